"""The weights, buffers and optimizer state of several trainings, as matrices with one row per lane.

All weights of one optimizer group and dtype lie in one matrix, so that an optimizer's rule is a handful of operations
for all of them; each parameter is a view into it. A training keeps its own model and optimizer, made by the unfused
code: what they hold is copied in when it takes a place, and back when it is asked for. So whatever a training can do
(be checkpointed, be trained on alone), it can do after it was fused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch.training.lanes import kernels, rules
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.rules import FloatArray, Progress, Rule
from hpsearch.training.loop import DefaultTraining

_UNSTEPPED = -1  # the group of parameters that need gradients, but that the optimizer was not given


@dataclass(frozen=True)
class Part:
    """One parameter's columns of a block."""

    name: str
    shape: torch.Size
    start: int
    end: int


@dataclass
class Block:
    """Parameters of one optimizer group and one dtype."""

    group: int  # in optimizer.param_groups, or _UNSTEPPED
    rule: Rule | None  # None where they are not stepped
    parts: list[Part]
    weights: Tensor  # (L, P)
    grad: Tensor
    held: dict[str, Tensor]  # what the optimizer keeps, each (L, P)
    leaves: list[Tensor]  # each part's weights, (L, *shape), views that gradients are asked of
    grad_views: list[Tensor]  # each part's gradient, likewise
    progress: list[Progress]
    needs: frozenset[str] = frozenset()
    table: Tensor | None = None  # of this epoch's steps, (T, C, L, 1)
    now: Tensor | None = None  # this step's, (C, L, 1), always in the same memory
    steppers: list[kernels.StepLane] = field(default_factory=list)

    def put_gradients(self, grads: Sequence[Tensor]) -> None:
        """Takes each leaf's gradient into the block's matrix."""
        if self.grad.device.type == "cpu":
            torch._foreach_copy_(
                self.grad_views, list(grads)
            )  # one pass, where `cat` first makes a transposed one whole
        else:
            n_lanes = len(self.weights)
            torch.cat([grad.reshape(n_lanes, -1) for grad in grads], dim=1, out=self.grad)

    def step(self, t: int) -> None:
        """Step t of the epoch, in place; the gradient is used up."""
        if self.steppers:
            for step_lane in self.steppers:
                step_lane(t)
        else:
            self.set_step(t)
            self.apply()

    def set_step(self, t: int) -> None:
        """Makes `now` the coefficients of step t."""
        if self.now is not None and self.table is not None:
            self.now.copy_(self.table[t])

    def apply(self) -> None:
        """One step by `now`: the same operations on the same memory each time."""
        assert self.rule is not None
        assert self.now is not None
        rules.apply(self.rule, self.weights, self.grad, self.held, self.now, self.needs)

    def tensors(self) -> list[Tensor]:
        return [self.weights, *self.held.values()]


class Weights:
    """The weights and buffers of several networks that are asked, not trained: a copy, one network after the other."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        """
        Args:
            models: alike, as `can_ask_together` has it.
        """
        self.device = device
        self.n_lanes = len(models)
        self.blocks: list[Block] = []  # nothing is trained
        self.constants = _all_stacked([dict(model.named_parameters()) for model in models])
        self.buffers = _all_stacked([dict(model.named_buffers()) for model in models])


class Stack:
    """The state of all lanes."""

    def __init__(self, trainings: Sequence[DefaultTraining], *, idle: frozenset[str], kernels_allowed: bool = True):
        """
        Args:
            trainings: alike, as `can_fuse` has it.
            idle: parameters that no gradient ever reaches, which an optimizer leaves alone.
            kernels_allowed: False: the rules are written out also where torch has a kernel for them.
        """
        first = trainings[0]
        self._kernels_allowed = kernels_allowed
        self.device = first.device
        self.n_lanes = len(trainings)
        self.generation = 0  # of the memory that everything lies in
        self.blocks = [
            self._block(first.optimizer, group, params) for (group, _), params in _grouped(first, idle).items()
        ]
        trained = {part.name for block in self.blocks for part in block.parts}
        named = dict(first.model.named_parameters())
        self.constants = {name: self._stacked(param) for name, param in named.items() if name not in trained}
        self.buffers = {name: self._stacked(buffer) for name, buffer in first.model.named_buffers()}
        self._kept: list[Tensor] = []
        self._kept_progress: list[list[Progress]] = []
        for place, training in enumerate(trainings):
            self.load(place, training)

    @property
    def stepped(self) -> list[Block]:
        return [block for block in self.blocks if block.rule is not None]

    def n_bytes(self) -> int:
        """Of all lanes together, gradients included."""
        return sum(tensor.nbytes for tensor in self._tensors()) + sum(block.grad.nbytes for block in self.blocks)

    @torch.no_grad()
    def load(self, place: int, training: DefaultTraining) -> None:
        """A training's state, into a lane."""
        params = dict(training.model.named_parameters())
        for block in self.blocks:
            torch.cat([params[part.name].detach().reshape(-1) for part in block.parts], out=block.weights[place])
            if block.rule is None:
                continue
            states = [training.optimizer.state.get(params[part.name], {}) for part in block.parts]
            for name, values in block.held.items():
                row = values[place]
                if all(isinstance(state.get(name), Tensor) for state in states):
                    torch.cat([state[name].detach().to(self.device).reshape(-1) for state in states], out=row)
                else:
                    row.zero_()
            block.progress[place] = read_progress(block.rule, states)
        for name, values in self.constants.items():
            values[place].copy_(params[name])
        for name, buffer in training.model.named_buffers():
            self.buffers[name][place].copy_(buffer)

    @torch.no_grad()
    def store(self, place: int, training: DefaultTraining, *, weights_only: bool = False) -> None:
        """A lane's state, into its training: weights, buffers, and the optimizer's state as torch would keep it."""
        params = dict(training.model.named_parameters())
        for block in self.blocks:
            for part in block.parts:
                params[part.name].copy_(block.weights[place, part.start : part.end].view(part.shape))
            if block.rule is None or weights_only or not block.progress[place].steps:
                continue
            group = training.optimizer.param_groups[block.group]
            for part in block.parts:
                _write_state(training.optimizer, group, params[part.name], block, part, place)
        for name, values in self.constants.items():  # not trained, but forward() may change them
            params[name].copy_(values[place])
        for name, buffer in training.model.named_buffers():
            buffer.copy_(self.buffers[name][place])

    @torch.no_grad()
    def resize(self, places: Sequence[int]) -> None:
        """Keeps these lanes, in this order; a place of -1 is a new lane, to be loaded."""
        index = torch.tensor([max(place, 0) for place in places], device=self.device)
        self.n_lanes = len(places)
        self.generation += 1
        self._kept = []
        for block in self.blocks:
            block.weights = block.weights.index_select(0, index)
            block.grad = torch.zeros_like(block.weights)
            block.held = {name: values.index_select(0, index) for name, values in block.held.items()}
            block.leaves = [view.requires_grad_() for view in _views(block.weights, block.parts)]
            block.grad_views = _views(block.grad, block.parts)
            block.progress = [block.progress[place] if place >= 0 else Progress() for place in places]
        self.constants = {name: values.index_select(0, index) for name, values in self.constants.items()}
        self.buffers = {name: values.index_select(0, index) for name, values in self.buffers.items()}

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers all lanes as they are, for `go_back`."""
        tensors = self._tensors()
        if not self._kept:
            self._kept = [torch.empty_like(tensor) for tensor in tensors]
        for kept, tensor in zip(self._kept, tensors, strict=True):
            kept.copy_(tensor)
        self._kept_progress = [block.progress for block in self.blocks]

    @torch.no_grad()
    def go_back(self) -> None:
        """All lanes as they were at `keep`."""
        for kept, tensor in zip(self._kept, self._tensors(), strict=True):
            tensor.copy_(kept)
        for block, progress in zip(self.blocks, self._kept_progress, strict=True):
            block.progress = progress

    def begin_epoch(self, optimizers: Sequence[torch.optim.Optimizer], lrs: Sequence[FloatArray]) -> None:
        """Prepares the steps of an epoch.

        Args:
            optimizers: of each lane; everything but the rates is read from them.
            lrs: of each optimizer group, the rates (T, L).
        """
        for block in self.stepped:
            assert block.rule is not None
            groups = [optimizer.param_groups[block.group] for optimizer in optimizers]
            lrs_TL = lrs[block.group]
            # On a GPU what was needed once is done ever after (to no effect), or each refill could ask for new graphs.
            before = block.needs if self.device.type == "cuda" else frozenset()
            block.needs = before | rules.uses(block.rule, groups)
            table_TCL, after = rules.coefficients(block.rule, groups, lrs_TL, block.progress)
            if self._kernels_allowed and kernels.has_kernel(block.rule, block.weights):
                block.steppers = kernels.lane_steps(
                    block.rule,
                    groups,
                    lrs_TL,
                    block.progress,
                    weights=block.weights,
                    grad=block.grad,
                    held=block.held,
                )
                block.table = None
            else:
                block.steppers = []
                table = torch.from_numpy(np.ascontiguousarray(table_TCL)).to(block.weights.dtype)
                block.table = table.unsqueeze(-1).to(self.device)
                if block.now is None or block.now.shape != block.table.shape[1:]:
                    block.now = torch.empty_like(block.table[0])
            block.progress = after

    def _block(self, optimizer: torch.optim.Optimizer, group: int, params: list[tuple[str, nn.Parameter]]) -> Block:
        rule = None if group == _UNSTEPPED else rules.rule_of(optimizer, optimizer.param_groups[group])
        parts = []
        start = 0
        for name, param in params:
            parts.append(Part(name, param.shape, start, start + param.numel()))
            start += param.numel()
        weights = torch.zeros(self.n_lanes, start, dtype=params[0][1].dtype, device=self.device)
        grad = torch.zeros_like(weights)
        return Block(
            group=group,
            rule=rule,
            parts=parts,
            weights=weights,
            grad=grad,
            held={} if rule is None else {name: torch.zeros_like(weights) for name in rule.held},
            leaves=[view.requires_grad_() for view in _views(weights, parts)],
            grad_views=_views(grad, parts),
            progress=[Progress() for _ in range(self.n_lanes)],
        )

    def _stacked(self, tensor: Tensor) -> Tensor:
        return torch.zeros((self.n_lanes, *tensor.shape), dtype=tensor.dtype, device=self.device)

    def _tensors(self) -> list[Tensor]:
        trained = (tensor for block in self.blocks for tensor in block.tensors())
        return [*trained, *self.constants.values(), *self.buffers.values()]


@torch.no_grad()
def _all_stacked(named: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each name's tensors of all lanes, (L, …)."""
    return {name: torch.stack([tensors[name].detach() for tensors in named]) for name in named[0]}


def read_progress(rule: Rule, states: Sequence[Mapping[str, Any]]) -> Progress:
    """Where an optimizer stands, from what it keeps for each parameter of a block.

    Raises:
        LanesRefused: not all of them stand at the same step.
    """
    if not states:
        return Progress()
    if rule.kind == "sgd":  # counts no steps; what matters is whether there was one
        found = {float(isinstance(state.get("momentum_buffer"), Tensor)) for state in states}
    else:
        found = {float(state["step"]) if "step" in state else 0.0 for state in states}
    products = {float(state["mu_product"]) for state in states if "mu_product" in state} or {1.0}
    if len(found) > 1 or len(products) > 1:
        raise LanesRefused("the optimizer has not stepped all of its parameters equally often")
    return Progress(steps=int(found.pop()), mu_product=products.pop())


def _views(matrix: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Each part's columns of a matrix (L, P), in its own shape: (L, *shape)."""
    return [matrix[:, part.start : part.end].view(len(matrix), *part.shape) for part in parts]


def _write_state(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    param: nn.Parameter,
    block: Block,
    part: Part,
    place: int,
) -> None:
    """One parameter's entry of the optimizer's state, as torch would have it after as many steps."""
    assert block.rule is not None
    state = optimizer.state[param]
    progress = block.progress[place]
    if block.rule.kind != "sgd":
        _write_number(state, "step", float(progress.steps), group, param)
    if block.rule.kind == "nadam":
        _write_number(state, "mu_product", progress.mu_product, group, param)
    for name in rules.held_by(block.rule, group):
        values = block.held[name][place, part.start : part.end].view(part.shape)
        if not isinstance(state.get(name), Tensor):
            state[name] = torch.empty_like(param, memory_format=torch.preserve_format)
        state[name].copy_(values)


def _write_number(
    state: dict[str, Any], name: str, value: float, group: Mapping[str, Any], param: nn.Parameter
) -> None:
    if isinstance(state.get(name), Tensor):
        state[name].fill_(value)
        return
    on_device = group.get("capturable") or group.get("fused")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not group.get("fused") else torch.float32
    state[name] = torch.tensor(value, dtype=dtype, device=param.device if on_device else "cpu")


def require_readable(training: DefaultTraining) -> None:
    """Raises LanesRefused where an optimizer's state could not be taken into a stack."""
    for (group, _), params in _grouped(training, frozenset()).items():
        if group == _UNSTEPPED:
            continue
        rule = rules.rule_of(training.optimizer, training.optimizer.param_groups[group])
        states = [training.optimizer.state.get(param, {}) for _, param in params]
        # One that no gradient reaches has no state; a trial step tells which these are.
        read_progress(rule, [state for state in states if state])


def _grouped(training: DefaultTraining, idle: frozenset[str]) -> dict[tuple[int, torch.dtype], Any]:
    """The parameters that need gradients, by optimizer group and dtype, in the model's order."""
    group_of = {
        id(param): number for number, group in enumerate(training.optimizer.param_groups) for param in group["params"]
    }
    grouped: dict[tuple[int, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for name, param in training.model.named_parameters():
        if param.requires_grad and name not in idle:
            grouped.setdefault((group_of.get(id(param), _UNSTEPPED), param.dtype), []).append((name, param))
    return grouped
