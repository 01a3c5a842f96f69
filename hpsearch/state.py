"""A study as its journal tells it: the fold of all events, and nothing that is not in them.

Everyone who wants to know where a study stands (the study itself, the tracker, `status`, `top`, the verdict) folds the
same events here. Applying an event costs about the same for the first and the ten-thousandth trial.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hpsearch.events import (
    Arrived,
    Compared,
    Confirmed,
    Damaged,
    DataSeen,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Finished,
    Leased,
    Opened,
    OutOfRoom,
    RangeMeasured,
    Returned,
    Selected,
    StageBegan,
    StageEnded,
    Stopped,
    TrialDrawn,
)
from hpsearch.job import Config, DataInfo, EpochMetrics, fresh_epochs, rebuild_key, rebuild_parts
from hpsearch.trial import Missing, TrialRecord, TrialState


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


RETRIED = ("fold/", "confirm/", "rebuild/", "evaluate/", "export/")  # jobs whose first crash may be an accident
LIMITS = ("hours", "gpu_hours", "epochs")  # of the budget that may end folds and fresh seeds early
CHECKED = ("task", "parameters", "seed", "metric")  # what preflight's verdicts depend on, beside the code and the data


@dataclass
class StudyState:
    """What is known of a study. Only `apply` changes it."""

    first_opened: Opened | None = None
    opened: Opened | None = None
    edited: bool = False  # some driver had another spec than the one before
    opened_at: float = 0.0  # of the first driver
    resumed_at: list[float] = field(default_factory=list)  # of each driver, the first included
    last_at: float = 0.0
    worked_s: float = 0.0  # seconds that earlier drivers were at work
    data: DataInfo | None = None
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    baselines: list[int] = field(default_factory=list)  # trials of the user's own configs, in the order of drawing
    ranges: list[RangeMeasured] = field(default_factory=list)  # one per branch
    range_edits: int = 0  # how often all ranges were given up, since what they were concluded from was edited
    ramp_epochs: float = 0.0  # trained by all ramps and probes, also by those whose settings were edited since
    results: dict[str, Finished] = field(default_factory=dict)  # finished jobs but for training, by key
    owners: dict[str, int] = field(default_factory=dict)  # ref of each checkpoint that is there -> its trial
    digests: dict[str, str] = field(default_factory=dict)  # ref -> digest of what was written
    out_of_room: bool = False  # budget.disk holds no more of what cannot be done without
    leases: dict[str, Leased] = field(default_factory=dict)  # in workers' hands, by key
    returned: set[str] = field(default_factory=set)  # keys of jobs that were given out and came back without a result
    deaths: Counter[str] = field(default_factory=Counter)  # key of a job -> how often it came back and may be why
    machine_went: bool = False  # the earlier driver's machine went down under it, and is back
    began: dict[str, float] = field(default_factory=dict)  # stage -> time of its (latest) start
    stage_s: dict[str, float] = field(default_factory=dict)  # stage -> seconds spent, over all drivers
    ended_stages: set[str] = field(default_factory=set)
    n_epochs: int = 0  # trained by all trials together
    n_fold_epochs: int = 0  # trained on folds
    n_confirm_epochs: int = 0  # trained with fresh seeds
    n_leased_epochs: int = 0  # in workers' hands, of all of these
    seats: dict[str, Arrived] = field(default_factory=dict)  # worker -> where its process began last
    retried: set[str] = field(default_factory=set)  # keys of jobs that crashed once and are tried once more
    alone: set[str] = field(default_factory=set)  # keys of jobs that ran out of memory, to be tried without company
    improvements: list[Improvement] = field(default_factory=list)  # best-so-far of the search, in order
    evaluated: Evaluated | None = None
    confirmed: Confirmed | None = None
    selected: Selected | None = None
    compared: Compared | None = None
    ended: Ended | None = None
    n_entries: int = field(default=0, compare=False)  # of the journal that `of` was given
    budget_spent: str = ""  # the limit that ended the search, "" where none did
    _busy_s: float = 0.0  # of all workers together, up to their last lease that ended
    _busy_since: dict[str, float] = field(default_factory=dict)  # worker -> when it had nothing to do last
    _busy_since_sum: float = 0.0  # of these times, counted from `opened_at`
    n_held: Counter[str] = field(default_factory=Counter)  # worker -> jobs in its hands
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
    def n_trained_epochs(self) -> int:
        """Of the search, on folds and with fresh seeds; what a budget bounds."""
        return self.n_epochs + self.n_fold_epochs + self.n_confirm_epochs

    @property
    def search_ended(self) -> bool:
        return "search" in self.ended_stages

    @property
    def done(self) -> bool:
        return self.ended is not None and self.ended.reason == "done"

    def busy_s(self, now: float) -> float:
        """Seconds that workers held jobs, over all workers and drivers; time without a driver counts for nobody."""
        # Asked at every question for work, so nothing is summed over a thousand workers here.
        return self._busy_s + len(self._busy_since) * (now - self.opened_at) - self._busy_since_sum

    def is_alone(self, key: str) -> bool:
        """Whether a job has run out of memory once, and is to run with nothing beside it."""
        return key in self.alone

    def ranking(self) -> list[TrialRecord]:
        """All trials, best first; diverged and failed last."""
        return sorted(self.trials.values(), key=lambda trial: trial.sort_key)

    def best(self) -> TrialRecord | None:
        """The best usable trial."""
        return next(iter(self.candidates(1)), None)

    @property
    def beats_baseline(self) -> bool | None:
        """Whether what is delivered is better than ignoring the inputs, beyond noise; None where that is not known."""
        found = self.compared.over_baseline.get("better") if self.compared is not None else None
        return found if isinstance(found, bool) else None

    @property
    def baseline_loss(self) -> float | None:
        """Loss on val of the best prediction that ignores the inputs; None before it is measured."""
        return self.baseline_loss_of("constant")

    def baseline_loss_of(self, name: str) -> float | None:
        """A baseline's loss on val; None before it is measured, or where it made no sense."""
        result = self.results.get(f"baseline/{name}")
        metrics = result.values.get("metrics") if result is not None and result.outcome == "done" else None
        val = metrics.get("val") if isinstance(metrics, Mapping) else None
        return float(val["loss"]) if isinstance(val, Mapping) and "loss" in val else None

    @property
    def confirmed_order(self) -> tuple[int, ...]:
        """The trials that were trained again with fresh seeds, the best first; empty where nothing was confirmed."""
        rows = self.confirmed.standings if self.confirmed is not None else ()
        return tuple(int(str(row["trial"])) for row in rows)

    @property
    def own_trial(self) -> TrialRecord | None:
        """The trial of the user's own config, of the present one where it was edited; None where there is none."""
        baseline = self.opened.spec.get("baseline") if self.opened is not None else None
        if not isinstance(baseline, Mapping):
            return None
        own = (self.trials[number] for number in reversed(self.baselines))
        return next((trial for trial in own if all(trial.config.get(k) == v for k, v in baseline.items())), None)

    @property
    def leaders(self) -> tuple[int, ...]:
        """Trials whose order was looked into after the search, the best first, by the last word on it; empty where the
        search's own scores decide."""
        if self.confirmed_order:
            return self.confirmed_order
        rows = self.evaluated.standings if self.evaluated is not None else ()
        return tuple(int(str(row["trial"])) for row in rows)

    def candidates(self, n: int) -> list[TrialRecord]:
        """The best usable trials, at most `n`, best first.

        One whose checkpoint is not there counts, since it can be trained again; but not where there was no room for
        that of a better one.
        """
        full_from = min((t.sort_key for t in self.trials.values() if t.missing is Missing.NO_ROOM), default=None)
        usable = (
            trial
            for trial in self.trials.values()
            if trial.usable and (trial.best_checkpoint is not None or full_from is None or trial.sort_key < full_from)
        )
        return heapq.nsmallest(n, usable, key=lambda trial: trial.sort_key)

    def counts(self) -> dict[TrialState, int]:
        counts = dict.fromkeys(TrialState, 0)
        for trial in self.trials.values():
            counts[trial.state] += 1
        return counts

    @property
    def metric(self) -> str:
        """The study's, with its split."""
        return self._metric

    def objective(self, metrics: dict[str, float]) -> float:
        """The study's metric of one epoch, turned so that smaller is better.

        Raises:
            KeyError: the metric is not among them.
        """
        return self._sign * metrics[self._metric]

    def best_by_epoch(self, trial: TrialRecord) -> tuple[tuple[int, float], ...]:
        """A trial's (epoch, best objective up to it), from the first finite one on."""
        best, rows = None, []
        for row in trial.curve:
            value = self.objective(row.metrics) if self._metric in row.metrics else None
            if value is not None and value - value == 0.0 and (best is None or value < best):
                best = value
            if best is not None:
                rows.append((row.epoch, best))
        return tuple(rows)

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
                if stage == "search":
                    self.budget_spent = ""
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
                self.ranges = [*(found for found in self.ranges if found.branch != event.branch), event]
            case TrialDrawn():
                if event.baseline:
                    self.baselines.append(event.trial)
                self.trials[event.trial] = TrialRecord(
                    number=event.trial,
                    config=event.config,
                    seed=event.seed,
                    baseline=event.baseline,
                    max_epochs=self._max_epochs,
                    drawn_at=time,
                )
            case Leased():
                self._lease(event, time)
            case Returned(key=key, blamed=blamed):
                self._release(key, time)
                self.returned.add(key)
                if blamed:
                    self.deaths[key] += 1
            case Finished():
                self._finish(event, time)
            case Stopped(trial=number):
                self.trials[number].let_go = True
                self.trials[number].ended_at = time
            case Dropped(refs=refs, no_room=no_room):
                for ref in refs:
                    self._lose(ref, Missing.NO_ROOM if no_room else Missing.DROPPED)
            case Damaged(ref=ref):
                self._damage(ref)
            case OutOfRoom():
                self.out_of_room = True
            case Evaluated():
                self.evaluated = event
            case Confirmed():
                self.confirmed = event
            case Selected():
                self.selected, self.compared = event, None
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
            self.first_opened = event
            self.opened_at = time
        else:
            # Time between two drivers counts for nobody: a stage that was under way begins anew.
            self.worked_s += last_at - self.resumed_at[-1]
            for worker, since in self._busy_since.items():
                self._busy_s += last_at - since
                self._busy_since[worker] = time
            self._busy_since_sum = len(self._busy_since) * (time - self.opened_at)
            for stage in [name for name in self.began if name not in self.ended_stages]:
                self.stage_s[stage] = self.stage_s.get(stage, 0.0) + last_at - self.began.pop(stage)
            if self.opened.spec.get("ensemble") != spec.get("ensemble"):
                self.selected = self.compared = None  # chosen by other settings
            if self.opened.spec.get("confirm") != spec.get("confirm"):
                self.confirmed = self.selected = self.compared = None
            if _asked(self.opened.spec, "evaluate") != _asked(spec, "evaluate"):
                self.evaluated = self.confirmed = self.selected = self.compared = None
            if spec.get("baseline") not in (None, self.opened.spec.get("baseline")):
                self.compared = None  # it is told against the other config; against none, nothing has to be told anew
            if _part(self.opened.spec, "budget", LIMITS) != _part(spec, "budget", LIMITS):
                self._go_on_with_what_was_cut_short()
            if _part(self.opened.spec, "budget", ("disk",)) != _part(spec, "budget", ("disk",)):
                self._make_room()
            if self.opened.spec != spec:
                self.edited = True
                self.returned.clear()  # nobody would be given these jobs any more, or not for the same reason
                self._forget_ranges(self.opened.spec, spec)
            if self.opened.code != event.code:
                self.deaths.clear()  # of a task that has been mended since
            if self.opened.code != event.code or any(self.opened.spec.get(k) != spec.get(k) for k in CHECKED):
                self.results = {k: v for k, v in self.results.items() if not k.startswith("check/")}
        if self.ended is not None and self.ended.reason == "failed":
            self._forgive()
        self.machine_went = self.opened is not None and self.ended is None and _went_down(self.opened, event)
        self.opened = event
        self.resumed_at.append(time)
        self.ended = None
        for trial in self.trials.values():
            trial.max_epochs = self._max_epochs

    def _forgive(self) -> None:
        """The task was at fault and has been mended, or nobody would go on: what crashed may be tried again."""
        self.results = {key: result for key, result in self.results.items() if result.outcome != "crashed"}
        self.retried.clear()
        self.deaths.clear()
        for trial in self.trials.values():
            trial.crashes = 0 if not trial.failed else trial.crashes
            if trial.missing is Missing.SPOILT:
                trial.missing = Missing.DROPPED

    def _forget_ranges(self, old: Mapping[str, object], new: Mapping[str, object]) -> None:
        """Ranges are concluded anew when the user's bounds or the ramps were edited, from those ramps that still hold.

        Ranges stay as they are where anything else was edited, since old trials were drawn from them.
        """
        ramps = [_part(spec, "lr_range", ("min", "max", "steps")) for spec in (old, new)]
        if ramps[0] != ramps[1]:
            self.results = {k: v for k, v in self.results.items() if not k.startswith(("ramp/", "probe/"))}
        seeds = [_part(spec, "lr_range", ("seeds",)) for spec in (old, new)]
        bounds = [lr_bounds(spec.get("parameters")) for spec in (old, new)]
        if ramps[0] != ramps[1] or seeds[0] != seeds[1] or bounds[0] != bounds[1]:
            self.range_edits += bool(self.ranges)
            self.ranges = []

    def _go_on_with_what_was_cut_short(self) -> None:
        """Another budget: what the last one ended may be taken further, from what was trained."""
        if self.evaluated is not None and self.evaluated.reason:
            self.evaluated = self.confirmed = self.selected = self.compared = None
        if self.confirmed is not None and self.confirmed.reason:
            self.confirmed = self.selected = self.compared = None

    def _forget_ensemble(self) -> None:
        """The search goes on: trials get other checkpoints, so what was measured of the old ones holds no longer."""
        self.results = {k: v for k, v in self.results.items() if not k.startswith(("evaluate/", "export/"))}
        self.evaluated = self.confirmed = self.selected = self.compared = None
        for stage in ("evaluate", "confirm", "ensemble"):
            self.ended_stages.discard(stage)
            self.began.pop(stage, None)

    def _mark_search(self) -> None:
        ended = self.search_ended
        for trial in self.trials.values():
            trial.search_ended = ended

    def _lease(self, event: Leased, time: float) -> None:
        self._release(event.key, time)  # a lease that is announced anew is one lease
        self.leases[event.key] = event
        self.returned.discard(event.key)
        self.n_leased_epochs += event.to_epoch - event.from_epoch + fresh_epochs(event.key)
        self.n_held[event.worker] += 1
        if event.worker not in self._busy_since:
            self._busy_since[event.worker] = time
            self._busy_since_sum += time - self.opened_at
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
        self.n_leased_epochs -= lease.to_epoch - lease.from_epoch + fresh_epochs(key)
        self.n_held[lease.worker] -= 1
        if not self.n_held[lease.worker]:
            since = self._busy_since.pop(lease.worker)
            self._busy_s += time - since
            self._busy_since_sum -= since - self.opened_at
        if lease.trial is not None:
            self.trials[lease.trial].leased = None
            self.trials[lease.trial].leased_to = None

    def _finish(self, event: Finished, time: float) -> None:
        self._release(event.key, time)
        self.returned.discard(event.key)
        self.deaths.pop(event.key, None)
        if event.key.startswith("fold/"):
            self.n_fold_epochs += len(event.epochs)
        elif event.outcome in ("done", "diverged"):
            self.n_confirm_epochs += fresh_epochs(event.key)
        if event.outcome == "out_of_memory" and event.key not in self.alone:
            self.alone.add(event.key)
            if event.trial is None:
                return  # it is tried once more
        else:
            self.alone.discard(event.key)
        accident = event.outcome == "crashed" and not event.final
        if accident and event.key.startswith(RETRIED) and event.key not in self.retried:
            self.retried.add(event.key)
            return  # as a trial is: one accident decides nothing
        if event.trial is None:
            self.results[event.key] = event
            self.digests.update(event.digests)
            if event.key.startswith("rebuild/"):
                self._rebuild(event)
            if event.key.startswith(("ramp/", "probe/")):
                self.ramp_epochs += float(str(event.values.get("epochs", 0.0)))
            return
        trial = self.trials[event.trial]
        trial.ended_at = time
        for epoch, metrics, seconds in event.epochs:
            if epoch > trial.epoch:
                self.n_epochs += 1
                self._learn(trial, EpochMetrics(epoch=epoch, metrics=metrics, seconds=seconds))
        match event.outcome:
            case "done" | "diverged":
                self._take_checkpoints(trial, event)
                size = event.values.get("n_parameters")
                trial.n_parameters = size if isinstance(size, int) else trial.n_parameters
                trial.diverged = event.outcome == "diverged"
                lanes = event.values.get("lanes")
                trial.lanes = max(trial.lanes, lanes) if isinstance(lanes, int) else trial.lanes
            case "out_of_memory":
                trial.out_of_memory += 1
            case _:
                trial.crashes += 1
        trial.message, trial.frame = event.message, event.frame
        if event.outcome == "done":
            self._compare_with_best(trial, time)
        # One retry with the same seed: a second crash of the same trial is no accident.
        alone = event.outcome == "out_of_memory" and event.key not in self.alone
        trial.failed = trial.crashes > 1 or event.final or alone

    # Checkpoints

    def _take_checkpoints(self, trial: TrialRecord, event: Finished) -> None:
        checkpoint, best = event.values.get("checkpoint"), event.values.get("best_checkpoint")
        before = {trial.checkpoint, trial.best_checkpoint}
        trial.checkpoint = None if checkpoint is None else str(checkpoint)
        if best is not None:
            trial.best_checkpoint = trial.best_ref = str(best)
            trial.missing = None
        now = {trial.checkpoint, trial.best_checkpoint}
        for ref in before - now:
            self._forget_ref(ref)
        for ref in now:
            if ref is not None:
                self.owners[ref] = trial.number
        self.digests.update(event.digests)
        unkept = event.values.get("unkept")
        for ref in unkept if isinstance(unkept, (list, tuple)) else ():
            self._lose(str(ref), Missing.NO_ROOM if event.values.get("no_room") else Missing.DROPPED)

    def _rebuild(self, event: Finished) -> None:
        """A best checkpoint was trained again, if it is still the trial's best."""
        parts = rebuild_parts(event.key)
        assert parts is not None
        trial = self.trials[parts[0]]
        if trial.best_epoch != parts[1]:
            return
        if event.outcome != "done":
            trial.missing = Missing.SPOILT
            return
        ref = str(event.values["best_checkpoint"])
        trial.best_checkpoint = trial.best_ref = ref
        trial.missing = None
        self.owners[ref] = trial.number
        if event.values.get("unkept"):
            self._lose(ref, Missing.NO_ROOM)

    def _lose(self, ref: str, why: Missing) -> None:
        """A trial's checkpoint is not there; it may be its last and its best."""
        number = self.owners.get(ref)
        self._forget_ref(ref)
        if number is None:
            return
        trial = self.trials[number]
        if trial.checkpoint == ref:
            trial.checkpoint = None
        if trial.best_checkpoint == ref:
            trial.best_checkpoint, trial.missing = None, why
            self.results.pop(rebuild_key(number, trial.best_epoch or 0), None)

    def _damage(self, ref: str) -> None:
        if ref in self.owners:
            self._lose(ref, Missing.DROPPED)
            return
        self._forget_ref(ref)
        self.results = {key: result for key, result in self.results.items() if not _names(result.values, ref)}

    def _forget_ref(self, ref: str | None) -> None:
        if ref is not None:
            self.owners.pop(ref, None)
            self.digests.pop(ref, None)

    def _make_room(self) -> None:
        """Another budget: what it could not hold may be had again."""
        self.out_of_room = False
        for trial in self.trials.values():
            if trial.missing is Missing.NO_ROOM:
                trial.missing = Missing.DROPPED

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


def lr_bounds(parameters: object) -> list[tuple[object, object]]:
    """The bounds of every `lr` in a dumped spec's parameters, those within choices too, in order.

    >>> lr_bounds({"lr": {"min": 0.001, "max": 0.1}, "width": {"min": 8, "max": 64}})
    [(0.001, 0.1)]
    """
    found: list[tuple[object, object]] = []
    for name, form in parameters.items() if isinstance(parameters, Mapping) else ():
        if isinstance(form, Mapping):
            if name == "lr" and "min" in form:
                found.append((form["min"], form["max"]))
            choices = form.get("choices")
            for inner in choices.values() if isinstance(choices, Mapping) else ():
                found += lr_bounds(inner)
    return found


def _went_down(before: Opened, now: Opened) -> bool:
    """Whether the machine of a driver was started anew before the next driver; False where that is not known."""
    hosts, boots = ([str(event.environment.get(key) or "") for event in (before, now)] for key in ("host", "boot"))
    return hosts[0] == hosts[1] and all(boots) and boots[0] != boots[1]


def _part(spec: Mapping[str, object], section: str, keys: tuple[str, ...]) -> list[object]:
    found = spec.get(section)
    return [found.get(key) if isinstance(found, Mapping) else None for key in keys]


def _asked(spec: Mapping[str, object], stage: str) -> Mapping[str, object] | None:
    """A stage's settings; None where it is off, as it is in the journal of a version that did not know it."""
    found = spec.get(stage)
    return found if isinstance(found, Mapping) and found.get("enabled") else None


def _names(values: object, ref: str) -> bool:
    """Whether a reference is among a result's values, at any depth."""
    if isinstance(values, Mapping):
        return any(_names(value, ref) for value in values.values())
    if isinstance(values, (list, tuple)):
        return any(_names(value, ref) for value in values)
    return values == ref


def data_info(fields: dict[str, object]) -> DataInfo:
    """DataInfo from its JSON form."""
    known = {f.name for f in dataclasses.fields(DataInfo)}
    body = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known}
    return DataInfo(**body)  # type: ignore[arg-type]
