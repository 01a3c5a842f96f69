"""The shorter ways through vmap give what vmap gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.training.lanes import batching
from hpsearch.training.lanes.batching import LaneLinear, over_lanes, shorten
from tests.test_lanes import VARIED, Cnn, assert_equivalent, networks, task


def layer() -> LaneLinear:
    made = nn.Linear(3, 2)
    shorten(made)
    assert type(made) is LaneLinear
    return made


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6, 5, 3), (4, 3)], ids=["rows", "sequences", "one"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 2, 1), (None, 0, 0), (0, None, None), (0, 0, None)])
def test_a_linear_layer_sees_all_lanes_wherever_their_dimension_is(shape: tuple[int, ...], in_dims: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    lanes = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (4, 2, 3), (4, 2))]
    given = [
        lane[0] if place is None else lane.movedim(0, place).contiguous()
        for lane, place in zip(lanes, in_dims, strict=True)
    ]
    for tensor in given:
        tensor.requires_grad_()
    module = layer()

    def shortened(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module._parameters["weight"], module._parameters["bias"] = weight, bias  # type: ignore[assignment]
        return module(x)

    found = torch.vmap(shortened, in_dims)(*given)
    wanted = torch.vmap(F.linear, in_dims)(*given)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum(), given)
    for gradient, other in zip(mine, torch.autograd.grad((wanted * weights).sum(), given), strict=True):
        torch.testing.assert_close(gradient, other)


def test_outside_of_lanes_it_is_the_layer_that_it_was() -> None:
    module, x = layer(), torch.randn(5, 3)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))


def test_what_does_not_depend_on_the_lane_is_given_for_every_lane() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    output, others = over_lanes(lambda given: (given[0].sum(), [torch.ones(2)]), [x], randomness="different")
    assert output.tolist() == [3.0, 12.0]
    assert others[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_without_these_parts_of_torch_lanes_train_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SHORT", False)
    assert_equivalent(task(Cnn, networks.images), VARIED[:2], epochs=2)
