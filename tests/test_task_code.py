"""The files of a task, found by reading."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from hpsearch.task_code import task_code

TRAP = "raise SystemExit('the file was run')\n"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def test_hash_is_the_files_sha256_and_nothing_is_run(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": TRAP})
    assert task_code("task.py:Digits", tmp_path) == {"task.py": hashlib.sha256(TRAP.encode()).hexdigest()}


def test_neighbours_that_are_imported_belong_to_the_task_and_others_do_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "task.py": "import os, torch, hpsearch\nimport nets.deep as deep\nfrom data import load\n"
            "def f():\n    if f:\n        from lazy import x\n",
            "nets/__init__.py": "from . import wide\n",
            "nets/deep.py": "from ..nets import blocks\nfrom .parts.norm import Norm\n",
            "nets/wide.py": "",
            "nets/blocks.py": "",
            "nets/unused.py": "",
            "nets/parts/norm.py": "import task\n",  # a circle
            "data.py": "from os import path\nfrom data import path\n",
            "lazy.py": "",
            "unused.py": "",
        },
    )
    assert list(task_code("task.py:Digits", tmp_path)) == [
        "data.py", "lazy.py", "nets/__init__.py", "nets/blocks.py", "nets/deep.py", "nets/parts/norm.py",
        "nets/wide.py", "task.py",
    ]  # fmt: skip


def test_file_in_a_subfolder_finds_its_own_neighbours(tmp_path: Path) -> None:
    write(tmp_path, {"tasks/digits.py": "import nets", "tasks/nets.py": "", "nets.py": ""})
    assert list(task_code("tasks/digits.py:Digits", tmp_path)) == ["tasks/digits.py", "tasks/nets.py"]


def test_hpsearch_itself_is_no_part_of_a_task_that_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": "import hpsearch", "hpsearch/__init__.py": ""})
    assert list(task_code("task.py:Digits", tmp_path)) == ["task.py"]


def test_package_beside_the_space_brings_what_lies_beside_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "tasks/__init__.py": TRAP,
            "tasks/digits.py": TRAP + "from . import nets\nimport common\n",
            "tasks/nets.py": "",
            "tasks/other.py": "",
            "common.py": "",
        },
    )
    expected = ["common.py", "tasks/__init__.py", "tasks/digits.py", "tasks/nets.py"]
    assert list(task_code("tasks.digits:Digits", tmp_path)) == expected


def test_installed_package_is_followed_within_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "folder"
    folder.mkdir()
    write(
        installed,
        {
            "far_tasks_pkg/__init__.py": TRAP,
            "far_tasks_pkg/digits.py": "from far_tasks_pkg import nets\nimport far_library\n",
            "far_tasks_pkg/nets.py": "",
            "far_library.py": "",
        },
    )
    monkeypatch.syspath_prepend(str(installed))
    assert list(task_code("far_tasks_pkg.digits:Digits", folder)) == [
        "far_tasks_pkg/__init__.py", "far_tasks_pkg/digits.py", "far_tasks_pkg/nets.py",
    ]  # fmt: skip
    assert "far_tasks_pkg" not in sys.modules


@pytest.mark.parametrize("source", ["def (", "\x00", "(" * 500])
def test_file_that_is_no_python_is_hashed_and_not_followed(tmp_path: Path, source: str) -> None:
    write(tmp_path, {"task.py": "import broken\n", "broken.py": source + "\nimport other", "other.py": ""})
    assert list(task_code("task.py:Digits", tmp_path)) == ["broken.py", "task.py"]


@pytest.mark.parametrize("task", ["gone.py:Digits", "no_such_module:Digits", "math:Digits"])
def test_task_that_cannot_be_read_has_no_code(tmp_path: Path, task: str) -> None:
    assert task_code(task, tmp_path) == {}


def test_warnings_of_the_users_file_stay_with_it(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": "PATTERN = '\\d'\n"})
    assert list(task_code("task.py:Digits", tmp_path)) == ["task.py"]
