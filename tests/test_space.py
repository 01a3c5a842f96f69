"""The space: every value lies in it, every value can be reached, and conditions decide who is there."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hpsearch.space import Condition, Parameter, Space, condition_circle, same_value, steps_between

coordinate = st.floats(0, 1, exclude_max=True)
finite = st.floats(-1e300, 1e300)


def real(low: float, high: float, **rest: Any) -> Parameter:
    return Parameter(name="x", kind="real", low=low, high=high, **rest)


def integer(low: int, high: int, **rest: Any) -> Parameter:
    return Parameter(name="n", kind="integer", low=low, high=high, **rest)


def categorical(name: str, *values: Any, **when: Any) -> Parameter:
    conditions = tuple(
        Condition(parent=parent, values=tuple(accepted) if isinstance(accepted, list) else (accepted,))
        for parent, accepted in when.items()
    )
    return Parameter(name=name, kind="categorical", values=values, conditions=conditions)


@st.composite
def numbers(draw: st.DrawFn) -> Parameter:
    """Any numeric parameter that a spec can hold."""
    log = draw(st.booleans())
    if draw(st.booleans()):
        low = draw(st.integers(1 if log else -(2**53), 2**53 - 1))
        high = draw(st.integers(low + 1, 2**53))
        step = None if log else draw(st.none() | st.integers(1, high - low))
        return integer(low, high, log=log, step=step)
    low_high = st.floats(5e-324, 1.7e308) if log else finite
    low, high = sorted((draw(low_high), draw(low_high)))
    assume(low < high)
    step = None if log or not draw(st.booleans()) else draw(st.floats(0.001, 1)) * (high - low)
    return real(low, high, log=log, step=step or None)


@given(numbers(), coordinate)
@example(real(5e-324, 1.7e308, log=True), 0.9999999999999999)
@example(real(-1.7e308, 1.7e308), 0.5)
@example(real(0.1, 0.7, step=0.1), 0.9999999999999999)
def test_every_value_lies_in_its_bounds_and_has_its_type(parameter: Parameter, u: float) -> None:
    value = parameter.value_at(u)
    assert isinstance(value, int if parameter.kind == "integer" else float)
    assert parameter.low <= value <= parameter.high


@given(numbers())
def test_both_ends_are_reached(parameter: Parameter) -> None:
    assert parameter.value_at(0) == parameter.low
    top = parameter.value_at(1)
    if parameter.step is None:
        assert top == pytest.approx(parameter.high, rel=1e-12)
    else:
        assert parameter.high - top < parameter.step * (1 + 1e-9)


@given(numbers(), coordinate, st.tuples(finite, finite).map(sorted))
def test_narrower_bounds_hold_within_the_users_own(parameter: Parameter, u: float, bounds: list[float]) -> None:
    lower, upper = bounds
    value = parameter.value_at(u, (lower, upper))
    assert isinstance(value, int | float)
    assert parameter.low <= value <= parameter.high
    if parameter.step is None and parameter.kind == "real":
        nearest = min(max(value, lower), upper)
        assert nearest == value or not (lower <= parameter.high and upper >= parameter.low)


def test_bounds_that_miss_the_interval_give_its_nearest_value() -> None:
    assert real(0.1, 1.0).value_at(0.3, (2.0, 3.0)) == 1.0
    assert real(0.1, 1.0, log=True).value_at(0.3, (0.001, 0.01)) == 0.1
    assert integer(3, 9).value_at(0.3, (0.0, 1.0)) == 3
    assert integer(3, 9).value_at(0.3, (4.2, 4.4)) == 4
    assert integer(3, 9).value_at(0.3, (4.6, 4.9)) == 5
    assert integer(0, 10, step=5).value_at(0.3, (6.0, 7.0)) == 5
    assert integer(0, 10, step=5).value_at(0.3, (11.0, 12.0)) == 10
    assert real(0.0, 1.0, step=0.4).value_at(0.3, (0.9, 0.95)) == 0.8


def test_bounds_on_a_step_include_it() -> None:
    values = {real(0.0, 1.0, step=0.1).value_at(u / 100, (0.3, 0.7)) for u in range(100)}
    assert values == {0.3, 0.4, 0.5, 0.6, 0.7}


@pytest.mark.parametrize("bounds", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_bounds_out_of_order_or_nan_are_a_slip(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="bounds are two numbers in order"):
        real(0.0, 1.0).value_at(0.5, bounds)


@pytest.mark.parametrize("u", [-0.1, 1.1, math.nan])
def test_a_coordinate_outside_the_cube_is_a_slip(u: float) -> None:
    with pytest.raises(ValueError, match="a coordinate lies in"):
        real(0.0, 1.0).value_at(u)


def test_integers_have_equal_shares_with_both_ends() -> None:
    counts = Counter(integer(-2, 3).value_at((i + 0.5) / 600) for i in range(600))
    assert counts == dict.fromkeys(range(-2, 4), 100)


def test_stepped_values_have_equal_shares_and_are_written_as_people_would() -> None:
    counts = Counter(real(0.1, 0.75, step=0.1).value_at((i + 0.5) / 700) for i in range(700))
    assert counts == dict.fromkeys([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 100)
    assert Counter(integer(1, 9, step=3).value_at((i + 0.5) / 300) for i in range(300)) == {1: 100, 4: 100, 7: 100}


def test_log_parameter_is_uniform_in_log() -> None:
    parameter = real(1e-5, 1e3, log=True)
    exponents = [math.log10(float(parameter.value_at((i + 0.5) / 800))) for i in range(800)]  # type: ignore[arg-type]
    assert Counter(math.floor(exponent) for exponent in exponents) == dict.fromkeys(range(-5, 3), 100)


def test_log_integers_have_shares_by_their_width_in_log_terms() -> None:
    n = 100_000
    counts = Counter(integer(1, 100, log=True).value_at((i + 0.5) / n) for i in range(n))
    assert set(counts) == set(range(1, 101))
    whole = math.log(100.5 / 0.5)
    for value in (1, 2, 10, 99, 100):
        assert counts[value] / n == pytest.approx(math.log((value + 0.5) / (value - 0.5)) / whole, abs=2e-5)


def test_lists_among_the_values_are_handed_out_as_copies() -> None:
    parameter = Parameter(name="layers", kind="categorical", values=([64, 64], [128]))
    space = Space(parameters=(parameter,))
    first = space.config([0.0])
    assert first == {"layers": [64, 64]}
    first["layers"].append(1)  # type: ignore[union-attr]
    assert space.config([0.0], fixed={"layers": [64, 64]}) == {"layers": [64, 64]}


OPTIMIZER = categorical("optimizer", "adamw", "sgd")
MOMENTUM = Parameter(
    name="momentum", kind="real", low=0.8, high=0.99, conditions=(Condition(parent="optimizer", values=("sgd",)),)
)
SPACE = Space(
    parameters=(
        MOMENTUM,  # before its parent, as a file may have it
        Parameter(name="lr", kind="real", low=1e-5, high=1.0, log=True, bounds_from="lr_range"),
        Parameter(name="classes", kind="constant", values=(10,)),
        OPTIMIZER,
        integer(1, 3),
    )
)


def test_config_holds_what_is_active_in_file_order() -> None:
    assert SPACE.n_dims == 4
    assert SPACE.measured == ("lr",)
    assert SPACE.names == ("momentum", "lr", "classes", "optimizer", "n")
    sgd = SPACE.config([0.0, 0.0, 0.5, 0.99])
    assert list(sgd.items()) == [("momentum", 0.8), ("lr", 1e-5), ("classes", 10), ("optimizer", "sgd"), ("n", 3)]
    adamw = SPACE.config([0.0, 0.0, 0.49, 0.99])
    assert list(adamw) == ["lr", "classes", "optimizer", "n"]


def test_a_coordinate_of_an_inactive_parameter_moves_nothing_else() -> None:
    assert SPACE.config([0.1, 0.2, 0.3, 0.4]) == SPACE.config([0.9, 0.2, 0.3, 0.4])


@given(st.tuples(coordinate, coordinate, coordinate, coordinate))
def test_fixed_values_leave_the_others_where_they_were(point: tuple[float, ...]) -> None:
    drawn = SPACE.config(point)
    fixed = SPACE.config(point, fixed={"optimizer": "sgd"})
    assert fixed["optimizer"] == "sgd"
    assert "momentum" in fixed
    assert (fixed["lr"], fixed["n"]) == (drawn["lr"], drawn["n"])


def test_bounds_narrow_by_name() -> None:
    values = [SPACE.config([0, i / 10, 0, 0], bounds={"lr": (0.01, 0.1)})["lr"] for i in range(10)]
    assert all(0.01 <= float(value) <= 0.1 for value in values)  # type: ignore[arg-type]
    assert values[0] == 0.01


def test_wrong_points_and_fixed_values_are_slips() -> None:
    with pytest.raises(ValueError, match="a point has 4 coordinates"):
        SPACE.config([0.5])
    with pytest.raises(ValueError, match="optimizer cannot be fixed to 'lion'"):
        SPACE.config([0.5] * 4, fixed={"optimizer": "lion"})
    with pytest.raises(ValueError, match="lr cannot be fixed to"):
        SPACE.config([0.5] * 4, fixed={"lr": 0.1})


def test_branches_are_all_combinations_the_first_slowest() -> None:
    space = Space(parameters=(categorical("a", 1, 2), categorical("b", "x", "y"), integer(1, 3)))
    assert space.branches(["b", "a"]) == (
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    )
    assert space.branches([]) == ({},)


def test_branches_follow_the_file_even_where_children_come_between() -> None:
    parameters = (categorical("a", 1, 2), categorical("child", "x", "y", a=2), categorical("b", 3, 4))
    assert Space(parameters=parameters).branches(["a", "b", "child"]) == (
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "child": "x", "b": 3},
        {"a": 2, "child": "x", "b": 4},
        {"a": 2, "child": "y", "b": 3},
        {"a": 2, "child": "y", "b": 4},
    )


def test_a_conditional_parameter_makes_branches_only_where_it_exists() -> None:
    space = Space(parameters=(categorical("nesterov", True, False, optimizer="sgd"), OPTIMIZER))
    assert space.branches(["optimizer", "nesterov"]) == (
        {"optimizer": "adamw"},
        {"nesterov": True, "optimizer": "sgd"},
        {"nesterov": False, "optimizer": "sgd"},
    )
    assert space.branches(["nesterov"]) == ({}, {"nesterov": True}, {"nesterov": False})


def test_a_parameter_without_listed_values_makes_no_branches() -> None:
    with pytest.raises(ValueError, match="lr has no list of values"):
        SPACE.branches(["lr"])
    with pytest.raises(ValueError, match="absent has no list of values"):
        SPACE.branches(["absent"])


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Spaces of listed parameters, whole numbers and conditions on earlier ones."""
    parameters: list[Parameter] = []
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        listed = [p for p in parameters if p.values]
        conditions = []
        for parent in draw(st.lists(st.sampled_from(listed), max_size=2, unique=True)) if listed else []:
            accepted = draw(st.lists(st.sampled_from(parent.values), min_size=1, max_size=2, unique=True))
            conditions.append(Condition(parent=parent.name, values=tuple(accepted)))
        if draw(st.booleans()):
            values = tuple(range(draw(st.integers(1, 3))))
            kind: Any = "constant" if len(values) == 1 and draw(st.booleans()) else "categorical"
            parameters.append(Parameter(name=name, kind=kind, values=values, conditions=tuple(conditions)))
        else:
            high = draw(st.integers(1, 3))
            parameters.append(Parameter(name=name, kind="integer", low=0, high=high, conditions=tuple(conditions)))
    return Space(parameters=tuple(draw(st.permutations(parameters))))


def all_configs(space: Space) -> set[str]:
    """By walking a grid fine enough for counts up to 4."""
    steps = [[i / (p.count or 1) + 1e-9 for i in range(p.count or 1)] for p in space.searched]
    return {repr(space.config(point)) for point in itertools.product(*steps)}


@given(spaces())
def test_size_counts_the_configs_that_points_give(space: Space) -> None:
    assert space.size() == len(all_configs(space))


@given(spaces(), st.randoms(use_true_random=False))
def test_every_config_belongs_to_a_branch_and_every_branch_to_a_config(space: Space, chance: random.Random) -> None:
    per = [p.name for p in space.parameters if p.values and chance.random() < 0.7]
    branches = space.branches(per)
    assert len({repr(branch) for branch in branches}) == len(branches)
    configs = [space.config([chance.random() for _ in range(space.n_dims)]) for _ in range(20)]
    assert all(space.branch_of(config, per) in branches for config in configs)
    everything = [p.name for p in space.parameters if p.values]
    for branch in space.branches(everything):
        fixed = space.config([0.5] * space.n_dims, fixed=branch)
        assert space.branch_of(fixed, everything) == branch


@given(spaces())
def test_never_names_the_parameters_that_no_config_has(space: Space) -> None:
    seen = {name for config in all_configs(space) for name in eval(config)}
    assert {parameter.name for parameter in space.never()} == set(space.names) - seen


def test_never_stays_quick_with_many_parents() -> None:
    parents = [categorical(f"p{i}", 0, 1) for i in range(40)]
    child = categorical("child", 1, **{parent.name: 1 for parent in parents})
    assert Space(parameters=(*parents, child)).never() == ()


def test_one_name_may_stand_under_several_choices_of_a_parent() -> None:
    def under(value: str, **rest: Any) -> Parameter:
        return Parameter(name="beta", conditions=(Condition(parent="optimizer", values=(value,)),), **rest)

    space = Space(
        parameters=(
            OPTIMIZER,
            under("adamw", kind="real", low=0.9, high=0.99),
            under("sgd", kind="constant", values=("none",)),
        )
    )
    assert space.n_dims == 2
    assert space.config([0.0, 0.0]) == {"optimizer": "adamw", "beta": 0.9}
    assert space.config([0.9, 0.0]) == {"optimizer": "sgd", "beta": "none"}


def test_size_of_a_space_with_a_real_is_none_unless_it_is_stepped() -> None:
    assert SPACE.size() is None
    assert Space(parameters=(real(0.0, 1.0, step=0.25),)).size() == 5


def test_size_stays_quick_with_many_independent_parents() -> None:
    pairs = [
        (categorical(f"p{i}", 0, 1), categorical(f"c{i}", 0, 1, 2, **{f"p{i}": 1}))
        for i in range(200)
    ]  # fmt: skip
    assert Space(parameters=tuple(p for pair in pairs for p in pair)).size() == 4**200


def test_a_condition_on_an_accepted_list_holds_for_each_value() -> None:
    child = categorical("child", 1, parent=[1, 2])
    space = Space(parameters=(categorical("parent", 1, 2, 3), child))
    assert [("child" in space.config([u, 0.0])) for u in (0.1, 0.5, 0.9)] == [True, True, False]


def test_conditions_in_a_circle_or_on_nothing_are_slips() -> None:
    a, b = categorical("a", 1, b=1), categorical("b", 1, a=1)
    assert condition_circle((a, b)) == ("a", "b", "a")
    assert condition_circle((MOMENTUM, OPTIMIZER)) == ()
    with pytest.raises(ValueError, match="conditions go in a circle: a -> b -> a"):
        Space(parameters=(a, b))
    with pytest.raises(ValueError, match="momentum depends on optimizer, which does not exist"):
        Space(parameters=(MOMENTUM,))
    with pytest.raises(ValueError, match="n has no list of values"):
        Space(parameters=(integer(1, 3), categorical("a", 1, n=1)))


def test_true_is_not_one_and_one_is_one_point_zero() -> None:
    assert same_value(1, 1.0)
    assert not same_value(True, 1)
    assert same_value([1, 2], [1.0, 2])
    assert not same_value([1, True], [1, 1])
    assert not same_value([1], [1, 1])
    assert not same_value(None, False)


def test_steps_are_counted_in_decimals() -> None:
    assert steps_between(0.1, 0.3, 0.1) == 2  # (0.3 - 0.1) / 0.1 is 1.9999999999999998 in binary
    assert steps_between(0, 10, 3) == 3
