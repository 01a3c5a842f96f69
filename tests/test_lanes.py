"""Trials that train in lanes are the trials that they would be alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import Config, EpochMetrics
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import pack, unpack
from hpsearch.training.data import StudyData
from hpsearch.training.lanes import LaneGroup, LanesRefused, Route, find_route
from hpsearch.training.loop import DefaultTraining
from tests import networks
from tests.test_loop import random_states

CPU = torch.device("cpu")
CLOSE = 1e-4  # relative, after three epochs in float32


def small(rows: Callable[[int, int], tuple[Tensor, Tensor]]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return lambda n, seed: rows(n // 5, seed)


def task(network: Callable[..., nn.Module], rows: Any = networks.classes, **members: Any) -> Task:
    """A task of 120 training rows whose model is `network(config)`."""
    return networks.task(network, small(rows), model=lambda self, config: network(config), **members)


def load(of: Task) -> StudyData:
    return StudyData.load(of, study_seed=0, cut_ensemble=False, device=CPU)


def trainings(of: Task, configs: Sequence[Config], data: StudyData | None = None, **kw: Any) -> list[DefaultTraining]:
    data = data or load(of)
    return [
        DefaultTraining(of, data, {"batch_size": 25, **config}, trial=i, seed=100 + i, device=CPU, **kw)
        for i, config in enumerate(configs)
    ]


def fused(
    lanes: Sequence[DefaultTraining], *, gradients: str = "summed", outputs: str = "vmap", **kw: Any
) -> LaneGroup:
    """The lanes, by the cheapest route; had a dearer one been taken, something would be wrong with that."""
    route, reason = find_route(lanes)
    assert route is not None, reason
    assert (route.gradients, route.outputs) == (gradients, outputs)
    return LaneGroup(lanes, route, **kw)


def assert_close(found: EpochMetrics | TrialDiverged, wanted: EpochMetrics, close: float = CLOSE) -> None:
    assert isinstance(found, EpochMetrics), found
    assert found.epoch == wanted.epoch
    assert found.metrics == pytest.approx(wanted.metrics, rel=close)


def assert_same_state(found: DefaultTraining, wanted: DefaultTraining, close: float = CLOSE) -> None:
    """Weights, buffers and all that the optimizer keeps, as of their largest entries."""
    assert found.epoch == wanted.epoch
    ours, theirs = found.checkpoint(), wanted.checkpoint()
    assert ours.optimizer is not None
    assert theirs.optimizer is not None
    for mine, other in (
        (ours.weights, theirs.weights),
        (ours.hidden_buffers, theirs.hidden_buffers),
        *((ours.optimizer["state"][i], state) for i, state in theirs.optimizer["state"].items()),
    ):
        assert list(mine) == list(other)
        for name, value in other.items():
            assert mine[name].dtype == value.dtype
            largest = float(value.abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(mine[name], value, rtol=0, atol=close * largest)
    assert ours.optimizer["param_groups"] == theirs.optimizer["param_groups"]


def assert_equivalent(of: Task, configs: Sequence[Config], epochs: int = 3, **kw: Any) -> None:
    """After some epochs, each lane is where its trial is when it trains alone."""
    data = load(of)
    alone, lanes = trainings(of, configs, data), trainings(of, configs, data)
    group = fused(lanes, **kw)
    for _ in range(epochs):
        wanted = [training.train_epoch() for training in alone]
        found = group.train_epoch()
        assert list(found) == list(group.trials) == [training.trial for training in alone]
        for training, row in zip(alone, wanted, strict=True):
            assert_close(found[training.trial], row)
    for training in alone:
        assert_same_state(group.leave(training.trial), training)


class Mlp(nn.Sequential):
    def __init__(self, config: Config) -> None:
        super().__init__(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


class DropoutMlp(nn.Module):
    """One dropout layer used twice, another of whole channels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.dropout, self.channels = nn.Dropout(config.get("dropout", 0.3)), nn.Dropout1d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.first(x)))
        x = self.dropout(F.relu(self.second(x)))
        return self.head(self.channels(x.unflatten(1, (8, 3))).flatten(1))


class Transposed(nn.Module):
    """Dropout on what lies in memory in another order than in its dimensions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv, self.dropout, self.head = nn.Conv1d(1, 4, 3, padding=1), nn.Dropout(0.4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.conv(x.unsqueeze(1)).transpose(1, 2))
        return self.head(self.dropout(x[:, ::2]).mean(dim=1))


class Cnn(nn.Module):
    """The convolutions before batch norm have no bias: its gradient is rounding alone, which Adam makes steps of."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.dropout, self.head = nn.Dropout(config.get("dropout", 0.0)), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.flatten(1)))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(20, 8), cell(8, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0].mean(dim=1))


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 8), nn.Parameter(0.02 * torch.randn(10, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=config.get("dropout", 0.0), batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place).mean(dim=1))


class Bag(nn.Module):
    """Tokens with padding; the embedding's weights are the head's as well."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 8), nn.Linear(8, 20)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(x).mean(dim=1)).tanh())


def padded(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = networks.sequences(n, seed)
    x[:, 7:] = 0
    return x, y


VARIED: tuple[Config, ...] = (
    {"lr": 1e-3},
    {"lr": 3e-3, "weight_decay": 0.1, "grad_clip_norm": 0.3},
    {"lr": 5e-4, "label_smoothing": 0.2, "warmup_epochs": 1.4},
)


RNN = {"gradients": "each", "outputs": "vjp"}


@pytest.mark.parametrize(
    ("network", "rows", "route"),
    [
        (Mlp, networks.classes, {}),
        (DropoutMlp, networks.classes, {}),
        (Transposed, networks.classes, {}),
        (Cnn, networks.images, {}),
        (lambda _: Recurrent(nn.GRU), networks.sequences, RNN),
        (lambda _: Recurrent(nn.LSTM), networks.sequences, RNN),
        (Bag, padded, {"gradients": "each"}),
    ],
    ids=["mlp", "dropout", "transposed", "cnn", "gru", "lstm", "embedding"],
)
def test_each_lane_is_the_trial_that_it_would_be_alone(network: Any, rows: Any, route: dict[str, str]) -> None:
    assert_equivalent(task(network, rows), VARIED, **route)


def test_a_transformer_in_lanes_is_the_one_that_it_would_be_alone() -> None:
    # By sgd: the gradient of the keys' bias is nothing but rounding, of which Adam makes whole steps.
    assert_equivalent(task(Transformer, networks.sequences), [{**c, "optimizer": "sgd"} for c in VARIED])


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "written-out"])
@pytest.mark.parametrize(
    "configs",
    [
        [{"optimizer": "adam", "lr": 1e-3}, {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.01}],
        [{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "sgd", "lr": 0.02, "momentum": 0.0, "weight_decay": 0.1}],
        [{"optimizer": "rmsprop", "lr": 1e-3}, {"optimizer": "rmsprop", "lr": 3e-3, "momentum": 0.8}],
        [{"optimizer": "nadam", "lr": 1e-3}, {"optimizer": "nadam", "lr": 3e-3, "weight_decay": 0.01}],
    ],
    ids=["adam", "sgd", "rmsprop", "nadam"],
)
def test_each_optimizer_steps_its_lane_as_torch_does(configs: list[Config], kernels: bool) -> None:
    assert_equivalent(task(Mlp), configs, kernels=kernels)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_network_that_changes_its_input_in_place_does_so_once_in_each_lane(dropout: float) -> None:
    class Scaling(DropoutMlp):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("mean", torch.full((12,), 0.7))

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(3.0)
            x -= self.mean
            return super().forward(x)

    assert_equivalent(task(Scaling), [{"lr": 1e-3, "dropout": dropout}, {"lr": 3e-3}], outputs="alone")


def test_validation_batches_are_those_of_a_trial_alone_where_a_batch_is_normalized_by_itself() -> None:
    class Normalized(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x[:, :3]))

    def wide(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = networks.classes(5 * n, seed)
        return F.pad(x, (0, 8000)), y

    assert_equivalent(task(Normalized, wide), [{"lr": 1e-3}, {"lr": 3e-3}], epochs=1)


def test_an_optimizer_of_the_tasks_with_groups_betas_and_flags_of_its_own() -> None:
    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.Adam(
            [{"params": params[::2], "lr": config["lr"] / 3, "weight_decay": 0.0}, {"params": params[1::2]}],
            lr=config["lr"],
            betas=(config["beta"], 0.99),
            eps=config["eps"],
            weight_decay=0.05,
            amsgrad=True,
        )

    configs = [{"lr": 1e-3, "beta": 0.9, "eps": 1e-8}, {"lr": 4e-3, "beta": 0.5, "eps": 1e-4}]
    assert_equivalent(task(Mlp, optimizer=optimizer), configs)


def test_dropout_probabilities_may_differ_between_lanes() -> None:
    assert_equivalent(task(DropoutMlp), [{"dropout": p} for p in (0.0, 0.5, 1.0)])


def test_masks_depend_neither_on_the_number_of_lanes_nor_on_the_lanes_place() -> None:
    of = task(DropoutMlp)
    data = load(of)
    wide, pair = trainings(of, [{}] * 4, data), trainings(of, [{}] * 4, data)[:1:-1]
    found, again = fused(wide).train_epoch(), fused(pair).train_epoch()
    for trial in (2, 3):
        mine = again[trial]
        assert isinstance(mine, EpochMetrics)
        assert_close(found[trial], mine, close=1e-6)


def test_attentions_own_dropout_is_random_in_each_lane_and_trains_as_well() -> None:
    # Other masks than alone, so only what becomes of them is alike. A lane's train loss differs by 0.004 (standard
    # deviation, 24 lanes), the mean of 6 by 0.0018: 0.012 is more than 6 sigma.
    of = task(Transformer, networks.sequences)
    data = load(of)
    configs: list[Config] = [{"dropout": 0.2, "lr": 3e-3}] * 6
    alone, group = trainings(of, configs, data), fused(trainings(of, configs, data))
    for _ in range(3):
        wanted = [training.train_epoch().metrics["train_loss"] for training in alone]
        rows = list(group.train_epoch().values())
        losses = [row.metrics["train_loss"] for row in rows if isinstance(row, EpochMetrics)]
        assert len(set(losses)) == 6
        assert sum(losses) / 6 == pytest.approx(sum(wanted) / 6, abs=0.012)


def test_frozen_idle_and_unstepped_parameters_stay_as_they_are() -> None:
    class Partly(Mlp):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.spare = nn.Parameter(torch.randn(3))  # in no graph: torch's optimizers leave it alone
            self[0].weight.requires_grad_(False)

    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(params)[1:], lr=config["lr"], weight_decay=0.1)

    assert_equivalent(task(Partly, optimizer=optimizer), [{"lr": 1e-3, "grad_clip_norm": 0.1}, {"lr": 3e-3}])


class Teacher(Mlp):
    """A frozen copy of the first layer follows it, as in self-distillation."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.frozen = copy.deepcopy(self[0]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.frozen.weight.mul_(0.9).add_(self[0].weight, alpha=0.1)
        for layer in list(self)[:5]:
            x = layer(x) + (0.1 * self.frozen(x) if layer is self[0] else 0.0)
        return x


def test_frozen_parameters_that_forward_changes_are_the_lanes_own() -> None:
    assert_equivalent(task(Teacher), [{"lr": 1e-3}, {"lr": 3e-3}])


def test_an_epoch_that_fails_leaves_frozen_parameters_where_they_were() -> None:
    failing = False

    def metrics(self: Task, output: Tensor, target: Tensor) -> dict[str, float]:
        if failing:
            raise ValueError("a bad day")
        return {}

    group = fused(trainings(task(Teacher, metrics=metrics), [{}, {}]))
    group.train_epoch()
    before = pack(group.checkpoint(0))
    failing = True
    with pytest.raises(UserCodeError):
        group.train_epoch()
    assert pack(group.checkpoint(0)) == before


def test_unstepped_parameters_that_forward_changes_are_the_lanes_own() -> None:
    class Follows(Teacher):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.frozen.requires_grad_(True)

    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(params)[:6], lr=config["lr"])

    assert_equivalent(task(Follows, optimizer=optimizer), [{"lr": 1e-3}, {"lr": 3e-3}])


def test_a_buffer_that_depends_on_the_weights_keeps_no_graph() -> None:
    class Remembers(Mlp):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            if self.training:
                self.last = output.mean(dim=0)
            return output

    group = fused(trainings(task(Remembers), [{}, {}]))
    group.train_epoch()
    assert not group._stack.buffers["last"].requires_grad


def test_buffers_that_forward_replaces_are_the_lanes_own() -> None:
    class Averaging(Mlp):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("mean", torch.zeros(12), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
            return super().forward(x - self.mean)

    assert_equivalent(task(Averaging), [{"lr": 1e-3}, {"lr": 3e-3}])


@pytest.mark.parametrize("route", ["summed", "each"])
@pytest.mark.parametrize("outputs", ["values", "binary_logits"])
def test_both_routes_train_on_other_targets_than_classes(route: Any, outputs: str) -> None:
    def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = networks.numbers(n, seed)
        return x, y if outputs == "values" else (y > 0).long()

    of = task(lambda _: nn.Linear(6, 1), rows, outputs=outputs)
    data = load(of)
    alone, lanes = trainings(of, VARIED[:2], data), trainings(of, VARIED[:2], data)
    group = LaneGroup(lanes, Route(gradients=route))
    for training in alone:
        training.train_epoch()
    group.train_epoch()
    for training in alone:
        assert_same_state(group.leave(training.trial), training)


def test_a_loss_of_the_tasks_own_is_taken_lane_by_lane() -> None:
    def loss(self: Task, output: Tensor, target: Tensor) -> Tensor:
        return F.multi_margin_loss(output, target) + 0.01 * output.square().mean()

    def loss_by_hand(self: Task, output: Tensor, target: Tensor) -> Tensor:
        right = output.gather(1, target[:, None])
        return (1 + output - right).clamp_min(0).mean(dim=1).mean().reshape(1)

    assert_equivalent(task(Mlp, loss=loss_by_hand), [{"lr": 1e-3}, {"lr": 3e-3}])
    route, reason = find_route(trainings(task(Mlp, loss=loss), [{}, {}]))
    assert route is not None or "multi_margin_loss" in reason


def test_augmentation_and_an_order_of_ones_own() -> None:
    def augment(self: Task, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

    assert_equivalent(task(Mlp, augment=augment), [{"lr": 1e-3}, {"lr": 3e-3}])
    of = task(Mlp)
    data = load(of)
    alone, lanes = trainings(of, [{}, {}], data, shuffle=False), trainings(of, [{}, {}], data, shuffle=False)
    group = fused(lanes)
    assert_close(group.train_epoch()[1], alone[1].train_epoch())


def test_a_dataset_is_read_by_every_lane_in_its_own_order() -> None:
    class Items(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __init__(self, n: int, seed: int) -> None:
            self.x, self.y = networks.classes(n, seed)

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.x[index], self.y[index]

    def data(self: Task) -> Splits:
        return Splits(train=Items(60, 1), val=Items(20, 2))

    assert_equivalent(task(Mlp, data=data), [{"lr": 1e-3}, {"lr": 3e-3}], epochs=2)


def test_lanes_are_refilled_in_the_middle_and_nobody_else_notices() -> None:
    of = task(DropoutMlp)
    data = load(of)
    configs: list[Config] = [{"lr": 1e-3 * (i + 1), "warmup_epochs": 1.5} for i in range(5)]
    alone, lanes = trainings(of, configs, data), trainings(of, configs, data)
    group = fused(lanes[:3])
    for training in alone:
        for _ in range(5 if training.trial in (0, 2) else 2):
            training.train_epoch()
    group.train_epoch()
    group.train_epoch()
    assert_same_state(group.leave(1), alone[1])
    group.join(lanes[3])  # in its place
    assert group.trials == (0, 3, 2)
    group.train_epoch()
    group.join(lanes[4])  # one more
    assert group.trials == (0, 3, 2, 4)
    group.train_epoch()
    assert_same_state(group.leave(3), alone[3])
    group.train_epoch()  # with one lane less
    assert group.trials == (0, 2, 4)
    for trial in (0, 2, 4):
        assert_same_state(group.leave(trial), alone[trial])
    assert group.train_epoch() == {}


def test_a_trial_goes_on_alone_after_its_lane_and_comes_back() -> None:
    of = task(Cnn, networks.images)
    data = load(of)
    alone, lanes = trainings(of, VARIED, data), trainings(of, VARIED, data)
    group = fused(lanes)
    for training in alone:
        for _ in range(4):
            last = training.train_epoch()
    group.train_epoch()
    packed = unpack(pack(group.leave(2).checkpoint()), ref="trial 2")
    resumed = DefaultTraining(of, data, lanes[2].config, trial=2, seed=lanes[2].seed, device=CPU, checkpoint=packed)
    resumed.train_epoch()
    group.train_epoch()
    group.join(resumed)
    group.train_epoch()
    found = group.train_epoch()
    assert_close(found[2], last)
    for training in alone:
        assert_same_state(group.leave(training.trial), training)


def test_a_checkpoint_of_a_lane_that_stays_is_the_trial_as_it_is() -> None:
    of = task(Mlp)
    data = load(of)
    alone, group = trainings(of, VARIED, data)[1], fused(trainings(of, VARIED, data))
    alone.train_epoch()
    group.train_epoch()
    kept = group.checkpoint(1, copy=True)
    before = pack(kept)
    group.train_epoch()
    assert pack(kept) == before
    assert group.checkpoint(1, weights_only=True).optimizer is None
    assert (kept.trial, kept.epoch, kept.resumable) == (1, 1, True)
    for name, value in alone.checkpoint().weights.items():
        torch.testing.assert_close(kept.weights[name], value, rtol=0, atol=CLOSE * float(value.abs().max()))


def test_a_lane_that_diverges_is_told_and_touches_no_other() -> None:
    of = task(Mlp)
    data = load(of)
    configs: list[Config] = [
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "sgd", "lr": 1e38},
        {"optimizer": "sgd", "lr": 0.05, "grad_clip_norm": 0.2},
    ]
    alone, group = trainings(of, configs, data), fused(trainings(of, configs, data))
    with pytest.raises(TrialDiverged) as raised:
        alone[1].train_epoch()
    for _ in range(2):  # also while it keeps its lane
        wanted = [alone[i].train_epoch() for i in (0, 2)]
        found = group.train_epoch()
        diverged = found[1]
        assert isinstance(diverged, TrialDiverged)
        assert diverged.message == raised.value.message
        for row, trial in zip(wanted, (0, 2), strict=True):
            assert_close(found[trial], row)
    assert group.leave(1).epoch == 0
    assert_close(group.train_epoch()[2], alone[2].train_epoch())


def test_a_metric_that_is_not_finite_is_the_lanes_alone() -> None:
    def metrics(self: Task, output: Tensor, target: Tensor) -> dict[str, float]:
        return {"odd": math.nan if output[0, 0] > output[0, 1] else 1.0}

    of = task(Mlp, metrics=metrics)
    group = fused(trainings(of, [{}] * 8))
    rows = group.train_epoch()
    told = {str(row.message) for row in rows.values() if isinstance(row, TrialDiverged)}
    assert told == {"val_odd is nan"}
    assert any(isinstance(row, EpochMetrics) for row in rows.values())


def test_an_epoch_that_fails_leaves_every_lane_where_it_was() -> None:
    calls: list[int] = []
    bad_day = False

    def augment(self: Task, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if bad_day and len(calls) == 5:
            raise ValueError("a bad day")
        calls.append(1)
        return inputs

    of = task(Mlp, augment=augment)
    data = load(of)
    lanes = trainings(of, [{}, {"lr": 3e-3}], data)
    group = fused(lanes)
    group.train_epoch()
    before = [pack(group.checkpoint(trial)) for trial in group.trials]
    states = random_states()
    bad_day = True
    calls.clear()
    with pytest.raises(UserCodeError, match="a bad day"):
        group.train_epoch()
    assert random_states() == states
    assert [pack(group.checkpoint(trial)) for trial in group.trials] == before


def test_a_model_that_cannot_be_fused_any_more_says_so_and_every_lane_is_where_it_was() -> None:
    class Moody(Mlp):
        limit = 1e9

        def forward(self, x: Tensor) -> Tensor:
            if Moody.limit < 0 and x.sum() > 0:
                return super().forward(-x)
            return super().forward(x)

    group = fused(trainings(task(Moody), [{}, {}]))
    before = [pack(group.checkpoint(trial)) for trial in group.trials]
    Moody.limit = -1
    with pytest.raises(LanesRefused, match="data-dependent control flow"):
        group.train_epoch()
    assert [pack(group.checkpoint(trial)) for trial in group.trials] == before


def test_a_metric_that_changes_the_targets_changes_no_other_lanes() -> None:
    def metrics(self: Task, output: Tensor, target: Tensor) -> dict[str, float]:
        target[target == 2] = 0
        return {"zeros": float((target == 0).float().mean())}

    assert_equivalent(task(Mlp, metrics=metrics), [{"lr": 1e-3}, {"lr": 3e-3}], epochs=1)


def test_a_trial_has_one_lane() -> None:
    of = task(Mlp)
    lanes = trainings(of, [{}, {}])
    group = fused(lanes)
    with pytest.raises(ValueError, match="trial 1 has a lane already"):
        group.join(lanes[1])
    with pytest.raises(ValueError, match=r"trial 7 has no lane \(those that have: \(0, 1\)\)"):
        group.leave(7)
    with pytest.raises(ValueError, match="of different trials"):
        LaneGroup([lanes[0], lanes[0]], Route(gradients="summed"))
    with pytest.raises(LanesRefused, match="batch_size is 25 and 10"):
        group.join(DefaultTraining(of, lanes[0].data, {"batch_size": 10}, trial=3, seed=3, device=CPU))


def test_a_fused_epoch_changes_no_random_state() -> None:
    group = fused(trainings(task(DropoutMlp), [{}, {}]))
    before = random_states()
    group.train_epoch()
    assert random_states() == before


class Asked(TorchDispatchMode):
    """Counts how often a tensor's value is read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += "_local_scalar_dense" in str(func) or "is_nonzero" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "written-out"])
def test_no_step_asks_the_host_for_a_value(kernels: bool) -> None:
    counts = []
    for batch_size in (40, 10):  # 3 and 12 steps
        config: Config = {"batch_size": batch_size, "grad_clip_norm": 1.0, "label_smoothing": 0.1}
        group = fused(trainings(task(Cnn, networks.images), [config, {**config, "lr": 3e-3}]), kernels=kernels)
        with Asked() as asked:
            group.train_epoch()
        counts.append(asked.n)
    assert counts[0] == counts[1]
