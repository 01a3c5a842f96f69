"""Ramps of the learning rate, several at once: the seeds of an LR range whose models are alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hpsearch.training.data import batch_bounds
from hpsearch.training.lanes.dropout import Drawn, Masks
from hpsearch.training.lanes.epochs import epoch_masks, fused, refusing
from hpsearch.training.lanes.feed import lane_batches
from hpsearch.training.lanes.forward import Forward, Route
from hpsearch.training.lanes.stack import Stack
from hpsearch.training.lanes.step import Step
from hpsearch.training.loop import DefaultTraining

LOOK_EVERY_STEPS = 16  # at whether any ramp still runs; it costs a wait for the device


def fused_ramps(
    trainings: Sequence[DefaultTraining], route: Route, lrs: Sequence[float], *, reference: float | None
) -> list[list[float]]:
    """Training losses of each lane's consecutive batches, each taken at its learning rate: `ramp_losses` of them all.

    Loss i is that of batch i before the step at lrs[i]; batches are those of epoch after epoch, in the trial's order
    and with its dropout masks. A ramp ends at its first loss that is not finite, which is not included; the others go
    on.
    The trainings, and all global random state, are left as they were.

    Args:
        trainings: at their start, alike as `can_fuse` has it; each seeded as its ramp is.
        route: as found by `find_route` for them.
        lrs: one per step.
        reference: the learning rate that the optimizers were made for; each group's own is multiplied by
            lr / reference. None: all groups get lr itself.

    Raises:
        UserCodeError: augment or a Dataset raised.
        LanesRefused: it could not be run in lanes after all; each alone it can.
    """
    stack = Stack(trainings, idle=route.idle)
    forward = Forward(trainings[0], stack, route)
    step = Step(stack, forward)
    rates = []
    for number in range(len(trainings[0].optimizer.param_groups)):
        own = np.array([float(training.optimizer.param_groups[number]["lr"]) for training in trainings])
        scale = np.ones_like(own) if reference is None else own / reference
        rates.append(np.asarray(lrs, dtype=np.float64)[:, None] * scale[None, :])
    losses: list[Tensor] = []
    with refusing(), fused(trainings):
        stack.begin_epoch([training.optimizer for training in trainings], rates)
        step.begin_epoch(
            [training.settings.grad_clip_norm for training in trainings],
            [training.settings.label_smoothing for training in trainings],
        )
        for t, (inputs, target, masks, in_row) in zip(range(len(lrs)), _endless(trainings), strict=False):
            plan: tuple[Drawn, ...] = forward.plan(inputs)
            losses.append(step(t, inputs, target, masks.draw(plan, in_row) if plan else [], plan))
            if (t + 1) % LOOK_EVERY_STEPS == 0 and not bool(losses[-1].isfinite().any()):
                break
    found = torch.stack(losses).tolist() if losses else []
    return [_until_not_finite([row[lane] for row in found]) for lane in range(len(trainings))]


def _endless(trainings: Sequence[DefaultTraining]) -> Iterator[tuple[Tensor, Tensor, Masks, int]]:
    """Batches of one epoch after another, with the epoch's masks, and how many batches of this size are to come."""
    first = trainings[0]
    sizes = [end - start for start, end in batch_bounds(first.data.n_rows("train"), first.settings.batch_size)]
    epoch = 0
    while True:
        epoch += 1
        epochs = [epoch] * len(trainings)
        masks = epoch_masks(trainings, epochs)
        for t, (inputs, target) in enumerate(lane_batches(trainings, epochs)):
            yield inputs, target, masks, sizes[t:].count(sizes[t])


def _until_not_finite(losses: Sequence[float]) -> list[float]:
    ends = next((t for t, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    return list(losses[:ends])
