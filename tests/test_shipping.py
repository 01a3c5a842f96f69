"""What other machines are sent, and where they find it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

import hpsearch
from hpsearch.errors import ClusterError, UsageError
from hpsearch.fleets import shipping
from hpsearch.fleets.shipping import Ignored, Shipment, digest_of, pack, pack_alone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task with what usually lies around it."""
    files = {
        "space.yaml": "name: x",
        "task.py": "import helpers.data",
        "helpers/__init__.py": "",
        "helpers/data.py": "",
        "data/rows.csv": "1,2",
        ".git/config": "",
        ".venv/lib/torch.py": "",
        "__pycache__/task.cpython-311.pyc": "",
        "runs/x/journal.jsonl": "",
        "small/journal.jsonl": "",  # a run directory by another name
        "small/blobs/1": "",
        "mlruns/1/meta": "",
        "mlflow.db": "",
        "mlflow.db-wal": "",
        ".env": "PASSWORD=1",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as packed:
        return {name.removeprefix("study/") for name in packed.namelist() if name.startswith("study/")}


KEPT = {"space.yaml", "task.py", "helpers/__init__.py", "helpers/data.py", "data/rows.csv"}


def test_folder_is_packed_without_what_no_task_needs(folder: Path, tmp_path: Path) -> None:
    shipment, archive = pack(folder, tmp_path)
    assert names(archive) == KEPT
    assert shipment.n_files == len(KEPT)
    assert shipment.n_bytes == sum((folder / name).stat().st_size for name in KEPT)


def test_archive_holds_hpsearch_as_it_runs_here(folder: Path, tmp_path: Path) -> None:
    _, archive = pack(folder, tmp_path)
    here = Path(hpsearch.__file__).parent
    with zipfile.ZipFile(archive) as packed:
        assert packed.read("hpsearch/fleets/shipping.py") == (here / "fleets/shipping.py").read_bytes()
        assert "hpsearch/py.typed" in packed.namelist()
        assert not [name for name in packed.namelist() if "__pycache__" in name]
    with zipfile.ZipFile(pack_alone(tmp_path)) as packed:
        assert {name.partition("/")[0] for name in packed.namelist()} == {"hpsearch"}


def test_equal_folders_make_equal_archives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, archive = pack(folder, tmp_path / "a")
    os.utime(folder / "task.py", (0, 0))
    second, again = pack(folder, tmp_path / "b")
    assert archive.read_bytes() == again.read_bytes()
    assert first == second
    with zipfile.ZipFile(archive) as packed:
        assert {entry.date_time[0] for entry in packed.infolist()} == {1980}


def test_rayignore_leaves_out_more_and_takes_back(folder: Path, tmp_path: Path) -> None:
    (folder / ".rayignore").write_text("# data lies on the nodes\n*.csv\n\n!/runs/\n")
    _, archive = pack(folder, tmp_path)
    assert names(archive) == KEPT - {"data/rows.csv"} | {".rayignore"}  # runs/x holds a journal, so it stays out


@pytest.mark.parametrize(
    ("patterns", "name", "is_folder", "expected"),
    [
        (("*.csv",), "deep/in/rows.csv", False, True),
        (("/rows.csv",), "deep/rows.csv", False, False),
        (("deep/*.csv",), "deep/rows.csv", False, True),
        (("deep/*.csv",), "deep/in/rows.csv", False, False),
        (("deep/**",), "deep/in/rows.csv", False, True),
        (("**/rows.csv",), "rows.csv", False, True),
        (("data/",), "data", False, False),
        (("data/",), "some/data", True, True),
        (("rows.[ct]sv",), "rows.tsv", False, True),
        (("rows.[!ct]sv",), "rows.tsv", False, False),
        (("row?.csv",), "rows.csv", False, True),
        ((r"\#rows",), "#rows", False, True),
        (("#rows",), "#rows", False, False),
        (("*.csv", "!rows.csv"), "rows.csv", False, False),
        (("!rows.csv", "*.csv"), "rows.csv", False, True),
        (("rows.csv  ",), "rows.csv", False, True),
        (("a[z-a]",), "az", False, False),
        (("a.c",), "abc", False, False),
    ],
)
def test_patterns_mean_what_they_mean_in_gitignore(
    patterns: tuple[str, ...], name: str, is_folder: bool, expected: bool
) -> None:
    assert Ignored(patterns)(name, is_folder=is_folder) is expected


def test_links_are_followed_but_not_in_a_circle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "net.py").write_text("")
    (folder / "common").symlink_to(tmp_path / "common")
    (folder / "again").symlink_to(tmp_path / "common")
    (folder / "helpers" / "up").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    _, archive = pack(folder, tmp_path)
    assert names(archive) == KEPT | {"common/net.py", "again/net.py"}


def test_more_than_ray_can_carry_is_refused_with_the_largest_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MAX_BYTES", 3 * 2**20)
    (folder / "data" / "images.bin").write_bytes(bytes(4 * 2**20))
    with pytest.raises(UsageError) as caught:
        pack(folder, tmp_path)
    assert caught.value.message == (
        f"{folder} holds 4 MiB, and at most 3 MiB are sent to a cluster "
        "(largest: data/images.bin 4 MiB, task.py 0 MiB, space.yaml 0 MiB)"
    )
    assert ".rayignore beside space.yaml" in caught.value.hint


def test_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(files: dict[str, Path]) -> str:
        raise PermissionError(13, "Permission denied", str(files["task.py"]))

    monkeypatch.setattr(shipping, "_digest", refuse)  # root, who may run the tests, can read everything
    with pytest.raises(UsageError, match=r"task\.py cannot be packed for the cluster: Permission denied"):
        pack(folder, tmp_path)


def test_executable_files_stay_so(folder: Path, tmp_path: Path) -> None:
    (folder / "helpers" / "fetch").write_text("#!/bin/sh")
    (folder / "helpers" / "fetch").chmod(0o755)
    _, archive = pack(folder, tmp_path)
    with zipfile.ZipFile(archive) as packed:
        modes = {name: packed.getinfo(f"study/{name}").external_attr >> 16 for name in ("helpers/fetch", "task.py")}
    assert modes == {"helpers/fetch": 0o100755, "task.py": 0o100644}


# On a node


@pytest.fixture
def unpacked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shipment:
    """As on a node: the archive unpacked, its hpsearch running."""
    shipment, archive = pack(folder, tmp_path)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "node")
    monkeypatch.setattr(hpsearch, "__file__", str(tmp_path / "node" / "hpsearch" / "__init__.py"))
    return shipment


def test_node_without_the_folder_uses_the_copy(unpacked: Shipment, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    assert unpacked.here() == tmp_path / "node" / "study"
    assert digest_of(unpacked.here()) == unpacked.digest


def test_node_with_the_same_folder_uses_it_in_place(unpacked: Shipment, folder: Path) -> None:
    (folder / "runs" / "x" / "journal.jsonl").write_text("a study has begun")  # what was not sent may differ
    assert unpacked.here() == folder


def test_node_with_another_version_of_the_folder_uses_the_copy(
    unpacked: Shipment, folder: Path, tmp_path: Path
) -> None:
    (folder / "helpers" / "data.py").write_text("changed = True")
    assert unpacked.here() == tmp_path / "node" / "study"


def test_copy_of_another_launch_is_not_taken(unpacked: Shipment, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "node" / "study.digest").write_text("another")
    with pytest.raises(ClusterError, match="is not on this node"):
        unpacked.here()


def test_folder_that_has_grown_too_large_meanwhile_is_not_the_one_that_was_sent(
    unpacked: Shipment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MAX_BYTES", 3)
    assert digest_of(folder) == ""
    assert unpacked.here() == tmp_path / "node" / "study"
