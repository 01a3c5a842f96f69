"""A small study of fake workers that is mirrored; also as a process of its own, to be killed.

As a process: python -m tests.mirrored_study RUN_DIR STORAGE SECONDS_PER_JOB
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpsearch import assembly
from hpsearch.archive import Archive, archive_for, archives, blob_name
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Job, Result
from hpsearch.journal import entries_of, read_journal
from hpsearch.mirror import Mirror
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from tests import fakes

SPACE = """
name: mirrored
task: task.py:Task
preflight: {enabled: false}
search: {trials: 27}
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
lr_range: {seeds: 2}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 6, size: 3}
"""
FAST = functools.partial(Mirror, every_s=0.02, again_s=0.05, owner_every_s=0.05)


class SlowExecutor(fakes.FakeExecutor):
    """Takes its time, so that something can happen meanwhile."""

    def __init__(self, job_s: float, before_job: Callable[[Job], None] = lambda job: None) -> None:
        super().__init__()
        self._job_s = job_s
        self._before_job = before_job

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            self._before_job(job)
            time.sleep(self._job_s)
            yield from super().run([job], fetch, progress)


def launch(
    run_dir: Path,
    storage: str,
    *overrides: str,
    make_executor: Callable[[Spec, Path], fakes.FakeExecutor] | None = None,
) -> Launch:
    return Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE + f"storage: {storage}\n", overrides=overrides),
        folder=run_dir.parent,
        make_sampler=fakes.make_sampler,
        make_executor=make_executor or fakes.make_executor,
        lock_wait_s=5.0,
    )


def run(study: Launch) -> StudyState:
    LocalFleet(study).run(lambda entries: None)
    return StudyState.of(read_journal(study.run_dir))


def archive_in(storage: str, run_dir: Path) -> Archive:
    found = archive_for(run_dir, archives(storage, "mirrored"))
    assert found is not None
    return found


def state_in(archive: Archive) -> StudyState:
    """The study as storage has it."""
    return StudyState.of(entries_of(archive.journal(archive.segments()), Path("journal")))


def missing(archive: Archive) -> list[str]:
    """Blobs that the journal in storage names and that are not there."""
    there = archive.blobs()
    digests = state_in(archive).digests
    return [ref for ref, digest in digests.items() if blob_name(ref, digest) not in there]


if __name__ == "__main__":
    assembly.Mirror = FAST  # type: ignore[misc,assignment]
    job_s = float(sys.argv[3])
    run(launch(Path(sys.argv[1]), sys.argv[2], make_executor=lambda spec, folder: SlowExecutor(job_s)))
