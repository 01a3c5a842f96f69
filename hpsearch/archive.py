"""The archive: one study as it lies in storage, found again by its name when its run directory is lost.

    <storage>/<study>-<uid>/owner.json                        the driver whose word counts
                            drivers/<fence>-<token>.json      one for each driver: where it went on from
                            journal/<start>-<fence>-<token>   bytes of the journal from `start` on, whole lines
                            blobs/<reference>~<digest>        a blob's content

A blob lies under its digest too, so that a checkpoint that was trained again is told from the one before it. Each
driver writes segments of its own and says which driver's it goes on from, and from which byte. So what is written by a
driver that was taken for dead, and was not, lies beside the study without being part of it.
"""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpsearch.errors import StorageError, UsageError
from hpsearch.state import StudyState
from hpsearch.storage import Storage

# The bytes of one result that travel with it; larger ones go by way of storage. On their way they are held by the
# worker, by Ray's object store (some GB on a small node, for all workers) and by the study's process until its disk has
# them, so a dozen workers that end together fill a few GB at this size.
INLINE_BYTES = 256 << 20
BLOBS = "blobs"
_UID = re.compile(r"[0-9a-f]{32}")
_OWNER = "owner.json"
_SEGMENT = re.compile(r"journal/(\d+)-(\d+)-([0-9a-f]+)")


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A driver that writes, or wrote, to an archive."""

    fence: int
    start: int  # its first byte of the journal; those before it are its parent's
    run_dir: str
    parent: str = ""  # token of the driver that it goes on from, "" for the first
    host: str = field(default_factory=socket.gethostname)
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    time: float = field(default_factory=time.time)  # unix time of its beginning, s

    def __str__(self) -> str:
        return f"{self.host}:{self.run_dir}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime(self.time))} UTC"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the journal, as one object."""

    start: int
    n_bytes: int
    driver: Driver

    @property
    def end(self) -> int:
        return self.start + self.n_bytes

    @property
    def name(self) -> str:
        return segment_name(self.start, self.driver)


def segment_name(start: int, driver: Driver) -> str:
    """Where a driver keeps the bytes of the journal from `start` on."""
    return f"journal/{start:012d}-{driver.fence:06d}-{driver.token}"


def blob_name(ref: str, digest: str) -> str:
    """Where a blob is kept.

    >>> blob_name("checkpoints/trial-0017-e0027.safetensors", "9c1185a5c5e9fc54")
    'blobs/checkpoints/trial-0017-e0027.safetensors~9c1185a5c5e9fc54'
    """
    return f"{BLOBS}/{ref}~{digest}"


class Archive:
    """A study's folder in storage. Raises StorageError where storage fails."""

    def __init__(self, uri: str, study: str, uid: str) -> None:
        self.study = study
        self.uid = uid
        self.storage = Storage(uri, f"{study}-{uid}")

    def __str__(self) -> str:
        return str(self.storage)

    def owner(self) -> Driver | None:
        """The driver that took the study last, None in an archive that nobody has begun."""
        return self._driver(_OWNER)

    def claim(self, driver: Driver) -> None:
        """From now on this driver's word counts."""
        content = json.dumps(asdict(driver)).encode()
        self.storage.write(f"drivers/{driver.fence:06d}-{driver.token}.json", content)
        self.storage.write(_OWNER, content)

    def segments(self) -> list[Segment]:
        """The study's journal, in order and without gaps: its owner's segments, and before them those it went on from.

        A driver that goes on from the middle of another's segment takes its beginning only.

        Raises:
            StorageError: one of them is not there.
        """
        driver = self.owner()
        if driver is None:
            return []
        found = self._found()
        chain: list[Segment] = []
        end: int | None = None  # where the later driver went on
        while driver is not None:
            own = [
                Segment(start=start, n_bytes=n_bytes if end is None else min(n_bytes, end - start), driver=driver)
                for start, n_bytes in sorted(found.get(driver.token, {}).items())
                if end is None or start < end
            ]
            at = driver.start
            for segment in own:
                if segment.start != at:
                    raise self._torn(at)
                at = segment.end
            if end is not None and at != end:
                raise self._torn(at)
            chain = own + chain
            end = driver.start
            driver = self._parent_of(driver)
        return chain

    def journal(self, segments: list[Segment]) -> bytes:
        """The bytes of these segments; of one that has grown meanwhile, those it had."""
        return b"".join(self.storage.read(segment.name)[: segment.n_bytes] for segment in segments)

    def read_blob(self, ref: str, digest: str) -> bytes | None:
        """A blob's content, None when it is not there."""
        try:
            return self.storage.read(blob_name(ref, digest))
        except StorageError as error:
            if error.gone:
                return None
            raise

    def blobs(self) -> dict[str, int]:
        """All blobs by the name of their object: bytes."""
        return self.storage.contents(BLOBS)

    def _parent_of(self, driver: Driver) -> Driver | None:
        if not driver.parent:
            return None
        for name in self.storage.contents("drivers"):
            if name.endswith(f"-{driver.parent}.json"):
                return self._driver(name)
        raise self._torn(driver.start)

    def _found(self) -> dict[str, dict[int, int]]:
        """Bytes of each segment by its start, by token of its driver."""
        found: dict[str, dict[int, int]] = {}
        for name, n_bytes in self.storage.contents("journal").items():
            if match := _SEGMENT.fullmatch(name):
                found.setdefault(match[3], {})[int(match[1])] = n_bytes
        return found

    def _driver(self, name: str) -> Driver | None:
        try:
            return Driver(**json.loads(self.storage.read(name)))
        except StorageError as error:
            if error.gone:
                return None
            raise
        except (ValueError, TypeError):
            raise StorageError(
                f"{self}/{name} is not what hpsearch writes there",
                hint="restore it, or name another place in `storage`",
            ) from None

    def _torn(self, at: int) -> StorageError:
        return StorageError(
            f"the journal in {self} is not whole: its bytes from {at:,} on are not there",
            hint="restore what was deleted there, or name another place in `storage`",
        )


def archive_of(state: StudyState) -> Archive | None:
    """Where a study is mirrored as it was opened last, None where it is not."""
    uri = state.opened.spec.get("storage") if state.opened is not None else None
    return Archive(uri, state.name, state.uid) if isinstance(uri, str) else None


def archives(uri: str, study: str) -> list[tuple[Archive, Driver]]:
    """All studies of a name, each with the driver that took it last; the one taken last comes last.

    Raises:
        StorageError: storage fails.
    """
    found = []
    for folder in Storage(uri).folders():
        uid = folder.removeprefix(f"{study}-")
        if folder != uid and _UID.fullmatch(uid):
            archive = Archive(uri, study, uid)
            owner = archive.owner()
            if owner is not None:
                found.append((archive, owner))
    return sorted(found, key=lambda pair: pair[1].time)


def archive_for(run_dir: Path, found: Sequence[tuple[Archive, Driver]]) -> Archive | None:
    """Of some studies of one name, the one that a lost run directory held: the last that was there, or the only one.

    Raises:
        UsageError: there are several, and none of them was there.
    """
    here = [archive for archive, owner in found if owner.run_dir == str(run_dir)]
    candidates = here or [archive for archive, _ in found]
    if not candidates:
        return None
    if here or len(candidates) == 1:
        return candidates[-1]
    told = "".join(f"\n  {owner}" for _, owner in found)
    raise UsageError(
        f"storage holds {len(found)} studies called {found[0][0].study!r}, none of them last in {run_dir}:{told}",
        hint="name the run directory of the one that you mean with --run-dir, or give the study another name",
    )
