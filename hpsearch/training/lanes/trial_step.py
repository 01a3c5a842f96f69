"""Which route trains some trials as one program: a step by each route is compared with the unfused step, lane by lane.

What is compared: losses, gradients, buffers, and outputs in evaluation; then, from the *same* gradients, clipping and
the optimizer's rule with all that it keeps. Weights after a whole step would be the wrong thing to compare: the first
step of Adam makes plus or minus one of a gradient that is nothing but rounding.

A network in bfloat16 is compared twice. By rounding alone its gradients may differ by half of their size, where many
layers normalise batches and a rounded value decides which entry a maximum takes; so a step that is wrong in a few
entries might pass. Whether a route is right is therefore found out in float32, and of bfloat16 is only asked whether it
does the same, coarsely.

So that chance does not differ, dropout layers are given the same masks on both sides, and whatever else draws does so
from the same seed, the same in every lane.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpsearch.training.data import epoch_seed
from hpsearch.training.lanes.attributes import changed_attribute, remembered
from hpsearch.training.lanes.dropout import Drawn, LaneDropout, Masks, give_masks, rates_of, recorded
from hpsearch.training.lanes.epochs import unsaid
from hpsearch.training.lanes.feed import host_random, undrawn
from hpsearch.training.lanes.forward import Forward, Network, Outputs, Route
from hpsearch.training.lanes.likeness import can_fuse
from hpsearch.training.lanes.refusal import LanesRefused
from hpsearch.training.lanes.stack import Stack, Weights
from hpsearch.training.lanes.step import clip_lanes
from hpsearch.training.loop import DefaultTraining, checked_loss, training_loss
from hpsearch.training.precision import in_float32, is_bf16, rounding
from hpsearch.training.seeding import borrowed_rng, seed_all
from hpsearch.training.user_code import describe, is_out_of_memory

RULE_TOLERANCE = 1e-5  # from the same gradients
EVAL_ROWS = 64
REASON_CHARS = 200
_OF_FORWARD = "forward() "  # how reasons begin that are the model's own doing, whatever the route


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How far a fused step may be from the unfused one, as a share of a tensor's largest entry."""

    values: float  # losses, outputs, buffers
    gradients: float
    small: float  # a gradient below this share of the lane's largest is compared with that share instead


def tolerances(rounding: float) -> Tolerances:
    """What kernels that round so may differ by; what is wrong is off by about its own size, and found out by all.

    float32 kernels differ by 1e-6 to 1e-4. In bfloat16, of twenty small networks, values differed by at most 4
    roundings, gradients by 70, or by 125 behind six convolutions with batch norm; and gradients that are nothing but
    rounding (a bias before batch norm) were 0.3 roundings of the largest. Of twelve such convolutions the first
    gradients differ by all of their size, and they are refused.

    Args:
        rounding: as `precision.rounding` gives it.

    >>> tolerances(2**-24)
    Tolerances(values=0.001, gradients=0.001, small=0.001)
    >>> tolerances(2**-8)
    Tolerances(values=0.0625, gradients=0.75, small=0.03125)
    """
    return Tolerances(
        values=max(1e-3, 16 * rounding), gradients=max(1e-3, 192 * rounding), small=max(1e-3, 8 * rounding)
    )


def find_route(trainings: Sequence[DefaultTraining]) -> tuple[Route | None, str]:
    """The cheapest route by which a trial step of these trainings is what each would do alone; else None and why not.

    All trainings, and all global random state, are left as they were.

    Args:
        trainings: at least one; a single one is tried in two lanes.
    """
    first = trainings[0]
    for training in trainings:
        if reason := can_fuse(first, training):
            return None, reason
    lanes = list(trainings) if len(trainings) > 1 else [first, first]
    held = [(param, param.grad) for training in trainings for param in training.model.parameters()]
    with borrowed_rng(first.device), exact_kernels(first.device), unsaid():
        try:
            for param, _ in held:
                param.grad = None
            found = _found_of_precision(lanes)
            # All steps are those of copies; of a function that holds the model itself there is no copy.
            reached = any(param.grad is not None for param, _ in held)
        finally:
            for param, grad in held:
                param.grad = grad
    if reached:
        return None, "the model keeps a function that uses the model's own weights, also where a copy of it is asked"
    return found


def _found_of_precision(lanes: Sequence[DefaultTraining]) -> tuple[Route | None, str]:
    """The first route that is right, for networks of either precision."""
    if not is_bf16(lanes[0].model):
        return _found(lanes)
    try:
        exact = [_float32_twin(lane) for lane in lanes]
    except LanesRefused as refusal:
        return None, refusal.reason
    route, reason = _found(exact)
    return (None, reason) if route is None else _found(lanes, (replace(route, outputs="vmap"),))


def _float32_twin(training: DefaultTraining) -> DefaultTraining:
    twin = copied(training)
    in_float32(twin.model)
    return twin


def _found(lanes: Sequence[DefaultTraining], routes: Sequence[Route] = ()) -> tuple[Route | None, str]:
    """The first route that is right.

    Args:
        routes: to be tried; none: all that there are.
    """
    try:
        plain = _plain_steps(lanes)
    except LanesRefused as refusal:
        return None, refusal.reason
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None, f"a plain step of it raised {describe(error)}"
    reasons = []
    for route in routes or _routes(plain[0]):
        try:
            return _tried(lanes, plain, route), ""
        except LanesRefused as refusal:
            reasons.append(refusal.reason)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reasons.append(_in_plain_words(error))
    return None, next((reason for reason in reasons if reason.startswith(_OF_FORWARD)), reasons[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class _PlainStep:
    """What one training's unfused step gives, from a copy of its model and optimizer."""

    inputs: Tensor
    target: Tensor
    masks: list[Tensor]
    plan: tuple[Drawn, ...]
    loss: Tensor
    grads: dict[str, Tensor]
    idle: frozenset[str]
    buffers: dict[str, Tensor]  # after it
    after: DefaultTraining  # the copy, after it
    pads: bool  # an embedding was told of padding
    eval_inputs: Tensor
    eval_output: Tensor  # of the model before the step
    mixes: bool  # its output for a row depends on the rows beside it


class _Padding(TorchDispatchMode):
    """Looks for embeddings that are told of padding, be it by a module or by a function in forward()."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and len(args) > 2 and args[2] >= 0:
            self.found = True
        return func(*args, **(kwargs or {}))


def _routes(plain: _PlainStep) -> Iterator[Route]:
    # Summed losses give the padding's row a gradient in all lanes but the first, which a step without padding hides.
    if not plain.pads:
        yield Route(gradients="summed", idle=plain.idle)
    yield Route(gradients="each", idle=plain.idle)


def _plain_steps(trainings: Sequence[DefaultTraining]) -> list[_PlainStep]:
    first = trainings[0]
    batches = list(undrawn((_first_batch(training) for training in trainings), first.device))
    if len({(x.shape, x.dtype, y.shape, y.dtype) for x, y in batches}) > 1:
        raise LanesRefused("augment() or the Dataset gives batches of other shapes in each lane")
    val = first.data.batches("val", batch_size=min(EVAL_ROWS, first.data.n_rows("val")))
    ((eval_inputs, _),) = undrawn(islice(val, 1), first.device)
    copies = [copied(training) for training in trainings]
    dropouts = [give_masks(lane.model) for lane in copies]
    seed = epoch_seed(first.seed, first.epoch + 1, "trial-step")
    plan: tuple[Drawn, ...] = ()
    if dropouts[0]:
        spare = copied(first)
        spare_dropouts = give_masks(spare.model)
        spare.model.train()
        with torch.no_grad():
            plan = recorded(spare_dropouts, lambda: spare.model(batches[0][0].clone()))
    masks = Masks(
        [rates_of(training.model) for training in trainings],
        [epoch_seed(training.seed, training.epoch + 1, "train") for training in trainings],
        first.device,
    )
    drawn = masks.draw(plan, 1) if plan else []
    steps = []
    for lane, own_copy in enumerate(copies):
        own = [mask[lane].clone() for mask in drawn]
        steps.append(_plain_step(own_copy, dropouts[lane], batches[lane], own, plan, eval_inputs, seed))
    if len({step.idle for step in steps}) > 1:
        raise LanesRefused("gradients reach other parameters in each lane")
    return steps


def _first_batch(training: DefaultTraining) -> tuple[Tensor, Tensor]:
    """Of the training's next epoch."""
    batches = training.data.train_batches(
        batch_size=training.settings.batch_size,
        seed=training.seed,
        epoch=training.epoch + 1,
        shuffle=training.shuffle,
        augment=training.augment,
    )
    return next(batches)


def _plain_step(
    training: DefaultTraining,
    dropouts: list[LaneDropout],
    batch: tuple[Tensor, Tensor],
    masks: list[Tensor],
    plan: tuple[Drawn, ...],
    eval_inputs: Tensor,
    seed: int,
) -> _PlainStep:
    model, (inputs, target) = training.model, batch
    model.eval()
    with torch.no_grad():
        eval_output = own_output(model, eval_inputs)
        mixes = mixes_rows(model, eval_inputs, eval_output)
    model.train()
    for number, dropout in enumerate(dropouts):
        dropout.masks = [mask for mask, call in zip(masks, plan, strict=True) if call.layer == number]
        dropout.n_calls = 0
    before = remembered(model)
    for param in model.parameters():
        param.grad = None
    seed_all(seed, training.device)
    loss_of = training_loss(training.task, training.data.info.outputs, training.settings.label_smoothing)
    host_before = host_random()
    with _Padding() as padding:
        output = model(inputs.clone())
    loss = checked_loss(training.task, training.data, loss_of)(output, target.clone())
    loss.backward()
    for dropout in dropouts:
        dropout.n_calls = 0
    if host_random() != host_before:
        raise LanesRefused("forward() draws from Python's or numpy's generator, and lanes would share what it draws")
    if name := changed_attribute(before, model):
        raise LanesRefused(f"forward() changes `{name}`, which lanes would share")
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    if any(grad.is_sparse for grad in grads.values()):
        raise LanesRefused("gradients are sparse")
    idle = frozenset(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
    kept = {name: grad.clone() for name, grad in grads.items()}
    if training.settings.grad_clip_norm is not None:
        nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.grad is not None], training.settings.grad_clip_norm
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training.optimizer.step()
    return _PlainStep(
        inputs=inputs,
        target=target,
        masks=masks,
        plan=plan,
        loss=loss.detach(),
        grads=kept,
        idle=idle,
        buffers=buffers,
        after=training,
        pads=padding.found,
        eval_inputs=eval_inputs,
        eval_output=eval_output,
        mixes=mixes,
    )


def _tried(trainings: Sequence[DefaultTraining], plain: Sequence[_PlainStep], route: Route) -> Route:
    """The route, with the way in which outputs are had.

    Raises:
        LanesRefused: the fused step differs from the plain ones.
        Exception: whatever a model raises under `vmap`.
    """
    first = trainings[0]
    allowed = tolerances(rounding(first.model))
    stack = Stack(trainings, idle=route.idle)
    same = Forward(first, stack, route, randomness="same")
    smoothing = [training.settings.label_smoothing for training in trainings]
    same.set_smoothing(smoothing, smoothed=any(smoothing))
    inputs, target = torch.stack([step.inputs for step in plain]), torch.stack([step.target for step in plain])
    masks = [torch.stack(list(lanes)) for lanes in zip(*(step.masks for step in plain), strict=True)]
    plan = plain[0].plan
    outputs = outputs_route(first, stack, plain[0].eval_inputs, [step.eval_output for step in plain])
    stack.keep()
    seed_all(epoch_seed(first.seed, first.epoch + 1, "trial-step"), first.device)
    losses, grads = same.losses_and_gradients(inputs.clone(), target.clone(), masks, plan)
    for lane, step in enumerate(plain):
        _require_close("its loss", losses[lane], step.loss.reshape(()), lane, allowed.values)
        largest = max((float(grad.abs().max()) for grad in step.grads.values() if grad.numel()), default=0.0)
        for block, given in zip(stack.blocks, grads, strict=True):
            for part, grad in zip(block.parts, given, strict=True):
                what, wanted = f"the gradient of {part.name}", step.grads[part.name]
                _require_close(what, grad[lane], wanted, lane, allowed.gradients, floor=allowed.small * largest)
        for name, values in stack.buffers.items():
            _require_close(f"buffer {name}", values[lane], step.buffers[name], lane, allowed.values)
    stack.go_back()
    different = Forward(first, stack, route)
    different.set_smoothing(smoothing, smoothed=any(smoothing))
    different.losses_and_gradients(inputs, target, masks, plan)  # as in training, where every lane draws for itself
    stack.go_back()
    _require_rule(trainings, plain, stack)
    mixes = route.mixes_rows or any(step.mixes for step in plain)
    return replace(route, outputs=outputs, mixes_rows=mixes)


def own_output(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model, in eval mode, gives alone.

    Raises:
        LanesRefused: no tensor; or it keeps something of what it was asked, which lanes would share or lose.
    """
    buffers = [(buffer, buffer._version) for buffer in model.buffers()]
    output, changed = _asked(model, inputs)
    if changed:  # a table perhaps, that is made in a first call
        output, changed = _asked(model, inputs)
    if changed:
        raise LanesRefused(f"forward() changes `{changed}`, which lanes would share")
    if any(
        old is not new or version != new._version for (old, version), new in zip(buffers, model.buffers(), strict=True)
    ):
        raise LanesRefused("forward() changes a buffer also in evaluation")
    return output


def _asked(model: nn.Module, inputs: Tensor) -> tuple[Tensor, str]:
    """A model's output, and an attribute that it changed meanwhile, if any."""
    before = remembered(model)
    output = model(inputs.clone())
    if not isinstance(output, Tensor):
        raise LanesRefused(f"the model returned a {type(output).__name__}, not a tensor")
    return output, changed_attribute(before, model)


def mixes_rows(model: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether a model's output for a row depends on the rows beside it, as where a batch is normalized by itself.

    Args:
        output: what it gave for the inputs.
    """
    half = len(inputs) // 2
    if not half:
        return False
    try:
        _require_close("", model(inputs[:half].clone()), output[:half], 0, tolerances(rounding(model)).values)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return True
    return False


def outputs_route(first: Network, stack: Stack | Weights, inputs: Tensor, wanted: Sequence[Tensor]) -> Outputs:
    """The cheapest way by which the outputs of all lanes are what each gives alone.

    Args:
        first: one of the stack's.
        inputs: the same for all.
        wanted: each lane's own output for them, in evaluation.

    Raises:
        LanesRefused: they are not, not even one lane after the other.
        Exception: what the model raises then.
    """
    allowed = tolerances(rounding(first.model))
    ways: tuple[Outputs, ...] = ("vmap", "vjp", "alone")
    for outputs in ways:
        forward = Forward(first, stack, Route(gradients="each", outputs=outputs), randomness="same")
        try:
            with forward.evaluating():
                found = forward.outputs(inputs.clone())
            for lane, output in enumerate(wanted):
                _require_close("its output", found[lane], output, lane, allowed.values)
        except Exception as error:
            if is_out_of_memory(error) or outputs == "alone":
                raise
        else:
            return outputs
    raise AssertionError


def _require_rule(trainings: Sequence[DefaultTraining], plain: Sequence[_PlainStep], stack: Stack) -> None:
    """The same gradients, clipped and stepped by, give the same weights and optimizer state."""
    rates = [
        np.array([[float(training.optimizer.param_groups[number]["lr"]) for training in trainings]])
        for number in range(len(trainings[0].optimizer.param_groups))
    ]
    stack.begin_epoch([training.optimizer for training in trainings], rates)
    with torch.no_grad():
        for block in stack.blocks:
            block.put_gradients([torch.stack([step.grads[part.name] for step in plain]) for part in block.parts])
        clips = [training.settings.grad_clip_norm for training in trainings]
        if any(clip is not None for clip in clips):
            limits = [float("inf") if clip is None else clip for clip in clips]
            clip_lanes([block.grad for block in stack.blocks], torch.tensor(limits, device=stack.device))
        for block in stack.stepped:
            block.step(0)
    for lane, (training, step) in enumerate(zip(trainings, plain, strict=True)):
        fused = copied(training)
        stack.store(lane, fused)
        theirs = dict(step.after.model.named_parameters())
        for name, param in fused.model.named_parameters():
            _require_close(f"{name} after a step", param, theirs[name], lane, RULE_TOLERANCE)
            mine, wanted = fused.optimizer.state.get(param, {}), step.after.optimizer.state.get(theirs[name], {})
            for key in set(mine) | set(wanted):
                if not isinstance(mine.get(key), Tensor) or not isinstance(wanted.get(key), Tensor):
                    raise LanesRefused(f"the optimizer keeps `{key}` of {name} in another way")
                what = f"the optimizer's {key} of {name}"
                _require_close(what, mine[key], wanted[key], lane, RULE_TOLERANCE)


def _require_close(
    what: str, found: Tensor, wanted: Tensor, lane: int, tolerance: float, *, floor: float = 1e-12
) -> None:
    if found.shape != wanted.shape:
        raise LanesRefused(f"{what} would be {tuple(found.shape)} in a lane, not {tuple(wanted.shape)}")
    if not wanted.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    finite = wanted.isfinite()
    scale = float(torch.where(finite, wanted, 0.0).abs().max())
    error = torch.where(finite, found - wanted, torch.where(found.isfinite(), 1.0, 0.0)).abs().max()
    if not float(error) <= tolerance * max(scale, floor):
        raise LanesRefused(f"{what} would be wrong in lane {lane} (by {float(error):.1g}, of {scale:.1g})")


def copied(training: DefaultTraining) -> DefaultTraining:
    """A training of its own, from where this one is.

    Raises:
        LanesRefused: the model or the optimizer cannot be copied.
    """
    made = copy.copy(training)
    try:
        made.model, made.optimizer = copy.deepcopy((training.model, training.optimizer))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise LanesRefused(f"its model cannot be copied: {describe(error)}") from error
    return made


def _in_plain_words(error: Exception) -> str:
    text = str(error)
    if ".item()" in text:
        return f"{_OF_FORWARD}reads a tensor's value (.item(), float(tensor), int(tensor)), of which lanes have several"
    if "data-dependent control flow" in text:
        return (
            f"{_OF_FORWARD}decides by the values of a tensor (if, while), which lanes cannot each do in their own way"
        )
    words = describe(error)
    return f"it cannot be run in lanes: {words if len(words) <= REASON_CHARS else words[: REASON_CHARS - 2] + ' …'}"


@contextmanager
def exact_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU, float32 without TF32, whose rounding differs from kernel to kernel by as much as is looked for."""
    if device.type != "cuda":
        yield
        return
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
