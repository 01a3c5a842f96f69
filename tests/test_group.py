"""Several processes that train one trial: the same as one process, and none left behind when something goes wrong."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpsearch.errors import ClusterError, TrialDiverged, UserCodeError
from hpsearch.job import EpochMetrics, Result
from hpsearch.training.group import GroupBroken, InStep, Note, is_lost_peer, verdict
from tests import group_process
from tests.group_process import Shared

END_S = 120.0


def run_group(scenario: str, out: Path, *, size: int = 2) -> list[dict[str, Any]]:
    """What each rank wrote, {} for one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.group_process", scenario]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(port), str(out)], cwd=Path(__file__).parent.parent)
        for rank in range(size)
    ]
    try:
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and not any(rank.poll() == 0 for rank in ranks):
            time.sleep(0.05)
        for rank in ranks:
            rank.wait(timeout=END_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    files = [Path(f"{out}.{rank}.json") for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 tells of a group that lives through all its jobs."""
    return run_group("sound", tmp_path_factory.mktemp("group") / "out")[0]


def job(sound: dict[str, Any], key: str) -> dict[str, Any]:
    return next(told for told in sound["jobs"] if told["key"] == key)


def test_training_together_is_training_alone_on_all_rows(sound: dict[str, Any]) -> None:
    alone = group_process.executor(Shared())
    blobs: dict[str, bytes] = {}
    curve = []
    for task in (group_process.SOUND[0], group_process.SOUND[6]):
        for result in alone.run([task], blobs.__getitem__, lambda key, epoch: None):
            blobs |= result.blobs
            curve += [row.metrics["val_loss"] for row in result.epochs]
    together = [row["val_loss"] for key in ("train/0/0-2", "train/0/2-4") for row in job(sound, key)["curve"]]
    assert together == pytest.approx(curve, abs=1e-6)
    assert len(together) == 4


def test_nan_on_one_rank_is_the_trials_end_on_all(sound: dict[str, Any]) -> None:
    told = job(sound, "train/1/0-1")
    assert (told["outcome"], told["message"]) == ("diverged", "val_loss is nan")


def test_an_exception_on_all_ranks_is_a_crash_and_the_group_goes_on(sound: dict[str, Any]) -> None:
    told = job(sound, "train/2/0-1")
    assert (told["outcome"], told["message"]) == ("crashed", "ValueError: an odd width")
    assert told["frame"].startswith("group_process.py:")


def test_memory_that_runs_out_is_told_as_such(sound: dict[str, Any]) -> None:
    told = job(sound, "train/3/0-1")
    assert told["outcome"] == "out_of_memory"
    assert told["message"].startswith("OutOfMemoryError: CUDA out of memory.")


def test_ramps_and_predictions_are_rank_0s_alone_while_the_others_wait(sound: dict[str, Any]) -> None:
    assert len(job(sound, "ramp/0")["values"]["losses"]) == 5
    assert job(sound, "evaluate/test/0")["values"]["metrics"]["loss"] > 0


def test_a_fit_without_state_stays_alive_on_every_rank(sound: dict[str, Any]) -> None:
    assert job(sound, "train/4/0-1")["values"]["resumable"] is False
    assert [job(sound, f"train/4/{epochs}")["outcome"] for epochs in ("0-1", "1-2")] == ["done", "done"]


def test_ranks_with_different_data_are_refused(sound: dict[str, Any]) -> None:
    (told,) = sound["different-data"]
    assert told["error"] == "UserCodeError"
    assert told["message"] == "Task.data() gave the 2 processes of one worker different data"


def test_data_that_one_rank_cannot_load_is_told_with_its_rank(sound: dict[str, Any]) -> None:
    (told,) = sound["data-on-rank-0"]
    assert told == {"error": "UserCodeError", "message": "FileNotFoundError: digits.csv (on rank 1 of 2)"}


def test_an_exception_while_others_are_in_a_collective_ends_the_group_with_the_jobs_outcome(tmp_path: Path) -> None:
    """Rank 0 hangs in all_reduce: rank 1 says what happened and gives up the group; rank 0 feels only that it went."""
    stuck, told = run_group("raises-in-the-middle", tmp_path / "out")
    assert stuck["result"] is None
    assert told["result"]["key"] == "train/0/0-1"
    assert told["result"]["outcome"] == "crashed"
    assert told["result"]["message"] == "ValueError: an odd width (on rank 1 of 2)"
    assert told["result"]["frame"].startswith("group_process.py:")


def test_an_exception_on_one_rank_alone_ends_the_group_since_it_may_be_out_of_step(tmp_path: Path) -> None:
    ranks = run_group("raises-at-the-end", tmp_path / "out")
    assert all("broken" in told for told in ranks)
    results = [told["result"] for told in ranks if told["result"] is not None]  # one may have lost the other by then
    assert {(result["outcome"], result["message"]) for result in results} == {
        ("crashed", "ValueError: an odd width (on rank 1 of 2)")
    }


def test_a_process_that_was_killed_is_no_outcome_of_the_job(tmp_path: Path) -> None:
    survivor, killed = run_group("killed", tmp_path / "out")
    assert killed == {}
    assert survivor["broken"]
    assert survivor["result"] is None


# What is decided from the notes.

DONE = Note(outcome="done")


@pytest.mark.parametrize(
    ("notes", "outcome", "message"),
    [
        ([DONE, DONE], "done", ""),
        ([DONE, Note(outcome="diverged", message="val_loss is nan")], "diverged", "val_loss is nan"),
        (
            [Note(outcome="crashed", message="a"), Note(outcome="crashed", message="b")],
            "crashed",
            "a",
        ),
        ([Note(outcome="diverged"), Note(outcome="crashed", message="a")], "crashed", "a (on rank 1 of 2)"),
        (
            [DONE, Note(outcome="out_of_memory", message="m"), DONE, Note(outcome="out_of_memory", message="n")],
            "out_of_memory",
            "m (on ranks 1, 3 of 4)",
        ),
        ([Note(outcome="crashed", message="a"), Note(message="gone")], None, "gone (on rank 1 of 2)"),
    ],
)
def test_the_worst_note_counts(notes: list[Note], outcome: str | None, message: str) -> None:
    found = verdict(notes)
    assert (found.outcome, found.message) == (outcome, message)


def test_one_rank_that_was_asked_to_stop_stops_all() -> None:
    assert verdict([DONE, Note(outcome="done", stop=True)]).stop


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done"),
        (TrialDiverged("val_loss is nan"), "diverged"),
        (UserCodeError("ValueError: a"), "crashed"),
        (ClusterError("cuda:0 is full"), "crashed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), None),
        (dist.DistNetworkError("failed to recv"), None),
        (KeyError("a defect of ours"), None),
    ],
)
def test_an_exception_becomes_the_jobs_outcome_or_the_groups_end(error: Exception | None, outcome: str | None) -> None:
    assert Note.of(error).outcome == outcome
    assert Note.of(error).lost is (outcome is None and not isinstance(error, KeyError))


def test_a_lost_peer_is_known_behind_the_users_code() -> None:
    wrapped = UserCodeError("RuntimeError: Connection closed by peer")
    wrapped.__cause__ = RuntimeError("Connection closed by peer")
    assert is_lost_peer(wrapped)
    assert not is_lost_peer(UserCodeError("ValueError: a"))


def test_a_broken_group_crosses_a_process_with_its_result() -> None:
    error = GroupBroken("out of step", Result(key="train/0/0-1", outcome="crashed"))
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.result) == (error.message, error.result)


def test_on_every_rank_the_epoch_counts_as_rank_0_reported_it() -> None:
    """So that all ranks agree on the best epoch, which the study's metric decides."""
    rank_0s = EpochMetrics(epoch=1, metrics={"val_loss": 0.25}, seconds=1.0)
    own = EpochMetrics(epoch=1, metrics={"val_loss": 0.5}, seconds=1.0)

    class OnRank1:
        """A group in which rank 0 has told its row."""

        def together(self, key: str, step: Any, *, stop: bool = False) -> tuple[Any, bool]:
            return step(), False

        def tell(self, value: Any) -> Any:
            assert value == (own, True)
            return rank_0s, True

    class Trained:
        model, epoch = torch.nn.Linear(1, 1), 0

        def train_epoch(self) -> EpochMetrics:
            self.epoch = 1
            return own

    in_step = InStep(OnRank1(), "train/0/0-1", Trained)  # type: ignore[arg-type]
    assert in_step.train_epoch() == rank_0s
    assert in_step.epoch == 1
