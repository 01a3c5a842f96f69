"""Lines that people write into a study's logbook, beside the journal.

Not in the journal, which has one writer and may be in use: nothing is computed from a note. One JSON object per line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time as time_module
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpsearch.errors import UsageError

FILE_NAME = "notes.jsonl"


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line of the logbook."""

    number: int  # 1 for the first
    time: float  # unix time, s
    text: str


def read_notes(run_dir: Path) -> list[Note]:
    """All notes of a run directory, oldest first; one that a crash cut short is left out."""
    try:
        lines = (run_dir / FILE_NAME).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    bodies = []
    for line in lines:
        with contextlib.suppress(ValueError):
            bodies.append(json.loads(line))
    return [Note(number=i, time=body["time"], text=body["text"]) for i, body in enumerate(bodies, start=1)]


def add_note(run_dir: Path, text: str, *, clock: Callable[[], float] = time_module.time) -> Note:
    """The note, as kept.

    Raises:
        UsageError: the text is empty, or the directory cannot be written.
    """
    if not text.strip():
        raise UsageError("a note needs some text")
    body = {"time": round(clock(), 3), "text": text.strip()}
    line = (json.dumps(body, ensure_ascii=False) + "\n").encode()
    try:
        # One write to a file opened for appending: two people's notes cannot mix.
        handle = os.open(run_dir / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line  # after one that a crash cut short
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be written: {error.strerror}") from None
    return read_notes(run_dir)[-1]
