"""What crashes and empty searches mean: the message that helps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.events import Event, Finished, Leased, Opened, TrialDrawn
from hpsearch.job import Outcome
from hpsearch.state import StudyState
from hpsearch.triage import Crash, common_crash, no_usable_trial


def crash(subject: str, message: str = "ValueError: bad", frame: str = "t.py:3 in model") -> Crash:
    return Crash(subject=subject, message=message, frame=frame)


def state_with(*outcomes: Outcome, message: str = "", frame: str = "") -> StudyState:
    """Trial i ended with outcomes[i]; one that crashed did so twice."""
    state = StudyState()
    spec = {"metric": {"name": "val_loss", "goal": "minimize"}, "early_stopping": {"max_epochs": 9}}
    events: list[Event] = [Opened(study="s", uid="u", spec=spec, spec_text="")]
    for trial, outcome in enumerate(outcomes):
        key = f"train/{trial}/0-1"
        events.append(TrialDrawn(trial=trial, config={}, seed=0))
        for _ in range(2 if outcome == "crashed" else 1):
            events += [
                Leased(key=key, worker="w", trial=trial, to_epoch=1),
                Finished(key=key, worker="w", outcome=outcome, trial=trial, message=message, frame=frame),
            ]
    for time, event in enumerate(events):
        state.apply(event, float(time))
    return state


def test_same_frame_and_kind_from_three_subjects_is_a_bug_of_the_users() -> None:
    error = common_crash([crash("1", "ValueError: a"), crash("2", "ValueError: b"), crash("3", "ValueError: c")], 3)
    assert error is not None
    assert str(error) == (
        "error[task]: t.py:3 in model: ValueError: c\n"
        "  hint: the same error ended 3 jobs, so the study was stopped; mend the task or space.yaml, then launch again "
        "with --resume (after a change of data(): with a new --run-dir)"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [crash("1"), crash("2")],
        [crash("1"), crash("1"), crash("1"), crash("2")],
        [crash("1"), crash("2"), crash("3", "KeyError: 'a'")],
        [crash("1"), crash("2"), crash("3", frame="t.py:9 in loss")],
    ],
    ids=["none", "too few", "one trial again and again", "another kind", "another place"],
)
def test_accidents_do_not_stop_a_study(rows: list[Crash]) -> None:
    assert common_crash(rows, 3) is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["E: x", "F: y"]), st.sampled_from("pq"))))
def test_study_is_stopped_exactly_when_some_kind_has_three_subjects(rows: list[tuple[str, str, str]]) -> None:
    crashes = [crash(subject, message, frame) for subject, message, frame in rows]
    most = max((len({s for s, m, f in rows if (m, f) == kind}) for kind in {r[1:] for r in rows}), default=0)
    assert (common_crash(crashes, 3) is not None) is (most >= 3)


def test_failed_trials_are_told_with_the_commonest_failure() -> None:
    error = no_usable_trial(state_with("crashed", "diverged", message="OSError: disk", frame="t.py:1 in data"))
    assert str(error) == (
        "error[no-usable-trial]: none of 2 trials left a finite checkpoint (1 diverged, 1 failed)\n"
        "  hint: the commonest failure: t.py:1 in data: OSError: disk"
    )


def test_failure_without_a_frame_is_told_by_its_message() -> None:
    error = no_usable_trial(state_with("crashed", message="out of memory"))
    assert error.hint == "the commonest failure: out of memory"


def test_diverged_trials_are_told_to_lower_the_rate() -> None:
    error = no_usable_trial(state_with("diverged", "diverged"))
    assert error.message == "none of 2 trials left a finite checkpoint (2 diverged)"
    assert error.hint == "lower lr's max, or bound it with bounds_from: lr_range"


def test_search_that_never_began_is_told_to_have_more_room() -> None:
    error = no_usable_trial(state_with())
    assert error.message == "none of 0 trials left a finite checkpoint (none was started)"
    assert error.hint == "raise search.trials or the budget"
