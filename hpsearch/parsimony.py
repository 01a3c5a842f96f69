"""The smallest model that is as good: trials by score and number of parameters.

A difference smaller than the error of the scores is none, and of equals the smallest is to be preferred: it is faster,
takes less memory, and has had less room to fit its noise. How large that error is, is measured on rows that the search
never ranked on; where trials were confirmed, what another seed would have given is counted too.

Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone 1984, Classification and Regression Trees,
section 3.4.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpsearch.errors import UsageError
from hpsearch.events import Finished
from hpsearch.job import evaluation_key
from hpsearch.racing import seed_spread
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

Arrays = Callable[[str], Mapping[str, np.ndarray]]
"""Reads the named arrays of a blob."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A trial as it is weighed here."""

    trial: int
    score: float  # of its best epoch, minimised
    n_parameters: int


@dataclass(frozen=True, kw_only=True)
class AsGood:
    """Trials that are as good as the best one."""

    best: Sized
    threshold: float  # minimised; a trial's score is at most this
    trials: tuple[Sized, ...]  # smallest first; the best is one of them


def read_within(text: str) -> float:
    """How many standard errors a trial may be worse than the best.

    Raises:
        UsageError: it is no such number.

    >>> read_within("1se"), read_within("0.5se")
    (1.0, 0.5)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)se", text, re.ASCII)
    times = float(found[1]) if found is not None else math.inf
    if not math.isfinite(times):
        raise UsageError(
            f"--smallest-within takes a number of standard errors (got {text!r})",
            hint="write 1se, or 0.5se, or 2se",
        )
    return times


def as_good(trials: Sequence[Sized], *, error: float, times: float = 1.0) -> AsGood:
    """Trials whose score is within `times` standard errors of the best score, the smallest first.

    Of one size the better comes first, of one size and score the lower trial number.

    Args:
        error: the standard error of the best trial's score.

    Raises:
        ValueError: no trials.

    >>> found = as_good([Sized(trial=0, score=0.10, n_parameters=900), Sized(trial=1, score=0.11, n_parameters=50),
    ...                  Sized(trial=2, score=0.20, n_parameters=10)], error=0.02)
    >>> [each.trial for each in found.trials]
    [1, 0]
    """
    if not trials:
        raise ValueError("at least one trial is needed")
    best = min(trials, key=lambda each: (each.score, each.trial))
    threshold = best.score + times * error
    kept = [each for each in trials if each.score <= threshold]
    kept.sort(key=lambda each: (each.n_parameters, each.score, each.trial))
    return AsGood(best=best, threshold=threshold, trials=tuple(kept))


def front(trials: Sequence[Sized]) -> tuple[Sized, ...]:
    """Trials that no other beats in score without being larger, smallest first (the Pareto front).

    One trial of each size and score: the one with the lowest number.
    """
    found: list[Sized] = []
    for each in sorted(trials, key=lambda each: (each.n_parameters, each.score, each.trial)):
        if not found or each.score < found[-1].score:
            found.append(each)
    return tuple(found)


def standard_error(rows_N: Sequence[float] | np.ndarray | None, *, n_scored: int, seeds: float | None) -> float | None:
    """The standard error of a trial's score, a mean over rows by one seed; None where nothing is known of it.

    Args:
        rows_N: the trial's scores of single rows that the search never ranked on.
        n_scored: rows that the score itself is a mean of.
        seeds: standard deviation between seeds of one config; None where that was not measured.
    """
    parts = [] if seeds is None else [seeds]
    if rows_N is not None and len(rows_N) > 1 and np.isfinite(rows_N).all():
        parts.append(float(np.std(np.asarray(rows_N, dtype=np.float64), ddof=1)) / math.sqrt(n_scored))
    return math.hypot(*parts) if parts else None


# What a study knows


def sized(state: StudyState) -> list[Sized]:
    """Trials that could be taken, with a score and a known size; none that diverged or failed."""
    return [
        Sized(trial=trial.number, score=trial.best_objective, n_parameters=trial.n_parameters)
        for trial in state.trials.values()
        if trial.best_objective is not None and trial.n_parameters is not None and _sound(trial)
    ]


def measured_error(state: StudyState, trial: int, arrays: Arrays) -> float | None:
    """The standard error of a trial's score, None before anything was measured that tells it.

    Raises:
        DamagedBlob: scores of rows are not there as they were written.
    """
    metric = state.metric.removeprefix("val_")
    ref = row_scores_of(state, trial)
    rows = None if ref is None else arrays(ref).get(metric)
    n_val = state.data.n_rows.get("val") if state.data is not None else None
    n_scored = n_val or (1 if rows is None else len(rows))
    fresh = {number: [_metrics(run)[metric] for run in runs] for number, runs in _fresh_runs(state).items()}
    return standard_error(rows, n_scored=n_scored, seeds=seed_spread(fresh))


def row_scores_of(state: StudyState, trial: int) -> str | None:
    """Where a trial's scores of rows are that the search never ranked on: its own, else those of a fresh seed."""
    own = state.results.get(evaluation_key("ensemble", [(trial, 1.0)]))
    for result in (own, *_fresh_runs(state).get(trial, ())):
        if result is not None and result.outcome == "done" and result.values.get("row_scores") is not None:
            return str(result.values["row_scores"])
    return None


def _sound(trial: TrialRecord) -> bool:
    return trial.usable and not (trial.diverged or trial.failed)


def _fresh_runs(state: StudyState) -> dict[int, list[Finished]]:
    """By trial, what it gave with fresh seeds, trained for as long as it is now; none before all was confirmed."""
    runs: dict[int, list[Finished]] = {}
    for key, result in sorted(state.results.items()) if state.confirmed is not None else ():
        kind, _, rest = key.partition("/")
        if kind == "confirm" and result.outcome == "done":
            number, epochs, _ = (int(part) for part in rest.split("/"))
            if state.trials[number].epoch == epochs:
                runs.setdefault(number, []).append(result)
    return runs


def _metrics(result: Finished) -> Mapping[str, float]:
    metrics = result.values["metrics"]
    assert isinstance(metrics, Mapping)
    return metrics
