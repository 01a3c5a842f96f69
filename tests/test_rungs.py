"""Who goes on: the rungs' promises, on hand-made ladders, random ones, and simulated studies."""

from __future__ import annotations

import doctest
import heapq
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch import rungs
from hpsearch.rungs import (
    MEDIAN_GRACE,
    MedianRule,
    NoStopping,
    Promotion,
    PromotionAsha,
    Standing,
    StoppingRule,
    SynchronousHalving,
    make_rule,
    rung_epochs,
)

RULES: dict[str, Callable[[int], StoppingRule]] = {
    name: lambda n_trials, name=name: make_rule(  # type: ignore[misc]
        name, min_epochs=1, max_epochs=27, reduction_factor=3, n_trials=n_trials
    )
    for name in ("asha", "sha", "median", "none")
}
every_rule = pytest.mark.parametrize("new_rule", RULES.values(), ids=RULES.keys())
every_pausing_rule = pytest.mark.parametrize(
    "new_rule", [RULES[name] for name in ("asha", "sha", "median")], ids=["asha", "sha", "median"]
)
values_of_a_rung = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8]) | st.floats(-1e9, 1e9), min_size=1, max_size=40)


def record_all(rule: StoppingRule, values: Iterable[float], *, epoch: int = 1) -> None:
    for trial, value in enumerate(values):
        rule.record(trial, epoch, value)


def take_promotable(rule: StoppingRule) -> list[Promotion]:
    """Everything that may go on now, in the order in which it is offered."""
    taken = []
    while (promotion := rule.promotable()) is not None:
        rule.promote(promotion.trial, promotion.from_epoch)
        taken.append(promotion)
    return taken


def trials_of(promotions: Iterable[Promotion]) -> list[int]:
    return [promotion.trial for promotion in promotions]


# Where the rungs are


def test_rungs_are_found_by_multiplying_and_end_below_max_epochs() -> None:
    assert rung_epochs(1, 243, 3) == (1, 3, 9, 27, 81)
    assert rung_epochs(1, 244, 3) == (1, 3, 9, 27, 81, 243)
    assert rung_epochs(2, 16, 2) == (2, 4, 8)
    assert rung_epochs(5, 5, 3) == ()


@given(st.integers(1, 50), st.integers(0, 5000), st.integers(2, 10))
def test_rungs_grow_by_the_reduction_factor_and_the_next_would_reach_max_epochs(low: int, extra: int, eta: int) -> None:
    epochs = rung_epochs(low, low + extra, eta)
    assert epochs == tuple(low * eta**place for place in range(len(epochs)))
    assert all(epoch < low + extra for epoch in epochs)
    assert low * eta ** len(epochs) >= low + extra


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 9, 3), "1 <= min_epochs <= max_epochs is needed (got 0 and 9)"),
        ((10, 9, 3), "1 <= min_epochs <= max_epochs is needed (got 10 and 9)"),
        ((1, 9, 1), "reduction_factor must be 2 or more (got 1)"),
    ],
)
def test_impossible_rungs_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the whole message is compared
        rung_epochs(*arguments)
    assert str(refusal.value) == message


def test_make_rule_gives_what_space_yaml_names() -> None:
    kinds = {name: type(new_rule(5)) for name, new_rule in RULES.items()}
    assert kinds == {"asha": PromotionAsha, "sha": SynchronousHalving, "median": MedianRule, "none": NoStopping}
    with pytest.raises(ValueError, match="there is no early stopping rule 'hyperbend'"):
        make_rule("hyperbend", min_epochs=1, max_epochs=9, reduction_factor=3, n_trials=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_trials must be 1 or more"):
        make_rule("sha", min_epochs=1, max_epochs=9, reduction_factor=3, n_trials=0)


def test_each_rule_tells_its_first_target_and_where_it_compares() -> None:
    assert {name: (new_rule(5).first_target, new_rule(5).epochs) for name, new_rule in RULES.items()} == {
        "asha": (1, (1, 3, 9)),
        "sha": (1, (1, 3, 9)),
        "median": (1, tuple(range(1, 27))),
        "none": (27, ()),
    }
    assert MedianRule(4, 10).epochs == (4, 8)
    assert PromotionAsha(9, 9, 3).first_target == 9


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(rungs).attempted > 0
    assert doctest.testmod(rungs).failed == 0


# What every rule keeps


@every_rule
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused_and_changes_nothing(
    new_rule: Callable[[int], StoppingRule], value: float
) -> None:
    rule = new_rule(3)
    for epoch in (rule.first_target, 27):
        with pytest.raises(ValueError, match="a value must be finite to be ranked"):
            rule.record(0, epoch, value)
    record_all(rule, [0.3, 0.2, 0.1], epoch=rule.first_target)
    best = rule.best_paused()
    assert best is None or best.trial == 2


@every_rule
def test_epoch_at_which_nobody_is_compared_is_refused(new_rule: Callable[[int], StoppingRule]) -> None:
    with pytest.raises(ValueError, match=r"trial 0: trials are not compared at epoch 28, but at .*27"):
        new_rule(3).record(0, 28, 0.5)


@every_pausing_rule
def test_earlier_epoch_after_a_later_one_is_refused(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(3)
    rule.record(0, 9, 0.5)
    with pytest.raises(ValueError, match="trial 0: epoch 3 was recorded after epoch 9"):
        rule.record(0, 3, 0.5)


@every_pausing_rule
def test_second_record_of_the_same_trial_and_epoch_is_ignored(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(3)
    record_all(rule, [0.3, 0.2, 0.1])
    for _ in range(5):
        rule.record(0, 1, 0.0)
    assert take_promotable(rule)[0].trial == 2
    rule.record(2, 3, 0.05)
    rule.record(2, 1, 0.9)  # a copy that comes late is still a copy
    rule.record(2, 27, 0.01)
    rule.record(2, 27, 0.9)
    assert rule.best_paused() is not None


@every_pausing_rule
def test_looking_changes_nothing_and_promoting_twice_is_promoting_once(
    new_rule: Callable[[int], StoppingRule],
) -> None:
    rule = new_rule(9)
    record_all(rule, [0.9, 0.1, 0.5, 0.3, 0.2, 0.8, 0.7, 0.6, 0.4])
    assert rule.promotable() == rule.promotable() == Promotion(trial=1, from_epoch=1, to_epoch=rule.epochs[1])
    assert rule.best_paused() == rule.best_paused() == Promotion(trial=1, from_epoch=1, to_epoch=27)
    for _ in range(2):
        rule.promote(1, 1)
    promotion = rule.promotable()
    assert promotion is not None
    assert promotion.trial == 4


@every_pausing_rule
def test_promoting_a_trial_that_is_not_there_is_refused(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(3)
    record_all(rule, [0.3, 0.2])
    rule.record(2, 27, 0.1)
    for trial, epoch in ((2, 27), (2, 1), (0, 3), (7, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"trial {trial} is not paused at epoch {epoch}"):
            rule.promote(trial, epoch)


@every_pausing_rule
def test_withdrawn_trial_is_never_offered_and_keeps_its_place(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(6)
    record_all(rule, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    rule.withdraw(5)
    rule.withdraw(5)
    rule.record(5, 3, 0.0)  # and what it left on the way does not count
    offered = trials_of(take_promotable(rule))
    assert 5 not in offered
    assert offered[0] == 4
    if not isinstance(rule, MedianRule):
        assert offered == [4]  # floor(6 / 3) = 2 places, one of them the withdrawn trial's
    assert not rule.keeps_going(5, 1)
    assert trials_of([paused for paused in [rule.best_paused()] if paused]) != [5]


@every_pausing_rule
@given(values=values_of_a_rung)
def test_trials_are_offered_best_first_and_equal_values_by_number(
    new_rule: Callable[[int], StoppingRule], values: Sequence[float]
) -> None:
    rule = new_rule(len(values))
    record_all(rule, values)
    offered = trials_of(take_promotable(rule))
    assert offered == sorted(range(len(values)), key=lambda trial: (values[trial], trial))[: len(offered)]


@every_pausing_rule
@given(values=values_of_a_rung)
def test_end_game_empties_the_highest_rung_first(
    new_rule: Callable[[int], StoppingRule], values: Sequence[float]
) -> None:
    rule = new_rule(len(values))
    record_all(rule, values)
    for promotion in take_promotable(rule):
        rule.record(promotion.trial, promotion.to_epoch, values[promotion.trial])
    ends = []
    while (best := rule.best_paused()) is not None:
        assert best.to_epoch == 27
        rule.promote(best.trial, best.from_epoch)
        ends.append((-best.from_epoch, values[best.trial], best.trial))
    assert ends == sorted(ends)
    assert sorted(trial for _, _, trial in ends) == list(range(len(values)))


def test_no_stopping_pauses_nobody() -> None:
    rule = NoStopping(27)
    record_all(rule, [0.3, 0.2, 0.1], epoch=27)
    rule.withdraw(3)
    assert rule.promotable() is None
    assert rule.best_paused() is None
    assert not rule.keeps_going(0, 27)


# Promotion ASHA


def test_trial_below_cutoff_at_rung_is_not_promoted() -> None:
    rule = PromotionAsha(1, 9, 3)
    rule.record(0, 1, 0.5)
    rule.record(1, 1, 0.4)
    assert rule.promotable() is None
    rule.record(2, 1, 0.6)
    assert take_promotable(rule) == [Promotion(trial=1, from_epoch=1, to_epoch=3)]


def test_trial_that_waited_goes_on_when_the_rung_has_grown() -> None:
    rule = PromotionAsha(1, 9, 3)
    record_all(rule, [0.1, 0.2, 0.3])
    assert trials_of(take_promotable(rule)) == [0]
    for trial in (3, 4):
        rule.record(trial, 1, 0.9)
        assert rule.promotable() is None
    rule.record(5, 1, 0.9)
    assert trials_of(take_promotable(rule)) == [1]


def test_highest_rung_is_served_first_and_the_last_rung_leads_to_max_epochs() -> None:
    rule = PromotionAsha(1, 8, 3)
    record_all(rule, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    for trial in (0, 1, 2):
        rule.promote(trial, 1)
        rule.record(trial, 3, 0.05)
    for trial in (9, 10, 11):
        rule.record(trial, 1, 0.01)
    assert take_promotable(rule)[:2] == [
        Promotion(trial=0, from_epoch=3, to_epoch=8),
        Promotion(trial=9, from_epoch=1, to_epoch=3),
    ]


def test_eight_trials_on_three_rungs_complete_only_by_the_end_game() -> None:
    rule = PromotionAsha(1, 27, 3)
    record_all(rule, [trial / 10 for trial in range(8)])
    for promotion in take_promotable(rule):
        rule.record(promotion.trial, 3, promotion.trial / 10)
    assert rule.promotable() is None
    assert rule.best_paused() == Promotion(trial=0, from_epoch=3, to_epoch=27)


@given(values=values_of_a_rung, eta=st.integers(2, 5))
def test_asha_gives_out_only_from_the_best_floor_of_n_over_eta(values: Sequence[float], eta: int) -> None:
    rule = PromotionAsha(1, eta, eta)
    for trial, value in enumerate(values):
        rule.record(trial, 1, value)
        here = sorted((value, trial) for trial, value in enumerate(values[: trial + 1]))
        for promotion in take_promotable(rule):
            assert (values[promotion.trial], promotion.trial) in here[: len(here) // eta]


@given(values=values_of_a_rung, eta=st.integers(2, 5))
def test_asha_asked_once_all_are_there_promotes_floor_of_n_over_eta(values: Sequence[float], eta: int) -> None:
    rule = PromotionAsha(1, eta, eta)
    record_all(rule, values)
    assert len(take_promotable(rule)) == len(values) // eta


@given(values=values_of_a_rung, eta=st.integers(2, 5))
def test_best_of_a_rung_with_eta_trials_or_more_is_promoted_in_the_end(values: Sequence[float], eta: int) -> None:
    rule = PromotionAsha(1, eta, eta)
    promoted = []
    for trial, value in enumerate(values):
        rule.record(trial, 1, value)
        promoted += trials_of(take_promotable(rule))
    best = min(range(len(values)), key=lambda trial: (values[trial], trial))
    assert (best in promoted) == (len(values) >= eta)


def test_trial_that_cannot_wait_goes_on_while_it_is_the_best_so_far_or_in_the_best_third() -> None:
    for rule in (PromotionAsha(1, 9, 3), SynchronousHalving(1, 9, 3, 6)):
        verdicts = []
        for trial, value in enumerate([0.5, 0.6, 0.4, 0.45, 0.7, 0.41]):
            rule.record(trial, 1, value)
            verdicts.append(rule.keeps_going(trial, 1))
        assert verdicts == [True, False, True, False, False, True]
        with pytest.raises(ValueError, match="trial 0 was not recorded at epoch 3"):
            rule.keeps_going(0, 3)
        rule.record(2, 9, 0.1)
        assert not rule.keeps_going(2, 9)


# Synchronous halving


def test_synchronous_rung_waits_for_all_of_its_trials() -> None:
    rule = SynchronousHalving(1, 9, 3, n_trials=6)
    record_all(rule, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert rule.promotable() is None
    rule.record(5, 1, 0.05)
    assert trials_of(take_promotable(rule)) == [5, 0]


def test_synchronous_rung_does_not_wait_for_a_withdrawn_trial_and_counts_values_only() -> None:
    rule = SynchronousHalving(1, 9, 3, n_trials=7)
    record_all(rule, [0.1, 0.2, 0.3, 0.4, 0.5])
    rule.withdraw(5)
    assert rule.promotable() is None
    rule.withdraw(6)
    assert trials_of(take_promotable(rule)) == [0]  # floor(5 / 3), not floor(7 / 3)


def test_withdrawal_on_the_way_to_a_higher_rung_decides_it() -> None:
    rule = SynchronousHalving(1, 27, 3, n_trials=27)
    record_all(rule, [trial / 100 for trial in range(27)])
    for promotion in take_promotable(rule):
        if promotion.trial != 4:
            rule.record(promotion.trial, 3, promotion.trial / 100)
    assert rule.promotable() is None
    rule.withdraw(4)
    assert take_promotable(rule) == [Promotion(trial=trial, from_epoch=3, to_epoch=9) for trial in (0, 1)]


def test_chosen_trial_that_is_withdrawn_while_it_waits_is_not_replaced() -> None:
    rule = SynchronousHalving(1, 9, 3, n_trials=9)
    record_all(rule, [trial / 100 for trial in range(9)])
    rule.withdraw(1)
    assert trials_of(take_promotable(rule)) == [0, 2]
    for trial in (0, 2):
        rule.record(trial, 3, 0.1)
    assert rule.promotable() is None  # floor(2 / 3)
    assert rule.best_paused() == Promotion(trial=0, from_epoch=3, to_epoch=9)


def test_synchronous_halving_of_64_trials_takes_184_epochs() -> None:
    rule = SynchronousHalving(1, 27, 3, n_trials=64)
    n_epochs = 64
    record_all(rule, [(trial * 37 % 64) / 64 for trial in range(64)])
    while promotions := take_promotable(rule):
        for promotion in promotions:
            n_epochs += promotion.to_epoch - promotion.from_epoch
            rule.record(promotion.trial, promotion.to_epoch, (promotion.trial * 37 % 64) / 64)
    assert n_epochs == 184


def test_more_trials_than_expected_are_refused() -> None:
    rule = SynchronousHalving(1, 9, 3, n_trials=2)
    record_all(rule, [0.1, 0.2])
    with pytest.raises(ValueError, match="trial 2 is one more than the 2 trials expected"):
        rule.record(2, 1, 0.0)
    assert rule.best_paused() == Promotion(trial=0, from_epoch=1, to_epoch=9)


def test_next_rung_does_not_wait_for_a_trial_withdrawn_before_it_was_chosen() -> None:
    rule = SynchronousHalving(1, 27, 3, n_trials=27)
    record_all(rule, [trial / 100 for trial in range(26)])
    rule.withdraw(0)
    rule.record(26, 1, 0.26)
    promotions = take_promotable(rule)
    assert trials_of(promotions) == list(range(1, 9))
    for promotion in promotions:
        rule.record(promotion.trial, 3, promotion.trial / 100)
    assert take_promotable(rule) == [Promotion(trial=trial, from_epoch=3, to_epoch=9) for trial in (1, 2)]


def test_raised_n_trials_lets_the_rungs_wait_for_who_went_on_before() -> None:
    rule = SynchronousHalving(1, 9, 3, n_trials=9)  # the study had 3; its events are replayed
    record_all(rule, [0.5, 0.6, 0.7])
    rule.promote(0, 1)
    for trial in range(3, 9):
        rule.record(trial, 1, trial / 100)
    assert trials_of(take_promotable(rule)) == [3, 4, 5]
    for trial in (3, 4, 5):
        rule.record(trial, 3, trial / 100)
    assert rule.promotable() is None  # trial 0 is on its way to epoch 3
    rule.record(0, 3, 0.01)
    assert trials_of(take_promotable(rule)) == [0]


@st.composite
def fates(draw: st.DrawFn) -> tuple[int, dict[int, list[float]]]:
    """A reduction factor, and for each trial its values by rung; it is withdrawn where they end (3 is the full way)."""
    n_trials = draw(st.integers(1, 30))
    values = st.lists(st.sampled_from([0.1, 0.2, 0.3]) | st.floats(0, 1), min_size=3, max_size=3)
    ends = st.sampled_from([3, 3, 3, 0, 1, 2])
    return draw(st.integers(2, 4)), {trial: draw(values)[: draw(ends)] for trial in range(n_trials)}


@given(fates(), st.randoms(use_true_random=False), st.randoms(use_true_random=False))
def test_synchronous_decisions_do_not_depend_on_the_order_of_arrival(
    study: tuple[int, Mapping[int, Sequence[float]]], one: random.Random, other: random.Random
) -> None:
    eta, values_of = study
    assert run_synchronously(eta, values_of, one) == run_synchronously(eta, values_of, other)


def run_synchronously(
    eta: int, values_of: Mapping[int, Sequence[float]], order: random.Random
) -> dict[int, frozenset[int]]:
    """Who was promoted from which epoch, when whatever may happen next happens in a random order."""
    rule = SynchronousHalving(1, eta**2 + 1, eta, n_trials=len(values_of))
    targets = (*rule.epochs, eta**2 + 1)
    promoted = defaultdict(set)
    training = [(trial, 0) for trial in values_of]
    while training:
        trial, place = training.pop(order.randrange(len(training)))
        if place < len(values_of[trial]):
            rule.record(trial, targets[place], values_of[trial][place])
        elif place < len(targets) - 1:
            rule.withdraw(trial)
        for promotion in take_promotable(rule):
            promoted[promotion.from_epoch].add(promotion.trial)
            training.append((promotion.trial, targets.index(promotion.to_epoch)))
    reached = {epoch: sum(len(values) > place for values in values_of.values()) for place, epoch in enumerate(targets)}
    assert all(len(trials) <= reached[epoch] // eta for epoch, trials in promoted.items())
    return {epoch: frozenset(trials) for epoch, trials in promoted.items()}


# The median rule


def test_median_rule_lets_everyone_on_until_five_others_have_been_there() -> None:
    rule = MedianRule(1, 10)
    record_all(rule, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(rule.keeps_going(trial, 1) for trial in range(5))
    rule.record(5, 1, 0.6)
    assert not rule.keeps_going(5, 1)


def test_trial_equal_to_the_median_of_the_others_goes_on() -> None:
    rule = MedianRule(1, 10)
    record_all(rule, [0.1, 0.2, 0.3, 0.3, 0.4, 0.5])
    assert [rule.keeps_going(trial, 1) for trial in range(6)] == [True, True, True, True, False, False]


def test_median_rule_compares_the_best_so_far_rather_than_the_last_value() -> None:
    rule = MedianRule(1, 10)
    record_all(rule, [0.1, 0.5, 0.5, 0.5, 0.5, 0.5])
    rule.record(0, 2, 9.0)
    for trial in range(1, 6):
        rule.record(trial, 2, 0.4)
    assert rule.keeps_going(0, 2)


def test_trial_held_back_by_the_median_goes_on_when_worse_ones_have_come() -> None:
    rule = MedianRule(1, 3)
    record_all(rule, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    assert trials_of(take_promotable(rule)) == [0, 1, 2, 3, 4]
    for trial in range(6, 12):
        rule.record(trial, 1, 0.9)
    assert trials_of(take_promotable(rule)) == [5]


def test_median_of_the_largest_floats_does_not_overflow() -> None:
    rule = MedianRule(1, 3)
    record_all(rule, [1.0e308] * 6 + [1.7e308])
    assert trials_of(take_promotable(rule)) == [0, 1, 2, 3, 4, 5]


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_median_rule_agrees_with_the_median_worked_out_in_full(values: Sequence[float]) -> None:
    rule = MedianRule(1, 3)
    record_all(rule, values)
    for trial, value in enumerate(values):
        others = [*values[:trial], *values[trial + 1 :]]
        expected = len(others) < MEDIAN_GRACE or value <= statistics.median(others)
        assert rule.keeps_going(trial, 1) == expected


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_median_rule_offers_all_that_may_go_on(values: Sequence[float]) -> None:
    rule = MedianRule(1, 3)
    record_all(rule, values)
    expected = {trial for trial in range(len(values)) if rule.keeps_going(trial, 1)}
    assert set(trials_of(take_promotable(rule))) == expected


# Whole studies


class Simulation:
    """A study of fake trials: workers take the next job and return it after a random time.

    A trial's curve falls from its own height to its own floor; good ones have a low floor, and the order at epoch 1 is
    roughly, not exactly, the order at the end.
    """

    def __init__(self, rule: StoppingRule, *, n_trials: int, n_workers: int, seed: int, diverging: float = 0.1) -> None:
        self.rule = rule
        self.n_epochs = 0
        self.completed: list[int] = []
        self._chance = random.Random(seed)
        nature = random.Random(42)  # the trials are the same whatever the order of events
        self.floor = [nature.uniform(0.1, 1.0) for _ in range(n_trials)]
        self._noise = [nature.gauss(0, 0.05) for _ in range(n_trials)]
        self.diverges_at = [nature.randint(1, 27) if nature.random() < diverging else 99 for _ in range(n_trials)]
        self._new = iter(range(n_trials))
        self._run(n_workers)

    def value(self, trial: int, epoch: int) -> float:
        return self.floor[trial] + (1 + self._noise[trial]) / epoch

    def _run(self, n_workers: int) -> None:
        now = 0.0
        running: list[tuple[float, int, int, int]] = []
        while True:
            while len(running) < n_workers and (job := self._next_job()) is not None:
                trial, from_epoch, to_epoch = job
                ends_at = now + (to_epoch - from_epoch) * self._chance.uniform(0.5, 2)
                heapq.heappush(running, (ends_at, trial, from_epoch, to_epoch))
            if not running:
                return
            now, trial, from_epoch, to_epoch = heapq.heappop(running)
            end = min(to_epoch, self.diverges_at[trial])
            self.n_epochs += end - from_epoch
            if end < to_epoch:
                self.rule.withdraw(trial)
            else:
                self.rule.record(trial, to_epoch, self.value(trial, to_epoch))
                if to_epoch == 27:
                    self.completed.append(trial)

    def _next_job(self) -> tuple[int, int, int] | None:
        promotion = self.rule.promotable()
        if promotion is not None:
            self.rule.promote(promotion.trial, promotion.from_epoch)
            return promotion.trial, promotion.from_epoch, promotion.to_epoch
        trial = next(self._new, None)
        return None if trial is None else (trial, 0, self.rule.first_target)


@every_rule
@pytest.mark.parametrize("n_workers", [1, 8, 64])
def test_study_of_243_trials_finds_the_best_finite_one(new_rule: Callable[[int], StoppingRule], n_workers: int) -> None:
    for seed in range(3):
        study = Simulation(new_rule(243), n_trials=243, n_workers=n_workers, seed=seed)
        finite = [trial for trial in range(243) if study.diverges_at[trial] > 27]
        best = sorted(finite, key=lambda trial: study.value(trial, 27))
        assert set(best[:3]) & set(study.completed)
        assert set(study.completed) <= set(finite)


def test_halving_takes_a_fraction_of_the_epochs_and_asynchrony_costs_little() -> None:
    full = 243 * 27
    synchronous = Simulation(RULES["sha"](243), n_trials=243, n_workers=8, seed=0, diverging=0)
    assert synchronous.n_epochs == 243 + 81 * 2 + 27 * 6 + 9 * 18 == 729
    for seed in range(5):
        asha = Simulation(RULES["asha"](243), n_trials=243, n_workers=8, seed=seed, diverging=0)
        assert 729 <= asha.n_epochs <= 1.4 * 729  # 10 to 20 % is usual; curves that come in another order cost more
        assert asha.n_epochs < 0.2 * full


def test_synchronous_study_completes_the_same_trials_for_any_number_of_workers() -> None:
    completed = {
        frozenset(Simulation(RULES["sha"](243), n_trials=243, n_workers=n_workers, seed=seed).completed)
        for n_workers, seed in ((1, 0), (7, 1), (200, 2))
    }
    assert len(completed) == 1


@every_rule
def test_ten_thousand_trials_cost_microseconds_each(new_rule: Callable[[int], StoppingRule]) -> None:
    started = time.perf_counter()
    Simulation(new_rule(10_000), n_trials=10_000, n_workers=8, seed=0)
    assert time.perf_counter() - started < 10  # 0.2 to 0.5 s on an idle machine; quadratic costs would show


# Trials of another era


def curve(trial: int, *values: float, withdrawn: bool = False) -> Standing:
    """A trial with these values after epochs 1, 2, …"""
    best = math.inf
    rows = [(epoch, best := min(best, value)) for epoch, value in enumerate(values, start=1)]
    return Standing(trial=trial, best_by_epoch=tuple(rows), withdrawn=withdrawn)


def test_value_at_an_epoch_is_the_best_up_to_it() -> None:
    standing = curve(0, 0.5, 0.3, 0.4, 0.2)
    assert [standing.value_at(epoch) for epoch in (0, 1, 2, 3, 4)] == [None, 0.5, 0.3, 0.3, 0.2]
    assert standing.epoch == 4
    late = Standing(trial=0, best_by_epoch=((3, 0.5),))
    assert [late.value_at(epoch) for epoch in (1, 3)] == [None, 0.5]
    assert Standing(trial=0, best_by_epoch=()).epoch == 0


@every_pausing_rule
def test_restored_trial_is_paused_at_the_highest_rung_that_it_passed(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(2)
    rule.restore([curve(0, *[0.5] * 4), curve(1, *[0.9] * 30)])
    for epoch in rule.epochs:
        assert rule.keeps_going(1, epoch) in (True, False)  # it was recorded at each
    best = rule.best_paused()
    assert best is not None
    assert (best.trial, best.from_epoch) == (0, max(epoch for epoch in rule.epochs if epoch <= 4))


@every_pausing_rule
def test_restored_trial_that_was_withdrawn_keeps_its_place_and_never_goes_on(
    new_rule: Callable[[int], StoppingRule],
) -> None:
    rule = new_rule(6)
    rule.restore([curve(0, 0.1, withdrawn=True), *(curve(n, 0.2 + n / 10) for n in range(1, 6))])
    assert 0 not in trials_of(take_promotable(rule))
    assert rule.best_paused() is None or rule.best_paused().trial != 0  # type: ignore[union-attr]


@every_rule
def test_restored_trial_without_a_finite_value_is_compared_nowhere(new_rule: Callable[[int], StoppingRule]) -> None:
    rule = new_rule(2)
    rule.restore([Standing(trial=0, best_by_epoch=()), Standing(trial=1, best_by_epoch=(), withdrawn=True)])
    assert rule.promotable() is None
    assert rule.best_paused() is None


@every_pausing_rule
@given(values=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=30), min_size=1, max_size=12))
def test_restoring_trials_at_the_lowest_rung_is_recording_them(
    new_rule: Callable[[int], StoppingRule], values: list[list[float]]
) -> None:
    first = new_rule(1).first_target
    curves = [(run * first)[:first] for run in values]
    recorded, restored = new_rule(len(values)), new_rule(len(values))
    for trial, run in enumerate(curves):
        recorded.record(trial, first, min(run))
    restored.restore(curve(trial, *run) for trial, run in enumerate(curves))
    assert take_promotable(restored) == take_promotable(recorded)
    assert restored.best_paused() == recorded.best_paused()


def test_synchronous_rung_is_decided_by_all_restored_trials_and_waits_for_the_rest() -> None:
    """Trial 3 went further under other rungs though it ranks last; it is not waited for, and not overlooked."""
    rule = SynchronousHalving(1, 9, 3, n_trials=6)
    rule.restore([*(curve(n, 0.1 * (n + 1)) for n in range(3)), curve(3, 0.9, 0.8, 0.05)])
    assert rule.promotable() is None
    for trial in (4, 5):
        rule.record(trial, 1, 0.7)
    chosen = take_promotable(rule)
    assert trials_of(chosen) == [0, 1]
    rule.record(0, 3, 0.09)
    assert rule.promotable() is None
    rule.record(1, 3, 0.2)
    assert trials_of(take_promotable(rule)) == [3]


def test_synchronous_rung_waits_for_a_restored_trial_that_has_not_come_to_it() -> None:
    rule = SynchronousHalving(2, 8, 2, n_trials=4)
    rule.restore([curve(0, 0.1, 0.1), curve(1, 0.2, 0.2), curve(2, 0.3), Standing(trial=3, best_by_epoch=())])
    assert rule.promotable() is None
    rule.record(2, 2, 0.3)
    assert rule.promotable() is None
    rule.record(3, 2, 0.4)
    assert trials_of(take_promotable(rule)) == [0, 1]


# Who may yet go on


def ask(rule: StoppingRule, trial: int, epoch: int, value: float, n_trials: int, end_game: int = 0) -> bool:
    return rule.may_yet_go_on(trial, epoch, value, n_trials=n_trials, end_game=end_game)


def test_paused_trial_may_go_on_as_long_as_enough_worse_ones_can_come() -> None:
    rule = RULES["asha"](9)
    record_all(rule, [0.1, 0.2, 0.3, 0.4])
    assert [ask(rule, trial, 1, value, 9) for trial, value in enumerate([0.1, 0.2, 0.3, 0.4])] == [True] * 3 + [False]
    assert [ask(rule, trial, 1, value, 8) for trial, value in enumerate([0.1, 0.2, 0.3, 0.4])] == [True] * 2 + [
        False
    ] * 2
    rule.withdraw(7)  # before it came: one fewer to be better than
    assert not ask(rule, 2, 1, 0.3, 9)
    assert not ask(rule, 7, 1, 0.0, 9)


def test_trial_that_is_about_to_come_is_judged_as_if_it_were_there() -> None:
    rule = RULES["asha"](6)
    record_all(rule, [0.2, 0.4, 0.6])
    assert [ask(rule, 5, 1, value, 6) for value in (0.1, 0.3, 0.5, 0.7)] == [True, True, False, False]


def test_end_game_takes_the_best_of_the_highest_rungs() -> None:
    rule = RULES["sha"](9)
    record_all(rule, [0.1 * (trial + 1) for trial in range(9)])
    for trial in (0, 1, 2):
        rule.promote(trial, 1)
        rule.record(trial, 3, 0.1 * (trial + 1))
    assert [ask(rule, trial, 3, 0.1 * (trial + 1), 9, end_game=2) for trial in range(3)] == [True, True, False]
    assert [ask(rule, trial, 1, 0.1 * (trial + 1), 9, end_game=5) for trial in range(3, 9)] == [True] * 2 + [False] * 4


def test_equal_values_wait_for_the_median_together() -> None:
    rule = RULES["median"](9)
    record_all(rule, [0.5] * 9)
    assert all(ask(rule, trial, 1, 0.5, 9) for trial in range(9))


@every_pausing_rule
@given(seed=st.integers(0, 10**6), n_trials=st.integers(1, 30))
def test_who_may_not_go_on_any_more_never_does(
    new_rule: Callable[[int], StoppingRule], seed: int, n_trials: int
) -> None:
    """A search in random order, with trials that diverge; whoever was given up once is never asked for again."""
    rng = random.Random(seed)
    rule = new_rule(n_trials)
    undrawn = [*range(n_trials)]
    running: list[tuple[int, int]] = []  # trial, epoch that it trains to
    waiting: dict[int, int] = {}  # paused trial -> epoch
    best: defaultdict[int, float] = defaultdict(lambda: math.inf)
    given_up: set[int] = set()
    while undrawn or running or rule.promotable() is not None:
        promotion = rule.promotable()
        if promotion is not None and rng.random() < 0.7:
            assert promotion.trial not in given_up
            rule.promote(promotion.trial, promotion.from_epoch)
            del waiting[promotion.trial]
            running.append((promotion.trial, promotion.to_epoch))
        elif undrawn and rng.random() < 0.5:
            running.append((undrawn.pop(0), rule.first_target))
        elif running:
            trial, epoch = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.1:
                rule.withdraw(trial)
            else:
                value = best[trial] = min(best[trial], rng.choice([0.1, 0.2, rng.random(), trial / 10, -trial / 10]))
                hopeful = epoch < 27 and ask(rule, trial, epoch, value, n_trials)
                rule.record(trial, epoch, value)
                if epoch < 27:
                    waiting[trial] = epoch
                    assert hopeful or not ask(rule, trial, epoch, value, n_trials)
        given_up |= {trial for trial, epoch in waiting.items() if not ask(rule, trial, epoch, best[trial], n_trials)}
    assert waiting.keys() <= given_up  # nobody is kept for nothing when all is over


def test_who_does_not_fit_is_passed_over_and_who_is_preferred_comes_first_among_those_that_may_go_on() -> None:
    rule = PromotionAsha(1, 9, 3)
    for trial in range(9):
        rule.record(trial, 1, 0.1 * trial)  # 0, 1 and 2 may go on
    assert rule.promotable(lambda trial: trial != 0) == Promotion(trial=1, from_epoch=1, to_epoch=3)
    assert rule.promotable(lambda trial: trial > 2) is None
    assert rule.promotable(prefer=lambda trial: trial >= 2) == Promotion(trial=2, from_epoch=1, to_epoch=3)
    assert rule.promotable(prefer=lambda trial: trial > 2) == Promotion(trial=0, from_epoch=1, to_epoch=3)
    rule.promote(0, 1)
    rule.record(0, 3, 0.0)
    for trial in (1, 2):
        rule.promote(trial, 1)
        rule.record(trial, 3, 0.1 * trial)
    for trial in range(9, 12):
        rule.record(trial, 1, 5.0)
    assert rule.promotable(prefer=lambda trial: trial == 3) == Promotion(trial=0, from_epoch=3, to_epoch=9)
