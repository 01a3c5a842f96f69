"""The figures of a study as PNG bytes: LR range, learning curves, ensemble, search, score against size.

Values in, bytes out. Figures are built from matplotlib's objects and its Agg canvas, never from pyplot, whose import
takes seconds, wants a display and keeps global state; matplotlib itself is imported when a figure is drawn.

Axes are set from the bulk of the values, so that one loss of 1e6 does not flatten all others, nor a baseline that is
far away; what lies beyond is said in the figure. Values that are not finite are left out, or marked where that tells
something.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Goal = Literal["minimize", "maximize"]

DOTS_PER_INCH = 130

FEW_VALUES = 6
"""A number with no more values than this is drawn in columns."""

HUGE = 1e100
"""Values are drawn no further out than this, nor nearer to zero than its inverse: matplotlib's own sums would leave
the range of floats."""

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
GREY, LIGHT, INK = "#8C8C8C", "#D9D9D9", "#222222"
BROWN = "#8B5E3C"  # of baselines, which no state has

BASELINE_DASHES = ((0, (7, 3)), (0, (7, 2, 1, 2)), (0, (1, 2)), (0, (3, 2)), (0, (7, 2, 1, 2, 1, 2)))
"""Line styles of baselines, in the order in which they are given; a sixth begins anew."""

FLAT = 1e-6
"""Of the best single score: rounds of greedy selection that differ by less do not differ."""

CURVES_SHARE = 0.6
"""An axis grows towards a baseline as long as the trials keep this share of its height."""

STATE_COLOURS = {
    "complete": BLUE,
    "stopped": "#A9A9A9",
    "paused": ORANGE,
    "running": GREEN,
    "waiting": SKY,
    "diverged": RED,
    "failed": PURPLE,
}
"""Colour of each trial state; any other state is drawn in ink."""

BAD_STATES = ("diverged", "failed")
"""Trials that are never the best, whatever they reached before."""


@dataclass(frozen=True, kw_only=True)
class LrRangePlot:
    """One branch of the LR range stage."""

    branch: str  # "optimizer=adamw"; "" for the only one
    lrs: Sequence[float]  # (T,) the ramp
    losses: Sequence[Sequence[float]]  # per seed, raw; may be shorter than lrs
    median_curve: Sequence[float | None] = ()  # (T,) smoothed
    lr: float | None = None  # the suggestion; None: nothing could be measured
    low: float | None = None
    high: float | None = None
    spread_decades: float | None = None
    probes: Mapping[float, float] = field(default_factory=dict)  # constant rate to its loss; not finite: diverged


@dataclass(frozen=True, kw_only=True)
class CurvePlot:
    """One trial's metric, epoch by epoch."""

    trial: int
    state: str
    epochs: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """One trial in the space that was searched."""

    trial: int
    state: str
    value: float | None  # the metric at the trial's best epoch, in its own unit; None or not finite: it has none
    config: Mapping[str, object]  # parameters that are not active are absent


@dataclass(frozen=True, kw_only=True)
class ParameterPlot:
    """One searched parameter: an axis."""

    name: str
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class BaselineLine:
    """A score that trials are held against: a horizontal line."""

    label: str  # "a linear model"
    value: float  # in the unit of the axis


@dataclass(frozen=True, kw_only=True)
class SizePoint:
    """One trial by its size."""

    trial: int
    state: str
    value: float | None  # as in SearchPoint
    n_parameters: int


def lr_range_figure(branches: Sequence[LrRangePlot], *, loss_name: str = "training loss") -> bytes:
    """Loss against learning rate, a panel per branch: each seed, their median, the suggestion and the interval.

    Raises:
        ValueError: no branches.
    """
    if not branches:
        raise ValueError("at least one branch is needed")
    figure, panels = _panels(len(branches), width=5.6, height=4.0, columns=3, foot=0.55)
    for panel, branch in zip(panels, branches, strict=True):
        _draw_branch(panel, branch, loss_name)
    _shared_legend(figure, panels)
    return png(figure)


def learning_curves_figure(
    curves: Sequence[CurvePlot],
    *,
    metric: str,
    goal: Goal = "minimize",
    rungs: Sequence[int] = (),
    baselines: Sequence[BaselineLine] = (),
    winner: int | None = None,
    own: Collection[int] = (),
) -> bytes:
    """A metric against epochs, one line per trial in its state's colour; the best trial is named.

    Args:
        curves: trials; values that are not finite are left out; a cross at the worst edge tells where a trial
            diverged or failed.
        metric: with its split, "val_loss".
        goal: which way is better.
        rungs: epochs at which trials were compared, drawn as dotted lines. With them the epochs are on a log scale,
            where rungs are evenly spaced and the many trials that ended early have room.
        baselines: what the metric is held against.
        winner: the best trial, where more than this metric chose it; the best by the metric is then told as such.
        own: trials of the user's own config.
    """
    figure, (panel,) = _panels(1, width=8.2, height=4.8, columns=1)
    finite = {
        c.trial: [(e, _drawable(v)) for e, v in zip(c.epochs, c.values, strict=True) if math.isfinite(v)]
        for c in curves
    }
    values = [v for points in finite.values() for _, v in points]
    last_epoch = max((e for curve in curves for e in curve.epochs), default=1)
    for rung in rungs:
        panel.axvline(rung, color=GREY, linestyle=":", linewidth=1.0, zorder=0.5)

    best = _best({c.trial: [v for _, v in finite[c.trial]] for c in curves if c.state not in BAD_STATES}, goal)
    counts: dict[str, int] = {}
    ended_badly: list[tuple[int, str]] = []
    for curve in sorted(curves, key=lambda c: (c.state == "complete", c.trial)):  # the complete ones on top
        counts[curve.state] = counts.get(curve.state, 0) + 1
        colour = STATE_COLOURS.get(curve.state, INK)
        if curve.state in BAD_STATES:
            ended_badly.append((max(curve.epochs, default=1), colour))
        if not finite[curve.trial]:
            continue
        epochs, ys = zip(*finite[curve.trial], strict=True)
        strong = curve.state == "complete"
        panel.plot(epochs, ys, color=colour, linewidth=1.5 if strong else 1.0, alpha=0.9 if strong else 0.7)
        panel.plot(epochs[-1:], ys[-1:], "o", markersize=3.5, color=colour)
    for epoch, colour in ended_badly:  # at the worst edge: their last value is mostly none, or far beyond the axis
        _mark_worst_edge(panel, epoch, colour, goal)
    _fit_y(panel, values, metric, goal)
    _draw_baselines(panel, baselines, goal)
    for trial in own:
        if finite.get(trial):
            epochs, ys = zip(*finite[trial], strict=True)
            panel.plot(epochs, ys, color=BROWN, linewidth=1.8, linestyle=(0, (4, 2)), label=_own_label(trial))
    for trial, marker, what in _named(best, winner if winner is not None and finite.get(winner) else None):
        epochs, ys = zip(*finite[trial], strict=True)
        i = int(np.argmin(ys) if goal == "minimize" else np.argmax(ys))
        width = 2.0 if marker == "*" else 1.2
        panel.plot(epochs, ys, color=INK, linewidth=width)
        panel.plot(epochs[i], ys[i], marker=marker, **_fill(marker), linestyle="none")
        label = f"{what}: trial {trial}, {_number(ys[i])} at epoch {epochs[i]}"
        panel.plot([], [], color=INK, linewidth=width, marker=marker, **_fill(marker), label=label)
    for state in [*STATE_COLOURS, *sorted(set(counts) - set(STATE_COLOURS))]:
        if state in counts:
            bad = state in BAD_STATES
            colour = STATE_COLOURS.get(state, INK)
            panel.plot([], [], color=colour, marker="x" if bad else "o", markersize=5, label=f"{counts[state]} {state}")
    if rungs:
        panel.set_xscale("log")
        ticks = sorted({1, *rungs, last_epoch})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_xlim(0.93, max(last_epoch, 2) * 1.07)
        panel.set_xlabel("epoch (log scale; dotted: rungs)")
    else:
        _integer_ticks(panel)
        panel.set_xlim(1 - 0.02 * last_epoch, max(last_epoch, 2) * 1.02)
        panel.set_xlabel("epoch")
    panel.set_title("Learning curves", loc="left")
    _shared_legend(figure, [panel])
    return png(figure)


def ensemble_figure(
    scores: Sequence[float],
    *,
    best_round: int,
    single_score: float,
    metric: str = "negative log likelihood (nats)",
    split: str = "ensemble split",
    baselines: Sequence[BaselineLine] = (),
) -> bytes:
    """The ensemble's score after each round of greedy selection, against the best single model's.

    Args:
        scores: after each round; lower is better.
        best_round: the round that was kept, 1 for the first.
        single_score: of the best model alone.
        metric: name and unit of the score.
        split: what it was measured on.
        baselines: what the score is held against, in its unit and on its split.

    Raises:
        ValueError: no scores, or a best_round that is not one of theirs.
    """
    if not 1 <= best_round <= len(scores):
        raise ValueError(f"best_round must be within 1 to {len(scores)} (got {best_round})")
    figure, (panel,) = _panels(1, width=6.6, height=4.2, columns=1)
    rounds = np.arange(1, len(scores) + 1)
    panel.axhline(single_score, color=RED, linestyle="--", linewidth=1.3, label=f"best single: {_number(single_score)}")
    flat = max(scores) - min(scores) <= FLAT * max(abs(single_score), 1e-12)
    if best_round > 1 or not flat:
        panel.plot(rounds[best_round - 1 :], scores[best_round - 1 :], "o-", color=GREY, markersize=3.5, linewidth=1.0)
        panel.plot(
            rounds[:best_round], scores[:best_round], "o-", color=BLUE, markersize=4.5, label="picks that were kept"
        )
        if best_round < len(scores):
            panel.plot([], [], "o-", color=GREY, markersize=3.5, linewidth=1.0, label="later picks, dropped")
    best = scores[best_round - 1]
    star = f"kept: {_number(best)} after {best_round} pick{'s' if best_round > 1 else ''}"
    panel.plot(best_round, best, "*", color=INK, markersize=15, markeredgecolor="white", label=star, zorder=5)
    panel.set_xlim(0.5, max(len(scores), 2) + 0.5)
    panel.margins(y=0.12)
    panel.autoscale_view()
    if flat:  # an axis of its own making would show noise of the last digits
        room = 0.1 * (abs(single_score) or 1.0)
        panel.set_ylim(single_score - room, single_score + room)
    if best_round == 1 and len(scores) > 1:
        panel.annotate(
            f"no pick helped: {len(scores) - 1} more were tried", (0.5, 0.9), xycoords="axes fraction", ha="center",
            fontsize=9, color=INK,
        )  # fmt: skip
    _draw_baselines(panel, baselines, "minimize")
    _integer_ticks(panel)
    panel.set_xlabel("models averaged, repeats counted")
    panel.set_ylabel(f"{metric}\n(lower is better)")
    panel.set_title(f"Greedy selection on the {split}", loc="left")
    _shared_legend(figure, [panel])
    return png(figure)


def search_figure(
    points: Sequence[SearchPoint],
    parameters: Sequence[ParameterPlot],
    *,
    metric: str,
    goal: Goal = "minimize",
    baselines: Sequence[BaselineLine] = (),
    winner: int | None = None,
    own: Collection[int] = (),
) -> bytes:
    """The metric against each searched parameter, a panel each; trials without a metric are marked at the edge.

    Numeric parameters get a numeric axis, logarithmic where `log` says so; those of few values, and all others, a
    column per value, in which trials are spread sideways.

    Args:
        winner: the best trial, where more than this metric chose it; the best by the metric is then told as such.
        own: trials of the user's own config, ringed.

    Raises:
        ValueError: no parameters.
    """
    if not parameters:
        raise ValueError("at least one parameter is needed")
    figure, panels = _panels(len(parameters), width=4.0, height=3.2, columns=3, foot=0.55)
    measured = [(p, _drawable(p.value)) for p in points if p.value is not None and math.isfinite(p.value)]
    best = _best({p.trial: [value] for p, value in measured if p.state not in BAD_STATES}, goal)
    values = [value for _, value in measured]
    named = _named(best, winner if winner in {p.trial for p, _ in measured} else None)
    for i, (panel, parameter) in enumerate(zip(panels, parameters, strict=True)):
        _draw_parameter(panel, points, parameter, named, own, goal)
        _fit_y(panel, values, metric if i % 3 == 0 else "", goal, note=i == 0)
        _draw_baselines(panel, baselines, goal, note=i == 0)
    _shared_legend(figure, panels)
    return png(figure)


def pareto_figure(
    points: Sequence[SizePoint],
    *,
    front: Sequence[int],
    metric: str,
    goal: Goal = "minimize",
    smallest: int | None = None,
    threshold: float | None = None,
    baselines: Sequence[BaselineLine] = (),
    winner: int | None = None,
) -> bytes:
    """The metric against the number of parameters, one point per trial; those that none beats are joined.

    Args:
        points: trials; those without a finite value are marked at the worst edge.
        front: trials that no other beats without being larger, smallest first.
        smallest: the smallest trial that is as good as the best; None where that is not known.
        threshold: the value that it had to reach: one standard error from the best.
        baselines: what the metric is held against.
        winner: the best trial, where more than this metric chose it; the best by the metric is then told as such.

    Raises:
        ValueError: no points, or a trial of the front, or the smallest, that is none of them or has no finite value.
    """
    if not points:
        raise ValueError("at least one trial is needed")
    ys = {p.trial: _drawable(p.value) for p in points if p.value is not None and math.isfinite(p.value)}
    xs = {p.trial: max(1, p.n_parameters) for p in points}  # a log scale has no place for none
    named = [*front, *([] if smallest is None else [smallest])]
    if not all(trial in ys for trial in named):
        raise ValueError(f"no value is known of trials {sorted(set(named) - set(ys))}")
    figure, (panel,) = _panels(1, width=8.2, height=4.8, columns=1)
    panel.set_xscale("log")
    for point in sorted(points, key=lambda p: (p.state == "complete", p.trial)):
        colour = STATE_COLOURS.get(point.state, INK)
        if point.trial not in ys:
            _mark_worst_edge(panel, xs[point.trial], colour, goal, label=f"{point.state}, no value")
        else:
            x, y = xs[point.trial], ys[point.trial]
            panel.plot(x, y, "o", color=colour, markersize=5.5, markeredgewidth=0, alpha=0.8, label=point.state)
    _fit_y(panel, list(ys.values()), metric, goal)
    _draw_baselines(panel, baselines, goal)
    if front:
        front_xs, front_ys = [xs[trial] for trial in front], [ys[trial] for trial in front]
        panel.plot(front_xs, front_ys, drawstyle="steps-post", color=INK, linewidth=1.4, alpha=0.8, zorder=1.5)
        panel.plot(front_xs, front_ys, "o", color="none", markeredgecolor=INK, markersize=9, markeredgewidth=1.2)
        label = "no smaller one is better"
        panel.plot([], [], "o-", color=INK, markerfacecolor="none", markersize=8, linewidth=1.4, label=label)
        for trial, marker, what in _named(front[-1], winner if winner in ys else None):
            label = f"{what}: trial {trial}, {_number(ys[trial])}"
            panel.plot(xs[trial], ys[trial], marker, **_fill(marker), zorder=5, label=label)
    if threshold is not None:
        panel.axhline(_drawable(threshold), color=GREEN, linewidth=1.0, zorder=0.6, label="one standard error")
    if smallest is not None:
        label = f"smallest within it: trial {smallest}"
        panel.plot(
            xs[smallest], ys[smallest], "D", color="none", markeredgecolor=GREEN, markeredgewidth=2.2, markersize=11,
            zorder=6, label=label,
        )  # fmt: skip
    low, high = min(xs.values()), max(xs.values())
    panel.set_xlim(low / 1.25, high * 1.25)
    _size_ticks(panel, few_decades=high < 100 * low)
    panel.set_xlabel("parameters (log scale)")
    panel.set_title("Score against size", loc="left")
    _shared_legend(figure, [panel])
    return png(figure)


def _draw_branch(panel: Axes, branch: LrRangePlot, loss_name: str) -> None:
    lrs = np.asarray(branch.lrs, dtype=np.float64)
    before_minimum: list[float] = []
    all_finite: list[float] = []
    curve = np.array([math.nan if v is None else _drawable(v) for v in branch.median_curve], dtype=np.float64)
    minimum = int(np.nanargmin(curve)) if np.isfinite(curve).any() else len(lrs) - 1
    for seed, run in enumerate(branch.losses):
        losses = np.array([_drawable(v) for v in run], dtype=np.float64)
        label = "single seeds" if seed == 0 else None
        panel.plot(lrs[: len(losses)], losses, color=SKY, linewidth=0.8, alpha=0.75, label=label)
        before_minimum += [float(v) for v in losses[: max(minimum + 1, 5)] if math.isfinite(v)]
        all_finite += [float(v) for v in losses if math.isfinite(v)]
    if np.isfinite(curve).any():
        panel.plot(lrs[: len(curve)], curve, color=INK, linewidth=2.0, label="median of seeds, smoothed")
    if branch.low is not None and branch.high is not None:
        panel.axvspan(branch.low, branch.high, color=GREEN, alpha=0.15, linewidth=0, label="interval to search")
    if branch.lr is not None:
        panel.axvline(branch.lr, color=GREEN, linewidth=2.0, label="suggestion")
    finite_probes = {lr: _drawable(loss) for lr, loss in branch.probes.items() if math.isfinite(loss)}

    # A ramp that works falls from its start to its minimum; what comes after may be anything.
    if before_minimum:
        top = float(np.quantile(before_minimum, 0.98))
        bottom = min(float(np.quantile(all_finite, 0.002)), min(before_minimum), *finite_probes.values(), top)
        room = (top - bottom) or abs(top) or 1.0
        panel.set_ylim(bottom - 0.08 * room, top + 0.25 * room)
    else:
        panel.set_yticks([])
    if finite_probes:
        rates, scores = zip(*sorted(finite_probes.items()), strict=True)
        panel.plot(rates, scores, "D", color=ORANGE, markersize=6, markeredgecolor="white", label="constant rates")
    for i, lr in enumerate(sorted(set(branch.probes) - set(finite_probes))):
        _mark_worst_edge(panel, lr, RED, "minimize", label=None if i else "constant rates, loss not finite")
    panel.set_xscale("log")
    panel.set_xlim(lrs[0], lrs[-1])
    panel.set_xlabel("learning rate (log scale)")
    panel.set_ylabel(f"{loss_name}, per step")
    panel.set_title(_branch_title(branch), loc="left")


def _branch_title(branch: LrRangePlot) -> str:
    name = branch.branch or "LR range"
    if branch.lr is None or branch.low is None or branch.high is None:
        return f"{name}\nno suggestion: the loss was not finite"
    spread = "" if branch.spread_decades is None else f" · seeds within {branch.spread_decades:.2f} decades"
    return f"{name}\nlr {branch.lr:.2g} in [{branch.low:.2g}, {branch.high:.2g}]{spread}"


def _draw_parameter(
    panel: Axes,
    points: Sequence[SearchPoint],
    parameter: ParameterPlot,
    named: Sequence[tuple[int, str, str]],
    own: Collection[int],
    goal: Goal,
) -> None:
    active = [p for p in points if parameter.name in p.config]
    found = [p.config[parameter.name] for p in active]
    distinct = sorted({v for v in found if isinstance(v, int | float) and not isinstance(v, bool)})
    numeric = bool(found) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)
    if numeric and not (len(distinct) <= FEW_VALUES and len(found) > 2 * len(distinct)):
        places = [float(str(v)) for v in found]
        if parameter.log and min(places) > 0:
            panel.set_xscale("log")
        elif all(isinstance(v, int) for v in found):
            _integer_ticks(panel)
        else:
            panel.locator_params(axis="x", nbins=6)
    else:
        names = [str(v) for v in distinct] if numeric else sorted({str(v) for v in found})
        places = [names.index(str(v)) + _jitter(p.trial) for p, v in zip(active, found, strict=True)]
        panel.set_xticks(range(len(names)), [_short(name) for name in names], rotation=25 if len(names) > 4 else 0)
        panel.set_xlim(-0.6, max(len(names), 1) - 0.4)
    marks = {trial: (marker, what) for trial, marker, what in named}
    # Stopped trials first, the best one last and on top.
    order = sorted(range(len(active)), key=lambda i: (active[i].trial in marks, active[i].state == "complete", i))
    for i in order:
        point, x = active[i], places[i]
        colour = STATE_COLOURS.get(point.state, INK)
        y = math.nan if point.value is None else _drawable(point.value)
        if math.isnan(y):
            _mark_worst_edge(panel, x, colour, goal, label=f"{point.state}, no value")
        elif point.trial in marks:
            marker, what = marks[point.trial]
            label = f"{what}: trial {point.trial}, {_number(y)}"
            panel.plot(x, y, marker, **_fill(marker), zorder=5, label=label)
        if point.trial not in marks and not math.isnan(y):
            panel.plot(x, y, "o", color=colour, markersize=5, markeredgewidth=0, alpha=0.8, label=point.state)
        if point.trial in own and not math.isnan(y):
            label = _own_label(point.trial)
            panel.plot(
                x, y, "o", color="none", markeredgecolor=BROWN, markeredgewidth=1.8, markersize=11, zorder=6,
                label=label, linestyle="none",
            )  # fmt: skip
    panel.set_xlabel(f"{parameter.name} (log scale)" if panel.get_xscale() == "log" else parameter.name)


def _panels(n: int, *, width: float, height: float, columns: int, foot: float = 0.45) -> tuple[Figure, list[Axes]]:
    """A figure with n panels of the given size in inches, and room below for a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows + foot), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    for panel in panels:
        panel.grid(True, color=LIGHT, linewidth=0.6, alpha=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(colors=INK, labelsize=9, which="both", color=GREY)
        panel.title.set_fontsize(11)
    return figure, panels


def _shared_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend below all panels, each label once."""
    entries: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        rows = math.ceil(len(entries) / max(2, int(figure.get_figwidth() / 1.8)))
        columns = math.ceil(len(entries) / rows)  # rows of like length
        labels = sorted(entries, key=_legend_rank)
        while columns > 1 and _legend_width(labels, columns) > figure.get_figwidth():
            columns -= 1
        handles = [entries[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """About how wide a legend is, in inches: it is filled column by column, each as wide as its longest label."""
    filled = np.array_split(np.array([len(label) for label in labels]), columns)
    return float(sum(0.72 + 0.066 * lengths.max() for lengths in filled))


def _legend_rank(label: str) -> int:
    """The best trial, then states in their usual order, then all others as they came."""
    if label.startswith(("best: ", "searched best: ")):
        return -2 + label.startswith("searched")
    ranks = {state: i for i, state in enumerate(STATE_COLOURS)}
    return next((ranks[word] for word in label.replace(",", "").split() if word in ranks), len(ranks))


def _fit_y(panel: Axes, values: Sequence[float], metric: str, goal: Goal, *, note: bool = True) -> None:
    """Scale, limits and title of the y axis from the bulk of the values; far outliers are counted, not shown."""
    if metric:
        panel.set_ylabel(f"{metric} ({'lower' if goal == 'minimize' else 'higher'} is better)")
    if not values:
        return
    ys = np.asarray(values, dtype=np.float64)
    log = bool((ys > 0).all() and np.quantile(np.log10(ys), 0.9) - np.log10(ys.min()) > 1)
    scaled = np.log10(ys) if log else ys
    quarter, half, three_quarters = np.quantile(scaled, [0.25, 0.5, 0.75])
    reach = 4.0 * max(three_quarters - quarter, 1e-3 * abs(half), 1e-9)
    shown = scaled[(scaled >= quarter - reach) & (scaled <= three_quarters + reach)]
    low, high = shown.min(), shown.max()
    # The good end is never cut: the best trials are what the figure is for.
    low, high = (scaled.min(), high) if goal == "minimize" else (low, scaled.max())
    room = 0.07 * ((high - low) or abs(high) or 1.0)
    beyond = int(((scaled < low) | (scaled > high)).sum())
    limits = (low - room, high + room)
    if log:
        from matplotlib.ticker import LogLocator

        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.set_ylim(10 ** limits[0], 10 ** limits[1])
    else:
        panel.set_ylim(*limits)
    if beyond and note:
        text = f"{beyond} value{'s' if beyond > 1 else ''} beyond the axis"
        y, side = (0.945, "top") if goal == "minimize" else (0.055, "bottom")
        panel.annotate(text, (0.995, y), xycoords="axes fraction", ha="right", va=side, fontsize=8, color=GREY)


def _draw_baselines(panel: Axes, baselines: Sequence[BaselineLine], goal: Goal, *, note: bool = True) -> None:
    """Thin lines below all else. The axis, whose limits are set, grows for those that are near; the others are named
    at the edge beyond which they lie."""
    log = panel.get_yscale() == "log"

    def place(value: float) -> float:
        return value if not log else math.log10(value) if value > 0 else -math.inf

    bottom, top = (place(limit) for limit in panel.get_ylim())
    largest = (top - bottom) / CURVES_SHARE
    places = {i: place(_drawable(line.value)) for i, line in enumerate(baselines) if math.isfinite(line.value)}
    beyond: list[int] = []
    for i, y in sorted(places.items(), key=lambda item: max(bottom - item[1], item[1] - top)):
        grown = (min(bottom, y), max(top, y))
        if grown[1] - grown[0] > largest:
            beyond.append(i)
        elif grown != (bottom, top):
            room = 0.04 * (grown[1] - grown[0])
            bottom, top = grown[0] - room * (y == grown[0]), grown[1] + room * (y == grown[1])
    for i in sorted(set(places) - set(beyond)):
        y, dashes = _drawable(baselines[i].value), BASELINE_DASHES[i % len(BASELINE_DASHES)]
        label = _baseline_label(baselines[i])
        panel.axhline(y, color=BROWN, linestyle=dashes, linewidth=1.3, alpha=0.85, zorder=0.8, label=label)
    panel.set_ylim(*((10**bottom, 10**top) if log else (bottom, top)))
    if not note:
        return
    for above in (True, False):
        names = [_baseline_label(baselines[i]) for i in sorted(beyond) if (places[i] > top) == above]
        if names:
            _note_at_edge(panel, names, above=above, worst=above == (goal == "minimize"))


def _baseline_label(line: BaselineLine) -> str:
    return f"{_short(line.label, 32)}: {_number(line.value)}"


def _note_at_edge(panel: Axes, names: Sequence[str], *, above: bool, worst: bool) -> None:
    """What lies beyond an edge, at that end of it where curves are rarely: they go from worse to better."""
    text = "\n".join(f"{'↑' if above else '↓'} {name}" for name in names)
    x, ha = (0.995, "right") if worst else (0.005, "left")
    has_count = worst and bool(panel.texts)  # of the values beyond the axis
    y = (0.885 if has_count else 0.945) if above else (0.115 if has_count else 0.055)
    panel.annotate(
        text, (x, y), xycoords="axes fraction", ha=ha, va="top" if above else "bottom", fontsize=8, color=BROWN
    )


def _size_ticks(panel: Axes, *, few_decades: bool) -> None:
    """Numbers at the ticks of a log axis (20k, 1M); between powers of ten too, where these alone would be few."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _mark_worst_edge(panel: Axes, x: float, colour: str, goal: Goal, *, label: str | None = None) -> None:
    """A cross where the worst values would be, whatever the y axis shows."""
    y = 0.975 if goal == "minimize" else 0.025
    panel.plot(x, y, "x", color=colour, markersize=6, transform=panel.get_xaxis_transform(), label=label)


def _best(values: Mapping[int, Sequence[float]], goal: Goal) -> int | None:
    """The trial with the best value; ties go to the lower number."""
    sign = 1.0 if goal == "minimize" else -1.0
    scored = {trial: min(sign * v for v in vs) for trial, vs in values.items() if vs}
    return min(scored, key=lambda trial: (scored[trial], trial), default=None)


def _named(best: int | None, winner: int | None) -> list[tuple[int, str, str]]:
    """The trials that a figure names, each with its marker and what it is; the winner last and on top.

    Args:
        best: by the figure's metric.
        winner: by all that is known; None: `best`.
    """
    if winner is None or winner == best:
        return [] if best is None else [(best, "*", "best")]
    return [*([] if best is None else [(best, "s", "searched best")]), (winner, "*", "best")]


def _fill(marker: str) -> dict[str, Any]:
    """A full star, and a hollow square."""
    if marker == "*":
        return {"markerfacecolor": INK, "markeredgecolor": "white", "markersize": 14}
    return {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.6, "markersize": 10}


def _own_label(trial: int) -> str:
    return f"your baseline config: trial {trial}"


def _drawable(value: float) -> float:
    """The value, moved to where a figure can show it; NaN when it is not finite."""
    if not math.isfinite(value):
        return math.nan
    return 0.0 if abs(value) < 1 / HUGE else max(-HUGE, min(HUGE, value))


def _integer_ticks(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _jitter(trial: int) -> float:
    """A sideways shift in (-0.25, 0.25), the same for a trial in every figure: golden ratio steps spread evenly."""
    return (trial * 0.6180339887498949) % 1.0 * 0.5 - 0.25


def _number(value: float) -> str:
    return f"{value:.4g}"


def _short(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
