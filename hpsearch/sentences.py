"""Sentences about a study that the report, `status` and MLflow's note share, so that all use the same words."""

from __future__ import annotations

from collections.abc import Mapping

from hpsearch.number_text import interval, number
from hpsearch.state import StudyState
from hpsearch.verdict import baselines, lanes, own_config
from hpsearch.winner import looked_into, ranking_mean, winner

WHAT_BASELINE = {"constant": "ignoring the inputs", "linear": "a linear model"}
"""What the study measures itself, in words."""


def winner_line(state: StudyState) -> str:
    """`best trial 4: chosen by the mean accuracy of 3 fresh seeds, 0.9286: first of 3`; "" before any trial."""
    best = winner(state)
    return "" if best is None else f"best trial {best.trial}: {best.rule}"


def training_line(state: StudyState) -> str:
    """`lanes: 24 of 30 trials shared a program, up to 8 at once; precision: bf16`; "" where neither was asked for."""
    spec = state.opened.spec if state.opened is not None else {}
    resources = spec.get("resources")
    asked = resources.get("lanes") if isinstance(resources, Mapping) else None
    found = lanes(state)
    told = []
    if found["trials"]:
        shared = f"{found['trials']} of {found['of']} trials shared a program, up to {found['most']} at once"
        told.append(f"lanes: {shared}")
    elif asked not in (None, 1) and found["of"]:
        told.append("lanes: none, each trial was trained by itself")
    if spec.get("precision", "float32") != "float32":
        told.append(f"precision: {spec['precision']}")
    return "; ".join(told)


def ensemble_line(state: StudyState) -> str:
    """What a reader should know of an ensemble that is a single trial; "" for any other."""
    selected = state.selected
    if selected is None or len(selected.members) != 1:
        return ""
    ((trial, _),) = selected.members
    told = f"the ensemble is trial {trial} alone"
    if len(selected.pool) > 1:
        told += ": no other checkpoint improved it on the rows set aside for choosing"
    if trial == selected.best:
        return told
    crossed, confirmed = looked_into(state, trial)
    asked = {"cross-validated": (state.evaluated, crossed), "confirmed": (state.confirmed, confirmed)}
    known = {word: was for word, (stage, was) in asked.items() if stage is not None}
    if known and not any(known.values()):
        how = " nor ".join(known)
        told += f"; it was {'neither ' if len(known) > 1 else 'not '}{how}"
    elif known:
        told += "; it was " + " and ".join(f"{'' if was else 'not '}{word}" for word, was in known.items())
    return told


def gain_line(state: StudyState, gain: Mapping[str, object]) -> str:
    """The ensemble against the best single trial on the test split, in one line."""
    if gain.get("value") is None:
        return "The ensemble was not compared on a test split."
    selected = state.selected
    what = "ensemble"
    if selected is not None and len(selected.members) == 1:
        what = f"trial {selected.members[0][0]}"
    if gain.get("low") is None:
        told = f"{number(gain['value'])}; too few rows for an interval, so undecided"
        return f"{what} − best trial, test {gain['metric']}: {told}"
    word = {True: "better", False: "worse", None: "no difference that this test split can show"}
    better = gain.get("better")
    verdict = word[better if isinstance(better, bool) else None]
    return f"{what} − best trial, test {gain['metric']}: {interval(gain['value'], gain)}: {verdict}"


def fold_words(state: StudyState) -> list[str]:
    """Each trial that was cross-validated with the mean that ranks it: `trial 4 0.8716 [0.826, 0.907]`."""
    rows = state.evaluated.standings if state.evaluated is not None else ()
    return [f"trial {row['trial']} {interval(ranking_mean(row), row)}" for row in rows]


def seed_words(state: StudyState) -> list[str]:
    """Each trial that was confirmed with the mean that ranks it: `trial 4 0.9286 [0.883, 0.959]`."""
    rows = state.confirmed.standings if state.confirmed is not None else ()
    return [f"trial {row['trial']} {interval(ranking_mean(row), row)}" for row in rows]


def baseline_lines(state: StudyState) -> list[str]:
    """What the study is held against, on the split that tells: `baseline, a linear model: test loss 0.13`."""
    lines = []
    for name, found in baselines(state).items():
        if name in ("gain", "gain_over_linear") or not isinstance(found, Mapping):
            continue
        if "skipped" in found:
            lines.append(f"baseline {name}: skipped: {found['skipped']}")
            continue
        split = next(key for key in ("test", "val", "given") if key in found)
        metrics = found[split]
        assert isinstance(metrics, Mapping)
        figures = ", ".join(
            f"{metric if split == 'given' else f'{split} {metric}'} {number(value)}"
            for metric, value in metrics.items()
        )
        lines.append(f"baseline, {WHAT_BASELINE.get(name, name)}: {figures}")
    return [*lines, *_linear_lines(state)]


def _linear_lines(state: StudyState) -> list[str]:
    """Said where the best trial is not shown to be better than a linear model."""
    over = state.compared.over_linear if state.compared is not None else {}
    if not over or over.get("better") is True:
        return []
    by = f"best trial − linear model, {over['split']} {over['metric']}: {interval(over['value'], over)}"
    if over.get("low") is None:
        return [f"note: whether the best trial beats a linear model is undecided: {by}; too few rows for an interval"]
    if over.get("better") is False:
        return [f"note: a linear model is better than the best trial: {by}"]
    return [f"note: a linear model is as good as the best trial, as far as {over['n_rows']:,} rows can show: {by}"]


def own_config_lines(state: StudyState) -> list[str]:
    """`your baseline config: trial 64, rank 12 of 65, complete; the winner, trial 3, is better: …`; nothing without."""
    own = own_config(state)
    if own is None:
        return []
    told = f"your baseline config: trial {own['trial']}, rank {own['rank']} of {own['of']}, {own['state']}"
    gain = own["gain"]
    if state.selected is not None and state.selected.best == own["trial"]:
        return [f"{told}: it is the winner"]
    if state.selected is None or not isinstance(gain, Mapping):
        untold = state.compared is not None and own["untold"]
        return [f"{told}; {untold}" if untold else told]
    word = {True: "better", False: "worse"}.get(gain["better"])
    by = f"{gain['split']} {gain['metric']} differs by {interval(gain['value'], gain)}"
    best = f"the winner, trial {state.selected.best}"
    if gain["low"] is None:
        return [f"{told}; {best}: {by}; too few rows for an interval, so undecided"]
    if word is None:
        return [f"{told}; {best}: {by}: no difference that {gain['n_rows']:,} rows can show"]
    return [f"{told}; {best}, is {word}: {by}"]
