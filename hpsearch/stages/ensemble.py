"""Ensemble: choose the checkpoints that help each other, then open the test split once.

The pool's predictions are scored on the ensemble split, which the search never ranked on. When the members are chosen,
they and the best single trial are measured on the test split, and each member is exported.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpsearch.events import Compared, Event, Finished, Opened, Selected
from hpsearch.intervals import Interval, better, mean_interval, paired_interval, wilson_interval
from hpsearch.job import EvaluateJob, ExportJob, Job, Member, SplitName, evaluation_key
from hpsearch.selection import select_greedy
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """How many candidates, how many members, and by which measure the gain is told."""

    pool: int
    size: int
    n_trials: int
    study_seed: int
    metric: str  # the study's metric without its split
    goal: Literal["minimize", "maximize"]
    combine: bool  # False: `ensemble: {enabled: false}`, the best single trial alone is measured and packaged


class EnsembleStage:
    """Pool, selection, test, export."""

    name = "ensemble"

    def __init__(
        self, settings: EnsembleSettings, state: StudyState, *, arrays: Callable[[str], dict[str, np.ndarray]]
    ) -> None:
        """
        Args:
            arrays: reads the named arrays of a blob.
        """
        self._settings = settings
        self._state = state
        self._arrays = arrays
        self._pool: list[TrialRecord] | None = None  # as of the last event that could change it

    def apply(self, event: Event) -> None:
        """Only the pool is remembered: ranking ten thousand trials for every question would cost seconds."""
        if isinstance(event, Opened) or (isinstance(event, Finished) and event.trial is not None):
            self._pool = None

    def lost(self, worker: str) -> None:
        """No evaluation lives in a worker's memory."""

    def next_job(self, worker: str) -> Job | None:
        return next((job for job in self._jobs() if self._free(job.key)), None)

    def conclude(self) -> list[Event]:
        if self._selected() is None:
            selected = self._select()
            return [] if selected is None else [selected]
        if self._has_test() and not self._compared() and self._is_over(self._test_jobs()):
            return [self._compare()]
        return []

    def finished(self) -> bool:
        if not self.pool():
            return True
        if self._selected() is None:
            return self._settings.combine and self._is_over(self._pool_jobs()) and not self._candidates()
        return self._is_over(self._jobs()) and (self._compared() or not self._has_test())

    def pool(self) -> list[TrialRecord]:
        """Candidates, best first: usable trials with the best metric."""
        if self._pool is None:
            usable = (trial for trial in self._state.trials.values() if trial.usable)
            size = self._settings.pool if self._settings.combine else 1
            self._pool = heapq.nsmallest(size, usable, key=lambda trial: trial.sort_key)
        return self._pool

    # Jobs

    def _jobs(self) -> list[Job]:
        if self._selected() is None:
            return list(self._pool_jobs())
        return [*self._export_jobs(), *self._test_jobs(), *self._val_jobs()]

    def _pool_jobs(self) -> list[EvaluateJob]:
        if not self._settings.combine:
            return []
        return [self._evaluate([(trial, 1.0)], "ensemble", keep=True) for trial in self.pool()]

    def _test_jobs(self) -> list[EvaluateJob]:
        if not self._has_test():
            return []
        return [self._evaluate(self._best(), "test", keep=False), self._evaluate(self._members(), "test", keep=False)]

    def _val_jobs(self) -> list[EvaluateJob]:
        return [self._evaluate(self._members(), "val", keep=False)]

    def _export_jobs(self) -> list[ExportJob]:
        """One job for all members: those of one architecture share a graph, and the exporter is loaded once."""
        members = tuple(_member(trial, weight) for trial, weight in self._members())
        name = "+".join(str(member.trial) for member in members)
        return [ExportJob(key=f"export/{name}", members=members)]

    def _evaluate(self, members: list[tuple[TrialRecord, float]], split: SplitName, *, keep: bool) -> EvaluateJob:
        return EvaluateJob(
            key=evaluation_key(split, [(trial.number, weight) for trial, weight in members]),
            members=tuple(_member(trial, weight) for trial, weight in members),
            split=split,
            keep_predictions=keep,
        )

    def _free(self, key: str) -> bool:
        return key not in self._state.results and key not in self._state.leases

    def _is_over(self, jobs: list[EvaluateJob] | list[Job]) -> bool:
        return all(job.key in self._state.results for job in jobs)

    # What is known

    def _has_test(self) -> bool:
        return self._state.data is not None and "test" in self._state.data.n_rows

    def _selected(self) -> Selected | None:
        selected = self._state.selected
        return selected if selected is not None and selected.n_trials == self._settings.n_trials else None

    def _compared(self) -> bool:
        compared = self._state.compared
        return compared is not None and compared.n_trials == self._settings.n_trials

    def _best(self) -> list[tuple[TrialRecord, float]]:
        selected = self._selected()
        assert selected is not None
        return [(self._state.trials[selected.best], 1.0)]

    def _members(self) -> list[tuple[TrialRecord, float]]:
        selected = self._selected()
        assert selected is not None
        return [(self._state.trials[trial], weight) for trial, weight in selected.members]

    def _candidates(self) -> list[tuple[TrialRecord, Finished]]:
        """Pool trials whose predictions are there."""
        jobs = zip(self.pool(), self._pool_jobs(), strict=True)
        results = [(trial, self._state.results.get(job.key)) for trial, job in jobs]
        return [(trial, result) for trial, result in results if result is not None and result.outcome == "done"]

    # Conclusions

    def _select(self) -> Selected | None:
        pool = self.pool()
        if not pool:
            return None
        best = pool[0].number
        if not self._settings.combine:
            return Selected(n_trials=self._settings.n_trials, best=best, pool=(best,), members=((best, 1.0),))
        if not self._is_over(self._pool_jobs()):
            return None
        candidates = self._candidates()
        if not candidates:
            return None
        assert self._state.data is not None
        blobs = [self._arrays(str(result.values["predictions"])) for _, result in candidates]
        targets = self._arrays(str(candidates[0][1].values["targets"]))["targets"]
        chosen = select_greedy(
            [blob["predictions"] for blob in blobs], targets, self._state.data.outputs, size=self._settings.size
        )
        return Selected(
            n_trials=self._settings.n_trials,
            best=best,
            pool=tuple(trial.number for trial in pool),
            members=tuple((candidates[index][0].number, weight) for index, weight in chosen.members),
            scores=chosen.scores,
            single_score=chosen.single_score,
        )

    def _compare(self) -> Compared:
        best, ensemble = (self._state.results[job.key] for job in self._test_jobs())
        if best.outcome != "done" or ensemble.outcome != "done":
            return Compared(n_trials=self._settings.n_trials, gain={})
        of_best = self._arrays(str(best.values["row_scores"]))
        of_ensemble = self._arrays(str(ensemble.values["row_scores"]))
        metric = self._settings.metric if self._settings.metric in of_best else "loss"
        goal = self._settings.goal if metric == self._settings.metric else "minimize"
        seed = self._settings.study_seed
        gain = paired_interval(of_ensemble[metric], of_best[metric], seed=seed)
        return Compared(
            n_trials=self._settings.n_trials,
            gain={"metric": metric, **_numbers(gain), "better": better(gain, goal)},
            intervals={"best": _row_intervals(of_best, seed), "ensemble": _row_intervals(of_ensemble, seed)},
        )


def _member(trial: TrialRecord, weight: float) -> Member:
    assert trial.best_checkpoint is not None
    return Member(trial=trial.number, config=trial.config, checkpoint=trial.best_checkpoint, weight=weight)


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _row_intervals(rows: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float | None]]:
    """Intervals of a model's own test scores; proportions by Wilson, means by bootstrap-t."""
    intervals = {}
    for name, values in rows.items():
        if name == "accuracy":
            interval = wilson_interval(int(values.sum()), len(values))
        else:
            interval = mean_interval(values, seed=seed)
        intervals[name] = _numbers(interval)
    return intervals
