"""What the study costs per trial (sampling, journal, rungs, leases, checkpoints kept), with workers that do nothing.

    python benchmarks/study_cost.py                   # 100, 1,000 and 10,000 trials
    python benchmarks/study_cost.py --trials 100000

Two fake workers in threads answer at once, so that all time is the study's. CPU time is the whole process's, the fake
workers' answers included. Wall time has the waits for the disk in it: each result is synced before it counts. Measured
twice: without checkpoints (sampling, journal, rungs and leases alone), and with a file kept for each pause of a trial.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.assembly import open_study
from hpsearch.journal import FILE_NAME
from hpsearch.spec import parse_spec
from hpsearch.worker import Worker
from tests import fakes

SPACE = """
name: cost
task: task.py:Task
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  momentum: {min: 0.8, max: 0.99, when: {optimizer: sgd}}
  weight_decay: {distribution: log_uniform, min: 1e-6, max: 1e-1}
  width: {values: [64, 128, 256]}
  depth: {min: 1, max: 3}
"""


def measure(n_trials: int, folder: Path, *, checkpoints: bool) -> dict[str, float | bool]:
    """Milliseconds per trial, and what the study leaves behind."""
    spec = parse_spec(SPACE, overrides=[f"search.trials={n_trials}"])
    study = open_study(folder, spec, make_sampler=fakes.make_sampler)
    workers = [Worker(f"worker-{i}", study, lambda: fakes.FakeExecutor(checkpoints=checkpoints)) for i in range(2)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    study.close()
    assert study.failure is None, study.failure
    return {
        "trials": n_trials,
        "checkpoints": checkpoints,
        "wall(ms/trial)": round(wall / n_trials * 1e3, 3),
        "cpu(ms/trial)": round(cpu / n_trials * 1e3, 3),
        "journal(bytes/trial)": round((folder / FILE_NAME).stat().st_size / n_trials),
        "memory/peak(MiB)": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def sync_ms(folder: Path) -> float:
    """Milliseconds of one append with fsync on this disk now: the floor of every kept result."""
    with (folder / "probe").open("wb") as file:
        start = time.perf_counter()
        for _ in range(100):
            file.write(b"x" * 300)
            file.flush()
            os.fsync(file.fileno())
    return (time.perf_counter() - start) * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be measured; default: a temporary one"
    )
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        disk_ms = sync_ms(Path(folder))
        print(f"one append with fsync: {disk_ms:.2f} ms")
        measure(10, Path(folder) / "warm-up", checkpoints=False)  # SciPy is imported with the first point
        header = (
            "trials",
            "checkpoints",
            "wall(ms/trial)",
            "cpu(ms/trial)",
            "journal(bytes/trial)",
            "memory/peak(MiB)",
        )
        print("{:>7}  {:>11}  {:>14}  {:>13}  {:>20}  {}".format(*header))
        for checkpoints in (False, True):
            for n_trials in args.trials:
                row = measure(n_trials, Path(folder) / f"run-{n_trials}-{checkpoints}", checkpoints=checkpoints)
                rows.append(row)
                print(
                    f"{n_trials:7,d}  {'kept' if checkpoints else 'none':>11}  {row['wall(ms/trial)']:14.3f}  "
                    f"{row['cpu(ms/trial)']:13.3f}  {row['journal(bytes/trial)']:20.0f}  {row['memory/peak(MiB)']:.0f}"
                )
    what = "cost of the study per trial, two fake workers in threads"
    keep("study_cost", what, rows, packages=["numpy", "scipy"], fsync_ms=round(disk_ms, 3))


if __name__ == "__main__":
    main()
