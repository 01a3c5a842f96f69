"""The drawing of the layers, and the proof that the imports agree with it.

The table is the drawing. What it asks of the source is read by `ast`, so imports inside functions count too, and
nothing has to be imported to be judged; what it asks of a running program is asked of a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Each row may import rows below it and its own, never a row above. `x.*` is the package x and all within; `hpsearch` is
# the package itself, which offers the Task API.
DRAWING = """
7  __main__ cli.*                                                             # front door: parse, choose, print, exit
6  fleets.* tracker.* report.* tpe                                            # ray; mlflow; the plots; optuna
5  study worker assembly packing                                              # give out jobs | pull, run, push
5  keeping forecast mirror carrier                                            # what is kept, where, and how much
4  stages.*                                                                   # journal view -> next jobs
3  training.* pyfunc_model                                                    # torch
2  sampler rungs lr_curve selection intervals verdict budget triage predict   # pure decisions, numpy and SciPy only
2  edits leases lane_groups retention diagnosis space_diagnosis racing corners parsimony  # of values as well
2  fold_race winner sentences                                                 # likewise
1  hpsearch spec spec_model spec_problems yaml_reader space task task_source  # what is written
1  metric_names checks task_code own_config number_text                       # what can be named
1  job trial state events journal blobs notes package                         # what is passed on and kept
1  storage archive restore                                                    # what outlives a study's machines
0  errors
"""
ROW = {
    "" if pattern == "hpsearch" else pattern: int(row)
    for row, *patterns in (line.partition("#")[0].split() for line in DRAWING.strip().splitlines())
    for pattern in patterns
}

# Who may import what is large.
OWNERS: dict[str, tuple[str, ...]] = {
    "torch": ("training.*", "task"),
    "ray": (
        *("fleets.tune", "fleets.ray_cluster", "fleets.study_actor", "fleets.worker_group", "fleets.storage_check"),
        "fleets.submission",
    ),
    "mlflow": ("tracker.*", "pyfunc_model"),
    "optuna": ("tpe",),
    "pyarrow": ("storage",),
}
# Imports that must stay inside functions: the defaults of a task's methods need torch, and `validate` reads task.
LATE: tuple[tuple[str, str], ...] = (("task", "training.*"), ("task", "torch"), ("storage", "pyarrow"))

PACKAGE = Path(__file__).resolve().parent.parent / "hpsearch"


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement's target: a module of ours ("training.data") or another's top name ("torch")."""

    module: str
    target: str
    ours: bool
    late: bool  # inside a function
    for_types: bool  # under `if TYPE_CHECKING:`; never executed
    line: int

    def __str__(self) -> str:
        return f"{self.module or 'hpsearch'} imports {self.target or 'hpsearch'} (line {self.line})"


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name within it; "" is the package itself."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(package: Path) -> list[Import]:
    """All imports of a package, those inside functions and for types included."""
    modules = modules_of(package)
    return [
        found
        for module, path in sorted(modules.items())
        for found in _imports_in(ast.parse(path.read_text()), module, path.name == "__init__.py", package.name, modules)
    ]


def _imports_in(tree: ast.AST, module: str, is_package: bool, name: str, modules: dict[str, Path]) -> Iterator[Import]:
    def ours(dotted: str) -> str:
        """The longest beginning of a dotted name that is a module of ours: `from hpsearch.job import Job` is of job."""
        while dotted and dotted not in modules:
            dotted = dotted.rpartition(".")[0]
        return dotted

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = node.module or ""
        if node.level:
            here = [name, *filter(None, module.split("."))]
            up = node.level - is_package
            base = ".".join([*here[: len(here) - up], *filter(None, [base])])
        yield from (f"{base}.{alias.name}" for alias in node.names)

    def visit(node: ast.AST, late: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for dotted in targets(node):
                top, _, rest = dotted.partition(".")
                target = ours(rest) if top == name else top
                yield Import(
                    module=module, target=target, ours=top == name, late=late, for_types=for_types, line=node.lineno
                )
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, late, True)
            for child in node.orelse:
                yield from visit(child, late, for_types)
            return
        within = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, within, for_types)

    yield from visit(tree, False, False)


def _is(module: str, pattern: str) -> bool:
    return module == pattern or (pattern.endswith(".*") and (module == pattern[:-2] or fnmatchcase(module, pattern)))


def row_of(module: str) -> int | None:
    """The module's row in the drawing; None when it is not drawn."""
    return next((row for pattern, row in ROW.items() if _is(module, pattern)), None)


def _is_late(found: Import) -> bool:
    return any(found.module == module and _is(found.target, target) for module, target in LATE)


def undrawn(package: Path) -> list[str]:
    """Modules that are not in the drawing."""
    return [module for module in sorted(modules_of(package)) if row_of(module) is None]


def upward(package: Path) -> list[str]:
    """Imports of a row above, except the late ones that the drawing allows."""

    def goes_up(found: Import) -> bool:
        here, there = row_of(found.module), row_of(found.target)
        return here is not None and there is not None and there > here

    return [
        str(found)
        for found in imports_of(package)
        if found.ours and goes_up(found) and not (_is_late(found) and (found.late or found.for_types))
    ]


def circle(package: Path) -> list[str]:
    """A circle of imports, "job -> task -> job"; [] when there is none."""
    graph: dict[str, set[str]] = {}
    for found in imports_of(package):
        if found.ours and not _is_late(found) and found.target != found.module:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        around = error.args[1][:0:-1]  # given with the imported first, and its first module twice
        start = around.index(min(around))
        around = [*around[start:], *around[:start], around[start]]
        return [" -> ".join(module or "hpsearch" for module in around)]
    return []


def foreign(package: Path) -> list[str]:
    """Imports of a large library by a module that does not own it, or early where late was promised."""
    return [
        str(found)
        for found in imports_of(package)
        if not found.ours
        and found.target in OWNERS
        and not found.for_types
        and (
            not any(_is(found.module, owner) for owner in OWNERS[found.target]) or (_is_late(found) and not found.late)
        )
    ]


def test_every_module_has_its_place_in_the_drawing() -> None:
    assert undrawn(PACKAGE) == []


def test_everything_drawn_exists() -> None:
    modules = modules_of(PACKAGE)
    assert [pattern for pattern in ROW if not any(_is(module, pattern) for module in modules)] == []


def test_no_module_imports_a_row_above() -> None:
    assert upward(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(PACKAGE) == []


def test_torch_ray_mlflow_and_optuna_are_imported_only_by_their_owners() -> None:
    assert foreign(PACKAGE) == []


PURE = [
    f"hpsearch.{module}".rstrip(".")
    for module in sorted(modules_of(PACKAGE))
    if (row_of(module) or 0) <= 2 or module in ("study", "worker", "fleets.local") or module.startswith("stages")
]

REPORT_LOADED = f"print(json.dumps(sorted(set({list(OWNERS)!r}) & set(sys.modules))), file=sys.stderr)"


def _run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_decisions_stages_study_and_local_fleet_load_none_of_the_large_libraries() -> None:
    done = _run(
        "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n" + REPORT_LOADED, *PURE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == []


@pytest.mark.parametrize("args", [("--help",), ("validate", "search_spaces/digits.yaml"), ("schema",)], ids=" ".join)
def test_command_line_answers_without_the_large_libraries(
    args: tuple[str, ...], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    program = (
        "import json, sys\nfrom hpsearch.cli import run\nsys.argv[0] = 'hpsearch'\n"
        f"code = run(sys.argv[1:])\n{REPORT_LOADED}\nsys.exit(code)"
    )
    done = _run(program, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout != ""
    assert json.loads(done.stderr.splitlines()[-1]) == []


# The checker itself, on packages with one planted fault each.


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package that keeps all the rules."""
    package = tmp_path / "hpsearch"
    for name, source in {
        "__init__": "from hpsearch.task import Task",
        "errors": "import math",
        "job": "from .errors import HpsearchError",
        "task": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
            "class Task:\n    def loss(self):\n        import torch\n        from hpsearch.training import optim\n"
        ),
        "rungs": "from hpsearch import job",
        "training/__init__": "",
        "training/optim": "import torch\nfrom hpsearch.task import Task\nfrom . import data",
        "training/data": "import torch.utils.data",
        "fleets/__init__": "",
        "fleets/tune": "from ray import tune\nfrom ..study import Study",
        "fleets/local": "",
        "study": "import hpsearch.rungs",
        "worker": "from hpsearch import study",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source)
    return package


def faults(package: Path) -> list[str]:
    return undrawn(package) + upward(package) + circle(package) + foreign(package)


def test_checker_accepts_a_package_that_keeps_the_rules(planted: Path) -> None:
    assert faults(planted) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("helpers", "", ["helpers"]),
        ("job", "from hpsearch import task\nimport os", []),
        ("training/data", "from ..study import Study", ["training.data imports study (line 1)"]),
        ("rungs", "from hpsearch.study import Study", ["rungs imports study (line 1)", "rungs -> study -> rungs"]),
        ("errors", "from . import job", ["errors imports job (line 1)", "errors -> job -> errors"]),
        ("job", "import hpsearch.rungs as r", ["job imports rungs (line 1)", "job -> rungs -> job"]),
        ("errors", "def f():\n    from hpsearch.fleets import local", ["errors imports fleets.local (line 2)"]),
        ("training/data", "from . import optim", ["training.data -> training.optim -> training.data"]),
        ("study", "from hpsearch.worker import pull", ["study -> worker -> study"]),
        ("task", "from hpsearch.training import data", ["task imports training.data (line 1)"]),
        ("task", "import torch", ["task imports torch (line 1)"]),
        ("study", "def f():\n    import torch.nn as nn", ["study imports torch (line 2)"]),
        ("study", "if True:\n    from ray.tune import Tuner", ["study imports ray (line 2)"]),
        ("fleets/local", "import ray", ["fleets.local imports ray (line 1)"]),
        ("training/data", "import optuna, os", ["training.data imports optuna (line 1)"]),
        ("rungs", "class A:\n    from mlflow import client", ["rungs imports mlflow (line 2)"]),
    ],
)
def test_checker_finds_a_planted_fault(planted: Path, module: str, source: str, expected: list[str]) -> None:
    (planted / f"{module}.py").write_text(source)
    assert faults(planted) == expected
