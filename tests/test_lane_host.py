"""Training jobs in lanes through the executor: the same results as the plain loop gives, and what is kept at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config, Job, RampJob, Result, TrainJob, train_key
from hpsearch.lane_groups import group_key
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import Checkpoint, pack, unpack
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.lanes import LaneGroup, LanesRefused, Route, Width, find_route


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

    def __init__(
        self, lanes: int | None, task: Task | None = None, *, group_sizes: Mapping[str, float] | None = None
    ) -> None:
        self.executor = TorchExecutor(
            task or Classes(), study_seed=0, device="cpu", lanes=lanes, group_sizes=group_sizes
        )
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
    assert found.values.keys() - {"lanes"} == wanted.values.keys()
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


def test_job_tells_that_it_lives_while_its_checkpoint_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert told == {0: {"train/0/0-2"}, 1: {"train/1/0-1"}, 2: {"train/2/0-1"}}


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


def measure_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("TRIALS", "S", "STEPS"):
        monkeypatch.setattr(f"hpsearch.training.lane_host.MEASURE_AFTER_{limit}", 0)


def test_nothing_is_measured_before_a_group_has_been_trained_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def width(trainings: Any, **_: Any) -> Width:
        measured.append(trainings[0].trial)
        return Width(lanes=2, measured=())

    monkeypatch.setattr("hpsearch.training.lane_host.best_width", width)
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_S", 1e-9)
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_STEPS", 8)  # of two in each epoch
    bench = Bench(None)
    bench.run(job(0, 0, 3))
    assert not bench.executor.fills(job(2, 0, 1))
    bench.run(job(0, 3, 4, "checkpoints/trial-0000-e0003.safetensors"))
    assert not bench.executor.fills(job(2, 0, 1))  # enough steps, of one trial
    bench.run(job(1, 0, 1))
    assert (measured, bench.asked) == ([], [])
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_STEPS", 11)
    assert not bench.executor.fills(job(2, 0, 1))
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_STEPS", 10)
    assert bench.executor.fills(job(2, 0, 1))
    assert not bench.executor.fills(job(2, 0, 1, width=8))
    assert len(bench.run(job(2, 0, 1), more=[job(3, 0, 1)])) == 2
    assert measured == [2]
    bench.run(job(4, 0, 1))
    assert measured == [2]


def test_group_of_which_much_is_to_come_is_measured_after_its_first_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.lane_host.best_width", lambda *_, **__: Width(lanes=2, measured=()))
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_FOR_STEPS", 1)
    many, few = Bench(None, group_sizes={group_key(job(0, 0, 1).config): 1e9}), Bench(None)
    for bench in (many, few):
        bench.run(job(0, 0, 1))
        assert not bench.executor.fills(job(2, 0, 1))
        bench.run(job(1, 0, 1))
    assert many.executor.fills(job(2, 0, 1))
    assert not many.executor.fills(job(2, 0, 1, width=8))
    assert not few.executor.fills(job(2, 0, 1))


def test_what_one_worker_has_measured_the_others_of_its_machine_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    widths = {16: 2, 8: 1}
    measured = []

    def width(trainings: Any, **_: Any) -> Width:
        measured.append(trainings[0].model[0].out_features)
        return Width(lanes=widths[measured[-1]], measured=())

    monkeypatch.setattr("hpsearch.training.lane_host.best_width", width)
    first, second, elsewhere = Bench(None), Bench(None), Bench(None)
    for bench in (first, second):
        bench.executor.share(tmp_path)
    with monkeypatch.context() as eager:
        measure_at_once(eager)
        first.run(job(0, 0, 1), job(1, 0, 1, width=8))
    assert measured == [16, 8]
    monkeypatch.setattr("hpsearch.training.lane_host.MEASURE_AFTER_TRIALS", 99)
    assert second.executor.fills(job(2, 0, 1))
    assert not second.executor.fills(job(3, 0, 1, width=8))
    assert not elsewhere.executor.fills(job(2, 0, 1))
    found = second.run(job(2, 0, 1), more=[job(3, 0, 1)])
    assert [result.values["lanes"] for result in found.values()] == [2, 2]
    assert measured == [16, 8]


def test_group_that_gains_nothing_is_trained_plainly_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.lane_host.best_width", lambda *_, **__: Width(lanes=1, measured=()))
    measure_at_once(monkeypatch)
    bench, plain = Bench(None), Bench(1)
    found, wanted = bench.run(job(0, 0, 2), job(1, 0, 1)), plain.run(job(0, 0, 2), job(1, 0, 1))
    assert bench.asked == []
    assert not bench.executor.fills(job(2, 0, 1))
    for key, result in found.items():
        assert [row.metrics for row in result.epochs] == [row.metrics for row in wanted[key].epochs]  # to the bit
        assert "one_lane" not in result.values  # nothing is wrong with it


def test_memory_that_runs_out_while_lanes_are_tried_means_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hpsearch.training.lane_host.find_route", fail)
    lanes, plain = Bench(4), Bench(1)
    jobs = [job(0, 0, 1), job(1, 0, 1)]
    found, wanted = lanes.run(*jobs), plain.run(*jobs)
    for key, result in found.items():
        assert result.epochs[0].metrics == wanted[key].epochs[0].metrics  # to the bit
    assert "CUDA out of memory" in str(found["train/0/0-1"].values["one_lane"])
    assert lanes.asked == []
    assert not lanes.executor.fills(job(2, 0, 1))


@pytest.mark.parametrize("error", [UserCodeError("augment() raised"), RuntimeError("shapes"), ZeroDivisionError()])
def test_whatever_measuring_raises_means_one_by_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("hpsearch.training.lane_host.best_width", fail)
    measure_at_once(monkeypatch)
    bench = Bench(None)
    found = bench.run(job(0, 0, 1), job(1, 0, 1))
    assert [result.outcome for result in found.values()] == ["done", "done"]
    assert type(error).__name__ in str(found["train/0/0-1"].values["one_lane"])
    assert not bench.executor.fills(job(2, 0, 1))


class Moody(Classes):
    """Some trials raise at their first step."""

    def model(self, config: Config) -> nn.Module:
        class Raises(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                raise ValueError("boo")

        return Raises(6, 3) if config["lr"] == 7.0 else nn.Linear(6, 3)


@pytest.mark.parametrize("lanes", [2, None])
def test_trial_that_crashes_does_not_end_lanes_for_its_group(
    lanes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_at_once(monkeypatch)
    monkeypatch.setattr("hpsearch.training.lane_host.best_width", lambda *_, **__: Width(lanes=2, measured=()))
    bench = Bench(lanes, Moody())
    found = bench.run(job(0, 0, 1, lr=7.0))
    assert found["train/0/0-1"].outcome == "crashed"
    found = bench.run(job(1, 0, 1), more=[job(2, 0, 1)])
    assert [result.outcome for result in found.values()] == ["done", "done"]
    assert bench.asked == [1, 2]
    assert bench.executor.fills(job(3, 0, 1))


def test_group_whose_program_fails_is_trained_one_by_one_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: LaneGroup) -> None:
        raise LanesRefused("in lanes it raised RuntimeError: stride")

    monkeypatch.setattr(LaneGroup, "train_epoch", fail)
    bench = Bench(2)
    found = bench.run(job(0, 0, 1), job(1, 0, 1))
    assert [result.values.get("one_lane") for result in found.values()] == [
        "trained one by one: in lanes it raised RuntimeError: stride",
        None,
    ]
    assert bench.asked == []
    assert not bench.executor.fills(job(2, 0, 1))


class Gated(nn.Module):
    """A float decides which of its parameters have a gradient."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate = gate
        self.main, self.extra = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.main(x)
        return output + self.gate * self.extra(x) if self.gate else output


class Gates(Classes):
    def model(self, config: Config) -> nn.Module:
        gate = config["gate"]
        assert isinstance(gate, float)
        return Gated(gate)


def test_each_structure_of_a_group_has_a_trial_step_of_its_own() -> None:
    lanes, plain = Bench(2, Gates()), Bench(1, Gates())
    for gate, trials in ((0.0, (0, 1)), (0.5, (2, 3)), (0.0, (4, 5))):
        jobs = [job(trial, 0, 2, gate=gate) for trial in trials]
        found, wanted = lanes.run(*jobs), plain.run(*jobs)
        for key, result in found.items():
            assert "one_lane" not in result.values
            assert_alike(result, wanted[key])


def test_like_programs_of_a_group_share_one_trial_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = watch_trial_steps(monkeypatch)
    bench = Bench(2)
    bench.run(job(0, 0, 1), job(1, 0, 1), job(2, 0, 1), job(3, 0, 1))
    assert tried == [1, 2]
    bench.executor._free_memory()  # and with it what programs are compared with
    bench.run(job(4, 0, 1), job(5, 0, 1))
    assert tried == [1, 2, 2]


@pytest.mark.parametrize("goes_together", [True, False])
def test_first_to_join_a_program_of_one_lane_is_tried_with_it(
    goes_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = watch_trial_steps(monkeypatch, goes_together=goes_together)
    jobs = [job(0, 0, 3), job(1, 0, 1), job(2, 0, 1)]
    lanes, plain = Bench(2), Bench(1)
    line: list[list[TrainJob]] = [[], [jobs[1]], [jobs[2]]]

    def one_by_one(last: Job, n: int) -> Sequence[Job]:
        return line.pop(0) if line else ()

    results = lanes.executor.run(jobs[:1], lambda ref: b"", lambda *_: None, one_by_one)
    found = {result.key: result for result in results}
    for key, result in plain.run(*jobs).items():
        assert_alike(found[key], result)
        if not goes_together and result.key != "train/0/0-3":
            assert [row.metrics for row in found[key].epochs] == [row.metrics for row in result.epochs]  # alone
    assert tried == ([1, 1, 2] if goes_together else [1, 1, 2, 2])


def watch_trial_steps(monkeypatch: pytest.MonkeyPatch, *, goes_together: bool = True) -> list[int]:
    """The number of trials of each trial step to come."""
    tried: list[int] = []

    def watched(trainings: Sequence[Any]) -> tuple[Route | None, str]:
        tried.append(len(trainings))
        return find_route(trainings) if goes_together or len(trainings) == 1 else (None, "they differ")

    monkeypatch.setattr("hpsearch.training.lane_host.find_route", watched)
    return tried


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
