"""Search: draw configs, train them to rungs, let the good ones go on.

What may run next, in this order: the trial that a worker cannot put down (its own loop gives no state); a trial whose
job was lost; a paused trial that ranks high enough; a new trial. When none of these is left and nothing below the
last epoch is running, the end-game takes the best paused trials to the end until an ensemble's worth of trials is
complete.

A config of the user's own, `baseline`, is drawn before all others and gets a number that no sampled trial has. At its
first rung it takes its place among the others; then it leaves the ladder and is trained to the last epoch whatever its
rank, so that what is said of it holds for full training. It counts for nobody's promotion above that rung, nor as one
of the trials that the end-game completes.

A study whose early stopping was changed between two launches has *eras*: what was decided under other rungs is not
decided again. When the present era begins, each trial is put where its curve has brought it on the present rungs; from
there on events are followed one by one, so that a study resumed within an era is the study that was interrupted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from hpsearch.events import Event, Finished, Leased, Opened, Returned, Stopped, TrialDrawn
from hpsearch.job import Config, Job, TrainJob, train_key, train_parts
from hpsearch.lane_groups import group_key
from hpsearch.own_config import same_config, sampled_below
from hpsearch.rungs import Standing, StoppingRule
from hpsearch.sampler import Sampler, trial_seed
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState

LOOK_AHEAD = 64  # trials that may start before one that waits for its learning-rate range
LANES_LOOK_AHEAD = 256  # how much later a trial's number may be that goes before it, into a lane of its own group


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How far the search goes."""

    n_trials: int  # that are sampled
    max_epochs: int
    study_seed: int
    n_complete: int  # trials that the end-game takes to the last epoch: the ensemble's size
    per: tuple[str, ...]  # parameters that make a branch
    measured: tuple[str, ...]  # parameters bounded by the measured range
    stopping: Mapping[str, object] = field(default_factory=dict)  # `early_stopping` as Opened events have it
    baseline: Config | None = None  # the user's own config


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
        self._waiting: list[int] = []  # numbers passed over, for want of a learning-rate range or of room in a program
        self._passed_over: dict[int, Config] = {}  # configs of those that were of another group
        self._next_number = 0
        self._highest = -1  # number of any trial
        self._drawn: tuple[int, Config] | None = None  # cache of next_job, until the trial is recorded
        self._to_stop: list[int] = []
        self._below_end: set[str] = set()  # leases that end at a rung
        self._to_end: set[str] = set()  # leases that end at the last epoch
        self._of_baseline: set[str] = set()  # leases of the user's own config, wherever they end
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
            case Returned(key=key) if key in self._leases_of_this_era():
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
        if self._leases_of_this_era():
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
        promotion = self._rule.promotable(prefer=self._was_at(worker))
        if promotion is not None:
            return self._job(self._state.trials[promotion.trial], promotion.to_epoch)
        return self._new_job() or self._end_game()

    def next_beside(self, worker: str, job: Job) -> TrainJob | None:
        """As `next_job`, of one group alone. New trials are looked for among the next LANES_LOOK_AHEAD numbers."""
        if self._out_of_budget or not isinstance(job, TrainJob) or self._held or self._orphans:
            return None
        group = group_key(job.config)

        def fits(trial: int) -> bool:
            return group_key(self._state.trials[trial].config) == group

        lost = [trial for trial in self._again if not self._over(self._state.trials[trial]) and fits(trial)]
        if lost:
            return self._job(self._state.trials[min(lost)], self._target[min(lost)])
        promotion = self._rule.promotable(fits, self._was_at(worker))
        if promotion is not None:
            return self._job(self._state.trials[promotion.trial], promotion.to_epoch)
        new = self._new_beside(group)
        if new is not None:
            return new
        end = self._end_game()
        return end if end is not None and fits(end.trial) else None

    def drawn(self, job: Job) -> TrialDrawn | None:
        """The event that a new trial's first job needs before it is given out; None for a known trial."""
        if not isinstance(job, TrainJob) or job.trial in self._state.trials:
            return None
        return TrialDrawn(trial=job.trial, config=job.config, seed=job.seed, baseline=job.trial >= self._sampled_below)

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
        if record.baseline or self._target.get(trial, 0) > epoch:
            return True  # it goes to the last epoch; or its job was lost, and is to be done again
        rung = epoch if epoch in self._rule.epochs else self._rung_of.get(trial)
        if rung is None or objective is None:
            return True
        return self._rule.may_yet_go_on(
            trial,
            rung,
            objective,
            n_trials=self._n_known,
            end_game=max(0, self._settings.n_complete - self._n_complete),
        )

    # New trials

    @property
    def n_to_begin(self) -> int:
        """Sampled trials that nobody was given yet."""
        if self._out_of_budget:
            return 0
        return max(0, self._settings.n_trials - (len(self._state.trials) - len(self._state.baselines)))

    def _has_new(self) -> bool:
        return bool(self._waiting) or self._next_number < self._sampled_below or self._new_baseline() is not None

    @property
    def _sampled_below(self) -> int:
        """Numbers from here on are no sampled trial's: those of the user's own configs are passed over."""
        return sampled_below(self._settings.n_trials, self._state.baselines)

    @property
    def _n_known(self) -> int:
        """Trials there are, and those still to be drawn. Asked for each result: it must not look at every trial."""
        below = self._sampled_below
        return below + sum(number in self._state.trials for number in range(below, self._highest + 1))

    def _new_baseline(self) -> tuple[int, Config] | None:
        """The user's own config, under the first number beyond all others, unless it was drawn."""
        config = self._settings.baseline
        if config is None or any(same_config(config, self._state.trials[n].config) for n in self._state.baselines):
            return None
        return max(self._sampled_below, self._highest + 1), config

    def _new_job(self) -> TrainJob | None:
        if self._drawn is None:
            self._drawn = self._new_baseline() or self._draw()
        return None if self._drawn is None else self._first_job(*self._drawn)

    def _new_beside(self, group: str) -> TrainJob | None:
        """The first new trial of a group; numbers that are passed over stay in line, and wait for the next worker."""
        if not self._sampler.in_any_order:
            new = self._new_job()
            return new if new is not None and group_key(new.config) == group else None
        end = min(self._waiting, default=self._next_number) + LANES_LOOK_AHEAD
        for number in self._in_line(LANES_LOOK_AHEAD):
            if number > end:
                return None
            config = self._passed_over.get(number) or self._sampler.config(number, self._bounds)
            if config is None:
                continue
            self._passed_over[number] = config
            if group_key(config) == group:
                return self._first_job(number, config)
        return None

    def _first_job(self, number: int, config: Config) -> TrainJob:
        return TrainJob(
            key=train_key(number, 0, self._rule.first_target),
            trial=number,
            config=config,
            seed=trial_seed(self._settings.study_seed, number),
            from_epoch=0,
            to_epoch=self._rule.first_target,
        )

    def _draw(self) -> tuple[int, Config] | None:
        for number in self._in_line(LOOK_AHEAD):
            config = self._passed_over.get(number) or self._sampler.config(number, self._bounds)
            if config is not None:
                return number, config
        return None

    def _in_line(self, most: int) -> Iterator[int]:
        """Numbers of trials to come, lowest first: those passed over, then new ones until `most` have been."""
        yield from tuple(self._waiting)
        while self._next_number < self._sampled_below and len(self._waiting) < most:
            number = self._next_number
            self._next_number += 1
            if number not in self._state.trials:
                self._waiting.append(number)
                yield number

    def _bounds(self, config: Config) -> Mapping[str, tuple[float, float]] | None:
        active = [name for name in self._settings.measured if name in config]
        if not active:
            return {}
        branch = {name: config[name] for name in self._settings.per if name in config}
        measured = self._state.range_of(branch)
        return None if measured is None else dict.fromkeys(active, (measured.low, measured.high))

    # Known trials

    def _was_at(self, worker: str) -> Callable[[int], bool]:
        """Whether a trial was last trained by this worker, which may have its state at hand."""
        return lambda trial: self._state.trials[trial].worker == worker

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
        self._below_end, self._to_end, self._of_baseline = set(), set(), set()
        self._target, self._rung_of = {}, {}
        self._n_complete = 0
        standings = []
        for record in self._state.trials.values():
            spoilt = record.diverged or record.failed
            standing = Standing(
                trial=record.number,
                best_by_epoch=self._state.best_by_epoch(record),
                withdrawn=spoilt or record.let_go or record.baseline,
            )
            standings.append(standing)
            if record.baseline:
                if record.epoch < self._settings.max_epochs and not spoilt:
                    self._train_again(record.number, self._next_rung(record.epoch))
                continue
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
        self._highest = max(self._highest, number)
        self._passed_over.pop(number, None)
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
        if self._state.trials[trial].baseline:
            leases = self._of_baseline
        else:
            leases = self._to_end if event.to_epoch >= self._settings.max_epochs else self._below_end
        leases.add(event.key)

    def _leases_of_this_era(self) -> set[str]:
        return self._below_end | self._to_end | self._of_baseline

    def _forget_lease(self, key: str) -> None:
        self._of_baseline.discard(key)
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
        if record.baseline:
            self._count_baseline(record, event)
            return
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

    def _count_baseline(self, record: TrialRecord, event: Finished) -> None:
        """The user's own config has its place at its first rung, and goes on whatever that is."""
        assert record.best_objective is not None
        self._rule.record(record.number, record.epoch, record.best_objective)
        self._rule.withdraw(record.number)
        if record.epoch >= self._settings.max_epochs:
            return
        if event.values.get("resumable", True):
            self._train_again(record.number, self._next_rung(record.epoch))
        else:
            self._held.setdefault(event.worker, []).append(record.number)
