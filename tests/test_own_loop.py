"""A user's own `fit`: one report an epoch, stopped and started again, with and without state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import Config
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.checkpoint import pack, unpack
from hpsearch.training.data import StudyData
from hpsearch.training.own_loop import OwnTraining, reported_metrics

CPU = torch.device("cpu")


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


class Own(Task):
    """A loop with dropout and its own optimizer, which it offers as state."""

    def data(self) -> Splits:
        return Splits(train=rows(40, 0), val=rows(30, 1), test=rows(10, 2))

    def model(self, config: Config) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if trial.state is not None:
            optimizer.load_state_dict(trial.state["optimizer"])
        x, y = splits.train
        while True:
            model.train()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                val = F.cross_entropy(model(splits.val[0]), splits.val[1])
            yield Report(
                {"train_loss": loss.item(), "loss": val.item()}, state=lambda: {"optimizer": optimizer.state_dict()}
            )


class Yields(Own):
    """Yields what it is given; notes what it was started with and whether it was closed."""

    def __init__(self, *reports: Any) -> None:
        self.reports = reports
        self.started: list[tuple[Config, Splits, Trial]] = []
        self.closed = False

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        self.started.append((config, splits, trial))
        try:
            yield from self.reports
        finally:
            self.closed = True


def start(task: Task, **kw: Any) -> OwnTraining:
    data = StudyData.load(task, study_seed=0, cut_ensemble=False, device=CPU)
    return OwnTraining(task, data, {"lr": 0.1}, trial=17, seed=5, device=CPU, **kw)


def test_an_epoch_is_a_report_and_loss_without_split_is_vals() -> None:
    row = start(Own()).train_epoch()
    assert row.epoch == 1
    assert list(row.metrics) == ["train_loss", "val_loss"]


def test_a_stopped_fit_goes_on_to_the_bit_from_its_state() -> None:
    straight, stopped = start(Own()), start(Own())
    curve = [straight.train_epoch().metrics for _ in range(4)]
    stopped.train_epoch()
    stopped.train_epoch()
    content = pack(stopped.checkpoint())
    torch.manual_seed(99)
    again = start(Own(), checkpoint=unpack(content, ref="x"))
    assert [again.train_epoch().metrics for _ in range(2)] == curve[2:]
    assert pack(again.checkpoint()) == pack(straight.checkpoint())


def test_fit_finds_trial_and_train_and_val_but_not_test() -> None:
    task = Yields(Report({"loss": 1.0}))
    start(task).train_epoch()
    ((config, splits, trial),) = task.started
    assert config == {"lr": 0.1}
    assert (trial.number, trial.seed, trial.epoch, trial.state, trial.device) == (17, 5, 0, None, CPU)
    assert len(splits.train[0]) == 40
    assert splits.test is None


def test_a_restarted_fit_finds_its_epoch_state_and_weights() -> None:
    class Stateful(Yields):
        def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
            self.started.append((config, splits, trial))
            with torch.no_grad():
                model[0].weight.add_(1.0)  # type: ignore[index, operator, union-attr]
            while True:
                yield Report({"loss": 1.0}, state=lambda: {"step": 3, "average": torch.ones(2)})

    task = Stateful()
    training = start(task)
    training.train_epoch()
    again = start(task, checkpoint=unpack(pack(training.checkpoint()), ref="x"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), training.model.parameters(), strict=True))
    assert again.train_epoch().epoch == 2
    trial = task.started[1][2]
    assert trial.epoch == 1
    assert trial.state is not None
    assert trial.state["step"] == 3
    assert torch.equal(trial.state["average"], torch.ones(2))


def test_without_state_a_trial_is_not_resumable_but_its_weights_are_kept() -> None:
    training = start(Yields(Report({"loss": 1.0})))
    training.train_epoch()
    assert not training.resumable
    checkpoint = training.checkpoint()
    assert not checkpoint.resumable
    assert checkpoint.weights


def test_state_is_asked_for_only_when_it_is_kept() -> None:
    asked = []

    def state() -> dict[str, Any]:
        asked.append(1)
        return {}

    training = start(Yields(Report({"loss": 1.0}, state=state)))
    training.train_epoch()
    training.checkpoint(weights_only=True)
    assert not asked
    assert training.checkpoint().resumable
    assert asked


def test_closing_runs_the_generators_finally() -> None:
    task = Yields(Report({"loss": 1.0}), Report({"loss": 1.0}))
    training = start(task)
    training.train_epoch()
    assert not task.closed
    training.close()
    assert task.closed
    training.close()  # again does nothing


def test_a_fit_that_ends_early_is_told_to_go_on_without_end() -> None:
    training = start(Yields(Report({"loss": 1.0})))
    training.train_epoch()
    with pytest.raises(UserCodeError) as caught:
        training.train_epoch()
    assert caught.value.message == "fit() ended after 1 epochs, before hpsearch had done with the trial"
    assert caught.value.hint == "yield reports without end (while True): hpsearch stops it by asking for no more"
    assert "in fit" in caught.value.frame


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"loss": 1.0}, "fit() yielded a dict, not a Report"),
        (Report({}), "a Report's metrics are a dict of numbers (got {})"),
        (Report([1.0]), "a Report's metrics are a dict of numbers (got [1.0])"),  # type: ignore[arg-type]
        (Report({"loss": "low"}), "a Report's `loss` is a str, not a number"),  # type: ignore[dict-item]
        (Report({"loss": torch.zeros(2)}), "a Report's `loss` is a Tensor, not a number"),  # type: ignore[dict-item]
        (Report({"loss": 1.0, "val_loss": 1.0}), "a Report gives `val_loss` twice, with and without its split"),
    ],
)
def test_what_is_no_report_is_refused(report: Any, message: str) -> None:
    with pytest.raises(UserCodeError) as caught:
        start(Yields(report)).train_epoch()
    assert caught.value.message == message
    assert "test_own_loop.py" in caught.value.frame


def test_a_fit_without_yield_is_refused() -> None:
    class Forgot(Own):
        def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Any:
            return None

    with pytest.raises(UserCodeError, match=r"fit\(\) returned a NoneType, not a generator"):
        start(Forgot()).train_epoch()


def test_a_fit_that_raises_is_the_users_error() -> None:
    class Raises(Own):
        def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
            raise RuntimeError("no data loader")
            yield

    with pytest.raises(UserCodeError, match="RuntimeError: no data loader") as caught:
        start(Raises()).train_epoch()
    assert caught.value.frame.endswith("in fit")


def test_state_that_is_no_dict_is_refused() -> None:
    training = start(Yields(Report({"loss": 1.0}, state=lambda: [1])))  # type: ignore[arg-type, return-value]
    training.train_epoch()
    with pytest.raises(UserCodeError, match=r"state\(\) of a Report returned a list, not a dict"):
        training.checkpoint()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_report_that_is_not_finite_diverges(value: float) -> None:
    training = start(Yields(Report({"loss": value})))
    with pytest.raises(TrialDiverged, match=f"val_loss is {value}"):
        training.train_epoch()
    assert training.epoch == 0


def test_numbers_of_any_kind_are_metrics() -> None:
    report = Report({"loss": torch.tensor(0.5), "val_f1": 1, "train_acc": True})  # type: ignore[dict-item]
    assert reported_metrics(report, frame="") == {"val_loss": 0.5, "val_f1": 1.0, "train_acc": 1.0}
