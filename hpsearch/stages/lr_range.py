"""LR range: the learning rates worth searching in each branch of the space.

Each branch is ramped from several seeds, as jobs; seed s takes the branch's other parameters from point s of the
sequence. When the seeds disagree, or the best rate lies at an edge, constant-rate probes over a wider range decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hpsearch.events import Event, Finished, RangeMeasured
from hpsearch.job import Config, Job, ProbeJob, RampJob
from hpsearch.lane_groups import may_share
from hpsearch.lr_curve import LrMeasurement, confirm_range, measure_range, probe_lrs, ramp_lrs
from hpsearch.state import StudyState

PROBE_SEEDS = 2
PROBE_STEPS = 40  # as in the comparison that this rule was chosen by: 40 steps of each rate tell the order


@dataclass(frozen=True, kw_only=True)
class LrRangeSettings:
    """What is ramped, and how."""

    branches: tuple[Config, ...]
    lr_min: float
    lr_max: float
    steps: int
    seeds: int
    user_low: float  # bounds of `lr` in the space
    user_high: float


class LrRange:
    """Ramps, then probes where the ramps are unsure, then one measured range per branch."""

    name = "lr_range"

    def __init__(
        self,
        settings: LrRangeSettings,
        state: StudyState,
        *,
        config_of: Callable[[Config, int], Config],
        seed_of: Callable[[int], int],
    ) -> None:
        """
        Args:
            config_of: (branch, s) -> the config that seed s ramps, without lr.
            seed_of: s -> seed of its initialisation and data order.
        """
        self._settings = settings
        self._state = state
        self._config_of = config_of
        self._seed_of = seed_of
        self._lrs = ramp_lrs(settings.lr_min, settings.lr_max, settings.steps)
        self._ramps = {branch_key(branch): self._ramp_jobs(branch) for branch in settings.branches}
        self._probes: dict[str, dict[float, list[ProbeJob]]] = {}
        self._unsure: dict[str, LrMeasurement] = {}

    def apply(self, event: Event) -> None:
        """Nothing is kept here: the study's state has the results."""

    def lost(self, worker: str) -> None:
        """Ramps live in no worker's memory."""

    def next_job(self, worker: str) -> Job | None:
        return next((job for job in self._jobs() if self._free(job.key)), None)

    def next_beside(self, worker: str, job: Job) -> Job | None:
        return next((other for other in self._jobs() if self._free(other.key) and may_share(job, other)), None)

    def conclude(self) -> list[Event]:
        events: list[Event] = []
        for branch in self._settings.branches:
            key = branch_key(branch)
            if self._state.range_of(branch) is None and all(self._over(job.key) for job in self._ramps[key]):
                event = self._measure(branch)
                if event is not None:
                    events.append(event)
        return events

    def finished(self) -> bool:
        return all(self._state.range_of(branch) is not None for branch in self._settings.branches)

    def _ramp_jobs(self, branch: Config) -> list[RampJob]:
        s = self._settings
        return [
            RampJob(
                key=f"ramp/{branch_key(branch)}/{index}",
                config=self._config_of(branch, index),
                seed=self._seed_of(index),
                lr_min=s.lr_min,
                lr_max=s.lr_max,
                steps=s.steps,
            )
            for index in range(s.seeds)
        ]

    def _jobs(self) -> list[Job]:
        ramps: list[Job] = [job for jobs in self._ramps.values() for job in jobs]
        return ramps + [job for rates in self._probes.values() for jobs in rates.values() for job in jobs]

    def _free(self, key: str) -> bool:
        return key not in self._state.results and key not in self._state.leases

    def _over(self, key: str) -> bool:
        return key in self._state.results

    def _measure(self, branch: Config) -> RangeMeasured | None:
        """The branch's range, or None while probes are still to be run."""
        key, s = branch_key(branch), self._settings
        if key not in self._probes:
            measured = measure_range(
                [losses_of(self._state.results[job.key]) for job in self._ramps[key]],
                self._lrs,
                user_low=s.user_low,
                user_high=s.user_high,
            )
            if measured is None:
                return RangeMeasured(
                    branch=branch,
                    lr=None,
                    low=s.user_low,
                    high=s.user_high,
                    spread_decades=0.0,
                    at_edge=False,
                    confirmed=False,
                )
            if measured.sure:
                return _event(branch, measured)
            self._unsure[key] = measured
            self._probes[key] = self._probe_jobs(branch, measured)
        jobs = [job for rate in self._probes[key].values() for job in rate]
        if not all(self._over(job.key) for job in jobs):
            return None
        losses = {
            lr: [losses_of(self._state.results[job.key]) for job in jobs] for lr, jobs in self._probes[key].items()
        }
        return _event(branch, confirm_range(self._unsure[key], losses, steps=PROBE_STEPS))

    def _probe_jobs(self, branch: Config, measured: LrMeasurement) -> dict[float, list[ProbeJob]]:
        return {
            float(lr): [
                ProbeJob(
                    key=f"probe/{branch_key(branch)}/{lr:.3e}/{index}",
                    config={**self._config_of(branch, index), "lr": float(lr)},
                    seed=self._seed_of(index),
                    steps=PROBE_STEPS,
                )
                for index in range(PROBE_SEEDS)
            ]
            for lr in probe_lrs(measured)
        }


def branch_key(branch: Mapping[str, object]) -> str:
    """A branch in a job's key: `optimizer=adamw,norm=batch`; `all` for a space without branches."""
    return ",".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in branch.items()) or "all"


def losses_of(result: Finished) -> Sequence[float]:
    """Raw losses of a ramp or probe; empty when it crashed, which counts as never finite."""
    losses = result.values.get("losses", [])
    assert isinstance(losses, (list, tuple))
    return losses


def _event(branch: Config, measured: LrMeasurement) -> RangeMeasured:
    return RangeMeasured(
        branch=branch,
        lr=measured.lr,
        low=measured.low,
        high=measured.high,
        spread_decades=measured.spread_decades,
        at_edge=measured.at_edge,
        confirmed=measured.confirmed,
        per_seed_lr=measured.per_seed_lr,
    )
