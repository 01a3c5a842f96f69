"""The rules of torch's optimizers for many lanes: what must agree, and what each step of each lane multiplies by.

A rule is applied to matrices with one row per lane. Everything that differs between lanes (rates, decays, betas, bias
corrections) is computed for a whole epoch beforehand, on the host and in float64 as torch.optim does it, and reaches
the step as one small table; so a step asks nothing of the host.

Array shapes: T steps of an epoch, L lanes, C coefficients of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.training.lanes.refusal import LanesRefused

FloatArray = NDArray[np.float64]
Kind = Literal["adam", "sgd", "rmsprop", "nadam"]

_KINDS: dict[type[torch.optim.Optimizer], Kind] = {
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
    torch.optim.SGD: "sgd",
    torch.optim.RMSprop: "rmsprop",
    torch.optim.NAdam: "nadam",
}
_FLAGS = ("amsgrad", "nesterov", "centered", "maximize")
_NADAM_DECAY = 0.96  # torch.optim.NAdam's own constant


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What of an optimizer decides which operations a step makes, and so must agree within a group of lanes."""

    kind: Kind
    decoupled: bool  # weight decay shrinks the weights, instead of joining the gradient
    amsgrad: bool
    nesterov: bool
    centered: bool
    maximize: bool

    @property
    def held(self) -> tuple[str, ...]:
        """Names of what the optimizer keeps for each weight, in torch's order."""
        match self.kind:
            case "adam":
                return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")
            case "sgd":
                return ("momentum_buffer",)
            case "rmsprop":
                return (
                    ("square_avg", "momentum_buffer", "grad_avg")
                    if self.centered
                    else (
                        "square_avg",
                        "momentum_buffer",
                    )
                )
            case "nadam":
                return ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where one lane's optimizer stands."""

    steps: int = 0
    mu_product: float = 1.0  # of nadam; a float32 in torch


def rule_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule:
    """The rule by which an optimizer steps one of its groups.

    Raises:
        LanesRefused: there is no fused rule for it.
    """
    kind = _KINDS.get(type(optimizer))
    name = type(optimizer).__name__
    if kind is None:
        known = ", ".join(cls.__name__ for cls in _KINDS)
        raise LanesRefused(f"the optimizer is a {name} (those that can be fused: {known})")
    if group.get("differentiable"):
        raise LanesRefused(f"the {name} is differentiable")
    decoupled = bool(group.get("decoupled_weight_decay", False)) or type(optimizer) is torch.optim.AdamW
    flags = {flag: bool(group.get(flag, False)) for flag in _FLAGS}
    return Rule(kind=kind, decoupled=decoupled, **flags)


def uses(rule: Rule, groups: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Which optional operations any of the lanes needs: "decay", "momentum"."""
    return frozenset(
        name
        for name, key in (("decay", "weight_decay"), ("momentum", "momentum"))
        if any(float(group.get(key, 0.0)) != 0 for group in groups)
    )


def held_by(rule: Rule, group: Mapping[str, Any]) -> tuple[str, ...]:
    """What torch would keep for a weight of this lane: a lane without momentum keeps no momentum buffer."""
    if rule.kind in ("sgd", "rmsprop") and float(group["momentum"]) == 0:
        return tuple(name for name in rule.held if name != "momentum_buffer")
    return rule.held


def coefficients(
    rule: Rule, groups: Sequence[Mapping[str, Any]], lrs_TL: FloatArray, progress: Sequence[Progress]
) -> tuple[FloatArray, list[Progress]]:
    """What each step of each lane multiplies by, (T, C, L), and where the lanes stand after the T steps.

    Args:
        groups: the parameter group of each lane; its `lr` is not read.
        lrs_TL: learning rates.
        progress: of each lane before the first step.
    """
    steps = len(lrs_TL)
    count_TL = np.arange(1, steps + 1)[:, None] + np.array([lane.steps for lane in progress])[None, :]
    mus = np.array([lane.mu_product for lane in progress])

    def of(key: str) -> FloatArray:
        return np.array([float(group[key]) for group in groups])

    rows: list[FloatArray]
    decay = of("weight_decay")
    decays = 1.0 - lrs_TL * decay if rule.decoupled else np.broadcast_to(decay, lrs_TL.shape)
    match rule.kind:
        case "adam":
            beta1, beta2 = _betas(groups)
            rows = [
                decays,
                1.0 - beta1,
                1.0 - beta2,
                1.0 / np.sqrt(1.0 - beta2**count_TL),
                of("eps"),
                -lrs_TL / (1.0 - beta1**count_TL),
            ]
        case "sgd":
            momentum = of("momentum")
            first = (count_TL == 1) | (momentum == 0)  # a first step takes the gradient whole, whatever the dampening
            rows = [
                decays,
                np.where(first, 0.0, momentum),
                np.where(first, 1.0, 1.0 - of("dampening")),
                momentum,
                -lrs_TL,
            ]
        case "rmsprop":
            alpha = of("alpha")
            rows = [decays, alpha, 1.0 - alpha, of("eps"), of("momentum"), -lrs_TL]
        case "nadam":
            beta1, beta2 = _betas(groups)
            momentum_decay = of("momentum_decay")
            mu = beta1 * (1.0 - 0.5 * _NADAM_DECAY ** (count_TL * momentum_decay))
            mu_next = beta1 * (1.0 - 0.5 * _NADAM_DECAY ** ((count_TL + 1) * momentum_decay))
            products = np.multiply.accumulate(  # in float32, as torch keeps it
                np.vstack([mus[None, :], mu]).astype(np.float32), axis=0
            )[1:].astype(np.float64)
            rows = [
                decays,
                1.0 - beta1,
                1.0 - beta2,
                1.0 / (1.0 - beta2**count_TL),
                of("eps"),
                -lrs_TL * (1.0 - mu) / (1.0 - products),
                -lrs_TL * mu_next / (1.0 - products * mu_next),
            ]
            mus = products[-1] if steps else mus
    table = np.stack([np.broadcast_to(row, lrs_TL.shape) for row in rows], axis=1)
    return table, [
        Progress(steps=lane.steps + steps, mu_product=float(mu)) for lane, mu in zip(progress, mus, strict=True)
    ]


def apply(
    rule: Rule, weights: Tensor, grad: Tensor, held: Mapping[str, Tensor], table: Tensor, needs: frozenset[str]
) -> None:
    """One step of all lanes, in place; the gradient is used up.

    Args:
        weights: (L, P), as `grad` and everything in `held`.
        table: this step's coefficients, (C, L, 1).
        needs: as from `uses`.
    """
    if rule.maximize:
        grad.neg_()
    decay, *rest = table.unbind(0)
    if "decay" in needs:
        if rule.decoupled:
            weights.mul_(decay)
        else:
            grad.addcmul_(weights, decay)
    match rule.kind:
        case "adam":
            one_minus_beta1, one_minus_beta2, root_correction, eps, rate = rest
            mean, square = held["exp_avg"], held["exp_avg_sq"]
            mean.lerp_(grad, one_minus_beta1)
            square.lerp_(grad.square_(), one_minus_beta2)
            if rule.amsgrad:
                torch.maximum(held["max_exp_avg_sq"], square, out=held["max_exp_avg_sq"])
                square = held["max_exp_avg_sq"]
            root = torch.sqrt(square, out=grad)
            torch.addcmul(eps, root, root_correction, out=root)
            weights.addcmul_(torch.div(mean, root, out=root), rate)
        case "sgd":
            keep, take, momentum, rate = rest
            if "momentum" in needs:
                buffer = held["momentum_buffer"].mul_(keep).addcmul_(grad, take)
                grad = grad.addcmul_(buffer, momentum) if rule.nesterov else buffer
            weights.addcmul_(grad, rate)
        case "rmsprop":
            alpha, one_minus_alpha, eps, momentum, rate = rest
            square = held["square_avg"].mul_(alpha).addcmul_(grad * one_minus_alpha, grad)
            if rule.centered:
                mean = held["grad_avg"].lerp_(grad, one_minus_alpha)
                root = square.addcmul(mean, mean, value=-1).sqrt_()
            else:
                root = square.sqrt()
            grad.div_(root.add_(eps))
            if "momentum" in needs:
                grad = held["momentum_buffer"].mul_(momentum).add_(grad)
            weights.addcmul_(grad, rate)
        case "nadam":
            one_minus_beta1, one_minus_beta2, correction, eps, grad_rate, mean_rate = rest
            mean = held["exp_avg"].lerp_(grad, one_minus_beta1)
            square = held["exp_avg_sq"].lerp_(grad.square(), one_minus_beta2)
            root = (square * correction).sqrt_().add_(eps)
            weights.addcdiv_(grad.mul_(grad_rate).addcmul_(mean, mean_rate), root)


def _betas(groups: Sequence[Mapping[str, Any]]) -> tuple[FloatArray, FloatArray]:
    return (
        np.array([float(group["betas"][0]) for group in groups]),
        np.array([float(group["betas"][1]) for group in groups]),
    )
