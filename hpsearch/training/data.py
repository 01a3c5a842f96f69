"""A study's data as a worker holds it: checked, cut, on its device, given out in batches.

Everything random here is a function of what it is for: the ensemble split of the study's seed, the order of a trial's
epoch of (trial seed, epoch), on any machine. Global random state is neither read nor changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hpsearch.errors import UserCodeError
from hpsearch.job import DataInfo, Outputs, SplitName
from hpsearch.task import Splits, Task
from hpsearch.training.fingerprint import fingerprint
from hpsearch.training.shared_data import shared_splits
from hpsearch.training.splits import Items, ReadSplits, Rows, Split, collated, read_splits, read_targets, with_meaning
from hpsearch.training.user_code import frame_of, user_code

# Rows are gathered a block of batches at a time and the batches are views of it: for small data the calls dominate
# (1,400 x 64 floats in batches of 32: 95 us against 184 us an epoch), for large data fresh memory does (MNIST: 33 ms
# in batches of 128, 138 ms as one block). 2 cores, torch 2.13.
BLOCK_BYTES_CPU = 1 << 20
BLOCK_BYTES_GPU = 64 << 20  # open: not yet measured on a GPU, where starting a kernel costs more than memory
EVAL_BATCH_BYTES = 4 << 20  # of inputs; activations are many times that
EVAL_BATCH_ROWS = (64, 4096)


def epoch_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed in [0, 2**63) for one purpose of one epoch; unlike arguments give unrelated seeds."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def batch_bounds(n_rows: int, batch_size: int) -> list[tuple[int, int]]:
    """First row and end of each training batch: all rows, the last batch smaller, but never of one row alone.

    A single last row joins the batch before it, since batch norm cannot train on one row, and dropping it would
    train on fewer rows than there are. Asked for batches of one, one gets them.

    >>> batch_bounds(7, 3)
    [(0, 3), (3, 7)]
    >>> batch_bounds(8, 3)
    [(0, 3), (3, 6), (6, 8)]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    starts = list(range(0, n_rows, batch_size))
    if n_rows % batch_size == 1 and len(starts) > 1 and batch_size > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n_rows], strict=True))


def ensemble_rows(targets: Tensor | None, n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which rows of val rank trials, and which choose the ensemble: two increasing index tensors, halves of val.

    With class numbers for targets, a class with two rows or more is in both halves, as evenly as it can be; a class
    with one row falls to either. Without (None), or with several targets per row, all falls by chance.

    Args:
        targets: int64 class numbers of shape (n_rows,), or anything else to cut by chance.
        n_rows: of val; the ensemble split gets n_rows // 2.
        seed: the study's.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, 0, "ensemble-split"))
    order = torch.randperm(n_rows, generator=generator)
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        # Rows in random order, gathered by class, classes in random order: then every second row to the ensemble.
        _, classes = torch.unique(targets, return_inverse=True)
        place = torch.randperm(int(classes.max()) + 1, generator=generator)
        order = order[torch.argsort(place[classes[order]], stable=True)]
    return order[0::2].sort().values, order[1::2].sort().values


def check_output(
    output: object, target: Tensor, outputs: Outputs, *, n_classes: int | None = None, own_loss: bool = False
) -> None:
    """Refuses a model's output that does not fit the target. For the first batch of a model.

    Args:
        output: what the model gave for a batch.
        target: the batch's targets.
        outputs: what the output means (DataInfo.outputs).
        n_classes: DataInfo.n_classes.
        own_loss: the task overrides `loss`, which may make something of other shapes; only what would broadcast
            in silence is refused then.

    Raises:
        UserCodeError: not a float tensor, another number of rows, too few classes, or a shape that would broadcast.
    """
    if not isinstance(output, Tensor):
        raise UserCodeError(
            f"the model returned a {type(output).__name__}, not a tensor", hint="forward() returns one tensor"
        )
    found, wanted = tuple(output.shape), tuple(target.shape)
    if not output.is_floating_point():
        raise UserCodeError(
            f"the model returned {str(output.dtype).removeprefix('torch.')}, not floats",
            hint="return logits or values; argmax belongs into metrics()",
        )
    if output.ndim == 0 or len(output) != len(target):
        raise UserCodeError(
            f"the model returned shape {found} for a batch of {len(target)}", hint="one row of output per example"
        )
    if own_loss:
        if found != wanted and _squeezed(found) == _squeezed(wanted):
            raise _broadcast(found, wanted)
    elif outputs == "logits":
        _check_logits(found, wanted, n_classes)
    elif found != wanted:
        if _squeezed(found) == _squeezed(wanted):
            raise _broadcast(found, wanted)
        raise UserCodeError(
            f"the model's output is {found} for targets of {wanted}", hint="one output per target, in the same shape"
        )


def _check_logits(found: tuple[int, ...], wanted: tuple[int, ...], n_classes: int | None) -> None:
    classes = "C" if n_classes is None else str(n_classes)
    needed = f"({', '.join([str(wanted[0]), classes, *map(str, wanted[1:])])})"
    if len(wanted) > 1 and len(found) == 2:
        hint = "class numbers are one per row: y.squeeze(-1)" if wanted[1] == 1 else ""
        hint = hint or 'one-hot targets: y.argmax(1); a yes or no for each column: outputs = "binary_logits"'
        raise UserCodeError(f"the model's output is {found} for class targets of {wanted}", hint=hint)
    if len(found) < 2 or found[2:] != wanted[1:]:
        hint = 'one logit for yes or no needs outputs = "binary_logits"; numbers to predict need float targets'
        if len(found) >= 2:
            hint = "classes are dimension 1 of the output"
        raise UserCodeError(f"the model's output is {found} where {needed} is needed", hint=hint)
    if n_classes is not None and found[1] < n_classes:
        hint = f"the last layer needs {n_classes} outputs, for targets 0 to {n_classes - 1}"
        if found[1] == 1:
            hint = 'one logit for yes or no needs outputs = "binary_logits"; numbers to predict need float targets'
        elif found[1] == n_classes - 1:
            hint += "; are the classes numbered from 1? Then subtract 1"
        raise UserCodeError(f"the model's output is {found} where {needed} is needed", hint=hint)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], *(size for size in shape[1:] if size != 1))


def _broadcast(found: tuple[int, ...], wanted: tuple[int, ...]) -> UserCodeError:
    hint = (
        "squeeze the output: output.squeeze(-1), or give targets of its shape: y.reshape(-1, 1)"
        if len(found) > len(wanted)
        else "squeeze the target: y.squeeze(-1)"
    )
    return UserCodeError(
        f"the model's output is {found} and the targets are {wanted}, which would broadcast", hint=hint
    )


class StudyData:
    """The splits of a study as a worker holds them.

    Roles: *train* is trained on, *val* ranks trials, *ensemble* (half of what the task gave as val) chooses the
    ensemble, *test* is opened at the end. Batches are copies, so a model that works in place does no harm.
    """

    def __init__(self, read: ReadSplits, *, info: DataInfo, device: torch.device) -> None:
        """For `load`; `read` has the ensemble split already."""
        self._read = read
        self._device = device
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}
        self._targets: dict[str, Tensor] = {}
        self.info = info
        self.on_batch: Callable[[], None] | None = None  # called before each batch, of whichever split

    @classmethod
    def load(
        cls, task: Task, *, study_seed: int, cut_ensemble: bool, device: torch.device, share: Path | None = None
    ) -> StudyData:
        """Calls task.data(), checks what it gives, and cuts the ensemble split from val.

        Args:
            task: the user's.
            study_seed: decides the cut.
            cut_ensemble: False (a study without an ensemble): val stays whole, and "ensemble" is another name for it.
            device: where batches are wanted.
            share: a folder through which the workers of this machine share what data() gave; None: none do.

        Raises:
            UserCodeError: data() raised, or gave what cannot be trained on.
        """

        def given_splits() -> ReadSplits:
            with user_code("data()"):
                given = task.data()
            # A Dataset is the user's code, down to its len() and targets.
            with user_code("reading what data() gave"):
                return read_splits(task, given)

        try:
            read = given_splits() if share is None else shared_splits(share, task, given_splits)
            with user_code("reading what data() gave"):
                sources = {name: _identity(split) for name, split in read.by_name.items()}
                whole = fingerprint(sources)
                test = fingerprint({"test": sources["test"]}) if "test" in sources else ""
        except UserCodeError as error:
            error.frame = error.frame or frame_of(type(task).data)
            raise
        read = _with_ensemble_split(read, study_seed=study_seed, cut=cut_ensemble)
        x = read.by_name["train"].example[0]
        info = DataInfo(
            fingerprint=whole,
            test_fingerprint=test,
            n_rows={name: len(split) for name, split in read.by_name.items()},
            outputs=read.outputs,
            n_classes=read.n_classes,
            input_shape=tuple(x.shape),
            input_dtype=str(x.dtype).removeprefix("torch."),
            metrics=(),
        )
        return cls(read, info=info, device=device)

    @property
    def placed_bytes(self) -> int:
        """Bytes of the splits that were put on a GPU."""
        return sum(t.nbytes for pair in self._placed.values() for t in pair if t.is_cuda)

    @property
    def splits(self) -> Splits:
        """For a user's own `fit`: train and val (as cut) alone, as CPU tensors or Datasets, as they were given."""
        return Splits(train=self._read.by_name["train"].source(), val=self._read.by_name["val"].source())

    def held(self, split: SplitName) -> Split:
        """A split as it is held: its rows in memory, or the Dataset that it is read from. To be read, not changed."""
        return self._split(split)

    def recut(self, by_name: dict[str, Split]) -> StudyData:
        """The same study with other rows in its splits, and none beside these."""
        read = ReadSplits(by_name=by_name, outputs=self.info.outputs, n_classes=self.info.n_classes)
        info = replace(self.info, n_rows={name: len(split) for name, split in by_name.items()})
        return StudyData(read, info=info, device=self._device)

    def n_rows(self, split: SplitName) -> int:
        return len(self._split(split))

    def n_train_batches(self, batch_size: int) -> int:
        """Batches, and so optimizer steps, of a training epoch."""
        return len(batch_bounds(self.n_rows("train"), batch_size))

    def targets(self, split: SplitName) -> Tensor:
        """All targets of a split, in its order, on the CPU; int64 classes or floats."""
        held = self._split(split)
        if held.y is not None:
            return held.y
        if split not in self._targets:
            assert isinstance(held, Items)
            self._targets[split] = with_meaning(read_targets(split, held), self.info.outputs)
        return self._targets[split]

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training split once, in batches on the device; every row, the last batch as in `batch_bounds`.

        The order is a function of (seed, epoch) alone, whatever the device. So is augmentation, on one kind of device.
        A Dataset that draws from global random state is as random as its caller has seeded that.

        Args:
            batch_size: rows per batch.
            seed: the trial's.
            epoch: any number that tells this epoch from the trial's others.
            shuffle: False: in the split's own order.
            augment: the task's `augment`, or None.

        Raises:
            UserCodeError: augment or a Dataset raised, or augment lost rows.
        """
        order = self.train_order(seed=seed, epoch=epoch) if shuffle else None
        batches = self._gather("train", order, batch_bounds(self.n_rows("train"), batch_size))
        if augment is None:
            return batches
        return self._augmented(batches, augment, epoch_seed(seed, epoch, "augment"))

    def train_order(self, *, seed: int, epoch: int) -> Tensor:
        """The order, int64 on the CPU, in which a trial's epoch takes the training rows."""
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch, "order"))
        return torch.randperm(self.n_rows("train"), generator=generator)

    def rows(self, split: SplitName) -> tuple[Tensor, Tensor] | None:
        """All of a split, on the device, or on the host while it does not fit there; None for one read item by item.

        To be read, not to be changed: batches come from the same memory.
        """
        held = self._split(split)
        return self._place(split, held) if isinstance(held, Rows) else None

    def batches(self, split: SplitName, *, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in its own order, in batches on the device.

        Args:
            batch_size: None: about 4 MiB of inputs, within 64 and 4,096 rows; a function of the examples alone.
        """
        held = self._split(split)
        if batch_size is None:
            x = held.example[0]
            low, high = EVAL_BATCH_ROWS
            batch_size = min(high, max(low, EVAL_BATCH_BYTES // (x.numel() * x.element_size())))
        bounds = [(start, min(start + batch_size, len(held))) for start in range(0, len(held), batch_size)]
        return self._gather(split, None, bounds)

    def _split(self, name: SplitName) -> Split:
        if name not in self._read.by_name:
            raise ValueError(f"there is no {name} split (known: {', '.join(self._read.by_name)})")
        return self._read.by_name[name]

    def _gather(
        self, name: SplitName, order: Tensor | None, bounds: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        held = self._split(name)
        if isinstance(held, Items):
            batches = self._collate(name, held, order, bounds)
        else:
            batches = self._gather_rows(name, held, order, bounds)
        return batches if self.on_batch is None else _told(batches, self.on_batch)

    def _gather_rows(
        self, name: SplitName, rows: Rows, order: Tensor | None, bounds: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self._place(name, rows)
        if order is not None:
            order = order.to(x.device)
        block_bytes = BLOCK_BYTES_CPU if self._device.type == "cpu" else BLOCK_BYTES_GPU
        row_bytes = x[0].numel() * x.element_size()
        per_block = max(1, block_bytes // (row_bytes * (bounds[0][1] - bounds[0][0])))
        for first in range(0, len(bounds), per_block):
            block = bounds[first : first + per_block]
            start, end = block[0][0], block[-1][1]
            if order is None:
                x_block, y_block = x[start:end].clone(), y[start:end].clone()
            else:
                x_block, y_block = x.index_select(0, order[start:end]), y.index_select(0, order[start:end])
            sizes = [batch_end - batch_start for batch_start, batch_end in block]
            x_block, y_block = x_block.to(self._device), y_block.to(self._device)
            yield from zip(torch.split(x_block, sizes), torch.split(y_block, sizes), strict=True)

    def _collate(
        self, name: SplitName, items: Items, order: Tensor | None, bounds: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = list(range(len(items))) if order is None else order.tolist()
        # Without a generator of its own, a DataLoader would draw from the global one. From pinned memory a copy to the
        # GPU runs beside the steps.
        loader: DataLoader[Any] = DataLoader(
            items.dataset,
            batch_sampler=[numbers[start:end] for start, end in bounds],
            generator=torch.Generator(),
            pin_memory=self._device.type == "cuda",
        )
        source = iter(loader)
        while True:
            with user_code(f"items of {name}"):
                try:
                    batch = next(source)
                except StopIteration:
                    return
            x, y = collated(batch, name)
            x, y = x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)
            yield x, with_meaning(y, self.info.outputs)

    def _augmented(
        self,
        batches: Iterator[tuple[Tensor, Tensor]],
        augment: Callable[[Tensor, torch.Generator], object],
        seed: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(device=self._device).manual_seed(seed)
        for x, y in batches:
            with user_code("augment()"):
                changed = augment(x, generator)
            if not isinstance(changed, Tensor) or len(changed) != len(y):
                found = f"shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
                raise UserCodeError(
                    f"augment() returned {found} for inputs of shape {tuple(x.shape)}",
                    frame=frame_of(augment),
                    hint="it returns the changed inputs, one row per example",
                )
            yield changed, y

    def _place(self, name: SplitName, rows: Rows) -> tuple[Tensor, Tensor]:
        """The split's tensors on the device, put there when first asked for; on the host while they do not fit."""
        if name not in self._placed:
            device = self._device
            n_bytes = rows.x.nbytes + rows.y.nbytes
            if device.type == "cuda" and n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
                return rows.x, rows.y  # half of what is free is the model's
            self._placed[name] = rows.x.to(device), rows.y.to(device)
        return self._placed[name]


def _told(batches: Iterator[tuple[Tensor, Tensor]], tell: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        tell()
        yield batch


def _with_ensemble_split(read: ReadSplits, *, study_seed: int, cut: bool) -> ReadSplits:
    by_name = dict(read.by_name)
    val = by_name["val"]
    by_name["ensemble"] = val
    if cut:
        val_rows, rows = ensemble_rows(val.y, len(val), study_seed)
        by_name["val"], by_name["ensemble"] = val.take(val_rows), val.take(rows)
    return ReadSplits(by_name=by_name, outputs=read.outputs, n_classes=read.n_classes)


def _identity(split: Split) -> Any:
    return (split.x, split.y) if isinstance(split, Rows) else split.dataset
