"""The study under any order of events: pulls, pushes, copies, late results, lost workers, silence, kills.

Hypothesis plays cluster, network and power cut against one study with fake workers and a fake clock. Halving is
synchronous, so whatever happens the study must come to what it comes to when nothing happens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hpsearch.assembly import open_study
from hpsearch.job import Job, Result, TrainJob
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.lane_groups import may_share
from hpsearch.leases import FIRST_LEASE_S, INHERIT_S, SHORTEST_LEASE_S
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from hpsearch.study import Study
from tests import fakes
from tests.same_study import held

SPACE = """
name: machine
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
lr_range: {seeds: 2, steps: 20}
early_stopping: {type: sha, min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
"""
WORKERS = ("a", "b", "c")
DIVERGES_ABOVE = 0.05  # so that some trials leave the search in its middle
CRASHES_ONCE = (2, 6)  # trials whose first attempt raises, as for want of a network
MOST_STEPS = 2000  # pulls that a study of this size may need to end

worker_names = st.sampled_from(WORKERS)


def outcome(state: StudyState) -> object:
    """All that a study came to, but for times, for who did what, and for attempts that failed."""
    assert state.compared is not None
    return (
        {n: (t.config, t.seed, t.curve, t.state, t.checkpoint) for n, t in sorted(state.trials.items())},
        sorted((str(r.branch), r) for r in state.ranges),
        state.selected,
        state.compared,
        {key: (result.outcome, result.values) for key, result in sorted(state.results.items())},
    )


def crash(job: Job, *, attempt: str) -> Result:
    message, frame = "OSError: no route to host", "task.py:7 in data"
    return Result(key=job.key, outcome="crashed", message=message, frame=frame, attempt=attempt)


class Play:
    """A study, its workers, and all that was ever seen of it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.run_dir = self.folder / "run"
        self.executor = fakes.FakeExecutor(diverge_above=DIVERGES_ABOVE)
        self.attempts: Counter[int] = Counter()  # by trial
        self.clock = 1000.0  # steady, s
        self.wall = 1_800_000_000.0  # unix time; jumps
        self.worked_s = 0.0  # while a driver lived
        self.hands: dict[str, list[Job]] = {name: [] for name in WORKERS}  # what each process is at
        self.under_way: list[tuple[str, Result]] = []  # results whose sender is gone, still in the network
        self.delivered: list[tuple[str, Result]] = []
        self.deaths: Counter[str] = Counter()
        self.configs: dict[int, object] = {}
        self.curves: dict[int, list[object]] = {}
        self.results: dict[str, object] = {}
        self.study = self.open(inherit=False)

    def open(self, *, inherit: bool) -> Study:
        return open_study(
            self.run_dir,
            parse_spec(SPACE),
            make_sampler=fakes.make_sampler,
            clock=lambda: self.wall,
            monotonic=lambda: self.clock,
            background=False,
            wait_s=0,
            inherit_leases=inherit,
        )

    def answer(self, job: Job) -> Result:
        if isinstance(job, TrainJob) and job.trial in CRASHES_ONCE:
            self.attempts[job.trial] += 1
            if self.attempts[job.trial] == 1:
                return crash(job, attempt=f"{job.trial}.1")
        (result,) = self.executor.run([job], lambda ref: b"", lambda key, epoch: None)
        return result

    def pass_time(self, seconds: float) -> None:
        self.clock += seconds
        self.wall += seconds
        self.worked_s += seconds

    def push(self, worker: str, result: Result) -> None:
        """A leased job's result must be in the journal when `push` returns."""
        owed = result.key in self.study.state.leases and (worker, result) not in self.delivered
        n_before = self.study.n_events
        self.study.push(worker, [result])
        self.delivered.append((worker, result))
        if owed and not self.study.ended:
            assert result.key not in self.study.state.leases
            assert self.study.n_events > n_before
        self.look()

    def look(self) -> None:
        """Nothing that was recorded is ever told otherwise."""
        state = self.study.state
        for number, trial in state.trials.items():
            assert self.configs.setdefault(number, (trial.config, trial.seed)) == (trial.config, trial.seed)
            known = self.curves.get(number, [])
            assert trial.curve[: len(known)] == known
            assert [row.epoch for row in trial.curve] == list(range(1, len(trial.curve) + 1))
            self.curves[number] = list(trial.curve)
        for key, result in self.results.items():
            assert state.results[key] == result
        self.results = dict(state.results)

    def kill(self) -> None:
        """SIGKILL: nothing more is written, the lock is free."""
        self.study._journal._file.close()
        self.study._journal._lock.close()

    def work(self, workers: tuple[str, ...] = WORKERS) -> None:
        """To the end, with nothing more in the way."""
        for worker in workers:
            self.study.arriving(worker)
            self.study.hello(worker, self.executor.describe())
        for step in range(MOST_STEPS):
            worker = workers[step % len(workers)]
            assignment = self.study.pull(worker)
            for job in assignment.jobs:
                self.push(worker, self.answer(job))
            if assignment.ended:
                return
        raise AssertionError(f"the study did not end within {MOST_STEPS} pulls")

    def close(self) -> None:
        self.study.close()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def undisturbed() -> object:
    play = Play()
    play.work(("a",))
    found = outcome(play.study.state)
    play.close()
    return found


class StudyMachine(RuleBasedStateMachine):
    """One study, and everything that may happen to it."""

    expected: object  # of the study that nothing happens to

    @initialize()
    def begin(self) -> None:
        self.play = Play()

    @rule(worker=worker_names, node=st.sampled_from(["", "n1", "n2"]), pid=st.integers(0, 3))
    def arrives(self, worker: str, node: str, pid: int) -> None:
        """A worker's process begins, for the first time or again; what the last one had sent may come later."""
        for key in [key for key, lease in self.play.study.state.leases.items() if lease.worker == worker]:
            self.spare(key)
        self.leave(worker)
        self.play.study.arriving(worker, node, pid)
        answer = self.play.study.hello(worker, self.play.executor.describe())
        assert answer.error == ""

    @rule(worker=worker_names, slots=st.integers(1, 4))
    def pulls(self, worker: str, slots: int) -> None:
        assignment = self.play.study.pull(worker, slots)
        held = {key: lease.worker for key, lease in self.play.study.state.leases.items()}
        for job in assignment.jobs:
            assert held[job.key] == worker
            self.play.hands[worker].append(job)

    @rule(worker=worker_names, slots=st.integers(1, 4), data=st.data())
    def fills_its_lanes(self, worker: str, slots: int, data: st.DataObject) -> None:
        """A worker asks for jobs that may share the program of one that it has, or had when it was last heard from."""
        if not self.play.hands[worker]:
            return
        first = data.draw(st.sampled_from(self.play.hands[worker]))
        for job in self.play.study.pull(worker, slots, 0.0, first).jobs:
            assert may_share(first, job)
            assert self.play.study.state.leases[job.key].beside == first.key
            self.play.hands[worker].append(job)

    @rule(worker=worker_names, together=st.booleans(), data=st.data())
    def pushes(self, worker: str, together: bool, data: st.DataObject) -> None:
        """A worker ends one of its jobs, or all of them."""
        jobs = self.play.hands[worker]
        if not jobs:
            return
        done = list(jobs) if together else [data.draw(st.sampled_from(jobs))]
        for job in done:
            jobs.remove(job)
            self.play.push(worker, self.play.answer(job))

    @rule(worker=worker_names, data=st.data())
    def shows_life(self, worker: str, data: st.DataObject) -> None:
        if self.play.hands[worker]:
            self.play.study.progress(worker, [data.draw(st.sampled_from(self.play.hands[worker])).key])

    @rule(worker=worker_names, key=st.sampled_from(["train/99/0-1", "train/0/0-9", "ramp/no/0", "export/3"]))
    def shows_life_of_what_nobody_gave(self, worker: str, key: str) -> None:
        if key.startswith("train/99"):
            self.play.study.progress(worker, [key])
            assert key not in self.play.study.state.leases

    @rule(worker=worker_names)
    def is_lost(self, worker: str) -> None:
        """Its node goes; the driver hears of it."""
        self.leave(worker)
        self.play.study.lost(worker)
        assert all(lease.worker != worker for lease in self.play.study.state.leases.values())

    @rule(worker=worker_names)
    def is_taken_for_lost(self, worker: str) -> None:
        """The driver errs: the worker goes on with what it has."""
        self.play.study.lost(worker)

    @precondition(lambda self: self.play.under_way)
    @rule(data=st.data())
    def late_result_comes(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.play.under_way))
        self.play.under_way.remove(pair)
        self.play.push(*pair)

    @precondition(lambda self: self.play.delivered)
    @rule(data=st.data())
    def result_comes_again(self, data: st.DataObject) -> None:
        """A copy, sent again since the answer was lost."""
        n_before = self.play.study.n_events
        self.play.push(*data.draw(st.sampled_from(self.play.delivered[-4:])))
        assert self.play.study.n_events == n_before

    @rule(seconds=st.sampled_from([0.1, 5.0, INHERIT_S + 1, SHORTEST_LEASE_S + 1, FIRST_LEASE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        """Up to more than any lease: silent workers lose their jobs, and go on with them."""
        study = self.play.study
        for key, limit in study._book.overdue(self.play.clock + seconds):
            if limit != INHERIT_S:
                self.spare(key)
        self.play.pass_time(seconds)

    def spare(self, key: str) -> None:
        """A job that goes wrong three times, by death or silence, is to blame, which is another test's matter.

        So what went wrong once is taken from its worker before it goes wrong again.
        """
        lease = self.play.study.state.leases.get(key)
        if lease is not None and self.play.deaths[key]:
            self.play.study.lost(lease.worker)
        self.play.deaths[key] += 1

    @rule(seconds=st.sampled_from([-3600.0, 86400.0]))
    def clock_is_set(self, seconds: float) -> None:
        self.play.wall += seconds

    @rule(inherit=st.booleans(), down_s=st.sampled_from([0.0, 3.0, 1e6]), torn=st.booleans())
    def is_killed(self, inherit: bool, down_s: float, torn: bool) -> None:
        """The study's process dies; with `inherit` the workers and the driver live, else all begin anew."""
        play = self.play
        play.kill()
        if torn:  # a line that was being written
            with (play.run_dir / FILE_NAME).open("ab") as file:
                file.write(b'{"seq":7,"fence":1,"ti')
        play.clock += down_s
        play.wall += down_s
        before = StudyState.of(read_journal(play.run_dir))
        held = set(before.leases)
        play.study = play.open(inherit=inherit)
        assert play.study.state.worked_s <= play.worked_s + 0.001
        if inherit and not play.study.ended:
            assert set(play.study.state.leases) == held
        else:
            assert not play.study.state.leases
            for worker in WORKERS:
                self.leave(worker)
        play.look()

    def leave(self, worker: str) -> None:
        """A process goes; what it had done is in the network still."""
        self.play.under_way += [(worker, self.play.answer(job)) for job in self.play.hands[worker]]
        self.play.hands[worker] = []

    @invariant()
    def nothing_recorded_changes(self) -> None:
        assert self.play.study.failure is None
        self.play.look()

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        play = self.play
        try:
            for worker in WORKERS:
                self.leave(worker)
                play.study.lost(worker)
            play.work()
            assert play.study.state.done
            assert not play.study.state.leases
            assert outcome(play.study.state) == self.expected
            self.require_a_whole_journal()
        finally:
            play.close()

    def require_a_whole_journal(self) -> None:
        """As read from the disk: the same study, its leases in order, its time never turned back or stretched."""
        entries = read_journal(self.play.run_dir)
        assert outcome(StudyState.of(entries)) == self.expected
        times = [entry.time for entry in entries]
        assert times == sorted(times)
        assert held(entries) == set()


def test_copy_of_a_crash_that_comes_while_the_retry_is_under_way_is_no_second_crash() -> None:
    """The worker's answer was lost with the study's process, so it sends again what is in the journal already."""
    play = Play()
    for worker in ("a", "b"):
        play.study.arriving(worker)
        play.study.hello(worker, play.executor.describe())
    (job,) = play.study.pull("a").jobs
    while not isinstance(job, TrainJob):
        play.study.push("a", [play.answer(job)])
        (job,) = play.study.pull("a").jobs
    crashed = crash(job, attempt="first")
    play.study.push("a", [crashed])
    play.kill()
    play.study = play.open(inherit=True)
    assert play.study.pull("b").jobs == (job,)
    play.study.push("a", [crashed])
    assert job.key in play.study.state.leases
    play.study.push("b", [crash(job, attempt="second")])
    assert play.study.state.trials[0].failed
    play.close()


@pytest.mark.slow
def test_whatever_happens_the_study_comes_to_the_same(undisturbed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is on disk is not the question, and there are many
    StudyMachine.expected = undisturbed
    # To shrink what it finds takes minutes: add Phase.shrink when there is something to look at.
    few = settings(max_examples=150, stateful_step_count=50, phases=[Phase.generate])
    run_state_machine_as_test(StudyMachine, settings=few)
