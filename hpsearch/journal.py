"""The journal: one append-only file of events, the truth of a study.

One writer at a time (a lock beside the file), any number of readers. A line is a JSON object with its sequence
number, its fence, its time and a checksum of what stands before it. The fence is one higher for each writer, so that
a line from a writer that was taken for dead, and was not, is recognised and passed over.

What counts is on disk: `commit` returns after fsync. A last line that a crash cut short is ignored and overwritten;
damage anywhere else is an error that names the line, since guessing would change the study.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time as time_module
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO

from hpsearch.blobs import sync_folder
from hpsearch.errors import JournalError, UsageError
from hpsearch.events import Event, Opened, from_json, to_json
from hpsearch.state import Entry

FILE_NAME = "journal.jsonl"
LOCK_NAME = "lock"
_CRC = b',"crc":"'

Clock = Callable[[], float]


class Journal:
    """The open journal of a run directory, held by its one writer."""

    def __init__(self, file: FileIO, lock: IO[bytes], entries: list[Entry], clock: Clock, steady: Clock) -> None:
        self.entries = entries  # as read when it was opened
        self._file = file
        self._lock = lock
        self._seq = entries[-1].seq + 1 if entries else 0
        self._fence = max((entry.fence for entry in entries), default=0) + 1
        # Wall time when it was opened, then a steady clock: a clock that is set forward or back while a study runs must
        # not stretch its stages or use up its budget. Nor may this driver's time begin before the last one's ended.
        self._opened_at = max(clock(), entries[-1].time if entries else 0.0)
        self._steady = steady
        self._steady_at = steady()
        self._n_bytes = file.tell()
        self._buffer: list[bytes] = []
        self._buffer_lock = threading.Lock()
        self._file_lock = threading.Lock()  # held over a write, so that batches reach the file in order

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        clock: Clock = time_module.time,
        steady: Clock = time_module.monotonic,
        wait_s: float = 30.0,
    ) -> Journal:
        """The journal of `run_dir`, made when it is not there, locked for writing.

        Args:
            clock: unix time, asked once.
            steady: seconds that pass, whatever is done to the clock.
            wait_s: how long to wait for another writer to go; a killed driver's study can outlive it by seconds.

        Raises:
            UsageError: the directory cannot be written, or another writer holds it.
            JournalError: a line before the last is damaged.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = (run_dir / LOCK_NAME).open("ab")
        except OSError as error:
            raise UsageError(
                f"the run directory {run_dir} cannot be written: {error.strerror}", hint="choose another --run-dir"
            ) from None
        try:
            _acquire(lock, run_dir, wait_s)
            path = run_dir / FILE_NAME
            try:
                is_new = not path.exists()
                file = path.open("x+b" if is_new else "r+b", buffering=0)
                if is_new:
                    sync_folder(run_dir)
            except OSError as error:
                raise UsageError(
                    f"the journal {path} cannot be written: {error.strerror}", hint="choose another --run-dir"
                ) from None
            try:
                entries, good_bytes = _read(file.read(), path)
                file.truncate(good_bytes)
                file.seek(good_bytes)
            except BaseException:
                file.close()
                raise
        except BaseException:
            lock.close()
            raise
        return cls(file, lock, entries, clock, steady)

    @property
    def next_seq(self) -> int:
        """Number of the next entry; grows with each."""
        return self._seq

    @property
    def fence(self) -> int:
        """This writer's number; higher than that of all before it."""
        return self._fence

    @property
    def path(self) -> Path:
        return Path(self._file.name)

    @property
    def n_bytes(self) -> int:
        """How much of the file is on disk for good: whole lines."""
        return self._n_bytes

    def now(self) -> float:
        """Unix time as this journal counts it: it never goes back, and jumps with no clock."""
        return round(self._opened_at + self._steady() - self._steady_at, 4)

    def append(self, event: Event) -> Entry:
        """The event as an entry; on disk after the next `commit`."""
        with self._buffer_lock:
            entry = Entry(seq=self._seq, fence=self._fence, time=self.now(), event=event)
            # A Ctrl-C may come between any two lines: what has a number must be in the buffer.
            line = _line(entry)
            self._buffer.append(line)
            self._seq += 1
        return entry

    def commit(self) -> None:
        """Everything appended so far is on disk when this returns.

        Raises:
            JournalError: the disk is full, or failed. Nothing is lost yet: the next `commit` tries again.
        """
        with self._file_lock:
            with self._buffer_lock:
                lines = self._buffer[:]
            if not lines:
                return
            good_bytes = self._file.tell()
            try:
                left = memoryview(b"".join(lines))
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
                self._n_bytes = self._file.tell()
                with self._buffer_lock:
                    del self._buffer[: len(lines)]
            except BaseException as error:
                # A line half written must be the last; after more lines it would be damage.
                self._file.seek(good_bytes)
                self._file.truncate()
                if isinstance(error, OSError):
                    raise JournalError(
                        f"the journal {self._file.name} cannot be written: {error.strerror}",
                        hint="make room, then hpsearch launch --resume",
                    ) from None
                raise

    def close(self) -> None:
        """Commit, and let another writer in."""
        try:
            self.commit()
        finally:
            self._file.close()
            self._lock.close()


def read_journal(run_dir: Path) -> list[Entry]:
    """All entries of a run directory's journal; nothing is locked or changed.

    Raises:
        UsageError: there is no journal.
        JournalError: a line before the last is damaged.
    """
    path = run_dir / FILE_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"{run_dir} holds no study (no {FILE_NAME} in it)", hint="name the run directory of a launch: runs/<name>"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    return _read(raw, path)[0]


def uid_of(run_dir: Path) -> str:
    """The uid of a run directory's study, from its first entry; "" where there is none yet."""
    try:
        with (run_dir / FILE_NAME).open("rb") as file:
            line = file.readline()
    except OSError:
        return ""
    if not line.endswith(b"\n"):
        return ""
    event = _parse(line[:-1], run_dir / FILE_NAME, 1).event
    return event.uid if isinstance(event, Opened) else ""


def entries_of(raw: bytes, path: Path) -> list[Entry]:
    """The entries of some whole lines of a journal.

    Args:
        path: of the journal, for messages.

    Raises:
        JournalError: a line is damaged.
    """
    return _read(raw, path)[0]


class JournalTail:
    """Reads what was added to a journal since the last look; for a driver whose study lives in another process."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._offset = 0
        self._fence = 0

    def new_entries(self) -> Iterator[Entry]:
        """Entries since the last call; a line that is still being written waits for the next."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            raw = file.read()
        end = raw.rfind(b"\n") + 1
        for entry in self._parse(raw[:end]):
            if entry.fence >= self._fence:
                self._fence = entry.fence
                yield entry

    def _parse(self, lines: bytes) -> list[Entry]:
        from_the_beginning = self._offset == 0
        self._offset += len(lines)
        if from_the_beginning:
            return _PARSED.entries(lines, self._path)
        return [_parse(line, self._path, number) for number, line in enumerate(lines.splitlines(), start=1)]


def _acquire(lock: IO[bytes], run_dir: Path, wait_s: float) -> None:
    deadline = time_module.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time_module.monotonic() >= deadline:
                raise UsageError(
                    f"the run directory {run_dir} is in use by another launch",
                    hint="wait for it to end, or choose another --run-dir",
                ) from None
            time_module.sleep(0.1)


def _line(entry: Entry) -> bytes:
    body = {"seq": entry.seq, "fence": entry.fence, "time": entry.time, **to_json(entry.event)}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()[:-1]
    return text + _CRC + f"{zlib.crc32(text):08x}".encode() + b'"}\n'


def _parse(line: bytes, path: Path, number: int) -> Entry:
    text, _, crc = line.rpartition(_CRC)
    try:
        if crc != f'{zlib.crc32(text):08x}"}}'.encode():
            raise ValueError("its checksum does not match")
        body = json.loads(text + b"}")
        seq, fence, time = body.pop("seq"), body.pop("fence"), body.pop("time")
        return Entry(seq=seq, fence=fence, time=time, event=from_json(body))
    except (ValueError, KeyError) as error:
        raise JournalError(
            f"{path}:{number}: the line is damaged: {error}",
            hint="restore the file from a copy; the lines before it are whole",
        ) from None


class _Parsed:
    """The lines of the journal that this process read last, each parsed once.

    A launch reads its journal for its checks, for the study, for the tracker and for the display. 10,000 trials take
    half a second each time, and longer where threads do it side by side.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_bytes = 0
        self._digest = b""  # of these bytes; a line that is altered is parsed again, and found out
        self._entries: list[Entry] = []

    def entries(self, raw: bytes, path: Path) -> list[Entry]:
        """Every line as an entry.

        Args:
            raw: whole lines from a journal's beginning.

        Raises:
            JournalError: a line is damaged.
        """
        with self._lock:
            is_known = len(raw) >= self._n_bytes and _digest(raw[: self._n_bytes]) == self._digest
            known, start = (self._entries, self._n_bytes) if is_known else ([], 0)
            new = raw[start:].split(b"\n")[:-1]
            entries = [*known, *(_parse(line, path, number) for number, line in enumerate(new, start=len(known) + 1))]
            self._entries, self._n_bytes, self._digest = entries, len(raw), _digest(raw)
            return entries


_PARSED = _Parsed()


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


def _read(raw: bytes, path: Path) -> tuple[list[Entry], int]:
    """Entries in force, and how many bytes of the file are whole lines."""
    end = raw.rfind(b"\n") + 1
    entries: list[Entry] = []
    fence = 0
    for number, entry in enumerate(_PARSED.entries(raw[:end], path), start=1):
        if entry.fence < fence:
            continue  # from a writer that had been replaced
        if entry.fence == fence and entry.seq != entries[-1].seq + 1:
            raise JournalError(
                f"{path}:{number}: entry {entries[-1].seq + 1} is missing (found {entry.seq})",
                hint="restore the file from a copy",
            )
        fence = entry.fence
        entries.append(entry)
    return entries, end


def is_locked(run_dir: Path) -> bool:
    """Whether a study of this run directory is open for writing somewhere on this machine."""
    try:
        with (run_dir / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
