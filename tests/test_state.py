"""The state of a study is the fold of its events, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hpsearch.events import (
    Ended,
    Event,
    Finished,
    Leased,
    Opened,
    RangeMeasured,
    Returned,
    StageBegan,
    StageEnded,
    Stopped,
    TrialDrawn,
)
from hpsearch.state import StudyState
from hpsearch.trial import TrialState

SPEC = {"metric": {"name": "val_loss", "goal": "minimize"}, "early_stopping": {"max_epochs": 9}}
OPENED = Opened(study="s", uid="u", spec=SPEC, spec_text="")


def state_after(*events: Event) -> StudyState:
    state = StudyState()
    for time, event in enumerate((OPENED, *events)):
        state.apply(event, float(time))
    return state


def drawn(trial: int) -> TrialDrawn:
    return TrialDrawn(trial=trial, config={"lr": 0.1}, seed=trial)


def leased(trial: int, start: int, end: int) -> Leased:
    return Leased(key=f"train/{trial}/{start}-{end}", worker="w", trial=trial, from_epoch=start, to_epoch=end)


def finished(trial: int, start: int, end: int, loss: float = 0.5, outcome: str = "done") -> Finished:
    ref = f"checkpoints/{trial}-{end}"
    return Finished(
        key=f"train/{trial}/{start}-{end}",
        worker="w",
        outcome=outcome,  # type: ignore[arg-type]
        trial=trial,
        values={"checkpoint": ref, "best_checkpoint": ref} if outcome == "done" else {},
        epochs=tuple((epoch, {"val_loss": loss}, 0.1) for epoch in range(start + 1, end + 1) if outcome != "crashed"),
    )


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], TrialState.WAITING),
        ([leased(0, 0, 3)], TrialState.RUNNING),
        ([leased(0, 0, 3), Returned(key="train/0/0-3", worker="w", reason="lost")], TrialState.WAITING),
        ([leased(0, 0, 3), finished(0, 0, 3)], TrialState.PAUSED),
        ([leased(0, 0, 3), finished(0, 0, 3), StageEnded(stage="search")], TrialState.STOPPED),
        ([leased(0, 0, 3), finished(0, 0, 3), Stopped(trial=0)], TrialState.STOPPED),
        ([leased(0, 0, 9), finished(0, 0, 9)], TrialState.COMPLETE),
        ([leased(0, 0, 3), finished(0, 0, 3, outcome="diverged")], TrialState.DIVERGED),
        ([leased(0, 0, 3), finished(0, 0, 3, outcome="crashed")], TrialState.WAITING),
        ([leased(0, 0, 3), finished(0, 0, 3, outcome="crashed")] * 2, TrialState.FAILED),
    ],
)
def test_state_of_a_trial_follows_from_its_events(events: list[Event], expected: TrialState) -> None:
    assert state_after(drawn(0), *events).trials[0].state is expected


def test_search_that_goes_on_makes_stopped_trials_paused_again() -> None:
    events = [drawn(0), leased(0, 0, 3), finished(0, 0, 3), StageEnded(stage="search"), StageBegan(stage="search")]
    assert state_after(*events).trials[0].state is TrialState.PAUSED


def test_best_epoch_is_the_first_of_equals() -> None:
    trial = state_after(drawn(0), leased(0, 0, 3), finished(0, 0, 3)).trials[0]
    assert (trial.best_epoch, trial.best_objective, trial.epoch) == (1, 0.5, 3)


def test_nan_never_becomes_the_best() -> None:
    trial = state_after(drawn(0), leased(0, 0, 3), finished(0, 0, 3, loss=math.nan)).trials[0]
    assert trial.best_objective is None


def test_maximised_metric_is_turned_around() -> None:
    spec = {"metric": {"name": "val_accuracy", "goal": "maximize"}, "early_stopping": {"max_epochs": 9}}
    state = StudyState()
    state.apply(Opened(study="s", uid="u", spec=spec, spec_text=""), 0.0)
    assert state.objective({"val_accuracy": 0.9}) == -0.9


def test_ranking_puts_diverged_last_and_breaks_ties_by_number() -> None:
    state = state_after(
        *(drawn(i) for i in range(4)),
        *(leased(i, 0, 1) for i in range(4)),
        finished(3, 0, 1, loss=0.2),
        finished(2, 0, 1, loss=0.2),
        finished(1, 0, 1, loss=0.1, outcome="diverged"),
        finished(0, 0, 1, loss=0.3),
    )
    assert [trial.number for trial in state.ranking()] == [2, 3, 0, 1]
    best = state.best()
    assert best is not None
    assert best.number == 2


def test_time_between_two_drivers_counts_for_no_stage() -> None:
    state = StudyState()
    for time, event in [
        (0.0, OPENED),
        (1.0, StageBegan(stage="search")),
        (5.0, Ended(reason="interrupted")),
        (1000.0, OPENED),
        (1001.0, StageBegan(stage="search")),
        (1003.0, StageEnded(stage="search")),
    ]:
        state.apply(event, time)
    assert state.stage_s["search"] == 6.0
    assert state.worked_s == 5.0
    assert state.ended is None


def test_crashes_are_forgiven_when_a_study_that_a_bug_stopped_is_resumed() -> None:
    crash = finished(0, 0, 3, outcome="crashed")
    ramp = Finished(key="ramp/all/0", worker="w", outcome="crashed", message="ValueError: bad")
    stopped = [drawn(0), leased(0, 0, 3), crash, ramp, Ended(reason="failed")]
    assert state_after(*stopped).trials[0].crashes == 1
    resumed = state_after(*stopped, OPENED)
    assert resumed.trials[0].crashes == 0
    assert "ramp/all/0" not in resumed.results


# Edited specs

RAMPED = {
    **SPEC,
    "lr_range": {"enabled": True, "min": 1e-5, "max": 10.0, "steps": 100, "seeds": 5},
    "parameters": {"lr": {"min": 1e-4, "max": 0.1}, "net": {"choices": {"deep": {"lr": {"min": 0.1, "max": 0.2}}}}},
}


def reopened(**sections: object) -> Opened:
    return Opened(study="s", uid="u", spec={**RAMPED, **sections}, spec_text="")


def ranged(branch: str, lr: float) -> RangeMeasured:
    return RangeMeasured(
        branch={"optimizer": branch}, lr=lr, low=lr, high=lr, spread_decades=0.0, at_edge=False, confirmed=False
    )


def ramped_state() -> StudyState:
    state = StudyState()
    ramp = Finished(key="ramp/optimizer=sgd/0", worker="w", outcome="done", values={"losses": [1.0], "epochs": 2.5})
    evaluated = Finished(key="evaluate/ensemble/0", worker="w", outcome="done")
    for event in (reopened(), ramp, evaluated, ranged("sgd", 0.1), ranged("adamw", 0.2)):
        state.apply(event, 1.0)
    return state


def test_range_that_is_concluded_again_takes_the_place_of_its_branch() -> None:
    state = ramped_state()
    state.apply(ranged("sgd", 0.3), 2.0)
    assert [(found.branch["optimizer"], found.lr) for found in state.ranges] == [("adamw", 0.2), ("sgd", 0.3)]


@pytest.mark.parametrize("setting", [{"min": 1e-6}, {"max": 1.0}, {"steps": 50}])
def test_ramps_of_other_settings_are_forgotten_with_their_ranges_and_their_epochs_count(
    setting: dict[str, object],
) -> None:
    state = ramped_state()
    lr_range = RAMPED["lr_range"]
    assert isinstance(lr_range, dict)
    state.apply(reopened(lr_range={**lr_range, **setting}), 2.0)
    assert state.ranges == []
    assert list(state.results) == ["evaluate/ensemble/0"]
    assert state.ramp_epochs == 2.5
    assert state.range_edits == 1


@pytest.mark.parametrize(
    "section",
    [
        {"lr_range": {"enabled": True, "min": 1e-5, "max": 10.0, "steps": 100, "seeds": 7}},
        {
            "parameters": {
                "lr": {"min": 1e-4, "max": 0.3},
                "net": {"choices": {"deep": {"lr": {"min": 0.1, "max": 0.2}}}},
            }
        },
        {
            "parameters": {
                "lr": {"min": 1e-4, "max": 0.1},
                "net": {"choices": {"deep": {"lr": {"min": 0.1, "max": 0.3}}}},
            }
        },
    ],
    ids=["seeds", "bounds", "bounds-within-a-choice"],
)
def test_ranges_are_given_up_and_ramps_kept_where_they_can_be_concluded_from_them(section: dict[str, object]) -> None:
    state = ramped_state()
    state.apply(reopened(**section), 2.0)
    assert state.ranges == []
    assert "ramp/optimizer=sgd/0" in state.results


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"search": {"trials": 128}},
        {"parameters": {**RAMPED["parameters"], "width": {"value": 1}}},  # type: ignore[dict-item]
        {"lr_range": {**RAMPED["lr_range"], "enabled": False, "per": ["net"]}},  # type: ignore[dict-item]
    ],
)
def test_ranges_stay_where_other_things_are_edited(section: dict[str, object]) -> None:
    state = ramped_state()
    state.apply(reopened(**section), 2.0)
    assert len(state.ranges) == 2
    assert state.range_edits == 0
    assert state.edited is bool(section)


def test_job_asked_for_under_another_spec_is_not_adopted_from_a_worker_that_still_has_it() -> None:
    before: list[Event] = [drawn(0), leased(0, 0, 3), Returned(key="train/0/0-3", worker="w", reason="the driver went")]
    assert state_after(*before, OPENED).returned == {"train/0/0-3"}
    edited = Opened(study="s", uid="u", spec={**SPEC, "early_stopping": {"max_epochs": 27}}, spec_text="")
    assert state_after(*before, edited).returned == set()


def test_best_by_epoch_is_the_best_so_far_from_the_first_finite_value_on() -> None:
    rows = (
        (1, {"val_loss": math.nan}, 0.1),
        (2, {"val_loss": 0.5}, 0.1),
        (3, {"other": 0.0}, 0.1),
        (4, {"val_loss": 0.7}, 0.1),
    )
    state = state_after(drawn(0), leased(0, 0, 4), dataclasses.replace(finished(0, 0, 4), epochs=rows))
    assert state.best_by_epoch(state.trials[0]) == ((2, 0.5), (3, 0.5), (4, 0.5))


def test_budget_that_ended_the_search_is_forgotten_when_it_goes_on() -> None:
    ended: list[Event] = [StageBegan(stage="search"), StageEnded(stage="search", reason="budget.hours: 1")]
    assert state_after(*ended).budget_spent == "budget.hours: 1"
    assert state_after(*ended, OPENED, StageBegan(stage="search")).budget_spent == ""
