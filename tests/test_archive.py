"""The archive: which bytes in storage are a study's journal, whoever else has written beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.archive import Archive, Driver, archive_for, archives, blob_name, segment_name
from hpsearch.errors import StorageError, UsageError

UID = "0123456789abcdef" * 2


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(str(tmp_path), "digits", UID)


def begin(archive: Archive, fence: int, start: int, parent: Driver | None = None, **more: object) -> Driver:
    driver = Driver(fence=fence, start=start, run_dir="/runs/digits", parent=parent.token if parent else "")
    driver = Driver(**{**vars(driver), **more})
    archive.claim(driver)
    return driver


def write(archive: Archive, driver: Driver, start: int, content: bytes) -> None:
    archive.storage.write(segment_name(start, driver), content)


def journal(archive: Archive) -> bytes:
    return archive.journal(archive.segments())


def test_archive_that_nobody_has_begun_holds_nothing(archive: Archive) -> None:
    assert archive.owner() is None
    assert archive.segments() == []
    assert journal(archive) == b""


def test_journal_is_its_segments_in_order(archive: Archive) -> None:
    driver = begin(archive, 1, 0)
    write(archive, driver, 0, b"one\n")
    write(archive, driver, 4, b"two\n")
    assert [(segment.start, segment.end) for segment in archive.segments()] == [(0, 4), (4, 8)]
    assert journal(archive) == b"one\ntwo\n"
    assert archive.owner() == driver


def test_driver_goes_on_from_the_one_before_it(archive: Archive) -> None:
    first = begin(archive, 1, 0)
    write(archive, first, 0, b"one\n")
    second = begin(archive, 2, 4, first)
    assert journal(archive) == b"one\n"  # it has written nothing yet
    write(archive, second, 4, b"two\n")
    begin(archive, 3, 8, second)
    assert journal(archive) == b"one\ntwo\n"


def test_what_a_driver_writes_after_another_took_over_is_not_part_of_the_study(archive: Archive) -> None:
    first = begin(archive, 1, 0)
    write(archive, first, 0, b"one\n")
    second = begin(archive, 2, 4, first)
    write(archive, first, 0, b"one\nstale\n")  # its last segment had grown
    write(archive, first, 10, b"staler\n")
    write(archive, second, 4, b"two\n")
    assert journal(archive) == b"one\ntwo\n"


def test_two_drivers_of_one_fence_do_not_mix(archive: Archive) -> None:
    first = begin(archive, 1, 0)
    write(archive, first, 0, b"one\n")
    loser, winner = begin(archive, 2, 4, first), begin(archive, 2, 4, first)
    write(archive, loser, 4, b"lost\n")
    write(archive, winner, 4, b"two\n")
    assert journal(archive) == b"one\ntwo\n"


def test_missing_segment_is_told(archive: Archive) -> None:
    driver = begin(archive, 1, 0)
    write(archive, driver, 4, b"two\n")
    with pytest.raises(StorageError) as caught:
        archive.segments()
    assert str(caught.value) == (
        f"error[storage]: the journal in {archive} is not whole: its bytes from 0 on are not there\n"
        "  hint: restore what was deleted there, or name another place in `storage`"
    )


def test_missing_end_of_an_earlier_driver_is_told(archive: Archive) -> None:
    first = begin(archive, 1, 0)
    write(archive, first, 0, b"one\n")
    begin(archive, 2, 8, first)
    with pytest.raises(StorageError, match="from 4 on"):
        archive.segments()


def test_missing_driver_is_told(archive: Archive) -> None:
    first = begin(archive, 1, 0)
    write(archive, first, 0, b"one\n")
    begin(archive, 2, 4, first)
    archive.storage.delete(f"drivers/000001-{first.token}.json")
    with pytest.raises(StorageError, match="from 4 on"):
        archive.segments()


def test_owner_that_cannot_be_read_is_told(archive: Archive) -> None:
    archive.storage.write("owner.json", b"{")
    with pytest.raises(StorageError, match=r"owner\.json is not what hpsearch writes there"):
        archive.owner()


def test_blob_is_read_by_its_reference_and_digest(archive: Archive) -> None:
    archive.storage.write(blob_name("checkpoints/a", "00"), b"x")
    assert archive.read_blob("checkpoints/a", "00") == b"x"
    assert archive.read_blob("checkpoints/a", "01") is None
    assert archive.blobs() == {"blobs/checkpoints/a~00": 1}


# Found again by name


def study(tmp_path: Path, name: str, uid: str, run_dir: str, time: float) -> Archive:
    archive = Archive(str(tmp_path), name, uid * 32)
    begin(archive, 1, 0, run_dir=run_dir, time=time)
    return archive


def test_studies_are_found_by_name(tmp_path: Path) -> None:
    study(tmp_path, "digits", "a", "/runs/a", 2.0)
    study(tmp_path, "digits", "b", "/runs/b", 1.0)
    study(tmp_path, "digits-2", "c", "/runs/c", 1.0)
    (tmp_path / ("digits-" + "d" * 32)).mkdir()  # begun by nobody
    (tmp_path / "tokens").mkdir()
    assert [archive.uid[0] for archive, _ in archives(str(tmp_path), "digits")] == ["b", "a"]


def test_only_study_of_a_name_is_the_one_wherever_it_was(tmp_path: Path) -> None:
    study(tmp_path, "digits", "a", "/home/ann/runs/digits", 1.0)
    found = archive_for(Path("/home/ben/runs/digits"), archives(str(tmp_path), "digits"))
    assert found is not None
    assert found.uid == "a" * 32
    assert archive_for(Path("/x"), []) is None


def test_of_several_the_last_at_the_run_directory_is_the_one(tmp_path: Path) -> None:
    for uid, run_dir, time in (("a", "/runs/x", 1.0), ("b", "/runs/x", 3.0), ("c", "/runs/y", 5.0)):
        study(tmp_path, "digits", uid, run_dir, time)
    found = archive_for(Path("/runs/x"), archives(str(tmp_path), "digits"))
    assert found is not None
    assert found.uid == "b" * 32


def test_none_of_several_is_guessed(tmp_path: Path) -> None:
    study(tmp_path, "digits", "a", "/runs/x", 0.0)
    study(tmp_path, "digits", "b", "/runs/y", 60.0)
    with pytest.raises(UsageError) as caught:
        archive_for(Path("/runs/z"), archives(str(tmp_path), "digits"))
    host = archives(str(tmp_path), "digits")[0][1].host
    assert str(caught.value) == (
        "error[usage]: storage holds 2 studies called 'digits', none of them last in /runs/z:\n"
        f"  {host}:/runs/x, 1970-01-01 00:00 UTC\n  {host}:/runs/y, 1970-01-01 00:01 UTC\n"
        "  hint: name the run directory of the one that you mean with --run-dir, or give the study another name"
    )
