"""The data as a model meets them: scale, constant and duplicate features, overlap, classes, drift between splits.

Nothing is changed. Only what cannot be meant fails; the rest may be the nature of the data, and warns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hpsearch.checks import NAMES, Check, Status
from hpsearch.job import SplitName
from hpsearch.training.data import StudyData

ROWS = 20_000  # of a split, at most, that are looked at
FEATURES = 4_096  # of an input, at most, that are looked at one by one
LARGE = 20.0  # magnitude of an input beyond which a default initialisation saturates
RARE = 0.01  # share of the rarest class below which classes are called imbalanced
DRIFT = 0.15  # difference of distribution functions that counts, given that chance would not give it
CHANCE = 1e-4  # of a drift somewhere in splits that have none

FloatArray = NDArray[np.float64]


def check_data(data: StudyData) -> list[Check]:
    """The data report."""
    splits = {name: torch.cat(list(_rows(data, name))) for name in _given(data)}
    train = splits["train"]
    found = [_overlap(splits)]
    if not train.is_floating_point() and train.dtype != torch.uint8:
        reason = f"inputs are {str(train.dtype).removeprefix('torch.')}"
        numeric = ("finite-inputs", "input-scale", "constant-features", "duplicate-features", "drift")
        found += [_check(code, "skipped", reason=reason) for code in numeric]
    else:
        table = {name: x.reshape(len(x), -1)[:, :FEATURES].double().numpy() for name, x in splits.items()}
        found += [_finite(splits), _scale(train), *_features(table["train"], train), _drift(table)]
    found += _classes(data)
    return found


def _given(data: StudyData) -> list[SplitName]:
    """The splits that the task gave; the ensemble's rows are val's."""
    names: tuple[SplitName, ...] = ("train", "val", "test")
    return [name for name in names if name in data.info.n_rows]


def _rows(data: StudyData, split: SplitName) -> Iterator[torch.Tensor]:
    seen = 0
    for inputs, _ in data.batches(split):
        yield inputs[: ROWS - seen].cpu()
        seen += len(inputs)
        if seen >= ROWS:
            return


def _check(code: str, status: Status, **more: str) -> Check:
    return Check(name=NAMES[code], code=code, status=status, **more)


def _finite(splits: Mapping[SplitName, torch.Tensor]) -> Check:
    for name, x in splits.items():
        bad = ~torch.isfinite(x.reshape(len(x), -1).double()).all(dim=1)
        if bool(bad.any()):
            return _check(
                "finite-inputs",
                "failed",
                found=f"{int(bad.sum())} of {len(x):,} rows of {name} have NaN or infinity "
                f"(first: row {int(bad.nonzero()[0])})",
                expected="none",
                cause="missing values, or a division by zero",
                look_at="Task.data(): fill or drop them",
            )
    return _check("finite-inputs", "passed")


def _scale(train: torch.Tensor) -> Check:
    x = train.double()
    x = x[torch.isfinite(x)]
    largest, mean, std = float(x.abs().max()), float(x.mean()), float(x.std())
    seen = f"mean {mean:.3g}, standard deviation {std:.3g}, largest {largest:.3g}"
    if largest <= LARGE:
        return _check("input-scale", "passed", found=seen)
    pixels = float(x.min()) >= 0 and 200 < largest <= 255
    return _check(
        "input-scale",
        "warned",
        found=seen,
        expected=f"magnitudes of about 1, none above {LARGE:g}",
        cause="pixels of 0 to 255 that nobody scaled" if pixels else "inputs that nobody normalised",
        look_at="scale them in data() or in the model's forward(), with train's figures for all splits",
    )


def _features(table: FloatArray, train: torch.Tensor) -> list[Check]:
    if table.shape[1] < 2 or len(table) < 2:
        reason = "an input is one number" if table.shape[1] < 2 else "train has one row"
        return [_check(code, "skipped", reason=reason) for code in ("constant-features", "duplicate-features")]
    constant = np.flatnonzero((table == table[0]).all(axis=0))
    image = train.ndim > 2  # the border of an image may well be constant
    found = []
    if len(constant) and not image:
        found.append(
            _check(
                "constant-features",
                "warned",
                found=f"{len(constant)} of {table.shape[1]} features have one value in all of train "
                f"(first: {constant[0]})",
                expected="none",
                cause="a column that carries nothing, or was filled with one value",
                look_at="leave them out, or find what overwrote them",
            )
        )
    else:
        found.append(_check("constant-features", "passed", found=f"{len(constant)} constant" if image else ""))
    _, first, counts = np.unique(table, axis=1, return_index=True, return_counts=True)
    twice = [int(first[i]) for i in np.flatnonzero(counts > 1) if first[i] not in set(constant.tolist())]
    if twice and not image:
        original = twice[0]
        copies = [k for k in range(table.shape[1]) if k != original and (table[:, k] == table[:, original]).all()]
        found.append(
            _check(
                "duplicate-features",
                "warned",
                found=f"feature {copies[0]} equals feature {original} in all of train ({len(twice)} such groups)",
                expected="none",
                cause="a column that was joined in twice, or the target's own copy",
                look_at="Task.data()",
            )
        )
    else:
        found.append(_check("duplicate-features", "passed"))
    return found


def _overlap(splits: Mapping[SplitName, torch.Tensor]) -> Check:
    """Rows that stand in train and in a split that has to be new to the model."""
    digests = {name: _digests(x) for name, x in splits.items()}
    train = set(digests["train"])
    shared = {name: sum(row in train for row in rows) for name, rows in digests.items() if name != "train"}
    worst = max(shared, key=lambda name: shared[name] / max(1, len(digests[name])))
    share = shared[worst] / max(1, len(digests[worst]))
    told = ", ".join(f"{n} of {len(digests[name])} rows of {name}" for name, n in shared.items() if n)
    few_values = len(train) < 0.5 * len(digests["train"])
    if share == 0:
        return _check("overlap", "passed")
    if few_values:
        return _check(
            "overlap",
            "skipped",
            reason=f"train has {len(train)} different rows among {len(digests['train'])}: "
            "equal rows need not be copies",
        )
    return _check(
        "overlap",
        "failed" if share > 0.05 else "warned",
        found=f"{told} stand in train",
        expected="none",
        cause="splits that were drawn from each other, or duplicates that were split apart",
        look_at="drop duplicates before splitting; split once, with a seed",
    )


def _digests(x: torch.Tensor) -> list[bytes]:
    rows = np.ascontiguousarray(x.reshape(len(x), -1).numpy())
    return [hashlib.blake2b(row.tobytes(), digest_size=12).digest() for row in rows]


def _drift(table: Mapping[SplitName, FloatArray]) -> Check:
    """Features whose distribution in another split is not that of train, by Kolmogorov and Smirnov's test of each."""
    from scipy.stats import ks_2samp

    train = table["train"]
    n_tests = (len(table) - 1) * train.shape[1]
    worst: tuple[float, SplitName, int] | None = None
    for name, rows in table.items():
        if name == "train" or len(rows) < 20 or len(train) < 20:
            continue
        # The means first, which costs nothing; the whole distribution for the features that moved most.
        moved = np.abs(rows.mean(axis=0) - train.mean(axis=0)) / (train.std(axis=0) + 1e-12)
        for feature in np.argsort(-moved)[:16]:
            found = ks_2samp(train[:, feature], rows[:, feature])
            significant = float(found.pvalue) * n_tests < CHANCE and float(found.statistic) > DRIFT
            if significant and (worst is None or float(found.statistic) > worst[0]):
                worst = (float(found.statistic), name, int(feature))
    if worst is None:
        return _check("drift", "passed")
    statistic, name, feature = worst
    return _check(
        "drift",
        "warned",
        found=f"feature {feature} of {name}: mean {table[name][:, feature].mean():.3g}, of train "
        f"{train[:, feature].mean():.3g} (distributions differ by {statistic:.2f})",
        expected=f"below {DRIFT:g}",
        cause="splits by time, by source or in order of the file; or a transform that one split did not get",
        look_at="shuffle before splitting, with a seed; transform all splits alike",
    )


def _classes(data: StudyData) -> list[Check]:
    if data.info.outputs != "logits":
        reason = "targets are no classes"
        return [*(_check(code, "skipped", reason=reason) for code in ("classes", "imbalance")), _target_range(data)]
    n_classes = data.info.n_classes or 0
    counts = {name: torch.bincount(data.targets(name).reshape(-1), minlength=n_classes) for name in _given(data)}
    missing = [(name, int(c)) for name, found in counts.items() for c in (found[:n_classes] == 0).nonzero().reshape(-1)]
    if missing:
        name, number = missing[0]
        classes = _check(
            "classes",
            "warned",
            found=f"class {number} is missing from {name}"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            expected="rows of each class in each split",
            cause="few rows of it, or a split in the order of the file",
            look_at="stratify the split, or shuffle before it",
        )
    else:
        classes = _check("classes", "passed")
    train = counts["train"].double()
    rarest, commonest = float(train[train > 0].min() / train.sum()), float(train.max() / train.sum())
    # Many classes are each rare without being rare beside the others.
    uneven = rarest < RARE and rarest * 20 < commonest
    imbalance = _check(
        "imbalance",
        "warned" if uneven else "passed",
        found=f"the rarest class has {rarest:.1%} of train, the commonest {commonest:.1%}",
        **(
            {
                "expected": f"{RARE:.0%} or more",
                "cause": "the nature of the data, or a filter that lost rows",
                "look_at": "rank by balanced_accuracy or f1 (metric), weight the loss, begin with the bias "
                f"log(p) of each class ({np.log(rarest):.1f} for the rarest)",
            }
            if uneven
            else {}
        ),
    )
    return [classes, imbalance, _target_range(data)]


def _target_range(data: StudyData) -> Check:
    """Classes and labels are refused where they cannot be trained on when data are read; numbers are looked at here."""
    if data.info.outputs != "values":
        return _check("target-range", "passed")
    y = data.targets("train").double()
    mean, std = float(y.mean()), float(y.std())
    seen = f"mean {mean:.3g}, standard deviation {std:.3g}"
    if abs(mean) <= 10 * max(std, 1e-12) and std < 100:
        return _check("target-range", "passed", found=seen)
    return _check(
        "target-range",
        "warned",
        found=seen,
        expected="about 0 and 1",
        cause="targets in their raw unit",
        look_at=f"standardise them, or begin with the bias {mean:.3g} in the last layer",
    )
