"""What a training job gives: its curve, the weights of its best epoch, and the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hpsearch.errors import DamagedBlob
from hpsearch.job import EpochMetrics, Result, TrainJob
from hpsearch.training.checkpoint import Alive, Checkpoint, pack
from hpsearch.training.loop import Training


@dataclass(kw_only=True)
class Curve:
    """What a job's epochs gave so far."""

    objective: float | None  # minimised; of the best epoch, also of earlier jobs
    rows: list[EpochMetrics] = field(default_factory=list)
    best: Checkpoint | None = None  # weights of the best epoch, when it is one of this job's
    diverged: str = ""

    def add(self, row: EpochMetrics, objective: float) -> bool:
        """Take an epoch more. True: it is the best so far, and its weights are wanted as `best`.

        Args:
            objective: of this epoch, minimised.
        """
        self.rows.append(row)
        if self.objective is not None and objective >= self.objective:
            return False
        self.objective = objective
        return True

    def result(self, job: TrainJob, training: Training, alive: Alive = None) -> Result:
        """Of a job that has come to its end, or diverged.

        Args:
            alive: called again and again while checkpoints are packed.
        """
        return _diverged(job, training, self, alive) if self.diverged else _trained(job, training, self, alive)


def checkpoint_ref(trial: int, epoch: int, *, best: bool = False) -> str:
    """Where a checkpoint is kept.

    >>> checkpoint_ref(17, 27), checkpoint_ref(17, 5, best=True)
    ('checkpoints/trial-0017-e0027.safetensors', 'checkpoints/trial-0017-best-e0005.safetensors')
    """
    return f"checkpoints/trial-{trial:04d}-{'best-' if best else ''}e{epoch:04d}.safetensors"


def _trained(job: TrainJob, training: Training, curve: Curve, alive: Alive) -> Result:
    blobs: dict[str, bytes] = {}
    last = training.checkpoint()
    last_ref = checkpoint_ref(job.trial, last.epoch) if last.resumable else None
    if last_ref is not None:
        blobs[last_ref] = pack(last, alive)
    best_ref = None
    if curve.best is not None:
        if last_ref is not None and curve.best.epoch == last.epoch:
            best_ref = last_ref
        else:
            best_ref = checkpoint_ref(job.trial, curve.best.epoch, best=True)
            blobs[best_ref] = pack(curve.best, alive)
    values = {
        "checkpoint": last_ref,
        "best_checkpoint": best_ref,
        "resumable": last.resumable,
        "n_parameters": _n_parameters(training.model),
    }
    return Result(key=job.key, values=values, epochs=tuple(curve.rows), blobs=blobs)


def _diverged(job: TrainJob, training: Training, curve: Curve, alive: Alive) -> Result:
    """The curve up to the bad epoch, and the best weights before it: a trial may be used up to where it went wrong."""
    blobs: dict[str, bytes] = {}
    best_ref = None
    if curve.best is not None:
        best_ref = checkpoint_ref(job.trial, curve.best.epoch, best=True)
        blobs[best_ref] = pack(curve.best, alive)
    return Result(
        key=job.key,
        outcome="diverged",
        values={
            "checkpoint": None,
            "best_checkpoint": best_ref,
            "resumable": False,
            "epoch": training.epoch + 1,
            "n_parameters": _n_parameters(training.model),
        },
        epochs=tuple(curve.rows),
        blobs=blobs,
        message=curve.diverged,
    )


def _n_parameters(model: nn.Module) -> int:
    """All numbers that a model has learned or was given, frozen ones too; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_continuable(job: TrainJob, checkpoint: Checkpoint) -> None:
    """Raises DamagedBlob when a job's checkpoint is not the one that the job goes on from."""
    assert job.checkpoint is not None
    if (checkpoint.trial, checkpoint.epoch) != (job.trial, job.from_epoch):
        raise DamagedBlob(
            job.checkpoint,
            f"it is of trial {checkpoint.trial} at epoch {checkpoint.epoch}, "
            f"not of trial {job.trial} at epoch {job.from_epoch}",
        )
    if not checkpoint.resumable:
        raise DamagedBlob(job.checkpoint, f"it holds weights alone, so trial {job.trial} cannot go on from it")
