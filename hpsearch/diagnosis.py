"""What a curve says about its trial, and all curves about their space: from numbers to the words a guide would use.

Each finding has a name in plain words, a sentence, and the numbers behind it. Nothing is found in a curve too short to
show it. A curve's own noise is measured first, so that a wiggle is not taken for a trend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SHORTEST_CURVE = 5  # epochs: with fewer, no trend can be told from noise
SETTLED = 0.02  # of the whole fall: a third of the curve that falls by less has settled
RISEN = 0.05  # of the whole fall: validation loss this far above its best has risen
SWING = 0.10  # of the whole fall: the typical step of a curve that swings, and at least
SWING_OF_LEVEL = 0.01  # of the loss itself: the batches' noise at a standstill is no oscillation
GAP = 0.10  # of the whole fall: train and validation loss this close show no overfitting
STOOD_STILL = 0.10  # of the whole fall: half of the curve that falls by less stands still
EXPLODED = 2.0  # times the first loss


class Finding(StrEnum):
    """What is said of a trial."""

    DIVERGED = "diverged"
    OSCILLATING = "oscillating"
    STUCK = "stuck"
    OVERFITTING = "overfitting"
    UNDERFITTING = "underfitting"
    IMPROVING = "still improving"
    PLATEAUED = "plateaued"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One finding with its sentence and its numbers."""

    finding: Finding
    words: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the study as a whole makes of a loss; None: not known."""

    baseline: float | None = None  # loss of the best prediction that ignores the inputs
    best_train: float | None = None  # of all trials
    best_val: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """A curve in the terms that the rules are written in."""

    values: FloatArray
    smooth: FloatArray  # centred median over three epochs
    noise: float  # standard deviation about its trend
    fall: float  # from the first value, or the baseline if that is lower, to the best smoothed one
    best: int  # index of the smoothed minimum

    @property
    def last(self) -> float:
        return float(self.smooth[-1])

    def fall_over(self, share: float) -> float:
        """How much the last `share` of the curve fell, smoothed; negative where it rose."""
        start = min(len(self.smooth) - 2, math.floor(len(self.smooth) * (1 - share)))
        return float(self.smooth[start] - self.smooth[start:].min())

    def gain_over(self, share: float) -> float:
        """By how much the last `share` of the curve got below the best before it, smoothed; negative where it did not.

        That best is the luckiest of many, so a gain as large as the noise is one. The last value alone is no trend: of
        it counts what the median of the last three leaves.
        """
        start = min(len(self.smooth) - 2, math.floor(len(self.smooth) * (1 - share)))
        late = [*self.smooth[start:-1], float(np.median(self.values[-3:]))]
        return float(self.smooth[:start].min() - np.min(late))


def diagnose(
    train_E: Sequence[float], val_E: Sequence[float], reference: Reference | None = None
) -> tuple[Diagnosis, ...]:
    """What a trial's losses say, the weightiest first; empty where nothing can be told.

    Args:
        train_E: training loss after each epoch, from the first; NaN where there is none.
        val_E: validation loss, of the same length.
        reference: lets `stuck` and `underfitting` be told; without it they are not.

    >>> [str(each.finding) for each in diagnose([1, .5, .3, .2, .1, .05, .03], [1, .6, .5, .5, .6, .7, .8])]
    ['overfitting']
    """
    if len(train_E) != len(val_E):
        raise ValueError(f"curves of one trial are equally long (got {len(train_E)} and {len(val_E)} epochs)")
    reference = reference or Reference()
    exploded = _exploded(train_E, val_E)
    if exploded is not None:
        return (exploded,)
    if len(val_E) < SHORTEST_CURVE:
        return ()
    val = _shape(val_E, reference.baseline)
    train = _shape(train_E, reference.baseline) if all(map(math.isfinite, train_E)) else None
    state = _stuck(val, reference) or _overfitting(train, val) or _underfitting(train, val, reference)
    found = [
        _oscillating(train or val, "train_loss" if train else "val_loss"),
        state,
        None if state is not None else _improving(val) or _plateaued(val),
    ]
    return tuple(each for each in found if each is not None)


def _exploded(train_E: Sequence[float], val_E: Sequence[float]) -> Diagnosis | None:
    for name, values in (("train_loss", train_E), ("val_loss", val_E)):
        bad = next((epoch for epoch, value in enumerate(values, start=1) if math.isinf(value)), None)
        if name == "val_loss":
            bad = next((epoch for epoch, value in enumerate(values, start=1) if not math.isfinite(value)), bad)
        if bad is not None:
            return Diagnosis(
                finding=Finding.DIVERGED, words=f"{name} is not finite at epoch {bad}", numbers={"epoch": bad}
            )
    if len(val_E) < SHORTEST_CURVE or not all(map(math.isfinite, train_E)):
        return None
    train = _shape(train_E)
    if train.fall > 0 and train.last - train.smooth[train.best] > max(
        0.5 * train.fall, 3 * train.noise, 0.02 * abs(train.last)
    ):
        lowest = float(train.smooth[train.best])
        return Diagnosis(
            finding=Finding.DIVERGED,
            words=f"train_loss rose from {lowest:.3g} at epoch {train.best + 1} to {train.last:.3g}: lower the "
            "learning rate",
            numbers={"best_epoch": train.best + 1, "best": lowest, "last": train.last},
        )
    first, last = float(train_E[0]), float(train.values[-3:].min())
    if first > 0 and last > EXPLODED * first:
        return Diagnosis(
            finding=Finding.DIVERGED,
            words=f"train_loss ends at {last:.3g}, {last / first:.1f} times where it began ({first:.3g})",
            numbers={"first": first, "last": last},
        )
    return None


def _oscillating(curve: _Shape, name: str) -> Diagnosis | None:
    """Large steps up and down in the second half, which get nowhere: the learning rate is too high."""
    half = curve.values[len(curve.values) // 2 - 1 :]
    steps = np.diff(half)
    if len(steps) < 3:
        return None
    turns = int(np.sum(np.sign(steps[1:]) * np.sign(steps[:-1]) < 0))
    swing = float(np.median(np.abs(steps)))
    net = abs(float(np.mean(half[-2:]) - np.mean(half[:2])))
    level = abs(float(np.median(half)))
    small = swing < max(SWING * curve.fall, SWING_OF_LEVEL * level)
    if turns < 0.5 * (len(steps) - 1) or small or net > swing * len(steps) / 2:
        return None
    return Diagnosis(
        finding=Finding.OSCILLATING,
        words=f"{name} steps up and down by {swing:.3g} about {level:.3g}: lower the learning rate, or raise the batch "
        "size",
        numbers={"swing": swing, "turns": turns},
    )


def _stuck(val: _Shape, reference: Reference) -> Diagnosis | None:
    """Never better than a prediction that ignores the inputs."""
    if reference.baseline is None:
        return None
    best = float(val.smooth.min())
    margin = max(2 * val.noise, 0.02 * abs(reference.baseline))
    if best < reference.baseline - margin:
        return None
    return Diagnosis(
        finding=Finding.STUCK,
        words=f"val_loss never got below {best:.3g}; ignoring the inputs gives {reference.baseline:.3g}",
        numbers={"best": best, "baseline": reference.baseline},
    )


def _overfitting(train: _Shape | None, val: _Shape) -> Diagnosis | None:
    """Validation loss rises from its best, or stands still well above training loss, which goes on falling."""
    lowest, at = float(val.smooth[val.best]), val.best
    risen = val.last - lowest
    fell = None if train is None else float(train.smooth[at] - train.last)
    if at < 0.9 * (len(val.values) - 1) and risen > max(RISEN * max(val.fall, 0.0), 3 * val.noise, 1e-12):
        if fell is not None and fell <= 0:
            return None
        while_train = "" if fell is None else f" while train_loss fell by another {fell:.3g}"
        return Diagnosis(
            finding=Finding.OVERFITTING,
            words=f"val_loss rose from {lowest:.3g} at epoch {at + 1} to {val.last:.3g}{while_train}",
            numbers={"best_epoch": at + 1, "best": lowest, "last": val.last},
        )
    if train is None or val.fall <= 0 or val.last - train.last < 0.25 * val.fall:
        return None
    if val.fall_over(0.5) > STOOD_STILL * val.fall or train.fall_over(0.5) < STOOD_STILL * train.fall:
        return None
    return Diagnosis(
        finding=Finding.OVERFITTING,
        words=f"val_loss stands at {val.last:.3g} while train_loss fell by {train.fall_over(0.5):.3g} over the second "
        f"half, to {train.last:.3g}",
        numbers={"last": val.last, "train": train.last, "train_fell": train.fall_over(0.5)},
    )


def _underfitting(train: _Shape | None, val: _Shape, reference: Reference) -> Diagnosis | None:
    """Train and validation loss have settled close together, well above what others reach: too little capacity."""
    if train is None or reference.baseline is None or reference.best_train is None:
        return None
    span = reference.baseline - reference.best_train
    if span <= 0 or train.fall_over(1 / 3) > SETTLED * span:
        return None
    above, gap = train.last - reference.best_train, val.last - train.last
    if above < 0.25 * span or gap > GAP * span:
        return None
    return Diagnosis(
        finding=Finding.UNDERFITTING,
        words=f"train_loss settled at {train.last:.3g}, others reach {reference.best_train:.3g}; "
        f"val_loss is as high ({val.last:.3g}): more capacity, or less regularisation",
        numbers={"train": train.last, "val": val.last, "best_train": reference.best_train},
    )


def _improving(val: _Shape) -> Diagnosis | None:
    """The last quarter of the curve is below all that came before it."""
    fell = val.gain_over(0.25)
    if val.best < 0.8 * (len(val.smooth) - 1) or val.fall <= 0 or fell < max(SETTLED * val.fall, val.noise):
        return None
    return Diagnosis(
        finding=Finding.IMPROVING,
        words=f"val_loss fell below its earlier best by {fell:.3g} over its last quarter ({fell / val.fall:.0%} of all "
        "it fell): train longer",
        numbers={"fell": fell, "last": val.last},
    )


def _plateaued(val: _Shape) -> Diagnosis:
    """What is left when nothing else is to be said: the last third brought little."""
    best = int(np.argmin(val.values))
    lowest, last = float(val.values[best]), float(val.values[-1])
    return Diagnosis(
        finding=Finding.PLATEAUED,
        words=f"val_loss ends at {last:.3g}; its own lowest was {lowest:.3g} at epoch {best + 1}, and the last third "
        "brought little",
        numbers={"best": lowest, "best_epoch": best + 1, "last": last},
    )


def _shape(values_E: Sequence[float], baseline: float | None = None) -> _Shape:
    values = np.asarray(values_E, dtype=np.float64)
    padded = np.concatenate([values[:1], values, values[-1:]])
    smooth = np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    # Of white noise with standard deviation s, second differences have s * sqrt(6); the median forgives the first fall.
    noise = float(1.4826 * np.median(np.abs(second)) / math.sqrt(6)) if len(second) else 0.0
    best = int(np.argmin(smooth))
    fall = float(values[0] - smooth[best])
    if baseline is not None and baseline > smooth[best]:
        fall = min(fall, baseline - float(smooth[best]))  # a wild start is no achievement
    return _Shape(values=values, smooth=smooth, noise=noise, fall=fall, best=best)
