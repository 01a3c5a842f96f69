"""The study in a process of its own, and the way to it: Ray's actor, its client, a worker's life.

Both ends of one conversation stand here, so that what a method sends and what its caller expects are read together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpsearch.errors import ClusterError, HpsearchError, internal_error
from hpsearch.fleets import Launch
from hpsearch.job import Assignment, DataInfo, Result
from hpsearch.worker import LooksAhead, Worker

JOBS_AT_ONCE = 8  # that a worker may hold while they are shorter than a call


class StudyActor:
    """The study in a process of its own: the same methods, opened from a launch."""

    def __init__(self, launch: Launch) -> None:
        self._error: HpsearchError | None = None
        try:
            self._study = launch.open_study(background=True)
        except HpsearchError as error:  # raised from `ready`, where the driver can tell it from a lost actor
            self._error = error
        except Exception as error:
            self._error = internal_error(error)

    def ready(self) -> None:
        if self._error is not None:
            raise self._error

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        self.ready()
        self._study.arriving(worker, node, pid)

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        return self._study.hello(worker, info)

    def pull(self, worker: str, slots: int, timeout_s: float) -> Assignment:
        return self._study.pull(worker, slots, timeout_s)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._study.push(worker, results)

    def progress(self, worker: str, key: str) -> None:
        self._study.progress(worker, key)

    def fetch(self, ref: str) -> bytes:
        return self._study.fetch(ref)

    def broken(self, worker: str, error: HpsearchError) -> None:
        if self._error is None:
            self._study.broken(worker, error)

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
    """The study actor, as a worker sees it. Raises ClusterError when it is gone."""

    def __init__(self, study: Any) -> None:
        self._study = study
        self._ahead: Any = None
        self._unread: list[Any] = []  # answers to pushes, read a few later so that nobody waits for the driver

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        answer(self._study.arriving.remote(worker, node, pid))

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        told: Assignment = answer(self._study.hello.remote(worker, info))
        return told

    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0) -> Assignment:
        asked, self._ahead = self._ahead, None
        told: Assignment = answer(asked if asked is not None else self._study.pull.remote(worker, slots, timeout_s))
        return told

    def look_ahead(self, worker: str, slots: int, timeout_s: float) -> None:
        self._ahead = self._study.pull.remote(worker, slots, timeout_s)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._unread.append(self._study.push.remote(worker, results))
        if len(self._unread) > 4:
            answer(self._unread.pop(0))

    def progress(self, worker: str, key: str) -> None:
        self._study.progress.remote(worker, key)

    def fetch(self, ref: str) -> bytes:
        content: bytes = answer(self._study.fetch.remote(ref))
        return content

    def broken(self, worker: str, error: HpsearchError) -> None:
        answer(self._study.broken.remote(worker, error))


def work_for(study: str, namespace: str, launch: Launch, name: str) -> None:
    """A worker's life, in the process that Tune gave it."""
    import ray

    client = ActorClient(ray.get_actor(study, namespace))
    Worker(name, client, launch.executor, most_at_once=JOBS_AT_ONCE).run()


def answer(ref: Any, timeout_s: float | None = None) -> Any:
    """The answer to a remote call; its own HpsearchError, or ClusterError when the study is gone."""
    import ray

    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        raise (cause if isinstance(cause, HpsearchError) else internal_error(error)) from None
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise ClusterError(
            f"the study's process is gone: {type(error).__name__}", hint="hpsearch launch --resume goes on from here"
        ) from None
