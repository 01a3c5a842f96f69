"""Who is in which lane: filling, ending, and what is done when a program fails. The program itself is a fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import EpochMetrics, Job, Outcome, Result, TrainJob, train_key
from hpsearch.training.lane_jobs import Interrupted, LaneJobs
from hpsearch.training.lanes import LanesRefused
from hpsearch.training.outcome import Curve


def job(trial: int, to_epoch: int = 1, from_epoch: int = 0) -> TrainJob:
    return TrainJob(
        key=train_key(trial, from_epoch, to_epoch),
        trial=trial,
        config={},
        seed=trial,
        from_epoch=from_epoch,
        to_epoch=to_epoch,
    )


class FakeTraining:
    def __init__(self, job: TrainJob) -> None:
        self.trial = job.trial
        self.epoch = job.from_epoch


class FakeProgram:
    """Each trial's loss is its number over its epoch."""

    def __init__(self, host: FakeHost, trainings: Sequence[FakeTraining]) -> None:
        self.host = host
        self.lanes = {training.trial: training for training in trainings}

    def train_epoch(self) -> dict[int, Any]:
        self.host.log.append("epoch of " + " ".join(map(str, self.lanes)))
        trouble = self.host.trouble(tuple(self.lanes))
        if trouble is not None:
            raise trouble
        rows: dict[int, Any] = {}
        for trial, training in self.lanes.items():
            if trial in self.host.diverging:
                rows[trial] = TrialDiverged("train_loss is nan")
            else:
                training.epoch += 1
                loss = {"val_loss": trial / training.epoch}
                rows[trial] = EpochMetrics(epoch=training.epoch, metrics=loss, seconds=0.0)
        return rows

    def join(self, training: Any) -> None:
        self.lanes[training.trial] = training

    def leave(self, trial: int) -> Any:
        return self.lanes.pop(trial)

    def checkpoint(self, trial: int, **_: object) -> Any:
        return ("weights", trial, self.lanes[trial].epoch)


class FakeHost:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.diverging: set[int] = set()
        self.unfit: set[int] = set()
        self.unable: set[int] = set()
        self.fusible = True
        self.trouble: Callable[[tuple[int, ...]], Exception | None] = lambda trials: None
        self.stop = False
        self.width = 2
        self.group = FakeProgram

    def begin(self, job: TrainJob) -> Any:
        if job.trial in self.unable:
            return Result(key=job.key, outcome="crashed")
        return FakeTraining(job)

    def alone(self, job: TrainJob) -> Result:
        self.log.append(f"alone {job.trial}")
        return Result(key=job.key, message="alone")

    def program(self, trainings: Any) -> Any:
        if not self.fusible:
            raise LanesRefused("it reads a tensor's value")
        return self.group(self, trainings)

    def fits(self, first: Any, other: Any) -> bool:
        return other.trial not in self.unfit

    def may_join(self, first: Any, other: Any) -> bool:
        return self.fits(first, other)

    def objective(self, row: EpochMetrics) -> float:
        return row.metrics["val_loss"]

    def told(self, job: TrainJob, epoch: int) -> None: ...

    def alive(self, jobs: Sequence[TrainJob]) -> AbstractContextManager[None]:
        return nullcontext()

    def stopped(self) -> bool:
        return self.stop

    def result(self, job: TrainJob, curve: Curve, training: Any) -> Result:
        outcome: Outcome = "diverged" if curve.diverged else "done"
        values = {"best": curve.best, "epoch": training.epoch}
        return Result(key=job.key, outcome=outcome, values=values, epochs=tuple(curve.rows))

    def ended(self, job: TrainJob, training: Any, result: Result) -> None:
        self.log.append(f"ended {job.trial}")

    def refused(self, reason: str) -> None:
        self.log.append(f"refused: {reason}")
        self.width = 1

    def too_wide(self, n_lanes: int) -> None:
        self.log.append(f"too wide {n_lanes}")
        self.width = max(1, n_lanes // 2)


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


def run(host: FakeHost, *jobs: TrainJob, width: int = 2, more: Sequence[TrainJob] = ()) -> list[Result]:
    line = list(more)

    def further(last: Job, n: int) -> Sequence[Job]:
        given = line[:n]
        del line[:n]
        host.log += [f"asked beside {last.key}"] if given else []
        return given

    host.width = width
    return list(LaneJobs(host, more=further).run(jobs))


def keys(results: Sequence[Result]) -> list[str]:
    return [result.key for result in results]


def test_lane_that_ends_is_refilled_at_the_next_epoch_while_others_go_on(host: FakeHost) -> None:
    results = run(host, job(1, 3), job(2, 1), more=[job(3, 1), job(4, 2)])
    assert keys(results) == ["train/2/0-1", "train/3/0-1", "train/1/0-3", "train/4/0-2"]
    assert [line for line in host.log if line.startswith("epoch")] == [
        "epoch of 1 2",
        "epoch of 1 3",
        "epoch of 1 4",
        "epoch of 4",
    ]
    assert results[2].values["best"] == ("weights", 1, 3)
    assert [row.epoch for row in results[2].epochs] == [1, 2, 3]
    assert [result.values.get("lanes") for result in results] == [2, 2, 2, 2]
    assert ["lanes" in result.values for result in run(FakeHost(), job(5))] == [False]


def test_more_is_asked_for_when_all_lanes_ended_together(host: FakeHost) -> None:
    results = run(host, job(1), job(2), more=[job(3), job(4)])
    assert keys(results) == [f"train/{trial}/0-1" for trial in (1, 2, 3, 4)]
    assert "epoch of 3 4" in host.log


def test_diverged_lane_ends_with_what_it_had_and_others_do_not_notice(host: FakeHost) -> None:
    host.diverging = {2}
    results = run(host, job(1, 2), job(2, 2))
    assert [(r.key, r.outcome) for r in results] == [("train/2/0-2", "diverged"), ("train/1/0-2", "done")]


def test_job_that_cannot_begin_has_its_result_and_its_lane_goes_to_another(host: FakeHost) -> None:
    host.unable = {1}
    results = run(host, job(1), job(2))
    assert [(r.key, r.outcome) for r in results] == [("train/1/0-1", "crashed"), ("train/2/0-1", "done")]
    assert run(host, job(1)) == [Result(key="train/1/0-1", outcome="crashed")]


def test_trial_of_another_structure_is_trained_alone(host: FakeHost) -> None:
    host.unfit = {2, 3}
    results = run(host, job(1, 2), job(2), more=[job(3)])
    assert sorted(keys(results)) == ["train/1/0-2", "train/2/0-1", "train/3/0-1"]
    assert [line for line in host.log if line.startswith("alone")] == ["alone 2", "alone 3"]


def test_network_that_cannot_be_fused_is_trained_alone_and_no_more_is_asked_for(host: FakeHost) -> None:
    host.fusible = False
    results = run(host, job(1), width=2, more=[job(2), job(3)])
    assert [(r.key, r.message) for r in results] == [("train/1/0-1", "alone"), ("train/2/0-1", "alone")]
    assert host.log == [
        "asked beside train/1/0-1",
        "refused: it reads a tensor's value",
        "alone 1",
        "alone 2",
    ]


@pytest.mark.parametrize("error", [UserCodeError("metrics() raised"), LanesRefused("metrics() raised")])
def test_program_that_fails_is_given_up_and_no_more_is_asked_for(host: FakeHost, error: Exception) -> None:
    host.trouble = lambda trials: error if 2 in trials else None
    results = run(host, job(1, 3), job(4, 1), more=[job(2), job(3)])
    assert [(r.key, r.message) for r in results] == [
        ("train/4/0-1", ""),
        ("train/1/0-3", "alone"),
        ("train/2/0-1", "alone"),
    ]
    assert host.log == [
        "epoch of 1 4",
        "ended 4",
        "asked beside train/4/0-1",
        "epoch of 1 2",
        "refused: metrics() raised",
        "alone 1",
        "alone 2",
    ]


def test_out_of_memory_halves_the_lanes_and_loses_nobody(host: FakeHost) -> None:
    host.trouble = lambda trials: torch.OutOfMemoryError("CUDA out of memory") if len(trials) > 2 else None
    results = run(host, *(job(trial, 2) for trial in range(5)), width=5)
    assert sorted(keys(results)) == [f"train/{trial}/0-2" for trial in range(5)]
    assert host.log[:2] == ["epoch of 0 1 2 3 4", "too wide 5"]
    assert max(len(line.split()) - 2 for line in host.log[2:] if line.startswith("epoch")) == 2


def test_one_lane_that_runs_out_of_memory_is_told_as_the_plain_loop_tells_it(host: FakeHost) -> None:
    host.trouble = lambda trials: torch.OutOfMemoryError("CUDA out of memory")
    assert [r.message for r in run(host, job(1))] == ["alone"]


def test_memory_that_runs_out_while_a_trial_leaves_loses_nobody(host: FakeHost) -> None:
    class Tight(FakeProgram):
        def leave(self, trial: int) -> Any:
            if len(self.lanes) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().leave(trial)

    host.group = Tight
    results = run(host, job(1, 2), job(2, 1), job(3, 1), job(4, 2), width=4)
    assert sorted(keys(results)) == ["train/1/0-2", "train/2/0-1", "train/3/0-1", "train/4/0-2"]
    assert host.log[:2] == ["epoch of 1 2 3 4", "too wide 4"]


def test_job_of_a_trial_that_has_a_lane_waits_until_it_has_left(host: FakeHost) -> None:
    results = run(host, job(1, 2), job(2, 1), more=[job(1, 3, from_epoch=2)])
    assert keys(results) == ["train/2/0-1", "train/1/0-2", "train/1/2-3"]
    assert [line for line in host.log if line.startswith("epoch")] == ["epoch of 1 2", "epoch of 1", "epoch of 1"]


def test_request_to_stop_is_heard_between_two_epochs(host: FakeHost) -> None:
    lanes = LaneJobs(host, more=lambda last, n: ()).run([job(1, 2), job(2, 1)])
    assert next(lanes).key == "train/2/0-1"
    host.stop = True
    with pytest.raises(Interrupted):
        next(lanes)


def test_a_bug_of_ours_is_not_swallowed(host: FakeHost) -> None:
    host.trouble = lambda trials: ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(host, job(1))
