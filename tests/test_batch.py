"""A batch as the model receives it: the very numbers that training gives it, kept small, with the figures of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from hpsearch.errors import UserCodeError
from hpsearch.job import CheckJob
from hpsearch.report.batch_figure import batch_figure, batch_plot
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.checks import batch as module
from hpsearch.training.checks.batch import Batch, received_batch, run_batch, shown, small
from hpsearch.training.data import StudyData
from hpsearch.training.loop import DefaultTraining
from tests.networks import classes, mlp, task

CPU = torch.device("cpu")
CONFIG = {"batch_size": 24, "lr": 0.01}


class Noisy(Dataset[Any]):
    """Draws from the global generators, as torchvision's transforms do."""

    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = classes(n, seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + torch.randn(12) + np.random.rand(), self.y[i]  # noqa: NPY002 - it is the global state


def noisy(n: int, seed: int) -> Noisy:
    return Noisy(n, seed)


def shaken(self: Task, x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=generator)


def made(rows: Callable[..., Any] = classes, **members: Any) -> tuple[Task, StudyData]:
    own = task(mlp, rows, **members)
    return own, StudyData.load(own, study_seed=0, cut_ensemble=True, device=CPU)


def received(own: Task, data: StudyData, shuffle: bool = True) -> Batch:
    return received_batch(own, data, CONFIG, seed=7, device=CPU, shuffle=shuffle)


# What the model is given


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("augment", [{}, {"augment": shaken}], ids=["as given", "augmented"])
@pytest.mark.parametrize("rows", [classes, noisy], ids=["tensors", "random Dataset"])
def test_it_is_to_the_bit_what_trial_0_is_trained_on_first(
    rows: Callable[..., Any], augment: dict[str, Any], shuffle: bool
) -> None:
    own, data = made(rows, **augment)
    batch = received(own, data, shuffle)
    training = DefaultTraining(own, data, CONFIG, trial=0, seed=7, device=CPU, shuffle=shuffle)
    given: list[Tensor] = []
    training.model.register_forward_pre_hook(lambda model, arguments: given.append(arguments[0].clone()))
    training.train_epoch()
    assert batch.inputs is not None
    assert torch.equal(batch.inputs, given[0])
    assert len(batch.inputs) == 24


def test_before_augment_the_examples_are_the_same_and_in_the_same_order() -> None:
    own, data = made(augment=lambda self, x, generator: x * 2 + 1)
    batch = received(own, data)
    assert batch.inputs is not None
    assert batch.before is not None
    assert torch.equal(batch.inputs, batch.before * 2 + 1)
    assert torch.equal(data.held("train").take(data.train_order(seed=7, epoch=1)[:24]).x, batch.before)


def test_random_state_of_the_process_is_left_alone() -> None:
    own, data = made(noisy, augment=shaken)
    before = torch.get_rng_state()
    received(own, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_augment_that_raises_is_the_users_own_error() -> None:
    def broken(self: Task, x: Tensor, generator: torch.Generator) -> Tensor:
        raise ValueError("no such axis")

    own, data = made(augment=broken)
    with pytest.raises(UserCodeError, match="no such axis"):
        received(own, data)


def looped(prepare: Callable[[Tensor], Tensor], call: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Any]:
    """A loop that looks at val first, without gradients, as many do."""

    def fit(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = splits.train
        while True:
            with torch.no_grad():
                val = F.cross_entropy(call(model.eval(), prepare(splits.val[0])), splits.val[1])
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(call(model, prepare(x[:16])), y[:16]).backward()
            optimizer.step()
            yield Report({"val_loss": float(val)})

    return fit


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(input=x)], ids=["by place", "by name"])
def test_of_a_loop_of_ones_own_it_is_what_the_model_is_first_called_with_in_training(call: Any) -> None:
    own, data = made(fit=looped(lambda x: x * 100, call))
    batch = received(own, data)
    assert batch.inputs is not None
    assert torch.equal(batch.inputs, data.held("train").take(torch.arange(16)).x * 100)
    assert batch.target is None


def test_loop_that_never_calls_the_whole_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(model: nn.Module, x: Tensor) -> Tensor:
        for part in model.children():
            x = part(x)
        return x

    own, data = made(fit=looped(lambda x: x, parts))
    assert received(own, data).reason == "fit() does not train the model as a whole"
    monkeypatch.setattr(module, "LIMIT_S", -1.0)
    assert received(own, data).reason == "fit() did not train the model as a whole in -1 s"


def test_model_that_is_only_evaluated_as_a_whole_has_no_batch() -> None:
    def parts_in_training(model: nn.Module, x: Tensor) -> Tensor:
        return nn.Sequential(*model.children())(x) if model.training else model(x * 1000)

    own, data = made(fit=looped(lambda x: x, parts_in_training))
    batch = received(own, data)
    assert (batch.inputs, batch.reason) == (None, "fit() does not train the model as a whole")


@pytest.mark.parametrize("limit_s", [20.0, -1.0])
def test_no_hook_is_left_on_modules_that_the_model_shares_with_others(
    limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", limit_s)
    shared = mlp()
    own, data = made(fit=looped(lambda x: x, lambda m, x: m(x)), model=lambda self, config: shared)
    received(own, data)
    assert not any(part._forward_pre_hooks for part in shared.modules())
    shared(torch.zeros(2, 12))


@pytest.mark.parametrize(
    "odd", [Tensor.to_sparse, lambda x: torch.zeros(len(x), 0, 3), lambda x: x.to(torch.complex64)]
)
def test_inputs_that_cannot_be_looked_at_are_told_and_stop_nothing(odd: Callable[[Tensor], Tensor]) -> None:
    own, data = made(fit=looped(odd, lambda m, x: m(x)))
    job = CheckJob(key="check/batch/trial 0", what="batch", corner="trial 0", config=dict(CONFIG), seed=7)
    result = run_batch(job, own, data, device=CPU, shuffle=True)
    assert (result.outcome, result.blobs, set(result.values)) == ("done", {}, {"checks", "reason"})


class Private(Noisy):
    """Draws from a generator of its own, so that no example is read twice alike."""

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, seed)
        self.rng = np.random.default_rng(seed)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + float(self.rng.normal()), self.y[i]


def test_before_augment_is_what_augment_was_given() -> None:
    own, data = made(lambda n, seed: Private(n, seed), augment=lambda self, x, generator: x.mul_(2))
    batch = received(own, data)
    assert batch.inputs is not None
    assert batch.before is not None
    assert torch.equal(batch.inputs, batch.before * 2)


def test_loop_that_raises_on_few_rows_is_told_and_stops_nothing() -> None:
    def fit(self: Task, model: nn.Module, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
        raise ValueError("too few")
        yield

    own, data = made(fit=fit)
    assert received(own, data).reason == "fit() does not run on a few rows: ValueError: too few"


# What is kept of it


@pytest.mark.parametrize(
    ("shape", "kind", "kept", "note"),
    [
        ((32,), "rows", (16, 1), ""),
        ((4, 12), "rows", (4, 12), ""),
        ((32, 700), "rows", (16, 512), "the first 512 of 700"),
        ((32, 28, 28), "pictures", (16, 28, 28), ""),
        ((32, 1, 28, 28), "pictures", (16, 28, 28), ""),
        ((32, 3, 20, 30), "pictures", (16, 20, 30, 3), ""),
        ((32, 20, 30, 3), "pictures", (16, 20, 30, 3), ""),
        ((32, 4, 20, 30), "pictures", (16, 20, 30, 3), "the first 3 of 4 channels"),
        ((32, 9, 20, 30), "pictures", (16, 20, 30), "index 4 of 9 along axis 1"),
        ((8, 1, 10, 20, 30), "pictures", (8, 20, 30), "index 5 of 10 along axis 2"),
        ((8, 10, 3, 20, 30), "pictures", (8, 20, 30, 3), "index 5 of 10 along axis 1"),
        ((8, 5, 6, 7, 8), "pictures", (8, 7, 8), "index 2 of 5 along axis 1; index 3 of 6 along axis 1"),
        ((2, 3, 300, 100), "pictures", (2, 128, 100, 3), "averaged down from 300 × 100"),
    ],
)
def test_examples_of_any_shape_become_pictures_or_rows(
    shape: tuple[int, ...], kind: str, kept: tuple[int, ...], note: str
) -> None:
    found = small(torch.rand(shape))
    assert (found[0], tuple(found[1].shape), found[2]) == (kind, kept, note)


def test_numbers_of_things_are_thinned_out_never_averaged() -> None:
    _, pictures, note = small(torch.tensor([7, 900]).repeat(1, 200, 100))
    assert note == "thinned out from 200 × 200"
    assert set(pictures.unique().tolist()) <= {7, 900}


DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_can_be_kept_and_drawn(dtype: torch.dtype) -> None:
    inputs = torch.randint(0, 2, (8, 5)).to(dtype)
    kept = shown(Batch(inputs=inputs, target=inputs[:, 0]))
    assert kept.told["dtype"] == str(dtype).removeprefix("torch.")
    arrays = load_arrays(save(dict(kept.tensors)))
    assert np.array_equal(arrays["received"].astype(float), inputs.double().numpy())
    assert batch_figure(batch_plot(kept.told, arrays)).startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.0, 1e16, 1e300, float(2**52), -7.5])
def test_constant_batch_has_no_histogram_and_can_be_drawn(value: float) -> None:
    kept = shown(Batch(inputs=torch.full((4, 3), value, dtype=torch.float64)))
    assert (kept.told["low"], kept.told["high"], "counts" in kept.told) == (value, value, False)
    assert batch_figure(batch_plot(kept.told, load_arrays(save(dict(kept.tensors))))).startswith(b"\x89PNG")


def test_figures_are_those_of_the_whole_batch_and_leave_out_what_is_not_finite() -> None:
    inputs = torch.zeros(100, 4)
    inputs[90] = torch.tensor([1.0, 3.0, float("nan"), float("inf")])
    told = shown(Batch(inputs=inputs)).told
    assert (told["shape"], told["n_not_finite"], told["low"], told["high"]) == ([100, 4], 2, 0.0, 3.0)
    assert told["mean"] == pytest.approx(4 / 398)
    assert sum(told["counts"]) == 398  # type: ignore[call-overload]


def test_figures_do_not_depend_on_the_parts_in_which_a_batch_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(50, 3, 7, dtype=torch.float64)
    inputs[3, 1, 2] = float("nan")
    whole = shown(Batch(inputs=inputs)).told
    monkeypatch.setattr(module, "PART", 64)
    parts = shown(Batch(inputs=inputs)).told
    numbers = inputs[torch.isfinite(inputs)].numpy()
    assert (parts["low"], parts["high"], parts["counts"]) == (whole["low"], whole["high"], whole["counts"])
    assert parts["counts"] == np.histogram(numbers, bins=module.BINS)[0].tolist()
    assert parts["mean"] == pytest.approx(numbers.mean())
    assert parts["std"] == pytest.approx(numbers.std())


def test_numbers_too_close_to_tell_apart_have_no_histogram() -> None:
    told = shown(Batch(inputs=torch.tensor([[1.0, 1.0 + 2**-52]], dtype=torch.float64))).told
    assert (told["low"], told["high"], "counts" in told) == (1.0, 1.0 + 2**-52, False)


@pytest.mark.parametrize("value", [float("nan"), 1e308, 0.0, 1e-320])
def test_batch_of_one_value_is_told_without_a_warning(value: float) -> None:
    told = shown(
        Batch(inputs=torch.full((4, 3), value, dtype=torch.float64).index_fill(0, torch.tensor(0), -value))
    ).told
    assert ("low" in told) == (value == value)


def test_complex_inputs_have_no_figure_and_the_reason_is_told() -> None:
    assert shown(Batch(inputs=torch.zeros(2, 3, dtype=torch.complex64))).told == {
        "reason": "inputs are complex numbers"
    }


def test_job_keeps_the_batch_beside_its_figures_and_finds_no_fault() -> None:
    own, data = made(augment=shaken)
    job = CheckJob(key="check/batch/trial 0", what="batch", corner="trial 0", config=dict(CONFIG), seed=7)
    result = run_batch(job, own, data, device=CPU, shuffle=True)
    assert result.values["checks"] == []
    (content,) = (result.blobs[str(result.values["batch"])],)
    kept = load(content)
    batch = received(own, data)
    assert batch.inputs is not None
    assert batch.target is not None
    assert torch.equal(kept["received"], batch.inputs[:16])
    assert torch.equal(kept["target"], batch.target[:16])
    assert set(kept) == {"received", "before", "target"}
