"""The corners of a space: the configs at which a network is likeliest to break, before anything is searched."""

from __future__ import annotations

from collections.abc import Sequence

from hpsearch.job import Config, Value
from hpsearch.space import Parameter, Space

HIGHEST = 1.0 - 1e-9  # a coordinate lies below 1
MIDDLE = 0.5


def corners(space: Space, per: Sequence[str]) -> dict[str, Config]:
    """Configs by a name in plain words; equal ones once, under the first.

    "smallest" and "largest" have every number at its low or high end, but the learning rate in the middle;
    then the lowest and the highest learning rate, and each branch, with all else in the middle.

    Args:
        per: the parameters whose values make a branch.
    """
    found = {
        "smallest": space.config([end_of(p, high=False) for p in space.searched]),
        "largest": space.config([end_of(p, high=True) for p in space.searched]),
    }
    if any(p.name == "lr" and p.kind == "real" for p in space.searched):
        for name, coordinate in (("lowest lr", 0.0), ("highest lr", HIGHEST)):
            found[name] = space.config([coordinate if p.name == "lr" else MIDDLE for p in space.searched])
    middle = [MIDDLE] * space.n_dims
    for branch in space.branches(per):
        if branch:
            label = ", ".join(f"{name}={value}" for name, value in branch.items())
            found[label] = space.config(middle, fixed=branch)
    once: dict[str, Config] = {}
    for name, config in found.items():
        if config not in once.values():
            once[name] = config
    return once


def end_of(parameter: Parameter, *, high: bool) -> float:
    """The coordinate of a parameter's end; of a list of numbers, of its least or greatest."""
    if parameter.name == "lr":
        return MIDDLE
    if parameter.kind != "categorical":
        return HIGHEST if high else 0.0
    numbers = [value for value in parameter.values if _is_number(value)]
    if len(numbers) < len(parameter.values):
        return 0.0
    chosen = (max if high else min)(range(len(parameter.values)), key=lambda i: float(str(parameter.values[i])))
    return (chosen + MIDDLE) / len(parameter.values)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
