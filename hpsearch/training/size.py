"""How large a checkpoint of a config is, without its data and without training it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hpsearch.errors import UserCodeError
from hpsearch.job import Config
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checkpoint import capture, pack
from hpsearch.training.loop import build_optimizer
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import user_code


def checkpoint_bytes(task: Task, config: Config) -> int:
    """Bytes of a trial's last checkpoint, as its file has them: weights, buffers, and what the optimizer keeps.

    The optimizer makes one step over gradients that are zero, since most allocate what they keep in their first. Of a
    task with its own `fit`, what a report's state() would add is left out: only training tells.

    Raises:
        UserCodeError: the task's code raised, or its model takes shape only when it sees data.
    """
    with seeded(0, torch.device("cpu")):
        with user_code("model()"):
            model = task.model(copy.deepcopy(config))
        if not isinstance(model, nn.Module):
            raise UserCodeError(f"model() returned a {type(model).__name__}, not a torch.nn.Module")
        if any(isinstance(param, nn.UninitializedParameter) for param in model.parameters()):
            raise UserCodeError("the model's lazy layers take their shape from a first batch")
        optimizer = None
        if not has_own_fit(task):
            optimizer = build_optimizer(task, model, config)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.zeros_like(param)
            with user_code("optimizer.step()"):
                optimizer.step()
        return len(pack(capture(model, trial=0, seed=0, epoch=1, config=config, optimizer=optimizer)))
