"""A trial as its events tell it. Its state is computed, so it cannot disagree with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hpsearch.job import Config, EpochMetrics


class TrialState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"  # at a rung
    STOPPED = "stopped"  # early, at the study's end
    COMPLETE = "complete"
    DIVERGED = "diverged"  # the config is at fault
    FAILED = "failed"  # code or machine is at fault


class Missing(StrEnum):
    """Why a trial's best checkpoint is not there."""

    DROPPED = "dropped"  # or damaged; training it again gives it back
    NO_ROOM = "no room"  # nor would there be if it were trained again
    SPOILT = "spoilt"  # training it again failed


@dataclass(kw_only=True)
class TrialRecord:
    """One config and what became of it."""

    number: int
    config: Config
    seed: int
    max_epochs: int
    drawn_at: float  # unix time, s
    baseline: bool = False  # the user's own config
    started_at: float | None = None
    ended_at: float | None = None  # of the last result
    curve: list[EpochMetrics] = field(default_factory=list)
    best_epoch: int | None = None
    best_objective: float | None = None  # minimised
    checkpoint: str | None = None  # weights and optimizer, to go on from
    best_checkpoint: str | None = None  # weights of the best epoch
    n_parameters: int | None = None  # of its network; None before its first result
    lanes: int = 1  # of the program that trained it, at most; 1: it had none beside it
    best_ref: str | None = None  # the name that it has, or had while it was there
    missing: Missing | None = None  # why it is not there, though there was one
    leased: str | None = None  # key of the job in a worker's hands
    leased_to: str | None = None
    target: int = 0  # epoch that the present or last lease trains to
    crashes: int = 0
    out_of_memory: int = 0  # how often; the second time it was alone
    diverged: bool = False
    failed: bool = False
    let_go: bool = False  # stopped for good, though the search goes on
    search_ended: bool = False
    message: str = ""
    frame: str = ""
    worker: str = ""

    @property
    def epoch(self) -> int:
        """Epochs trained and recorded."""
        return self.curve[-1].epoch if self.curve else 0

    @property
    def state(self) -> TrialState:
        if self.diverged:
            return TrialState.DIVERGED
        if self.failed:
            return TrialState.FAILED
        if self.epoch >= self.max_epochs:
            return TrialState.COMPLETE
        if self.let_go or (self.search_ended and self.leased is None):
            return TrialState.STOPPED
        if self.leased is not None:
            return TrialState.RUNNING
        return TrialState.PAUSED if self.epoch else TrialState.WAITING

    @property
    def open(self) -> bool:
        """Whether a job may still train it, and nobody does."""
        return self.leased is None and not (self.diverged or self.failed or self.let_go)

    @property
    def usable(self) -> bool:
        """Whether a finite checkpoint is there to predict with, or can be had again."""
        return self.best_checkpoint is not None or self.missing is Missing.DROPPED

    @property
    def best_metrics(self) -> dict[str, float]:
        """Metrics of the best epoch, with their split; empty before the first."""
        for row in reversed(self.curve):
            if row.epoch == self.best_epoch:
                return row.metrics
        return {}

    @property
    def sort_key(self) -> tuple[bool, bool, float, int]:
        """Order of `top`: best first, those without a value after, diverged and failed last; ties: lower number."""
        value = self.best_objective
        bad = self.diverged or self.failed
        return (bad, value is None, 0.0 if value is None else value, self.number)
