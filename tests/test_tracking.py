"""What a launch keeps in its run directory beside the journal."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from hpsearch.cli import tracking
from hpsearch.cli.tracking import Keepsakes, Tracking
from hpsearch.errors import DamagedBlob
from hpsearch.events import Finished
from hpsearch.state import StudyState
from hpsearch.tracker import SyncReport
from tests.tasks import blobs
from tests.tracked_study import whole_study, with_batch


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Topics in the order in which they were drawn."""
    topics: list[str] = []

    def draw(topic: str, state: StudyState, arrays: object) -> dict[str, bytes]:
        topics.append(topic)
        return {f"{topic}.png": b"%d baselines" % sum(key.startswith("baseline/") for key in state.results)}

    monkeypatch.setattr(tracking, "figures", draw)
    monkeypatch.setattr(tracking, "pack", lambda *_: None)
    return topics


def with_baseline() -> StudyState:
    values = {"metrics": {"val": {"loss": 2.3}}}
    return whole_study().add(Finished(key="baseline/constant", worker="w", outcome="done", values=values)).state()


def test_figures_that_mlflow_got_are_not_drawn_once_more_at_the_end(tmp_path: Path, drawn: list[str]) -> None:
    keepsakes = Keepsakes(tmp_path)
    keepsakes.draw("search", whole_study().state())
    keepsakes.complete(whole_study().state())
    assert sorted(drawn) == ["ensemble", "lr-range", "search"]


def test_figures_are_drawn_again_at_the_end_where_a_baseline_came_after_them(tmp_path: Path, drawn: list[str]) -> None:
    keepsakes = Keepsakes(tmp_path)
    keepsakes.draw("search", whole_study().state())
    assert (tmp_path / "plots/search.png").read_bytes() == b"0 baselines"
    keepsakes.complete(with_baseline())
    assert drawn.count("search") == 2
    assert (tmp_path / "plots/search.png").read_bytes() == b"1 baselines"


@pytest.mark.parametrize("error", [DamagedBlob("preflight/batch.safetensors", "it is gone"), KeyError("BF16")])
def test_figure_that_cannot_be_made_is_told_and_keeps_no_other_from_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def draw(topic: str, state: StudyState, arrays: object) -> dict[str, bytes]:
        if topic == "batch":
            raise error
        return {f"{topic}.png": b"png"}

    monkeypatch.setattr(tracking, "figures", draw)
    packed: list[object] = []
    monkeypatch.setattr(tracking, "pack", lambda *given: packed.append(given))
    Keepsakes(tmp_path).complete(with_batch().state())
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "ensemble.png",
        "lr-range.png",
        "search.png",
    ]
    assert capsys.readouterr().err.startswith("warning[run-dir]: ")
    assert len(packed) == 1


class Recorded:
    """In place of the thread that tells MLflow."""

    def __init__(self, *given: object, **named: object) -> None:
        self.said: list[str] = []

    def start(self) -> None:
        self.said.append("start")

    def close(self, timeout_s: float) -> SyncReport:
        self.said.append(f"close within {timeout_s:g} s")
        return SyncReport(tracking_uri="")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tracking, list[str]]:
    monkeypatch.setattr(tracking, "TrackerThread", Recorded)
    launch = SimpleNamespace(run_dir=tmp_path)
    made = Tracking(launch, "sqlite:///" + str(tmp_path / "mlflow.db"))  # type: ignore[arg-type]
    return made, made._thread.said  # type: ignore[attr-defined]


def test_mlflow_is_told_when_the_time_has_come_and_once(told: tuple[Tracking, list[str]]) -> None:
    made, said = told
    made.start(after_s=0.05)
    made.start()
    assert said == []
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    made.close(StudyState(), timeout_s=5.0)
    assert said == ["start", "close within 5 s"]


def test_study_that_ends_before_that_is_told_at_its_end(told: tuple[Tracking, list[str]]) -> None:
    made, said = told
    made.start(after_s=60.0)
    made.close(StudyState(), timeout_s=5.0)
    assert said == ["close within 30 s"]  # MLflow is to be imported yet


def test_timer_that_comes_too_late_begins_nothing(told: tuple[Tracking, list[str]]) -> None:
    made, said = told
    made.close(StudyState(), timeout_s=5.0)
    made._go()
    assert said == ["close within 30 s"]


SPACE = """
name: quiet
task: task.py:Blobs
preflight: {enabled: false}
search: {trials: 2}
parameters:
  lr: {distribution: log_uniform, min: 1e-3, max: 1e-1}
early_stopping: {min_epochs: 1, max_epochs: 2}
ensemble: {pool: 2, size: 1}
"""


BEFORE = """
from hpsearch.tracker import tracker
tracking.Tracking.start.__defaults__ = (2.0,)
tracker._step_back = lambda: None  # beside other tests it would not get far
"""
MODEL = """
def model(self, config):
    if "lr" in config:  # of a trial
        self.act()
    return torch.nn.Linear(4, 3)
"""


def local_launch(folder: Path, methods: str, before: str = "") -> None:
    (folder / "task.py").write_text(blobs(MODEL + dedent(methods), imports="import pathlib, sys, time"))
    (folder / "space.yaml").write_text(SPACE)
    words = ["launch", "space.yaml", "--fleet", "local", "--tracking-uri", "sqlite:///mlflow.db"]
    code = f"import sys\nfrom hpsearch.cli import run, tracking\n{before}\nsys.exit(run({words}))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
def test_mlflow_is_told_while_the_search_runs_and_not_imported_while_workers_begin(tmp_path: Path) -> None:
    note = """
    def act(self):
        if '"finished"' not in pathlib.Path("runs/quiet/journal.jsonl").read_text():
            return  # the worker has only begun
        with open("imported", "a") as file:
            print(sorted({"mlflow", "matplotlib"} & set(sys.modules)), file=file)
        deadline = time.monotonic() + 60
        while not pathlib.Path("mlflow.db").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        pathlib.Path("told").write_text(str(pathlib.Path("mlflow.db").exists()))
    """
    local_launch(tmp_path, note, BEFORE)
    assert (tmp_path / "imported").read_text().splitlines()[0] == "[]"
    assert (tmp_path / "told").read_text() == "True"


def test_workers_have_seconds_to_begin_in(told: tuple[Tracking, list[str]]) -> None:
    made, _ = told
    made.start()
    assert made._timer is not None
    assert made._timer.interval >= 5
    made.close(StudyState())
