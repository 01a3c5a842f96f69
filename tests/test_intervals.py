"""Properties and coverage of hpsearch/intervals.py."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import hpsearch.intervals
from hpsearch.intervals import Interval, _nominal_level, better, mean_interval, paired_interval, wilson_interval


def losses(n: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Skewed like a confident network's: most rows cost little, a few much. Mean exp(-2.5)."""
    return np.exp(np.random.default_rng(seed).normal(-3.0, 1.0, n))


def test_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = losses(200, 0)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_below_100_rows_there_is_a_value_and_no_interval() -> None:
    assert mean_interval(losses(99, 0), seed=0).low is None
    assert mean_interval(losses(99, 0), seed=0).high is None
    assert mean_interval([1.0] * 99, seed=0) == Interval(value=1.0)
    assert mean_interval(losses(100, 0), seed=0).low is not None


def test_equal_rows_give_an_interval_of_no_width() -> None:
    assert mean_interval([0.1] * 300, seed=0) == Interval(value=0.1, low=0.1, high=0.1)


def test_two_rows_that_differ_among_ten_thousand_give_no_interval() -> None:
    values = np.zeros(10_000)
    values[:2] = 1.0
    interval = mean_interval(values, seed=0)
    assert interval.value == pytest.approx(2e-4)
    assert (interval.low, interval.high) == (None, None)


def test_skewed_rows_get_an_interval_that_reaches_further_up_than_down() -> None:
    interval = mean_interval(losses(300, 0), seed=0)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.value > 1.1 * (interval.value - interval.low)


def test_interval_covers_the_true_mean_of_skewed_losses() -> None:
    truth = math.exp(-2.5)
    trials = 400
    hits = 0
    for seed in range(trials):
        interval = mean_interval(losses(100, 10_000 + seed), seed=seed)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= truth <= interval.high
    # Meant: 0.95, measured over 4,000 trials: 0.93. 6 sigma below that: fails by chance about once in 1e9 runs, and
    # the seeds are fixed. A percentile bootstrap covers about 0.90 here, the mean's mirror image about 0.87.
    assert hits / trials > 0.93 - 6 * math.sqrt(0.93 * 0.07 / trials)
    assert hits / trials > 0.91  # with these seeds; tells the bootstrap-t from the percentile one


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-200, 1e-3, 1.0, 7.0, 1e200]),
    shift=st.sampled_from([0.0, -1.0, 100.0]),
)
def test_interval_moves_and_stretches_with_its_values(seed: int, scale: float, shift: float) -> None:
    plain = mean_interval(losses(120, seed), seed=seed)
    moved = mean_interval((losses(120, seed) + shift) * scale, seed=seed)
    for a, b in ((plain.value, moved.value), (plain.low, moved.low), (plain.high, moved.high)):
        assert a is not None
        assert b is not None
        assert b / scale == pytest.approx(a + shift, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-1e6, 1e6), min_size=100, max_size=150), st.integers(0, 5))
def test_interval_holds_its_value_or_is_none(values: list[float], seed: int) -> None:
    interval = mean_interval(values, seed=seed)
    assert (interval.low is None) == (interval.high is None)
    if interval.low is not None and interval.high is not None:
        assert math.isfinite(interval.low)
        assert math.isfinite(interval.high)
        assert interval.low <= interval.high


def test_expansion_for_many_rows_agrees_with_the_drawn_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    values = losses(20_000, 3) ** 2  # skewed enough that the correction moves both ends by several per cent
    drawn = mean_interval(values, seed=0)
    monkeypatch.setattr(hpsearch.intervals, "LARGE_ROWS", 10_000)
    expanded = mean_interval(values, seed=0)
    assert drawn.low is not None
    assert drawn.high is not None
    width = drawn.high - drawn.low
    # A quantile of 2,000 draws has a standard error of 0.06 standard errors of the mean, 1.5 % of the width.
    assert expanded.low == pytest.approx(drawn.low, abs=0.05 * width)
    assert expanded.high == pytest.approx(drawn.high, abs=0.05 * width)
    assert expanded.low is not None
    assert expanded.high is not None
    assert expanded.high - expanded.value > 1.05 * (expanded.value - expanded.low)


def test_ten_thousand_rows_take_under_a_second_of_processor_time() -> None:
    values = losses(10_000, 0)
    start = time.process_time()
    mean_interval(values, seed=0)
    assert time.process_time() - start < 1.0  # 0.12 s on one core


def test_higher_level_is_wider() -> None:
    values = losses(500, 0)
    narrow, wide = mean_interval(values, seed=0, level=0.8), mean_interval(values, seed=0, level=0.99)
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairs_remove_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.exponential(1.0, 400)
    gain = paired_interval(hard - 0.05 + 0.01 * rng.standard_normal(400), hard, seed=0)
    assert gain.value == pytest.approx(-0.05, abs=0.01)
    assert better(gain, "minimize") is True
    assert better(gain, "maximize") is False


@pytest.mark.parametrize(
    ("interval", "minimize", "maximize"),
    [
        (Interval(value=-2.0, low=-3.0, high=-1.0), True, False),
        (Interval(value=2.0, low=1.0, high=3.0), False, True),
        (Interval(value=1.0, low=-1.0, high=3.0), None, None),
        (Interval(value=0.0, low=0.0, high=0.0), None, None),
        (Interval(value=1.0, low=0.0, high=3.0), None, None),
        (Interval(value=-5.0), None, None),
    ],
)
def test_better_is_true_false_or_unknown(interval: Interval, minimize: bool | None, maximize: bool | None) -> None:
    assert better(interval, "minimize") is minimize
    assert better(interval, "maximize") is maximize


def test_wilson_gives_the_textbook_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148 and 0 of 20.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson_interval(successes, n)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_holds_its_proportion_and_stays_within_zero_and_one(n: int, share: float) -> None:
    interval = wilson_interval(round(share * n), n)
    assert interval.low is not None
    assert interval.high is not None
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.low < interval.high


def test_slips_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([math.nan] * 200, seed=0)
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        mean_interval([], seed=0)
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        mean_interval([[1.0, 2.0], [3.0, 4.0]], seed=0)
    with pytest.raises(ValueError, match="0 < level < 1"):
        mean_interval([1.0], seed=0, level=95)
    with pytest.raises(ValueError, match="equal shapes"):
        paired_interval([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson_interval(0, 0)


def test_level_makes_up_for_long_tails_to_both_sides_on_few_rows_alone() -> None:
    rng = np.random.default_rng(0)
    one_sided = rng.gamma(0.5, size=100_000)
    two_sided = one_sided * rng.choice([-1, 1], size=len(one_sided))

    def level(rows: NDArray[np.float64], n: int) -> float:
        return _nominal_level((rows[:n] - rows[:n].mean()) / rows[:n].std(), 0.95)

    assert level(one_sided, 100) == pytest.approx(0.95, abs=0.002)
    assert 0.97 < level(two_sided, 100) <= 0.985
    assert level(two_sided, 5_000) == pytest.approx(0.95, abs=0.002)


def test_difference_of_long_tailed_losses_holds_at_100_rows() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for study in range(800):
        interval = paired_interval(rng.gamma(0.3, size=100), rng.gamma(0.3, size=100), seed=study)
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0.0 <= interval.high
    assert 0.945 <= held / 800 <= 0.97  # 0.936 where 0.95 is asked for and nothing is made up for
