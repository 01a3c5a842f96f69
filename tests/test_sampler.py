"""Configs as functions of (space, seed, number): the same in any order, even over the space, none for nothing."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from hpsearch import sampler
from hpsearch.job import Config
from hpsearch.sampler import BLOCK, RandomSampler, Sampler, SobolSampler, derived_seed, ramp_config, trial_seed
from hpsearch.space import Bounds, Condition, Parameter, Space

LR = Parameter(name="lr", kind="real", low=1e-5, high=1.0, log=True, bounds_from="lr_range")
OPTIMIZER = Parameter(name="optimizer", kind="categorical", values=("adamw", "sgd"))
MOMENTUM = Parameter(
    name="momentum", kind="real", low=0.8, high=0.99, conditions=(Condition(parent="optimizer", values=("sgd",)),)
)
WIDTH = Parameter(name="width", kind="integer", low=1, high=300)
EPOCH_SIZE = Parameter(name="epoch_size", kind="constant", values=(1000,))
DROPOUT = Parameter(name="dropout", kind="real", low=0.0, high=1.0)
SPACE = Space(parameters=(LR, OPTIMIZER, MOMENTUM, WIDTH, EPOCH_SIZE, DROPOUT))

NewSampler = Callable[[Space, int], Sampler]
every_sampler = pytest.mark.parametrize("new_sampler", [SobolSampler, RandomSampler])


def unbounded(config: Config) -> Bounds:
    return {}


def configs(drawn_by: Sampler, n_trials: int) -> list[Config]:
    return [config for number in range(n_trials) if (config := drawn_by.config(number, unbounded)) is not None]


def numbers(name: str, of: list[Config]) -> np.ndarray:
    return np.array([config[name] for config in of], dtype=float)


# The same trial whatever happens around it


@every_sampler
@given(order=st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=12), seed=st.integers(0, 2**63))
def test_config_does_not_depend_on_the_order_of_asking(new_sampler: NewSampler, order: list[int], seed: int) -> None:
    one, other = new_sampler(SPACE, seed), new_sampler(SPACE, seed)
    found = {number: one.config(number, unbounded) for number in order}
    assert {number: other.config(number, unbounded) for number in reversed(order)} == found
    assert one.config(order[0], unbounded) == found[order[0]]


@every_sampler
def test_same_seed_gives_same_configs_for_1_and_8_workers(new_sampler: NewSampler) -> None:
    alone = configs(new_sampler(SPACE, 3), 64)
    workers = [new_sampler(SPACE, 3) for _ in range(8)]
    assert [workers[number % 8].config(number, unbounded) for number in range(64)] == alone


@every_sampler
def test_raising_trials_keeps_the_earlier_ones(new_sampler: NewSampler) -> None:
    assert configs(new_sampler(SPACE, 3), 600)[:200] == configs(new_sampler(SPACE, 3), 200)


@every_sampler
def test_what_was_observed_or_restored_changes_nothing(new_sampler: NewSampler) -> None:
    told = new_sampler(SPACE, 3)
    for number, config in enumerate(configs(told, 20)):
        told.restore(number, config)
        told.observe(number, config, 0.1 if number % 2 else None, 1)
    assert configs(told, 40) == configs(new_sampler(SPACE, 3), 40)


@every_sampler
def test_other_seed_gives_other_configs(new_sampler: NewSampler) -> None:
    one, other = (configs(new_sampler(SPACE, seed), 50) for seed in (0, 1))
    assert not any(config in other for config in one)


def test_samplers_share_no_point() -> None:
    one, other = (numbers("dropout", configs(new(SPACE, 0), 50)) for new in (SobolSampler, RandomSampler))
    assert not set(one) & set(other)


# Even over the space


def test_each_parameter_of_the_first_64_sobol_trials_has_one_value_in_each_64th() -> None:
    space = Space(parameters=tuple(Parameter(name=f"x{i}", kind="real", low=0.0, high=1.0) for i in range(9)))
    for seed in range(5):
        drawn = configs(SobolSampler(space, seed), 64)
        for parameter in space.parameters:
            bins = np.floor(numbers(parameter.name, drawn) * 64).astype(int)
            assert sorted(bins) == list(range(64))


def test_every_64_sobol_trials_in_a_row_from_a_multiple_of_64_are_as_even() -> None:
    drawn = configs(SobolSampler(SPACE, 0), 4 * BLOCK)
    for start in range(0, 4 * BLOCK, 64):
        bins = np.floor(numbers("dropout", drawn[start : start + 64]) * 64).astype(int)
        assert sorted(bins) == list(range(64))


def test_sobol_trials_are_those_of_scipy_in_one_go() -> None:
    space = Space(parameters=tuple(Parameter(name=f"x{i}", kind="real", low=0.0, high=1.0) for i in range(4)))
    points = qmc.Sobol(4, rng=np.random.default_rng(derived_seed(7, "sobol"))).random(1024)
    scattered = SobolSampler(space, 7)
    for number in (1023, 0, 700, 255, 256, 257, 511):
        assert scattered.config(number, unbounded) == dict(zip(("x0", "x1", "x2", "x3"), points[number], strict=True))


@every_sampler
def test_log_parameter_is_uniform_in_log(new_sampler: NewSampler) -> None:
    logs = np.sort((np.log10(numbers("lr", configs(new_sampler(SPACE, 0), 2000))) + 5) / 5)
    distance = np.max(np.abs(logs - (np.arange(2000) + 0.5) / 2000))
    assert distance < 0.08  # fails by chance once in 6e10 runs: 2 exp(-2 · 2000 · 0.08²), Massart 1990


def test_random_parameters_are_independent_of_each_other_and_of_the_number() -> None:
    drawn = configs(RandomSampler(SPACE, 0), 4000)
    columns = np.vstack([np.log(numbers("lr", drawn)), numbers("width", drawn), numbers("dropout", drawn), range(4000)])
    correlations = np.corrcoef(columns)[np.triu_indices(4, k=1)]
    # 6 sigma of each of 6 correlations: fails by chance about once in 8e7 runs
    assert np.max(np.abs(correlations)) < 6 / math.sqrt(4000)


@every_sampler
def test_choices_come_equally_often(new_sampler: NewSampler) -> None:
    n_sgd = sum(config["optimizer"] == "sgd" for config in configs(new_sampler(SPACE, 0), 4096))
    assert abs(n_sgd - 2048) <= 6 * 32  # 6 sigma of a fair coin: fails by chance about once in 5e8 runs


@every_sampler
def test_inactive_parameter_is_left_out_and_moves_no_other(new_sampler: NewSampler) -> None:
    without_condition = Space(
        parameters=(
            LR,
            OPTIMIZER,
            Parameter(name="momentum", kind="real", low=0.8, high=0.99),
            WIDTH,
            EPOCH_SIZE,
            DROPOUT,
        )
    )
    pairs = zip(configs(new_sampler(SPACE, 0), 50), configs(new_sampler(without_condition, 0), 50), strict=True)
    for conditional, plain in pairs:
        assert ("momentum" in conditional) == (conditional["optimizer"] == "sgd")
        assert conditional == {name: value for name, value in plain.items() if name in conditional}


# Spaces at the edge


@every_sampler
def test_space_without_searched_parameters_gives_its_constants(new_sampler: NewSampler) -> None:
    assert configs(new_sampler(Space(parameters=()), 0), 3) == [{}, {}, {}]
    assert configs(new_sampler(Space(parameters=(EPOCH_SIZE,)), 0), 2) == [{"epoch_size": 1000}] * 2


@every_sampler
def test_space_of_one_parameter_works(new_sampler: NewSampler) -> None:
    drawn = configs(new_sampler(Space(parameters=(DROPOUT,)), 0), 300)
    assert len({config["dropout"] for config in drawn}) == 300


@every_sampler
def test_number_below_zero_is_refused(new_sampler: NewSampler) -> None:
    for space in (SPACE, Space(parameters=())):
        with pytest.raises(ValueError, match=r"trials are counted from 0 \(got -1\)"):
            new_sampler(space, 0).config(-1, unbounded)
    with pytest.raises(ValueError, match=r"trials are counted from 0 \(got -1\)"):
        trial_seed(0, -1)


@every_sampler
def test_values_are_plain_python_for_json(new_sampler: NewSampler) -> None:
    for config in configs(new_sampler(SPACE, 0), 10):
        assert {type(value) for value in config.values()} <= {float, int, str}


# Measured bounds


@every_sampler
def test_trial_waits_while_its_bounds_are_not_measured(new_sampler: NewSampler) -> None:
    waiting = new_sampler(SPACE, 0)
    assert waiting.config(0, lambda config: None) is None
    assert waiting.config(0, unbounded) == new_sampler(SPACE, 0).config(0, unbounded)


@every_sampler
def test_bounds_are_asked_with_the_config_drawn_without_them(new_sampler: NewSampler) -> None:
    asked: list[Config] = []

    def remember(config: Config) -> Bounds:
        asked.append(config)
        return {"lr": (1e-3, 1e-2)}

    new_sampler(SPACE, 0).config(7, remember)
    assert asked == [new_sampler(SPACE, 0).config(7, unbounded)]


@every_sampler
def test_measured_bounds_narrow_the_learning_rate_and_nothing_else(new_sampler: NewSampler) -> None:
    narrow = {"adamw": (1e-4, 1e-3), "sgd": (1e-2, 1e-1)}
    measuring = new_sampler(SPACE, 0)
    for number in range(50):
        free = measuring.config(number, unbounded)
        config = measuring.config(number, lambda config: {"lr": narrow[str(config["optimizer"])]})
        assert free is not None
        assert config is not None
        low, high = narrow[str(config["optimizer"])]
        lr, free_lr = config.pop("lr"), free.pop("lr")
        assert isinstance(lr, float)
        assert isinstance(free_lr, float)
        assert low <= lr <= high
        # it is as far between the new bounds, in log, as it was between the user's
        assert math.log(lr / low) / math.log(high / low) == pytest.approx(math.log(free_lr / 1e-5) / math.log(1e5))
        assert config == free


# Seeds and ramps


def test_trial_seeds_are_the_ones_that_were_written_down() -> None:
    asked_for = [(0, 0), (0, 1), (0, 17), (2**70, 10**6)]
    assert [trial_seed(study, number) for study, number in asked_for] == [
        7146628681795601837,
        23223456390896147,
        6804424940628260654,
        3227677959888593909,
    ]


def test_trial_seeds_differ_and_every_bit_of_them_is_used() -> None:
    seeds = [trial_seed(study, number) for study in range(4) for number in range(2500)]
    assert len(set(seeds)) == 10_000  # 63 bits: a collision by chance about once in 2e11 runs
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        n_set = sum(seed >> bit & 1 for seed in seeds)
        assert abs(n_set - 5000) < 6 * 50  # 6 sigma, 63 times: fails by chance about once in 8e6 runs


def test_numbers_that_run_together_as_text_have_different_seeds() -> None:
    assert trial_seed(1, 11) != trial_seed(11, 1)
    assert derived_seed(1, "trial", 1) != derived_seed(1, "random", 1)


def test_ramp_takes_the_branch_and_the_other_values_from_the_sobol_sequence_without_lr() -> None:
    for index in range(5):
        expected = SobolSampler(SPACE, 3).config(index, unbounded)
        assert expected is not None
        for optimizer in ("adamw", "sgd"):
            config = ramp_config(SPACE, 3, {"optimizer": optimizer}, index)
            assert config["optimizer"] == optimizer
            assert "lr" not in config
            assert ("momentum" in config) == (optimizer == "sgd")
            assert (config["width"], config["dropout"]) == (expected["width"], expected["dropout"])


def test_ramp_keeps_an_lr_that_is_not_searched() -> None:
    fixed = Space(parameters=(Parameter(name="lr", kind="constant", values=(0.1,)), WIDTH))
    assert ramp_config(fixed, 0, {}, 0)["lr"] == 0.1
    with pytest.raises(ValueError, match="optimizer cannot be fixed to 'adam'"):
        ramp_config(SPACE, 0, {"optimizer": "adam"}, 0)


# What it costs


@every_sampler
def test_config_takes_well_under_a_tenth_of_a_millisecond(new_sampler: NewSampler) -> None:
    drawing = new_sampler(SPACE, 0)
    drawing.config(0, unbounded)  # imports
    seconds = []
    for start in range(0, 5000, 500):
        started = time.perf_counter()
        for number in range(start, start + 500):
            drawing.config(number, unbounded)
        seconds.append((time.perf_counter() - started) / 500)
    assert min(seconds) < 1e-4  # 15 to 30 µs on an idle core; the quickest of ten, since the machine may be busy


def test_no_warning_of_scipy_comes_through() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = SobolSampler(SPACE, 0)
        for number in (0, 1, 1000, 5, 99_999):
            drawing.config(number, unbounded)


def test_numpy_and_scipy_are_imported_with_the_first_point_only() -> None:
    program = (
        "import sys, hpsearch.sampler, hpsearch.rungs; print({'numpy', 'scipy', 'torch', 'optuna'} & {*sys.modules})"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(sampler).attempted > 0
    assert doctest.testmod(sampler).failed == 0
