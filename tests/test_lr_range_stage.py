"""The LR-range stage: ramps of every branch, probes where they leave doubt, one range each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hpsearch.events import Event, Finished, Leased, RangeMeasured, Returned
from hpsearch.job import Config, Job, Outcome, ProbeJob, RampJob
from hpsearch.lr_curve import ramp_lrs
from hpsearch.stages.lr_range import PROBE_SEEDS, PROBE_STEPS, LrRange, LrRangeSettings, branch_key
from hpsearch.state import StudyState

ADAMW: Config = {"optimizer": "adamw"}
SGD: Config = {"optimizer": "sgd"}
LRS = ramp_lrs(1e-5, 10.0, 100)

Curve = Callable[[float], float]


def bowl(lr_min: float) -> Curve:
    """A loss that is lowest at lr_min and finite everywhere."""
    return lambda lr: 1.0 + math.log10(lr / lr_min) ** 2


def config_of(branch: Config, index: int) -> Config:
    return {**branch, "width": 16 + index}


@dataclass
class Bench:
    """The stage with its state, driven by hand."""

    branches: tuple[Config, ...] = (ADAMW, SGD)
    seeds: int = 3
    user_low: float = 1e-5
    user_high: float = 10.0
    state: StudyState = field(default_factory=StudyState)

    def __post_init__(self) -> None:
        self.stage = LrRange(
            LrRangeSettings(
                branches=self.branches,
                lr_min=1e-5,
                lr_max=10.0,
                steps=100,
                seeds=self.seeds,
                user_low=self.user_low,
                user_high=self.user_high,
            ),
            self.state,
            config_of=config_of,
            seed_of=lambda index: 100 + index,
        )

    def tell(self, *events: Event) -> None:
        for event in events:
            self.state.apply(event, 0.0)
            self.stage.apply(event)

    def take(self) -> Job | None:
        job = self.stage.next_job("w")
        if job is not None:
            self.tell(Leased(key=job.key, worker="w"))
        return job

    def finish(self, job: Job, losses: list[float], outcome: Outcome = "done") -> None:
        values = {"losses": losses, "batch_size": 32, "epochs": 1.0} if outcome == "done" else {}
        self.tell(Finished(key=job.key, worker="w", outcome=outcome, values=values))
        self.tell(*self.stage.conclude())

    def run(self, ramp: Callable[[RampJob], list[float]], probe: Curve | None = None) -> list[Job]:
        """All jobs, in order, with these losses."""
        jobs = []
        while (job := self.take()) is not None:
            jobs.append(job)
            if isinstance(job, RampJob):
                self.finish(job, ramp(job))
            else:
                assert isinstance(job, ProbeJob)
                assert probe is not None, f"{job.key} was not expected"
                self.finish(job, [probe(float(str(job.config["lr"])))] * job.steps)
        return jobs

    def range_of(self, branch: Config) -> RangeMeasured:
        measured = self.state.range_of(branch)
        assert measured is not None
        return measured


def ramp_of(curve: Curve) -> Callable[[RampJob], list[float]]:
    return lambda job: [curve(float(lr)) for lr in LRS]


def test_every_branch_is_ramped_from_every_seed() -> None:
    bench = Bench()
    jobs = [job for job in bench.run(ramp_of(bowl(0.04))) if isinstance(job, RampJob)]
    assert [job.key for job in jobs] == [
        f"ramp/optimizer={name}/{seed}" for name in ("adamw", "sgd") for seed in range(3)
    ]
    assert jobs[4] == RampJob(
        key="ramp/optimizer=sgd/1",
        config={"optimizer": "sgd", "width": 17},
        seed=101,
        lr_min=1e-5,
        lr_max=10.0,
        steps=100,
    )


def test_range_is_measured_when_the_last_ramp_of_its_branch_is_in_and_not_before() -> None:
    bench = Bench()
    for n in range(3):
        assert bench.state.ranges == []
        job = bench.take()
        assert job is not None
        bench.finish(job, ramp_of(bowl(0.04))(job))  # type: ignore[arg-type]
        assert bench.stage.finished() is False
        assert len(bench.state.ranges) == (n == 2)
    assert bench.state.ranges[0].branch == ADAMW


def test_branches_have_ranges_of_their_own() -> None:
    bench = Bench()
    bench.run(lambda job: ramp_of(bowl(0.004 if job.config["optimizer"] == "adamw" else 0.4))(job))
    assert bench.range_of(ADAMW).lr == pytest.approx(0.001, rel=0.1)
    assert bench.range_of(SGD).lr == pytest.approx(0.1, rel=0.1)
    assert bench.range_of(SGD).low < 0.1 < bench.range_of(SGD).high
    assert bench.stage.finished()
    assert not bench.range_of(SGD).confirmed


def test_job_in_a_workers_hands_is_not_given_out_twice_and_a_returned_one_is() -> None:
    bench = Bench(branches=({},), seeds=2)
    first, second = bench.take(), bench.take()
    assert first is not None
    assert second is not None
    assert first.key != second.key
    assert bench.take() is None
    bench.tell(Returned(key=first.key, worker="w", reason="lost"))
    assert bench.take() == first


def test_seeds_that_disagree_ask_for_probes_and_those_decide() -> None:
    bench = Bench(branches=(ADAMW,), seeds=4)
    minima = {0: 1e-4, 1: 1e-3, 2: 0.1, 3: 1.0}
    jobs = bench.run(lambda job: ramp_of(bowl(minima[job.seed - 100]))(job), probe=bowl(0.02))
    probes = [job for job in jobs if isinstance(job, ProbeJob)]
    rates = sorted({float(str(job.config["lr"])) for job in probes})
    assert len(probes) == PROBE_SEEDS * len(rates)
    assert all(job.steps == PROBE_STEPS for job in probes)
    assert {job.seed for job in probes} == {100, 101}
    measured = bench.range_of(ADAMW)
    assert measured.confirmed
    assert measured.spread_decades > 0.3
    assert measured.lr == min(rates, key=bowl(0.02))
    assert bench.stage.finished()


def test_minimum_at_the_edge_asks_for_probes() -> None:
    bench = Bench(branches=(ADAMW,))
    jobs = bench.run(ramp_of(lambda lr: -math.log10(lr)), probe=bowl(1.0))
    assert any(isinstance(job, ProbeJob) for job in jobs)
    assert bench.range_of(ADAMW).confirmed


def test_range_waits_for_the_last_probe() -> None:
    bench = Bench(branches=(ADAMW,))
    while isinstance(job := bench.take(), RampJob):
        bench.finish(job, ramp_of(lambda lr: -math.log10(lr))(job))
    while job is not None:
        assert bench.state.ranges == []
        assert not bench.stage.finished()
        bench.finish(job, [1.0] * PROBE_STEPS)
        job = bench.take()
    assert len(bench.state.ranges) == 1


def test_resumed_stage_asks_for_the_same_probes() -> None:
    bench = Bench(branches=(ADAMW,))
    while isinstance(job := bench.take(), RampJob):
        bench.finish(job, ramp_of(lambda lr: -math.log10(lr))(job))
    assert job is not None
    bench.finish(job, [1.0] * PROBE_STEPS)
    resumed = Bench(branches=(ADAMW,), state=bench.state)
    assert resumed.stage.next_job("w") is None  # nothing was concluded yet
    assert resumed.stage.conclude() == []
    assert resumed.stage.next_job("w") == bench.stage.next_job("w")


def test_branch_whose_ramps_all_crash_is_searched_within_the_users_bounds() -> None:
    bench = Bench(branches=(ADAMW,), user_low=1e-4, user_high=0.5)
    while (job := bench.take()) is not None:
        bench.finish(job, [], outcome="crashed")
    measured = bench.range_of(ADAMW)
    assert (measured.lr, measured.low, measured.high) == (None, 1e-4, 0.5)
    assert bench.stage.finished()


def test_ramp_that_is_nan_from_its_start_counts_as_no_loss() -> None:
    bench = Bench(branches=(ADAMW,))
    bench.run(lambda job: [])
    assert bench.range_of(ADAMW).lr is None


def test_range_lies_within_the_users_bounds() -> None:
    bench = Bench(branches=(ADAMW,), user_low=1e-3, user_high=2e-2)
    bench.run(ramp_of(bowl(1.0)), probe=bowl(1.0))
    measured = bench.range_of(ADAMW)
    assert 1e-3 <= measured.low < measured.high <= 2e-2


@pytest.mark.parametrize(
    ("branch", "key"),
    [
        ({}, "all"),
        ({"optimizer": "adamw"}, "optimizer=adamw"),
        ({"optimizer": "sgd", "norm": "batch"}, "optimizer=sgd,norm=batch"),
        ({"depth": 2, "bias": True, "act": None, "sizes": [1, 2]}, "depth=2,bias=true,act=null,sizes=[1, 2]"),
    ],
)
def test_branch_is_named_in_its_jobs_keys(branch: Config, key: str) -> None:
    assert branch_key(branch) == key
