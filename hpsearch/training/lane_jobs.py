"""The training jobs of one group, a lane each: whoever ends makes room for the next, as in a server that batches.

How lanes are trained is `lanes`'s business, how a trial is begun, and what is done when lanes fail, the executor's.
What is left is who is in which lane. Every job's result is what the plain loop gives for it, within float tolerance:
a program that fails is given up, and its jobs are trained alone, where an error can be told of whom it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        """The job's trial where the job begins, or the job's result where it cannot begin."""

    def alone(self, job: TrainJob) -> Result:
        """The job's result by the plain loop, from the job's beginning."""

    def program(self, trainings: Sequence[DefaultTraining]) -> Program | None:
        """A program for these; None when they do not fit into one."""

    def fits(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        """Whether a trial may join a program that was made for another."""

    def objective(self, row: EpochMetrics) -> float: ...
    def told(self, job: TrainJob, epoch: int) -> None: ...
    def alive(self, jobs: Sequence[TrainJob]) -> AbstractContextManager[None]:
        """While inside, every job tells between batches that it is alive."""

    def stopped(self) -> bool: ...
    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining, beside: Sequence[TrainJob]) -> Result:
        """What a job that is over has given. While checkpoints are packed, it and those beside it tell that they live.

        Args:
            training: the job's trial, where the job ended.
            beside: the other jobs of the program, which wait meanwhile.
        """

    def ended(self, job: TrainJob, training: DefaultTraining, result: Result) -> None:
        """The trial has left the program, with this result."""

    def too_wide(self, n_lanes: int) -> int:
        """So many lanes ran out of memory; how many to go on with."""


_Begun = tuple[TrainJob, DefaultTraining]


@dataclass(kw_only=True)
class _Lane:
    job: TrainJob
    curve: Curve
    began_at: float


class LaneJobs:
    """Some jobs of one group, and those that come to take their places."""

    def __init__(self, host: Host, *, width: int, more: Callable[[Job, int], Sequence[Job]]) -> None:
        """
        Args:
            width: most lanes.
            more: gives up to n further jobs of the group.
        """
        self._host = host
        self._width = width
        self._more = more
        self._lanes: dict[int, _Lane] = {}  # by trial
        self._program: Program | None = None
        self._first: DefaultTraining | None = None  # what the program was made for

    def run(self, jobs: Sequence[TrainJob]) -> Iterator[Result]:
        """One result for each of these, and of those that were asked for.

        Raises:
            Interrupted: asked to stop between two epochs.
        """
        waiting, last = deque(jobs), jobs[-1]
        while True:
            n_free = self._width - len(self._lanes) - len(waiting)
            if n_free > 0:
                waiting += [job for job in self._more(last, n_free) if isinstance(job, TrainJob)]
            begun: list[_Begun] = []
            while waiting and len(self._lanes) + len(begun) < self._width:
                last = waiting.popleft()
                training = self._host.begin(last)
                if isinstance(training, Result):
                    yield training
                else:
                    begun.append((last, training))
            if not begun and not self._lanes:
                if not waiting:
                    return
                continue
            if self._host.stopped():
                raise Interrupted
            jobs = [*(lane.job for lane in self._lanes.values()), *(job for job, _ in begun)]
            trouble, alone, ended = "", [], []
            try:
                alone = self._admit(begun)
                ended = self._train_epoch()
            except (UserCodeError, LanesRefused):
                trouble = "code"
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                trouble = "memory"
            begun = []  # what is held here cannot be given back
            if trouble:
                self._program = self._first = None
                self._lanes.clear()
                if trouble == "memory":
                    self._width = self._host.too_wide(len(jobs))
                if trouble == "memory" and self._width > 1:
                    waiting.extendleft(reversed(jobs))
                else:
                    alone = jobs
            for trial in ended:
                assert self._program is not None
                yield self._end(self._lanes.pop(trial), self._program.leave(trial))
            if not self._lanes:
                self._program = self._first = None
            for job in alone:
                yield self._host.alone(job)

    def _admit(self, begun: Sequence[_Begun]) -> list[TrainJob]:
        """Put trials into free lanes; those that do not fit beside the others are given back."""
        if not begun:
            return []
        if self._first is None:
            self._first = begun[0][1]
        fitting = [(job, training) for job, training in begun if self._host.fits(self._first, training)]
        if self._program is None:
            self._program = self._host.program([training for _, training in fitting])
            if self._program is None:
                return [job for job, _ in begun]
        else:
            for _, training in fitting:
                self._program.join(training)
        for job, _ in fitting:
            self._lanes[job.trial] = _Lane(job=job, curve=Curve(objective=job.best), began_at=time.perf_counter())
        entered = {job.trial for job, _ in fitting}
        return [job for job, _ in begun if job.trial not in entered]

    def _train_epoch(self) -> list[int]:
        """Train every lane for an epoch; trials whose job is over."""
        if self._program is None:
            return []
        with self._host.alive([lane.job for lane in self._lanes.values()]):
            rows = self._program.train_epoch()
        return [trial for trial, row in rows.items() if self._take(self._lanes[trial], row)]

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

    def _end(self, lane: _Lane, training: DefaultTraining) -> Result:
        beside = [other.job for other in self._lanes.values()]
        result = self._host.result(lane.job, lane.curve, training, beside)
        result = replace(result, seconds=time.perf_counter() - lane.began_at)
        self._host.ended(lane.job, training, result)
        return result
