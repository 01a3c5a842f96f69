"""What a model gives on a split: metrics of all rows at once, predictions, scores by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import UserCodeError
from hpsearch.job import Outputs
from hpsearch.task import Splits, Task
from hpsearch.training import measure
from hpsearch.training.data import StudyData
from hpsearch.training.measure import (
    evaluate,
    mean_prediction,
    output_metrics,
    output_of,
    prediction_of,
    row_scores,
    split_output,
)

CPU = torch.device("cpu")
N_VAL = 150


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classes(Task):
    def data(self) -> Splits:
        return Splits(train=rows(20, 0), val=rows(N_VAL, 1))

    def model(self, config: Any) -> nn.Module:
        return nn.Linear(5, 3)


def load(task: Task) -> StudyData:
    return StudyData.load(task, study_seed=0, cut_ensemble=False, device=CPU)


def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits in several batches of 7, so that the last is smaller."""
    whole = StudyData.batches
    monkeypatch.setattr(StudyData, "batches", lambda self, split, batch_size=None: whole(self, split, batch_size=7))


def outputs_and_targets(outputs: Outputs, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if outputs == "logits":
        return torch.randn(40, 3, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    output = torch.randn(40, 2, generator=generator)
    if outputs == "values":
        return output, torch.randn(40, 2, generator=generator)
    return output, torch.randint(0, 2, (40, 2), generator=generator).float()


def task_for(outputs: Outputs) -> Task:
    task = Task()
    task.outputs = outputs
    return task


def test_metrics_are_those_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    task = Classes()
    data = load(task)
    torch.manual_seed(0)
    model = task.model({})
    x, y = rows(N_VAL, 1)
    found = evaluate(model, task, data, "val")
    assert found["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_a_metric_that_is_no_mean_over_rows_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)

    class Spread(Classes):
        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            return {"spread": output.max() - output.min(), "rows": len(target), "seed": np.int64(3)}

    task = Spread()
    torch.manual_seed(0)
    model = task.model({})
    output = model(rows(N_VAL, 1)[0])
    found = evaluate(model, task, load(task), "val")
    assert found["spread"] == pytest.approx((output.max() - output.min()).item())
    assert found["rows"] == N_VAL
    assert found["seed"] == 3


def test_large_outputs_are_gathered_on_the_host_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    task = Classes()
    model = task.model({})
    data = load(task)
    expected = evaluate(model, task, data, "val")
    moved = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (moved.append(1), to_host(self))[1])
    monkeypatch.setattr(measure, "DEVICE_OUTPUT_BYTES", N_VAL * 12 - 1)
    assert evaluate(model, task, data, "val") == expected
    assert moved
    moved.clear()
    monkeypatch.setattr(measure, "DEVICE_OUTPUT_BYTES", N_VAL * 12)
    evaluate(model, task, data, "val")
    assert not moved


def test_the_model_predicts_in_eval_mode_without_gradients_and_keeps_its_modes() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.BatchNorm1d(5).eval()
            self.head = nn.Linear(5, 3)
            self.seen: list[tuple[bool, bool]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append((self.training, torch.is_grad_enabled()))
            out: Tensor = self.head(self.frozen(x))
            return out

    model = Watching()
    split_output(model, load(Classes()), "val")
    assert set(model.seen) == {(False, False)}
    assert (model.training, model.frozen.training, model.head.training) == (True, False, True)


def test_half_precision_outputs_are_measured_in_single_precision() -> None:
    task = Classes()
    output, _ = split_output(nn.Sequential(nn.Linear(5, 3), Half()), load(task), "val")
    assert output.dtype == torch.float32


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_metrics_are_not_asked_when_the_loss_is_not_finite() -> None:
    class Touchy(Task):
        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            raise ValueError("Input contains NaN.")

    output, target = outputs_and_targets("logits")
    found = output_metrics(Touchy(), output * math.nan, target)
    assert list(found) == ["loss"]
    assert math.isnan(found["loss"])


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ([0.5], "metrics() returned a list, not a dict"),
        ({"f1": "0.5"}, "metrics()['f1'] is a str, not a number"),
        ({"f1": None}, "metrics()['f1'] is a NoneType, not a number"),
        ({"f1": torch.zeros(3)}, "metrics()['f1'] is a tensor of shape (3,), not a number"),
        ({"f1": np.zeros(3)}, "metrics()['f1'] is a ndarray, not a number"),
        ({3: 0.5}, "metrics() has the key 3; names are strings"),
        ({"loss": 0.5}, "metrics() gives `loss`, which loss() already gives"),
    ],
)
def test_metrics_that_are_no_numbers_by_name_are_refused(given_: object, message: str) -> None:
    class Odd(Task):
        def metrics(self, output: Tensor, target: Tensor) -> Any:
            return given_

    with pytest.raises(UserCodeError) as caught:
        output_metrics(Odd(), *outputs_and_targets("logits"))
    assert caught.value.message == message
    assert "test_measure.py" in caught.value.frame


def test_a_metric_that_raises_is_the_users_error_with_their_frame() -> None:
    class Raising(Task):
        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            raise KeyError("classes")

    with pytest.raises(UserCodeError, match="KeyError: 'classes'") as caught:
        output_metrics(Raising(), *outputs_and_targets("logits"))
    assert caught.value.frame.startswith("test_measure.py:")
    assert caught.value.frame.endswith("in metrics")


@pytest.mark.parametrize("outputs", ["logits", "values", "binary_logits"])
def test_an_output_made_of_a_prediction_has_the_same_loss_and_metrics(outputs: Outputs) -> None:
    output, target = outputs_and_targets(outputs)
    prediction = prediction_of(output, outputs)
    assert prediction.dtype == torch.float32
    expected = output_metrics(task_for(outputs), output, target)
    assert output_metrics(task_for(outputs), output_of(prediction, outputs), target) == pytest.approx(expected)


def test_predictions_are_probabilities_or_the_numbers_themselves() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(prediction_of(logits, "logits"), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(prediction_of(logits, "binary_logits"), torch.tensor([[0.5, 0.75]]))
    assert torch.equal(prediction_of(logits, "values"), logits)


@pytest.mark.parametrize("outputs", ["logits", "binary_logits"])
def test_certain_predictions_have_finite_outputs(outputs: Outputs) -> None:
    certain = torch.tensor([[0.0, 1.0]])
    assert torch.isfinite(output_of(certain, outputs)).all()


def test_mean_is_of_predictions_and_weights_need_not_sum_to_one() -> None:
    a, b = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(mean_prediction([a, b], [3.0, 1.0]), torch.tensor([[0.8, 0.2]]))
    with pytest.raises(ValueError, match="one weight per member"):
        mean_prediction([a, b], [1.0])
    for weights in ([0.0, 0.0], [2.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="weights are numbers of at least 0, not all 0"):
            mean_prediction([a, b], weights)


@given(
    outputs=st.sampled_from(["logits", "values", "binary_logits"]),
    seeds=st.lists(st.integers(0, 100), min_size=1, max_size=4),
)
def test_the_mean_of_members_is_never_worse_than_their_mean_loss(outputs: Outputs, seeds: list[int]) -> None:
    _, target = outputs_and_targets(outputs)
    members = [outputs_and_targets(outputs, seed)[0] for seed in seeds]
    mean = mean_prediction([prediction_of(output, outputs) for output in members], [1.0] * len(members))
    losses = [output_metrics(task_for(outputs), output, target)["loss"] for output in members]
    assert output_metrics(task_for(outputs), output_of(mean, outputs), target)["loss"] <= np.mean(losses) + 1e-5


@pytest.mark.parametrize("outputs", ["logits", "values", "binary_logits"])
def test_row_scores_have_the_loss_as_their_mean(outputs: Outputs) -> None:
    output, target = outputs_and_targets(outputs)
    task = task_for(outputs)
    scores = row_scores(task, outputs, output, target)
    metrics = output_metrics(task, output, target)
    assert scores["loss"].dtype == torch.float64
    assert scores["loss"].shape == (40,)
    assert scores["loss"].mean().item() == pytest.approx(metrics["loss"], rel=1e-6)
    if outputs == "logits":
        assert set(scores["accuracy"].tolist()) == {0.0, 1.0}
        assert scores["accuracy"].mean().item() == pytest.approx(metrics["accuracy"])
    if outputs == "values":
        assert scores["mae"].mean().item() == pytest.approx(metrics["mae"])


def test_accuracy_by_row_is_left_out_where_rows_are_not_right_or_wrong() -> None:
    output, target = outputs_and_targets("binary_logits")  # two labels a row: half right is possible
    assert "accuracy" not in row_scores(task_for("binary_logits"), "binary_logits", output, target)


def test_row_scores_of_pixels_are_means_over_an_examples_pixels() -> None:
    output, target = torch.randn(4, 3, 2, 2), torch.randint(0, 3, (4, 2, 2))
    scores = row_scores(task_for("logits"), "logits", output, target)
    expected = F.cross_entropy(output.double(), target, reduction="none").mean(dim=(1, 2))
    torch.testing.assert_close(scores["loss"], expected)


class Absolute(Task):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().mean()


class Rms(Task):
    """A loss that is no mean over rows."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean().sqrt()


class Gaussian(Task):
    """A mean and a log variance for each target, and a loss that vmap cannot run."""

    outputs: Outputs = "values"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        mean, log_variance = output[:, :1], output[:, 1:]
        if target.abs().max().item() > 1e6:
            raise ValueError("targets are not standardised")
        return 0.5 * (log_variance + (target - mean).square() / log_variance.exp()).mean()

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"rmse": float((output[:, :1] - target).square().mean().sqrt())}


def test_rows_of_a_tasks_own_loss_are_scored_by_it() -> None:
    output, target = outputs_and_targets("values")
    scores = row_scores(Absolute(), "values", output, target)
    torch.testing.assert_close(scores["loss"], (output - target).abs().mean(dim=1).double())


def test_rows_of_a_loss_that_is_no_mean_get_the_proper_score() -> None:
    output, target = outputs_and_targets("values")
    scores = row_scores(Rms(), "values", output, target)
    torch.testing.assert_close(scores["loss"], (output - target).double().square().mean(dim=1))


def test_rows_of_outputs_unlike_their_targets_are_scored_one_by_one() -> None:
    output, target = torch.randn(6, 2), torch.randn(6, 1)
    scores = row_scores(Gaussian(), "values", output, target)
    assert set(scores) == {"loss"}  # an RMSE is no mean over rows
    assert scores["loss"].mean().item() == pytest.approx(Gaussian().loss(output, target).item(), rel=1e-5)


def test_output_that_would_be_broadcast_against_its_target_is_refused() -> None:
    """Also where a loop of the user's has trained the model, and nobody has compared the two before."""
    with pytest.raises(UserCodeError, match="which would broadcast"):
        output_metrics(Classes(), torch.zeros(9), torch.zeros(9, 1))
