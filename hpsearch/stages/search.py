"""Search: draw configs, train them to rungs, let the good ones go on.

What may run next, in this order: the trial that a worker cannot put down (its own loop gives no state); a trial whose
job was lost; a paused trial that ranks high enough; a new trial. When none of these is left and nothing below the
last epoch is running, the end-game takes the best paused trials to the end until an ensemble's worth of trials is
complete.

A study whose early stopping was changed between two launches has *eras*: what was decided under other rungs is not
decided again. When the present era begins, each trial is put where its curve has brought it on the present rungs; from
there on events are followed one by one, so that a study resumed within an era is the study that was interrupted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hpsearch.events import Event, Finished, Leased, Opened, Returned, Stopped, TrialDrawn
from hpsearch.job import Config, Job, TrainJob, train_key, train_parts
from hpsearch.rungs import Standing, StoppingRule
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
    stopping: Mapping[str, object] = field(default_factory=dict)  # `early_stopping` as Opened events have it


class Search:
    """The search, over any sampler and any stopping rule."""

    name = "search"

    def __init__(
        self, settings: SearchSettings, state: StudyState, *, sampler: Sampler, make_rule: Callable[[], StoppingRule]
    ) -> None:
        """
        Args:
            make_rule: gives a rule that knows of no trial.
        """
        self._settings = settings
        self._state = state
        self._sampler = sampler
        self._make_rule = make_rule
        self._rule = make_rule()
        self._of_this_era = True  # what is being told happened under the present early stopping
        self._again: list[int] = []  # heap: drawn trials without a lease that have to train to their target
        self._target: dict[int, int] = {}  # trial -> epoch that it has to be trained to
        self._rung_of: dict[int, int] = {}  # trial -> the last rung at which it was compared
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
            case Opened():
                self._open(event)
            case TrialDrawn():
                self._count_drawn(event.trial)
                self._sampler.restore(event.trial, event.config)
            case Finished(trial=int()):
                self._tell_sampler(event)
            case _:
                pass
        if self._of_this_era:
            self._follow(event)

    def _follow(self, event: Event) -> None:
        """Keep the books of the present era."""
        match event:
            case TrialDrawn(trial=trial):
                self._train_again(trial, self._rule.first_target)
            case Leased(trial=int()):
                self._count_lease(event)
            case Returned(key=key) if key in self._below_end or key in self._to_end:  # else of another era
                self._forget_lease(key)
                lost = train_parts(key)
                assert lost is not None
                heapq.heappush(self._again, lost[0])
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
            return self._job(record, self._target[record.number])
        promotion = self._rule.promotable()
        if promotion is not None:
            return self._job(self._state.trials[promotion.trial], promotion.to_epoch)
        return self._new_job() or self._end_game()

    def drawn(self, job: Job) -> TrialDrawn | None:
        """The event that a new trial's first job needs before it is given out; None for a known trial."""
        if not isinstance(job, TrainJob) or job.trial in self._state.trials:
            return None
        return TrialDrawn(trial=job.trial, config=job.config, seed=job.seed)

    def may_continue(self, trial: int, epoch: int, objective: float | None) -> bool:
        """Whether a trial that stands, or is about to stand, at `epoch` may be trained on from its last checkpoint.

        Args:
            objective: its best one by then.
        """
        record = self._state.trials[trial]
        if record.leased is not None and record.epoch >= epoch:
            return True
        if record.diverged or record.failed or record.let_go or epoch >= self._settings.max_epochs:
            return False
        if self._target.get(trial, 0) > epoch:
            return True  # its job was lost, and is to be done again
        rung = epoch if epoch in self._rule.epochs else self._rung_of.get(trial)
        if rung is None or objective is None:
            return True
        return self._rule.may_yet_go_on(
            trial,
            rung,
            objective,
            n_trials=len(self._state.trials) + len(self._waiting) + max(0, self._settings.n_trials - self._next_number),
            end_game=max(0, self._settings.n_complete - self._n_complete),
        )

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
        return gone or record.epoch >= self._target[record.number]

    def _train_again(self, trial: int, target: int) -> None:
        self._target[trial] = target
        heapq.heappush(self._again, trial)

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

    # Eras

    def _open(self, event: Opened) -> None:
        stopping = event.spec.get("early_stopping")
        theirs = stopping if isinstance(stopping, Mapping) else {}
        # A key that an older version did not have says nothing.
        same = all(theirs.get(key, value) == value for key, value in self._settings.stopping.items())
        if same and not self._of_this_era:
            self._begin_era()
        self._of_this_era = same

    def _begin_era(self) -> None:
        """Put each trial where its curve has brought it on the present rungs, whatever brought it there."""
        self._rule = self._make_rule()
        self._again, self._held, self._orphans, self._to_stop = [], {}, [], []
        self._below_end, self._to_end = set(), set()
        self._target, self._rung_of = {}, {}
        self._n_complete = 0
        standings = []
        for record in self._state.trials.values():
            spoilt = record.diverged or record.failed
            standing = Standing(
                trial=record.number,
                best_by_epoch=self._state.best_by_epoch(record),
                withdrawn=spoilt or record.let_go,
            )
            standings.append(standing)
            if record.epoch >= self._settings.max_epochs:
                self._n_complete += not spoilt
                continue
            rung = self._rung_at(record.epoch)
            if rung is not None and standing.value_at(rung) is not None:
                self._rung_of[record.number] = rung
            elif not standing.withdrawn:
                self._train_again(record.number, self._next_rung(record.epoch))
        self._rule.restore(standings)

    def _rung_at(self, epoch: int) -> int | None:
        """The highest rung up to an epoch, None below the lowest."""
        return max((rung for rung in self._rule.epochs if rung <= epoch), default=None)

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
        elif trial in self._again:  # announced by a worker whose lease had ended
            self._again.remove(trial)
            heapq.heapify(self._again)
        self._held = {
            worker: rest for worker, held in self._held.items() if (rest := [other for other in held if other != trial])
        }
        if trial in self._orphans:
            self._orphans.remove(trial)
        self._target[trial] = event.to_epoch
        if trial in self._rung_of:
            self._rule.promote(trial, self._rung_of[trial])
        leases = self._to_end if event.to_epoch >= self._settings.max_epochs else self._below_end
        leases.add(event.key)

    def _forget_lease(self, key: str) -> None:
        self._below_end.discard(key)
        self._to_end.discard(key)

    def _tell_sampler(self, event: Finished) -> None:
        assert event.trial is not None
        record = self._state.trials[event.trial]
        if record.state in (TrialState.DIVERGED, TrialState.FAILED):
            self._sampler.observe(record.number, record.config, None, record.epoch)
        elif event.outcome == "done":
            self._sampler.observe(record.number, record.config, record.best_objective, record.epoch)

    def _count_result(self, event: Finished) -> None:
        assert event.trial is not None
        record = self._state.trials[event.trial]
        if record.state in (TrialState.DIVERGED, TrialState.FAILED):
            self._rule.withdraw(record.number)
            return
        if event.outcome != "done":
            heapq.heappush(self._again, record.number)
            return
        assert record.best_objective is not None
        if record.epoch >= self._settings.max_epochs:
            self._rule.record(record.number, self._settings.max_epochs, record.best_objective)
            self._n_complete += 1
            return
        self._rule.record(record.number, record.epoch, record.best_objective)
        self._rung_of[record.number] = record.epoch
        if not event.values.get("resumable", True):
            # It cannot wait at a rung for its rank to be known, so it is judged at once, and never promoted later.
            if self._rule.keeps_going(record.number, record.epoch):
                self._held.setdefault(event.worker, []).append(record.number)
            else:
                self._to_stop.append(record.number)
            self._rule.promote(record.number, record.epoch)
