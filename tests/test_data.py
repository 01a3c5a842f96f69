"""A study's data: what is refused, how val is cut, and what batches are given out."""

from __future__ import annotations

import doctest
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from hpsearch.errors import UserCodeError
from hpsearch.task import Splits, Task
from hpsearch.training import data as data_module
from hpsearch.training import fingerprint as fingerprint_module
from hpsearch.training.data import StudyData, batch_bounds, check_output, ensemble_rows, epoch_seed
from hpsearch.training.fingerprint import fingerprint, sample_rows, seeded_reading

CPU = torch.device("cpu")


def rows(n_rows: int = 12, n_features: int = 3, n_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs that are all different, and targets 0, 1, 2, 0, …"""
    x = torch.randn(n_rows, n_features, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n_rows) % n_classes


def task_of(train: object, val: object = None, test: object = None, outputs: Any = None) -> Task:
    class Digits(Task):
        def data(self) -> Splits:
            return Splits(train=train, val=rows(8, seed=1) if val is None else val, test=test)

    Digits.outputs = outputs
    return Digits()


def load(train: object, val: object = None, test: object = None, *, cut: bool = True, outputs: Any = None) -> StudyData:
    return StudyData.load(task_of(train, val, test, outputs), study_seed=0, cut_ensemble=cut, device=CPU)


class Items(Dataset[Any]):
    """A Dataset that is not a TensorDataset, and counts how often it is read."""

    def __init__(self, x: Any, y: Any, change: Callable[[Any], Any] = lambda x: x) -> None:
        self.x, self.y, self.change, self.n_reads = x, y, change, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.n_reads += 1
        return self.change(self.x[index]), self.y[index]


class Labelled(Items):
    """As torchvision's: the targets are an attribute."""

    @property
    def targets(self) -> Any:
        return self.y


def everything(batches: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def epoch(data: StudyData, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    return list(data.train_batches(**{"batch_size": 5, "seed": 7, "epoch": 1, **changes}))


# What comes back


def test_info_tells_what_was_found() -> None:
    info = load(rows(12), rows(9, seed=1), rows(4, seed=2)).info
    assert info.n_rows == {"train": 12, "val": 5, "ensemble": 4, "test": 4}
    assert (info.outputs, info.n_classes) == ("logits", 3)
    assert (info.input_shape, info.input_dtype, info.metrics) == ((3,), "float32", ())
    assert len(info.fingerprint) == len(info.test_fingerprint) == 32


def test_study_without_test_has_none() -> None:
    data = load(rows())
    assert data.info.test_fingerprint == ""
    assert "test" not in data.info.n_rows
    with pytest.raises(ValueError, match=r"there is no test split \(known: train, val, ensemble\)"):
        data.targets("test")


def test_float_targets_have_no_classes() -> None:
    info = load((rows()[0], torch.rand(12)), (rows(4)[0], torch.rand(4))).info
    assert (info.outputs, info.n_classes) == ("values", None)


def test_whole_number_targets_become_floats_where_the_task_says_values() -> None:
    data = load(rows(), outputs="values")
    assert data.info.outputs == "values"
    assert data.targets("train").dtype == torch.float32
    items = load(Items(*rows()), Items(*rows(4)), outputs="values")
    assert {y.dtype for _, y in epoch(items)} == {torch.float32}
    assert items.targets("val").dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "x", "y"),
    [
        (np.float64, torch.float32, torch.float32),
        (np.float32, torch.float32, torch.float32),
        (np.float16, torch.float16, torch.float16),
        (np.longdouble, torch.float32, torch.float32),
        (np.int32, torch.int32, torch.int64),
        (np.uint8, torch.uint8, torch.int64),
        (np.uint16, torch.int32, torch.int64),
        (np.uint32, torch.int64, torch.int64),
        (np.dtype(">i4"), torch.int32, torch.int64),
        (np.bool_, torch.bool, torch.int64),
    ],
)
def test_numpy_dtypes_become_what_a_pytorch_user_expects(given: Any, x: torch.dtype, y: torch.dtype) -> None:
    pair = np.array([[0], [1], [1], [0]], dtype=given), np.array([0, 1, 0, 1], dtype=given)
    data = load(pair, pair)
    got = epoch(data, shuffle=False)[0]
    assert (got[0].dtype, got[1].dtype) == (x, y)
    assert got[0].flatten().tolist() == [0, 1, 1, 0]


def test_float64_is_kept_where_torch_computes_in_it() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        pair = np.zeros((4, 1)), np.zeros(4)
        assert load(pair, pair).info.input_dtype == "float64"
    finally:
        torch.set_default_dtype(torch.float32)


def test_arrays_that_cannot_be_written_or_run_backwards_are_read() -> None:
    x, y = np.arange(8.0).reshape(4, 2)[::-1], np.array([0, 1, 0, 1])
    x.flags.writeable = y.flags.writeable = False
    data = load((x, y), (x, y))
    assert epoch(data, shuffle=False)[0][0][0].tolist() == [6.0, 7.0]


def test_inputs_that_require_gradients_are_detached() -> None:
    x, y = rows()
    assert not epoch(load((x.requires_grad_(), y)))[0][0].requires_grad


# What is refused


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserCodeError) as info:
        load(*args, **kwargs)
    # All of these lie in data(), and say so.
    assert info.value.frame.startswith("test_data.py:")
    assert info.value.frame.endswith(" in data")
    return f"{info.value.message} | {info.value.hint}"


X, Y = rows()
NAN_X, NAN_Y = X.clone(), torch.rand(12)
NAN_X[3, 1] = NAN_X[7, 0] = torch.nan
NAN_Y[5] = torch.inf
PAIR = "give (x, y), two tensors or arrays, or a torch Dataset of such pairs"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((X,), f"train is a tensor of shape (12, 3), not a pair (x, y) | {PAIR}"),
        (({"x": X},), f"train is a dict, not a pair (x, y) | {PAIR}"),
        ((None,), f"train is None, not a pair (x, y) | {PAIR}"),
        (((X, Y, Y),), f"train is a tuple of 3, not a pair (x, y) | {PAIR}"),
        (((X, Y[:11]),), "train has 12 rows of inputs and 11 of targets | each row of x needs its y"),
        (
            ((X[:0], Y[:0]),),
            "train has no rows | every split that is given needs some; leave test out if there is none",
        ),
        (
            ((X, Y), (X[:0], Y[:0])),
            "val has no rows | every split that is given needs some; leave test out if there is none",
        ),
        (((X[:, :0], Y),), "train inputs are empty: shape (12, 0) | every example needs at least one value"),
        (((X, torch.tensor(1)),), f"train targets are a single number, not rows | {PAIR}"),
        (
            ((NAN_X, Y),),
            "train inputs: 2 of 12 rows hold NaN or infinity (first in row 3) | fill or drop such rows in data()",
        ),
        (
            ((X, NAN_Y),),
            "train targets: 1 of 12 rows hold NaN or infinity (first in row 5) | fill or drop such rows in data()",
        ),
        (
            ((X, Y), (X, Y), (NAN_X[3:4], Y[:1])),
            "test inputs hold NaN or infinity | fill or drop such rows in data()",
        ),
        (
            ((X.double().numpy() * 1e300, Y),),
            "train inputs: 12 of 12 rows hold NaN or infinity (first in row 0) | fill or drop such rows in data()",
        ),
        (
            ((X, Y - 1),),
            "train targets: 4 of 12 are below 0 (first in row 0: -1) | "
            "classes are numbered from 0; drop rows without a class",
        ),
        (
            ((X, Y), (X, Y + 1)),
            "val targets: 4 of 12 are classes that train has not (first in row 2: 3; train's classes are 0 to 2) | "
            "split so that train has every class; number classes from 0 without gaps",
        ),
        (
            ((X, Y), (X, Y), (X, Y * 2)),
            "test targets: 4 of 12 are classes that train has not (first in row 2: 4; train's classes are 0 to 2) | "
            "split so that train has every class; number classes from 0 without gaps",
        ),
        (
            ((X, Y * 0), (X, Y * 0)),
            "train targets are all class 0 | classification needs two classes; give float targets for numbers",
        ),
        (
            ((X, Y), (X[:, :2], Y)),
            "val inputs have shape (2,) per row, train's have (3,) | every split needs examples of one shape",
        ),
        (
            ((X, Y), (X, Y[:, None])),
            "val targets have shape (1,) per row, train's have () | every split needs examples of one shape",
        ),
        (((X, Y), (X.half(), Y)), "val inputs are float16, train's are float32 | every split needs the same dtype"),
        (((X, Y), (X, Y.float())), "val targets are float32, train's are int64 | every split needs the same dtype"),
        (
            ((X, Y), (X[:1], Y[:1])),
            "val has 1 row; at least 2 are needed | half of val ranks trials, the other chooses the ensemble",
        ),
        (
            ((np.array([[1], [2, 3]], dtype=object), Y[:2]),),
            "train inputs: an array of Python objects | "
            "the rows differ in length or type: pad them, then x.astype(float)",
        ),
        (
            ((X[:2], np.array(["cat", "dog"])),),
            "train targets: an array of strings | number the categories: np.unique(x, return_inverse=True)[1]",
        ),
        (
            ((np.array(["2020-01-01"], dtype="datetime64[D]"), Y[:1]),),
            "train inputs: an array of dates | turn dates into numbers: (x - x.min()) / np.timedelta64(1, 'D')",
        ),
        (
            ((np.ma.masked_less(X.numpy(), 0), Y),),
            "train inputs: a masked array | fill the masked values: x.filled(…)",
        ),
        (
            ((X.to_sparse(), Y),),
            "train inputs: a sparse tensor | give a dense one: x.to_dense(), x.to_padded_tensor(0), x.dequantize()",
        ),
        (((X.tolist(), Y),), "train inputs: a list of 12 | give a torch tensor or a numpy array"),
        (((X, Y.to(torch.complex64)),), "train targets is complex64 | targets are class numbers or real numbers"),
        (
            (DataLoader(TensorDataset(X, Y)),),
            "train is a DataLoader | give its dataset; batches are hpsearch's, by the config's batch_size",
        ),
        (
            (Items(X[:0], Y),),
            "train has no rows | every split that is given needs some; leave test out if there is none",
        ),
        (
            (Items([*X[:3], X[0, :2]], Y),),
            "train[3] has shapes (2,) and (), train[0] has (3,) and () | "
            "pad or crop, so that all examples have one shape",
        ),
        ((Items(X, list("abcdefghijkl")),), "train[0] target: a str | give a torch tensor or a numpy array"),
        ((Items(NAN_X, Y),), "train[3] inputs hold NaN or infinity | fill or drop such rows in data()"),
        ((TensorDataset(X),), "train[0] is a tuple of 1, not a pair (x, y) | __getitem__ returns (x, y)"),
    ],
    ids=lambda value: value.partition(" | ")[0] if isinstance(value, str) else "",
)
def test_data_that_cannot_be_trained_on_is_refused(splits: tuple[Any, ...], message: str) -> None:
    assert refusal(*splits) == message


def test_something_else_than_splits_is_refused() -> None:
    class Digits(Task):
        def data(self) -> Any:
            return {"train": rows()}

    with pytest.raises(UserCodeError) as info:
        StudyData.load(Digits(), study_seed=0, cut_ensemble=True, device=CPU)
    assert info.value.message == "data() returned a dict, not hpsearch.Splits"
    assert info.value.hint == "return hpsearch.Splits(train=(x, y), val=(x, y), test=(x, y))"


def test_stream_of_examples_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    assert refusal(Stream()).startswith("train is an IterableDataset")


def test_data_that_raises_is_told_with_its_frame() -> None:
    class Digits(Task):
        def data(self) -> Splits:
            raise FileNotFoundError("no digits here")

    with pytest.raises(UserCodeError, match=r"test_data\.py:\d+ in data: FileNotFoundError: no digits here"):
        StudyData.load(Digits(), study_seed=0, cut_ensemble=True, device=CPU)


def test_dataset_that_raises_is_told_with_its_frame() -> None:
    with pytest.raises(UserCodeError, match=r"in <lambda>: ZeroDivisionError"):
        load(Items(*rows(), change=lambda x: 1 / 0))


def test_outputs_that_do_not_exist_are_refused() -> None:
    assert refusal(rows(), outputs="softmax") == (
        'outputs is \'softmax\' | it is "logits", "values", "binary_logits" or None'
    )


def test_float_targets_for_class_logits_are_refused() -> None:
    assert refusal((X, Y.float()), (X, Y.float()), outputs="logits") == (
        'train targets are float32, but outputs = "logits" needs class numbers | '
        "give integer targets: y.astype(int), y.long()"
    )


def test_binary_targets_beyond_0_and_1_are_refused() -> None:
    assert refusal(rows(), outputs="binary_logits") == (
        'train targets go from 0 to 2 | with outputs = "binary_logits" each target is 0 or 1, or a probability'
    )
    assert load(rows(n_classes=2), rows(8, n_classes=2), outputs="binary_logits").info.n_classes is None


def test_nan_is_found_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.splits.CHECK_BYTES", 1)
    assert refusal((NAN_X, Y)).startswith("train inputs: 2 of 12 rows hold NaN or infinity (first in row 3)")


# The ensemble split


@given(
    classes=st.lists(st.integers(min_value=0, max_value=6), min_size=2, max_size=60),
    seed=st.integers(min_value=0, max_value=2**62),
)
def test_ensemble_split_halves_val_and_every_class_of_it(classes: list[int], seed: int) -> None:
    targets = torch.tensor(classes)
    val, ensemble = ensemble_rows(targets, len(classes), seed)
    assert sorted([*val.tolist(), *ensemble.tolist()]) == list(range(len(classes)))
    assert len(ensemble) == len(classes) // 2
    assert val.tolist() == sorted(val.tolist())
    for label in set(classes):
        n_val, n_ensemble = int((targets[val] == label).sum()), int((targets[ensemble] == label).sum())
        assert abs(n_val - n_ensemble) <= 1


def test_ensemble_split_is_the_study_seeds() -> None:
    targets = torch.arange(100) % 3
    cuts = [ensemble_rows(targets, 100, seed)[1].tolist() for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


@pytest.mark.parametrize("targets", [None, torch.zeros(1000), torch.zeros(1000, dtype=torch.int64)])
def test_every_row_falls_to_either_half_with_equal_chance(targets: Tensor | None) -> None:
    counts = sum(torch.bincount(ensemble_rows(targets, 1000, seed)[1], minlength=1000) for seed in range(100))
    assert isinstance(counts, Tensor)
    # 100 draws of chance 1/2 per row: standard deviation 5; 6 of them, fails by chance about once in 5e5 runs.
    assert (counts - 50).abs().max() < 30
    # Neighbours are not tied to each other, as they would be if every second row were taken unshuffled.
    assert counts[:500].sum().item() == pytest.approx(25_000, abs=1000)


def test_numbers_are_cut_by_chance_not_by_rank() -> None:
    targets = torch.arange(1000.0)
    data = load((torch.rand(4, 1), torch.rand(4)), (torch.rand(1000, 1), targets))
    # Were rows paired by rank, the two means would differ by about 1; by chance by 18 (1000 / sqrt(12) / sqrt(250)).
    assert (data.targets("val").mean() - data.targets("ensemble").mean()).abs() > 2


def test_without_an_ensemble_val_stays_whole_and_ensemble_is_val() -> None:
    data = load(rows(), rows(9, seed=1), cut=False)
    assert data.info.n_rows == {"train": 12, "val": 9, "ensemble": 9}
    assert torch.equal(everything(data.batches("ensemble"))[0], everything(data.batches("val"))[0])


def test_dataset_is_cut_by_its_targets() -> None:
    x, y = rows(30)
    for kind in (Items, Labelled, TensorDataset):
        data = load(kind(x, y), kind(x, y))
        assert data.targets("val").bincount().tolist() == data.targets("ensemble").bincount().tolist() == [5, 5, 5]
        assert torch.equal(everything(data.batches("ensemble"))[1], data.targets("ensemble"))


# Datasets


def test_targets_that_a_dataset_carries_are_taken_without_reading_it() -> None:
    train, val = Labelled(*rows(1000)), Labelled(*rows(400, seed=1))
    data = load(Subset(train, range(900)), Subset(val, range(300)))
    assert train.n_reads + val.n_reads < 100
    assert data.targets("ensemble").tolist() == [y.item() for _, y in data._split("ensemble").dataset]  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["shifted", "target_transform", "short", "names"])
def test_targets_that_items_contradict_are_read_from_the_items(how: str) -> None:
    class Wrapped(Items):
        targets: Any = None
        target_transform: Any = None

    x, y = rows(40)
    train = Wrapped(x, y)
    train.targets = {"shifted": 2 - y, "target_transform": y, "short": y[:5], "names": ["a"] * 40}[how]
    if how == "target_transform":
        train.target_transform = str
    assert torch.equal(load(train).targets("train"), y)
    assert train.n_reads >= 40


def test_numbers_of_a_dataset_are_read_only_when_asked_for() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(())

    train, val = Items(torch.rand(500, 1), torch.rand(500)), Items(torch.rand(100, 1), torch.rand(100), noisy)
    data = load(train, val)
    assert train.n_reads + val.n_reads < 100
    state = torch.get_rng_state()
    targets = data.targets("val")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(targets, everything(data.batches("val"))[1])


def test_tensor_dataset_and_its_subsets_are_gathered_as_tensors() -> None:
    x, y = rows(40)
    parts = random_split(TensorDataset(x, y), [30, 10], generator=torch.Generator().manual_seed(3))
    given = load(Subset(parts[0], range(20)), parts[1])
    as_pair = load((x[parts[0].indices[:20]], y[parts[0].indices[:20]]), (x[parts[1].indices], y[parts[1].indices]))
    assert given.info == as_pair.info
    assert_equal(everything(epoch(given)), everything(epoch(as_pair)))
    assert isinstance(given.splits.train, TensorDataset)


def test_dataset_gives_the_same_batches_as_its_tensors() -> None:
    x, y = rows(23)
    tensors, items = load((x, y)), load(Items(x.double().numpy(), [int(label) for label in y]), Items(*rows(8, seed=1)))
    for ours, theirs in zip(epoch(tensors), epoch(items), strict=True):
        assert_equal(ours, theirs)


def test_dataset_of_plain_numbers_is_read() -> None:
    data = load(Items([0.5, 1.5, 2.5], [1.0, 2.0, 3.0]), Items([0.5, 1.5], [1.0, 2.0]))
    x, y = everything(epoch(data, shuffle=False))
    assert (x.dtype, y.dtype, x.tolist(), y.tolist()) == (torch.float32, torch.float32, [0.5, 1.5, 2.5], [1, 2, 3])


def test_batches_leave_global_random_state_alone() -> None:
    x, y = rows(23)
    for data in (load((x, y)), load(Items(x, y), Items(x, y))):
        states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
        epoch(data)
        list(data.batches("val"))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), repr(np.random.get_state())) == states[1:]  # noqa: NPY002


def test_own_loop_sees_train_and_val_as_cut_and_nothing_else() -> None:
    x, y = rows(12)
    splits = load((x.numpy(), y.numpy()), rows(9, seed=1), rows(5, seed=2)).splits
    assert (len(splits.train[0]), len(splits.val[0]), splits.test) == (12, 5, None)
    as_items = load(Items(x, y), Items(*rows(9, seed=1)), Items(x, y)).splits
    assert (len(as_items.train), len(as_items.val), as_items.test) == (12, 5, None)
    assert torch.equal(as_items.val[0][0], splits.val[0][0])


# Batches


@pytest.mark.parametrize("batch_size", range(1, 24))
def test_training_batches_hold_every_row_once_and_none_is_of_one_row(batch_size: int) -> None:
    for n_rows in range(1, 70):
        bounds = batch_bounds(n_rows, batch_size)
        assert [row for start, end in bounds for row in range(start, end)] == list(range(n_rows))
        sizes = [end - start for start, end in bounds]
        assert all(size == batch_size for size in sizes[:-1])
        assert sizes[-1] <= batch_size + 1
        if batch_size > 1 and n_rows > 1:
            assert min(sizes) > 1


def test_batches_of_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 0; at least 1 is needed"):
        batch_bounds(10, 0)


@given(n_rows=st.integers(min_value=2, max_value=50), batch_size=st.integers(min_value=1, max_value=60))
def test_an_epoch_is_a_permutation_of_train(n_rows: int, batch_size: int) -> None:
    x = torch.arange(n_rows, dtype=torch.float32)[:, None]
    data = load((x, x[:, 0]), (x, x[:, 0]))
    batches = epoch(data, batch_size=batch_size)
    assert len(batches) == data.n_train_batches(batch_size)
    got_x, got_y = everything(batches)
    assert torch.equal(got_x[:, 0], got_y)
    assert torch.equal(got_y.sort().values, x[:, 0])


def test_order_is_a_function_of_trial_seed_and_epoch_alone() -> None:
    data = load(rows(40), rows(8))
    order = everything(epoch(data, seed=7, epoch=3))[0]
    torch.manual_seed(99)
    assert torch.equal(everything(epoch(load(rows(40), rows(20, seed=5)), seed=7, epoch=3, batch_size=3))[0], order)
    assert not torch.equal(everything(epoch(data, seed=8, epoch=3))[0], order)
    assert not torch.equal(everything(epoch(data, seed=7, epoch=4))[0], order)


def test_order_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(rows(1000))
    whole = epoch(data, batch_size=7)
    for block_bytes in (1, 200, 1000):
        monkeypatch.setattr(data_module, "BLOCK_BYTES_CPU", block_bytes)
        for ours, theirs in zip(whole, epoch(data, batch_size=7), strict=True):
            assert_equal(ours, theirs)


def test_unshuffled_epoch_is_in_the_splits_order() -> None:
    x, y = rows(23)
    got = everything(epoch(load((x, y)), shuffle=False))
    assert torch.equal(got[0], x)
    assert torch.equal(got[1], y)


@pytest.mark.parametrize("split", ["train", "val"])
def test_model_that_works_in_place_does_not_change_the_data(split: Any) -> None:
    x, y = rows(12)
    data = load((x, y), rows(12))
    before = everything(data.batches(split))
    for shuffle in (True, False):
        for inputs, targets in [*epoch(data, shuffle=shuffle), *data.batches(split)]:
            inputs.zero_()
            targets.zero_()
    assert_equal(everything(data.batches(split)), before)


def test_evaluation_batches_are_bounded_by_bytes_and_rows() -> None:
    def sizes(n_rows: int, n_features: int) -> list[int]:
        x = torch.zeros(n_rows, n_features)
        return [len(y) for _, y in load((x, torch.rand(n_rows)), (x[:2], torch.rand(2))).batches("train")]

    assert sizes(5000, 1) == [4096, 904]
    assert sizes(2100, 1024) == [1024, 1024, 52]
    assert sizes(70, 100_000) == [64, 6]


def test_augment_is_a_function_of_trial_seed_and_epoch_and_leaves_the_data_alone() -> None:
    def noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs.add_(torch.randn(inputs.shape, generator=generator))

    x, y = rows(40)
    data = load((x.clone(), y))

    def augmented(**changes: int) -> Tensor:
        return everything(epoch(data, augment=noise, shuffle=False, **changes))[0]

    first = augmented()
    torch.manual_seed(5)
    assert torch.equal(augmented(), first)
    assert not torch.equal(augmented(epoch=2), first)
    assert not torch.equal(augmented(seed=8), first)
    assert torch.equal(everything(data.batches("train"))[0], x)


@pytest.mark.parametrize(
    ("augment", "found"),
    [(lambda x, g: None, "NoneType"), (lambda x, g: x[1:], "shape (4, 3)"), (lambda x, g: (x, x), "tuple")],
)
def test_augment_that_loses_rows_is_refused(augment: Any, found: str) -> None:
    with pytest.raises(UserCodeError) as info:
        epoch(load(rows()), augment=augment)
    assert info.value.message == f"augment() returned {found} for inputs of shape (5, 3)"


def test_augment_that_raises_is_told_with_its_frame() -> None:
    with pytest.raises(UserCodeError, match=r"in <lambda>: ZeroDivisionError"):
        epoch(load(rows()), augment=lambda x, g: 1 / 0)


def test_epoch_seeds_differ_in_each_argument_and_fit_63_bits() -> None:
    seeds = [epoch_seed(s, e, p) for s in (0, 1, 10, 2**63) for e in (0, 1, 10, 11) for p in ("order", "dropout")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert epoch_seed(0, 1, "order") == 7059649363489870664  # for good: old studies resume with it


@pytest.mark.gpu
def test_order_is_the_same_on_a_gpu() -> None:
    gpu = StudyData.load(task_of(rows(40)), study_seed=0, cut_ensemble=True, device=torch.device("cuda"))
    x = everything(epoch(gpu))[0]
    assert x.is_cuda
    assert torch.equal(x.cpu(), everything(epoch(load(rows(40))))[0])
    assert torch.equal(everything(gpu.batches("val"))[1].cpu(), gpu.targets("val"))


# The model's output


def outcome(found: tuple[int, ...], target: Tensor, outputs: Any, **kwargs: Any) -> str:
    try:
        check_output(torch.zeros(found), target, outputs, **kwargs)
    except UserCodeError as error:
        return f"{error.message} | {error.hint}"
    return ""


CLASSES, NUMBERS = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
BINARY = 'one logit for yes or no needs outputs = "binary_logits"; numbers to predict need float targets'


@pytest.mark.parametrize(
    ("found", "target", "outputs", "message"),
    [
        ((4, 3), CLASSES, "logits", ""),
        ((4, 5), CLASSES, "logits", ""),  # spare outputs are the user's choice
        ((4, 3, 2, 2), CLASSES[:, None, None].expand(4, 2, 2), "logits", ""),
        ((4,), NUMBERS, "values", ""),
        ((4, 2), NUMBERS[:, None].expand(4, 2), "values", ""),
        ((4, 1), NUMBERS[:, None], "binary_logits", ""),
        ((4, 1), CLASSES, "logits", f"the model's output is (4, 1) where (4, 3) is needed | {BINARY}"),
        ((4,), CLASSES, "logits", f"the model's output is (4,) where (4, 3) is needed | {BINARY}"),
        (
            (4, 2),
            CLASSES,
            "logits",
            "the model's output is (4, 2) where (4, 3) is needed | the last layer needs 3 outputs, for targets 0 to 2; "
            "are the classes numbered from 1? Then subtract 1",
        ),
        (
            (4, 3),
            CLASSES[:, None],
            "logits",
            "the model's output is (4, 3) for class targets of (4, 1) | class numbers are one per row: y.squeeze(-1)",
        ),
        (
            (4, 3),
            CLASSES[:, None].expand(4, 3),
            "logits",
            "the model's output is (4, 3) for class targets of (4, 3) | "
            'one-hot targets: y.argmax(1); a yes or no for each column: outputs = "binary_logits"',
        ),
        (
            (4, 5, 3),
            CLASSES[:, None].expand(4, 5),
            "logits",
            "the model's output is (4, 5, 3) where (4, 3, 5) is needed | classes are dimension 1 of the output",
        ),
        (
            (4, 1),
            NUMBERS,
            "values",
            "the model's output is (4, 1) and the targets are (4,), which would broadcast | "
            "squeeze the output: output.squeeze(-1), or give targets of its shape: y.reshape(-1, 1)",
        ),
        (
            (4,),
            NUMBERS[:, None],
            "binary_logits",
            "the model's output is (4,) and the targets are (4, 1), which would broadcast | "
            "squeeze the target: y.squeeze(-1)",
        ),
        (
            (4, 3),
            NUMBERS,
            "values",
            "the model's output is (4, 3) for targets of (4,) | one output per target, in the same shape",
        ),
        ((1, 3), CLASSES, "logits", "the model returned shape (1, 3) for a batch of 4 | one row of output per example"),
        ((), NUMBERS, "values", "the model returned shape () for a batch of 4 | one row of output per example"),
    ],
)
def test_output_is_held_against_the_target(found: Any, target: Tensor, outputs: Any, message: str) -> None:
    assert outcome(found, target, outputs, n_classes=3) == message


def test_single_row_batch_that_would_broadcast_is_refused_too() -> None:
    assert "which would broadcast" in outcome((1, 1), NUMBERS[:1], "values")


def test_loss_of_the_users_own_is_refused_only_what_would_broadcast() -> None:
    assert outcome((4, 3), NUMBERS, "values", own_loss=True) == ""  # three quantiles
    assert "which would broadcast" in outcome((4, 1), NUMBERS, "values", own_loss=True)
    assert outcome((4, 2), CLASSES, "logits", n_classes=3, own_loss=True) == ""


def test_output_that_is_no_float_tensor_is_refused() -> None:
    with pytest.raises(UserCodeError, match=r"the model returned a tuple, not a tensor"):
        check_output((torch.zeros(4, 3), None), CLASSES, "logits")
    with pytest.raises(UserCodeError, match=r"the model returned int64, not floats"):
        check_output(CLASSES, CLASSES, "logits")


# The fingerprint


def test_same_data_has_the_same_fingerprint_and_a_split_by_chance_has_not() -> None:
    def loaded(seed: int) -> StudyData:
        train, val = random_split(Items(*rows(60)), [40, 20], generator=torch.Generator().manual_seed(seed))
        return load(train, val, rows(4))

    first, again, other = loaded(0).info, loaded(0).info, loaded(1).info
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.test_fingerprint == other.test_fingerprint


def test_fingerprint_does_not_depend_on_the_cut() -> None:
    assert load(rows(), cut=True).info.fingerprint == load(rows(), cut=False).info.fingerprint


X_FLIPPED = X.clone()
X_FLIPPED[11, 2] += 1e-6


@pytest.mark.parametrize(
    "other",
    [
        {"train": (X_FLIPPED, Y)},
        {"train": (X, Y.flip(0))},
        {"train": (X.flip(0), Y.flip(0))},
        {"train": (X.reshape(12, 3, 1), Y)},
        {"train": (X, Y.to(torch.int32))},
        {"val": (X, Y)},
        {"train": (X, Y), "val": (X, Y)},
        {"train": TensorDataset(X, Y)},
    ],
)
def test_fingerprint_tells_apart_what_differs(other: Any) -> None:
    assert fingerprint({"train": (X, Y)}) != fingerprint(other)


def test_fingerprint_is_the_same_for_good() -> None:
    # The journal holds it, and test_fingerprint names a test split across studies: a change is a change of format.
    assert fingerprint({"train": (torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 1]))}) == (
        "df9e862473c64624fd18e287372ae153"
    )


def test_fingerprint_of_large_tensors_sees_every_byte_and_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "FULL_BYTES", 64)
    monkeypatch.setattr(fingerprint_module, "SAMPLE_BYTES", 40)
    x = torch.randn(1000, 4)
    digest = fingerprint({"train": (x, Y)})
    assert digest == fingerprint({"train": (x.clone(), Y)})
    for row in (0, 1, 501, 999):
        other = x.clone()
        other[row, 1] += 1
        assert fingerprint({"train": (other, Y)}) != digest
    assert fingerprint({"train": (x[torch.randperm(1000)], Y)}) != digest
    swapped = x.clone()
    swapped[[0, 1]] = x[[1, 0]]  # within a chunk the sums are the same; row 0 is among the sample
    assert fingerprint({"train": (swapped, Y)}) != digest


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.uint8, torch.complex64])
def test_fingerprint_reads_every_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1]).to(dtype)
    assert fingerprint({"train": (values, Y[:3])}) != fingerprint({"train": (values.flip(0), Y[:3])})


def test_random_dataset_has_one_fingerprint_and_its_own_targets() -> None:
    def flipped(x: Tensor) -> Tensor:
        return x.flip(0) if torch.rand(()) < 0.5 else x

    def unseeded(x: Tensor) -> Tensor:
        return x + float(np.random.default_rng().random())

    for change in (flipped, unseeded):
        digests = {fingerprint({"train": Labelled(X, Y, change)}) for _ in range(5)}
        assert len(digests) == 1
        assert digests != {fingerprint({"train": Labelled(X, Y.flip(0), change)})}


def test_fingerprint_of_a_subset_sees_its_indices_where_items_and_targets_tell_nothing() -> None:
    random_items = Items(X, Y, lambda x: x + float(np.random.default_rng().random()))
    parts = [Subset(Subset(random_items, outer), [0, 1, 2]) for outer in ([0, 1, 2], [0, 1, 2], [3, 4, 5])]
    first, again, other = (fingerprint({"train": part}) for part in parts)
    assert first == again != other


def test_fingerprint_of_a_dataset_sees_its_items() -> None:
    assert fingerprint({"train": Items(X, Y)}) == fingerprint({"train": Items(X.clone(), Y)})
    assert fingerprint({"train": Items(X, Y)}) != fingerprint({"train": Items(X_FLIPPED, Y)})
    assert fingerprint({"train": Items(X, Y)}) != fingerprint({"train": Subset(Items(X, Y), range(12))})


@given(n_rows=st.integers(min_value=1, max_value=10**7), n_sample=st.integers(min_value=2, max_value=20))
def test_sample_rows_are_spread_from_first_to_last(n_rows: int, n_sample: int) -> None:
    sample = sample_rows(n_rows, n_sample)
    assert (sample[0], sample[-1], len(set(sample))) == (0, n_rows - 1, min(n_rows, n_sample))


def test_reading_leaves_global_random_state_alone_also_when_it_raises() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    def read() -> None:
        with seeded_reading(3):
            assert draw() == seeded
            raise ZeroDivisionError

    with seeded_reading(3):
        seeded = draw()
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    with pytest.raises(ZeroDivisionError):
        read()
    assert (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == states  # noqa: NPY002


@pytest.mark.parametrize("module", [data_module, fingerprint_module], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
