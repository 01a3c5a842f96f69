"""The one module that talks to MLflow: explicit run ids, few calls, nothing global.

MLflow is imported when the first writer connects, since that takes a second or two, and is told to be quiet: it prints
to stdout, logs its migrations and retries for minutes unless asked otherwise. What the user has set stays as it is.

Two things can go wrong, and the caller does different things about them: `OutOfReach` (wait, then try again) and
`Refused` (this will not get better by itself). Messages never hold credentials.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from hpsearch.errors import HpsearchError
from hpsearch.tracker.champion import AliasDecision, Scored, decide_alias
from hpsearch.tracker.operations import (
    TAG_GOAL,
    TAG_OP,
    TAG_TEST,
    TAG_TEST_METRIC,
    TAG_TEST_VALUE,
    TAG_UID,
    Content,
    Dataset,
    Registration,
    RunStatus,
)
from hpsearch.tracker.outbox import redact, scrub

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would spoil --json
    # MLflow would repeat any call whose answer was lost, create_run too, and leave a run that nobody knows; the default
    # also holds one call for about four minutes. What has to be repeated is repeated by the tracker, who asks first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # "come back in an hour" is for the tracker to hear, at once
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_PROBE_S = 3.0  # a server on the same planet answers a connect within this
_MAKING_S = 60.0  # the tables of a new SQLite store take 3 to 7 s, on a busy machine several times that
_PAGE = 1000
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE_MAGIC = b"SQLite format 3\0"

# Codes of MLflow that another attempt can mend. All others say that the request itself is not wanted.
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "ABORTED", "CANCELLED"}

_CREDENTIALS = "its credentials: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"

MODEL_FOLDER = "ensemble"  # of the package, among the artifacts of a registered version


class OutOfReach(Exception):
    """MLflow does not answer; the same call may succeed later."""


class Refused(Exception):
    """MLflow answered, and said no."""


class Missing(Refused):
    """What was asked for is not there."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a packaged model takes and gives; shapes of one example, () for a scalar."""

    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version in the registry, and who holds the alias now."""

    model: str
    version: str
    decision: AliasDecision


def load_mlflow() -> None:
    """MLflow imported, and quiet."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It logs a traceback for a locked database and raises as well; we tell what is raised.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.WARNING)


def resolve_uri(tracking_uri: str | None) -> str:
    """The tracking server's address: as given, else MLFLOW_TRACKING_URI, else MLflow's own default."""
    if tracking_uri:
        return tracking_uri
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if from_environment:
        return from_environment
    load_mlflow()
    import mlflow

    return mlflow.get_tracking_uri()


def probe(uri: str) -> None:
    """Look at an address before MLflow does, which would try a database that is not there for minutes.

    Raises:
        OutOfReach: nobody listens, or the name is unknown.
        Refused: the SQLite file cannot be one.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]  # postgresql+psycopg2
    if scheme == "sqlite":
        _probe_file(uri)
        return
    port = _PORTS.get(scheme)
    if port is None or not parts.hostname:
        return
    if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return  # the proxy is who connects
    try:
        socket.create_connection((parts.hostname, parts.port or port), timeout=_PROBE_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OutOfReach(f"nobody answers at {redact(uri)}: {reason}") from None


def _probe_file(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        if not path.parent.is_dir():
            raise Refused(f"{redact(uri)} cannot be used: {path.parent} is not a folder")
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(_SQLITE_MAGIC))
            if start and start != _SQLITE_MAGIC:
                raise Refused(f"{redact(uri)} cannot be used: the file is not a SQLite database")
        elif not os.access(path.parent, os.W_OK):
            raise Refused(f"{redact(uri)} cannot be made: {path.parent} is not writable")
    except OSError as error:
        raise Refused(f"{redact(uri)} cannot be used: {error.strerror or error}") from None


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite address, None for other stores and for one in memory."""
    scheme, sep, rest = uri.partition(":///")
    path = rest.partition("?")[0]
    return Path(path) if sep and scheme.startswith("sqlite") and path not in ("", ":memory:") else None


def begin_with_write_ahead_log(uri: str) -> None:
    """Make a SQLite file that is not there yet, with a write-ahead log; one that is there is left as it is.

    MLflow commits seven times per trial, and the rollback journal syncs the disk several times for each, beside the
    study's own journal that must sync too. Measured on a busy disk: 31 ms per trial against 75 to 100, and the
    tables are made in 3 s, not 7.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA user_version = 0")  # a write: some network file systems refuse only this
    except sqlite3.Error:
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)


def fold_write_ahead_log(uri: str) -> None:
    """Bring everything into the one file, so that whoever copies it has it all; nothing without such a log."""
    path = sqlite_path(uri)
    if path is None or not path.with_name(f"{path.name}-wal").exists():
        return
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def _sole_maker(uri: str) -> Iterator[None]:
    """One process at a time opens a SQLite store, which may mean making it; other stores are not held up.

    MLflow does not guard its migrations: two processes that run them at once on one new file get each other's "table
    already exists", and can leave it so for good.

    Raises:
        OutOfReach: another process has been at it for a minute.
    """
    path = sqlite_path(uri)
    handle: int | None = None
    # The folder is locked: a lock on the file would meddle with SQLite's own, a file of locks would stay behind.
    with contextlib.suppress(OSError):
        handle = None if path is None else os.open(path.parent, os.O_RDONLY)
    if handle is None:
        yield
        return
    try:
        deadline = time.monotonic() + _MAKING_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OutOfReach(f"another process is making {redact(uri)}") from None
                time.sleep(0.1)
            except OSError:
                break  # a network file system that locks no folders
        yield
    finally:
        os.close(handle)


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """MLflow's errors as ours, on one line and without credentials."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except MlflowException as error:
        text = str(error)
        message = one_line(_cause(text, uri), uri)
        code = error.error_code
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise Missing(message) from None
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            message += f" ({_CREDENTIALS})"
        unreachable = code in _PASSING or "failed with exception" in text or "timed out" in text.lower()
        raise (OutOfReach if unreachable else Refused)(message) from None
    except (RequestException, OSError) as error:
        raise OutOfReach(one_line(_cause(str(error), uri) or type(error).__name__, uri)) from None
    except (OutOfReach, Refused, HpsearchError):
        raise
    except Exception as error:
        # What the database's driver raises under MLflow. Its OperationalError: locked, or the connection was lost.
        unreachable = type(error).__name__ in ("OperationalError", "InterfaceError")
        message = one_line(f"{type(error).__name__}: {error}", uri)
        raise (OutOfReach if unreachable else Refused)(message) from None


def _cause(message: str, uri: str) -> str:
    """What lies under urllib3's "Max retries exceeded with url: …", which is said first and is not so: there were none.

    >>> _cause("… Max retries exceeded with url: /api (Caused by ResponseError('too many 503 error responses'))", "http://h")
    'http://h answers with HTTP status 503'
    """
    _, found, cause = message.partition("(Caused by ")
    if not found:
        return message
    status = re.search(r"too many (\d+) error responses", cause)
    return f"{uri} answers with HTTP status {status[1]}" if status else f"{uri}: {cause.removesuffix(')')}"


def one_line(message: str, uri: str) -> str:
    """A message of someone else's, short and without the address's credentials."""
    text = " ".join(scrub(message, uri).split())
    return text if len(text) <= 300 else text[:297] + "…"


def _make_whole(uri: str) -> None:
    """Make a SQLite store that is not there yet beside its place, and move it there when it has its tables.

    MLflow makes them in dozens of steps. A process that is killed in between would leave a file that no later one can
    open: "table issues already exists".
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    from mlflow import MlflowClient

    beside = path.with_name(f"{path.name}.new")
    for end in ("", "-wal", "-shm", "-journal"):
        Path(f"{beside}{end}").unlink(missing_ok=True)  # of a process that was killed
    scheme, _, rest = uri.partition(":///")
    _, question, query = rest.partition("?")
    new_uri = f"{scheme}:///{beside}{question}{query}"
    begin_with_write_ahead_log(new_uri)
    store = MlflowClient(tracking_uri=new_uri)._tracking_client.store
    store.engine.dispose()  # else it would keep the file open, under its old name
    fold_write_ahead_log(new_uri)
    os.replace(beside, path)


def make_client(uri: str, *, write_ahead_log: bool = False) -> MlflowClient:
    """A client for this address alone; for a new SQLite file it makes the tables, which takes seconds.

    Args:
        write_ahead_log: for a new SQLite file.

    Raises:
        OutOfReach, Refused
    """
    load_mlflow()
    probe(uri)
    from mlflow import MlflowClient

    with _sole_maker(uri), translated(uri):
        if write_ahead_log:
            _make_whole(uri)
        return MlflowClient(tracking_uri=uri)


class MlflowWriter:
    """Writes one study's runs into one experiment."""

    def __init__(self, uri: str, *, experiment: str) -> None:
        """Connects.

        Raises:
            OutOfReach, Refused
        """
        self.uri = uri
        self._client = make_client(uri, write_ahead_log=True)
        self.experiment_id, self.experiment_is_new = self._experiment(experiment)

    def _experiment(self, name: str) -> tuple[str, bool]:
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    return self._client.create_experiment(name), True
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self._client.get_experiment_by_name(name)  # another study was faster
        if found is None or found.lifecycle_stage == "deleted":
            number = "" if found is None else f" {found.experiment_id}"
            raise Refused(
                f"the experiment {name!r} was deleted in MLflow; restore it (mlflow experiments restore"
                f" --experiment-id{number}) or name another: --set mlflow.experiment=NAME"
            )
        return str(found.experiment_id), False

    def close(self) -> None:
        """Leave the store as one whole file, where it is a file."""
        fold_write_ahead_log(self.uri)

    # Runs

    def find_runs(self, uid: str) -> dict[str, str]:
        """Run id by operation key, of all runs of a study that were not deleted."""
        found: dict[str, str] = {}
        token: str | None = None
        while True:
            with translated(self.uri):
                page = self._client.search_runs(
                    [self.experiment_id],
                    filter_string=f"tags.`{TAG_UID}` = '{uid}'",
                    max_results=_PAGE,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
            for run in page:
                key = run.data.tags.get(TAG_OP)
                if key is not None:
                    found.setdefault(key, run.info.run_id)
            token = page.token
            if not token:
                return found

    def lifecycle(self, run_id: str) -> Literal["active", "deleted", "missing"]:
        """Whether a run is there."""
        try:
            with translated(self.uri):
                stage = self._client.get_run(run_id).info.lifecycle_stage
        except Missing:
            return "missing"
        return "deleted" if stage == "deleted" else "active"

    def create_run(self, name: str, *, start_ms: int, tags: Mapping[str, str], parent: str | None) -> str:
        """A new run's id. Not idempotent: who is unsure whether it happened asks `find_runs` first."""
        family = {} if parent is None else {"mlflow.parentRunId": parent}
        with translated(self.uri):
            run = self._client.create_run(
                self.experiment_id, start_time=start_ms, run_name=name, tags={**tags, **family}
            )
        return str(run.info.run_id)

    def write(self, run_id: str, content: Content, *, tags: bool = True) -> None:
        """Params, metrics and (unless the run was created with them) tags, in one call. Idempotent."""
        from mlflow.entities import Metric, Param, RunTag

        with translated(self.uri):
            self._client.log_batch(
                run_id,
                metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in content.points],
                params=[Param(k, v) for k, v in content.params.items()],
                tags=[RunTag(k, v) for k, v in content.tags.items()] if tags else [],
            )
            for name, text in content.texts.items():
                self._client.log_text(run_id, text, name)

    def write_files(self, run_id: str, files: Mapping[str, bytes], *, folder: str) -> None:
        """Artifacts of a run."""
        with tempfile.TemporaryDirectory(prefix="hpsearch-") as temporary, translated(self.uri):
            for name, data in files.items():
                path = Path(temporary) / name
                path.write_bytes(data)
                self._client.log_artifact(run_id, str(path), folder)

    def write_dataset(self, run_id: str, dataset: Dataset) -> None:
        """The data of a study, in MLflow's dataset column."""
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput

        entity = MlflowDataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="code",
            source='{"tags": {}}',
            profile=dataset.profile,
        )
        with translated(self.uri):
            self._client.log_inputs(run_id, datasets=[DatasetInput(dataset=entity)])

    def end_run(self, run_id: str, status: RunStatus, end_ms: int) -> None:
        """A run ended, at the time it truly did."""
        with translated(self.uri):
            self._client.set_terminated(run_id, status, end_ms)

    def reopen_run(self, run_id: str) -> None:
        """A run goes on."""
        with translated(self.uri):
            self._client.update_run(run_id, status="RUNNING")

    def count_test_uses(self, fingerprint: str) -> int:
        """How many studies of this experiment opened the test split of this fingerprint."""
        token: str | None = None
        n = 0
        while True:
            with translated(self.uri):
                page = self._client.search_runs(
                    [self.experiment_id],
                    filter_string=f"tags.`{TAG_TEST}` = '{_quoted(fingerprint)}'",
                    max_results=_PAGE,
                    page_token=token,
                )
            n += len(page)
            token = page.token
            if not token:
                return n

    # Registry

    def register(
        self,
        run_id: str,
        package: Path,
        registration: Registration,
        *,
        uid: str,
        signature: Signature,
        may_exist: bool,
    ) -> Registered:
        """The ensemble as a version of the registered model, with the alias decided.

        Args:
            package: folder written by `hpsearch.package`.
            may_exist: an earlier attempt's fate is unknown, so its version is looked for first.
        """
        model = registration.model
        key = registration.key
        version = self._find_version(model, uid, key) if may_exist else None
        if version is None:
            source, model_id = self._log_model(run_id, package, registration, signature)
            self._ensure_model(model)
            with translated(self.uri):
                version = self._client.create_model_version(
                    model,
                    source=source,
                    run_id=run_id,
                    model_id=model_id,
                    tags=_version_tags(registration, uid, key),
                    description=registration.description,
                    await_creation_for=30,
                )
        number = str(version.version)
        decision = decide_alias(
            Scored(
                version=number,
                test_fingerprint=registration.test_fingerprint,
                metric=registration.metric,
                goal=registration.goal,
                value=registration.test_value,
                beats_baseline=registration.beats_baseline,
            ),
            self._alias_holder(model, registration.alias),
            alias=registration.alias,
        )
        if decision.moves:
            with translated(self.uri):
                self._client.set_registered_model_alias(model, registration.alias, number)
        return Registered(model=model, version=number, decision=decision)

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                try:
                    self._client.create_registered_model(name)
                except MlflowException as race:
                    if race.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise

    def _find_version(self, model: str, uid: str, key: str) -> ModelVersion | None:
        with translated(self.uri):
            for version in self._client.search_model_versions(f"name = '{_quoted(model)}'", max_results=_PAGE):
                if version.tags.get(TAG_UID) == uid and version.tags.get(TAG_OP) == key:
                    return version
        return None

    def _alias_holder(self, model: str, alias: str) -> Scored | None:
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                holder = self._client.get_model_version_by_alias(model, alias)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        tags = holder.tags
        return Scored(
            version=str(holder.version),
            test_fingerprint=tags.get(TAG_TEST, ""),
            metric=tags.get(TAG_TEST_METRIC, ""),
            goal="maximize" if tags.get(TAG_GOAL) == "maximize" else "minimize",
            value=_finite(tags.get(TAG_TEST_VALUE)),
        )

    def _log_model(
        self, run_id: str, package: Path, registration: Registration, signature: Signature
    ) -> tuple[str, str]:
        """Source and id of the packaged model, among the logged models of the experiment."""
        from mlflow.entities import LoggedModelOutput

        with translated(self.uri), tempfile.TemporaryDirectory(prefix="hpsearch-") as temporary:
            logged = self._client.create_logged_model(
                self.experiment_id, name="ensemble", source_run_id=run_id, model_type="hpsearch.ensemble"
            )
            named = Path(temporary) / MODEL_FOLDER  # MLflow keeps a folder's own name
            shutil.copytree(package, named)
            folder = Path(temporary) / "model"
            save_model(folder, named, signature)
            self._client.log_model_artifacts(logged.model_id, str(folder))
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        # The place itself: `models:/m-…` would be looked up at MLflow's global tracking URI, which need not be ours.
        return str(logged.artifact_location), str(logged.model_id)


def save_model(folder: Path, package: Path, signature: Signature) -> None:
    """A pyfunc model folder around a package: MLmodel, our loader's source, and the package's files as they are.

    The requirements are given, so that MLflow does not load the model to guess them.
    """
    with _without_type_hint_warnings():
        import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    dtype = np.dtype(signature.input_dtype)
    out_dtype = np.dtype("float64")
    spec = ModelSignature(
        inputs=Schema([TensorSpec(dtype, (-1, *signature.input_shape))]),
        outputs=Schema([TensorSpec(out_dtype, (-1, *signature.output_shape))]),
    )
    with _without_type_hint_warnings():
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(Path(__file__).parents[1] / "pyfunc_model.py"),
            artifacts={MODEL_FOLDER: str(package)},
            signature=spec,
            input_example=np.zeros((2, *signature.input_shape), dtype),
            pip_requirements=requirements(("mlflow", "numpy", "onnxruntime")),
        )


@contextmanager
def _without_type_hint_warnings() -> Iterator[None]:
    """MLflow wants type hints of its own in a predict, also in its own modules; other warnings are passed on.

    A filter would not do: it puts its own "once" before any.
    """
    with warnings.catch_warnings(record=True) as recorded:
        warnings.filterwarnings("always", message=".*type hint", category=UserWarning)
        yield
    for warning in recorded:
        if "type hint" not in str(warning.message).lower():
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def requirements(names: Iterable[str]) -> list[str]:
    """What loading a model needs, pinned to what is installed here."""
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for name in names:
        try:
            lines.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            lines.append(name)
    return lines


def _version_tags(registration: Registration, uid: str, key: str) -> dict[str, str]:
    tags = {TAG_UID: uid, TAG_OP: key, "hpsearch.members": _members(registration.members)}
    if registration.test_fingerprint:
        tags |= {TAG_TEST: registration.test_fingerprint}
    if registration.test_value is not None:
        tags |= {
            TAG_TEST_METRIC: registration.metric,
            TAG_TEST_VALUE: repr(registration.test_value),
            TAG_GOAL: registration.goal,
        }
    return tags


def _members(members: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"trial {trial} ({weight:.3g})" for trial, weight in members)


def _finite(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")
