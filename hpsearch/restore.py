"""A study brought back from storage: a run directory that is lost is filled again, as far as storage had got."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpsearch.archive import INLINE_BYTES, Archive, Driver, blob_name
from hpsearch.blobs import BlobStore, digest_of, sync_folder
from hpsearch.errors import StorageError, UsageError
from hpsearch.journal import FILE_NAME, entries_of
from hpsearch.notes import FILE_NAME as NOTES
from hpsearch.state import StudyState

BRINGERS = 8  # blobs on their way at once


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a run directory was given."""

    state: StudyState
    owner: Driver  # who had written it last
    n_blobs: int
    n_bytes: int  # of these and the journal


def restore(archive: Archive, run_dir: Path, *, local_bytes: int = INLINE_BYTES) -> Restored | None:
    """Give a run directory without a journal the study of an archive; None when the archive holds nothing yet.

    The journal is put there last, so that what is interrupted can be begun again.

    Args:
        local_bytes: blobs above it are left in storage, where workers read them.

    Raises:
        StorageError: storage fails, or what it holds is not whole.
        UsageError: the run directory cannot be written, or has a journal.
        JournalError: the journal in storage is damaged.
    """
    owner = archive.owner()
    raw = archive.journal(archive.segments())
    entries = entries_of(raw, run_dir / FILE_NAME)
    if owner is None or not entries:
        return None
    state = StudyState.of(entries)
    sizes = archive.blobs()
    wanted = {
        ref: digest
        for ref, digest in state.digests.items()
        if sizes.get(blob_name(ref, digest), local_bytes + 1) <= local_bytes
    }
    blobs = BlobStore(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        n_bytes = len(raw) + _bring(wanted, archive, blobs)
        _put_notes(archive, run_dir)
        _put_journal(raw, run_dir)
    except OSError as error:
        raise UsageError(
            f"the run directory {run_dir} cannot be written: {error.strerror}", hint="choose another --run-dir"
        ) from None
    finally:
        blobs.close()
    return Restored(state=state, owner=owner, n_blobs=len(wanted), n_bytes=n_bytes)


def bring_over(digests: Mapping[str, str], blobs: BlobStore, old: Archive, new: Archive | None) -> None:
    """Blobs that lie in the old storage alone, when a study is given another: to the new one, or to the run directory.

    Raises:
        StorageError: one of the two fails.
        JournalError: the disk is full.
    """
    for ref, digest in digests.items():
        if blobs.path(ref).exists():
            continue
        content = old.read_blob(ref, digest)
        if content is None:
            continue  # it is damaged, and made again when somebody asks for it
        if new is not None:
            new.storage.write(blob_name(ref, digest), content)
        else:
            blobs.keep({ref: content})


def _bring(wanted: Mapping[str, str], archive: Archive, blobs: BlobStore) -> int:
    """Blobs into the run directory; gives their bytes."""
    n_bytes = 0
    with ThreadPoolExecutor(BRINGERS, thread_name_prefix="restore") as pool:
        found = pool.map(archive.read_blob, wanted, wanted.values())
        for (ref, digest), content in zip(wanted.items(), found, strict=True):
            if content is None or (digest and digest_of(content) != digest):
                continue  # as above
            blobs.keep({ref: content})
            n_bytes += len(content)
    return n_bytes


def _put_notes(archive: Archive, run_dir: Path) -> None:
    try:
        content = archive.storage.read(NOTES)
    except StorageError as error:
        if not error.gone:
            raise
        return
    (run_dir / NOTES).write_bytes(content)


def _put_journal(raw: bytes, run_dir: Path) -> None:
    """Whole, and only where there is none: another launch may have had the same thought."""
    beside = run_dir / f"{FILE_NAME}.{os.getpid()}.part"
    try:
        with beside.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, run_dir / FILE_NAME)
    except FileExistsError:
        raise UsageError(
            f"the run directory {run_dir} is in use by another launch",
            hint="wait for it to end, or choose another --run-dir",
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(run_dir)
