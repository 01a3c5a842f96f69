"""Properties and situations of hpsearch/lr_curve.py. Curves are made up; no network is trained."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpsearch.lr_curve import (
    ABOVE,
    BELOW,
    MIN_WIDTH,
    LrMeasurement,
    confirm_range,
    measure_range,
    probe_lrs,
    probe_scores,
    ramp_lrs,
    spread_decades,
)

LRS = ramp_lrs(1e-5, 10.0, 100)
FREE = {"user_low": 1e-8, "user_high": 1e4}


def valley(at: float, *, depth: float = 1.0, noise_seed: int | None = None, shift: float = 0.0) -> list[float]:
    """A loss that falls to its minimum at the given rate and rises steeply after it."""
    x = np.log10(LRS) - math.log10(at)
    losses: NDArray[np.float64] = shift + depth * np.where(x < 0, x**2 / 4, 3 * x**2)
    if noise_seed is not None:
        losses = losses + 0.01 * np.random.default_rng(noise_seed).standard_normal(len(LRS))
    return [float(v) for v in losses]


def measured(losses: list[list[float]], user_low: float = 1e-8, user_high: float = 1e4) -> LrMeasurement:
    measurement = measure_range(losses, LRS, user_low=user_low, user_high=user_high)
    assert measurement is not None
    return measurement


def test_ramp_is_geometric_and_holds_both_ends_exactly() -> None:
    assert LRS[0] == 1e-5
    assert LRS[-1] == 10.0
    assert len(LRS) == 100
    ratios = LRS[1:] / LRS[:-1]
    assert np.allclose(ratios, ratios[0])


@pytest.mark.parametrize(("low", "high", "steps"), [(0.0, 1.0, 10), (1.0, 1.0, 10), (2.0, 1.0, 10), (0.1, 1.0, 1)])
def test_ramp_refuses_ends_that_do_not_rise_and_single_steps(low: float, high: float, steps: int) -> None:
    with pytest.raises(ValueError, match=r"needed|at least 2 steps"):
        ramp_lrs(low, high, steps)


def test_suggestion_is_a_quarter_of_the_minimum_and_interval_lies_around_it() -> None:
    measurement = measured([valley(0.1, noise_seed=s) for s in range(5)])
    assert measurement.lr == pytest.approx(0.1 / 4, rel=0.3)  # the steep side pushes a mean's minimum down
    assert measurement.low == pytest.approx(measurement.lr / BELOW, rel=0.16)  # one step of the grid is 15 %
    assert measurement.high == pytest.approx(measurement.lr * ABOVE, rel=0.16)
    assert measurement.sure
    assert not measurement.at_edge
    assert not measurement.confirmed


def test_negative_losses_give_the_same_answer_as_positive_ones() -> None:
    above = measured([valley(0.1, noise_seed=s) for s in range(5)])
    below = measured([valley(0.1, noise_seed=s, shift=-50.0) for s in range(5)])
    assert (below.lr, below.low, below.high, below.spread_decades) == (
        above.lr,
        above.low,
        above.high,
        above.spread_decades,
    )


def test_minimum_in_the_first_or_last_steps_is_at_an_edge_and_not_sure() -> None:
    falling = [list(np.linspace(2.0, 1.0, 100))] * 5
    rising = [list(np.linspace(1.0, 2.0, 100))] * 5
    for losses in (falling, rising):
        measurement = measured(losses)
        assert measurement.at_edge
        assert not measurement.sure
        assert measurement.spread_decades == 0.0


def test_a_run_that_stops_at_nan_and_one_that_records_on_are_the_same() -> None:
    runs = [valley(0.1, noise_seed=s) for s in range(3)]
    stopped = [run[:80] for run in runs]
    for rest in (math.nan, math.inf, -math.inf):
        recorded = [[*run[:80], rest, *run[81:]] for run in runs]
        assert measured(recorded) == measured(stopped)


def test_curve_is_cut_where_most_seeds_diverged() -> None:
    runs = [valley(0.1, noise_seed=s) for s in range(5)]
    runs = [run[:n] for run, n in zip(runs, (70, 70, 80, 90, 100), strict=True)]
    curve = measured(runs).median_curve
    assert len(curve) == 100
    assert curve[79] is not None
    assert curve[80:] == (None,) * 20


def test_divergence_next_to_the_minimum_does_not_hide_it() -> None:
    run = [*np.linspace(2.0, 1.0, 60), math.nan]
    measurement = measured([run] * 5)
    assert measurement.lr == pytest.approx(LRS[59] / 4, rel=0.1)
    assert not measurement.at_edge


@pytest.mark.parametrize("losses", [[[]], [[math.nan]], [[], [], [1.0, 1.0]], [[math.inf] * 100] * 3])
def test_no_finite_loss_of_the_median_seed_gives_none(losses: list[list[float]]) -> None:
    assert measure_range(losses, LRS, **FREE) is None


def test_one_stray_seed_moves_neither_answer_nor_trust_and_two_take_the_trust() -> None:
    good = [valley(0.1, noise_seed=s) for s in range(5)]
    strays = [valley(1e-4, noise_seed=9), valley(2.0, noise_seed=8)]
    one = measured(good[:4] + strays[:1])
    assert one.sure
    assert abs(math.log10(one.lr / measured(good).lr)) < 0.15
    two = measured([*good[:3], strays[0], valley(2e-4, noise_seed=7)])
    assert two.spread_decades > 0.3
    assert not two.sure


def test_seed_without_a_finite_loss_takes_the_trust() -> None:
    measurement = measured([valley(0.1), valley(0.1), valley(0.1), []])
    assert len(measurement.per_seed_lr) == 3
    assert measurement.spread_decades == 0.0
    assert not measurement.sure


def test_bounds_that_hide_a_disagreement_do_not_settle_it() -> None:
    runs = [valley(1e-3), valley(1e-3), valley(0.1), valley(1.0), valley(1.0)]
    hidden = measured(runs, user_low=1e-6, user_high=1e-5)
    assert set(hidden.per_seed_lr) == {1e-5}
    assert not hidden.sure


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((1e-6, 1e-4), (1e-4 / MIN_WIDTH, 1e-4, 1e-4)),  # the suggestion is far above
        ((1.0, 10.0), (1.0, MIN_WIDTH, 1.0)),  # far below
        ((1e-4, 2e-4), (1e-4, 2e-4, 2e-4)),  # and the bounds are narrower than the narrowest interval
    ],
)
def test_interval_hugs_the_bound_nearest_to_a_suggestion_outside(
    bounds: tuple[float, float], expected: tuple[float, float, float]
) -> None:
    measurement = measured([valley(0.1)] * 3, *bounds)
    assert (measurement.low, measurement.high, measurement.lr) == pytest.approx(expected)


def test_equal_measurements_with_other_noise_give_equal_numbers() -> None:
    numbers = {
        (m.lr, m.low, m.high) for m in (measured([valley(0.1, depth=d), valley(0.1)]) for d in (0.5, 1.0, 1.7, 20.0))
    }
    assert len(numbers) == 1


def test_numbers_are_on_the_grid_of_the_ramp_also_beyond_its_ends() -> None:
    lrs = ramp_lrs(0.01, 1.0, 21)
    measurement = measure_range([list(np.linspace(1.0, 2.0, 21))], lrs, user_low=1e-9, user_high=1.0)
    assert measurement is not None
    for lr in (measurement.lr, measurement.low, measurement.high):
        place = math.log10(lr / 0.01) * 10  # ten steps a decade
        assert place == pytest.approx(round(place), abs=1e-9)
    assert measurement.low < lrs[0]


finite = st.floats(-1e9, 1e9)
loss = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e300]))


@given(
    losses=st.lists(st.lists(loss, max_size=20), min_size=1, max_size=6),
    low=st.floats(1e-9, 1e3),
    factor=st.floats(1.001, 1e6),
)
def test_any_losses_give_a_rising_interval_within_the_bounds_or_none(
    losses: list[list[float]], low: float, factor: float
) -> None:
    high = low * factor
    lrs = ramp_lrs(1e-4, 1.0, 20)
    measurement = measure_range(losses, lrs, user_low=low, user_high=high)
    if measurement is None:
        return
    assert low <= measurement.low < measurement.high <= high
    assert low <= measurement.lr <= high
    assert measurement.low <= measurement.lr <= measurement.high
    # Suggested rates were snapped; the narrowest interval was not, so rounding is allowed for.
    assert measurement.high / measurement.low >= min(MIN_WIDTH, high / low) * (1 - 1e-9)
    assert all(low <= lr <= high for lr in measurement.per_seed_lr)
    assert math.isfinite(measurement.spread_decades)
    probes = probe_lrs(measurement)
    assert (probes == ()) == measurement.sure
    assert all(low <= lr <= high for lr in probes)
    assert all(a < b for a, b in pairwise(probes))
    if probes:
        confirmed = confirm_range(measurement, {lr: [[1.0, float(i)]] for i, lr in enumerate(probes)})
        assert low <= confirmed.low <= measurement.low < measurement.high <= confirmed.high <= high


def test_measurement_refuses_more_losses_than_rates_and_bounds_upside_down() -> None:
    with pytest.raises(ValueError, match="seed 1 has 101 losses for 100 rates"):
        measure_range([[1.0], [1.0] * 101], LRS, **FREE)
    with pytest.raises(ValueError, match=r"0 < user_low < user_high is needed \(got user_low=1.0, user_high=0.1\)"):
        measure_range([[1.0]], LRS, user_low=1.0, user_high=0.1)
    with pytest.raises(ValueError, match="at least one seed"):
        measure_range([], LRS, **FREE)
    with pytest.raises(ValueError, match="rising"):
        measure_range([[1.0]], [1.0, 0.1], **FREE)


def test_spread_is_the_width_of_the_middle_half_in_decades() -> None:
    assert spread_decades([0.01]) == 0.0
    assert spread_decades([0.001, 0.01, 0.01, 0.01, 10.0]) == 0.0
    assert spread_decades([0.001, 0.001, 0.01, 0.1, 0.1]) == pytest.approx(2.0)


def test_sure_measurement_asks_for_no_probes() -> None:
    assert probe_lrs(measured([valley(0.1)] * 5)) == ()


def test_probes_of_an_edge_span_the_ramp_within_the_bounds() -> None:
    measurement = measured([list(np.linspace(2.0, 1.0, 100))] * 3, user_low=1e-3, user_high=1e2)
    probes = probe_lrs(measurement)
    assert len(probes) == 9
    assert probes[0] == pytest.approx(1e-3, rel=0.16)
    assert probes[-1] == 10.0
    assert len(probe_lrs(measurement, count=4)) == 4


def test_probes_of_disagreeing_seeds_reach_a_decade_beyond_them() -> None:
    measurement = measured([valley(1e-2), valley(1e-2), valley(0.1), valley(1.0), valley(1.0)])
    probes = probe_lrs(measurement)
    assert probes[0] == pytest.approx(1e-2 / 4 / 10, rel=0.3)
    assert probes[-1] == pytest.approx(1.0 / 4 * 10, rel=0.3)


def test_probes_stay_within_bounds_that_do_not_meet_the_ramp() -> None:
    measurement = measured([list(np.linspace(2.0, 1.0, 100))] * 3, user_low=1e-8, user_high=1e-7)
    probes = probe_lrs(measurement)
    assert (probes[0], probes[-1]) == pytest.approx((1e-8, 1e-7))


def unsure() -> LrMeasurement:
    return measured([valley(1e-2), valley(1e-2), valley(0.1), valley(1.0), valley(1.0)], 1e-5, 1.0)


def test_best_probe_becomes_the_suggestion_and_the_interval_covers_both_answers() -> None:
    before = unsure()
    probes = {1e-4: [[2.0] * 8], 1e-3: [[1.0] * 8], 0.5: [[2.0] * 8]}
    after = confirm_range(before, probes)
    assert after.lr == 1e-3
    assert after.confirmed
    assert after.sure
    assert after.low <= 1e-3 / 10 * 1.16
    assert after.high == before.high


def test_probe_is_scored_by_its_last_quarter_alone() -> None:
    assert probe_scores({0.1: [[9.0] * 6 + [1.0, 2.0], [9.0] * 8], 0.01: [[1.0]]}) == {0.01: math.inf, 0.1: 5.25}
    late = [9.0] * 6 + [0.1, 0.1]
    early = [0.0] * 6 + [1.0, 1.0]
    assert confirm_range(unsure(), {1e-4: [early], 1e-3: [late], 1e-2: [early]}).lr == 1e-3


def test_probe_that_ends_early_or_in_nan_loses_to_any_that_does_not() -> None:
    probes = {1e-4: [[5.0] * 8], 1e-3: [[6.0] * 8], 1e-2: [[0.1] * 7], 0.1: [[0.1] * 7 + [math.nan]]}
    assert confirm_range(unsure(), probes).lr == 1e-4
    assert confirm_range(unsure(), {1e-4: [[0.1] * 7], 1e-3: [[0.1] * 7]}, steps=8) == unsure()


def test_best_probe_at_an_end_is_not_sure() -> None:
    after = confirm_range(unsure(), {1e-4: [[2.0]], 1e-3: [[1.5]], 1e-2: [[1.0]]})
    assert after.at_edge
    assert not after.sure
    assert after.confirmed


def test_probes_that_all_diverged_leave_the_measurement_as_it_was() -> None:
    after = confirm_range(unsure(), {1e-3: [[math.nan]], 1e-2: [[]]})
    assert after == unsure()
    assert not after.confirmed


def test_confirmation_refuses_no_probes_and_impossible_rates() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        confirm_range(unsure(), {})
    with pytest.raises(ValueError, match="at least one seed"):
        confirm_range(unsure(), {0.1: []})
    with pytest.raises(ValueError, match="finite and positive"):
        confirm_range(unsure(), {-0.1: [[1.0]]})
    with pytest.raises(ValueError, match="at least 2 probes"):
        probe_lrs(unsure(), count=1)
