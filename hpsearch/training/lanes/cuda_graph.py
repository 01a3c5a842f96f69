"""Steps replayed from CUDA graphs: one launch in place of hundreds, for networks whose kernels are shorter than that.

A graph holds addresses, so what changes from step to step (batch, masks, coefficients) is copied into memory of its
own, and everything else (weights, buffers, optimizer state) has to stay where it was at capture. Who moves it makes a
new GraphedStep. Where capturing fails, steps go on being launched one by one, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpsearch.training.lanes.dropout import Drawn

WARM_UP_STEPS = 3  # launched before a capture: libraries allocate and choose their kernels in the first

Body = Callable[[Tensor, Tensor, Sequence[Tensor], tuple[Drawn, ...]], Tensor]
_Shapes = tuple[torch.Size, torch.Size]  # of inputs and targets; the masks' follow from them


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, ...]  # inputs, target, masks: read by the graph
    losses: Tensor  # written by it


class GraphedStep:
    """A step's body, captured once for each shape of its inputs."""

    def __init__(self, body: Body) -> None:
        """
        Args:
            body: does the same to the same memory each time, and never asks the host.
        """
        self._body = body
        self._seen: dict[_Shapes, int] = {}
        self._graphs: dict[_Shapes, _Captured] = {}
        self._works = True

    def __call__(self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]) -> Tensor:
        """One step; the losses before it, (L,), good until the next call's work is enqueued."""
        key = (inputs.shape, target.shape)
        held = self._graphs.get(key)
        if held is None:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if not self._works or seen <= WARM_UP_STEPS:
                return self._on_a_side_stream(inputs, target, masks, plan)
            held = self._capture(inputs, target, masks, plan)
            if held is None:
                return self._body(inputs, target, masks, plan)
            self._graphs[key] = held
        for place, value in zip(held.given, (inputs, target, *masks), strict=True):
            place.copy_(value, non_blocking=True)
        held.graph.replay()
        return held.losses.clone()

    def _on_a_side_stream(
        self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]
    ) -> Tensor:
        """Warm-up runs beside the default stream, as capture will: autograd remembers streams."""
        if not self._works:
            return self._body(inputs, target, masks, plan)
        device = inputs.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            losses = self._body(inputs, target, masks, plan)
        torch.cuda.current_stream(device).wait_stream(side)
        return losses

    def _capture(
        self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]
    ) -> _Captured | None:
        """The body as a graph, not yet run; None where it cannot be captured."""
        given = tuple(tensor.clone() for tensor in (inputs, target, *masks))
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others may use the GPU meanwhile.
            with torch.cuda.device(inputs.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                losses = self._body(given[0], given[1], given[2:], plan)
        except RuntimeError:  # an operation that a graph cannot hold; nothing of it was run
            self._works = False
            torch.cuda.synchronize(inputs.device)
            return None
        return _Captured(graph, given, losses)
