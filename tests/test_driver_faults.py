"""What happens to a launch as users run it, a process of its own: killed, interrupted, left without its cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.cli.adapters import make_executor, make_sampler
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.journal import is_locked, read_journal
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from tests.processes import process_groups
from tests.test_cli import SPACE, TASK

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# So slow that something can be done to it in the middle.
MODEL = "def model(self, config):"
SLOW_TASK = TASK.replace(MODEL, f"{MODEL}\n        import time; time.sleep(0.2)")
SLOWER_TASK = TASK.replace(MODEL, f"{MODEL}\n        import time; time.sleep(0.7)")
N_TRIALS = 16
N_TRIALS_OF_A_MINUTE = 200  # with the slower task


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(SLOW_TASK)
    (tmp_path / "space.yaml").write_text(SPACE.replace("trials: 8", f"trials: {N_TRIALS}"))
    return tmp_path


@pytest.fixture
def launched(project: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `hpsearch launch space.yaml …` in a process group of its own, as a shell does."""
    command = [sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--workers", "2"]
    with process_groups() as start:
        yield lambda *arguments: start([*command, *arguments], cwd=project)


def state_of(project: Path) -> StudyState:
    return StudyState.of(read_journal(project / "runs" / "blobs"))


def wait_until_trained(project: Path, n_epochs: int, process: subprocess.Popen[str]) -> None:
    journal = project / "runs" / "blobs" / "journal.jsonl"
    deadline = time.monotonic() + 150
    while not journal.exists() or state_of(project).n_epochs < n_epochs:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """Exit code and stderr."""
    _, err = process.communicate(timeout=within_s)
    return process.returncode, err


def assert_kept(before: StudyState, after: StudyState) -> None:
    for number, trial in before.trials.items():
        assert after.trials[number].config == trial.config
        assert after.trials[number].seed == trial.seed
        assert after.trials[number].curve[: len(trial.curve)] == trial.curve
    assert after.ranges[: len(before.ranges)] == before.ranges


@pytest.mark.timeout(900)
def test_launch_that_is_killed_again_and_again_ends_as_one_that_never_was(
    project: Path, launched: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    before = StudyState()
    for n_epochs in (2, 8, 14):  # in the range of epochs that one session is sure to get through
        process = launched("--resume")
        wait_until_trained(project, n_epochs, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        state = state_of(project)
        assert not state.done
        assert_kept(before, state)
        before = state
    code, err = ended(launched("--resume"), within_s=200)
    assert code == 0, err
    after = state_of(project)
    assert after.done
    assert len(after.trials) == N_TRIALS
    assert_kept(before, after)

    # What a study that nobody killed finds, on one worker in this process.
    undisturbed = Launch(
        run_dir=tmp_path / "undisturbed",
        spec=parse_spec((project / "space.yaml").read_text()),
        folder=project,
        make_sampler=make_sampler,
        make_executor=make_executor,
    )
    (project / "task.py").write_text(TASK)
    LocalFleet(undisturbed).run(lambda entries: None)
    reference = StudyState.of(read_journal(undisturbed.run_dir))
    assert after.ranges == reference.ranges
    for number, trial in after.trials.items():
        assert trial.config == reference.trials[number].config
        for row, known in zip(trial.curve, reference.trials[number].curve, strict=False):
            assert row.metrics == known.metrics


@pytest.mark.timeout(900)
def test_launch_can_be_interrupted_in_every_way_and_goes_on(
    project: Path, launched: Callable[..., subprocess.Popen[str]]
) -> None:
    def once(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)

    def twice(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)

    def notice(process: subprocess.Popen[str]) -> None:
        process.terminate()

    def notice_to_all(process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGTERM)

    before = StudyState()
    for interrupt in (once, twice, notice_to_all, notice):
        process = launched("--resume")
        wait_until_trained(project, before.n_epochs + 2, process)
        interrupt(process)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert out == ""
        assert re.search(r"Go on: \S*hpsearch launch space\.yaml", err)
        assert "--resume" in err
        assert "Traceback" not in err
        assert "raylet" not in err
        if interrupt is once:  # it has taken the time that it needs
            assert not is_locked(project / "runs" / "blobs")
        wait_until_unlocked(project)
        state = state_of(project)
        if interrupt is once:
            assert state.ended is not None
            assert state.ended.reason == "interrupted"
        assert_kept(before, state)
        before = state


def wait_until_unlocked(project: Path) -> None:
    deadline = time.monotonic() + 30
    while is_locked(project / "runs" / "blobs"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_launch_whose_cluster_loses_its_head_ends_with_4_and_goes_on_with_another(
    project: Path, launched: Callable[..., subprocess.Popen[str]]
) -> None:
    (project / "task.py").write_text(SLOWER_TASK)
    endless = ("--set", f"search.trials={N_TRIALS_OF_A_MINUTE}")
    cluster = head()
    try:
        process = launched("--address", cluster.address, *endless)
        wait_until_trained(project, 3, process)
        for name in ("gcs_server", "raylet"):
            for held in cluster.head_node.all_processes[name]:
                held.process.kill()
        code, err = ended(process, within_s=55)  # Ray itself would end it after 60, without a word of ours
        assert code == 4, err
        assert "hint: hpsearch launch --resume goes on from here" in err
        assert "Traceback" not in err
        wait_until_unlocked(project)
        before = state_of(project)
    finally:
        cluster.shutdown()
    cluster = head()
    try:
        process = launched("--address", cluster.address, *endless, "--resume")
        wait_until_trained(project, before.n_epochs + 3, process)
        os.killpg(process.pid, signal.SIGINT)
        code, err = ended(process, within_s=30)
    finally:
        cluster.shutdown()
    assert code == 130, err
    assert_kept(before, state_of(project))


def head() -> Any:
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
