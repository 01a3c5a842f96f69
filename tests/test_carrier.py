"""Large results: by way of storage where there is one, and a clear word where there is none."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from hpsearch import assembly
from hpsearch.archive import Archive, blob_name
from hpsearch.blobs import digest_of
from hpsearch.carrier import Carrier
from hpsearch.errors import DamagedBlob, InStorage, StorageError
from hpsearch.events import Damaged
from hpsearch.fleets import Launch
from hpsearch.job import ExportJob, Job, Result, TrainJob
from hpsearch.journal import read_journal
from hpsearch.packing import pack
from hpsearch.restore import restore
from hpsearch.spec import Spec
from hpsearch.state import StudyState
from tests import fakes, same_study
from tests.mirrored_study import FAST, archive_in, launch, missing, run, state_in
from tests.s3_server import S3Server, s3_environment

JOB = TrainJob(key="train/0/0-1", trial=0, config={}, seed=1, from_epoch=0, to_epoch=1)
BIG, MIDDLE, SMALL = b"b" * 600, b"m" * 300, b"s" * 50


@pytest.fixture
def archive(storage: str) -> Archive:
    return Archive(storage, "s", "0" * 32)


class Gives(fakes.FakeExecutor):
    """Gives a result with these blobs, or reads one."""

    def __init__(self, blobs: dict[str, bytes], reads: str = "") -> None:
        super().__init__()
        self.blobs = blobs
        self.reads = reads
        self.read: list[bytes] = []

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            if self.reads:
                self.read.append(fetch(self.reads))
            yield Result(key=job.key, blobs=self.blobs, values={"checkpoint": "c"}, seconds=2.0)


def nothing(key: str, epoch: int) -> None:
    """Progress that nobody wants to hear of."""


def no_fetch(ref: str) -> bytes:
    raise AssertionError("nothing is fetched")


def carried(carrier: Carrier, fetch: Callable[[str], bytes] = no_fetch) -> Result:
    (result,) = carrier.run([JOB], fetch, nothing)
    return result


# Sending


def test_result_up_to_the_limit_travels_with_its_blobs(archive: Archive) -> None:
    result = carried(Carrier(Gives({"a": BIG, "b": MIDDLE}), archive, inline_bytes=900))
    assert result.blobs == {"a": BIG, "b": MIDDLE}
    assert result.stored == {}
    assert archive.blobs() == {}


def test_largest_blobs_go_to_storage_until_the_rest_may_travel(archive: Archive) -> None:
    result = carried(Carrier(Gives({"c": SMALL, "a": BIG, "b": MIDDLE}), archive, inline_bytes=349))
    assert result.blobs == {"c": SMALL}
    assert result.stored == {"a": digest_of(BIG), "b": digest_of(MIDDLE)}
    assert result.values == {"checkpoint": "c"}
    assert archive.read_blob("a", digest_of(BIG)) == BIG
    assert archive.read_blob("b", digest_of(MIDDLE)) == MIDDLE


def test_without_storage_a_large_result_is_an_error_that_names_its_size_and_the_key() -> None:
    with pytest.raises(StorageError) as caught:
        carried(Carrier(Gives({"a": b"x" * (3 << 20)}), None, inline_bytes=1 << 20))
    assert str(caught.value) == (
        "error[storage]: train/0/0-1 gave 3 MiB of files, and up to 1 MiB travel to the driver\n"
        "  hint: name a place for larger ones in space.yaml, `storage:` with s3://bucket/prefix, gs://bucket/prefix "
        "or a folder that every machine sees; then launch again with --resume"
    )


class Closed:
    """An archive's storage that is out of reach for a while."""

    def __init__(self, archive: Archive, n_failures: int) -> None:
        self._storage = archive.storage
        self.n_failures = n_failures

    def write(self, ref: str, content: bytes) -> None:
        if self.n_failures > 0:
            self.n_failures -= 1
            raise StorageError("nobody answers there")
        self._storage.write(ref, content)


def test_worker_waits_for_a_storage_that_is_out_of_reach_and_says_that_it_lives(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "storage", Closed(archive, 3))
    alive: list[str] = []
    carrier = Carrier(Gives({"a": BIG}), archive, inline_bytes=0, again_s=0.01)
    (result,) = carrier.run([JOB], no_fetch, lambda key, epoch: alive.append(key))
    assert result.stored == {"a": digest_of(BIG)}
    assert alive == [JOB.key] * 3


def test_storage_that_stays_out_of_reach_is_told(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "storage", Closed(archive, 10**9))
    with pytest.raises(StorageError, match="nobody answers"):
        carried(Carrier(Gives({"a": BIG}), archive, inline_bytes=0, again_s=0.01, outage_s=0.1))


def test_job_is_alive_while_its_result_is_on_its_way(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.carrier.SIGN_S", 0.01)
    on_its_way = threading.Event()

    class Slow(Closed):
        def write(self, ref: str, content: bytes) -> None:
            assert on_its_way.wait(30)

    monkeypatch.setattr(archive, "storage", Slow(archive, 0))
    carrier = Carrier(Gives({"a": BIG}), archive, inline_bytes=0)
    (result,) = carrier.run([JOB], no_fetch, lambda key, epoch: on_its_way.set())
    assert result.stored == {"a": digest_of(BIG)}


def test_job_is_alive_while_the_digest_of_its_result_is_computed(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.carrier.SIGN_S", 0.01)
    alive = threading.Event()

    def slow_digest(content: bytes) -> str:
        assert alive.wait(30)
        return digest_of(content)

    monkeypatch.setattr("hpsearch.carrier.digest_of", slow_digest)
    carrier = Carrier(Gives({"a": BIG}), archive, inline_bytes=0)
    (result,) = carrier.run([JOB], no_fetch, lambda key, epoch: alive.set())
    assert archive.read_blob("a", result.stored["a"]) == BIG


# Reading


def in_storage(digest: str) -> Callable[[str], bytes]:
    def fetch(ref: str) -> bytes:
        raise InStorage(ref, digest)

    return fetch


def test_blob_that_is_not_with_the_study_is_read_from_storage(archive: Archive) -> None:
    archive.storage.write(blob_name("a", digest_of(BIG)), BIG)
    executor = Gives({}, reads="a")
    carried(Carrier(executor, archive), in_storage(digest_of(BIG)))
    assert executor.read == [BIG]


def test_blob_that_is_nowhere_is_damaged(archive: Archive) -> None:
    with pytest.raises(DamagedBlob, match="neither in the run directory nor in storage"):
        carried(Carrier(Gives({}, reads="a"), archive), in_storage("00"))


def test_blob_that_was_altered_in_storage_is_damaged(archive: Archive) -> None:
    archive.storage.write(blob_name("a", digest_of(BIG)), BIG[:-1])
    with pytest.raises(DamagedBlob, match="its 599 bytes in storage are not those that were written"):
        carried(Carrier(Gives({}, reads="a"), archive), in_storage(digest_of(BIG)))


def test_executor_that_wears_out_is_heard_through_the_carrier() -> None:
    class Worn(fakes.FakeExecutor):
        def worn(self) -> str:
            return "its memory is not given back"

    assert Carrier(Worn(), None).worn() == "its memory is not given back"
    assert Carrier(fakes.FakeExecutor(), None).worn() == ""


# In a study


class LargeExecutor(fakes.FakeExecutor):
    """Checkpoints of 4 kB, which it wants back; exports that it packs."""

    fetched: ClassVar[list[str]] = []

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            refs = [job.checkpoint] if isinstance(job, TrainJob) and job.checkpoint else []
            refs += [member.checkpoint for member in getattr(job, "members", ())]
            try:
                for ref in refs:
                    assert fetch(ref).endswith(b"." * 4000)
                    self.fetched.append(ref)
            except DamagedBlob as error:
                yield Result(key=job.key, outcome="damaged", values={"ref": error.ref}, message=error.why)
                continue
            for result in super().run([job], fetch, progress):
                blobs = {
                    ref: content + b"." * 4000 if ref.startswith("checkpoints/") else content
                    for ref, content in result.blobs.items()
                }
                yield Result(**{**vars(result), "blobs": blobs})


def large_executor(spec: Spec, folder: Path) -> LargeExecutor:
    return LargeExecutor()


def large(run_dir: Path, storage: str, *overrides: str, inline_bytes: int = 3000) -> Launch:
    study = launch(run_dir, storage, *overrides, make_executor=large_executor)
    return Launch(**{**vars(study), "inline_bytes": inline_bytes})


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Mirror", FAST)


@pytest.mark.usefixtures("_fast")
def test_study_with_large_checkpoints_keeps_them_in_storage_alone(run_dir: Path, storage: str, tmp_path: Path) -> None:
    straight = run(large(tmp_path / "straight", storage, "storage=null", inline_bytes=10**9))
    LargeExecutor.fetched.clear()
    state = run(large(run_dir, storage))
    assert same_study.differences(straight, state) == []
    assert LargeExecutor.fetched
    assert list(run_dir.glob("checkpoints/*")) == []
    archive = archive_in(storage, run_dir)
    assert {name for name in archive.blobs() if "/checkpoints/" in name} == {
        blob_name(ref, digest) for ref, digest in state.digests.items() if ref.startswith("checkpoints/")
    }


@pytest.mark.usefixtures("_fast")
def test_run_directory_restored_without_its_large_checkpoints_goes_on(run_dir: Path, storage: str) -> None:
    run(large(run_dir, storage))
    archive = archive_in(storage, run_dir)
    shutil.rmtree(run_dir)
    restored = restore(archive, run_dir, local_bytes=3000)
    assert restored is not None
    assert list(run_dir.glob("checkpoints/*")) == []
    more = run(large(run_dir, storage, "search.trials=36"))
    assert more.done
    assert not any(isinstance(entry.event, Damaged) for entry in read_journal(run_dir))


@pytest.mark.usefixtures("_fast")
def test_large_checkpoint_that_is_lost_in_storage_is_made_again(run_dir: Path, storage: str) -> None:
    run(large(run_dir, storage))
    archive = archive_in(storage, run_dir)
    for name in archive.blobs():
        if "/checkpoints/" in name:
            archive.storage.delete(name)
    more = run(large(run_dir, storage, "search.trials=36"))
    assert more.done
    assert any(isinstance(entry.event, Damaged) for entry in read_journal(run_dir))
    assert missing(archive) == []


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("new", ["elsewhere", None])
def test_large_checkpoints_follow_a_study_to_another_storage(
    run_dir: Path, storage: str, tmp_path: Path, new: str | None
) -> None:
    run(large(run_dir, storage))
    place = str(tmp_path / new) if new else "null"
    if new:
        Path(place).mkdir()
    run(large(run_dir, storage, f"storage={place}"))
    shutil.rmtree(storage)
    more = run(large(run_dir, storage, f"storage={place}", "search.trials=36", inline_bytes=3000 if new else 10**9))
    assert more.done
    assert not any(isinstance(entry.event, Damaged) for entry in read_journal(run_dir))
    if new:
        assert missing(archive_in(place, run_dir)) == []
    else:
        assert list(run_dir.glob("checkpoints/*"))


@pytest.mark.usefixtures("_fast")
def test_study_whose_results_are_too_large_stops_with_a_word_and_goes_on_once_it_has_a_storage(
    run_dir: Path, storage: str
) -> None:
    with pytest.raises(StorageError, match=r"train/0/0-1 gave 3\.92 KiB of files, and up to 2\.93 KiB travel"):
        run(large(run_dir, storage, "storage=null"))
    state = StudyState.of(read_journal(run_dir))
    assert state.ended is not None
    assert state.ended.reason == "failed"
    assert state.n_epochs == 0
    state = run(large(run_dir, storage))
    assert state.done
    assert all(not trial.failed and not trial.crashes for trial in state.trials.values())


@pytest.mark.usefixtures("_fast")
def test_large_checkpoints_travel_through_s3(run_dir: Path, tmp_path: Path) -> None:
    with s3_environment():
        server = S3Server(tmp_path).start()
        try:
            server.make_bucket("studies")
            storage = server.uri("studies")
            state = run(large(run_dir, storage))
            archive = archive_in(storage, run_dir)
            assert state.done
            assert missing(archive) == []
            assert state_in(archive).digests == state.digests
        finally:
            server.stop()


class ExportingExecutor(LargeExecutor):
    """Exports that are too large to travel."""

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for result in super().run(jobs, fetch, progress):
            job = next(job for job in jobs if job.key == result.key)
            if isinstance(job, ExportJob):
                blobs = {f"exports/{member.trial}.safetensors": b"w" * 5000 for member in job.members}
                told = {
                    str(member.trial): {"onnx": None, "weights": ref, "max_difference": None, "reason": "a fake"}
                    for member, ref in zip(job.members, blobs, strict=True)
                }
                result = Result(**{**vars(result), "blobs": blobs, "values": {**result.values, "members": told}})
            yield result


@pytest.mark.usefixtures("_fast")
def test_ensemble_is_packed_from_exports_that_lie_in_storage(
    run_dir: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = launch(run_dir, storage, make_executor=lambda spec, folder: ExportingExecutor())
    state = run(Launch(**{**vars(study), "inline_bytes": 3000}))
    assert list(run_dir.glob("exports/*")) == []
    read: list[bytes] = []
    monkeypatch.setattr("hpsearch.packing.write_package", lambda folder, **more: read.extend(
        member.weights for member in more["members"]
    ))  # fmt: skip
    assert pack(run_dir, state) == run_dir / "package"
    assert read
    assert set(read) == {b"w" * 5000}
