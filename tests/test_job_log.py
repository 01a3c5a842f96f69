"""A submitted job's log, taken apart as it comes."""

from __future__ import annotations

import pytest

from hpsearch.fleets.job_log import BEGUN, JobLog, Outcome, encode_result

PROGRESS = ["starting the workers", "", "search …", "warning[diverged]: trial 3", "  note: counted"]
OUTCOME = Outcome(stdout='{"study": "digits – ü"}\n' + "x" * 50_000, exit_code=3)
LOG = "\n".join(["Running entrypoint for job 1: python", BEGUN, *PROGRESS, encode_result(OUTCOME)])


@pytest.mark.parametrize("size", [1, 7, 1000, len(LOG)])
def test_log_is_the_same_in_pieces_of_any_size(size: int) -> None:
    log = JobLog()
    shown = [line for i in range(0, len(LOG), size) for line in log.feed(LOG[i : i + size])]
    assert shown == PROGRESS
    assert log.outcome == OUTCOME
    assert log.before == ["Running entrypoint for job 1: python"]


def test_no_line_is_longer_than_ray_tells_in_one_piece() -> None:
    assert max(map(len, encode_result(OUTCOME).splitlines())) < 20_000


def test_what_comes_before_hpsearch_is_kept_for_the_error_and_not_shown() -> None:
    log = JobLog()
    assert log.feed("Running entrypoint\n/bin/sh: python: not found\n") == []
    assert not log.begun
    assert log.before == ["Running entrypoint", "/bin/sh: python: not found"]


def test_blank_lines_are_shown_between_progress_and_not_before_the_result() -> None:
    log = JobLog()
    assert log.feed(f"{BEGUN}\na\n\n\nb\n") == ["a", "", "", "b"]
    assert log.feed("\n") == []
    assert log.feed(encode_result(Outcome(stdout="", exit_code=0))) == []
    assert log.outcome == Outcome(stdout="", exit_code=0)
