"""The LR ramp: its losses, its end, and that it leaves nothing changed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.lr_curve import ramp_lrs
from hpsearch.training.checkpoint import capture, pack
from hpsearch.training.ramp import ramp_losses


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def batches(n: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield torch.randn(16, 5, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def random_states() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate())  # type: ignore[union-attr]


class Stop(Exception):
    pass


@pytest.mark.parametrize("ending", ["all steps", "a loss that is nan", "a loss that raises"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_ramp_leaves_model_optimizer_and_rng_as_they_were(ending: str, steps_before: int) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for inputs, target in batches(steps_before):
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    model[0].eval()  # a mode of its own
    grads = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    modes = [module.training for module in model.modules()]
    before = pack(capture(model, trial=0, seed=0, epoch=0, config={}, optimizer=optimizer))
    states = random_states()
    n_calls = 0

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        random.random()
        np.random.rand()  # noqa: NPY002
        if n_calls == 5 and ending == "a loss that raises":
            raise Stop
        loss = F.cross_entropy(output, target)
        return loss * math.nan if n_calls == 5 and ending == "a loss that is nan" else loss

    def ramp() -> list[float]:
        return ramp_losses(model, optimizer, batches(), loss_of, ramp_lrs(1e-4, 1.0, 10).tolist())

    if ending == "a loss that raises":
        with pytest.raises(Stop):
            ramp()
    else:
        assert len(ramp()) == (10 if ending == "all steps" else 4)
    assert pack(capture(model, trial=0, seed=0, epoch=0, config={}, optimizer=optimizer)) == before
    assert random_states() == states
    assert [module.training for module in model.modules()] == modes
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert (param.grad is None) == (grad is None)
        assert grad is None or (param.grad is not None and torch.equal(param.grad, grad))


def test_losses_are_those_of_a_training_at_these_rates() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lrs = ramp_lrs(1e-3, 1.0, 6).tolist()
    found = ramp_losses(model, optimizer, batches(), F.cross_entropy, lrs)
    expected = []
    for lr, (inputs, target) in zip(lrs, batches(), strict=False):
        loss = F.cross_entropy(model(inputs), target)
        expected.append(loss.item())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found == expected


def test_an_infinite_loss_ends_the_ramp_and_is_not_included() -> None:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = ramp_losses(
        model, optimizer, batches(), lambda output, _: output.square().sum(), ramp_lrs(1.0, 1e30, 50).tolist()
    )
    assert 0 < len(losses) < 50
    assert all(map(math.isfinite, losses))


def test_batches_that_run_out_end_the_ramp() -> None:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(ramp_losses(model, optimizer, batches(3), F.cross_entropy, [0.1] * 5)) == 3


def test_groups_keep_their_proportions_when_a_reference_is_given() -> None:
    seen: list[list[float]] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.append([group["lr"] for group in self.param_groups])

    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = Recording(groups, lr=0.1)
    ramp_losses(model, optimizer, batches(), F.cross_entropy, [0.1, 0.5], reference=0.1)
    assert seen == [[pytest.approx(0.01), 0.1], [pytest.approx(0.05), 0.5]]


def test_clipping_limits_the_step() -> None:
    def second_loss(clip: float | None) -> float:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return ramp_losses(model, optimizer, batches(), F.cross_entropy, [100.0, 100.0], grad_clip_norm=clip)[1]

    assert second_loss(1e-6) < second_loss(None)


def test_clipping_counts_parameters_that_are_not_stepped_as_training_does() -> None:
    def losses(clip: float | None) -> list[float]:
        model = net()
        optimizer = torch.optim.SGD(model[3].parameters(), lr=1e-3)
        return ramp_losses(model, optimizer, batches(), F.cross_entropy, [0.1] * 3, grad_clip_norm=clip)

    model = net()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    wanted = []
    for inputs, target in batches(3):
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert losses(0.5) == wanted
    assert losses(None) != wanted


def test_rates_rise_by_one_factor_from_end_to_end() -> None:
    lrs = ramp_lrs(1e-5, 10.0, 100).tolist()
    assert (lrs[0], lrs[-1], len(lrs)) == (1e-5, 10.0, 100)
    factors = [b / a for a, b in itertools.pairwise(lrs)]
    assert max(factors) / min(factors) == pytest.approx(1.0)
