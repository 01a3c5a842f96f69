"""What an epoch of some lanes is made of: their rates, their masks, their global random state, their mean losses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hpsearch.errors import HpsearchError
from hpsearch.training.data import epoch_seed
from hpsearch.training.lanes.dropout import Masks, rates_of
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.rules import FloatArray
from hpsearch.training.loop import DefaultTraining
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import describe, is_out_of_memory


def epoch_rates(lanes: Sequence[DefaultTraining], n_steps: int) -> list[FloatArray]:
    """Learning rates (T, L) of each optimizer group in the lanes' next epochs, with each lane's own warm-up."""
    rates = []
    for number in range(len(lanes[0].optimizer.param_groups)):
        lrs_TL = np.empty((n_steps, len(lanes)))
        for place, lane in enumerate(lanes):
            warm_steps = round(lane.settings.warmup_epochs * n_steps)
            steps = lane.epoch * n_steps + np.arange(1, n_steps + 1)
            share = np.minimum(1.0, steps / warm_steps) if warm_steps else np.ones(n_steps)
            lrs_TL[:, place] = float(lane.optimizer.param_groups[number]["lr"]) * share
        rates.append(lrs_TL)
    return rates


def mean_losses(losses: Sequence[Tensor], sizes: Sequence[int]) -> list[float]:
    """Each lane's mean over rows, of losses (L,) of batches of so many rows; the host waits here, and only here."""
    losses_TL = torch.stack(list(losses))
    exact = torch.float32 if losses_TL.device.type == "mps" else torch.float64
    weights = torch.tensor(sizes, dtype=exact, device=losses_TL.device)
    mean: list[float] = (weights @ losses_TL.to(exact) / sum(sizes)).tolist()
    return mean


def epoch_masks(lanes: Sequence[DefaultTraining], epochs: Sequence[int]) -> Masks:
    """The dropout masks of an epoch of each lane."""
    return Masks(
        [rates_of(lane.model) for lane in lanes],
        [epoch_seed(lane.seed, epoch, "train") for lane, epoch in zip(lanes, epochs, strict=True)],
        lanes[0].device,
    )


@contextmanager
def refusing() -> Iterator[None]:
    """Makes of whatever a fused program raises a LanesRefused; not of memory that ran out, nor of our own errors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, HpsearchError | LanesRefused) or is_out_of_memory(error):
            raise
        raise LanesRefused(f"in lanes it raised {describe(error)}") from error


@contextmanager
def unsaid() -> Iterator[None]:
    """Leaves torch's word unsaid that an operation is run lane by lane."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


@contextmanager
def fused(lanes: Sequence[DefaultTraining]) -> Iterator[None]:
    """Global random state of a fused epoch; torch's word that an operation is run lane by lane stays `unsaid`."""
    first = lanes[0]
    with seeded(epoch_seed(first.seed, first.epoch + 1, "lanes"), first.device), unsaid():
        yield
