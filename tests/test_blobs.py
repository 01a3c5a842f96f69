"""Blobs: whole or not at all, and never outside their run directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hpsearch.blobs import BlobStore, digest_of
from hpsearch.errors import DamagedBlob, JournalError


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


def test_checkpoints_alone_are_counted(store: BlobStore, tmp_path: Path) -> None:
    store.keep({"checkpoints/a": b"12345", "checkpoints/b": b"12", "predictions/a": b"123"})
    assert store.n_bytes() == 7
    assert (store.size("checkpoints/a"), store.size("checkpoints/c")) == (5, 0)
    (tmp_path / "checkpoints/other").write_bytes(b"1")
    assert BlobStore(tmp_path).n_bytes() == 8


def test_nothing_to_keep_makes_nothing(store: BlobStore, tmp_path: Path) -> None:
    store.keep({})
    assert files(tmp_path) == []


def test_second_content_of_a_reference_replaces_the_first(store: BlobStore, tmp_path: Path) -> None:
    store.keep({"checkpoints/a": b"first"})
    store.keep({"checkpoints/a": b"2nd"})
    assert store.read("checkpoints/a") == b"2nd"
    assert store.n_bytes() == 3
    assert files(tmp_path) == ["checkpoints/a"]


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
    store.keep({"checkpoints/a": b"old"})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError) as raised:
            store.keep({f"checkpoints/{name}": b"new content" for name in "abc"[:n_blobs]})
    assert str(raised.value) == (
        f"error[journal]: {tmp_path} cannot be written: No space left on device\n"
        "  hint: make room, then hpsearch launch --resume"
    )
    store.close()
    assert files(tmp_path) == ["checkpoints/a"]  # nothing half written stays, which would only take room
    assert store.read("checkpoints/a") == b"old"
    assert store.n_bytes() == 3
    store.keep({"checkpoints/a": b"new content"})
    assert store.read("checkpoints/a") == b"new content"


def test_content_is_synced_before_it_has_its_name_and_then_the_name(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path)}")
        fsync(handle)

    def name(old: Path, new: Path) -> None:
        order.append(f"name {new.relative_to(tmp_path)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", name)
    store.keep({"folder/a": b"x"})
    assert order == ["sync .", "sync folder/a.part", "name folder/a", "sync folder"]


def test_blob_that_is_gone_is_told(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(DamagedBlob) as raised:
        store.read("checkpoints/gone")
    assert raised.value.ref == "checkpoints/gone"
    assert str(raised.value) == (
        "error[journal]: checkpoints/gone is damaged: the file is gone\n  hint: hpsearch launch --resume makes it again"
    )


@pytest.mark.parametrize("damage", [b"0123456789"[:-1], b"0123456780", b"", b"01234567890"])
def test_blob_that_is_not_what_was_written_is_told(store: BlobStore, tmp_path: Path, damage: bytes) -> None:
    store.keep({"a": b"0123456789"})
    digest = digest_of(b"0123456789")
    assert store.read("a", digest) == b"0123456789"
    (tmp_path / "a").write_bytes(damage)
    with pytest.raises(DamagedBlob, match=f"a is damaged: its {len(damage)} bytes are not those that were written"):
        store.read("a", digest)
    assert store.read("a") == damage  # nobody knows better


def test_blob_that_may_not_be_read_is_no_damage(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(JournalError, match="a cannot be read: Permission denied") as raised:
        store.read("a")
    assert not isinstance(raised.value, DamagedBlob)


def test_disk_that_cannot_read_a_blob_back_has_damaged_it(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(DamagedBlob, match="a is damaged: it is unreadable"):
        store.read("a")


def test_what_a_crash_left_behind_is_deleted_and_nothing_else(store: BlobStore, tmp_path: Path) -> None:
    names = ["checkpoints/a.safetensors", "checkpoints/b.safetensors", "checkpoints/mine.txt", "predictions/p"]
    halves = ["checkpoints/c.safetensors.part", "predictions/p.part"]
    for name in [*names, *halves]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    again = BlobStore(tmp_path)
    assert sorted(again.tidy({"checkpoints/a.safetensors"})) == sorted(["checkpoints/b.safetensors", *halves])
    assert files(tmp_path) == ["checkpoints/a.safetensors", "checkpoints/mine.txt", "predictions/p"]
    assert again.n_bytes() == 6


def test_dropped_blob_takes_no_room_and_can_be_dropped_twice(store: BlobStore, tmp_path: Path) -> None:
    store.keep({"checkpoints/a": b"xyz", "checkpoints/b": b"x"})
    store.drop("checkpoints/a")
    store.drop("checkpoints/a")
    assert store.n_bytes() == 1
    assert files(tmp_path) == ["checkpoints/b"]


def test_arrays_come_back_by_name(store: BlobStore) -> None:
    store.keep({"p": save({"loss": np.arange(3.0), "hit": np.array([True, False])})})
    arrays = store.arrays("p")
    assert sorted(arrays) == ["hit", "loss"]
    assert arrays["loss"].tolist() == [0.0, 1.0, 2.0]
    assert arrays["hit"].tolist() == [True, False]


def test_arrays_that_are_none_are_told(store: BlobStore) -> None:
    store.keep({"p": b"no arrays"})
    with pytest.raises(DamagedBlob, match="p is damaged: it holds no arrays"):
        store.arrays("p")


def test_store_can_be_used_again_after_it_was_closed(store: BlobStore) -> None:
    store.keep({"a": b"1", "b": b"2"})
    store.close()
    store.close()
    store.keep({"c": b"3", "d": b"4"})
    assert store.read("d") == b"4"
