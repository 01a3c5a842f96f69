"""One training step of all lanes: losses, gradients, clipping, the optimizers' rules. Nothing in it asks the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpsearch.training.lanes.cuda_graph import GraphedStep
from hpsearch.training.lanes.dropout import Drawn
from hpsearch.training.lanes.forward import Forward
from hpsearch.training.lanes.stack import Stack


class Step:
    """Makes steps over a stack; on a GPU by replaying them from a graph."""

    def __init__(self, stack: Stack, forward: Forward, *, graphs: bool = True) -> None:
        """
        Args:
            graphs: on a GPU, capture steps into CUDA graphs where that works.
        """
        self._stack = stack
        self._forward = forward
        self._limits = torch.zeros(0)  # of gradient norms; infinite where a lane does not clip
        self._clips = self._smooths = False
        self._graphs_wanted = graphs and stack.device.type == "cuda"
        self._graphs: GraphedStep | None = None
        self._captured: object = None  # what the graphs were captured for

    def begin_epoch(self, clips: Sequence[float | None], smoothing: Sequence[float]) -> None:
        """Settings of each lane; to be called when the stack's own epoch has begun."""
        steady = self._graphs_wanted  # as with the blocks' needs: what was done once is done ever after
        self._smooths = any(smoothing) or (steady and self._smooths)
        self._forward.set_smoothing(smoothing, smoothed=self._smooths)
        limits = torch.tensor([math.inf if clip is None else clip for clip in clips], device=self._stack.device)
        if self._limits.shape == limits.shape:
            self._limits.copy_(limits)
        else:
            self._limits = limits
        self._clips = any(clip is not None for clip in clips) or (steady and self._clips)
        if self._graphs_wanted:
            needs = tuple(block.needs for block in self._stack.blocks)
            now = (self._stack.generation, needs, self._clips, self._smooths)
            if now != self._captured:
                self._graphs, self._captured = GraphedStep(self._body), now

    def __call__(
        self, t: int, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]
    ) -> Tensor:
        """Step t of the epoch; the losses before it, (L,)."""
        blocks = self._stack.stepped
        if self._graphs is not None:
            for block in blocks:
                block.set_step(t)
            return self._graphs(inputs, target, masks, plan)
        losses = self._gradients(inputs, target, masks, plan)
        with torch.no_grad():
            for block in blocks:
                block.step(t)
        return losses

    def _body(self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]) -> Tensor:
        """A step by the blocks' present coefficients: what a graph holds."""
        losses = self._gradients(inputs, target, masks, plan)
        with torch.no_grad():
            for block in self._stack.stepped:
                block.apply()
        return losses

    def _gradients(self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: tuple[Drawn, ...]) -> Tensor:
        losses, grads = self._forward.losses_and_gradients(inputs, target, masks, plan)
        with torch.no_grad():
            for block, given in zip(self._stack.blocks, grads, strict=True):
                block.put_gradients(given)
            if self._clips:
                clip_lanes([block.grad for block in self._stack.blocks], self._limits)
        return losses


def clip_lanes(grads: Sequence[Tensor], limits: Tensor) -> None:
    """Scales each lane's gradients, in place, to at most its own norm, as `nn.utils.clip_grad_norm_` does.

    Args:
        grads: matrices of one row per lane.
        limits: of each lane; an infinite one leaves the lane as it is, whatever its norm.
    """
    norms = torch.linalg.vector_norm(grads[0], dim=1)
    if len(grads) > 1:
        norms = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(grad, dim=1).to(norms.dtype) for grad in grads]), dim=0
        )
    scale = (limits / (norms + 1e-6)).clamp(max=1.0).masked_fill(limits.isinf(), 1.0).unsqueeze(1)
    for grad in grads:
        grad.mul_(scale)
