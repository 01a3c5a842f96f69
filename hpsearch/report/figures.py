"""A study's figures, by topic: from its state to what `plots` draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from hpsearch.errors import HpsearchError
from hpsearch.events import Selected
from hpsearch.lr_curve import measure_range, probe_scores, ramp_lrs
from hpsearch.parsimony import Arrays, AsGood, as_good, front, measured_error, row_scores_of, sized
from hpsearch.report.batch_figure import batch_figure, batch_plot
from hpsearch.report.plots import (
    BaselineLine,
    CurvePlot,
    LrRangePlot,
    ParameterPlot,
    SearchPoint,
    SizePoint,
    ensemble_figure,
    learning_curves_figure,
    lr_range_figure,
    pareto_figure,
    search_figure,
)
from hpsearch.rungs import rung_epochs
from hpsearch.sentences import WHAT_BASELINE
from hpsearch.spec import Spec
from hpsearch.stages.lr_range import PROBE_STEPS, branch_key, losses_of
from hpsearch.stages.preflight import kept_batch
from hpsearch.state import StudyState
from hpsearch.verdict import measured_metrics
from hpsearch.winner import winner

Topic = Literal["batch", "lr-range", "search", "ensemble"]


def figures(topic: Topic, state: StudyState, arrays: Arrays | None = None) -> Mapping[str, bytes]:
    """PNG bytes by file name; empty where the study has nothing to show of the topic.

    Args:
        arrays: reads blobs: the batch itself, and scores of rows, for what they tell of the smallest model that is as
            good; None where they are not at hand.
    """
    assert state.opened is not None
    spec = Spec.from_dump(dict(state.opened.spec))
    match topic:
        case "batch":
            return _batch(state, arrays)
        case "lr-range":
            return _lr_range(state, spec)
        case "search":
            return _search(state, spec, arrays)
        case "ensemble":
            return _ensemble(state)


def drawn_from(topic: Topic, state: StudyState) -> str:
    """What changes when the figures of a topic would show something else; "" where there is nothing to draw.

    Trials are shown when the search ends; baselines, scores of rows and fresh seeds may come after it.
    """
    match topic:
        case "batch":
            return state.digests.get(str(kept_batch(state).get("batch")), "")
        case "lr-range":
            return f"{len(state.ranges)}@{state.range_edits}"
        case "search":
            lines = _baselines(state, Spec.from_dump(dict(state.opened.spec))) if state.opened is not None else []
            known = "".join(f" {line.label}={line.value:.6g}" for line in lines)
            best, named = state.best(), winner(state)
            rows = row_scores_of(state, best.number) if best is not None else None
            told = (f" rows of {rows}" if rows else "") + (" confirmed" if state.confirmed is not None else "")
            told += (
                f" winner {named.trial}"
                if named is not None and best is not None and named.trial != best.number
                else ""
            )
            return f"{len(state.trials)}@{state.n_epochs}{known}{told}"
        case "ensemble":
            return f"{state.selected} {_constant(state, 'ensemble')}"


def load_matplotlib() -> None:
    """Import what draws: half a second, better spent while the study starts."""
    importlib.import_module("matplotlib.figure")


def _batch(state: StudyState, arrays: Arrays | None) -> dict[str, bytes]:
    told = kept_batch(state)
    if arrays is None or "batch" not in told:
        return {}
    return {"batch.png": batch_figure(batch_plot(told, arrays(str(told["batch"]))))}


def _lr_range(state: StudyState, spec: Spec) -> dict[str, bytes]:
    settings = spec.lr_range
    lrs = ramp_lrs(settings.min, settings.max, settings.steps)
    panels = []
    for measured in state.ranges:
        key = branch_key(measured.branch)
        ramps = [state.results.get(f"ramp/{key}/{seed}") for seed in range(settings.seeds)]
        losses = [losses_of(ramp) for ramp in ramps if ramp is not None]
        again = measure_range(losses, lrs, user_low=settings.min, user_high=settings.max) if losses else None
        panels.append(
            LrRangePlot(
                branch="" if key == "all" else key,
                lrs=[float(lr) for lr in lrs],
                losses=losses,
                median_curve=again.median_curve if again is not None else (),
                lr=measured.lr,
                low=measured.low,
                high=measured.high,
                spread_decades=measured.spread_decades if math.isfinite(measured.spread_decades) else None,
                probes=_probes(state, key),
            )
        )
    return {"lr_range.png": lr_range_figure(panels)} if panels else {}


def _probes(state: StudyState, branch: str) -> Mapping[float, float]:
    """Each constant rate's score, as the measurement saw it; empty where the ramps were sure."""
    losses: dict[float, list[Sequence[float]]] = {}
    for key, result in state.results.items():
        if key.startswith(f"probe/{branch}/"):
            losses.setdefault(float(key.split("/")[-2]), []).append(losses_of(result))
    return probe_scores(losses, steps=PROBE_STEPS) if losses else {}


def _search(state: StudyState, spec: Spec, arrays: Arrays | None) -> dict[str, bytes]:
    metric, goal, stopping = spec.metric.name, spec.metric.goal, spec.early_stopping
    halving = stopping.rule in ("asha", "sha")
    rungs = rung_epochs(stopping.min_epochs, stopping.max_epochs, stopping.reduction_factor) if halving else ()
    curves = [
        CurvePlot(
            trial=trial.number,
            state=str(trial.state),
            epochs=[row.epoch for row in trial.curve if metric in row.metrics],
            values=[row.metrics[metric] for row in trial.curve if metric in row.metrics],
        )
        for trial in state.trials.values()
    ]
    points = [
        SearchPoint(
            trial=trial.number, state=str(trial.state), value=trial.best_metrics.get(metric), config=trial.config
        )
        for trial in state.trials.values()
    ]
    if not any(curve.values for curve in curves):
        return {}
    lines = _baselines(state, spec)
    found = winner(state)
    best = None if found is None else found.trial
    own = [trial.number for trial in state.trials.values() if trial.baseline]
    files = {
        "learning_curves.png": learning_curves_figure(
            curves, metric=metric, goal=goal, rungs=rungs, baselines=lines, winner=best, own=own
        )
    }
    names = dict.fromkeys(p.name for p in spec.space.searched)
    logs = {p.name for p in spec.space.searched if p.log}
    parameters = [ParameterPlot(name=name, log=name in logs) for name in names]
    if parameters:
        files["search.png"] = search_figure(
            points, parameters, metric=metric, goal=goal, baselines=lines, winner=best, own=own
        )
    return files | _pareto(state, spec, arrays, lines, best)


def _pareto(
    state: StudyState, spec: Spec, arrays: Arrays | None, lines: Sequence[BaselineLine], best: int | None
) -> dict[str, bytes]:
    """The metric against size; nothing where all trials are of one size."""
    metric, goal = spec.metric.name, spec.metric.goal
    points = [
        SizePoint(
            trial=trial.number,
            state=str(trial.state),
            value=trial.best_metrics.get(metric),
            n_parameters=trial.n_parameters,
        )
        for trial in state.trials.values()
        if trial.n_parameters is not None
    ]
    if len({point.n_parameters for point in points}) < 2:
        return {}
    known = sized(state)
    found = _smallest(state, arrays)
    figure = pareto_figure(
        points,
        front=[each.trial for each in front(known)],
        metric=metric,
        goal=goal,
        smallest=None if found is None else found.trials[0].trial,
        threshold=None if found is None else found.threshold * (1.0 if goal == "minimize" else -1.0),
        baselines=lines,
        winner=best,
    )
    return {"pareto.png": figure}


def _smallest(state: StudyState, arrays: Arrays | None) -> AsGood | None:
    """Trials within one standard error of the best, None where the error is not known."""
    known = sized(state)
    if arrays is None or not known:
        return None
    best = min(known, key=lambda each: (each.score, each.trial))
    try:
        error = measured_error(state, best.trial, arrays)
    except HpsearchError:  # scores of rows that cannot be read: whoever needs them says so
        return None
    return None if error is None else as_good(known, error=error)


def _baselines(state: StudyState, spec: Spec) -> list[BaselineLine]:
    """What the study's metric is held against on val, and what the user gave."""
    name = spec.metric.name
    found = []
    for key, label in WHAT_BASELINE.items() if name.startswith("val_") else ():
        value = _measured(state, key, "val").get(name.removeprefix("val_"))
        if value is not None:
            found.append(BaselineLine(label=label, value=value))
    return found + [BaselineLine(label=label, value=value) for label, value in spec.baselines.items()]


def _measured(state: StudyState, baseline: str, split: str) -> Mapping[str, float]:
    """A baseline's metrics on a split; empty where it was not measured."""
    result = state.results.get(f"baseline/{baseline}")
    metrics = result.values.get("metrics") if result is not None and result.outcome == "done" else None
    found = metrics.get(split) if isinstance(metrics, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _constant(state: StudyState, split: str) -> float | None:
    return _measured(state, "constant", split).get("loss")


def _ensemble(state: StudyState) -> dict[str, bytes]:
    selected = state.selected
    if selected is None or not selected.scores or selected.single_score is None:
        return {}
    best_round = selected.scores.index(min(selected.scores)) + 1
    assert state.data is not None
    metric = "mean squared error" if state.data.outputs == "values" else "negative log likelihood (nats)"
    constant = _constant(state, "ensemble")
    lines = [] if constant is None else [BaselineLine(label=WHAT_BASELINE["constant"], value=constant)]
    figure = ensemble_figure(
        selected.scores,
        best_round=best_round,
        single_score=selected.single_score,
        metric=metric,
        baselines=lines if _is_the_loss(state, selected) else (),
    )
    return {"ensemble.png": figure}


def _is_the_loss(state: StudyState, selected: Selected) -> bool:
    """Whether the ensemble's score is the task's own loss, so that a baseline's loss is in its unit: the best single
    model then scores what its loss is."""
    assert selected.single_score is not None
    losses = [measured_metrics(state, "ensemble", [(trial, 1.0)]).get("loss") for trial in selected.pool]
    known = [loss for loss in losses if loss is not None]
    return bool(known) and math.isclose(min(known), selected.single_score, rel_tol=1e-3, abs_tol=1e-6)
