"""An ensemble fetched as data: from a registry that is in order, one that is hostile, and one that is not there."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from hpsearch.errors import TrackerError, UsageError
from hpsearch.package import PackageError
from hpsearch.state import StudyState
from hpsearch.tracker import Tracker, pull
from tests.mlflow_server import free_port, mlflow_server
from tests.tracked_study import Script, small_package

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <sqlite3.Connection:pytest.PytestUnraisableExceptionWarning"
    ),
]

FILES = {"ensemble.json", "member-0000.onnx", "member-0000.safetensors", "member-0001.onnx", "member-0001.safetensors"}


def register(folder: Path, uri: str, *, uid: str = "0123456789abcdef", name: str = "digits") -> None:
    """A version of a registered model, as a launch leaves it."""
    folder.mkdir(parents=True)

    def package(state: StudyState, run_ids: Mapping[int, str]) -> Path:
        small_package(folder / "model")
        return folder / "model"

    script = Script(name, uid=uid).data().search_begins().trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0])
    tracker = Tracker(folder, tracking_uri=uri, package=package)
    report = tracker.sync(script.search_ends().ensemble().ends().state())
    tracker.close()
    assert report.error is None
    assert report.version is not None


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that holds `digits`, version 1 (champion) and 2."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        for i in range(2):
            register(folder / f"run-{i}", f"sqlite:///{folder}/mlflow.db", uid=f"{i:016d}")
    return folder


@pytest.fixture
def uri(registry: Path) -> str:
    return f"sqlite:///{registry}/mlflow.db"


@pytest.fixture
def hostile(registry: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address, and the folder of version 1's files, which the test may alter."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{registry}/mlflow.db"
    artifacts = Path(MlflowClient(tracking_uri=uri).get_model_version_download_uri("digits", "1"))
    shutil.copytree(artifacts, tmp_path / "saved")
    yield uri, artifacts
    shutil.rmtree(artifacts)
    shutil.copytree(tmp_path / "saved", artifacts)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# In order


def test_champion_is_pulled_by_default_and_only_the_ensemble(uri: str, tmp_path: Path) -> None:
    pulled = pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert (pulled.version, pulled.aliases, pulled.tracking_uri) == ("1", ("champion",), uri)
    assert names_in(tmp_path / "out") == FILES
    assert [member.trial for member in pulled.package.members] == [0, 1]
    assert names_in(tmp_path) == {"out", *(f"out/{name}" for name in FILES)}  # nothing else is left behind


def test_version_is_pulled_by_number(uri: str, tmp_path: Path) -> None:
    pulled = pull("digits", version="2", out=tmp_path / "deep" / "out", tracking_uri=uri)
    assert (pulled.version, pulled.aliases) == ("2", ())


def test_empty_folder_is_used_and_a_full_one_refused(uri: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pull("digits", out=tmp_path / "out", tracking_uri=uri)
    with pytest.raises(UsageError) as found:
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert str(found.value) == (
        f"error[usage]: {tmp_path}/out is not empty\n  hint: name a new folder with --out, or clear it"
    )


def test_file_as_out_is_refused(uri: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file; --out names a folder"):
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert (tmp_path / "out").read_text() == "mine"


# Not there


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"name": "digit"}, "there is no model 'digit' in {uri}; did you mean 'digits'? (known: digits)"),
        (
            {"name": "digits", "alias": "campion"},
            "there is no alias 'campion' of model 'digits' in {uri}; did you mean 'champion'? (known: champion)",
        ),
        ({"name": "digits", "version": "9"}, "there is no version '9' of model 'digits' in {uri} (known: 1, 2)"),
        (
            {"name": "digits", "version": "latest"},
            "there is no version 'latest' of model 'digits' in {uri} (known: 1, 2)",
        ),
        (
            {"name": "digits", "version": "1", "alias": "champion"},
            "--alias and --version are two ways to name a version; give one",
        ),
        ({"name": "it's an mnist"}, 'there is no model "it\'s an mnist" in {uri} (known: digits)'),
        ({"name": "../digits"}, "there is no model '../digits' in {uri}; did you mean 'digits'? (known: digits)"),
        ({"name": ""}, "there is no model '' in {uri} (known: digits)"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(uri: str, tmp_path: Path, wanted: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as found:
        pull(out=tmp_path / "out", tracking_uri=uri, **wanted)  # type: ignore[arg-type]
    assert found.value.message == message.format(uri=uri)
    assert found.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_server_out_of_reach_is_told_within_seconds_and_without_credentials(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(TrackerError) as found:
        pull("digits", out=tmp_path / "out", tracking_uri=f"http://ann:s3cret@127.0.0.1:{free_port()}")
    assert time.monotonic() - begun < 5
    assert found.value.exit_code == 4
    assert found.value.message.startswith("MLflow is out of reach: nobody answers at http://127.0.0.1:")
    assert "s3cret" not in str(found.value)


def test_name_that_resolves_to_nobody_is_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(TrackerError) as found:
        pull("digits", out=tmp_path / "out", tracking_uri="http://mlflow.invalid:5000")
    assert "mlflow.invalid" in found.value.message


# Hostile


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (_sing, (str(self.path),))


def _sing(path: str) -> None:
    Path(path).write_text("executed")


def plant(artifacts: Path, canary: Path) -> None:
    """What a registry's attacker can do beside our files: code, pickles, requirements, a loader of theirs."""
    code = f"open({str(canary)!r}, 'w').write('executed')\n"
    bomb = pickle.dumps(Canary(canary))
    for name in ("pyfunc_model.py", "sitecustomize.py", "setup.py", "artifacts/ensemble/__init__.py"):
        (artifacts / name).write_text(code)
    for name in (
        "python_model.pkl",
        "model.pkl",
        "artifacts/ensemble/member-0000.pkl",
        "artifacts/ensemble/weights.pt",
    ):
        (artifacts / name).write_bytes(bomb)
    (artifacts / "requirements.txt").write_text("--index-url http://127.0.0.1:1/\nevil\n")
    model = (artifacts / "MLmodel").read_text()
    (artifacts / "MLmodel").write_text(
        model.replace("mlflow.pyfunc.loaders.code_model", "mlflow.pyfunc.model")
        + "\n  x: !!python/object/apply:os.system ['touch canary']\n"
    )


def test_planted_code_and_pickles_are_neither_run_nor_fetched(
    hostile: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, artifacts = hostile
    canary = tmp_path / "canary"
    monkeypatch.chdir(tmp_path)
    plant(artifacts, canary)
    pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert not canary.exists()
    assert names_in(tmp_path / "out") == FILES
    pickle.loads((artifacts / "model.pkl").read_bytes())
    assert canary.exists()  # the bomb was live: whoever loads it hears the canary


def test_members_replaced_by_pickles_are_refused(hostile: tuple[str, Path], tmp_path: Path) -> None:
    uri, artifacts = hostile
    canary = tmp_path / "canary"
    for name in FILES - {"ensemble.json"}:
        (artifacts / "artifacts" / "ensemble" / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(PackageError) as found:
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert "member-0000.safetensors has" in found.value.message
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_altered_member_of_the_same_size_is_refused(hostile: tuple[str, Path], tmp_path: Path) -> None:
    uri, artifacts = hostile
    file = artifacts / "artifacts" / "ensemble" / "member-0001.onnx"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    with pytest.raises(PackageError, match=r"member-0001\.onnx was altered"):
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert names_in(tmp_path) == {"saved", *(f"saved/{n}" for n in names_in(tmp_path / "saved"))}


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "..",
        "a/b.onnx",
        "..\\x.onnx",
        "x\x00.onnx",
        "~/x.onnx",
        "models:/x/1/y",
        "",
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(hostile: tuple[str, Path], tmp_path: Path, name: str) -> None:
    uri, artifacts = hostile
    manifest = artifacts / "artifacts" / "ensemble" / "ensemble.json"
    body = json.loads(manifest.read_text())
    body["members"][0]["onnx"]["file"] = name
    manifest.write_text(json.dumps(body))
    with pytest.raises(PackageError):
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert not (tmp_path / "out").exists()


def test_link_to_a_file_outside_is_not_followed_into_out(hostile: tuple[str, Path], tmp_path: Path) -> None:
    uri, artifacts = hostile
    secret = tmp_path / "secret"
    secret.write_bytes(b"weights 0")  # even with the right content
    member = artifacts / "artifacts" / "ensemble" / "member-0000.safetensors"
    member.unlink()
    member.symlink_to(secret)
    try:
        pulled = pull("digits", out=tmp_path / "out", tracking_uri=uri)
    except (PackageError, TrackerError):
        assert not (tmp_path / "out").exists()
    else:
        assert not (pulled.out / member.name).is_symlink()  # copied, and its digest compared


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"[]", b"{}", b"[" * 100_000, b'{"format_version": 99}'])
def test_manifest_that_is_none_is_refused(hostile: tuple[str, Path], tmp_path: Path, content: bytes) -> None:
    uri, artifacts = hostile
    (artifacts / "artifacts" / "ensemble" / "ensemble.json").write_bytes(content)
    with pytest.raises(PackageError):
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert not (tmp_path / "out").exists()


def test_version_that_is_no_ensemble_is_told_as_such(hostile: tuple[str, Path], tmp_path: Path) -> None:
    uri, artifacts = hostile
    shutil.rmtree(artifacts / "artifacts")
    with pytest.raises(PackageError) as found:
        pull("digits", out=tmp_path / "out", tracking_uri=uri)
    assert found.value.message == "the version holds no ensemble.json; it is not an ensemble of hpsearch, or not whole"


def test_version_whose_member_is_gone_is_told_as_such(hostile: tuple[str, Path], tmp_path: Path) -> None:
    uri, artifacts = hostile
    (artifacts / "artifacts" / "ensemble" / "member-0001.onnx").unlink()
    with pytest.raises(PackageError, match=r"holds no member-0001\.onnx"):
        pull("digits", out=tmp_path / "out", tracking_uri=uri)


# A server


@pytest.mark.slow
def test_ensemble_is_pulled_from_a_server_and_planted_code_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with mlflow_server(tmp_path / "server") as server:
        register(tmp_path / "run", server.uri)
        artifacts = next((tmp_path / "server" / "artifacts").rglob("MLmodel")).parent
        plant(artifacts, tmp_path / "canary")
        pulled = pull("digits", out=tmp_path / "out", tracking_uri=server.uri)
        assert (pulled.version, names_in(tmp_path / "out")) == ("1", FILES)
        with pytest.raises(UsageError, match="there is no version '7' of model 'digits'"):
            pull("digits", version="7", out=tmp_path / "other", tracking_uri=server.uri)
        (artifacts / "artifacts" / "ensemble" / "member-0000.onnx").unlink()
        with pytest.raises(PackageError, match=r"holds no member-0000\.onnx"):
            pull("digits", out=tmp_path / "other", tracking_uri=server.uri)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "mlflow.db").exists()
