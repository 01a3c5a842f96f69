"""Optimizers by the name that a space gives them.

A task that wants another optimizer, or groups of parameters with their own settings, overrides `Task.optimizer`; this
is only its default. The learning rate is set once: who changes it during training (warm-up, an LR ramp) multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config

DEFAULT_LR = 1e-3
DEFAULT_MOMENTUM = 0.9  # of sgd; rmsprop's is 0, as in torch

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "nadam")

# One kernel per step instead of one per tensor and operation. An MLP of 64-128-128-10 at batch 64, one thread of a busy
# 2-core CPU, whole steps: sgd 500 us against 710, adam 465 against 675, adamw 460 against 780; runs repeat to the bit.
# torch 2.13 has no fused kernel for the other two.
_FUSED = frozenset({"adamw", "adam", "sgd"})
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def make_optimizer(params: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimizer that a config names, over all of `params`.

    Reads `optimizer` (adamw unless given), `lr` (1e-3), `weight_decay` (0), and `momentum`, which is that of sgd (0.9)
    and rmsprop (0); the adams keep torch's betas. Everything else is torch's default. `weight_decay` is decoupled in
    adamw alone, as in torch: elsewhere it is added to the gradient.

    Args:
        params: the parameters to train; those that need no gradient are left out.
        config: of the trial; other keys are not looked at.

    Raises:
        UserCodeError: an unknown name, a number out of range, or nothing to train.
    """
    name = config.get("optimizer")
    name = "adamw" if name is None else name
    if name not in OPTIMIZERS:
        raise UserCodeError(
            f"optimizer is {name!r}, which is not known (known: {', '.join(OPTIMIZERS)})",
            hint="for any other, write Task.optimizer(params, config)",
        )
    trained = [param for param in params if param.requires_grad]
    if not trained:
        raise UserCodeError("the model has no parameters to train", hint="does model() register them as nn.Parameter?")
    lr = config_number(config, "lr", default=DEFAULT_LR, low=0.0)
    weight_decay = config_number(config, "weight_decay", default=0.0, low=0.0)
    fused = name in _FUSED and all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in trained)
    match name:
        case "adamw":
            return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused)
        case "adam":
            return torch.optim.Adam(trained, lr=lr, weight_decay=weight_decay, fused=fused)
        case "sgd":
            momentum = config_number(config, "momentum", default=DEFAULT_MOMENTUM, low=0.0)
            return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
        case "rmsprop":
            momentum = config_number(config, "momentum", default=0.0, low=0.0)
            return torch.optim.RMSprop(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
        case _:
            return torch.optim.NAdam(trained, lr=lr, weight_decay=weight_decay)


def config_number(config: Config, key: str, *, default: float, low: float, high: float = math.inf) -> float:
    """A config's number within [low, high), or the default where the key is absent or None.

    Raises:
        UserCodeError: it is no finite number, or out of range.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserCodeError(f"{key} is {value!r}, where a number is needed", hint=f"mend `{key}` in space.yaml")
    if not low <= value < high:
        wanted = f"at least {low:g}" if math.isinf(high) else f"within [{low:g}, {high:g})"
        raise UserCodeError(f"{key} is {value!r}; it must be {wanted}", hint=f"mend `{key}` in space.yaml")
    return float(value)
