from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpsearch.errors import HpsearchError
from hpsearch.package import (
    MAX_MANIFEST_BYTES,
    Metrics,
    NewMember,
    Package,
    PackageError,
    read_package,
    write_package,
)

GRAPH, WEIGHTS = b"a graph, as far as a package can tell", b"weights, likewise"


def new_member(trial: int = 17, weight: float = 1.0, **changes: Any) -> NewMember:
    values: dict[str, Any] = {
        "trial": trial,
        "weight": weight,
        "config": {"lr": 0.01, "width": 64, "optimizer": "adamw", "layers": [1, 2], "bias": None, "wide": True},
        "onnx": GRAPH + str(trial).encode(),
        "weights": WEIGHTS + str(trial).encode(),
        "max_difference": 3e-8,
        "run_id": "0123abcd",
    }
    return NewMember(**{**values, **changes})


def write(folder: Path, **changes: Any) -> Package:
    values: dict[str, Any] = {
        "study": "digits",
        "outputs": "logits",
        "n_classes": 10,
        "input_shape": (64,),
        "input_dtype": "float32",
        "members": [new_member(17, 0.75), new_member(4, 0.25)],
        "metrics": Metrics(
            val={"loss": 0.1, "accuracy": 0.97},
            test={"loss": 0.2},
            gain={"metric": "loss", "value": -0.02, "low": -0.03, "high": -0.01, "better": True},
        ),
        "test_fingerprint": "abcd",
        "created": "2026-01-02T03:04:05+00:00",
        "hpsearch_version": "0.1.0",
    }
    return write_package(folder, **{**values, **changes})


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The message of reading a package whose ensemble.json was changed by hand."""
    path = folder / "ensemble.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(PackageError) as caught:
        read_package(folder)
    return caught.value.message


def test_package_error_is_the_users_to_read_and_exits_with_1() -> None:
    assert issubclass(PackageError, HpsearchError)
    assert PackageError.exit_code == 1
    assert str(PackageError("x is gone", hint="pull again")) == "error[package]: x is gone\n  hint: pull again"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    package = write(tmp_path / "ensemble")
    assert package == read_package(tmp_path / "ensemble")
    assert [(member.trial, member.weight) for member in package.members] == [(17, 0.75), (4, 0.25)]
    assert package.members[0].config == new_member().config
    assert package.input_shape == (64,)
    assert package.metrics.gain == {"metric": "loss", "value": -0.02, "low": -0.03, "high": -0.01, "better": True}
    assert package.classes is None
    onnx = package.members[1].onnx
    assert onnx is not None
    assert onnx.file == "member-0004.onnx"
    assert package.read_file(onnx) == GRAPH + b"4"
    names = {path.name for path in (tmp_path / "ensemble").iterdir()}
    assert names == {
        "ensemble.json",
        "member-0004.onnx",
        "member-0004.safetensors",
        "member-0017.onnx",
        "member-0017.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble"]  # nothing is left beside it


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text()
    | st.floats(allow_nan=False).filter(lambda value: abs(value) < float("inf"))
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=4),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    study=st.text(),
)
def test_any_config_and_any_weights_survive(
    tmp_path: Path, config: dict[str, Any], shares: list[int], study: str
) -> None:
    members = [new_member(i, share / sum(shares), config=config) for i, share in enumerate(shares)]
    package = write(tmp_path / "ensemble", members=members, study=study)
    assert [member.config for member in package.members] == [config] * len(shares)
    assert [member.weight for member in package.members] == [share / sum(shares) for share in shares]
    assert package.study == study


def test_member_without_a_graph_tells_why(tmp_path: Path) -> None:
    members = [new_member(1, 0.5), new_member(2, 0.5, onnx=None, max_difference=None, reason="it branches on its data")]
    package = write(tmp_path / "ensemble", members=members)
    assert [member.trial for member in package.without_graph] == [2]
    assert package.without_graph[0].reason == "it branches on its data"
    assert not (tmp_path / "ensemble" / "member-0002.onnx").exists()


def test_package_replaces_an_older_package(tmp_path: Path) -> None:
    write(tmp_path / "ensemble")
    write(tmp_path / "ensemble", members=[new_member(5)])
    assert not (tmp_path / "ensemble" / "member-0017.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble"]


def test_package_does_not_replace_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PackageError, match="holds other files"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="is a file; a package is a folder"):
        write(tmp_path / "file")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": []}, "members must have 1 to 1,000 entries (found 0)"),
        ({"members": [new_member(1, 0.5)]}, "the members' weights sum to 0.5, not to 1"),
        ({"members": [new_member(1, 0.5), new_member(1, 0.5)]}, "a trial is listed twice as a member"),
        ({"members": [new_member(1, float("nan"))]}, "cannot hold these values"),
        ({"members": [new_member(1, onnx=None)]}, "members[0].reason must be given when there is no graph"),
        ({"members": [new_member(1, reason="but there is a graph")]}, "members[0].reason must be given when"),
        ({"members": [new_member(1, weights=b"")]}, "members[0].weights.bytes must be an integer from 1"),
        ({"n_classes": 1}, "logits need 2 classes or more (found 1)"),
        ({"n_classes": None}, "logits need 2 classes or more (found None)"),
        ({"classes": ["cat", "dog"]}, "2 classes are named, n_classes is 10"),
        ({"outputs": "probabilities"}, "outputs must be one of logits, values, binary_logits (found 'probabilities')"),
        ({"input_dtype": "object"}, "input_dtype must be one of float16"),
        ({"input_shape": (0,)}, "input_shape[0] must be an integer from 1"),
    ],
)
def test_values_that_make_no_package_are_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError) as caught:
        write(tmp_path / "ensemble", **changes)
    assert message in caught.value.message
    assert list(tmp_path.iterdir()) == []


# A hostile or damaged package


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("package") / "ensemble"
    write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, pristine: dict[str, bytes]) -> Path:
    folder = tmp_path / "ensemble"
    folder.mkdir()
    for name, data in pristine.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["member-0017.onnx", "member-0017.safetensors", "member-0004.onnx"])
def test_every_altered_byte_of_a_member_is_found(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(PackageError, match=f"{name} was altered"):
            read_package(folder)


def test_a_truncated_or_longer_or_missing_member_is_found(folder: Path) -> None:
    path = folder / "member-0017.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(PackageError, match=r"has 18 bytes; ensemble\.json says 19"):
        read_package(folder)
    path.write_bytes(data + b"!")
    with pytest.raises(PackageError, match=r"has 20 bytes; ensemble\.json says 19"):
        read_package(folder)
    path.unlink()
    with pytest.raises(PackageError, match=r"has no member-0017\.safetensors"):
        read_package(folder)


def test_a_file_altered_after_it_was_verified_is_not_used(folder: Path) -> None:
    package = read_package(folder)
    onnx = package.members[0].onnx
    assert onnx is not None
    (folder / onnx.file).write_bytes(bytes(onnx.bytes))
    with pytest.raises(PackageError, match="was altered"):
        package.read_file(onnx)


@pytest.mark.parametrize(
    "name",
    ["../../x.onnx", "/etc/passwd", "/tmp/x.onnx", "..", ".", "", "a/b.onnx", "a\\b.onnx", ".hidden.onnx", "x.onnx\0",
     "x.onnx\n", "C:x.onnx", "x.pkl", "~x.onnx", "ü.onnx", "x" * 200 + ".onnx", "ensemble.json"],
)  # fmt: skip
def test_a_file_name_that_is_not_plain_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "x.onnx").write_bytes((folder / "member-0017.onnx").read_bytes())
    message = altered(folder, lambda found: found["members"][0]["onnx"].update(file=name))
    assert "members[0].onnx.file must be a plain name that ends in .onnx, without a folder (found " in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["member-0017.onnx", "ensemble.json"])
def test_links_are_not_followed(folder: Path, name: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)  # the very bytes that are expected
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(PackageError, match=f"{name} is a link"):
        read_package(folder)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["member-0017.onnx", "ensemble.json"])
def test_pipes_and_folders_are_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(PackageError, match=f"{name} is not a plain file"):
        read_package(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(PackageError, match=f"{name} is not a plain file"):
        read_package(folder)


def test_an_oversize_file_is_refused_before_it_is_read(folder: Path) -> None:
    os.truncate(folder / "member-0017.onnx", 2**40)  # sparse: a terabyte on paper
    with pytest.raises(PackageError, match=r"member-0017\.onnx has 1,099,511,627,776 bytes; at most"):
        read_package(folder)
    os.truncate(folder / "ensemble.json", MAX_MANIFEST_BYTES + 1)
    with pytest.raises(PackageError, match=r"ensemble\.json has 16,777,217 bytes; at most 16,777,216"):
        read_package(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "ensemble.json is not JSON"),
        (b"\x80\x04\x95", "ensemble.json is not JSON"),
        (b"[" * 200_000 + b"]" * 200_000, "ensemble.json is nested too deeply"),
        (b'{"a":' * 200_000, "ensemble.json is nested too deeply"),
        (b"[]", "ensemble.json must be an object (found a list)"),
        (b"{}", "ensemble.json: format_version is missing"),
        (b'{"format_version": NaN}', "ensemble.json is not JSON: NaN is not a number of JSON"),
        (b'{"format_version": 1, "format_version": 1}', "ensemble.json is not JSON: a key occurs twice in one object"),
        (b'{"format_version": 2}', "ensemble.json has format 2; this hpsearch reads format 1"),
        (b'{"format_version": true}', "format_version must be an integer from 0 to"),
        (b'{"format_version": ' + b"9" * 10_000 + b"}", "ensemble.json"),
    ],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, text: bytes, message: str) -> None:
    (folder / "ensemble.json").write_bytes(text)
    with pytest.raises(PackageError) as caught:
        read_package(folder)
    assert message in caught.value.message
    assert len(caught.value.message) < 300


def _paths(found: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of the manifest that a reader must know; what is inside config, metrics' values and shape is free."""
    paths = []
    if isinstance(found, dict) and path[-1:] not in {("config",), ("val",), ("test",), ("gain",)}:
        for key, item in found.items():
            paths += [(*path, key), *_paths(item, (*path, key))]
    elif isinstance(found, list):
        for index, item in enumerate(found):
            paths += _paths(item, (*path, index))
    return paths


def test_every_key_is_needed_and_no_other_is_known(folder: Path, pristine: dict[str, bytes]) -> None:
    whole = json.loads(pristine["ensemble.json"])
    paths = _paths(whole)
    assert len(paths) == 12 + 3 + 2 * (8 + 3 + 3)
    for path in paths:
        for unknown in (False, True):
            found = copy.deepcopy(whole)
            parent: Any = found
            for key in path[:-1]:
                parent = parent[key]
            if unknown:
                parent["surprise"] = 1
            else:
                del parent[path[-1]]
            (folder / "ensemble.json").write_text(json.dumps(found))
            with pytest.raises(PackageError, match="is not a known key" if unknown else f"{path[-1]} is missing"):
                read_package(folder)


@pytest.mark.parametrize("wrong", [{}, [], {"a": {}}, [[]], True, "text", -1, 1e308, 0.5, None, 10**400])
def test_no_wrong_type_gets_past_the_reader(folder: Path, pristine: dict[str, bytes], wrong: object) -> None:
    """Whatever stands in place of a value is either read as what it is, or refused with a PackageError."""
    whole = json.loads(pristine["ensemble.json"])
    for path in _paths(whole):
        found = copy.deepcopy(whole)
        parent: Any = found
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = wrong
        (folder / "ensemble.json").write_text(json.dumps(found))
        problem = problem_of(folder)
        free = {"study", "test_fingerprint", "created", "hpsearch_version", "run_id", "config", "val", "test", "gain"}
        free |= {"classes", "input_shape", "max_difference"}
        assert problem.isprintable(), (path, problem)
        assert problem or path[-1] in free, (path, wrong)


def problem_of(folder: Path) -> str:
    """Why the package is refused; "" when it is read."""
    try:
        read_package(folder)
    except PackageError as error:
        return error.message
    return ""


def test_weights_that_are_negative_or_not_finite_or_do_not_sum_to_1_are_refused(
    folder: Path, pristine: dict[str, bytes]
) -> None:
    def change(weights: tuple[float, float]) -> Callable[[dict[str, Any]], None]:
        return lambda found: [m.update(weight=w) for m, w in zip(found["members"], weights, strict=True)] and None

    assert altered(folder, change((1.5, -0.5))) == "ensemble.json: members[0].weight must be within 0 and 1 (found 1.5)"
    for bad in (float("nan"), float("inf")):
        assert altered(folder, change((bad, 0.5))).startswith("ensemble.json is not JSON: ")
        (folder / "ensemble.json").write_bytes(pristine["ensemble.json"])
    assert altered(folder, change((0.5, 0.4))) == "ensemble.json: the members' weights sum to 0.9, not to 1"


def test_one_file_for_two_members_is_refused(folder: Path) -> None:
    message = altered(folder, lambda found: found["members"][1].update(onnx=found["members"][0]["onnx"]))
    assert message == "ensemble.json: a file is listed twice"


def test_files_that_the_manifest_does_not_name_are_left_alone(folder: Path) -> None:
    (folder / "OUT.npz").write_bytes(b"mine")
    (folder / "python_model.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert read_package(folder).study == "digits"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is not a folder"):
        read_package(tmp_path / "nowhere")
    with pytest.raises(PackageError, match=r"has no ensemble\.json"):
        read_package(tmp_path)
