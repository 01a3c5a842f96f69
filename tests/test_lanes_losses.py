"""Losses of many lanes at once are each lane's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hpsearch.task import Task
from hpsearch.training.lanes.losses import loss_of_lane, loss_of_lanes


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def labels(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("smoothing", [(0.0, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize(
    ("outputs", "output", "target", "plain"),
    [
        ("logits", drawn(2, 6, 4), labels(4, 2, 6), F.cross_entropy),
        ("logits", drawn(2, 6, 4, 3, 2), labels(4, 2, 6, 3, 2), F.cross_entropy),
        (
            "binary_logits",
            drawn(2, 6, 3),
            labels(2, 2, 6, 3),
            lambda o, t, **_: F.binary_cross_entropy_with_logits(o, t.float()),
        ),
        ("values", drawn(2, 6, 1), drawn(2, 6, 1).double() + 1, lambda o, t, **_: F.mse_loss(o, t.float())),
    ],
    ids=["classes", "pixels", "binary", "values"],
)
def test_each_lanes_loss_is_the_loss_of_it_alone(
    outputs: Any, output: Tensor, target: Tensor, plain: Any, smoothing: tuple[float, float]
) -> None:
    smoothed = any(smoothing)
    wanted = torch.stack([plain(output[i], target[i], label_smoothing=smoothing[i]) for i in range(2)])
    given = torch.tensor(smoothing)
    torch.testing.assert_close(loss_of_lanes(Task(), outputs, smoothed=smoothed)(output, target, given), wanted)
    of_lane = torch.vmap(loss_of_lane(Task(), outputs, smoothed=smoothed))
    torch.testing.assert_close(of_lane(output, target, given), wanted)


def test_an_impossible_class_is_no_matter_to_a_lane_without_smoothing() -> None:
    output = drawn(2, 6, 4).requires_grad_()
    masked = output.masked_fill(torch.tensor([False, False, False, True]), -math.inf)
    target, smoothing = labels(3, 2, 6), torch.tensor([0.0, 0.1])
    for losses in (
        loss_of_lanes(Task(), "logits", smoothed=True),
        torch.vmap(loss_of_lane(Task(), "logits", smoothed=True)),
    ):
        found = losses(masked, target, smoothing)
        plain = F.cross_entropy(masked[0], target[0])
        torch.testing.assert_close(found[0], plain)
        assert found[1].isinf()  # as alone
        (grad,) = torch.autograd.grad(found[0], output, retain_graph=True)
        (wanted,) = torch.autograd.grad(plain, output, retain_graph=True)
        torch.testing.assert_close(grad, wanted)
