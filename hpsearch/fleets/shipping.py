"""What other machines are sent of the user's code: the folder of space.yaml, and hpsearch as it runs here.

Both travel in one archive that Ray unpacks on every node and puts in front of the Python path:

    hpsearch/   this very package: same version or not, the nodes run the code that the driver runs
    study/      the folder of space.yaml, without what no task needs

A cluster of our own on this machine is sent nothing. A node that has the folder already, with the same files at the
same path (a shared filesystem, the driver's own node), uses that; so data that was left out of the archive can lie
there.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hpsearch
from hpsearch.errors import ClusterError, UsageError
from hpsearch.journal import FILE_NAME as JOURNAL

MAX_BYTES = 256 * 2**20  # before compression; Ray keeps the archive in its head's memory, and refuses 512 MB
LARGEST_TOLD = 3
IGNORE_FILE = ".rayignore"  # Ray's own name and form for this
PACKAGE, STUDY = "hpsearch", "study"
STAMP = "study.digest"  # beside the two: tells a copy of this launch from another's
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can tell; equal files make equal archives

# Never needed by a task. Lines of .rayignore are read after these, so `!runs/` there takes one back.
LEFT_OUT = (
    ".git/", ".hg/", ".svn/", ".venv/", "venv/", ".env", "node_modules/",
    "__pycache__/", "*.pyc", "*.egg-info/", ".ipynb_checkpoints/",
    ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".hypothesis/", ".tox/",
    "/runs/", "mlruns/", "mlartifacts/", "mlflow.db*", ".DS_Store",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """A folder on its way to other machines. Can be sent to another process."""

    folder: Path  # where it lies on the driver's machine
    digest: str  # of the names and contents of what was sent
    n_files: int
    n_bytes: int  # before compression

    def here(self) -> Path:
        """The folder on this machine: at the driver's path where the same files lie there, else the copy.

        Raises:
            ClusterError: neither is there.
        """
        if digest_of(self.folder) == self.digest:
            return self.folder
        around = Path(hpsearch.__file__).parent.parent
        copy, stamp = around / STUDY, around / STAMP
        if stamp.is_file() and stamp.read_text() == self.digest:
            return copy
        raise ClusterError(
            f"the folder {self.folder} is not on this node ({os.uname().nodename}), and the copy that Ray was to "
            f"bring is not beside the hpsearch that runs here ({around / PACKAGE})",
            hint="something on the node comes before Ray's PYTHONPATH; remove it, or put the folder at the same path",
        )


def pack(folder: Path, into: Path) -> tuple[Shipment, Path]:
    """What is sent of a folder, and the archive that holds it.

    Args:
        into: a directory for the archive.

    Raises:
        UsageError: there is more than Ray can carry, or a file cannot be read.
    """
    archive = into / "study.zip"
    try:
        files = dict(_files(folder))
        _check_size(folder, files)
        digest = _digest(files)
        with zipfile.ZipFile(archive, "w") as packed:
            _add_package(packed)
            for name, path in sorted(files.items()):
                _add(packed, f"{STUDY}/{name}", path.read_bytes(), executable=os.access(path, os.X_OK))
            _add(packed, STAMP, digest.encode())
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be packed for the cluster: {error.strerror}",
            hint=f"mend it, or name it in {folder / IGNORE_FILE}",
        ) from None
    n_bytes = sum(path.stat().st_size for path in files.values())
    return Shipment(folder=folder, digest=digest, n_files=len(files), n_bytes=n_bytes), archive


def pack_alone(into: Path) -> Path:
    """An archive of hpsearch without a study."""
    archive = into / "hpsearch.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        _add_package(packed)
    return archive


def digest_of(folder: Path) -> str:
    """Digest of what would be sent of a folder, "" where it is not there or cannot be read."""
    try:
        files = dict(_files(folder))
        if not files or sum(path.stat().st_size for path in files.values()) > MAX_BYTES:
            return ""  # what is larger was never sent
        return _digest(files)
    except OSError:
        return ""


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        with path.open("rb") as content:
            inner = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16))
        digest.update(f"{name}\0{inner.hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name (relative, with /) and path of every file that is sent. Links are followed, but never in a circle."""
    ignored = Ignored(LEFT_OUT, *_ignore_lines(folder))

    def walk(directory: Path, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, Path]]:
        real = os.path.realpath(directory)
        if real in above or (prefix and (directory / JOURNAL).exists()):  # a run directory, whatever it is called
            return
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = prefix + entry.name
            if entry.is_dir():
                if not ignored(name, is_folder=True):
                    yield from walk(directory / entry.name, name + "/", above | {real})
            elif entry.is_file() and not ignored(name, is_folder=False):  # neither sockets nor broken links
                yield name, directory / entry.name

    yield from walk(folder, "", frozenset())


def _ignore_lines(folder: Path) -> tuple[str, ...]:
    try:
        return tuple((folder / IGNORE_FILE).read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return ()


def _add_package(packed: zipfile.ZipFile) -> None:
    root = Path(hpsearch.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            _add(packed, f"{PACKAGE}/{path.relative_to(root).as_posix()}", path.read_bytes())


def _add(packed: zipfile.ZipFile, name: str, content: bytes, *, executable: bool = False) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = (0o100755 if executable else 0o100644) << 16
    packed.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)


def _check_size(folder: Path, files: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST_TOLD]
    told = ", ".join(f"{name} {_mib(sizes[name])}" for name in largest)
    raise UsageError(
        f"{folder} holds {_mib(total)}, and at most {_mib(MAX_BYTES)} are sent to a cluster (largest: {told})",
        hint=f"name what the task does not need in {IGNORE_FILE} beside space.yaml, one pattern a line as in "
        ".gitignore; data belongs where every node can read it",
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


class Ignored:
    """Whether a path is left out, by patterns as in .gitignore: the last that fits decides, `!` takes back."""

    def __init__(self, patterns: tuple[str, ...], *more: str) -> None:
        self._rules = [rule for line in (*patterns, *more) if (rule := _rule(line)) is not None]

    def __call__(self, name: str, *, is_folder: bool) -> bool:
        """
        >>> ignored = Ignored(("*.csv", "!small.csv", "/runs/", "a/**/b"))
        >>> [ignored(n, is_folder=False) for n in ("data/big.csv", "data/small.csv", "runs", "a/b", "a/x/y/b", "xa/b")]
        [True, False, False, True, True, False]
        >>> ignored("runs", is_folder=True), ignored("old/runs", is_folder=True)
        (True, False)
        """
        left_out = False
        for pattern, folders_only, taken_back in self._rules:
            if (is_folder or not folders_only) and pattern.fullmatch(name):
                left_out = not taken_back
        return left_out


def _rule(line: str) -> tuple[re.Pattern[str], bool, bool] | None:
    """A line of .gitignore: its pattern, whether it is for folders alone, whether it takes back."""
    line = line.rstrip()
    taken_back = line.startswith("!")
    line = line.removeprefix("!")
    if not line or line.startswith("#"):
        return None
    folders_only, line = line.endswith("/"), line.rstrip("/")
    anchored, line = "/" in line, line.lstrip("/")  # a slash at the start or within ties it to the folder
    tokens = re.findall(r"\*\*/|/\*\*$|\*|\?|\[!?[^\]]+\]|\\.|.", line)
    made = {"**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]"}

    def translated(token: str) -> str:
        if token in made:
            return made[token]
        if token.startswith("[") and len(token) > 2:
            return token.replace("[!", "[^", 1)
        return re.escape(token.removeprefix("\\") or token)

    body = "".join(map(translated, tokens))
    try:
        return re.compile(body if anchored else f"(?:.*/)?{body}"), folders_only, taken_back
    except re.error:  # [z-a]: as in git, a pattern that fits nothing
        return None
