"""How many lanes pay, and ramps of several seeds at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpsearch.job import Config
from hpsearch.lr_curve import ramp_lrs
from hpsearch.task import Task
from hpsearch.training.checkpoint import pack
from hpsearch.training.data import epoch_seed
from hpsearch.training.lanes import Measurement, best_width, choose_width, find_route, fused_ramps, next_width
from hpsearch.training.loop import DefaultTraining, training_loss
from hpsearch.training.ramp import ramp_losses
from hpsearch.training.seeding import seed_all
from tests.test_lanes import DropoutMlp, Mlp, load, task, trainings
from tests.test_loop import random_states


def measured(*rates: tuple[int, float], n_bytes: int = 0) -> list[Measurement]:
    return [Measurement(lanes=n, steps_per_s=rate, n_bytes=n * n_bytes) for n, rate in rates]


def test_lanes_that_gain_less_than_a_fifth_are_not_taken() -> None:
    assert choose_width(measured((1, 1000), (2, 1100), (4, 1199))) == 1
    assert choose_width(measured((1, 1000), (2, 1100), (4, 1201))) == 4
    assert choose_width(measured((1, 1000))) == 1


def test_the_narrowest_of_nearly_the_best_is_taken() -> None:
    assert choose_width(measured((1, 1000), (2, 1500), (8, 2900), (16, 3000), (32, 2800))) == 8


def test_lanes_keep_within_the_memory_that_is_free() -> None:
    rates = ((1, 1000), (2, 1900), (4, 3800), (8, 7000))
    assert choose_width(measured(*rates, n_bytes=100), free_bytes=1000) == 8
    assert choose_width(measured(*rates, n_bytes=100), free_bytes=900) == 4
    assert choose_width(measured(*rates, n_bytes=1000), free_bytes=1000) == 1


def asked(rates: dict[int, float], widths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)) -> list[int]:
    """The widths that are measured, in order, of a network that has these rates."""
    found = measured((1, rates[1]))
    while (width := next_width(found, widths)) is not None:
        found += measured((width, rates[width]))
        assert len(found) <= len(widths) + 1  # it ends
    return [at.lanes for at in found[1:]]


def test_a_quick_network_is_widened_from_eight_while_that_gains() -> None:
    assert asked({1: 3000, 8: 7000, 16: 9000, 32: 9100}) == [8, 16, 32]
    assert asked({1: 3000, 8: 7000, 16: 9000, 32: 12000, 64: 20000}) == [8, 16, 32, 64]


def test_a_quick_network_that_eight_lanes_do_not_help_is_asked_about_fewer() -> None:
    assert asked({1: 3000, 8: 3100, 4: 3000}) == [8, 4]
    assert asked({1: 3000, 8: 2000, 4: 3300, 2: 3400}) == [8, 4, 2]
    assert asked({1: 3000, 8: 2000, 4: 4000}) == [8, 4]


def test_a_slow_network_begins_with_two_lanes() -> None:
    assert asked({1: 20, 2: 18, 4: 18}) == [2, 4]
    assert asked({1: 20, 2: 30, 4: 40, 8: 41}) == [2, 4, 8]


def test_widths_that_are_given_are_all_there_is() -> None:
    assert asked({1: 3000, 3: 9000}, (2, 3)) == [3]
    assert asked({1: 20, 2: 30, 3: 50}, (2, 3)) == [2, 3]
    assert asked({1: 3000, 3: 3000, 2: 3000}, (2, 3)) == [3, 2]
    assert asked({1: 3000}, ()) == []


def test_measuring_leaves_trainings_and_random_state_as_found() -> None:
    lanes = trainings(task(DropoutMlp), [{"lr": 1e-3}, {"lr": 3e-3, "optimizer": "adamw"}])
    lanes[1].train_epoch()
    route, _ = find_route(lanes)
    assert route is not None
    before, states = [pack(lane.checkpoint()) for lane in lanes], random_states()
    found = best_width(lanes, (2, 3), route=route, seconds=0.001)
    assert [at.lanes for at in found.measured] in ([1, 2, 3], [1, 2], [1, 3], [1, 3, 2])
    assert all(at.steps_per_s > 0 for at in found.measured)
    assert found.lanes == choose_width(found.measured)
    assert [pack(lane.checkpoint()) for lane in lanes] == before
    assert random_states() == states


def plain_ramp(of: Task, training: DefaultTraining, lrs: list[float]) -> list[float]:
    """As the executor ramps: epoch after epoch, each seeded as a trial's."""

    def batches() -> object:
        for epoch in range(1, 100):
            seed_all(epoch_seed(training.seed, epoch, "train"), training.device)
            yield from training.data.train_batches(
                batch_size=training.settings.batch_size, seed=training.seed, epoch=epoch
            )

    loss_of = training_loss(of, training.data.info.outputs, training.settings.label_smoothing)
    return ramp_losses(
        training.model,
        training.optimizer,
        batches(),  # type: ignore[arg-type]
        loss_of,
        lrs,
        reference=lrs[0],
        grad_clip_norm=training.settings.grad_clip_norm,
    )


@pytest.mark.parametrize("network", [Mlp, DropoutMlp])
def test_ramps_in_lanes_have_the_losses_of_ramps_alone(network: type[torch.nn.Module]) -> None:
    of = task(network)
    lrs = ramp_lrs(1e-4, 1.0, 20).tolist()
    configs: list[Config] = [{"lr": lrs[0]}, {"lr": lrs[0], "grad_clip_norm": 0.2}, {"lr": lrs[0], "weight_decay": 0.1}]
    lanes = trainings(of, configs)
    route, _ = find_route(lanes)
    assert route is not None
    before, states = [pack(lane.checkpoint()) for lane in lanes], random_states()
    found = fused_ramps(lanes, route, lrs, reference=lrs[0])
    assert [pack(lane.checkpoint()) for lane in lanes] == before
    assert random_states() == states
    for lane, losses in zip(lanes, found, strict=True):
        # In the last steps the rates are so large that rounding grows.
        assert losses[:14] == pytest.approx(plain_ramp(of, lane, lrs)[:14], rel=1e-4)
        assert len(losses) == 20


def test_a_ramp_that_is_not_finite_ends_alone() -> None:
    def loss(self: Task, output: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(output, target)

    of = task(Mlp, loss=loss)
    data = load(of)
    lanes = trainings(of, [{"optimizer": "sgd", "lr": 1e-3}, {"optimizer": "sgd", "lr": 1e36}], data)
    route, _ = find_route(trainings(of, [{"optimizer": "sgd"}] * 2, data))
    assert route is not None
    lrs = [1e-3] * 40
    well, ill = fused_ramps(lanes, route, lrs, reference=1e-3)
    assert len(well) == 40
    assert ill == pytest.approx(plain_ramp(of, lanes[1], lrs), rel=1e-3)
    assert 1 <= len(ill) < 40
    assert len(fused_ramps(lanes[1:], route, lrs, reference=1e-3)[0]) == len(ill)
    absolute = fused_ramps(lanes, route, lrs, reference=None)  # whatever rates the optimizers were made for
    assert [len(losses) for losses in absolute] == [40, 40]
