"""Capital letters, told from 16 numbers that describe their picture: a table, and a network for tables."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import hpsearch


class Letter(hpsearch.Task):
    """UCI's letter recognition, 20,000 rows and 26 classes.

    HPSEARCH_TABLES names a folder (its full path) with letter.tsv.gz: tab-separated, a line of names, the target last.
    """

    def data(self) -> hpsearch.Splits:
        folder = os.environ.get("HPSEARCH_TABLES")
        path = Path(folder or ".", "letter.tsv.gz")
        if not folder or not path.is_file():
            found = f"{path} is not there" if folder else "it is not set"
            raise FileNotFoundError(
                f"HPSEARCH_TABLES must name a folder with letter.tsv.gz, and {found}; see {__file__}"
            )
        rows = np.loadtxt(path, delimiter="\t", skiprows=1)
        x = rows[:, :-1]
        _, y = np.unique(rows[:, -1], return_inverse=True)  # classes count from 0
        x, x_test, y, y_test = train_test_split(x, y, test_size=4_000, random_state=0, stratify=y)
        x, x_val, y, y_val = train_test_split(x, y, test_size=4_000, random_state=0, stratify=y)
        mean, std = x.mean(axis=0), x.std(axis=0)  # each column on its own scale, from train alone
        return hpsearch.Splits(
            train=((x - mean) / std, y), val=((x_val - mean) / std, y_val), test=((x_test - mean) / std, y_test)
        )

    def model(self, config: dict[str, Any]) -> nn.Module:
        width, dropout, depth = config["width"], config["dropout"], config["depth"]
        if config["network"] == "residual":
            blocks: list[nn.Module] = [Residual(width, config["expansion"], dropout) for _ in range(depth)]
            return nn.Sequential(nn.Linear(16, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 26))
        widths = [16, *[width] * depth]
        blocks = [
            nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(dropout))
            for n_in, n_out in pairwise(widths)
        ]
        return nn.Sequential(*blocks, nn.Linear(width, 26))


class Residual(nn.Module):
    """x + a small network of x: depth costs no signal, so deeper ones still train."""

    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(expansion * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out
