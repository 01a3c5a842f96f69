"""Random kills over workers, nodes, the study's process and the driver of one study; then: is anything lost or double?

    python benchmarks/soak.py                         # 100 kills, a quarter of an hour
    python benchmarks/soak.py --kills 5 --seed 1      # a few others
    python benchmarks/soak.py --minutes 10            # as many as fit
    python benchmarks/soak.py --kinds driver          # of one kind alone

A study of many short trials runs on a Ray cluster of its own: a head, and two nodes with a worker each. At random
moments something is ended by SIGKILL: a worker's process, all processes of a node (another node joins), the study's
process, or the driver with its whole process group (the same command is given again, with --resume). When all kills
are done the rest of the study runs at full speed. Then the journal, the run directory and MLflow are searched for
anything lost, double, altered or left over: every breach is a line, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.events import Arrived, Finished, Leased
from hpsearch.journal import FILE_NAME, JournalTail, read_journal
from hpsearch.state import Entry, StudyState
from tests.same_study import Glance, glance, lost, twice

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"worker": 5, "node": 2, "driver": 2, "study": 1}  # of the kills
JOB_S = 0.4  # that a training job takes while kills go on
CALM_S = (0.2, 5.0)  # between the first sign of recovery and the next kill
IMPATIENT = 0.2  # share of the kills that do not wait for a recovery
PATIENCE_S = 120.0  # for a sign of recovery; after it the study is taken to hang
TRIALS_PER_KILL = 15  # more than two workers begin between two kills
MOST_FALLS = 3  # of drivers that nobody had killed, before it makes no sense to go on
MOST_TOLD = 20  # breaches that are printed
NODES = 2

TASK = """
import pathlib
import time

import torch

import hpsearch

class Blobs(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(600) % 3
        x = torch.randn(600, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:300], y[:300]), val=(x[300:450], y[300:450]), test=(x[450:], y[450:]))

    def model(self, config):
        if not pathlib.Path({calm!r}).exists():
            time.sleep({job_s} if "lr" in config else 0)
        width = config["width"]
        return torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(width, 3)
        )
"""

SPACE = """
name: soak
task: task.py:Blobs
search: {{trials: {trials}}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}}
  optimizer: {{values: [adamw, sgd]}}
  width: {{values: [8, 16]}}
lr_range: {{seeds: 2, steps: 30}}
early_stopping: {{type: asha, min_epochs: 1, max_epochs: 9, reduction_factor: 3}}
ensemble: {{pool: 4, size: 2}}
resources: {{lanes: 1}}
"""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One of them, and how long its trace could be seen."""

    number: int
    kind: str
    at: float  # unix time, s
    who: str
    back_s: float | None  # until whoever was hit had a job again; None: the next kill did not wait for it


class Failed(RuntimeError):
    """The study cannot go on; says why."""


class Soak:
    """The cluster, the study on it, and whoever kills."""

    def __init__(self, folder: Path, n_trials: int) -> None:
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)
        self.run_dir = folder / "run"
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.calm = folder / "calm"  # once it is there, jobs take no longer than they must
        self.project = folder / "project"
        self.project.mkdir()
        (self.project / "task.py").write_text(TASK.format(calm=str(self.calm), job_s=JOB_S))
        (self.project / "space.yaml").write_text(SPACE.format(trials=n_trials))
        self._log = (folder / "driver.log").open("ab")
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(NODES)]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray has put its own there
        self._driver: subprocess.Popen[bytes] | None = None
        self._tail = JournalTail(self.run_dir)
        self.entries: list[Entry] = []
        self.state = StudyState()

    # The study

    def launch(self) -> None:
        """Begin the study, or go on with it."""
        self._driver = subprocess.Popen(
            self._command("--address", self._cluster.address, "--workers", str(NODES), "--run-dir", str(self.run_dir)),
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def undisturbed(self) -> StudyState:
        """The same study in one process, at full speed; on the same data with the same seeds."""
        folder = self.project.parent / "undisturbed"
        folder.mkdir()
        subprocess.run(
            self._command("--fleet", "local", "--run-dir", str(folder / "run"), store=f"sqlite:///{folder}/mlflow.db"),
            cwd=self.project,
            stdout=self._log,
            stderr=self._log,
            check=True,
        )
        return StudyState.of(read_journal(folder / "run"))

    def look(self) -> StudyState:
        """What the journal says now."""
        for entry in self._tail.new_entries():
            self.entries.append(entry)
            self.state.apply(entry.event, entry.time)
        return self.state

    def gone(self) -> int | None:
        """The driver's exit code, None while it lives."""
        assert self._driver is not None
        return self._driver.poll()

    def wait(self, timeout_s: float) -> int:
        assert self._driver is not None
        return self._driver.wait(timeout=timeout_s)

    def close(self) -> None:
        """End everything that was started here."""
        if self._driver is not None and self._driver.poll() is None:
            os.killpg(self._driver.pid, signal.SIGKILL)
            self._driver.wait()
        self._cluster.shutdown()
        self._log.close()

    def last_words(self) -> str:
        """The end of what drivers said."""
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")[-3000:]

    def _command(self, *arguments: str, store: str = "") -> list[str]:
        command = [sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--resume"]
        return [*command, "--tracking-uri", store or self.store, *arguments]

    # Who is killed. Each returns whom it hit, "" when nobody was there.

    def kill_worker(self, dice: random.Random) -> str:
        seats = [seat for seat in self.state.seats.values() if _parent(seat.pid) in self._raylets()]
        if not seats:
            return ""
        seat = dice.choice(sorted(seats, key=lambda seat: seat.worker))
        os.kill(seat.pid, signal.SIGKILL)
        return seat.worker

    def kill_node(self, dice: random.Random) -> str:
        node = self._nodes.pop(dice.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))
        return str(node.node_id)

    def kill_driver(self, dice: random.Random) -> str:
        if self._driver is None or self._driver.poll() is not None:
            return ""
        os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait()
        self.launch()
        return "driver"

    def kill_study(self, dice: random.Random) -> str:
        pids = self.studies()
        if not pids:
            return ""
        os.kill(pids[-1], signal.SIGKILL)
        return "study"

    def studies(self) -> list[int]:
        """Processes on our nodes that hold a study, oldest first."""
        raylets = self._raylets()
        return sorted(pid for pid in _pids() if _parent(pid) in raylets and b"StudyActor" in _title(pid))

    def _raylets(self) -> set[int]:
        nodes = [self._cluster.head_node, *self._nodes]
        return {info.process.pid for node in nodes for info in node.all_processes.get("raylet", [])}


def soak(
    folder: Path, n_kills: int, kinds: Sequence[str], seed: int, most_s: float
) -> tuple[list[Kill], dict[str, Any], list[str]]:
    """The kills, some figures, and every breach that was found. No further kill after `most_s` seconds."""
    dice = random.Random(seed)
    found: list[str] = []
    kills: list[Kill] = []
    looks: list[dict[int, Glance]] = []
    began = time.monotonic()
    study = Soak(folder, TRIALS_PER_KILL * n_kills + 30)
    try:
        study.launch()
        _until(study, lambda entries: any(isinstance(e.event, Finished) for e in entries), 0, found)
        for number in range(n_kills):
            if time.monotonic() - began > most_s:
                break
            time.sleep(dice.uniform(*CALM_S))
            kind = dice.choices(kinds, weights=[SHARES[kind] for kind in kinds])[0]
            study.look()
            at, seen = time.time(), len(study.entries)
            who = getattr(study, f"kill_{kind}")(dice)
            looks.append(glance(study.look()))
            if study.state.done:
                found.append(f"the study was done before kill {number + 1}: more trials per kill are needed")
                break
            if not who:
                continue
            patient = number == n_kills - 1 or dice.random() > IMPATIENT
            back = _until(study, _is_back(kind, who), seen, found) if patient else False
            back_s = round(time.time() - at, 2) if back else None
            kills.append(Kill(number=number + 1, kind=kind, at=round(at, 2), who=who, back_s=back_s))
            print(
                f"{number + 1:4d}  {kind:<7} {who:<20.20} {'-' if back_s is None else f'{back_s:.1f}':>6}", flush=True
            )
        study.calm.touch()
        code = study.wait(timeout_s=600)
        if code:
            found.append(f"the last launch ended with {code}")
        study.look()
        orphans = study.studies()
        if orphans:
            found.append(f"{len(orphans)} processes of earlier studies live on")
        if found:
            print(study.last_words(), file=sys.stderr)
        wall_s = time.monotonic() - began
        entries = read_journal(study.run_dir)
        state = StudyState.of(entries)
        found += _breaches(study, entries, state, looks)
        figures = {
            "trials": len(state.trials),
            "epochs": state.n_epochs,
            "jobs_given_out_again": sum(e.event.type == "returned" for e in entries),
            "workers_processes": sum(isinstance(e.event, Arrived) for e in entries),
            "openings": len(state.resumed_at),
            "journal(bytes)": (study.run_dir / FILE_NAME).stat().st_size,
            "wall(s)": round(wall_s, 1),
        }
        return kills, figures, found
    finally:
        study.close()


def _until(study: Soak, ready: Callable[[Sequence[Entry]], bool], since: int, found: list[str]) -> bool:
    """Wait until the journal's entries after the first `since` say so. A driver that fell is told, and begun anew."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready(study.entries[since:]):
        code = study.gone()
        if code is not None and not study.look().done:
            found.append(f"a driver that nobody had killed ended with {code}")
            if sum(sentence == found[-1] for sentence in found) > MOST_FALLS:
                raise Failed("\n".join([*found, study.last_words()]))
            study.launch()
        if time.monotonic() > deadline:
            found.append(f"no recovery within {PATIENCE_S:.0f} s")
            return False
        if study.look().done:
            return True
        time.sleep(0.05)
    return True


def _is_back(kind: str, who: str) -> Callable[[Sequence[Entry]], bool]:
    """Whether entries show that whoever was hit is at work again.

    A worker: itself. A node: a worker that began anew. The driver: as many workers as there are. The study: anybody.
    """

    def is_back(entries: Sequence[Entry]) -> bool:
        arrived: set[str] = set()
        at_work: set[str] = set()
        for entry in entries:
            match entry.event:
                case Arrived(worker=worker):
                    arrived.add(worker)
                case Leased(worker=worker) if worker in arrived or kind == "study":
                    at_work.add(worker)
        return who in at_work if kind == "worker" else len(at_work) >= (NODES if kind == "driver" else 1)

    return is_back


def _breaches(
    study: Soak, entries: Sequence[Entry], state: StudyState, looks: Sequence[dict[int, Glance]]
) -> list[str]:
    """Everything that must not be, a sentence each."""
    found = list(twice(entries))
    if not state.done:
        found.append("the study has not ended well")
    final = glance(state)
    for number, look in enumerate(looks, start=1):
        found += [f"since kill {number}: {sentence}" for sentence in lost(look, final)]
    for trial, told in glance(study.undisturbed()).items():
        its = final.get(trial)
        n = min(len(told.curve), len(its.curve)) if its else 0
        if its is None or (its.config, its.seed, its.curve[:n]) != (told.config, told.seed, told.curve[:n]):
            found.append(f"trial {trial} is not what it is in an undisturbed study")
    failed = [str(n) for n, trial in state.trials.items() if trial.failed]
    if failed:
        found.append(f"trials {', '.join(failed)} failed")
    parts = [path.name for path in study.run_dir.rglob("*.part")]
    if parts:
        found.append(f"{len(parts)} half-written files are left: {', '.join(parts[:3])}")
    refs = {ref for t in state.trials.values() for ref in (t.checkpoint, t.best_checkpoint) if ref is not None}
    found += [f"the checkpoint {ref} is named, and not there" for ref in refs if not (study.run_dir / ref).exists()]
    return found + _mlflow_breaches(study.store, state)


def _mlflow_breaches(store: str, state: StudyState) -> list[str]:
    """One finished run per trial, with the whole curve; one run of the study."""
    from mlflow import MlflowClient

    from hpsearch.tracker.operations import TAG_OP

    client = MlflowClient(tracking_uri=store)
    runs: list[Any] = []
    for experiment in client.search_experiments():
        token = None
        while True:
            page = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                break
    by_key: dict[str, list[Any]] = {}
    for run in runs:
        by_key.setdefault(run.data.tags.get(TAG_OP, "?"), []).append(run)
    found = [f"MLflow has {len(group)} runs for {key}" for key, group in by_key.items() if len(group) > 1]
    found += [f"MLflow's run {run.info.run_name} is still RUNNING" for run in runs if run.info.status == "RUNNING"]
    for number, trial in state.trials.items():
        group = by_key.get(f"trial/{number}", [])
        if not group:
            found.append(f"MLflow has no run of trial {number}")
            continue
        history = client.get_metric_history(group[0].info.run_id, "val_loss")
        told = sorted((point.step, point.value) for point in history)
        if told != [(row.epoch, row.metrics["val_loss"]) for row in trial.curve]:
            found.append(f"MLflow's curve of trial {number} has {len(told)} points, the journal's {len(trial.curve)}")
    return found


def summary(kills: Sequence[Kill]) -> list[dict[str, object]]:
    """A line per kind: how many, how long until it was back."""
    rows: list[dict[str, object]] = []
    for kind, n in Counter(kill.kind for kill in kills).items():
        times = [kill.back_s for kill in kills if kill.kind == kind and kill.back_s is not None]
        median, most = (round(statistics.median(times), 1), max(times)) if times else (None, None)
        rows.append({"kind": kind, "kills": n, "timed": len(times), "back_median(s)": median, "back_most(s)": most})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further kill after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(SHARES), default=list(SHARES))
    parser.add_argument("--no-record", action="store_true", help="print alone; benchmarks/results is left as it is")
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        del os.environ[name]  # no one's real cluster, no one's real logbook
    os.environ.update(
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
        MLFLOW_DISABLE_TELEMETRY="true",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
    )
    print("kill  kind    who                  back(s)")
    with tempfile.TemporaryDirectory(prefix="hpsearch-soak-", ignore_cleanup_errors=True) as folder:
        try:
            kills, figures, found = soak(Path(folder), args.kills, args.kinds, args.seed, 60 * args.minutes)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
    rows = summary(kills)
    print("\n{:<8} {:>5} {:>6} {:>15} {:>13}".format("kind", "kills", "timed", "back median(s)", "back most(s)"))
    for row in rows:
        print("{kind:<8} {kills:>5} {timed:>6} {back_median(s)!s:>15} {back_most(s)!s:>13}".format(**row))
    print(", ".join(f"{name} {value:,}" for name, value in figures.items()))
    print("\n".join(found[:MOST_TOLD]) if found else "nothing lost, nothing double, nothing altered, nothing left over")
    if not args.no_record:
        what = "random SIGKILLs of workers, nodes, the study's process and the driver; back: at work again, in s"
        more = {"asked": args.kills, "seed": args.seed, "summary": rows, "figures": figures, "found": found}
        keep("soak", what, [asdict(kill) for kill in kills], packages=["ray", "torch", "mlflow"], **more)
    return 1 if found else 0


# Linux's own word on processes


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> int:
    """0 when there is no such process."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _title(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    sys.exit(main())
