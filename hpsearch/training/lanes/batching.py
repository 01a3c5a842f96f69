"""`torch.vmap` over a list of tensors, and a linear layer in one batched product: shorter ways to the same numbers.

For small networks a step is mostly dispatch. `torch.vmap` flattens and rebuilds nested arguments, 60 us a call; under
it a linear layer is a product, an addition and four views, 85 us more than `baddbmm` with its backward. These are the
parts of torch that `torch.vmap` is itself made of; where a version of torch has them under other names, `torch.vmap` is
called, and layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from torch._C import _functorch
    from torch._functorch import vmap as _vmap

    _add, _remove, _nested = _functorch._add_batch_dim, _vmap._maybe_remove_batch_dim, _vmap.vmap_increment_nesting
    _is_batched, _level_of = _functorch.is_batchedtensor, _functorch.maybe_get_level
    _place_of, _inner = _functorch.maybe_get_bdim, _functorch.get_unwrapped
    _load_rules: Callable[[], None] = vars(_vmap)["lazy_load_decompositions"]
    SHORT = True
except (ImportError, AttributeError, KeyError):
    SHORT = False

Randomness = Literal["different", "same"]


def over_lanes(
    function: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    tensors: Sequence[Tensor],
    *,
    randomness: Randomness,
) -> tuple[Tensor, list[Tensor]]:
    """What a function of one lane's tensors gives, for all lanes, along dimension 0 as they are in `tensors`."""
    if not SHORT:
        output, others = torch.vmap(function, randomness=randomness)(list(tensors))
        return output, list(others)
    n_lanes = len(tensors[0])
    _load_rules()
    with _nested(n_lanes, randomness) as level:
        output, others = function([_add(tensor, 0, level) for tensor in tensors])
        given = [_remove("forward", each, level, n_lanes, 0) for each in (output, *others)]
    return given[0], given[1:]


class LaneLinear(nn.Linear):
    """A linear layer that does all lanes in one product where it sees them."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if bias is None or x.ndim < 2 or not (_is_batched(x) and _is_batched(weight) and _is_batched(bias)):
            return F.linear(x, weight, bias)
        level = _level_of(weight)
        if _level_of(x) != level or _level_of(bias) != level:
            return F.linear(x, weight, bias)
        x_all, w_all, b_all = (
            _inner(tensor) if _place_of(tensor) == 0 else _inner(tensor).movedim(_place_of(tensor), 0)
            for tensor in (x, weight, bias)
        )
        if x_all.ndim == 3:
            return _add(torch.baddbmm(b_all.unsqueeze(1), x_all, w_all.transpose(1, 2)), 0, level)
        output = torch.baddbmm(b_all.unsqueeze(1), x_all.flatten(1, -2), w_all.transpose(1, 2))
        return _add(output.unflatten(1, x_all.shape[1:-1]), 0, level)


def shorten(model: nn.Module) -> None:
    """Makes the linear layers of a model, which is one's own copy, into ones that see all lanes."""
    for module in model.modules():
        if SHORT and type(module) is nn.Linear:
            module.__class__ = LaneLinear
