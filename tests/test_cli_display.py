"""What a launch says while it runs, entry by entry."""

from __future__ import annotations

import pytest

from hpsearch.cli.display import Display
from hpsearch.events import Event, Finished
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
