"""The race of the best few: who gets the next seed, who is ahead, and how sure that is."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.racing import FEWEST_SEEDS, SURE, next_run, standings


def race(truth: dict[int, float], spread: float, n_seeds: int, seed: int) -> tuple[dict[int, list[float]], int]:
    """Scores of a whole race, one run after another, and how many runs it took."""
    rng = np.random.default_rng(seed)
    scores: dict[int, list[float]] = defaultdict(list)
    runs = 0
    while (run := next_run(scores, {}, candidates=list(truth), n_seeds=n_seeds, seed=0)) is not None:
        trial, number = run
        assert number == len(scores[trial])
        scores[trial].append(truth[trial] + spread * rng.standard_normal())
        runs += 1
    return scores, runs


def test_clear_winner_costs_only_the_first_seeds() -> None:
    scores, runs = race({4: 0.1, 7: 0.9, 9: 0.8}, spread=0.001, n_seeds=5, seed=0)
    assert runs == 3 * FEWEST_SEEDS
    assert standings(scores, seed=0)[0].trial == 4
    assert standings(scores, seed=0)[0].chance > SURE


def test_seeds_go_to_those_who_may_still_win() -> None:
    spent = defaultdict(int)
    for seed in range(20):
        scores, _ = race({1: 0.100, 2: 0.101, 3: 0.9}, spread=0.02, n_seeds=8, seed=seed)
        for trial, values in scores.items():
            spent[trial] += len(values)
    assert spent[1] > 2 * spent[3]
    assert spent[2] > 2 * spent[3]
    assert spent[3] == 20 * FEWEST_SEEDS


def test_no_candidate_gets_more_than_its_share() -> None:
    scores, runs = race({1: 0.1, 2: 0.1, 3: 0.1}, spread=0.05, n_seeds=3, seed=1)
    assert all(len(values) <= 3 for values in scores.values())
    assert runs <= 9


def test_runs_under_way_are_not_given_out_again() -> None:
    under_way: dict[int, int] = defaultdict(int)
    given_out = []
    while (run := next_run({}, under_way, candidates=[5, 3], n_seeds=3, seed=0)) is not None:
        given_out.append(run)
        under_way[run[0]] += 1
    assert given_out == [(5, 0), (3, 0), (5, 1), (3, 1)]


def test_one_seed_each_is_possible_and_says_that_nothing_is_known_of_the_spread() -> None:
    scores, runs = race({1: 0.1, 2: 0.2}, spread=0.0, n_seeds=1, seed=0)
    assert runs == 2
    first, second = standings(scores, seed=0)
    assert (first.trial, first.low, first.high, first.chance) == (1, None, None, 1.0)
    assert second.chance == 0.0


def test_equal_means_rank_by_trial_number_and_share_the_chance() -> None:
    table = standings({9: [0.5, 0.5], 2: [0.5, 0.5]}, seed=0)
    assert [(row.trial, row.chance) for row in table] == [(2, 0.5), (9, 0.5)]


def test_intervals_of_the_mean_hold_as_often_as_they_say() -> None:
    """400 races of 3 candidates x 3 seeds; 95 % within 6 sigma (0.065) would fail by chance about once in 5e8."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        scores = {k: list(0.3 + 0.05 * rng.standard_normal(3)) for k in range(3)}
        held += sum(row.low <= 0.3 <= row.high for row in standings(scores, seed=0) if row.low is not None)
    assert abs(held / 1200 - 0.95) < 0.065


def test_chance_of_the_leader_is_how_often_it_is_the_best() -> None:
    """Means drawn as the prior has it: among leaders with a chance near p, about p are the best."""
    rng = np.random.default_rng(4)
    claimed, right = [], []
    for _ in range(600):
        truth = 0.05 * rng.standard_normal(3)
        scores = {k: list(truth[k] + 0.05 * rng.standard_normal(3)) for k in range(3)}
        leader = standings(scores, seed=0)[0]
        claimed.append(leader.chance)
        right.append(leader.trial == int(truth.argmin()))
    assert np.mean(right) == pytest.approx(np.mean(claimed), abs=0.08)


def test_score_that_is_not_finite_is_a_slip() -> None:
    with pytest.raises(ValueError, match="trial 3: a score is not finite"):
        standings({3: [0.1, float("nan")]}, seed=0)


@given(
    st.dictionaries(st.integers(0, 99), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=5)
)
def test_chances_sum_to_one_and_the_order_is_that_of_the_means(scores: dict[int, list[float]]) -> None:
    table = standings(scores, seed=1)
    assert sum(row.chance for row in table) == pytest.approx(1.0)
    assert [row.mean for row in table] == sorted(row.mean for row in table)
