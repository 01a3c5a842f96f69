"""The optimizers' rules over lanes give what torch.optim gives, each lane with its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpsearch.training.lanes.kernels import has_kernel, lane_steps
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.rules import Progress, apply, coefficients, rule_of, uses
from hpsearch.training.lanes.step import clip_lanes

STEPS = 6
Make = Callable[..., torch.optim.Optimizer]

ADAM = ({"lr": 0.01}, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1})
SGD = ({"lr": 0.1}, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3})
NESTEROV = ({"lr": 0.1, "momentum": 0.5, "nesterov": True}, {"lr": 0.02, "momentum": 0.9, "nesterov": True})
RMSPROP = ({"lr": 0.01}, {"lr": 0.03, "alpha": 0.7, "eps": 1e-3, "momentum": 0.8, "weight_decay": 0.1})
NADAM = ({"lr": 0.01}, {"lr": 0.03, "betas": (0.6, 0.9), "momentum_decay": 0.1, "weight_decay": 0.1})
CASES: list[tuple[Make, tuple[dict[str, Any], dict[str, Any]], dict[str, Any]]] = [
    (torch.optim.Adam, ADAM, {}),
    (torch.optim.Adam, ADAM, {"amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, ADAM, {}),
    (torch.optim.AdamW, ADAM, {"amsgrad": True}),
    (torch.optim.SGD, SGD, {}),
    (torch.optim.SGD, SGD, {"maximize": True}),
    (torch.optim.SGD, NESTEROV, {}),
    (torch.optim.RMSprop, RMSPROP, {}),
    (torch.optim.RMSprop, RMSPROP, {"centered": True, "maximize": True}),
    (torch.optim.NAdam, NADAM, {}),
    (torch.optim.NAdam, NADAM, {"decoupled_weight_decay": True, "maximize": True}),
]


def gradients(dtype: torch.dtype) -> Tensor:
    return torch.randn(STEPS, 2, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))


WAYS = [("written-out", *case) for case in CASES] + [("kernels", *case) for case in CASES[:7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("way", "make", "lanes", "flags"),
    WAYS,
    ids=["-".join((make.__name__, *flags, way)) for way, make, _, flags in WAYS],
)
def test_lanes_step_as_torchs_optimizers_do(
    way: str, make: Make, lanes: tuple[dict[str, Any], ...], flags: dict[str, Any], dtype: torch.dtype
) -> None:
    start = torch.randn(2, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(row.clone()) for row in start]
    optimizers = [make([param], **lane, **flags) for param, lane in zip(params, lanes, strict=True)]
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    rule = rule_of(optimizers[0], groups[0])
    assert rule == rule_of(optimizers[1], groups[1])
    weights, grad = start.clone(), torch.zeros_like(start)
    assert has_kernel(rule, weights) == (make not in (torch.optim.RMSprop, torch.optim.NAdam))
    held = {name: torch.zeros_like(start) for name in rule.held}
    progress = [Progress(), Progress()]
    for epoch in range(2):  # in two halves, as an epoch after another
        half = gradients(dtype)[epoch * 3 : epoch * 3 + 3]
        lrs_TL = np.array([[float(group["lr"]) * (t + 1) for group in groups] for t in range(3)])
        table, after = coefficients(rule, groups, lrs_TL, progress)
        steppers = []
        if way == "kernels":
            steppers = lane_steps(rule, groups, lrs_TL, progress, weights=weights, grad=grad, held=held)
        rates = [float(group["lr"]) for group in groups]
        for t, given in enumerate(half):
            grad.copy_(given)
            for lane, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
                param.grad = given[lane].clone()
                optimizer.param_groups[0]["lr"] = lrs_TL[t, lane]
                optimizer.step()
            if steppers:
                for step in steppers:
                    step(t)
            else:
                apply(rule, weights, grad, held, torch.from_numpy(table[t]).to(dtype).unsqueeze(-1), uses(rule, groups))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        progress = after
    close = 1e-6 if dtype == torch.float32 else 1e-12
    for lane, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
        torch.testing.assert_close(weights[lane], param.detach(), rtol=close, atol=close)
        for name, value in optimizer.state[param].items():
            if name in held:
                torch.testing.assert_close(held[name][lane], value, rtol=close, atol=close)
        if "mu_product" in optimizer.state[param]:
            assert progress[lane].mu_product == pytest.approx(float(optimizer.state[param]["mu_product"]), rel=1e-6)


def test_only_optimizers_whose_rule_is_known_are_fused() -> None:
    class Mine(torch.optim.SGD):
        pass

    params = [nn.Parameter(torch.zeros(2))]
    adagrad, mine = torch.optim.Adagrad(params), Mine(params, lr=0.1)
    known = "Adam, AdamW, SGD, RMSprop, NAdam"
    with pytest.raises(LanesRefused) as raised:
        rule_of(adagrad, adagrad.param_groups[0])
    assert raised.value.reason == f"the optimizer is a Adagrad (those that can be fused: {known})"
    with pytest.raises(LanesRefused):
        rule_of(mine, mine.param_groups[0])


def test_each_lane_is_clipped_by_its_own_norm() -> None:
    grads = [torch.tensor([[3.0, 0.0], [3.0, 4.0], [3.0, 4.0], [float("inf"), 1.0]]), torch.tensor([[4.0]] * 4)]
    limits = torch.tensor([2.5, float("inf"), 100.0, float("inf")])
    wanted = [grad.clone() for grad in grads]
    lane = [nn.Parameter(grad[0]) for grad in wanted]
    for param, grad in zip(lane, wanted, strict=True):
        param.grad = grad[0]
    nn.utils.clip_grad_norm_(lane, 2.5)
    clip_lanes(grads, limits)
    for found, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, expected)
