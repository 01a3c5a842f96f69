"""What can share a program, and by which route; what cannot says why, and nothing is left changed."""

from __future__ import annotations

import functools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.job import Config
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import pack
from hpsearch.training.lanes import LaneGroup, LanesRefused, Route, can_fuse, find_route
from hpsearch.training.lanes.forward import Forward
from hpsearch.training.loop import DefaultTraining
from tests import networks
from tests.test_lanes import Bag, Mlp, Recurrent, Transformer, padded, task, trainings
from tests.test_loop import random_states


def pair(of: Task, *configs: Config) -> list[DefaultTraining]:
    return trainings(of, configs or ({}, {}))


def reason_of(network: Any, rows: Any = networks.classes, **members: Any) -> str:
    route, reason = find_route(pair(task(network, rows, **members)))
    assert route is None
    return reason


class Odd(Mlp):
    """An Mlp whose forward() does something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.odd(x))

    def odd(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("network", "rows", "route"),
    [
        (Mlp, networks.classes, Route(gradients="summed")),
        (Transformer, networks.sequences, Route(gradients="summed")),
        (lambda _: Recurrent(nn.GRU), networks.sequences, Route(gradients="each", outputs="vjp")),
        (Bag, padded, Route(gradients="each")),
    ],
    ids=["mlp", "transformer", "gru", "padding"],
)
def test_the_cheapest_route_that_is_right_is_taken(network: Any, rows: Any, route: Route) -> None:
    assert find_route(pair(task(network, rows))) == (route, "")


def test_parameters_without_gradients_are_told_to_the_optimizer() -> None:
    class Spare(Mlp):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.spare = nn.Parameter(torch.ones(2))

    assert find_route(pair(task(Spare))) == (Route(gradients="summed", idle=frozenset({"spare"})), "")


class Padded(nn.Module):
    """An embedding whose padding no module tells of."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(20, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.embedding(x, self.table, padding_idx=0).mean(dim=1))


def test_a_route_that_gives_wrong_gradients_is_found_out_by_the_trial_step() -> None:
    assert find_route(pair(task(Padded, padded))) == (Route(gradients="each"), "")
    wrong = trainings(task(Padded, padded), [{}, {}])
    forward = Forward(wrong[0], LaneGroup(wrong, Route(gradients="summed"))._stack, Route(gradients="summed"))
    x = torch.zeros(2, 5, 10, dtype=torch.long)
    grads = forward.losses_and_gradients(x, torch.zeros(2, 5, dtype=torch.long), [], [])[1][0]
    assert [bool((grads[0][lane][0] != 0).any()) for lane in (0, 1)] == [False, True]  # what torch 2.13 does


def test_a_single_training_is_tried_in_two_lanes() -> None:
    assert find_route(pair(task(Padded, padded))[:1]) == (Route(gradients="each"), "")


@pytest.mark.parametrize("network", [Bag, Padded], ids=["module", "function"])
def test_padding_is_minded_also_where_the_trial_step_meets_none(network: Any) -> None:
    def unpadded(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = networks.sequences(n, seed)
        return x.clamp_min(1), y

    assert find_route(pair(task(network, unpadded))) == (Route(gradients="each"), "")


def test_a_network_whose_rows_have_to_do_with_each_other_in_evaluation_is_told() -> None:
    def network(config: Config) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, track_running_stats=False))

    assert find_route(pair(task(network))) == (Route(gradients="summed", mixes_rows=True), "")


def test_buffers_that_change_in_evaluation_are_trained_alone() -> None:
    class Averaging(Odd):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("mean", torch.zeros(12))

        def odd(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
            return x

    assert reason_of(Averaging) == "forward() changes a buffer also in evaluation"


def test_outputs_that_cannot_be_had_even_one_after_the_other_are_trained_alone() -> None:
    class Random(Odd):
        def odd(self, x: Tensor) -> Tensor:
            return x if self.training else x + torch.randn(x.shape)

    assert reason_of(Random).startswith("its output would be wrong in lane 0 (by ")


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), np.random.random_sample, random.random])
def test_batches_that_a_global_generator_decides_are_trained_alone(draw: Any) -> None:
    def augment(self: Task, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + float(draw())

    words = "augment() or the Dataset draws from a global generator, of which lanes have one between them"
    assert reason_of(Mlp, augment=augment) == words
    of = task(Mlp)
    group = LaneGroup(pair(of), Route(gradients="summed"))
    for lane in group._lanes:  # as where only some batches draw
        lane.augment = lambda inputs, generator: augment(of, inputs, generator)
    with pytest.raises(LanesRefused) as refused:
        group.train_epoch()
    assert refused.value.reason == words


def test_a_validation_split_that_a_global_generator_decides_is_trained_alone() -> None:
    class Noisy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __init__(self, first: int) -> None:
            self.first, (self.x, self.y) = first, networks.classes(80, 1)

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.x[index] + (torch.randn(12) if index >= self.first else 0.0), self.y[index]

    for first in (0, 70):  # in the rows that the trial step sees, and behind them
        members = {"data": lambda self, first=first: Splits(train=networks.classes(50, 0), val=Noisy(first))}
        lanes = pair(task(Mlp, **members))
        if first == 0:
            assert find_route(lanes)[1].startswith("augment() or the Dataset draws from a global generator")
        with pytest.raises(LanesRefused, match="draws from a global generator"):
            LaneGroup(lanes, Route(gradients="summed")).train_epoch()


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda self, x: x * float(x.abs().mean().item()), "forward() reads a tensor's value (.item(), float(tensor)"),
        (lambda self, x: x if x.sum() > 0 else -x, "forward() decides by the values of a tensor (if, while)"),
    ],
    ids=["item", "branch"],
)
def test_a_forward_that_needs_values_is_trained_alone(odd: Any, words: str) -> None:
    assert reason_of(type("Reads", (Odd,), {"odd": odd})).startswith(words)


def test_a_forward_that_counts_in_an_attribute_is_trained_alone() -> None:
    class Counting(Odd):
        calls = 0

        def odd(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    assert reason_of(Counting) == "forward() changes `calls`, which lanes would share"


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_counts_in_one_mode_alone_is_trained_alone(training: bool) -> None:
    class Counting(Odd):
        calls = 0

        def odd(self, x: Tensor) -> Tensor:
            self.calls += self.training is training
            return x

    assert reason_of(Counting) == "forward() changes `calls`, which lanes would share"


def test_a_table_that_is_made_once_is_no_reason_against_lanes() -> None:
    class Tabled(Odd):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.table: Tensor | None = None

        def odd(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(12.0).cos()
            return x * self.table

    lanes = pair(task(Tabled))
    route, reason = find_route(lanes)
    assert (route, reason) == (Route(gradients="summed"), "")
    assert route is not None
    group = LaneGroup(lanes, route)
    for _ in range(2):
        group.train_epoch()


def test_a_forward_that_draws_on_the_host_is_trained_alone() -> None:
    class Skipping(Odd):
        def odd(self, x: Tensor) -> Tensor:
            return x if random.random() < 0.5 else -x

    words = "forward() draws from Python's or numpy's generator, and lanes would share what it draws"
    assert reason_of(Skipping) == words


def test_a_model_that_cannot_be_copied_is_trained_alone() -> None:
    class Uncopied(Mlp):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            raise TypeError("one of a kind")

    assert reason_of(Uncopied) == "its model cannot be copied: TypeError: one of a kind"


def test_a_function_that_holds_the_model_itself_is_found_out_also_by_a_single_training() -> None:
    def network(config: Config) -> nn.Module:
        model = Mlp(config)
        own = model[0].forward
        model[0].forward = lambda x: 1.5 * own(x)  # type: ignore[method-assign]
        return model

    lanes = pair(task(network))
    words = "the model keeps a function that uses the model's own weights, also where a copy of it is asked"
    for some in (lanes[:1], lanes):
        assert find_route(some) == (None, words)
    assert all(param.grad is None for param in lanes[0].model.parameters())


def test_batch_norm_that_counts_on_the_host_is_trained_alone() -> None:
    def network(config: Config) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, momentum=None))

    assert reason_of(network) == "module 1 has momentum=None, so that it counts its batches on the host"


def test_hooks_and_half_precision_are_trained_alone() -> None:
    def hooked(config: Config) -> nn.Module:
        model = Mlp(config)
        model[0].register_forward_hook(lambda *_: None)
        return model

    def masked(config: Config) -> nn.Module:
        model = Mlp(config)
        model[0].weight.register_hook(lambda grad: grad * 0)
        return model

    assert reason_of(hooked) == "module 0 has hooks"
    assert reason_of(masked) == "parameter 0.weight has hooks"
    half = reason_of(lambda config: Mlp(config).to(torch.bfloat16))
    assert half == "parameter 0.weight is bfloat16, where lanes train float32 or float64"


def test_compiled_models_are_trained_alone() -> None:
    def compiled(config: Config) -> nn.Module:
        model = Mlp(config)
        model[2].add_module("_orig_mod", nn.Identity())  # as torch.compile leaves it; importing that takes seconds
        return model

    assert reason_of(compiled) == "module 2 is compiled"


def test_an_optimizer_without_a_fused_rule_is_trained_alone() -> None:
    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(params)

    assert reason_of(Mlp, optimizer=optimizer).startswith("the optimizer is a Adagrad (those that can be fused: Adam,")


def test_an_optimizer_whose_step_was_replaced_is_trained_alone() -> None:
    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        made = torch.optim.SGD(params, lr=0.1)
        step = made.step

        def halving(*args: Any) -> None:
            step(*args)
            made.param_groups[0]["lr"] /= 2

        made.step = halving  # type: ignore[method-assign, assignment]
        return made

    assert reason_of(Mlp, optimizer=optimizer) == "the optimizer's step() was replaced, by a scheduler perhaps"


def test_a_task_that_raises_is_trained_alone_where_it_says_so_itself() -> None:
    def odd(self: Odd, x: Tensor) -> Tensor:
        raise ValueError("a bad day")

    assert reason_of(type("Raises", (Odd,), {"odd": odd})) == "a plain step of it raised ValueError: a bad day"


def test_sparse_gradients_are_trained_alone() -> None:
    class Sparse(Recurrent):
        def __init__(self, config: Config) -> None:
            super().__init__(nn.GRU)
            self.embed = nn.Embedding(20, 8, sparse=True)

    def optimizer(self: Task, params: Any, config: Config) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    assert reason_of(Sparse, networks.sequences, optimizer=optimizer) == "gradients are sparse"


class Wide(nn.Sequential):
    def __init__(self, config: Config) -> None:
        self_width = config.get("width", 8)
        super().__init__(nn.Linear(12, self_width), nn.ReLU(), nn.Linear(self_width, 4))


@pytest.mark.parametrize(
    ("network", "one", "other", "reason"),
    [
        (Wide, {}, {"width": 16}, "parameter 0.weight is (8, 12) and (16, 12)"),
        (Mlp, {}, {"batch_size": 10}, "batch_size is 25 and 10"),
        (Mlp, {}, {"optimizer": "sgd"}, "the optimizer is AdamW and SGD"),
        (
            lambda c: nn.Sequential(nn.Linear(12, 4), nn.ELU(c.get("alpha", 1.0))),
            {},
            {"alpha": 0.5},
            "`alpha` of module 1 differs",
        ),
        (
            lambda c: nn.Sequential(nn.Linear(12, 4), nn.ReLU() if c.get("relu") else nn.Tanh()),
            {},
            {"relu": True},
            "module 1 is a Tanh and a ReLU",
        ),
        (
            lambda c: nn.Sequential(*(nn.Linear(12 if i == 0 else 4, 4) for i in range(c.get("depth", 1)))),
            {},
            {"depth": 2},
            "their models have other modules (1)",
        ),
    ],
    ids=["width", "batch_size", "optimizer", "attribute", "module", "depth"],
)
def test_what_differs_between_two_trainings_is_named(network: Any, one: Config, other: Config, reason: str) -> None:
    first, second = pair(task(network), one, other)
    assert can_fuse(first, second) == reason
    assert can_fuse(first, first) == can_fuse(second, second) == ""


def test_what_reaches_a_step_as_a_number_may_differ() -> None:
    class Keeps(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config, self.act = config, functools.partial(F.leaky_relu, negative_slope=0.1)
            factor = config.get("factor", 2)
            self.twice = lambda x: x * factor
            self.hidden, self.dropout = nn.Linear(12, 4), nn.Dropout(config.get("dropout", 0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.act(self.twice(self.hidden(x))))

    one: Config = {"lr": 1e-3, "weight_decay": 0.1}
    other: Config = {"lr": 1e-2, "label_smoothing": 0.1, "grad_clip_norm": 1.0, "warmup_epochs": 2}
    assert can_fuse(*pair(task(Keeps), one, other)) == ""
    assert can_fuse(*pair(task(Keeps), one, {"factor": 3})) == "`config` of the model differs"


class Scale:
    """A helper that is no module."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Helped(Odd):
    """An Mlp whose forward() calls something that it keeps."""

    def __init__(self, config: Config, helper: Any) -> None:
        super().__init__(config)
        self.helper = helper

    def odd(self, x: Tensor) -> Tensor:
        return self.helper(x)


@pytest.mark.parametrize(
    "helper",
    [
        lambda model, config: Scale(config["factor"]).apply,
        lambda model, config: lambda x: x * config["factor"],
        lambda model, config: lambda x: Scale(config["factor"]).apply(model.odd(x)),
        lambda model, config: functools.partial(torch.mul, np.full(1, config["factor"])),
        lambda model, config: types.MethodType(lambda self, x: x * config["factor"], model),
        lambda model, config: [model, nn.Dropout(config["factor"])],
        lambda model, config: {"scale": Scale(config["factor"]), "config": {"lr": config["factor"]}},
    ],
    ids=["method", "closure", "own module", "array", "replaced method", "hidden dropout", "dict"],
)
def test_what_a_model_keeps_is_compared_to_its_depths(helper: Any) -> None:
    def network(config: Config) -> nn.Module:
        model = Helped(config, None)
        model.helper = helper(model, {"factor": config.get("factor", 0.5)})
        return model

    assert can_fuse(*pair(task(network), {}, {"lr": 0.1})) == ""
    assert can_fuse(*pair(task(network), {}, {"factor": 0.25})) == "`helper` of the model differs"


def test_what_is_known_by_its_name_alone_differs_from_another() -> None:
    def network(config: Config) -> nn.Module:
        factor = config.get("factor", 2)
        return Helped(config, functools.lru_cache(lambda x: x * factor))

    assert can_fuse(*pair(task(network), {}, {"factor": 3})) == "`helper` of the model differs"


def test_a_function_over_a_config_is_of_that_config_alone() -> None:
    def network(config: Config) -> nn.Module:
        return Helped(config, lambda x: x * config["lr"])

    assert can_fuse(*pair(task(network), {"lr": 0.1}, {"lr": 0.2})) == "`helper` of the model differs"


@pytest.mark.parametrize("use", [lambda x, value: x * value, lambda x, value: x + 1 if value > 0.5 else x])
def test_a_forward_that_reads_what_lanes_have_each_their_own_of_is_trained_alone(use: Any) -> None:
    class Reads(Odd):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.kept = {"config": config}

        def odd(self, x: Tensor) -> Tensor:
            return use(x, self.kept["config"]["momentum"])

    lanes = pair(task(Reads), {"momentum": 0.9}, {"momentum": 0.1})
    words = "forward() reads `momentum` of a config that it keeps, which each lane has another of"
    for some in (lanes, lanes[:1]):
        assert find_route(some) == (None, words)
    assert lanes[0].model.kept["config"]["momentum"] == 0.9


@pytest.mark.parametrize(
    "helper",
    [
        lambda: Scale(1.0).count,
        lambda: functools.partial(lambda held, x: held.update(n=held.get("n", 0) + 1) or x, {}),
        lambda: functools.partial(lambda held, x: held[0].append(held[0].pop() + 1) or x, [[0]]),
        lambda: functools.partial(lambda held, x: held.normal() and x, np.random.default_rng(0)),
    ],
    ids=["helper", "dict", "list", "generator"],
)
def test_a_forward_that_counts_in_what_it_keeps_is_trained_alone(helper: Any) -> None:
    assert reason_of(lambda config: Helped(config, helper())) == "forward() changes `helper`, which lanes would share"


def test_an_optimizer_that_has_stepped_its_parameters_unequally_is_refused() -> None:
    first, second = pair(task(Mlp))
    second.train_epoch()
    assert can_fuse(first, second) == ""
    second.optimizer.state[second.model[0].weight]["step"] += 1  # type: ignore[index]
    assert can_fuse(first, second) == "the optimizer has not stepped all of its parameters equally often"


@pytest.mark.parametrize("network", [networks.Cnn, networks.Transformer, networks.Lstm])
def test_trainings_and_random_state_are_left_as_found(network: Any) -> None:
    rows = networks.images if network is networks.Cnn else networks.sequences
    lanes = trainings(task(lambda _: network(), rows), [{"lr": 1e-3}, {"lr": 3e-3, "grad_clip_norm": 0.1}])
    lanes[1].train_epoch()
    lanes[0].model.eval()
    before, states = [pack(lane.checkpoint()) for lane in lanes], random_states()
    modes = [[module.training for module in lane.model.modules()] for lane in lanes]
    grads = [[param.grad for param in lane.model.parameters()] for lane in lanes]
    route, reason = find_route(lanes)
    assert route is not None, reason
    assert [pack(lane.checkpoint()) for lane in lanes] == before
    assert random_states() == states
    assert [[module.training for module in lane.model.modules()] for lane in lanes] == modes
    assert all(
        mine is other
        for lane, given in zip(lanes, grads, strict=True)
        for mine, other in zip([param.grad for param in lane.model.parameters()], given, strict=True)
    )
    assert [lane.epoch for lane in lanes] == [0, 1]
