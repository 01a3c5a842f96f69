"""Confirm: train the best few again with fresh seeds, and measure them on rows that the search never ranked on.

The search's winner is the luckiest of many, so its own score flatters it. What is told of it afterwards comes from
here: its mean over fresh seeds, how far the search's score was from that, and the chance that it is the best at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpsearch.events import Confirmed, Evaluated, Event, Finished
from hpsearch.intervals import mean_interval
from hpsearch.job import ConfirmJob, Job
from hpsearch.metric_names import clipped
from hpsearch.racing import FEWEST_SEEDS, Standing, next_run, standings
from hpsearch.sampler import derived_seed
from hpsearch.stages import may_reorder
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class ConfirmSettings:
    """How many are confirmed, and by which measure."""

    trials: int
    seeds: int
    study_seed: int
    metric: str  # the study's metric without its split
    goal: Literal["minimize", "maximize"]


class Confirm:
    """Fresh seeds for the best few, spent where their order is unsure; then who is the best."""

    name = "confirm"

    def __init__(
        self, settings: ConfirmSettings, state: StudyState, *, arrays: Callable[[str], dict[str, np.ndarray]]
    ) -> None:
        """
        Args:
            arrays: reads the named arrays of a blob.
        """
        self._settings = settings
        self._state = state
        self._arrays = arrays
        self._best: list[TrialRecord] | None = None  # as of the last event that could change it
        self._spent = ""

    def end_budget(self, spent: str) -> None:
        """Give out no further runs: those under way may end, then the order is by the runs that there are."""
        self._spent = spent

    def apply(self, event: Event) -> None:
        if may_reorder(event) or isinstance(event, Evaluated):
            self._best = None

    def lost(self, worker: str) -> None:
        """A run lives in no worker's memory: it is trained from its start again."""

    def next_job(self, worker: str) -> Job | None:
        run = None if self._confirmed() or self._spent else self._next_run()
        if run is None:
            return None
        number, index = run
        return self._job(self._state.trials[number], self._free_index(number, index))

    def conclude(self) -> list[Event]:
        if self._confirmed() or not self._candidates() or self._under_way():
            return []
        cut_short = self._next_run() is not None
        if cut_short and not self._spent:
            return []
        scores = self._scores()
        too_few = any(len(runs) < min(FEWEST_SEEDS, self._settings.seeds) for runs in scores.values())
        table = () if too_few else standings(scores, seed=self._settings.study_seed)
        rows = [self._row(standing) for standing in table]
        out = [trial.number for trial in self._best or () if trial not in self._candidates()]
        reason = self._spent if cut_short else ""
        return [Confirmed(epoch_of_search=self._state.n_epochs, standings=tuple(rows), out=tuple(out), reason=reason)]

    def finished(self) -> bool:
        return self._confirmed() or not self._candidates()

    def _next_run(self) -> tuple[int, int] | None:
        return next_run(
            self._scores(),
            self._under_way(),
            candidates=[trial.number for trial in self._candidates()],
            n_seeds=self._settings.seeds,
            seed=self._settings.study_seed,
        )

    def _confirmed(self) -> bool:
        return self._state.confirmed is not None

    def _candidates(self) -> list[TrialRecord]:
        """The best few; those whose fresh run went wrong are out of the race."""
        if self._best is None:
            self._best = self._the_best()
        return [trial for trial in self._best if all(self._is_sound(run) for run in self._runs(trial).values())]

    def _the_best(self) -> list[TrialRecord]:
        """The first few: by folds, without those that were given up there, else by the search's own score."""
        evaluated = self._state.evaluated
        if evaluated is None or not evaluated.standings:
            return self._state.candidates(self._settings.trials)
        rows = [row for row in evaluated.standings if row["chance"] is not None]
        ranked = [self._state.trials[int(str(row["trial"]))] for row in rows]
        return [trial for trial in ranked if trial.usable][: self._settings.trials]

    def _is_sound(self, run: Finished) -> bool:
        """Whether a fresh run ended well, with a finite score."""
        if run.outcome != "done":
            return False
        told = [run.values["metrics"], run.values["val"]]
        metric = self._settings.metric
        values = [found[metric] for found in told if isinstance(found, Mapping) and metric in found]
        return bool(values) and math.isfinite(float(values[0]))

    def _job(self, trial: TrialRecord, index: int) -> ConfirmJob:
        return ConfirmJob(
            key=confirm_key(trial.number, trial.epoch, index),
            trial=trial.number,
            config=trial.config,
            seed=derived_seed(self._settings.study_seed, "confirm", trial.number, index),
            epochs=trial.epoch,
        )

    def _free_index(self, number: int, index: int) -> int:
        """Runs come back in any order: the first seed of the trial that nobody has taken."""
        trial = self._state.trials[number]
        taken = [i for i in range(self._settings.seeds) if self._is_taken(confirm_key(number, trial.epoch, i))]
        return next(i for i in range(index + 1) if i not in taken)

    def _is_taken(self, key: str) -> bool:
        return key in self._state.results or key in self._state.leases

    def _runs(self, trial: TrialRecord) -> dict[int, Finished]:
        """Runs of a trial that have come back, by the number of their seed."""
        keys = ((i, confirm_key(trial.number, trial.epoch, i)) for i in range(self._settings.seeds))
        return {i: self._state.results[key] for i, key in keys if key in self._state.results}

    def _scores(self) -> dict[int, list[float]]:
        return {
            trial.number: [self._score(result) for _, result in sorted(self._runs(trial).items())]
            for trial in self._candidates()
        }

    def _score(self, result: Finished) -> float:
        """The run's score, minimised; of a metric that only the user's own loop tells, the one on val."""
        metrics, val = result.values["metrics"], result.values["val"]
        assert isinstance(metrics, Mapping)
        assert isinstance(val, Mapping)
        metric = self._settings.metric
        sign = 1.0 if self._settings.goal == "minimize" else -1.0
        return sign * float(metrics[metric] if metric in metrics else val[metric])

    def _under_way(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for key in self._state.leases:
            kind, _, rest = key.partition("/")
            if kind == self.name:
                number = int(rest.partition("/")[0])
                counts[number] = counts.get(number, 0) + 1
        return counts

    def _row(self, standing: Standing) -> dict[str, object]:
        """A candidate's line: what the search said, what fresh seeds and fresh rows say, in the metric's own unit."""
        trial = self._state.trials[standing.trial]
        sign = 1.0 if self._settings.goal == "minimize" else -1.0
        assert trial.best_objective is not None
        low, high = self._interval(trial, standing)
        searched, confirmed = sign * trial.best_objective, sign * standing.corrected
        return {
            "trial": standing.trial,
            "searched": searched,
            "mean": sign * standing.mean,
            "confirmed": confirmed,
            "low": low,
            "high": high,
            "optimism": standing.corrected - trial.best_objective,  # positive where the search's score flattered
            "seeds": standing.n_seeds,
            "chance": standing.chance,
        }

    def _interval(self, trial: TrialRecord, standing: Standing) -> tuple[float | None, float | None]:
        """95 % of the confirmed score on new rows with a new seed's mean: the spread of rows and of seeds together."""
        metric, sign = self._settings.metric, 1.0 if self._settings.goal == "minimize" else -1.0
        refs = [str(result.values["row_scores"]) for result in self._runs(trial).values()]
        rows = [self._arrays(ref) for ref in refs]
        if standing.low is None or any(metric not in row for row in rows):
            return None, None
        of_rows = mean_interval(sum(row[metric] for row in rows) / len(rows), seed=self._settings.study_seed)
        if of_rows.low is None or of_rows.high is None:
            return None, None
        half = standing.corrected - standing.low
        centre = sign * standing.corrected
        low = centre - math.hypot(of_rows.value - of_rows.low, half)
        high = centre + math.hypot(of_rows.high - of_rows.value, half)
        return clipped(metric, low, seen=centre), clipped(metric, high, seen=centre)


def confirm_key(trial: int, epochs: int, index: int) -> str:
    """Key of a fresh run of a trial.

    >>> confirm_key(17, 27, 0)
    'confirm/17/27/0'
    """
    return f"confirm/{trial}/{epochs}/{index}"
