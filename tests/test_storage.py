"""Storage: what is written is there whole, what goes wrong is said in words, and no URI holds a secret."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpsearch.errors import SpecError, StorageError
from hpsearch.spec import Spec, parse_spec
from hpsearch.storage import Place, Storage, read_uri
from tests.s3_server import CREDENTIALS, S3Server, s3_environment, s3_server

SPACE = "name: s\ntask: t.py:T\nparameters: {lr: {value: 1}}\n"
SECRETS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS for gs://) on "
    "every node, or give the machines a role"
)


def spec(uri: str) -> Spec:
    return parse_spec(SPACE + f"storage: {uri}\n")


# What may be written in space.yaml


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/mnt/studies", Place(kind="folder", root="/mnt/studies")),
        ("file:///mnt/my%20studies/", Place(kind="folder", root="/mnt/my studies")),
        ("s3://bucket", Place(kind="s3", root="bucket")),
        ("s3://bucket/a//b/?region=eu-central-1", Place(kind="s3", root="bucket/a/b", region="eu-central-1")),
        (
            "s3://bucket/a?endpoint_override=http%3A%2F%2Fminio%3A9000",
            Place(kind="s3", root="bucket/a", endpoint="minio:9000", scheme="http"),
        ),
        (
            "gs://bucket/a?endpoint_override=localhost:1&scheme=http",
            Place(kind="gs", root="bucket/a", endpoint="localhost:1", scheme="http"),
        ),
    ],
)
def test_uri_names_a_place(uri: str, place: Place) -> None:
    assert read_uri(uri) == place
    assert spec(uri).storage == uri


def test_study_without_storage_has_none() -> None:
    assert parse_spec(SPACE).storage is None


@pytest.mark.parametrize(
    ("uri", "what", "hint"),
    [
        ("runs/x", "is s3://bucket/prefix, gs://bucket/prefix, file:///folder, or an absolute path",
         "a path that is not absolute would be another place on another machine"),
        ("abfs://a/b", "is s3://bucket/prefix, gs://bucket/prefix, file:///folder, or an absolute path",
         "abfs:// is none of these"),
        ("s3:///x", "names no bucket after s3://", "such as s3://bucket/prefix"),
        ("file://host/x", "names a host after file://", "a local folder has three slashes: file:///mnt/x"),
        ("/mnt/../etc", "has `..` in its path", "write the folder's own path"),
        ("s3://bucket/x?color=red", "has options after its `?` that are not known: color",
         "it takes endpoint_override, region, scheme"),
        ("s3://bucket/x?scheme=ftp", "has a scheme other than http and https",
         "scheme=http is for a server of your own"),
    ],
)  # fmt: skip
def test_uri_that_names_no_place_is_refused(uri: str, what: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(uri)
    assert [str(problem) for problem in caught.value.problems] == [
        f"error[storage]: space.yaml:4:10: `storage` {what}\n  hint: {hint}"
    ]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hunter2@bucket/x",
        "s3://bucket/x?secret_key=hunter2",
        "s3://bucket/x?access_key=a&secret_key=hunter2&region=r",
        "s3://bucket/x?endpoint_override=http://ann:hunter2@minio:9000",
        "gs://hunter2@bucket/x",
    ],
)
def test_uri_with_a_secret_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(uri)
    assert "hunter2" not in str(caught.value)
    assert "credentials" in str(caught.value)
    assert caught.value.problems[0].hint == SECRETS_HINT


# A folder and a bucket alike


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3"), bucket="bucket") as running:
        yield running


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage(str(tmp_path), "study")
    server: S3Server = request.getfixturevalue("server")
    return Storage(server.uri("bucket", tmp_path.name), "study")


def test_what_was_written_is_read_back(storage: Storage) -> None:
    storage.write("blobs/a b+c=1~x", b"one")
    storage.write("blobs/a b+c=1~x", b"another")
    assert storage.read("blobs/a b+c=1~x") == b"another"
    assert storage.size("blobs/a b+c=1~x") == 7
    assert storage.exists("blobs/a b+c=1~x")
    assert not storage.exists("blobs")


def test_large_content_is_read_back(storage: Storage) -> None:
    content = os.urandom(24 << 20)  # several parts of an upload
    storage.write("large", content)
    assert storage.read("large") == content


def test_contents_are_all_below_a_folder_and_folders_what_is_directly_below(storage: Storage) -> None:
    for name in ("journal/0", "blobs/checkpoints/a", "blobs/b", "owner"):
        storage.write(name, name.encode())
    assert storage.contents("blobs") == {"blobs/checkpoints/a": 19, "blobs/b": 7}
    assert storage.contents() == {"journal/0": 9, "blobs/checkpoints/a": 19, "blobs/b": 7, "owner": 5}
    assert storage.folders() == ["blobs", "journal"]
    assert storage.contents("nothing") == {}


def test_what_is_not_there_is_gone_and_can_be_deleted(storage: Storage) -> None:
    storage.write("a", b"x")
    storage.delete("a")
    storage.delete("a")
    with pytest.raises(StorageError, match=r"a cannot be read from .*: it is not there") as caught:
        storage.read("a")
    assert caught.value.gone
    assert storage.size("a") is None


def test_name_that_leads_out_is_a_slip(storage: Storage) -> None:
    with pytest.raises(ValueError, match="a path below it"):
        storage.read("../other/a")


# What goes wrong


def test_folder_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "unmounted"))
    with pytest.raises(StorageError) as caught:
        storage.write("a", b"x")
    assert str(caught.value) == (
        f"error[storage]: a cannot be written to {tmp_path}/unmounted: that folder is not there\n"
        "  hint: mount it on every machine, or make it"
    )
    assert caught.value.exit_code == 4
    assert not (tmp_path / "unmounted").exists()


def test_write_to_a_folder_that_is_cut_short_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write("a", b"new")
    assert storage.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_missing_bucket_is_named(server: S3Server) -> None:
    with pytest.raises(StorageError) as caught:
        Storage(server.uri("no-such-bucket")).write("a", b"x")
    assert str(caught.value) == (
        "error[storage]: a cannot be written to s3://no-such-bucket/studies: the bucket no-such-bucket is not there\n"
        "  hint: make it, or mend its name in `storage`"
    )


def test_server_that_cannot_be_reached_is_told_within_seconds(server: S3Server) -> None:
    storage = Storage(server.uri("bucket"))
    server.cut()
    try:
        began = time.monotonic()
        with pytest.raises(StorageError, match="nobody answers there") as caught:
            storage.write("a", b"x")
        assert time.monotonic() - began < 30
        assert not caught.value.gone
    finally:
        server.mend()
    storage.write("a", b"x")


def test_server_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.storage.SILENCE_S", 1.0)
    monkeypatch.setattr("hpsearch.storage.ATTEMPTS", 1)
    with socket.socket() as mute, s3_environment():
        mute.bind(("127.0.0.1", 0))
        mute.listen(64)
        storage = Storage(f"s3://bucket/x?endpoint_override=127.0.0.1:{mute.getsockname()[1]}&scheme=http")
        with pytest.raises(StorageError, match="nobody answers there"):
            storage.write("a", b"x")


def test_refused_credentials_are_told_without_them(tmp_path: Path) -> None:
    with s3_environment():
        server = S3Server(tmp_path).start(check_credentials_after=0)
        try:
            with pytest.raises(StorageError) as caught:
                Storage(server.uri("bucket")).write("a", b"x")
        finally:
            server.stop()
    assert str(caught.value) == (
        "error[storage]: a cannot be written to s3://bucket/studies: the credentials are refused\n"
        f"  hint: {SECRETS_HINT}"
    )
    assert not any(secret in str(caught.value) for secret in CREDENTIALS.values())


def test_what_a_cloud_says_is_passed_on_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_environment():
        secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]

        def refuse(place: Place) -> None:
            raise OSError(f"AWS Error SLOW_DOWN during PutObject: {secret} is asked too often (Request ID: 12ab34)")

        monkeypatch.setattr("hpsearch.storage._connect", refuse)
        with pytest.raises(StorageError) as caught:
            Storage("s3://bucket/x?region=r").write("a", b"x")
    assert str(caught.value) == (
        "error[storage]: a cannot be written to s3://bucket/x: "
        "AWS Error SLOW_DOWN during PutObject: *** is asked too often"
    )
