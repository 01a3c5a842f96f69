"""Loops of one's own, watched: which of them forget a mode, and which only look as if they did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.checks import Check
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.checks import modes as module
from hpsearch.training.checks.modes import check_modes
from hpsearch.training.data import StudyData
from tests.networks import Cnn, images, mlp, task

CPU = torch.device("cpu")
Fit = Callable[..., Iterator[Report]]


def asked(fit: Fit, network: Callable[[], nn.Module] = Cnn, rows: Callable[..., Any] = images) -> Check:
    made = task(network, rows, fit=fit)
    data = StudyData.load(made, study_seed=0, cut_ensemble=True, device=CPU)
    inputs = next(data.batches("train", batch_size=32))[0]
    return check_modes(made, data, {}, inputs, seed=0, device=CPU, where="trial 0")


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for rows in torch.arange(len(x)).split(128):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def score(model: nn.Module, x: Tensor, y: Tensor) -> Report:
    with torch.no_grad():
        return Report({"val_loss": float(F.cross_entropy(model(x), y))})


def right(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    while True:
        train(model.train(), *splits.train)
        yield score(model.eval(), *splits.val)


def never_evaluates(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    while True:
        train(model, *splits.train)
        yield score(model, *splits.val)


def never_trains_again(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    model.train()
    while True:
        train(model, *splits.train)
        yield score(model.eval(), *splits.val)


def never_in_training_mode(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    model.eval()
    while True:
        train(model, *splits.train)
        yield score(model, *splits.val)


def with_gradients(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    """Validates as it trains, without no_grad: nothing tells the two apart but the mode that was not set."""
    while True:
        train(model, *splits.train)
        x, y = splits.val
        yield Report({"val_loss": float(F.cross_entropy(model(x), y).detach())})


def averaged(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    """An average of the weights is what is evaluated; the model itself never is."""
    while True:
        train(model, *splits.train)
        yield score(copy.deepcopy(model).eval(), *splits.val)


def frozen_below(self: Task, model: Any, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
    """Batch norm of the lower layers stays in evaluation, as in fine-tuning."""
    while True:
        model.train()
        model.norm1.eval()
        train(model, *splits.train)
        yield score(model.eval(), *splits.val)


def frozen_below_and_never_evaluates(
    self: Task, model: Any, config: Any, splits: Splits, trial: Trial
) -> Iterator[Report]:
    while True:
        model.train()
        model.norm1.eval()
        train(model, *splits.train)
        yield score(model, *splits.val)


@pytest.mark.parametrize("fit", [right, averaged, frozen_below])
def test_loop_that_sets_its_modes_passes(fit: Fit) -> None:
    assert asked(fit).status == "passed"


@pytest.mark.parametrize(
    ("fit", "status", "found"),
    [
        (never_evaluates, "failed", "every call was in training mode, those without gradients too"),
        (frozen_below_and_never_evaluates, "failed", "every call was in training mode, those without gradients too"),
        (with_gradients, "warned", "every call was in training mode"),
        (never_trains_again, "failed", "from the second epoch on it trains in evaluation mode"),
        (never_in_training_mode, "warned", "no part of the model was trained in training mode"),
    ],
)
def test_loop_that_forgets_a_mode_is_told_which(fit: Fit, status: str, found: str) -> None:
    check = asked(fit)
    assert (check.status, check.found) == (status, found)
    assert check.code == "train-eval"
    assert "fit()" in check.look_at


def test_network_that_is_the_same_in_both_modes_needs_none() -> None:
    def never(*arguments: Any) -> Iterator[Report]:
        raise AssertionError("the loop is not run")

    check = asked(never, mlp, rows=lambda n, seed: (torch.randn(n, 12), torch.arange(n) % 4))
    assert check.status == "passed"


def test_loop_that_does_not_run_on_a_few_rows_is_not_called_wrong() -> None:
    def picky(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
        yield Report({"val_loss": 1 / (len(splits.train[0]) // 100_000)})

    check = asked(picky)
    assert check.status == "skipped"
    assert "ZeroDivisionError" in check.reason


def test_loop_that_diverges_on_a_few_rows_is_not_called_wrong() -> None:
    def wild(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
        yield Report({"val_loss": float("nan")})

    assert asked(wild).status == "skipped"


def test_loop_that_takes_long_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_S", -1.0)
    closed = []

    def careful(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
        try:
            try:
                train(model, *splits.train)
            except Exception as error:
                raise AssertionError("the user's code took it for its own") from error
            yield score(model, *splits.val)
        finally:
            closed.append(True)

    check = asked(careful)
    assert check.status == "skipped"
    assert closed


def test_random_state_and_the_network_asked_are_left_as_they_were() -> None:
    model = Cnn().train()
    before = copy.deepcopy(model.state_dict())
    module.depends_on_mode(model, torch.randn(16, 1, 8, 8))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
