"""Curves with a known shape get the word for it, with and without noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.diagnosis import SHORTEST_CURVE, Finding, Reference, diagnose

E = np.arange(1, 31)
FALLING = 0.2 + 0.8 * np.exp(-E / 5)  # settles at 0.2
CHANCE = Reference(baseline=1.0, best_train=0.05)

SHAPES: dict[str, tuple[np.ndarray, np.ndarray, Reference | None, Finding]] = {
    "settled": (FALLING, FALLING + 0.05, None, Finding.PLATEAUED),
    "linear fall": (1.0 - 0.02 * E, 1.05 - 0.02 * E, None, Finding.IMPROVING),
    "slow power law": (E**-0.5, 0.05 + E**-0.5, None, Finding.IMPROVING),
    "val turns": (np.exp(-E / 5), 0.3 + np.exp(-E / 4) + 0.02 * E, None, Finding.OVERFITTING),
    "val stands, train falls": (
        np.exp(-E / 25), 0.6 + 0.4 * np.exp(-E / 2), None, Finding.OVERFITTING,
    ),
    "train comes apart": (
        0.3 + np.exp(-E / 2) + 0.03 * np.maximum(0, E - 8), 0.3 + np.exp(-E / 2) + 0.03 * np.maximum(0, E - 8), None,
        Finding.DIVERGED,
    ),
    "explodes": (0.5 * 1.2**E, 0.5 * 1.2**E, None, Finding.DIVERGED),
    "swings": (0.5 + 0.2 * (-1.0) ** E, 0.5 + 0.2 * (-1.0) ** E, None, Finding.OSCILLATING),
    "chance": (np.full(30, 1.0), np.full(30, 1.0), CHANCE, Finding.STUCK),
    "falls to chance from a wild start": (1 + 3 * np.exp(-E), 1 + 3 * np.exp(-E), CHANCE, Finding.STUCK),
    "settled high": (0.5 + 0.5 * np.exp(-E / 2), 0.52 + 0.5 * np.exp(-E / 2), CHANCE, Finding.UNDERFITTING),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_known_shape_gets_its_word(shape: str, noise: float) -> None:
    train, val, reference, expected = SHAPES[shape]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = diagnose(train + noise * rng.normal(size=len(E)), val + noise * rng.normal(size=len(E)), reference)
        assert expected in {each.finding for each in found}, [each.words for each in found]


def test_sound_curves_are_never_called_bad_over_many_seeds() -> None:
    """Noise of 1 % of the fall: no overfitting, oscillation or divergence is seen where there is none."""
    alarms = {Finding.OVERFITTING, Finding.OSCILLATING, Finding.DIVERGED, Finding.STUCK, Finding.UNDERFITTING}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        train, val = (FALLING + offset + 0.008 * rng.normal(size=len(E)) for offset in (0.0, 0.03))
        found = {each.finding for each in diagnose(train, val)}
        assert not found & alarms, (seed, found)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([1.0, math.inf], [1.0, 2.0], "train_loss is not finite at epoch 2"),
        ([1.0, 0.5, 0.4], [1.0, math.nan, 0.4], "val_loss is not finite at epoch 2"),
    ],
)
def test_value_that_is_not_finite_is_diverged_with_its_epoch(train: list[float], val: list[float], words: str) -> None:
    (found,) = diagnose(train, val)
    assert (found.finding, found.words) == (Finding.DIVERGED, words)


def test_curve_without_training_loss_is_judged_by_validation_alone() -> None:
    train, val, _, _ = SHAPES["val turns"]
    found = diagnose([math.nan] * len(train), val)
    assert [each.finding for each in found] == [Finding.OVERFITTING]


def test_numbers_behind_the_words_are_those_of_the_curve() -> None:
    (found,) = diagnose([1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03], [1, 0.6, 0.5, 0.5, 0.6, 0.7, 0.8])
    assert found.words == "val_loss rose from 0.5 at epoch 3 to 0.8 while train_loss fell by another 0.27"
    assert found.numbers == {"best_epoch": 3, "best": 0.5, "last": 0.8}


@given(st.lists(st.floats(0.0, 1e6), max_size=SHORTEST_CURVE - 1))
def test_nothing_is_seen_in_a_curve_too_short_to_show_it(values: list[float]) -> None:
    assert diagnose(values, values) == ()


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, allow_infinity=True)),
        max_size=40,
    )
)
def test_any_curve_gets_an_answer(rows: list[tuple[float, float]]) -> None:
    with np.errstate(all="ignore"):
        diagnose([train for train, _ in rows], [val for _, val in rows], CHANCE)


def test_curves_of_unequal_length_are_a_slip() -> None:
    with pytest.raises(ValueError, match=r"equally long \(got 2 and 1 epochs\)"):
        diagnose([1.0, 2.0], [1.0])


def test_noisy_last_value_below_all_others_is_no_improvement() -> None:
    """It swings between 0.05 and 0.155 from the tenth epoch on, and was as low then."""
    val = [
        0.317, 0.144, 0.16, 0.124, 0.112, 0.111, 0.068, 0.085, 0.09, 0.048, 0.06, 0.118, 0.069, 0.073, 0.056, 0.143,
        0.148, 0.138, 0.157, 0.069, 0.12, 0.112, 0.118, 0.155, 0.049, 0.048, 0.036,
    ]  # fmt: skip
    found = diagnose([math.nan] * len(val), val, Reference(baseline=2.3))
    assert Finding.IMPROVING not in {each.finding for each in found}


def test_one_lucky_last_value_on_a_settled_curve_is_no_improvement() -> None:
    val = [*FALLING[:-1], 0.1]
    assert {each.finding for each in diagnose([math.nan] * len(val), val)} == {Finding.PLATEAUED}
