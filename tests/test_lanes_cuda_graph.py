"""Steps replayed from graphs, with a stand-in for CUDA's: what is copied where, and that what a graph reads stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpsearch.job import Config
from hpsearch.training.lanes import LaneGroup, cuda_graph
from hpsearch.training.lanes.cuda_graph import WARM_UP_STEPS, GraphedStep
from tests import networks
from tests.test_lanes import Cnn, DropoutMlp, assert_close, fused, load, task, trainings


class FakeCuda:
    """Graphs that run their body again; as with CUDA's, a capture runs nothing, and losses stay in one place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, captures: bool = True) -> None:
        self.captures = captures
        self.n_captured = self.n_replayed = 0
        monkeypatch.setattr(cuda_graph.GraphedStep, "_capture", lambda step, *given: self._capture(step, *given))
        monkeypatch.setattr(cuda_graph.GraphedStep, "_on_a_side_stream", lambda step, *given: step._body(*given))

    def _capture(self, step: Any, inputs: Tensor, target: Tensor, masks: Any, plan: Any) -> Any:
        if not self.captures:
            step._works = False
            return None
        self.n_captured += 1
        given = tuple(tensor.clone() for tensor in (inputs, target, *masks))
        losses = torch.empty(len(inputs))
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.n_replayed += 1
                losses.copy_(step._body(given[0], given[1], given[2:], plan))

        return cuda_graph._Captured(Graph(), given, losses)  # type: ignore[arg-type]


def test_a_shape_is_captured_after_its_warm_up_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    step = GraphedStep(lambda inputs, target, masks, plan: (inputs * masks[0]).sum(dim=1) + target)
    found = []
    for t in range(WARM_UP_STEPS + 3):
        inputs, mask = torch.full((2, 3), float(t)), torch.full((2, 3), 2.0)
        found.append(step(inputs, torch.ones(2), [mask], ()))
    assert [losses.tolist() for losses in found] == [[6.0 * t + 1] * 2 for t in range(WARM_UP_STEPS + 3)]
    assert (fake.n_captured, fake.n_replayed) == (1, 3)
    step(torch.ones(2, 4), torch.ones(2), [torch.ones(2, 4)], ())
    assert fake.n_captured == 1


def test_what_cannot_be_captured_is_launched_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, captures=False)
    step = GraphedStep(lambda inputs, target, masks, plan: inputs.sum(dim=1))
    for t in range(WARM_UP_STEPS + 3):
        assert step(torch.full((2, 3), float(t)), torch.ones(2), [], ()).tolist() == [3.0 * t] * 2
    assert fake.n_replayed == 0


def addresses(group: LaneGroup) -> list[int]:
    """Of everything that a captured step reads or writes, besides its inputs."""
    stack, step = group._stack, group._step
    tensors = [*stack._tensors(), *stack.constants.values(), step._limits, step._forward._smoothing]
    for block in stack.blocks:
        assert block.now is not None
        tensors += [block.grad, block.now, *block.leaves]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize(("network", "rows"), [(Cnn, networks.images), (DropoutMlp, networks.classes)])
def test_lanes_from_graphs_are_the_trials_that_they_would_be(
    monkeypatch: pytest.MonkeyPatch, network: Any, rows: Any
) -> None:
    fake = FakeCuda(monkeypatch)
    of = task(network, rows)
    data = load(of)
    configs: list[Config] = [
        {"lr": 1e-3, "grad_clip_norm": 0.3},
        {"lr": 3e-3, "label_smoothing": 0.1, "warmup_epochs": 2.5},
        {"lr": 2e-3, "weight_decay": 0.1},
        {"lr": 1e-3, "label_smoothing": 0.2},
    ]
    alone, lanes = trainings(of, configs, data), trainings(of, configs, data)
    group = fused(lanes[:3], kernels=False)
    group._step._graphs_wanted = True

    def train(*trials: int) -> list[int]:
        wanted = [alone[trial].train_epoch() for trial in trials]
        found = group.train_epoch()
        for trial, row in zip(trials, wanted, strict=True):
            assert_close(found[trial], row)
        return addresses(group)

    places = [train(0, 1, 2) for _ in range(WARM_UP_STEPS + 1)]
    assert fake.n_captured == 2  # the last batch of an epoch is smaller, and captured in the last of these
    group.leave(0)
    group.join(lanes[3])
    places.append(train(3, 1, 2))
    assert all(place == places[0] for place in places)
    assert fake.n_captured == 2  # though nobody clips any more
    group.leave(1)
    assert train(3, 2) != places[0]  # narrower, in other memory
    assert fake.n_captured == 3
    group.join(lanes[0])
    assert train(3, 2, 0) != places[0]  # as wide as at first, where no old graph may be replayed
    assert fake.n_captured == 4
