"""A loop of the user's own, watched: does it validate in evaluation mode, and train in training mode?

A network with dropout or batch norm computes something else in each mode, and a loop that never calls `model.eval()`
reports a score that is not the network's; one that calls it and never `model.train()` again trains another network from
its second epoch on. Neither raises anything. So two epochs are run on a few rows, and each module's mode is noted
whenever it is called.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.checks import NAMES, Check
from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import Config
from hpsearch.task import Task
from hpsearch.training.data import StudyData
from hpsearch.training.own_loop import OwnTraining

CODE = "train-eval"
TRAIN_ROWS, VAL_ROWS = 512, 128  # of an epoch; more where a batch is larger
BATCHES = 4  # of training, at least: a loop may drop the last
EPOCHS = 2  # the second tells whether training mode comes back
LIMIT_S = 20.0  # a loop that reads its rows from elsewhere is not waited for


@dataclass(frozen=True, kw_only=True)
class Call:
    """One module was called in some mode. Equal calls are one."""

    module: str
    epoch: int
    training: bool
    with_gradients: bool


class _TooLong(BaseException):
    """The time is up. No Exception, or the user's code might take it for one of its own."""


def check_modes(
    task: Task, data: StudyData, config: Config, inputs: Tensor, *, seed: int, device: torch.device, where: str
) -> Check:
    """Whether a task's own `fit` sets the modes, where its network depends on them. Runs two epochs on a few rows.

    Args:
        inputs: some rows, on the device.
    """

    def check(status: Any, **more: str) -> Check:
        return Check(name=NAMES[CODE], code=CODE, status=status, where=where, **more)

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return check("skipped", reason="the loop runs on several GPUs together")
    training = OwnTraining(task, few_rows(data, config), config, trial=0, seed=seed, device=device)
    if not depends_on_mode(training.model, inputs):
        return check("passed", found="the output is the same in both modes")
    try:
        calls = _watched(training)
    except TrialDiverged as error:
        return check("skipped", reason=f"on {TRAIN_ROWS} rows {error.message}")
    except UserCodeError as error:
        return check("skipped", reason=f"fit() does not run on a few rows: {error.message}")
    except _TooLong:
        return check("skipped", reason=f"{EPOCHS} epochs on {TRAIN_ROWS} rows took longer than {LIMIT_S:.0f} s")
    finally:
        with suppress(UserCodeError):
            training.close()
    return judged(calls, check)


def judged(calls: set[Call], check: Callable[..., Check]) -> Check:
    """What the calls of two epochs say.

    A part that is always evaluated (a frozen backbone) or never (a head for training alone) says nothing: asked is
    whether anything that is trained in training mode is ever evaluated, and trained so in the second epoch too.
    """
    trained = {call.module for call in calls if call.training and call.with_gradients}
    if not calls:
        return check("skipped", reason="fit() called no part of the model")
    if not trained:
        return check(
            "warned",
            found="no part of the model was trained in training mode",
            expected="model.train() before training",
            cause="model.eval() before the first epoch: dropout is off, and batch norm keeps its first statistics",
            look_at="fit(): model.train() at the start of each epoch; if it is meant, allow it",
        )
    of_trained = [call for call in calls if call.module in trained]
    if all(call.training for call in of_trained):
        validated = any(not call.with_gradients for call in of_trained)
        return check(
            "failed" if validated else "warned",
            found="every call was in training mode" + (", those without gradients too" if validated else ""),
            expected="evaluation mode while validating",
            cause="model.eval() is never called: dropout and batch norm disturb every score that is reported",
            look_at="fit(): model.eval() before validating, model.train() before training",
        )
    last = [call for call in of_trained if call.epoch == EPOCHS and call.with_gradients]
    if last and not any(call.training for call in last):
        return check(
            "failed",
            found="from the second epoch on it trains in evaluation mode",
            expected="training mode in each epoch",
            cause="model.eval() before validating, and no model.train() after it",
            look_at="fit(): model.train() at the start of each epoch, not before the first alone",
        )
    return check("passed")


def depends_on_mode(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a network gives another output in training than in evaluation. The network is left as it was."""
    asked = copy.deepcopy(model)
    with torch.no_grad():
        evaluated, trained = asked.eval()(inputs), asked.train()(inputs)
    return not torch.allclose(evaluated, trained, rtol=1e-3, atol=1e-5)


def few_rows(data: StudyData, config: Config) -> StudyData:
    """Train and val, cut short: some batches of each."""
    batch_size = config.get("batch_size")
    batch = batch_size if isinstance(batch_size, int) else 0
    rows = {"train": max(TRAIN_ROWS, BATCHES * batch), "val": max(VAL_ROWS, batch)}
    few = {}
    for name in ("train", "val"):
        held = data.held("train" if name == "train" else "val")
        few[name] = held.take(torch.arange(min(len(held), rows[name])))
    return data.recut(few)


def _watched(training: OwnTraining) -> set[Call]:
    """The calls of two epochs; a copy of the model that `fit` makes is watched with it."""
    calls: set[Call] = set()
    end = time.monotonic() + LIMIT_S

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, arguments: Any) -> None:
            if time.monotonic() > end:
                raise _TooLong
            gradients = torch.is_grad_enabled()
            calls.add(Call(module=name, epoch=training.epoch + 1, training=module.training, with_gradients=gradients))

        return note

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in training.model.named_modules()]
    try:
        for _ in range(EPOCHS):
            training.train_epoch()
    finally:
        for each in hooks:  # parts of it may be another model's too
            each.remove()
    return calls
