"""A trial trained by the task's own `fit`: a generator that yields one Report per epoch.

`fit` is stopped by not being asked for its next report, and started again from the state that a report offered. A `fit`
that offers none cannot be paused: its generator is kept alive by whoever keeps the `OwnTraining`, and a trial that has
lost it is trained again from its start, its first epochs unreported.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
from torch import nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config, EpochMetrics
from hpsearch.task import Report, Task, Trial
from hpsearch.training.checkpoint import Checkpoint, capture, load_weights
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.loop import build_model, require_finite
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import frame_of, user_code

_SPLITS = ("train_", "val_")


class OwnTraining:
    """A trial trained by the user's generator. `resumable` is known after the first epoch."""

    def __init__(
        self,
        task: Task,
        data: StudyData,
        config: Config,
        *,
        trial: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """A trial at its start, or at a checkpoint, whose weights the model has before `fit` is called.

        Args:
            rank: of this process among the `world_size` that train the trial together.

        Raises:
            UserCodeError: model() raised, or the checkpoint does not fit it.
        """
        self._task = task
        self._data = data
        self._config = config
        self._trial = trial
        self._seed = seed
        self._device = device
        self._rank, self._world_size = rank, world_size
        self.model: nn.Module = build_model(task, config, data, seed=seed, device=device)
        self.epoch = 0
        self.resumable = checkpoint is not None
        self._restarted_from = checkpoint
        self._report: Report | None = None
        self._reports: Iterator[object] | None = None
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
            self.epoch = checkpoint.epoch

    def train_epoch(self) -> EpochMetrics:
        start = time.perf_counter()
        epoch = self.epoch + 1
        with seeded(epoch_seed(self._seed, epoch, "train"), self._device):
            report = self._next_report()
        metrics = reported_metrics(report, frame=frame_of(type(self._task).fit))
        require_finite(metrics)
        self.epoch = epoch
        self._report = report
        self.resumable = report.state is not None
        return EpochMetrics(epoch=epoch, metrics=metrics, seconds=time.perf_counter() - start)

    def checkpoint(self, *, weights_only: bool = False, copy: bool = False) -> Checkpoint:
        """The trial as it is; the user's state is asked for only when more than weights is wanted."""
        state = None
        if not weights_only and self._report is not None and self._report.state is not None:
            with user_code("state()"):
                state = self._report.state()
            if not isinstance(state, dict):
                raise UserCodeError(
                    f"state() of a Report returned a {type(state).__name__}, not a dict",
                    frame=frame_of(self._report.state),
                )
        return capture(
            self.model,
            trial=self._trial,
            seed=self._seed,
            epoch=self.epoch,
            config=self._config,
            state=state,
            copy=copy,
        )

    def close(self) -> None:
        """Ends the generator, so that its `finally` runs now.

        Raises:
            UserCodeError: it raised.
        """
        reports, self._reports = self._reports, None
        close = getattr(reports, "close", None)
        if close is not None:
            with user_code("fit()"):
                close()

    def _next_report(self) -> Report:
        fit = type(self._task).fit
        with user_code("fit()"):
            if self._reports is None:
                self._reports = self._started()
            report = next(self._reports, None)
        if report is None:
            raise UserCodeError(
                f"fit() ended after {self.epoch} epochs, before hpsearch had done with the trial",
                frame=frame_of(fit),
                hint="yield reports without end (while True): hpsearch stops it by asking for no more",
            )
        if not isinstance(report, Report):
            raise UserCodeError(
                f"fit() yielded a {type(report).__name__}, not a Report",
                frame=frame_of(fit),
                hint="yield hpsearch.Report({'val_loss': …}) after every epoch",
            )
        return report

    def _started(self) -> Iterator[object]:
        restarted = self._restarted_from
        trial = Trial(
            epoch=self.epoch,
            state=None if restarted is None else restarted.state,
            number=self._trial,
            seed=self._seed,
            device=self._device,
            rank=self._rank,
            world_size=self._world_size,
        )
        self._restarted_from = None
        reports = self._task.fit(self.model, copy.deepcopy(self._config), self._data.splits, trial)
        if not hasattr(reports, "__next__"):
            raise UserCodeError(
                f"fit() returned a {type(reports).__name__}, not a generator",
                frame=frame_of(type(self._task).fit),
                hint="yield hpsearch.Report({'val_loss': …}) after every epoch",
            )
        return reports


def reported_metrics(report: Report, *, frame: str) -> dict[str, float]:
    """A report's metrics with their split: `loss` is `val_loss`; what begins with train_ or val_ stays.

    Raises:
        UserCodeError: no dict of numbers, none at all, or one metric twice.
    """
    reported: object = report.metrics
    if not isinstance(reported, dict) or not reported:
        raise UserCodeError(
            f"a Report's metrics are a dict of numbers (got {reported!r})", frame=frame, hint="{'val_loss': …}"
        )
    metrics: dict[str, float] = {}
    for given, value in reported.items():
        name = given if isinstance(given, str) and given.startswith(_SPLITS) else f"val_{given}"
        if name in metrics:
            raise UserCodeError(f"a Report gives `{name}` twice, with and without its split", frame=frame)
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            found = f"a {type(value).__name__}"
            raise UserCodeError(f"a Report's `{given}` is {found}, not a number", frame=frame) from None
    return metrics
