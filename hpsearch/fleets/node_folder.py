"""A folder of one launch on one machine, for what its workers share; gone when none of them lives.

Whoever uses a folder holds a lock in it, which the kernel lets go when the process dies, however it dies. So a folder
whose lock is free is nobody's, and whoever comes next removes it: after the launch itself, or the next launch on the
machine.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

IN_USE = "in-use"

_held: list[int] = []  # file descriptors of this process's locks; never closed


def launch_folder(launch: str) -> Path | None:
    """The folder of a launch on this machine, in use by this process from now on; None where there can be none.

    Args:
        launch: a name that no other launch has.
    """
    root = _root()
    if root is None:
        return None
    sweep(keep=launch)
    folder = root / launch
    try:
        while True:
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(handle, fcntl.LOCK_SH)
                if os.stat(folder / IN_USE).st_ino == os.fstat(handle).st_ino:
                    _held.append(handle)
                    return folder
            except FileNotFoundError:  # swept in between
                continue
            os.close(handle)
    except OSError:
        return None


def sweep(*, keep: str = "", wait_s: float = 0.0) -> None:
    """Remove the folders that no process uses.

    Args:
        keep: the launch whose folder stays, used or not.
        wait_s: how long processes that are just ending may take to let go.
    """
    root = _root()
    deadline = time.monotonic() + wait_s
    while root is not None:
        left = [folder for folder in root.iterdir() if folder.name != keep and not _removed(folder)]
        if not left or time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _removed(folder: Path) -> bool:
    try:
        handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # gone already, or no folder of ours
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(handle)


def _root() -> Path | None:
    """Where the folders of all launches of this user are; None when it is somebody else's."""
    root = Path(tempfile.gettempdir()) / f"hpsearch-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return root if mine else None
