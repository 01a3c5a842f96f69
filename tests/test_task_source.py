"""Finding the task's class without running anything of the user's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpsearch.errors import SpecError
from hpsearch.spec import find_task, parse_spec, read_spec

TRAP = "raise SystemExit('the file was run')\n"
TASK = "import hpsearch\n\n\nclass Digits(hpsearch.Task):\n    pass\n"


def found(folder: Path, task: str) -> list[str]:
    """Problems of a space.yaml beside which `folder`'s files lie, with the folder's own path left out."""
    space = folder / "space.yaml"
    space.write_text(f"name: digits\ntask: {task}\nparameters: {{depth: {{min: 1, max: 3}}}}\n")
    problems = find_task(parse_spec(space.read_bytes()), space)
    return [str(problem).replace(f"{folder}/", "") for problem in problems]


def test_class_is_found_and_nothing_is_run(tmp_path: Path) -> None:
    (tmp_path / "digits_task.py").write_text(TRAP + TASK)
    assert found(tmp_path, "digits_task.py:Digits") == []
    assert read_spec(tmp_path / "space.yaml").task_file(tmp_path / "space.yaml") == tmp_path / "digits_task.py"


def test_missing_file_is_told_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "digits_task.py").write_text(TASK)
    assert found(tmp_path, "digit_task.py:Digits") == [
        "error[task-file]: space.yaml:2:7: the task's file `digit_task.py` is not there\n"
        "  hint: did you mean digits_task.py?"
    ]
    assert found(tmp_path, "sub/x.py:Digits") == [
        "error[task-file]: space.yaml:2:7: the task's file `sub/x.py` is not there\n"
        "  hint: it is looked for at sub/x.py"
    ]


def test_missing_class_is_told_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(TASK)
    assert found(tmp_path, "t.py:Digit") == [
        "error[task-class]: space.yaml:2:7: `t.py` has no class `Digit`\n  hint: did you mean Digits?"
    ]
    assert found(tmp_path, "t.py:Letters") == [
        "error[task-class]: space.yaml:2:7: `t.py` has no class `Letters`\n  hint: classes there: Digits"
    ]
    (tmp_path / "empty.py").write_text("")
    assert found(tmp_path, "empty.py:Letters") == [
        "error[task-class]: space.yaml:2:7: `empty.py` has no class `Letters`\n  hint: classes there: none"
    ]


def test_what_is_no_task_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("def Digits():\n    pass\n\nclass Plain:\n    pass\n")
    assert found(tmp_path, "t.py:Digits") == [
        "error[task-class]: space.yaml:2:7: `Digits` in `t.py` is a function, and a task is a class\n"
        "  hint: write class Digits(hpsearch.Task)"
    ]
    assert found(tmp_path, "t.py:Plain") == [
        "error[task-class]: space.yaml:2:7: `Plain` in `t.py` is not a hpsearch.Task\n"
        "  hint: write class Plain(hpsearch.Task)"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "if True:\n    class Digits(Base): pass\n",
        "try:\n    from there import Digits\nexcept ImportError:\n    Digits = None\n",
        "Digits = make_task()\n",
        "Other, Digits = make_tasks()\n",
        "from there import *\n",
        "from there import X as Digits\n",
    ],
)
def test_a_class_that_is_bound_in_another_way_is_given_the_benefit_of_the_doubt(tmp_path: Path, source: str) -> None:
    (tmp_path / "t.py").write_text(source)
    assert found(tmp_path, "t.py:Digits") == []


def test_syntax_error_is_told_with_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("import hpsearch\n\nclass Digits(hpsearch.Task)\n    pass\n")
    assert found(tmp_path, "t.py:Digits") == [
        "error[task-syntax]: t.py:3:28: the task's file is not valid Python: expected ':'"
    ]


@pytest.mark.parametrize("source", [b"\x00", b"\xff\xfe", b"# coding: nothing\n", b"(" * 500, b"x = " + b"-" * 100_000])
def test_bytes_that_are_no_python_are_a_problem_and_no_traceback(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "t.py").write_bytes(source)
    (problem,) = found(tmp_path, "t.py:Digits")
    assert problem.startswith("error[task-syntax]: t.py")


def test_warnings_of_the_users_file_stay_with_it(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(TASK + "PATTERN = '\\d'\n")  # with -W error a SyntaxWarning would raise
    assert found(tmp_path, "t.py:Digits") == []


def test_module_beside_the_file_or_installed_is_found_without_importing_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, installed = tmp_path / "beside", tmp_path / "installed"
    for folder, package in ((beside, "near_tasks"), (installed, "far_tasks")):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(TRAP)
        (folder / package / "digits.py").write_text(TRAP + TASK)
    monkeypatch.syspath_prepend(str(installed))
    assert found(beside, "near_tasks.digits:Digits") == []
    assert found(beside, "far_tasks.digits:Digits") == []
    assert found(beside, "near_tasks:Digits")[0].startswith("error[task-class]")
    assert found(beside, "far_tasks.digits:Digit")[0].endswith("did you mean Digits?")
    assert "far_tasks" not in sys.modules


@pytest.mark.parametrize("module", ["no_such_module", "json.no_such", "json.decoder.deeper", "sys.x"])
def test_missing_module_is_told(tmp_path: Path, module: str) -> None:
    assert found(tmp_path, f"{module}:Digits") == [
        f"error[task-file]: space.yaml:2:7: the task's module `{module}` is neither beside space.yaml nor installed\n"
        "  hint: for a file beside it write file.py:Class"
    ]


def test_compiled_module_cannot_be_read_and_is_left_to_the_run(tmp_path: Path) -> None:
    assert found(tmp_path, "math:Digits") == []


def test_read_spec_tells_of_the_task_and_of_the_rest_at_once(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("name: digits\nseed: x\ntask: gone.py:Digits\nparameters: {a: {value: 1}}\n")
    with pytest.raises(SpecError) as caught:
        read_spec(space)
    assert [(p.code, p.where) for p in caught.value.problems] == [
        ("type", f"{space}:2:7"),
        ("task-file", f"{space}:3:7"),
    ]
    with pytest.raises(SpecError) as caught:
        read_spec(space, ["task=away.py:Digits", "seed=1"])
    assert [(p.code, p.where) for p in caught.value.problems] == [("task-file", "--set task")]
