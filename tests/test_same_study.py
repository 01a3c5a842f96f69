"""What watches over studies under fire sees each kind of breach."""

from __future__ import annotations

import dataclasses

import pytest

from hpsearch.events import Event, Finished, Leased, Opened, TrialDrawn
from hpsearch.state import Entry, StudyState
from tests.same_study import differences, glance, lost, twice
from tests.tracked_study import spec

OPENED = Opened(study="digits", uid="u", spec=spec(), spec_text="")
DRAWN = TrialDrawn(trial=0, config={"lr": 0.1}, seed=7)
LEASED = Leased(key="train/0/0-1", worker="a", trial=0, from_epoch=0, to_epoch=1)
FINISHED = Finished(
    key="train/0/0-1",
    worker="a",
    outcome="done",
    trial=0,
    values={"checkpoint": "c", "best_checkpoint": "c"},
    epochs=((1, {"val_loss": 0.5}, 0.1),),
)
GOOD: tuple[Event, ...] = (OPENED, DRAWN, LEASED, FINISHED)


def entries(*events: Event) -> list[Entry]:
    return [Entry(seq=seq, fence=1, time=float(seq), event=event) for seq, event in enumerate(events)]


def state(*events: Event) -> StudyState:
    return StudyState.of(entries(*events))


def test_other_workers_and_times_make_no_other_study() -> None:
    slower = dataclasses.replace(FINISHED, worker="b", epochs=((1, {"val_loss": 0.5}, 9.0),))
    assert differences(state(*GOOD), state(OPENED, DRAWN, dataclasses.replace(LEASED, worker="b"), slower)) == []
    assert twice(entries(*GOOD)) == []


@pytest.mark.parametrize(
    ("event", "other", "sentence"),
    [
        (DRAWN, dataclasses.replace(DRAWN, seed=8), "trial 0: its seed is 7 and 8"),
        (
            FINISHED,
            dataclasses.replace(FINISHED, epochs=((1, {"val_loss": 0.5000000000000001}, 0.1),)),
            "trial 0: its curve is [(1, {'val_loss': 0.5})] and [(1, {'val_loss': 0.5000000000000001})]",
        ),
    ],
)
def test_the_last_bit_of_a_curve_makes_another_study(event: Event, other: Event, sentence: str) -> None:
    changed = [other if each is event else each for each in GOOD]
    assert sentence in differences(state(*GOOD), state(*changed))


def test_a_trial_that_is_in_one_study_only_is_told() -> None:
    assert differences(state(*GOOD), state(OPENED)) == ["trials [0] are in one of the two only"]


def test_what_was_seen_once_must_be_the_beginning_of_what_is_seen_later() -> None:
    before, after = glance(state(*GOOD)), glance(state(OPENED, DRAWN))
    assert lost(after, before) == []
    assert lost(before, after) == ["trial 0 had 1 epochs that its curve does not begin with"]
    assert lost(before, {}) == ["trial 0 is gone"]
    other = glance(state(OPENED, dataclasses.replace(DRAWN, seed=8), LEASED, FINISHED))
    assert lost(before, other) == ["trial 0 has another config or seed"]


def test_a_second_result_is_told_with_its_lease_and_without() -> None:
    assert twice(entries(*GOOD, FINISHED)) == [
        "train/0/0-1 was finished without a lease (entry 4)",
        "train/0/0-1 was finished twice (entry 4)",
        "trial 0 has epoch 1 after epoch 1 (entry 4)",
    ]
    assert twice(entries(*GOOD, LEASED, FINISHED))[0] == "train/0/0-1 was finished twice (entry 5)"
