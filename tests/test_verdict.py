"""The verdict: what a study came to, computed from its state alone."""

from __future__ import annotations

import json
import math

import pytest

from hpsearch.events import (
    Compared,
    Event,
    Finished,
    Leased,
    Opened,
    RangeMeasured,
    Selected,
    StageBegan,
    StageEnded,
    TrialDrawn,
)
from hpsearch.job import Outcome
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from hpsearch.verdict import epochs, lr_ranges, measured_metrics, top, trial_counts, val_metrics, verdict

SPEC = parse_spec(
    "name: digits\ntask: t.py:T\nseed: 7\nearly_stopping: {max_epochs: 3}\nparameters: {lr: {min: 1e-3, max: 1.0}}"
).dump()
Rows = list[dict[str, float]]


def opened(spec: dict[str, object] | None = None) -> Opened:
    return Opened(study="digits", uid="u", spec=spec or SPEC, spec_text="")


def trained(trial: int, rows: Rows, outcome: Outcome = "done") -> list[Event]:
    """A trial trained for as many epochs as it has rows, in one job."""
    key = f"train/{trial}/0-{len(rows) or 1}"
    ref = f"checkpoints/{trial}"
    return [
        TrialDrawn(trial=trial, config={"lr": 0.1 / (trial + 1)}, seed=trial),
        Leased(key=key, worker="w", trial=trial, to_epoch=len(rows) or 1),
        Finished(
            key=key,
            worker="w",
            outcome=outcome,
            trial=trial,
            values={"checkpoint": ref, "best_checkpoint": ref, "n_parameters": 99} if outcome == "done" else {},
            epochs=tuple((epoch, row, 0.1) for epoch, row in enumerate(rows, start=1)),
        ),
    ]


def losses(*values: float) -> Rows:
    return [{"val_loss": value, "val_accuracy": 1 - value, "train_loss": value / 2} for value in values]


def measured(key: str, outcome: Outcome = "done", **metrics: float) -> Finished:
    return Finished(key=key, worker="w", outcome=outcome, values={"metrics": metrics} if outcome == "done" else {})


def state_of(*events: Event, spec: dict[str, object] | None = None) -> StudyState:
    state = StudyState()
    for time, event in enumerate((opened(spec), *events)):
        state.apply(event, float(time))
    return state


def told(state: StudyState) -> dict[str, object]:
    return verdict(state, run_dir="runs/digits", wall_s=41.234, stages_s={"start": 6.123}, mlflow={"run_id": None})


CRASHED = Finished(
    key="evaluate/test/0", worker="w", outcome="crashed", values={"metrics": {"loss": 1.0}}, message="ValueError"
)
SEARCH: list[Event] = [
    StageBegan(stage="search"),
    *trained(0, losses(0.5, 0.3, 0.4)),
    *trained(1, losses(0.6)),
    *trained(2, losses(0.2), outcome="diverged"),
    StageEnded(stage="search"),
]
GAIN = {"metric": "loss", "value": -0.02, "low": -0.03, "high": -0.01, "better": True}
ENSEMBLE: list[Event] = [
    StageBegan(stage="ensemble"),
    Selected(n_trials=3, best=0, pool=(0, 1), members=((0, 0.6), (1, 0.4))),
    measured("evaluate/test/0", loss=0.32, accuracy=0.9),
    measured("evaluate/test/0*0.6+1*0.4", loss=0.3, accuracy=0.92),
    measured("evaluate/val/0*0.6+1*0.4", loss=0.28, accuracy=0.93),
    Compared(n_trials=3, gain=GAIN, intervals={"best": {"loss": {"value": 0.32, "low": 0.3, "high": 0.34}}}),
    StageEnded(stage="ensemble"),
]


def test_whole_verdict_of_a_whole_study() -> None:
    assert told(state_of(*SEARCH, *ENSEMBLE)) == {
        "study": "digits",
        "run_dir": "runs/digits",
        "seed": 7,
        "epochs": {"lr_range": 0, "search": 5, "evaluate": 0, "confirm": 0, "finish": 0},
        "wall_s": 41.23,
        "stages_s": {"start": 6.12, "lr_range": 0.0, "search": 10.0, "ensemble": 6.0, "tracking": 0.0},
        "trials": {"total": 3, "complete": 1, "stopped": 1, "diverged": 1, "failed": 0},
        "lanes": {"trials": 0, "of": 3, "most": 1},
        "precision": "float32",
        "lr_range": [],
        "best": {
            "trial": 0,
            "config": {"lr": 0.1},
            "epoch": 2,
            "val": {"loss": 0.3, "accuracy": 0.7},
            "test": {"loss": 0.32, "accuracy": 0.9},
            "test_intervals": {"loss": {"value": 0.32, "low": 0.3, "high": 0.34}},
            "chosen": {
                "by": "search",
                "metric": "val_loss",
                "value": 0.3,
                "scores": 1,
                "place": 1,
                "of": 3,
                "final": True,
                "searched_best": 0,
            },
            "evaluated": None,
            "confirmed": None,
        },
        "baselines": {"gain": None},
        "baseline": None,
        "diagnosis": {
            "best": [],
            "space": [{"name": "diverged", "words": "1 of 3 trials diverged (33%)", "hint": ""}],
        },
        "ensemble": {
            "members": [{"trial": 0, "weight": 0.6}, {"trial": 1, "weight": 0.4}],
            "val": {"loss": 0.28, "accuracy": 0.93},
            "test": {"loss": 0.3, "accuracy": 0.92},
            "test_intervals": {},
            "gain": GAIN,
        },
        "mlflow": {"run_id": None},
    }


def test_verdict_is_json_through_and_through() -> None:
    branch = RangeMeasured(
        branch={"optimizer": "sgd"},
        lr=None,
        low=1e-5,
        high=1.0,
        spread_decades=math.inf,
        at_edge=True,
        confirmed=True,
    )
    outcome = told(state_of(branch, *SEARCH, *ENSEMBLE))
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome


def test_study_that_was_interrupted_before_a_choice_tells_its_best_so_far() -> None:
    outcome = told(state_of(*SEARCH))
    best = outcome["best"]
    assert isinstance(best, dict)
    assert (best["trial"], best["test"], best["test_intervals"]) == (0, {}, {})
    assert outcome["ensemble"] is None


def test_study_without_a_usable_trial_has_no_best() -> None:
    assert told(state_of(*trained(0, losses(0.1), outcome="diverged")))["best"] is None


def test_gain_that_was_not_measured_has_every_key_and_no_number() -> None:
    outcome = told(state_of(*SEARCH, Selected(n_trials=3, best=0, pool=(0,), members=((0, 1.0),))))
    ensemble = outcome["ensemble"]
    assert isinstance(ensemble, dict)
    assert ensemble["gain"] == dict.fromkeys(("metric", "value", "low", "high", "better"))
    assert ensemble["test"] == {}


def test_ranking_is_by_the_best_epoch_with_the_lower_number_first_and_diverged_last() -> None:
    state = state_of(
        *trained(0, losses(0.3)),
        *trained(1, losses(0.5, 0.2, 0.9)),
        *trained(2, losses(0.01), outcome="diverged"),
        *trained(3, losses(0.2)),
        *trained(4, [], outcome="crashed"),
    )
    rows = top(state)
    assert [row["trial"] for row in rows] == [1, 3, 0, 4, 2]
    assert rows[0] == {
        "trial": 1,
        "winner": False,
        "config": {"lr": 0.05},
        "state": "complete",
        "baseline": False,
        "epoch": 2,
        "epochs_trained": 3,
        "n_parameters": 99,
        "val": {"loss": 0.2, "accuracy": 0.8},
        "diagnosis": [],
    }
    assert [row["trial"] for row in top(state, 2)] == [1, 3]
    assert len(top(state, 99)) == 5


def test_trial_that_never_ended_an_epoch_has_no_metrics() -> None:
    state = state_of(TrialDrawn(trial=0, config={}, seed=0))
    (row,) = top(state)
    assert row == {
        "trial": 0, "winner": False, "config": {}, "state": "waiting", "baseline": False, "epoch": 0,
        "epochs_trained": 0, "n_parameters": None, "val": {}, "diagnosis": [],
    }  # fmt: skip
    assert val_metrics(state.trials[0]) == {}


def test_maximised_metric_ranks_the_highest_first() -> None:
    spec = {**SPEC, "metric": {"name": "val_accuracy", "goal": "maximize"}}
    state = state_of(*trained(0, losses(0.3)), *trained(1, losses(0.1)), spec=spec)
    assert [row["trial"] for row in top(state)] == [1, 0]


def test_epochs_of_ramps_are_counted_by_the_examples_they_saw() -> None:
    ramps = [
        Finished(key=key, worker="w", outcome="done", values={"losses": [], "epochs": share})
        for key, share in (
            ("ramp/all/0", 1.25),
            ("ramp/all/1", 1.25),
            ("probe/all/0.1/0", 0.5),
            ("evaluate/val/0", 9.0),
        )
    ]
    crashed = Finished(key="ramp/all/2", worker="w", outcome="crashed")
    assert epochs(state_of(*ramps, crashed)) == {"lr_range": 3, "search": 0, "evaluate": 0, "confirm": 0, "finish": 0}


def test_counts_name_the_final_states_always_and_the_others_when_there_are_any() -> None:
    assert trial_counts(state_of()) == {"total": 0, "complete": 0, "stopped": 0, "diverged": 0, "failed": 0}
    state = state_of(*trained(0, losses(0.3)), TrialDrawn(trial=1, config={}, seed=0))
    assert trial_counts(state) == {
        "total": 2, "complete": 0, "stopped": 0, "diverged": 0, "failed": 0, "paused": 1, "waiting": 1,
    }  # fmt: skip


def test_range_that_was_not_found_has_no_rate_and_infinite_spread_no_number() -> None:
    event = RangeMeasured(
        branch={}, lr=None, low=1e-5, high=1.0, spread_decades=math.inf, at_edge=False, confirmed=False
    )
    assert lr_ranges(state_of(event)) == [
        {
            "branch": {},
            "lr": None,
            "low": 1e-5,
            "high": 1.0,
            "spread_decades": None,
            "confirmed": False,
            "at_edge": False,
        }
    ]


@pytest.mark.parametrize("event", [None, CRASHED, measured("evaluate/val/0", loss=1.0)], ids=str)
def test_what_was_not_measured_is_empty_and_not_guessed(event: Event | None) -> None:
    state = state_of(*([event] if event is not None else []))
    assert measured_metrics(state, "test", [(0, 1.0)]) == {}
