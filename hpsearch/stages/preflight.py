"""Preflight: distrust the network and its data before a GPU-hour is spent on them.

The data once, the network of trial 0 whole, the smallest and the largest on two examples, every corner of the space by
one step. What fails stops the study before any search job; what warns is told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hpsearch.checks import NAMES, Check
from hpsearch.errors import HpsearchError, PreflightError, UserCodeError
from hpsearch.events import Event
from hpsearch.job import CheckJob, Config, Job
from hpsearch.state import StudyState
from hpsearch.triage import parted

TRIAL_0 = "trial 0"
BATCH_KEY = f"check/batch/{TRIAL_0}"


@dataclass(frozen=True, kw_only=True)
class PreflightSettings:
    """Which networks are asked."""

    first: Config  # trial 0's
    first_seed: int
    corners: Mapping[str, Config]
    allow: tuple[str, ...]  # codes of checks that may fail


class Preflight:
    """The checks as jobs, and what they come to."""

    name = "preflight"

    def __init__(self, settings: PreflightSettings, state: StudyState) -> None:
        self._settings = settings
        self._state = state
        self._jobs = check_jobs(settings)

    def apply(self, event: Event) -> None:
        """Nothing is kept here: the study's state has the results."""

    def lost(self, worker: str) -> None:
        """A check lives in no worker's memory."""

    def next_job(self, worker: str) -> Job | None:
        return next((job for job in self._jobs if self._due(job) and job.key not in self._state.leases), None)

    def _due(self, job: CheckJob) -> bool:
        if job.what == "batch" and self.name in self._state.ended_stages:
            return False  # of a study that an earlier version began: a figure alone is not worth another preflight
        return job.key not in self._state.results

    def conclude(self) -> list[Event]:
        return []

    def finished(self) -> bool:
        return not any(self._due(job) for job in self._jobs)

    def failure(self) -> HpsearchError | None:
        """Why the study must not go on: the user's code raised, or a check failed that is not allowed to."""
        for job in self._jobs:
            result = self._state.results.get(job.key)
            if result is not None and result.outcome == "crashed":
                what, hint = parted(result.message)
                return UserCodeError(what, frame=result.frame, hint=f"{hint or 'mend the task'}; then launch again")
        failed = [c for c in checks(self._state) if c.status == "failed" and c.code not in self._settings.allow]
        return preflight_error(failed) if failed else None


def check_jobs(settings: PreflightSettings) -> list[CheckJob]:
    """The longest first, so that workers end together."""
    jobs = [
        CheckJob(
            key=f"check/network/{TRIAL_0}",
            what="network",
            corner=TRIAL_0,
            config=settings.first,
            seed=settings.first_seed,
        ),
        CheckJob(key="check/data", what="data", corner="", config={}, seed=settings.first_seed),
        CheckJob(key=BATCH_KEY, what="batch", corner=TRIAL_0, config=settings.first, seed=settings.first_seed),
    ]
    for corner, config in settings.corners.items():
        kinds = ("overfit", "step") if corner in ("smallest", "largest") else ("step",)
        jobs += [
            CheckJob(key=f"check/{kind}/{corner}", what=kind, corner=corner, config=config, seed=settings.first_seed)  # type: ignore[arg-type]
            for kind in kinds
        ]
    return sorted(jobs, key=lambda job: ("network", "data", "overfit", "step", "batch").index(job.what))


def checks(state: StudyState) -> list[Check]:
    """Every check that has been made, in the order in which a person reads them: the data, trial 0, the corners."""
    found: list[Check] = []
    for kind in ("data", "network", "overfit", "step"):
        for key, result in state.results.items():
            if key.split("/")[:2] == ["check", kind]:
                rows = result.values.get("checks")
                found += [Check.of(row) for row in rows] if isinstance(rows, (list, tuple)) else []
                if result.outcome not in ("done", "crashed"):  # twice, the second time with nothing beside it
                    found.append(_could_not_be_asked(key, result.message))
    return found


def kept_batch(state: StudyState) -> Mapping[str, object]:
    """What is known of a batch as trial 0 receives it (`job.Result`); empty where none was kept."""
    result = state.results.get(BATCH_KEY)
    return result.values if result is not None and result.outcome == "done" else {}


def _could_not_be_asked(key: str, message: str) -> Check:
    return Check(
        name=NAMES["builds"],
        code="builds",
        status="failed",
        where=key.split("/", 2)[2] if key.count("/") > 1 else "",
        found=message,
        expected="a check that ends",
        cause="out of memory: this network, or the data, is larger than the device",
        look_at="lower the space's largest values, or the batch size",
    )


def preflight_error(failed: Collection[Check]) -> PreflightError:
    """The error of a preflight, with each failure's likeliest cause."""
    lines = []
    for check in failed:
        at = f" ({check.where})" if check.where else ""
        lines.append(f"{check.code}: not true that {check.name}{at}: {check.found} (expected {check.expected})")
    codes = ", ".join(dict.fromkeys(check.code for check in failed))
    n = len(failed)
    first = next(iter(failed))
    return PreflightError(
        f"{n} check{'s' if n > 1 else ''} failed, so nothing was searched\n  " + "\n  ".join(lines),
        hint=f"likeliest: {first.cause}: {first.look_at}\n  hint: if it is meant: "
        f"preflight: {{allow: [{codes}]}}, or --skip-preflight",
    )
