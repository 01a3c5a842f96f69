"""Metrics by name: the values that scikit-learn gives, and words where there is none."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from hpsearch import metric_names
from hpsearch.errors import SpecError, UserCodeError
from hpsearch.metric_names import NAMED_METRICS
from hpsearch.spec import parse_spec
from hpsearch.task import Task
from hpsearch.training.measure import output_metrics, prediction_of
from hpsearch.training.named_metrics import named_metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def logits_and_classes(rng: np.random.Generator, n_classes: int, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    target = rng.integers(0, n_classes, n)
    target[:n_classes] = np.arange(n_classes)
    logits = rng.normal(size=(n, n_classes)) + 1.2 * np.eye(n_classes)[target]
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target)


def test_doctests() -> None:
    assert doctest.testmod(metric_names).failed == 0


def test_metrics_of_several_classes_are_scikit_learns(rng: np.random.Generator) -> None:
    output, target = logits_and_classes(rng, 7)
    probs, y = output.softmax(dim=1).double().numpy(), target.numpy()
    chosen = probs.argmax(axis=1)
    found = named_metrics(
        ["accuracy", "balanced_accuracy", "f1", "roc_auc", "average_precision", "top5", "log_loss", "iou"],
        prediction_of(output, "logits"),
        target,
        "logits",
    )
    one_hot = np.eye(7)[y]
    assert found == pytest.approx(
        {
            "accuracy": sk.accuracy_score(y, chosen),
            "balanced_accuracy": sk.balanced_accuracy_score(y, chosen),
            "f1": sk.f1_score(y, chosen, average="macro"),
            "roc_auc": sk.roc_auc_score(one_hot, probs, average="macro"),
            "average_precision": sk.average_precision_score(one_hot, probs, average="macro"),
            "top5": sk.top_k_accuracy_score(y, probs, k=5, labels=range(7)),
            "log_loss": -np.log(probs[np.arange(len(y)), y]).mean(),
            "iou": sk.jaccard_score(y, chosen, average="macro"),
        },
        rel=1e-5,
    )


def test_of_two_classes_the_second_is_the_one_that_is_looked_for(rng: np.random.Generator) -> None:
    output, target = logits_and_classes(rng, 2)
    probs, y = output.softmax(dim=1).double().numpy(), target.numpy()
    found = named_metrics(
        ["f1", "roc_auc", "average_precision", "iou"], prediction_of(output, "logits"), target, "logits"
    )
    assert found == pytest.approx(
        {
            "f1": sk.f1_score(y, probs.argmax(axis=1)),
            "roc_auc": sk.roc_auc_score(y, probs[:, 1]),
            "average_precision": sk.average_precision_score(y, probs[:, 1]),
            "iou": sk.jaccard_score(y, probs.argmax(axis=1)),
        }
    )


def test_labels_of_their_own_are_measured_one_by_one_and_averaged(rng: np.random.Generator) -> None:
    target = torch.tensor(rng.integers(0, 2, (200, 3)))
    output = torch.tensor(rng.normal(size=(200, 3)) + target.numpy(), dtype=torch.float32)
    probs, y = output.sigmoid().numpy(), target.numpy()
    found = named_metrics(
        ["roc_auc", "f1", "log_loss"], prediction_of(output, "binary_logits"), target, "binary_logits"
    )
    assert found == pytest.approx(
        {
            "roc_auc": np.mean([sk.roc_auc_score(y[:, k], probs[:, k]) for k in range(3)]),
            "f1": np.mean([sk.f1_score(y[:, k], probs[:, k] > 0.5) for k in range(3)]),
            "log_loss": np.mean([sk.log_loss(y[:, k], probs[:, k]) for k in range(3)]),
        },
        rel=1e-5,
    )


def test_metrics_of_numbers_are_scikit_learns(rng: np.random.Generator) -> None:
    target = torch.tensor(rng.normal(size=(50, 1)), dtype=torch.float32)
    output = target + 0.3
    found = named_metrics(["mse", "mae", "r2"], output, target, "values")
    assert found == pytest.approx({"mse": 0.09, "mae": 0.3, "r2": sk.r2_score(target, output)}, rel=1e-5)


def test_pixels_count_as_rows(rng: np.random.Generator) -> None:
    target = torch.tensor(rng.integers(0, 2, (4, 8, 8)))
    output = torch.stack([1.0 - target.float(), target.float()], dim=1)
    output[0] = output[0].flip(0)  # every pixel of the first of four images is wrong
    found = named_metrics(["accuracy", "iou"], prediction_of(output, "logits"), target, "logits")
    assert found["accuracy"] == 0.75
    assert 0 < found["iou"] < 0.75


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("f2", "logits", r"there is no metric named `f2` \(known: accuracy, balanced_accuracy, f1"),
        ("r2", "logits", r"`r2` is not for models that predict classes \(those are: accuracy"),
        ("f1", "values", r"`f1` is not for models that predict numbers \(those are: mse, mae, r2\)"),
    ],
)
def test_metric_that_does_not_fit_the_outputs_is_told(name: str, outputs: str, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        named_metrics([name], torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["roc_auc", "average_precision"])
def test_metric_without_a_value_on_these_rows_is_an_error_not_a_diverged_trial(name: str) -> None:
    with pytest.raises(UserCodeError, match=f"the metric `{name}` has no value on the 4 rows of a split"):
        named_metrics([name], torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.long), "logits")


def test_top5_of_few_classes_says_nothing_and_is_refused() -> None:
    with pytest.raises(UserCodeError, match="every class is among the five likeliest"):
        named_metrics(["top5"], torch.full((4, 3), 1 / 3), torch.zeros(4, dtype=torch.long), "logits")


def test_metrics_of_the_tasks_own_win_over_those_of_the_same_name() -> None:
    class Own(Task):
        metric_names = ("f1", "log_loss")

        def metrics(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
            return {"f1": 0.123}

    found = output_metrics(Own(), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    assert found["f1"] == 0.123
    assert set(found) == {"loss", "f1", "log_loss"}
    assert found["log_loss"] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize("metric", NAMED_METRICS.values(), ids=lambda metric: metric.name)
def test_goal_of_a_named_metric_needs_not_be_written(metric) -> None:  # type: ignore[no-untyped-def]
    spec = parse_spec(f"name: a\ntask: t.py:T\nmetric: {{name: val_{metric.name}}}\nparameters: {{lr: {{value: 0.1}}}}")
    assert spec.metric.goal == ("maximize" if metric.higher_is_better else "minimize")
    assert spec.metric_names == (metric.name,)


def test_unknown_metric_in_the_list_is_told_with_the_nearest() -> None:
    with pytest.raises(SpecError) as found:
        parse_spec("name: a\ntask: t.py:T\nmetrics: [f1, roc_acu]\nparameters: {lr: {value: 0.1}}")
    assert 'has no metric "roc_acu"' in str(found.value)
    assert "did you mean roc_auc?" in str(found.value)
