"""Several trials of one group, trained by one program, an epoch at a time.

Lanes are at epochs of their own: a trial that starts trains beside one that is at its last rung, since an epoch has the
same number of steps for both. Between two epochs lanes may leave and others join; nobody else notices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from hpsearch.errors import TrialDiverged
from hpsearch.job import EpochMetrics
from hpsearch.training.checkpoint import Checkpoint
from hpsearch.training.data import batch_bounds
from hpsearch.training.lanes.epochs import epoch_masks, epoch_rates, fused, mean_losses, refusing
from hpsearch.training.lanes.feed import lane_batches
from hpsearch.training.lanes.forward import Forward, Route
from hpsearch.training.lanes.likeness import can_fuse
from hpsearch.training.lanes.measures import lane_metrics
from hpsearch.training.lanes.predictions import split_outputs
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.stack import Stack
from hpsearch.training.lanes.step import Step
from hpsearch.training.loop import DefaultTraining, require_finite


class LaneGroup:
    """Several trials of one group, trained by one program.

    Each lane is a `DefaultTraining`, and stays one: after `leave` it is where it would be had it been trained alone,
    within float tolerance. Its model and optimizer are brought up to date by `leave` and `checkpoint`; in between they
    lag behind.

    Of dropout, what holds is in `dropout`: masks of nn.Dropout layers are the lane's own, on a CPU those of the unfused
    loop; other draws are independent in every lane, but depend on all of them together.
    """

    def __init__(
        self, trainings: Sequence[DefaultTraining], route: Route, *, kernels: bool = True, graphs: bool = True
    ) -> None:
        """
        Args:
            trainings: at least one, alike as `can_fuse` has it, of different trials.
            route: as found by `find_route` for such trainings.
            kernels: use torch's own optimizer kernels where there are any.
            graphs: on a GPU, capture steps into CUDA graphs where that works.

        Raises:
            LanesRefused: they are not alike.
            ValueError: none, or a trial twice.
        """
        if not trainings or len({training.trial for training in trainings}) != len(trainings):
            raise ValueError("lanes are one training or more, of different trials")
        for training in trainings:
            _require_alike(trainings[0], training)
            training.model.zero_grad(set_to_none=True)  # of its last step alone: memory for nothing
        self._places: list[DefaultTraining | None] = list(trainings)
        self._like = trainings[0]
        self._stack = Stack(trainings, idle=route.idle, kernels_allowed=kernels)
        self._forward = Forward(trainings[0], self._stack, route)
        self._step = Step(self._stack, self._forward, graphs=graphs)

    @property
    def trials(self) -> tuple[int, ...]:
        """In the order of their lanes."""
        return tuple(training.trial for training in self._lanes)

    @property
    def n_bytes(self) -> int:
        """Weights, gradients, buffers and optimizer state of all lanes."""
        return self._stack.n_bytes()

    def train_epoch(self) -> dict[int, EpochMetrics | TrialDiverged]:
        """One epoch more of every lane, and what it gave: metrics as of `DefaultTraining.train_epoch`, by trial.

        A lane whose loss or metric is not finite is reported as diverged, and its epoch does not count; the others
        never feel it. Seconds are the lane's share of the time that all took together.

        All or nothing: when it raises, every lane is where it was before.

        Raises:
            LanesRefused: the program could not be run after all, and every trial is to be trained alone; that also
                tells whether the fault is the user's.
            UserCodeError: augment, a Dataset, the loss or a metric raised; alone, the trial whose fault it is will too.
        """
        self._close_gaps()
        lanes = self._lanes
        if not lanes:
            return {}
        start = time.perf_counter()
        self._stack.keep()
        try:
            with refusing(), fused(lanes):
                losses = self._train(lanes)
                outputs, target = split_outputs(self._forward, lanes[0].data, "val", len(lanes))
                sound = [math.isfinite(loss) for loss in losses]
                measured = lane_metrics([lane.task for lane in lanes], outputs, target, sound)
                results = {
                    lane.trial: _result(loss, metrics)
                    for lane, loss, metrics in zip(lanes, losses, measured, strict=True)
                }
        except BaseException:
            self._stack.go_back()
            raise
        share = (time.perf_counter() - start) / len(lanes)
        told: dict[int, EpochMetrics | TrialDiverged] = {}
        for lane in lanes:
            found = results[lane.trial]
            if isinstance(found, TrialDiverged):
                told[lane.trial] = found
            else:
                lane.epoch += 1
                told[lane.trial] = EpochMetrics(epoch=lane.epoch, metrics=found, seconds=share)
        return told

    def join(self, training: DefaultTraining) -> None:
        """Gives a training a lane: a free one, or one more.

        Raises:
            LanesRefused: it is not like the others.
            ValueError: the trial has a lane already.
        """
        if training.trial in self.trials:
            raise ValueError(f"trial {training.trial} has a lane already")
        _require_alike(self._like, training)
        if None not in self._places:
            self._places.append(None)
            self._stack.resize([*range(len(self._places) - 1), -1])
        place = self._places.index(None)
        self._stack.load(place, training)
        training.model.zero_grad(set_to_none=True)
        self._places[place] = training

    def leave(self, trial: int) -> DefaultTraining:
        """Frees a trial's lane, and gives back its training, which can go on alone, or in another group."""
        place = self._place(trial)
        training = self._up_to_date(place)
        self._places[place] = None
        return training

    def checkpoint(self, trial: int, *, weights_only: bool = False, copy: bool = False) -> Checkpoint:
        """A trial as it is, which keeps its lane; without `copy` it is good until the trial's next."""
        training = self._up_to_date(self._place(trial), weights_only=weights_only)
        return training.checkpoint(weights_only=weights_only, copy=copy)

    @property
    def _lanes(self) -> list[DefaultTraining]:
        return [training for training in self._places if training is not None]

    def _place(self, trial: int) -> int:
        for place, training in enumerate(self._places):
            if training is not None and training.trial == trial:
                return place
        raise ValueError(f"trial {trial} has no lane (those that have: {self.trials})")

    def _up_to_date(self, place: int, *, weights_only: bool = False) -> DefaultTraining:
        training = self._places[place]
        assert training is not None
        self._stack.store(place, training, weights_only=weights_only)
        return training

    def _close_gaps(self) -> None:
        taken = [place for place, training in enumerate(self._places) if training is not None]
        if taken and len(taken) < len(self._places):
            self._stack.resize(taken)
            self._places = list(self._lanes)

    def _train(self, lanes: Sequence[DefaultTraining]) -> list[float]:
        """Each lane's mean training loss over the rows of its epoch."""
        epochs = [lane.epoch + 1 for lane in lanes]
        first = lanes[0]
        sizes = [end - start for start, end in batch_bounds(first.data.n_rows("train"), first.settings.batch_size)]
        self._stack.begin_epoch([lane.optimizer for lane in lanes], epoch_rates(lanes, len(sizes)))
        self._step.begin_epoch(
            [lane.settings.grad_clip_norm for lane in lanes], [lane.settings.label_smoothing for lane in lanes]
        )
        masks = epoch_masks(lanes, epochs)
        losses: list[Tensor] = []
        for t, (inputs, target) in enumerate(lane_batches(lanes, epochs)):
            plan = self._forward.plan(inputs)
            drawn = masks.draw(plan, sizes[t:].count(sizes[t])) if plan else []
            losses.append(self._step(t, inputs, target, drawn, plan))
        return mean_losses(losses, sizes)


def _result(train_loss: float, found: Mapping[str, float]) -> dict[str, float] | TrialDiverged:
    """A lane's epoch, with its metrics on val; or that it diverged."""
    metrics = {"train_loss": train_loss, **{f"val_{name}": value for name, value in found.items()}}
    try:
        require_finite(metrics)
    except TrialDiverged as diverged:
        return diverged
    return metrics


def _require_alike(first: DefaultTraining, other: DefaultTraining) -> None:
    reason = can_fuse(first, other)
    if reason:
        raise LanesRefused(reason)
