"""Metrics by name, of a whole split at once: scikit-learn's, asked with a model's predictions.

A metric that has no value on the rows at hand (an ROC AUC where a class is missing) is an error that says so, not NaN,
which would read as a trial that diverged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.errors import UserCodeError
from hpsearch.job import Outputs
from hpsearch.metric_names import NAMED_METRICS

Array = NDArray[Any]


def named_metrics(names: Sequence[str], prediction: Tensor, target: Tensor, outputs: Outputs) -> dict[str, float]:
    """The metrics of these names.

    Args:
        names: of NAMED_METRICS.
        prediction: as `measure.prediction_of` gives it: class probabilities (N, C) or (N, C, …), probabilities of a
            yes, or numbers.
        target: class numbers (N,) or (N, …), labels of 0 and 1, or numbers, shaped like the prediction.

    Raises:
        UserCodeError: a name is not known or not for such outputs, or the metric has no value on these rows.
    """
    if not names:
        return {}
    for name in names:
        require_defined(name, outputs)
    truth, guess = _tabled(prediction, target, outputs)
    values = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns where it gives NaN, which is told below
            try:
                value = float(_METRICS[outputs][name](truth, guess))
            except ValueError as error:
                value, reason = math.nan, str(error)
            else:
                reason = "a class is missing, or all values are equal"
        if not math.isfinite(value):
            raise UserCodeError(
                f"the metric `{name}` has no value on the {len(truth)} rows of a split: {reason}",
                hint="give each split rows of every class, or choose another metric",
            )
        values[name] = value
    return values


def require_defined(name: str, outputs: Outputs) -> None:
    """Raises UserCodeError where a name is not known, or not for such outputs."""
    if name not in NAMED_METRICS:
        known = ", ".join(NAMED_METRICS)
        raise UserCodeError(f"there is no metric named `{name}` (known: {known})", hint="or give it in Task.metrics()")
    if outputs not in NAMED_METRICS[name].outputs:
        fitting = ", ".join(metric.name for metric in NAMED_METRICS.values() if outputs in metric.outputs)
        what = {"logits": "classes", "binary_logits": "yes or no", "values": "numbers"}[outputs]
        raise UserCodeError(f"the metric `{name}` is not for models that predict {what} (those are: {fitting})")


def unknown_metric(name: str, known: Sequence[str], outputs: Outputs) -> UserCodeError:
    """The error of a study whose metric is none of those that a trial reports.

    Args:
        name: with its split, as in space.yaml.
        known: of a trial.
        outputs: decides which of hpsearch's own metrics could be meant.
    """
    own = [each.removeprefix("val_") for each in known if each.startswith("val_")]
    fitting = [metric.name for metric in NAMED_METRICS.values() if outputs in metric.outputs]
    near = [each for each in get_close_matches(name.removeprefix("val_"), [*own, *fitting], 1) if f"val_{each}" != name]
    meant = f"did you mean val_{near[0]}? else " if near else ""
    return UserCodeError(
        f"the study's metric `{name}` is not among those of the task (known: {', '.join(known)})",
        hint=f"{meant}give it in Task.metrics(), or name one of these, and its goal, under `metric` in space.yaml",
    )


def _tabled(prediction: Tensor, target: Tensor, outputs: Outputs) -> tuple[Array, Array]:
    """Truth and prediction on the host, one row per decision; pixels count as rows."""
    guess = prediction.detach().double().cpu()
    truth = target.detach().cpu()
    if outputs == "logits":
        if guess.ndim > 2:
            guess = guess.movedim(1, -1).reshape(-1, guess.shape[1])
        return truth.reshape(-1).numpy(), guess.numpy()
    rows = len(truth)
    return truth.double().reshape(rows, -1).numpy(), guess.reshape(rows, -1).numpy()


def _one_label(metric: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    """A metric of one yes-or-no label, as the mean over labels of a table of them."""

    def mean(truth_NK: Array, guess_NK: Array) -> float:
        return float(np.mean([metric(truth_NK[:, k] > 0.5, guess_NK[:, k]) for k in range(truth_NK.shape[1])]))

    return mean


def _decided(metric: str, **options: Any) -> Callable[[Array, Array], float]:
    """A metric of decided classes: the likeliest one, or a yes from 1/2 on."""

    def measure(truth: Array, guess: Array) -> float:
        from sklearn import metrics

        if guess.ndim == 2 and truth.ndim == 1:
            n_classes = guess.shape[1]
            averaged = {"average": "binary" if n_classes == 2 else "macro", "zero_division": 0.0}
            more = averaged if metric in ("f1_score", "jaccard_score") else {}
            return float(getattr(metrics, metric)(truth, guess.argmax(axis=1), **more, **options))
        more = {"zero_division": 0.0} if metric in ("f1_score", "jaccard_score") else {}
        return float(getattr(metrics, metric)(truth, guess > 0.5, **more, **options))

    return measure


def _roc_auc(truth_N: Array, probs_NC: Array) -> float:
    from sklearn.metrics import roc_auc_score

    return float(np.mean([roc_auc_score(truth_N == c, probs_NC[:, c]) for c in _compared(probs_NC)]))


def _average_precision(truth_N: Array, probs_NC: Array) -> float:
    from sklearn.metrics import average_precision_score

    if missing := [c for c in _compared(probs_NC) if not (truth_N == c).any()]:
        raise ValueError(f"class {missing[0]} is missing")
    return float(np.mean([average_precision_score(truth_N == c, probs_NC[:, c]) for c in _compared(probs_NC)]))


def _compared(probs_NC: Array) -> Sequence[int]:
    """Classes that are held against the rest; of two, the second alone."""
    n_classes = probs_NC.shape[1]
    return [1] if n_classes == 2 else range(n_classes)


def _top5(truth_N: Array, probs_NC: Array) -> float:
    if probs_NC.shape[1] <= 5:
        raise ValueError(f"with {probs_NC.shape[1]} classes every class is among the five likeliest")
    likeliest_N5 = np.argpartition(-probs_NC, 4, axis=1)[:, :5]
    return float((likeliest_N5 == truth_N[:, None]).any(axis=1).mean())


def _log_loss(truth_N: Array, probs_NC: Array) -> float:
    from sklearn.metrics import log_loss

    return float(log_loss(truth_N, probs_NC / probs_NC.sum(axis=1, keepdims=True), labels=range(probs_NC.shape[1])))


def _of_label(metric: str) -> Callable[[Array, Array], float]:
    def measure(truth_N: Array, guess_N: Array) -> float:
        from sklearn import metrics

        if metric != "log_loss" and not truth_N.any():
            raise ValueError("no row is a yes")
        more = {"labels": [False, True]} if metric == "log_loss" else {}
        return float(getattr(metrics, metric)(truth_N, guess_N, **more))

    return _one_label(measure)


def _of_numbers(metric: str) -> Callable[[Array, Array], float]:
    def measure(truth_NK: Array, guess_NK: Array) -> float:
        from sklearn import metrics

        if metric == "r2_score" and (truth_NK == truth_NK[0]).all(axis=0).any():
            raise ValueError("all values of a target are equal")
        return float(getattr(metrics, metric)(truth_NK, guess_NK))

    return measure


_METRICS: dict[Outputs, dict[str, Callable[[Array, Array], float]]] = {
    "logits": {
        "accuracy": _decided("accuracy_score"),
        "balanced_accuracy": _decided("balanced_accuracy_score"),
        "f1": _decided("f1_score"),
        "roc_auc": _roc_auc,
        "average_precision": _average_precision,
        "top5": _top5,
        "log_loss": _log_loss,
        "iou": _decided("jaccard_score"),
    },
    "binary_logits": {
        name: _one_label(_decided(metric))
        for name, metric in (
            ("accuracy", "accuracy_score"),
            ("balanced_accuracy", "balanced_accuracy_score"),
            ("f1", "f1_score"),
            ("iou", "jaccard_score"),
        )
    }
    | {
        "roc_auc": _of_label("roc_auc_score"),
        "average_precision": _of_label("average_precision_score"),
        "log_loss": _of_label("log_loss"),
    },
    "values": {
        "mse": _of_numbers("mean_squared_error"),
        "mae": _of_numbers("mean_absolute_error"),
        "r2": _of_numbers("r2_score"),
    },
}
