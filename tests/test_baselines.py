"""Baselines: the best constant prediction and a linear model, measured as a trial is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.task import Splits, Task
from hpsearch.training.baselines import Skipped, measure_baseline
from hpsearch.training.data import StudyData


def made(splits: Splits, **attributes: Any) -> tuple[Task, StudyData]:
    class Given(Task):
        def data(self) -> Splits:
            return splits

        def model(self, config: dict[str, Any]) -> nn.Module:
            return nn.Linear(1, 1)

    for name, value in attributes.items():
        setattr(Given, name, value)
    task = Given()
    return task, StudyData.load(task, study_seed=0, cut_ensemble=True, device=torch.device("cpu"))


def classes(n: int = 600, shares: tuple[float, ...] = (0.7, 0.2, 0.1)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    y = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=generator)
    x = torch.randn(n, 5, generator=generator) + 2.0 * F.one_hot(y, 5)
    return x, y


def test_constant_prediction_of_classes_has_the_entropy_of_their_shares_and_the_accuracy_of_the_majority() -> None:
    task, data = made(Splits(train=classes(3000), val=classes(2000), test=classes(2500)))
    measured = measure_baseline("constant", task, data, seed=0)
    assert set(measured) == {"val", "ensemble", "test"}
    metrics, rows = measured["test"]
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert metrics["loss"] == pytest.approx(entropy, abs=0.05)
    assert metrics["accuracy"] == pytest.approx(0.7, abs=0.03)
    assert float(rows["loss"].mean()) == pytest.approx(metrics["loss"], rel=1e-5)


def test_linear_model_beats_the_constant_where_inputs_tell_something() -> None:
    task, data = made(Splits(train=classes(900), val=classes(600)))
    constant = measure_baseline("constant", task, data, seed=0)["ensemble"][0]
    linear = measure_baseline("linear", task, data, seed=0)["ensemble"][0]
    assert linear["loss"] < 0.6 * constant["loss"]
    assert linear["accuracy"] > 0.85


def test_constant_number_is_the_mean_for_squared_and_the_median_for_absolute_error() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(400, 3, generator=generator), torch.exp(2 * torch.randn(400, 1, generator=generator))
    mean = float(y.mean())
    task, data = made(Splits(train=(x, y), val=(x, y)))
    assert measure_baseline("constant", task, data, seed=0)["val"][0]["mae"] > 0
    absolute, data_l1 = made(Splits(train=(x, y), val=(x, y)), loss=staticmethod(lambda o, t: F.l1_loss(o, t)))
    by_l1 = measure_baseline("constant", absolute, data_l1, seed=0)
    squared = measure_baseline("constant", task, data, seed=0)
    n = data.info.n_rows["val"] + data.info.n_rows["ensemble"]
    both = sum(squared[s][0]["loss"] * data.info.n_rows[s] for s in ("val", "ensemble")) / n
    assert both == pytest.approx(float(((y - mean) ** 2).mean()), rel=1e-4)
    both = sum(by_l1[s][0]["loss"] * data.info.n_rows[s] for s in ("val", "ensemble")) / n
    assert both == pytest.approx(float((y - y.median()).abs().mean()), rel=0.01)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 2)])
def test_linear_model_predicts_numbers_in_the_shape_of_their_targets(shape: tuple[int, ...]) -> None:
    """Targets of shape (N, 1) are not broadcast against predictions of shape (N,)."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, 3, generator=generator)
    y = (x[:, :2] if shape[-1] == 2 else x[:, 0]).reshape(shape)
    task, data = made(Splits(train=(x, y), val=(x, y)), metric_names=("r2",))
    metrics, rows = measure_baseline("linear", task, data, seed=0)["val"]
    assert metrics["loss"] < 0.01
    assert metrics["mae"] < 0.1
    assert metrics["r2"] > 0.99
    assert float(rows["loss"].mean()) == pytest.approx(metrics["loss"], rel=1e-4)


def test_labels_of_their_own_are_each_predicted() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=generator)
    y = (x[:, :2] > 0.3).long()
    task, data = made(Splits(train=(x, y), val=(x, y)), outputs="binary_logits")
    constant = measure_baseline("constant", task, data, seed=0)["val"][0]
    linear = measure_baseline("linear", task, data, seed=0)["val"][0]
    assert linear["accuracy"] > 0.9 > constant["accuracy"]


def test_pixels_get_the_shares_of_their_classes() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 3, 8, 8, generator=generator), torch.randint(0, 3, (40, 8, 8), generator=generator)
    task, data = made(Splits(train=(x, y), val=(x, y)))
    assert measure_baseline("constant", task, data, seed=0)["val"][0]["loss"] == pytest.approx(math.log(3), abs=0.01)
    with pytest.raises(Skipped, match="a target is more than a row of numbers"):
        measure_baseline("linear", task, data, seed=0)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(20, 5000), "an input has 5,000 numbers; a linear model is fitted to 4,096 at most"),
        (torch.zeros(20, 5, dtype=torch.int64), "inputs are int64: numbers of things"),
    ],
)
def test_linear_model_of_what_cannot_be_added_up_is_skipped_with_the_reason(x: Tensor, why: str) -> None:
    y = torch.arange(20) % 2
    task, data = made(Splits(train=(x, y), val=(x, y)))
    with pytest.raises(Skipped, match=why):
        measure_baseline("linear", task, data, seed=0)


def test_equal_data_give_equal_baselines() -> None:
    task, data = made(Splits(train=classes(900), val=classes(600)))
    first, second = (measure_baseline("linear", task, data, seed=5)["val"][0] for _ in range(2))
    assert first == second
