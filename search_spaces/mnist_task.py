"""MNIST and a small convolutional network with batch norm and dropout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hpsearch


class Mnist(hpsearch.Task):
    """28 x 28 grey pixels, ten digits. The environment says where the data are:

    HPSEARCH_MNIST: the full path of an .npz file with train_images (N, 28, 28) uint8, train_labels (N,), test_images
        and test_labels.
    HPSEARCH_MNIST_TRAIN_ROWS: train on that many rows only, for a machine without a GPU; unset, on all.
    """

    def data(self) -> hpsearch.Splits:
        path = os.environ.get("HPSEARCH_MNIST")
        if not path or not Path(path).is_file():
            found = f"it is {path!r}" if path else "it is not set"
            raise FileNotFoundError(f"HPSEARCH_MNIST must name an .npz file with MNIST, and {found}; see {__file__}")
        with np.load(path) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
            test = (arrays["test_images"], arrays["test_labels"])
        # A sixth of the training rows ranks the trials: 10,000 of MNIST's 60,000. Seeded, the same on every worker.
        order = np.random.default_rng(0).permutation(len(images))
        val, train = np.split(order, [len(order) // 6])
        train = train[: int(os.environ.get("HPSEARCH_MNIST_TRAIN_ROWS", len(train)))]
        # uint8 as it is: a quarter of the memory, and the model does the arithmetic on its device.
        return hpsearch.Splits(train=(images[train], labels[train]), val=(images[val], labels[val]), test=test)

    def model(self, config: dict[str, Any]) -> nn.Module:
        channels = config["channels"]

        def block(n_in: int, n_out: int) -> list[nn.Module]:
            # Batch norm adds its own offset, so the convolution goes without one.
            return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]

        return nn.Sequential(
            Standardise(),
            *block(1, channels),
            *block(channels, 2 * channels),
            nn.Flatten(),
            nn.Dropout(config["dropout"]),
            nn.Linear(2 * channels * 7 * 7, config["width"]),
            nn.ReLU(),
            nn.Dropout(config["dropout"]),
            nn.Linear(config["width"], 10),
        )

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        # Up to two pixels in each direction, one shift for the batch: digits are centred, and handwriting is not.
        right, down = torch.randint(-2, 3, (2,), generator=generator, device=inputs.device).tolist()
        return torch.roll(inputs, (down, right), dims=(1, 2))


class Standardise(nn.Module):
    """Images (B, 28, 28) uint8 as (B, 1, 28, 28) floats with the mean and scale of MNIST's training pixels."""

    mean = 0.1307
    std = 0.3081

    def forward(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).unsqueeze(1)
