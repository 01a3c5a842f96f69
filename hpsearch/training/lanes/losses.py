"""The training loss of many lanes at once, each with its own label smoothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hpsearch.job import Outputs
from hpsearch.task import Task

LaneLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (output, target, smoothing) -> loss


def loss_of_lane(task: Task, outputs: Outputs, *, smoothed: bool) -> LaneLoss:
    """One lane's loss, a scalar, written so that `vmap` can run it."""
    if type(task).loss is not Task.loss:
        return lambda output, target, _: task.loss(output, target)
    match outputs:
        case "logits" if smoothed:
            return _smoothed_cross_entropy
        case "logits":
            return lambda output, target, _: F.cross_entropy(output, target)
        case "binary_logits":
            return lambda output, target, _: F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
        case "values":
            return lambda output, target, _: F.mse_loss(output, target.to(output.dtype))


def loss_of_lanes(task: Task, outputs: Outputs, *, smoothed: bool) -> LaneLoss:
    """All lanes' losses, (L,), of outputs (L, B, …), targets (L, B, …) and smoothing (L,).

    The default losses are written out over all lanes, which saves the dispatches of `vmap`.
    """
    if type(task).loss is not Task.loss:
        return torch.vmap(loss_of_lane(task, outputs, smoothed=smoothed), randomness="different")
    match outputs:
        case "logits" if smoothed:
            return _smoothed_cross_entropies
        case "logits":
            return _cross_entropies
        case "binary_logits":
            return partial(_means, F.binary_cross_entropy_with_logits)
        case "values":
            return partial(_means, F.mse_loss)


def _smoothed_cross_entropy(output: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
    log_probs = output.log_softmax(dim=1)
    return (1 - smoothing) * F.nll_loss(log_probs, target) - _share(smoothing, log_probs.mean())


def _smoothed_cross_entropies(output: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
    log_probs = output.log_softmax(dim=2)
    hard = F.nll_loss(log_probs.flatten(0, 1), target.flatten(0, 1), reduction="none").view(len(output), -1).mean(1)
    return (1 - smoothing) * hard - _share(smoothing, log_probs.flatten(1).mean(1))


def _share(smoothing: Tensor, mean: Tensor) -> Tensor:
    """What the mean adds; nothing where nothing is smoothed, also when a class is impossible and the mean infinite."""
    return torch.where(smoothing > 0, smoothing * mean, 0.0)


def _cross_entropies(output: Tensor, target: Tensor, _: Tensor) -> Tensor:
    each = F.cross_entropy(output.flatten(0, 1), target.flatten(0, 1), reduction="none")
    return each.view(len(output), -1).mean(1)


def _means(loss: Callable[..., Tensor], output: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return loss(output, target.to(output.dtype), reduction="none").flatten(1).mean(1)
