"""The search stage: what may run next, for every situation that a study meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from hpsearch.events import Event, Finished, Leased, Opened, RangeMeasured, Returned, TrialDrawn
from hpsearch.job import Config, TrainJob
from hpsearch.rungs import make_rule
from hpsearch.sampler import BoundsOf
from hpsearch.stages.search import Search, SearchSettings
from hpsearch.state import StudyState
from hpsearch.trial import TrialState


class CountingSampler:
    """Config i is {"lr": 10**-i, "optimizer": sgd for odd i}."""

    in_any_order = True

    def config(self, number: int, bounds: BoundsOf) -> Config | None:
        config: Config = {"lr": 10.0**-number, "optimizer": "sgd" if number % 2 else "adamw"}
        return None if bounds(config) is None else config

    def observe(self, number: int, config: Config, objective: float | None, epoch: int) -> None: ...

    def restore(self, number: int, config: Config) -> None: ...


@dataclass
class Bench:
    """A search with its state, driven by hand."""

    n_trials: int = 9
    measured: tuple[str, ...] = ()
    rule: str = "asha"
    n_complete: int = 2
    min_epochs: int = 1
    max_epochs: int = 9
    reduction_factor: int = 3
    state: StudyState = field(default_factory=StudyState)
    time: float = 0.0
    told: list[Event] = field(default_factory=list)
    first: bool = True  # of the study's drivers

    def __post_init__(self) -> None:
        self.search = Search(
            SearchSettings(
                n_trials=self.n_trials,
                max_epochs=self.max_epochs,
                study_seed=0,
                n_complete=self.n_complete,
                per=("optimizer",),
                measured=self.measured,
                stopping=self.stopping,
            ),
            self.state,
            sampler=CountingSampler(),
            make_rule=lambda: make_rule(
                self.rule,  # type: ignore[arg-type]
                min_epochs=self.min_epochs,
                max_epochs=self.max_epochs,
                reduction_factor=self.reduction_factor,
                n_trials=self.n_trials,
            ),
        )
        if self.first:
            self.tell(self.opened())

    @property
    def stopping(self) -> dict[str, object]:
        return {
            "type": self.rule,
            "min_epochs": self.min_epochs,
            "max_epochs": self.max_epochs,
            "reduction_factor": self.reduction_factor,
        }

    def opened(self) -> Opened:
        spec = {"metric": {"name": "val_loss", "goal": "minimize"}, "early_stopping": self.stopping}
        return Opened(study="s", uid="u", spec=spec, spec_text="")

    def edited(self, **changes: Any) -> Bench:
        """The same study, opened again by a driver with other settings."""
        other = dataclasses.replace(self, **changes, state=StudyState(), told=[], time=0.0, first=False)
        other.tell(*self.told, other.opened())
        for lease in list(other.state.leases.values()):
            other.tell(Returned(key=lease.key, worker=lease.worker, reason="the driver went"))
        return other

    def tell(self, *events: Event) -> None:
        for event in events:
            self.told.append(event)
            self.time += 1
            self.state.apply(event, self.time)
            self.search.apply(event)

    def take(self, worker: str = "w") -> TrainJob | None:
        job = self.search.next_job(worker)
        if job is None:
            return None
        drawn = self.search.drawn(job)
        if drawn is not None:
            self.tell(drawn)
        self.tell(Leased(key=job.key, worker=worker, trial=job.trial, from_epoch=job.from_epoch, to_epoch=job.to_epoch))
        return job

    def finish(
        self, job: TrainJob, loss: float = 0.5, outcome: str = "done", worker: str = "w", resumable: bool = True
    ) -> None:
        values: Mapping[str, object] = {"checkpoint": job.key, "best_checkpoint": job.key, "resumable": resumable}
        rows: Sequence[tuple[int, dict[str, float], float]] = [
            (epoch, {"val_loss": loss}, 0.1) for epoch in range(job.from_epoch + 1, job.to_epoch + 1)
        ]
        done = outcome == "done"
        self.tell(
            Finished(
                key=job.key,
                worker=worker,
                outcome=outcome,  # type: ignore[arg-type]
                trial=job.trial,
                values=values if done else {},
                epochs=tuple(rows) if done else (),
            )
        )
        self.tell(*self.search.conclude())

    def run(self, losses: Mapping[int, float]) -> list[str]:
        """Keys of all jobs, in order, when trial i has loss losses[i]."""
        keys = []
        while (job := self.take()) is not None:
            keys.append(job.key)
            self.finish(job, losses[job.trial])
        return keys


def test_trials_go_to_the_first_rung_and_the_best_go_on_at_once() -> None:
    bench = Bench()
    assert bench.run({i: float(i) for i in range(9)})[:5] == [
        "train/0/0-1",
        "train/1/0-1",
        "train/2/0-1",
        "train/0/1-3",
        "train/3/0-1",
    ]


def test_end_game_completes_an_ensembles_worth_of_trials() -> None:
    bench = Bench(n_complete=3)
    bench.run({i: float(i) for i in range(9)})
    complete = [n for n, trial in bench.state.trials.items() if trial.state is TrialState.COMPLETE]
    assert complete == [0, 1, 2]
    assert bench.search.finished()


def test_end_game_waits_for_what_runs_below_the_last_epoch() -> None:
    bench = Bench(n_trials=2, n_complete=1)
    first, second = bench.take("a"), bench.take("b")
    assert first is not None
    assert second is not None
    bench.finish(first, loss=2.0, worker="a")
    assert bench.take("a") is None
    assert not bench.search.finished()
    bench.finish(second, loss=1.0, worker="b")
    last = bench.take("a")
    assert last is not None
    assert last.key == "train/1/1-9"


def test_end_game_replaces_a_trial_that_diverges_in_it() -> None:
    bench = Bench(n_trials=3, n_complete=1, rule="sha")
    for loss in (1.0, 2.0, 3.0):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss)
    keys = []
    while (job := bench.take()) is not None:
        keys.append(job.key)
        bench.finish(job, 1.0, outcome="diverged" if job.trial == 0 and job.to_epoch == 9 else "done")
    assert keys[-1] == "train/1/1-9"


def test_lost_job_is_given_out_again_before_anything_new() -> None:
    bench = Bench()
    job = bench.take("a")
    assert job is not None
    bench.tell(Returned(key=job.key, worker="a", reason="lost"))
    again = bench.take("b")
    assert again == job


def test_promoted_job_that_is_lost_is_the_same_job_again() -> None:
    bench = Bench()
    for loss in (0.0, 1.0, 2.0):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss)
    promoted = bench.take()
    assert promoted is not None
    assert promoted.key == "train/0/1-3"
    bench.tell(Returned(key=promoted.key, worker="w", reason="lost"))
    again = bench.take("other")
    assert again == promoted


def test_crashed_trial_is_tried_once_more_then_failed() -> None:
    bench = Bench(n_trials=1)
    for _ in range(2):
        job = bench.take()
        assert job is not None
        assert job.key == "train/0/0-1"
        bench.finish(job, outcome="crashed")
    assert bench.take() is None
    assert bench.search.finished()
    assert bench.state.trials[0].state is TrialState.FAILED


def test_synchronous_halving_does_not_wait_for_diverged_trials() -> None:
    bench = Bench(n_trials=4, rule="sha", n_complete=1)
    for loss, outcome in ((1.0, "done"), (0.0, "diverged"), (2.0, "done"), (3.0, "done")):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss, outcome)
    job = bench.take()
    assert job is not None
    assert job.trial == 0


def test_trial_that_waits_for_its_range_lets_later_ones_pass() -> None:
    bench = Bench(measured=("lr",), n_trials=4)
    assert bench.take() is None
    bench.tell(_range("sgd"))
    assert _trials(bench) == [1, 3]
    bench.tell(_range("adamw"))
    assert _trials(bench) == [0, 2]


def test_budget_that_is_spent_gives_out_nothing_and_ends_when_all_is_in() -> None:
    bench = Bench()
    job = bench.take()
    assert job is not None
    bench.search.end_budget()
    assert bench.take("other") is None
    assert not bench.search.finished()
    bench.finish(job)
    assert bench.search.finished()


def test_trial_that_cannot_pause_goes_on_where_it_lives_or_is_stopped() -> None:
    bench = Bench(n_trials=4, n_complete=1)
    first = bench.take("a")
    assert first is not None
    bench.finish(first, loss=0.5, worker="a", resumable=False)
    going_on = bench.take("a")
    assert going_on is not None
    assert going_on.key == "train/0/1-3"
    other = bench.take("b")
    assert other is not None
    assert other.trial == 1
    bench.finish(other, loss=0.9, worker="b", resumable=False)
    assert bench.state.trials[1].state is TrialState.STOPPED
    following = bench.take("b")
    assert following is not None
    assert following.trial == 2


def test_worker_lost_with_a_trial_that_cannot_pause_gives_it_to_another() -> None:
    bench = Bench(n_trials=1, n_complete=1)
    job = bench.take("a")
    assert job is not None
    bench.finish(job, worker="a", resumable=False)
    bench.search.lost("a")
    again = bench.take("b")
    assert again is not None
    assert (again.trial, again.from_epoch) == (0, 1)


def test_worker_can_hold_two_trials_that_cannot_pause() -> None:
    bench = Bench(n_trials=2, n_complete=2, rule="asha")
    first, second = bench.take("a"), bench.take("a")
    assert first is not None
    assert second is not None
    bench.finish(first, loss=0.5, worker="a", resumable=False)
    bench.finish(second, loss=0.4, worker="a", resumable=False)
    going_on = [bench.take("a"), bench.take("a")]
    assert sorted(job.key for job in going_on if job is not None) == ["train/0/1-3", "train/1/1-3"]


def test_trial_that_was_stopped_is_not_stopped_again_when_replayed() -> None:
    bench = Bench(n_trials=2, n_complete=1)
    for loss in (0.5, 0.9):
        job = bench.take("a")
        assert job is not None
        bench.finish(job, loss=loss, worker="a", resumable=False)
        if loss == 0.5:
            bench.search.lost("a")
    again = Bench(n_trials=2, n_complete=1)
    again.tell(*bench.told)
    assert again.search.conclude() == []


def test_replayed_events_leave_the_same_next_job() -> None:
    bench, other = Bench(), Bench()
    for loss in (3.0, 1.0, 2.0, 0.5):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss)
    other.tell(*bench.told[1:])
    assert other.search.next_job("w") == bench.search.next_job("w")


def _range(optimizer: str) -> RangeMeasured:
    return RangeMeasured(
        branch={"optimizer": optimizer},
        lr=0.1,
        low=0.01,
        high=0.3,
        spread_decades=0.1,
        at_edge=False,
        confirmed=False,
    )


def _trials(bench: Bench) -> list[int]:
    """The new trials that can start now."""
    trials = []
    while (job := bench.take()) is not None and isinstance(job, TrainJob):
        trials.append(job.trial)
    return trials


def test_drawn_trial_is_the_job_it_came_from() -> None:
    bench = Bench()
    job = bench.search.next_job("w")
    assert job is not None
    drawn = bench.search.drawn(job)
    assert drawn == TrialDrawn(trial=0, config=job.config, seed=job.seed)
    assert bench.search.drawn(job) == drawn


# Eras


def trained(bench: Bench, losses: Mapping[int, float], n_jobs: int) -> None:
    """So many jobs, done one after another."""
    for _ in range(n_jobs):
        job = bench.take()
        assert job is not None
        bench.finish(job, losses[job.trial])


LOSSES = {number: float(number) for number in range(9)}


def test_longer_training_pauses_complete_trials_and_lets_the_best_go_on() -> None:
    bench = Bench()
    bench.run(LOSSES)
    assert bench.search.finished()
    longer = bench.edited(max_epochs=27)
    assert not longer.search.finished()
    assert longer.run(LOSSES) == ["train/0/9-27", "train/1/9-27"]
    assert longer.search.finished()


def test_trial_past_a_new_rung_is_compared_there_and_goes_on_from_its_own_epoch() -> None:
    bench = Bench(rule="sha")
    bench.run(LOSSES)  # three have come to epoch 3, two of them to 9
    other = bench.edited(rule="sha", min_epochs=2, reduction_factor=2, max_epochs=16)
    keys = other.run(LOSSES)
    assert keys[:6] == [f"train/{number}/1-2" for number in range(3, 9)]
    assert "train/2/3-4" in keys
    assert "train/0/9-16" in keys
    assert not any(key.startswith(("train/0/3", "train/1/3")) for key in keys)


def test_shorter_training_leaves_nothing_to_do_with_trials_that_are_beyond_it() -> None:
    bench = Bench()
    bench.run(LOSSES)
    assert bench.edited(max_epochs=3).search.finished()


def test_job_of_an_older_era_is_not_given_out_again() -> None:
    """Its trial is judged anew: it stands at the lowest rung, where the others' values are not in yet."""
    bench = Bench(rule="sha")
    trained(bench, LOSSES, 9)
    lost = bench.take()
    assert lost is not None
    assert lost.key == "train/0/1-3"
    other = bench.edited(rule="sha", min_epochs=1, reduction_factor=2)
    assert other.run(LOSSES)[0] == "train/0/1-2"


def test_trial_that_passed_no_rung_is_trained_to_the_first() -> None:
    bench = Bench()
    trained(bench, LOSSES, 2)
    other = bench.edited(min_epochs=4)
    assert other.run(LOSSES)[:3] == ["train/0/1-4", "train/1/1-4", "train/2/0-4"]


def test_value_at_a_new_rung_is_the_best_up_to_it() -> None:
    """Trial 0 was bad at epoch 1 and good at 3; at rung 2 only its first two epochs count."""
    bench = Bench(n_trials=3, rule="none", max_epochs=3)
    for curve in ((0.9, 0.8, 0.1), (0.5, 0.5, 0.5), (0.6, 0.6, 0.6)):
        job = bench.take()
        assert job is not None
        rows = tuple((epoch, {"val_loss": loss}, 0.1) for epoch, loss in enumerate(curve, start=1))
        values = {"checkpoint": job.key, "best_checkpoint": job.key, "resumable": True}
        bench.tell(Finished(key=job.key, worker="w", outcome="done", trial=job.trial, values=values, epochs=rows))
    other = bench.edited(rule="asha", min_epochs=2, max_epochs=6, reduction_factor=3)
    job = other.take()
    assert job is not None
    assert job.key == "train/1/3-6"


def test_era_that_was_interrupted_goes_on_as_it_would_have() -> None:
    bench = Bench()
    trained(bench, LOSSES, 7)
    other = bench.edited(max_epochs=27, reduction_factor=2)
    trained(other, LOSSES, 5)
    again = other.edited()
    assert again.run(LOSSES) == other.run(LOSSES)


def test_settings_edited_back_begin_an_era_of_their_own() -> None:
    """What was trained meanwhile, to other rungs, counts where it has come to."""
    bench = Bench(n_trials=4)
    trained(bench, LOSSES, 2)
    between = bench.edited(min_epochs=2)
    trained(between, LOSSES, 3)
    back = between.edited(min_epochs=1)
    assert all(job.split("/")[-1].split("-")[1] in ("1", "3", "9") for job in back.run(LOSSES))
    assert back.search.finished()


def test_sampler_is_told_of_every_era() -> None:
    class Listening(CountingSampler):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def observe(self, number: int, config: Config, objective: float | None, epoch: int) -> None:
            self.seen.append((number, epoch))

    bench = Bench()
    trained(bench, LOSSES, 4)
    other = bench.edited(max_epochs=27)
    listening = Listening()
    search = Search(
        SearchSettings(
            n_trials=9, max_epochs=27, study_seed=0, n_complete=2, per=(), measured=(), stopping=other.stopping
        ),
        state := StudyState(),
        sampler=listening,
        make_rule=lambda: make_rule("asha", min_epochs=1, max_epochs=27, reduction_factor=3, n_trials=9),
    )
    for time, event in enumerate(other.told):
        state.apply(event, float(time))
        search.apply(event)
    assert listening.seen == [(0, 1), (1, 1), (2, 1), (0, 3)]


def test_a_key_of_early_stopping_that_an_older_version_did_not_have_begins_no_era() -> None:
    bench = Bench(n_trials=2)
    bench.run(LOSSES)
    old = Opened(study="s", uid="u", spec={"early_stopping": {"max_epochs": 9}}, spec_text="")
    before = bench.search._rule
    bench.tell(old, bench.opened())
    assert bench.search._rule is before


def test_trial_that_diverged_at_the_top_of_its_rung_never_goes_on_under_new_ones() -> None:
    bench = Bench(rule="sha", n_complete=1)
    trained(bench, LOSSES, 9)
    job = bench.take()
    assert job is not None
    assert job.key == "train/0/1-3"
    bench.finish(job, outcome="diverged")
    other = bench.edited(rule="sha", max_epochs=27)
    assert not any(key.startswith("train/0/") for key in other.run(LOSSES))


def test_trial_that_was_let_go_never_goes_on_under_new_rungs() -> None:
    losses = {0: 0.5, 1: 0.9, 2: 0.8}
    bench = Bench(n_trials=3, n_complete=1)
    while not any(trial.let_go for trial in bench.state.trials.values()):
        job = bench.take("a")
        assert job is not None
        bench.finish(job, loss=losses[job.trial], worker="a", resumable=False)
    assert bench.state.trials[1].let_go
    keys = bench.edited(reduction_factor=2, n_complete=3).run(losses)
    assert not any(key.startswith("train/1/") for key in keys)
    assert {key.split("/")[1] for key in keys} == {"2"}  # 0 is complete


# What may be asked for again


def test_checkpoint_is_asked_for_while_its_trial_may_go_on() -> None:
    bench = Bench(n_trials=9, n_complete=2)
    jobs = [bench.take() for _ in range(9)]
    assert bench.search.may_continue(0, 0, None)  # in a worker's hands
    for job in jobs[:8]:
        assert job is not None
        bench.finish(job, loss=0.1 * (job.trial + 1))
    may = [bench.search.may_continue(trial, 1, 0.1 * (trial + 1)) for trial in range(8)]
    assert may == [True] * 3 + [False] * 5  # the third of 9, when the last has come
    assert bench.search.may_continue(8, 1, 0.25)  # if it ended so
    assert not bench.search.may_continue(8, 1, 0.95)
    assert not bench.search.may_continue(8, 9, 0.0)  # it would be complete


def test_end_games_candidates_are_asked_for_and_nobody_else() -> None:
    bench = Bench(n_trials=5, n_complete=2)
    for _ in range(5):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss=0.1 * (job.trial + 1))
    assert [trial.epoch for trial in bench.state.trials.values()] == [3, 1, 1, 1]
    may = [bench.search.may_continue(n, trial.epoch, trial.best_objective) for n, trial in bench.state.trials.items()]
    assert may == [True, True, False, False]


def test_trial_whose_job_was_lost_is_asked_for_and_one_that_is_spoilt_is_not() -> None:
    bench = Bench(n_trials=3)
    first = bench.take()
    assert first is not None
    bench.finish(first, loss=0.9)
    for loss in (0.1, 0.2):
        job = bench.take()
        assert job is not None
        bench.finish(job, loss=loss)
    promoted = bench.take()
    assert promoted is not None
    assert promoted.from_epoch == 1
    bench.tell(Returned(key=promoted.key, worker="w", reason="lost"))
    assert bench.search.may_continue(promoted.trial, 1, 0.1)
    bench.take()
    bench.finish(promoted, outcome="diverged")
    assert not bench.search.may_continue(promoted.trial, 1, 0.1)


# Jobs for a program's free lanes


def beside(bench: Bench, job: TrainJob, worker: str = "w") -> TrainJob | None:
    found = bench.search.next_beside(worker, job)
    if found is not None:
        drawn = bench.search.drawn(found)
        bench.tell(*([drawn] if drawn is not None else []))
        bench.tell(Leased(key=found.key, worker=worker, trial=found.trial, to_epoch=found.to_epoch, beside=job.key))
    return found


def test_free_lanes_get_trials_of_the_group_and_those_passed_over_come_next() -> None:
    bench = Bench()
    first = bench.take()
    assert first is not None
    found = [beside(bench, first) for _ in range(5)]
    assert [job.trial if job else None for job in found] == [2, 4, 6, 8, None]
    following = [bench.take("v") for _ in range(2)]
    assert [job.trial for job in following if job] == [1, 3]


def test_free_lanes_get_promotions_of_the_group_before_new_trials() -> None:
    bench = Bench(n_trials=20)
    jobs = [bench.take() for _ in range(6)]
    for job in jobs:
        assert job is not None
        bench.finish(job, loss=0.1 * (job.trial + 1))
    adamw, sgd = jobs[0], jobs[1]
    assert adamw is not None
    assert sgd is not None
    found = [beside(bench, sgd) for _ in range(2)]
    assert [(job.trial, job.from_epoch) for job in found if job] == [(1, 1), (7, 0)]  # the best may go on, of adamw: 0
    promoted = beside(bench, adamw)
    assert promoted is not None
    assert (promoted.trial, promoted.from_epoch) == (0, 1)


def test_trials_to_come_are_counted_alike_after_a_replay() -> None:
    bench = Bench()
    first = bench.take()
    assert first is not None
    jobs = [first, *(job for _ in range(4) if (job := beside(bench, first)) is not None)]
    for job in jobs:
        bench.finish(job, loss=0.1 * (job.trial + 1))
    assert list(bench.state.trials) == [0, 2, 4, 6, 8]
    replayed = dataclasses.replace(bench, state=StudyState(), told=[], time=0.0, first=False)
    replayed.tell(*bench.told)
    for each in (bench, replayed):
        may = [each.search.may_continue(job.trial, 1, 0.1 * (job.trial + 1)) for job in jobs]
        assert may == [True] * 3 + [False] * 2  # the third of 9, of which 4 have yet to come


def test_no_trial_is_passed_over_by_more_than_the_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.stages.search.LANES_LOOK_AHEAD", 4)
    bench = Bench(n_trials=100)
    first = bench.take()
    assert first is not None
    found = []
    while (job := beside(bench, first)) is not None:
        found.append(job.trial)
    assert found == [2, 4]  # 5 is as far as it goes while 1 waits
    assert [job.trial for job in (bench.take("v") for _ in range(2)) if job] == [1, 3]
    job = beside(bench, first)
    assert job is not None
    assert job.trial == 6  # the line has moved on


def test_sampler_that_learns_is_not_asked_ahead() -> None:
    class Learning(CountingSampler):
        in_any_order = False

    bench = Bench()
    bench.search._sampler = Learning()
    first = bench.take()
    assert first is not None
    assert beside(bench, first) is None  # trial 1 is of another group
    second = bench.take("v")
    assert second is not None
    third = beside(bench, first)
    assert third is not None
    assert (second.trial, third.trial) == (1, 2)


def test_lost_job_goes_into_a_lane_of_its_group() -> None:
    bench = Bench()
    jobs = [bench.take() for _ in range(4)]
    assert all(jobs)
    for job in jobs[:2]:
        assert job is not None
        bench.tell(Returned(key=job.key, worker="w", reason="its worker was lost"))
    assert jobs[3] is not None
    found = beside(bench, jobs[3], "v")
    assert found is not None
    assert found.trial == 1
    again = bench.take("v")
    assert again is not None
    assert again.trial == 0


def test_nothing_goes_into_lanes_when_the_budget_is_spent() -> None:
    bench = Bench()
    first = bench.take()
    assert first is not None
    bench.search.end_budget()
    assert beside(bench, first) is None


def test_worker_gets_the_trial_that_it_trained_last_when_several_may_go_on() -> None:
    bench = Bench(n_trials=6)
    jobs = [bench.take("v" if number % 2 else "w") for number in range(6)]
    for job in jobs:
        assert job is not None
        bench.finish(job, loss=0.1 * (job.trial + 1), worker="v" if job.trial % 2 else "w")
    mine = bench.take("v")
    other = bench.take("v")
    assert mine is not None
    assert other is not None
    assert (mine.trial, other.trial) == (1, 0)  # both may go on; nobody waits for the better one
