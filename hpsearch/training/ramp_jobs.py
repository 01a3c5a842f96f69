"""One seed of an LR range, or a probe at one learning rate: the network is trained for a moment and forgotten."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpsearch.job import ProbeJob, RampJob, Result
from hpsearch.lr_curve import ramp_lrs
from hpsearch.task import Task
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.loop import (
    augmentation,
    build_model,
    build_optimizer,
    checked_loss,
    read_settings,
    training_loss,
)
from hpsearch.training.ramp import ramp_losses
from hpsearch.training.seeding import seed_all, seeded
from hpsearch.training.user_code import user_code


def run_ramp(job: RampJob | ProbeJob, task: Task, data: StudyData, *, device: torch.device, shuffle: bool) -> Result:
    """Training losses of consecutive batches: a ramp's while the learning rate rises, a probe's at its config's own.

    Args:
        job: of a network that begins with the job's seed.
        task: the user's.
        data: of the study.
        device: where the network trains.
        shuffle: whether training rows come in another order each epoch.

    Raises:
        UserCodeError: the task raised, or a setting is out of range.
    """
    if isinstance(job, RampJob):
        # A task's own optimizer() or model() may read the rate: it is there, and the ramp scales it.
        config, reference = {**job.config, "lr": job.lr_min}, job.lr_min
        lrs = ramp_lrs(job.lr_min, job.lr_max, job.steps).tolist()
    else:
        # A reference equal to the rates leaves each group its own.
        config, reference, lrs = job.config, 1.0, [1.0] * job.steps
    n_train = data.n_rows("train")
    settings = read_settings(config, n_train=n_train)
    model = build_model(task, config, data, seed=job.seed, device=device)
    optimizer = build_optimizer(task, model, config)
    loss_of = training_loss(task, data.info.outputs, settings.label_smoothing)
    with seeded(epoch_seed(job.seed, 0, "ramp"), device), user_code("training"):
        losses = ramp_losses(
            model,
            optimizer,
            _endless_batches(task, data, settings.batch_size, job.seed, device=device, shuffle=shuffle),
            checked_loss(task, data, loss_of),
            lrs,
            reference=reference,
            grad_clip_norm=settings.grad_clip_norm,
        )
    epochs = len(losses) * settings.batch_size / n_train
    return Result(key=job.key, values={"losses": losses, "batch_size": settings.batch_size, "epochs": epochs})


def _endless_batches(
    task: Task, data: StudyData, batch_size: int, seed: int, *, device: torch.device, shuffle: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches of one epoch after another, seeded as a trial's epochs are."""
    epoch = 0
    while True:
        epoch += 1
        seed_all(epoch_seed(seed, epoch, "train"), device)
        yield from data.train_batches(
            batch_size=batch_size, seed=seed, epoch=epoch, shuffle=shuffle, augment=augmentation(task)
        )
