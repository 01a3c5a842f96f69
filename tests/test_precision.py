"""Forward passes in bfloat16: what changes, and what stays as it was."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from hpsearch.job import ExportJob, Member, TrainJob
from hpsearch.task import Splits, Task
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.precision import in_bf16, in_float32, is_bf16, rounding


class Noted(nn.Linear):
    """A layer that tells what it computed in."""

    seen: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        self.seen = output.dtype
        return output


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Noted(4, 8), nn.ReLU(), Noted(8, 3))


def test_layers_run_in_bfloat16_and_all_that_is_seen_outside_is_float32() -> None:
    plain, model = network(), in_bf16(network())
    x = torch.randn(5, 4)
    output = model(x)
    assert output.dtype == torch.float32
    assert model[0].seen == torch.bfloat16  # type: ignore[index]
    output.square().mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    torch.testing.assert_close(output, plain(x), rtol=2e-2, atol=2e-2)
    assert not torch.equal(output, plain(x))


def test_a_models_precision_is_told() -> None:
    assert (is_bf16(network()), rounding(network())) == (False, 2**-24)
    assert (is_bf16(in_bf16(network())), rounding(in_bf16(network()))) == (True, 2**-8)
    assert not is_bf16(in_float32(in_bf16(network())))


def test_class_copy_state_and_functional_call_are_as_ever() -> None:
    model = in_bf16(network())
    assert isinstance(model, nn.Sequential)
    assert repr(model) == repr(network())
    assert list(model.state_dict()) == list(network().state_dict())
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) is type(in_bf16(network()))
    x = torch.randn(5, 4)
    zeros = {name: torch.zeros_like(value) for name, value in twin.named_parameters()}
    assert not functional_call(twin, zeros, (x,)).any()
    assert type(in_float32(model)) is nn.Sequential
    assert torch.equal(model(x), network()(x))
    assert type(in_float32(network())) is nn.Sequential


def test_study_trains_in_bfloat16_and_exports_float32() -> None:
    class Small(Task):
        precision = "bf16"

        def data(self) -> Splits:
            x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
            y = (x[:, 0] > 0).long()
            return Splits(train=(x[:40], y[:40]), val=(x[40:], y[40:]))

        def model(self, config: object) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    job = TrainJob(key="train/0/0-2", trial=0, config={"lr": 0.01}, seed=0, from_epoch=0, to_epoch=2)
    runs = {}
    for precision in ("float32", "bf16"):
        task = Small()
        task.precision = precision  # type: ignore[assignment]
        executor = TorchExecutor(task, study_seed=0, device="cpu")
        (runs[precision],) = executor.run([job], lambda ref: b"", lambda key, epoch: None)
    losses = {name: run.epochs[-1].metrics["val_loss"] for name, run in runs.items()}
    assert losses["bf16"] != losses["float32"]
    assert abs(losses["bf16"] - losses["float32"]) < 0.01
    blobs = runs["bf16"].blobs
    member = Member(trial=0, config={"lr": 0.01}, checkpoint=next(iter(blobs)))
    (exported,) = executor.run(
        [ExportJob(key="export/0", members=(member,))], lambda ref: blobs[ref], lambda key, epoch: None
    )
    assert exported.outcome == "done"
    (found,) = exported.values["members"].values()  # type: ignore[attr-defined]
    assert found["max_difference"] < 1e-5
