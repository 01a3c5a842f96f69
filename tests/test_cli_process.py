"""The command line as users run it: a process of its own, Ray's workers, MLflow on SQLite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import SPACE, TASK

pytestmark = pytest.mark.ray


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def test_launch_prints_one_object_and_nothing_else_to_stdout(project: Path) -> None:
    command = [sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--workers", "2", "--json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    assert out.count("\n") == 1
    told = json.loads(out)
    assert told["trials"]["total"] == 8
    assert told["mlflow"]["alias"] == "champion"
    assert "Traceback" not in err
