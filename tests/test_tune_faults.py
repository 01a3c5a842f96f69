"""What goes wrong on a cluster, with real processes: workers, nodes, the study's process, the driver, the head.

One cluster serves them all: a head without room for workers, and two nodes with room for one each.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpsearch import leases
from hpsearch.errors import ClusterError, JournalError
from hpsearch.events import Arrived
from hpsearch.fleets import Launch, watchdog
from hpsearch.fleets.tune import TuneFleet
from hpsearch.job import Job, Result, TrainJob
from hpsearch.journal import read_journal
from hpsearch.sampler import Sampler, trial_seed
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry, StudyState
from tests import fakes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = """
name: faults
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0}
  width: {values: [16, 32]}
early_stopping: {min_epochs: 1, max_epochs: 4, reduction_factor: 2}
ensemble: {pool: 4, size: 2}
"""
JOB_S = 0.25
BUSY_AGAIN_S = 10.0  # what the README promises
ON_ITS_WAY_S = 0.5  # that a result may be under way before the journal has it
HOLD = "hold"  # a note that keeps all jobs from ending
LEASE_S, SLACK_S = 3.0, 2.0  # instead of a minute and a quarter of one


# What the workers run, in Ray's processes; `notes` is a folder that test and workers share.


class SlowExecutor(fakes.FakeExecutor):
    """Takes its time over training, tells that it is alive, and writes down what it began."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            with (self.notes / "ran").open("a") as file:
                file.write(f"{job.key}\n")
            if isinstance(job, TrainJob):
                self.train(job, progress)
            yield from super().run([job], fetch, progress)

    def train(self, job: TrainJob, progress: Callable[[str, int], None]) -> None:
        self.work(job, progress, JOB_S)

    def work(self, job: TrainJob, progress: Callable[[str, int], None], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until or (self.notes / HOLD).exists():
            time.sleep(0.05)
            progress(job.key, job.from_epoch)


def make(spec: Spec, folder: Path, *, kind: type[SlowExecutor], notes: Path) -> SlowExecutor:
    return kind(notes)


# What every study must be after a fault


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def launch_of(tmp_path: Path, kind: type[SlowExecutor] = SlowExecutor) -> Launch:
    for name in ("project", "notes"):
        (tmp_path / name).mkdir()
    return Launch(
        run_dir=tmp_path / "run",
        spec=parse_spec(SPACE),
        folder=tmp_path / "project",
        make_sampler=fakes.make_sampler,
        make_executor=partial(make, kind=kind, notes=tmp_path / "notes"),
        lock_wait_s=5.0,
    )


class Run:
    """A study on the cluster, with something done to it while it runs."""

    def __init__(self, launch: Launch, cluster: Any) -> None:
        self.fleet = TuneFleet(launch, workers=2, address=cluster.address)
        self.state = StudyState()
        self._launch = launch
        self._deed: Callable[[Run], bool] = lambda run: True
        self._done = False
        self.done_at = 0.0  # unix time

    def go(self, deed: Callable[[Run], bool]) -> list[Entry]:
        """Run to the end; `deed` is called until it says that it is done."""
        self._deed = deed
        try:
            self.fleet.run(self._watch)
        finally:
            self.fleet.close()
        assert self._done
        return read_journal(self._launch.run_dir)

    def _watch(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.state.apply(entry.event, entry.time)
        if not self._done and self._deed(self):
            self._done, self.done_at = True, time.time()

    @property
    def in_mid_search(self) -> bool:
        """Some trials have finished a job, and both workers have one in their hands."""
        trained = sum(bool(trial.curve) for trial in self.state.trials.values())
        return trained >= 4 and len({lease.worker for lease in self.state.leases.values()}) == 2


def assert_right(entries: list[Entry], launch: Launch) -> StudyState:
    """Every trial keeps config, seed and curve; no result is lost, none is recorded twice."""
    state = StudyState.of(entries)
    assert state.done, state.ended
    assert not state.leases
    assert len(state.trials) == launch.spec.search.trials
    drawn = Counter(entry.event.trial for entry in entries if entry.event.type == "trial")  # type: ignore[union-attr]
    assert set(drawn.values()) == {1}
    finished = Counter(
        entry.event.key  # type: ignore[union-attr]
        for entry in entries
        if entry.event.type == "finished" and entry.event.outcome == "done"  # type: ignore[union-attr]
    )
    assert set(finished.values()) == {1}
    for number, trial in state.trials.items():
        assert trial.seed == trial_seed(launch.spec.seed, number)
        assert [row.epoch for row in trial.curve] == list(range(1, trial.epoch + 1))
        for row in trial.curve:
            assert row.metrics["val_loss"] == pytest.approx(fakes.val_loss(trial.config, row.epoch), abs=1e-12)
    return state


def events(entries: list[Entry], kind: str, since: float = 0.0) -> list[tuple[float, Any]]:
    return [(entry.time, entry.event) for entry in entries if entry.event.type == kind and entry.time >= since]


# Worker processes


def test_job_of_a_killed_worker_is_given_out_at_once_and_the_worker_is_back(tmp_path: Path, cluster: Any) -> None:
    launch = launch_of(tmp_path)
    hold = tmp_path / "notes" / HOLD
    held: list[str] = []
    killed: list[tuple[Arrived, float]] = []

    def kill_and_wait(run: Run) -> bool:
        if not hold.exists() and run.in_mid_search:
            hold.touch()  # a job is under way when the worker is killed, and work is left when it is back
        elif not killed and run.in_mid_search and time.time() > hold.stat().st_mtime + 2 * ON_ITS_WAY_S:
            held.extend(lease.key for lease in run.state.leases.values() if lease.worker == "worker-0")
            killed.append((run.state.seats["worker-0"], time.time()))
            os.kill(killed[0][0].pid, signal.SIGKILL)
        back = bool(killed) and run.state.seats["worker-0"] != killed[0][0]
        if back:
            hold.unlink()
        return back

    entries = Run(launch, cluster).go(kill_and_wait)
    assert_right(entries, launch)
    at = killed[0][1]
    assert {event.key for _, event in events(entries, "returned", at)} == set(held)
    back = next(when for when, _ in events(entries, "arrived", at))
    busy = next(when for when, event in events(entries, "leased", back) if event.worker == "worker-0")
    assert busy - at < BUSY_AGAIN_S


class HangingExecutor(SlowExecutor):
    """Hangs once in trial 5, after a sign of life, so that no Python code runs in its process any more.

    Whoever has the trial next takes its time, so that the search goes on until the process is replaced.
    """

    def train(self, job: TrainJob, progress: Callable[[str, int], None]) -> None:
        mark = self.notes / "hung"
        if job.key == "train/5/0-1" and mark.exists():
            (self.notes / HOLD).touch()
        self.work(job, progress, JOB_S)
        if job.trial == 5 and not mark.exists():
            self.work(job, progress, 1.5)  # a sign of life is told after a second
            mark.write_text(str(os.getpid()))
            ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock


class LateExecutor(SlowExecutor):
    """Takes several seconds over trial 5, in silence at last."""

    def train(self, job: TrainJob, progress: Callable[[str, int], None]) -> None:
        super().train(job, progress)
        if job.trial == 5 and job.from_epoch == 0:
            self.work(job, progress, 1.5)
            (self.notes / "late").touch()
            time.sleep(6)


def impatient_executor(spec: Spec, folder: Path, *, notes: Path) -> SlowExecutor:
    watchdog.SLACK_S = SLACK_S
    return HangingExecutor(notes)


def impatient_sampler(spec: Spec) -> Sampler:
    leases.SHORTEST_LEASE_S = leases.SHORTEST_FIRST_LEASE_S = LEASE_S
    leases.SILENCES = 1.0
    return fakes.make_sampler(spec)


def test_job_of_a_hung_worker_goes_to_another_and_its_process_is_replaced(tmp_path: Path, cluster: Any) -> None:
    launch = dataclasses.replace(
        launch_of(tmp_path),
        make_sampler=impatient_sampler,
        make_executor=partial(impatient_executor, notes=tmp_path / "notes"),
    )
    hold, key = tmp_path / "notes" / HOLD, "train/5/0-1"
    hung: list[Arrived] = []

    def wait_for_help_and_a_new_process(run: Run) -> bool:
        mark = tmp_path / "notes" / "hung"
        if not hung and mark.exists():
            hung.extend(seat for seat in run.state.seats.values() if str(seat.pid) == mark.read_text())
        ready = bool(hung) and run.state.seats[hung[0].worker] != hung[0] and hold.exists()
        if ready:
            hold.unlink()
        return ready

    entries = Run(launch, cluster).go(wait_for_help_and_a_new_process)
    state = assert_right(entries, launch)
    assert state.trials[5].crashes == 0
    first, then = [event.worker for _, event in events(entries, "leased") if event.key == key]
    assert first == hung[0].worker
    assert then != first
    (returned,) = [event for _, event in events(entries, "returned") if event.key == key]
    assert returned.reason == f"no progress for {LEASE_S:.0f} s"
    assert [event.worker for _, event in events(entries, "arrived")].count(first) == 2


class FatalExecutor(SlowExecutor):
    """Trial 5 ends whatever process it is trained in, as the kernel does where memory has run out."""

    def train(self, job: TrainJob, progress: Callable[[str, int], None]) -> None:
        if job.trial == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def test_trial_that_kills_every_process_fails_alone_and_says_so(tmp_path: Path, cluster: Any) -> None:
    launch = launch_of(tmp_path, FatalExecutor)
    entries = Run(launch, cluster).go(lambda run: True)
    state = StudyState.of(entries)
    assert state.done
    failed = [trial for trial in state.trials.values() if trial.failed]
    assert [trial.number for trial in failed] == [5]
    assert failed[0].message == (
        "the worker's process died 3 times in this job (out of memory, or a crash in native code)"
    )
    assert not failed[0].curve
    assert sum(trial.usable for trial in state.trials.values()) == len(state.trials) - 1


# Nodes


def killed(cluster: Any, node: Any) -> None:
    cluster.remove_node(node, allow_graceful=False)


def given_notice(cluster: Any, node: Any) -> None:
    """As a spot machine that is taken away: its raylet is asked to end."""
    (raylet,) = node.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGTERM)


@pytest.mark.parametrize("take_away", [killed, given_notice])
def test_job_of_a_lost_node_goes_on_elsewhere_and_a_new_node_gets_work(
    tmp_path: Path, cluster: Any, take_away: Callable[[Any, Any], None]
) -> None:
    launch = launch_of(tmp_path, LateExecutor)
    key = "train/5/0-1"
    hold = tmp_path / "notes" / HOLD
    at: dict[str, float] = {}
    seats: list[Any] = []

    def take_then_bring(run: Run) -> bool:
        lease = run.state.leases.get(key)
        if not at and lease is not None and (tmp_path / "notes" / "late").exists():
            seats.append(run.state.seats[lease.worker])
            at["taken"] = time.time()
            hold.touch()
            take_away(cluster, next(node for node in cluster.worker_nodes if node.node_id == seats[0].node))
        elif at and "brought" not in at and (lease is None or lease.worker != seats[0].worker):
            cluster.add_node(num_cpus=1)
            at["brought"] = time.time()
        back = "brought" in at and run.state.seats[seats[0].worker] != seats[0]
        if back:
            hold.unlink()
        return back

    entries = Run(launch, cluster).go(take_then_bring)
    assert_right(entries, launch)
    (returned,) = [(when, event) for when, event in events(entries, "returned") if event.key == key]
    back = next(when for when, event in events(entries, "arrived", at["brought"]) if event.worker == seats[0].worker)
    assert returned[1].reason == "its node went"
    assert returned[0] - at["taken"] < BUSY_AGAIN_S
    assert back - at["brought"] < 3 * BUSY_AGAIN_S


def test_frozen_worker_loses_its_job_to_another_and_takes_nothing_from_it_when_it_thaws(
    tmp_path: Path, cluster: Any
) -> None:
    launch = dataclasses.replace(launch_of(tmp_path, LateExecutor), make_sampler=impatient_sampler)
    at: dict[str, float] = {}
    frozen: list[int] = []
    key = "train/5/0-1"

    def freeze_then_thaw(run: Run) -> bool:
        lease = run.state.leases.get(key)
        if lease is not None and not frozen and (tmp_path / "notes" / "late").exists():
            frozen.append(run.state.seats[lease.worker].pid)
            at["frozen"] = time.time()
            os.kill(frozen[0], signal.SIGSTOP)
        elif frozen and lease is not None and run.state.seats[lease.worker].pid != frozen[0]:
            os.kill(frozen[0], signal.SIGCONT)
            return True
        return False

    entries = Run(launch, cluster).go(freeze_then_thaw)
    assert_right(entries, launch)
    # Whoever has it next is silent too, and on a slow machine loses it before the first one thaws.
    first, second, *_ = [event.worker for _, event in events(entries, "leased") if event.key == key]
    assert first != second


# The study's process


def study_pid(run: Run) -> int:
    import ray

    pid: int = ray.get(run.fleet._study.ready.remote())
    return pid


def test_study_goes_on_when_its_process_is_killed_and_no_running_job_is_begun_anew(
    tmp_path: Path, cluster: Any
) -> None:
    launch = launch_of(tmp_path, LateExecutor)
    key = "train/5/0-1"

    def kill(run: Run) -> bool:
        if key not in run.state.leases or not (tmp_path / "notes" / "late").exists():
            return False
        os.kill(study_pid(run), signal.SIGKILL)
        return True

    run = Run(launch, cluster)
    entries = run.go(kill)
    assert_right(entries, launch)
    assert len(events(entries, "opened")) == 2
    goes_on = next(when for when, _ in events(entries, "opened", run.done_at))
    assert goes_on - run.done_at < BUSY_AGAIN_S
    assert (tmp_path / "notes" / "ran").read_text().split().count(key) == 1


def test_journal_that_is_damaged_when_the_study_is_restarted_ends_it_with_its_line(
    tmp_path: Path, cluster: Any
) -> None:
    launch = launch_of(tmp_path)
    journal = launch.run_dir / "journal.jsonl"

    def kill(run: Run) -> bool:
        if not run.in_mid_search:
            return False
        os.kill(study_pid(run), signal.SIGKILL)
        time.sleep(0.1)
        content = journal.read_bytes()
        journal.write_bytes(content.replace(b'"type":"trial"', b'"type":"trail"', 1))
        return True

    with pytest.raises(JournalError, match=r"journal\.jsonl:\d+: the line is damaged"):
        Run(launch, cluster).go(kill)


def test_study_whose_process_dies_again_and_again_ends_with_a_clear_error(tmp_path: Path, cluster: Any) -> None:
    launch = dataclasses.replace(launch_of(tmp_path), spec=parse_spec(SPACE, overrides=["search.trials=512"]))
    pause = [0.0]

    def kill(run: Run) -> bool:
        if run.in_mid_search and time.monotonic() > pause[0]:
            pause[0] = time.monotonic() + 2.5  # until the driver has seen it
            os.kill(study_pid(run), signal.SIGKILL)
        return False

    with pytest.raises(ClusterError, match="the study's process died 5 times within 10 minutes"):
        Run(launch, cluster).go(kill)
