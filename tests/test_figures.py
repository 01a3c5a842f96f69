"""A study's figures by topic: what is drawn of a state, and when it has to be drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hpsearch.errors import DamagedBlob
from hpsearch.events import Confirmed, Event, Finished, Selected, StageBegan, StageEnded
from hpsearch.report import figures as module
from hpsearch.report.batch_figure import BatchPlot
from hpsearch.report.figures import drawn_from, figures
from hpsearch.report.plots import BaselineLine
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState, data_info
from tests.test_verdict import SPEC, losses, state_of, trained

Drawn = dict[str, dict[str, Any]]

HUMAN = {**SPEC, "baselines": {"human": 0.05}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What each figure was asked to show."""
    asked: Drawn = {}
    for name in ("learning_curves_figure", "search_figure", "ensemble_figure", "pareto_figure"):

        def keep(*args: object, name: str = name, **settings: object) -> bytes:
            asked[name] = {"args": args, **settings}
            return b"png"

        monkeypatch.setattr(module, name, keep)
    return asked


def baseline(name: str, **by_split: dict[str, float]) -> Finished:
    return Finished(key=f"baseline/{name}", worker="w", outcome="done", values={"metrics": by_split})


def measured(trial: int, loss: float) -> Finished:
    values = {"metrics": {"loss": loss}, "row_scores": "rows"}
    return Finished(key=f"evaluate/ensemble/{trial}", worker="w", outcome="done", values=values)


CONSTANT = baseline("constant", val={"loss": 2.3, "accuracy": 0.1}, ensemble={"loss": 2.4})
LINEAR = baseline("linear", val={"loss": 0.5, "accuracy": 0.8}, ensemble={"loss": 0.6})
SEARCH: list[Event] = [StageBegan(stage="search"), *trained(0, losses(0.5, 0.30)), *trained(1, losses(0.32))]
ENDED = StageEnded(stage="search")


def arrays(ref: str) -> Mapping[str, np.ndarray]:
    return {"loss": np.array([0.0, 1.0] * 50)}


def of_sizes(state: StudyState, *sizes: int) -> StudyState:
    for trial, size in zip(state.trials.values(), sizes, strict=True):
        trial.n_parameters = size
    return state


BATCH = "preflight/batch.safetensors"


def batch(digest: str = "0f", outcome: str = "done", **values: object) -> Finished:
    return Finished(
        key="check/batch/trial 0",
        worker="w",
        outcome=outcome,  # type: ignore[arg-type]
        values={"checks": [], **values},
        digests={BATCH: digest},
    )


def test_batch_is_drawn_from_what_preflight_kept_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"batch": BATCH, "kind": "rows", "shape": [4, 2], "dtype": "float32", "note": "", "n_not_finite": 0}
    asked: list[BatchPlot] = []
    monkeypatch.setattr(module, "batch_figure", lambda plot: asked.append(plot) or b"png")
    kept = {BATCH: {"received": np.eye(4, 2), "target": np.arange(4)}}
    state = state_of(batch(**told))
    assert figures("batch", state, lambda ref: kept[ref]) == {"batch.png": b"png"}
    assert asked[0].received is kept[BATCH]["received"]
    assert asked[0].target is kept[BATCH]["target"]
    assert drawn_from("batch", state) == "0f"


@pytest.mark.parametrize("events", [(), (batch(reason="no"),), (batch(outcome="out_of_memory"),)])
def test_without_a_batch_there_is_nothing_to_draw(events: tuple[Event, ...]) -> None:
    state = state_of(*events)
    assert figures("batch", state, arrays) == {}
    assert drawn_from("batch", state) == ""


def test_baselines_are_on_every_figure_with_the_metric_on_an_axis(drawn: Drawn) -> None:
    state = of_sizes(state_of(*SEARCH, ENDED, CONSTANT, LINEAR, spec=HUMAN), 900, 50)
    files = figures("search", state)
    assert set(files) == {"learning_curves.png", "search.png", "pareto.png"}
    expected = [
        BaselineLine(label="ignoring the inputs", value=2.3),
        BaselineLine(label="a linear model", value=0.5),
        BaselineLine(label="human", value=0.05),
    ]
    for name in ("learning_curves_figure", "search_figure", "pareto_figure"):
        assert drawn[name]["baselines"] == expected, name


def test_baselines_are_told_in_the_study_metric_and_left_out_where_they_were_skipped(drawn: Drawn) -> None:
    spec = parse_spec(
        "name: d\ntask: t.py:T\nmetric: {name: val_accuracy, goal: maximize}\nearly_stopping: {max_epochs: 3}\n"
        "parameters: {lr: {min: 1e-3, max: 1.0}}"
    ).dump()
    skipped = Finished(key="baseline/linear", worker="w", outcome="unusable", message="inputs are words")
    figures("search", state_of(*SEARCH, ENDED, CONSTANT, skipped, spec=spec))
    assert drawn["search_figure"]["baselines"] == [BaselineLine(label="ignoring the inputs", value=0.1)]


def test_smallest_within_one_error_is_marked_where_scores_of_rows_are_at_hand(drawn: Drawn) -> None:
    state = of_sizes(state_of(*SEARCH, ENDED, measured(0, 0.3)), 900, 50)
    figures("search", state, arrays)
    error = float(np.std([0, 1] * 50, ddof=1)) / 10
    told = drawn["pareto_figure"]
    assert (told["front"], told["smallest"], told["threshold"]) == ([1, 0], 1, pytest.approx(0.3 + error))

    def damaged(ref: str) -> Mapping[str, np.ndarray]:
        raise DamagedBlob(ref, "it is gone")

    for without in (None, damaged):
        figures("search", state, without)
        assert (drawn["pareto_figure"]["smallest"], drawn["pareto_figure"]["threshold"]) == (None, None)


def test_trials_of_one_size_make_no_figure_of_sizes(drawn: Drawn) -> None:
    assert "pareto.png" not in figures("search", of_sizes(state_of(*SEARCH, ENDED), 50, 50))
    assert "pareto_figure" not in drawn


def selected(*more: Event, single: float = 0.4) -> StudyState:
    chosen = Selected(n_trials=2, best=0, pool=(0, 1), members=((0, 1.0),), scores=(single,), single_score=single)
    state = state_of(*SEARCH, ENDED, CONSTANT, measured(0, 0.4), measured(1, 0.45), *more, chosen)
    state.data = data_info(
        {
            "fingerprint": "d",
            "test_fingerprint": "",
            "n_rows": {"val": 100},
            "outputs": "logits",
            "n_classes": 3,
            "input_shape": (4,),
            "input_dtype": "float32",
            "metrics": (),
        }
    )
    return state


def test_ensemble_figure_has_the_constant_baseline_of_its_split_where_the_loss_is_its_unit(drawn: Drawn) -> None:
    figures("ensemble", selected())
    assert drawn["ensemble_figure"]["baselines"] == [BaselineLine(label="ignoring the inputs", value=2.4)]
    figures("ensemble", selected(single=0.9))  # a loss of the task's own: the best model's is not its likelihood
    assert drawn["ensemble_figure"]["baselines"] == ()


def test_search_is_drawn_again_when_a_baseline_scores_of_rows_or_more_epochs_arrive() -> None:
    so_far = [*SEARCH, ENDED]
    told = [drawn_from("search", state_of(*so_far))]
    for event in (CONSTANT, LINEAR, measured(0, 0.3)):
        so_far.append(event)
        told.append(drawn_from("search", state_of(*so_far)))
    assert len(set(told)) == 4
    assert drawn_from("search", state_of(*so_far, measured(1, 0.4))) == told[-1]  # only the best one's rows count
    assert drawn_from("search", state_of(*so_far, spec=HUMAN)) != told[-1]
    assert len({drawn_from("ensemble", state) for state in (state_of(*SEARCH), selected(), selected(single=0.9))}) == 3


def test_every_figure_of_the_search_gets_the_winner_and_is_drawn_again_when_another_one_wins(drawn: Drawn) -> None:
    before = state_of(*SEARCH, ENDED)
    row = {"trial": 1, "mean": 0.3, "confirmed": 0.3, "seeds": 3}
    won = [
        Confirmed(epoch_of_search=3, standings=(row,), out=()),
        Selected(n_trials=2, best=1, pool=(0, 1), members=((1, 1.0),)),
    ]
    state = of_sizes(state_of(*SEARCH, ENDED, *won), 900, 50)
    figures("search", state)
    for name in ("learning_curves_figure", "search_figure", "pareto_figure"):
        assert drawn[name]["winner"] == 1, name
    assert "winner 1" in drawn_from("search", state)
    assert "winner" not in drawn_from("search", before)
