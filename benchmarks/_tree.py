"""Runs a command and tells what it and all processes that it started cost: wall, CPU, memory.

Ray's processes outlive those that started them, so this process adopts orphans of its own (PR_SET_CHILD_SUBREAPER,
Linux) and looks through /proc five times a second, which takes about one percent of a core, for every engine alike.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.2
LEFT_OVER_S = 30.0  # that processes may outlive their command
_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, kw_only=True)
class Process:
    """A line of /proc."""

    pid: int
    parent: int
    began: int  # ticks since boot; with the pid it names a process for good
    cpu_s: float  # user and system
    rss_mib: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command cost, with everything that it started."""

    stdout: str
    began: float  # unix time, s
    wall_s: float  # until the command itself ended
    cpu_s: float  # user and system, of the whole tree
    peak_mib: float  # largest sum of the tree's resident memory; pages that two processes share count twice


class CommandFailedError(RuntimeError):
    """The command's exit status was not 0."""


def read_stat(text: str) -> Process:
    """A process from its /proc/PID/stat.

    >>> line = "7 (a (b) c) S 1 7 7 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 1234 1000 256"
    >>> process = read_stat(line + " 0" * 20)
    >>> process.pid, process.parent, process.began
    (7, 1, 1234)
    """
    head, _, tail = text.rpartition(")")
    fields = tail.split()  # from the third field of proc(5) on
    return Process(
        pid=int(head.split("(", 1)[0]),
        parent=int(fields[1]),
        began=int(fields[19]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
        rss_mib=int(fields[21]) * _PAGE_MIB,
    )


def descendants(processes: Sequence[Process], root: int) -> list[Process]:
    """All processes under `root`, itself left out."""
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def run_measured(command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float = 7200.0) -> Cost:
    """Run a command to its end, and wait until nothing of it is left.

    Raises:
        CommandFailedError: it failed, or did not end in time; with the end of what it wrote to stderr.
    """
    _adopt_orphans()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch = _Watch()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began, start = time.time(), time.perf_counter()
        child = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=out, stderr=err)
        watch.start()
        try:
            status = child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        wall_s = time.perf_counter() - start
        _await_the_rest()
        watch.stop()
        out.seek(0)
        err.seek(0)
        if status != 0:
            raise CommandFailedError(f"{' '.join(command)} gave {status}:\n{err.read()[-4000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        reaped_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Cost(
            stdout=out.read(),
            began=began,
            wall_s=wall_s,
            # Each misses something: the kernel's account those whose parent ignores its children's end, the watch what
            # ran since it last looked.
            cpu_s=max(reaped_s, watch.cpu_s),
            peak_mib=watch.peak_mib,
        )


class _Watch:
    """Looks at this process's descendants until it is stopped."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._cpu_s: dict[tuple[int, int], float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _look_on(self) -> None:
        while True:
            found = descendants(_processes(), os.getpid())
            self.peak_mib = max(self.peak_mib, sum(process.rss_mib for process in found))
            self._cpu_s |= {(process.pid, process.began): process.cpu_s for process in found}
            if self._stopped.wait(EVERY_S):
                return


def _processes() -> list[Process]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.append(read_stat(Path("/proc", name, "stat").read_text()))
            except (OSError, IndexError):
                continue  # it went meanwhile
    return found


def _adopt_orphans() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this benchmark measures process trees, which needs Linux")


def _await_the_rest() -> None:
    """Reap what the command left behind; end it where it does not go by itself."""
    deadline = time.monotonic() + LEFT_OVER_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            if time.monotonic() > deadline:
                left = descendants(_processes(), os.getpid())
                print(f"ending {len(left)} processes that outlived their command by {LEFT_OVER_S:.0f} s", flush=True)
                for process in left:
                    os.kill(process.pid, signal.SIGKILL)
                deadline = time.monotonic() + LEFT_OVER_S
            time.sleep(0.02)
