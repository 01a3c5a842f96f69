"""Diabetes: how far the disease goes within a year, predicted from ten measurements. Regression on few rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn

import hpsearch

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Diabetes(hpsearch.Task):
    """442 patients, comes with scikit-learn. Float targets: the default loss is squared error, the metric its `mae`."""

    def data(self) -> hpsearch.Splits:
        x, y = load_diabetes(return_X_y=True, scaled=False)
        x, x_test, y, y_test = train_test_split(x, y, test_size=120, random_state=0)
        x, x_val, y, y_val = train_test_split(x, y, test_size=120, random_state=0)
        x_mean, x_std, y_mean, y_std = x.mean(axis=0), x.std(axis=0), y.mean(), y.std()

        def standardised(x: Any, y: Any) -> tuple[Any, Any]:
            # The target too: a loss of 1.0 is then what guessing the mean gives. One column, as the model's output is:
            # (N,) against (N, 1) would broadcast to (N, N), and is refused.
            return (x - x_mean) / x_std, ((y - y_mean) / y_std)[:, None]

        return hpsearch.Splits(
            train=standardised(x, y), val=standardised(x_val, y_val), test=standardised(x_test, y_test)
        )

    def model(self, config: dict[str, Any]) -> nn.Module:
        widths = [10, *[config["width"]] * config["depth"]]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[config["activation"]](), nn.Dropout(config["dropout"])]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
