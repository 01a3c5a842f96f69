"""A batch as the model receives it, drawn: examples, how their numbers spread, and what was done to them before.

Values in, PNG out, as in `plots`. Pictures share one scale of brightness, that of the whole batch: an example that is
empty, or brighter than all others, looks like it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpsearch.number_text import number
from hpsearch.report.plots import BLUE, DOTS_PER_INCH, GREY, HUGE, INK, LIGHT, RED, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLUMNS = 8  # of pictures
LONGEST_TITLE = 18  # of a picture, in characters

RECEIVED, BEFORE = "as the model receives them", "before augment()"


@dataclass(frozen=True, kw_only=True)
class BatchPlot:
    """Some examples of a batch, and the figures of the whole."""

    kind: Literal["pictures", "rows"]
    received: np.ndarray  # (N, H, W), (N, H, W, 3) or, of rows, (N, F)
    before: np.ndarray | None  # the same examples before `augment`
    target: np.ndarray | None  # (N, …)
    shape: Sequence[int]  # of the batch, its rows first
    dtype: str
    note: str  # what was left out of an example, "" for nothing
    n_not_finite: int
    low: float | None  # of the finite numbers; None: there are none
    high: float | None
    mean: float | None
    std: float | None
    counts: Sequence[int]  # of the numbers in equal steps from low to high


def batch_figure(batch: BatchPlot) -> bytes:
    """The examples, with their targets; below, a histogram of all numbers of the batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [(RECEIVED, _drawable(batch.received))]
    if batch.before is not None:
        n = COLUMNS if batch.kind == "pictures" else len(batch.received)
        parts = [(BEFORE, _drawable(batch.before[:n])), (RECEIVED, _drawable(batch.received[:n]))]
    heights = [_height(batch.kind, shown) for _, shown in parts]
    figure = Figure(figsize=(9.6, 0.5 + sum(heights) + 2.1), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(parts) + 1, 1, squeeze=False, height_ratios=[*heights, 2.1], hspace=0.02)
    *upper, lower = rows.ravel()
    size = " × ".join(str(n) for n in batch.shape)
    left_out = f"; each shown: {batch.note}" if batch.note else ""
    figure.suptitle(f"A batch of {size}, {batch.dtype}{left_out}", x=0.01, ha="left", fontsize=11)
    for part, (name, shown) in zip(upper, parts, strict=True):
        limits, scale = _limits_of(shown, _limits(batch))
        told = f"{len(shown)} of {batch.shape[0]} examples {name}{scale}"
        part.suptitle(told, x=0.02, ha="left", fontsize=9, color=GREY)
        draw = _draw_pictures if batch.kind == "pictures" else _draw_rows
        draw(part, shown, _titles(batch.target, len(shown)), limits)
    _draw_histogram(lower.subplots(), batch)
    return png(figure)


def batch_plot(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> BatchPlot:
    """What is drawn of a kept batch.

    Args:
        told: values of the job's result.
        arrays: of its blob.
    """
    return BatchPlot(
        kind=told["kind"],
        received=arrays["received"],
        before=arrays.get("before"),
        target=arrays.get("target"),
        shape=told["shape"],
        dtype=told["dtype"],
        note=told["note"],
        n_not_finite=told["n_not_finite"],
        low=told.get("low"),
        high=told.get("high"),
        mean=told.get("mean"),
        std=told.get("std"),
        counts=told.get("counts", ()),
    )


def _drawable(numbers: np.ndarray) -> np.ndarray:
    """As floats; NaN what is not finite."""
    return np.where(np.isfinite(numbers), np.clip(numbers.astype(float), -HUGE, HUGE), np.nan)


def _height(kind: str, shown: np.ndarray) -> float:
    """Of a part, in inches."""
    if kind == "rows":
        return 0.75 + 0.17 * max(4, len(shown))
    rows = math.ceil(len(shown) / COLUMNS)
    side = 9.6 / COLUMNS * min(1.6, shown.shape[1] / shown.shape[2])  # a tall picture gets less than its height
    return float(0.3 + rows * (max(0.4, side) + 0.25))


def _draw_pictures(part: SubFigure, shown: np.ndarray, titles: Sequence[str], limits: tuple[float, float]) -> None:
    panels = part.subplots(math.ceil(len(shown) / COLUMNS), COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    low, high = limits
    for panel, picture, title in zip(panels, shown, titles, strict=False):
        panel.set_title(title, fontsize=8, pad=2)
        if picture.ndim == 3:
            unit = (picture - low) / (high - low)
            panel.imshow(np.where(np.isfinite(picture).all(axis=-1, keepdims=True), unit, (1.0, 0.0, 0.0)).clip(0, 1))
        else:
            panel.imshow(picture, cmap=_colours("gray"), vmin=low, vmax=high, interpolation="nearest", aspect="auto")
            panel.set_box_aspect(max(0.35, min(1.6, picture.shape[0] / picture.shape[1])))


def _draw_rows(part: SubFigure, shown: np.ndarray, titles: Sequence[str], limits: tuple[float, float]) -> None:
    low, high = limits
    panel = part.subplots()
    image = panel.imshow(shown, cmap=_colours("viridis"), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    panel.set_yticks(range(len(shown)), titles, fontsize=7)
    panel.set_xlabel("place in the input", fontsize=8)
    panel.set_ylabel("target" if any(titles) else "", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    bar = part.colorbar(image, ax=panel, pad=0.01)
    bar.ax.tick_params(labelsize=8)


def _draw_histogram(panel: Axes, batch: BatchPlot) -> None:
    panel.set_title(_words(batch), loc="left", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(labelsize=8, colors=INK, color=GREY)
    if not batch.counts:
        panel.set_axis_off()
        return
    low, high = _limits(batch)
    edges = np.linspace(low, high, len(batch.counts) + 1)
    panel.stairs(batch.counts, edges, fill=True, color=BLUE)
    panel.set_ylim(bottom=0)
    panel.grid(True, axis="y", color=LIGHT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_xlabel("number in the input", fontsize=8)
    panel.set_ylabel("how often", fontsize=8)


def _words(batch: BatchPlot) -> str:
    """The batch's figures in a line."""
    n = math.prod(batch.shape)
    bad = f"{batch.n_not_finite:,} of {n:,} are NaN or infinite (red)" if batch.n_not_finite else ""
    if batch.low is None or batch.high is None:
        return f"{n:,} numbers: {bad}" if n else "no numbers"
    told = f"{n:,} numbers from {number(batch.low)} to {number(batch.high)}"
    if batch.mean is not None and batch.std is not None:
        told += f", mean {number(batch.mean)}, standard deviation {number(batch.std)}"
    return f"{told}; {bad}" if bad else told


def _limits(batch: BatchPlot) -> tuple[float, float]:
    """The scale of all that is drawn; never empty, nor wider than floats go."""
    if batch.low is None or batch.high is None:
        return 0.0, 1.0
    return _widened(batch.low, batch.high)


def _widened(low: float, high: float) -> tuple[float, float]:
    low, high = (max(-HUGE, min(HUGE, limit)) for limit in (low, high))
    room = 0.0 if high > low else max(0.5, abs(low) * 1e-3)
    return low - room, high + room


def _limits_of(shown: np.ndarray, limits: tuple[float, float]) -> tuple[tuple[float, float], str]:
    """The scale of a part, and what is said of it: its own where on the batch's it would be one colour, or nearly.

    >>> _limits_of(np.array([0, 255]), (-1.0, 1.0))
    ((0.0, 255.0), ' (on a scale of their own: 0 to 255)')
    """
    low, high = limits
    numbers = shown[np.isfinite(shown)]
    if not numbers.size or (numbers.min() >= 2 * low - high and numbers.max() <= 2 * high - low):
        return limits, ""
    low, high = _widened(float(numbers.min()), float(numbers.max()))
    return (low, high), f" (on a scale of their own: {number(low)} to {number(high)})"


def _colours(name: str) -> Any:
    """A colour map in which what is no number is red."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=RED)


def _titles(target: np.ndarray | None, n: int) -> list[str]:
    """What each example is to give, as far as it is short."""
    if target is None:
        return ["" for _ in range(n)]
    return [_title(each) for each in target[:n]]


def _title(target: np.ndarray) -> str:
    """One example's target.

    >>> _title(np.array(3)), _title(np.array([0.25, -1.0])), _title(np.arange(100))
    ('3', '0.25 -1', '0 1 2 3 4 5 6 7 8…')
    """
    text = " ".join(number(float(value)) for value in target.ravel()[:LONGEST_TITLE])
    return text if len(text) <= LONGEST_TITLE else text[: LONGEST_TITLE - 1].rstrip() + "…"
