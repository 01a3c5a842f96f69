"""Evaluations of single models that share a program: each alone is little more than reading the split once more.

Nothing is measured beforehand, as with ramps: there are too few batches. Every job's result is what the executor gives
for it alone, within float tolerance: what cannot be done together is done alone, where an error can be told of whom it
is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hpsearch.errors import UserCodeError
from hpsearch.job import EvaluateJob, Job, Result
from hpsearch.lane_groups import group_key
from hpsearch.training.lanes import LanesRefused, Predictor, can_ask_together, fused_outputs
from hpsearch.training.user_code import is_out_of_memory

MOST_AT_ONCE = 16  # where nobody says how many lanes
MOST_WEIGHT_BYTES = 1 << 30  # of all lanes; a network that is larger than its share keeps the device busy alone

_Begun = list[tuple[EvaluateJob, Predictor]]


class Plain(Protocol):
    """The executor: what evaluations in lanes need of it."""

    def begin_predictor(self, job: EvaluateJob) -> Predictor | Result:
        """The job's one model, or the job's result where it cannot be had."""

    def measured(self, job: EvaluateJob, output: Tensor, target: Tensor) -> Result:
        """The job's result, once its model's output is there."""

    def alone(self, job: Job) -> Result:
        """The job's result without lanes, from its beginning."""

    def at_work(self, jobs: Sequence[Job]) -> AbstractContextManager[None]:
        """The process as results depend on it; and every job tells between batches that it is alive."""

    def free_memory(self) -> None: ...


class EvaluationLanes:
    """The evaluations of one worker, over its life."""

    def __init__(self, most: int | None, device: torch.device) -> None:
        """
        Args:
            most: lanes that are asked for; None: several on a GPU, which one network leaves waiting.
        """
        self._most = most or (MOST_AT_ONCE if device.type == "cuda" else 1)
        self._alone: set[str] = set()  # groups that were found not to go together

    def may_take(self, job: EvaluateJob) -> bool:
        """Whether a job goes into lanes, as far as is known."""
        return self._most > 1 and len(job.members) == 1 and _group(job) not in self._alone

    def run(
        self, jobs: Sequence[EvaluateJob], plain: Plain, more: Callable[[Job, int], Sequence[Job]]
    ) -> Iterator[Result]:
        """One result for each of these evaluations of one group and split, and for each that is asked for."""
        waiting = deque(jobs)
        if len(waiting) < self._most:
            further = more(jobs[-1], self._most - len(waiting))
            waiting += [job for job in further if isinstance(job, EvaluateJob)]
        while waiting:
            results, alone = self._together(waiting, plain)
            yield from results
            yield from map(plain.alone, alone)

    def _together(self, waiting: deque[EvaluateJob], plain: Plain) -> tuple[list[Result], list[EvaluateJob]]:
        """Results of some of the waiting jobs, which are taken away, and those of them that are to be done alone."""
        if len(waiting) == 1 or _group(waiting[0]) in self._alone:
            alone = list(waiting)
            waiting.clear()
            return [], alone
        began = time.perf_counter()
        taken: list[EvaluateJob] = []
        found: dict[str, Result] = {}
        refused = no_memory = False
        with plain.at_work(list(waiting)):
            try:
                self._predict(waiting, plain, taken, found)
            except (UserCodeError, LanesRefused):
                refused = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                refused = no_memory = True
        if refused:
            self._alone.add(_group(taken[0]))
        # Memory that ran out beside others is no word on the job itself.
        results = {key: result for key, result in found.items() if result.outcome != "out_of_memory"}
        if no_memory or len(results) < len(found):
            plain.free_memory()
        share = (time.perf_counter() - began) / len(taken)
        alone = [job for job in taken if job.key not in results]
        return [replace(result, seconds=share) for result in results.values()], alone

    def _predict(
        self, waiting: deque[EvaluateJob], plain: Plain, taken: list[EvaluateJob], found: dict[str, Result]
    ) -> None:
        """Take as many of the waiting jobs as go together, and find their results.

        Raises:
            LanesRefused: their models cannot be asked together.
            UserCodeError: the user's code raised.
        """
        begun: _Begun = []
        n_bytes, unlike = 0, ""
        while waiting and len(begun) < self._most and n_bytes * (1 + 1 / max(1, len(begun))) <= MOST_WEIGHT_BYTES:
            taken.append(waiting.popleft())
            predictor = plain.begin_predictor(taken[-1])
            if isinstance(predictor, Result):
                found[predictor.key] = predictor
                if predictor.outcome == "out_of_memory":
                    raise LanesRefused("its models do not fit into memory together")
                continue
            _tell(predictor)
            first = begun[0][1] if begun else predictor
            reason = can_ask_together(first.model, predictor.model, predictor.device)
            if reason and not begun:
                raise LanesRefused(reason)
            if reason:
                unlike = reason
            else:
                begun.append((taken[-1], predictor))
                n_bytes += _n_bytes(predictor)
        if len(begun) < 2:
            if unlike:
                raise LanesRefused(unlike)
            if n_bytes > MOST_WEIGHT_BYTES // 2:
                raise LanesRefused(f"its weights are {n_bytes >> 20} MiB, too many to be held for several lanes")
            return
        outputs, target = fused_outputs([predictor for _, predictor in begun], begun[0][0].split)
        for (job, predictor), output in zip(begun, outputs, strict=True):
            found[job.key] = plain.measured(job, output, target.clone())  # a metric may change it
            _tell(predictor)


def _group(job: EvaluateJob) -> str:
    return group_key(job.members[0].config)


def _n_bytes(predictor: Predictor) -> int:
    return sum(tensor.nbytes for tensor in (*predictor.model.parameters(), *predictor.model.buffers()))


def _tell(predictor: Predictor) -> None:
    """A sign of life where no batch gives one."""
    if predictor.data.on_batch is not None:
        predictor.data.on_batch()
