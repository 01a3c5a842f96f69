"""Which files a task is made of, and their hashes, found by reading: nothing of the user's is run.

A study records them with each launch, so that a resume can say which code has changed since its trials were trained.
Followed are imports of modules that lie beside the task, or in its own package; installed libraries are versions, not
code of the task's, and data files are known by their fingerprint.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from hpsearch.task_source import module_source

OURS = "hpsearch"


def task_code(task: str, folder: Path) -> dict[str, str]:
    """sha256 in hex of the task's file and of the user's modules that it imports, by name; empty if it is not found.

    Imports within functions count, those of a module whose name is computed cannot be found. A file that is no Python
    is hashed and not followed.

    Args:
        task: "file.py:Class", the file relative to `folder`, or "package.module:Class".
        folder: where space.yaml is.

    Returns:
        Names relative to `folder`; of files elsewhere, relative to the folder that Python finds them from.
    """
    module, _, _ = task.rpartition(":")
    package = ""  # the only one that is followed, where there is one: beside it libraries are installed
    if module.endswith(".py"):
        waiting = [folder / module]
        root = waiting[0].parent  # goes to the front of sys.path when the task is loaded
    else:
        found = module_source(module, folder)
        if found is None or found.suffix != ".py":
            return {}
        parts = tuple(module.split("."))
        root = found.parents[len(parts) - (found.name != "__init__.py")]
        package = "" if root == folder else parts[0]
        waiting = list(_files_of(parts, root))
    hashes: dict[str, str] = {}
    seen = {file.resolve() for file in waiting}
    while waiting:
        file = waiting.pop()
        try:
            source = file.read_bytes()
        except OSError:
            continue
        hashes[_name(file, folder, root)] = hashlib.sha256(source).hexdigest()
        for imported in _imported(source, file, root):
            top = imported.relative_to(root).parts[0].removesuffix(".py")
            if package in ("", top) and imported.resolve() not in seen:
                seen.add(imported.resolve())
                waiting.append(imported)
    return dict(sorted(hashes.items()))


def _name(file: Path, folder: Path, root: Path) -> str:
    base = folder if file.is_relative_to(folder) else root
    return file.relative_to(base).as_posix()


def _imported(source: bytes, file: Path, root: Path) -> Iterator[Path]:
    """Files below `root` that a source may import, the packages that they lie in included."""
    import ast

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's escapes and comparisons: Python says so when it runs
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = file.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            names = [base, *((*base, alias.name) for alias in node.names)]
        else:
            continue
        for parts in names:
            if parts and parts[0] != OURS:
                yield from _files_of(parts, root)


def _files_of(parts: tuple[str, ...], root: Path) -> Iterator[Path]:
    """The files that importing a dotted name runs: each package's on the way, and the module's own."""
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        for file in (place / "__init__.py", place.with_name(place.name + ".py")):
            if file.is_file():
                yield file
                break
