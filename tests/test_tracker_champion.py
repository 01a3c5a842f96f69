"""When the alias moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hpsearch.tracker.champion import AliasDecision, Scored, decide_alias


def scored(version: str, value: float | None, **changes: str) -> Scored:
    told = {"test_fingerprint": "f", "metric": "loss", "goal": "minimize"} | changes
    return Scored(version=version, value=value, **told)  # type: ignore[arg-type]


def test_first_version_gets_the_alias_even_without_a_test_split() -> None:
    assert decide_alias(scored("1", None, test_fingerprint=""), None, alias="champion").moves


@pytest.mark.parametrize(
    ("goal", "old", "new", "moves"),
    [
        ("minimize", 0.30, 0.29, True),
        ("minimize", 0.30, 0.30, False),
        ("minimize", 0.30, 0.31, False),
        ("maximize", 0.90, 0.91, True),
        ("maximize", 0.90, 0.90, False),
        ("minimize", 0.30, math.nan, False),
        ("maximize", 0.30, math.nan, False),
    ],
)
def test_alias_moves_only_to_a_better_score(goal: str, old: float, new: float, moves: bool) -> None:
    decision = decide_alias(scored("2", new, goal=goal), scored("1", old, goal=goal), alias="champion")
    assert decision.moves is moves


@pytest.mark.parametrize(
    ("new", "old", "why"),
    [
        ({"test_fingerprint": "g"}, {}, "version 1 stays champion: it was measured on another test split"),
        (
            {"test_fingerprint": ""},
            {},
            "version 1 stays champion: without a test split the two cannot be compared",
        ),
        ({}, {"test_fingerprint": ""}, "version 1 stays champion: it was made without a test split"),
        (
            {"metric": "accuracy", "goal": "maximize"},
            {},
            "version 1 stays champion: it was measured by loss, this one by accuracy",
        ),
    ],
)
def test_what_cannot_be_compared_leaves_the_alias_and_says_why(
    new: dict[str, str], old: dict[str, str], why: str
) -> None:
    decision = decide_alias(scored("2", 0.1, **new), scored("1", 0.3, **old), alias="champion")
    assert (decision.moves, decision.why) == (False, why)


def test_holder_without_a_score_keeps_the_alias() -> None:
    decision = decide_alias(scored("2", 0.1), scored("1", None), alias="champion")
    assert (decision.moves, decision.why) == (False, "version 1 stays champion: a test score is missing")


def test_version_that_holds_the_alias_keeps_it() -> None:
    assert decide_alias(scored("1", 0.3), scored("1", 0.3), alias="champion").moves


def test_ensemble_no_better_than_ignoring_the_inputs_gets_no_alias_even_as_the_first() -> None:
    new = replace(scored("1", 0.3), beats_baseline=False)
    for holder in (None, scored("0", 0.9)):
        decision = decide_alias(new, holder, alias="champion")
        assert decision == AliasDecision(
            moves=False, why="it is not better than ignoring the inputs, so it is not champion"
        )
    assert decide_alias(replace(new, beats_baseline=True), None, alias="champion").moves
