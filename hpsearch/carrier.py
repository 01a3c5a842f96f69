"""The carrier: an executor whose large results go by way of storage.

A result's blobs travel with it to the driver, as bytes in a message, as long as they are small enough for that. Larger
ones are written to storage by the worker itself, and read from there by whoever needs them, so that they pass through
neither the study's process nor the head's disk.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from hpsearch.archive import INLINE_BYTES, Archive, blob_name
from hpsearch.blobs import digest_of
from hpsearch.errors import DamagedBlob, InStorage, StorageError
from hpsearch.job import DataInfo, Job, Result
from hpsearch.worker import Executor, HasLanes, More, WearsOut

OUTAGE_S = 600.0  # that a worker with a large result waits for storage, before it tells the study that it is gone
AGAIN_S = 5.0  # after a failure
SIGN_S = 1.0  # between two signs of life while bytes are on their way

T = TypeVar("T")
Progress = Callable[[str, int], None]


class Carrier:
    """Runs jobs with another executor."""

    def __init__(
        self,
        executor: Executor,
        archive: Archive | None,
        *,
        inline_bytes: int = INLINE_BYTES,
        outage_s: float = OUTAGE_S,
        again_s: float = AGAIN_S,
    ) -> None:
        """
        Args:
            archive: of the study; None: no `storage:`, and a result above `inline_bytes` is an error that says so.
            inline_bytes: of a result's blobs, that travel with it.
            outage_s: how long a storage that is out of reach is waited for.
        """
        self._executor = executor
        self._archive = archive
        self._inline_bytes = inline_bytes
        self._outage_s = outage_s
        self._again_s = again_s

    def describe(self) -> DataInfo:
        return self._executor.describe()

    def worn(self) -> str:
        return self._executor.worn() if isinstance(self._executor, WearsOut) else ""

    def fills(self, job: Job) -> bool:
        return isinstance(self._executor, HasLanes) and self._executor.fills(job)

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Progress, more: More | None = None
    ) -> Iterator[Result]:
        """Results as the executor gives them, the large ones without their large blobs.

        Raises:
            StorageError: a result is large, and there is no storage, or it was out of reach for longer than this waits.
        """
        keys = [job.key for job in jobs]

        def fetch_here_or_there(ref: str) -> bytes:
            try:
                return fetch(ref)
            except InStorage as elsewhere:
                return self._read(elsewhere, keys, progress)

        def further(job: Job, n: int) -> Sequence[Job]:
            assert more is not None
            others = more(job, n)
            keys.extend(other.key for other in others)
            return others

        if more is not None and isinstance(self._executor, HasLanes):
            results = self._executor.run(jobs, fetch_here_or_there, progress, further)
        else:
            results = self._executor.run(jobs, fetch_here_or_there, progress)
        for result in results:
            yield self._carried(result, keys, progress)
            if result.key in keys:
                keys.remove(result.key)

    def _carried(self, result: Result, keys: Sequence[str], progress: Progress) -> Result:
        n_bytes = sum(map(len, result.blobs.values()))
        if n_bytes <= self._inline_bytes:
            return result
        if self._archive is None:
            # Not a crash of the trial: with a storage its result is as good as any other, so none is given up for this.
            raise StorageError(
                f"{result.key} gave {_size(n_bytes)} of files, and up to {_size(self._inline_bytes)} travel to the "
                "driver",
                hint="name a place for larger ones in space.yaml, `storage:` with s3://bucket/prefix, "
                "gs://bucket/prefix or a folder that every machine sees; then launch again with --resume",
            )
        blobs, stored = dict(result.blobs), dict(result.stored)
        for ref, content in sorted(result.blobs.items(), key=lambda item: len(item[1]), reverse=True):
            if n_bytes <= self._inline_bytes:
                break
            stored[ref] = self._patiently(partial(_store, self._archive, ref, content), keys, progress)
            n_bytes -= len(blobs.pop(ref))
        return dataclasses.replace(result, blobs=blobs, stored=stored)

    def _read(self, elsewhere: InStorage, keys: Sequence[str], progress: Progress) -> bytes:
        archive, ref, digest = self._archive, elsewhere.ref, elsewhere.digest
        assert archive is not None, "a study without storage said that a blob is there"
        return self._patiently(partial(_stored, archive, ref, digest), keys, progress)

    def _patiently(self, work: Callable[[], T], keys: Sequence[str], progress: Progress) -> T:
        """What `work` gives, when storage can be reached; says meanwhile that the jobs at hand are alive."""
        give_up_at = time.monotonic() + self._outage_s
        with ThreadPoolExecutor(1, thread_name_prefix="carrier") as pool:
            while True:
                doing = pool.submit(work)
                while True:
                    try:
                        return doing.result(timeout=SIGN_S)
                    except TimeoutError:
                        if doing.done():  # it was the work's own
                            raise
                        _say_alive(keys, progress)
                    except StorageError:
                        if time.monotonic() + self._again_s > give_up_at:
                            raise
                        break
                time.sleep(self._again_s)
                _say_alive(keys, progress)


def _store(archive: Archive, ref: str, content: bytes) -> str:
    """Write a blob to storage; its digest, which takes seconds of a large one too."""
    digest = digest_of(content)
    archive.storage.write(blob_name(ref, digest), content)
    return digest


def _stored(archive: Archive, ref: str, digest: str) -> bytes:
    """A blob of storage, as it was written; else a DamagedBlob is raised."""
    content = archive.read_blob(ref, digest)
    if content is None:
        raise DamagedBlob(ref, "it is neither in the run directory nor in storage")
    if digest and digest_of(content) != digest:
        raise DamagedBlob(ref, f"its {len(content):,} bytes in storage are not those that were written")
    return content


def _say_alive(keys: Sequence[str], progress: Progress) -> None:
    for key in keys:
        progress(key, 0)


def _size(n_bytes: int) -> str:
    """Bytes as people read them.

    >>> _size(256 << 20), _size(1_500)
    ('256 MiB', '1.5 KiB')
    """
    value, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"
