"""Finding a task's class by reading source, so that `validate` runs none of the user's code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hpsearch.errors import Problem

TASK = re.compile(r"(?P<module>[\w./ -]*[\w-]\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")


def task_problems(task: str, space_path: Path, where: str) -> list[Problem]:
    module, _, name = task.rpartition(":")
    folder = space_path.parent
    if module.endswith(".py"):
        file = folder / module
        if not file.is_file():
            near = get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
            hint = f"did you mean {Path(module).with_name(near[0])}?" if near else f"it is looked for at {file}"
            what = f"the task's file `{module}` is not there"
            return [Problem(code="task-file", where=where, what=what, hint=hint)]
        return _class_problems(file, name, where)
    source = module_source(module, folder)
    if source is None:
        what = f"the task's module `{module}` is neither beside {space_path.name} nor installed"
        hint = "for a file beside it write file.py:Class"
        return [Problem(code="task-file", where=where, what=what, hint=hint)]
    return _class_problems(source, name, where) if source.suffix == ".py" else []  # compiled: found, and unreadable


def module_source(module: str, folder: Path) -> Path | None:
    """Where a module lies: beside space.yaml, else as Python would find it, without importing its parents."""
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    parts = module.split(".")
    beside = folder.joinpath(*parts)
    for file in (beside.with_name(beside.name + ".py"), beside / "__init__.py"):
        if file.is_file():
            return file
    try:
        found = find_spec(parts[0])  # a top-level name: finders are asked, nothing is run
    except (ImportError, ValueError):
        return None
    for end in range(2, len(parts) + 1):
        if found is None or found.submodule_search_locations is None:
            return None
        found = PathFinder.find_spec(".".join(parts[:end]), list(found.submodule_search_locations))
    return Path(found.origin) if found is not None and found.origin else None


def _class_problems(file: Path, name: str, where: str) -> list[Problem]:
    """Whether a source file defines a class, as far as reading tells."""
    import ast
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's escapes and comparisons: Python says so when it runs
            tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        place = f"{file}:{error.lineno or 1}:{max(error.offset or 1, 1)}"
        return [Problem(code="task-syntax", where=place, what=f"the task's file is not valid Python: {error.msg}")]
    except (ValueError, RecursionError, MemoryError) as error:
        what = f"the task's file is not valid Python: {str(error) or 'too deeply nested'}"
        return [Problem(code="task-syntax", where=str(file), what=what)]
    except OSError as error:
        return [Problem(code="task-file", where=str(file), what=f"cannot be read: {error.strerror}")]
    bound = dict(_bound_names(tree.body))
    node = bound.get(name)
    if node is None:
        if "*" in bound:
            return []
        classes = [other for other, node in bound.items() if isinstance(node, ast.ClassDef)]
        near = get_close_matches(name, classes, 1)
        hint = f"did you mean {near[0]}?" if near else f"classes there: {', '.join(classes) or 'none'}"
        return [Problem(code="task-class", where=where, what=f"`{file.name}` has no class `{name}`", hint=hint)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        what = f"`{name}` in `{file.name}` is a function, and a task is a class"
    elif isinstance(node, ast.ClassDef) and not node.bases and not node.keywords and not node.decorator_list:
        what = f"`{name}` in `{file.name}` is not a hpsearch.Task"
    else:
        return []
    return [Problem(code="task-class", where=where, what=what, hint=f"write class {name}(hpsearch.Task)")]


def _bound_names(body: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The names that a module's statements bind, with what binds them; "*" for a star import."""
    import ast

    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((part.id, node) for part in ast.walk(target) if isinstance(part, ast.Name))
        for block in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _bound_names(getattr(node, block, ()))
