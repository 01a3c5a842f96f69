"""The command line as users run it: a process of its own, Ray's workers, MLflow on SQLite, a Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpsearch.journal import is_locked, read_journal
from hpsearch.state import StudyState
from tests.test_cli import SPACE, TASK

pytestmark = pytest.mark.ray


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """`hpsearch launch space.yaml …` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--workers", "2", *arguments],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_launch_prints_one_object_and_nothing_else_to_stdout(project: Path) -> None:
    process = start(project, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("\n") == 1
    told = json.loads(out)
    assert told["trials"]["total"] == 8
    assert told["mlflow"]["alias"] == "champion"
    assert "Traceback" not in err


def test_ctrl_c_keeps_the_study_and_resume_ends_it(project: Path) -> None:
    slow = "def model(self, config):\n        import time; time.sleep(0.3)"  # so that Ctrl-C comes in the search
    (project / "task.py").write_text(TASK.replace("def model(self, config):", slow))
    process = start(project, "--set", "search.trials=40")
    run_dir = project / "runs" / "blobs"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run_dir / "journal.jsonl").exists() and len(StudyState.of(read_journal(run_dir)).trials) > 4:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "--resume" in err
    assert "Traceback" not in err
    assert not is_locked(run_dir)
    before = StudyState.of(read_journal(run_dir))
    assert before.ended is not None
    assert before.ended.reason == "interrupted"
    resumed = start(project, "--set", "search.trials=40", "--resume", "--json")
    out, err = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, err
    assert json.loads(out)["trials"]["total"] == 40
    after = StudyState.of(read_journal(run_dir))
    for number, trial in before.trials.items():
        assert after.trials[number].config == trial.config
        assert after.trials[number].curve[: len(trial.curve)] == trial.curve
