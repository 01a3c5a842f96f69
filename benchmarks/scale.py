"""A thousand workers and a hundred thousand trials through the real study, on a clock that is made up.

    python benchmarks/scale.py                                         # 100 to 100,000 trials: minutes
    python benchmarks/scale.py --trials 100 1000 10000 --workers 200   # under a minute

A simulation by events: every worker has a speed, every epoch takes a random time, and each push, pull and sign of life
is the study's own method, over its own journal, checkpoints and stages (LR range, asynchronous halving, ensemble), on a
real disk. What is told is the study's side alone: seconds inside its methods, and within these the waits for the disk.
A study has one process; what it decides in a second bounds how many workers it can keep busy.

Told for studies of each size, a process each and at most one worker for ten trials: milliseconds per trial (flat, or
not), memory, size of the journal; and for the largest the same as it grows, each row since the row before. Then, in
turns, a smaller study with no tracker and with one whose MLflow accepts the connection and never answers.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.assembly import open_study
from hpsearch.job import Job, Result, TrainJob
from hpsearch.journal import FILE_NAME
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from hpsearch.study import Study
from tests import fakes

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

SPACE = """
name: scale
task: task.py:Task
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  momentum: {min: 0.8, max: 0.99, when: {optimizer: sgd}}
  weight_decay: {distribution: log_uniform, min: 1e-6, max: 1e-1}
  width: {values: [64, 128, 256]}
ensemble: {pool: 20, size: 5}
"""
STAGES = ("lr_range", "search", "ensemble")
EPOCH_S = 20.0  # on a worker of middling speed
ASK_AGAIN_S = 10.0  # as workers do that got nothing
SIZES = (100, 1_000, 10_000, 100_000)
STEPS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
TRIALS_PER_WORKER = 10  # at least, or most of a small study's cost would be workers that come and find nothing


@dataclass(kw_only=True)
class Meter:
    """Seconds inside the study's methods, and of these in fsync."""

    study_s: float = 0.0
    disk_s: float = 0.0
    n_pulls: int = 0
    n_jobs: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.study_s += time.perf_counter() - began

    @contextlib.contextmanager
    def watching_the_disk(self) -> Iterator[None]:
        sync = os.fsync

        def timed(fd: FileDescriptorLike) -> None:
            began = time.perf_counter()
            sync(fd)
            self.disk_s += time.perf_counter() - began

        os.fsync = timed
        try:
            yield
        finally:
            os.fsync = sync


class Simulation:
    """Workers on a made-up clock."""

    def __init__(self, run_dir: Path, *, n_workers: int, n_trials: int, seed: int = 0) -> None:
        self.meter = Meter()
        self.now = 0.0
        self._rng = random.Random(seed)
        self._speeds = {f"worker-{n}": self._rng.lognormvariate(0.0, 0.3) for n in range(n_workers)}
        self._executor = fakes.FakeExecutor()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._n_queued = 0
        self._ended: set[str] = set()
        self.study = open_study(
            run_dir,
            parse_spec(SPACE, overrides=[f"search.trials={n_trials}"]),
            make_sampler=fakes.make_sampler,
            stages=STAGES,
            clock=lambda: 1_800_000_000.0,
            monotonic=lambda: self.now,
            background=False,
        )

    def run(self, watch: Callable[[Study, Meter], None]) -> None:
        """To the study's end."""
        for number, worker in enumerate(self._speeds):
            self._at(0.01 * number, lambda worker=worker: self._begin(worker))  # type: ignore[misc]
        with self.meter.watching_the_disk():
            while len(self._ended) < len(self._speeds):
                self.now, _, act = heapq.heappop(self._queue)
                act()
                watch(self.study, self.meter)
        self.study.close()
        assert self.study.failure is None, self.study.failure
        assert self.study.state.done

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._n_queued += 1
        heapq.heappush(self._queue, (when, self._n_queued, act))

    def _begin(self, worker: str) -> None:
        with self.meter.running():
            self.study.arriving(worker, f"node-{int(worker.removeprefix('worker-')) % 250}", 1)
            self.study.hello(worker, self._executor.describe())
        self._pull(worker)

    def _pull(self, worker: str) -> None:
        self.meter.n_pulls += 1
        with self.meter.running():
            assignment = self.study.pull(worker)
        if assignment.ended:
            self._ended.add(worker)
            return
        for job in assignment.jobs:
            self.meter.n_jobs += 1
            self._train(worker, job)
        if not assignment.jobs:
            self._at(self.now + ASK_AGAIN_S * self._rng.uniform(0.9, 1.1), lambda: self._pull(worker))

    def _train(self, worker: str, job: Job) -> None:
        """A sign of life after each epoch, the result after the last."""
        n_epochs = job.to_epoch - job.from_epoch if isinstance(job, TrainJob) else 1
        at = self.now
        for _ in range(n_epochs):
            at += EPOCH_S * self._speeds[worker] * self._rng.lognormvariate(0.0, 0.1)
            self._at(at, lambda: self._sign(worker, job.key))
        (result,) = self._executor.run([job], lambda ref: b"", lambda key, epoch: None)
        self._at(at, lambda: self._push(worker, result))

    def _sign(self, worker: str, key: str) -> None:
        with self.meter.running():
            self.study.progress(worker, key)

    def _push(self, worker: str, result: Result) -> None:
        with self.meter.running():
            self.study.push(worker, [result])
        self._pull(worker)


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A study from its first to its last trial."""

    total: dict[str, float]
    growth: list[dict[str, float]]  # a row for each of STEPS on its way, costs since the row before


def measure(folder: Path, n_workers: int, n_trials: int) -> Measured:
    """One study."""
    rows: list[dict[str, float]] = []
    last = Meter()
    reached = 0
    steps = [step for step in STEPS if step < n_trials] + [n_trials]

    def row(state: StudyState, meter: Meter) -> None:
        nonlocal last, reached
        n = len(state.trials)
        study_s, disk_s = meter.study_s - last.study_s, meter.disk_s - last.disk_s
        rows.append(
            {
                "trials": n,
                "study(ms/trial)": round(1e3 * study_s / (n - reached), 3),
                "of it disk(ms/trial)": round(1e3 * disk_s / (n - reached), 3),
                "jobs given(1/s)": round((meter.n_jobs - last.n_jobs) / study_s),
                "memory(MiB)": round(rss_mib()),
                "journal(bytes/trial)": round((folder / FILE_NAME).stat().st_size / n),
            }
        )
        reached = n
        last = Meter(study_s=meter.study_s, disk_s=meter.disk_s, n_pulls=meter.n_pulls, n_jobs=meter.n_jobs)

    def watch(study: Study, meter: Meter) -> None:
        if steps and len(study.state.trials) >= steps[0]:
            row(study.state, meter)
            steps.pop(0)

    simulation = Simulation(folder, n_workers=n_workers, n_trials=n_trials)
    began = time.perf_counter()
    simulation.run(watch)
    meter = simulation.meter
    n_bytes = (folder / FILE_NAME).stat().st_size
    total = {
        "trials": n_trials,
        "workers": n_workers,
        "study(ms/trial)": round(1e3 * meter.study_s / n_trials, 3),
        "of it disk(ms/trial)": round(1e3 * meter.disk_s / n_trials, 3),
        "memory(MiB)": round(rss_mib()),
        "journal(bytes/trial)": round(n_bytes / n_trials),
        "journal(MB)": round(n_bytes / 1e6, 1),
        "wall(s)": round(time.perf_counter() - began, 1),
        "study(s)": round(meter.study_s, 1),
        "pulls": meter.n_pulls,
        "jobs given": meter.n_jobs,
        "pulls and pushes(1/s)": round((meter.n_pulls + meter.n_jobs) / meter.study_s),
        "simulated(h)": round(simulation.now / 3600, 2),
    }
    return Measured(total=total, growth=rows)


def measure_sizes(folder: Path, n_workers: int, sizes: Sequence[int]) -> list[Measured]:
    """A study of each size, each in a process of its own, so that its memory is its own."""
    found: list[Measured] = []
    for n_trials in sorted(sizes):
        workers = max(1, min(n_workers, n_trials // TRIALS_PER_WORKER))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(measure, folder / f"run-{n_trials}", workers, n_trials).result())
        if len(found) == 1:
            show_header(TOTALS)
        show_row(found[-1].total, TOTALS)
    print(f"\nthe study of {sorted(sizes)[-1]:,} trials as it grew, costs since the row before")
    show_header(GROWTH)
    for row in found[-1].growth:
        show_row(row, GROWTH)
    print(flush=True)
    return found


TOTALS = (
    *("workers", "study(ms/trial)", "of it disk(ms/trial)", "memory(MiB)", "journal(bytes/trial)", "journal(MB)"),
    *("pulls and pushes(1/s)", "wall(s)"),
)
GROWTH = ("study(ms/trial)", "of it disk(ms/trial)", "jobs given(1/s)", "memory(MiB)", "journal(bytes/trial)")


def show_header(columns: Sequence[str]) -> None:
    print(f"{'trials':>9}  " + "  ".join(columns))


def show_row(row: Mapping[str, float], columns: Sequence[str]) -> None:
    print(f"{row['trials']:9,d}  " + "  ".join(f"{row[name]:>{len(name)},}" for name in columns), flush=True)


@contextlib.contextmanager
def silent_mlflow(run_dir: Path) -> Iterator[None]:
    """A tracker beside the study whose server takes the connection and never answers."""
    from hpsearch.tracker import JournalFollower, Tracker, TrackerThread

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        tracker = Tracker(run_dir, tracking_uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker.prepare()  # MLflow is imported before anything is measured
        thread = TrackerThread(tracker, JournalFollower(run_dir), warn=lambda text: None).start()
        try:
            yield
        finally:
            thread.close(timeout_s=0.0)


def with_and_without_mlflow(folder: Path, n_workers: int, n_trials: int, repeats: int) -> dict[str, object]:
    """Seconds of the same study, in turns; without the waits for the disk, which differ more than what is asked."""
    seconds: dict[str, list[float]] = {"none": [], "silent": []}
    for repeat in range(repeats):
        for which in seconds:
            run_dir = folder / f"{which}-{repeat}"
            run_dir.mkdir()
            with silent_mlflow(run_dir) if which == "silent" else contextlib.nullcontext():
                simulation = Simulation(run_dir, n_workers=n_workers, n_trials=n_trials)
                began = time.perf_counter()
                simulation.run(lambda study, meter: None)
                seconds[which].append(round(time.perf_counter() - began - simulation.meter.disk_s, 3))
    ratio = median_ratio(seconds["silent"], seconds["none"])
    print(f"silent MLflow: {ratio:.3f} times the time without any ({repeats} pairs of {n_trials:,} trials)")
    return {"without the disk(s)": seconds, "ratio": ratio, "trials": n_trials}


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(these, those, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=1_000, help="at most, and one for ten trials")
    parser.add_argument("--trials", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--mlflow-trials", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5, help="pairs with and without a silent MLflow")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found = measure_sizes(Path(name), args.workers, args.trials)
        beside = with_and_without_mlflow(Path(name), args.workers, args.mlflow_trials, args.repeats)
    keep(
        "scale",
        f"up to {args.workers:,} simulated workers through the real study on a made-up clock, per size of the study",
        {"sizes": [each.total for each in found], "growth": found[-1].growth, "silent_mlflow": beside},
        packages=["numpy", "scipy", "mlflow"],
        workers=args.workers,
        trials=args.trials,
    )


if __name__ == "__main__":
    main()
