"""What names a set of data: equal for equal data, on any machine, and different where rows, order or split differ.

Every worker of a study reports it. An unseeded random split would put test rows of one worker into train of another;
the fingerprint is how that is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hpsearch.training.seeding import seeded

FULL_BYTES = 256 << 20  # up to here every byte is hashed (half a second); above it a sample, and exact sums of all
SAMPLE_BYTES = 64 << 20
N_SAMPLE_ITEMS = 8

Source = tuple[Tensor, Tensor] | Dataset[Any]


def fingerprint(splits: Mapping[str, Source]) -> str:
    """32 hex digits that stand for these splits.

    Tensors count by shape, dtype and bytes; above FULL_BYTES by evenly spaced rows and by sums over all bytes, which
    would miss a permutation of the rows between those.
    A Dataset counts by its length, the name of its class, the indices of a Subset, `.targets` where it has them, and
    eight of its items, unless reading an item twice gives two things (random augmentation).
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, source in sorted(splits.items()):
        digest.update(f"split {name} ".encode())
        if isinstance(source, tuple):
            for tensor in source:
                _add_tensor(digest, tensor)
        else:
            _add_dataset(digest, source)
    return digest.hexdigest()


def sample_rows(n_rows: int, n_sample: int = N_SAMPLE_ITEMS) -> list[int]:
    """At most `n_sample` row numbers, evenly spaced, first and last among them.

    >>> sample_rows(100, 4)
    [0, 33, 66, 99]
    >>> sample_rows(2, 4)
    [0, 1]
    """
    if n_rows <= n_sample:
        return list(range(n_rows))
    return [row * (n_rows - 1) // (n_sample - 1) for row in range(n_sample)]


@contextmanager
def seeded_reading(seed: int) -> Iterator[None]:
    """While items of a user's Dataset are read: global random state is seeded, and as before afterwards."""
    on_gpu = torch.cuda.is_initialized()
    with seeded(seed, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")):
        yield


def _add_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    digest.update(f"tensor {tuple(tensor.shape)} {tensor.dtype} ".encode())
    n_bytes = tensor.numel() * tensor.element_size()
    if n_bytes <= FULL_BYTES:
        digest.update(_bytes_of(tensor).data)
        return
    step = -(-n_bytes // SAMPLE_BYTES)  # every step-th row
    digest.update(_bytes_of(tensor[::step]).data)
    # Sums of integers are exact, whatever the order and number of threads; float sums would differ between machines.
    rows = max(1, SAMPLE_BYTES * len(tensor) // n_bytes)
    for chunk in torch.split(tensor, rows):
        raw = _bytes_of(chunk)
        whole = len(raw) // 8 * 8
        digest.update(int(raw[:whole].view(np.int64).sum()).to_bytes(8, "little", signed=True))
        digest.update(raw[whole:].data)


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(torch.uint8).numpy()


def _add_dataset(digest: hashlib.blake2b, dataset: Dataset[Any]) -> None:
    # The class goes by its own name alone: the module of a task file is named after its path, which differs by node.
    n_items = len(dataset)  # type: ignore[arg-type]
    digest.update(f"dataset {type(dataset).__qualname__} {n_items} ".encode())
    inner: object = dataset
    while isinstance(inner, Subset):
        digest.update(f"subset {list(inner.indices)} ".encode())
        inner = inner.dataset
    targets = getattr(inner, "targets", None)
    if isinstance(targets, (Tensor, np.ndarray, list, tuple)):
        _add_value(digest, targets)
    rows = sample_rows(n_items)
    first, second = (_digest_items(dataset, rows, seed) for seed in (0, 1))
    if first == second:
        digest.update(first)


def _digest_items(dataset: Dataset[Any], rows: list[int], seed: int) -> bytes:
    """Seeded, so that two workers come to the same view of whether a dataset is random."""
    digest = hashlib.blake2b()
    with seeded_reading(seed):
        for row in rows:
            _add_value(digest, dataset[row])
    return digest.digest()


def _add_value(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        digest.update(f"array {value.shape} {value.dtype} ".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)} ".encode())
        for item in value:
            _add_value(digest, item)
    elif isinstance(value, np.generic):
        _add_value(digest, value.item())
    elif isinstance(value, (bool, int, float, str)):
        digest.update(f"{type(value).__name__} {value!r} ".encode())
