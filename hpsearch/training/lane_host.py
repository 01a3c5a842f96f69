"""How an executor's jobs come into lanes: how many, by which route, and what of a trial is kept at hand.

Measured once for each group of trials and kept: how many lanes pay, and how they are fused. A group that cannot be
fused, or is not faster so, is trained by the plain loop from then on, and says why once. Measuring costs some tens of
steps, so nothing is measured before a group has been trained for a while: most groups of a wide space never are.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from hpsearch.errors import UserCodeError
from hpsearch.job import EpochMetrics, EvaluateJob, Job, RampJob, Result, TrainJob
from hpsearch.lane_groups import group_key
from hpsearch.lr_curve import ramp_lrs
from hpsearch.training import lane_evaluations
from hpsearch.training.lane_evaluations import EvaluationLanes
from hpsearch.training.lane_jobs import LaneJobs, Program
from hpsearch.training.lanes import LaneGroup, LanesRefused, Route, best_width, can_fuse, find_route, fused_ramps
from hpsearch.training.loop import DefaultTraining
from hpsearch.training.outcome import Curve
from hpsearch.training.user_code import describe, is_out_of_memory
from hpsearch.training.width_notes import WidthNotes

MEASURE_AFTER_TRIALS = 2  # of a group, trained by the plain loop: one that nobody follows needs no lanes
MEASURE_AFTER_S = 0.15  # of their training: as much as measuring takes of a small network, and trying its first program
MEASURE_AFTER_STEPS = 150  # of theirs: measuring takes some tens of steps of a large one
MEASURE_FOR_S = 2.0  # that the rest of the group, as far as is known, would take the plain loop: then at once
MEASURE_FOR_STEPS = 50  # of those that were trained, at least
MOST_RAMPS = 16  # at once, where nobody says how many lanes
KEPT_SHARE = 0.25  # of a GPU's memory, for paused trials
KEPT_BYTES_CPU = 256 << 20


class Plain(lane_evaluations.Plain, Protocol):
    """The executor: what lanes need of it."""

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        """The job's trial where the job begins, or the job's result where it cannot begin."""

    def begin_ramp(self, job: RampJob) -> DefaultTraining | Result:
        """The network that is ramped, and what trains it; or the job's result where it cannot begin."""

    def objective(self, row: EpochMetrics) -> float: ...
    def told(self, job: TrainJob, epoch: int) -> None: ...
    def stopped(self) -> bool: ...
    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining) -> Result:
        """What a job that is over has given; while checkpoints are packed, it is at work."""

    def remember(self, result: Result) -> None:
        """Keep the result's checkpoints, as bytes."""


@dataclass(kw_only=True)
class _Plan:
    """What is known of a group."""

    width: int
    route: Route | None = None
    like: DefaultTraining | None = None  # of the structure whose trials were compared by this route, several at once
    why: str = ""  # one lane is the most, and nobody was told yet


@dataclass(kw_only=True)
class _Spent:
    """What the plain loop has trained of a group."""

    trials: set[int] = field(default_factory=set)
    seconds: float = 0.0
    n_steps: int = 0


def is_worth_measuring(*, n_trials: int, seconds: float, n_steps: int, n_expected: float = 0.0) -> bool:
    """Whether lanes are to be measured for a group: the plain loop has trained it for as long as measuring takes, or
    what is to come of it would take much longer.

    Args:
        n_trials: of the group, that this worker has trained by the plain loop.
        seconds: that they took.
        n_steps: of theirs.
        n_expected: trials of the group in the whole study.

    >>> is_worth_measuring(n_trials=2, seconds=0.5, n_steps=150)
    True
    >>> is_worth_measuring(n_trials=1, seconds=60.0, n_steps=9000)
    False
    >>> is_worth_measuring(n_trials=9, seconds=0.1, n_steps=9000)
    False
    >>> is_worth_measuring(n_trials=9, seconds=60.0, n_steps=149)
    False
    >>> is_worth_measuring(n_trials=2, seconds=0.05, n_steps=80, n_expected=100)
    True
    """
    if n_trials < MEASURE_AFTER_TRIALS:
        return False
    if seconds >= MEASURE_AFTER_S and n_steps >= MEASURE_AFTER_STEPS:
        return True
    return n_steps >= MEASURE_FOR_STEPS and seconds / n_trials * (n_expected - n_trials) >= MEASURE_FOR_S


class Lanes:
    """The lanes of one worker, over its life."""

    def __init__(self, most: int | None, device: torch.device, group_sizes: Mapping[str, float] | None = None) -> None:
        """
        Args:
            most: lanes that are asked for, whether they pay or not; None: as many as pay.
            group_sizes: trials of each group in the whole study, as far as is known.
        """
        self._most = most
        self._group_sizes = group_sizes or {}
        self._device = device
        self._notes = WidthNotes(None)
        self._plans: dict[str, _Plan] = {}
        self._evaluations = EvaluationLanes(most, device)
        self._spent: defaultdict[str, _Spent] = defaultdict(_Spent)  # by group
        self._paused: OrderedDict[int, DefaultTraining] = OrderedDict()  # trials with their state on the device
        self._paused_bytes = 0

    def share(self, notes: WidthNotes) -> None:
        """Take the widths that other workers of this machine have measured, and tell them those that are measured here.

        On a GPU that depends on the memory that each finds free there, so nothing is shared.
        """
        if self._device.type == "cpu":
            self._notes = notes

    def may_take(self, job: Job) -> bool:
        """Whether a job goes into lanes, as far as is known."""
        if self._most == 1:
            return False
        if isinstance(job, RampJob):  # too few steps to measure what pays
            return self._most is not None or self._device.type == "cuda"
        if isinstance(job, EvaluateJob):
            return self._evaluations.may_take(job)
        if not isinstance(job, TrainJob):
            return False
        group = group_key(job.config)
        plan = self._plans.get(group)
        if plan is None:
            return self._most is not None or self._is_known(group) or self._is_worth_measuring(group)
        return plan.width > 1

    def _is_known(self, group: str) -> bool:
        """Whether another worker has measured that lanes pay; what does not pay is taken as a plan at once."""
        width = self._notes.read(group)
        if width == 1:
            self._plans[group] = _Plan(width=1)
        return width is not None and width > 1

    def _is_worth_measuring(self, group: str) -> bool:
        spent = self._spent[group]
        return is_worth_measuring(
            n_trials=len(spent.trials),
            seconds=spent.seconds,
            n_steps=spent.n_steps,
            n_expected=self._group_sizes.get(group, 0.0),
        )

    def trained_plainly(self, job: Job, result: Result, n_steps_of: Callable[[TrainJob], int]) -> None:
        """A job was done by the plain loop.

        Args:
            n_steps_of: tells the optimizer steps of an epoch; asked only where that decides something.
        """
        if self._most is None and isinstance(job, TrainJob) and result.epochs:
            spent = self._spent[group_key(job.config)]
            spent.trials.add(job.trial)
            spent.seconds += result.seconds
            spent.n_steps += len(result.epochs) * n_steps_of(job)

    def run(self, jobs: Sequence[Job], plain: Plain, more: Callable[[Job, int], Sequence[Job]]) -> Iterator[Result]:
        """One result for each of these jobs that may share a program, and for each that is asked for meanwhile.

        Raises:
            Interrupted: the worker was asked to stop.
        """
        match jobs[0]:
            case EvaluateJob():
                evaluations = [job for job in jobs if isinstance(job, EvaluateJob)]
                yield from self._evaluations.run(evaluations, plain, more)
            case RampJob():
                yield from self._ramps([job for job in jobs if isinstance(job, RampJob)], plain, more)
            case _:
                yield from self._trials([job for job in jobs if isinstance(job, TrainJob)], plain, more)

    def _trials(
        self, jobs: Sequence[TrainJob], plain: Plain, more: Callable[[Job, int], Sequence[Job]]
    ) -> Iterator[Result]:
        """One result for each of these jobs of one group, and for each that is asked for meanwhile.

        Raises:
            Interrupted: the worker was asked to stop.
        """
        host = _Host(self, plain, group_key(jobs[0].config))
        if host.plan is None:
            result = host.measure(jobs[0])
            if result is not None:
                yield result
                jobs = jobs[1:]
        if jobs:
            yield from LaneJobs(host, more=more).run(jobs)

    def _ramps(
        self, jobs: Sequence[RampJob], plain: Plain, more: Callable[[Job, int], Sequence[Job]]
    ) -> Iterator[Result]:
        """One result for each of these ramps of one group, and for each that is asked for."""
        free = (self._most or MOST_RAMPS) - len(jobs)
        further = more(jobs[-1], free) if free > 0 else ()
        begun: list[tuple[RampJob, DefaultTraining]] = []
        for job in [*jobs, *(job for job in further if isinstance(job, RampJob))]:
            training = plain.begin_ramp(job)
            if isinstance(training, Result):
                yield training
            else:
                begun.append((job, training))
        losses = self._ramp_losses(begun, plain)
        if losses is None:
            yield from (plain.alone(job) for job, _ in begun)
            return
        for (job, training), found in zip(begun, losses, strict=True):
            size = training.settings.batch_size
            epochs = len(found) * size / training.data.n_rows("train")
            yield Result(key=job.key, values={"losses": found, "batch_size": size, "epochs": epochs})

    def _ramp_losses(self, begun: Sequence[tuple[RampJob, DefaultTraining]], plain: Plain) -> list[list[float]] | None:
        """None where the ramps have to be run one by one."""
        if len(begun) < 2:
            return None
        first, trainings = begun[0][0], [training for _, training in begun]
        lrs = ramp_lrs(first.lr_min, first.lr_max, first.steps).tolist()
        try:
            with plain.at_work([job for job, _ in begun]):
                route, _ = find_route(trainings)
                return None if route is None else fused_ramps(trainings, route, lrs, reference=first.lr_min)
        except (UserCodeError, LanesRefused):
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        plain.free_memory()
        return None

    def forget(self) -> None:
        """Let go of paused trials, whose checkpoints are elsewhere, and of what programs are compared with."""
        self._paused.clear()
        self._paused_bytes = 0
        for plan in self._plans.values():
            plan.like = None

    def _plan(self, group: str, training: DefaultTraining, plain: Plain) -> _Plan:
        """How a group is trained. Whatever measuring raises, the plain loop tells better: one by one, then."""
        try:
            route, why = find_route([training])
            if route is not None:
                width = self._most or self._notes.read(group)
                if width is None:
                    width = best_width([training], route=route).lanes
                    self._notes.write(group, width)
                return _Plan(width=width, route=route)
        except Exception as error:
            why, no_memory = f"to measure what lanes gain raised {describe(error)}", is_out_of_memory(error)
        else:
            no_memory = False
        if no_memory:
            plain.free_memory()
        return _Plan(width=1, why=f"trained one by one: {why}")

    def _pause(self, job: TrainJob, training: DefaultTraining) -> None:
        """Keep a trial's state where it is, as long as there is room for it."""
        self._resume(job)
        n_bytes = _n_bytes(training)
        room = KEPT_BYTES_CPU
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            room = min(int(KEPT_SHARE * total), self._paused_bytes + free // 2)
        if n_bytes > room:
            return
        self._paused[job.trial] = training
        self._paused_bytes += n_bytes
        while self._paused_bytes > room:
            _, dropped = self._paused.popitem(last=False)
            self._paused_bytes -= _n_bytes(dropped)

    def _resume(self, job: TrainJob) -> DefaultTraining | None:
        """A paused trial, if it stands where the job begins."""
        training = self._paused.pop(job.trial, None)
        if training is None:
            return None
        self._paused_bytes -= _n_bytes(training)
        return training if training.epoch == job.from_epoch and training.seed == job.seed else None


class _Host:
    """One run of lanes; `lane_jobs.Host`."""

    def __init__(self, lanes: Lanes, plain: Plain, group: str) -> None:
        self._lanes = lanes
        self._plain = plain
        self.group = group

    @property
    def plan(self) -> _Plan | None:
        return self._lanes._plans.get(self.group)

    @property
    def width(self) -> int:
        return 1 if self.plan is None else self.plan.width

    def measure(self, job: TrainJob) -> Result | None:
        """Plan how the group is trained, by one of its jobs; the job's result where it cannot begin."""
        training = self.begin(job)
        if isinstance(training, Result):
            return training
        with self._plain.at_work([job]):
            plan = self._lanes._plan(self.group, training, self._plain)
        self._lanes._plans[self.group] = plan
        if plan.width > 1:
            self._lanes._pause(job, training)
        return None

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        return self._lanes._resume(job) or self._plain.begin(job)

    def alone(self, job: TrainJob) -> Result:
        result = self._plain.alone(job)
        plan = self.plan
        if plan is None or plan.width > 1:
            return result
        if result.outcome == "crashed":  # this trial may be why its group is trained one by one: others are asked anew
            del self._lanes._plans[self.group]
            return result
        if not plan.why:
            return result
        why, plan.why = plan.why, ""
        return replace(result, values={**result.values, "one_lane": why})

    def program(self, trainings: Sequence[DefaultTraining]) -> Program:
        plan = self.plan
        assert plan is not None
        if plan.route is None or plan.like is None or can_fuse(plan.like, trainings[0]):
            plan.route, why = find_route(trainings)
            if plan.route is None:
                raise LanesRefused(why)
            plan.like = trainings[0] if len(trainings) > 1 else None
        return LaneGroup(trainings, plan.route)

    def fits(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        return not can_fuse(first, other)

    def may_join(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        plan = self.plan
        assert plan is not None
        if not self.fits(first, other):
            return False
        if plan.like is None:  # the program was begun with one lane, and tried with copies of that alone
            route, _ = find_route([first, other])
            if route is None or route != plan.route:
                return False
            plan.like = first
        return True

    def objective(self, row: EpochMetrics) -> float:
        return self._plain.objective(row)

    def told(self, job: TrainJob, epoch: int) -> None:
        self._plain.told(job, epoch)

    def alive(self, jobs: Sequence[TrainJob]) -> AbstractContextManager[None]:
        return self._plain.at_work(jobs)

    def stopped(self) -> bool:
        return self._plain.stopped()

    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining) -> Result:
        return self._plain.result(job, curve, training)

    def ended(self, job: TrainJob, training: DefaultTraining, result: Result) -> None:
        if result.outcome == "done":
            self._plain.remember(result)
            self._lanes._pause(job, training)

    def refused(self, reason: str) -> None:
        plan = self.plan
        assert plan is not None
        plan.width, plan.like, plan.why = 1, None, f"trained one by one: {reason}"

    def too_wide(self, n_lanes: int) -> None:
        plan = self.plan
        assert plan is not None
        self._plain.free_memory()
        plan.width = max(1, n_lanes // 2)


def _n_bytes(training: DefaultTraining) -> int:
    """Of a trial's weights, buffers and optimizer state."""
    state = [value for held in training.optimizer.state.values() for value in held.values()]
    tensors = [*training.model.parameters(), *training.model.buffers(), *state]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
