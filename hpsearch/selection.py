"""Which models to average: greedy selection with replacement on a proper score.

The score is the negative log likelihood for classes and for yes/no labels, the squared error for numbers; lower is
better. Selection never looks at more of a prediction than the score does: a class model's probability of the true
class, a number's residual. Those are averaged instead of whole predictions, so a round costs one pass over (M, N)
however many classes there are, and the picks are the same.

Array shapes: M models, N examples, C classes; R = N times the positions of an example (1, unless a model predicts for
every pixel or token).

Source: Caruana et al. 2004, Ensemble Selection from Libraries of Models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpsearch.job import Outputs

FloatArray = NDArray[np.float64]

EPSILON = 1e-12
"""Probabilities are raised to this before their logarithm: an impossible truth costs 27.6 nats, not infinity."""

TIE = 1e-12
"""Scores that differ by less than this part of the best single model's are equal: rounding alone moves them so far,
and nobody wants six copies of a model because their mean differs from it in the last bit."""

_CHUNK = 1 << 17  # values scored at once; a chunk and its logarithms stay in the cache


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen ensemble, and how it came about."""

    members: tuple[tuple[int, float], ...]  # (index of the model, weight); heaviest first, then by index; sums to 1
    scores: tuple[float, ...]  # of the ensemble after each round; lower is better
    best_round: int  # picks that make up the members; scores[best_round - 1] is the lowest, the first of those that tie
    single: int  # index of the best model alone
    single_score: float


def select_greedy(
    predictions: Sequence[ArrayLike], targets: ArrayLike, outputs: Outputs, *, size: int = 5, rounds: int = 25
) -> Selection:
    """The models to average, with their weights, chosen greedily with replacement.

    Starts with the best models by their own score, as many as score best together; on small pools that generalised
    a little better than starting with one. They take half of `size` at most (rounded up), or five near-copies of the
    best model could leave no room for one that helps. Then each round adds the model that helps the average most,
    which may be a member already; ties go to current members, then to the lower index. Once there are `size` different
    members only they are picked. The best round is kept, so on these targets the ensemble is never worse than the best
    single model.

    Args:
        predictions: per model. "logits": probabilities (N, C) or (N, C, …). "binary_logits": probabilities of a yes,
            shaped like targets. "values": numbers shaped like targets.
        targets: "logits": integers (N,) or (N, …) in [0, C). "binary_logits": 0 or 1. "values": numbers.
        outputs: what the models' outputs mean.
        size: the most different members.
        rounds: picks, those of the start included.

    Raises:
        ValueError: no models, size or rounds below 1, shapes that do not fit; or a model whose predictions are not
            finite, or are no probabilities: the message names its index. Or none has a finite score.
    """
    if not len(predictions):
        raise ValueError("at least one candidate is needed")
    if size < 1 or rounds < 1:
        raise ValueError(f"size and rounds must be at least 1 (got size={size}, rounds={rounds})")
    parts_MR = np.stack([_scored_part(p, targets, outputs, f"candidate {m}: ") for m, p in enumerate(predictions)])

    all_models = np.arange(len(parts_MR))
    alone = _mean_scores(np.zeros_like(parts_MR[0]), parts_MR, all_models, 1, outputs)
    order = np.argsort(alone, kind="stable")
    if not np.isfinite(alone[order[0]]):
        raise ValueError("no candidate has a finite score")
    tie = TIE * float(alone[order[0]])
    picks, scores = _start(parts_MR, order[: min(-(-size // 2), rounds)], outputs, tie)
    sum_R = parts_MR[picks].sum(axis=0)
    while len(picks) < rounds:
        members = sorted(set(picks))
        candidates = np.array(members) if len(members) >= size else all_models
        found = _mean_scores(sum_R, parts_MR, candidates, len(picks) + 1, outputs)
        equals = candidates[found <= found.min() + tie]
        pick = int(next((m for m in equals if m in members), equals[0]))
        picks.append(pick)
        scores.append(float(found[candidates == pick][0]))
        sum_R += parts_MR[pick]

    best_round = _first_lowest(scores, tie) + 1
    chosen = picks[:best_round]
    weights = {m: chosen.count(m) / best_round for m in set(chosen)}
    return Selection(
        members=tuple(sorted(weights.items(), key=lambda member: (-member[1], member[0]))),
        scores=tuple(scores),
        best_round=best_round,
        single=int(order[0]),
        single_score=float(alone[order[0]]),
    )


def average_predictions(predictions: Sequence[ArrayLike], weights_M: Sequence[float]) -> FloatArray:
    """The ensemble's predictions: the weighted mean over models, float64, shaped like one model's.

    Summed one model at a time, so the stack (M, N, …) is never in memory.

    Args:
        predictions: per model, probabilities (N, C, …) or numbers (N, …).
        weights_M: one per model, non-negative, summing to 1.

    Raises:
        ValueError: counts or shapes differ, weights that are no weights, or a value that is not finite.
    """
    if not len(predictions) or len(predictions) != len(weights_M):
        raise ValueError(f"one weight per model is needed (got {len(predictions)} models, {len(weights_M)} weights)")
    weights = np.asarray(weights_M, dtype=np.float64)
    if not (weights >= 0).all() or abs(float(weights.sum()) - 1.0) > 1e-6:
        raise ValueError(f"weights must be non-negative and sum to 1 (got {weights.tolist()})")
    total = np.zeros(np.shape(predictions[0]))
    for m, prediction in enumerate(predictions):
        values = np.asarray(prediction, dtype=np.float64)
        if values.shape != total.shape:
            raise ValueError(f"model {m}: shape {values.shape}, but model 0 has {total.shape}")
        _check_finite(values, f"model {m}: ")
        total += weights[m] * values
    return total


def row_losses(predictions: ArrayLike, targets: ArrayLike, outputs: Outputs) -> FloatArray:
    """Proper score of each example, (N,): negative log likelihood in nats, or squared error; lower is better.

    Where an example has several positions or labels, their mean. Probabilities are raised to EPSILON first.

    Args:
        predictions: one model's, or an ensemble's; shapes as in `select_greedy`.
        targets: as in `select_greedy`.
        outputs: what the predictions mean.

    Raises:
        ValueError: as `select_greedy`.
    """
    part_R = _scored_part(predictions, targets, outputs, "")
    losses_R = _losses(part_R, outputs)
    mean_N: FloatArray = losses_R.reshape(len(np.asarray(targets)), -1).mean(axis=1)
    return mean_N


def row_correct(predictions: ArrayLike, targets: ArrayLike, outputs: Outputs) -> FloatArray:
    """Share of each example that is classified right, (N,): 0 or 1, or between where it has positions or labels.

    The most probable class (ties: the lower one); a yes where its probability is above one half.

    Raises:
        ValueError: "values", which are not classified; otherwise as `select_greedy`.
    """
    if outputs == "values":
        raise ValueError("numbers are not right or wrong; row_losses scores them")
    values, truth = _checked(predictions, targets, outputs, "")
    guess = values.argmax(axis=1) if outputs == "logits" else values > 0.5
    share_N: FloatArray = (guess == truth).reshape(len(truth), -1).mean(axis=1)
    return share_N


def _start(
    parts_MR: FloatArray, order: NDArray[np.intp], outputs: Outputs, tie: float
) -> tuple[list[int], list[float]]:
    """The best models alone, as many as score best together, and the score after each."""
    sum_R = np.zeros_like(parts_MR[0])
    scores: list[float] = []
    for n, m in enumerate(order, start=1):
        scores.append(float(_mean_scores(sum_R, parts_MR, np.array([m]), n, outputs)[0]))
        sum_R += parts_MR[m]
    n_start = _first_lowest(scores, tie) + 1
    return [int(m) for m in order[:n_start]], scores[:n_start]


def _first_lowest(scores: Sequence[float], tie: float) -> int:
    """Index of the lowest score, the first of those that tie."""
    lowest = min(scores)
    return next(i for i, score in enumerate(scores) if score <= lowest + tie)


def _mean_scores(
    sum_R: FloatArray, parts_MR: FloatArray, models: NDArray[np.intp], n_picks: int, outputs: Outputs
) -> FloatArray:
    """Score of (sum_R + a model) / n_picks for each of the models."""
    scores = np.empty(len(models))
    at_once = max(1, _CHUNK // max(1, sum_R.size))
    for start in range(0, len(models), at_once):
        chunk = parts_MR[models[start : start + at_once]]  # a copy, free to be overwritten
        chunk += sum_R
        chunk /= n_picks
        scores[start : start + at_once] = _losses(chunk, outputs).mean(axis=1)
    return scores


def _losses(parts: FloatArray, outputs: Outputs) -> FloatArray:
    """The score of each averaged part; overwrites nothing."""
    if outputs == "values":
        with np.errstate(over="ignore"):  # a model that is off by 1e200 scores infinity, and is never picked
            return np.square(parts)
    losses: FloatArray = np.maximum(parts, EPSILON)
    np.log(losses, out=losses)
    return np.negative(losses, out=losses)


def _scored_part(predictions: ArrayLike, targets: ArrayLike, outputs: Outputs, who: str) -> FloatArray:
    """What the score sees of a prediction, (R,): the truth's probability, or the residual. Linear in the models."""
    values, truth = _checked(predictions, targets, outputs, who)
    if outputs == "logits":
        part = np.take_along_axis(values, truth[:, None], axis=1)
    elif outputs == "binary_logits":
        part = np.where(truth == 1, values, 1.0 - values)
    else:
        part = values - truth
    part = part.reshape(-1).astype(np.float64)
    return part if outputs == "values" else np.clip(part, 0.0, 1.0)  # rounding must not make a loss negative


def _checked(
    predictions: ArrayLike, targets: ArrayLike, outputs: Outputs, who: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and targets as arrays that fit each other and their meaning; `who` begins the message if not."""
    if outputs not in get_args(Outputs):
        raise ValueError(f"outputs must be one of {get_args(Outputs)} (got {outputs!r})")
    values, truth = np.asarray(predictions), np.asarray(targets)
    if not truth.size:
        raise ValueError("there are no targets")
    if outputs == "logits":
        if not np.issubdtype(truth.dtype, np.integer):
            raise ValueError(f"classes must be integers (got {truth.dtype})")
        if values.ndim != truth.ndim + 1 or (values.shape[0], *values.shape[2:]) != truth.shape:
            raise ValueError(f"{who}shape {values.shape} does not fit targets {truth.shape}: (N, C, …) is needed")
        if truth.min() < 0 or truth.max() >= values.shape[1]:
            raise ValueError(f"{who}targets {truth.min()} to {truth.max()} for {values.shape[1]} classes")
    else:
        if values.shape != truth.shape:
            raise ValueError(f"{who}shape {values.shape} differs from the targets' {truth.shape}")
        values = values.astype(np.float64)  # before 1 - p and p - target, which would round
        truth = truth.astype(np.float64)
        if outputs == "binary_logits" and not ((truth == 0) | (truth == 1)).all():
            raise ValueError("targets of yes/no labels must be 0 or 1")
        if not np.isfinite(truth).all():
            raise ValueError("a target is not finite")
    _check_finite(values, who)
    if outputs != "values":
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1 + 1e-3:  # a softmax in half precision may pass 1 by as much
            raise ValueError(f"{who}not probabilities: they reach from {low:.3g} to {high:.3g}")
    return values, truth


def _check_finite(values: NDArray[Any], who: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{who}a prediction is not finite")
