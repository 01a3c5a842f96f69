"""What a resume of a large study costs: until its first job is given out, in memory, and in bytes of the journal.

    python benchmarks/resume.py                         # 10,000 trials with results, --fleet local
    python benchmarks/resume.py --trials 100000
    python benchmarks/resume.py --fleet tune            # the same command on Ray

The study is interrupted in the middle of its search: every trial has trained to a rung by then, 20 % more are to come.
Its results are made up, with three metrics an epoch in full digits as torch gives them; its task is real, so that the
command can go on with it. Measured twice, a fresh start and a resume taking turns:

- the study alone, in a process without torch, as Ray's actor holds it: from nothing to a worker's first job;
- `hpsearch launch --resume` as a shell starts it, until the journal says that a job was given out; it is killed then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.assembly import open_study
from hpsearch.job import DataInfo, EpochMetrics, Job, Result, TrainJob
from hpsearch.journal import FILE_NAME
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from tests import fakes

TASK = """
import torch
import hpsearch

class Blobs(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(600) % 3
        x = torch.randn(600, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:300], y[:300]), val=(x[300:450], y[300:450]), test=(x[450:], y[450:]))

    def model(self, config):
        width = config["width"]
        return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
"""

SPACE = """
name: large
task: task.py:Blobs
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  momentum: {min: 0.8, max: 0.99, when: {optimizer: sgd}}
  weight_decay: {distribution: log_uniform, min: 1e-6, max: 1e-1}
  width: {values: [8, 16, 32]}
"""

ALONE = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from hpsearch.assembly import open_study
from hpsearch.job import DataInfo
from hpsearch.spec import parse_spec
from tests.fakes import make_sampler
imported = time.perf_counter()
folder, run_dir, n_trials, info = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
spec = parse_spec((folder / "space.yaml").read_text(), overrides=[f"search.trials={n_trials}"])
study = open_study(run_dir, spec, make_sampler=make_sampler)
opened = time.perf_counter()
study.arriving("worker-0")
study.hello("worker-0", DataInfo(**{k: tuple(v) if isinstance(v, list) else v for k, v in info.items()}))
assert study.pull("worker-0").jobs
given = time.perf_counter()
with open("/proc/self/status") as status:
    kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in status) if key[:2] == "Vm"}
print(json.dumps({"import_s": imported - start, "first_job_s": given - start, "open_s": opened - imported,
                  "rss_mib": kib["VmRSS"] / 1024, "peak_mib": kib["VmHWM"] / 1024}))
study.close()
"""


class MadeUp(fakes.FakeExecutor):
    """Results as long as real ones."""

    def __init__(self, info: DataInfo) -> None:
        super().__init__(checkpoints=False)
        self._info = info

    def describe(self) -> DataInfo:
        return self._info

    def _train(self, job: TrainJob) -> Result:
        rng = np.random.default_rng([job.trial, job.from_epoch])
        rows = []
        for epoch in range(job.from_epoch + 1, job.to_epoch + 1):
            loss = fakes.val_loss(job.config, epoch) + float(rng.random()) / 10
            metrics = {"train_loss": loss * 0.9, "val_loss": loss, "val_accuracy": math.exp(-loss)}
            rows.append(EpochMetrics(epoch=epoch, metrics=metrics, seconds=float(rng.random()) / 10))
        ref = f"checkpoints/trial-{job.trial:04d}-e{job.to_epoch:04d}.safetensors"
        values = {"checkpoint": ref, "best_checkpoint": ref, "resumable": True}
        return Result(key=job.key, values=values, epochs=tuple(rows), seconds=sum(row.seconds for row in rows))


def real_info(spec: Spec, folder: Path) -> DataInfo:
    """What the real task's workers will say of its data."""
    from hpsearch.cli.adapters import make_executor

    return make_executor(spec, folder).describe()


def prepare(folder: Path, n_trials: int) -> tuple[Path, DataInfo, int]:
    """A run directory with a result of every one of `n_trials` trials; the data's description; trials of the study."""
    (folder / "task.py").write_text(TASK)
    (folder / "space.yaml").write_text(SPACE)
    n_planned = n_trials + n_trials // 5
    spec = parse_spec(SPACE, overrides=[f"search.trials={n_planned}"])
    info = real_info(spec, folder)
    executor = MadeUp(info)
    study = open_study(folder / "run", spec, make_sampler=fakes.make_sampler, background=False)
    study.arriving("worker-0")
    study.hello("worker-0", info)
    with no_sync():  # how long this takes is not the question
        while not trained(study.state, n_trials):
            jobs: Sequence[Job] = study.pull("worker-0", slots=64).jobs
            study.push("worker-0", list(executor.run(jobs, lambda ref: b"", lambda key, epoch: None)))
    study.close()
    assert study.failure is None, study.failure
    return folder / "run", info, n_planned


def trained(state: StudyState, n_trials: int) -> bool:
    return len(state.trials) >= n_trials and all(trial.epoch for trial in state.trials.values())


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Without waiting for the disk."""
    sync = os.fsync
    os.fsync = lambda handle: None
    try:
        yield
    finally:
        os.fsync = sync


def alone(folder: Path, run_dir: Path, n_planned: int, info: DataInfo) -> dict[str, float]:
    """The study in a process of its own, to its first job."""
    command = [sys.executable, "-c", ALONE, str(folder), str(run_dir), str(n_planned), json.dumps(vars(info))]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    told: dict[str, float] = json.loads(done.stdout)
    return told


def command(folder: Path, run_dir: Path, n_planned: int, fleet: str) -> dict[str, float]:
    """`hpsearch launch --resume` until the journal tells of a job that this launch gave out."""
    journal = run_dir / FILE_NAME
    before = journal.stat().st_size if journal.exists() else 0
    start = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--resume", "--fleet", fleet),
            *("--run-dir", str(run_dir), "--set", f"search.trials={n_planned}"),
            # Nobody listens there: MLflow would be told of all these trials for the first time, which a resume is not.
            *("--tracking-uri", "http://127.0.0.1:9"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while not gave_out(journal, before):
            if process.poll() is not None:
                assert process.stderr is not None
                raise RuntimeError(f"the launch ended: {process.stderr.read().decode()[-2000:]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        with open(f"/proc/{process.pid}/status") as status:
            rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT if fleet == "tune" else signal.SIGKILL)  # Ray's processes go with it
        process.communicate()
    return {"first_job_s": seconds, "driver_rss_mib": rss / 1024}


def gave_out(journal: Path, before: int) -> bool:
    """Whether a lease stands behind the journal's first `before` bytes."""
    if not journal.exists() or journal.stat().st_size <= before:
        return False
    with journal.open("rb") as file:
        file.seek(before)
        return b'"type":"leased"' in file.read()


def median_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=10_000, help="with results, when the study is resumed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fleet", choices=["local", "tune"], default="local")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("alone/fresh", "alone/resumed", "fresh", "resumed")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept, info, n_planned = prepare(folder, args.trials)
        journal_bytes = (kept / FILE_NAME).stat().st_size
        for repeat in range(args.repeats + 1):
            for what in rows:
                run_dir = folder / f"run-{repeat}-{what.replace('/', '-')}"
                if what.endswith("resumed"):
                    shutil.copytree(kept, run_dir)
                if what.startswith("alone"):
                    row = alone(folder, run_dir, n_planned, info)
                else:
                    row = command(folder, run_dir, n_planned, args.fleet)
                if repeat:  # the first time brings the libraries into the page cache
                    rows[what].append(row)
    medians = {what: median_of(measured) for what, measured in rows.items()}
    for what, row in medians.items():
        print(f"{what:14}", "  ".join(f"{key} {value:8.2f}" for key, value in row.items()))
    more = {
        "alone": round(medians["alone/resumed"]["first_job_s"] - medians["alone/fresh"]["first_job_s"], 3),
        "command": round(medians["resumed"]["first_job_s"] - medians["fresh"]["first_job_s"], 3),
    }
    print(f"a resume takes {more['alone']:.2f} s more than a fresh start for the study, {more['command']:.2f} s in all")
    print(f"journal: {journal_bytes / 1e6:.1f} MB, {journal_bytes / args.trials:.0f} bytes per trial")
    keep(
        "resume" if args.fleet == "local" else f"resume_{args.fleet}",
        f"resume of a study with {args.trials:,} trials' results against a fresh start, medians, seconds and MiB",
        {"medians": medians, "all": rows, "more_than_fresh_s": more, "journal_bytes": journal_bytes},
        packages=["numpy", "torch", "mlflow", "ray"],
        trials=args.trials,
        repeats=args.repeats,
        fleet=args.fleet,
    )


if __name__ == "__main__":
    main()
