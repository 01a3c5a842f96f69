"""Handwritten digits, 8 x 8 grey pixels, and a plain multilayer perceptron: the study that ./scripts/demo runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import hpsearch


class Digits(hpsearch.Task):
    """1,797 images, comes with scikit-learn. Integer targets: the default loss is cross-entropy."""

    def data(self) -> hpsearch.Splits:
        x, y = load_digits(return_X_y=True)
        # Every worker must find the same rows, so the split is seeded; stratified, so that each digit is in each part.
        x, x_test, y, y_test = train_test_split(x, y, test_size=450, random_state=0, stratify=y)
        x, x_val, y, y_val = train_test_split(x, y, test_size=450, random_state=0, stratify=y)
        # One mean and one scale for all pixels, and from train alone: val and test are data not seen yet. (Pixel by
        # pixel would divide by zero: the corners are always blank.)
        mean, std = x.mean(), x.std()
        return hpsearch.Splits(
            train=((x - mean) / std, y), val=((x_val - mean) / std, y_val), test=((x_test - mean) / std, y_test)
        )

    def model(self, config: dict[str, Any]) -> nn.Module:
        widths = [64, *[config["width"]] * config["depth"]]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(config["dropout"])]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))
