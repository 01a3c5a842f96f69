"""The MLflow that a study was launched with by --tracking-uri, kept in its journal, so that later verbs find it again.

Credentials are never kept: of an address that holds some, the rest is, to say which one has to be given again.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpsearch.errors import UsageError
from hpsearch.state import StudyState

KEY = "tracking_uri"  # in the environment that a launch notes
WITHHELD = "tracking_uri_credentials"


def to_remember(uri: str) -> dict[str, object]:
    """What a launch notes of its --tracking-uri: whole, whatever the working directory will be, without credentials."""
    from hpsearch.tracker.outbox import absolute, redact

    whole = absolute(uri, Path.cwd())
    kept = redact(whole)
    return {KEY: kept} if kept == whole else {KEY: kept, WITHHELD: "not kept"}


def remembered_uri(state: StudyState) -> str | None:
    """The --tracking-uri of the last launch; None where there was none, or where MLFLOW_TRACKING_URI stands in for one
    that held credentials.

    Raises:
        UsageError: it held credentials, and nothing stands in for it.
    """
    noted = state.opened.environment if state.opened is not None else {}
    uri = noted.get(KEY)
    if not isinstance(uri, str) or not uri:
        return None
    if WITHHELD not in noted:
        return uri
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    raise UsageError(
        f"this study was launched with MLflow at {uri}, and its credentials are not kept",
        hint="give the address again: --tracking-uri",
    )
