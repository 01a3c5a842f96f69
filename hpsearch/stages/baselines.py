"""Baselines: what a study is held against, measured once, while workers have nothing better to do."""

from __future__ import annotations

from typing import Literal

from hpsearch.events import Event
from hpsearch.job import BaselineJob, Job
from hpsearch.state import StudyState

NAMES: tuple[Literal["constant", "linear"], ...] = ("constant", "linear")


class Baselines:
    """The best prediction that ignores the inputs, and a linear model."""

    name = "baselines"

    def __init__(self, state: StudyState, *, study_seed: int) -> None:
        self._state = state
        self._jobs = [BaselineJob(key=f"baseline/{name}", name=name, seed=study_seed) for name in NAMES]

    def apply(self, event: Event) -> None:
        """Nothing is kept here: the study's state has the results."""

    def lost(self, worker: str) -> None:
        """A baseline lives in no worker's memory."""

    def next_job(self, worker: str) -> Job | None:
        return next((job for job in self._jobs if self._free(job.key)), None)

    def _free(self, key: str) -> bool:
        return key not in self._state.results and key not in self._state.leases

    def conclude(self) -> list[Event]:
        return []

    def finished(self) -> bool:
        return all(job.key in self._state.results for job in self._jobs)
