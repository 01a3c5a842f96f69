"""Which trial a study takes for its best, and by what: one answer for the report, the rankings, the figures and MLflow.

The last word counts. Fresh seeds decide where the best few were confirmed, else folds where they were cross-validated,
else the search's own score. Each time it is the mean that decides, as it was measured: what is taken off the mean of
whoever comes first, since being first flatters, changes no order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpsearch.state import StudyState


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best single trial, and how it came to be that."""

    trial: int
    by: Literal["seeds", "folds", "search"]
    metric: str  # that ranked it; of the search with its split, else of fresh rows or held-out folds
    value: float  # of that metric, in its own unit: the mean that ranked it
    n_scores: int  # fresh seeds, or folds, that it is the mean of; 1 for the search
    of: int  # trials that were ranked with it
    place: int  # among them; another than the first where the first can no longer be had
    final: bool  # the ensemble was chosen: nothing can change it but more search
    searched: int  # who comes first by the search's own score

    @property
    def rule(self) -> str:
        """`chosen by the mean accuracy of 3 fresh seeds, 0.9286: first of 3; the search had trial 20 first`"""
        what = {"seeds": f"of {self.n_scores} fresh seeds", "folds": f"of {self.n_scores} folds", "search": ""}[self.by]
        metric = f"the mean {self.metric} {what}" if what else f"its {self.metric} in the search"
        place = "first" if self.place == 1 else f"number {self.place}, whose betters are gone,"
        told = f"chosen by {metric}, {self.value:.4g}: {place} of {self.of}"
        return told if self.trial == self.searched else f"{told}; the search had trial {self.searched} first"


def winner(state: StudyState) -> Winner | None:
    """The best single trial as far as the study has come; None before any trial can be used."""
    first = state.best()
    usable = [number for number in state.leaders if state.trials[number].usable]
    if state.selected is not None:
        number = state.selected.best
    elif usable:
        number = usable[0]
    elif first is not None:
        number = first.number
    else:
        return None
    ranked = [trial.number for trial in state.ranking() if trial.best_objective is not None]
    searched = next((n for n in ranked if not (state.trials[n].diverged or state.trials[n].failed)), number)
    final, metric = state.selected is not None, state.metric.removeprefix("val_")
    for by, rows in (("seeds", _rows(state, "seeds")), ("folds", _rows(state, "folds"))):
        place = next((i for i, row in enumerate(rows) if row["trial"] == number), None)
        if rows and place is None:
            break  # of those that were looked into none could be had
        if place is not None:
            row, named = rows[place], by == "seeds"
            return Winner(
                trial=number,
                by="seeds" if named else "folds",
                metric=metric,
                value=ranking_mean(row),
                n_scores=int(str(row[by])),
                of=len(rows),
                place=place + 1,
                final=final,
                searched=searched,
            )
    trial = state.trials[number]
    return Winner(
        trial=number,
        by="search",
        metric=state.metric,
        value=trial.best_metrics.get(state.metric, math.nan),
        n_scores=1,
        of=len(state.trials),
        place=ranked.index(number) + 1 if number in ranked else 1,
        final=final,
        searched=searched,
    )


def ranking_mean(row: Mapping[str, object]) -> float:
    """What a row of folds or fresh seeds is ranked by; an old journal has of fresh seeds only the corrected mean."""
    return float(str(row.get("mean", row.get("confirmed"))))


def looked_into(state: StudyState, trial: int) -> tuple[bool, bool]:
    """Whether a trial was cross-validated, and whether it was confirmed."""
    folds, seeds = ([row["trial"] for row in _rows(state, by)] for by in ("folds", "seeds"))
    return trial in folds, trial in seeds


def _rows(state: StudyState, by: str) -> Sequence[Mapping[str, object]]:
    found = state.confirmed if by == "seeds" else state.evaluated
    return found.standings if found is not None else ()
