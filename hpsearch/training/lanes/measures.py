"""The loss and metrics of all lanes on a split: at once where both are the Task's own, else lane by lane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpsearch.task import Task, outputs_of
from hpsearch.training.data import check_output
from hpsearch.training.lanes.losses import loss_of_lanes
from hpsearch.training.measure import output_metrics
from hpsearch.training.user_code import user_code


def lane_metrics(
    tasks: Sequence[Task], outputs: Tensor, target: Tensor, sound: Sequence[bool]
) -> list[dict[str, float]]:
    """What `output_metrics` gives for each lane, within rounding.

    On a GPU the lanes' own loss and metrics cost a wait for each number; at once they cost one.

    Args:
        tasks: of each lane, of one class.
        outputs: (L, rows, …).
        target: of all lanes.
        sound: of each lane, whether its training loss is finite; else a metric of the task's own is not asked.

    Raises:
        UserCodeError: as `output_metrics`.
    """
    task = tasks[0]
    if type(task).loss is not Task.loss or type(task).metrics is not Task.metrics or any(t.metric_names for t in tasks):
        # A loss or metric of the task's own may change what it is given, and the targets are all lanes'.
        lanes = zip(tasks, outputs, sound, strict=True)
        return [output_metrics(task, output, target.clone()) if is_sound else {} for task, output, is_sound in lanes]
    meaning = outputs_of(task, target)
    check_output(outputs[0], target, meaning, own_loss=True)
    with torch.no_grad(), user_code("loss()"):
        losses = loss_of_lanes(task, meaning, smoothed=False)(
            outputs, target.expand(len(outputs), *target.shape), outputs.new_zeros(len(outputs))
        )
        match meaning:
            case "logits":
                name, each = "accuracy", outputs.argmax(dim=2) == target
            case "binary_logits":
                name, each = "accuracy", (outputs > 0) == (target > 0.5)
            case "values":
                name, each = "mae", (outputs - target).abs()
        told = torch.stack([losses.double(), each.float().flatten(1).mean(1).double()]).tolist()
    return [{"loss": loss, name: value} for loss, value in zip(*told, strict=True)]
