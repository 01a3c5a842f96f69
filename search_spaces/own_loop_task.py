"""A task with a training loop of its own: mixup, which blends the labels too, as `augment` (inputs only) cannot.

The loop keeps the two promises that let a study pause a trial, take it up on another machine, and get the same to the
bit: what is random in an epoch follows from (trial.seed, epoch), and `state` holds all that the next epoch needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import hpsearch


class Tumours(hpsearch.Task):
    """Benign or malignant, from 30 measurements of cell nuclei: 569 rows, comes with scikit-learn."""

    def data(self) -> hpsearch.Splits:
        x, y = load_breast_cancer(return_X_y=True)
        x, x_test, y, y_test = train_test_split(x, y, test_size=140, random_state=0, stratify=y)
        x, x_val, y, y_val = train_test_split(x, y, test_size=140, random_state=0, stratify=y)
        mean, std = x.mean(axis=0), x.std(axis=0)  # of train alone
        return hpsearch.Splits(
            train=((x - mean) / std, y), val=((x_val - mean) / std, y_val), test=((x_test - mean) / std, y_test)
        )

    def model(self, config: dict[str, Any]) -> nn.Module:
        width = config["width"]
        return nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def fit(
        self, model: nn.Module, config: dict[str, Any], splits: hpsearch.Splits, trial: hpsearch.Trial
    ) -> Iterator[hpsearch.Report]:
        x, y = splits.train
        x_val, y_val = splits.val
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
        if trial.state is not None:  # taken up again after trial.epoch epochs
            model.load_state_dict(trial.state["model"])
            optimizer.load_state_dict(trial.state["optimizer"])

        def state() -> dict[str, Any]:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

        mixing = torch.distributions.Beta(config["mixup"], config["mixup"])
        for epoch in count(trial.epoch + 1):  # the study stops asking when it has seen enough
            torch.manual_seed(trial.seed + 1_000_003 * epoch)
            model.train()
            total = 0.0
            for rows in torch.randperm(len(x)).split(config["batch_size"]):
                rows = rows.to(x.device)
                others, share = rows.flip(0), mixing.sample().to(x.device)
                output = model(share * x[rows] + (1 - share) * x[others])
                loss = share * functional.cross_entropy(output, y[rows])
                loss = loss + (1 - share) * functional.cross_entropy(output, y[others])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            model.eval()
            with torch.no_grad():
                output = model(x_val)
                metrics = {
                    "train_loss": total / len(x),
                    "val_loss": functional.cross_entropy(output, y_val).item(),
                    "val_accuracy": (output.argmax(dim=1) == y_val).float().mean().item(),
                }
            yield hpsearch.Report(metrics, state=state)
