"""The executor: every kind of job, and that a result depends on the job alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import DamagedBlob
from hpsearch.job import Config, EvaluateJob, ExportJob, Job, Member, ProbeJob, RampJob, RebuildJob, Result, TrainJob
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.checkpoint import unpack
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.outcome import checkpoint_ref


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classes(Task):
    """Dropout and batch norm, so that resuming is no easy matter."""

    def data(self) -> Splits:
        return Splits(train=rows(100, 0), val=rows(40, 1), test=rows(30, 2))

    def model(self, config: Config) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Scripted(Classes):
    """val_loss of the epochs as told, whatever the model."""

    def __init__(self, *losses: float) -> None:
        self.losses = iter(losses)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if output.requires_grad:
            return F.cross_entropy(output, target)
        return output.sum() * 0 + next(self.losses)


class Study:
    """The study's side: keeps blobs, and notes what was fetched and told."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.progress: list[tuple[str, int]] = []

    def fetch(self, ref: str) -> bytes:
        self.fetched.append(ref)
        return self.blobs[ref]

    def run(self, executor: TorchExecutor, *jobs: Job) -> list[Result]:
        results = list(executor.run(jobs, self.fetch, lambda key, epoch: self.progress.append((key, epoch))))
        for result in results:
            self.blobs.update(result.blobs)
            json.dumps(dict(result.values), allow_nan=False)
        return results

    def one(self, executor: TorchExecutor, job: Job) -> Result:
        (result,) = self.run(executor, job)
        return result


def executor(task: Task | None = None, **kw: Any) -> TorchExecutor:
    return TorchExecutor(Classes() if task is None else task, study_seed=0, device="cpu", **kw)


def train(
    from_epoch: int,
    to_epoch: int,
    config: Config | None = None,
    *,
    trial: int = 17,
    checkpoint: str | None = None,
    best: float | None = None,
) -> TrainJob:
    return TrainJob(
        key=f"train/{trial}/{from_epoch}-{to_epoch}",
        trial=trial,
        config=config or {},
        seed=5,
        from_epoch=from_epoch,
        to_epoch=to_epoch,
        checkpoint=checkpoint,
        best=best,
    )


def after(result: Result, to_epoch: int) -> TrainJob:
    """The job that goes on where another ended."""
    epoch = result.epochs[-1].epoch
    best = min(row.metrics["val_loss"] for row in result.epochs)
    return train(epoch, to_epoch, checkpoint=str(result.values["checkpoint"]), best=best)


def curve(*results: Result) -> list[dict[str, float]]:
    return [row.metrics for result in results for row in result.epochs]


# To the bit


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.8, "lr": 0.1, "warmup_epochs": 4.5},
        {"optimizer": "nadam", "grad_clip_norm": 0.5},
        {"optimizer": "rmsprop", "momentum": 0.5, "batch_size": 33, "label_smoothing": 0.1},
    ],
    ids=lambda config: config["optimizer"],
)
def test_nine_epochs_at_once_are_three_and_three_and_three_on_other_workers(config: Config) -> None:
    study = Study()
    whole = study.one(executor(), train(0, 9, config))
    parts: list[Result] = []
    checkpoint, best = None, None
    for start in (0, 3, 6):
        job = train(start, start + 3, config, checkpoint=checkpoint, best=best)
        torch.manual_seed(start)  # a worker's own random state is of no account
        parts.append(study.one(executor(), job))
        checkpoint = str(parts[-1].values["checkpoint"])
        best = min(metrics["val_loss"] for metrics in curve(*parts))
    ref = checkpoint_ref(17, 9)
    assert curve(*parts) == curve(whole)
    assert parts[-1].blobs[ref] == whole.blobs[ref]
    assert len(study.fetched) == 2


_ELSEWHERE = """
import pickle, sys
from tests.test_executor import Study, executor
study = Study()
study.blobs, job = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(study.one(executor(), job)))
"""


def test_another_process_goes_on_to_the_bit(repository: Path) -> None:
    import pickle

    study = Study()
    whole = study.one(executor(), train(0, 4))
    first = study.one(executor(), train(0, 2))
    given = pickle.dumps((study.blobs, after(first, 4)))
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE], input=given, capture_output=True, cwd=repository)
    assert done.returncode == 0, done.stderr.decode()
    second: Result = pickle.loads(done.stdout)
    assert curve(first, second) == curve(whole)
    assert second.blobs[checkpoint_ref(17, 4)] == whole.blobs[checkpoint_ref(17, 4)]


def test_a_result_does_not_depend_on_what_the_worker_did_before() -> None:
    fresh = Study().one(executor(), train(0, 2))
    study, busy = Study(), executor()
    study.run(
        busy, train(0, 3, {"lr": 0.5}, trial=3), RampJob(key="r", config={}, seed=1, lr_min=1e-5, lr_max=10, steps=9)
    )
    again = study.one(busy, train(0, 2))
    assert again.blobs == fresh.blobs
    assert curve(again) == curve(fresh)


def test_without_a_checkpoint_earlier_epochs_are_trained_again_and_not_reported() -> None:
    study = Study()
    whole = study.one(executor(), train(0, 3))
    later = study.one(executor(), train(2, 3))
    assert curve(later) == curve(whole)[2:]
    assert [row.epoch for row in later.epochs] == [3]
    assert study.progress[-3:] == [("train/17/2-3", 1), ("train/17/2-3", 2), ("train/17/2-3", 3)]


def test_a_workers_own_checkpoints_are_not_fetched_again() -> None:
    study, worker = Study(), executor()
    study.one(worker, after(study.one(worker, train(0, 1)), 2))
    assert study.fetched == []


def test_threads_and_random_state_are_put_back() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seen: list[int] = []

    class Counting(Classes):
        def model(self, config: Config) -> nn.Module:
            seen.append(torch.get_num_threads())
            return super().model(config)

    Study().one(executor(Counting(), threads=threads + 1), train(0, 1))
    assert seen == [threads + 1]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


# Best checkpoints


def scripted(*losses: float, best: float | None = None, **kw: Any) -> Result:
    return Study().one(executor(Scripted(*losses), **kw), train(0, len(losses), best=best))


def test_the_best_epoch_has_its_weights_kept_apart_from_the_last() -> None:
    result = scripted(3.0, 1.0, 2.0)
    assert result.values == {
        "checkpoint": "checkpoints/trial-0017-e0003.safetensors",
        "best_checkpoint": "checkpoints/trial-0017-best-e0002.safetensors",
        "resumable": True,
        "n_parameters": 6 * 16 + 16 + 2 * 16 + 16 * 3 + 3,
    }
    best = unpack(result.blobs[checkpoint_ref(17, 2, best=True)], ref="x")
    assert (best.epoch, best.resumable, best.seed) == (2, False, 5)
    straight = Study().one(executor(Scripted(3.0, 1.0)), train(0, 2))
    second = unpack(straight.blobs[checkpoint_ref(17, 2)], ref="x")
    assert all(torch.equal(best.weights[name], second.weights[name]) for name in second.weights)


def test_when_the_last_epoch_is_the_best_one_checkpoint_is_both() -> None:
    result = scripted(3.0, 2.0)
    assert result.values["best_checkpoint"] == result.values["checkpoint"] == checkpoint_ref(17, 2)
    assert list(result.blobs) == [checkpoint_ref(17, 2)]


def test_ties_keep_the_earlier_epoch_also_of_an_earlier_job() -> None:
    assert scripted(2.0, 2.0).values["best_checkpoint"] == checkpoint_ref(17, 1, best=True)
    assert scripted(2.0, 3.0, best=2.0).values["best_checkpoint"] is None
    assert scripted(2.0, 3.0, best=2.5).values["best_checkpoint"] == checkpoint_ref(17, 1, best=True)


def test_a_metric_to_maximize_keeps_the_largest() -> None:
    assert scripted(1.0, 3.0, 2.0, goal="maximize").values["best_checkpoint"] == checkpoint_ref(17, 2, best=True)
    assert scripted(1.0, 3.0, 2.0, goal="maximize", best=-4.0).values["best_checkpoint"] is None


# What goes wrong


def test_a_trial_that_diverges_keeps_its_curve_and_its_best_weights() -> None:
    result = scripted(3.0, 2.0, float("nan"), 1.0)
    assert (result.outcome, result.message, result.values["epoch"]) == ("diverged", "val_loss is nan", 3)
    assert result.values["n_parameters"] == scripted(3.0).values["n_parameters"]
    assert [row.metrics["val_loss"] for row in result.epochs] == [3.0, 2.0]
    assert result.values["checkpoint"] is None
    assert result.values["best_checkpoint"] == checkpoint_ref(17, 2, best=True)
    assert unpack(result.blobs[checkpoint_ref(17, 2, best=True)], ref="x").epoch == 2


def test_a_trial_that_diverges_at_once_leaves_nothing() -> None:
    result = scripted(float("inf"))
    assert (result.outcome, result.message) == ("diverged", "val_loss is inf")
    assert result.epochs == ()
    assert result.blobs == {}


class Raises(Classes):
    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error

    def model(self, config: Config) -> nn.Module:
        raise self.error()


def test_a_task_that_raises_is_a_crash_with_the_users_frame_and_traceback() -> None:
    study = Study()
    result, other = study.run(
        executor(Raises(lambda: ValueError("width must be even"))),
        train(0, 1),
        RampJob(key="r", config={}, seed=0, lr_min=1e-5, lr_max=1, steps=3),
    )
    assert (result.outcome, result.message) == ("crashed", "ValueError: width must be even")
    assert result.frame.startswith("test_executor.py:")
    assert result.frame.endswith("in model")
    assert "raise self.error()" in result.traceback
    assert other.outcome == "crashed"


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError,
        lambda: RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_memory_that_runs_out_is_told_apart_from_a_crash(error: Callable[[], BaseException]) -> None:
    result = Study().one(executor(Raises(error)), train(0, 1))
    assert result.outcome == "out_of_memory"
    assert result.message


def test_shapes_that_only_torchs_layers_complain_of_are_placed_at_the_users_model() -> None:
    class Mismatched(Classes):
        def model(self, config: Config) -> nn.Module:
            return nn.Sequential(nn.Linear(99, 3))

    result = Study().one(executor(Mismatched()), train(0, 1))
    assert result.outcome == "crashed"
    assert "shapes cannot be multiplied" in result.message
    assert result.frame.startswith("test_executor.py:")
    assert result.frame.endswith("in model")


def test_a_bug_of_ours_is_not_taken_for_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.outcome.pack", lambda checkpoint, alive: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Study().one(executor(), train(0, 1))


def test_a_metric_that_the_task_does_not_give_is_named_with_those_it_does() -> None:
    result = Study().one(executor(metric="val_f1"), train(0, 1))
    assert result.outcome == "crashed"
    assert result.message == (
        "the study's metric `val_f1` is not among those of the task (known: train_loss, val_loss, val_accuracy) "
        "(hint: give it in Task.metrics(), or name one of these, and its goal, under `metric` in space.yaml)"
    )


def test_a_damaged_or_strange_checkpoint_is_named() -> None:
    study = Study()
    first = study.one(executor(), train(0, 1))
    ref = checkpoint_ref(17, 1)
    study.blobs["checkpoints/half"] = study.blobs[ref][:100]
    study.blobs["checkpoints/best"] = b""
    damaged = study.one(executor(), dataclasses.replace(after(first, 2), checkpoint="checkpoints/half"))
    assert damaged.outcome == "damaged"
    assert damaged.values == {"ref": "checkpoints/half"}
    assert damaged.message == "it is not a checkpoint of hpsearch's, or cut short"
    wrong = study.one(executor(), train(3, 4, checkpoint=ref))
    assert wrong.message == "it is of trial 17 at epoch 1, not of trial 17 at epoch 3"
    both = study.one(executor(Scripted(1.0, 2.0)), train(0, 2))
    weights = str(both.values["best_checkpoint"])
    alone = study.one(executor(), train(1, 2, checkpoint=weights))
    assert (alone.outcome, alone.values) == ("damaged", {"ref": weights})
    assert alone.message == "it holds weights alone, so trial 17 cannot go on from it"


def test_a_damaged_blob_gives_the_job_back_without_blame() -> None:
    def gone(ref: str) -> bytes:
        raise DamagedBlob(ref, "the file is gone")

    member = Member(trial=17, config={}, checkpoint="checkpoints/gone")
    jobs: list[Job] = [
        train(1, 2, checkpoint="checkpoints/gone"),
        EvaluateJob(key="evaluate/test/17", members=(member,), split="test", keep_predictions=False),
        ExportJob(key="export/17", members=(member,)),
    ]
    results = list(executor().run(jobs, gone, lambda key, epoch: None))
    assert [(r.key, r.outcome, r.values, r.message) for r in results] == [
        (job.key, "damaged", {"ref": "checkpoints/gone"}, "the file is gone") for job in jobs
    ]


def rebuild(epoch: int, config: Config | None = None) -> RebuildJob:
    return RebuildJob(
        key=f"rebuild/17/{epoch}", trial=17, config=config or {}, seed=5, epoch=epoch, checkpoint="checkpoints/again"
    )


@pytest.mark.parametrize("config", [{"optimizer": "adamw", "dropout": 0.3}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_rebuilt_epoch_has_the_weights_of_the_first_time_to_the_bit(config: Config) -> None:
    study = Study()
    first = study.one(executor(), train(0, 2, config))
    study.one(executor(), train(2, 5, config, checkpoint=str(first.values["checkpoint"])))
    for epoch in (2, 5):
        again = study.one(executor(), rebuild(epoch, config))
        assert again.outcome == "done"
        assert again.epochs == ()
        old, new = (unpack(study.blobs[ref], ref=ref) for ref in (checkpoint_ref(17, epoch), "checkpoints/again"))
        assert (new.trial, new.seed, new.epoch, new.config) == (17, 5, epoch, config)
        assert new.optimizer is None
        assert old.weights.keys() == new.weights.keys()
        assert all(torch.equal(old.weights[name], new.weights[name]) for name in old.weights)


def test_a_rebuilt_best_epoch_gives_the_very_bytes() -> None:
    study = Study()
    first = study.one(executor(Scripted(1.0, 0.5, 2.0)), train(0, 3))
    best = str(first.values["best_checkpoint"])
    study.one(executor(Scripted(1.0, 0.5, 2.0)), rebuild(2))
    assert study.blobs["checkpoints/again"] == study.blobs[best]


def test_a_rebuild_that_diverges_says_that_it_did_not_the_first_time() -> None:
    again = Study().one(executor(Scripted(1.0, float("nan"))), rebuild(2))
    assert (again.outcome, again.blobs) == ("diverged", {})
    assert again.message == "trained again, val_loss is nan, as it was not the first time"


def test_when_asked_to_stop_it_ends_between_epochs_without_a_result() -> None:
    study = Study()
    worker = executor(should_stop=lambda: len(study.progress) == 2)
    assert study.run(worker, train(0, 9), train(0, 9, trial=3)) == []
    assert study.progress == [("train/17/0-9", 1), ("train/17/0-9", 2)]


def test_jobs_of_every_kind_say_between_their_batches_that_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.executor.ALIVE_S", 0.0)
    study, worker = Study(), executor()
    trained = study.one(worker, train(0, 2, {"batch_size": 25}))
    told = list(study.progress)
    assert {key for key, _ in told} == {"train/17/0-2"}
    assert told == sorted(told)
    assert told.count(("train/17/0-2", 0)) > 1  # within the first epoch
    assert told.count(("train/17/0-2", 1)) > 2  # at its end, and within the second
    assert told.count(("train/17/0-2", 2)) > 1  # at its end, and while its checkpoints are packed
    member = Member(trial=17, config={}, checkpoint=str(trained.values["checkpoint"]))
    for job in (
        RampJob(key="ramp/0", config={"batch_size": 25}, seed=3, lr_min=1e-5, lr_max=0.1, steps=5),
        ProbeJob(key="probe/0", config={"batch_size": 25, "lr": 0.1}, seed=3, steps=5),
        EvaluateJob(key="evaluate/val/17", members=(member,), split="val", keep_predictions=False),
    ):
        study.one(worker, job)
        assert study.progress[-1] == (job.key, 0)


# LR range


def test_a_ramp_gives_its_losses_and_what_it_cost() -> None:
    job = RampJob(key="ramp/0", config={"batch_size": 25}, seed=3, lr_min=1e-5, lr_max=0.1, steps=20)
    result = Study().one(executor(), job)
    losses = result.values["losses"]
    assert isinstance(losses, list)
    assert len(losses) == 20
    assert result.values["batch_size"] == 25
    assert result.values["epochs"] == pytest.approx(5.0)
    assert Study().one(executor(), job).values == result.values
    assert Study().one(executor(), dataclasses.replace(job, seed=4)).values["losses"] != losses


def test_a_ramp_that_reaches_nan_is_shorter() -> None:
    class Regression(Classes):
        def data(self) -> Splits:
            x, _ = rows(100, 0)
            return Splits(train=(x, x[:, :1] * 2), val=(x, x[:, :1] * 2))

        def model(self, config: Config) -> nn.Module:
            return nn.Linear(6, 1)

    config: Config = {"optimizer": "sgd", "batch_size": 50}
    job = RampJob(key="ramp/0", config=config, seed=0, lr_min=1e-5, lr_max=1e30, steps=40)
    losses = Study().one(executor(Regression()), job).values["losses"]
    assert isinstance(losses, list)
    assert 5 < len(losses) < 40


def test_a_task_that_reads_lr_in_its_optimizer_can_be_ramped() -> None:
    class Reads(Classes):
        def optimizer(self, params: Any, config: Config) -> torch.optim.Optimizer:
            lr = config["lr"]
            assert isinstance(lr, float)
            return torch.optim.SGD(params, lr=lr)

    job = RampJob(key="ramp/0", config={}, seed=0, lr_min=1e-5, lr_max=10, steps=5)
    assert Study().one(executor(Reads()), job).outcome == "done"


def test_a_probe_trains_as_a_trial_does() -> None:
    config: Config = {"lr": 0.02, "optimizer": "sgd", "batch_size": 20}
    losses = Study().one(executor(), ProbeJob(key="probe/0", config=config, seed=5, steps=5)).values["losses"]
    assert isinstance(losses, list)
    trained = Study().one(executor(), train(0, 1, config))
    assert np.mean(losses) == pytest.approx(trained.epochs[0].metrics["train_loss"], rel=1e-6)


# Prediction


def trained_study(*seeds: int) -> tuple[Study, TorchExecutor, list[Member]]:
    study, worker = Study(), executor()
    members = []
    for trial in seeds:
        job = dataclasses.replace(train(0, 2, trial=trial), seed=trial)
        ref = str(study.one(worker, job).values["best_checkpoint"])
        members.append(Member(trial=trial, config={}, checkpoint=ref))
    return study, worker, members


def test_a_single_model_is_measured_as_it_was_in_training() -> None:
    study, worker = Study(), executor()
    result = study.one(worker, train(0, 3))
    member = Member(trial=17, config={}, checkpoint=str(result.values["checkpoint"]))
    job = EvaluateJob(key="evaluate/val/17", members=(member,), split="val", keep_predictions=False)
    found = study.one(executor(), job)
    metrics = result.epochs[-1].metrics
    assert found.values["metrics"] == {"loss": metrics["val_loss"], "accuracy": metrics["val_accuracy"]}
    assert found.values["n_rows"] == 20
    assert (found.values["predictions"], found.values["targets"]) == (None, None)
    assert list(found.blobs) == ["predictions/evaluate-val-17-rows.safetensors"]


def test_predictions_targets_and_row_scores_are_kept_where_asked() -> None:
    study, worker, members = trained_study(3)
    job = EvaluateJob(key="evaluate/ensemble/3", members=tuple(members), split="ensemble", keep_predictions=True)
    values = study.one(worker, job).values
    predictions = load(study.blobs[str(values["predictions"])])["predictions"]
    targets = load(study.blobs[str(values["targets"])])["targets"]
    scores = load(study.blobs[str(values["row_scores"])])
    assert (predictions.dtype, predictions.shape, targets.shape) == (np.float32, (20, 3), (20,))
    np.testing.assert_allclose(predictions.sum(axis=1), 1.0, rtol=1e-6)
    nll = -np.log(predictions[np.arange(20), targets])
    np.testing.assert_allclose(scores["loss"], nll, rtol=1e-5)
    np.testing.assert_array_equal(scores["accuracy"], (predictions.argmax(axis=1) == targets).astype(float))
    metrics = values["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["loss"] == pytest.approx(nll.mean(), rel=1e-5)


def test_an_ensemble_is_the_weighted_mean_of_its_members_predictions() -> None:
    study, worker, members = trained_study(3, 4)
    alone = []
    for member in members:
        job = EvaluateJob(key=f"evaluate/test/{member.trial}", members=(member,), split="test", keep_predictions=True)
        alone.append(load(study.blobs[str(study.one(worker, job).values["predictions"])])["predictions"])
    heavy = (dataclasses.replace(members[0], weight=0.75), dataclasses.replace(members[1], weight=0.25))
    key = "evaluate/test/3*0.75+4*0.25"
    values = study.one(worker, EvaluateJob(key=key, members=heavy, split="test", keep_predictions=True)).values
    assert values["predictions"] == "predictions/evaluate-test-3x0.75+4x0.25.safetensors"
    found = load(study.blobs[str(values["predictions"])])["predictions"]
    expected = 0.75 * alone[0] + 0.25 * alone[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    targets = load(study.blobs[str(values["targets"])])["targets"]
    metrics = values["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["loss"] == pytest.approx(-np.log(expected[np.arange(30), targets]).mean(), rel=1e-5)


def test_a_very_long_key_still_makes_a_file_name() -> None:
    study, worker, members = trained_study(3)
    key = "evaluate/test/" + "+".join(f"{n}*0.05" for n in range(100))
    values = study.one(
        worker, EvaluateJob(key=key, members=tuple(members), split="test", keep_predictions=False)
    ).values
    assert len(Path(str(values["row_scores"])).name) < 200


def test_a_split_that_the_task_does_not_have_is_told() -> None:
    class Untested(Classes):
        def data(self) -> Splits:
            return Splits(train=rows(100, 0), val=rows(40, 1))

    study, _, members = trained_study(3)
    job = EvaluateJob(key="evaluate/test/3", members=tuple(members), split="test", keep_predictions=False)
    result = study.one(executor(Untested()), job)
    assert result.outcome == "crashed"
    assert result.message == "the task has no test split (hint: give one in Task.data())"


def test_export_gives_graphs_and_weights() -> None:
    study, worker, members = trained_study(3)
    result = study.one(worker, ExportJob(key="export/3", members=tuple(members)))
    assert result.outcome == "done", result.message
    exported = result.values["members"]
    assert isinstance(exported, dict)
    assert exported["3"]["onnx"] in result.blobs
    assert exported["3"]["weights"] in result.blobs
    assert result.values["input_shape"] == [6]


# What the worker tells of its data


def test_describe_tells_data_and_with_a_config_the_metrics() -> None:
    info = executor().describe()
    assert info.n_rows == {"train": 100, "val": 20, "ensemble": 20, "test": 30}
    assert (info.metrics, info.resumable) == ((), True)
    assert executor().describe({}).metrics == ("train_loss", "val_loss", "val_accuracy")
    assert executor(cut_ensemble=False).describe().n_rows["val"] == 40


def test_jobs_find_the_data_loaded_without_describe() -> None:
    assert Study().one(executor(), train(0, 1)).outcome == "done"


# A user's own loop


class Own(Classes):
    """Counts from its state; with `keeps` it offers one."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.log: list[str] = []

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        epoch = trial.epoch if trial.state is None else int(trial.state["epoch"])
        self.log.append(f"trial {trial.number} starts at {epoch}")
        try:
            while True:
                epoch += 1
                with torch.no_grad():
                    for param in model.parameters():
                        param.add_(torch.rand(()))
                kept = {"epoch": epoch}
                yield Report({"loss": 1.0 / epoch}, state=(lambda kept=kept: kept) if self.keeps else None)
        finally:
            self.log.append(f"trial {trial.number} ends at {epoch}")


def test_a_fit_with_state_is_paused_and_goes_on_anywhere() -> None:
    study = Study()
    whole = study.one(executor(Own(keeps=True)), train(0, 4))
    task = Own(keeps=True)
    first = study.one(executor(task), train(0, 2))
    second = study.one(executor(task), after(first, 4))
    assert first.values["resumable"] is True
    assert curve(first, second) == curve(whole) == [{"val_loss": 1 / epoch} for epoch in (1, 2, 3, 4)]
    assert second.blobs[checkpoint_ref(17, 4)] == whole.blobs[checkpoint_ref(17, 4)]
    assert task.log == ["trial 17 starts at 0", "trial 17 ends at 2", "trial 17 starts at 2", "trial 17 ends at 4"]


def test_a_fit_without_state_is_kept_alive_for_its_next_job() -> None:
    task = Own(keeps=False)
    study, worker = Study(), executor(task)
    first = study.one(worker, train(0, 2))
    assert first.values == {
        "checkpoint": None,
        "best_checkpoint": "checkpoints/trial-0017-best-e0002.safetensors",
        "resumable": False,
        "n_parameters": 195,
    }
    second = study.one(worker, train(2, 3))
    assert task.log == ["trial 17 starts at 0"]
    assert curve(second) == [{"val_loss": 1 / 3}]
    worker.close()
    assert task.log == ["trial 17 starts at 0", "trial 17 ends at 3"]


def test_a_fit_without_state_is_trained_again_elsewhere_and_gives_the_same() -> None:
    study = Study()
    whole = study.one(executor(Own(keeps=False)), train(0, 3))
    task = Own(keeps=False)
    elsewhere = study.one(executor(task), train(2, 3, best=0.5))
    assert curve(elsewhere) == curve(whole)[2:]
    ref = str(elsewhere.values["best_checkpoint"])
    assert elsewhere.blobs[ref] == whole.blobs[ref]


def test_a_living_fit_at_another_epoch_is_not_used() -> None:
    task = Own(keeps=False)
    study, worker = Study(), executor(task)
    study.one(worker, train(0, 3))
    assert curve(study.one(worker, train(1, 2))) == [{"val_loss": 0.5}]
    assert task.log[:3] == ["trial 17 starts at 0", "trial 17 ends at 3", "trial 17 starts at 0"]


def test_only_some_fits_are_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.executor.LIVE_FITS", 1)
    task = Own(keeps=False)
    study, worker = Study(), executor(task)
    study.run(worker, train(0, 1, trial=1), train(0, 1, trial=2))
    assert task.log == ["trial 1 starts at 0", "trial 2 starts at 0", "trial 1 ends at 1"]


def test_a_fit_that_diverges_or_crashes_is_closed() -> None:
    class Bad(Own):
        def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
            for _ in super().fit(model, config, splits, trial):
                yield Report({"loss": float(config["bad"]) if trial.number == 1 else "high"})  # type: ignore[arg-type, dict-item]

    task = Bad(keeps=False)
    diverged, crashed = Study().run(
        executor(task), train(0, 2, {"bad": float("inf")}, trial=1), train(0, 2, {"bad": 0.0}, trial=2)
    )
    assert (diverged.outcome, diverged.message) == ("diverged", "val_loss is inf")
    assert (crashed.outcome, crashed.message) == ("crashed", "a Report's `loss` is a str, not a number")
    assert task.log == ["trial 1 starts at 0", "trial 1 ends at 1", "trial 2 starts at 0", "trial 2 ends at 1"]


def test_a_task_with_its_own_fit_says_that_only_training_tells_its_metrics() -> None:
    info = executor(Own(keeps=True)).describe({})
    assert (info.metrics, info.resumable) == ((), False)
