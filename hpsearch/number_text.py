"""Numbers as people read them, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping


def number(value: object) -> str:
    """A number as people read it: four significant digits, exponents only where they help.

    >>> [number(v) for v in (0.0273, 0.0081, 4.6e-6, 64, None, float("nan"))]
    ['0.0273', '0.0081', '4.6e-06', '64', '–', 'nan']
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}"


def interval(value: object, bounds: object) -> str:
    """A figure with its interval, where there is one: `0.975 [0.953, 0.987]`."""
    if not isinstance(bounds, Mapping) or bounds.get("low") is None:
        return number(value)
    return f"{number(value)} [{number(bounds['low'])}, {number(bounds['high'])}]"
