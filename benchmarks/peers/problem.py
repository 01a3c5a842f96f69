"""What every engine trains: the same data, the same networks, the same loop. Nothing here is hpsearch's.

Which data is told by the environment, since workers of every engine inherit it:

    BENCHMARK_DATA=digits                 scikit-learn's 1,797 digits of 8 x 8 pixels
    BENCHMARK_DATA=/path/to/mnist.npz     train_images, train_labels, test_images, test_labels; BENCHMARK_ROWS of them
                                          are trained on (5,000), 2,000 others rank the trials, all 10,000 test
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Arrays = dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
Splits = dict[str, "tuple[Tensor, Tensor]"]
Config = Mapping[str, Any]

MNIST_TRAIN_ROWS, MNIST_VAL_ROWS = 5_000, 2_000
N_CLASSES = 10


def load() -> Arrays:
    """train, val and test, standardised by train's one mean and scale; the same for every process."""
    source = os.environ["BENCHMARK_DATA"]
    cut = _digits() if source == "digits" else _mnist(source, int(os.environ.get("BENCHMARK_ROWS", MNIST_TRAIN_ROWS)))
    mean, std = cut["train"][0].mean(), cut["train"][0].std()
    return {name: (((x - mean) / std).astype(np.float32), y.astype(np.int64)) for name, (x, y) in cut.items()}


def _digits() -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=450, random_state=0, stratify=y)
    x, x_val, y, y_val = train_test_split(x, y, test_size=450, random_state=0, stratify=y)
    return {"train": (x, y), "val": (x_val, y_val), "test": (x_test, y_test)}


def _mnist(path: str, n_train: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    with np.load(path) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
        test = (arrays["test_images"], arrays["test_labels"])
    order = np.random.default_rng(0).permutation(len(images))
    rows = {"val": order[:MNIST_VAL_ROWS], "train": order[MNIST_VAL_ROWS : MNIST_VAL_ROWS + n_train]}
    cut = {name: (images[chosen], labels[chosen]) for name, chosen in rows.items()} | {"test": test}
    return {name: (x.reshape(len(x), -1) / 255.0, y) for name, (x, y) in cut.items()}


def network(n_inputs: int, config: Config) -> nn.Module:
    """A multilayer perceptron of `depth` layers (1) of `width` with `dropout` (0)."""
    from torch import nn

    widths = [n_inputs, *[config["width"]] * config.get("depth", 1)]
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(config.get("dropout", 0.0))]
    return nn.Sequential(*layers, nn.Linear(widths[-1], N_CLASSES))


def as_tensors(arrays: Arrays, device: str = "cpu") -> Splits:
    import torch

    return {name: (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for name, (x, y) in arrays.items()}


class PlainTraining:
    """A trial as one would write it by hand and care for its speed: tensors on the device, fused optimizers, nothing
    asked of the device within an epoch. One at a time in a process: it draws from torch's global generator."""

    def __init__(self, splits: Splits, config: Config) -> None:
        import torch

        self._splits = splits
        self._batch_size = config["batch_size"]
        x, _ = splits["train"]
        torch.manual_seed(config["seed"])
        self.model = network(x.shape[1], config).to(x.device)
        self._optimizer = _optimizer(self.model, config)
        self.n_epochs = 0

    def epoch(self) -> dict[str, float]:
        """Train one epoch more; loss and accuracy on val, and the epoch."""
        import torch
        from torch.nn import functional

        x, y = self._splits["train"]
        order = torch.randperm(len(x), device=x.device)
        x_epoch, y_epoch = x[order], y[order]
        self.model.train()
        for start in range(0, len(x), self._batch_size):
            end = start + self._batch_size
            loss = functional.cross_entropy(self.model(x_epoch[start:end]), y_epoch[start:end])
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self.n_epochs += 1
        return {"epoch": self.n_epochs, **self.measure("val")}

    def measure(self, split: str) -> dict[str, float]:
        """{"<split>_loss": …, "<split>_accuracy": …}"""
        import torch
        from torch.nn import functional

        x, y = self._splits[split]
        self.model.eval()
        with torch.no_grad():
            output = self.model(x)
            loss = functional.cross_entropy(output, y)
            accuracy = (output.argmax(1) == y).float().mean()
        return {f"{split}_loss": loss.item(), f"{split}_accuracy": accuracy.item()}


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    import torch

    lr, weight_decay = config["lr"], config.get("weight_decay", 0.0)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True),
        "sgd": lambda: torch.optim.SGD(
            model.parameters(), lr=lr, momentum=config["momentum"], weight_decay=weight_decay, fused=True
        ),
    }
    return makers[config.get("optimizer", "adamw")]()


def warm_up(splits: Splits, threads: int = 1) -> None:
    """One step of a small network, as hpsearch's workers take before they are timed: with its first step torch loads a
    second's worth of modules."""
    import torch

    torch.set_num_threads(threads)
    x, y = splits["train"]
    few = {name: (x[:8], y[:8]) for name in ("train", "val")}
    PlainTraining(few, {"width": 2, "batch_size": 8, "lr": 1e-3, "seed": 0}).epoch()
