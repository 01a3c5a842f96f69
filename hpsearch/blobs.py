"""Bytes that are too large for the journal, kept in the run directory under their reference.

A reference is a relative path such as `checkpoints/trial-0017-e0027.safetensors`. A blob is on disk, whole and synced
with the folder that names it, before the event that tells of it; so a checkpoint without such an event was left over by
a crash. Its digest is in that event, which is how damage is told from what was written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hpsearch.errors import DamagedBlob, InStorage, JournalError

if TYPE_CHECKING:
    import numpy as np

WRITERS = 8  # files written and synced at once
CHECKPOINTS = "checkpoints"  # the folder that budget.disk is about
_PART = ".part"  # a file that is being written


def digest_of(content: bytes) -> str:
    """16 hexadecimal digits: enough to know a file that was damaged by accident, short enough for the journal."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_beside(beside: Path, path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: under another name in its folder, synced, then renamed."""
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # half a file would only take room
            beside.unlink(missing_ok=True)
        raise


def is_checkpoint(ref: str) -> bool:
    """Whether the blob counts towards budget.disk."""
    return ref.startswith(f"{CHECKPOINTS}/")


class Elsewhere(Protocol):
    """Where blobs may lie that are not in the run directory, or not whole there."""

    def read_blob(self, ref: str, digest: str) -> bytes | None:
        """The content, None when it is not there either."""


class BlobStore:
    """The blobs of one run directory. One thread keeps and drops; any may read."""

    def __init__(self, run_dir: Path, elsewhere: Elsewhere | None = None) -> None:
        self._root = run_dir
        self._elsewhere = elsewhere
        self._made: set[Path] = set()
        self._sizes: dict[str, int] = {}  # of all checkpoints
        for path in run_dir.glob(f"{CHECKPOINTS}/*"):
            with contextlib.suppress(FileNotFoundError):  # another process's, which is writing it
                self._sizes[f"{CHECKPOINTS}/{path.name}"] = path.stat().st_size
        self._n_bytes = sum(self._sizes.values())
        self._pool: ThreadPoolExecutor | None = None

    def path(self, ref: str) -> Path:
        """Where a blob lies.

        Raises:
            ValueError: the reference leads out of the run directory.
        """
        path = Path(ref)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"a blob's reference is a path within the run directory (got {ref!r})")
        return self._root / path

    def keep(self, blobs: Mapping[str, bytes]) -> None:
        """Write blobs, each whole or not at all, and wait until they are on disk under their names.

        Raises:
            JournalError: the disk is full, or failed.
        """
        folders = {self.path(ref).parent for ref in blobs}
        try:
            for folder in folders - self._made:
                if not folder.exists():
                    folder.mkdir(parents=True)
                    sync_folder(folder.parent)
                self._made.add(folder)
            # Several at once: the disk then commits them together (3.5 ms each one by one on a busy disk, 0.6 so).
            if len(blobs) > 1:
                writing = [self._threads().submit(self._write, ref, content) for ref, content in blobs.items()]
                wait(writing)  # also when one has failed: nobody may find a file that was written afterwards
                for written in writing:
                    written.result()
            else:
                for ref, content in blobs.items():
                    self._write(ref, content)
            for folder in folders:
                sync_folder(folder)
        except OSError as error:
            raise JournalError(
                f"{self._root} cannot be written: {error.strerror}", hint="make room, then hpsearch launch --resume"
            ) from None
        finally:
            self._count(blobs)

    def _write(self, ref: str, content: bytes) -> None:
        path = self.path(ref)
        beside = path.with_name(path.name + _PART)
        write_beside(beside, path, content)

    def _count(self, refs: Collection[str]) -> None:
        for ref in filter(is_checkpoint, refs):
            try:
                size = self.path(ref).stat().st_size
            except OSError:
                continue
            self._n_bytes += size - self._sizes.get(ref, 0)
            self._sizes[ref] = size

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="blobs")
        return self._pool

    def close(self) -> None:
        """Let the writing threads go."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def read(self, ref: str, digest: str = "") -> bytes:
        """A blob's content, from the run directory or else from storage.

        Args:
            digest: of what was written, "" where it is not known.

        Raises:
            DamagedBlob: it is not there, or not what was written.
            JournalError: it may not be read.
            StorageError: it is not here, and storage cannot be asked.
        """
        try:
            return self._read(ref, digest)
        except DamagedBlob:
            content = None if self._elsewhere is None else self._elsewhere.read_blob(ref, digest)
            if content is None or (digest and digest_of(content) != digest):
                raise
            return content

    def fetch(self, ref: str, digest: str = "") -> bytes:
        """As `read`, for a worker, who asks storage himself.

        Raises:
            InStorage: it is not here, or not as it was written.
        """
        try:
            return self._read(ref, digest)
        except DamagedBlob:
            if self._elsewhere is None:
                raise
            raise InStorage(ref, digest) from None

    def _read(self, ref: str, digest: str) -> bytes:
        try:
            content = self.path(ref).read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EIO):
                raise DamagedBlob(
                    ref, "the file is gone" if error.errno == errno.ENOENT else "it is unreadable"
                ) from None
            raise JournalError(
                f"{self.path(ref)} cannot be read: {error.strerror}", hint="give the study back the right to read it"
            ) from None
        if digest and digest_of(content) != digest:
            raise DamagedBlob(ref, f"its {len(content):,} bytes are not those that were written")
        return content

    def drop(self, ref: str) -> None:
        """Delete a blob that nothing will ask for again."""
        self.path(ref).unlink(missing_ok=True)
        self._n_bytes -= self._sizes.pop(ref, 0)

    def tidy(self, named: Collection[str]) -> list[str]:
        """Delete what a crash left behind: files half written, and checkpoints that no event names; says which.

        To be asked by the run directory's one writer, while it writes nothing.
        """
        halves = [str(path.relative_to(self._root)) for path in self._root.glob(f"*/*{_PART}")]
        strays = [ref for ref in self._sizes if ref.endswith(".safetensors") and ref not in named]
        for ref in [*halves, *strays]:
            self.drop(ref)
        return [*halves, *strays]

    def size(self, ref: str) -> int:
        """Bytes of a checkpoint, 0 when it is not there."""
        return self._sizes.get(ref, 0)

    def n_bytes(self) -> int:
        """Bytes of all files in checkpoints/, whoever wrote them."""
        return self._n_bytes

    def arrays(self, ref: str, digest: str = "") -> dict[str, np.ndarray]:
        """The named arrays of a safetensors blob.

        Raises:
            DamagedBlob: as `read`, and where it holds no arrays.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.read(ref, digest))
        except SafetensorError:
            raise DamagedBlob(ref, "it holds no arrays") from None


def sync_folder(folder: Path) -> None:
    """What was made or renamed in a folder is found there after a crash too. Costs one sync."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
