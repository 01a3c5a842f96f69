"""The mirror: storage has what a lost disk takes with it, and the search does not wait for it."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from hpsearch import assembly
from hpsearch.archive import Archive, blob_name
from hpsearch.errors import HpsearchError, StorageError
from hpsearch.events import StorageBehind, StorageCaughtUp
from hpsearch.job import ExportJob, Job
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.notes import add_note
from hpsearch.restore import restore
from hpsearch.state import StudyState
from hpsearch.storage import Storage
from tests import same_study
from tests.mirrored_study import FAST, SlowExecutor, archive_in, launch, missing, run, state_in
from tests.s3_server import S3Server, s3_server


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Mirror", FAST)


def slow(job_s: float, before_job: Callable[[Job], None] = lambda job: None) -> Callable[..., SlowExecutor]:
    return lambda spec, folder: SlowExecutor(job_s, before_job)


def raw(run_dir: Path) -> bytes:
    return (run_dir / FILE_NAME).read_bytes()


def mirrored(archive: Archive) -> bytes:
    return archive.journal(archive.segments())


def wait_until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it has not come true in time"
        time.sleep(0.01)


# What is there


def test_storage_has_journal_and_blobs_of_a_study_that_is_done(run_dir: Path, storage: str) -> None:
    state = run(launch(run_dir, storage))
    archive = archive_in(storage, run_dir)
    assert state.done
    assert mirrored(archive) == raw(run_dir)
    assert set(archive.blobs()) == {blob_name(ref, digest) for ref, digest in state.digests.items()}
    for ref, digest in state.digests.items():
        assert archive.read_blob(ref, digest) == (run_dir / ref).read_bytes()


def test_storage_names_no_blob_that_is_not_there_at_any_moment(run_dir: Path, storage: str) -> None:
    """Looked at between jobs: what the journal in storage says is there, is."""
    found: list[list[str]] = []
    n_entries: set[int] = set()

    def look(job: Job) -> None:
        with contextlib.suppress(StorageError):  # a segment grows, a blob is deleted: seen in the middle of a pass
            archive = archive_in(storage, run_dir)
            before = state_in(archive)
            there = archive.blobs()
            if before.n_entries == state_in(archive).n_entries:
                n_entries.add(before.n_entries)
                found.append([r for r, d in before.digests.items() if blob_name(r, d) not in there])

    run(launch(run_dir, storage, make_executor=slow(0.01, look)))
    assert len(n_entries) > 5
    assert [refs for refs in found if refs] == []


def test_checkpoints_that_the_study_drops_are_deleted_in_storage(run_dir: Path, storage: str) -> None:
    most: set[str] = set()

    def look(job: Job) -> None:
        most.update(archive_in(storage, run_dir).blobs())

    state = run(launch(run_dir, storage, make_executor=slow(0.02, look)))
    left = set(archive_in(storage, run_dir).blobs())
    assert left == {blob_name(ref, digest) for ref, digest in state.digests.items()}
    assert most - left


def test_journal_grows_in_few_objects(run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.mirror.SEGMENT_BYTES", 8 << 10)
    run(launch(run_dir, storage, make_executor=slow(0.02)))
    archive = archive_in(storage, run_dir)
    assert 2 <= len(archive.segments()) <= len(raw(run_dir)) / (8 << 10) + 1
    assert mirrored(archive) == raw(run_dir)


def test_notes_are_mirrored_too(run_dir: Path, storage: str) -> None:
    study = launch(run_dir, storage)
    run(study)
    add_note(run_dir, "batch norm was the culprit")
    run(study)
    shutil.rmtree(run_dir)
    restore(archive_in(storage, run_dir), run_dir)
    assert "culprit" in (run_dir / "notes.jsonl").read_text()


def test_study_without_storage_asks_nothing_of_it(run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Mirror", None)
    assert run(launch(run_dir, storage, "storage=null")).done


# A lost disk


def results(state: StudyState) -> Mapping[int, object]:
    return {number: (trial.config, trial.seed, trial.curve, trial.state) for number, trial in state.trials.items()}


def test_study_whose_run_directory_is_lost_comes_to_the_same_end(run_dir: Path, storage: str, tmp_path: Path) -> None:
    straight = run(launch(tmp_path / "straight", storage, "storage=null"))
    study = launch(run_dir, storage, make_executor=slow(0.005, _stop_at("train/20/0-1")))
    with pytest.raises(KeyboardInterrupt):
        run(study)
    shutil.rmtree(run_dir)
    restored = restore(archive_in(storage, run_dir), run_dir)
    assert restored is not None
    assert len(restored.state.trials) >= 20
    resumed = run(launch(run_dir, storage))
    assert resumed.uid == study.uid
    assert same_study.differences(straight, resumed) == []
    assert same_study.twice(read_journal(run_dir)) == []


def _stop_at(key: str) -> Callable[[Job], None]:
    def stop(job: Job) -> None:
        if job.key == key:
            raise KeyboardInterrupt

    return stop


@pytest.mark.slow
def test_driver_killed_at_random_moments_with_its_disk_loses_at_most_the_last_seconds(
    run_dir: Path, storage: str, tmp_path: Path
) -> None:
    moments = random.Random(0)
    command = [sys.executable, "-m", "tests.mirrored_study", str(run_dir), storage, "0.01"]
    seen: dict[int, same_study.Glance] = {}
    for _ in range(4):
        log = (tmp_path / "log").open("wb")
        with log, subprocess.Popen(command, stdout=log, stderr=log) as driver:
            first = _n_entries(storage, run_dir)
            with contextlib.suppress(subprocess.TimeoutExpired):
                wait_until(lambda a=first, d=driver: _n_entries(storage, run_dir) > a or d.poll() is not None, 60.0)  # type: ignore[misc]
                driver.wait(moments.uniform(0.0, 0.6))
            driver.kill()
        archive = archive_in(storage, run_dir)
        assert missing(archive) == []
        now = same_study.glance(state_in(archive))
        assert same_study.lost(seen, now) == []
        seen = now
        shutil.rmtree(run_dir)
        assert restore(archive, run_dir) is not None
    end = run(launch(run_dir, storage))
    assert same_study.lost(seen, same_study.glance(end)) == []
    assert same_study.twice(read_journal(run_dir)) == []
    straight = run(launch(tmp_path / "straight", storage, "storage=null"))
    assert same_study.differences(straight, end) == []


def _n_entries(storage: str, run_dir: Path) -> int:
    try:
        return state_in(archive_in(storage, run_dir)).n_entries
    except (AssertionError, HpsearchError):
        return 0


# Outages


def test_outage_is_told_once_and_made_good(run_dir: Path, storage: str) -> None:
    """The folder goes away in the middle, and comes back."""
    hidden = Path(storage).with_name("hidden")

    def weather(job: Job) -> None:
        if job.key == "train/4/0-1":
            Path(storage).rename(hidden)
        if job.key == "train/12/0-1":
            wait_until(lambda: "storage-behind" in (run_dir / FILE_NAME).read_text())
            hidden.rename(storage)
            wait_until(lambda: _n_entries(storage, run_dir) > 40)

    state = run(launch(run_dir, storage, make_executor=slow(0.01, weather)))
    told = [e.event for e in read_journal(run_dir) if isinstance(e.event, StorageBehind | StorageCaughtUp)]
    assert [event.type for event in told] == ["storage-behind", "storage-caught-up"]
    assert isinstance(told[0], StorageBehind)
    assert told[0].reason.endswith("that folder is not there")
    assert told[0].n_entries >= 1
    assert state.done
    assert mirrored(archive_in(storage, run_dir)) == raw(run_dir)


def test_what_storage_has_not_got_at_the_end_is_told_and_sent_by_the_next_launch(
    run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.study.DRAIN_S", 0.3)
    hidden = Path(storage).with_name("hidden")

    def weather(job: Job) -> None:
        if isinstance(job, ExportJob) and Path(storage).exists():
            Path(storage).rename(hidden)

    study = launch(run_dir, storage, make_executor=slow(0.0, weather))
    state = run(study)
    assert state.done
    last = read_journal(run_dir)[-1].event
    assert isinstance(last, StorageBehind)
    assert last.n_entries >= 1
    hidden.rename(storage)
    run(study)
    assert mirrored(archive_in(storage, run_dir)) == raw(run_dir)


class Swamp(Storage):
    """Takes what it is given in its own time."""

    write_s = 0.0

    def write(self, ref: str, content: bytes) -> None:
        time.sleep(self.write_s)
        super().write(ref, content)


def test_search_does_not_wait_for_a_slow_storage_and_being_behind_is_told(
    run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.archive.Storage", Swamp)
    monkeypatch.setattr(assembly, "Mirror", lambda *args, **more: FAST(*args, **more, late_s=0.2))
    monkeypatch.setattr("hpsearch.study.DRAIN_S", 0.0)
    asked: list[float] = []

    def note(job: Job) -> None:
        monkeypatch.setattr(Swamp, "write_s", 0.4)
        asked.append(time.monotonic())

    run(launch(run_dir, storage, make_executor=slow(0.06, note)))
    assert max(later - earlier for earlier, later in itertools.pairwise(asked)) < 0.4 * 8  # blobs go eight at a time
    behind = [e.event for e in read_journal(run_dir) if isinstance(e.event, StorageBehind)]
    assert behind
    assert "more slowly than they come" in behind[0].reason


def test_mirror_that_was_given_up_has_nothing_to_say(
    run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is in the middle of a slow write when the study closes, and finds that it is late afterwards."""
    begun, ended = threading.Event(), threading.Event()

    class Stuck(Storage):
        def write(self, ref: str, content: bytes) -> None:
            if threading.current_thread().name.startswith("mirror") and not begun.is_set() and stuck:
                begun.set()
                ended.wait(10.0)
                raise StorageError("it is gone")
            super().write(ref, content)

    stuck: list[bool] = []
    monkeypatch.setattr("hpsearch.archive.Storage", Stuck)
    monkeypatch.setattr("hpsearch.study.DRAIN_S", 0.0)
    monkeypatch.setattr("hpsearch.study.HURRIED_DRAIN_S", 0.0)
    study = launch(run_dir, storage).open_study(background=False)
    thread = next(thread for thread in threading.enumerate() if thread.name == "mirror")
    stuck.append(True)
    study.arriving("w", "", 1)
    assert begun.wait(10.0)
    study.close()
    before = raw(run_dir)
    ended.set()
    thread.join(10.0)
    assert not thread.is_alive()
    assert raw(run_dir) == before


def test_study_that_is_restarted_under_its_workers_does_not_wait_for_storage(run_dir: Path, storage: str) -> None:
    """A result on its way has its large checkpoint there already, though no event names it yet."""
    study = launch(run_dir, storage)
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/9/0-1"))))
    archive = archive_in(storage, run_dir)
    archive.storage.write(blob_name("checkpoints/on-its-way", "00"), b"x")
    hidden = Path(storage).with_name("hidden")
    Path(storage).rename(hidden)
    restarted = study.open_study(background=True, inherit_leases=True)
    try:
        wait_until(lambda: "storage-behind" in (run_dir / FILE_NAME).read_text())
        hidden.rename(storage)
        wait_until(lambda: "storage-caught-up" in (run_dir / FILE_NAME).read_text())
        assert archive.read_blob("checkpoints/on-its-way", "00") == b"x"
    finally:
        restarted.close()
    assert raw(run_dir).startswith(mirrored(archive))
    run(study)
    assert archive.read_blob("checkpoints/on-its-way", "00") is None


# Two drivers


def test_run_directory_that_is_behind_storage_is_refused(run_dir: Path, storage: str, tmp_path: Path) -> None:
    """Another machine went on with the study; this one's old directory must not."""
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/9/0-1"))))
    other = tmp_path / "other"
    restore(archive_in(storage, run_dir), other)
    run(launch(other, storage))
    before = raw(run_dir)
    archive = archive_in(storage, other)
    with pytest.raises(StorageError) as caught:
        run(launch(run_dir, storage))
    assert str(caught.value) == (
        f"error[storage]: {archive} holds more of this study than {run_dir} does: it was written last from "
        f"{archive.owner()}\n"
        "  hint: another launch went on with it: go on there; or with --resume and a new --run-dir, which is filled "
        "from storage; or name another place in `storage` for what is here"
    )
    assert raw(run_dir) == before
    assert mirrored(archive) == raw(other)


def test_run_directory_with_another_course_of_the_study_is_refused(run_dir: Path, storage: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/9/0-1"))))
    other = tmp_path / "other"
    restore(archive_in(storage, run_dir), other)
    with pytest.raises(KeyboardInterrupt):
        run(launch(other, storage, make_executor=slow(0.0, _stop_at("train/12/0-1"))))
    run(launch(run_dir, storage, "storage=null"))  # it went on by itself, and further
    with pytest.raises(StorageError, match="holds another course of this study than"):
        run(launch(run_dir, storage))


def test_driver_stops_when_another_has_taken_the_study_over(run_dir: Path, storage: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    done = threading.Event()

    def take_over(job: Job) -> None:
        if job.key == "train/9/0-1":
            wait_until(lambda: mirrored(archive_in(storage, run_dir)) == raw(run_dir))
            restore(archive_in(storage, run_dir), other)
            run(launch(other, storage))
            done.set()

    study = launch(run_dir, storage, make_executor=slow(0.05, take_over))
    with pytest.raises(StorageError, match="another launch has taken this study over") as caught:
        run(study)
    assert done.is_set()
    assert str(other) in str(caught.value)
    assert mirrored(archive_in(storage, other)) == raw(other)
    assert StudyState.of(read_journal(other)).done


# Other places


def test_other_storage_gets_everything_anew(run_dir: Path, storage: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/9/0-1"))))
    (tmp_path / "new").mkdir()
    new = str(tmp_path / "new")
    before = mirrored(archive_in(storage, run_dir))
    state = run(launch(run_dir, new))
    archive = archive_in(new, run_dir)
    assert mirrored(archive) == raw(run_dir)
    assert set(archive.blobs()) == {blob_name(ref, digest) for ref, digest in state.digests.items()}
    assert mirrored(archive_in(storage, run_dir)) == before


def test_storage_may_be_named_after_the_study_began_and_given_up(run_dir: Path, storage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, "storage=null", make_executor=slow(0.0, _stop_at("train/9/0-1"))))
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/12/0-1"))))
    archive = archive_in(storage, run_dir)
    assert raw(run_dir).startswith(mirrored(archive))
    assert len(state_in(archive).trials) >= 12
    assert run(launch(run_dir, storage, "storage=null")).done


def test_storage_that_is_not_there_is_told_before_anything_is_trained(run_dir: Path, tmp_path: Path) -> None:
    executor = SlowExecutor(0.0)
    with pytest.raises(StorageError, match="that folder is not there"):
        run(launch(run_dir, str(tmp_path / "nowhere"), make_executor=lambda spec, folder: executor))
    assert executor.ran == []


# A damaged file of the run directory


def test_damaged_checkpoint_is_not_mirrored_over_a_good_one(run_dir: Path, storage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/20/0-1"))))
    state = StudyState.of(read_journal(run_dir))
    best = state.best()
    assert best is not None
    assert best.best_checkpoint is not None
    ref = best.best_checkpoint
    (run_dir / ref).write_bytes(b"noise")
    archive = archive_in(storage, run_dir)
    assert archive.read_blob(ref, state.digests[ref]) not in (None, b"noise")
    shutil.rmtree(Path(storage) / f"mirrored-{state.uid}" / "blobs")
    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.0, _stop_at("train/21/0-1"))))
    assert archive.read_blob(ref, state.digests[ref]) is None


# A real object store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_study_mirrored_to_s3_survives_an_outage_and_the_loss_of_the_heads_disk(
    run_dir: Path, tmp_path: Path, server: S3Server
) -> None:
    storage = server.uri("studies", tmp_path.name)
    straight = run(launch(tmp_path / "straight", storage, "storage=null"))

    def weather(job: Job) -> None:
        if job.key == "train/4/0-1":
            server.cut()
        if job.key == "train/8/0-1":
            wait_until(lambda: "storage-behind" in (run_dir / FILE_NAME).read_text())
            server.mend()
            wait_until(lambda: "storage-caught-up" in (run_dir / FILE_NAME).read_text())
        if job.key == "train/16/0-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(launch(run_dir, storage, make_executor=slow(0.01, weather)))
    archive = archive_in(storage, run_dir)
    assert missing(archive) == []
    shutil.rmtree(run_dir)
    restored = restore(archive, run_dir)
    assert restored is not None
    assert len(restored.state.trials) >= 16
    state = run(launch(run_dir, storage))
    assert same_study.differences(straight, state) == []
    assert mirrored(archive) == raw(run_dir)


@pytest.mark.parametrize(("bucket", "message"), [("no-such-bucket", "the bucket no-such-bucket is not there")])
def test_study_whose_bucket_is_not_there_is_refused(run_dir: Path, server: S3Server, bucket: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        run(launch(run_dir, server.uri(bucket)))
    assert caught.value.exit_code == 4
