"""What the verbs print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from hpsearch.number_text import interval, number

__all__ = [
    "counted",
    "interval",
    "is_terminal",
    "json_option",
    "number",
    "print_json",
    "report_error",
    "say",
    "table",
    "tool",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
"""The flag that every verb has."""


def print_json(value: object) -> None:
    """One JSON object to stdout; what JSON has no number for becomes null."""
    click.echo(json.dumps(_finite(value), ensure_ascii=False))


def say(message: str = "") -> None:
    """A line for the person, to stderr."""
    click.echo(message, err=True)


def report_error(
    message: str, exit_code: int, *, code: str, as_json: bool, hint: str = "", formatted: bool = False
) -> None:
    """An error to stderr; with --json as an object to stdout too, so that a script finds it where it looks."""
    text = message if formatted else f"error[{code}]: {message}" + (f"\n  hint: {hint}" if hint else "")
    say(text)
    if as_json:
        print_json({"error": {"code": code, "message": text, "exit_code": exit_code}})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, right-aligned but for the first and last, two spaces apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def counted(n: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "trial"), counted(1728, "epoch"), counted(2, "branch")
    ('1 trial', '1,728 epochs', '2 branches')
    """
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun == "branch" else "s")


def tool(name: str) -> str:
    """How to call a program of this installation from here: by its name where PATH finds it, else by its path.

    After ./scripts/demo that is `.venv/bin/hpsearch`, and a command that is printed should work when it is pasted.
    """
    beside = Path(sys.executable).parent / name
    if not beside.exists() or shutil.which(name) == str(beside):
        return name
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)


def is_terminal() -> bool:
    """Whether stderr is a person's terminal."""
    return sys.stderr.isatty()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
