"""What all trials together say about their space: too narrow, too wide, or too small to overfit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from hpsearch.diagnosis import Diagnosis, Finding, Reference, diagnose
from hpsearch.events import RangeMeasured
from hpsearch.job import Value
from hpsearch.space import Parameter, Space
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

EDGE = 0.03  # of a range: this close to an end is at its edge
LEANING = 1 / 3  # of a range: where four of five leaders must lie as well, since one trial lies anywhere by chance
LEADERS = 5
FEWEST_VALUES = 5  # that a parameter can take: with fewer, a third of the range is one value or two
AS_GOOD = 0.02  # of what was learnt beyond ignoring the inputs: a loss this close is as good
NEAR = 0.25  # of training loss: validation loss no further above it leaves nothing that fitting train better would cost
FEWEST_BAD = 1  # trials that diverged, before it is told
CHANCE = 0.01  # that a parameter which does nothing is suspected, over all of its possible bounds


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One thing to know about the space: a short name, a sentence with its numbers, what to do."""

    name: str
    words: str
    hint: str = ""


def remarks(state: StudyState, space: Space, per: Sequence[str] = ()) -> tuple[Remark, ...]:
    """All that can be said of a study so far; `per`: the parameters whose values make a branch of the LR range.

    The user's own config, which was not drawn from the space, says nothing of it.
    """
    trials = [trial for trial in state.trials.values() if not trial.baseline]
    leaders = [trial for trial in state.ranking() if trial.usable and not trial.baseline][:LEADERS]
    said = [*edges(leaders, space, state.ranges, per), *infeasible(trials, space)]
    capacity = nothing_overfits(state)
    return (*said, capacity) if capacity is not None else tuple(said)


def edges(
    leaders: Sequence[TrialRecord], space: Space, measured: Sequence[RangeMeasured] = (), per: Sequence[str] = ()
) -> list[Remark]:
    """Parameters whose best value lies at an end of its range, the other leaders on the same side.

    Args:
        leaders: the best trials, best first.
        measured: the learning-rate ranges, which bound the parameters that ask for it.
        per: the parameters whose values make a branch.
    """
    found: list[Remark] = []
    if not leaders:
        return found
    for parameter in space.searched:
        if parameter.kind == "categorical" or (parameter.count or FEWEST_VALUES) < FEWEST_VALUES:
            continue
        ranges = [_searched_range(parameter, trial, measured, per) for trial in leaders]
        places = [place(each, trial.config.get(parameter.name)) for each, trial in zip(ranges, leaders, strict=True)]
        known = [each for each in places if each is not None]
        if places[0] is None:
            continue
        for side, far in (("bottom", known), ("top", [1 - each for each in known])):
            at_end = far[0] <= EDGE
            leaning = sum(each <= LEANING for each in far)
            if not at_end or len(far) < 3 or leaning < 0.8 * len(far):
                continue
            if side == "bottom" and _ends_by_nature(ranges[0]):
                continue
            value = leaders[0].config[parameter.name]
            found.append(
                Remark(
                    name="edge",
                    words=f"the best {parameter.name} ({_short(value)}) lies at the {side} of "
                    f"its range ({_short(ranges[0].low)} to {_short(ranges[0].high)}); {leaning} of the best "
                    f"{len(far)} lie there",
                    hint=f"a {'lower min' if side == 'bottom' else 'higher max'} of {parameter.name} may do better",
                )
            )
    return found


def _ends_by_nature(parameter: Parameter) -> bool:
    """Whether nothing lies below a range: a share or a strength begins at 0, a number of things at 0 or 1."""
    if parameter.kind == "integer":
        return parameter.low in (0, 1)
    return not parameter.log and parameter.low == 0


def infeasible(trials: Iterable[TrialRecord], space: Space) -> list[Remark]:
    """Parameters that tell the trials which diverged from those which did not."""
    trials = [trial for trial in trials if trial.epoch or trial.diverged]
    n_bad = sum(trial.diverged for trial in trials)
    if n_bad < FEWEST_BAD:
        return []
    said = [Remark(name="diverged", words=f"{n_bad} of {len(trials)} trials diverged ({n_bad / len(trials):.0%})")]
    for parameter in space.searched:
        rows = [(trial.config[parameter.name], trial.diverged) for trial in trials if parameter.name in trial.config]
        split = _best_split(parameter, rows)
        if split is not None:
            said.append(split)
    return said


def nothing_overfits(state: StudyState) -> Remark | None:
    """Said when no trial that was trained for long overfits: the space can hold larger networks.

    Not where the best one's validation loss is more than a quarter above its training loss, since fitting train better
    would not help there; nor where a linear model is as good, since then size is not what is missing.
    """
    ends = state.search_ended
    long = [trial for trial in state.trials.values() if trial.epoch >= trial.max_epochs and not trial.diverged]
    if not ends or len(long) < 2:
        return None
    for trial in long:
        train, val = losses(trial)
        if not val or any(each.finding is Finding.OVERFITTING for each in diagnose(train, val)):
            return None
    train, val = losses(min(long, key=lambda trial: trial.sort_key))
    if not all(map(math.isfinite, train)) or val[-1] - train[-1] > NEAR * abs(train[-1]):
        return None
    if _linear_is_as_good(state, min(value for trial in long for value in losses(trial)[1])):
        return None
    return Remark(
        name="nothing overfits",
        words=f"none of {len(long)} trials trained to the end overfits (the best: train_loss {train[-1]:.3g}, "
        f"val_loss {val[-1]:.3g})",
        hint="widen capacity: larger networks, less regularisation, or longer training",
    )


def _linear_is_as_good(state: StudyState, val_loss: float) -> bool:
    """Whether a linear model, where one was measured, comes as near to this loss as makes no difference.

    On rows that chose nothing where that was told; else on val, where the loss flatters.
    """
    told = state.compared.over_linear if state.compared is not None else {}
    if told:
        return told.get("better") is not True
    linear, constant = (state.baseline_loss_of(name) for name in ("linear", "constant"))
    if linear is None:
        return False
    span = abs((constant if constant is not None else val_loss) - val_loss)
    return linear <= val_loss + AS_GOOD * span


def findings(trial: TrialRecord, known: Reference | None = None) -> tuple[Diagnosis, ...]:
    """What a trial's curve says; `known` from `reference`."""
    if trial.diverged:
        return (Diagnosis(finding=Finding.DIVERGED, words=trial.message),)
    return diagnose(*losses(trial), known)


def losses(trial: TrialRecord) -> tuple[list[float], list[float]]:
    """Training and validation loss after each epoch; NaN where a loop of the user's gives none."""
    rows = [row.metrics for row in trial.curve]
    if not any("val_loss" in row for row in rows):
        return [], []
    return [row.get("train_loss", math.nan) for row in rows], [row.get("val_loss", math.nan) for row in rows]


def reference(state: StudyState, baseline: float | None = None) -> Reference:
    """What the study makes of a loss: the best that any trial reached."""
    trains, vals = [], []
    for trial in state.trials.values():
        if not trial.diverged:
            train, val = losses(trial)
            trains += [value for value in train if math.isfinite(value)]
            vals += [value for value in val if math.isfinite(value)]
    return Reference(baseline=baseline, best_train=min(trains, default=None), best_val=min(vals, default=None))


def place(parameter: Parameter, value: Value) -> float | None:
    """Where in its range a value lies, 0 for the lowest and 1 for the highest, in log where the parameter is; None
    for what is no number of this range."""
    low, high = parameter.low, parameter.high
    if not low < high or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if parameter.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if value > 0 else None
    return (value - low) / (high - low)


def _searched_range(
    parameter: Parameter, trial: TrialRecord, measured: Sequence[RangeMeasured], per: Sequence[str]
) -> Parameter:
    """The parameter with the bounds that the trial was drawn from."""
    if parameter.bounds_from is None:
        return parameter
    branch = {name: trial.config[name] for name in per if name in trial.config}
    found = next((each for each in measured if each.branch == branch), None)
    return parameter if found is None else replace(parameter, low=found.low, high=found.high)


def _best_split(parameter: Parameter, rows: Sequence[tuple[Value, bool]]) -> Remark | None:
    """The bound or value that best parts the trials that diverged from the others, if chance would not do so."""
    if parameter.kind == "categorical":
        values = list(dict.fromkeys(str(value) for value, _ in rows))
        splits = [(f"{parameter.name}={value}", [str(v) == value for v, _ in rows]) for value in values]
    else:
        numbers = sorted({value for value, _ in rows if isinstance(value, int | float)})
        bounds = [(a + b) / 2 if not parameter.log else math.sqrt(a * b) for a, b in pairwise(numbers)]
        splits = [(f"{parameter.name} > {_short(b)}", [_number(v) > b for v, _ in rows]) for b in bounds]
        splits += [(f"{parameter.name} < {_short(b)}", [_number(v) < b for v, _ in rows]) for b in bounds]
    bad = np.array([diverged for _, diverged in rows])
    best: tuple[float, str, int, int] | None = None
    for words, inside in splits:
        mask = np.array(inside)
        n_in, bad_in = int(mask.sum()), int((mask & bad).sum())
        p = _chance(len(rows), int(bad.sum()), n_in, bad_in)
        if best is None or p < best[0]:
            best = (p, words, bad_in, n_in)
    if best is None or best[0] * len(splits) > CHANCE:
        return None
    _, words, bad_in, n_in = best
    n_bad, n_out = int(bad.sum()), len(rows) - n_in
    return Remark(
        name="infeasible",
        words=f"{bad_in} of {n_in} trials with {words} diverged, {n_bad - bad_in} of the {n_out} others",
        hint=f"leave out {words}" if bad_in == n_in else f"fewer trials with {words}",
    )


def _chance(n: int, n_bad: int, n_in: int, bad_in: int) -> float:
    """That at least `bad_in` of the `n_bad` fall among `n_in` of `n` by chance: Fisher's exact test, one-sided."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(bad_in - 1, n, n_bad, n_in))


def _number(value: Value) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
