"""A disk that is full, for the journal and for checkpoints: a real one of a few KiB under a whole launch."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpsearch.cli import run
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.state import StudyState
from tests.projects import in_project
from tests.test_cli import SPACE, TASK

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of this size over a folder; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def launch(run_dir: Path, *arguments: str) -> int:
    """A whole launch; its exit code."""
    return run(["launch", "space.yaml", "--fleet", "local", "--skip-preflight", "--run-dir", str(run_dir), *arguments])


def outcome(run_dir: Path) -> object:
    state = StudyState.of(read_journal(run_dir))
    assert state.done
    curves = {
        n: (trial.config, trial.seed, [(row.epoch, row.metrics) for row in trial.curve], trial.state)
        for n, trial in state.trials.items()
    }
    return curves, state.selected


@pytest.fixture(scope="module", autouse=True)
def _project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with in_project(tmp_path_factory.mktemp("project"), task=TASK, space=SPACE):
        yield


@pytest.fixture(scope="module")
def uncut(_project: None) -> object:
    """What a launch gives that has all the room it wants."""
    assert launch(Path("uncut")) == 0
    return outcome(Path("uncut"))


def test_disk_that_is_full_of_checkpoints_ends_the_launch_and_resume_goes_on(
    uncut: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    with small_disk(checkpoints, "24k"):
        assert launch(run_dir) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert (
            f"error[journal]: {run_dir} cannot be written: No space left on device\n"
            "  hint: make room, then hpsearch launch --resume\n"
        ) in told.err
        assert "Traceback" not in told.err
        assert not [*checkpoints.glob("*.part")]
        assert StudyState.of(read_journal(run_dir)).trials
        make_room(checkpoints)
        assert launch(run_dir, "--resume") == 0
        assert "warning[damaged]" not in capsys.readouterr().err
        assert outcome(run_dir) == uncut


def test_disk_that_is_full_for_the_journal_ends_the_launch_and_resume_goes_on(
    uncut: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, small = tmp_path / "run", tmp_path / "small"
    run_dir.mkdir()
    with small_disk(small, "20k"):
        (small / FILE_NAME).touch()
        (run_dir / FILE_NAME).symlink_to(small / FILE_NAME)
        assert launch(run_dir) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert (
            f"error[journal]: the journal {run_dir / FILE_NAME} cannot be written: No space left on device\n"
            "  hint: make room, then hpsearch launch --resume\n"
        ) in told.err
        assert "Traceback" not in told.err
        before = StudyState.of(read_journal(run_dir))
        assert before.data is not None
        make_room(small)
        assert launch(run_dir, "--resume") == 0
        after = StudyState.of(read_journal(run_dir))
        for number, trial in before.trials.items():
            assert after.trials[number].curve[: len(trial.curve)] == trial.curve
        assert outcome(run_dir) == uncut


def test_budget_that_holds_two_checkpoints_is_said_and_kept_and_the_ensemble_still_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert launch(run_dir, "--set", "budget.disk=7KiB", "--set", "ensemble.size=3") == 0
    told = capsys.readouterr()
    assert "warning[disk]: no room for checkpoints/" in told.err
    assert "hint: a larger budget.disk, then launch --resume, goes on with it" in told.err
    assert "(ended by budget.disk: 7 KiB, which holds no more checkpoints)" in told.err
    assert sum(path.stat().st_size for path in (run_dir / "checkpoints").iterdir()) <= 7 * 1024
    state = StudyState.of(read_journal(run_dir))
    assert state.done
    assert state.selected is not None
