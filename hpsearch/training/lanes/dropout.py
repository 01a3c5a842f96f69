"""Dropout whose masks belong to the lane: drawn from a generator of its own, seeded as the trial's epoch is.

A mask is a function of (trial seed, epoch) and of what came before it in that epoch, whatever the number of lanes and
the lane's place. On a CPU it is, to the bit, the mask of the unfused loop, as long as `nn.Dropout` and its kin are all
that draws from torch's global generator: they draw in the same order and the same shapes. On a GPU masks are drawn for
many steps at once, so they are other masks than the unfused loop's, of the same distribution.

What draws in another way (`F.dropout` in a forward(), the dropout inside nn.LSTM or nn.MultiheadAttention) draws under
`vmap(randomness="different")`: independent in every lane, but a function of all lanes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from hpsearch.training.lanes.refusal import LanesRefused

_BLOCK_STEPS = 64
_BLOCK_BYTES = 8 << 20  # of one mask of one lane; a function of the lane alone, or masks would depend on their number


@dataclass(frozen=True)
class Drawn:
    """One call of a dropout layer in a forward pass."""

    layer: int
    shape: tuple[int, ...]  # of the mask
    strides: tuple[int, ...]  # torch draws in the order of memory
    dtype: torch.dtype


class LaneDropout(nn.Module):
    """Takes the place of an nn.Dropout: multiplies by masks that it is given, one per call."""

    def __init__(self, p: float, spatial: int) -> None:
        """
        Args:
            p: probability of a zero, for calls that are only recorded.
            spatial: dimensions of a channel that is dropped whole, 0 for single values.
        """
        super().__init__()
        self.p = p
        self.spatial = spatial
        self.masks: list[Tensor] = []
        self.n_calls = 0
        self.on_call: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.on_call is not None:
            if self.spatial:
                if x.ndim != 2 + self.spatial:
                    raise LanesRefused(f"a dropout of whole channels has {x.ndim} dimensions")
                self.on_call(x.new_empty((*x.shape[:2], *(1 for _ in range(self.spatial)))))
            else:
                self.on_call(torch.empty_like(x))
            return x
        mask = self.masks[self.n_calls]
        self.n_calls += 1
        return x * mask


# Dimensions of what is dropped whole.
_SPATIAL: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def own_dropouts(model: nn.Module) -> list[nn.Module]:
    """A model's dropout layers whose masks can be given to it, each once, in the order of its modules."""
    return [module for module in model.modules() if type(module) in _SPATIAL]


def give_masks(model: nn.Module) -> list[LaneDropout]:
    """Puts a LaneDropout in the place of each of a model's own dropout layers, in their order."""
    made: dict[int, LaneDropout] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is None or type(child) not in _SPATIAL:
                continue
            if id(child) not in made:
                made[id(child)] = LaneDropout(float(child.p), _SPATIAL[type(child)])  # type: ignore[arg-type]
            module._modules[name] = made[id(child)]
    return [module for module in model.modules() if isinstance(module, LaneDropout)]


def rates_of(model: nn.Module) -> list[float]:
    """The probabilities of a model's own dropout layers."""
    return [float(module.p) for module in own_dropouts(model)]  # type: ignore[arg-type]


class Masks:
    """The masks of an epoch: drawn for all lanes, each from its own generator."""

    def __init__(self, rates: Sequence[Sequence[float]], seeds: Sequence[int], device: torch.device) -> None:
        """
        Args:
            rates: of each lane, of each of its dropout layers.
            seeds: of each lane.
        """
        self._rates = rates
        self._device = device
        self._generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self._plan: tuple[Drawn, ...] = ()
        self._held: list[Tensor] = []  # of each call, (S, L, *shape)
        self._keeps: list[Tensor] = []
        self._shares: list[_Shares] = []  # of each call, where they are what masks are drawn from
        self._next = 0  # step within the block
        self._n_block = 0

    def draw(self, plan: tuple[Drawn, ...], steps_left: int) -> list[Tensor]:
        """The masks of the next step, each (L, *shape), already scaled; good until the next call.

        Args:
            plan: the calls of this step's forward pass, in order.
            steps_left: steps of this plan that follow in a row, this one included.
        """
        if plan != self._plan or self._next == self._n_block:
            self._draw_block(plan, steps_left)
        masks = [held[self._next] for held in self._held]
        self._next += 1
        return masks

    def _draw_block(self, plan: tuple[Drawn, ...], steps_left: int) -> None:
        n_lanes = len(self._rates)
        size = 1
        if self._device.type != "cpu" and plan:
            largest = max(torch.Size(call.shape).numel() * call.dtype.itemsize for call in plan)
            size = max(1, min(_BLOCK_STEPS, steps_left, _BLOCK_BYTES // max(1, largest)))
        if plan != self._plan or size != self._n_block:
            self._plan, self._n_block = plan, size
            self._held = [
                torch.empty_strided(
                    (size, n_lanes, *call.shape),
                    (n_lanes * math.prod(call.shape), math.prod(call.shape), *call.strides),
                    dtype=call.dtype,
                    device=self._device,
                ).fill_(1.0)
                for call in plan
            ]
            self._keeps = [self._keep(call) for call in plan]
            self._shares = []
            if self._device.type == "cpu" and bernoulli_compares_shares():
                self._shares = [_Shares(self._of(call), held) for call, held in zip(plan, self._held, strict=True)]
        self._next = 0
        for shares in self._shares:
            shares.draw(self._generators)
        if self._shares:
            return
        for call, held, keep in zip(plan, self._held, self._keeps, strict=True):
            for p, lane, generator in zip(self._of(call), range(n_lanes), self._generators, strict=True):
                if 0.0 < p < 1.0:
                    held[:, lane].bernoulli_(1.0 - p, generator=generator)
                elif p == 1.0:
                    held[:, lane].zero_()
            held.div_(keep)

    def _of(self, call: Drawn) -> list[float]:
        """The rate of a call's layer in each lane."""
        return [rates[call.layer] for rates in self._rates]

    def _keep(self, call: Drawn) -> Tensor:
        """What a mask is divided by: the probability of a one, where there is anything to scale."""
        keeps = [1.0 - p if 0.0 < p < 1.0 else 1.0 for p in self._of(call)]
        shape = (len(keeps), *(1 for _ in call.shape))
        return torch.tensor(keeps, dtype=call.dtype, device=self._device).reshape(shape)


class _Shares:
    """Masks of one call drawn as `bernoulli_` draws them, in half of its time: a share of [0, 1) for each value, all of
    which are then compared at once."""

    def __init__(self, rates: Sequence[float], held: Tensor) -> None:
        """
        Args:
            rates: of each lane.
            held: (1, L, *shape), dense in each lane; what is drawn goes there, scaled.
        """
        self._drawing = [lane for lane, p in enumerate(rates) if 0.0 < p < 1.0]
        self._held = held[0]
        # Torch draws in the order of memory, so the strides are the mask's.
        self._shares = torch.empty_strided(self._held.shape, self._held.stride(), dtype=torch.float64).zero_()
        n = self._held[0].numel()
        self._flat = self._shares.as_strided((len(rates), n), (n, 1))
        column = (len(rates), *(1 for _ in self._held.shape[1:]))
        kept = [1.0 - p if 0.0 < p < 1.0 else 2.0 * (p <= 0.0) for p in rates]  # of what is not drawn: all, or none
        self._kept = torch.tensor(kept, dtype=torch.float64).reshape(column)
        wide = torch.float64 if held.dtype == torch.float64 else torch.float32  # in which torch divides by a number
        scale = 1.0 / torch.tensor([1.0 - p if 0.0 < p < 1.0 else 1.0 for p in rates], dtype=wide)
        self._scale = scale.to(held.dtype).reshape(column)

    def draw(self, generators: Sequence[torch.Generator]) -> None:
        for lane in self._drawing:
            self._flat[lane].uniform_(generator=generators[lane])
        torch.lt(self._shares, self._kept, out=self._held)
        self._held.mul_(self._scale)


@cache
def bernoulli_compares_shares() -> bool:
    """Whether torch's `bernoulli_` on this CPU is a comparison with what `uniform_` draws; MKL's, on Intel, is not."""
    for n in (7, 5_000):  # vectors, and several threads' worth
        first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        wanted = torch.empty(n).bernoulli_(0.3, generator=first)
        shares = torch.empty(n, dtype=torch.float64).uniform_(generator=second)
        if not torch.equal(wanted, (shares < 0.3).float()) or not torch.equal(first.get_state(), second.get_state()):
            return False
    return True


def recorded(layers: Sequence[LaneDropout], forward: Callable[[], object]) -> tuple[Drawn, ...]:
    """The calls of dropout layers in a forward pass, in order; in that pass nothing is dropped."""
    calls: list[Drawn] = []

    def listener(number: int) -> Callable[[Tensor], None]:
        return lambda mask: calls.append(Drawn(number, tuple(mask.shape), mask.stride(), mask.dtype))

    try:
        for number, layer in enumerate(layers):
            layer.on_call = listener(number)
        forward()
    finally:
        for layer in layers:
            layer.on_call = None
    return tuple(calls)
