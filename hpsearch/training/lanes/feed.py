"""Training batches of many lanes side by side: each lane its own epoch, in its own order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hpsearch.training.data import BLOCK_BYTES_CPU, BLOCK_BYTES_GPU, batch_bounds
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.loop import DefaultTraining

Made = TypeVar("Made")
_DRAWN = "augment() or the Dataset draws from a global generator, of which lanes have one between them"


def lane_batches(trainings: Sequence[DefaultTraining], epochs: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The training split once for every lane, (L, B, …) and (L, B, …): lane l has the batches of its own loop.

    Args:
        trainings: of one group: the same data, the same batch size.
        epochs: of each lane.

    Raises:
        UserCodeError: augment or a Dataset raised.
        LanesRefused: the lanes' batches have different shapes, or a global generator decides what is in them.
    """
    rows = trainings[0].data.rows("train")
    if rows is None or any(training.augment is not None for training in trainings):
        return _stacked(trainings, epochs)
    return _gathered(trainings, epochs, *rows)


def _gathered(
    trainings: Sequence[DefaultTraining], epochs: Sequence[int], x: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """From tensors: the rows of several steps and all lanes are gathered by one index."""
    data, device, n_lanes = trainings[0].data, trainings[0].device, len(trainings)
    bounds = batch_bounds(len(x), trainings[0].settings.batch_size)
    orders = torch.stack(
        [
            data.train_order(seed=training.seed, epoch=epoch) if training.shuffle else torch.arange(len(x))
            for training, epoch in zip(trainings, epochs, strict=True)
        ]
    ).to(x.device)
    block_bytes = BLOCK_BYTES_CPU if device.type == "cpu" else BLOCK_BYTES_GPU
    row_bytes = x[0].numel() * x.element_size()
    per_block = max(1, block_bytes // (row_bytes * n_lanes * (bounds[0][1] - bounds[0][0])))
    for first in range(0, len(bounds), per_block):
        block = bounds[first : first + per_block]
        index = torch.cat([orders[:, start:end].reshape(-1) for start, end in block])
        sizes = [n_lanes * (end - start) for start, end in block]
        x_block = x.index_select(0, index).to(device, non_blocking=True)
        y_block = y.index_select(0, index).to(device, non_blocking=True)
        for x_step, y_step in zip(torch.split(x_block, sizes), torch.split(y_block, sizes), strict=True):
            if data.on_batch is not None:
                data.on_batch()
            yield x_step.unflatten(0, (n_lanes, -1)), y_step.unflatten(0, (n_lanes, -1))


def _stacked(trainings: Sequence[DefaultTraining], epochs: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """From each lane's own batches, where they are augmented or read item by item."""
    lanes = [
        training.data.train_batches(
            batch_size=training.settings.batch_size,
            seed=training.seed,
            epoch=epoch,
            shuffle=training.shuffle,
            augment=training.augment,
        )
        for training, epoch in zip(trainings, epochs, strict=True)
    ]
    for batches in undrawn(zip(*lanes, strict=True), trainings[0].device):
        if len({(x.shape, x.dtype, y.shape, y.dtype) for x, y in batches}) > 1:
            raise LanesRefused("augment() or the Dataset gives batches of other shapes in each lane")
        yield torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches])


def undrawn(batches: Iterator[Made], device: torch.device) -> Iterator[Made]:
    """Batches as they come, of which no global generator may decide: its one stream is not what each trial has alone.

    Raises:
        LanesRefused: one does.
    """
    host = host_random()  # read at both ends alone, for it takes longer than a small batch; networks leave it as it is
    while True:
        before = device_random(device)
        try:
            batch = next(batches)
        except StopIteration:
            break
        if any(not torch.equal(now, then) for now, then in zip(device_random(device), before, strict=True)):
            raise LanesRefused(_DRAWN)
        yield batch
    if host_random() != host:
        raise LanesRefused(_DRAWN)


def host_random() -> tuple[object, ...]:
    """Where Python's and numpy's global generators stand."""
    numpys: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - user code may draw from it
    return random.getstate(), numpys["state"]["key"].tobytes(), numpys["state"]["pos"], numpys["gauss"]


def device_random(device: torch.device) -> list[Tensor]:
    """Where torch's global generators stand: the host's, and the device's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
