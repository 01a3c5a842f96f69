"""What leases and journal cost a study in which nothing goes wrong, against the same study without them.

    python benchmarks/overhead.py                          # epochs of 20 and 200 ms, seven pairs each: minutes
    python benchmarks/overhead.py --epoch-ms 20 --pairs 3

The same jobs are run by the same workers, threads that wait as long as an epoch takes, on two studies in turns: the
study as it is, and one whose journal writes no file and waits for no disk, and whose lease book keeps nothing. What is
left over is decisions, and they are the same. Fake epochs wait and do not compute, so a study that takes the processor
away from its workers' own process is charged for it all the same: it holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.assembly import open_study
from hpsearch.job import Job, Result, TrainJob
from hpsearch.journal import Journal
from hpsearch.leases import LeaseBook
from hpsearch.spec import parse_spec
from hpsearch.worker import Worker
from tests import fakes

SPACE = """
name: overhead
task: task.py:Task
search: {trials: 60}
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0}
  width: {values: [64, 128, 256]}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {enabled: false}
"""
STAGES = ("search",)
CHECKPOINT_BYTES = 200_000  # of a small network with its optimizer


class Waiting(fakes.FakeExecutor):
    """Epochs that take as long as they are told to."""

    def __init__(self, epoch_s: float) -> None:
        super().__init__()
        self._epoch_s = epoch_s

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            if isinstance(job, TrainJob):
                for epoch in range(job.from_epoch + 1, job.to_epoch + 1):
                    time.sleep(self._epoch_s)
                    progress(job.key, epoch)
            for result in super().run([job], fetch, progress):
                yield replace(result, blobs={ref: bytes(CHECKPOINT_BYTES) for ref in result.blobs})


class ForgetfulBook(LeaseBook):
    """No lease is kept, none is overdue."""

    def begin(self, key: str, now: float) -> None:
        """Nothing is kept."""

    def heard(self, key: str, now: float) -> None:
        """Nothing is kept."""


class Unwritten(Journal):
    """Entries are numbered and told, and reach no disk."""

    def commit(self) -> None:
        """Forget what was to be written."""
        with self._buffer_lock:
            self._buffer.clear()


def seconds_of(folder: Path, epoch_s: float, *, n_workers: int, whole: bool) -> float:
    """Wall time of one study, from its first question for work to its end."""
    with mock.patch("hpsearch.study.LeaseBook", LeaseBook if whole else ForgetfulBook):
        kind = Journal if whole else Unwritten
        with mock.patch("hpsearch.assembly.Journal", kind):
            study = open_study(folder, parse_spec(SPACE), make_sampler=fakes.make_sampler, stages=STAGES)
    workers = [Worker(f"worker-{n}", study, lambda: Waiting(epoch_s)) for n in range(n_workers)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    study.close()
    assert study.failure is None, study.failure
    assert study.state.done
    # What each worker was busy with differs from run to run, for asynchronous halving; per epoch it does not matter.
    return seconds / sum(trial.epoch for trial in study.state.trials.values())


def measure(epoch_ms: float, n_workers: int, pairs: int) -> dict[str, object]:
    """Slowdown in percent, from pairs run one after the other, which goes first in turns."""
    slower = []
    with tempfile.TemporaryDirectory() as name:
        for pair in range(pairs + 1):
            seconds = {}
            for whole in (True, False) if pair % 2 else (False, True):
                folder = Path(name) / f"{pair}-{whole}"
                seconds[whole] = seconds_of(folder, epoch_ms / 1e3, n_workers=n_workers, whole=whole)
            if pair:  # the first warms up
                slower.append(round(100 * (seconds[True] / seconds[False] - 1), 3))
    row = {
        "epoch(ms)": epoch_ms,
        "slower(%)": round(statistics.median(slower), 2),
        "lowest(%)": min(slower),
        "highest(%)": max(slower),
        "pairs(%)": slower,
    }
    print(
        f"epochs of {epoch_ms:g} ms: {row['slower(%)']:+.2f} % slower with leases and journal "
        f"(median of {pairs} pairs, {row['lowest(%)']:+.2f} to {row['highest(%)']:+.2f})"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--epoch-ms", type=float, nargs="+", default=[20.0, 200.0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    rows = [measure(epoch_ms, args.workers, args.pairs) for epoch_ms in args.epoch_ms]
    keep(
        "overhead",
        "slowdown of a fault-free study by leases and journal, percent of its time per epoch, workers in threads",
        rows,
        packages=["numpy"],
        workers=args.workers,
        pairs=args.pairs,
        checkpoint_bytes=CHECKPOINT_BYTES,
    )


if __name__ == "__main__":
    main()
