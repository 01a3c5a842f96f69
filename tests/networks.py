"""Small tasks for preflight's tests: sound ones, and ones with a bug planted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.task import Report, Splits, Task, Trial

N = 600


def classes(n: int, seed: int, *, n_classes: int = 4, n_features: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, n_classes, (n,), generator=generator)
    x = 0.7 * torch.randn(n, n_features, generator=generator)
    x[torch.arange(n), y] += 2.0
    return x, y


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for k in range(3):
        x[y == k, 0, 2 * k : 2 * k + 2] += 1.0
    return x, y


def sequences(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens; the class is which of three tokens stands among the noise most often."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 20, (n, 10), generator=generator)
    y = torch.randint(0, 3, (n,), generator=generator)
    places = torch.rand(n, 10, generator=generator) < 0.4
    return torch.where(places, y[:, None], x), y


def numbers(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, (x[:, :1] - 0.5 * x[:, 1:2] ** 2 + 0.1 * torch.randn(n, 1, generator=generator))


def rare(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """One row in a hundred is of class 1."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) % 100 == 0).long()[torch.randperm(n, generator=generator)]
    x = torch.randn(n, 8, generator=generator)
    x[y == 1, 0] += 3.0
    return x, y


class Made(Task):
    """A task of a model and of splits."""

    rows: Callable[[int, int], tuple[Tensor, Tensor]] = staticmethod(classes)
    network: Callable[[], nn.Module]

    def data(self) -> Splits:
        rows = type(self).rows
        return Splits(train=rows(N, 1), val=rows(N // 2, 2), test=rows(N // 2, 3))

    def model(self, config: dict[str, Any]) -> nn.Module:
        return type(self).network()


def task(network: Callable[[], nn.Module], rows: Callable[..., Any] = classes, **members: Any) -> Task:
    """A task whose model is `network()`."""
    cls = type("Planted", (Made,), {"network": staticmethod(network), "rows": staticmethod(rows), **members})
    made: Task = cls()
    return made


def mlp(n_in: int = 12, n_out: int = 4, width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_out))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.flatten(1)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 16), nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(x))
        return self.head(out.mean(dim=1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 16), nn.Parameter(0.02 * torch.randn(10, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place).mean(dim=1))


SOUND: dict[str, Callable[[], Task]] = {
    "mlp": lambda: task(mlp),
    "cnn with batch norm and dropout": lambda: task(Cnn, images),
    "lstm": lambda: task(Lstm, sequences),
    "transformer": lambda: task(Transformer, sequences),
    "regression": lambda: task(lambda: mlp(6, 1), numbers),
    "1:100": lambda: task(lambda: mlp(8, 2), rare),
}


class _Wrapped(nn.Module):
    """An MLP with something done to it."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None, before: Any = None) -> None:
        super().__init__()
        self.net, self.after, self.before = mlp(), after, before

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        x = self.net(x)
        return x if self.after is None else self.after(x)


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).detach())


class _NanLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.log(self.first(x)))


class _Mixed(nn.Module):
    """A reshape that takes rows for features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(x).mean(dim=0, keepdim=True)


class _PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(12, 4)]
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.scale


class _Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)
        nn.init.constant_(self.first.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _zero() -> nn.Module:
    model = mlp()
    for param in model.parameters():
        nn.init.zeros_(param)
    return model


def _wild() -> nn.Module:
    model = mlp()
    for param in model.parameters():
        nn.init.normal_(param, std=3.0)
    return model


class _Unseeded(nn.Module):
    """Noise from a source that no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.rng = mlp(), torch.Generator()
        self.rng.seed()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.01 * torch.randn(x.shape, generator=self.rng)
        return self.net(x)


def _half_of_the_parameters(self: Task, params: Any, config: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(params)[2:], lr=1e-3)


def _blind_loss(self: Task, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.zeros_like(target))


def shifted(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    return x, y.roll(1)


def pixels(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    return (60 * x + 100).clamp(0, 255).round(), y


def with_constant(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    x[:, 7] = 3.0
    return x, y


def with_duplicate(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    x[:, 9] = x[:, 4]
    return x, y


def overlapping(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    known, known_y = classes(N, 1)
    if seed != 1:
        x[: n // 4], y[: n // 4] = known[: n // 4], known_y[: n // 4]
    return x, y


def missing_class(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    keep = y < 3 if seed != 1 else torch.ones_like(y, dtype=torch.bool)
    return x[keep], y[keep]


def drifting(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    return x + (1.5 if seed == 3 else 0.0), y


def broken_rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    x[5, 2] = math.nan
    return x, y


def easy_val(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = classes(n, seed)
    if seed == 1:
        noise = torch.Generator().manual_seed(9)
        y = torch.where(torch.rand(n, generator=noise) < 0.5, torch.randint(0, 4, (n,), generator=noise), y)
    return x, y


# name of the bug: (task, code of the check that finds it)
def _looping(*, evaluate: bool = True, train_again: bool = True) -> Callable[..., Any]:
    """A `fit` that sets both modes, or leaves one out."""

    def fit(self: Task, model: nn.Module, config: dict[str, Any], splits: Splits, trial: Trial) -> Iterator[Report]:
        (x, y), (x_val, y_val) = splits.train, splits.val
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model.train()
        while True:
            if train_again:
                model.train()
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if evaluate:
                model.eval()
            with torch.no_grad():
                loss = float(F.cross_entropy(model(x_val), y_val))
            yield Report({"val_loss": loss})

    return fit


SOUND["loop of its own"] = lambda: task(Cnn, images, fit=_looping())

PLANTED: dict[str, tuple[Callable[[], Task], str]] = {
    "leak across the batch": (lambda: task(_Mixed), "batch-leak"),
    "input ignored": (lambda: task(lambda: _Wrapped(before=torch.zeros_like)), "inputs"),
    "softmax before cross-entropy": (lambda: task(lambda: _Wrapped(lambda x: x.softmax(dim=1))), "logits"),
    "sigmoid before cross-entropy": (lambda: task(lambda: _Wrapped(torch.sigmoid)), "logits"),
    "wild init": (lambda: task(_wild), "loss-at-init"),
    "zero init": (lambda: task(_zero), "symmetry"),
    "nan at a layer": (lambda: task(_NanLayer), "finite"),
    "dead relus": (lambda: task(_Dead), "activations"),
    "nothing trains": (lambda: task(_PlainList), "trains"),
    "detached parameters": (lambda: task(_Detached), "gradients"),
    "parameters not given to the optimizer": (lambda: task(mlp, optimizer=_half_of_the_parameters), "optimizer"),
    "loss without targets": (lambda: task(mlp, loss=_blind_loss), "targets"),
    "labels shifted against inputs": (lambda: task(mlp, shifted), "beats-zero-input"),
    "pixels of 0 to 255": (lambda: task(mlp, pixels), "input-scale"),
    "constant feature": (lambda: task(mlp, with_constant), "constant-features"),
    "duplicate feature": (lambda: task(mlp, with_duplicate), "duplicate-features"),
    "train rows in val": (lambda: task(mlp, overlapping), "overlap"),
    "class missing from a split": (lambda: task(mlp, missing_class), "classes"),
    "drift": (lambda: task(mlp, drifting), "drift"),
    "not deterministic": (lambda: task(_Unseeded), "repeats"),
    "dropout in evaluation": (lambda: task(lambda: _Wrapped(lambda x: F.dropout(x, 0.5))), "eval-mode"),
    "validates in training mode": (lambda: task(Cnn, images, fit=_looping(evaluate=False)), "train-eval"),
    "trains in evaluation mode": (lambda: task(Cnn, images, fit=_looping(train_again=False)), "train-eval"),
    "val easier than train": (lambda: task(mlp, easy_val), "val-like-train"),
}
