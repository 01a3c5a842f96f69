"""Preflight: what training would fail at in silence, asked before anything is spent.

`network` asks one network by a few steps of training on a few rows; `data_report` looks at the splits. Both return
plain `Check`s, and change neither the user's task nor any random state.
"""

from __future__ import annotations

from typing import Literal

import torch

from hpsearch.checks import Check
from hpsearch.job import Config
from hpsearch.task import Task
from hpsearch.training.checks.data_report import check_data
from hpsearch.training.checks.network import check_network, check_step
from hpsearch.training.data import StudyData


def run_check(
    what: Literal["data", "network", "overfit", "step"],
    task: Task,
    data: StudyData,
    config: Config,
    *,
    seed: int,
    device: torch.device,
    where: str,
) -> list[Check]:
    """The checks of one job.

    Raises:
        UserCodeError: the user's code raised.
    """
    match what:
        case "data":
            return check_data(data)
        case "network":
            return check_network(task, data, config, seed=seed, device=device, where=where)
        case "overfit":
            return check_network(task, data, config, seed=seed, device=device, where=where, whole=False)
        case "step":
            return [check_step(task, data, config, seed=seed, device=device, where=where)]
