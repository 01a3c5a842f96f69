"""Training jobs in lanes through the executor: the same results as the plain loop gives, and what is kept at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config, Job, RampJob, Result, TrainJob, train_key
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import Checkpoint, pack, unpack
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.lanes import Width


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classes(Task):
    def data(self) -> Splits:
        return Splits(train=rows(100, 0), val=rows(40, 1))

    def model(self, config: Config) -> nn.Module:
        width = config.get("width", 16)
        assert isinstance(width, int)
        # A bias before batch norm has no gradient but rounding, which Adam makes steps of: it would differ by chance.
        return nn.Sequential(
            nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3)
        )


class Unfusable(Classes):
    def model(self, config: Config) -> nn.Module:
        class Peeks(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (1.0 if x.sum().item() > -1e9 else 2.0)

        return Peeks(6, 3)


CONFIGS: list[Config] = [
    {"lr": 0.01, "optimizer": "adamw", "weight_decay": 0.01},
    {"lr": 0.003, "optimizer": "adamw", "grad_clip_norm": 0.5},
    {"lr": 0.03, "optimizer": "adamw", "label_smoothing": 0.1, "warmup_epochs": 1.0},
    {"lr": 0.001, "optimizer": "adamw", "weight_decay": 0.1},
]


def job(trial: int, from_epoch: int, to_epoch: int, checkpoint: str | None = None, **keys: Any) -> TrainJob:
    return TrainJob(
        key=train_key(trial, from_epoch, to_epoch),
        trial=trial,
        config={**CONFIGS[trial % 4], **keys},
        seed=100 + trial,
        from_epoch=from_epoch,
        to_epoch=to_epoch,
        checkpoint=checkpoint,
    )


class Bench:
    """An executor, and a line of jobs for its free lanes."""

    def __init__(self, lanes: int | None, task: Task | None = None) -> None:
        self.executor = TorchExecutor(task or Classes(), study_seed=0, device="cpu", lanes=lanes)
        self.blobs: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.asked: list[int] = []
        self.alive: list[str] = []  # jobs that told so, in order

    def run(self, *jobs: Job, more: Sequence[Job] = ()) -> dict[str, Result]:
        line = list(more)

        def further(last: Job, n: int) -> Sequence[Job]:
            self.asked.append(n)
            given = line[:n]
            del line[:n]
            return given

        def fetch(ref: str) -> bytes:
            self.fetched.append(ref)
            return self.blobs[ref]

        results = {}
        for result in self.executor.run(jobs, fetch, lambda key, epoch: self.alive.append(key), further):
            self.blobs.update(result.blobs)
            results[result.key] = result
        assert not line
        return results


def assert_alike(found: Result, wanted: Result) -> None:
    assert found.outcome == wanted.outcome == "done"
    assert found.values.keys() == wanted.values.keys()
    for row, other in zip(found.epochs, wanted.epochs, strict=True):
        assert row.epoch == other.epoch
        for name, value in row.metrics.items():
            assert value == pytest.approx(other.metrics[name], rel=1e-4, abs=1e-6), (found.key, row.epoch, name)
    for ref, content in found.blobs.items():
        mine, theirs = unpack(content, ref=ref), unpack(wanted.blobs[ref], ref=ref)
        assert (mine.epoch, mine.resumable) == (theirs.epoch, theirs.resumable)
        for name, tensor in mine.weights.items():
            torch.testing.assert_close(tensor, theirs.weights[name], rtol=1e-4, atol=1e-5)


def test_lanes_give_what_the_plain_loop_gives_also_when_they_are_refilled() -> None:
    jobs = [job(0, 0, 3), job(1, 0, 1), job(2, 0, 2), job(3, 0, 1), job(4, 0, 2), job(5, 0, 1)]
    lanes, plain = Bench(3), Bench(1)
    found = lanes.run(*jobs[:3], more=jobs[3:])
    wanted = plain.run(*jobs[:3], *jobs[3:])
    assert found.keys() == wanted.keys()
    for key, result in found.items():
        assert_alike(result, wanted[key])
    assert lanes.asked


def test_trials_go_on_in_lanes_from_plain_checkpoints_and_the_other_way_round() -> None:
    plain, lanes = Bench(1), Bench(2)
    wanted = {**plain.run(job(0, 0, 1), job(1, 0, 1))}
    refs = [f"checkpoints/trial-000{trial}-e0001.safetensors" for trial in (0, 1)]
    lanes.blobs = dict(plain.blobs)
    wanted |= plain.run(job(0, 1, 3, refs[0]), job(1, 1, 3, refs[1]))
    found = lanes.run(job(0, 1, 3, refs[0]), job(1, 1, 3, refs[1]))
    assert lanes.fetched == refs
    for key, result in found.items():
        assert_alike(result, wanted[key])
    back = Bench(1)
    back.blobs = dict(lanes.blobs)
    last = "checkpoints/trial-0000-e0003.safetensors"
    assert_alike(back.run(job(0, 3, 4, last))["train/0/3-4"], plain.run(job(0, 3, 4, last))["train/0/3-4"])


def test_paused_trial_goes_on_where_its_state_is() -> None:
    lanes = Bench(2)
    lanes.run(job(0, 0, 1), job(1, 0, 1))
    lanes.executor._remembered.clear()
    ref = "checkpoints/trial-0000-e0001.safetensors"
    found = lanes.run(job(0, 1, 2, ref))["train/0/1-2"]
    assert lanes.fetched == []
    plain = Bench(1)
    plain.run(job(0, 0, 1))
    assert_alike(found, plain.run(job(0, 1, 2, ref))["train/0/1-2"])
    lanes.executor._free_memory()
    lanes.run(job(1, 1, 2, "checkpoints/trial-0001-e0001.safetensors"))
    assert lanes.fetched == ["checkpoints/trial-0001-e0001.safetensors"]


def test_paused_trial_that_stands_elsewhere_is_not_taken() -> None:
    lanes = Bench(2)
    lanes.run(job(0, 0, 2))
    ref = "checkpoints/trial-0000-e0001.safetensors"
    plain = Bench(1)
    plain.run(job(0, 0, 1))
    lanes.blobs = dict(plain.blobs)
    assert_alike(lanes.run(job(0, 1, 2, ref))["train/0/1-2"], plain.run(job(0, 1, 2, ref))["train/0/1-2"])


def test_network_that_cannot_be_fused_is_trained_alone_and_says_so_once() -> None:
    lanes, plain = Bench(4, Unfusable()), Bench(1, Unfusable())
    jobs = [job(0, 0, 1), job(1, 0, 1)]
    found, wanted = lanes.run(*jobs), plain.run(*jobs)
    assert ".item()" in str(found["train/0/0-1"].values["one_lane"])
    assert "one_lane" not in found["train/1/0-1"].values
    assert found["train/1/0-1"].epochs[0].metrics == wanted["train/1/0-1"].epochs[0].metrics  # to the bit
    assert not lanes.executor.fills(job(2, 0, 1))
    assert lanes.executor.fills(job(2, 0, 1, width=8))  # another group may do better


def test_all_lanes_tell_that_they_live_while_the_checkpoint_of_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.executor.ALIVE_S", 0.0)
    lanes = Bench(3)
    told: dict[int, set[str]] = {}

    def watched(checkpoint: Checkpoint, alive: Any = None) -> bytes:
        before = len(lanes.alive)
        content = pack(checkpoint, alive)
        told[checkpoint.trial] = set(lanes.alive[before:])
        return content

    monkeypatch.setattr("hpsearch.training.outcome.pack", watched)
    lanes.run(job(0, 0, 2), job(1, 0, 1), job(2, 0, 1))
    first, second, third = "train/0/0-2", "train/1/0-1", "train/2/0-1"
    assert told == {1: {first, second, third}, 2: {first, third}, 0: {first}}


def test_checkpoint_that_cannot_be_packed_is_the_end_of_its_own_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(checkpoint: Checkpoint, alive: Any = None) -> bytes:
        if checkpoint.trial == 1:
            raise UserCodeError("state is neither tensor nor plain value")
        return pack(checkpoint, alive)

    monkeypatch.setattr("hpsearch.training.outcome.pack", refuses)
    found = Bench(2).run(job(0, 0, 2), job(1, 0, 1))
    assert {key: (result.outcome, result.message) for key, result in found.items()} == {
        "train/0/0-2": ("done", ""),
        "train/1/0-1": ("crashed", "state is neither tensor nor plain value"),
    }


def test_one_lane_is_the_plain_loop_and_asks_for_nothing() -> None:
    bench = Bench(1)
    assert not bench.executor.fills(job(0, 0, 1))
    bench.run(job(0, 0, 1), job(1, 0, 1))
    assert bench.asked == []


def test_jobs_of_other_groups_are_done_as_well() -> None:
    jobs = [job(0, 0, 1), job(1, 0, 1, width=8), job(2, 0, 1), job(3, 0, 1, width=8)]
    found, wanted = Bench(2).run(*jobs), Bench(1).run(*jobs)
    assert list(found) == [f"train/{trial}/0-1" for trial in (0, 2, 1, 3)]
    for key, result in found.items():
        assert_alike(result, wanted[key])


def test_diverged_lane_ends_with_its_curve_and_the_other_is_unharmed() -> None:
    jobs = [job(0, 0, 2), job(1, 0, 2, lr=1e30)]
    found, wanted = Bench(2).run(*jobs), Bench(1).run(*jobs)
    assert_alike(found["train/0/0-2"], wanted["train/0/0-2"])
    bad, other = found["train/1/0-2"], wanted["train/1/0-2"]
    assert bad.outcome == other.outcome == "diverged"
    assert bad.values["epoch"] == other.values["epoch"]


def test_nothing_is_measured_before_a_group_has_been_trained_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def width(trainings: Any, **_: Any) -> Width:
        measured.append(trainings[0].trial)
        return Width(lanes=2, measured=())

    monkeypatch.setattr("hpsearch.training.lane_host.best_width", width)
    bench = Bench(None)
    bench.run(job(0, 0, 1), job(1, 0, 1))
    assert not bench.executor.fills(job(2, 0, 1))
    assert (measured, bench.asked) == ([], [])
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_S", 1e-9)
    assert bench.executor.fills(job(2, 0, 1))
    assert not bench.executor.fills(job(2, 0, 1, width=8))
    assert len(bench.run(job(2, 0, 1), more=[job(3, 0, 1)])) == 2
    assert measured == [2]
    bench.run(job(4, 0, 1))
    assert measured == [2]


def test_group_that_gains_nothing_is_trained_plainly_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.lane_host.best_width", lambda *_, **__: Width(lanes=1, measured=()))
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_S", 0.0)
    bench, plain = Bench(None), Bench(1)
    found, wanted = bench.run(job(0, 0, 2), job(1, 0, 1)), plain.run(job(0, 0, 2), job(1, 0, 1))
    assert bench.asked == []
    assert not bench.executor.fills(job(2, 0, 1))
    for key, result in found.items():
        assert [row.metrics for row in result.epochs] == [row.metrics for row in wanted[key].epochs]  # to the bit
        assert "one_lane" not in result.values  # nothing is wrong with it


def ramp(index: int, **keys: Any) -> RampJob:
    return RampJob(
        key=f"ramp/all/{index}",
        config={"weight_decay": 0.01 * index, **keys},
        seed=7 + index,
        lr_min=1e-4,
        lr_max=1e4,
        steps=40,
    )


@pytest.mark.parametrize("keys", [{}, {"optimizer": "sgd", "momentum": 0.9}])
def test_ramps_of_a_group_share_a_program_and_measure_the_same(keys: dict[str, Any]) -> None:
    lanes, plain = Bench(4), Bench(1)
    found = lanes.run(ramp(0, **keys), ramp(1, **keys), more=[ramp(2, **keys)])
    wanted = plain.run(*(ramp(index, **keys) for index in range(3)))
    assert found.keys() == wanted.keys()
    assert lanes.asked == [2]
    for key, result in found.items():
        assert result.outcome == "done"
        assert result.values.keys() == wanted[key].values.keys()
        mine, theirs = result.values["losses"], wanted[key].values["losses"]
        assert isinstance(mine, list)
        assert isinstance(theirs, list)
        # Where the rate is far too high, rounding grows from step to step; the minimum is long past by then.
        n_calm = sum(loss < 1.5 * theirs[0] for loss in theirs[:24])
        assert n_calm > 15
        assert mine[:n_calm] == pytest.approx(theirs[:n_calm], rel=1e-3)


def test_ramp_alone_is_the_plain_one() -> None:
    lanes, plain = Bench(4), Bench(1)
    assert lanes.run(ramp(0))["ramp/all/0"].values == plain.run(ramp(0))["ramp/all/0"].values
    assert lanes.executor.fills(ramp(0))
    assert not plain.executor.fills(ramp(0))
    assert not Bench(None).executor.fills(ramp(0))  # on a CPU little is won
