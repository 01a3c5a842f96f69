"""What a study is held against: predictions that ignore the inputs, and a linear model.

Both are fitted on train and measured as a trial is, with the task's own loss and metrics, on every split that there is.
A baseline that makes no sense for the data (a linear model of token numbers) is skipped, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.job import Outputs, SplitName
from hpsearch.task import Task
from hpsearch.training.data import StudyData
from hpsearch.training.measure import output_metrics, output_of, row_scores

BaselineName = Literal["constant", "linear"]

FIT_ROWS = 20_000  # of train, at most: a linear model changes little with more
FIT_NUMBERS = 4_096  # of one input, at most
SPLITS: tuple[SplitName, ...] = ("val", "ensemble", "test")

Predict = Callable[[Tensor], Tensor]


class Skipped(Exception):
    """A baseline does not fit these data; the message says why."""


def measure_baseline(
    name: BaselineName, task: Task, data: StudyData, *, seed: int
) -> dict[str, tuple[dict[str, float], dict[str, Tensor]]]:
    """By split: the baseline's metrics, and its scores of single rows as `measure.row_scores` gives them.

    Args:
        seed: of the rows that are fitted where train has more than FIT_ROWS.

    Raises:
        Skipped: it makes no sense here.
        UserCodeError: the task's loss or metrics raised.
    """
    outputs = data.info.outputs
    predict = _constant(task, data) if name == "constant" else _linear(data, seed)
    measured: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}
    for split in SPLITS:
        if split not in data.info.n_rows:
            continue
        predictions, targets = [], []
        for inputs, target in data.batches(split):
            predictions.append(predict(inputs.cpu()))
            targets.append(target.cpu())
        target = torch.cat(targets)
        output = output_of(torch.cat(predictions), outputs)
        measured[split] = (output_metrics(task, output, target), row_scores(task, outputs, output, target))
    return measured


def _constant(task: Task, data: StudyData) -> Predict:
    """The best prediction that is one for all inputs: class shares, or the mean or median under the task's loss."""
    outputs, target = data.info.outputs, data.targets("train")
    if outputs == "logits":
        n_classes = data.info.n_classes or int(target.max()) + 1
        counts = torch.bincount(target.reshape(-1), minlength=n_classes).double()
        best = (counts / counts.sum()).float()

        def shares(inputs: Tensor) -> Tensor:
            shape = (len(inputs), n_classes, *target.shape[1:])
            return best.reshape(1, n_classes, *[1] * (target.ndim - 1)).expand(shape)

        return shares
    rows = target.double()
    if outputs == "binary_logits":
        guesses = [(rows.sum(dim=0) + 0.5) / (len(rows) + 1)]
    else:
        guesses = [rows.mean(dim=0), rows.median(dim=0).values]
    with torch.no_grad():
        losses = [float(task.loss(output_of(_spread(guess, target), outputs), target)) for guess in guesses]
    chosen = guesses[int(np.argmin(losses))]
    return lambda inputs: _spread(chosen, inputs)


def _spread(guess: Tensor, like: Tensor) -> Tensor:
    return guess.float().expand(len(like), *guess.shape).contiguous()


def _linear(data: StudyData, seed: int) -> Predict:
    """Logistic or ridge regression on standardised inputs."""
    inputs, target = _fitted_rows(data, seed)
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x = (inputs - mean) / scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: a baseline need not be the best linear model
        predict = _fitted(x, target, data.info.outputs, data.info.n_classes)

    def predicted(batch: Tensor) -> Tensor:
        found = predict((batch.reshape(len(batch), -1).double().numpy() - mean) / scale)
        return torch.from_numpy(found).float()

    return predicted


def _fitted_rows(data: StudyData, seed: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
    info = data.info
    n_numbers = int(np.prod(info.input_shape))
    if n_numbers > FIT_NUMBERS:
        raise Skipped(f"an input has {n_numbers:,} numbers; a linear model is fitted to {FIT_NUMBERS:,} at most")
    if "int" in info.input_dtype and info.input_dtype != "uint8":
        raise Skipped(f"inputs are {info.input_dtype}: numbers of things, which a linear model cannot add up")
    target = data.targets("train")
    if target.ndim > 1 and (info.outputs == "logits" or target.ndim > 2):
        raise Skipped("a target is more than a row of numbers")
    inputs = np.concatenate([x.reshape(len(x), -1).double().cpu().numpy() for x, _ in data.batches("train")])
    if not np.isfinite(inputs).all():
        raise Skipped("inputs are not all finite")
    rows = np.sort(np.random.default_rng(seed).permutation(len(inputs))[:FIT_ROWS])
    return inputs[rows], target.numpy()[rows]


def _fitted(
    x: NDArray[np.float64], target: NDArray[Any], outputs: Outputs, n_classes: int | None
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    from sklearn.linear_model import LogisticRegression, Ridge

    if outputs == "values":
        ridge = Ridge(alpha=1.0).fit(x, target)
        # Targets of shape (N, 1) would come back as (N,), and be broadcast against the truth.
        return lambda new: np.asarray(ridge.predict(new), dtype=np.float64).reshape(len(new), *target.shape[1:])
    if outputs == "binary_logits":
        labels = target.reshape(len(target), -1) > 0.5
        models = [None if len(np.unique(column)) < 2 else _logistic().fit(x, column) for column in labels.T]
        shares = labels.mean(axis=0)

        def yes(new: NDArray[np.float64]) -> NDArray[np.float64]:
            columns = [
                np.full(len(new), share) if model is None else model.predict_proba(new)[:, 1]
                for model, share in zip(models, shares, strict=True)
            ]
            return np.stack(columns, axis=1).reshape(len(new), *target.shape[1:])

        return yes
    classes = np.unique(target)
    if len(classes) < 2:
        raise Skipped("train has one class alone")
    model: LogisticRegression = _logistic().fit(x, target)

    def probabilities(new: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.full((len(new), n_classes or int(classes.max()) + 1), 1e-6)
        found[:, classes] = model.predict_proba(new)
        return np.asarray(found / found.sum(axis=1, keepdims=True), dtype=np.float64)

    return probabilities


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=200)
