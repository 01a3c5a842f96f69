"""Which learning rates are worth searching, from the raw losses of a few ramps.

A ramp trains a fresh network while its learning rate rises geometrically. What is made of the losses happens here,
after the run, so the same ramps can be judged again under another rule, and nothing is smoothed while it is measured:
an exponential average during a ramp shifts the curve by decades. No rule here compares a loss with a multiple of the
best one, so negative losses are as good as positive ones. When several seeds disagree, or the curve has its minimum
at an edge, constant rates (probes) are asked; `probe_lrs` says which, `confirm_range` weighs the answers.

Array shapes: S seeds, T steps of a ramp.

Source: Smith 2017, arXiv:1506.01186, for the test itself. Median, centred mean and a quarter of the minimum's rate were
the best of nine published rules over 16 small settings, by regret against 25 constant rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SMOOTHING_STEPS = 5
"""Width of the centred mean over steps."""

MINIMUM_TO_LR = 4.0
"""The suggestion is the rate of the curve's minimum divided by this."""

BELOW, ABOVE = 10.0, 3.0
"""The interval is [lr / BELOW, ABOVE * lr]: too low a rate costs time, too high a one costs the trial."""

SURE_SPREAD_DECADES = 0.3
"""Seeds that disagree by more than this ask for probes."""

MIN_WIDTH = 3.0
"""high / low of the narrowest interval that clipping may leave, unless the user's own bounds are narrower."""

PROBE_MARGIN = 10.0
"""Probes reach this factor beyond the seeds' lowest and highest suggestions."""


@dataclass(frozen=True, kw_only=True)
class LrMeasurement:
    """What ramps (and probes) say about a branch's learning rate. All rates are within the user's bounds."""

    lr: float  # the suggestion
    low: float  # of the interval to search; low < high
    high: float
    spread_decades: float  # how far the seeds disagree, see `spread_decades()`
    at_edge: bool  # the curve falls (or the best probe lies) at an end of what was tried
    sure: bool  # nothing more need be asked
    median_curve: tuple[float | None, ...]  # (T,) smoothed median over seeds; None from where most seeds diverged
    per_seed_lr: tuple[float, ...]  # every seed's own suggestion, in seed order; seeds without a finite loss left out
    lrs: tuple[float, ...]  # (T,) the ramp
    user_low: float
    user_high: float
    confirmed: bool = False  # constant rates were asked too


def ramp_lrs(lr_min: float, lr_max: float, steps: int) -> FloatArray:
    """Learning rate of each step of a ramp: geometric, both ends included and exact.

    Raises:
        ValueError: not 0 < lr_min < lr_max < inf, or fewer than two steps.

    >>> ramp_lrs(1e-3, 10.0, 5).tolist()
    [0.001, 0.01, 0.1, 1.0, 10.0]
    """
    _check_bounds(lr_min, lr_max, "lr_min", "lr_max")
    if steps < 2:
        raise ValueError(f"a ramp needs at least 2 steps (got {steps})")
    lrs: FloatArray = np.geomspace(lr_min, lr_max, steps)
    return lrs


def measure_range(
    losses: Sequence[Sequence[float]], lrs: Sequence[float] | FloatArray, *, user_low: float, user_high: float
) -> LrMeasurement | None:
    """The suggested learning rate and interval of one branch, or None where the median seed has no finite loss.

    The seeds' losses are joined by their median, step by step, and smoothed by a centred mean over 5 steps. The
    suggestion is a quarter of the rate at the minimum (ties: the lowest rate). It and the interval around it are
    snapped to the ramp's own grid, continued beyond its ends, so that equal measurements give equal numbers; then
    they are clipped to the user's bounds. An interval that clipping would leave narrower than a factor of 3 hugs the
    bound: [user_low, 3 * user_low] or [user_high / 3, user_high], within the bounds.

    Args:
        losses: per seed, the raw training loss of each step's batch before that step's update. May be shorter than
            lrs. The first loss that is not finite ends a seed's ramp; from there on it counts as +inf.
        lrs: (T,) the rates of the steps, as `ramp_lrs` gives them.
        user_low: the lowest rate the user allows.
        user_high: the highest.

    Raises:
        ValueError: no seeds, a seed with more losses than lrs, rates or bounds that do not rise.
    """
    grid = _Grid.of(lrs)
    _check_bounds(user_low, user_high, "user_low", "user_high")
    curves_ST = _curves(losses, len(grid.lrs))
    minima = [_lowest(curve_T) for curve_T in curves_ST]
    curve_T = np.median(curves_ST, axis=0)
    minimum = _lowest(curve_T)
    if minimum is None:
        return None

    # Suggestions are compared before they are clipped: bounds that hide a disagreement do not settle it.
    per_seed = [grid.snap(grid.lrs[i] / MINIMUM_TO_LR) for i in minima if i is not None]
    spread = spread_decades(per_seed)
    raw_lr = grid.lrs[minimum] / MINIMUM_TO_LR
    low, high = _interval(grid, raw_lr, user_low, user_high)
    margin = SMOOTHING_STEPS // 2  # nearer to an end the mean has no window of its own
    at_edge = not margin <= minimum < len(grid.lrs) - margin
    return LrMeasurement(
        lr=_clip(grid.snap(raw_lr), user_low, user_high),
        low=low,
        high=high,
        spread_decades=spread,
        at_edge=at_edge,
        sure=spread <= SURE_SPREAD_DECADES and not at_edge and len(per_seed) == len(losses),
        median_curve=tuple(float(v) if math.isfinite(v) else None for v in _smooth(curve_T)),
        per_seed_lr=tuple(_clip(lr, user_low, user_high) for lr in per_seed),
        lrs=grid.lrs,
        user_low=user_low,
        user_high=user_high,
    )


def spread_decades(per_seed_lr: Sequence[float]) -> float:
    """How far the seeds' suggestions disagree: the width in decades of the range that holds their middle half.

    The interquartile range of log10(lr). With five seeds it is the distance from the second to the fourth, so one
    seed that strays does not spoil the agreement of four, while two that stray do. That is when the median curve
    starts to suffer: with ramps of another optimizer mixed in, more than 0.3 decades were found in 12 % of cases with
    one stray and in all with two. The standard deviation and the range call on one stray already (97 and 100 %), the
    median absolute deviation seldom on two (28 %). 0 for a single seed, which cannot disagree.

    Raises:
        ValueError: no seeds.

    >>> round(spread_decades([0.001, 0.1, 0.1, 0.2, 0.2]), 2)
    0.3
    """
    if not per_seed_lr:
        raise ValueError("at least one seed's suggestion is needed")
    low, high = np.percentile(np.log10(np.asarray(per_seed_lr, dtype=np.float64)), [25.0, 75.0])
    return float(high - low)


def probe_lrs(measurement: LrMeasurement, *, count: int = 9) -> tuple[float, ...]:
    """Constant rates to try where the ramps left doubt, lowest first; none where they left none.

    Evenly spaced in log over the seeds' suggestions and a decade to either side, or over the whole ramp when the
    minimum is at an edge; within the ramp's range and the user's bounds (the bounds alone where the two do not meet).
    Rates are on the ramp's grid, except at a bound. Fewer than `count` where the grid has no more.

    Raises:
        ValueError: count is below 2.
    """
    if count < 2:
        raise ValueError(f"at least 2 probes are needed (got {count})")
    if measurement.sure:
        return ()
    grid = _Grid.of(measurement.lrs)
    low, high = _overlap(grid.lrs[0], grid.lrs[-1], measurement.user_low, measurement.user_high)
    if not measurement.at_edge:
        suggestions = (measurement.lr, *measurement.per_seed_lr)
        low, high = _overlap(min(suggestions) / PROBE_MARGIN, max(suggestions) * PROBE_MARGIN, low, high)
    rates = (_clip(grid.snap(lr), low, high) for lr in np.geomspace(low, high, count))
    return tuple(sorted(set(rates)))


def confirm_range(
    measurement: LrMeasurement, probes: Mapping[float, Sequence[Sequence[float]]], *, steps: int | None = None
) -> LrMeasurement:
    """The measurement corrected by constant rates: the best of them is the new suggestion.

    The lowest of `probe_scores` wins (ties: the lowest rate). The interval is widened to cover the ramps' answer and
    the probes'. It is sure when the best probe has worse ones on either side. When every probe diverged the
    measurement comes back as it was, and not sure.

    Args:
        measurement: the ramps' answer.
        probes: as for `probe_scores`.
        steps: as for `probe_scores`.

    Raises:
        ValueError: as `probe_scores`.
    """
    scores = probe_scores(probes, steps=steps)
    best = min(scores, key=lambda lr: scores[lr])  # the first of equals, and they rise
    if not math.isfinite(scores[best]):
        return replace(measurement, sure=False)

    grid = _Grid.of(measurement.lrs)
    low, high = _interval(grid, best, measurement.user_low, measurement.user_high)
    at_edge = best in (min(scores), max(scores))
    return replace(
        measurement,
        lr=_clip(best, measurement.user_low, measurement.user_high),
        low=min(low, measurement.low),
        high=max(high, measurement.high),
        at_edge=at_edge,
        sure=not at_edge,
        confirmed=True,
    )


def probe_scores(probes: Mapping[float, Sequence[Sequence[float]]], *, steps: int | None = None) -> dict[float, float]:
    """Each constant rate's score, lowest rate first: the mean of the last quarter of losses, the median over seeds.

    A seed that diverged scores +inf.

    Args:
        probes: per rate, the raw losses of each seed; one that is short or not finite diverged.
        steps: losses of a probe that ran to its end; the longest seen when not told.

    Raises:
        ValueError: no probes, a probe without seeds, or a rate that is not finite and positive.
    """
    if not probes or not all(probes.values()):
        raise ValueError("every probe needs the losses of at least one seed")
    if not all(0 < lr < math.inf for lr in probes):
        raise ValueError(f"a probe's rate must be finite and positive (got {sorted(probes)})")
    n_losses = max(len(run) for runs in probes.values() for run in runs) if steps is None else steps
    return {lr: float(np.median([_last_quarter(run, n_losses) for run in probes[lr]])) for lr in sorted(probes)}


@dataclass(frozen=True)
class _Grid:
    """A ramp's rates, continued geometrically beyond both ends."""

    lrs: tuple[float, ...]

    @classmethod
    def of(cls, lrs: Sequence[float] | FloatArray) -> _Grid:
        rates = tuple(float(lr) for lr in lrs)
        if len(rates) < 2 or not all(0 < a < b < math.inf for a, b in pairwise(rates)):
            raise ValueError("a ramp's rates must be finite, positive and rising, two at least")
        return cls(rates)

    def snap(self, lr: float) -> float:
        """The grid's rate that is nearest in log."""
        last = len(self.lrs) - 1
        first_log, last_log = math.log(self.lrs[0]), math.log(self.lrs[-1])
        place = (math.log(lr) - first_log) / (last_log - first_log) * last
        index = round(place)
        if 0 <= index <= last:
            return self.lrs[index]
        return math.exp(first_log + (last_log - first_log) * index / last)


def _curves(losses: Sequence[Sequence[float]], n_steps: int) -> FloatArray:
    """(S, T) losses, +inf from a seed's first loss that is not finite, or not there."""
    if not losses:
        raise ValueError("at least one seed's losses are needed")
    curves_ST = np.full((len(losses), n_steps), np.inf)
    for seed, run in enumerate(losses):
        if len(run) > n_steps:
            raise ValueError(f"seed {seed} has {len(run)} losses for {n_steps} rates")
        values = np.asarray(run, dtype=np.float64)
        finite = np.isfinite(values)
        n_finite = len(values) if finite.all() else int(np.argmin(finite))
        curves_ST[seed, :n_finite] = values[:n_finite]
    return curves_ST


def _smooth(curve_T: FloatArray) -> FloatArray:
    """Centred mean of the finite beginning of a curve, +inf behind it; windows are cut at both of its ends."""
    smooth_T = np.full(len(curve_T), np.inf)
    n_finite = int(np.isfinite(curve_T).sum())  # the finite losses of a ramp come first, also after a median
    half = SMOOTHING_STEPS // 2
    for i in range(n_finite):
        window = curve_T[max(0, i - half) : min(n_finite, i + half + 1)]
        smooth_T[i] = (window / len(window)).sum()  # divided first: losses near the float's end would overflow
    return smooth_T


def _lowest(curve_T: FloatArray) -> int | None:
    """Index of the smoothed curve's minimum, the first of equals; None without a finite loss."""
    smooth_T = _smooth(curve_T)
    index = int(np.argmin(smooth_T))
    return index if math.isfinite(smooth_T[index]) else None


def _interval(grid: _Grid, lr: float, user_low: float, user_high: float) -> tuple[float, float]:
    """[lr / 10, 3 * lr] on the grid, within the user's bounds, and no narrower than MIN_WIDTH where they allow it."""
    low = _clip(grid.snap(lr / BELOW), user_low, user_high)
    high = _clip(grid.snap(lr * ABOVE), user_low, user_high)
    if high < low * MIN_WIDTH:
        if high >= user_high:
            low = max(user_low, min(low, user_high / MIN_WIDTH))
        else:
            high = min(user_high, max(high, user_low * MIN_WIDTH))
    return low, high


def _last_quarter(run: Sequence[float], n_losses: int) -> float:
    """Mean of the last quarter of a probe's losses, at least one of them; +inf when it diverged."""
    if n_losses < 1 or len(run) < n_losses or not all(math.isfinite(loss) for loss in run):
        return math.inf
    tail = run[-max(1, len(run) // 4) :]
    return math.fsum(loss / len(tail) for loss in tail)


def _overlap(low: float, high: float, user_low: float, user_high: float) -> tuple[float, float]:
    """The part of [low, high] within the user's bounds, or the bounds themselves when they do not meet."""
    inner = max(low, user_low), min(high, user_high)
    return inner if inner[0] < inner[1] else (user_low, user_high)


def _clip(lr: float, low: float, high: float) -> float:
    return min(max(lr, low), high)


def _check_bounds(low: float, high: float, low_name: str, high_name: str) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"0 < {low_name} < {high_name} is needed (got {low_name}={low}, {high_name}={high})")
