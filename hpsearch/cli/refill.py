"""A run directory that is lost, and filled again from storage before a launch goes on."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hpsearch.archive import archive_for, archives
from hpsearch.cli.output import say
from hpsearch.cli.run_verbs import counts_line
from hpsearch.errors import UsageError
from hpsearch.journal import FILE_NAME
from hpsearch.restore import restore
from hpsearch.spec import Spec


def refill(run_dir: Path, spec: Spec, *, resume: bool, again: str) -> None:
    """Give a run directory without a study what `storage:` holds of it, and say so; nothing where neither has one.

    Args:
        again: the command that resumes.

    Raises:
        UsageError: the study is to begin, and storage holds one of this run directory; or several of its name.
        StorageError: storage fails.
    """
    if spec.storage is None or (run_dir / FILE_NAME).exists():
        return
    found = archives(spec.storage, spec.name)
    if not resume:
        before = [archive for archive, owner in found if owner.run_dir == str(run_dir.resolve())]
        if before:
            raise UsageError(
                f"{before[-1]} holds the study of {run_dir} already",
                hint=f"to restore it and go on: {again}; for a new one choose another --run-dir",
            )
        return
    archive = archive_for(run_dir.resolve(), found)
    restored = None if archive is None else restore(archive, run_dir)
    if restored is None:
        return
    at = datetime.fromtimestamp(restored.state.last_at, UTC).isoformat(" ", "seconds").removesuffix("+00:00")
    say(
        f"{run_dir} holds no study; restored from {archive} as it stood at {at} UTC, with {restored.n_blobs} files "
        f"({restored.n_bytes:,} bytes), last written from {restored.owner}"
    )
    say(counts_line(restored.state))
