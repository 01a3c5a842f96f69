"""The default loop: what the keys of a config do, and that an epoch depends on (trial seed, epoch) alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import Config
from hpsearch.task import Splits, Task
from hpsearch.training.checkpoint import pack, unpack
from hpsearch.training.data import StudyData
from hpsearch.training.loop import DefaultTraining, read_settings, training_loss
from hpsearch.training.seeding import seeded

CPU = torch.device("cpu")


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classes(Task):
    def data(self) -> Splits:
        return Splits(train=rows(100, 0), val=rows(30, 1))

    def model(self, config: Config) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Linear(Classes):
    def model(self, config: Config) -> nn.Module:
        return nn.Linear(6, 3)


def start(task: Task, config: Config | None = None, *, seed: int = 0, **kw: Any) -> DefaultTraining:
    data = StudyData.load(task, study_seed=0, cut_ensemble=False, device=CPU)
    return DefaultTraining(task, data, config or {}, trial=0, seed=seed, device=CPU, **kw)


def weights(training: DefaultTraining) -> bytes:
    return pack(training.checkpoint())


def random_states() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate())  # type: ignore[union-attr]


def test_an_epoch_reports_train_and_val_and_learns() -> None:
    training = start(Classes(), {"lr": 0.01, "batch_size": 10})
    first = training.train_epoch()
    for _ in range(5):
        last = training.train_epoch()
    assert list(first.metrics) == ["train_loss", "val_loss", "val_accuracy"]
    assert (first.epoch, last.epoch, training.epoch) == (1, 6, 6)
    assert last.metrics["val_loss"] < first.metrics["val_loss"]
    assert first.seconds > 0


def test_the_loop_is_the_plain_one() -> None:
    task = Linear()
    training = start(task, {"optimizer": "sgd", "lr": 0.1, "batch_size": 16})
    model = nn.Linear(6, 3)
    model.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    total = 0.0
    data = StudyData.load(task, study_seed=0, cut_ensemble=False, device=CPU)
    for inputs, target in data.train_batches(batch_size=16, seed=0, epoch=1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(target)
    metrics = training.train_epoch().metrics
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), training.model.parameters(), strict=True))
    assert metrics["train_loss"] == pytest.approx(total / 100, rel=1e-12)  # a mean over rows: the last batch has 4


def test_training_goes_on_to_the_bit_whatever_was_drawn_in_between() -> None:
    straight, stopped = start(Classes()), start(Classes())
    for _ in range(4):
        straight.train_epoch()
    stopped.train_epoch()
    stopped.train_epoch()
    torch.manual_seed(99)
    again = start(Classes(), checkpoint=unpack(weights(stopped), ref="x"))
    assert again.epoch == 2
    again.train_epoch()
    random.random()
    again.train_epoch()
    assert weights(again) == weights(straight)


def test_trials_of_unlike_seeds_differ_and_like_seeds_agree() -> None:
    trained = []
    for seed in (0, 0, 1):
        training = start(Classes(), seed=seed)
        training.train_epoch()
        trained.append([param.detach() for param in training.model.parameters()])
    same = [torch.equal(a, b) for a, b in zip(trained[0], trained[1], strict=True)]
    other = [torch.equal(a, b) for a, b in zip(trained[0], trained[2], strict=True)]
    assert all(same)
    assert not all(other)


@pytest.mark.parametrize("fails", [False, True])
def test_global_random_state_is_lent_and_put_back_also_when_the_loss_raises(fails: bool) -> None:
    class Drawing(Classes):
        def model(self, config: Config) -> nn.Module:
            self.draw()
            return super().model(config)

        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            self.draw()
            if fails:
                raise ValueError("no")
            return F.cross_entropy(output, target)

        def draw(self) -> None:
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)

    before = random_states()
    training = start(Drawing())
    if fails:
        with pytest.raises(UserCodeError, match="ValueError: no"):
            training.train_epoch()
    else:
        training.train_epoch()
    assert random_states() == before


def test_seeded_gives_the_same_draws_from_all_generators() -> None:
    def draws() -> tuple[float, float, float]:
        with seeded(2**63 - 1, CPU):
            return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002

    assert draws() == draws()


def test_model_and_optimizer_get_copies_of_the_config() -> None:
    class Greedy(Linear):
        def model(self, config: Config) -> nn.Module:
            layers = config.pop("layers")
            assert isinstance(layers, list)
            layers.clear()
            return super().model(config)

    config: Config = {"layers": [1, 2], "lr": 0.5}
    training = start(Greedy(), config)
    assert config == {"layers": [1, 2], "lr": 0.5}
    assert training.optimizer.param_groups[0]["lr"] == 0.5
    assert training.checkpoint().config == config


# What the keys do


class Recording(torch.optim.SGD):
    """Notes the learning rates and the gradients' norm at every step, and does not move."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.lrs: list[list[float]] = []
        self.norms: list[float] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.lrs.append([float(group["lr"]) for group in self.param_groups])
        grads = [param.grad.flatten() for group in self.param_groups for param in group["params"]]
        self.norms.append(torch.cat(grads).norm().item())


class Recorded(Linear):
    lr_type: Callable[[float], Any] = float

    def optimizer(self, params: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
        weight, bias = params
        kind = type(self).lr_type
        return Recording([{"params": [weight], "lr": kind(1.0)}, {"params": [bias], "lr": kind(0.1)}], lr=kind(1.0))


class RecordedTensors(Recorded):
    lr_type = staticmethod(torch.tensor)


def recorder(training: DefaultTraining) -> Recording:
    assert isinstance(training.optimizer, Recording)
    return training.optimizer


@pytest.mark.parametrize("task", [Recorded, RecordedTensors])
def test_warm_up_multiplies_each_groups_own_rate_step_by_step(task: type[Recorded]) -> None:
    training = start(task(), {"batch_size": 25, "warmup_epochs": 1.5})  # 4 steps an epoch, 6 of warm-up
    training.train_epoch()
    assert [float(group["lr"]) for group in training.optimizer.param_groups] == pytest.approx([1.0, 0.1])
    training.train_epoch()
    training.train_epoch()
    lrs = recorder(training).lrs
    assert [lr for lr, _ in lrs] == pytest.approx([k / 6 for k in range(1, 7)] + [1.0] * 6)
    assert [lr for _, lr in lrs] == pytest.approx([k / 60 for k in range(1, 7)] + [0.1] * 6)


def test_warm_up_goes_on_in_a_restored_trial() -> None:
    config: Config = {"batch_size": 25, "warmup_epochs": 2}
    first = start(Recorded(), config)
    first.train_epoch()
    again = start(Recorded(), config, checkpoint=unpack(weights(first), ref="x"))
    again.train_epoch()
    assert [lr for lr, _ in recorder(again).lrs] == pytest.approx([k / 8 for k in range(5, 9)])


def test_gradients_are_clipped_by_their_norm_together() -> None:
    plain, clipped = start(Recorded()), start(Recorded(), {"grad_clip_norm": 0.01})
    plain.train_epoch()
    clipped.train_epoch()
    assert min(recorder(plain).norms) > 0.01
    assert max(recorder(clipped).norms) == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    config: Config = {"batch_size": 100, "lr": 0.0, "label_smoothing": 0.3}
    training = start(Linear(), config)
    metrics = training.train_epoch().metrics
    (x, y), (val_x, val_y) = rows(100, 0), rows(30, 1)
    smooth = F.cross_entropy(training.model(x), y, label_smoothing=0.3).item()
    assert metrics["train_loss"] == pytest.approx(smooth, rel=1e-6)
    assert metrics["val_loss"] == pytest.approx(F.cross_entropy(training.model(val_x), val_y).item(), rel=1e-6)


def test_a_tasks_own_loss_is_left_as_it_is_and_a_default_without_labels_refuses_smoothing() -> None:
    class Own(Task):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return output.sum()

    own = Own()
    assert training_loss(own, "logits", 0.1) == own.loss
    with pytest.raises(UserCodeError, match=r"label_smoothing is 0.1, but the loss is not cross-entropy over classes"):
        training_loss(Task(), "values", 0.1)


@pytest.mark.parametrize("outputs", ["logits", "values", "binary_logits"])
def test_the_loss_that_is_trained_on_is_the_tasks(outputs: Any) -> None:
    task = Task()
    task.outputs = outputs
    output = torch.randn(8, 3)
    target = {"logits": torch.arange(8) % 3, "values": output * 2, "binary_logits": (output > 0).long()}[outputs]
    assert torch.equal(training_loss(task, outputs, 0.0)(output, target), task.loss(output, target))


def test_settings_have_defaults_and_batches_no_more_rows_than_there_are() -> None:
    settings = read_settings({}, n_train=1000)
    assert (settings.batch_size, settings.grad_clip_norm) == (64, None)
    assert (settings.label_smoothing, settings.warmup_epochs) == (0.0, 0.0)
    assert read_settings({"batch_size": 128}, n_train=100).batch_size == 100
    assert read_settings({"batch_size": 32.0, "grad_clip_norm": None}, n_train=100).batch_size == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, not a whole number"),
        ({"batch_size": "64"}, "batch_size is '64', where a number is needed"),
        ({"grad_clip_norm": 0}, "grad_clip_norm is 0, which stops all training"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must be within \[0, 1\)"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(config: Config, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        read_settings(config, n_train=100)


def test_shuffle_off_trains_in_the_splits_order_and_augment_is_called_in_training_alone() -> None:
    seen: list[Tensor] = []

    class Seen(Linear):
        def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(inputs.clone())
            return inputs

    start(Seen(), {"batch_size": 50}, shuffle=False).train_epoch()
    assert torch.equal(torch.cat(seen), rows(100, 0)[0])


# What goes wrong


def test_a_nan_train_loss_diverges_without_an_evaluation() -> None:
    class Nan(Linear):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + (math.nan if output.requires_grad else 0.0)

        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            raise AssertionError("not asked")

    training = start(Nan())
    with pytest.raises(TrialDiverged) as caught:
        training.train_epoch()
    assert caught.value.message == "train_loss is nan"
    assert training.epoch == 0


def test_one_infinite_batch_among_finite_ones_diverges() -> None:
    class Once(Linear):
        n = 0

        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            self.n += 1
            return F.cross_entropy(output, target) + (math.inf if self.n == 2 else 0.0)

    with pytest.raises(TrialDiverged, match="train_loss is inf"):
        start(Once(), {"batch_size": 10}).train_epoch()


def test_a_val_metric_that_is_nan_diverges() -> None:
    class Nan(Linear):
        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            return {"f1": math.nan}

    with pytest.raises(TrialDiverged, match="val_f1 is nan"):
        start(Nan()).train_epoch()


def test_a_last_step_into_nan_weights_is_diverged_and_not_the_metrics_crash() -> None:
    class Sklearn(Linear):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + (output * 0).sqrt().sum()  # finite, and its gradient is not

        def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
            if output.isnan().any():
                raise ValueError("Input contains NaN.")
            return {}

    with pytest.raises(TrialDiverged, match="val_loss is nan"):
        start(Sklearn(), {"batch_size": 100}).train_epoch()


class ModelOf(Classes):
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def model(self, config: Config) -> Any:
        return self.make()


class LossOf(Linear):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make = make

    def loss(self, output: Tensor, target: Tensor) -> Any:
        return self.make(output)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ModelOf(lambda: "mlp"), r"model\(\) returned a str, not a torch.nn.Module"),
        (ModelOf(lambda: nn.Linear(6, 2)), r"the model's output is \(64, 2\) where \(64, 3\) is needed"),
        (ModelOf(lambda: nn.Linear(5, 3)), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (ModelOf(lambda: nn.Flatten()), "the model has no parameters to train"),
        (LossOf(lambda output: output.square().mean(dim=1)), r"loss\(\) returned shape \(64,\), not one number"),
        (LossOf(lambda output: 3.0), r"loss\(\) returned a float, not a tensor"),
        (LossOf(lambda output: output.detach().mean()), "the loss does not depend on the model's parameters"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_first_batch(task: Task, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        start(task).train_epoch()


def test_an_optimizer_that_is_none_is_refused() -> None:
    class Forgot(Linear):
        def optimizer(self, params: Iterable[nn.Parameter], config: Config) -> Any:
            return None

    with pytest.raises(
        UserCodeError, match=r"optimizer\(\) returned a NoneType, not a torch.optim.Optimizer"
    ) as caught:
        start(Forgot())
    assert "test_loop.py" in caught.value.frame


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_take_their_shape_from_the_data() -> None:
    training = start(ModelOf(lambda: nn.LazyLinear(3)))
    training.train_epoch()
    again = start(ModelOf(lambda: nn.LazyLinear(3)), checkpoint=unpack(weights(training), ref="x"))
    assert weights(again) == weights(training)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a device, for which the host waits until it has come to that step."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# nadam reads its count of steps, which torch keeps on the host for that.
@pytest.mark.parametrize("config", [{}, {"optimizer": "rmsprop"}, {"optimizer": "sgd", "grad_clip_norm": 1.0}])
def test_no_step_waits_for_the_device(config: Config) -> None:
    counts = []
    for batch_size in (50, 10):  # 2 steps, and 10
        training = start(Linear(), {"batch_size": batch_size, "warmup_epochs": 1, **config})
        training.train_epoch()
        with Reads() as reads:
            training.train_epoch()
        counts.append(reads.n)
    assert counts[0] == counts[1]
    assert counts[0] > 0  # the epoch's metrics
