"""One model's code, run over the weights of all lanes: training losses with gradients, and outputs.

The model is a copy of one lane's, emptied: before each run the tensors that `vmap` hands in are put where its modules
look for their parameters and buffers. That is what `torch.func.functional_call` does as well, at a tenth of the cost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hpsearch.task import Task
from hpsearch.training.data import StudyData
from hpsearch.training.lanes.attributes import hide_loop_keys
from hpsearch.training.lanes.batch_norm import take_bf16
from hpsearch.training.lanes.batching import Randomness, over_lanes, shorten
from hpsearch.training.lanes.dropout import Drawn, give_masks, recorded
from hpsearch.training.lanes.losses import loss_of_lane, loss_of_lanes
from hpsearch.training.lanes.stack import Stack, Weights
from hpsearch.training.precision import is_bf16
from hpsearch.training.user_code import user_code

Outputs = Literal["vmap", "vjp", "alone"]
Slot = tuple[Any, Any]  # a container and a key: container[key] is the tensor


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a group of trials is trained as one program."""

    gradients: Literal["summed", "each"]
    """summed: one backward pass of all lanes' losses together; each: `vmap` over the gradient of one lane, slower, but
    right for what has no batching rule of its own (nn.LSTM, nn.GRU, padding_idx)."""
    outputs: Outputs = "vmap"
    """How outputs are had in evaluation; vjp: as the forward half of a gradient; alone: one lane after the other."""
    idle: frozenset[str] = frozenset()
    """Parameters that no gradient reaches, which torch's optimizers leave as they are."""
    mixes_rows: bool = False
    """A row's output in evaluation depends on the rows beside it, so batches are to be those of a trial alone."""


class Network(Protocol):
    """What is read of a lane: it is a trial in training, or a model that is only asked."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def task(self) -> Task: ...
    @property
    def data(self) -> StudyData: ...


class Forward:
    """Runs one model over the lanes of a stack."""

    def __init__(
        self, network: Network, stack: Stack | Weights, route: Route, *, randomness: Randomness = "different"
    ) -> None:
        """
        Args:
            network: one of the stack's; its model is copied.
            randomness: of what draws under `vmap`.
        """
        self._stack = stack
        self.device = stack.device
        self.route = route
        self._randomness = randomness
        self.model = copy.deepcopy(network.model)
        hide_loop_keys(self.model)
        self.dropouts = give_masks(self.model)
        shorten(self.model)
        if is_bf16(self.model):
            take_bf16(self.model)
        self.model.train()
        trained = [part.name for block in stack.blocks for part in block.parts]
        slots = _slots(self.model)
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self._slots = [slots[id(named[name])] for name in (*trained, *stack.constants, *stack.buffers)]
        self._first_buffer = len(trained) + len(stack.constants)
        self._names = [*trained, *stack.constants, *stack.buffers]
        self._changed: list[int] = []  # buffers that forward() put something else in the place of
        self._task, self._outputs = network.task, network.data.info.outputs
        self._n_trained = len(trained)
        self._plans: dict[tuple[int, ...], tuple[Drawn, ...]] = {}
        self._smoothing = torch.zeros(0)
        self.set_smoothing([0.0] * stack.n_lanes, smoothed=False)

    def set_smoothing(self, smoothing: Sequence[float], *, smoothed: bool) -> None:
        """Label smoothing of each lane; not `smoothed`: it is 0 in all."""
        given = torch.tensor(smoothing, dtype=torch.float32, device=self._stack.device)
        if self._smoothing.shape == given.shape:
            self._smoothing.copy_(given)  # in the same memory, for a captured graph reads it there
        else:
            self._smoothing = given
        self._losses = loss_of_lanes(self._task, self._outputs, smoothed=smoothed)
        self._loss = loss_of_lane(self._task, self._outputs, smoothed=smoothed)

    def plan(self, inputs: Tensor) -> tuple[Drawn, ...]:
        """The dropout calls of a training step with such inputs, (L, B, …)."""
        if not self.dropouts:
            return ()
        shape = tuple(inputs.shape[1:])
        if shape not in self._plans:
            self._put(self._lane(0, copied=True))
            with torch.no_grad():
                self._plans[shape] = recorded(self.dropouts, lambda: self.model(inputs[0].clone()))
        return self._plans[shape]

    def losses_and_gradients(
        self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: Sequence[Drawn]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Losses of all lanes, (L,), and the gradients of each block's leaves; buffers are changed as in training."""
        if self.route.gradients == "summed":
            losses, grads = self._summed(inputs, target, masks, plan)
        else:
            losses, grads = self._each(inputs, target, masks, plan)
        by_block = []
        start = 0
        for block in self._stack.blocks:
            by_block.append(grads[start : start + len(block.parts)])
            start += len(block.parts)
        return losses, by_block

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs of all lanes for the same inputs, (L, B, …)."""
        tensors = [tensor.detach() for tensor in self._tensors()]
        match self.route.outputs:
            case "vmap":
                function = torch.vmap(self._output, in_dims=(0, None), randomness=self._randomness)
                output: Tensor = function(tensors, inputs)
            case "vjp":
                output = torch.vmap(self._output_of_vjp, in_dims=(0, None), randomness=self._randomness)(
                    tensors, inputs
                )
            case "alone":
                lanes = [self._output(self._lane(i), inputs.clone()) for i in range(self._stack.n_lanes)]
                output = torch.stack(lanes)
        return output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode, then in training mode again."""
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with user_code("model.eval()"):
            self.model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # without a batching rule it is run lane by lane
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            self.model.train()

    def _summed(
        self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: Sequence[Drawn]
    ) -> tuple[Tensor, list[Tensor]]:
        n = len(self._slots)

        def run(given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            return self._output_and_buffers(given[:n], self._by_layer(given[n:-1], plan), given[-1])

        with torch.enable_grad():
            output, changed = over_lanes(run, [*self._tensors(), *masks, inputs], randomness=self._randomness)
            losses = self._losses(output, target, self._smoothing).reshape(self._stack.n_lanes)
            grads = torch.autograd.grad(losses.sum(), self._leaves(), materialize_grads=True)
        self._write_buffers(changed)
        return losses.detach(), list(grads)

    def _each(
        self, inputs: Tensor, target: Tensor, masks: Sequence[Tensor], plan: Sequence[Drawn]
    ) -> tuple[Tensor, list[Tensor]]:
        def loss_of(
            trained: list[Tensor], others: list[Tensor], masks: list[list[Tensor]], x: Tensor, y: Tensor, s: Tensor
        ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            output, changed = self._output_and_buffers([*trained, *others], masks, x)
            loss = self._loss(output, y, s).reshape(())
            return loss, (loss.detach(), [tensor.detach() for tensor in changed])

        tensors = [tensor.detach() for tensor in self._tensors()]
        gradients = torch.vmap(torch.func.grad(loss_of, has_aux=True), randomness=self._randomness)
        grads, (losses, changed) = gradients(
            tensors[: self._n_trained],
            tensors[self._n_trained :],
            self._by_layer(masks, plan),
            inputs,
            target,
            self._smoothing,
        )
        self._write_buffers(changed)
        return losses, grads

    def _output(self, tensors: list[Tensor], inputs: Tensor) -> Tensor:
        self._put(tensors)
        output: Tensor = self.model(inputs)
        return output

    def _output_of_vjp(self, tensors: list[Tensor], inputs: Tensor) -> Tensor:
        trained, others = tensors[: self._n_trained], tensors[self._n_trained :]
        output: Tensor = torch.func.vjp(lambda given: self._output([*given, *others], inputs), trained)[0]
        return output

    def _output_and_buffers(
        self, tensors: list[Tensor], masks: list[list[Tensor]], inputs: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The output, and the buffers that were replaced rather than changed in place."""
        self._put(tensors)
        for dropout, mask in zip(self.dropouts, masks, strict=True):
            dropout.masks = mask
            dropout.n_calls = 0
        output = self.model(inputs)
        self._changed = []
        changed = []
        for number in range(self._first_buffer, len(self._slots)):
            container, key = self._slots[number][0]
            if container[key] is not tensors[number]:
                self._changed.append(number)
                changed.append(container[key])
        return output, changed

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for slots, tensor in zip(self._slots, tensors, strict=True):
            for container, key in slots:
                container[key] = tensor

    def _write_buffers(self, changed: Sequence[Tensor]) -> None:
        for number, tensor in zip(self._changed, changed, strict=True):
            self._stack.buffers[self._names[number]].copy_(tensor.detach())

    def _by_layer(self, masks: Sequence[Tensor], plan: Sequence[Drawn]) -> list[list[Tensor]]:
        by_layer: list[list[Tensor]] = [[] for _ in self.dropouts]
        for mask, call in zip(masks, plan, strict=True):
            by_layer[call.layer].append(mask)
        return by_layer

    def _leaves(self) -> list[Tensor]:
        return [leaf for block in self._stack.blocks for leaf in block.leaves]

    def _tensors(self) -> list[Tensor]:
        return [*self._leaves(), *self._stack.constants.values(), *self._stack.buffers.values()]

    def _lane(self, place: int, *, copied: bool = False) -> list[Tensor]:
        return [tensor[place].detach().clone() if copied else tensor[place].detach() for tensor in self._tensors()]


def _slots(model: nn.Module) -> dict[int, list[Slot]]:
    """Where a model's modules look for each of its parameters and buffers; a tied one has several places."""
    slots: dict[int, list[Slot]] = {}
    for module in model.modules():
        containers: list[Any] = [module._parameters, module._buffers]
        for container in containers:
            for key, tensor in container.items():
                if tensor is not None:
                    slots.setdefault(id(tensor), []).append((container, key))
    return slots
