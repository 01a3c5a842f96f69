"""Outputs of several models of one structure on a split, from one program.

Where they are right is not taken on trust: for the split's first rows each model is asked alone as well. Who is refused
here is asked alone for all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpsearch.job import SplitName
from hpsearch.task import Task
from hpsearch.training.data import EVAL_BATCH_BYTES, EVAL_BATCH_ROWS, StudyData
from hpsearch.training.lanes.epochs import refusing, unsaid
from hpsearch.training.lanes.feed import undrawn
from hpsearch.training.lanes.forward import Forward, Route
from hpsearch.training.lanes.likeness import can_ask_together
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.stack import Weights
from hpsearch.training.lanes.trial_step import EVAL_ROWS, exact_kernels, mixes_rows, outputs_route, own_output
from hpsearch.training.measure import DEVICE_OUTPUT_BYTES
from hpsearch.training.seeding import borrowed_rng

MOST_OUTPUT_BYTES = 512 << 20  # of all lanes for a split, which are held at once; each alone holds its own


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model in eval mode, and what it is asked about."""

    model: nn.Module
    task: Task
    data: StudyData
    device: torch.device


def fused_outputs(predictors: Sequence[Predictor], split: SplitName) -> tuple[Tensor, Tensor]:
    """Outputs of some models for a split, (L, N, …), and the targets: `split_output` of each.

    Within float tolerance of that; a model whose weights are not finite touches no other. The models, and all global
    random state, are left as they were.

    Args:
        predictors: of the same task, data and device; alike, as `can_ask_together` has it.

    Raises:
        LanesRefused: they have to be asked one by one; that also tells whether the fault is the user's.
        UserCodeError: a Dataset raised.
    """
    first = predictors[0]
    models = [predictor.model for predictor in predictors]
    for model in models:
        if reason := can_ask_together(models[0], model, first.device):
            raise LanesRefused(reason)
    with refusing(), borrowed_rng(first.device), unsaid(), torch.no_grad():
        n_rows = first.data.n_rows(split)
        inputs, _ = next(first.data.batches(split, batch_size=min(EVAL_ROWS, n_rows)))
        with exact_kernels(first.device):
            wanted = [own_output(model, inputs) for model in models]
            mixes = any(mixes_rows(model, inputs, output) for model, output in zip(models, wanted, strict=True))
            if sum(output.nbytes for output in wanted) * n_rows > MOST_OUTPUT_BYTES * len(inputs):
                raise LanesRefused(f"outputs for {n_rows} rows are too large to be held for {len(models)} lanes")
            weights = Weights(models, first.device)
            way = outputs_route(first, weights, inputs, wanted)
        if way == "alone":
            raise LanesRefused("in lanes its outputs would be wrong, or cannot be had")
        route = Route(gradients="each", outputs=way, mixes_rows=mixes)
        return split_outputs(Forward(first, weights, route), first.data, split, len(models))


def split_outputs(forward: Forward, data: StudyData, split: SplitName, n_lanes: int) -> tuple[Tensor, Tensor]:
    """All lanes' outputs for a split, (L, N, …), at least float32, and the targets, in the split's order.

    Both on the device, or on the host when the outputs are large. Batches are the smaller the more lanes there are,
    unless rows of a batch have to do with each other.
    """
    n_rows = data.n_rows(split)
    low, high = EVAL_BATCH_ROWS
    row_bytes = math.prod(data.info.input_shape) * getattr(torch, data.info.input_dtype).itemsize
    size = None if forward.route.mixes_rows else min(high, max(low, EVAL_BATCH_BYTES // (row_bytes * n_lanes)))
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    to_host = False
    with forward.evaluating():
        batches = data.batches(split, batch_size=size)
        for inputs, target in batches if data.rows(split) is not None else undrawn(batches, forward.device):
            output = forward.outputs(inputs)
            if not outputs:
                to_host = output.nbytes * n_rows > DEVICE_OUTPUT_BYTES * len(target)
            outputs.append(output.cpu() if to_host else output)
            targets.append(target.cpu() if to_host else target)
    output, target = torch.cat(outputs, dim=1), torch.cat(targets)
    return (output.float() if output.dtype in (torch.float16, torch.bfloat16) else output), target
