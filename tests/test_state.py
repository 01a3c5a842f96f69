"""The state of a study is the fold of its events, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hpsearch.events import (
    Damaged,
    Dropped,
    Ended,
    Event,
    Finished,
    Leased,
    Opened,
    OutOfRoom,
    RangeMeasured,
    Returned,
    StageBegan,
    StageEnded,
    Stopped,
    TrialDrawn,
)
from hpsearch.state import StudyState
from hpsearch.trial import Missing, TrialState

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


# Checkpoints


def trained(trial: int, loss: float, *, last: str = "", best: str = "", **values: object) -> list[Event]:
    """A trial after its first epoch, with files for its last and its best."""
    refs = {"checkpoint": last or f"checkpoints/{trial}", "best_checkpoint": best or f"checkpoints/{trial}"}
    event = dataclasses.replace(
        finished(trial, 0, 1, loss), values={**refs, **values}, digests={ref: ref[-1] * 16 for ref in refs.values()}
    )
    return [drawn(trial), leased(trial, 0, 1), event]


def evaluated(trial: int) -> Finished:
    values = {"predictions": f"predictions/{trial}", "targets": "predictions/targets"}
    digests = {ref: "0" * 16 for ref in values.values()}
    return Finished(key=f"evaluate/ensemble/{trial}", worker="w", outcome="done", values=values, digests=digests)


def test_dropped_checkpoint_is_no_trials_any_more_and_the_best_can_be_had_again() -> None:
    state = state_after(*trained(0, 0.5), *trained(1, 0.4, best="checkpoints/1-best"))
    assert state.owners == {"checkpoints/0": 0, "checkpoints/1": 1, "checkpoints/1-best": 1}
    assert set(state.digests) == set(state.owners)
    state.apply(Dropped(refs=("checkpoints/0", "checkpoints/1")), 9.0)
    first, second = state.trials[0], state.trials[1]
    assert (first.checkpoint, first.best_checkpoint, first.best_ref) == (None, None, "checkpoints/0")
    assert (first.missing, first.usable) == (Missing.DROPPED, True)
    assert (second.checkpoint, second.best_checkpoint, second.missing) == (None, "checkpoints/1-best", None)
    assert set(state.owners) == set(state.digests) == {"checkpoints/1-best"}


def test_checkpoint_that_was_never_kept_is_as_one_that_was_dropped() -> None:
    state = state_after(
        *trained(0, 0.5, unkept=["checkpoints/0"]), *trained(1, 0.4, unkept=["checkpoints/1"], no_room=True)
    )
    assert [(t.best_checkpoint, t.missing, t.usable) for t in state.trials.values()] == [
        (None, Missing.DROPPED, True),
        (None, Missing.NO_ROOM, False),
    ]
    assert state.owners == state.digests == {}


def test_better_epoch_takes_the_place_of_a_checkpoint_that_was_lost() -> None:
    state = state_after(*trained(0, 0.5), Dropped(refs=("checkpoints/0",)), leased(0, 1, 3), finished(0, 1, 3, 0.4))
    trial = state.trials[0]
    assert (trial.best_checkpoint, trial.missing, trial.best_epoch) == ("checkpoints/0-3", None, 2)


def test_candidates_behind_one_that_found_no_room_are_those_that_are_there() -> None:
    events = [event for trial in range(6) for event in trained(trial, 0.1 * (trial + 1))]
    events += [Dropped(refs=("checkpoints/0", "checkpoints/3")), Dropped(refs=("checkpoints/2",), no_room=True)]
    state = state_after(*events)
    assert [trial.number for trial in state.candidates(9)] == [0, 1, 4, 5]
    assert [trial.number for trial in state.candidates(2)] == [0, 1]
    assert state.best() is state.trials[0]


def test_other_budget_of_disk_may_hold_what_the_last_one_did_not() -> None:
    full = OutOfRoom(ref="checkpoints/0", n_bytes=100)
    state = state_after(*trained(0, 0.5), Dropped(refs=("checkpoints/0",), no_room=True), full)
    assert (state.out_of_room, state.candidates(1)) == (True, [])
    state.apply(dataclasses.replace(OPENED, spec={**SPEC, "budget": {"hours": 3}}), 50.0)
    assert (state.out_of_room, state.candidates(1)) == (True, [])
    state.apply(dataclasses.replace(OPENED, spec={**SPEC, "budget": {"hours": 3, "disk": "1GiB"}}), 60.0)
    assert (state.out_of_room, state.candidates(1)) == (False, [state.trials[0]])


def test_rebuilt_best_is_there_again_under_its_name_and_can_be_lost_again() -> None:
    again = Finished(
        key="rebuild/0/1",
        worker="w",
        outcome="done",
        values={"best_checkpoint": "checkpoints/0"},
        digests={"checkpoints/0": "f" * 16},
    )
    state = state_after(*trained(0, 0.5), Damaged(ref="checkpoints/0"), again)
    assert (state.trials[0].best_checkpoint, state.trials[0].missing) == ("checkpoints/0", None)
    assert state.digests == {"checkpoints/0": "f" * 16}
    assert "rebuild/0/1" in state.results
    state.apply(Damaged(ref="checkpoints/0"), 9.0)
    assert state.trials[0].missing is Missing.DROPPED
    assert state.results == {}


def test_best_that_cannot_be_rebuilt_is_no_candidate_until_the_task_was_mended() -> None:
    failed = Finished(key="rebuild/0/1", worker="w", outcome="crashed", message="ValueError: bad")
    state = state_after(*trained(0, 0.5), Dropped(refs=("checkpoints/0",)), failed)
    assert state.candidates(1) == [state.trials[0]]  # one crash may be an accident
    state.apply(failed, 19.0)
    assert (state.trials[0].missing, state.candidates(1)) == (Missing.SPOILT, [])
    state.apply(Ended(reason="failed"), 20.0)
    state.apply(OPENED, 21.0)
    assert state.candidates(1) == [state.trials[0]]
    assert "rebuild/0/1" not in state.results


def test_rebuild_of_an_epoch_that_was_bettered_meanwhile_changes_nothing() -> None:
    late = Finished(key="rebuild/0/1", worker="w", outcome="done", values={"best_checkpoint": "checkpoints/0"})
    events = [*trained(0, 0.5), Dropped(refs=("checkpoints/0",)), leased(0, 1, 3), finished(0, 1, 3, 0.4), late]
    assert state_after(*events).trials[0].best_checkpoint == "checkpoints/0-3"


def test_results_that_name_a_damaged_blob_are_forgotten() -> None:
    events = [*trained(0, 0.5), evaluated(0), evaluated(1)]
    state = state_after(*events, Damaged(ref="predictions/0"))
    assert list(state.results) == ["evaluate/ensemble/1"]
    assert "predictions/0" not in state.digests
    state.apply(Damaged(ref="predictions/targets"), 9.0)
    assert state.results == {}
    assert state.trials[0].usable
