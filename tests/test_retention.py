"""What a checkpoint is worth: a decision of values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.retention import Worth, n_kept_at_most, price_of_best, price_of_last

GOOD, BAD = (False, False, 0.1, 4), (False, False, 0.9, 3)


def worth_of_last(*, leased: bool = False, may_continue: bool = False, is_best: bool = False) -> int:
    return price_of_last(4, 3, 0.1, leased=leased, may_continue=may_continue, is_best=is_best)[0]


def test_last_checkpoint_is_worth_what_would_be_trained_without_it() -> None:
    assert worth_of_last() == Worth.NOTHING
    assert worth_of_last(is_best=True) == Worth.LONGER
    assert worth_of_last(may_continue=True, is_best=True) == Worth.PAUSED
    assert worth_of_last(leased=True, may_continue=True) == Worth.RUNNING


@pytest.mark.parametrize(
    ("place", "worth"), [(0, Worth.BEST), (1, Worth.BEST), (2, Worth.POOL), (4, Worth.POOL), (5, Worth.NOTHING)]
)
def test_best_checkpoint_is_worth_its_place(place: int, worth: Worth) -> None:
    assert price_of_best(GOOD, place, pool=5, size=2)[0] == worth


def test_of_paused_trials_the_lower_rung_goes_first_then_the_worse_then_the_later() -> None:
    def price(trial: int, epoch: int, objective: float | None) -> object:
        return price_of_last(trial, epoch, objective, leased=False, may_continue=True, is_best=False)

    in_order = [price(1, 1, 0.1), price(7, 3, 0.9), price(9, 3, 0.2), price(8, 3, 0.2), price(2, 9, 0.95)]
    assert sorted(in_order) == in_order  # type: ignore[type-var]


def test_of_candidates_the_worse_goes_first_and_a_spoilt_one_before_all() -> None:
    spoilt = (True, False, 0.01, 5)
    prices = [price_of_best(key, 3, pool=5, size=2) for key in (spoilt, BAD, GOOD)]
    assert sorted(prices) == prices


def test_candidate_for_the_ensemble_outlives_all_that_only_spares_training() -> None:
    spared = price_of_last(1, 81, 0.0, leased=True, may_continue=True, is_best=True)
    assert spared < price_of_best(BAD, 4, pool=5, size=2) < price_of_best(BAD, 1, pool=5, size=2)


def test_without_rungs_only_the_pool_and_the_best_few_are_kept() -> None:
    assert n_kept_at_most(1000, (), 3, pool=20, size=5) == 25 + 4


def test_each_rung_keeps_those_that_can_go_on() -> None:
    assert n_kept_at_most(81, (1, 3, 9), 3, pool=6, size=3) == 3 + 27 + 9 + 3 + 6 + 6


@given(
    n_trials=st.integers(1, 10_000),
    n_rungs=st.integers(0, 6),
    eta=st.integers(2, 5),
    pool=st.integers(1, 50),
    overtaken=st.floats(1.0, 3.0),
)
def test_no_more_than_a_last_and_a_best_of_each_trial_are_kept(
    n_trials: int, n_rungs: int, eta: int, pool: int, overtaken: float
) -> None:
    kept = n_kept_at_most(n_trials, range(n_rungs), eta, pool=pool, size=1, overtaken=overtaken)
    assert 1 <= kept <= 2 * n_trials
    assert kept >= n_kept_at_most(n_trials, range(n_rungs), eta, pool=pool, size=1)
