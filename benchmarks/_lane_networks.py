"""The networks of `lanes.py`, on made-up data of MNIST's and CIFAR's shapes: what a step costs does not depend on the
pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hpsearch

N_CLASSES = 10
RANDOM_ROWS = 8192  # repeated, since drawing a gigabyte takes long
VAL_ROWS = 64  # measured after every epoch, which takes no more than one step


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, and how a trial of it is trained."""

    make: Callable[[], nn.Module]
    words: str
    shape: tuple[int, ...]  # of an example
    optimizer: str
    batch: int
    steps: int  # of an epoch, on a GPU
    cpu_batch: int
    cpu_steps: int

    def batch_on(self, device: str) -> int:
        return self.cpu_batch if device == "cpu" else self.batch

    def steps_on(self, device: str) -> int:
        return self.cpu_steps if device == "cpu" else self.steps


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, N_CLASSES),
        )


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *_block(1, 16),
            *_block(16, 32),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, N_CLASSES),
        )


def _block(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]


class Residual(nn.Module):
    """Two convolutions beside a shortcut.

    Source: He et al. 2015, arXiv:1512.03385.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        same = stride == 1 and n_in == n_out
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """For 32 x 32 pixels: the first convolution is 3 x 3, and nothing is pooled before the blocks."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        n_in = 64
        for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Residual(n_in, n_out, stride), Residual(n_out, n_out, 1)]
            n_in = n_out
        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, N_CLASSES),
        )


class Gru(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(28, 64, batch_first=True)
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        found: Tensor = self.head(out[:, -1])
        return found


class Transformer(nn.Module):
    """The rows of an image are its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(28, 64), nn.Parameter(0.02 * torch.randn(28, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(self.embed(x) + self.place).mean(dim=1))
        return found


NETWORKS = {
    "mlp": Network(
        make=Mlp,
        words="784-128-128-10, dropout",
        shape=(28, 28),
        optimizer="adamw",
        batch=64,
        steps=100,
        cpu_batch=64,
        cpu_steps=50,
    ),
    "cnn": Network(
        make=Cnn,
        words="two convolutions of 16 and 32 channels, batch norm, dropout, 28 x 28",
        shape=(1, 28, 28),
        optimizer="adamw",
        batch=64,
        steps=100,
        cpu_batch=64,
        cpu_steps=10,
    ),
    "resnet18": Network(
        make=ResNet18,
        words="ResNet-18 at 32 x 32",
        shape=(3, 32, 32),
        optimizer="sgd",
        batch=128,
        steps=20,
        cpu_batch=16,
        cpu_steps=2,
    ),
    "gru": Network(
        make=Gru,
        words="GRU of 64 over 28 steps of 28 numbers",
        shape=(28, 28),
        optimizer="adamw",
        batch=64,
        steps=100,
        cpu_batch=64,
        cpu_steps=10,
    ),
    "transformer": Network(
        make=Transformer,
        words="two layers of 64 with four heads over 28 tokens, dropout",
        shape=(28, 28),
        optimizer="adamw",
        batch=64,
        steps=100,
        cpu_batch=64,
        cpu_steps=10,
    ),
}


class Synthetic(hpsearch.Task):
    """A network of the table with random rows."""

    def __init__(self, network: Network, n_rows: int) -> None:
        self._network = network
        self._n_rows = n_rows

    def data(self) -> hpsearch.Splits:
        generator = torch.Generator().manual_seed(0)

        def rows(n: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(min(n, RANDOM_ROWS), *self._network.shape, generator=generator)
            x = x.repeat(-(-n // len(x)), *(1 for _ in self._network.shape))[:n]
            return x, torch.randint(0, N_CLASSES, (n,), generator=generator)

        return hpsearch.Splits(train=rows(self._n_rows), val=rows(VAL_ROWS))

    def model(self, config: dict[str, Any]) -> nn.Module:
        return self._network.make()


def lane_config(network: Network, lane: int, batch_size: int) -> dict[str, Any]:
    """A trial of its own: rates that no other lane has."""
    return {
        "optimizer": network.optimizer,
        "lr": 1e-4 * 1.01**lane,
        "weight_decay": 1e-5 * (1 + lane),
        **({"momentum": 0.9} if network.optimizer == "sgd" else {}),
        "batch_size": batch_size,
    }
