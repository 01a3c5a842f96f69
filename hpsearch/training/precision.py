"""Forward passes in bfloat16, for GPUs whose matrix units are fastest in it.

Weights, gradients, optimizer state, losses and metrics stay float32: only the operations that torch's autocast lists
(products of matrices, convolutions) run in bfloat16, inside forward() and the gradients that follow from it.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_AUTOCAST: dict[type[nn.Module], type[nn.Module]] = {}  # models of one class stay of one class


def in_bf16(model: nn.Module) -> nn.Module:
    """The same model, whose forward() runs under autocast and returns float32.

    It gets a class of its own rather than hooks or a wrapper around it: copies of it, `functional_call` and its
    state_dict work as ever. In `float32` it is what it was.
    """
    given = type(model)
    if given not in _AUTOCAST:
        _AUTOCAST[given] = _autocast_class(given)
    model.__class__ = _AUTOCAST[given]
    return model


def in_float32(model: nn.Module) -> nn.Module:
    """The model as the user's task gave it."""
    model.__class__ = getattr(type(model), "hpsearch_given_class", type(model))
    return model


def is_bf16(model: nn.Module) -> bool:
    """Whether the model's forward() runs under autocast."""
    return hasattr(type(model), "hpsearch_given_class")


def rounding(model: nn.Module) -> float:
    """By how much of itself a number is off at most, where the model's layers round it."""
    return float(torch.finfo(torch.bfloat16 if is_bf16(model) else torch.float32).eps) / 2


def _autocast_class(given: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = (tensor for tensor in chain(args, self.parameters()) if isinstance(tensor, Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        with torch.autocast(device, dtype=torch.bfloat16):
            output = given.forward(self, *args, **kwargs)
        return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output

    members = {
        "forward": forward,
        "hpsearch_given_class": given,
        "__module__": given.__module__,
        "__qualname__": given.__qualname__,
        "__doc__": given.__doc__,
    }
    return type(given.__name__, (given,), members)
