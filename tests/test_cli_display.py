"""What a launch says while it runs, entry by entry."""

from __future__ import annotations

import pytest

from hpsearch.cli.display import Display
from hpsearch.errors import UserCodeError
from hpsearch.events import Confirmed, Event, Finished
from hpsearch.state import Entry, StudyState


def told(capsys: pytest.CaptureFixture[str], *events: Event) -> list[str]:
    display = Display(StudyState())
    display.show([Entry(seq=number, fence=1, time=0.0, event=event) for number, event in enumerate(events)])
    return capsys.readouterr().err.splitlines()


def test_why_trials_share_no_program_is_said_once_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    def trained(trial: int, why: str) -> Finished:
        return Finished(key=f"train/{trial}/0-1", worker="w", outcome="done", trial=trial, values={"one_lane": why})

    reasons = ["trained one by one: .item()", "trained one by one: .item()", "trained one by one: hooks"]
    lines = told(capsys, *(trained(trial, why) for trial, why in enumerate(reasons)))
    assert lines == [
        "note: lanes: trials as trial 0 are trained one by one: .item()",
        "note: lanes: trials as trial 2 are trained one by one: hooks",
    ]


def crash(trial: int, message: str, frame: str = "net.py:3 in model") -> Finished:
    return Finished(key=f"ramp/all/{trial}", worker="w", outcome="crashed", message=message, frame=frame)


def test_crash_is_told_when_the_study_outlives_it_and_its_like_is_not_told_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    display = Display(StudyState(), clock=lambda: now[0])
    crashes = [crash(1, "ValueError: odd width 3 (hint: make it even)"), crash(2, "ValueError: odd width 5")]
    display.show([Entry(seq=number, fence=1, time=0.0, event=event) for number, event in enumerate(crashes)])
    assert capsys.readouterr().err == ""
    now[0] = 11.0
    display.show([])
    assert capsys.readouterr().err.splitlines() == [
        "warning[crashed]: ramp/all/1: ValueError: odd width 3 at net.py:3 in model",
        "  hint: make it even",
        "  note: told once; further crashes of this kind are counted, not shown",
    ]


def test_crash_that_ends_the_study_is_left_to_its_error_and_others_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [crash(1, "ValueError: odd width 3"), crash(2, "KeyError: 'w'", "net.py:9 in loss")]
    display = Display(StudyState())
    display.__enter__()
    display.show([Entry(seq=number, fence=1, time=0.0, event=event) for number, event in enumerate(found)])
    display.__exit__(UserCodeError, UserCodeError("ValueError: odd width 5", frame="net.py:3 in model"), None)
    assert capsys.readouterr().err.splitlines() == [
        "starting the workers",
        "warning[crashed]: ramp/all/2: KeyError: 'w' at net.py:9 in loss",
        "  note: told once; further crashes of this kind are counted, not shown",
    ]


def test_first_by_fresh_seeds_is_told_when_all_are_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ({"trial": 4, "mean": 0.3}, {"trial": 20, "mean": 0.4})
    assert told(capsys, Confirmed(epoch_of_search=9, standings=rows, out=())) == [
        "confirm: trial 4 is first of 2 by the mean of its fresh seeds"
    ]
    assert told(capsys, Confirmed(epoch_of_search=9, standings=(), out=(4,))) == []
