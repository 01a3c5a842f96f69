"""The default training loop: one trial, one epoch at a time.

An epoch is a function of the weights and optimizer state before it and of (trial seed, epoch): data order, augmentation
and dropout are seeded from these alone. So a trial that stops at any epoch and goes on elsewhere is the same trial.

Small networks take well under a millisecond a step, so a step does nothing but what training needs: settings are read
once, losses stay on the device until the epoch ends, and only then is it asked whether they were finite.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import Config, EpochMetrics, Outputs
from hpsearch.task import Task
from hpsearch.training.checkpoint import Checkpoint, capture, load_optimizer, load_weights
from hpsearch.training.data import StudyData, check_output, epoch_seed
from hpsearch.training.measure import evaluate
from hpsearch.training.optim import config_number
from hpsearch.training.precision import in_bf16
from hpsearch.training.ramp import set_lr
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import frame_of, user_code

DEFAULT_BATCH_SIZE = 64
_LOSSES_HELD = 4096  # losses of single batches kept before they are added up


class Training(Protocol):
    """A trial in training: by the default loop, or by the task's own."""

    model: nn.Module
    epoch: int

    def train_epoch(self) -> EpochMetrics:
        """Trains one epoch more, and tells what it gave.

        Raises:
            TrialDiverged: a loss or metric is not finite.
            UserCodeError: the user's code raised.
        """

    def checkpoint(self, *, weights_only: bool = False, copy: bool = False) -> Checkpoint:
        """The trial as it is; without `copy` it shares the model's memory."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The keys of a config that the default loop understands, besides the optimizer's."""

    batch_size: int  # at most the rows of train
    grad_clip_norm: float | None  # largest L2 norm of all gradients together
    label_smoothing: float  # within [0, 1)
    warmup_epochs: float  # lr rises in a straight line to its value, step by step; may be a fraction of an epoch


def read_settings(config: Config, *, n_train: int) -> LoopSettings:
    """The loop's settings in a config; other keys are not looked at.

    Raises:
        UserCodeError: a value is no number, or out of range.
    """
    batch_size = config_number(config, "batch_size", default=DEFAULT_BATCH_SIZE, low=1)
    if batch_size != int(batch_size):
        raise UserCodeError(f"batch_size is {batch_size!r}, not a whole number", hint="mend `batch_size` in space.yaml")
    clip = None
    if config.get("grad_clip_norm") is not None:
        clip = config_number(config, "grad_clip_norm", default=1.0, low=0.0)
        if clip == 0:
            raise UserCodeError("grad_clip_norm is 0, which stops all training", hint="null means no clipping")
    return LoopSettings(
        batch_size=min(int(batch_size), n_train),
        grad_clip_norm=clip,
        label_smoothing=config_number(config, "label_smoothing", default=0.0, low=0.0, high=1.0),
        warmup_epochs=config_number(config, "warmup_epochs", default=0.0, low=0.0),
    )


def build_model(task: Task, config: Config, data: StudyData, *, seed: int, device: torch.device) -> nn.Module:
    """The task's model for a config, on the device, with the initial weights of this seed.

    Raises:
        UserCodeError: model() raised, or gave something else.
    """
    with seeded(epoch_seed(seed, 0, "init"), device), user_code("model()"):
        model = task.model(copy.deepcopy(config))
        if not isinstance(model, nn.Module):
            raise UserCodeError(
                f"model() returned a {type(model).__name__}, not a torch.nn.Module", frame=frame_of(type(task).model)
            )
        model = model.to(device)
        if any(isinstance(param, nn.UninitializedParameter) for param in model.parameters()):
            inputs, _ = next(data.batches("val", batch_size=2))  # lazy layers take their shape from a first batch
            with torch.no_grad():
                model.eval()(inputs)
    return in_bf16(model) if task.precision == "bf16" else model


def build_optimizer(task: Task, model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The task's optimizer for a model.

    Raises:
        UserCodeError: optimizer() raised, or gave something else.
    """
    with user_code("optimizer()"):
        optimizer = task.optimizer(model.parameters(), copy.deepcopy(config))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserCodeError(
            f"optimizer() returned a {type(optimizer).__name__}, not a torch.optim.Optimizer",
            frame=frame_of(type(task).optimizer),
        )
    return optimizer


def training_loss(task: Task, outputs: Outputs, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that is trained on. Smoothed labels are for the default cross-entropy; a task's own loss stays as it is.

    Raises:
        UserCodeError: labels are to be smoothed where the default loss has none to smooth.
    """
    if type(task).loss is not Task.loss:
        return task.loss
    if outputs == "logits":
        return partial(F.cross_entropy, label_smoothing=label_smoothing) if label_smoothing else F.cross_entropy
    if label_smoothing:
        raise UserCodeError(
            f"label_smoothing is {label_smoothing:g}, but the loss is not cross-entropy over classes",
            hint="take label_smoothing out of space.yaml, or write Task.loss",
        )
    if outputs == "binary_logits":
        return lambda output, target: F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
    return lambda output, target: F.mse_loss(output, target.to(output.dtype))


def augmentation(task: Task) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """The task's `augment`, or None when it has none of its own."""
    return None if type(task).augment is Task.augment else task.augment


class DefaultTraining:
    """A trial trained by the default loop."""

    def __init__(
        self,
        task: Task,
        data: StudyData,
        config: Config,
        *,
        trial: int,
        seed: int,
        device: torch.device,
        shuffle: bool = True,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """A trial at its start, or at a checkpoint.

        Raises:
            UserCodeError: the task raised, a setting is out of range, or the checkpoint does not fit.
        """
        self.task = task
        self.data = data
        self.config = config
        self.trial = trial
        self.seed = seed
        self.device = device
        self.shuffle = shuffle
        self.augment = augmentation(task)
        self.settings = read_settings(config, n_train=data.n_rows("train"))
        self._loss = training_loss(task, data.info.outputs, self.settings.label_smoothing)
        self.model = build_model(task, config, data, seed=seed, device=device)
        self.optimizer = build_optimizer(task, self.model, config)
        self.epoch = 0
        self._checked = False  # whether the model's output was found to fit the targets
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
            if checkpoint.optimizer is not None:
                load_optimizer(self.optimizer, checkpoint.optimizer)
            self.epoch = checkpoint.epoch

    def train_epoch(self) -> EpochMetrics:
        start = time.perf_counter()
        epoch = self.epoch + 1
        with seeded(epoch_seed(self.seed, epoch, "train"), self.device):
            metrics = {"train_loss": self._train(epoch)}
            require_finite(metrics)
            metrics |= {f"val_{k}": v for k, v in evaluate(self.model, self.task, self.data, "val").items()}
            require_finite(metrics)
        self.epoch = epoch
        return EpochMetrics(epoch=epoch, metrics=metrics, seconds=time.perf_counter() - start)

    def checkpoint(self, *, weights_only: bool = False, copy: bool = False) -> Checkpoint:
        return capture(
            self.model,
            trial=self.trial,
            seed=self.seed,
            epoch=self.epoch,
            config=self.config,
            optimizer=None if weights_only else self.optimizer,
            copy=copy,
        )

    def _train(self, epoch: int) -> float:
        """Mean training loss over the rows of an epoch, each batch's taken before its step."""
        model, optimizer, loss_of = self.model, self.optimizer, self._loss
        clip = self.settings.grad_clip_norm
        step = optimizer.step
        trained = _trained(model, optimizer)
        model.train()
        losses = _LossSum()
        add_loss = losses.add
        n_steps = self.data.n_train_batches(self.settings.batch_size)
        warm_steps = round(self.settings.warmup_epochs * n_steps)
        warm_up = _warm_up(optimizer, first_step=(epoch - 1) * n_steps, warm_steps=warm_steps)
        with user_code("training"), warm_up as set_warm_lr:
            for inputs, target in self.data.train_batches(
                batch_size=self.settings.batch_size,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                augment=self.augment,
            ):
                for param in trained:
                    param.grad = None
                output = model(inputs)
                if self._checked:
                    loss = loss_of(output, target)
                else:
                    loss = self._checked_loss(output, target)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(trained, clip)
                if set_warm_lr is not None:
                    set_warm_lr()
                step()
                add_loss(loss.detach(), len(target))
        return losses.mean()

    def _checked_loss(self, output: object, target: Tensor) -> Tensor:
        """The loss of a first batch, once the output fits the targets and the loss can be trained on."""
        loss = checked_loss(self.task, self.data, self._loss)(output, target)
        self._checked = True
        return loss


def checked_loss(
    task: Task, data: StudyData, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[object, Tensor], Tensor]:
    """A loss that refuses outputs that do not fit the targets, and a loss of the user's that is not one number."""
    own_loss = type(task).loss is not Task.loss
    frame = frame_of(type(task).loss) if own_loss else ""

    def checked(output: object, target: Tensor) -> Tensor:
        check_output(output, target, data.info.outputs, n_classes=data.info.n_classes, own_loss=own_loss)
        assert isinstance(output, Tensor)
        loss = loss_of(output, target)
        if not isinstance(loss, Tensor):
            raise UserCodeError(f"loss() returned a {type(loss).__name__}, not a tensor", frame=frame)
        if loss.numel() != 1:
            raise UserCodeError(
                f"loss() returned shape {tuple(loss.shape)}, not one number",
                frame=frame,
                hint="take the mean over rows",
            )
        if not loss.requires_grad:
            raise UserCodeError(
                "the loss does not depend on the model's parameters, so there is nothing to train",
                frame=frame,
                hint="does loss() or forward() detach the output, or turn gradients off?",
            )
        return loss

    return checked


def require_finite(metrics: dict[str, float]) -> None:
    """Raises TrialDiverged, as in "val_loss is nan", for the first metric that is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrialDiverged(f"{name} is {value}")


class _LossSum:
    """Sum of losses that stays on the device until it is asked for."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._sums: list[Tensor] = []
        self._n_rows = 0

    def add(self, loss: Tensor, n_rows: int) -> None:
        self._losses.append(loss)
        self._sizes.append(n_rows)
        if len(self._losses) == _LOSSES_HELD:
            self._fold()

    def mean(self) -> float:
        """Mean over rows; not finite when any of the losses was not."""
        self._fold()
        return float(torch.stack(self._sums).sum()) / self._n_rows

    def _fold(self) -> None:
        if not self._losses:
            return
        losses = torch.stack(self._losses).reshape(-1)
        exact = torch.float32 if losses.device.type == "mps" else torch.float64  # mps has no float64
        sizes = torch.tensor(self._sizes, dtype=exact, device=losses.device)
        self._sums.append(losses.to(exact).dot(sizes))
        self._n_rows += sum(self._sizes)
        self._losses, self._sizes = [], []


@contextmanager
def _warm_up(
    optimizer: torch.optim.Optimizer, *, first_step: int, warm_steps: int
) -> Iterator[Callable[[], None] | None]:
    """What to call before each step of an epoch that begins while the learning rate rises; else None.

    Each group's own learning rate is multiplied, and stands again at the end, so it is what a checkpoint holds.

    Args:
        first_step: steps of the trial before this epoch.
        warm_steps: the step, counted from 1, that first takes the whole learning rate.
    """
    if first_step >= warm_steps:
        yield None
        return
    groups = optimizer.param_groups
    rates = [float(group["lr"]) for group in groups]
    step = first_step

    def set_next_lr() -> None:
        nonlocal step
        step += 1
        if step <= warm_steps:
            for group, rate in zip(groups, rates, strict=True):
                set_lr(group, rate * (step / warm_steps))

    try:
        yield set_next_lr
    finally:
        for group, rate in zip(groups, rates, strict=True):
            set_lr(group, rate)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters whose gradients a step fills or uses, each once."""
    params = [*model.parameters(), *(param for group in optimizer.param_groups for param in group["params"])]
    return list({id(param): param for param in params if param.requires_grad}.values())
