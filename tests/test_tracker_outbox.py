"""What MLflow acknowledged survives crashes, and addresses are shown without their credentials."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.errors import TrackerError
from hpsearch.tracker.outbox import FILE_NAME, Outbox, absolute, redact, scrub

URI = "http://127.0.0.1:5000"


def test_acknowledgements_are_there_after_a_restart(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, URI)
    outbox.adopt("study", "r0")
    outbox.acknowledge("trial/17", "complete@27", run_id="r17", more={"version": "1"})
    outbox.close()
    again = Outbox(tmp_path, URI)
    assert again.revisions == {"trial/17": "complete@27"}
    assert again.runs == {"study": "r0", "trial/17": "r17"}
    assert again.more("trial/17") == {"version": "1"}
    again.close()


def test_half_written_last_line_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, URI)
    outbox.acknowledge("trial/1", "a", run_id="r1")
    outbox.acknowledge("trial/2", "a", run_id="r2")
    outbox.close()
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second + 1, len(whole) - 1):  # after any byte of the second line
        file.write_bytes(whole[:cut])
        outbox = Outbox(tmp_path, URI)
        assert dict(outbox.runs) == {"trial/1": "r1"}
        outbox.acknowledge("trial/3", "a", run_id="r3")
        outbox.close()
        outbox = Outbox(tmp_path, URI)
        assert dict(outbox.runs) == {"trial/1": "r1", "trial/3": "r3"}
        outbox.close()


def test_two_servers_are_kept_apart(tmp_path: Path) -> None:
    first = Outbox(tmp_path, URI)
    first.acknowledge("study", "1", run_id="here")
    first.close()
    second = Outbox(tmp_path, "http://elsewhere:5000")
    assert second.runs == {}
    second.close()


def test_forgotten_server_starts_afresh(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, URI)
    outbox.acknowledge("study", "1", run_id="old")
    outbox.forget()
    outbox.close()
    again = Outbox(tmp_path, URI)
    assert (again.runs, again.revisions) == ({}, {})
    again.close()


def test_second_process_is_told_that_the_first_is_sending(tmp_path: Path) -> None:
    first = Outbox(tmp_path, URI)
    with pytest.raises(TrackerError, match="another process is sending"):
        Outbox(tmp_path, URI)
    first.close()
    Outbox(tmp_path, URI).close()


def test_credentials_are_never_written(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "https://ann:s3cret@mlflow.example.org/?token=t0ken")
    outbox.acknowledge("study", "1", run_id="r")
    outbox.close()
    written = (tmp_path / FILE_NAME).read_text()
    assert "mlflow.example.org" in written
    assert "s3cret" not in written
    assert "t0ken" not in written
    assert "ann" not in written


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://ann:s3cret@host/path", "https://host/path"),
        ("https://ann:s3/cr@et@host:8080/path", "https://host:8080/path"),
        ("https://host/a?access_token=abc&x=1", "https://host/a?access_token=***&x=1"),
        ("https://ann:s3cret@host?api_key=k", "https://host?api_key=***"),
        ("postgresql://u:p@db.example.org:5432/mlflow", "postgresql://db.example.org:5432/mlflow"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("databricks", "databricks"),
        ("", ""),
    ],
)
def test_redacted_address_names_the_place_and_no_credentials(uri: str, shown: str) -> None:
    assert redact(uri) == shown


@given(
    st.text(alphabet="abcXYZ019!$%^*()_+-=/:@.", min_size=8, max_size=20),
    st.sampled_from(["/", "/a/b", "", "/p?x=1", "?token=qqqqqqqq"]),
)
def test_no_password_survives_redaction(password: str, tail: str) -> None:
    uri = f"https://user:{password}@host.example:5000{tail}"
    assert redact(uri).startswith("https://host.example:5000")
    assert password not in redact(uri)
    assert "qqqqqqqq" not in redact(uri)
    assert redact(redact(uri)) == redact(uri)


def test_messages_of_others_lose_the_credentials_too() -> None:
    uri = "https://ann:s3cret@host/?token=t0ken"
    message = f"request to {uri} failed: ann with s3cret and t0ken at https://bob:pw@other/"
    scrubbed = scrub(message, uri)
    assert "s3cret" not in scrubbed
    assert "t0ken" not in scrubbed
    assert "bob:pw" not in scrubbed


def test_relative_sqlite_address_means_one_file(tmp_path: Path) -> None:
    assert absolute("sqlite:///mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute("sqlite:////data/mlflow.db", tmp_path) == "sqlite:////data/mlflow.db"
    assert absolute("http://host/x", tmp_path) == "http://host/x"
