"""What a model, or the weighted mean of some models, gives on a split: metrics, predictions, scores of single rows.

Metrics are asked of the whole split at once, so that one which is no mean over rows (an F1, an R²) is right. An
*output* is what the model returned (logits, say), a *prediction* what it means: probabilities, or the numbers
themselves. Members of an ensemble are averaged as predictions; an output that means the same is then made of the mean,
so that the task's own loss and metrics apply to it.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import UserCodeError
from hpsearch.job import Outputs, SplitName
from hpsearch.task import Task, outputs_of
from hpsearch.training.data import StudyData, check_output
from hpsearch.training.named_metrics import named_metrics
from hpsearch.training.user_code import frame_of, user_code

DEVICE_OUTPUT_BYTES = 256 << 20  # outputs of a split above this are gathered on the host
_ROWS_AT_ONCE = 4096  # of a user's loss under vmap
_SMALLEST_PROBABILITY = 1e-12  # as in selection: an impossible truth costs 27.6 nats, not infinity


def evaluate(model: nn.Module, task: Task, data: StudyData, split: SplitName) -> dict[str, float]:
    """A model's loss and metrics over a split: {"loss": …, "accuracy": …}.

    When the loss is not finite the metrics are not asked: a user's metric may well raise on NaN, and the trial is over.

    Raises:
        UserCodeError: the model, the loss or the metrics raised, or gave what is no number.
    """
    return output_metrics(task, *split_output(model, data, split))


def split_output(model: nn.Module, data: StudyData, split: SplitName) -> tuple[Tensor, Tensor]:
    """A model's outputs for a split, at least float32, and the targets, in the split's order.

    Both on the device, or on the host when the outputs are large. The model is left in the modes that it had.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    to_host = False
    n_rows = data.n_rows(split)
    with _eval_mode(model), torch.no_grad(), user_code("model.forward()"):
        for inputs, target in data.batches(split):
            output = model(inputs)
            if not isinstance(output, Tensor):
                raise UserCodeError(
                    f"the model returned a {type(output).__name__}, not a tensor", hint="forward() returns one tensor"
                )
            if not outputs:
                to_host = output.nbytes * n_rows > DEVICE_OUTPUT_BYTES * max(1, len(output))
            outputs.append(output.cpu() if to_host else output)
            targets.append(target.cpu() if to_host else target)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    target = targets[0] if len(targets) == 1 else torch.cat(targets)
    return (output.float() if output.dtype in (torch.float16, torch.bfloat16) else output), target


def output_metrics(task: Task, output: Tensor, target: Tensor) -> dict[str, float]:
    """The task's loss and metrics of some outputs; {"loss": nan} alone when the loss is not finite.

    Raises:
        UserCodeError: the task raised, or gave what is no number; or the output would be broadcast against the target.
    """
    if type(task).loss is Task.loss or type(task).metrics is Task.metrics:  # a loop of the user's may not have asked
        check_output(output, target, outputs_of(task, target), own_loss=True)
    with torch.no_grad():
        with user_code("loss()"):
            loss = _number(task.loss(output, target), "loss()", frame_of(type(task).loss))
        if not math.isfinite(loss):
            return {"loss": loss}
        with user_code("metrics()"):
            given: object = task.metrics(output, target)
    frame = frame_of(type(task).metrics)
    if not isinstance(given, dict):
        raise UserCodeError(
            f"metrics() returned a {type(given).__name__}, not a dict", frame=frame, hint='return {"accuracy": …}'
        )
    metrics = {"loss": loss}
    for name, value in given.items():
        if not isinstance(name, str) or not name:
            raise UserCodeError(f"metrics() has the key {name!r}; names are strings", frame=frame)
        if name == "loss":
            raise UserCodeError("metrics() gives `loss`, which loss() already gives", frame=frame, hint="rename it")
        metrics[name] = _number(value, f"metrics()[{name!r}]", frame)
    wanted = [name for name in task.metric_names if name not in metrics]
    if wanted:
        outputs = outputs_of(task, target)
        metrics |= named_metrics(wanted, prediction_of(output, outputs), target, outputs)
    return metrics


def prediction_of(output: Tensor, outputs: Outputs) -> Tensor:
    """What an output means, float32: class probabilities along dim 1, probabilities of a yes, or the numbers."""
    match outputs:
        case "logits":
            return output.float().softmax(dim=1)
        case "binary_logits":
            return output.float().sigmoid()
        case "values":
            return output.float()


def output_of(prediction: Tensor, outputs: Outputs) -> Tensor:
    """An output that means a prediction: its logarithm, its logit, or itself. Finite also where a probability is 0."""
    match outputs:
        case "logits":
            return prediction.clamp_min(_SMALLEST_PROBABILITY).log()
        case "binary_logits":
            # In float64, where 1 - 1e-12 is not 1.
            return prediction.double().logit(eps=_SMALLEST_PROBABILITY).to(prediction.dtype)
        case "values":
            return prediction


def mean_prediction(predictions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of members' predictions; weights are made to sum to 1.

    Raises:
        ValueError: no members, counts that differ, or weights that are negative, not finite or all zero.
    """
    total = sum(weights)
    if not predictions or len(predictions) != len(weights):
        raise ValueError(f"one weight per member is needed (got {len(predictions)} members, {len(weights)} weights)")
    if not math.isfinite(total) or total <= 0 or min(weights) < 0:
        raise ValueError(f"weights are numbers of at least 0, not all 0 (got {list(weights)})")
    mean = torch.zeros_like(predictions[0], dtype=torch.float64)
    for prediction, weight in zip(predictions, weights, strict=True):
        mean.add_(prediction, alpha=weight / total)
    return mean.float()


def row_scores(task: Task, outputs: Outputs, output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Scores of single rows, float64 of shape (N,), from which intervals are made.

    "loss" is a proper score of the row: the negative log likelihood of its classes or labels, or its squared error, a
    mean over the positions of an example. For a task with its own loss it is that loss of the row, where the rows' mean
    is the loss of all. So with every metric: it is here when it is a mean over rows. "accuracy" is here only as 0 or 1.
    """
    scores: dict[str, Tensor] = {}
    output, target = output.cpu(), target.cpu()
    loss = None
    if type(task).loss is not Task.loss:
        loss = _by_row(task.loss, output, target)
    if loss is None:
        loss = _proper_score(outputs, output, target)
    if loss is None:  # an output of another shape than the target, and a loss that vmap cannot run
        each = [task.loss(output[i : i + 1], target[i : i + 1]) for i in range(len(output))]
        loss = torch.stack([torch.as_tensor(row).detach().double().reshape(()) for row in each])
    scores["loss"] = loss.double()
    for name, value in output_metrics(task, output, target).items():
        if name == "loss":
            continue
        rows = _by_row(partial(_metric, task, name), output, target, mean=value)
        if rows is not None and (name != "accuracy" or bool(((rows == 0) | (rows == 1)).all())):
            scores[name] = rows
    return scores


def _metric(task: Task, name: str, output: Tensor, target: Tensor) -> Any:
    return task.metrics(output, target)[name]


def _proper_score(outputs: Outputs, output: Tensor, target: Tensor) -> Tensor | None:
    """None when the output does not have the shape that its meaning asks for."""
    output = output.double()
    if outputs == "logits":
        if output.ndim < 2 or output.shape[2:] != target.shape[1:]:
            return None
        score = F.cross_entropy(output, target, reduction="none")
    elif output.shape != target.shape:
        return None
    elif outputs == "binary_logits":
        score = F.binary_cross_entropy_with_logits(output, target.double(), reduction="none")
    else:
        score = (output - target.double()).square()
    return score.flatten(1).mean(dim=1) if score.ndim > 1 else score


def _by_row(
    function: Callable[[Tensor, Tensor], Any], output: Tensor, target: Tensor, *, mean: float | None = None
) -> Tensor | None:
    """A function's value for each row alone; None where it cannot be had, or the rows' mean is not `mean`."""

    def of_row(row: Tensor, row_target: Tensor) -> Tensor:
        return torch.as_tensor(function(row.unsqueeze(0), row_target.unsqueeze(0))).reshape(())

    try:
        # A user's function may warn, or raise, on what it was not written for: then there are no scores by row.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            rows = torch.vmap(of_row, chunk_size=_ROWS_AT_ONCE)(output, target).double()
            whole = float(function(output, target)) if mean is None else mean
    except Exception:
        return None
    return rows if math.isclose(float(rows.mean()), whole, rel_tol=1e-4, abs_tol=1e-7) else None


def _number(value: object, what: str, frame: str) -> float:
    """A user's number as a float; tensors and arrays of one element are numbers too."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if not isinstance(value, Tensor | str | complex) and (isinstance(value, numbers.Real) or hasattr(value, "item")):
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserCodeError(f"{what} is {found}, not a number", frame=frame, hint="take the mean over the rows")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
