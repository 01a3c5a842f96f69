"""Blobs: whole or not at all, and never outside their run directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hpsearch.blobs import BlobStore
from hpsearch.errors import JournalError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path)
    yield store
    store.close()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_was_kept_is_read_back(store: BlobStore) -> None:
    store.keep({"checkpoints/a": b"one"})
    assert store.read("checkpoints/a") == b"one"


def test_many_blobs_are_kept_at_once(store: BlobStore, tmp_path: Path) -> None:
    blobs = {f"{folder}/{n}": bytes([n]) * n for folder in ("a", "b/c") for n in range(30)}
    store.keep(blobs)
    assert {ref: store.read(ref) for ref in blobs} == blobs
    assert files(tmp_path) == sorted(blobs)
    assert store.n_bytes() == sum(map(len, blobs.values()))


def test_nothing_to_keep_makes_nothing(store: BlobStore, tmp_path: Path) -> None:
    store.keep({})
    assert files(tmp_path) == []


def test_second_content_of_a_reference_replaces_the_first(store: BlobStore, tmp_path: Path) -> None:
    store.keep({"a": b"first"})
    store.keep({"a": b"2nd"})
    assert store.read("a") == b"2nd"
    assert store.n_bytes() == 3
    assert files(tmp_path) == ["a"]


@pytest.mark.parametrize("ref", ["../out", "checkpoints/../../out", "/etc/passwd", ".."])
def test_reference_that_leads_out_is_refused(store: BlobStore, tmp_path: Path, ref: str) -> None:
    told = f"a blob's reference is a path within the run directory \\(got '{ref}'\\)"
    for use in (store.read, store.drop, lambda ref: store.keep({ref: b"x"})):
        with pytest.raises(ValueError, match=told):
            use(ref)
    assert files(tmp_path) == []
    assert not (tmp_path.parent / "out").exists()


@pytest.mark.parametrize("n_blobs", [1, 3], ids=["alone", "in threads"])
def test_full_disk_is_told_and_leaves_the_old_content(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_blobs: int
) -> None:
    store.keep({"a": b"old"})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError) as raised:
            store.keep(dict.fromkeys("abc"[:n_blobs], b"new content"))
    assert str(raised.value) == (
        f"error[journal]: {tmp_path} cannot be written: No space left on device\n"
        "  hint: make room, then hpsearch launch --resume"
    )
    assert store.read("a") == b"old"
    assert store.n_bytes() == 3
    store.keep({"a": b"new content"})
    assert store.read("a") == b"new content"


def test_content_is_synced_before_it_has_its_name(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("name"), replace(old, new)))
    store.keep({"a": b"x"})
    assert order == ["sync", "name"]


def test_blob_that_is_gone_is_told(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(JournalError) as raised:
        store.read("checkpoints/gone")
    assert str(raised.value) == (
        f"error[journal]: {tmp_path / 'checkpoints/gone'} cannot be read: No such file or directory\n"
        "  hint: restore the run directory from a copy"
    )


def test_dropped_blob_takes_no_room_and_can_be_dropped_twice(store: BlobStore, tmp_path: Path) -> None:
    store.keep({"a": b"xyz", "b": b"x"})
    store.drop("a")
    store.drop("a")
    assert store.n_bytes() == 1
    assert files(tmp_path) == ["b"]


def test_arrays_come_back_by_name(store: BlobStore) -> None:
    store.keep({"p": save({"loss": np.arange(3.0), "hit": np.array([True, False])})})
    arrays = store.arrays("p")
    assert sorted(arrays) == ["hit", "loss"]
    assert arrays["loss"].tolist() == [0.0, 1.0, 2.0]
    assert arrays["hit"].tolist() == [True, False]


def test_store_can_be_used_again_after_it_was_closed(store: BlobStore) -> None:
    store.keep({"a": b"1", "b": b"2"})
    store.close()
    store.close()
    store.keep({"c": b"3", "d": b"4"})
    assert store.read("d") == b"4"
