"""How sure a score is: confidence intervals that hold at the size at hand.

The percentile bootstrap covers far less than it claims on few and skewed rows, and per-row losses are skewed. So means
get the bootstrap-t, which bootstraps the mean *in units of its own standard error*, and proportions get Wilson's
interval. Below 100 rows a mean gets none: no method holds there for the losses of a confident network.

Every interval is a function of the values and a seed; rows are taken to be independent of each other.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 12; Wilson 1927; Hall 1992, The Bootstrap
and Edgeworth Expansion, section 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

MIN_ROWS = 100
"""A mean of fewer rows gets no interval."""

RESAMPLES = 2_000
"""Bootstrap resamples."""

LARGE_ROWS = 50_000
"""From here on the quantiles of the bootstrap are computed by its expansion, which they equal to drawing accuracy."""

SHOWN_OF_A_TAIL = 1 / 3
"""Share of a long tail's fourth moment that 100 rows show."""

_CHUNK = 1 << 20  # rows drawn at once: about 30 MB


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the interval that holds the truth in `level` of all studies; None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_interval(values_N: ArrayLike, *, seed: int, level: float = 0.95) -> Interval:
    """The mean with its bootstrap-t interval, the same for the same values and seed.

    What the bootstrap-t falls short of its level by, on few rows with long tails to both sides, is added to the level.

    Low and high are None below 100 rows, and where so few rows differ from the rest that resamples often miss them
    all (3 wrong answers in 10,000 tell too little of their size). Rows that are all equal give low = high = value.

    Args:
        values_N: one value per independent row; finite.
        seed: of the resamples.
        level: probability that the interval is meant to hold.

    Raises:
        ValueError: no rows, more than one axis, a value that is not finite, or a level outside (0, 1).
    """
    values = np.asarray(values_N, dtype=np.float64)
    _check_level(level)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one value per row is needed (got shape {values.shape})")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    n = len(values)
    first = float(values[0])
    if (values == first).all():
        return Interval(value=first, low=first, high=first) if n >= MIN_ROWS else Interval(value=first)
    scale = float(np.abs(values).max())  # sums of squares of very large or small values leave the float's range
    mean = math.fsum(values / scale) / n * scale
    if n < MIN_ROWS:
        return Interval(value=mean)

    centred_N = values / scale - mean / scale
    spread = math.sqrt(float(np.mean(centred_N**2)))
    standard_N = centred_N / spread
    quantiles = _expanded_quantiles if n >= LARGE_ROWS else _drawn_quantiles
    t_low, t_high = quantiles(standard_N, seed, _nominal_level(standard_N, level))
    if not (math.isfinite(t_low) and math.isfinite(t_high)):
        return Interval(value=mean)
    error = spread * scale / math.sqrt(n)
    # The upper quantile of t gives the lower end: a resample's mean lies above the mean as the mean lies above truth.
    return Interval(value=mean, low=mean - t_high * error, high=mean - t_low * error)


def paired_interval(a_N: ArrayLike, b_N: ArrayLike, *, seed: int, level: float = 0.95) -> Interval:
    """The mean of a - b, row by row, with its interval; see `mean_interval`.

    Raises:
        ValueError: the two differ in shape, or as `mean_interval`.
    """
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal shapes (got {a.shape} and {b.shape})")
    return mean_interval(a - b, seed=seed, level=level)


def sign_flip_chance(a_N: ArrayLike, b_N: ArrayLike, *, seed: int) -> float:
    """How likely a mean of a - b this low is, or a lower one, if the sign of each difference were chance; for any N.

    The sign-flip test, one-sided: exact for differences that are symmetric about zero.

    Args:
        a_N, b_N: one value per row; finite.
        seed: of the flips.
    """
    differences = np.asarray(a_N, dtype=np.float64) - np.asarray(b_N, dtype=np.float64)
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(RESAMPLES, len(differences)), dtype=np.int8) * 2 - 1
    flipped = signs @ differences
    return (1 + int(np.sum(flipped <= differences.sum()))) / (RESAMPLES + 1)


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """A proportion with Wilson's interval, which holds for few rows and near 0 and 1 too.

    Args:
        successes: rows that succeeded, 0 to n.
        n: rows; at least 1.
        level: probability that the interval is meant to hold.

    Raises:
        ValueError: counts that are no counts, or a level outside (0, 1).

    >>> interval = wilson_interval(95, 100)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.888, 0.978)
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"0 <= successes <= n and n >= 1 are needed (got {successes} of {n})")
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n successes an end is the proportion itself, and rounding must not carry it past.
    return Interval(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


def better(gain: Interval, goal: Literal["minimize", "maximize"]) -> bool | None:
    """Whether a gain (new minus old) is one; None when the interval holds zero, or there is none.

    >>> better(Interval(value=-0.02, low=-0.03, high=-0.01), "minimize")
    True
    """
    if gain.low is None or gain.high is None or gain.low <= 0.0 <= gain.high:
        return None
    return (gain.high < 0.0) == (goal == "minimize")


def _drawn_quantiles(standard_N: FloatArray, seed: int, level: float) -> tuple[float, float]:
    """Quantiles of a resample's t = mean / standard error, rows having mean 0 and variance 1; may be infinite."""
    n = len(standard_N)
    rng = np.random.default_rng(seed)
    sums, squares = np.empty(RESAMPLES), np.empty(RESAMPLES)
    at_once = max(1, _CHUNK // n)
    for start in range(0, RESAMPLES, at_once):
        stop = min(RESAMPLES, start + at_once)
        rows = standard_N[rng.integers(0, n, size=(stop - start, n), dtype=np.int32)]
        sums[start:stop] = rows.sum(axis=1)
        squares[start:stop] = np.einsum("ij,ij->i", rows, rows)
    means = sums / n
    variances = squares / n - means**2
    flat = variances <= 1e-12 * (1.0 + means**2)  # all rows of the resample are equal
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(flat, np.copysign(np.inf, means), means / np.sqrt(np.where(flat, 1.0, variances)) * math.sqrt(n))
    # An order statistic, not a mix of two: infinity times a weight of zero is not a number.
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _nominal_level(standard_N: FloatArray, level: float) -> float:
    """The level to ask for, so that the interval holds at `level`.

    The bootstrap-t misses it by z (2 z^2 + 1) phi(z) (kurtosis - 1.5 skew^2) / 3N: nothing for the one-sided tails of
    losses, 3 % at 100 rows for differences of losses. Of such a tail few rows show but a share.

    Source: Hall 1992, section 3.5; the share shown was measured (benchmarks/coverage.py).
    """
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + level / 2)
    skew, kurtosis = float(np.mean(standard_N**3)), float(np.mean(standard_N**4)) - 3
    shown = z * (2 * z * z + 1) * normal.pdf(z) * max(0.0, kurtosis - 1.5 * skew**2) / (3 * len(standard_N))
    return min(level + shown / SHOWN_OF_A_TAIL, 1 - 0.3 * (1 - level))


def _expanded_quantiles(standard_N: FloatArray, seed: int, level: float) -> tuple[float, float]:
    """What `_drawn_quantiles` tends to, with its error of order 1 / sqrt(N) corrected for skew; draws nothing."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    skew = float(np.mean(standard_N**3))
    shift = skew / (6 * math.sqrt(len(standard_N))) * (2 * z * z + 1)
    return -z - shift, z - shift


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"0 < level < 1 is needed (got {level})")
