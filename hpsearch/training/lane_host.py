"""How an executor's jobs come into lanes: how many, by which route, and what of a trial is kept at hand.

Measured once for each group of trials and kept: how many lanes pay, and how they are fused. A group that cannot be
fused, or is not faster so, is trained by the plain loop from then on, and says why once. Measuring costs part of a
second, so nothing is measured before a group has been trained for some seconds: most groups of a wide space never
are.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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
from hpsearch.training.user_code import is_out_of_memory

MEASURE_AFTER_S = 4.0  # of a group's training by the plain loop: what measuring costs is a tenth of it, and less
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
    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining, beside: Sequence[TrainJob]) -> Result:
        """What a job that is over has given; while checkpoints are packed, it and those beside it are at work."""

    def remember(self, result: Result) -> None:
        """Keep the result's checkpoints, as bytes."""


@dataclass(kw_only=True)
class _Plan:
    """What is known of a group."""

    width: int
    route: Route | None = None
    accepted: bool = False  # several trials of it were compared with their unfused steps
    why: str = ""  # one lane is the most, and nobody was told yet


class Lanes:
    """The lanes of one worker, over its life."""

    def __init__(self, most: int | None, device: torch.device) -> None:
        """
        Args:
            most: lanes that are asked for, whether they pay or not; None: as many as pay.
        """
        self._most = most
        self._device = device
        self._plans: dict[str, _Plan] = {}
        self._evaluations = EvaluationLanes(most, device)
        self._spent_s: defaultdict[str, float] = defaultdict(float)  # by group, of the plain loop
        self._paused: OrderedDict[int, DefaultTraining] = OrderedDict()  # trials with their state on the device
        self._paused_bytes = 0

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
            return self._most is not None or self._spent_s[group] >= MEASURE_AFTER_S
        return plan.width > 1

    def trained_plainly(self, job: Job, seconds: float) -> None:
        """A job was trained by the plain loop, in so many seconds."""
        if self._most is None and isinstance(job, TrainJob):
            self._spent_s[group_key(job.config)] += seconds

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
            training = host.begin(jobs[0])
            if isinstance(training, Result):
                yield training
                jobs = jobs[1:]
            else:
                with plain.at_work(jobs[:1]):
                    self._plans[host.group] = self._plan(training)
                self._pause(jobs[0], training)
            if not jobs:
                return
        plan = self._plans.get(host.group)
        if plan is not None and plan.width > 1:
            yield from LaneJobs(host, width=plan.width, more=more).run(jobs)
        else:
            yield from (host.alone(job) for job in jobs)

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
        """Let go of paused trials; their checkpoints are elsewhere."""
        self._paused.clear()
        self._paused_bytes = 0

    def _plan(self, training: DefaultTraining) -> _Plan:
        route, why = find_route([training])
        if route is None:
            return _Plan(width=1, why=f"trained one by one: {why}")
        if self._most is not None:
            return _Plan(width=self._most, route=route)
        return _Plan(width=best_width([training], route=route).lanes, route=route)

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

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        return self._lanes._resume(job) or self._plain.begin(job)

    def alone(self, job: TrainJob) -> Result:
        result = self._plain.alone(job)
        plan = self.plan
        if plan is None or not plan.why:
            return result
        why, plan.why = plan.why, ""
        return replace(result, values={**result.values, "one_lane": why})

    def program(self, trainings: Sequence[DefaultTraining]) -> Program | None:
        plan = self.plan
        assert plan is not None
        with self._plain.at_work([]):
            if not plan.accepted:
                plan.route, why = find_route(trainings)
                plan.accepted = plan.route is not None and len(trainings) > 1
                if plan.route is None:
                    plan.width, plan.why = 1, f"trained one by one: {why}"
            return None if plan.route is None else LaneGroup(trainings, plan.route)

    def fits(self, first: DefaultTraining, other: DefaultTraining) -> bool:
        return not can_fuse(first, other)

    def objective(self, row: EpochMetrics) -> float:
        return self._plain.objective(row)

    def told(self, job: TrainJob, epoch: int) -> None:
        self._plain.told(job, epoch)

    def alive(self, jobs: Sequence[TrainJob]) -> AbstractContextManager[None]:
        return self._plain.at_work(jobs)

    def stopped(self) -> bool:
        return self._plain.stopped()

    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining, beside: Sequence[TrainJob]) -> Result:
        return self._plain.result(job, curve, training, beside)

    def ended(self, job: TrainJob, training: DefaultTraining, result: Result) -> None:
        if result.outcome == "done":
            self._plain.remember(result)
            self._lanes._pause(job, training)

    def too_wide(self, n_lanes: int) -> int:
        plan = self.plan
        assert plan is not None
        self._lanes.forget()
        self._plain.free_memory()
        plan.width = max(1, n_lanes // 2)
        return plan.width


def _n_bytes(training: DefaultTraining) -> int:
    """Of a trial's weights, buffers and optimizer state."""
    state = [value for held in training.optimizer.state.values() for value in held.values()]
    tensors = [*training.model.parameters(), *training.model.buffers(), *state]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
