"""The space that is searched: from a point of the unit cube to a config, and nothing random in between.

A sampler says where in [0, 1)^n to look, one coordinate per searched parameter in the file's order. Coordinates of
parameters that a config does not have are left unused, so that a trial's other values do not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Literal

from hpsearch.job import Config, Value

Kind = Literal["constant", "categorical", "integer", "real"]
Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A parameter exists where `parent` has one of `values`; several conditions must all hold."""

    parent: str
    values: tuple[Value, ...]

    def holds(self, config: Mapping[str, Value]) -> bool:
        return self.parent in config and any(same_value(config[self.parent], value) for value in self.values)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One line of `parameters`, or of a choice's own.

    Two parameters may share a name when they belong to different choices of one parent: they never meet in a config.
    """

    name: str
    kind: Kind
    values: tuple[Value, ...] = ()  # one for a constant, all of them for a categorical
    low: float | int = 0  # of an integer or a real; both ends included
    high: float | int = 0
    log: bool = False
    step: float | int | None = None  # values are low + k * step
    conditions: tuple[Condition, ...] = ()
    bounds_from: Literal["lr_range"] | None = None

    @property
    def searched(self) -> bool:
        """Whether it takes a coordinate. A list of one value does, so that adding to it moves no other parameter."""
        return self.kind != "constant"

    @property
    def count(self) -> int | None:
        """How many values it can take; None for a real without step."""
        if self.kind in ("constant", "categorical"):
            return len(self.values)
        if self.step is not None:
            return steps_between(self.low, self.high, self.step) + 1
        return int(self.high) - int(self.low) + 1 if self.kind == "integer" else None

    def value_at(self, u: float, bounds: tuple[float, float] | None = None) -> Value:
        """The value at coordinate `u` in [0, 1], each value of a list, integer or step having an equal share.

        Args:
            u: the coordinate.
            bounds: a narrower interval for a number; where it misses [low, high] altogether, the nearest value is
                taken.

        Raises:
            ValueError: u or a bound is not a number, or u is outside [0, 1].
        """
        if not 0 <= u <= 1:
            raise ValueError(f"a coordinate lies in [0, 1] (got {u} for {self.name})")
        if self.kind in ("constant", "categorical"):
            value = self.values[_share(u, len(self.values))]
            return list(value) if isinstance(value, list) else value
        lower, upper = (self.low, self.high) if bounds is None else bounds
        if not lower <= upper:
            raise ValueError(f"bounds are two numbers in order (got {lower} and {upper} for {self.name})")
        if self.step is not None:
            first, last = self._steps_within(lower, upper)
            return self._stepped(first + _share(u, last - first + 1))
        if self.kind == "integer":
            return self._integer(u, lower, upper)
        return self._real(u, min(max(lower, self.low), self.high), max(min(upper, self.high), self.low))

    def _integer(self, u: float, lower: float, upper: float) -> int:
        low, high = int(self.low), int(self.high)
        first = low if lower <= low else high if lower > high else math.ceil(lower)
        last = high if upper >= high else low if upper < low else math.floor(upper)
        if first > last:  # the interval lies between two integers: the nearer one
            first = last = first if first - upper <= lower - last else last
        if not self.log:
            return first + _share(u, last - first + 1)
        # x is uniform in log on [first - 1/2, last + 1/2), rounded: each integer has the share that its width has in
        # log terms, the ends included. Counted from first - 1/2, so that neighbours near 2^53 stay apart.
        edge = first - 0.5
        beyond = edge * math.expm1(u * math.log1p((last - first + 1) / edge))
        return first + min(int(beyond), last - first)

    def _real(self, u: float, low: float, high: float) -> float:
        if u == 0 or low == high:
            return float(low)
        if self.log:
            value = math.exp(math.log(low) * (1 - u) + math.log(high) * u)
        else:
            value = low * (1 - u) + high * u  # not low + u * (high - low), which can overflow
        return float(min(max(value, low), high))

    def _steps_within(self, lower: float, upper: float) -> tuple[int, int]:
        """First and last k of the values low + k * step within the bounds; one k, the nearest, where none is."""
        assert self.step is not None
        top = steps_between(self.low, self.high, self.step)
        below = steps_between(self.low, min(max(lower, self.low), self.high), self.step)
        first = below if self._stepped(below) >= lower else min(below + 1, top)
        last = steps_between(self.low, min(max(upper, self.low), self.high), self.step)
        if first > last:
            nearer_first = self._stepped(first) - upper <= lower - self._stepped(last)
            first = last = first if nearer_first else last
        return first, last

    def _stepped(self, k: int) -> int | float:
        """low + k * step as one would write it: 0.1 + 2 * 0.1 is 0.3 here."""
        assert self.step is not None
        if self.kind == "integer":
            return int(self.low) + k * int(self.step)
        return min(float(_decimal(self.low) + k * _decimal(self.step)), float(self.high))


@dataclass(frozen=True, kw_only=True)
class Space:
    """All parameters of a study, in the order of the file.

    Raises:
        ValueError: a condition names no parameter, or one without listed values, or conditions go in a circle.
    """

    parameters: tuple[Parameter, ...]
    _order: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        circle = condition_circle(self.parameters)
        if circle:
            raise ValueError(f"conditions go in a circle: {' -> '.join(circle)}")
        listed = {parameter.name for parameter in self.parameters if parameter.values}
        for parameter in self.parameters:
            for condition in parameter.conditions:
                if condition.parent not in self.names:
                    raise ValueError(f"{parameter.name} depends on {condition.parent}, which does not exist")
                if condition.parent not in listed:
                    raise ValueError(f"{condition.parent} has no list of values, so nothing can depend on it")
        object.__setattr__(self, "_order", tuple(self._parents_first()))

    @cached_property
    def searched(self) -> tuple[Parameter, ...]:
        """The parameters that have a coordinate, in its order."""
        return tuple(parameter for parameter in self.parameters if parameter.searched)

    @property
    def n_dims(self) -> int:
        return len(self.searched)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every name once, in the order of the file."""
        return tuple(dict.fromkeys(parameter.name for parameter in self.parameters))

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """Names whose bounds come from the LR range."""
        return tuple(dict.fromkeys(p.name for p in self.parameters if p.bounds_from == "lr_range"))

    def config(
        self, point: Sequence[float], bounds: Bounds | None = None, fixed: Mapping[str, Value] | None = None
    ) -> Config:
        """The config at a point of the unit cube.

        Args:
            point: n_dims coordinates in [0, 1], of the searched parameters in file order.
            bounds: narrower intervals for numeric parameters by name; the value lies in both this and the user's own,
                or at the nearest value where the two have nothing in common.
            fixed: values of categorical parameters that are decided already, as in a branch. Ignored where the
                parameter does not occur.

        Returns:
            One value for every parameter whose conditions hold, in file order.

        Raises:
            ValueError: the wrong number of coordinates, one outside [0, 1], or a fixed value that the parameter
                cannot take.
        """
        if len(point) != self.n_dims:
            raise ValueError(f"a point has {self.n_dims} coordinates, one per searched parameter (got {len(point)})")
        bounds, fixed = bounds or {}, fixed or {}
        for name, value in fixed.items():
            if not any(p.name == name and _takes(p, value) for p in self.parameters):
                raise ValueError(f"{name} cannot be fixed to {value!r}")
        found: Config = {}
        for index in self._order:
            parameter = self.parameters[index]
            if not all(condition.holds(found) for condition in parameter.conditions):
                continue
            name = parameter.name
            if name in fixed and _takes(parameter, fixed[name]):
                found[name] = _copied(next(v for v in parameter.values if same_value(v, fixed[name])))
            else:
                u = point[self._coordinates[index]] if parameter.searched else 0.0
                found[name] = parameter.value_at(u, bounds.get(name))
        return {name: found[name] for name in self.names if name in found}

    def completed(self, given: Mapping[str, Value]) -> Config:
        """A config of the user's in the order of the file, with the values of constants that it leaves out."""
        found = {name: _copied(value) for name, value in given.items()}
        for index in self._order:
            parameter = self.parameters[index]
            active = all(condition.holds(found) for condition in parameter.conditions)
            if active and parameter.kind == "constant":
                found.setdefault(parameter.name, parameter.value_at(0.0))
        return {name: found[name] for name in self.names if name in found}

    def branches(self, per: Sequence[str]) -> tuple[Config, ...]:
        """Every combination of the values of some categorical parameters that can occur, the first slowest.

        A parameter that is itself conditional is in a branch only where it exists.

        >>> optimizer = Parameter(name="optimizer", kind="categorical", values=("adamw", "sgd"))
        >>> Space(parameters=(optimizer,)).branches(["optimizer"])
        ({'optimizer': 'adamw'}, {'optimizer': 'sgd'})

        Raises:
            ValueError: a name that is not a categorical or constant parameter.
        """
        for name in per:
            if not all(p.values for p in self.parameters if p.name == name) or name not in self.names:
                raise ValueError(f"{name} has no list of values, so it makes no branches")
        involved = self._with_ancestors(per)
        combinations = sorted(self._combinations(involved), key=lambda pair: pair[0])
        branches: dict[str, Config] = {}
        for _, config in combinations:
            branch = self.branch_of(config, per)
            branches.setdefault(repr(branch), branch)
        return tuple(branches.values())

    def branch_of(self, config: Mapping[str, Value], per: Sequence[str]) -> Config:
        """The branch a config belongs to: its values of the parameters in `per`, in file order."""
        return {name: _copied(config[name]) for name in self.names if name in per and name in config}

    def never(self) -> tuple[Parameter, ...]:
        """Parameters that no config has, since their conditions exclude each other."""
        return tuple(parameter for parameter in self.parameters if not self._can_occur(parameter))

    def size(self) -> int | None:
        """How many different configs there are; None when a real parameter makes them countless.

        Parameters that no condition connects are counted apart and multiplied, so this stays quick.
        """
        if any(parameter.count is None for parameter in self.parameters):
            return None
        total = 1
        for group in self._connected():
            parents = {c.parent for i in group for c in self.parameters[i].conditions}
            deciding = [i for i in group if self.parameters[i].name in parents and self.parameters[i].values]
            others = [self.parameters[i] for i in group if i not in deciding]
            total *= sum(
                math.prod(p.count or 0 for p in others if all(c.holds(config) for c in p.conditions))
                for _, config in self._combinations(deciding)
            )
        return total

    @cached_property
    def _coordinates(self) -> dict[int, int]:
        """Position in `parameters` -> position in a point."""
        searched = [i for i, parameter in enumerate(self.parameters) if parameter.searched]
        return {index: coordinate for coordinate, index in enumerate(searched)}

    def _parents_first(self) -> Iterator[int]:
        """Positions of the parameters, every parent before its children, else as in the file."""
        left = list(range(len(self.parameters)))
        while left:
            waiting = {self.parameters[i].name for i in left}
            ready = [i for i in left if not any(c.parent in waiting for c in self.parameters[i].conditions)]
            yield from ready
            left = [i for i in left if i not in set(ready)]

    def _with_ancestors(self, names: Sequence[str]) -> list[int]:
        """Positions of the named parameters and of all that they depend on, parents first."""
        wanted = set(names)
        for index in reversed(self._order):
            if self.parameters[index].name in wanted:
                wanted.update(condition.parent for condition in self.parameters[index].conditions)
        return [index for index in self._order if self.parameters[index].name in wanted]

    def _combinations(
        self, involved: Sequence[int], wanted: Sequence[Condition] = ()
    ) -> Iterator[tuple[tuple[int, ...], Config]]:
        """Every combination of values of those that are listed, with a key that sorts them as the file does.

        With `wanted`, only the values that these conditions accept: a search for one combination stays short.
        """
        in_order = [index for index in self._order if index in set(involved)]
        in_file = sorted(in_order)

        def walk(position: int, chosen: dict[int, int], config: Config) -> Iterator[tuple[tuple[int, ...], Config]]:
            if position == len(in_order):
                yield tuple(chosen.get(index, -1) for index in in_file), dict(config)
                return
            index = in_order[position]
            parameter = self.parameters[index]
            if not parameter.values or not all(condition.holds(config) for condition in parameter.conditions):
                yield from walk(position + 1, chosen, config)
                return
            accepting = [condition for condition in wanted if condition.parent == parameter.name]
            for number, value in enumerate(parameter.values):
                if not all(condition.holds({parameter.name: value}) for condition in accepting):
                    continue
                yield from walk(position + 1, {**chosen, index: number}, {**config, parameter.name: value})

        yield from walk(0, {}, {})

    def _can_occur(self, parameter: Parameter) -> bool:
        if not parameter.conditions:
            return True
        involved = self._with_ancestors([condition.parent for condition in parameter.conditions])
        combinations = self._combinations(involved, parameter.conditions)
        return any(all(c.holds(config) for c in parameter.conditions) for _, config in combinations)

    def _connected(self) -> list[list[int]]:
        """Positions in groups, such that no condition goes from one group to another."""
        groups: list[tuple[set[str], list[int]]] = []
        for index, parameter in enumerate(self.parameters):
            touched = {parameter.name, *(condition.parent for condition in parameter.conditions)}
            members = [index]
            apart = []
            for names, group in groups:
                if names & touched:
                    touched |= names
                    members = group + members
                else:
                    apart.append((names, group))
            groups = [*apart, (touched, members)]
        return [members for _, members in groups]


def same_value(a: Value, b: Value) -> bool:
    """Whether two values are one to a user: 1 and 1.0 are, True and 1 are not.

    >>> same_value(1, 1.0), same_value(True, 1)
    (True, False)
    """
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def steps_between(low: float, high: float, step: float) -> int:
    """How many whole steps fit, counted in decimals as the user wrote them: 0.1 fits three times into 0.3."""
    return int((_decimal(high) - _decimal(low)) // _decimal(step))


def condition_circle(parameters: Sequence[Parameter]) -> tuple[str, ...]:
    """Names of parameters that wait for each other, the first repeated at the end; () when there are none."""
    parents: dict[str, set[str]] = {}
    for parameter in parameters:
        parents.setdefault(parameter.name, set()).update(c.parent for c in parameter.conditions)
    done: set[str] = set()
    for start in parents:
        stack = [(start, iter(sorted(parents[start])))] if start not in done else []
        way = [start] if stack else []
        while stack:
            name, rest = stack[-1]
            following = next((parent for parent in rest if parent in parents and parent not in done), None)
            if following is None:
                done.add(name)
                stack.pop()
                way.pop()
            elif following in way:
                return (*way[way.index(following) :], following)
            else:
                stack.append((following, iter(sorted(parents[following]))))
                way.append(following)
    return ()


def _share(u: float, count: int) -> int:
    """Which of `count` equal shares of [0, 1] holds u; 1 belongs to the last."""
    return min(int(u * count), count - 1)


def _decimal(number: float) -> Decimal:
    """The number as it is written in decimals, not its binary neighbour."""
    return Decimal(repr(number))


def _takes(parameter: Parameter, value: Value) -> bool:
    return parameter.kind in ("categorical", "constant") and any(same_value(value, own) for own in parameter.values)


def _copied(value: Value) -> Value:
    return list(value) if isinstance(value, list) else value
