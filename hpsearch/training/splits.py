"""What Task.data() gave, read and checked: every split becomes Rows (tensors) or Items (a Dataset).

Refusals name the split, what was found, and what to do; they are UserCodeErrors without a frame, which StudyData adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hpsearch.errors import UserCodeError
from hpsearch.job import Outputs
from hpsearch.task import Splits, Task, outputs_of
from hpsearch.training.fingerprint import sample_rows, seeded_reading
from hpsearch.training.user_code import user_code

CHECK_BYTES = 64 << 20  # values are checked in chunks of about this size

_PAIR_HINT = "give (x, y), two tensors or arrays, or a torch Dataset of such pairs"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A split in memory: x[i] and y[i] are example i. On the CPU."""

    x: Tensor
    y: Tensor
    from_dataset: bool = False  # the user gave a TensorDataset, and expects one back in `fit`

    def __len__(self) -> int:
        return len(self.x)

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        return self.x[0], self.y[0]

    def take(self, rows: Tensor) -> Rows:
        return Rows(x=self.x[rows], y=self.y[rows], from_dataset=self.from_dataset)

    def source(self) -> tuple[Tensor, Tensor] | Dataset[Any]:
        """What a user's own loop is given."""
        return TensorDataset(self.x, self.y) if self.from_dataset else (self.x, self.y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """A split that is read item by item; its targets too where they could be had without reading the items."""

    dataset: Dataset[Any]
    example: tuple[Tensor, Tensor]
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> Items:
        y = None if self.y is None else self.y[rows]
        return Items(dataset=Subset(self.dataset, rows.tolist()), example=self.example, y=y)

    def source(self) -> Dataset[Any]:
        return self.dataset


Split = Rows | Items


@dataclass(frozen=True, kw_only=True)
class ReadSplits:
    """All splits of a task, checked against each other."""

    by_name: dict[str, Split]
    outputs: Outputs
    n_classes: int | None  # of class logits


def read_splits(task: Task, given: object) -> ReadSplits:
    """The splits that a task gave, as tensors or items, each checked alone and against train.

    The inputs of a Dataset are checked only where its items are read anyway: all of them when its class targets
    can be had in no other way than by reading, else some. (What hides there shows as a diverged trial.)

    Raises:
        UserCodeError: something that could not be trained on, or would be in silence.
    """
    if not isinstance(given, Splits):
        _refuse(
            f"data() returned {_kind(given)}, not hpsearch.Splits",
            "return hpsearch.Splits(train=(x, y), val=(x, y), test=(x, y))",
        )
    if task.outputs not in (None, "logits", "values", "binary_logits"):
        _refuse(f"outputs is {task.outputs!r}", 'it is "logits", "values", "binary_logits" or None')
    named = {"train": given.train, "val": given.val, "test": given.test}
    splits = {name: _read_split(name, entry) for name, entry in named.items() if not (name == "test" and entry is None)}
    outputs = outputs_of(task, splits["train"].example[1])
    for name, split in splits.items():
        _check_alike(name, split, splits["train"])
    if len(splits["val"]) < 2:
        _refuse("val has 1 row; at least 2 are needed", "half of val ranks trials, the other chooses the ensemble")
    splits = {name: _with_meaning(name, split, outputs) for name, split in splits.items()}
    n_classes = _count_classes(splits) if outputs == "logits" else None
    return ReadSplits(by_name=splits, outputs=outputs, n_classes=n_classes)


def as_input(value: object, where: str) -> Tensor:
    """A tensor of inputs on the CPU, in the dtype that was given; float64 alone becomes torch's default dtype.

    numpy's arrays are float64 unless told otherwise, and no layer would take that. Who computes in float64 on purpose
    calls torch.set_default_dtype(torch.float64), and keeps it.
    """
    tensor = _as_tensor(value, where)
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def as_target(value: object, where: str) -> Tensor:
    """A tensor of targets on the CPU: whole numbers and booleans as int64, others as `as_input`."""
    tensor = as_input(value, where)
    if tensor.is_complex():
        _refuse(f"{where} is {_dtype(tensor)}", "targets are class numbers or real numbers")
    return tensor if tensor.is_floating_point() else tensor.to(torch.int64)


def as_example(item: Any, where: str) -> tuple[Tensor, Tensor]:
    """(x, y) of one item of a Dataset, whatever it gives (arrays, plain numbers), as `as_input` and `as_target`."""
    x, y = (torch.tensor(part) if isinstance(part, (bool, int, float, np.generic)) else part for part in item)
    return as_input(x, f"{where} inputs"), as_target(y, f"{where} target")


def collated(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """(x, y) as DataLoader's collation left it, in the dtypes of `as_input` and `as_target`."""
    x, y = batch
    return as_input(x, f"{where} inputs"), as_target(y, f"{where} targets")


def with_meaning(y: Tensor, outputs: Outputs) -> Tensor:
    """Targets in the dtype that the model's output is compared in: whole numbers as floats unless they are classes."""
    return y if outputs == "logits" or y.is_floating_point() else y.to(torch.get_default_dtype())


def read_targets(name: str, split: Items) -> Tensor:
    """All targets of a Dataset, by reading its items once; global random state is left as it was."""
    with seeded_reading(0):
        targets = [_read_item(name, split.dataset, row)[1] for row in range(len(split))]
    shapes = {tuple(target.shape) for target in targets}
    if len(shapes) > 1:
        _refuse(f"{name} targets have different shapes: {_listed(sorted(shapes))}", "every item needs the same")
    return torch.stack(targets)


def _read_split(name: str, entry: object) -> Split:
    if isinstance(entry, DataLoader):
        _refuse(f"{name} is a DataLoader", "give its dataset; batches are hpsearch's, by the config's batch_size")
    if isinstance(entry, IterableDataset):
        _refuse(f"{name} is an IterableDataset", "examples are drawn by number: give a Dataset with len() and [i]")
    from_dataset = isinstance(entry, Dataset)
    pair = _unwrapped(entry) if from_dataset else entry
    if isinstance(pair, (tuple, list)):
        if len(pair) != 2:
            _refuse(f"{name} is a {type(pair).__name__} of {len(pair)}, not a pair (x, y)", _PAIR_HINT)
        return _read_rows(name, pair[0], pair[1], from_dataset=from_dataset)
    if from_dataset or (hasattr(entry, "__getitem__") and hasattr(entry, "__len__") and not _is_array(entry)):
        return _read_items(name, entry)
    _refuse(f"{name} is {_kind(entry)}, not a pair (x, y)", _PAIR_HINT)


def _read_rows(name: str, x_given: object, y_given: object, *, from_dataset: bool) -> Rows:
    x, y = as_input(x_given, f"{name} inputs"), as_target(y_given, f"{name} targets")
    for what, tensor in (("inputs", x), ("targets", y)):
        if tensor.ndim == 0:
            _refuse(f"{name} {what} are a single number, not rows", _PAIR_HINT)
    if len(x) != len(y):
        _refuse(f"{name} has {len(x):,} rows of inputs and {len(y):,} of targets", "each row of x needs its y")
    if len(x) == 0:
        _refuse(f"{name} has no rows", "every split that is given needs some; leave test out if there is none")
    for what, tensor in (("inputs", x), ("targets", y)):
        if tensor.numel() == 0:
            _refuse(f"{name} {what} are empty: shape {tuple(tensor.shape)}", "every example needs at least one value")
        _check_finite(f"{name} {what}", tensor)
    return Rows(x=x, y=y, from_dataset=from_dataset)


def _read_items(name: str, dataset: Any) -> Items:
    n_items = len(dataset)
    if n_items == 0:
        _refuse(f"{name} has no rows", "every split that is given needs some; leave test out if there is none")
    with seeded_reading(0):
        samples = {row: _read_item(name, dataset, row) for row in sample_rows(n_items)}
    example = samples[0]
    for row, (x, y) in samples.items():
        if x.shape != example[0].shape or y.shape != example[1].shape:
            _refuse(
                f"{name}[{row}] has shapes {tuple(x.shape)} and {tuple(y.shape)}, {name}[0] has "
                f"{tuple(example[0].shape)} and {tuple(example[1].shape)}",
                "pad or crop, so that all examples have one shape",
            )
    known = _known_targets(dataset)
    # A wrapper may change targets on their way out; the attribute is believed where some items agree with it.
    if known is not None and not (
        len(known) == n_items and all(torch.equal(known[row], y) for row, (_, y) in samples.items())
    ):
        known = None
    return Items(dataset=dataset, example=example, y=known)


def _read_item(name: str, dataset: Any, row: int) -> tuple[Tensor, Tensor]:
    with user_code(f"{name}[{row}]"):
        item = dataset[row]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        _refuse(f"{name}[{row}] is {_kind(item)}, not a pair (x, y)", "__getitem__ returns (x, y)")
    x, y = as_example(item, f"{name}[{row}]")
    if x.numel() == 0 or y.numel() == 0:
        _refuse(f"{name}[{row}] is empty: shapes {tuple(x.shape)} and {tuple(y.shape)}", "every example needs values")
    _check_finite(f"{name}[{row}] inputs", x[None])
    _check_finite(f"{name}[{row}] target", y[None])
    return x, y


def _unwrapped(dataset: object) -> tuple[Tensor, Tensor] | None:
    """The tensors of a plain TensorDataset, or of Subsets of one: gathered by index they are far faster."""
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if type(dataset) is Subset and (pair := _unwrapped(dataset.dataset)) is not None:
        rows = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        return pair[0][rows], pair[1][rows]
    return None


def _known_targets(dataset: object) -> Tensor | None:
    """Targets that a dataset carries as an attribute, as torchvision's do."""
    if isinstance(dataset, Subset):
        known = _known_targets(dataset.dataset)
        return None if known is None else known[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in ("targets", "labels"):
        values = getattr(dataset, attribute, None)
        if isinstance(values, (Tensor, np.ndarray, list, tuple)):
            try:
                tensor = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError):  # names, ragged lists
                continue
            return as_target(tensor, attribute)
    return None


def _with_meaning(name: str, split: Split, outputs: Outputs) -> Split:
    """The split with its targets in the dtype that this meaning of outputs compares with, checked for it."""
    y = split.example[1]
    if outputs == "logits" and y.is_floating_point():
        _refuse(
            f'{name} targets are {_dtype(y)}, but outputs = "logits" needs class numbers',
            "give integer targets: y.astype(int), y.long()",
        )
    if isinstance(split, Items):
        targets = split.y
        if targets is None and outputs == "logits":
            targets = read_targets(name, split)
        if targets is not None:
            targets = with_meaning(targets, outputs)
        example = (split.example[0], with_meaning(y, outputs))
        split = Items(dataset=split.dataset, example=example, y=targets)
    else:
        split = Rows(x=split.x, y=with_meaning(split.y, outputs), from_dataset=split.from_dataset)
    if split.y is not None:
        if outputs == "binary_logits" and (split.y.min() < 0 or split.y.max() > 1):
            _refuse(
                f"{name} targets go from {split.y.min():g} to {split.y.max():g}",
                'with outputs = "binary_logits" each target is 0 or 1, or a probability',
            )
        if isinstance(split, Items) and split.y.is_floating_point():
            _check_finite(f"{name} targets", split.y)
    return split


def _count_classes(splits: dict[str, Split]) -> int:
    """Classes 0 to the largest target of train, for which every other split's targets are checked."""
    targets = {name: split.y for name, split in splits.items() if split.y is not None}
    for name, y in targets.items():
        bad = y < 0
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            _refuse(
                f"{name} targets: {int(bad.sum()):,} of {y.numel():,} are below 0 (first in row {row}: "
                f"{int(y[bad][0])})",
                "classes are numbered from 0; drop rows without a class",
            )
    n_classes = int(targets["train"].max()) + 1
    if n_classes < 2:
        _refuse("train targets are all class 0", "classification needs two classes; give float targets for numbers")
    for name, y in targets.items():
        bad = y >= n_classes
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            _refuse(
                f"{name} targets: {int(bad.sum()):,} of {y.numel():,} are classes that train has not (first in row "
                f"{row}: {int(y[bad][0])}; train's classes are 0 to {n_classes - 1})",
                "split so that train has every class; number classes from 0 without gaps",
            )
    return n_classes


def _check_alike(name: str, split: Split, train: Split) -> None:
    for what, ours, trains in zip(("inputs", "targets"), split.example, train.example, strict=True):
        if ours.shape != trains.shape:
            _refuse(
                f"{name} {what} have shape {tuple(ours.shape)} per row, train's have {tuple(trains.shape)}",
                "every split needs examples of one shape",
            )
        if ours.dtype != trains.dtype:
            _refuse(
                f"{name} {what} are {_dtype(ours)}, train's are {_dtype(trains)}", "every split needs the same dtype"
            )


def _check_finite(where: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity. By extremes first, which needs no memory; both let NaN through to the result."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values)):
        return
    flat = values.reshape(len(values), -1)
    chunk = max(1, CHECK_BYTES // (flat.shape[1] * flat.element_size()))
    bad = torch.cat([~torch.isfinite(part).all(dim=1) for part in torch.split(flat, chunk)])
    if len(tensor) == 1:
        _refuse(f"{where} hold NaN or infinity", "fill or drop such rows in data()")
    found = f"{int(bad.sum()):,} of {len(bad):,} rows hold NaN or infinity (first in row {int(bad.nonzero()[0, 0])})"
    _refuse(f"{where}: {found}", "fill or drop such rows in data()")


def _as_tensor(value: object, where: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
            _refuse(
                f"{where}: a {kind} tensor", "give a dense one: x.to_dense(), x.to_padded_tensor(0), x.dequantize()"
            )
        return value.detach().cpu()
    if isinstance(value, np.ma.MaskedArray):
        _refuse(f"{where}: a masked array", "fill the masked values: x.filled(…)")
    if isinstance(value, np.ndarray):
        return _from_numpy(value, where)
    hint = "give x.to_numpy()" if hasattr(value, "to_numpy") else "give a torch tensor or a numpy array"
    if type(value).__module__.partition(".")[0] == "PIL":
        hint = "turn images into tensors: torchvision.transforms.ToTensor()"
    elif type(value).__module__.startswith("scipy.sparse"):
        hint = "give a dense array: x.toarray()"
    _refuse(f"{where}: {_kind(value)}", hint)


def _from_numpy(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "biufc":
        hints = {
            "O": "the rows differ in length or type: pad them, then x.astype(float)",
            "U": "number the categories: np.unique(x, return_inverse=True)[1]",
            "S": "number the categories: np.unique(x, return_inverse=True)[1]",
            "M": "turn dates into numbers: (x - x.min()) / np.timedelta64(1, 'D')",
            "m": "turn durations into numbers: x / np.timedelta64(1, 's')",
        }
        kinds = {"O": "Python objects", "U": "strings", "S": "strings", "M": "dates", "m": "durations"}
        _refuse(
            f"{where}: an array of {kinds.get(array.dtype.kind, str(array.dtype))}",
            hints.get(array.dtype.kind, "give an array of numbers"),
        )
    # torch has no arithmetic for wide unsigned numbers, and none of numpy's long double.
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "longdouble": np.float64}
    dtype = wider.get(np.dtype(array.dtype).type.__name__, array.dtype.newbyteorder("="))
    array = np.ascontiguousarray(array.astype(dtype, copy=False)) if array.ndim else array.astype(dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _is_array(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray, str, bytes, dict)) or hasattr(value, "to_numpy")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(value: object) -> str:
    """What something is, in few words: None, a dict, an array of shape (3, 4)."""
    if value is None:
        return "None"
    if isinstance(value, (Tensor, np.ndarray)):
        name = "tensor" if isinstance(value, Tensor) else "array"
        return f"{'an' if name == 'array' else 'a'} {name} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:5]))
    return f"{shown}, …" if len(values) > 5 else shown


def _refuse(found: str, hint: str) -> NoReturn:
    raise UserCodeError(found, hint=hint)
