"""A config that the user wrote, held against the space: what it lacks, what it has too much of, what cannot be meant.

A number may lie outside its range: the config is the user's, and is what the search is to be compared with. A name may
not, since it decides which parameters there are, and a misspelt one would be found by nobody before training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from hpsearch.job import Config, Value
from hpsearch.space import Parameter, Space, same_value
from hpsearch.spec_model import as_found


@dataclass(frozen=True, kw_only=True)
class ConfigSlip:
    """One thing that is wrong with a config."""

    name: str | None  # the key that it is at; None: one that is missing
    what: str
    hint: str = ""


def config_slips(space: Space, given: Mapping[str, Value]) -> Iterator[ConfigSlip]:
    """What is wrong with a user's config, in the order of the space, then what the space does not know."""
    config = space.completed(given)
    for name in space.names:
        forms = [parameter for parameter in space.parameters if parameter.name == name]
        active = next((form for form in forms if all(condition.holds(config) for condition in form.conditions)), None)
        if active is None:
            if name in given and all(condition.parent in config for form in forms for condition in form.conditions):
                yield ConfigSlip(name=name, what=f"`{name}` exists only with {_conditions(forms)}", hint="leave it out")
        elif name not in config:
            yield ConfigSlip(
                name=None,
                what=f"`baseline` needs `{name}`",
                hint=f"a value for each parameter, such as {_such(active)}",
            )
        else:
            yield from _value_slips(active, config[name])
    for name in given:
        if name not in space.names:
            near = get_close_matches(name, space.names, 1)
            yield ConfigSlip(
                name=name,
                what=f"`{name}` is no parameter (known: {', '.join(space.names)})",
                hint=f"did you mean {near[0]}?" if near else "give it under `parameters` with one `value`",
            )


def _value_slips(parameter: Parameter, value: Value) -> Iterator[ConfigSlip]:
    if parameter.kind == "integer" and not _is_whole(value):
        hint = f"write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        yield ConfigSlip(
            name=parameter.name, what=f"`{parameter.name}` is a whole number (got {as_found(value)})", hint=hint
        )
    elif parameter.kind == "real" and not _is_number(value):
        yield ConfigSlip(name=parameter.name, what=f"`{parameter.name}` is a number (got {as_found(value)})")
    elif parameter.values and not _could_be(parameter.values, value):
        listed = [str(own) for own in parameter.values]
        near = get_close_matches(str(value), listed, 1)
        hint = f"did you mean {near[0]}?" if near else "add it to the parameter's values, if it is meant"
        what = f"`{parameter.name}` is never {as_found(value)} (it is one of: {', '.join(listed)})"
        yield ConfigSlip(name=parameter.name, what=what, hint=hint)


def _could_be(listed: tuple[Value, ...], value: Value) -> bool:
    """One of the values, or a number or list where such are listed."""
    if any(same_value(value, own) for own in listed):
        return True
    if isinstance(value, list):
        return any(isinstance(own, list) for own in listed)
    if isinstance(value, float):
        return any(isinstance(own, float) for own in listed)
    return _is_whole(value) and any(_is_number(own) for own in listed)


def _is_whole(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _conditions(forms: list[Parameter]) -> str:
    ways = [" and ".join(f"{c.parent}: {' or '.join(map(str, c.values))}" for c in form.conditions) for form in forms]
    return ", or ".join(dict.fromkeys(ways))


def _such(parameter: Parameter) -> str:
    value = parameter.values[0] if parameter.values else parameter.low
    return f"{parameter.name}: {value}"


def same_config(one: Config, other: Config) -> bool:
    """Whether two configs are one: the same names with the same values.

    >>> same_config({"lr": 1, "width": 64}, {"width": 64, "lr": 1.0})
    True
    """
    return one.keys() == other.keys() and all(same_value(one[name], other[name]) for name in one)


def sampled_below(n_trials: int, own: Iterable[int]) -> int:
    """The first number beyond the sampled trials, of which there are `n_trials`; the user's own have numbers between.

    So a trial keeps its config whether or not there is one of the user's own, and when `trials` is raised later.

    >>> sampled_below(64, []), sampled_below(64, [64]), sampled_below(128, [64])
    (64, 64, 129)
    """
    end = n_trials
    for number in sorted(own):
        end += number < end
    return end
