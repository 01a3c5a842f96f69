"""The search stage: what may run next, for every situation that a study meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpsearch.events import Event, Finished, Leased, Opened, RangeMeasured, Returned, TrialDrawn
from hpsearch.job import Config, TrainJob
from hpsearch.rungs import make_rule
from hpsearch.sampler import Bounds
from hpsearch.stages.search import Search, SearchSettings
from hpsearch.state import StudyState
from hpsearch.trial import TrialState


class CountingSampler:
    """Config i is {"lr": 10**-i, "optimizer": sgd for odd i}."""

    def config(self, number: int, bounds: Bounds) -> Config | None:
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
    state: StudyState = field(default_factory=StudyState)
    time: float = 0.0
    told: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.search = Search(
            SearchSettings(
                n_trials=self.n_trials,
                max_epochs=9,
                study_seed=0,
                n_complete=self.n_complete,
                per=("optimizer",),
                measured=self.measured,
            ),
            self.state,
            sampler=CountingSampler(),
            rule=make_rule(self.rule, min_epochs=1, max_epochs=9, reduction_factor=3, n_trials=self.n_trials),  # type: ignore[arg-type]
        )
        spec = {"metric": {"name": "val_loss", "goal": "minimize"}, "early_stopping": {"max_epochs": 9}}
        self.tell(Opened(study="s", uid="u", spec=spec, spec_text=""))

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
