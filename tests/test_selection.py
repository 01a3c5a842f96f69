"""Properties of hpsearch/selection.py, the picks against a reference that averages whole predictions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpsearch.job import Outputs
from hpsearch.selection import EPSILON, Selection, average_predictions, row_correct, row_losses, select_greedy

Array = NDArray[Any]


def made_up(
    outputs: Outputs, n_models: int, n_rows: int, seed: int, positions: tuple[int, ...] = ()
) -> tuple[list[Array], Array]:
    """Models of different skill, some of them copies of each other, so that ties occur."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, *positions)
    predictions: list[Array] = []
    if outputs == "logits":
        targets: Array = rng.integers(0, 3, shape)
        one_hot = np.moveaxis(np.eye(3)[targets], -1, 1)
    elif outputs == "binary_logits":
        targets = rng.integers(0, 2, shape).astype(np.float64)
        one_hot = targets
    else:
        targets = rng.standard_normal(shape)
        one_hot = targets
    for _ in range(n_models):
        if predictions and rng.random() < 0.3:
            predictions.append(predictions[int(rng.integers(len(predictions)))].copy())
            continue
        noise = rng.uniform(0.3, 3.0)
        raw = 2 * one_hot + noise * rng.standard_normal(one_hot.shape)
        if outputs == "logits":
            raw = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
        elif outputs == "binary_logits":
            raw = 1 / (1 + np.exp(1 - raw))
        predictions.append(raw)
    return predictions, targets


def score_of(mean: Array, targets: Array, outputs: Outputs) -> float:
    if outputs == "values":
        return float(((mean - targets) ** 2).mean())
    if outputs == "binary_logits":
        seen = np.where(targets == 1, mean, 1 - mean)
    else:
        seen = np.take_along_axis(mean, targets[:, None], axis=1)
    return float(-np.log(np.maximum(seen, EPSILON)).mean())


def reference(predictions: list[Array], targets: Array, outputs: Outputs, size: int, rounds: int) -> list[list[int]]:
    """All ensembles on the way, as lists of picks. Scores that differ by rounding are ties."""

    def score(picks: list[int]) -> float:
        return round(score_of(np.mean([predictions[m] for m in picks], axis=0), targets, outputs), 10)

    everyone = range(len(predictions))
    order = sorted(everyone, key=lambda m: (score([m]), m))
    starts = [order[: n + 1] for n in range(min(math.ceil(size / 2), rounds, len(order)))]
    picks = min(starts, key=lambda start: (score(start), len(start)))
    way = [picks[: n + 1] for n in range(len(picks))]
    while len(picks) < rounds:
        allowed = set(picks) if len(set(picks)) >= size else everyone
        picks = [*picks, min(allowed, key=lambda m: (score([*picks, m]), m not in picks, m))]
        way.append(picks)
    return way


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.sampled_from(["logits", "binary_logits", "values"]),
    n_models=st.integers(1, 7),
    n_rows=st.integers(1, 12),
    positions=st.sampled_from([(), (2,), (2, 3)]),
    seed=st.integers(0, 10_000),
    size=st.integers(1, 5),
    rounds=st.integers(1, 9),
)
def test_picks_and_scores_are_those_of_the_plain_rule(
    outputs: Outputs, n_models: int, n_rows: int, positions: tuple[int, ...], seed: int, size: int, rounds: int
) -> None:
    predictions, targets = made_up(outputs, n_models, n_rows, seed, positions)
    selection = select_greedy(predictions, targets, outputs, size=size, rounds=rounds)
    way = reference(predictions, targets, outputs, size, rounds)
    scores = [score_of(np.mean([predictions[m] for m in picks], axis=0), targets, outputs) for picks in way]
    assert selection.scores == pytest.approx(scores, rel=1e-9, abs=1e-12)
    kept = way[selection.best_round - 1]
    assert {m: kept.count(m) / len(kept) for m in kept} == pytest.approx(dict(selection.members))


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.sampled_from(["logits", "binary_logits", "values"]),
    n_models=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    size=st.integers(1, 6),
)
def test_ensemble_is_never_worse_than_the_best_single_model_and_keeps_its_promises(
    outputs: Outputs, n_models: int, seed: int, size: int
) -> None:
    predictions, targets = made_up(outputs, n_models, 20, seed)
    selection = select_greedy(predictions, targets, outputs, size=size)
    singles = [float(row_losses(p, targets, outputs).mean()) for p in predictions]
    assert selection.single == int(np.argmin(np.round(singles, 10)))
    assert selection.single_score == pytest.approx(min(singles))
    assert len(selection.scores) == 25
    assert selection.scores[selection.best_round - 1] == pytest.approx(min(selection.scores), rel=1e-11)
    assert min(selection.scores) <= selection.single_score
    indices = [m for m, _ in selection.members]
    weights = [w for _, w in selection.members]
    assert 1 <= len(indices) <= size
    assert sum(weights) == pytest.approx(1.0)
    assert list(selection.members) == sorted(selection.members, key=lambda member: (-member[1], member[0]))
    mean = average_predictions([predictions[m] for m in indices], weights)
    assert float(row_losses(mean, targets, outputs).mean()) == pytest.approx(min(selection.scores))


def test_copies_of_a_model_tie_to_the_current_member_and_then_to_the_lower_index() -> None:
    predictions, targets = made_up("logits", 1, 30, seed=3)
    selection = select_greedy(predictions * 4, targets, "logits")
    assert selection == Selection(
        members=((0, 1.0),),
        scores=selection.scores,
        best_round=1,
        single=0,
        single_score=selection.scores[0],
    )


def test_two_models_that_err_apart_are_both_taken_although_a_copy_of_the_best_ranks_higher() -> None:
    targets = np.zeros(100)
    left, right = np.ones(100), -1.1 * np.ones(100)
    selection = select_greedy([left, left, left, right], targets, "values", size=2)
    assert {m for m, _ in selection.members} == {0, 3}
    assert min(selection.scores) < 0.01


def test_start_leaves_room_for_a_model_that_is_worse_alone_and_helps() -> None:
    rng = np.random.default_rng(0)
    targets = np.zeros(1000)
    near_copies = [np.ones(1000) + 0.1 * rng.standard_normal(1000) for _ in range(5)]
    selection = select_greedy([*near_copies, -1.5 * np.ones(1000)], targets, "values", size=5)
    assert 5 in dict(selection.members)
    assert min(selection.scores) < 0.1


def test_size_one_keeps_the_best_single_model() -> None:
    predictions, targets = made_up("logits", 8, 50, seed=1)
    selection = select_greedy(predictions, targets, "logits", size=1)
    assert selection.members == ((selection.single, 1.0),)


def test_model_that_is_absurdly_off_is_never_picked() -> None:
    predictions, targets = made_up("values", 3, 20, seed=0)
    selection = select_greedy([*predictions, np.full(20, 1e200)], targets, "values")
    assert 3 not in dict(selection.members)
    with pytest.raises(ValueError, match="no candidate has a finite score"):
        select_greedy([np.full(20, 1e200)], targets, "values")


def test_float32_probabilities_are_summed_in_float64() -> None:
    predictions, targets = made_up("logits", 6, 50, seed=1)
    single = [p.astype(np.float32) for p in predictions]
    double = [p.astype(np.float64) for p in single]
    assert select_greedy(single, targets, "logits") == select_greedy(double, targets, "logits")


def test_certain_and_wrong_costs_a_finite_loss() -> None:
    wrong = np.array([[1.0, 0.0]])
    assert row_losses(wrong, np.array([1]), "logits")[0] == pytest.approx(-math.log(EPSILON))
    assert row_losses(np.array([1.0]), np.array([0.0]), "binary_logits")[0] == pytest.approx(-math.log(EPSILON))


def test_probability_that_rounding_carried_past_one_gains_nothing() -> None:
    assert row_losses(np.array([[1.0005, 0.0]]), np.array([0]), "logits")[0] == 0.0


def test_row_losses_are_means_over_positions() -> None:
    probs = np.array([[[0.5, 0.25], [0.5, 0.75]]])  # one example, two classes, two positions
    assert row_losses(probs, np.array([[0, 0]]), "logits").tolist() == pytest.approx([math.log(8) / 2])
    assert row_losses([[1.0, 3.0]], [[0.0, 0.0]], "values").tolist() == [5.0]
    assert row_losses([[0.5, 0.25]], [[1, 0]], "binary_logits").tolist() == pytest.approx(
        [-(math.log(0.5) + math.log(0.75)) / 2]
    )


def test_row_correct_counts_positions_and_labels_and_breaks_ties_low() -> None:
    assert row_correct([[0.5, 0.5], [0.2, 0.8]], np.array([0, 0]), "logits").tolist() == [1.0, 0.0]
    assert row_correct([[0.9, 0.4, 0.5]], [[1, 1, 0]], "binary_logits").tolist() == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match="row_losses"):
        row_correct([1.0], [1.0], "values")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([[math.nan, 0.5], [0.5, 0.5]]), "candidate 1: a prediction is not finite"),
        (np.array([[math.inf, 0.5], [0.5, 0.5]]), "candidate 1: a prediction is not finite"),
        (np.array([[4.0, -2.0], [0.5, 0.5]]), "candidate 1: not probabilities: they reach from -2 to 4"),
        (np.array([[0.5, 0.5]]), "candidate 1: shape (1, 2) does not fit targets (2,): (N, C, …) is needed"),
        (np.array([[1.0], [1.0]]), "candidate 1: targets 0 to 1 for 1 classes"),
    ],
)
def test_a_candidate_that_cannot_be_scored_is_named(bad: Array, message: str) -> None:
    good = np.array([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match="candidate 1") as caught:
        select_greedy([good, bad], np.array([0, 1]), "logits")
    assert str(caught.value) == message


def test_other_slips_are_refused() -> None:
    good = np.array([[0.5, 0.5]])
    with pytest.raises(ValueError, match="at least one candidate"):
        select_greedy([], np.array([0]), "logits")
    with pytest.raises(ValueError, match="got size=0, rounds=25"):
        select_greedy([good], np.array([0]), "logits", size=0)
    with pytest.raises(ValueError, match="classes must be integers"):
        select_greedy([good], np.array([0.0]), "logits")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        row_losses([0.5], [0.5], "binary_logits")
    with pytest.raises(ValueError, match=r"shape \(2,\) differs"):
        row_losses([0.5, 0.5], [0.5], "values")
    with pytest.raises(ValueError, match="target is not finite"):
        row_losses([0.5], [math.nan], "values")
    with pytest.raises(ValueError, match="no targets"):
        row_losses([], [], "values")
    with pytest.raises(ValueError, match="outputs must be one of"):
        row_losses([0.5], [0.5], "softmax")  # type: ignore[arg-type]


def test_average_of_probabilities_has_rows_that_sum_to_one() -> None:
    predictions, _ = made_up("logits", 3, 20, seed=0)
    mean = average_predictions(predictions, [0.5, 0.25, 0.25])
    assert mean.sum(axis=1) == pytest.approx(1.0)
    assert mean == pytest.approx(0.5 * predictions[0] + 0.25 * predictions[1] + 0.25 * predictions[2])


@pytest.mark.parametrize(
    ("predictions", "weights", "message"),
    [
        ([], [], "one weight per model"),
        ([[1.0]], [0.5, 0.5], "one weight per model"),
        ([[1.0]], [0.5], "sum to 1"),
        ([[1.0], [1.0]], [1.5, -0.5], "non-negative"),
        ([[1.0], [1.0, 2.0]], [0.5, 0.5], r"model 1: shape \(2,\)"),
        ([[1.0], [math.nan]], [0.5, 0.5], "model 1: a prediction is not finite"),
    ],
)
def test_average_refuses_what_does_not_fit(predictions: list[list[float]], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_predictions(predictions, weights)
