"""Loss and metrics of lanes: those that each lane's outputs have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpsearch.errors import UserCodeError
from hpsearch.task import Task
from hpsearch.training.lanes.measures import lane_metrics
from hpsearch.training.measure import output_metrics


class Own(Task):
    """Counts how often it is asked, and changes what it is given."""

    def __init__(self) -> None:
        self.n_asked = 0

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        self.n_asked += 1
        target.zero_()
        return {"share": (output > 0).float().mean()}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CLASSES = torch.arange(9) % 4
CASES = {
    "classes": (drawn(3, 9, 4), CLASSES),
    "pixels": (drawn(3, 9, 4, 5, 2), CLASSES.reshape(9, 1, 1).expand(9, 5, 2)),
    "binary": (drawn(3, 9), (CLASSES > 1).float()),
    "binary columns": (drawn(3, 9, 2), torch.stack([CLASSES > 1, CLASSES > 2], 1).float()),
    "values": (drawn(3, 9, 2), drawn(9, 2)),
    "whole values": (drawn(3, 9, 1).double(), drawn(9, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_all_at_once_are_those_of_each_alone(case: str) -> None:
    outputs, target = CASES[case]
    task = Task()
    if case.startswith("binary"):
        task.outputs = "binary_logits"
    found = lane_metrics([task] * 3, outputs, target, [True] * 3)
    for lane, metrics in enumerate(found):
        wanted = output_metrics(task, outputs[lane], target)
        assert metrics == pytest.approx(wanted, rel=1e-5)
        assert list(metrics) == list(wanted)


def test_metric_of_the_tasks_own_is_asked_for_each_sound_lane_with_its_own_targets() -> None:
    task, (outputs, target) = Own(), CASES["classes"]
    before = target.clone()
    found = lane_metrics([task] * 3, outputs, target, [True, False, True])
    assert [set(metrics) for metrics in found] == [{"loss", "share"}, set(), {"loss", "share"}]
    assert task.n_asked == 2
    assert torch.equal(target, before)


def test_names_of_metrics_are_honoured() -> None:
    task, (outputs, target) = Task(), CASES["classes"]
    task.metric_names = ("balanced_accuracy",)
    found = lane_metrics([task] * 3, outputs, target, [True] * 3)
    assert set(found[0]) == {"loss", "accuracy", "balanced_accuracy"}


def test_lane_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    outputs, target = CASES["classes"]
    broken = outputs.clone()
    broken[1] = float("nan")
    found = lane_metrics([Task()] * 3, broken, target, [True] * 3)
    wanted = lane_metrics([Task()] * 3, outputs, target, [True] * 3)
    assert found[1]["loss"] != found[1]["loss"]
    assert (found[0], found[2]) == (wanted[0], wanted[2])


def test_outputs_that_do_not_fit_the_targets_are_the_users_error() -> None:
    with pytest.raises(UserCodeError):
        lane_metrics([Task()] * 2, drawn(2, 9, 3), torch.full((9,), 7), [True] * 2)
