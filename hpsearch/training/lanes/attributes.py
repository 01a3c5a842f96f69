"""What the modules of a model keep beside parameters, buffers and submodules: one copy of it serves all lanes.

So it has to mean the same in every lane, and to stay as it is.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch.training.lanes.refusal import LanesRefused

LOOP_KEYS = frozenset({"lr", "weight_decay", "momentum", "grad_clip_norm", "label_smoothing", "warmup_epochs"})
"""Keys of a config that reach a step as a number per lane; a model that keeps its config may hold other values."""

_TORCHS_OWN = frozenset(vars(nn.Module())) | {
    *("_is_full_backward_hook", "_compiled_call_impl", "_flat_weights", "_flat_weight_refs")
}
_USES = (
    *("__bool__", "__float__", "__int__", "__index__", "__neg__", "__abs__", "__eq__", "__ne__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__format__", "__str__"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__rfloordiv__", "__rmod__", "__rpow__"),
)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside its parameters, buffers and submodules, and torch's own bookkeeping."""
    return {key: value for key, value in vars(module).items() if key not in _TORCHS_OWN}


def first_that_differs(first: nn.Module, other: nn.Module, free: set[int]) -> str:
    """The first attribute that two models of the same modules do not have in common, in plain words; or "".

    A dict that a module keeps may hold other values under `LOOP_KEYS`, if these are not read: see `hide_loop_keys`.

    Args:
        free: ids of modules of the first that may differ.
    """
    comparison = Comparison(first, other)
    others = dict(other.named_modules())
    for name, module in first.named_modules():
        if id(module) in free:
            continue
        mine, theirs = plain_attributes(module), plain_attributes(others[name])
        for key in sorted(set(mine) | set(theirs)):
            if not (
                key in mine
                and key in theirs
                and comparison.same(_without_loop_keys(mine[key]), _without_loop_keys(theirs[key]))
            ):
                return f"`{key}` of {f'module {name}' if name else 'the model'} differs"
    return ""


def remembered(model: nn.Module) -> dict[str, Any]:
    """A copy of what a model's modules keep, for `changed_attribute` after a step."""
    found = dict(_attributes(model))
    for name, value in found.items():
        # Modules and tensors of the model itself are what they are.
        own: dict[int, Any] = {id(each): each for each in (*model.modules(), *model.parameters(), *model.buffers())}
        try:
            found[name] = copy.deepcopy(value, own)
        except Exception:  # something that there is one of alone
            found[name] = value
    return found


def changed_attribute(before: Mapping[str, Any], model: nn.Module) -> str:
    """The first attribute that is another than it was, "" where there is none."""
    now, comparison = dict(_attributes(model)), Comparison()
    return next(
        (
            name
            for name in [*before, *now]
            if name not in before or name not in now or not comparison.same(before[name], now[name])
        ),
        "",
    )


def hide_loop_keys(model: nn.Module) -> None:
    """Makes of each value under `LOOP_KEYS`, in the dicts that a model keeps, one that refuses lanes when it is used.

    Args:
        model: one's own copy.
    """
    for _, value in _attributes(model):
        _hide(value)


class Comparison:
    """Whether values that two models keep mean the same; what cannot be judged differs."""

    def __init__(self, first: nn.Module | None = None, other: nn.Module | None = None) -> None:
        """
        Args:
            first: a model of the same modules as `other`; each module means the other's of the same place.
        """
        modules = () if first is None or other is None else zip(first.modules(), other.modules(), strict=True)
        self._others = {id(mine): theirs for mine, theirs in modules}
        self._met: dict[tuple[int, int], Any] = {}  # with the values, or another could come by the same id

    def same(self, mine: Any, theirs: Any) -> bool:
        try:
            return self._same(mine, theirs)
        except Exception:
            return False

    def _same(self, mine: Any, theirs: Any) -> bool:
        if id(mine) in self._others:
            return self._others[id(mine)] is theirs
        if mine is theirs:
            return True
        if type(mine) is not type(theirs):
            return False
        if (id(mine), id(theirs)) in self._met:  # they hold themselves, or were compared before
            return True
        self._met[id(mine), id(theirs)] = (mine, theirs)
        if isinstance(mine, Tensor):
            return mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        if isinstance(mine, np.ndarray):
            return mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
        if isinstance(mine, Mapping):
            return mine.keys() == theirs.keys() and all(self._same(mine[key], theirs[key]) for key in mine)
        if isinstance(mine, list | tuple):
            return len(mine) == len(theirs) and all(map(self._same, mine, theirs))
        if isinstance(mine, types.FunctionType):
            return mine.__code__ is theirs.__code__ and self._same(_bound(mine), _bound(theirs))
        if isinstance(mine, types.MethodType):
            return self._same(mine.__func__, theirs.__func__) and self._same(mine.__self__, theirs.__self__)
        if isinstance(mine, functools.partial):
            return self._same((mine.func, mine.args, mine.keywords), (theirs.func, theirs.args, theirs.keywords))
        kind: Any = type(mine)
        if kind.__eq__ is not object.__eq__:
            return bool(mine == theirs)
        return self._same(_parts(mine), _parts(theirs))


class _OfEachLane:
    """Stands where a config holds what each lane has another value of."""

    def __init__(self, key: str) -> None:
        self._key = key

    def refuse(self, *_: object) -> Any:
        raise LanesRefused(f"forward() reads `{self._key}` of a config that it keeps, which each lane has another of")


for _use in _USES:
    setattr(_OfEachLane, _use, _OfEachLane.refuse)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for key, value in plain_attributes(module).items():
            yield f"{name}.{key}".lstrip("."), value


def _hide(value: Any) -> None:
    if type(value) is not dict:
        return
    for key, held in value.items():
        if key in LOOP_KEYS:
            value[key] = _OfEachLane(key)
        else:
            _hide(held)


def _without_loop_keys(value: Any) -> Any:
    if type(value) is not dict:
        return value
    return {key: _without_loop_keys(held) for key, held in value.items() if key not in LOOP_KEYS}


def _bound(function: types.FunctionType) -> tuple[Any, ...]:
    cells = function.__closure__ or ()
    return (function.__defaults__, function.__kwdefaults__, *(cell.cell_contents for cell in cells))


def _parts(value: Any) -> tuple[Any, ...]:
    """What another of its kind is made of, where its class does not say what is equal."""
    parts = value.__reduce_ex__(4)
    if isinstance(parts, str):  # known by a name alone, and the other is another
        raise TypeError
    return tuple(list(part) if isinstance(part, Iterator) else part for part in parts)
