"""A folder for what Ray Tune insists on writing, gone when its driver is, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "hpsearch-tune-"
LOCK_NAME = "lock"
YOUNG_S = 60.0  # a folder this young may not have its lock yet


class TuneScratch:
    """A folder in the system's temporary directory. The lock in it tells others that its driver lives.

    A process id in its name would not: in another container it names another process.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """
        Args:
            parent: None: the system's temporary directory.
        """
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = (self.path / LOCK_NAME).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(parent: Path) -> None:
    """Remove what drivers left that were killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another driver is sweeping
            if time.time() - folder.stat().st_mtime > YOUNG_S and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    try:
        with (folder / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # its driver died between two lines
        return True
    except BlockingIOError:
        return False
    return True
