"""Processes that a test starts as a shell does, each in a group of its own; none outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Start(Protocol):
    """Starts a command, its stdout and stderr kept for `communicate`."""

    def __call__(
        self, command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]: ...


@contextlib.contextmanager
def process_groups() -> Iterator[Start]:
    """What starts processes; what is left of their groups is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(
        command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
