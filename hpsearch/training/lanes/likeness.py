"""Whether two trainings are of one group: the same program over other numbers.

Tensors may differ in their values, and so may everything that reaches a step as a number per lane: rates, decays,
betas, clipping, smoothing, the probabilities of dropout layers. What decides shapes, operations or their order must
agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.training.lanes.attributes import first_that_differs
from hpsearch.training.lanes.dropout import own_dropouts
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.rules import rule_of
from hpsearch.training.lanes.stack import require_readable
from hpsearch.training.loop import DefaultTraining

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_DTYPES = (torch.float32, torch.float64)


def can_fuse(first: DefaultTraining, other: DefaultTraining) -> str:
    """Why two trainings cannot share a program, in plain words; "" when their structure lets them.

    Whether the program is right, only a trial step tells: see `find_route`.
    """
    return _unfit(first) or (_unfit(other) or _difference(first, other) if other is not first else "")


def can_ask_together(first: nn.Module, other: nn.Module, device: torch.device) -> str:
    """Why two networks on a device cannot be asked by one program; "" when their structure lets them.

    Whether what it answers is right, only their own answers tell: see `fused_outputs`.
    """
    unfit = _unfit_model(first, device)
    return unfit or (_unfit_model(other, device) or _models_differ(first, other) if other is not first else "")


def _unfit(training: DefaultTraining) -> str:
    """What of one training alone stands against lanes."""
    if reason := _unfit_model(training.model, training.device):
        return reason
    optimizer = training.optimizer
    if any(getattr(optimizer, hooks, None) for hooks in _OPTIMIZER_HOOKS):
        return "the optimizer has hooks"
    if "step" in vars(optimizer):  # by hand, or by a scheduler, which does so when it is made
        return "the optimizer's step() was replaced, by a scheduler perhaps"
    known = {id(param) for param in training.model.parameters()}
    try:
        for group in optimizer.param_groups:
            rule_of(optimizer, group)
            if any(id(param) not in known for param in group["params"]):
                return "the optimizer steps parameters that are not the model's"
        require_readable(training)
    except LanesRefused as refusal:
        return refusal.reason
    return ""


def _unfit_model(model: nn.Module, device: torch.device) -> str:
    """What of one model alone stands against lanes."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            return f"{_at(name)} is compiled"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            return f"{_at(name)} has hooks"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"{_at(name)} has momentum=None, so that it counts its batches on the host"
    for name, param in model.named_parameters():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            return f"parameter {name} has hooks"
        if param.requires_grad and param.dtype not in _DTYPES:
            return (
                f"parameter {name} is {str(param.dtype).removeprefix('torch.')}, where lanes train float32 or float64"
            )
        if param.device.type != device.type:
            return f"parameter {name} is on {param.device}, the data on {device}"
    return ""


def _difference(first: DefaultTraining, other: DefaultTraining) -> str:
    if type(first.task) is not type(other.task) or first.data is not other.data:
        return "they train other tasks"
    if first.device != other.device:
        return f"one trains on {first.device}, the other on {other.device}"
    if first.settings.batch_size != other.settings.batch_size:
        return f"batch_size is {first.settings.batch_size} and {other.settings.batch_size}"
    return _models_differ(first.model, other.model) or _optimizers_differ(first, other)


def _models_differ(first: nn.Module, other: nn.Module) -> str:
    modules, others = dict(first.named_modules()), dict(other.named_modules())
    if list(modules) != list(others):
        names = set(modules) ^ set(others)
        return f"their models have other modules ({', '.join(sorted(names)[:3]) or 'in another order'})"
    for name, module in modules.items():
        if _kind(module) is not _kind(others[name]):
            return f"{_at(name)} is a {type(module).__name__} and a {type(others[name]).__name__}"
    for what, mine, theirs in (
        ("parameter", _tensors(first.named_parameters), _tensors(other.named_parameters)),
        ("buffer", _tensors(first.named_buffers), _tensors(other.named_buffers)),
    ):
        if list(mine) != list(theirs):
            return f"their models have other {what}s, or tie them in another way"
        for key, (tensor, tie) in mine.items():
            found, found_tie = theirs[key]
            if tensor.shape != found.shape:
                return f"{what} {key} is {tuple(tensor.shape)} and {tuple(found.shape)}"
            if tensor.dtype != found.dtype or tensor.requires_grad != found.requires_grad or tie != found_tie:
                return f"{what} {key} has another dtype, another requires_grad, or is tied in another way"
    return first_that_differs(first, other, free={id(module) for module in own_dropouts(first)})


def _optimizers_differ(first: DefaultTraining, other: DefaultTraining) -> str:
    mine, theirs = first.optimizer, other.optimizer
    if type(mine) is not type(theirs):
        return f"the optimizer is {type(mine).__name__} and {type(theirs).__name__}"
    if len(mine.param_groups) != len(theirs.param_groups):
        return "their optimizers have another number of groups"
    names = {id(param): name for name, param in first.model.named_parameters()}
    their_names = {id(param): name for name, param in other.model.named_parameters()}
    for number, (group, their_group) in enumerate(zip(mine.param_groups, theirs.param_groups, strict=True)):
        if [names[id(p)] for p in group["params"]] != [their_names[id(p)] for p in their_group["params"]]:
            return f"group {number} of their optimizers has other parameters"
        if rule_of(mine, group) != rule_of(theirs, their_group):
            return f"group {number} of their optimizers has other flags"
    return ""


def _tensors(named: Any) -> dict[str, tuple[Tensor, str]]:
    """Each tensor by each of its names, with the name under which it came first."""
    first: dict[int, str] = {}
    return {name: (tensor, first.setdefault(id(tensor), name)) for name, tensor in named(remove_duplicate=False)}


def _kind(module: nn.Module) -> type[nn.Module]:
    """A module's class; each parametrized module has one made for it alone, of which the parent counts."""
    return type(module).__bases__[0] if nn.utils.parametrize.is_parametrized(module) else type(module)


def _at(name: str) -> str:
    return f"module {name}" if name else "the model"
