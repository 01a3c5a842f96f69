"""The smallest model that is as good: a decision from scores, sizes and the error of a score."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpsearch.errors import UsageError
from hpsearch.events import Confirmed, Event, Finished
from hpsearch.parsimony import (
    Sized,
    as_good,
    front,
    measured_error,
    read_within,
    row_scores_of,
    sized,
    standard_error,
)
from hpsearch.state import StudyState
from tests.test_verdict import losses, state_of, trained
from tests.tracked_study import Script


def trial(number: int, score: float, n_parameters: int) -> Sized:
    return Sized(trial=number, score=score, n_parameters=n_parameters)


def numbers(trials: tuple[Sized, ...]) -> list[int]:
    return [each.trial for each in trials]


SOME = [trial(0, 0.10, 900), trial(1, 0.12, 50), trial(2, 0.15, 20), trial(3, 0.11, 900), trial(4, 0.13, 5000)]


def test_trials_within_the_error_are_told_smallest_first_and_of_one_size_the_better_first() -> None:
    found = as_good(SOME, error=0.03)
    assert found.best == SOME[0]
    assert found.threshold == pytest.approx(0.13)
    assert numbers(found.trials) == [1, 0, 3, 4]


def test_more_errors_let_more_trials_in_and_none_lets_only_the_best_and_its_equals() -> None:
    assert numbers(as_good(SOME, error=0.03, times=2).trials) == [2, 1, 0, 3, 4]
    assert numbers(as_good(SOME, error=0.03, times=0.5).trials) == [0, 3]
    assert numbers(as_good([*SOME, trial(9, 0.10, 7)], error=0.0).trials) == [9, 0]


def test_of_equal_trials_the_best_is_the_one_with_the_lower_number() -> None:
    assert as_good([trial(7, 0.1, 5), trial(2, 0.1, 5)], error=0.1).best.trial == 2


def test_no_trials_have_no_best() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        as_good([], error=0.1)


def test_front_holds_the_best_of_each_size_that_no_smaller_one_equals() -> None:
    assert numbers(front(SOME)) == [2, 1, 0]
    assert numbers(front([trial(1, 0.1, 10), trial(0, 0.1, 10), trial(2, 0.1, 20)])) == [0]
    assert front([]) == ()


@pytest.mark.parametrize(("text", "times"), [("1se", 1.0), ("0.5se", 0.5), (".25se", 0.25), ("2se", 2.0), ("0se", 0.0)])
def test_numbers_of_standard_errors_are_read(text: str, times: float) -> None:
    assert read_within(text) == times


@pytest.mark.parametrize(
    "text", ["1sd", "-1se", "1", "se", "", "1 se", "1e3se", "infse", "nanse", "٣se", "9" * 400 + "se"]
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_within(text)
    assert caught.value.exit_code == 2
    assert caught.value.message == f"--smallest-within takes a number of standard errors (got {text!r})"
    assert caught.value.hint == "write 1se, or 0.5se, or 2se"


def test_error_of_a_mean_over_rows_shrinks_with_the_rows_that_were_scored() -> None:
    rows = [0.0, 2.0] * 50
    deviation = float(np.std(rows, ddof=1))
    assert standard_error(rows, n_scored=100, seeds=None) == pytest.approx(deviation / 10)
    assert standard_error(rows, n_scored=400, seeds=None) == pytest.approx(deviation / 20)


def test_rows_and_seeds_add_up_as_independent_errors_do() -> None:
    rows = [0.0, 2.0] * 50
    of_rows = standard_error(rows, n_scored=100, seeds=None)
    assert of_rows is not None
    assert standard_error(rows, n_scored=100, seeds=0.3) == pytest.approx(math.hypot(of_rows, 0.3))
    assert standard_error(None, n_scored=100, seeds=0.3) == 0.3


def test_nothing_measured_is_no_error_at_all() -> None:
    assert standard_error(None, n_scored=100, seeds=None) is None
    assert standard_error([1.0], n_scored=100, seeds=None) is None
    assert standard_error([1.0, math.nan], n_scored=100, seeds=None) is None


# What a study knows


def measured(key: str, ref: str, **metrics: float) -> Finished:
    return Finished(key=key, worker="w", outcome="done", values={"metrics": metrics, "row_scores": ref})


def confirmed() -> list[Event]:
    """Trial 0 with two fresh seeds at its 2 epochs, and one from when it had trained for 1."""
    runs = [("confirm/0/2/0", 0.20), ("confirm/0/2/1", 0.24), ("confirm/0/1/0", 9.0)]
    return [
        *(measured(key, f"{key}-rows", loss=loss) for key, loss in runs),
        Confirmed(epoch_of_search=2, standings=({"trial": 0},)),
    ]


def arrays(ref: str) -> dict[str, np.ndarray]:
    return {"loss": np.array([0.0, 2.0] * 50), "accuracy": np.ones(100)} if ref else {}


def test_only_trials_that_could_be_taken_and_whose_size_is_known_are_weighed() -> None:
    state = state_of(*trained(0, losses(0.5, 0.3)), *trained(1, losses(0.2), "diverged"), *trained(2, losses(0.4)))
    state.trials[1].n_parameters, state.trials[1].best_checkpoint = 99, "checkpoints/1"  # its best epoch was kept
    assert sized(state) == [trial(0, 0.3, 99), trial(2, 0.4, 99)]
    state.trials[2].n_parameters = None  # trained before sizes were told
    assert numbers(tuple(sized(state))) == [0]


def test_size_of_a_trial_is_what_its_result_tells_and_stays_when_a_later_one_does_not() -> None:
    state = Script().search_begins().trial(0, [1.0]).state()
    assert state.trials[0].n_parameters is None
    state = state_of(*trained(0, losses(0.5)))
    values = {"checkpoint": "c", "best_checkpoint": None}
    state.apply(
        Finished(
            key="train/0/1-2", worker="w", outcome="done", trial=0, values=values, epochs=((2, {"val_loss": 0.6}, 0.1),)
        ),
        99.0,
    )
    assert state.trials[0].n_parameters == 99


def test_error_is_unknown_until_rows_were_measured_and_then_is_that_of_the_rows() -> None:
    state = state_of(*trained(0, losses(0.5, 0.3)))
    assert measured_error(state, 0, arrays) is None
    state.apply(measured("evaluate/ensemble/0", "own-rows", loss=0.3), 50.0)
    assert row_scores_of(state, 0) == "own-rows"
    assert measured_error(state, 0, arrays) == pytest.approx(np.std([0, 2] * 50, ddof=1) / 10)


def test_seeds_count_once_all_was_confirmed_and_only_runs_as_long_as_the_trial() -> None:
    state = state_of(*trained(0, losses(0.5, 0.3)), *confirmed())
    spread = math.sqrt(2 * 0.02**2)
    assert row_scores_of(state, 0) == "confirm/0/2/0-rows"
    assert measured_error(state, 0, lambda ref: {}) == pytest.approx(spread)
    of_rows = float(np.std([0, 2] * 50, ddof=1)) / 10
    assert measured_error(state, 0, arrays) == pytest.approx(math.hypot(spread, of_rows))
    half = state_of(*trained(0, losses(0.5, 0.3)), *confirmed()[:-1])
    assert measured_error(half, 0, arrays) is None


def test_metric_that_is_no_mean_over_rows_has_no_error_by_rows() -> None:
    state: StudyState = state_of(*trained(0, losses(0.3)), measured("evaluate/ensemble/0", "own-rows", loss=0.3))
    assert measured_error(state, 0, lambda ref: {"accuracy": np.ones(9)}) is None
