"""A study in a real MLflow: on SQLite, and on a server that goes away and comes back."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpsearch.errors import TrackerError
from hpsearch.notes import add_note
from hpsearch.state import StudyState
from hpsearch.tracker import JournalFollower, SyncReport, Tracker, TrackerThread
from hpsearch.tracker.mlflow_writer import (
    MlflowWriter,
    OutOfReach,
    begin_with_write_ahead_log,
    fold_write_ahead_log,
    make_client,
)
from hpsearch.tracker.outbox import Outbox
from tests.mlflow_server import MlflowServer, free_port, mlflow_server
from tests.tracked_study import START, Script, small_package, whole_study

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

pytestmark = [
    # SQLAlchemy tells MLflow's developers of what they use; newer releases of it only.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    # The stores' connections are MLflow's to close; the collector finds them.
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <sqlite3.Connection:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables, which take seconds to make."""

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin_with_write_ahead_log(f"sqlite:///{path}")  # as a launch would, and quicker
        make_client(f"sqlite:///{path}").search_experiments()
        fold_write_ahead_log(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts beside where it is run
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def package_for(run_dir: Path):  # type: ignore[no-untyped-def]
    def make(state: StudyState, run_ids: Mapping[int, str]) -> Path:
        assert state.selected is not None
        small_package(run_dir / "model", members=state.selected.members)
        return run_dir / "model"

    return make


def sync(run_dir: Path, uri: str, state: StudyState, **more: bool) -> SyncReport:
    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir))
    try:
        return tracker.sync(state, **more)
    finally:
        tracker.close()


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, experiment_id: str) -> dict[str, Run]:
    """Runs by name; a name that occurs twice is a failure."""
    runs = client_of(uri).search_runs([experiment_id], max_results=1000)
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names)), f"some runs came twice: {sorted(names)}"
    return {run.info.run_name: run for run in runs}


WHOLE = {"digits", "lr-range", "trial-0000", "trial-0001", "trial-0002", "trial-0003", "ensemble"}


# What arrives


def test_whole_study_arrives_with_its_runs_numbers_and_model(run_dir: Path, uri: str) -> None:
    report = sync(run_dir, uri, whole_study().state())
    assert (report.error, report.waiting, report.sent) == (None, 0, 14)
    assert report.experiment_id is not None
    runs = runs_of(uri, report.experiment_id)
    assert set(runs) == WHOLE
    study = runs["digits"]
    assert all(
        run.data.tags["mlflow.parentRunId"] == study.info.run_id for name, run in runs.items() if name != "digits"
    )
    assert (study.info.status, study.info.start_time) == ("FINISHED", START * 1000)
    assert study.data.metrics["best_objective"] == 0.4
    assert study.data.params["data.n_train"] == "100"
    assert study.data.tags["mlflow.source.git.commit"] == "abc123"
    assert study.inputs.dataset_inputs[0].dataset.name == "digits"
    best = runs["trial-0000"]
    assert (best.info.status, best.data.metrics["objective"], best.data.params["lr"]) == ("FINISHED", 0.4, "0.01")
    assert [m.value for m in client_of(uri).get_metric_history(best.info.run_id, "val_loss")] == [0.9, 0.6, 0.4]
    assert math.isnan(runs["trial-0002"].data.metrics["val_loss"])
    artifacts = {file.path for file in client_of(uri).list_artifacts(study.info.run_id)}
    assert {"space.yaml", "environment.json"} <= artifacts


def test_report_is_the_mlflow_object_of_the_verdict(run_dir: Path, uri: str) -> None:
    report = sync(run_dir, uri, whole_study().state())
    assert report.as_json() == {
        "tracking_uri": uri,
        "experiment_id": report.experiment_id,
        "run_id": report.run_id,
        "model": "digits",
        "version": "1",
        "alias": "champion",
    }
    assert report.run_id is not None
    assert client_of(uri).get_run(report.run_id).info.run_name == "digits"


def test_second_sync_sends_nothing_and_reports_the_same(run_dir: Path, uri: str) -> None:
    state = whole_study().state()
    first = sync(run_dir, uri, state)
    second = sync(run_dir, uri, state)
    assert second.sent == 0
    assert second.as_json() == first.as_json()
    assert second.test_uses == 1


def test_study_is_the_same_sent_as_it_goes_or_at_the_end(run_dir: Path, uri: str, tmp_path: Path) -> None:
    script = whole_study("slow")
    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir))
    state = StudyState()
    for when, event in script.events:
        state.apply(event, when)
        assert tracker.sync(state).error is None
    tracker.close()
    other = tmp_path / "other"
    other.mkdir()
    at_once = whole_study("fast")
    at_once.uid = "f" * 16
    at_once.events[0] = Script("fast", uid="f" * 16).events[0]
    sync(other, uri, at_once.state())
    found = []
    for name in ("slow", "fast"):
        experiment = client_of(uri).get_experiment_by_name(name)
        assert experiment is not None
        runs = runs_of(uri, experiment.experiment_id)
        found.append(
            {k.replace(name, "study"): (r.info.status, r.data.metrics, r.data.params) for k, r in runs.items()}
        )
    for run in found[0]:
        assert str(found[0][run]).replace("slow", "fast") == str(found[1][run])  # as text, since nan is not nan


def test_note_taken_later_arrives_with_the_next_sync(run_dir: Path, uri: str) -> None:
    state = whole_study().state()
    report = sync(run_dir, uri, state)
    add_note(run_dir, "the scanner was replaced", clock=lambda: 0.0)
    assert sync(run_dir, uri, state).sent == 1
    assert report.run_id is not None
    tags = client_of(uri).get_run(report.run_id).data.tags
    assert tags["mlflow.note.content"].endswith("- 1970-01-01 00:00 UTC: the scanner was replaced")


def test_study_that_grew_continues_its_runs_and_registers_again(run_dir: Path, uri: str) -> None:
    script = whole_study()
    first = sync(run_dir, uri, script.state())
    script.resume(trials=5).search_begins().trial(1, [0.3, 0.2], first=2).trial(4, [0.9]).search_ends()
    script.ensemble(((1, 1.0),), n_trials=5, best=1, test_loss=0.2).ends()
    second = sync(run_dir, uri, script.state())
    assert (second.run_id, second.version, second.alias) == (first.run_id, "2", "champion")
    assert second.alias_why == "test loss 0.22 against 0.3 of version 1"  # the script's single models score 0.02 worse
    assert second.experiment_id is not None
    runs = client_of(uri).search_runs([second.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([*WHOLE, "trial-0004", "ensemble"])
    grown = next(run for run in runs if run.info.run_name == "trial-0001")
    assert (grown.info.status, grown.data.metrics["objective"]) == ("FINISHED", 0.2)
    assert client_of(uri).get_run(str(second.run_id)).data.tags["hpsearch.search.trials"] == "5"


def test_study_that_stopped_is_killed_and_goes_on_when_it_is_resumed(run_dir: Path, uri: str) -> None:
    script = Script().data().search_begins().trial(0, [0.9])
    report = sync(run_dir, uri, script.state(), running=False)
    study = str(report.run_id)
    assert client_of(uri).get_run(study).info.status == "KILLED"
    script.resume()
    sync(run_dir, uri, script.state())
    assert client_of(uri).get_run(study).info.status == "RUNNING"
    script.search_ends().ends()
    sync(run_dir, uri, script.state())
    assert client_of(uri).get_run(study).info.status == "FINISHED"


def test_plots_are_artifacts_and_a_broken_plot_costs_nothing(run_dir: Path, uri: str) -> None:
    def plots(topic: str, state: StudyState) -> dict[str, bytes]:
        if topic == "ensemble":
            raise ZeroDivisionError
        return {f"{topic}.png": b"png"}

    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir), plots=plots)
    report = tracker.sync(whole_study().state())
    tracker.close()
    assert (report.error, report.version) == (None, "1")
    runs = runs_of(uri, str(report.experiment_id))
    found = {name: client_of(uri).list_artifacts(runs[name].info.run_id, "plots") for name in ("digits", "lr-range")}
    assert {name: [file.path for file in files] for name, files in found.items()} == {
        "digits": ["plots/search.png"],
        "lr-range": ["plots/lr-range.png"],
    }


def test_store_that_is_not_the_default_one_is_the_only_one_touched(
    run_dir: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(empty_store, elsewhere / "mlflow.db")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    report = sync(run_dir, f"sqlite:///{elsewhere}/mlflow.db", whole_study().state())
    assert (report.error, report.waiting, report.version) == (None, 0, "1")
    assert not (here / "mlflow.db").exists()


def test_new_store_is_whole_in_one_file_once_the_tracker_is_closed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = sync(run_dir, f"sqlite:///{tmp_path}/new.db", whole_study().state())
    assert report.error is None
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "new.db", tmp_path / "copy" / "new.db")
    assert set(runs_of(f"sqlite:///{tmp_path}/copy/new.db", str(report.experiment_id))) == WHOLE
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_store_that_is_there_keeps_its_journal_mode(run_dir: Path, uri: str, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    sync(run_dir, uri, Script().state())
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


SYNC_WHEN_TOLD = """
import sys
from pathlib import Path
from hpsearch.tracker import Tracker
from tests.tracked_study import Script
folder, uri, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tracker = Tracker(folder, tracking_uri=uri)
tracker.prepare()
state = Script(name, uid=name * 8).state()
print("ready", flush=True)
sys.stdin.readline()
report = tracker.sync(state)
tracker.close()
print(report.error, report.waiting)
"""


@pytest.mark.slow
def test_two_processes_that_make_the_same_new_store_at_once_both_succeed(tmp_path: Path) -> None:
    processes = []
    for name in ("ab", "cd"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-W", "ignore", "-c", SYNC_WHEN_TOLD, str(tmp_path / name)]
        processes.append(
            subprocess.Popen(
                [*command, f"sqlite:///{tmp_path}/new.db", name],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert told == ["None 0\n", "None 0\n"]
    experiments = client_of(f"sqlite:///{tmp_path}/new.db").search_experiments()
    assert {experiment.name for experiment in experiments} == {"Default", "ab", "cd"}


def test_store_that_another_process_is_making_for_too_long_is_out_of_reach(
    run_dir: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.tracker.mlflow_writer._MAKING_S", 0.2)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    report = sync(run_dir, uri, Script().state())
    os.close(handle)
    assert (report.error, report.out_of_reach) == (f"another process is making {uri}", True)
    assert sync(run_dir, uri, Script().state()).error is None


# Registry


def study_with_score(name: str, uid: str, loss: float, *, test: str = "test-split-1") -> StudyState:
    script = Script(name, uid=uid).data(test_fingerprint=test).search_begins()
    script.trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0]).search_ends()
    return script.ensemble(test_loss=loss).ends().state()


def test_alias_follows_the_better_ensemble_on_the_same_test_split_alone(tmp_path: Path, uri: str) -> None:
    told = []
    scores = [(0.30, "a"), (0.35, "a"), (0.25, "a"), (0.10, "b")]
    for i, (loss, test) in enumerate(scores):
        folder = tmp_path / f"run-{i}"
        folder.mkdir()
        report = sync(folder, uri, study_with_score("digits", f"{i:016d}", loss, test=test))
        told.append((report.version, report.alias, report.alias_why, report.test_uses))
    assert told == [
        ("1", "champion", "no version was champion", 1),
        ("2", None, "version 1 stays champion: test loss 0.35 against 0.3 of version 1", 2),
        ("3", "champion", "test loss 0.25 against 0.3 of version 1", 3),
        ("4", None, "version 3 stays champion: it was measured on another test split", 1),
    ]
    aliases = client_of(uri).get_registered_model("digits").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"champion": "3"}


def test_ensemble_chosen_again_at_the_same_size_is_another_run_and_version(run_dir: Path, uri: str) -> None:
    script = whole_study()
    first = sync(run_dir, uri, script.state())
    script.resume().search_begins().trial(1, [0.5], first=2).search_ends()  # a raised budget
    script.ensemble(((1, 1.0),), best=1, test_loss=0.4).ends()
    worse = sync(run_dir, uri, script.state())
    script.resume().ensemble(((1, 0.5), (0, 0.5)), best=1, test_loss=0.1).ends()  # another `ensemble:` section
    better = sync(run_dir, uri, script.state())
    assert [(report.error, report.waiting) for report in (first, worse, better)] == [(None, 0)] * 3
    assert [(report.version, report.alias) for report in (first, worse, better)] == [
        ("1", "champion"),
        ("2", None),
        ("3", "champion"),
    ]
    (run_dir / "outbox.jsonl").unlink()
    again = sync(run_dir, uri, script.state())
    assert (again.error, again.as_json()) == (None, better.as_json())
    assert sync(run_dir, uri, script.state()).sent == 0
    versions = client_of(uri).search_model_versions("name = 'digits'")
    runs = client_of(uri).search_runs([str(first.experiment_id)])
    members = {run.info.run_id: run.data.params["member.0"] for run in runs if run.info.run_name == "ensemble"}
    assert {v.version: members[str(v.run_id)] for v in versions} == {
        1: "trial 0, weight 0.75",
        2: "trial 1, weight 1",
        3: "trial 1, weight 0.5",
    }
    assert len(members) == 3


def test_registered_version_has_signature_example_and_the_package(run_dir: Path, uri: str, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    report = sync(run_dir, uri, whole_study().state())
    folder = Path(download_artifacts(artifact_uri="models:/digits/1", dst_path=str(tmp_path / "m"), tracking_uri=uri))
    model = Model.load(str(folder))
    assert model.signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 4)}
    assert model.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float64", "shape": (-1, 3)}
    assert model.saved_input_example_info is not None
    assert "onnxruntime==" in (folder / "requirements.txt").read_text()
    assert (folder / "artifacts" / "ensemble" / "ensemble.json").is_file()
    version = client_of(uri).get_model_version("digits", "1")
    assert version.run_id == runs_of(uri, str(report.experiment_id))["ensemble"].info.run_id
    assert version.tags["hpsearch.test_fingerprint"] == "test-split-1"


def test_study_without_a_package_has_runs_and_no_version(run_dir: Path, uri: str) -> None:
    tracker = Tracker(run_dir, tracking_uri=uri, package=lambda state, run_ids: None)
    report = tracker.sync(whole_study().state())
    tracker.close()
    assert (report.error, report.version, report.waiting) == (None, None, 0)


def test_packaging_that_fails_is_told_and_the_rest_arrives(run_dir: Path, uri: str) -> None:
    def broken(state: StudyState, run_ids: Mapping[int, str]) -> Path:
        raise KeyError("export")

    tracker = Tracker(run_dir, tracking_uri=uri, package=broken)
    report = tracker.sync(whole_study().state())
    tracker.close()
    assert report.waiting == 0
    assert report.alias_why == "the ensemble could not be packaged: KeyError: 'export'"


# Crashes and deletions


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("call", ["create_run", "write", "end_run", "register", "write_dataset"])
def test_process_that_dies_after_any_call_leaves_nothing_twice(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = whole_study().state()
    original = getattr(MlflowWriter, call)
    for survived in range(40):
        left = [survived]

        def dies(*args: object, left: list[int] = left, **kwargs: object) -> object:
            answer = original(*args, **kwargs)  # MLflow has it; nobody here learns so
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return answer

        monkeypatch.setattr(MlflowWriter, call, dies)
        try:
            report = sync(run_dir, uri, state)
            break
        except Crash:
            continue
    assert survived > 0
    assert (report.error, report.waiting) == (None, 0)
    assert set(runs_of(uri, str(report.experiment_id))) == WHOLE
    assert len(client_of(uri).search_model_versions("name = 'digits'")) == 1


def test_lost_outbox_is_made_good_by_asking_the_server(run_dir: Path, uri: str) -> None:
    state = whole_study().state()
    first = sync(run_dir, uri, state)
    (run_dir / "outbox.jsonl").unlink()
    again = sync(run_dir, uri, state)
    assert again.as_json() == first.as_json()
    assert set(runs_of(uri, str(again.experiment_id))) == WHOLE
    assert len(client_of(uri).search_model_versions("name = 'digits'")) == 1


def test_new_database_at_the_same_address_gets_everything_again(
    run_dir: Path, uri: str, tmp_path: Path, empty_store: Path
) -> None:
    state = whole_study().state()
    sync(run_dir, uri, state)
    other = f"sqlite:///{tmp_path}/second.db"
    shutil.copy(empty_store, tmp_path / "second.db")
    lines = (run_dir / "outbox.jsonl").read_text()
    moved = Outbox(run_dir, other)
    mine = moved._server
    moved.close()
    old = Outbox(run_dir, uri)
    theirs = old._server
    old.close()
    (run_dir / "outbox.jsonl").write_text(lines.replace(theirs, mine))  # as if `second.db` had been there all along
    report = sync(run_dir, other, state)
    assert (report.error, report.sent) == (None, 14)
    assert set(runs_of(other, str(report.experiment_id))) == WHOLE


def test_trial_deleted_in_mlflow_stays_deleted(run_dir: Path, uri: str) -> None:
    state = whole_study().state()
    report = sync(run_dir, uri, state)
    client_of(uri).delete_run(runs_of(uri, str(report.experiment_id))["trial-0001"].info.run_id)
    assert sync(run_dir, uri, state).sent == 0
    assert set(runs_of(uri, str(report.experiment_id))) == WHOLE - {"trial-0001"}


def test_deleted_study_run_is_named_with_the_way_back(run_dir: Path, uri: str) -> None:
    script = Script().data()
    first = sync(run_dir, uri, script.state())
    client_of(uri).delete_run(str(first.run_id))
    report = sync(run_dir, uri, script.ends().state())
    assert report.error == (
        f"the study's run {first.run_id} was deleted in MLflow; restore it: mlflow runs restore --run-id {first.run_id}"
    )
    assert not report.out_of_reach


def test_deleted_experiment_is_named_with_the_way_back(run_dir: Path, uri: str) -> None:
    client = client_of(uri)
    number = client.create_experiment("digits")
    client.delete_experiment(number)
    report = sync(run_dir, uri, whole_study().state())
    assert report.error == (
        "the experiment 'digits' was deleted in MLflow; restore it (mlflow experiments restore"
        f" --experiment-id {number}) or name another: --set mlflow.experiment=NAME"
    )
    assert report.as_json() == dict.fromkeys(["tracking_uri", "experiment_id", "run_id", "model", "version", "alias"])
    with pytest.raises(TrackerError, match="was deleted in MLflow"):
        report.raise_for_error()


def test_experiment_made_by_another_study_meanwhile_is_used(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    number = client_of(uri).create_experiment("digits")
    original = MlflowClient.get_experiment_by_name
    asked: list[str] = []

    def get_experiment_by_name(self: MlflowClient, name: str) -> object:
        asked.append(name)
        return None if len(asked) == 1 else original(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", get_experiment_by_name)
    report = sync(run_dir, uri, Script().state())
    assert (report.error, report.experiment_id) == (None, number)


# Addresses


def test_address_is_the_option_then_the_environment_then_the_default(
    run_dir: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> None:
    state = Script().state()
    for name in ("option.db", "environment.db"):
        shutil.copy(empty_store, tmp_path / name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    assert sync(run_dir, f"sqlite:///{tmp_path}/option.db", state).tracking_uri.endswith("/option.db")
    tracker = Tracker(run_dir)
    assert tracker.sync(state).tracking_uri.endswith("/environment.db")
    tracker.close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = Tracker(run_dir)
    assert tracker.sync(state).tracking_uri == uri  # mlflow.db in the current directory
    tracker.close()


def test_address_that_is_none_is_refused_in_one_line(run_dir: Path) -> None:
    report = sync(run_dir, "carrier-pigeon://coop", Script().state())
    assert report.error is not None
    assert "\n" not in report.error
    assert report.run_id is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"not a database at all"), "the file is not a SQLite database"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.parent.rmdir(), "is not a folder"),
    ],
)
def test_sqlite_file_that_is_none_is_told_at_once(
    run_dir: Path, tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    make(path)
    begun = time.monotonic()
    report = sync(run_dir, f"sqlite:///{path}", Script().state())
    assert time.monotonic() - begun < 5
    assert report.error is not None
    assert reason in report.error


def test_damaged_sqlite_file_is_told_and_does_not_raise(run_dir: Path, tmp_path: Path, empty_store: Path) -> None:
    path = tmp_path / "mlflow.db"
    whole = empty_store.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    report = sync(run_dir, f"sqlite:///{path}", Script().state())
    assert report.error is not None
    assert "malformed" in report.error


def test_unreachable_server_is_told_within_seconds_without_credentials(run_dir: Path) -> None:
    begun = time.monotonic()
    report = sync(run_dir, f"http://ann:s3cret@127.0.0.1:{free_port()}", Script().state())
    assert time.monotonic() - begun < 5
    assert report.out_of_reach
    assert report.error is not None
    assert report.error.startswith("nobody answers at http://127.0.0.1:")
    assert "s3cret" not in repr(report)
    assert report.waiting == 2


# Beside a launch


def test_thread_follows_a_journal_and_sends_all_of_it(
    run_dir: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_study().write(run_dir)
    warned: list[str] = []
    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir))
    thread = TrackerThread(tracker, JournalFollower(run_dir), warn=warned.append, interval_s=0.05).start()
    report = thread.close(timeout_s=60)
    assert (report.error, report.waiting, warned) == (None, 0, [])
    assert set(runs_of(uri, str(report.experiment_id))) == WHOLE
    assert capsys.readouterr().out == ""


def test_thread_warns_once_and_names_the_way_to_catch_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_study().write(run_dir)
    warned: list[str] = []
    port = free_port()
    tracker = Tracker(run_dir, tracking_uri=f"http://ann:s3cret@127.0.0.1:{port}")
    attempts = threading.Semaphore(0)
    original = tracker.sync

    def sync_and_count(state: StudyState) -> SyncReport:
        report = original(state)
        attempts.release()
        return report

    monkeypatch.setattr(tracker, "sync", sync_and_count)
    thread = TrackerThread(
        tracker, JournalFollower(run_dir), warn=warned.append, interval_s=0.01, max_pause_s=0.02
    ).start()
    for _ in range(3):
        assert attempts.acquire(timeout=30)
    report = thread.close(timeout_s=60)
    assert len(warned) == 1
    assert warned[0] == (
        f"MLflow: nobody answers at http://127.0.0.1:{port}: Connection refused. The study goes on; send the rest"
        f" later: hpsearch sync {run_dir} --tracking-uri http://127.0.0.1:{port}"
    )
    assert report.out_of_reach
    assert report.as_json()["run_id"] is None


def test_thread_survives_a_state_that_cannot_be_read(run_dir: Path, uri: str) -> None:
    def latest() -> StudyState:
        raise RuntimeError("no state today")

    warned: list[str] = []
    thread = TrackerThread(Tracker(run_dir, tracking_uri=uri), latest, warn=warned.append).start()
    report = thread.close(timeout_s=60)
    assert report.error == "RuntimeError: no state today"
    assert len(warned) == 1


def test_thread_goes_on_after_an_exception_that_nobody_foresaw(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt makes a run and cannot write that down: the disk is full, for a while."""
    whole_study().write(run_dir)
    original = Outbox.adopt
    failed = threading.Semaphore(0)
    failures = [OSError(28, "No space left on device"), RuntimeError("table experiments already exists")] * 2

    def adopt(self: Outbox, key: str, run_id: str) -> None:
        if failures:
            failed.release()
            raise failures.pop()
        original(self, key, run_id)

    monkeypatch.setattr(Outbox, "adopt", adopt)
    warned: list[str] = []
    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir))
    thread = TrackerThread(tracker, JournalFollower(run_dir), warn=warned.append, interval_s=0.01).start()
    for _ in range(4):
        assert failed.acquire(timeout=30)
    report = thread.close(timeout_s=60)
    assert (report.error, report.waiting) == (None, 0)
    assert set(runs_of(uri, str(report.experiment_id))) == WHOLE
    assert len(warned) == 1
    assert warned[0].startswith(("MLflow: OSError: [Errno 28] No space", "MLflow: RuntimeError: table"))


def test_thread_outlives_a_sync_that_raises_and_tries_once_more_when_closed(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script().write(run_dir)
    tracker = Tracker(run_dir, tracking_uri=uri)
    original = tracker.sync
    attempts = threading.Semaphore(0)

    def sync(state: StudyState) -> SyncReport:
        if not thread._stopping.is_set():
            attempts.release()
            raise ZeroDivisionError("at http://ann:s3cret@host/")
        return original(state)

    monkeypatch.setattr(tracker, "sync", sync)
    warned: list[str] = []
    thread = TrackerThread(tracker, JournalFollower(run_dir), warn=warned.append, interval_s=0.01)
    thread.start()
    for _ in range(3):
        assert attempts.acquire(timeout=30)
    report = thread.close(timeout_s=60)
    assert (report.error, report.waiting) == (None, 0)
    assert len(warned) == 1
    assert warned[0].startswith("MLflow: ZeroDivisionError: at http://host/. The study goes on")


def test_thread_looks_again_only_when_the_study_or_its_notes_have_grown(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    script.write(run_dir)
    tracker = Tracker(run_dir, tracking_uri=uri)
    original = tracker.sync
    looks: list[int] = []
    asked: list[int] = []

    def sync(state: StudyState) -> SyncReport:
        looks.append(len(asked))
        return original(state)

    follower = JournalFollower(run_dir)

    def latest() -> StudyState:
        asked.append(1)
        return follower()

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    monkeypatch.setattr(tracker, "sync", sync)
    thread = TrackerThread(tracker, latest, warn=lambda text: None, interval_s=0.005).start()
    wait_for(lambda: len(asked) > 20)
    assert len(looks) == 2
    add_note(run_dir, "the scanner was replaced")
    wait_for(lambda: len(looks) == 3)
    (run_dir / "journal.jsonl").unlink()
    script.data().write(run_dir)  # longer than before, so the follower reads on where it stood
    wait_for(lambda: len(looks) == 4)
    report = thread.close(timeout_s=60)
    assert (len(looks), report.error, report.waiting) == (5, None, 0)


def test_thread_that_hangs_is_left_behind(run_dir: Path, uri: str) -> None:
    released = threading.Event()

    def latest() -> StudyState:
        released.wait(30)
        return StudyState()

    warned: list[str] = []
    thread = TrackerThread(Tracker(run_dir, tracking_uri=uri), latest, warn=warned.append).start()
    report = thread.close(timeout_s=0.2)
    released.set()
    assert report.error == "MLflow had not taken everything after 0.2 s"


# A server


@pytest.mark.slow
def test_whole_study_arrives_at_a_server(
    server: MlflowServer, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = sync(run_dir, server.uri, whole_study("served").state())
    assert (report.error, report.waiting, report.version, report.alias) == (None, 0, "1", "champion")
    assert capsys.readouterr().out == ""  # MLflow would print each run's address there, and spoil --json
    runs = runs_of(server.uri, str(report.experiment_id))
    assert set(runs) == (WHOLE - {"digits"}) | {"served"}
    assert math.isnan(runs["trial-0002"].data.metrics["val_loss"])


@pytest.mark.slow
def test_server_that_dies_in_the_middle_gets_everything_once(
    server: MlflowServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script("outage").data().search_begins()
    for number in range(6):
        script.trial(number, [1.0 / (number + 1), 0.5, 0.4])
    state = script.search_ends().ensemble().ends().state()
    original = MlflowWriter.create_run
    created: list[str] = []

    def create_run(self: MlflowWriter, name: str, **kwargs: object) -> str:
        run_id = original(self, name, **kwargs)  # type: ignore[arg-type]
        created.append(name)
        if len(created) == 4:
            server.stop()
        return run_id

    monkeypatch.setattr(MlflowWriter, "create_run", create_run)
    tracker = Tracker(run_dir, tracking_uri=server.uri, package=package_for(run_dir))
    first = tracker.sync(state)
    assert first.out_of_reach
    assert first.waiting > 0
    assert tracker.sync(state).sent == 0
    server.start()
    second = tracker.sync(state)
    tracker.close()
    assert (second.error, second.waiting) == (None, 0)
    names = {f"trial-{n:04d}" for n in range(6)} | {"outage", "ensemble"}
    assert set(runs_of(server.uri, str(second.experiment_id))) == names
    assert len(client_of(server.uri).search_model_versions("name = 'outage'")) == 1


def test_call_that_was_answered_by_silence_is_not_repeated_blindly(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server made the run, and the answer was lost: the next attempt finds it."""
    original = MlflowWriter.create_run
    lost = [True, False, True]

    def create_run(self: MlflowWriter, *args: object, **kwargs: object) -> str:
        run_id = original(self, *args, **kwargs)  # type: ignore[arg-type]
        if lost and lost.pop():
            raise OutOfReach("connection reset")
        return run_id

    monkeypatch.setattr(MlflowWriter, "create_run", create_run)
    tracker = Tracker(run_dir, tracking_uri=uri, package=package_for(run_dir))
    state = whole_study().state()
    reports = [tracker.sync(state) for _ in range(3)]
    tracker.close()
    assert [report.out_of_reach for report in reports] == [True, True, False]
    assert set(runs_of(uri, str(reports[-1].experiment_id))) == WHOLE
