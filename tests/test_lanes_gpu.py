"""Lanes on a GPU: the same trials, from CUDA graphs, without a wait for the device in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hpsearch.job import Config, EpochMetrics
from hpsearch.training.data import StudyData
from hpsearch.training.lanes import LaneGroup, Predictor, best_width, find_route, fused_outputs
from hpsearch.training.lanes.cuda_graph import WARM_UP_STEPS
from hpsearch.training.loop import DefaultTraining
from hpsearch.training.measure import split_output
from tests import networks
from tests.test_lanes import Cnn, DropoutMlp, Mlp, Transformer, assert_close, task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CUDA = torch.device("cuda")


def on_gpu(network: Any, rows: Any, configs: Sequence[Config]) -> tuple[list[DefaultTraining], list[DefaultTraining]]:
    of = task(network, rows)
    data = StudyData.load(of, study_seed=0, cut_ensemble=False, device=CUDA)
    made = [
        [
            DefaultTraining(of, data, {"batch_size": 25, **config}, trial=i, seed=100 + i, device=CUDA)
            for i, config in enumerate(configs)
        ]
        for _ in range(2)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    ("network", "rows"),
    [(Mlp, networks.classes), (Cnn, networks.images), (Transformer, networks.sequences)],
    ids=["mlp", "cnn", "transformer"],
)
def test_each_lane_is_the_trial_that_it_would_be_alone(
    network: Any, rows: Any, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    configs: list[Config] = [
        {"optimizer": "sgd", "lr": 0.05, "grad_clip_norm": 0.5},
        {"optimizer": "sgd", "lr": 0.02, "label_smoothing": 0.1, "warmup_epochs": 1.5},
    ]
    alone, lanes = on_gpu(network, rows, configs)
    route, reason = find_route(lanes)
    assert route is not None, reason
    group = LaneGroup(lanes, route, graphs=graphs)
    for _ in range(WARM_UP_STEPS + 2):
        wanted = [training.train_epoch() for training in alone]
        found = group.train_epoch()
        for training, row in zip(alone, wanted, strict=True):
            assert_close(found[training.trial], row)
    captured = group._step._graphs
    assert (captured is not None and bool(captured._graphs)) == graphs


@pytest.mark.parametrize(
    ("network", "rows"),
    [(Mlp, networks.classes), (Cnn, networks.images), (Transformer, networks.sequences)],
    ids=["mlp", "cnn", "transformer"],
)
def test_models_asked_in_lanes_answer_as_each_does_alone(
    network: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    trials, _ = on_gpu(network, rows, [{}, {}, {}])
    asked = [Predictor(model=t.model.eval(), task=t.task, data=t.data, device=CUDA) for t in trials]
    outputs, target = fused_outputs(asked, "val")
    for trial, output in zip(trials, outputs, strict=True):
        wanted, wanted_target = split_output(trial.model, trial.data, "val")
        assert torch.equal(target, wanted_target)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


def test_no_step_waits_for_the_device() -> None:
    _, lanes = on_gpu(DropoutMlp, networks.classes, [{}, {"lr": 3e-3, "grad_clip_norm": 1.0}])
    route, reason = find_route(lanes)
    assert route is not None, reason
    group = LaneGroup(lanes, route, graphs=False)
    group.train_epoch()
    step = group._step
    inner = step._gradients

    def watched(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step._gradients = watched  # type: ignore[method-assign]
    assert all(isinstance(row, EpochMetrics) for row in group.train_epoch().values())


def test_widths_are_measured_with_their_memory() -> None:
    _, lanes = on_gpu(Mlp, networks.classes, [{}, {}])
    route, _ = find_route(lanes)
    assert route is not None
    found = best_width(lanes, (2, 8), route=route)
    assert all(at.n_bytes > 0 for at in found.measured)
