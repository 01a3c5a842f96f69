"""What a study is asked to do: space.yaml with every default, or every reason why it is no study.

A wrong file is refused, not repaired, and all of its problems are told at once with their places. Nothing of the user's
is imported. The keys are in `spec_model`, the problems in `spec_problems`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hpsearch.errors import Problem, SpecError
from hpsearch.spec_model import (
    Budget,
    Confirm,
    EarlyStopping,
    Ensemble,
    Evaluate,
    Finish,
    LrRange,
    Metric,
    Mlflow,
    Preflight,
    Resources,
    Search,
    Spec,
)
from hpsearch.spec_problems import check_document
from hpsearch.task_source import TASK, task_problems
from hpsearch.yaml_reader import MAX_BYTES, Document, Place, read_document, with_overrides

__all__ = [
    "Budget",
    "Confirm",
    "EarlyStopping",
    "Ensemble",
    "Evaluate",
    "Finish",
    "LrRange",
    "Metric",
    "Mlflow",
    "Preflight",
    "Resources",
    "Search",
    "Spec",
    "find_task",
    "json_schema",
    "parse_spec",
    "read_spec",
]


def read_spec(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """The study that a file describes, with `--set` overrides, its task found (but not imported).

    Args:
        path: space.yaml; messages call it as given here.
        overrides: `key=value` with a dotted key, applied in order.

    Raises:
        SpecError: every problem of the file, of the overrides, and of finding the task.
    """
    path = Path(path)
    document = with_overrides(_read_file(path), overrides)
    spec, problems = check_document(document)
    task = spec.task if spec else document.at(("task",))
    if isinstance(task, str) and TASK.fullmatch(task):
        place = document.place(("task",))
        problems += [(place, problem) for problem in task_problems(task, path, document.where(place))]
    return _spec_or_raise(spec, problems, document)


def parse_spec(text: str | bytes, *, name: str = "space.yaml", overrides: Sequence[str] = ()) -> Spec:
    """The study that a text describes; its task is not looked for. Raises SpecError with every problem."""
    document = with_overrides(read_document(text, name=name), overrides)
    spec, problems = check_document(document)
    return _spec_or_raise(spec, problems, document)


def find_task(spec: Spec, space_path: Path) -> list[Problem]:
    """What is wrong with `task`, found by reading source and running none of it; empty when the class is there."""
    document = _read_file(Path(space_path))
    written = document.at(("task",)) == spec.task
    where = document.where(document.place(("task",))) if written else "--set task"
    return task_problems(spec.task, Path(space_path), where)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of space.yaml, for editors; relations between keys are left to `validate`."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "space.yaml of hpsearch"}


def _read_file(path: Path) -> Document:
    name = str(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "the README has one to start from"
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        problem = Problem(code="no-file", where=name, what=what, hint="" if path.is_dir() else hint)
        return Document(name=name, value=None, problems=(problem,))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        problem = Problem(code="no-file", where=name, what=f"cannot be read: {error.strerror}")
        return Document(name=name, value=None, problems=(problem,))
    return read_document(data, name=name)


def _spec_or_raise(spec: Spec | None, problems: list[tuple[Place, Problem]], document: Document) -> Spec:
    if spec is None or problems:
        problems.sort(key=lambda pair: pair[0].order())
        raise SpecError([problem for _, problem in problems], file=document.name)
    return spec
