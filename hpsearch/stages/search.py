"""Search: draw configs, train them to rungs, let the good ones go on.

What may run next, in this order: the trial that a worker cannot put down (its own loop gives no state); a trial whose
job was lost; a paused trial that ranks high enough; a new trial. When none of these is left and nothing below the
last epoch is running, the end-game takes the best paused trials to the end until an ensemble's worth of trials is
complete.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from hpsearch.events import Event, Finished, Leased, Returned, Stopped, TrialDrawn
from hpsearch.job import Config, Job, TrainJob, train_key, train_parts
from hpsearch.rungs import StoppingRule
from hpsearch.sampler import Sampler, trial_seed
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState

LOOK_AHEAD = 64  # trials that may start before one that waits for its learning-rate range


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How far the search goes."""

    n_trials: int
    max_epochs: int
    study_seed: int
    n_complete: int  # trials that the end-game takes to the last epoch: the ensemble's size
    per: tuple[str, ...]  # parameters that make a branch
    measured: tuple[str, ...]  # parameters bounded by the measured range


class Search:
    """The search, over any sampler and any stopping rule."""

    name = "search"

    def __init__(self, settings: SearchSettings, state: StudyState, *, sampler: Sampler, rule: StoppingRule) -> None:
        self._settings = settings
        self._state = state
        self._sampler = sampler
        self._rule = rule
        self._again: list[int] = []  # heap: drawn trials without a lease that have to train to their target
        self._held: dict[str, list[int]] = {}  # worker -> trials that live in its memory only, and may go on
        self._orphans: list[int] = []  # such trials whose worker is gone; they are trained from their first epoch again
        self._waiting: list[int] = []  # numbers passed over, for want of a learning-rate range
        self._next_number = 0
        self._drawn: tuple[int, Config] | None = None  # cache of next_job, until the trial is recorded
        self._to_stop: list[int] = []
        self._below_end: set[str] = set()  # leases that end at a rung
        self._to_end: set[str] = set()  # leases that end at the last epoch
        self._n_complete = 0
        self._out_of_budget = False

    def end_budget(self) -> None:
        """Give out no further jobs: what is running may end, then the study goes on with what there is."""
        self._out_of_budget = True

    def apply(self, event: Event) -> None:
        match event:
            case TrialDrawn():
                self._count_drawn(event.trial)
                self._sampler.restore(event.trial, event.config)
                heapq.heappush(self._again, event.trial)
            case Leased(trial=int()):
                self._count_lease(event)
            case Returned():
                lost = _trial_of(event.key)
                if lost is not None:
                    self._forget_lease(event.key)
                    heapq.heappush(self._again, lost)
            case Stopped(trial=trial):  # replayed: an earlier driver has told it
                self._to_stop = [other for other in self._to_stop if other != trial]
            case Finished(trial=int()):
                self._forget_lease(event.key)
                self._count_result(event)
            case _:
                pass

    def lost(self, worker: str) -> None:
        self._orphans += self._held.pop(worker, [])

    def conclude(self) -> list[Event]:
        stopped, self._to_stop = self._to_stop, []
        return [Stopped(trial=trial) for trial in stopped]

    def finished(self) -> bool:
        if self._below_end or self._to_end:
            return False
        if self._out_of_budget:
            return True
        return (
            not self._again
            and not self._held
            and not self._orphans
            and not self._has_new()
            and self._next_paused() is None
        )

    def next_job(self, worker: str) -> TrainJob | None:
        if self._out_of_budget:
            return None
        held = next(iter(self._held.get(worker) or self._orphans), None)
        if held is not None:
            record = self._state.trials[held]
            return self._job(record, self._next_rung(record.epoch))
        while self._again:
            record = self._state.trials[self._again[0]]
            if self._over(record):
                heapq.heappop(self._again)
                continue
            return self._job(record, max(record.target, self._rule.first_target))
        promotion = self._rule.promotable()
        if promotion is not None:
            return self._job(self._state.trials[promotion.trial], promotion.to_epoch)
        return self._new_job() or self._end_game()

    def drawn(self, job: Job) -> TrialDrawn | None:
        """The event that a new trial's first job needs before it is given out; None for a known trial."""
        if not isinstance(job, TrainJob) or job.trial in self._state.trials:
            return None
        return TrialDrawn(trial=job.trial, config=job.config, seed=job.seed)

    # New trials

    def _has_new(self) -> bool:
        return bool(self._waiting) or self._next_number < self._settings.n_trials

    def _new_job(self) -> TrainJob | None:
        if self._drawn is None:
            self._drawn = self._draw()
        if self._drawn is None:
            return None
        number, config = self._drawn
        return TrainJob(
            key=train_key(number, 0, self._rule.first_target),
            trial=number,
            config=config,
            seed=trial_seed(self._settings.study_seed, number),
            from_epoch=0,
            to_epoch=self._rule.first_target,
        )

    def _draw(self) -> tuple[int, Config] | None:
        for number in self._waiting:
            config = self._sampler.config(number, self._bounds)
            if config is not None:
                return number, config
        while self._next_number < self._settings.n_trials and len(self._waiting) < LOOK_AHEAD:
            number = self._next_number
            self._next_number += 1
            if number in self._state.trials:
                continue
            self._waiting.append(number)
            config = self._sampler.config(number, self._bounds)
            if config is not None:
                return number, config
        return None

    def _bounds(self, config: Config) -> Mapping[str, tuple[float, float]] | None:
        active = [name for name in self._settings.measured if name in config]
        if not active:
            return {}
        branch = {name: config[name] for name in self._settings.per if name in config}
        measured = self._state.range_of(branch)
        return None if measured is None else dict.fromkeys(active, (measured.low, measured.high))

    # Known trials

    def _job(self, record: TrialRecord, to_epoch: int) -> TrainJob:
        return TrainJob(
            key=train_key(record.number, record.epoch, to_epoch),
            trial=record.number,
            config=record.config,
            seed=record.seed,
            from_epoch=record.epoch,
            to_epoch=to_epoch,
            checkpoint=record.checkpoint,
            best=record.best_objective,
        )

    def _next_rung(self, epoch: int) -> int:
        return min((rung for rung in self._rule.epochs if rung > epoch), default=self._settings.max_epochs)

    def _over(self, record: TrialRecord) -> bool:
        gone = record.diverged or record.failed or record.let_go or record.leased is not None
        return gone or (record.epoch > 0 and record.epoch >= record.target)

    def _end_game(self) -> TrainJob | None:
        promotion = self._next_paused()
        if promotion is None:
            return None
        return self._job(self._state.trials[promotion], self._settings.max_epochs)

    def _next_paused(self) -> int | None:
        """The paused trial that may go on now or, when all below is done, by the end-game."""
        promotion = self._rule.promotable()
        if promotion is not None:
            return promotion.trial
        if self._below_end or self._again or self._orphans or self._has_new():
            return None
        if self._n_complete + len(self._to_end) >= self._settings.n_complete:
            return None
        best = self._rule.best_paused()
        return None if best is None else best.trial

    # Book-keeping

    def _count_drawn(self, number: int) -> None:
        self._drawn = None
        if number in self._waiting:
            self._waiting.remove(number)
        while self._next_number in self._state.trials:
            self._next_number += 1

    def _count_lease(self, event: Leased) -> None:
        trial = event.trial
        assert trial is not None
        if self._again and self._again[0] == trial:
            heapq.heappop(self._again)
        self._held = {
            worker: rest for worker, held in self._held.items() if (rest := [other for other in held if other != trial])
        }
        if trial in self._orphans:
            self._orphans.remove(trial)
        if event.from_epoch:
            self._rule.promote(trial, event.from_epoch)
        leases = self._to_end if event.to_epoch >= self._settings.max_epochs else self._below_end
        leases.add(event.key)

    def _forget_lease(self, key: str) -> None:
        self._below_end.discard(key)
        self._to_end.discard(key)

    def _count_result(self, event: Finished) -> None:
        assert event.trial is not None
        record = self._state.trials[event.trial]
        if record.state in (TrialState.DIVERGED, TrialState.FAILED):
            self._rule.withdraw(record.number)
            self._sampler.observe(record.number, record.config, None, record.epoch)
            return
        if event.outcome != "done":
            heapq.heappush(self._again, record.number)
            return
        assert record.best_objective is not None
        self._sampler.observe(record.number, record.config, record.best_objective, record.epoch)
        self._rule.record(record.number, record.epoch, record.best_objective)
        if record.epoch >= self._settings.max_epochs:
            self._n_complete += 1
        elif not event.values.get("resumable", True):
            # It cannot wait at a rung for its rank to be known, so it is judged at once, and never promoted later.
            if self._rule.keeps_going(record.number, record.epoch):
                self._held.setdefault(event.worker, []).append(record.number)
            else:
                self._to_stop.append(record.number)
            self._rule.promote(record.number, record.epoch)


def _trial_of(key: str) -> int | None:
    """The trial that a training job's key names, None for other jobs."""
    parts = train_parts(key)
    return None if parts is None else parts[0]
