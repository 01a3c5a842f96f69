"""The study in a process of its own, and the way to it: Ray's actor, its client, a worker's life.

Both ends of one conversation stand here, so that what a method sends and what its caller expects are read together.

When the study's process dies, Ray starts another, which opens the journal again, and Ray sends again what was not
answered: calls wait, they do not fail. So every call may arrive twice, and the study takes that: a second copy of a
result is passed over, and a job whose assignment was lost on the way is given out again when its lease ends. Workers
answer the roll call of the new process, so that it takes no running job away from them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hpsearch.errors import ClusterError, HpsearchError, internal_error
from hpsearch.fleets import Launch
from hpsearch.fleets.watchdog import Watchdog
from hpsearch.job import Assignment, DataInfo, Job, Result
from hpsearch.leases import INHERIT_S
from hpsearch.study import Study
from hpsearch.worker import Executor, LooksAhead, Worker

JOBS_AT_ONCE = 8  # that a worker may hold while they are shorter than a call
PRESENT_EVERY_S = INHERIT_S / 3  # that a worker with a long silent job says which it has
PING_EVERY_S = 1.0  # whether the study's process is alive
RIDE_OUT_S = 120.0  # that it may take to be back, its journal read
MOST_DEATHS = 5  # of the study's process within DEATHS_S: it would die again
DEATHS_S = 600.0
RESUME = "hpsearch launch --resume goes on from here"

# Ray's part of riding out a death: it restarts the process and repeats the calls, as often as needed. When to give up
# is the driver's decision (Pulse).
RESTARTED = {"max_restarts": -1, "max_task_retries": -1}


class StudyActor:
    """The study in a process of its own: the same methods, opened from a launch."""

    def __init__(self, launch: Launch) -> None:
        import ray

        # Begun anew by Ray, under a driver and workers that live.
        self._restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._present: set[tuple[str, str]] = set()  # (worker, key) that have answered this process's roll call
        self._error: HpsearchError | None = None
        try:
            self._opened = launch.open_study(background=True, inherit_leases=self._restarted)
        except HpsearchError as error:  # raised from `ready`, where the driver can tell it from a lost actor
            self._error = error
        except Exception as error:
            self._error = internal_error(error)

    @property
    def _study(self) -> Study:
        """Raises what kept it from being opened."""
        if self._error is not None:
            raise self._error
        return self._opened

    def ready(self) -> int:
        """This process's id; another one tells of a restart."""
        assert self._study is not None
        return os.getpid()

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        self._study.arriving(worker, node, pid)

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        return self._study.hello(worker, info)

    def pull(self, worker: str, slots: int, timeout_s: float, beside: Job | None = None) -> Assignment:
        return self._study.pull(worker, slots, timeout_s, beside)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._study.push(worker, results)

    def progress(self, worker: str, keys: Sequence[str], waiting: Sequence[str] = ()) -> None:
        self._study.progress(worker, keys, waiting)

    def present(self, worker: str, keys: Sequence[str]) -> None:
        """A worker's answer to the roll call of a study that was restarted: these jobs are in its hands.

        It counts once: said again and again by a thread of a process that hangs, it is no sign of life.
        """
        if not self._restarted:
            return
        for key in keys:
            if (worker, key) not in self._present:
                self._present.add((worker, key))
                self._study.progress(worker, [key])

    def fetch(self, ref: str) -> bytes:
        return self._study.fetch(ref)

    def broken(self, worker: str, error: HpsearchError) -> None:
        if self._error is None:
            self._study.broken(worker, error)

    def lost(self, worker: str, pid: int, reason: str, blame_job: bool) -> None:
        """The driver's word that a process of a worker is gone; passed over when another has arrived since."""
        seat = self._study.workers().get(worker)
        if seat is None or seat.pid == pid:
            self._study.lost(worker, reason, blame_job=blame_job)

    def stop(self, reason: str) -> None:
        if self._error is None:
            self._study.stop(reason)

    def close(self) -> HpsearchError | None:
        """Keep what was pushed; why the study stopped early, None when it did not."""
        if self._error is not None:
            return self._error
        self._study.close()
        return self._study.failure


class ActorClient(LooksAhead):
    """The study actor, as a worker sees it. Rides out its restarts; raises ClusterError when it is gone for good."""

    def __init__(self, study: Any) -> None:
        self._study = study
        self._ahead: Any = None
        self._unread: list[Any] = []  # answers to pushes, read a few later so that nobody waits for the driver
        self._hands: dict[str, None] = {}  # keys of the jobs that were given here and not pushed yet
        self._spoke_at = time.monotonic()

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        answer(self._study.arriving.remote(worker, node, pid))

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        told: Assignment = answer(self._study.hello.remote(worker, info))
        return told

    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
        asked, self._ahead = self._ahead, None
        assert asked is None or beside is None, "what was asked ahead is for whoever has nothing in hand"
        if asked is None:
            asked = self._study.pull.remote(worker, slots, timeout_s, beside)
        told: Assignment = answer(asked)
        self._hands.update(dict.fromkeys(job.key for job in told.jobs))
        return told

    def look_ahead(self, worker: str, slots: int, timeout_s: float) -> None:
        self._ahead = self._study.pull.remote(worker, slots, timeout_s)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._spoke_at = time.monotonic()
        self._unread.append(self._study.push.remote(worker, results))
        for result in results:
            self._hands.pop(result.key, None)
        if len(self._unread) > 4:
            answer(self._unread.pop(0))

    def settle(self) -> None:
        while self._unread:
            answer(self._unread.pop(0))

    def progress(self, worker: str, keys: Sequence[str], waiting: Sequence[str] = ()) -> None:
        self._spoke_at = time.monotonic()
        self._study.progress.remote(worker, keys, waiting)

    def answer_roll_calls(self, worker: str) -> None:
        """Say which jobs are in this worker's hands while nothing else is said of them; never returns.

        For a thread: a study that was restarted must hear of a job that says nothing for minutes.
        """
        while True:
            time.sleep(PRESENT_EVERY_S)
            keys = list(self._hands)
            if keys and time.monotonic() - self._spoke_at >= PRESENT_EVERY_S:
                self._study.present.remote(worker, keys)

    def fetch(self, ref: str) -> bytes:
        content: bytes = answer(self._study.fetch.remote(ref))
        return content

    def broken(self, worker: str, error: HpsearchError) -> None:
        answer(self._study.broken.remote(worker, error))


class Pulse:
    """The driver's eye on the study's process: waits while it is restarted, and says when that makes no sense."""

    def __init__(self, study: Any, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._study = study
        self._clock = clock
        self._question: Any = None
        self._asked_at = float("-inf")
        self._pid = 0
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)

    def check(self) -> None:
        """Ask whether the process lives, once a second; never waits for the answer.

        Raises:
            HpsearchError: the study could not be opened, or stopped answering.
            ClusterError: its process cannot come back, or dies again and again.
        """
        now = self._clock()
        if self._question is None:
            if now - self._asked_at >= PING_EVERY_S:
                self._question, self._asked_at = self._study.ready.remote(), now
        elif is_answered(self._question):
            question, self._question = self._question, None
            self._count(answer(question), now)
        elif now - self._asked_at > RIDE_OUT_S:
            raise ClusterError(f"the study's process has not answered for {RIDE_OUT_S:.0f} s", hint=RESUME)

    def _count(self, pid: int, now: float) -> None:
        if self._pid and pid != self._pid:
            self._deaths.append(now)
            if len(self._deaths) == MOST_DEATHS and now - self._deaths[0] < DEATHS_S:
                raise ClusterError(
                    f"the study's process died {MOST_DEATHS} times within {DEATHS_S / 60:.0f} minutes",
                    hint=f"is this machine out of memory? {RESUME}",
                )
        self._pid = pid


def work_for(study: str, namespace: str, name: str, make_executor: Callable[[], Executor]) -> None:
    """A worker's life, in the process that it was given.

    Raises:
        ProcessSpent: another process has to go on.
    """
    import ray

    client = ActorClient(ray.get_actor(study, namespace))
    threading.Thread(target=client.answer_roll_calls, args=(name,), name="roll-call", daemon=True).start()
    Worker(
        name,
        client,
        make_executor,
        most_at_once=JOBS_AT_ONCE,
        node=ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        alarm=Watchdog(),
    ).run()


def is_answered(ref: Any, within_s: float = 0.0) -> bool:
    """Whether a remote call has ended, well or badly; returns when it has, or after that time."""
    import ray

    return bool(ray.wait([ref], timeout=within_s)[0])


def answer(ref: Any, timeout_s: float | None = None) -> Any:
    """The answer to a remote call; its own HpsearchError, or ClusterError when the study is gone."""
    import ray

    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        raise (cause if isinstance(cause, HpsearchError) else internal_error(error)) from None
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise ClusterError(f"the study's process is gone: {type(error).__name__}", hint=RESUME) from None
