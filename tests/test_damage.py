"""Damaged files of a study that trains for real: noticed before they are used, said, and made again to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpsearch.cli import run
from hpsearch.errors import DamagedBlob
from hpsearch.events import Damaged, Finished, Returned
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.packing import pack
from hpsearch.state import StudyState
from hpsearch.training.checkpoint import unpack
from tests.projects import in_project
from tests.test_cli import SPACE, TASK

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 4]) + bytes(8)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
}


def launch(run_dir: Path, *arguments: str) -> int:
    return run(["launch", "space.yaml", "--fleet", "local", "--skip-preflight", "--run-dir", str(run_dir), *arguments])


def state_of(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir))


def exported(run_dir: Path) -> dict[str, bytes]:
    """What the ensemble's package is made of."""
    (event,) = [result for key, result in state_of(run_dir).results.items() if key.startswith("export/")]
    return {ref: (run_dir / ref).read_bytes() for ref in event.digests}


def outcome(state: StudyState) -> object:
    assert state.selected is not None
    curves = {n: [(row.epoch, row.metrics) for row in trial.curve] for n, trial in state.trials.items()}
    return curves, state.selected.members, state.selected.scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a study that is done; the working directory holds its task and space."""
    with in_project(tmp_path_factory.mktemp("project"), task=TASK, space=SPACE) as folder:
        assert launch(Path("whole")) == 0
    return folder / "whole"


def copy_until(whole: Path, to: Path, last: Callable[[object], bool]) -> None:
    """The study as it was when an event had been recorded; later files are there too, and nobody knows of them."""
    shutil.copytree(whole, to)
    entries = read_journal(whole)
    n_lines = 1 + next(i for i, entry in enumerate(entries) if last(entry.event))
    lines = (whole / FILE_NAME).read_bytes().splitlines(keepends=True)
    (to / FILE_NAME).write_bytes(b"".join(lines[:n_lines]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_damaged_in_a_finished_search_are_rebuilt_to_the_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    monkeypatch.chdir(whole.parent)
    run_dir = tmp_path / "hurt"
    copy_until(whole, run_dir, lambda event: getattr(event, "stage", "") == "search" and event.type == "stage-ended")
    hurt = [str(trial.best_checkpoint) for trial in state_of(run_dir).ranking()[:3]]
    before = {ref: (run_dir / ref).read_bytes() for ref in hurt}
    for ref in hurt:
        DAMAGES[damage](run_dir / ref)
    assert launch(run_dir, "--resume") == 0
    again = state_of(run_dir)
    assert outcome(again) == outcome(state_of(whole))
    assert exported(run_dir) == exported(whole)
    events = [entry.event for entry in read_journal(run_dir)]
    assert [event.ref for event in events if isinstance(event, Damaged)] == hurt
    assert not any(isinstance(event, Finished) and event.outcome in ("crashed", "damaged") for event in events)
    assert sum(isinstance(event, Returned) and event.reason.endswith("is damaged") for event in events) == len(hurt)
    told = capsys.readouterr().err
    assert all(told.count(f"warning[damaged]: {ref}: ") == 1 for ref in hurt)
    for ref in hurt:
        old, new = unpack(before[ref], ref=ref), unpack((run_dir / ref).read_bytes(), ref=ref)
        assert old.weights.keys() == new.weights.keys()
        assert all(bool((old.weights[name] == new.weights[name]).all()) for name in old.weights)


def test_last_checkpoints_damaged_in_mid_study_change_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    run_dir = tmp_path / "hurt"
    promoted = [
        entry.event
        for entry in read_journal(whole)
        if isinstance(entry.event, Finished) and entry.event.trial is not None
    ]
    fifth = promoted[4].key
    copy_until(whole, run_dir, lambda event: isinstance(event, Finished) and event.key == fifth)
    for ref in state_of(run_dir).owners:
        path = run_dir / ref  # some were deleted later, which is damage too
        DAMAGES["flipped"](path) if path.exists() else None
    assert launch(run_dir, "--resume") == 0
    assert outcome(state_of(run_dir)) == outcome(state_of(whole))
    assert exported(run_dir) == exported(whole)


def test_damaged_export_is_no_package_and_is_exported_again_on_resume(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    run_dir = tmp_path / "hurt"
    shutil.copytree(whole, run_dir)
    ref = next(iter(exported(run_dir)))
    DAMAGES["flipped"](run_dir / ref)
    with pytest.raises(DamagedBlob, match=f"{ref} is damaged"):
        pack(run_dir, state_of(run_dir))
    assert launch(run_dir, "--resume") == 0
    assert exported(run_dir) == exported(whole)
    assert pack(run_dir, state_of(run_dir)) is not None
