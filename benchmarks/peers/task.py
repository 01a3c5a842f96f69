"""The same data and networks as a task of hpsearch's."""

from __future__ import annotations

from typing import Any

from torch import nn

import hpsearch
from benchmarks.peers import problem


class Study(hpsearch.Task):
    """Loss, metrics and optimizers are the defaults."""

    def data(self) -> hpsearch.Splits:
        arrays = problem.load()
        self.n_inputs = arrays["train"][0].shape[1]
        return hpsearch.Splits(train=arrays["train"], val=arrays["val"], test=arrays["test"])

    def model(self, config: dict[str, Any]) -> nn.Module:
        return problem.network(self.n_inputs, config)
