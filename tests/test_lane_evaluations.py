"""Evaluations in lanes through the executor: the same results as each gives alone, and who has to be done alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import DamagedBlob
from hpsearch.events import Event, Leased
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Config, EvaluateJob, Member, Result, SplitName, evaluation_key
from hpsearch.journal import read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import load_weights, pack, unpack
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.lane_host import Lanes
from hpsearch.training.lanes import LanesRefused
from tests import fakes
from tests.test_lane_host import CONFIGS, Bench, Classes, Unfusable, job
from tests.test_loop import random_states


class Images(Task):
    def data(self) -> Splits:
        return Splits(train=images(60, 0), val=images(90, 1), test=images(30, 2))

    def model(self, config: Config) -> nn.Module:
        return Cnn()


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.dropout, self.head = nn.Dropout2d(0.3), nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2))
        output: Tensor = self.head(x.flatten(1))
        return output


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(x.unflatten(1, (3, 2)))[0][:, -1])
        return output


class Peeking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.weight.sum().item() > -1e9 else 2.0)


class Guessing(nn.Linear):
    """Chance is in its outputs also in evaluation, so that no two ways of asking agree."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(len(x), 3)


class Counting(nn.Linear):
    """Counts what it was asked, in a buffer."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("n_asked", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n_asked += 1
        return super().forward(x)


class Recurrent(Classes):
    def model(self, config: Config) -> nn.Module:
        return Lstm()


class Zeroes(Classes):
    """A metric that changes the targets that it is given."""

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        target[target == 2] = 0
        return {"zeros": float((target == 0).float().mean())}


class Peeks(Classes):
    def model(self, config: Config) -> nn.Module:
        return Peeking(6, 3)


class Guesses(Classes):
    def model(self, config: Config) -> nn.Module:
        return Guessing(6, 3)


class Counts(Classes):
    def model(self, config: Config) -> nn.Module:
        return Counting()


class Widths(Classes):
    """A float that makes shapes, which a config alone does not tell."""

    def model(self, config: Config) -> nn.Module:
        factor = config.get("factor", 1.0)
        assert isinstance(factor, float)
        width = int(8 * factor)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


class Trained:
    """Some trials after an epoch, and benches that have their checkpoints."""

    def __init__(self, task: Task, n: int = 3, **keys: Any) -> None:
        self.task = task
        bench = Bench(1, task)
        bench.run(*(job(trial, 0, 1, **keys) for trial in range(n)))
        self.blobs = bench.blobs

    def bench(self, lanes: int | None) -> Bench:
        bench = Bench(lanes, self.task)
        bench.blobs = dict(self.blobs)
        return bench


def ref(trial: int) -> str:
    return f"checkpoints/trial-{trial:04d}-e0001.safetensors"


def asked(trial: int, split: SplitName = "ensemble", *, keep: bool = True, **keys: Any) -> EvaluateJob:
    member = Member(trial=trial, config={**CONFIGS[trial % 4], **keys}, checkpoint=ref(trial))
    key = evaluation_key(split, [(trial, 1.0)])
    return EvaluateJob(key=key, members=(member,), split=split, keep_predictions=keep)


def assert_alike(found: Result, wanted: Result) -> None:
    assert (found.outcome, found.message) == (wanted.outcome, wanted.message)
    assert found.values.keys() == wanted.values.keys()
    for name, value in wanted.values.items():
        if name == "metrics":
            assert found.values[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
        else:
            assert found.values[name] == value
    assert found.blobs.keys() == wanted.blobs.keys()
    for name, content in wanted.blobs.items():
        mine, theirs = load(found.blobs[name]), load(content)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-6)


def assert_same_bits(found: dict[str, Result], wanted: dict[str, Result]) -> None:
    assert found.keys() == wanted.keys()
    for key, result in wanted.items():
        assert replace(found[key], seconds=0.0) == replace(result, seconds=0.0)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of lanes of each program that gave outputs."""
    from hpsearch.training.lanes import fused_outputs

    widths: list[int] = []

    def counted(predictors: Sequence[Any], split: SplitName) -> tuple[Tensor, Tensor]:
        given = fused_outputs(predictors, split)
        widths.append(len(predictors))
        return given

    monkeypatch.setattr("hpsearch.training.lane_evaluations.fused_outputs", counted)
    return widths


@pytest.mark.parametrize("task", [Classes(), Images(), Recurrent(), Zeroes()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("split", ["ensemble", "val"])
def test_lanes_give_what_each_model_gives_alone(task: Task, split: SplitName, shared: list[int]) -> None:
    trained = Trained(task)
    jobs = [asked(0, split), asked(1, split, keep=False), asked(2, split)]
    lanes, plain = trained.bench(4), trained.bench(1)
    state = random_states()
    found = lanes.run(*jobs)
    assert random_states() == state
    wanted = plain.run(*jobs)
    assert list(found) == list(wanted)
    for key, result in found.items():
        assert result.outcome == "done"
        assert result.seconds > 0
        assert_alike(result, wanted[key])
    assert (shared, lanes.asked) == ([3], [1])


def test_free_lanes_are_filled_and_what_is_too_many_comes_next(shared: list[int]) -> None:
    trained = Trained(Classes(), 5)
    bench = trained.bench(3)
    found = bench.run(asked(0), more=[asked(1), asked(2)])
    assert list(found) == [asked(trial).key for trial in (0, 1, 2)]
    assert (shared, bench.asked) == ([3], [2])
    assert len(bench.run(*(asked(trial) for trial in range(5)))) == 5
    assert shared == [3, 3, 2]
    assert bench.run(asked(0)).keys() == {asked(0).key}
    assert shared == [3, 3, 2]  # one is asked alone


def test_one_lane_and_a_cpu_left_to_itself_evaluate_as_ever(shared: list[int]) -> None:
    trained = Trained(Classes())
    results = []
    for lanes in (1, None):
        bench = trained.bench(lanes)
        assert not bench.executor.fills(asked(0))
        results.append(bench.run(asked(0), asked(1)))
        assert (shared, bench.asked) == ([], [])
    assert_same_bits(*results)


def test_who_may_go_into_lanes() -> None:
    two = replace(asked(0), members=(*asked(0).members, *asked(1).members))
    assert Lanes(None, torch.device("cuda")).may_take(asked(0))
    assert not Lanes(None, torch.device("cuda")).may_take(two)
    assert not Lanes(1, torch.device("cuda")).may_take(asked(0))
    assert Lanes(4, torch.device("cpu")).may_take(asked(0))
    assert not Lanes(4, torch.device("cpu")).may_take(two)


@pytest.mark.parametrize("gone", [False, True])
def test_damaged_checkpoint_is_its_lanes_alone(gone: bool, shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(Classes())
    bench, plain = trained.bench(4), trained.bench(1)
    jobs = [asked(0), asked(1), asked(2)]
    wanted = plain.run(*jobs)
    content = bench.blobs[ref(1)]
    bench.blobs[ref(1)] = content[:-1] + bytes([content[-1] ^ 1])
    if gone:

        def fetch_gone(content: bytes, ref: str) -> Any:
            if ref == "checkpoints/trial-0001-e0001.safetensors":
                raise DamagedBlob(ref, "it is gone")
            return unpack(content, ref=ref)

        monkeypatch.setattr("hpsearch.training.executor.unpack", fetch_gone)
    found = bench.run(*jobs)
    assert found.keys() == wanted.keys()
    bad = found[asked(1).key]
    assert (bad.outcome, bad.values) == ("damaged", {"ref": ref(1)})
    for trial in (0, 2):
        assert_alike(found[asked(trial).key], wanted[asked(trial).key])
    assert shared == [2]


@pytest.mark.parametrize("task", [Classes(), Images()], ids=lambda task: type(task).__name__)
def test_predictions_that_are_not_finite_touch_no_other_lane(task: Task, shared: list[int]) -> None:
    trained = Trained(task, 4)
    for trial, value in ((1, float("nan")), (2, float("inf"))):
        checkpoint = unpack(trained.blobs[ref(trial)], ref=ref(trial))
        for tensor in checkpoint.weights.values():
            if tensor.is_floating_point():
                tensor.fill_(value)
        trained.blobs[ref(trial)] = pack(checkpoint)
    jobs = [asked(trial) for trial in range(4)]
    found, wanted = trained.bench(4).run(*jobs), trained.bench(1).run(*jobs)
    outcomes = [found[job.key].outcome for job in jobs]
    assert outcomes == ["done", "diverged", "diverged", "done"]
    for key, result in found.items():
        assert_alike(result, wanted[key])
    assert shared == [4]


@pytest.mark.parametrize("task", [Peeks(), Counts(), Unfusable()], ids=lambda task: type(task).__name__)
def test_network_that_cannot_be_asked_in_lanes_is_asked_alone_from_then_on(task: Task, shared: list[int]) -> None:
    trained = Trained(task)
    bench = trained.bench(4)
    jobs = [asked(0), asked(1), asked(2)]
    assert bench.executor.fills(jobs[0])
    assert_same_bits(bench.run(*jobs), trained.bench(1).run(*jobs))
    assert shared == []
    assert not bench.executor.fills(jobs[0])
    assert bench.executor.fills(asked(0, width=8))  # another group may do better


def test_outputs_that_do_not_match_those_of_each_alone_are_refused(shared: list[int]) -> None:
    trained = Trained(Guesses())
    bench = trained.bench(4)
    torch.manual_seed(0)
    found = bench.run(asked(0), asked(1))
    torch.manual_seed(0)  # what was tried has drawn nothing from the global generator
    assert_same_bits(found, trained.bench(1).run(asked(0), asked(1)))
    assert shared == []
    assert not bench.executor.fills(asked(0))


def test_model_of_another_structure_is_asked_alone(shared: list[int]) -> None:
    bench = Bench(1, Widths())
    factors = [1.0, 2.0, 1.0]
    bench.run(*(job(trial, 0, 1, factor=factor) for trial, factor in enumerate(factors)))
    jobs = [asked(trial, factor=factor) for trial, factor in enumerate(factors)]
    lanes = Bench(4, Widths())
    lanes.blobs = dict(bench.blobs)
    found, wanted = lanes.run(*jobs), bench.run(*jobs)
    for key, result in found.items():
        assert_alike(result, wanted[key])
    assert shared == [2]
    assert lanes.executor.fills(jobs[0])


@pytest.mark.parametrize(
    "trouble", [torch.OutOfMemoryError("CUDA out of memory"), LanesRefused("they do not go together")]
)
def test_program_that_fails_is_given_up_and_each_is_asked_alone(
    trouble: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(Classes())
    bench = trained.bench(4)

    def fail(predictors: Sequence[Any], split: SplitName) -> None:
        raise trouble

    monkeypatch.setattr("hpsearch.training.lane_evaluations.fused_outputs", fail)
    jobs = [asked(0), asked(1), asked(2)]
    assert_same_bits(bench.run(*jobs), trained.bench(1).run(*jobs))
    assert not bench.executor.fills(jobs[0])


def test_bug_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(Classes())

    def fail(predictors: Sequence[Any], split: SplitName) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("hpsearch.training.lane_evaluations.fused_outputs", fail)
    with pytest.raises(AssertionError, match="ours"):
        trained.bench(4).run(asked(0), asked(1))


def test_memory_that_runs_out_with_the_models_is_no_word_on_the_job(
    shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(Classes())
    bench = trained.bench(4)
    begun = []

    def second_fails(model: nn.Module, checkpoint: Any) -> None:
        begun.append(model)
        if len(begun) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        load_weights(model, checkpoint)

    monkeypatch.setattr("hpsearch.training.measure_jobs.load_weights", second_fails)
    jobs = [asked(0), asked(1), asked(2)]
    assert_same_bits(bench.run(*jobs), trained.bench(1).run(*jobs))
    assert shared == []


@pytest.mark.parametrize(
    ("limit", "value"), [("lane_evaluations.MOST_WEIGHT_BYTES", 100), ("lanes.predictions.MOST_OUTPUT_BYTES", 100)]
)
def test_what_is_too_large_to_be_held_for_several_is_asked_alone(
    limit: str, value: int, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"hpsearch.training.{limit}", value)
    trained = Trained(Classes())
    jobs = [asked(0), asked(1), asked(2)]
    bench = trained.bench(4)
    assert_same_bits(bench.run(*jobs), trained.bench(1).run(*jobs))
    assert shared == []
    assert not bench.executor.fills(jobs[0])


def test_as_many_lanes_as_their_weights_have_room_for(shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(Classes(), 5)
    model = Classes().model({})
    n_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr("hpsearch.training.lane_evaluations.MOST_WEIGHT_BYTES", 2 * n_bytes + 1)
    assert len(trained.bench(8).run(*(asked(trial) for trial in range(5)))) == 5
    assert shared == [2, 2]


@pytest.mark.parametrize("task", [Classes(), Peeks()], ids=lambda task: type(task).__name__)
def test_some_job_at_hand_gives_signs_of_life_at_any_time(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.executor.ALIVE_S", 0.0)
    bench = Trained(task, 4).bench(2)
    jobs = [asked(trial) for trial in range(4)]
    told: set[str] = set()
    heard = []
    for _ in bench.executor.run(jobs, bench.blobs.__getitem__, lambda key, epoch: told.add(key), lambda job, n: ()):
        heard.append(set(told))
        told.clear()
    keys = [job.key for job in jobs]
    if isinstance(task, Peeks):
        assert [key in found for key, found in zip(keys, heard, strict=True)] == [True] * 4  # each is asked alone
    else:
        assert heard == [set(keys), set(), set(keys[2:]), set()]  # two at a time


def test_loss_that_raises_is_told_of_the_lane_alone() -> None:
    class Picky(Classes):
        def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
            if bool((output > 1e6).any()):
                raise ValueError("too large")
            return {"mean": float(output.mean())}

    trained = Trained(Picky())
    checkpoint = unpack(trained.blobs[ref(1)], ref=ref(1))
    checkpoint.weights["4.bias"].fill_(2e6)
    trained.blobs[ref(1)] = pack(checkpoint)
    found = trained.bench(4).run(asked(0), asked(1), asked(2))
    assert [found[asked(trial).key].outcome for trial in range(3)] == ["done", "crashed", "done"]
    assert "too large" in found[asked(1).key].message


SPACE = """
name: shared
task: task.py:Task
preflight: {enabled: false}
search: {trials: 8}
parameters:
  lr: {distribution: log_uniform, min: 1e-3, max: 1e-1}
  width: {values: [8, 16]}
early_stopping: {min_epochs: 2, max_epochs: 2}
ensemble: {pool: 6, size: 3}
"""


def study(run_dir: Path, lanes: int) -> tuple[StudyState, list[Event]]:
    def make_executor(spec: Spec, folder: Path) -> TorchExecutor:
        return TorchExecutor(Classes(), study_seed=spec.seed, device="cpu", lanes=lanes)

    launch = Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=make_executor,
        stages=("search", "ensemble"),
        lock_wait_s=0,
    )
    LocalFleet(launch).run(lambda entries: None)
    entries = read_journal(run_dir)
    return StudyState.of(entries), [entry.event for entry in entries]


def test_study_with_lanes_chooses_the_ensemble_that_it_chooses_without(tmp_path: Path, shared: list[int]) -> None:
    plain, _ = study(tmp_path / "plain", 1)
    assert shared == []
    lanes, events = study(tmp_path / "lanes", 4)
    beside = [event for event in events if isinstance(event, Leased) and event.key.startswith("evaluate/ensemble/")]
    assert len(beside) == 6
    assert sum(bool(event.beside) for event in beside) == sum(shared) - len(shared) > 0
    for event in beside:
        mine, theirs = (state.results[event.key].values["metrics"] for state in (lanes, plain))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert lanes.selected is not None
    assert plain.selected is not None
    assert (lanes.selected.pool, lanes.selected.best) == (plain.selected.pool, plain.selected.best)
    assert {trial for trial, _ in lanes.selected.members} == {trial for trial, _ in plain.selected.members}
    assert lanes.ended is not None
