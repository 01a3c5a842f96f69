"""The --tracking-uri that a launch leaves for the verbs after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.cli.tracking_uri import remembered_uri, to_remember
from hpsearch.errors import UsageError
from hpsearch.events import Opened
from hpsearch.state import StudyState


def launched(uri: str | None) -> StudyState:
    state = StudyState()
    noted = {} if uri is None else to_remember(uri)
    state.apply(Opened(study="s", uid="u", spec={}, spec_text="", environment=noted, code={}), 0.0)
    return state


def test_address_without_credentials_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert remembered_uri(launched("http://127.0.0.1:5000")) == "http://127.0.0.1:5000"
    assert remembered_uri(launched("sqlite:///a.db")) == f"sqlite:///{tmp_path}/a.db"
    assert remembered_uri(launched(None)) is None


@pytest.mark.parametrize("uri", ["https://ann:s3cret@host/x", "https://host/x?token=s3cret"])
def test_credentials_are_not_kept_and_the_address_is_asked_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = launched(uri)
    assert state.opened is not None
    assert "s3cret" not in str(state.opened.environment)
    with pytest.raises(UsageError, match=r"at https://host/x.*credentials are not kept") as caught:
        remembered_uri(state)
    assert caught.value.hint == "give the address again: --tracking-uri"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert remembered_uri(state) is None
