"""Folds: what a trial is trained on and ranked by, cut anew from train and val together.

The ensemble split and the test split are in no fold, so what is said on them afterwards is said of rows that no fold
has ranked on. Which row falls into which fold is a function of (study seed, folds, repeat) alone, on any machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from hpsearch.errors import UserCodeError
from hpsearch.fold_race import FEWEST_ROWS
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.splits import Items, Rows, Split, as_example


def fold_rows(targets: Tensor | None, n_rows: int, *, folds: int, repeat: int, seed: int) -> tuple[Tensor, ...]:
    """The rows of each fold, as increasing index tensors; each row is in one, and sizes differ by one at most.

    With class numbers for targets, the rows of a class are dealt out in turn: a class with `folds` rows or more is in
    every fold, as evenly as it can be. Without (None), or with several targets per row, all falls by chance.

    Args:
        targets: int64 class numbers of shape (n_rows,), or anything else to cut by chance.
        repeat: from 0; each cuts the rows anew.
        seed: the study's.

    >>> [rows.tolist() for rows in fold_rows(torch.tensor([0, 0, 1, 1]), 4, folds=2, repeat=0, seed=0)]
    [[0, 3], [1, 2]]
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, repeat, f"folds-{folds}"))
    order = torch.randperm(n_rows, generator=generator)
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        _, classes = torch.unique(targets, return_inverse=True)
        order = order[torch.argsort(classes[order], stable=True)]
    return tuple(order[fold::folds].sort().values for fold in range(folds))


class Folds:
    """The folds of a study's data. None is held: it would keep its room on the device, and is cut in a moment."""

    def __init__(self, data: StudyData, *, study_seed: int) -> None:
        self._data = data
        self._study_seed = study_seed
        self._pool: Split | None = None  # train and val, as cut

    def without(self, fold: int, *, folds: int, repeat: int) -> StudyData:
        """The study's data with all folds but one as train, and that one as val; there are no other splits.

        Raises:
            UserCodeError: there are too few rows for so many folds.
        """
        if self._pool is None:
            self._pool = _together(self._data.held("train"), self._data.held("val"))
        pool = self._pool
        if len(pool) < FEWEST_ROWS * folds:
            raise UserCodeError(
                f"train and val have {len(pool)} rows together, too few for {folds} folds of at least {FEWEST_ROWS}",
                hint="write fewer folds under `evaluate`",
            )
        rows = fold_rows(pool.y, len(pool), folds=folds, repeat=repeat, seed=self._study_seed)
        others = torch.cat([each for number, each in enumerate(rows) if number != fold]).sort().values
        cut = self._data.recut({"train": pool.take(others), "val": pool.take(rows[fold])})
        cut.on_batch = self._alive
        return cut

    def missing_class(self, held_out: StudyData, folds: int) -> str:
        """Which class has no row in a fold, in words, the rarest of several; "" where none is missing, or nothing is
        known of classes."""
        pool, n_classes = self._pool, self._data.info.n_classes
        if pool is None or n_classes is None or pool.y is None:
            return ""
        of_all = torch.bincount(pool.y.reshape(-1), minlength=n_classes).tolist()
        of_fold = torch.bincount(held_out.targets("val").reshape(-1), minlength=n_classes).tolist()
        missing = [number for number in range(n_classes) if of_all[number] and not of_fold[number]]
        if not missing:
            return ""
        rarest = min(missing, key=lambda number: (of_all[number], number))
        rows = f"{of_all[rarest]} row{'' if of_all[rarest] == 1 else 's'}"
        return f"class {rarest} is not in this fold: train and val have {rows} of it, for {folds} folds"

    def _alive(self) -> None:
        if self._data.on_batch is not None:
            self._data.on_batch()


def _together(train: Split, val: Split) -> Split:
    """The rows of train, then those of val."""
    if isinstance(train, Rows) and isinstance(val, Rows):
        return replace(train, x=torch.cat([train.x, val.x]), y=torch.cat([train.y, val.y]))
    y = None if train.y is None or val.y is None else torch.cat([train.y, val.y])
    return Items(dataset=_Both(train, val), example=train.example, y=y)


class _Both(Dataset[Any]):
    """The items of two splits, as tensors: a batch cannot be made of what different Datasets give."""

    def __init__(self, train: Split, val: Split) -> None:
        self._parts = [_as_dataset(train), _as_dataset(val)]
        self._n_train, self._n_rows = len(train), len(train) + len(val)

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row < self._n_train:
            return as_example(self._parts[0][row], f"train[{row}]")
        return as_example(self._parts[1][row - self._n_train], f"val[{row - self._n_train}]")


def _as_dataset(split: Split) -> Dataset[Any]:
    return TensorDataset(split.x, split.y) if isinstance(split, Rows) else split.dataset
