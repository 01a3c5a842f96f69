"""Networks in bfloat16 share programs too: rounding is no reason to refuse, a wrong gradient is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from hpsearch.job import Config, EpochMetrics
from hpsearch.lr_curve import ramp_lrs
from hpsearch.task import Task
from hpsearch.training.lanes import LaneGroup, Route, best_width, find_route, fused_ramps
from hpsearch.training.lanes.forward import Forward
from hpsearch.training.lanes.trial_step import tolerances
from hpsearch.training.loop import DefaultTraining
from hpsearch.training.precision import is_bf16, rounding
from tests import networks
from tests.test_lanes import VARIED, Cnn, Mlp, Recurrent, Transformer, load, padded, task, trainings
from tests.test_lanes_route import Padded
from tests.test_lanes_width import plain_ramp

SAME_LOSS = 0.01  # relative: bfloat16 rounds by 0.004; measured 0.002 after three epochs, 0.1 with a rate 10 % higher
SAME_WAY = 0.05  # of the way that weights went: measured 0.021, and 0.1 with a learning rate that is 10 % higher


class Normed(nn.Sequential):
    """Batch norm of what is bfloat16 in lanes also on a CPU, where torch's autocast leaves convolutions out."""

    def __init__(self, config: Config) -> None:
        super().__init__(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


class Deep(nn.Sequential):
    """Its gradients differ by 0.44 of their largest entries, by rounding alone."""

    def __init__(self, config: Config) -> None:
        norms = [[nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)] for _ in range(4)]
        norms[1].append(nn.MaxPool2d(2))
        norms[3].append(nn.MaxPool2d(2))
        layers = [layer for norm in norms for layer in norm]
        super().__init__(nn.Conv2d(1, 6, 3, padding=1), *layers, nn.Flatten(), nn.Linear(24, 3))


def bf16(network: Any, rows: Any) -> Task:
    return task(network, rows, precision="bf16")


def apart(found: DefaultTraining, wanted: DefaultTraining, start: Sequence[Tensor]) -> float:
    """How far two trainings are from each other, as a share of the way that the second has gone."""
    mine, theirs = ([param.detach() for param in training.model.parameters()] for training in (found, wanted))
    off = sum(float((a - b).square().sum()) for a, b in zip(mine, theirs, strict=True))
    way = sum(float((a - b).square().sum()) for a, b in zip(theirs, start, strict=True))
    return float((off / way) ** 0.5)


@pytest.mark.parametrize(("network", "rows"), [(Mlp, networks.classes), (Cnn, networks.images)], ids=["mlp", "cnn"])
def test_lanes_in_bfloat16_are_near_to_the_trials_alone(network: Any, rows: Any) -> None:
    of = bf16(network, rows)
    data = load(of)
    alone, lanes = trainings(of, VARIED, data), trainings(of, VARIED, data)
    starts = [[param.detach().clone() for param in training.model.parameters()] for training in alone]
    route, reason = find_route(lanes)
    assert (route, reason) == (Route(gradients="summed"), "")
    group = LaneGroup(lanes, Route(gradients="summed"))
    for _ in range(3):
        wanted = [training.train_epoch() for training in alone]
        found = group.train_epoch()
    for training, row, start in zip(alone, wanted, starts, strict=True):
        mine = found[training.trial]
        assert isinstance(mine, EpochMetrics)
        for name in ("train_loss", "val_loss"):
            assert mine.metrics[name] == pytest.approx(row.metrics[name], rel=SAME_LOSS)
        assert apart(group.leave(training.trial), training, start) < SAME_WAY


@pytest.mark.parametrize(
    ("network", "rows", "route"),
    [
        (Transformer, networks.sequences, Route(gradients="summed")),
        (Normed, networks.classes, Route(gradients="summed")),
        (Deep, networks.images, Route(gradients="summed")),
        (lambda _: networks.Cnn(), networks.images, Route(gradients="summed")),  # biases with rounding for gradients
        (lambda _: Recurrent(nn.LSTM), networks.sequences, Route(gradients="each", outputs="vjp")),
        (Padded, padded, Route(gradients="each")),  # whose summed gradients are wrong in one row of twenty
    ],
    ids=["transformer", "batch norm", "deep", "cnn", "lstm", "padding"],
)
def test_the_route_is_that_of_float32(network: Any, rows: Any, route: Route) -> None:
    for configs in ([{}, {}], [{}]):
        assert find_route(trainings(bf16(network, rows), configs)) == (route, "")
    assert find_route(trainings(task(network, rows), [{}, {}])) == (route, "")


@pytest.mark.parametrize("wrong", [lambda grad: grad * 0, lambda grad: -grad, lambda grad: grad.flip(1)])
def test_gradients_that_are_wrong_in_bfloat16_alone_are_refused(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Forward.losses_and_gradients

    def spoilt(self: Forward, *args: Any) -> Any:
        losses, blocks = original(self, *args)
        if is_bf16(self.model):
            blocks = [[wrong(grad) for grad in grads] for grads in blocks]
        return losses, blocks

    monkeypatch.setattr(Forward, "losses_and_gradients", spoilt)
    route, reason = find_route(trainings(bf16(Mlp, networks.classes), [{}, {}]))
    assert route is None
    assert reason.startswith("the gradient of 0.weight would be wrong in lane 0 (by ")
    assert find_route(trainings(task(Mlp), [{}, {}]))[0] == Route(gradients="summed")


def test_float32_is_compared_as_closely_as_ever() -> None:
    assert tolerances(rounding(Mlp({}))).gradients == 1e-3


def test_ramps_in_bfloat16_lanes_have_the_losses_of_ramps_alone() -> None:
    of = bf16(Mlp, networks.classes)
    lrs = ramp_lrs(1e-4, 1.0, 20).tolist()
    configs: list[Config] = [{"lr": lrs[0]}, {"lr": lrs[0], "grad_clip_norm": 0.2}]
    lanes = trainings(of, configs)
    route, _ = find_route(lanes)
    assert route is not None
    for lane, losses in zip(lanes, fused_ramps(lanes, route, lrs, reference=lrs[0]), strict=True):
        assert losses[:14] == pytest.approx(plain_ramp(of, lane, lrs)[:14], rel=SAME_LOSS)
        assert len(losses) == 20


def test_widths_of_bfloat16_networks_are_measured_like_others() -> None:
    lanes = trainings(bf16(Cnn, networks.images), [{}])
    route, _ = find_route(lanes)
    assert route is not None
    measured = best_width(lanes, (2,), route=route, seconds=0.001).measured
    assert [found.lanes for found in measured] == [1, 2]
