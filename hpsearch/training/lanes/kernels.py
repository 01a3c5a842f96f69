"""Torch's own one-pass optimizer kernels, lane by lane: how Adam, AdamW and SGD are stepped on a CPU.

On a CPU an optimizer waits for memory: the rule of Adam written out takes eight passes over all weights, torch's
kernel one. A lane is one row and thus one call, some microseconds beside the pass. On a GPU it would be one launch per
lane, so there the rules are written out over all lanes at once (`rules.apply`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpsearch.training.lanes.rules import FloatArray, Progress, Rule

StepLane = Callable[[int], None]


def has_kernel(rule: Rule, weights: Tensor) -> bool:
    """Whether torch has a kernel for this rule and these weights."""
    names = {"adam": ("_fused_adam_", "_fused_adamw_"), "sgd": ("_fused_sgd_",)}.get(rule.kind, ())
    return weights.device.type == "cpu" and bool(names) and all(hasattr(torch, name) for name in names)


def lane_steps(
    rule: Rule,
    groups: Sequence[Mapping[str, Any]],
    lrs_TL: FloatArray,
    progress: Sequence[Progress],
    *,
    weights: Tensor,
    grad: Tensor,
    held: Mapping[str, Tensor],
) -> list[StepLane]:
    """For each lane what makes its step t of an epoch, in place.

    Args:
        groups: the parameter group of each lane; its `lr` is not read.
        lrs_TL: learning rates, (T, L).
        progress: of each lane before the first step.
        weights: (L, P), as `grad` and everything in `held`.
    """
    make = _adam if rule.kind == "adam" else _sgd
    return [
        make(
            rule,
            group,
            lrs_TL[:, lane].tolist(),
            progress[lane].steps,
            [weights[lane]],
            [grad[lane]],
            {name: [values[lane]] for name, values in held.items()},
        )
        for lane, group in enumerate(groups)
    ]


def _adam(
    rule: Rule,
    group: Mapping[str, Any],
    lrs: list[float],
    steps: int,
    weights: list[Tensor],
    grad: list[Tensor],
    held: dict[str, list[Tensor]],
) -> StepLane:
    kernel = torch._fused_adamw_ if rule.decoupled else torch._fused_adam_
    beta1, beta2 = (float(beta) for beta in group["betas"])
    decay, eps = float(group["weight_decay"]), float(group["eps"])
    mean, square, largest = held["exp_avg"], held["exp_avg_sq"], held.get("max_exp_avg_sq", [])
    count = torch.tensor(float(steps))
    counts = [count]

    def step(t: int) -> None:
        count.add_(1)
        kernel(
            weights,
            grad,
            mean,
            square,
            largest,
            counts,
            lr=lrs[t],
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=rule.amsgrad,
            maximize=rule.maximize,
        )

    return step


def _sgd(
    rule: Rule,
    group: Mapping[str, Any],
    lrs: list[float],
    steps: int,
    weights: list[Tensor],
    grad: list[Tensor],
    held: dict[str, list[Tensor]],
) -> StepLane:
    decay, momentum, dampening = (float(group[key]) for key in ("weight_decay", "momentum", "dampening"))
    buffers = held["momentum_buffer"] if momentum else []

    def step(t: int) -> None:
        torch._fused_sgd_(
            weights,
            grad,
            buffers,
            weight_decay=decay,
            momentum=momentum,
            lr=lrs[t],
            dampening=dampening,
            nesterov=rule.nesterov and momentum != 0,
            maximize=rule.maximize,
            is_first_step=momentum != 0 and steps + t == 0,
        )

    return step
