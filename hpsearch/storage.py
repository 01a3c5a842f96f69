"""Storage: bytes under names, at a URI that outlives the machines of a study.

A bucket (`s3://`, `gs://`) or a folder that every machine sees (`file:///`, or its path). What is written is there
whole or not at all, and an answer takes seconds: nobody waits for a server that says nothing. Credentials come from
where the cloud's own tools find them (environment variables, an instance's role), never from the URI, which is kept in
the journal and shown in messages.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from hpsearch.blobs import write_beside
from hpsearch.errors import StorageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECT_S = 5.0
SILENCE_S = 10.0  # without a byte from a server that was reached
ATTEMPTS = 3  # of each request, within seconds; who can wait longer asks again
OPTIONS = ("endpoint_override", "region", "scheme")  # what a bucket's URI may say after its `?`
_CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS for gs://) on "
    "every node, or give the machines a role"
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a storage URI says."""

    kind: Literal["s3", "gs", "folder"]
    root: str  # "bucket/prefix", or the folder's absolute path
    endpoint: str = ""  # host:port instead of the cloud's own
    scheme: str = "https"
    region: str = ""  # "": asked of the bucket


def read_uri(uri: str) -> Place:
    """The place that a URI names; nothing is asked of anyone.

    Raises:
        ValueError: (what is wrong, what to do). The URI itself is not repeated, since it may hold a secret.

    >>> read_uri("s3://studies/vision?region=eu-central-1").root
    'studies/vision'
    """
    if uri.startswith("/"):
        return _folder(uri)
    parts = _split(uri)
    if parts.scheme not in ("s3", "gs", "file"):
        raise ValueError(
            "`{key}` is s3://bucket/prefix, gs://bucket/prefix, file:///folder, or an absolute path",
            "a path that is not absolute would be another place on another machine"
            if not parts.scheme
            else f"{parts.scheme}:// is none of these",
        )
    if "@" in parts.netloc:
        raise ValueError(f"`{{key}}` holds credentials, before the @ of {parts.scheme}://", _CREDENTIALS_HINT)
    if parts.fragment:
        raise ValueError("`{key}` has a `#`, after which nothing is read", "write it as %23 if it belongs to the name")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError("`{key}` names a host after file://", "a local folder has three slashes: file:///mnt/x")
        if parts.query:
            raise ValueError("`{key}` has options after a `?`, which a folder does not take", "leave them out")
        return _folder(unquote(parts.path))
    return _bucket(parts.scheme, parts.netloc, unquote(parts.path), parts.query)


def _split(uri: str) -> SplitResult:
    try:
        return urlsplit(uri)
    except ValueError:
        raise ValueError("`{key}` is no URI", "such as s3://bucket/prefix") from None


def _folder(path: str) -> Place:
    if ".." in Path(path).parts or "\0" in path:
        raise ValueError("`{key}` has `..` in its path", "write the folder's own path")
    return Place(kind="folder", root=str(Path(path)))


def _bucket(scheme: str, bucket: str, path: str, query: str) -> Place:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9]", bucket):
        raise ValueError(f"`{{key}}` names no bucket after {scheme}://", f"such as {scheme}://bucket/prefix")
    prefix = "/".join(part for part in path.split("/") if part)
    if ".." in prefix.split("/"):
        raise ValueError("`{key}` has `..` in its path", "write the prefix itself")
    told = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(told) - set(OPTIONS))
    if unknown:
        secret = any(re.search(r"key|secret|token|pass|cred|sig", name, re.IGNORECASE) for name in unknown)
        known = f"it takes {', '.join(OPTIONS)}"
        what = "may be credentials" if secret else "are not known"
        raise ValueError(
            f"`{{key}}` has options after its `?` that {what}: {', '.join(unknown)}",
            _CREDENTIALS_HINT if secret else known,
        )
    endpoint = told.get("endpoint_override", "")
    via, sep, host = endpoint.partition("://")
    by_endpoint, endpoint = (via, host) if sep else ("", endpoint)
    if "@" in endpoint or "?" in endpoint:
        raise ValueError("`{key}` holds credentials in its endpoint_override", _CREDENTIALS_HINT)
    wire = told.get("scheme") or by_endpoint or "https"
    if wire not in ("http", "https"):
        raise ValueError("`{key}` has a scheme other than http and https", "scheme=http is for a server of your own")
    return Place(
        kind="s3" if scheme == "s3" else "gs",
        root=f"{bucket}/{prefix}".rstrip("/"),
        endpoint=endpoint.rstrip("/"),
        scheme=wire,
        region=told.get("region", ""),
    )


class _Backend(Protocol):
    """Bytes under whole names; raises OSError as its library does."""

    def write(self, name: str, content: bytes) -> None: ...
    def read(self, name: str) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def contents(self, folder: str) -> dict[str, int]: ...
    def folders(self, folder: str) -> list[str]: ...
    def delete(self, name: str) -> None: ...


class Storage:
    """One place; names are relative paths below it. Can be used from several threads."""

    def __init__(self, uri: str, prefix: str = "") -> None:
        """Opens nothing yet.

        Args:
            prefix: below the URI.
        """
        self.uri = uri
        self._prefix = prefix
        try:
            self._place = read_uri(uri)
        except ValueError as error:
            what, hint = error.args
            raise StorageError(what.replace("{key}", "storage"), hint=hint) from None
        self._opened = _Opened(self._place)

    def __str__(self) -> str:
        return "/".join(filter(None, [_bare(self.uri), self._prefix]))

    def under(self, prefix: str) -> Storage:
        """The place below this one."""
        below = Storage(self.uri, "/".join(filter(None, [self._prefix, prefix])))
        below._opened = self._opened
        return below

    def write(self, ref: str, content: bytes) -> None:
        """Whole or not at all; what was there before is replaced.

        Raises:
            StorageError: as every method here, when the place is not there, refuses, or does not answer.
        """
        with self._told(f"{ref} cannot be written to"):
            self._opened.backend().write(self._name(ref), content)

    def read(self, ref: str) -> bytes:
        """The content; a StorageError that is `gone` when there is none."""
        with self._told(f"{ref} cannot be read from"):
            return self._opened.backend().read(self._name(ref))

    def size(self, ref: str) -> int | None:
        """Bytes of the content, None when there is none."""
        with self._told(f"{ref} cannot be looked for in"):
            return self._opened.backend().size(self._name(ref))

    def exists(self, ref: str) -> bool:
        return self.size(ref) is not None

    def contents(self, folder: str = "") -> dict[str, int]:
        """All that lies below a folder, at any depth: name -> bytes."""
        with self._told(f"{folder or 'the folder'} cannot be listed in"):
            return {
                f"{folder}/{name}" if folder else name: size
                for name, size in self._opened.backend().contents(self._name(folder)).items()
            }

    def folders(self) -> list[str]:
        """Names of what lies directly below and has something in it."""
        with self._told("the folders cannot be listed in"):
            return sorted(self._opened.backend().folders(self._name("")))

    def delete(self, ref: str) -> None:
        """Gone afterwards, whether it was there or not."""
        with self._told(f"{ref} cannot be deleted in"), contextlib.suppress(FileNotFoundError):
            self._opened.backend().delete(self._name(ref))

    def _name(self, ref: str) -> str:
        if ref.startswith("/") or ".." in ref.split("/"):
            raise ValueError(f"a name in storage is a path below it (got {ref!r})")
        return "/".join(filter(None, [self._place.root, self._prefix, ref]))

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise StorageError(f"{what} {self}: it is not there", gone=True) from None
        except OSError as error:
            reason, hint = _explain(error, self._place)
            raise StorageError(f"{what} {self}: {reason}", hint=hint) from None


class _Opened:
    """The way to a place, found when it is first used: a bucket may have to be asked where it is."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._backend: _Backend | None = None

    def backend(self) -> _Backend:
        with self._lock:
            if self._backend is None:
                root = self._place.root
                self._backend = _Folder(Path(root)) if self._place.kind == "folder" else _Bucket(_connect(self._place))
            return self._backend


class _Folder:
    """A folder, which has to be there already: one that is not mounted must not be made up on the local disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, name: str, content: bytes) -> None:
        self._require_root()
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}{_BESIDE}{uuid.uuid4().hex}")
        try:
            write_beside(beside, path, content)
        except FileNotFoundError:
            raise self._no_root() from None  # it went away meanwhile: nobody else deletes folders here

    def read(self, name: str) -> bytes:
        return Path(name).read_bytes()

    def size(self, name: str) -> int | None:
        self._require_root()
        path = Path(name)
        return path.stat().st_size if path.is_file() else None

    def contents(self, folder: str) -> dict[str, int]:
        self._require_root()
        found = {}
        for path in Path(folder).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if path.is_file() and _BESIDE not in path.name:
                    found[path.relative_to(folder).as_posix()] = path.stat().st_size
        return found

    def folders(self, folder: str) -> list[str]:
        self._require_root()
        path = Path(folder)
        return [child.name for child in path.iterdir() if child.is_dir()] if path.is_dir() else []

    def delete(self, name: str) -> None:
        self._require_root()
        Path(name).unlink()

    def _require_root(self) -> None:
        if not self._root.is_dir():
            raise self._no_root()

    def _no_root(self) -> OSError:
        return NotADirectoryError(f"the folder {self._root} is not there")


_BESIDE = ".part-"  # ends the name of a file that is being written


class _Bucket:
    """A bucket of an object store, by pyarrow; its root is the first part of every name."""

    def __init__(self, system: FileSystem) -> None:
        self._system = system

    def write(self, name: str, content: bytes) -> None:
        # An object appears when it is closed. A part that failed makes the closing fail too, so none appears cut short.
        with self._system.open_output_stream(name) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        with self._system.open_input_stream(name) as stream:
            content: bytes = stream.read()
        return content

    def size(self, name: str) -> int | None:
        found = self._system.get_file_info(name)
        return int(found.size) if found.is_file else None

    def contents(self, folder: str) -> dict[str, int]:
        return {name: size for name, size, is_file in self._select(folder, recursive=True) if is_file}

    def folders(self, folder: str) -> list[str]:
        return [name for name, _, is_file in self._select(folder, recursive=False) if not is_file]

    def delete(self, name: str) -> None:
        self._system.delete_file(name)

    def _select(self, folder: str, *, recursive: bool) -> list[tuple[str, int, bool]]:
        from pyarrow.fs import FileSelector

        found = self._system.get_file_info(FileSelector(folder, recursive=recursive, allow_not_found=True))
        return [(info.path[len(folder) + 1 :], int(info.size or 0), bool(info.is_file)) for info in found]


def _connect(place: Place) -> FileSystem:
    """The cloud's file system; OSError when a bucket cannot be found."""
    try:
        from pyarrow import fs
    except ImportError:
        raise StorageError(
            "buckets are reached by pyarrow, which is not installed", hint="pip install pyarrow, on every node"
        ) from None
    if place.kind == "gs":
        return fs.GcsFileSystem(
            endpoint_override=place.endpoint or None,
            scheme=place.scheme,
            retry_time_limit=timedelta(seconds=SILENCE_S),
        )
    # Asked of the bucket as pyarrow's own reading of such URIs does; a server of the user's has no regions.
    region = place.region or ("us-east-1" if place.endpoint else fs.resolve_s3_region(place.root.split("/")[0]))
    return fs.S3FileSystem(
        region=region,
        endpoint_override=place.endpoint or None,
        scheme=place.scheme,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # one request for what fits into one
    )


def _explain(error: OSError, place: Place) -> tuple[str, str]:
    """What an error of a file system or a cloud's library means, and what to do."""
    text = str(error)
    bucket = place.root.split("/")[0]
    for pattern, reason, hint in _MEANINGS:
        if re.search(pattern, text):
            return reason.format(bucket=bucket), hint
    if place.kind == "folder":
        return error.strerror or text, "see that every machine mounts it, and that it has room"
    return _scrub(text.splitlines()[0] if text else type(error).__name__), ""


_MEANINGS = (
    (r"^the folder .* is not there$", "that folder is not there", "mount it on every machine, or make it"),
    (
        r"NO_SUCH_BUCKET|Bucket '.*' not found|specified bucket does not exist",
        "the bucket {bucket} is not there",
        "make it, or mend its name in `storage`",
    ),
    (
        r"INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|InvalidAccessKeyId|SignatureDoesNotMatch|UNRECOGNIZED_CLIENT|"
        r"INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|ExpiredToken|MISSING_AUTHENTICATION_TOKEN|HTTP status 401|"
        r"UNAUTHENTICATED",
        "the credentials are refused",
        _CREDENTIALS_HINT,
    ),
    (
        r"ACCESS_DENIED|AccessDenied|HTTP status 403|PERMISSION_DENIED|Forbidden",
        "access is denied",
        "give these credentials leave to list, read, write and delete there; without any: " + _CREDENTIALS_HINT,
    ),
    (
        r"NETWORK_CONNECTION|curlCode|Could not resolve|Connection refused|UNAVAILABLE|DEADLINE_EXCEEDED|Retry policy",
        "nobody answers there",
        "see that the network reaches it from here, then launch again with --resume",
    ),
    (r"PermanentRedirect|MOVED_PERMANENTLY|HTTP status 301", "the bucket is in another region", "add ?region=… to it"),
)


def _scrub(text: str) -> str:
    """A message of the cloud's library without request ids and what the environment holds in secret."""
    text = re.sub(r" ?\(?(Request ID|RequestId): [^)\s]*\)?", "", text)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        secret = os.environ.get(name, "")
        if len(secret) > 3:
            text = text.replace(secret, "***")
    return text


def _bare(uri: str) -> str:
    """The URI without its options, for messages."""
    return uri.partition("?")[0].rstrip("/")
