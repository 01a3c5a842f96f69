"""A launch's folder on a machine: there while a process uses it, and gone after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpsearch.fleets import node_folder
from hpsearch.fleets.node_folder import launch_folder, sweep

HOLDER = (
    "import sys, tempfile, time\n"
    "tempfile.tempdir = sys.argv[1]\n"
    "from hpsearch.fleets.node_folder import launch_folder\n"
    "folder = launch_folder(sys.argv[2])\n"
    "(folder / 'data').write_text('x')\n"
    "print(folder, flush=True)\n"
    "time.sleep(120)\n"
)


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(node_folder, "_held", [])


def holder(tmp_path: Path, launch: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that uses a launch's folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), launch]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_workers_of_a_launch_get_one_folder_for_themselves_alone(tmp_path: Path) -> None:
    folder = launch_folder("study-1")
    assert folder is not None
    assert folder == launch_folder("study-1")
    assert folder.parent == tmp_path / f"hpsearch-{os.getuid()}"
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_a_folder_lives_as_long_as_its_processes_however_they_end(tmp_path: Path) -> None:
    process, folder = holder(tmp_path, "study-1")
    try:
        sweep()
        assert (folder / "data").exists()
        other = launch_folder("study-2")  # the next launch looks around, too
        assert other is not None
        assert (folder / "data").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    sweep(keep="study-2", wait_s=10.0)
    assert not folder.exists()
    assert other.exists()


def test_the_next_launch_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    process, folder = holder(tmp_path, "study-1")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert folder.exists()
    launch_folder("study-2")
    assert not folder.exists()


def test_a_place_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / f"hpsearch-{os.getuid()}"
    root.mkdir()
    root.chmod(0o777)
    assert launch_folder("study-1") is None


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"hpsearch-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert launch_folder("study-1") is None
