"""A lost run directory, as a person meets it: the same command fills it again and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpsearch import assembly
from hpsearch.cli.refill import refill
from hpsearch.errors import StorageError, UsageError
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.restore import restore
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from tests.mirrored_study import FAST, SPACE, archive_in, launch, run


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Mirror", FAST)


def ask(run_dir: Path, storage: str, *, resume: bool = True) -> None:
    refill(run_dir, parse_spec(SPACE + f"storage: {storage}\n"), resume=resume, again="hpsearch launch … --resume")


def test_lost_run_directory_is_filled_and_that_is_said(
    run_dir: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    shutil.rmtree(run_dir)
    ask(run_dir, storage)
    after = StudyState.of(read_journal(run_dir))
    assert after == before
    for ref in after.digests:
        assert (run_dir / ref).exists()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{run_dir} holds no study; restored from {archive} as it stood at 20")
    assert first.endswith(f"last written from {archive.owner()}")
    assert f"with {len(after.digests)} files" in first
    assert second.startswith("27 trials: ")


def test_run_directory_that_holds_a_study_is_left_alone(run_dir: Path, storage: str) -> None:
    run(launch(run_dir, storage))
    before = (run_dir / FILE_NAME).read_bytes()
    ask(run_dir, storage, resume=False)
    ask(run_dir, storage)
    assert (run_dir / FILE_NAME).read_bytes() == before


def test_nothing_in_storage_is_a_study_that_begins(
    run_dir: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(run_dir, storage)
    ask(run_dir, storage, resume=False)
    assert not run_dir.exists()
    assert capsys.readouterr().err == ""


def test_study_that_storage_holds_of_this_run_directory_is_not_begun_over(run_dir: Path, storage: str) -> None:
    run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    shutil.rmtree(run_dir)
    with pytest.raises(UsageError) as caught:
        ask(run_dir, storage, resume=False)
    assert str(caught.value) == (
        f"error[usage]: {archive} holds the study of {run_dir} already\n"
        "  hint: to restore it and go on: hpsearch launch … --resume; for a new one choose another --run-dir"
    )
    ask(run_dir.with_name("second"), storage, resume=False)


def test_restoring_that_was_interrupted_begins_again(run_dir: Path, storage: str) -> None:
    before = run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    (run_dir / "checkpoints").mkdir()
    (run_dir / next(iter(before.digests))).parent.mkdir(exist_ok=True)
    (run_dir / next(iter(before.digests))).write_bytes(b"half")
    assert restore(archive, run_dir) is not None
    assert run(launch(run_dir, storage)).done


def test_restoring_never_overwrites_a_journal(run_dir: Path, storage: str) -> None:
    """Two launches had the same thought."""
    run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    before = (run_dir / FILE_NAME).read_bytes()
    with pytest.raises(UsageError, match="in use by another launch"):
        restore(archive, run_dir)
    assert (run_dir / FILE_NAME).read_bytes() == before
    assert sorted(path.name for path in run_dir.glob("*.part")) == []


def test_blob_that_was_altered_in_storage_is_not_restored(run_dir: Path, storage: str) -> None:
    state = run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    name = next(name for name in archive.blobs() if "/checkpoints/" in name)
    archive.storage.write(name, b"noise")
    shutil.rmtree(run_dir)
    restored = restore(archive, run_dir)
    assert restored is not None
    there = [ref for ref in state.digests if (run_dir / ref).exists()]
    assert len(there) == len(state.digests) - 1


def test_journal_that_is_torn_in_storage_is_told_and_nothing_is_made(run_dir: Path, storage: str) -> None:
    run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    shutil.rmtree(run_dir)
    for name in archive.storage.contents("journal"):
        archive.storage.delete(name)
    (archive_segment,) = [archive.owner()]
    assert archive_segment is not None
    archive.storage.write(f"journal/{9:012d}-{1:06d}-{archive_segment.token}", b"x\n")
    with pytest.raises(StorageError, match="is not whole"):
        ask(run_dir, storage)
    assert not (run_dir / FILE_NAME).exists()
