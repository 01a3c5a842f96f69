"""Bytes that are too large for the journal, kept in the run directory under their reference.

A reference is a relative path such as `checkpoints/trial-0017-e0027.safetensors`. A blob is on disk, whole and synced,
before the event that names it; a file without such an event is left over from a crash and is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.errors import JournalError

if TYPE_CHECKING:
    import numpy as np

WRITERS = 8  # files written and synced at once


class BlobStore:
    """The blobs of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir
        self._made: set[Path] = set()
        self._sizes = {
            str(path.relative_to(run_dir)): path.stat().st_size for path in run_dir.glob("checkpoints/*.safetensors")
        }
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
        """Write blobs, each whole or not at all, and wait until they are on disk.

        Raises:
            JournalError: the disk is full, or failed.
        """
        try:
            for folder in {self.path(ref).parent for ref in blobs} - self._made:
                folder.mkdir(parents=True, exist_ok=True)
                self._made.add(folder)
            # Several at once: the disk then commits them together (3.5 ms each one by one on a busy disk, 0.6 so).
            if len(blobs) > 1:
                list(self._threads().map(self._write, blobs, blobs.values()))
            else:
                for ref, content in blobs.items():
                    self._write(ref, content)
        except OSError as error:
            raise JournalError(
                f"{self._root} cannot be written: {error.strerror}", hint="make room, then hpsearch launch --resume"
            ) from None

    def _write(self, ref: str, content: bytes) -> None:
        path = self.path(ref)
        beside = path.with_name(path.name + ".part")
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        self._sizes[ref] = len(content)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="blobs")
        return self._pool

    def close(self) -> None:
        """Let the writing threads go."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def read(self, ref: str) -> bytes:
        """A blob's content.

        Raises:
            JournalError: it is not there.
        """
        try:
            return self.path(ref).read_bytes()
        except OSError as error:
            raise JournalError(
                f"{self.path(ref)} cannot be read: {error.strerror}", hint="restore the run directory from a copy"
            ) from None

    def drop(self, ref: str) -> None:
        """Delete a blob that nothing will ask for again."""
        self.path(ref).unlink(missing_ok=True)
        self._sizes.pop(ref, None)

    def n_bytes(self) -> int:
        """Bytes kept: checkpoints of all drivers, and whatever else this process has kept."""
        return sum(self._sizes.values())

    def arrays(self, ref: str) -> dict[str, np.ndarray]:
        """The named arrays of a safetensors blob."""
        from safetensors.numpy import load

        return load(self.read(ref))
