"""What a launch keeps in its run directory beside the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.cli import tracking
from hpsearch.cli.tracking import Keepsakes
from hpsearch.errors import DamagedBlob
from hpsearch.events import Finished
from hpsearch.state import StudyState
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


def test_figure_that_cannot_be_made_is_told_and_keeps_no_other_from_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(topic: str, state: StudyState, arrays: object) -> dict[str, bytes]:
        if topic == "batch":
            raise DamagedBlob("preflight/batch.safetensors", "it is gone")
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
