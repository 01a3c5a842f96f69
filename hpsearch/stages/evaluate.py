"""Evaluate: cross-validate the best few on folds of train and val, and give up early on those that are clearly worse.

With few rows, whoever ranks first on one val split may owe it to these rows. So the search, on its one split, chooses
who is worth more; and these are trained afresh on each of the folds, every fold a job, and ranked by their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpsearch.errors import PreflightError
from hpsearch.events import Evaluated, Event, Finished
from hpsearch.fold_race import FEWEST_ROWS, FoldStanding, fold_standings, wanted_folds
from hpsearch.job import FoldJob, Job, fold_key
from hpsearch.metric_names import clipped
from hpsearch.sampler import derived_seed
from hpsearch.stages import may_reorder
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How many are cross-validated, on how many folds, and by which measure."""

    trials: int
    folds: int
    repeats: int
    study_seed: int
    metric: str  # the study's metric without its split
    goal: Literal["minimize", "maximize"]

    @property
    def n_runs(self) -> int:
        return self.folds * self.repeats


class Evaluate:
    """Folds for the best few, until who is the best is known or all folds are trained."""

    name = "evaluate"

    def __init__(self, settings: EvaluateSettings, state: StudyState) -> None:
        self._settings = settings
        self._state = state
        self._best: list[TrialRecord] | None = None  # as of the last event that could change it
        self._wanted: tuple[tuple[int, int], ...] | None = None  # likewise
        self._spent = ""

    def end_budget(self, spent: str) -> None:
        """Give out no further folds: those under way may end, then the order is by the folds that there are."""
        self._spent = spent

    def apply(self, event: Event) -> None:
        if may_reorder(event):
            self._best = self._wanted = None
        if isinstance(event, Finished) and event.key.startswith("fold/"):
            self._wanted = None

    def lost(self, worker: str) -> None:
        """A run lives in no worker's memory: it is trained from its start again."""

    def refusal(self) -> PreflightError | None:
        """Why there can be no such folds, as soon as it is known how many rows there are."""
        data = self._state.data
        n_rows = 0 if data is None else data.n_rows.get("train", 0) + data.n_rows.get("val", 0)
        if data is None or n_rows >= FEWEST_ROWS * self._settings.folds:
            return None
        most = n_rows // FEWEST_ROWS
        return PreflightError(
            f"evaluate asks for {self._settings.folds} folds, and train and val have {n_rows} rows together: a fold "
            f"needs at least {FEWEST_ROWS}",
            hint=f"write folds: {most}, or fewer, under `evaluate`" if most > 1 else "leave `evaluate` out",
        )

    def next_job(self, worker: str) -> Job | None:
        if self._state.evaluated is not None or self._spent:
            return None
        jobs = (self._job(self._state.trials[trial], fold) for trial, fold in self._next_folds())
        return next((job for job in jobs if job.key not in self._state.leases), None)

    def conclude(self) -> list[Event]:
        if self._state.evaluated is not None or not self._searched_best():
            return []
        cut_short = bool(self._next_folds())
        if cut_short and (not self._spent or any(key.startswith("fold/") for key in self._state.leases)):
            return []
        sound = self._sound()
        table = fold_standings(
            self._curves(sound),
            sound,
            folds=self._settings.folds,
            n_runs=self._settings.n_runs,
            seed=self._settings.study_seed,
        )
        return [
            Evaluated(
                epoch_of_search=self._state.n_epochs,
                folds=self._settings.folds,
                repeats=self._settings.repeats,
                standings=tuple(self._row(standing) for standing in table),
                out=tuple(trial.number for trial in self._searched_best() if trial.number not in sound),
                reason=self._spent if cut_short else "",
            )
        ]

    def finished(self) -> bool:
        return self._state.evaluated is not None or not self._searched_best()

    def _next_folds(self) -> tuple[tuple[int, int], ...]:
        if self._wanted is None:
            sound = self._sound()
            self._wanted = wanted_folds(
                self._curves(sound), sound, folds=self._settings.folds, n_runs=self._settings.n_runs
            )
        return self._wanted

    def _searched_best(self) -> list[TrialRecord]:
        if self._best is None:
            self._best = self._state.candidates(self._settings.trials)
        return self._best

    def _sound(self) -> list[int]:
        """Numbers of the best few, by the search's own score; one that went wrong on some fold is out of the race."""
        return [trial.number for trial in self._searched_best() if all(map(self._is_sound, self._runs(trial).values()))]

    def _is_sound(self, run: Finished) -> bool:
        """Whether a training ended well, each epoch with a finite score."""
        scores = [self._state.objective(metrics) for _, metrics, _ in run.epochs] if run.outcome == "done" else []
        return bool(scores) and all(map(math.isfinite, scores))

    def _curves(self, trials: Sequence[int]) -> dict[int, dict[int, list[float]]]:
        runs = {number: self._runs(self._state.trials[number]) for number in trials}
        return {
            number: {
                fold: [self._state.objective(metrics) for _, metrics, _ in run.epochs] for fold, run in done.items()
            }
            for number, done in runs.items()
        }

    def _runs(self, trial: TrialRecord) -> dict[int, Finished]:
        """Trainings that have come back, by the number of their fold, counted through all repeats."""
        keys = ((fold, self._key(trial, fold)) for fold in range(self._settings.n_runs))
        return {fold: self._state.results[key] for fold, key in keys if key in self._state.results}

    def _key(self, trial: TrialRecord, fold: int) -> str:
        return fold_key(trial.number, trial.epoch, self._settings.folds, *divmod(fold, self._settings.folds))

    def _job(self, trial: TrialRecord, fold: int) -> FoldJob:
        repeat, held_out = divmod(fold, self._settings.folds)
        return FoldJob(
            key=self._key(trial, fold),
            trial=trial.number,
            config=trial.config,
            seed=derived_seed(self._settings.study_seed, f"fold-{fold}-of-{self._settings.folds}", trial.number),
            epochs=trial.epoch,
            folds=self._settings.folds,
            repeat=repeat,
            fold=held_out,
        )

    def _row(self, standing: FoldStanding) -> dict[str, object]:
        """A candidate's line, in the metric's own unit."""
        trial = self._state.trials[standing.trial]
        sign = 1.0 if self._settings.goal == "minimize" else -1.0
        assert trial.best_objective is not None
        metric, mean = self._settings.metric, sign * standing.mean
        ends = (sign * end for end in (standing.low, standing.high) if end is not None)
        bounds = sorted(clipped(metric, end, seen=mean) for end in ends)
        return {
            "trial": standing.trial,
            "searched": sign * trial.best_objective,
            "mean": mean,
            "corrected": clipped(metric, sign * standing.corrected, seen=mean),
            "low": bounds[0] if bounds else None,
            "high": bounds[-1] if bounds else None,
            "epoch": standing.epoch,
            "folds": standing.n_folds,
            "scores": [sign * score for score in standing.scores],
            "chance": standing.chance,
        }
