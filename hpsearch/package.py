"""A package: an ensemble as data, in one flat folder that needs neither the user's code nor trust.

    ensemble.json              what the members are, how much each counts, and the sha256 of every file
    member-0017.onnx           what the member computes, as a graph (absent when it could not be exported)
    member-0017.safetensors    its weights, for whoever has the model's code

The folder may come from a registry that others can write to. So reading it is strict: ensemble.json is refused unless
every key is known and has the type it should have, files are named without a path, links are not followed, sizes are
bounded before anything is read, and a file whose digest differs is not used. Nothing is unpickled, nothing is executed.
Running the graphs is left to `predict`; making them to `training.export`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeVar, cast, get_args

from hpsearch.errors import HpsearchError
from hpsearch.job import Config, Outputs, Scalar, Value

FORMAT_VERSION = 1
MANIFEST = "ensemble.json"
MAX_MANIFEST_BYTES = 16 * 2**20  # 1,000 members with long configs take about 1 MiB
MAX_GRAPH_BYTES = 2**31 - 1  # protobuf holds no more in one message, and our graphs are one message
MAX_WEIGHTS_BYTES = 64 * 2**30
MAX_MEMBERS = 1_000
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
"""What a graph may take as input, under NumPy's names."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 2**20


class PackageError(HpsearchError):
    """A package is incomplete, altered, or not one; pull it again, or from another version."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "package"


@dataclass(frozen=True, kw_only=True)
class NewMember:
    """A member as it goes into a package: the files' content, not yet their names."""

    trial: int
    weight: float
    config: Config
    onnx: bytes | None
    weights: bytes
    max_difference: float | None = None  # as `training.export` measured it
    reason: str = ""  # why there is no graph
    run_id: str | None = None  # of the trial's run in MLflow


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file of a package, by its plain name, and what it must hold."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PackedMember:
    """A trial's best checkpoint in an ensemble, with its share of the prediction."""

    trial: int
    weight: float
    config: Config
    onnx: PackedFile | None
    weights: PackedFile
    max_difference: float | None  # greatest |graph - model| over the rows it was checked on, in the outputs' unit
    reason: str
    run_id: str | None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What the ensemble scored when it was made; keys without their split: loss, accuracy, …"""

    val: Mapping[str, float | None]
    test: Mapping[str, float | None] | None = None
    gain: Mapping[str, Scalar] | None = None  # metric, value, low, high, better


@dataclass(frozen=True, kw_only=True)
class Package:
    """An ensemble that was read and verified."""

    folder: Path
    study: str
    outputs: Outputs
    n_classes: int | None
    classes: tuple[Scalar, ...] | None  # what class 0, 1, … stands for, where the user told
    input_shape: tuple[int, ...]  # of one example
    input_dtype: str
    members: tuple[PackedMember, ...]
    metrics: Metrics
    test_fingerprint: str
    created: str
    hpsearch_version: str

    @property
    def without_graph(self) -> tuple[PackedMember, ...]:
        """The members that only the model's own code can load."""
        return tuple(member for member in self.members if member.onnx is None)

    @property
    def files(self) -> tuple[PackedFile, ...]:
        """Every file that ensemble.json names."""
        return tuple(packed for member in self.members for packed in (member.weights, member.onnx) if packed)

    def read_file(self, packed: PackedFile) -> bytes:
        """The file's bytes, compared with its digest as they are read, so that what is used is what was checked.

        Raises:
            PackageError: the file is gone, a link, of another size, or altered.
        """
        with _opened(self.folder, packed) as file:
            data = file.read(packed.bytes + 1)
        _require_same(packed, len(data), hashlib.sha256(data).hexdigest())
        return data


# Writing


def write_package(
    folder: Path,
    *,
    study: str,
    outputs: Outputs,
    n_classes: int | None,
    input_shape: Sequence[int],
    input_dtype: str,
    members: Sequence[NewMember],
    metrics: Metrics,
    test_fingerprint: str,
    created: str,
    hpsearch_version: str,
    classes: Sequence[Scalar] | None = None,
) -> Package:
    """The package as `read_package` reads it back; the folder appears whole or not at all.

    Args:
        folder: where to; may be absent, empty, or an older package, which is then replaced.
        members: in the order in which they are to be listed.
        created: an ISO time; taken as an argument, since a clock is not ours to read.

    Raises:
        PackageError: the folder holds something else, or cannot be written, or the values do not make a package.
    """
    files: dict[str, bytes] = {}
    listed: list[dict[str, object]] = []
    for member in members:
        stem = f"member-{member.trial:04d}"
        weights = _listed(files, f"{stem}.safetensors", member.weights)
        onnx = None if member.onnx is None else _listed(files, f"{stem}.onnx", member.onnx)
        listed.append(
            {
                "trial": member.trial,
                "weight": member.weight,
                "config": member.config,
                "onnx": onnx,
                "weights": weights,
                "max_difference": member.max_difference,
                "reason": member.reason,
                "run_id": member.run_id,
            }
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "study": study,
        "outputs": outputs,
        "n_classes": n_classes,
        "classes": None if classes is None else list(classes),
        "input_shape": list(input_shape),
        "input_dtype": input_dtype,
        "members": listed,
        "metrics": {
            "val": dict(metrics.val),
            "test": None if metrics.test is None else dict(metrics.test),
            "gain": None if metrics.gain is None else dict(metrics.gain),
        },
        "test_fingerprint": test_fingerprint,
        "created": created,
        "hpsearch_version": hpsearch_version,
    }
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PackageError(f"{MANIFEST} cannot hold these values: {error}") from None
    files[MANIFEST] = text.encode() + b"\n"
    _parse(files[MANIFEST], folder)  # what we write, we must be able to read
    try:
        _write_folder(folder, files)
    except OSError as error:
        raise PackageError(f"{folder} cannot be written: {error.strerror or error}") from None
    return read_package(folder)


def _listed(files: dict[str, bytes], name: str, data: bytes) -> dict[str, object]:
    """The manifest's entry for a file that is to be written."""
    files[name] = data
    return {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write beside, then rename: a reader finds the old folder, the new one, or for an instant none, never a half."""
    if folder.exists() and not folder.is_dir():
        raise PackageError(f"{folder} is a file; a package is a folder")
    replaces = folder.is_dir() and any(folder.iterdir())
    if replaces and not (folder / MANIFEST).is_file():
        raise PackageError(f"{folder} holds other files", hint="name a folder that is new or empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        beside.mkdir()
        for name, data in files.items():
            with (beside / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if replaces:
            os.replace(folder, old)
        os.replace(beside, folder)
    finally:
        if old.is_dir() and not folder.exists():  # the second rename failed: the old package goes back
            os.replace(old, folder)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)


# Reading


def read_package(folder: Path) -> Package:
    """The package in a folder, each of its files compared with its digest.

    Files that ensemble.json does not name are left alone: they are never opened.

    Raises:
        PackageError: the first thing that is missing, unknown, out of bounds or altered.
    """
    package = read_manifest(folder)
    for packed in package.files:
        _verify(folder, packed)
    return package


def read_manifest(folder: Path) -> Package:
    """What ensemble.json says; the files it names need not be there yet.

    Raises:
        PackageError: it is missing, or not an ensemble.json of ours.
    """
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder", hint="hpsearch pull MODEL --out DIR makes one")
    with _opened_plain(folder, MANIFEST, MAX_MANIFEST_BYTES) as file:
        return _parse(file.read(MAX_MANIFEST_BYTES), folder)


def _verify(folder: Path, packed: PackedFile) -> None:
    """Compare a file with its digest, a piece at a time, since weights may be larger than the memory."""
    digest = hashlib.sha256()
    n_bytes = 0
    with _opened(folder, packed) as file:
        while chunk := file.read(_CHUNK_BYTES):
            n_bytes += len(chunk)
            if n_bytes > packed.bytes:
                break
            digest.update(chunk)
    _require_same(packed, n_bytes, digest.hexdigest())


def _require_same(packed: PackedFile, n_bytes: int, sha256: str) -> None:
    if n_bytes != packed.bytes:
        raise PackageError(f"{packed.file} changed in size while it was read", hint=_PULL_AGAIN)
    if sha256 != packed.sha256:
        raise PackageError(
            f"{packed.file} was altered: its sha256 is {sha256[:12]}…, {MANIFEST} says {packed.sha256[:12]}…",
            hint=_PULL_AGAIN,
        )


_PULL_AGAIN = "pull the model again; if it stays so, do not use this version"


@contextmanager
def _opened(folder: Path, packed: PackedFile) -> Iterator[BinaryIO]:
    """A member's file, known to be a regular one of the listed size."""
    with _opened_plain(folder, packed.file, MAX_WEIGHTS_BYTES) as file:
        found = os.fstat(file.fileno()).st_size
        if found != packed.bytes:
            raise PackageError(f"{packed.file} has {found:,} bytes; {MANIFEST} says {packed.bytes:,}", hint=_PULL_AGAIN)
        yield file


@contextmanager
def _opened_plain(folder: Path, name: str, max_bytes: int) -> Iterator[BinaryIO]:
    """A regular file of the folder itself. What was opened is what is asked, so a swap in between gains nothing."""
    path = folder / name
    # A pipe would block a plain open for ever, and a link could lead anywhere.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise PackageError(f"{name} is a link; a package holds plain files", hint=_PULL_AGAIN)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise PackageError(f"{folder} has no {name}", hint=_PULL_AGAIN) from None
    except OSError as error:
        raise PackageError(f"{name} cannot be read: {error.strerror or error}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PackageError(f"{name} is not a plain file", hint=_PULL_AGAIN)
    with open(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise PackageError(f"{name} has {status.st_size:,} bytes; at most {max_bytes:,} are expected")
        yield file


# ensemble.json, key by key


def _parse(data: bytes, folder: Path) -> Package:
    """The manifest's content; the files it names are not looked at."""
    top = _Object(_loads(data), MANIFEST)
    version = top.take("format_version", _integer(0))
    if version != FORMAT_VERSION:
        raise PackageError(
            f"{MANIFEST} has format {version}; this hpsearch reads format {FORMAT_VERSION}",
            hint="use the hpsearch that made it: `hpsearch_version` in the file",
        )
    outputs = cast(Outputs, top.take("outputs", _one_of(get_args(Outputs))))
    package = Package(
        folder=folder,
        study=top.take("study", _text),
        outputs=outputs,
        n_classes=top.take("n_classes", _optional(_integer(1))),
        classes=top.take("classes", _optional(_tuple(_scalar, at_least=1))),
        input_shape=top.take("input_shape", _tuple(_integer(1))),
        input_dtype=top.take("input_dtype", _one_of(DTYPES)),
        members=top.take("members", _tuple(_member, at_least=1, at_most=MAX_MEMBERS)),
        metrics=top.take("metrics", _metrics),
        test_fingerprint=top.take("test_fingerprint", _text),
        created=top.take("created", _text),
        hpsearch_version=top.take("hpsearch_version", _text),
    )
    top.close()
    _check_whole(package)
    return package


def _check_whole(package: Package) -> None:
    """The rules that hold between keys."""
    total = math.fsum(member.weight for member in package.members)
    if abs(total - 1) > 1e-6:
        raise PackageError(f"{MANIFEST}: the members' weights sum to {total:.6g}, not to 1")
    trials = [member.trial for member in package.members]
    if len(set(trials)) < len(trials):
        raise PackageError(f"{MANIFEST}: a trial is listed twice as a member")
    names = [packed.file for member in package.members for packed in (member.weights, member.onnx) if packed]
    if len({name.lower() for name in names}) < len(names):
        raise PackageError(f"{MANIFEST}: a file is listed twice")
    if package.outputs == "logits" and (package.n_classes is None or package.n_classes < 2):
        raise PackageError(f"{MANIFEST}: n_classes: logits need 2 classes or more (found {package.n_classes})")
    if package.classes is not None and len(package.classes) != package.n_classes:
        raise PackageError(f"{MANIFEST}: {len(package.classes)} classes are named, n_classes is {package.n_classes}")


def _loads(data: bytes) -> object:
    """JSON without its traps: no NaN, no key twice, no nesting that exhausts the stack."""

    def refuse_constant(name: str) -> object:
        raise ValueError(f"{name} is not a number of JSON")

    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice in one object")
        return found

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise PackageError(f"{MANIFEST} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise PackageError(f"{MANIFEST} is not JSON: {error}") from None


T = TypeVar("T")
Reader = Callable[[object, str], T]
"""Takes what was found and where, returns it with its type, or raises PackageError."""


class _Object:
    """A JSON object that is emptied key by key; what is left at the end is unknown."""

    def __init__(self, found: object, where: str) -> None:
        if not isinstance(found, dict):
            raise _wrong(where, "an object", found)
        self._left: dict[str, object] = dict(found)
        self._where = where
        self._known: list[str] = []

    def take(self, key: str, read: Reader[T]) -> T:
        where = f"{self._where}: {key}" if self._where == MANIFEST else f"{self._where}.{key}"
        self._known.append(key)
        if key not in self._left:
            raise PackageError(f"{where} is missing")
        return read(self._left.pop(key), where)

    def close(self) -> None:
        for key in self._left:
            raise PackageError(f"{self._where}: {_short(key)} is not a known key (known: {', '.join(self._known)})")


def _wrong(where: str, expected: str, found: object) -> PackageError:
    return PackageError(f"{where} must be {expected} (found {_short(found)})")


def _short(found: object) -> str:
    """What was found, in one line that no escape sequence can spoil; containers by their kind alone."""
    if isinstance(found, dict | list):
        return "an object" if isinstance(found, dict) else "a list"
    text = ascii(found)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _text(found: object, where: str) -> str:
    if not isinstance(found, str):
        raise _wrong(where, "a string", found)
    return found


def _number(found: object, where: str) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not _is_finite(found):
        raise _wrong(where, "a finite number", found)
    return float(found)


def _is_finite(found: float) -> bool:
    try:
        return math.isfinite(found)
    except OverflowError:  # an integer beyond any float
        return False


def _weight(found: object, where: str) -> float:
    weight = _number(found, where)
    if not 0 <= weight <= 1:
        raise _wrong(where, "within 0 and 1", found)
    return weight


def _integer(at_least: int, at_most: int = 2**53) -> Reader[int]:
    def read(found: object, where: str) -> int:
        if isinstance(found, bool) or not isinstance(found, int) or not at_least <= found <= at_most:
            raise _wrong(where, f"an integer from {at_least} to {at_most:,}", found)
        return found

    return read


def _one_of(choices: Collection[str]) -> Reader[str]:
    def read(found: object, where: str) -> str:
        if not isinstance(found, str) or found not in choices:
            raise _wrong(where, f"one of {', '.join(choices)}", found)
        return found

    return read


def _optional(read: Reader[T]) -> Reader[T | None]:
    return lambda found, where: None if found is None else read(found, where)


def _tuple(read: Reader[T], *, at_least: int = 0, at_most: int = 2**20) -> Reader[tuple[T, ...]]:
    def read_all(found: object, where: str) -> tuple[T, ...]:
        if not isinstance(found, list):
            raise _wrong(where, "a list", found)
        if not at_least <= len(found) <= at_most:
            raise PackageError(f"{where} must have {at_least} to {at_most:,} entries (found {len(found):,})")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(found))

    return read_all


def _mapping(read: Reader[T]) -> Reader[dict[str, T]]:
    def read_all(found: object, where: str) -> dict[str, T]:
        if not isinstance(found, dict):
            raise _wrong(where, "an object", found)
        return {key: read(item, f"{where}.{_short(key)}") for key, item in found.items()}

    return read_all


def _scalar(found: object, where: str) -> Scalar:
    if isinstance(found, float):
        return _number(found, where)
    if found is not None and not isinstance(found, bool | int | str):
        raise _wrong(where, "true, false, a number, a string or null", found)
    return found


def _value(found: object, where: str) -> Value:
    return list(_tuple(_scalar)(found, where)) if isinstance(found, list) else _scalar(found, where)


def _metrics(found: object, where: str) -> Metrics:
    scores = _mapping(_optional(_number))
    entry = _Object(found, where)
    metrics = Metrics(
        val=entry.take("val", scores),
        test=entry.take("test", _optional(scores)),
        gain=entry.take("gain", _optional(_mapping(_scalar))),
    )
    entry.close()
    return metrics


def _member(found: object, where: str) -> PackedMember:
    entry = _Object(found, where)
    member = PackedMember(
        trial=entry.take("trial", _integer(0)),
        weight=entry.take("weight", _weight),
        config=entry.take("config", _mapping(_value)),
        onnx=entry.take("onnx", _optional(_file(".onnx", MAX_GRAPH_BYTES))),
        weights=entry.take("weights", _file(".safetensors", MAX_WEIGHTS_BYTES)),
        max_difference=entry.take("max_difference", _optional(_number)),
        reason=entry.take("reason", _text),
        run_id=entry.take("run_id", _optional(_text)),
    )
    entry.close()
    if (member.onnx is None) != bool(member.reason):
        raise PackageError(f"{where}.reason must be given when there is no graph, and only then")
    return member


def _file(suffix: str, max_bytes: int) -> Reader[PackedFile]:
    def read(found: object, where: str) -> PackedFile:
        entry = _Object(found, where)
        name = entry.take("file", _text)
        if not _PLAIN_NAME.fullmatch(name) or not name.endswith(suffix):
            raise PackageError(
                f"{where}.file must be a plain name that ends in {suffix}, without a folder (found {_short(name)})"
            )
        digest = entry.take("sha256", _text)
        if not _SHA256.fullmatch(digest):
            raise _wrong(f"{where}.sha256", "64 hexadecimal digits", digest)
        packed = PackedFile(file=name, sha256=digest, bytes=entry.take("bytes", _integer(1, max_bytes)))
        entry.close()
        return packed

    return read
