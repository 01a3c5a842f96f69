"""A study's figures, by topic: from its state to what `plots` draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from hpsearch.lr_curve import measure_range, probe_scores, ramp_lrs
from hpsearch.report.plots import (
    CurvePlot,
    LrRangePlot,
    ParameterPlot,
    SearchPoint,
    ensemble_figure,
    learning_curves_figure,
    lr_range_figure,
    search_figure,
)
from hpsearch.rungs import rung_epochs
from hpsearch.spec import Spec
from hpsearch.stages.lr_range import PROBE_STEPS, branch_key, losses_of
from hpsearch.state import StudyState

Topic = Literal["lr-range", "search", "ensemble"]


def figures(topic: Topic, state: StudyState) -> Mapping[str, bytes]:
    """PNG bytes by file name; empty where the study has nothing to show of the topic."""
    assert state.opened is not None
    spec = Spec.from_dump(dict(state.opened.spec))
    match topic:
        case "lr-range":
            return _lr_range(state, spec)
        case "search":
            return _search(state, spec)
        case "ensemble":
            return _ensemble(state)


def load_matplotlib() -> None:
    """Import what draws: half a second, better spent while the study starts."""
    importlib.import_module("matplotlib.figure")


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


def _search(state: StudyState, spec: Spec) -> dict[str, bytes]:
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
    files = {"learning_curves.png": learning_curves_figure(curves, metric=metric, goal=goal, rungs=rungs)}
    names = dict.fromkeys(p.name for p in spec.space.searched)
    logs = {p.name for p in spec.space.searched if p.log}
    parameters = [ParameterPlot(name=name, log=name in logs) for name in names]
    if parameters:
        files["search.png"] = search_figure(points, parameters, metric=metric, goal=goal)
    return files


def _ensemble(state: StudyState) -> dict[str, bytes]:
    selected = state.selected
    if selected is None or not selected.scores or selected.single_score is None:
        return {}
    best_round = selected.scores.index(min(selected.scores)) + 1
    assert state.data is not None
    metric = "mean squared error" if state.data.outputs == "values" else "negative log likelihood (nats)"
    figure = ensemble_figure(selected.scores, best_round=best_round, single_score=selected.single_score, metric=metric)
    return {"ensemble.png": figure}
