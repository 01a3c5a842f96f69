"""Fake workers: executors that answer from synthetic curves, so that whole studies run in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hpsearch.job import (
    BaselineJob,
    CheckJob,
    ConfirmJob,
    DataInfo,
    EpochMetrics,
    EvaluateJob,
    ExportJob,
    FoldJob,
    Job,
    ProbeJob,
    RampJob,
    RebuildJob,
    Result,
    TrainJob,
)
from hpsearch.sampler import Sampler, SobolSampler
from hpsearch.spec import Spec

N_ROWS, N_CLASSES = 120, 3


def val_loss(config: dict[str, object], epoch: int) -> float:
    """A curve that falls with epochs towards a floor set by how far lr is from 0.01."""
    distance = abs(math.log10(float(str(config.get("lr", 0.01)))) + 2)
    return 0.1 + 0.2 * distance + 1.0 / (epoch + 1)


class FakeExecutor:
    """Answers every job from its own fields alone, as a real one must."""

    def __init__(
        self,
        *,
        diverge_above: float = math.inf,
        crash: Callable[[TrainJob], str] | None = None,
        checkpoints: bool = True,
    ) -> None:
        """
        Args:
            checkpoints: False: named, but no bytes are sent, so that a benchmark sees the study without the disk.
        """
        self._checkpoints = checkpoints
        self._diverge_above = diverge_above
        self._crash = crash
        self.ran: list[str] = []

    def describe(self) -> DataInfo:
        return DataInfo(
            fingerprint="fake",
            test_fingerprint="fake-test",
            n_rows={"train": 300, "val": N_ROWS, "ensemble": N_ROWS, "test": N_ROWS},
            outputs="logits",
            n_classes=N_CLASSES,
            input_shape=(4,),
            input_dtype="float32",
            metrics=("val_loss", "val_accuracy"),
        )

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            self.ran.append(job.key)
            match job:
                case RampJob():
                    yield self._ramp(job)
                case ProbeJob():
                    yield Result(key=job.key, values={"losses": [1.0] * job.steps, "batch_size": 32, "epochs": 1.0})
                case TrainJob():
                    yield self._train(job)
                case CheckJob():
                    yield Result(key=job.key, values={"checks": []})
                case BaselineJob():
                    yield self._baseline(job)
                case FoldJob():
                    yield self._fold(job)
                case ConfirmJob():
                    yield self._confirm(job)
                case RebuildJob():
                    yield Result(
                        key=job.key,
                        values={"best_checkpoint": job.checkpoint},
                        blobs={job.checkpoint: job.key.encode()} if self._checkpoints else {},
                    )
                case EvaluateJob():
                    yield self._evaluate(job)
                case ExportJob():
                    yield Result(key=job.key, values={"members": {}, "input_shape": [4], "input_dtype": "float32"})

    def _ramp(self, job: RampJob) -> Result:
        lrs = np.geomspace(job.lr_min, job.lr_max, job.steps)
        losses = [1.0 + 0.3 * (math.log10(lr) + 1) ** 2 for lr in lrs]
        return Result(key=job.key, values={"losses": losses, "batch_size": 32, "epochs": 1.0})

    def _train(self, job: TrainJob) -> Result:
        message = self._crash(job) if self._crash else ""
        if message:
            return Result(key=job.key, outcome="crashed", message=message, frame="task.py:7 in model")
        epochs = []
        for epoch in range(job.from_epoch + 1, job.to_epoch + 1):
            loss = val_loss(job.config, epoch)
            epochs.append(
                EpochMetrics(epoch=epoch, metrics={"val_loss": loss, "val_accuracy": 1 - loss / 3}, seconds=0.1)
            )
        if float(str(job.config.get("lr", 0.0))) > self._diverge_above:
            return Result(key=job.key, outcome="diverged", message="val_loss is nan")
        ref = f"checkpoints/trial-{job.trial:04d}-e{job.to_epoch:04d}.safetensors"
        return Result(
            key=job.key,
            values={"checkpoint": ref, "best_checkpoint": ref, "resumable": True},
            epochs=tuple(epochs),
            blobs={ref: job.key.encode()} if self._checkpoints else {},
            seconds=0.1,
        )

    def _baseline(self, job: BaselineJob) -> Result:
        """Chance, and something between chance and the trials."""
        level = {"constant": 1.5, "linear": 1.2}[job.name]
        rows = level + 0.1 * np.random.default_rng(len(job.name)).standard_normal(N_ROWS)
        refs = {split: f"predictions/baseline-{job.name}-{split}.safetensors" for split in ("val", "ensemble", "test")}
        metrics = {"loss": float(rows.mean()), "accuracy": 1 / N_CLASSES}
        return Result(
            key=job.key,
            values={"metrics": dict.fromkeys(refs, metrics), "row_scores": refs},
            blobs={ref: save({"loss": rows}) for ref in refs.values()},
        )

    def _fold(self, job: FoldJob) -> Result:
        """The trial's curve, harder or easier by the fold, with a spread of its seed's."""
        hard = 0.1 * np.random.default_rng([job.repeat, job.fold]).standard_normal()
        luck = 0.01 * np.random.default_rng(job.seed).standard_normal()
        epochs = []
        for epoch in range(1, job.epochs + 1):
            loss = float(val_loss(job.config, epoch) + hard + luck)
            epochs.append(EpochMetrics(epoch=epoch, metrics={"val_loss": loss, "val_accuracy": 1 - loss}, seconds=0.1))
        return Result(key=job.key, values={"n_rows": {"train": 320, "val": 80}}, epochs=tuple(epochs))

    def _confirm(self, job: ConfirmJob) -> Result:
        """The trial's last value, a tenth worse, with a spread of its seed's."""
        rng = np.random.default_rng(job.seed)
        rows = val_loss(job.config, job.epochs) + 0.1 + 0.01 * rng.standard_normal() + 0.2 * rng.standard_normal(N_ROWS)
        name = "predictions/" + job.key.replace("/", "-") + "-rows.safetensors"
        loss = float(rows.mean())
        return Result(
            key=job.key,
            values={
                "metrics": {"loss": loss, "accuracy": 1 - loss / 3},
                "val": {"loss": loss, "accuracy": 1 - loss / 3},
                "epoch": job.epochs,
                "n_rows": N_ROWS,
                "row_scores": name,
            },
            blobs={name: save({"loss": rows})},
        )

    def _evaluate(self, job: EvaluateJob) -> Result:
        targets = np.arange(N_ROWS) % N_CLASSES
        mean = np.zeros((N_ROWS, N_CLASSES))
        for member in job.members:
            noise = np.random.default_rng([member.trial]).random((N_ROWS, N_CLASSES))
            probs = noise + 1.5 * np.eye(N_CLASSES)[targets]
            mean += member.weight * probs / probs.sum(axis=1, keepdims=True)
        rows = -np.log(mean[np.arange(N_ROWS), targets])
        right = (mean.argmax(axis=1) == targets).astype(np.float64)
        name = "predictions/" + job.key.replace("/", "-").replace("*", "x") + ".safetensors"
        blobs = {f"{name}.rows": save({"loss": rows, "accuracy": right})}
        values: dict[str, object] = {
            "metrics": {"loss": float(rows.mean()), "accuracy": float(right.mean())},
            "n_rows": N_ROWS,
            "row_scores": f"{name}.rows",
            "predictions": None,
            "targets": None,
        }
        if job.keep_predictions:
            blobs[name] = save({"predictions": mean.astype(np.float32), "targets": targets})
            values |= {"predictions": name, "targets": name}
        return Result(key=job.key, values=values, blobs=blobs)


def make_sampler(spec: Spec) -> Sampler:
    return SobolSampler(spec.space, spec.seed)


def make_executor(spec: Spec, folder: Path) -> FakeExecutor:
    return FakeExecutor()
