"""Memory that runs out, simulated by the error that CUDA's allocator raises: tried again alone, then told."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpsearch.events import Finished
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Config, TrainJob
from hpsearch.journal import read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.executor import TorchExecutor
from hpsearch.trial import TrialState
from tests import fakes

SPACE = """
name: memory
task: task.py:Task
preflight: {enabled: false}
search: {trials: 6}
parameters:
  lr: {min: 0.01, max: 0.1}
  width: {values: [4, 8, 512]}
early_stopping: {min_epochs: 1, max_epochs: 2}
ensemble: {pool: 3, size: 1}
"""
MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 39.38 GiB"


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


class Greedy(Task):
    """Memory runs out for width 512: every time, or `times` times."""

    times = 10**6
    asked = 0

    def data(self) -> Splits:
        return Splits(train=rows(64, 0), val=rows(40, 1), test=rows(20, 2))

    def model(self, config: Config) -> nn.Module:
        if config["width"] == 512 and type(self).asked < type(self).times:
            type(self).asked += 1
            raise torch.OutOfMemoryError(MESSAGE)
        width = min(int(str(config["width"])), 8)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


def always(spec: Spec, folder: Path) -> TorchExecutor:
    return TorchExecutor(Greedy(), study_seed=0, device="cpu")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, times: int) -> tuple[StudyState, list[Finished]]:
    monkeypatch.setattr(Greedy, "times", times)
    monkeypatch.setattr(Greedy, "asked", 0)
    launch = Launch(
        run_dir=tmp_path / "run",
        spec=parse_spec(SPACE),
        folder=tmp_path,
        make_sampler=fakes.make_sampler,
        make_executor=always,
        stages=("search",),
    )
    LocalFleet(launch).run(lambda entries: None)
    entries = read_journal(launch.run_dir)
    bad = [e.event for e in entries if isinstance(e.event, Finished) and e.event.outcome == "out_of_memory"]
    return StudyState.of(entries), bad


def test_memory_that_runs_out_once_costs_the_trial_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, bad = run(tmp_path, monkeypatch, times=1)
    assert state.done
    assert [event.message for event in bad] == [f"OutOfMemoryError: {MESSAGE}"]
    assert bad[0].trial is not None
    assert state.trials[bad[0].trial].curve
    assert state.counts()[TrialState.FAILED] == 0


def test_a_config_that_never_fits_fails_and_the_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, bad = run(tmp_path, monkeypatch, times=10**6)
    greedy = {number for number, trial in state.trials.items() if trial.config["width"] == 512}
    assert state.done
    assert greedy
    assert {event.trial for event in bad} == greedy
    assert {number for number, trial in state.trials.items() if trial.state is TrialState.FAILED} == greedy
    assert all(sum(event.trial == number for event in bad) == 2 for number in greedy)  # once more, alone, and no more


class KeepsGenerators(Greedy):
    """A fit that cannot be paused, so that its model lives on in the worker."""

    models: list[Any]

    def __init__(self) -> None:
        self.models = []

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        self.models.append(weakref.ref(model))
        while True:
            yield Report({"val_loss": 1.0})


def train(trial: int, width: int, epochs: tuple[int, int] = (0, 1)) -> TrainJob:
    from_epoch, to_epoch = epochs
    return TrainJob(
        key=f"train/{trial}/{from_epoch}-{to_epoch}", trial=trial, config={"lr": 0.1, "width": width}, seed=1,
        from_epoch=from_epoch, to_epoch=to_epoch,
    )  # fmt: skip


def outcomes(executor: TorchExecutor, *jobs: TrainJob) -> list[str]:
    return [result.outcome for result in executor.run(jobs, lambda ref: b"", lambda key, epoch: None)]


def test_a_worker_whose_memory_ran_out_keeps_no_trial_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it kept is trained again from its start when it is asked for, which costs time and no result."""
    monkeypatch.setattr(Greedy, "times", 1)
    monkeypatch.setattr(Greedy, "asked", 0)
    task = KeepsGenerators()
    executor = TorchExecutor(task, study_seed=0, device="cpu")
    assert outcomes(executor, train(0, 8)) == ["done"]
    assert task.models[0]() is not None
    assert outcomes(executor, train(1, 512)) == ["out_of_memory"]
    gc.collect()
    assert task.models[0]() is None
    assert outcomes(executor, train(0, 8, (1, 2)), train(1, 512)) == ["done", "done"]
