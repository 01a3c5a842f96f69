"""The training jobs of one group, a lane each: whoever ends makes room for the next, as in a server that batches.

How lanes are trained is `lanes`'s business, how a trial is begun, and what is done when lanes fail, the executor's.
What is left is who is in which lane. Every job's result is what the plain loop gives for it, within float tolerance:
a program that fails is given up, and its jobs are trained alone, where an error can be told of whom it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import EpochMetrics, Job, Result, TrainJob
from hpsearch.training.checkpoint import Checkpoint
from hpsearch.training.lanes import LanesRefused
from hpsearch.training.loop import DefaultTraining
from hpsearch.training.outcome import Curve
from hpsearch.training.user_code import is_out_of_memory


class Interrupted(Exception):
    """The worker was asked to stop between two epochs; the jobs at hand have no result and will be given out again."""


class Program(Protocol):
    """Trials of one group in one program (`lanes.LaneGroup`)."""

    def train_epoch(self) -> dict[int, EpochMetrics | TrialDiverged]: ...
    def join(self, training: DefaultTraining) -> None: ...
    def leave(self, trial: int) -> DefaultTraining: ...
    def checkpoint(self, trial: int, *, weights_only: bool = False, copy: bool = False) -> Checkpoint: ...


class Host(Protocol):
    """What runs the jobs: the executor."""

    @property
    def width(self) -> int:
        """Most lanes; 1: the jobs are trained alone."""

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        """The job's trial where the job begins, or the job's result where it cannot begin."""

    def alone(self, job: TrainJob) -> Result:
        """The job's result by the plain loop, from the job's beginning."""

    def program(self, trainings: Sequence[DefaultTraining]) -> Program:
        """A program for these.

        Raises:
            LanesRefused: they do not fit into one.
        """

    def fits(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        """Whether a trial may be in a program that is made for another."""

    def may_join(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        """Whether a trial may join a program that was made for another."""

    def objective(self, row: EpochMetrics) -> float: ...
    def told(self, job: TrainJob, epoch: int) -> None: ...
    def alive(self, jobs: Sequence[TrainJob]) -> AbstractContextManager[None]:
        """While inside, every job tells between batches that it is alive."""

    def stopped(self) -> bool: ...
    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining) -> Result:
        """What a job that is over has given."""

    def ended(self, job: TrainJob, training: DefaultTraining, result: Result) -> None:
        """The trial has left the program, with this result."""

    def refused(self, reason: str) -> None:
        """There is no program for some jobs, or it failed: the group is to be trained one by one."""

    def too_wide(self, n_lanes: int) -> None:
        """So many lanes ran out of memory: fewer are to go on."""


_Begun = tuple[TrainJob, DefaultTraining]


@dataclass(kw_only=True)
class _Lane:
    job: TrainJob
    curve: Curve
    began_at: float
    n_lanes: int = 1  # of its program, at most


class LaneJobs:
    """Some jobs of one group, and those that come to take their places."""

    def __init__(self, host: Host, *, more: Callable[[Job, int], Sequence[Job]]) -> None:
        """
        Args:
            more: gives up to n further jobs of the group.
        """
        self._host = host
        self._more = more
        self._waiting: deque[TrainJob] = deque()
        self._lanes: dict[int, _Lane] = {}  # by trial
        self._program: Program | None = None
        self._first: DefaultTraining | None = None  # what the program was made for

    def run(self, jobs: Sequence[TrainJob]) -> Iterator[Result]:
        """One result for each of these, and of those that were asked for.

        Raises:
            Interrupted: asked to stop between two epochs.
        """
        self._waiting.extend(jobs)
        last = jobs[-1]
        while self._host.width > 1:
            n_free = self._host.width - len(self._lanes) - len(self._waiting)
            if n_free > 0:
                self._waiting += [job for job in self._more(last, n_free) if isinstance(job, TrainJob)]
            begun: dict[int, _Begun] = {}
            while (job := self._next(begun)) is not None:
                last = job
                result = self._begin(job, begun)
                if result is not None:
                    yield result
            if not begun and not self._lanes:
                if not self._waiting:
                    return
                continue
            if self._host.stopped():
                raise Interrupted
            ended, alone = self._step(begun)
            while ended:
                yield self._result(*ended.pop(0))
            if not self._lanes:
                self._program = self._first = None
            for job in alone:
                yield self._host.alone(job)
        assert not self._lanes
        while self._waiting:
            yield self._host.alone(self._waiting.popleft())

    def _next(self, begun: Mapping[int, _Begun]) -> TrainJob | None:
        """The next job for a free lane, taken away; a trial whose lane is not free yet waits for it."""
        if len(self._lanes) + len(begun) >= self._host.width:
            return None
        job = next((job for job in self._waiting if job.trial not in self._lanes and job.trial not in begun), None)
        if job is not None:
            self._waiting.remove(job)
        return job

    def _begin(self, job: TrainJob, begun: dict[int, _Begun]) -> Result | None:
        """Put a trial among those that have begun; the job's result where it cannot begin."""
        training = self._host.begin(job)
        self._host.told(job, job.from_epoch)
        if isinstance(training, Result):
            return training
        begun[job.trial] = (job, training)
        return None

    def _step(self, begun: dict[int, _Begun]) -> tuple[list[tuple[_Lane, DefaultTraining]], list[TrainJob]]:
        """Admit trials and train an epoch: what has left its lane, its job being over, and jobs to be done alone.

        A program that fails is given up: all its jobs wait again, and are begun anew in the way that the host decides.
        """
        jobs = [*(lane.job for lane in self._lanes.values()), *(job for job, _ in begun.values())]
        reason: str | None = None
        try:
            with self._host.alive(jobs):
                alone = self._admit(list(begun.values()))
                return self._train_epoch(), alone
        except LanesRefused as refusal:
            reason = refusal.reason
        except UserCodeError as error:
            reason = error.message
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        begun.clear()  # memory that is held here cannot be given back
        self._program = self._first = None
        self._lanes.clear()
        self._waiting.extendleft(reversed(jobs))
        if reason is None:
            self._host.too_wide(len(jobs))
        else:
            self._host.refused(reason)
        return [], []

    def _admit(self, begun: Sequence[_Begun]) -> list[TrainJob]:
        """Put trials into free lanes; those that do not fit beside the others are given back."""
        if not begun:
            return []
        if self._program is None:
            self._first = begun[0][1]
            fitting = [(job, training) for job, training in begun if self._host.fits(self._first, training)]
            self._program = self._host.program([training for _, training in fitting])
        else:
            assert self._first is not None
            fitting = [(job, training) for job, training in begun if self._host.may_join(self._first, training)]
            for _, training in fitting:
                self._program.join(training)
        for job, _ in fitting:
            self._lanes[job.trial] = _Lane(job=job, curve=Curve(objective=job.best), began_at=time.perf_counter())
        return [job for job, _ in begun if job.trial not in self._lanes]

    def _train_epoch(self) -> list[tuple[_Lane, DefaultTraining]]:
        """Train every lane for an epoch; what has left its lane, its job being over."""
        assert self._program is not None
        rows = self._program.train_epoch()
        for lane in self._lanes.values():
            lane.n_lanes = max(lane.n_lanes, len(self._lanes))
        over = [trial for trial, row in rows.items() if self._take(self._lanes[trial], row)]
        return [(self._lanes.pop(trial), self._program.leave(trial)) for trial in over]

    def _take(self, lane: _Lane, row: EpochMetrics | TrialDiverged) -> bool:
        """Take a lane's epoch into account. True: its job is over.

        Raises:
            UserCodeError: the study's metric is not among those that the trial gave.
        """
        assert self._program is not None
        job, curve = lane.job, lane.curve
        if isinstance(row, TrialDiverged):
            curve.diverged = row.message
            return True
        value = self._host.objective(row)
        self._host.told(job, row.epoch)
        if row.epoch <= job.from_epoch:
            return False
        over = row.epoch >= job.to_epoch
        if curve.add(row, value):
            curve.best = self._program.checkpoint(job.trial, weights_only=True, copy=True)
        return over

    def _result(self, lane: _Lane, training: DefaultTraining) -> Result:
        result = self._host.result(lane.job, lane.curve, training)
        values = {**result.values, "lanes": lane.n_lanes} if lane.n_lanes > 1 else result.values
        result = replace(result, values=values, seconds=time.perf_counter() - lane.began_at)
        self._host.ended(lane.job, training, result)
        return result
