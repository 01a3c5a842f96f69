"""The size of a checkpoint before any training: what its file will have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config, TrainJob
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.size import checkpoint_bytes


class Sized(Task):
    def data(self) -> Splits:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return Splits(train=(x, (x[:, 0] > 0).long()), val=(x, (x[:, 0] > 0).long()))

    def model(self, config: Config) -> nn.Module:
        width = int(str(config.get("width", 16)))
        return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "adamw", "lr": 0.01, "width": 64},
        {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9},
        {"optimizer": "sgd", "lr": 0.01},
        {"optimizer": "rmsprop", "lr": 0.01, "width": 8},
    ],
)
def test_forecast_is_the_size_of_the_file_that_training_leaves(config: Config) -> None:
    job = TrainJob(key="train/7/0-1", trial=7, config=config, seed=5, from_epoch=0, to_epoch=1)
    executor = TorchExecutor(Sized(), study_seed=0, device="cpu", cut_ensemble=False)
    (result,) = executor.run([job], lambda ref: b"", lambda key, epoch: None)
    assert result.outcome == "done", result.message
    (content,) = result.blobs.values()
    assert abs(checkpoint_bytes(Sized(), config) - len(content)) <= 32  # numbers in its header may be written longer


def test_asking_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    checkpoint_bytes(Sized(), {"lr": 0.1})
    assert torch.equal(torch.get_rng_state(), before)


def test_task_with_its_own_loop_is_sized_by_its_weights() -> None:
    class Own(Sized):
        def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
            yield Report({"loss": 1.0})

    weights = sum(t.numel() * t.element_size() for t in Sized().model({}).state_dict().values())
    assert weights < checkpoint_bytes(Own(), {}) < weights + 4000


def test_model_that_takes_shape_from_data_is_not_guessed() -> None:
    class Lazy(Sized):
        def model(self, config: Config) -> nn.Module:
            return nn.LazyLinear(2)

    with pytest.raises(UserCodeError, match="lazy layers take their shape from a first batch"):
        checkpoint_bytes(Lazy(), {})


def test_optimizer_that_needs_more_than_gradients_is_not_guessed() -> None:
    class Second(Sized):
        def optimizer(self, params: Iterator[nn.Parameter], config: Config) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(params)

    with pytest.raises(UserCodeError, match="closure"):
        checkpoint_bytes(Second(), {})


def test_model_that_is_none_is_refused() -> None:
    class Wrong(Sized):
        def model(self, config: Config) -> nn.Module:
            return Tensor([1.0])  # type: ignore[return-value]

    with pytest.raises(UserCodeError, match=r"model\(\) returned a Tensor, not a torch.nn.Module"):
        checkpoint_bytes(Wrong(), {})
