"""From a study's state and run directory to the package of its ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from hpsearch.blobs import BlobStore, digest_of
from hpsearch.errors import DamagedBlob
from hpsearch.events import Compared, DataSeen, Event, Finished, Leased, Opened, Selected, TrialDrawn
from hpsearch.job import Outcome
from hpsearch.package import PackageError, read_package
from hpsearch.packing import FOLDER, pack
from hpsearch.state import StudyState
from tests import fakes

SPEC = {"metric": {"name": "val_loss", "goal": "minimize"}, "early_stopping": {"max_epochs": 1}}
MEMBERS = {
    "4": {"onnx": "exports/4.onnx", "weights": "exports/4.safetensors", "max_difference": 1e-6, "reason": ""},
    "1": {"onnx": None, "weights": "exports/1.safetensors", "max_difference": None, "reason": "it has a loop"},
}
BLOBS = {"exports/4.onnx": b"graph", "exports/4.safetensors": b"four", "exports/1.safetensors": b"one"}
GAIN = {"metric": "loss", "value": -0.1, "low": None, "high": None, "better": None}


def trained(trial: int) -> list[Event]:
    key = f"train/{trial}/0-1"
    return [
        TrialDrawn(trial=trial, config={"width": 16 * trial}, seed=trial),
        Leased(key=key, worker="w", trial=trial, to_epoch=1),
        Finished(
            key=key,
            worker="w",
            outcome="done",
            trial=trial,
            values={"checkpoint": f"c/{trial}", "best_checkpoint": f"c/{trial}"},
            epochs=((1, {"val_loss": 0.1 * trial}, 0.1),),
        ),
    ]


def exported(outcome: Outcome = "done", members: Mapping[str, object] = MEMBERS) -> Finished:
    values = {"members": members, "input_shape": [4], "input_dtype": "float32"}
    return Finished(key="export/4+1", worker="w", outcome=outcome, values=values if outcome == "done" else {})


SELECTED = Selected(n_trials=2, best=1, pool=(1, 4), members=((4, 0.75), (1, 0.25)))
DATA = DataSeen(info=vars(fakes.FakeExecutor().describe()))
TESTED = Finished(
    key="evaluate/test/4*0.75+1*0.25", worker="w", outcome="done", values={"metrics": {"loss": 0.2, "accuracy": 0.9}}
)
VALIDATED = Finished(key="evaluate/val/4*0.75+1*0.25", worker="w", outcome="done", values={"metrics": {"loss": 0.1}})


def state_of(*events: Event) -> StudyState:
    state = StudyState()
    opened = Opened(study="digits", uid="u", spec=SPEC, spec_text="")
    for event in (opened, *trained(1), *trained(4), *events):
        state.apply(event, 1_700_000_000.0)
    return state


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    BlobStore(tmp_path).keep(BLOBS)
    return tmp_path


def test_package_holds_members_in_order_with_their_files_and_configs(run_dir: Path) -> None:
    folder = pack(run_dir, state_of(DATA, SELECTED, exported(), TESTED, VALIDATED, Compared(n_trials=2, gain=GAIN)))
    assert folder == run_dir / FOLDER
    package = read_package(folder)
    assert [(m.trial, m.weight, m.config) for m in package.members] == [
        (4, 0.75, {"width": 64}),
        (1, 0.25, {"width": 16}),
    ]
    first, second = package.members
    assert first.onnx is not None
    assert (folder / first.onnx.file).read_bytes() == b"graph"
    assert first.max_difference == 1e-6
    assert (folder / second.weights.file).read_bytes() == b"one"
    assert (second.onnx, second.reason) == (None, "it has a loop")
    assert package.without_graph == (second,)


def test_package_says_what_the_study_measured(run_dir: Path) -> None:
    folder = pack(run_dir, state_of(DATA, SELECTED, exported(), TESTED, VALIDATED, Compared(n_trials=2, gain=GAIN)))
    assert folder is not None
    package = read_package(folder)
    assert package.metrics.val == {"loss": 0.1}
    assert package.metrics.test == {"loss": 0.2, "accuracy": 0.9}
    assert package.metrics.gain == GAIN
    assert (package.study, package.outputs, package.n_classes) == ("digits", "logits", fakes.N_CLASSES)
    assert (package.input_shape, package.input_dtype) == ((4,), "float32")
    assert package.test_fingerprint == "fake-test"
    assert package.created == "2023-11-14T22:13:20+00:00"  # of the study's last event, not of the packing


def test_without_a_test_split_the_package_claims_nothing(run_dir: Path) -> None:
    folder = pack(run_dir, state_of(DATA, SELECTED, exported(), VALIDATED))
    assert folder is not None
    package = read_package(folder)
    assert package.metrics.test is None
    assert package.metrics.gain is None


@pytest.mark.parametrize(
    "events",
    [[], [DATA, exported()], [DATA, SELECTED], [DATA, SELECTED, exported("crashed")], [SELECTED, exported()]],
    ids=["nothing", "not chosen", "not exported", "export crashed", "no data"],
)
def test_nothing_is_packed_while_something_is_missing(run_dir: Path, events: list[Event]) -> None:
    assert pack(run_dir, state_of(*events)) is None
    assert not (run_dir / FOLDER).exists()


def test_packing_again_replaces_the_older_package(run_dir: Path) -> None:
    state = state_of(DATA, SELECTED, exported())
    assert pack(run_dir, state) == pack(run_dir, state)
    BlobStore(run_dir).keep({"exports/4.onnx": b"newer graph"})
    folder = pack(run_dir, state)
    assert folder is not None
    member = read_package(folder).members[0].onnx
    assert member is not None
    assert (folder / member.file).read_bytes() == b"newer graph"


def test_exported_file_that_is_gone_is_named_and_no_package_is_left(run_dir: Path) -> None:
    BlobStore(run_dir).drop("exports/1.safetensors")
    with pytest.raises(DamagedBlob, match=r"exports/1\.safetensors is damaged: the file is gone"):
        pack(run_dir, state_of(DATA, SELECTED, exported()))
    assert not (run_dir / FOLDER).exists()


@pytest.mark.parametrize("ref", BLOBS)
def test_exported_file_that_was_altered_is_named_and_no_package_is_left(run_dir: Path, ref: str) -> None:
    digests = {name: digest_of(content) for name, content in BLOBS.items()}
    events = (SELECTED, DATA, dataclasses.replace(exported(), digests=digests))
    BlobStore(run_dir).keep({ref: BLOBS[ref].replace(b"e", b"E").replace(b"g", b"G")[:3]})
    with pytest.raises(DamagedBlob, match=f"{ref} is damaged: its 3 bytes are not those that were written"):
        pack(run_dir, state_of(*events))
    assert not (run_dir / "package").exists()


def test_folder_that_holds_something_else_is_left_alone(run_dir: Path) -> None:
    (run_dir / FOLDER).mkdir()
    (run_dir / FOLDER / "thesis.tex").write_text("mine")
    with pytest.raises(PackageError):
        pack(run_dir, state_of(DATA, SELECTED, exported()))
    assert (run_dir / FOLDER / "thesis.tex").read_text() == "mine"
