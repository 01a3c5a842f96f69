"""Jobs about models that are trained already: what they are worth on a split, and as what they leave the study."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hpsearch.errors import UserCodeError
from hpsearch.job import BaselineJob, Config, EvaluateJob, ExportJob, Member, Result, SplitName
from hpsearch.task import Task
from hpsearch.training.checkpoint import Checkpoint, load_weights
from hpsearch.training.data import StudyData
from hpsearch.training.lanes import Predictor
from hpsearch.training.loop import build_model
from hpsearch.training.measure import (
    mean_prediction,
    output_metrics,
    output_of,
    prediction_of,
    row_scores,
    split_output,
)
from hpsearch.training.precision import in_float32
from hpsearch.training.user_code import user_code

EXPORT_ROWS = 16  # real rows that an exported graph is compared on


class Measuring:
    """Measures and exports the models of one study on one worker."""

    def __init__(self, task: Task, data: StudyData, *, device: torch.device, read: Callable[[str], Checkpoint]) -> None:
        """
        Args:
            task: the user's.
            data: of the study.
            device: where models run.
            read: gives a checkpoint by its reference.
        """
        self._task = task
        self._data = data
        self._device = device
        self._read = read

    def baseline(self, job: BaselineJob) -> Result:
        """What a model that hardly learns is worth on every split; "unusable" where it is not one for this task."""
        from hpsearch.training.baselines import Skipped, measure_baseline

        try:
            measured = measure_baseline(job.name, self._task, self._data, seed=job.seed)
        except Skipped as reason:
            return Result(key=job.key, outcome="unusable", message=str(reason))
        refs = {split: f"predictions/{_file_name(job.key)}-{split}-rows.safetensors" for split in measured}
        return Result(
            key=job.key,
            values={"metrics": {split: metrics for split, (metrics, _) in measured.items()}, "row_scores": refs},
            blobs={refs[split]: save_tensors(rows) for split, (_, rows) in measured.items()},
        )

    def evaluate(self, job: EvaluateJob) -> Result:
        """What the job's members, averaged by their weights, are worth on its split.

        Raises:
            UserCodeError: there is no such split, or the task's own code raised.
            DamagedBlob: a member's checkpoint cannot be read.
        """
        if job.split not in self._data.info.n_rows:
            raise UserCodeError(f"the task has no {job.split} split", hint="give one in Task.data()")
        outputs = [split_output(self._member(member), self._data, job.split) for member in job.members]
        weights = [member.weight for member in job.members]
        return self.measured(job.key, outputs, weights, job.split, keep=job.keep_predictions)

    def measured(
        self,
        key: str,
        given: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[float],
        split: SplitName,
        *,
        keep: bool,
    ) -> Result:
        """What some models' outputs, weighted, are worth on a split; `given` are (output, target) of each."""
        outputs, target = self._data.info.outputs, given[0][1]
        predictions = [prediction_of(output, outputs) for output, _ in given]
        if len(given) == 1:
            # A single model keeps its own output, so that its metrics are those of its training to the bit.
            prediction, output = predictions[0], given[0][0]
        else:
            prediction = mean_prediction(predictions, weights)
            output = output_of(prediction, outputs)
        metrics = output_metrics(self._task, output, target)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not bad and not bool(torch.isfinite(prediction).all()):
            return Result(key=key, outcome="diverged", message=f"predictions of the {split} split are not finite")
        if bad:
            return Result(key=key, outcome="diverged", message=f"{split}_{bad[0]} is {metrics[bad[0]]}")
        stem = f"predictions/{_file_name(key)}"
        with user_code("loss()"):
            rows = row_scores(self._task, outputs, output, target)
        blobs = {f"{stem}-rows.safetensors": save_tensors(rows)}
        refs: dict[str, str | None] = {"predictions": None, "targets": None}
        if keep:
            refs = {"predictions": f"{stem}.safetensors", "targets": f"predictions/targets-{split}.safetensors"}
            blobs[f"{stem}.safetensors"] = save_tensors({"predictions": prediction.cpu().contiguous()})
            blobs[f"predictions/targets-{split}.safetensors"] = save_tensors({"targets": target.cpu().contiguous()})
        values = {"metrics": metrics, "n_rows": len(target), **refs, "row_scores": f"{stem}-rows.safetensors"}
        return Result(key=key, values=values, blobs=blobs)

    def export(self, job: ExportJob) -> Result:
        """The job's members as graphs and weights that can be used without the task."""
        from hpsearch.training.export import export_members  # onnx takes a second to import

        models = {member.trial: (in_float32(self._member(member)), member.config) for member in job.members}
        inputs, _ = next(self._data.batches("train", batch_size=EXPORT_ROWS))
        example = inputs if len(inputs) > 1 else torch.cat([inputs, inputs])
        with user_code("model.forward()"):
            values, blobs = export_members(models, example)
        return Result(key=job.key, values=values, blobs=blobs)

    def predictor(self, member: Member) -> Predictor:
        """A member, to be asked beside others.

        Raises:
            DamagedBlob: its checkpoint cannot be read.
            UserCodeError: its model cannot be made.
        """
        return Predictor(model=self._member(member), task=self._task, data=self._data, device=self._device)

    def model_of(self, config: Config, checkpoint: Checkpoint) -> nn.Module:
        """A model with its trained weights, in eval mode."""
        model = build_model(self._task, config, self._data, seed=checkpoint.seed, device=self._device)
        load_weights(model, checkpoint)
        return model.eval()

    def _member(self, member: Member) -> nn.Module:
        return self.model_of(member.config, self._read(member.checkpoint))


def metric_names(task: Task, data: StudyData, config: Config, *, seed: int, device: torch.device) -> tuple[str, ...]:
    """The metrics that the default loop gives for a config, found by asking an untrained model about some rows."""
    model = build_model(task, config, data, seed=seed, device=device).eval()
    inputs, target = next(data.batches("val", batch_size=16))
    with torch.no_grad(), user_code("model.forward()"):
        output = model(inputs)
    return ("train_loss", *(f"val_{name}" for name in output_metrics(task, output, target)))


def _file_name(key: str) -> str:
    """A job's key as the name of a file; long ones are cut and told apart by a digest.

    >>> _file_name("evaluate/test/17*0.75+3*0.25")
    'evaluate-test-17x0.75+3x0.25'
    """
    name = re.sub(r"[^\w.+=-]", "-", key.replace("*", "x"), flags=re.ASCII)
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
