"""Which checkpoints are worth their room, and in which order they go where there is none.

A trial has a *last* checkpoint, to be trained on from, and a *best* one, to predict with; one file may be both. Each
has a price, computed from where its trial stands; what nobody can ask for has none. A last checkpoint spares training,
so its price is what it would cost to do without; a best one may enter the ensemble. Either can be computed again from
its trial's seed, so nothing that goes is lost but time.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from hpsearch.trial import TrialRecord

LOOK_THROUGH = 8  # all checkpoints are looked through when one in so many may have another price than last time


class Worth(IntEnum):
    """Why a checkpoint is kept; the lowest goes first."""

    NOTHING = 0  # nobody will ask for it
    REPLACED = 1  # it is being replaced by its trial's next
    LONGER = 2  # of one of the best trials, which would be trained on if max_epochs were raised
    PAUSED = 3  # its trial may still be promoted, or taken to the end by the end-game
    RUNNING = 4  # its trial is trained from it, and would be again if the worker were lost
    POOL = 5  # of a candidate for the ensemble, or of a trial that is measured whatever its rank
    BEST = 6  # of one of the few best, which an ensemble is made of; never goes


Price = tuple[int, int, float, int]
"""(Worth, epochs of training that it spares, -objective, -trial): of two, the smaller goes first."""

SortKey = tuple[bool, bool, float, int]
"""A trial's place in the ranking: TrialRecord.sort_key."""


def price_of_last(
    trial: int, epoch: int, objective: float | None, *, leased: bool, may_continue: bool, is_best: bool
) -> Price:
    """Of the checkpoint that a trial would be trained on from.

    Args:
        epoch: epochs behind it.
        objective: the trial's best; minimised.
        leased: a worker trains it.
        may_continue: it may yet be given out.
        is_best: it is among the few best of the study.
    """
    if leased:
        worth = Worth.RUNNING
    elif may_continue:
        worth = Worth.PAUSED
    elif is_best:
        worth = Worth.LONGER
    else:
        worth = Worth.NOTHING
    return (worth, epoch, 0.0 if objective is None else -objective, -trial)


def price_of_best(key: SortKey, place: int, *, pool: int, size: int, wanted: bool = False) -> Price:
    """Of the checkpoint that a trial would predict with.

    Args:
        key: the trial's.
        place: among all that have such a checkpoint, 0 for the best.
        pool: how many of the best are candidates for the ensemble.
        size: how many an ensemble has at most.
        wanted: somebody asks for it whatever its place.
    """
    spoilt, _, value, number = key
    worth = Worth.BEST if place < size else Worth.POOL if place < pool or wanted else Worth.NOTHING
    return (worth, 0 if spoilt else 1, -value, -number)


def n_kept_at_most(
    n_trials: int, rungs: Sequence[int], reduction_factor: int, *, pool: int, size: int, overtaken: float = 1.0
) -> int:
    """How many checkpoints a search keeps at once, where trials come in no particular order.

    At each rung those that are, or can yet come to be, in the best 1/reduction_factor of all that will reach it; the
    lasts of the `size` best; the bests of the pool; and what has become useless since it was looked for last.

    Args:
        rungs: epochs at which the best 1/reduction_factor go on; empty when nothing is ever paused.
        pool: candidates for the ensemble.
        size: members of the ensemble.
        overtaken: how many times more than 1/reduction_factor go on where nobody waits for the others.

    >>> n_kept_at_most(64, (1, 3, 9), 3, pool=20, size=5)
    62
    """
    lasts, entering = size, float(n_trials)
    for _ in rungs:
        going_on = int(entering) // reduction_factor
        lasts += going_on
        entering = min(float(n_trials), going_on * overtaken)
    needed = min(n_trials, lasts) + min(n_trials, pool)
    return min(2 * n_trials, needed + -(-needed // LOOK_THROUGH))


def is_among_best(trial: TrialRecord, ranked: Sequence[SortKey], size: int) -> bool:
    """Whether a trial is one of the `size` best of those ranked."""
    return len(ranked) < size or trial.sort_key <= ranked[size - 1]
