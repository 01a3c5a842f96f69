"""Folds of train and val: which rows they hold, and a config trained on them."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hpsearch.errors import UserCodeError
from hpsearch.job import FoldJob, Result, TrainJob, fold_key
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training import folds as module
from hpsearch.training.data import StudyData
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.folds import Folds, fold_rows
from tests.networks import classes, mlp, task

CPU = torch.device("cpu")


def data_of(made: Task, *, cut_ensemble: bool = True) -> StudyData:
    return StudyData.load(made, study_seed=0, cut_ensemble=cut_ensemble, device=CPU)


def numbered(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each row of each split is another number."""
    x = (1000.0 * seed + torch.arange(n)).reshape(-1, 1)
    return x, torch.arange(n) % 3


def values(data: StudyData, split: Any) -> list[float]:
    return sorted(float(x) for batch, _ in data.batches(split) for x in batch.reshape(-1))


def small(rows: Callable[[int, int], Any] = numbered, **members: Any) -> Task:
    def data(self: Task) -> Splits:
        return Splits(train=rows(30, 1), val=rows(20, 2), test=rows(20, 3))

    return task(lambda: nn.Linear(1, 3), rows, data=data, **members)


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), folds=st.integers(2, 7), repeat=st.integers(0, 3))
def test_each_row_is_in_one_fold_and_each_class_is_dealt_out_evenly(counts: list[int], folds: int, repeat: int) -> None:
    targets = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    cut = fold_rows(targets, len(targets), folds=folds, repeat=repeat, seed=0)
    assert sorted(torch.cat(cut).tolist()) == list(range(len(targets)))
    sizes = [len(rows) for rows in cut]
    assert max(sizes) - min(sizes) <= 1
    for label in range(len(counts)):
        held = [int((targets[rows] == label).sum()) for rows in cut]
        assert max(held) - min(held) <= 1


def test_cut_is_a_function_of_study_seed_folds_and_repeat() -> None:
    def cut(folds: int = 5, repeat: int = 0, seed: int = 0) -> list[list[int]]:
        return [rows.tolist() for rows in fold_rows(None, 50, folds=folds, repeat=repeat, seed=seed)]

    assert cut() == cut()
    assert cut() != cut(repeat=1)
    assert cut() != cut(seed=1)
    assert cut(folds=4)[0] != cut()[0]


def test_folds_are_made_of_train_and_val_and_never_of_the_ensemble_split_or_test() -> None:
    data = data_of(small())
    folds = Folds(data, study_seed=0)
    known = values(data, "train") + values(data, "val")
    held_out = []
    for fold in range(5):
        cut = folds.without(fold, folds=5, repeat=0)
        assert set(cut.info.n_rows) == {"train", "val"}
        assert sorted(values(cut, "train") + values(cut, "val")) == sorted(known)
        held_out += values(cut, "val")
    assert sorted(held_out) == sorted(known)
    assert not set(held_out) & {*values(data, "ensemble"), *values(data, "test")}


def test_study_that_sets_nothing_aside_has_all_of_val_in_its_folds() -> None:
    data = data_of(small(), cut_ensemble=False)
    cut = Folds(data, study_seed=0).without(0, folds=5, repeat=0)
    assert sum(cut.info.n_rows.values()) == 50


class Seen(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]


@pytest.mark.parametrize("kind", [Seen, TensorDataset])
def test_datasets_are_cut_like_tensors(kind: Callable[..., Any]) -> None:
    of_tensors = Folds(data_of(small()), study_seed=0).without(3, folds=5, repeat=1)
    of_dataset = Folds(data_of(small(lambda n, seed: kind(*numbered(n, seed)))), study_seed=0)
    cut = of_dataset.without(3, folds=5, repeat=1)
    assert values(cut, "val") == values(of_tensors, "val")
    assert values(cut, "train") == values(of_tensors, "train")


def test_dataset_beside_tensors_is_cut_too() -> None:
    mixed = small(lambda n, seed: Seen(*numbered(n, seed)) if seed == 1 else numbered(n, seed))
    of_tensors = Folds(data_of(small()), study_seed=0).without(3, folds=5, repeat=1)
    assert values(Folds(data_of(mixed), study_seed=0).without(3, folds=5, repeat=1), "val") == values(of_tensors, "val")


class Plain(Seen):
    """Gives an array and a plain number."""

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return self.x[row].double().numpy(), int(self.y[row])


@pytest.mark.parametrize("seeds", [(1,), (2,), (1, 2)], ids=["train", "val", "both"])
def test_dataset_of_arrays_and_numbers_beside_tensors_gives_batches_of_both(seeds: tuple[int, ...]) -> None:
    mixed = small(lambda n, seed: Plain(*numbered(n, seed)) if seed in seeds else numbered(n, seed))
    of_tensors = Folds(data_of(small()), study_seed=0).without(3, folds=5, repeat=1)
    cut = Folds(data_of(mixed), study_seed=0).without(3, folds=5, repeat=1)
    for split in ("train", "val"):
        assert values(cut, split) == values(of_tensors, split)
        for (x, y), (its_x, its_y) in zip(cut.batches(split), of_tensors.batches(split), strict=True):
            assert (x.dtype, y.dtype) == (its_x.dtype, its_y.dtype)


def test_too_few_rows_are_refused_with_what_there_are() -> None:
    with pytest.raises(UserCodeError, match="train and val have 40 rows together, too few for 21 folds of at least 2"):
        Folds(data_of(small()), study_seed=0).without(0, folds=21, repeat=0)


# The job


def job(fold: int = 0, *, epochs: int = 2, folds: int = 4, seed: int = 3) -> FoldJob:
    return FoldJob(
        key=fold_key(7, epochs, folds, 0, fold),
        trial=7,
        config={"lr": 0.01, "batch_size": 64},
        seed=seed,
        epochs=epochs,
        folds=folds,
        repeat=0,
        fold=fold,
    )


def one(executor: TorchExecutor, asked: FoldJob | TrainJob) -> Result:
    def nothing(ref: str) -> bytes:
        raise AssertionError(ref)

    (result,) = executor.run([asked], nothing, lambda key, epoch: None)
    return result


def told(result: Result) -> list[dict[str, float]]:
    return [row.metrics for row in result.epochs]


def test_fold_gives_its_curve_and_keeps_no_weights() -> None:
    result = one(TorchExecutor(task(mlp), study_seed=0, device="cpu"), job())
    assert result.outcome == "done"
    assert [row.epoch for row in result.epochs] == [1, 2]
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(told(result)[0])
    assert result.values == {"n_rows": {"train": 562, "val": 188}}
    assert not result.blobs


def test_fold_does_not_depend_on_what_the_worker_did_before() -> None:
    fresh = one(TorchExecutor(task(mlp), study_seed=0, device="cpu"), job(2))
    worker = TorchExecutor(task(mlp), study_seed=0, device="cpu")
    one(worker, job(1))
    again = one(worker, job(2))
    assert told(again) == told(fresh)
    assert told(one(worker, job(1))) != told(fresh)


def test_trials_own_training_sees_its_own_rows_after_a_fold() -> None:
    train = TrainJob(key="train/0/0-1", trial=0, config={"lr": 0.01}, seed=1, from_epoch=0, to_epoch=1)
    alone = one(TorchExecutor(task(mlp), study_seed=0, device="cpu"), train)
    worker = TorchExecutor(task(mlp), study_seed=0, device="cpu")
    one(worker, job())
    assert told(one(worker, train)) == told(alone)


def test_fold_that_diverges_says_so_with_its_curve() -> None:
    def loss(self: Task, output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * float("nan")

    result = one(TorchExecutor(task(mlp, loss=loss), study_seed=0, device="cpu"), job())
    assert result.outcome == "diverged"


def rare(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three rows of class 1, however many there are in all."""
    x, _ = classes(n, seed)
    return x, (torch.arange(n) < 3).long()


def test_fold_without_a_class_on_which_the_metric_has_no_value_is_said_as_such() -> None:
    made = task(lambda: mlp(n_out=2), rare)
    made.metric_names = ("roc_auc",)
    worker = TorchExecutor(made, study_seed=0, device="cpu", metric="val_roc_auc", goal="maximize", cut_ensemble=False)
    results = [one(worker, job(fold, epochs=1, folds=8)) for fold in range(8)]
    crashed = [result for result in results if result.outcome == "crashed"]
    assert 0 < len(crashed) < 8
    for result in crashed:
        assert result.message.startswith("the metric `roc_auc` has no value on the ")
        assert result.message.endswith(
            "; class 1 is not in this fold: train and val have 6 rows of it, for 8 folds "
            "(hint: write fewer folds under `evaluate`)"
        )


def test_metric_that_is_not_finite_on_a_fold_without_a_class_is_said_as_such() -> None:
    def metrics(self: Task, output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"found": (output.argmax(1) == 1)[target == 1].float().mean()}

    worker = TorchExecutor(
        task(mlp, rare, metrics=metrics), study_seed=0, device="cpu", metric="val_found", cut_ensemble=False
    )
    found = [one(worker, job(fold, epochs=1, folds=8)) for fold in range(8)]
    (message,) = {result.message for result in found if result.outcome == "diverged"}
    assert message.endswith("; class 1 is not in this fold: train and val have 6 rows of it, for 8 folds")


def test_loop_of_ones_own_is_given_the_fold() -> None:
    seen = []

    def fit(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Any:
        seen.append((len(splits.train[0]), len(splits.val[0])))
        while True:
            yield Report({"val_loss": 1.0})

    result = one(TorchExecutor(task(mlp, fit=fit), study_seed=0, device="cpu"), job())
    assert result.outcome == "done"
    assert seen == [(562, 188)]


def test_batches_of_a_fold_are_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.executor.ALIVE_S", 0.0)
    heard: list[tuple[str, int]] = []
    worker = TorchExecutor(task(mlp, classes), study_seed=0, device="cpu")
    asked = dataclasses.replace(job(), epochs=1)
    list(worker.run([asked], lambda ref: b"", lambda key, epoch: heard.append((key, epoch))))
    assert heard.count((asked.key, 0)) > 8
