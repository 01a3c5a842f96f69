"""The worker: pulls jobs, runs them, pushes results.

How a job is run is the executor's business (torch's, or a fake), how the study is reached the client's (a method
call, or a Ray actor). What is left is this loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from hpsearch.errors import ClusterError, HpsearchError, OtherDataError, ProcessSpent, internal_error
from hpsearch.job import Assignment, DataInfo, Job, Result

PULL_S = 10.0  # how long one question for work may stay open
SHORT_JOB_S = 0.25  # after jobs shorter than this the next is asked for ahead, so that nobody waits for the answer
BATCH_S = 0.05  # jobs that fit into this are given and told together: a call costs as much as a tiny epoch
TELL_S = 1.0  # between two signs of life; with long leases a thirtieth of them


More = Callable[[Job, int], Sequence[Job]]
"""`more(job, n)`: up to n jobs that may share the program of `job`; none is waited for."""


class StudyClient(Protocol):
    """The study, as a worker sees it."""

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None: ...
    def hello(self, worker: str, info: DataInfo) -> Assignment: ...
    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment: ...
    def push(self, worker: str, results: Sequence[Result]) -> None: ...
    def progress(self, worker: str, keys: Sequence[str], waiting: Sequence[str] = ()) -> None: ...
    def fetch(self, ref: str) -> bytes: ...
    def broken(self, worker: str, error: HpsearchError) -> None: ...


class Executor(Protocol):
    """Runs jobs. Speaks of several at once: jobs of one group may share a program, a lane each."""

    def describe(self) -> DataInfo:
        """Load the data and tell what they are.

        Raises:
            HpsearchError: the task or its data cannot be used.
        """

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        """One result per job, as each ends; what a user's code or a config can cause is an outcome, never raised."""


@runtime_checkable
class HasLanes(Protocol):
    """An executor that may train several jobs in one program, and takes another job whenever a lane is free."""

    def fills(self, job: Job) -> bool:
        """Whether it would take others beside this job."""

    def run(
        self,
        jobs: Sequence[Job],
        fetch: Callable[[str], bytes],
        progress: Callable[[str, int], None],
        more: More | None = None,
    ) -> Iterator[Result]:
        """As an executor's; also one result for each job that it asks for."""


@runtime_checkable
class WearsOut(Protocol):
    """An executor that can become unfit for more work while its results are good."""

    def worn(self) -> str:
        """Why this process should make room for another, "" while it is good for more. Asked after each job."""


class Alarm(Protocol):
    """Ends the process when it is not set anew in time, whatever the process is stuck in."""

    def arm(self, silence_s: float) -> None: ...
    def disarm(self) -> None: ...


class Worker:
    """One worker's loop."""

    def __init__(
        self,
        name: str,
        client: StudyClient,
        make_executor: Callable[[], Executor],
        *,
        most_at_once: int = 1,
        node: str = "",
        pid: int = 0,
        alarm: Alarm | None = None,
    ) -> None:
        """
        Args:
            most_at_once: jobs to be given at once while they are very short; with more than 1, who gets which job
                depends on measured times.
            node: where its process runs, in Ray's words; "" where nobody needs to know.
            pid: of a process that is its own; 0 where it shares the study's.
            alarm: set while a job runs, with the silence that it is allowed at its beginning, when it may compile;
                None: a hung job is waited for.
        """
        self._name = name
        self._client = client
        self._make_executor = make_executor
        self._most_at_once = most_at_once
        self._node = node
        self._pid = pid
        self._alarm = alarm
        self._slots = 1
        self._executor: Executor | None = None
        self._last_job_s = float("inf")
        self._asked_ahead = False
        self._worn = ""
        self._assignment = Assignment()  # the last that had jobs
        # Key of a job, until its result was told -> whether it was worked on since the last sign of life.
        self._at_hand: dict[str, bool] = {}
        self._told_at = 0.0  # time of the last sign of life
        self._unsaid: list[Result] = []  # results that the study was not told yet
        self._said_at = 0.0

    def begin(self) -> bool:
        """Load the task and its data, and announce both. False: the study refused, and knows why."""
        try:
            self._client.arriving(self._name, self._node, self._pid)
            self._executor = self._make_executor()
            info = self._executor.describe()
            answer = self._client.hello(self._name, info)
        except HpsearchError as error:
            self._client.broken(self._name, error)
            return False
        except ProcessSpent:
            raise
        except Exception as error:  # a bug of ours must end the study with a word, not hang it
            self._client.broken(self._name, internal_error(error))
            return False
        if answer.error:
            self._client.broken(
                self._name,
                OtherDataError(
                    answer.error,
                    hint="seed every random choice in Task.data(); data changed on purpose need a new --run-dir",
                ),
            )
            return False
        if not info.resumable:  # its trials may live in this process: no other is taken before they are judged
            self._most_at_once = 0
        return not answer.ended

    def run(self) -> None:
        """Work until the study has ended or is gone.

        Raises:
            ProcessSpent: everything is told, nothing is held, and another process should go on.
        """
        try:
            if self.begin():
                while self.step(timeout_s=PULL_S):
                    if self._worn and not self._asked_ahead:  # else jobs are on their way to this process
                        if isinstance(self._client, LooksAhead):
                            self._client.settle()
                        raise ProcessSpent(self._worn)
        except ClusterError:
            return  # the study is gone; what was not pushed will be given out again
        except HpsearchError as error:  # of the study's own, met in an answer: it ends the study with a word
            with contextlib.suppress(ClusterError):
                self._client.broken(self._name, error)

    def step(self, timeout_s: float = 0.0) -> bool:
        """Ask once, run what is given. False: the study has ended."""
        assignment = self._client.pull(self._name, self._slots, timeout_s)
        self._asked_ahead = False
        if assignment.jobs:
            short = self._most_at_once and self._last_job_s < SHORT_JOB_S and not self._worn
            if short and isinstance(self._client, LooksAhead) and not self._fills(assignment.jobs[0]):
                self._client.look_ahead(self._name, self._slots, timeout_s)
                self._asked_ahead = True
            self._assignment = assignment
            try:
                self._run(assignment.jobs)
            finally:
                if self._alarm is not None:  # nobody is hung who waits for work
                    self._alarm.disarm()
        return not assignment.ended

    def _run(self, jobs: tuple[Job, ...]) -> None:
        start = self._said_at = self._told_at = time.perf_counter()
        self._at_hand = dict.fromkeys((job.key for job in jobs), False)
        self._arm()
        n_results, failed = 0, False
        try:
            for result in self._results(jobs):
                self._unsaid.append(dataclasses.replace(result, attempt=secrets.token_hex(4)))
                self._arm()
                n_results += 1
                failed |= result.outcome not in ("done", "diverged")
                if time.perf_counter() - self._said_at > BATCH_S:
                    self._say()
            self._say()
        except (HpsearchError, ProcessSpent):
            raise
        except Exception as error:
            self._client.broken(self._name, internal_error(error))
            raise ClusterError("the worker met an internal error") from error
        # After a crash one job at a time: the next may crash alike, and three of a kind end the study.
        self._last_job_s = float("inf") if failed else (time.perf_counter() - start) / max(n_results, len(jobs))
        at_once = 1 if self._fills(jobs[-1]) else self._most_at_once  # it asks for what fits into its lanes
        self._slots = max(1, min(at_once, int(BATCH_S / max(self._last_job_s, 1e-6))))
        self._worn = self._wear()

    def _results(self, jobs: tuple[Job, ...]) -> Iterator[Result]:
        assert self._executor is not None
        if isinstance(self._executor, HasLanes) and not self._asked_ahead:  # else the next jobs are on their way
            return self._executor.run(jobs, self._client.fetch, self._tell_progress, self._more)
        return self._executor.run(jobs, self._client.fetch, self._tell_progress)

    def _fills(self, job: Job) -> bool:
        return isinstance(self._executor, HasLanes) and self._executor.fills(job)

    def _wear(self) -> str:
        return self._executor.worn() if isinstance(self._executor, WearsOut) else ""

    def _more(self, job: Job, n: int) -> Sequence[Job]:
        self._say()  # what is to follow depends on it
        if self._wear():
            return ()
        assignment = self._client.pull(self._name, n, 0.0, job)
        # Whoever was silent for too long may be given again what it has: then only the lease is new.
        jobs = tuple(other for other in assignment.jobs if other.key not in self._at_hand)
        if jobs:
            self._assignment = assignment
            self._at_hand.update(dict.fromkeys((other.key for other in jobs), False))
            self._arm()
        return jobs

    def _say(self) -> None:
        """Push the results that the study has not been told."""
        unsaid, self._unsaid = self._unsaid, []
        if unsaid:
            self._client.push(self._name, unsaid)
        for result in unsaid:
            self._at_hand.pop(result.key, None)
        self._said_at = time.perf_counter()

    def _tell_progress(self, key: str, epoch: int) -> None:
        """A sign of life, for the study and the alarm; both cost more than a tiny epoch, so not every one is told.

        What one job does keeps all others at hand: they wait for it, or share its program.
        """
        if key not in self._at_hand:
            return
        self._at_hand[key] = True
        now = time.perf_counter()
        if now - self._told_at < max(TELL_S, self._assignment.lease_s / 30):
            return
        self._told_at = now
        working = [key for key, worked_on in self._at_hand.items() if worked_on]
        waiting = [key for key, worked_on in self._at_hand.items() if not worked_on]
        self._at_hand = dict.fromkeys(self._at_hand, False)
        self._client.progress(self._name, working, waiting)
        self._arm()

    def _arm(self) -> None:
        """Set the alarm anew, with the longer lease: a job given out twice costs a job, a process all that it holds."""
        if self._alarm is not None and self._assignment.first_lease_s:
            self._alarm.arm(self._assignment.first_lease_s)


class LooksAhead:
    """A client that can ask for the next jobs while the present ones run."""

    def look_ahead(self, worker: str, slots: int, timeout_s: float) -> None:
        """Ask now; the next `pull` takes the answer."""
        raise NotImplementedError  # abstract: each client has its own way to ask

    def settle(self) -> None:
        """Return when the study has everything that was pushed."""
        raise NotImplementedError  # abstract, like look_ahead
