"""A worker that is several processes: each trains the same trial on a GPU of its own, in step.

Rank 0 works for the study; the other ranks do as it does. Only training is done by all, since only the task's own `fit`
knows how to share it; ramps, predictions and exports are rank 0's alone, and the others wait. After every epoch the
ranks compare notes before any of them goes on, so that what happened to one (NaN, an exception, memory that ran out)
happens to all, and none is left behind in a collective that will never be complete.

Two ways lead from rank to rank, both besides the process group that belongs to `fit`: a group over gloo for jobs and
checkpoints, which waits as long as it takes and breaks when a process dies, and a store for notes, which can be waited
for with an end. An exception in the middle of an epoch leaves the others in a collective, where no note reaches them:
then the rank that raised it gives up the group, naming the job's outcome, and whoever hosts the group tells the study
and starts another.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hpsearch.errors import (
    ClusterError,
    DamagedBlob,
    HpsearchError,
    JournalError,
    ProcessSpent,
    TrialDiverged,
    UserCodeError,
)
from hpsearch.job import ConfirmJob, DataInfo, EpochMetrics, FoldJob, Job, Outcome, RebuildJob, Result, TrainJob
from hpsearch.training.checkpoint import Checkpoint
from hpsearch.training.loop import Training
from hpsearch.training.own_loop import OwnTraining
from hpsearch.training.user_code import describe, is_out_of_memory

SETTLE_S = 10.0  # that the others have to come to the same end, once one has met an error
WAIT_S = 60.0  # of one question to the store; asked again without end, so that a lost process is noticed by Ray first
FOREVER = timedelta(days=365)
LOST_PEER = ("closed by peer", "reset by peer", "gloo/transport", "NCCL", "Broken pipe")

T = TypeVar("T")
Fetch = Callable[[str], bytes]
Progress = Callable[[str, int], None]
SharedJob = TrainJob | RebuildJob | FoldJob | ConfirmJob
"""What all ranks train together; other jobs are rank 0's alone."""


class GroupBroken(ProcessSpent):
    """The processes of a group are no longer in step; another group has to be started.

    `result` is what the study is to be told of the job at hand; None when a process was lost, which is not the job's
    doing.
    """

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message, result)  # all of it, or it could not cross a process
        self.message = message
        self.result = result


@dataclass(frozen=True, kw_only=True)
class Note:
    """How a step ended on one rank."""

    outcome: Outcome | None = None  # None: not an outcome of the job's; the group is lost
    message: str = ""
    frame: str = ""
    traceback: str = ""
    cluster: bool = False  # the machine is at fault, not the task
    lost: bool = False  # another process is gone
    stop: bool = False  # the rank was asked to stop between two epochs

    @classmethod
    def of(cls, error: Exception | None, *, stop: bool = False) -> Note:
        """What there is to say of a step that raised this, or nothing."""
        if error is None:
            return cls(outcome="done", stop=stop)
        if is_lost_peer(error):
            return cls(message=describe(error), lost=True)
        if isinstance(error, TrialDiverged):
            return cls(outcome="diverged", message=error.message)
        if isinstance(error, UserCodeError):
            message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
            return cls(outcome="crashed", message=message, frame=error.frame, traceback=error.traceback)
        if isinstance(error, HpsearchError):
            return cls(outcome="crashed", message=error.message, cluster=isinstance(error, ClusterError))
        if is_out_of_memory(error):
            return cls(outcome="out_of_memory", message=describe(error))
        return cls(message=describe(error), traceback="".join(traceback.format_exception(error)))  # a bug of ours


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone, rather than that this one's code is wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in LOST_PEER):
            return True
        cause = cause.__cause__
    return False


def verdict(notes: Sequence[Note]) -> Note:
    """What a step came to, by the notes of all ranks: the worst counts, and of equals the lowest rank's.

    A crash or memory that ran out on some ranks alone says on which.
    """
    for outcome in (None, "crashed", "out_of_memory", "diverged"):
        ranks = [rank for rank, note in enumerate(notes) if note.outcome == outcome]
        if ranks:
            note = notes[ranks[0]]
            if len(ranks) == len(notes) or outcome == "diverged":
                return note
            where = f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {len(notes)}"
            return replace(note, message=f"{note.message} ({where})")
    return Note(outcome="done", stop=any(note.stop for note in notes))


class Group:
    """This process's place among those of its worker. `torch.distributed` is set up before."""

    def __init__(self, *, device: str, settle_s: float = SETTLE_S) -> None:
        """Every rank makes one, at the same time.

        Args:
            device: this process's own, as torch names it.
            settle_s: how long the others have to come to the same end, once one has met an error; longer than it takes
                until a process that was killed is noticed.
        """
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = torch.device(device)
        self._settle_s = settle_s
        self._n_steps = 0
        self._channel = dist.new_group(backend="gloo", timeout=FOREVER)
        self._store = self._opened_store()

    def abandon(self) -> None:
        """End the group before it began: the others are told by a note, for which they wait.

        Raises:
            GroupBroken: on every rank.
        """
        self._compare(Note(message="rank 0 was not let begin"), bounded=True)
        raise GroupBroken("rank 0 was not let begin")

    def tell(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; waits as long as rank 0 takes."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._channel)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank; waits as long as the slowest takes."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._channel)
        return cast("list[T]", values)

    def together(self, key: str, step: Callable[[], T], *, stop: bool = False, apart: bool = False) -> tuple[T, bool]:
        """What this rank's step gave, once all ranks have done theirs; and whether any was asked to stop.

        Args:
            key: of the job.
            stop: this rank was.
            apart: the step needs no other rank, so one that fails waits for the rest as long as they take.

        Raises:
            TrialDiverged, UserCodeError, ClusterError, torch.OutOfMemoryError: on every rank, when it was so on any.
            HpsearchError: with its traceback, when a rank met a defect of hpsearch.
            GroupBroken: the others cannot be waited for, or may not be in step again.
        """
        error: Exception | None = None
        try:
            value = step()
        except ProcessSpent:
            raise
        except Exception as raised:
            error = raised
        mine = Note.of(error, stop=stop)
        notes = self._compare(mine, bounded=not (apart or mine.outcome in ("done", "diverged")))
        if notes is None:
            there = [mine if rank == self.rank else Note(outcome="done") for rank in range(self.size)]
            raise GroupBroken(
                f"rank {self.rank} met an error that the others did not meet: {mine.message}",
                _result(key, verdict(there)),
            ) from error
        common = verdict(notes)
        if common.outcome == "done":
            return value, common.stop
        failed = common.outcome in ("crashed", "out_of_memory")
        if common.lost or (failed and not apart and not self._still_in_step(notes)):
            raise GroupBroken(common.message, _result(key, common)) from error
        if error is not None and all(note.outcome == mine.outcome for note in notes):
            raise error
        raise _raised(common) from error

    def _still_in_step(self, notes: Sequence[Note]) -> bool:
        """Whether the collectives of `fit` are known to be complete on every rank after a failure.

        Those of gloo are done when they return. On a GPU they may wait in a queue for a partner that will never come.
        """
        return self.device.type == "cpu" and len({note.outcome for note in notes}) == 1

    def _compare(self, mine: Note, *, bounded: bool) -> list[Note] | None:
        """All ranks' notes of this step; None when `bounded` and the others have not come in time."""
        self._n_steps += 1
        keys = [f"{self._n_steps}/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + self._settle_s if bounded else None
        try:
            self._store.set(keys[self.rank], json.dumps(vars(mine)))
            while not self._are_there(keys, deadline):
                if deadline is not None and time.monotonic() >= deadline:
                    return None
            notes = [Note(**json.loads(self._store.get(key))) for key in keys]
            if self._n_steps > 1:  # all have read those, or they would not be here
                self._store.delete_key(f"{self._n_steps - 1}/{self.rank}")
        except dist.DistNetworkError:  # it may go at any of these steps: the store is its
            raise GroupBroken("rank 0 is gone") from None
        return notes

    def _are_there(self, keys: list[str], deadline: float | None) -> bool:
        """Whether all keys are in the store, after a wait of at most WAIT_S, and not beyond the deadline."""
        left = WAIT_S if deadline is None else max(0.001, deadline - time.monotonic())
        try:
            self._store.wait(keys, timedelta(seconds=min(left, WAIT_S)))
        except dist.DistNetworkError:
            raise
        except dist.DistStoreError:  # not yet
            return False
        return True

    def _opened_store(self) -> TCPStore:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # rank 0's, as set by whoever set up torch.distributed
        if self.rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.tell(store.port)
            return store
        port: int = self.tell()
        return TCPStore(host, port, is_master=False, wait_for_workers=False)


class InStep:
    """A trial in training on every rank: what rank 0 reports counts on all, so that all decide alike."""

    def __init__(
        self, group: Group, key: str, start: Callable[[], Training], should_stop: Callable[[], bool] | None = None
    ) -> None:
        """
        Args:
            key: of the job.
            start: gives this rank's training; run on all ranks together.
            should_stop: asked of this rank between epochs; when one rank says yes, all stop.
        """
        self._group = group
        self._key = key
        self._should_stop = should_stop
        self.stop = False
        self.training = self._together(start)
        self.model = self.training.model
        self.epoch = self.training.epoch

    def train_epoch(self) -> EpochMetrics:
        row = self._together(self.training.train_epoch)
        told: tuple[EpochMetrics, bool] = self._group.tell((row, getattr(self.training, "resumable", True)))
        row, resumable = told
        self.epoch = self.training.epoch
        if isinstance(self.training, OwnTraining):
            self.training.resumable = resumable
        return row

    def checkpoint(self, *, weights_only: bool = False, copy: bool = False) -> Checkpoint:
        """This rank's; the study is told rank 0's."""
        return self._together(lambda: self.training.checkpoint(weights_only=weights_only, copy=copy))

    def _together(self, step: Callable[[], T]) -> T:
        asked = self._should_stop is not None and self._should_stop()
        value, stop = self._group.together(self._key, step, stop=asked)
        self.stop = self.stop or stop
        return value


class Member(Protocol):
    """An executor that can be one of a group."""

    def join(self, group: Group) -> None:
        """Train in step with the group from now on, on its device. Before the data are loaded."""

    def describe(self) -> DataInfo: ...
    def run(self, jobs: Sequence[Job], fetch: Fetch, progress: Progress) -> Iterator[Result]: ...
    def worn(self) -> str: ...


class GroupExecutor:
    """Rank 0's executor, as its worker sees it: training is everyone's, the rest its own."""

    def __init__(self, group: Group, make_member: Callable[[], Member]) -> None:
        """Every rank makes its own in `describe`, so that one that cannot be made is told like data that cannot be."""
        self._group = group
        self._make_member = make_member
        self._member: Member | None = None
        self._worn = ""

    def describe(self) -> DataInfo:
        """Every rank loads the data, one GPU each.

        Raises:
            UserCodeError: on any rank, or the ranks have different data.
        """
        self._member = _made(self._group, self._make_member)
        return _described(self._group, self._member)

    def run(self, jobs: Sequence[Job], fetch: Fetch, progress: Progress) -> Iterator[Result]:
        """One result per job, as rank 0 has it."""
        assert self._member is not None
        for job in jobs:
            if isinstance(job, SharedJob):
                content = _checkpoint_of(job, fetch)
                if isinstance(content, DamagedBlob):  # told by rank 0 alone: nobody has begun
                    values = {"ref": content.ref}
                    yield Result(key=job.key, outcome="damaged", values=values, message=content.why)
                    continue
                self._group.tell((job, content))
                results = list(self._member.run((job,), _instead(job, content, fetch), progress))
                self._worn = _worn(self._group, self._member)
                yield from results
            else:
                yield from self._member.run((job,), fetch, progress)

    def worn(self) -> str:
        """Why the group should make room for another: what the first rank that is worn says."""
        return self._worn

    def dismiss(self) -> None:
        """Let the other ranks go."""
        self._group.tell(("end", None))


def follow(group: Group, make_member: Callable[[], Member]) -> None:
    """The life of a rank that is not 0: load the data, do what rank 0 does, end when it does."""
    member: Member | None = None
    try:
        member = _made(group, make_member)
        _described(group, member)
    except HpsearchError:
        pass  # rank 0 has met the same; it tells the study, and says goodbye below
    while True:
        job, content = group.tell()
        if job == "end":
            return
        assert member is not None
        for _ in member.run((job,), _instead(job, content, _nothing), _unheard):
            pass
        _worn(group, member)


def _worn(group: Group, member: Member) -> str:
    return next(filter(None, group.gather(member.worn())), "")


def _made(group: Group, make_member: Callable[[], Member]) -> Member:
    def make() -> Member:
        member = make_member()
        member.join(group)
        return member

    return group.together("begin", make, apart=True)[0]


def _described(group: Group, member: Member) -> DataInfo:
    info = group.together("begin", member.describe, apart=True)[0]
    if len({one.fingerprint for one in group.gather(info)}) > 1:
        raise UserCodeError(
            f"Task.data() gave the {group.size} processes of one worker different data",
            hint="seed every random choice in Task.data(); each rank is given all of it, and takes its share in fit()",
        )
    return info


def _checkpoint_of(job: SharedJob, fetch: Fetch) -> bytes | JournalError | None:
    """The checkpoint that a job goes on from, or why it cannot be had."""
    if not isinstance(job, TrainJob) or job.checkpoint is None:
        return None
    try:
        return fetch(job.checkpoint)
    except JournalError as error:
        return error


def _instead(job: SharedJob, content: bytes | JournalError | None, fetch: Fetch) -> Fetch:
    """Gives what rank 0 fetched, so that every rank goes on from the same bytes."""

    def fetched(ref: str) -> bytes:
        if not isinstance(job, TrainJob) or ref != job.checkpoint:
            return fetch(ref)
        if isinstance(content, JournalError):
            raise content
        assert content is not None
        return content

    return fetched


def _nothing(ref: str) -> bytes:
    raise AssertionError(f"only rank 0 fetches ({ref})")


def _unheard(key: str, epoch: int) -> None:
    """Rank 0 tells of progress."""


def _raised(note: Note) -> Exception:
    if note.outcome is None:
        return HpsearchError(
            f"internal error: {note.message}", hint=f"please report this, with what follows\n{note.traceback}"
        )
    if note.cluster:
        return ClusterError(note.message)
    if note.outcome == "diverged":
        return TrialDiverged(note.message)
    if note.outcome == "out_of_memory":
        return torch.OutOfMemoryError(note.message)
    return UserCodeError(note.message, frame=note.frame, traceback=note.traceback)


def _result(key: str, note: Note) -> Result | None:
    if note.outcome is None:
        return None
    return Result(key=key, outcome=note.outcome, message=note.message, frame=note.frame, traceback=note.traceback)
