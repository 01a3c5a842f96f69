"""A study as its journal tells it: the fold of all events, and nothing that is not in them.

Everyone who wants to know where a study stands (the study itself, the tracker, `status`, `top`, the verdict) folds the
same events here. Applying an event costs about the same for the first and the ten-thousandth trial.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hpsearch.events import (
    Arrived,
    Compared,
    DataSeen,
    Ended,
    Event,
    Finished,
    Leased,
    Opened,
    RangeMeasured,
    Returned,
    Selected,
    StageBegan,
    StageEnded,
    Stopped,
    TrialDrawn,
)
from hpsearch.job import Config, DataInfo, EpochMetrics
from hpsearch.trial import TrialRecord, TrialState


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a journal."""

    seq: int
    fence: int
    time: float  # unix time, s
    event: Event


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """A best-so-far: the moment a job's result bettered all earlier ones."""

    time: float  # unix time, s
    epochs: int  # trained in the whole study by then
    trial: int
    objective: float  # minimised


@dataclass
class StudyState:
    """What is known of a study. Only `apply` changes it."""

    opened: Opened | None = None
    opened_at: float = 0.0  # of the first driver
    resumed_at: list[float] = field(default_factory=list)  # of each driver, the first included
    last_at: float = 0.0
    worked_s: float = 0.0  # seconds that earlier drivers were at work
    data: DataInfo | None = None
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    ranges: list[RangeMeasured] = field(default_factory=list)
    results: dict[str, Finished] = field(default_factory=dict)  # finished jobs but for training, by key
    leases: dict[str, Leased] = field(default_factory=dict)  # in workers' hands, by key
    returned: set[str] = field(default_factory=set)  # keys of jobs that were given out and came back without a result
    began: dict[str, float] = field(default_factory=dict)  # stage -> time of its (latest) start
    stage_s: dict[str, float] = field(default_factory=dict)  # stage -> seconds spent, over all drivers
    ended_stages: set[str] = field(default_factory=set)
    n_epochs: int = 0  # trained by all trials together
    n_leased_epochs: int = 0  # in workers' hands
    seats: dict[str, Arrived] = field(default_factory=dict)  # worker -> where its process began last
    alone: set[str] = field(default_factory=set)  # keys of jobs that ran out of memory, to be tried without company
    improvements: list[Improvement] = field(default_factory=list)  # best-so-far of the search, in order
    selected: Selected | None = None
    compared: Compared | None = None
    ended: Ended | None = None
    n_entries: int = field(default=0, compare=False)  # of the journal that `of` was given
    budget_spent: str = ""  # the limit that ended the search, "" where none did
    _busy_s: float = 0.0  # of all workers together, up to their last lease that ended
    _busy_since: dict[str, float] = field(default_factory=dict)  # worker -> when it had nothing to do last
    _n_held: Counter[str] = field(default_factory=Counter)  # worker -> jobs in its hands
    _metric: str = "val_loss"
    _sign: float = 1.0
    _max_epochs: int = 0

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> StudyState:
        """The state after these events."""
        state = cls()
        for entry in entries:
            state.apply(entry.event, entry.time)
            state.n_entries = entry.seq + 1
        return state

    # What it means

    @property
    def name(self) -> str:
        return self.opened.study if self.opened else ""

    @property
    def uid(self) -> str:
        return self.opened.uid if self.opened else ""

    @property
    def stage(self) -> str:
        """The stage that began last and has not ended, "" between stages."""
        running = [name for name in self.began if name not in self.ended_stages]
        return running[-1] if running else ""

    @property
    def search_ended(self) -> bool:
        return "search" in self.ended_stages

    @property
    def done(self) -> bool:
        return self.ended is not None and self.ended.reason == "done"

    def busy_s(self, now: float) -> float:
        """Seconds that workers held jobs, over all workers and drivers; time without a driver counts for nobody."""
        return self._busy_s + sum(now - since for since in self._busy_since.values())

    def is_alone(self, key: str) -> bool:
        """Whether a job has run out of memory once, and is to run with nothing beside it."""
        return key in self.alone

    def ranking(self) -> list[TrialRecord]:
        """All trials, best first; diverged and failed last."""
        return sorted(self.trials.values(), key=lambda trial: trial.sort_key)

    def best(self) -> TrialRecord | None:
        """The best usable trial."""
        return min((t for t in self.trials.values() if t.usable), key=lambda t: t.sort_key, default=None)

    def counts(self) -> dict[TrialState, int]:
        counts = dict.fromkeys(TrialState, 0)
        for trial in self.trials.values():
            counts[trial.state] += 1
        return counts

    def objective(self, metrics: dict[str, float]) -> float:
        """The study's metric of one epoch, turned so that smaller is better.

        Raises:
            KeyError: the metric is not among them.
        """
        return self._sign * metrics[self._metric]

    def range_of(self, branch: Config) -> RangeMeasured | None:
        """The learning-rate range of a branch, None before it is measured."""
        return next((r for r in self.ranges if r.branch == branch), None)

    # How it changes

    def apply(self, event: Event, time: float) -> None:
        """Take one more event into account."""
        before, self.last_at = self.last_at, time
        match event:
            case Opened():
                self._open(event, time, before)
            case DataSeen():
                self.data = data_info(dict(event.info))
            case Arrived():
                self.seats[event.worker] = event
            case StageBegan(stage=stage):
                if stage == "search" and self.search_ended:
                    self._forget_ensemble()
                self.began.pop(stage, None)
                self.began[stage] = time
                self.ended_stages.discard(stage)
                self._mark_search()
            case StageEnded(stage=stage, reason=reason):
                self.budget_spent = reason or self.budget_spent
                self.stage_s[stage] = self.stage_s.get(stage, 0.0) + time - self.began.get(stage, time)
                self.ended_stages.add(stage)
                self._mark_search()
            case RangeMeasured():
                self.ranges.append(event)
            case TrialDrawn():
                self.trials[event.trial] = TrialRecord(
                    number=event.trial,
                    config=event.config,
                    seed=event.seed,
                    max_epochs=self._max_epochs,
                    drawn_at=time,
                )
            case Leased():
                self._lease(event, time)
            case Returned(key=key):
                self._release(key, time)
                self.returned.add(key)
            case Finished():
                self._finish(event, time)
            case Stopped(trial=number):
                self.trials[number].let_go = True
                self.trials[number].ended_at = time
            case Selected():
                self.selected = event
            case Compared():
                self.compared = event
            case Ended():
                self.ended = event

    def _open(self, event: Opened, time: float, last_at: float) -> None:
        spec = event.spec
        metric = spec.get("metric")
        stopping = spec.get("early_stopping")
        if isinstance(metric, dict):
            self._metric = str(metric.get("name", "val_loss"))
            self._sign = -1.0 if metric.get("goal") == "maximize" else 1.0
        if isinstance(stopping, dict):
            self._max_epochs = int(stopping["max_epochs"])
        if self.opened is None:
            self.opened_at = time
        else:
            # Time between two drivers counts for nobody: a stage that was under way begins anew.
            self.worked_s += last_at - self.resumed_at[-1]
            for worker, since in self._busy_since.items():
                self._busy_s += last_at - since
                self._busy_since[worker] = time
            for stage in [name for name in self.began if name not in self.ended_stages]:
                self.stage_s[stage] = self.stage_s.get(stage, 0.0) + last_at - self.began.pop(stage)
            if self.opened.spec.get("ensemble") != spec.get("ensemble"):
                self.selected = self.compared = None  # chosen by other settings
        if self.ended is not None and self.ended.reason == "failed":
            self._forgive()
        self.opened = event
        self.resumed_at.append(time)
        self.ended = None
        for trial in self.trials.values():
            trial.max_epochs = self._max_epochs

    def _forgive(self) -> None:
        """The task was at fault and has been mended, or nobody would go on: what crashed may be tried again."""
        self.results = {key: result for key, result in self.results.items() if result.outcome != "crashed"}
        for trial in self.trials.values():
            trial.crashes = 0 if not trial.failed else trial.crashes

    def _forget_ensemble(self) -> None:
        """The search goes on: trials get other checkpoints, so what was measured of the old ones holds no longer."""
        self.results = {k: v for k, v in self.results.items() if not k.startswith(("evaluate/", "export/"))}
        self.selected = self.compared = None
        self.ended_stages.discard("ensemble")
        self.began.pop("ensemble", None)

    def _mark_search(self) -> None:
        ended = self.search_ended
        for trial in self.trials.values():
            trial.search_ended = ended

    def _lease(self, event: Leased, time: float) -> None:
        self._release(event.key, time)  # a lease that is announced anew is one lease
        self.leases[event.key] = event
        self.returned.discard(event.key)
        self.n_leased_epochs += event.to_epoch - event.from_epoch
        self._n_held[event.worker] += 1
        self._busy_since.setdefault(event.worker, time)
        if event.trial is not None:
            trial = self.trials[event.trial]
            trial.leased = event.key
            trial.leased_to = event.worker
            trial.target = event.to_epoch
            trial.worker = event.worker
            if trial.started_at is None:
                trial.started_at = time

    def _release(self, key: str, time: float) -> None:
        lease = self.leases.pop(key, None)
        if lease is None:
            return
        self.n_leased_epochs -= lease.to_epoch - lease.from_epoch
        self._n_held[lease.worker] -= 1
        if not self._n_held[lease.worker]:
            self._busy_s += time - self._busy_since.pop(lease.worker)
        if lease.trial is not None:
            self.trials[lease.trial].leased = None
            self.trials[lease.trial].leased_to = None

    def _finish(self, event: Finished, time: float) -> None:
        self._release(event.key, time)
        self.returned.discard(event.key)
        if event.outcome == "out_of_memory" and event.key not in self.alone:
            self.alone.add(event.key)
            if event.trial is None:
                return  # it is tried once more
        else:
            self.alone.discard(event.key)
        if event.trial is None:
            self.results[event.key] = event
            return
        trial = self.trials[event.trial]
        trial.ended_at = time
        for epoch, metrics, seconds in event.epochs:
            if epoch > trial.epoch:
                self.n_epochs += 1
                self._learn(trial, EpochMetrics(epoch=epoch, metrics=metrics, seconds=seconds))
        match event.outcome:
            case "done" | "diverged":
                checkpoint, best = event.values.get("checkpoint"), event.values.get("best_checkpoint")
                trial.checkpoint = None if checkpoint is None else str(checkpoint)
                trial.best_checkpoint = trial.best_checkpoint if best is None else str(best)
                trial.diverged = event.outcome == "diverged"
            case "out_of_memory":
                trial.out_of_memory += 1
            case _:
                trial.crashes += 1
        trial.message, trial.frame = event.message, event.frame
        if event.outcome == "done":
            self._compare_with_best(trial, time)
        # One retry with the same seed: a second crash of the same trial is no accident.
        trial.failed = trial.crashes > 1 or (event.outcome == "out_of_memory" and event.key not in self.alone)

    def _compare_with_best(self, trial: TrialRecord, time: float) -> None:
        value = trial.best_objective
        if value is not None and (not self.improvements or value < self.improvements[-1].objective):
            self.improvements.append(Improvement(time=time, epochs=self.n_epochs, trial=trial.number, objective=value))

    def _learn(self, trial: TrialRecord, row: EpochMetrics) -> None:
        trial.curve.append(row)
        if self._metric not in row.metrics:
            return
        value = self.objective(row.metrics)
        if value - value == 0.0 and (trial.best_objective is None or value < trial.best_objective):
            trial.best_objective, trial.best_epoch = value, row.epoch


def data_info(fields: dict[str, object]) -> DataInfo:
    """DataInfo from its JSON form."""
    known = {f.name for f in dataclasses.fields(DataInfo)}
    body = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known}
    return DataInfo(**body)  # type: ignore[arg-type]
