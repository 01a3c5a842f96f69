"""The mirror: keeps a study's archive in step with its run directory, from a thread that nobody waits for.

It follows the journal as it lies on disk. A pass takes all that was committed, sends the blobs that the study needs at
that point, then the lines, as one object: so whoever restores the archive finds a study that stood like this at some
moment, with every blob that it names. What the study needs no more is deleted there afterwards. An outage is told once,
and made good when it is over; until then the study goes on.
"""

from __future__ import annotations

import threading
import time as time_module
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

from hpsearch.archive import Archive, Driver, blob_name, segment_name
from hpsearch.blobs import digest_of
from hpsearch.errors import HpsearchError, StorageError, internal_error
from hpsearch.events import Event, Finished, StorageBehind, StorageCaughtUp
from hpsearch.journal import entries_of
from hpsearch.notes import FILE_NAME as NOTES
from hpsearch.state import Entry, StudyState

EVERY_S = 1.0  # between two passes; what was committed since the last is what a lost disk takes with it
AGAIN_S = 5.0  # after a failure
CLOSING_AGAIN_S = 0.5  # the same at the end, when there is little time left
LATE_S = 60.0  # a pass that takes longer is told as falling behind
OWNER_EVERY_S = 10.0  # whether another driver has taken the study
SEGMENT_BYTES = 256 << 10  # the last object of the journal is written anew with each pass until it has this size
SENDERS = 8  # blobs on their way at once

_ELSEWHERE = (
    "another launch went on with it: go on there; or with --resume and a new --run-dir, which is filled from storage; "
    "or name another place in `storage` for what is here"
)


class Committed(Protocol):
    """A journal, as the mirror sees it."""

    @property
    def path(self) -> Path: ...
    @property
    def n_bytes(self) -> int:
        """How much of the file is on disk for good: whole lines."""


class Mirror:
    """One driver's writing to an archive."""

    def __init__(
        self,
        archive: Archive,
        journal: Committed,
        run_dir: Path,
        *,
        fence: int,
        entries: Sequence[Entry] = (),
        restarted: bool = False,
        every_s: float = EVERY_S,
        again_s: float = AGAIN_S,
        late_s: float = LATE_S,
        owner_every_s: float = OWNER_EVERY_S,
    ) -> None:
        """
        Args:
            journal: open, and not yet written to by this driver.
            fence: this driver's.
            entries: of the journal so far.
            restarted: the study's process, under workers that live: a storage that is out of reach is waited for, and
                blobs that no event names may be of results on their way.
        """
        self._archive = archive
        self._journal = journal
        self._run_dir = run_dir
        self._fence = fence
        self._restarted = restarted
        self._every_s, self._again_s, self._late_s, self._owner_every_s = every_s, again_s, late_s, owner_every_s
        self._state = StudyState()  # as of `_folded`
        self._unfolded: Sequence[Entry] = entries
        self._folded = self._began_with = journal.n_bytes
        self._driver: Driver | None = None
        self._sent = 0  # bytes of the journal that are in storage
        self._segment_start = 0
        self._needed: dict[str, tuple[str, str]] = {}  # name of each blob of the state's -> reference, digest
        self._there: set[str] = set()  # names of the blobs that are in storage
        self._spared: set[str] = set()  # of those that no event names, yet
        self._absent: set[str] = set()  # of those that nobody has: damaged, and soon to be made again
        self._notes = (0, 0)  # size and time of the notes that were sent
        self._owner_seen_at = float("-inf")
        self._pass_began = 0.0
        self._behind = ""  # why, as it was told; "" while all is well
        self._tell: Callable[[Event], None] = lambda event: None
        self._fail: Callable[[HpsearchError], None] = lambda error: None
        self._speaking = threading.Lock()
        self._closing = threading.Event()
        self._close_by = float("inf")  # clock
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(SENDERS, thread_name_prefix="mirror")

    def begin(self) -> None:
        """Take the study's place in storage.

        Raises:
            StorageError: storage fails; or it holds more of this study than this run directory, or other things.
        """
        try:
            self._begin()
        except _NotOurs as error:
            raise error.reason from None
        except StorageError:
            if not self._restarted:
                raise

    def start(self, tell: Callable[[Event], None], fail: Callable[[HpsearchError], None]) -> None:
        """Follow the journal from now on.

        Args:
            tell: takes what the study should know.
            fail: takes the reason why the study cannot go on: another driver has taken it.
        """
        self._tell, self._fail = tell, fail
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> StorageBehind | None:
        """Send what is left, for at most this long. What could not be sent, None when storage has all."""
        self._close_by = time_module.monotonic() + timeout_s
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._speaking:  # a thread that was given up, in the middle of something, has nobody to talk to
            self._tell, self._fail = _unheard, _unheard
        return None if self._sent >= self._journal.n_bytes else self._lag(self._behind or "there was no time for it")

    # The thread

    def _run(self) -> None:
        ok = True
        while True:
            if self._closing.wait(self._every_s if ok else self._again_s) and not ok:
                time_module.sleep(min(CLOSING_AGAIN_S, self._again_s))
            last = self._closing.is_set()
            try:
                self._pass()
                ok = True
            except StorageError as error:
                ok = False
                self._say_behind(error.message)
            except _NotOurs as error:
                self._behind = error.reason.message
                with self._speaking:
                    self._fail(error.reason)
                return
            except Exception as error:  # a defect of ours; the study need not end for it, but must not be silent
                if time_module.monotonic() > self._close_by:
                    return  # given up by `close`, in the middle of something
                self._say_behind(str(internal_error(error)))
                return
            if last and (ok or time_module.monotonic() > self._close_by):
                return

    def _pass(self) -> None:
        self._pass_began = time_module.monotonic()
        if self._driver is None:
            self._begin()
        if self._journal.n_bytes > self._sent or self._unfolded:
            self._check_owner()
            self._send_blobs()
            self._send_journal()
            self._delete_blobs()
        elif time_module.monotonic() - self._owner_seen_at > self._owner_every_s:
            self._check_owner()
        self._send_notes()
        if self._behind and self._sent >= self._folded:
            self._behind = ""
            with self._speaking:
                self._tell(StorageCaughtUp())

    def _say_behind(self, reason: str) -> None:
        if not self._behind:
            self._behind = reason
            with self._speaking:
                self._tell(self._lag(reason))

    def _lag(self, reason: str) -> StorageBehind:
        try:
            with self._journal.path.open("rb") as file:
                file.seek(self._sent)
                n_entries = file.read().count(b"\n")
        except OSError:  # the run directory's disk fails too, which the study tells; this must still be said
            n_entries = 0
        return StorageBehind(reason=reason, n_entries=n_entries)

    # What a pass is made of

    def _begin(self) -> None:
        segments = self._archive.segments()
        end = segments[-1].end if segments else 0
        if segments:
            self._compare(segments[-1].start, self._archive.journal(segments[-1:]), segments[-1].driver)
        earlier = self._archive.owner()
        driver = Driver(
            fence=self._fence,
            start=end,
            run_dir=str(self._run_dir),
            parent=earlier.token if earlier is not None else "",
        )
        there = set(self._archive.blobs())
        self._archive.claim(driver)
        self._sent = self._segment_start = end
        # Those that no event names are left over from a crash; or of a result that is on its way to a restarted study.
        self._there, self._spared = there, there if self._restarted else set()
        self._driver = driver

    def _compare(self, start: int, content: bytes, driver: Driver) -> None:
        """Whether the last of what storage has is in this run directory too."""
        end = start + len(content)
        if end > self._began_with:
            raise _NotOurs(
                StorageError(
                    f"{self._archive} holds more of this study than {self._run_dir} does: it was written last "
                    f"from {driver}",
                    hint=_ELSEWHERE,
                )
            )
        if self._local(start, end) != content:
            raise _NotOurs(
                StorageError(
                    f"{self._archive} holds another course of this study than {self._run_dir} does: it was written "
                    f"last from {driver}",
                    hint=_ELSEWHERE,
                )
            )

    def _check_owner(self) -> None:
        owner = self._archive.owner()
        self._owner_seen_at = time_module.monotonic()
        if owner is not None and self._driver is not None and owner.token != self._driver.token:
            raise _NotOurs(
                StorageError(
                    f"another launch has taken this study over, from {owner}",
                    hint=f"it goes on there; what was found here since lies in {self._run_dir} only",
                )
            )

    def _send_blobs(self) -> None:
        """Send what the study needs, until it needs nothing more at the point where the journal has got to."""
        missed: set[str] = set()
        while True:
            self._fold()
            todo = [name for name in self._needed if name not in self._there and name not in self._absent]
            if not todo:
                return
            for chunk in _chunks(todo, 4 * SENDERS):
                self._look_at_the_clock(len(todo))
                for name, there in zip(chunk, self._pool.map(self._send_blob, chunk), strict=True):
                    if there:
                        self._there.add(name)
                    elif name in missed:  # needed still, by events later than the one that would have dropped it
                        self._absent.add(name)
                    else:
                        missed.add(name)

    def _send_blob(self, name: str) -> bool:
        """Have a blob in storage; False when neither this run directory nor a worker's sending has it."""
        ref, digest = self._needed[name]
        try:
            content = (self._run_dir / ref).read_bytes()
        except OSError:
            return self._archive.storage.exists(name)
        if digest and digest_of(content) != digest:
            return False
        self._archive.storage.write(name, content)
        return True

    def _send_journal(self) -> None:
        assert self._driver is not None
        if self._sent >= self._folded:
            return
        content = self._local(self._segment_start, self._folded)
        self._archive.storage.write(segment_name(self._segment_start, self._driver), content)
        self._sent = self._folded
        if len(content) >= SEGMENT_BYTES:
            self._segment_start = self._folded

    def _delete_blobs(self) -> None:
        dead = [name for name in self._there if name not in self._needed and name not in self._spared]
        for name, _ in zip(dead, self._pool.map(self._archive.storage.delete, dead), strict=True):
            self._there.discard(name)

    def _send_notes(self) -> None:
        """What people wrote into the logbook; not part of the journal, and as dear."""
        try:
            found = (self._run_dir / NOTES).stat()
            if (found.st_size, found.st_mtime_ns) != self._notes:
                self._archive.storage.write(NOTES, (self._run_dir / NOTES).read_bytes())
                self._notes = found.st_size, found.st_mtime_ns
        except OSError:
            return

    def _fold(self) -> None:
        """Bring the state to where the journal is."""
        unfolded, self._unfolded = self._unfolded, ()
        end = self._journal.n_bytes
        new = entries_of(self._local(self._folded, end), self._journal.path)
        for entry in (*unfolded, *new):
            self._state.apply(entry.event, entry.time)
        for finished in [entry.event for entry in new if isinstance(entry.event, Finished)]:
            names = {ref: blob_name(ref, digest) for ref, digest in finished.digests.items()}
            self._absent.difference_update(names.values())
            self._there.update(names[ref] for ref in finished.stored)
        self._folded = end
        self._needed = {blob_name(ref, digest): (ref, digest) for ref, digest in self._state.digests.items()}
        self._spared -= self._needed.keys()

    def _local(self, start: int, end: int) -> bytes:
        with self._journal.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _look_at_the_clock(self, n_blobs: int) -> None:
        now = time_module.monotonic()
        if self._closing.is_set() and now > self._close_by:
            raise StorageError(f"{n_blobs} files were still to be sent")
        if now - self._pass_began > self._late_s:
            self._say_behind(f"{self._archive} takes files more slowly than they come: {n_blobs} are waiting")


class _NotOurs(Exception):
    """The study in storage is another driver's."""

    def __init__(self, reason: StorageError) -> None:
        self.reason = reason


def _chunks(names: Sequence[str], n: int) -> Iterator[list[str]]:
    rest = iter(names)
    while chunk := list(islice(rest, n)):
        yield chunk


def _unheard(word: object) -> None:
    """Nobody listens any more."""
