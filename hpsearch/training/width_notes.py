"""How many lanes a group pays with, told to the other workers of the machine: they need not measure it again.

A note is a small file in a folder of this launch and machine. Nothing depends on it but time: whoever reads a width
still compares the fused step with the plain one before it trains by it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_MOST = 4096  # lanes: no note of ours says more


class WidthNotes:
    """The notes in a folder; none where there is no folder."""

    def __init__(self, folder: Path | None, setting: str = "") -> None:
        """
        Args:
            folder: there already.
            setting: what a width depends on besides the group: device and threads.
        """
        self._folder = folder
        self._setting = setting

    def read(self, group: str) -> int | None:
        """The number of lanes for a group, 1 for the plain loop; None when nobody knows yet."""
        if self._folder is None:
            return None
        try:
            width = int(self._path(self._folder, group).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return width if 1 <= width <= _MOST else None

    def write(self, group: str, width: int) -> None:
        """Tell the others."""
        if self._folder is None:
            return
        path = self._path(self._folder, group)
        beside = path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # a full disk: they measure it themselves
            beside.write_text(str(width), encoding="ascii")
            os.replace(beside, path)

    def _path(self, folder: Path, group: str) -> Path:
        return folder / f"lanes-{hashlib.sha256(f'{self._setting} {group}'.encode()).hexdigest()[:32]}.txt"
