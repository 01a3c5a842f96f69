"""What Task.data() gave, once per machine: the first worker writes it to a folder, the others map the files.

Nothing may come of it but time and memory. So data are shared only where nothing else can tell the difference: tensors
or arrays (not Datasets, whose items are code), large or slow enough to be worth it, and from a `data()` that left no
trace on its task, module or process, which a worker that does not call it would miss; numbers that it left on its task,
as `self.n_inputs`, go with the data. Whatever else goes wrong, a worker calls `data()` itself.

A file holds the bytes of one tensor and nothing else, so it begins at the start of a page, aligned for any kernel;
shapes and types stand beside in JSON. It is mapped privately: what a worker writes into its tensors is its own, page by
page, and never reaches the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpsearch.task import Task
from hpsearch.training.splits import ReadSplits, Rows, Split

WORTH_BYTES = 32 << 20  # below it, and
WORTH_S = 0.25  # quicker than this, every worker calls data() itself; the others wait for the first in any case
NOTE = "data.json"
LOCK = "loading.lock"


def shared_splits(folder: Path, task: Task, read: Callable[[], ReadSplits]) -> ReadSplits:
    """The task's splits: read here, or by another worker of this machine before.

    Args:
        folder: of this launch and machine; there already.
        task: whose data they are; looked at before and after they are read.
        read: calls `task.data()` and checks what it gives; what it raises is passed on.
    """
    with _locked(folder / LOCK) as locked:
        if not locked:
            return read()
        note = _read_note(folder)
        if note is None:
            return _read_and_share(folder, task, read)
    return (_mapped(folder, note, task) if note["why_not"] == "" else None) or read()


def why_not_shared(splits: ReadSplits, *, seconds: float, left_traces: bool, free_bytes: int) -> str:
    """Why these splits are better not shared; "" when they are.

    Args:
        seconds: that it took to read them.
        left_traces: whether data() did more than return them.
        free_bytes: on the disk of the folder.
    """
    rows = [split for split in splits.by_name.values() if isinstance(split, Rows)]
    n_bytes = sum(split.x.nbytes + split.y.nbytes for split in rows)
    if len(rows) < len(splits.by_name):
        return "a split is a Dataset"
    if not all(tensor.is_contiguous() for split in rows for tensor in (split.x, split.y)):
        return "a tensor is not contiguous"  # a copy would lie otherwise in memory, and may round otherwise
    if n_bytes < WORTH_BYTES and seconds < WORTH_S:
        return "small, and quickly read"
    if left_traces:
        return "data() changes its task, its module or its process"
    if free_bytes < 2 * n_bytes:
        return "the disk is nearly full"
    return ""


def traces(task: Task) -> tuple[object, ...]:
    """What code besides data() can see of it, to be compared before and after: the attributes of the task that are not
    numbers, its classes and their modules, with the items of lists, dicts and sets among all these, and whether tensors
    were written to; torch's default dtype; the environment, but for what scikit-learn tells OpenMP when it is
    imported."""
    numbers = _numbers(task)
    places = [{name: value for name, value in _attributes(task).items() if name not in numbers}]
    for cls in type(task).__mro__:
        if cls in (Task, object):
            break
        module = sys.modules.get(cls.__module__)
        places += [dict(vars(cls)), {} if module is None else vars(module)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    seen: list[object] = [torch.get_default_dtype(), environment]
    for place in places:
        for name, value in list(place.items()):
            seen.append((name, *_glance(value)))
    return tuple(seen)


def _attributes(task: Task) -> dict[str, Any]:
    return vars(task) if hasattr(task, "__dict__") else {}


def _numbers(task: Task) -> dict[str, float]:
    """The task's attributes that are numbers."""
    return {name: value for name, value in _attributes(task).items() if type(value) in (bool, int, float)}


def _glance(value: object) -> tuple[object, ...]:
    if isinstance(value, dict):
        return (_Same(value), *map(_Same, value.keys()), *map(_Same, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return (_Same(value), *map(_Same, value))
    if isinstance(value, Tensor):
        return (_Same(value), value._version)
    if isinstance(value, np.ndarray):
        return (_Same(value), value.shape, str(value.dtype), hash(value.tobytes()) if value.nbytes < 1 << 20 else 0)
    return (_Same(value),)


class _Same:
    """An object that equals itself alone; held, so that no other takes its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _read_and_share(folder: Path, task: Task, read: Callable[[], ReadSplits]) -> ReadSplits:
    before, numbers, started = traces(task), _numbers(task), time.perf_counter()
    splits = read()
    seconds = time.perf_counter() - started
    left = {name: value for name, value in _numbers(task).items() if repr(numbers.get(name)) != repr(value)}
    try:
        why_not = why_not_shared(
            splits,
            seconds=seconds,
            left_traces=traces(task) != before or not numbers.keys() <= _numbers(task).keys(),
            free_bytes=shutil.disk_usage(folder).free,
        )
        note = {"why_not": why_not} if why_not else _write(folder, splits) | {"numbers": left}
        _write_note(folder, note)
    except OSError:  # the next worker is the first
        return splits
    return splits if why_not else _mapped(folder, note, task) or splits  # mapped here too: one copy for all


def _write(folder: Path, splits: ReadSplits) -> dict[str, Any]:
    described = {}
    for name, split in splits.by_name.items():
        assert isinstance(split, Rows)
        tensors = {}
        for part, tensor in (("x", split.x), ("y", split.y)):
            file = folder / f"{name}-{part}.bin"
            file.unlink(missing_ok=True)
            with file.open("xb") as out:
                out.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
            file.chmod(0o444)
            tensors[part] = {
                "file": file.name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
        described[name] = {**tensors, "from_dataset": split.from_dataset}
    return {"why_not": "", "splits": described, "outputs": splits.outputs, "n_classes": splits.n_classes}


def _mapped(folder: Path, note: dict[str, Any], task: Task) -> ReadSplits | None:
    """The splits that a note describes, with the numbers on the task; None when the files are not what it says."""
    try:
        by_name: dict[str, Split] = {
            name: Rows(
                x=_map_tensor(folder, split["x"]),
                y=_map_tensor(folder, split["y"]),
                from_dataset=bool(split["from_dataset"]),
            )
            for name, split in note["splits"].items()
        }
        splits = ReadSplits(by_name=by_name, outputs=note["outputs"], n_classes=note["n_classes"])
        _attributes(task).update(note["numbers"])
        return splits
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None


def _map_tensor(folder: Path, described: dict[str, Any]) -> Tensor:
    path = folder / described["file"]
    dtype = getattr(torch, described["dtype"])
    shape = tuple(described["shape"])
    size = int(np.prod(shape, dtype=np.int64))
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path} is {path.stat().st_size} bytes long")
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).reshape(shape)


def _read_note(folder: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("why_not"), str) else None


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    beside = folder / f"{NOTE}.new"
    beside.write_text(json.dumps(note), encoding="utf-8")
    os.replace(beside, folder / NOTE)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process alone has the lock, which goes with it; waits as long as another reads its data."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield False
        return
    try:
        locked = False
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(handle)
