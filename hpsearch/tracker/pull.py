"""Fetch a registered ensemble as data.

What a registry holds was written by others. So nothing of it is loaded: the version's address is asked for, then
`ensemble.json` is fetched, then the files it names, by plain names, and each is compared with its digest. MLmodel,
Python files and pickles beside them are never fetched, so they can neither be run nor unpickled.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.errors import TrackerError, UsageError
from hpsearch.package import MANIFEST, Package, PackageError, read_manifest, read_package
from hpsearch.tracker.mlflow_writer import (
    MODEL_FOLDER,
    Missing,
    OutOfReach,
    Refused,
    make_client,
    resolve_uri,
    translated,
)
from hpsearch.tracker.outbox import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DEFAULT_ALIAS = "champion"


@dataclass(frozen=True, kw_only=True)
class PulledModel:
    """A verified ensemble on the disk."""

    name: str
    version: str
    aliases: tuple[str, ...]
    out: Path
    package: Package
    tracking_uri: str  # without credentials


def pull(
    name: str,
    *,
    out: Path,
    alias: str | None = None,
    version: str | None = None,
    tracking_uri: str | None = None,
) -> PulledModel:
    """The ensemble of a registered model, in the new folder `out`, which appears whole or not at all.

    Args:
        alias: which version; `champion` when neither this nor `version` is given.
        tracking_uri: else MLFLOW_TRACKING_URI, else MLflow's own default.

    Raises:
        UsageError: no such name, version or alias, or `out` cannot be used.
        TrackerError: MLflow is out of reach, or refuses.
        PackageError: the version holds no package of ours, or an altered one.
    """
    if alias is not None and version is not None:
        raise UsageError("--alias and --version are two ways to name a version; give one")
    _require_free(out)
    uri = resolve_uri(tracking_uri)
    try:
        client = make_client(uri)
        found = _resolve(client, uri, name, alias=alias, version=version)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_parent(out)) as temporary:
            fetched = Path(temporary) / "package"
            fetched.mkdir()
            _fetch(client, uri, found, fetched)
            read_package(fetched)
            _move(fetched, out)
    except OutOfReach as problem:
        raise TrackerError(
            f"MLflow is out of reach: {problem}", hint="name another server with --tracking-uri URI"
        ) from None
    except Refused as problem:
        raise TrackerError(f"MLflow refused: {problem}") from None
    return PulledModel(
        name=name,
        version=str(found.version),
        aliases=tuple(found.aliases),
        out=out,
        package=read_package(out),
        tracking_uri=redact(uri),
    )


# Which version


def _resolve(client: MlflowClient, uri: str, name: str, *, alias: str | None, version: str | None) -> ModelVersion:
    """The version that was asked for.

    Raises:
        UsageError: it is not there; tells what is.
    """
    try:
        if not name or "/" in name or ":" in name:
            raise Missing  # no model can be called so, and MLflow would complain in its own words
        with translated(uri):
            model = client.get_registered_model(name)
    except Missing:
        raise UsageError(_no_such("model", name, _model_names(client, uri), uri)) from None
    if version is not None:
        with translated(uri):
            versions = {str(v.version): v for v in client.search_model_versions(f"name = '{_quoted(name)}'")}
        if version not in versions:
            raise UsageError(_no_such("version", version, sorted(versions, key=_as_number), uri, of=name))
        with translated(uri):
            return client.get_model_version(name, version)
    wanted = alias or DEFAULT_ALIAS
    if wanted not in model.aliases:
        raise UsageError(
            _no_such("alias", wanted, sorted(model.aliases), uri, of=name),
            hint="" if alias else "name one with --alias ALIAS or --version N",
        )
    with translated(uri):
        return client.get_model_version_by_alias(name, wanted)


def _model_names(client: MlflowClient, uri: str) -> list[str]:
    try:
        with translated(uri):
            return sorted(model.name for model in client.search_registered_models(max_results=200))
    except Refused:
        return []  # the names only help


def _no_such(kind: str, wanted: str, known: Iterable[str], uri: str, *, of: str = "") -> str:
    """What is missing, what is meant perhaps, what is there."""
    names = list(known)
    place = f"of model {of!r} in {redact(uri)}" if of else f"in {redact(uri)}"
    close = difflib.get_close_matches(wanted, names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    there = f" (known: {shown})" if names else " (there is none)"
    return f"there is no {kind} {wanted!r} {place}{guess}{there}"


def _as_number(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdecimal() else (0, version)


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")


# Its files


def _fetch(client: MlflowClient, uri: str, version: ModelVersion, folder: Path) -> None:
    """ensemble.json and the files it names, and nothing else.

    Raises:
        PackageError: a file is not there, or ensemble.json is none.
    """
    with translated(uri):
        source = client.get_model_version_download_uri(version.name, str(version.version))
    _fetch_file(uri, source, MANIFEST, folder)
    for packed in read_manifest(folder).files:
        _fetch_file(uri, source, packed.file, folder)


def _fetch_file(uri: str, source: str, name: str, folder: Path) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, translated(uri):
        try:
            got = download_artifacts(
                artifact_uri=f"{source.rstrip('/')}/artifacts/{MODEL_FOLDER}/{name}",
                dst_path=temporary,
                tracking_uri=uri,
            )
        except (MlflowException, OSError) as error:
            if isinstance(error, MlflowException) and not _says_missing(error):
                raise
            raise PackageError(
                f"the version holds no {name}; it is not an ensemble of hpsearch, or not whole"
            ) from None
        path = Path(got)
        if path.is_symlink() or not path.is_file():
            raise PackageError(f"{name} is not a plain file in the registry")
        os.replace(path, folder / name)


def _says_missing(error: Exception) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in ("no such", "not found", "404", "does not exist"))


def _require_free(out: Path) -> None:
    if out.is_symlink() or out.exists():
        if not out.is_dir():
            raise UsageError(f"{out} is a file; --out names a folder")
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty", hint="name a new folder with --out, or clear it")


def _parent(out: Path) -> Path:
    """The folder in which `out` will appear; a rename is atomic within one file system only."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.strerror}") from None
    if not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"{out.absolute().parent} is not writable")
    return out.absolute().parent


def _move(folder: Path, out: Path) -> None:
    try:
        os.replace(folder, out)
    except OSError:
        if out.is_symlink():
            shutil.copytree(folder, out, dirs_exist_ok=True)
            return
        raise UsageError(f"{out} came to be used while the model was fetched") from None
