"""A forward pass, watched: who first gives what is not finite, which layers are called, how many units are dead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

SATURATED = 0.99  # of a sigmoid's or tanh's range: beyond it the slope is next to nothing

RECTIFIERS = frozenset({"relu", "relu_", "relu6", "threshold"})
SQUASHERS = frozenset({"sigmoid", "sigmoid_", "tanh", "tanh_"})


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What an activation made of a batch."""

    where: str
    word: str  # "dead" or "saturated"
    bad_share: float  # of its units, dead or saturated for every row


class LayerWatch(TorchFunctionMode):
    """Watches a model's layers, and activations that are called as functions. Changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.first_bad = ""  # the first layer or function with finite inputs and an output that is not
        self.called: set[str] = set()  # names of modules whose forward ran
        self.activations: list[Activation] = []
        self._inside: list[str] = []
        self._handles: list[Any] = []
        self._counts: dict[str, int] = {}

    def __enter__(self) -> LayerWatch:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            name = getattr(function, "__name__", "")
            with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
                self._look(name, function, result.detach(), arguments)
        return result

    def _look(self, name: str, function: Callable[..., Any], result: Tensor, arguments: Any) -> None:
        if not self.first_bad and not bool(torch.isfinite(result).all()):
            given = [each for each in arguments if isinstance(each, Tensor) and each.is_floating_point()]
            if all(bool(torch.isfinite(each).all()) for each in given):
                told = (resolve_name(function) or name).rpartition(".")[2]
                layer = self._inside[-1] if self._inside else ""
                self.first_bad = f"{layer} ({told})" if layer else f"forward() ({told})"
        if name in RECTIFIERS or name in SQUASHERS:
            layer = self._inside[-1] if self._inside else ""
            self._counts[layer + name] = count = self._counts.get(layer + name, 0) + 1
            told = name.rstrip("_") + (f" {count}" if count > 1 else "")
            where = (
                layer if layer and name in layer.lower() else f"{told} in {f'layer {layer}' if layer else 'forward()'}"
            )
            self.activations.append(_activation(where, name, result))

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self.called.add(name)
            self._inside.append(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._inside:
                self._inside.pop()

        return hook


def _activation(where: str, name: str, output: Tensor) -> Activation:
    units = output.movedim(1, -1).reshape(-1, output.shape[1]) if output.ndim > 2 else output.reshape(len(output), -1)
    if name in RECTIFIERS:
        return Activation(where=where, word="dead", bad_share=float((units <= 0).all(dim=0).float().mean()))
    far = units.abs() > SATURATED if name.startswith("tanh") else (units - 0.5).abs() > SATURATED / 2
    return Activation(where=where, word="saturated", bad_share=float(far.all(dim=0).float().mean()))
