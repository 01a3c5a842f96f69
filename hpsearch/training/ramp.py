"""The loss while the learning rate rises: one seed of an LR range test.

Only raw losses are measured here. Smoothing, the median over seeds and the suggestion are made of them afterwards, in
`lr_curve`: a running average during the ramp would shift the curve by decades.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.training.seeding import borrowed_rng


def ramp_losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    lrs: Sequence[float],
    *,
    reference: float | None = None,
    grad_clip_norm: float | None = None,
) -> list[float]:
    """Training losses of consecutive batches, each taken at its learning rate.

    Loss i is that of batch i before the step at lrs[i]. Ends at the first loss that is not finite, which is not
    included, or with the batches. Whatever happens, and also when the loss raises, the model's weights, buffers,
    gradients and train/eval modes, the optimizer's state and groups, and all global random state are afterwards what
    they were.

    Args:
        model: in any mode; trained in training mode.
        optimizer: over the model's parameters.
        batches: (inputs, target) on the model's device.
        loss_fn: of (output, target), a scalar.
        lrs: one per step.
        reference: the learning rate that the optimizer was made for; each group's own is multiplied by lr / reference,
            so that groups keep their proportions. None: all groups get lr itself.
        grad_clip_norm: as in training, also over parameters that the optimizer does not step; or None.
    """
    losses: list[float] = []
    stepped = [param for group in optimizer.param_groups for param in group["params"]]
    trained = list({id(param): param for param in (*model.parameters(), *stepped) if param.requires_grad}.values())
    with _left_as_found(model, optimizer):
        model.train()
        model.zero_grad(set_to_none=True)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        for lr, (inputs, target) in zip(lrs, batches, strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                set_lr(group, lr if reference is None else rate / reference * lr)
            loss = loss_fn(model(inputs), target)
            value = float(loss.detach())
            if not math.isfinite(value):
                break
            losses.append(value)
            for param in trained:
                param.grad = None
            loss.backward()
            if grad_clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, grad_clip_norm)
            optimizer.step()
    return losses


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Sets a parameter group's learning rate, also where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


@contextmanager
def _left_as_found(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    known = {id(tensor) for tensor in tensors}
    tensors += [param for param in trained if id(param) not in known]
    values = [tensor.detach().clone() for tensor in tensors]
    grads = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    modes = [(module, module.training) for module in model.modules()]
    state = {param: copy.deepcopy(held) for param, held in optimizer.state.items()}
    groups = [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    device = tensors[0].device if tensors else torch.device("cpu")
    with borrowed_rng(device):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for tensor, grad in grads:
                tensor.grad = grad
            for module, training in modes:
                module.training = training
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                for key in [key for key in group if key != "params" and key not in saved]:
                    del group[key]
                group.update(saved)
