"""What MLflow has acknowledged, one line each, in the run directory.

Not a second copy of the study: what is to be sent is computed from the journal, and a line here only says "MLflow has
this revision of this key, in that run". It is kept apart for each tracking server, told by a digest of its address, so
one study can be synced to two. Losing the file, or its last lines, costs a question to the server at the next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO
from urllib.parse import parse_qsl, urlencode, urlsplit

from hpsearch.errors import TrackerError

FILE_NAME = "outbox.jsonl"
LOCK_NAME = "outbox.lock"


def redact(uri: str) -> str:
    """The address without its credentials: fit to be shown, logged and stored.

    >>> redact("https://ann:s3cret@mlflow.example.org/x?token=abc&workspace=a")
    'https://mlflow.example.org/x?token=***&workspace=a'
    >>> redact("sqlite:////data/mlflow.db")
    'sqlite:////data/mlflow.db'
    """
    scheme, sep, rest = uri.partition("://")
    if not sep:
        return uri
    authority, slash, tail = _split_authority(rest)
    authority = authority.rpartition("@")[2]
    path, question, query = tail.partition("?")
    query = query.partition("#")[0]
    if question:
        pairs = [(k, "***" if _SECRET.search(k) else v) for k, v in parse_qsl(query, keep_blank_values=True)]
        path += "?" + urlencode(pairs, safe="*")
    return f"{scheme}://{authority}{slash}{path}"


_SECRET = re.compile(r"token|key|secret|pass|pwd|auth|sig|cred|user", re.IGNORECASE)


def _split_authority(rest: str) -> tuple[str, str, str]:
    """user:password@host, "/" and what follows. A password may itself hold a slash: the last @ before ? counts."""
    before_query = re.split(r"[?#]", rest, maxsplit=1)[0]
    at = before_query.rfind("@")
    end = rest.find("/", at + 1 if at >= 0 else 0)
    question = rest.find("?")
    if question >= 0 and (end < 0 or question < end):
        return rest[:question], "", rest[question:]
    return (rest, "", "") if end < 0 else (rest[:end], "/", rest[end + 1 :])


def scrub(text: str, uri: str) -> str:
    """A message of someone else's, without the address's credentials."""
    text = text.replace(uri, redact(uri))
    try:
        parts = urlsplit(uri)
        secrets = [parts.password, parts.username, *(v for k, v in parse_qsl(parts.query) if _SECRET.search(k))]
    except ValueError:
        secrets = []
    for secret in secrets:
        if secret and len(secret) > 2:
            text = text.replace(secret, "***")
    return re.sub(r"(\w+://)[^\s/@'\"]+@", r"\1", text)


def absolute(uri: str, folder: Path) -> str:
    """A SQLite address with its path made absolute, since the same words in another folder mean another file."""
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/") and uri != prefix + ":memory:":
        return prefix + str(folder / uri.removeprefix(prefix))
    if "://" not in uri and uri:
        return str(folder / uri)
    return uri


class Outbox:
    """Acknowledgements for one tracking server."""

    def __init__(self, run_dir: Path, uri: str) -> None:
        """
        Raises:
            TrackerError: another process is sending this study, or the directory cannot be written.
        """
        self.uri = redact(uri)
        self._server = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        self._writing = threading.Lock()
        self._revisions: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        self._more: dict[str, dict[str, str]] = {}
        try:
            self._lock = (run_dir / LOCK_NAME).open("ab")
        except OSError as error:
            raise TrackerError(f"{run_dir} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise TrackerError(
                f"another process is sending {run_dir} to MLflow", hint="a running launch sends by itself; let it end"
            ) from None
        try:
            self._file: IO[bytes] = (run_dir / FILE_NAME).open("ab+")
            self._load()
        except OSError as error:
            self._lock.close()
            raise TrackerError(f"{run_dir / FILE_NAME} cannot be used: {error.strerror}") from None

    @property
    def revisions(self) -> Mapping[str, str]:
        """The acknowledged revision of each key."""
        return self._revisions

    @property
    def runs(self) -> Mapping[str, str]:
        """Run id of each key that has a run."""
        return self._runs

    def more(self, key: str) -> Mapping[str, str]:
        """What else was learned when a key was acknowledged; empty before."""
        return self._more.get(key, {})

    def acknowledge(
        self, key: str, revision: str, *, run_id: str | None = None, more: Mapping[str, str] | None = None
    ) -> None:
        """MLflow has this revision."""
        line: dict[str, object] = {"key": key, "revision": revision}
        if run_id is not None:
            line["run"] = run_id
        if more:
            line["more"] = dict(more)
        self._append(line)

    def adopt(self, key: str, run_id: str) -> None:
        """A run is there for this key; what it holds is not known, so it will be written again."""
        self._append({"key": key, "run": run_id})

    def forget(self) -> None:
        """The server lost the study: nothing is acknowledged any more."""
        self._append({"forget": True})

    def close(self) -> None:
        """Let another process send."""
        try:
            self._file.close()
        finally:  # also when the disk is full
            self._lock.close()

    def _append(self, line: dict[str, object]) -> None:
        body = {"server": self._server, **line}
        if not self._revisions and not self._runs:
            body["uri"] = self.uri  # for the reader; once is enough
        with self._writing:
            # Not synced to the disk: a line lost with the machine is asked of the server at the next start.
            self._file.write(json.dumps(body, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            self._take(body)

    def _load(self) -> None:
        self._file.seek(0)
        raw = self._file.read()
        if raw and not raw.endswith(b"\n"):
            self._file.write(b"\n")  # the half-written line stays, and stays alone
            self._file.flush()
        for line in raw.splitlines():
            try:
                body = json.loads(line)
            except ValueError:
                continue
            if isinstance(body, dict) and body.get("server") == self._server:
                self._take(body)

    def _take(self, body: Mapping[str, object]) -> None:
        if body.get("forget"):
            self._revisions.clear()
            self._runs.clear()
            self._more.clear()
            return
        key = body.get("key")
        if not isinstance(key, str):
            return
        revision, run, more = body.get("revision"), body.get("run"), body.get("more")
        if isinstance(revision, str):
            self._revisions[key] = revision
        if isinstance(run, str):
            self._runs[key] = run
        if isinstance(more, dict):
            self._more[key] = {str(k): str(v) for k, v in more.items()}
