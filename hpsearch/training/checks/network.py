"""One network, asked the questions that a careful person asks before training it.

Each check is a few forward and backward passes on a few rows. They run in an order in which a failure explains the
later ones: what cannot be built is not asked whether it learns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.checks import NAMES, Check, Status
from hpsearch.errors import UserCodeError
from hpsearch.job import Config
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checks.modes import check_modes
from hpsearch.training.checks.watch import Activation, LayerWatch
from hpsearch.training.data import StudyData, check_output, epoch_seed
from hpsearch.training.loop import build_model, build_optimizer, checked_loss, training_loss
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import frame_told, is_out_of_memory, user_code

BATCH = 64  # rows of a step
LEARN_ROWS = 512  # of train, that the short training sees
LEARN_STEPS = 120
OVERFIT_STEPS = 150
SAFE_LRS = (3e-3, 3e-2, 3e-4)  # of Adam: the first that overfits two examples is enough
EASIER = 0.7  # of train's loss: a val loss below it is suspicious
FEWEST_TELLING = 10  # rows of val, below which nothing is said of what a short training did on it
WILD = 3.0  # times the loss of an undecided model
DEAD = 0.5  # share of a layer's units, from which it is told

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(kw_only=True)
class _Bench:
    """A network on its rows, and how to make it anew."""

    task: Task
    data: StudyData
    config: Config
    seed: int
    device: torch.device
    where: str

    def __post_init__(self) -> None:
        self.score: Loss = training_loss(self.task, self.data.info.outputs, 0.0)  # where nothing is trained
        self.loss: Loss = checked_loss(self.task, self.data, self.score)
        self.inputs, self.target = next(self.data.train_batches(batch_size=LEARN_ROWS, seed=self.seed, epoch=1))

    def model(self) -> nn.Module:
        return build_model(self.task, self.config, self.data, seed=self.seed, device=self.device)

    def check(self, code: str, status: Status, **more: str) -> Check:
        return Check(name=NAMES[code], code=code, status=status, where=self.where, **more)

    def skipped(self, reason: str, *codes: str) -> list[Check]:
        return [self.check(code, "skipped", reason=reason) for code in codes]


def check_step(task: Task, data: StudyData, config: Config, *, seed: int, device: torch.device, where: str) -> Check:
    """One step of training at a corner of the space, with its own batch size; on a GPU with the memory that it took."""
    from hpsearch.training.loop import DefaultTraining, read_settings

    bench = _Bench(task=task, data=data, config=config, seed=seed, device=device, where=where)
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch_size = read_settings(config, n_train=data.n_rows("train")).batch_size
        if has_own_fit(task):
            model = bench.model()
        else:
            training = DefaultTraining(task, data, config, trial=0, seed=seed, device=device)
            model = training.model
            inputs, target = next(data.train_batches(batch_size=batch_size, seed=seed, epoch=1))
            with seeded(epoch_seed(seed, 1, "train"), device), user_code("training"):
                model.train()
                bench.loss(model(inputs), target).backward()
                training.optimizer.step()
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, UserCodeError):
            raise
        memory = is_out_of_memory(error)
        return bench.check(
            "builds",
            "failed",
            found="out of memory"
            if memory
            else f"{frame_told(error, type(task).model)}: {error.message}"
            if isinstance(error, UserCodeError)
            else "",
            expected="one step",
            cause="this corner is larger than the device" if memory else "the task's own code",
            look_at="lower the space's largest values, or the batch size" if memory else getattr(error, "hint", ""),
        )
    n_parameters = sum(param.numel() for param in model.parameters())
    memory_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    told = f"{n_parameters:,} parameters" + ("" if memory_gib is None else f", {memory_gib:.2f} GiB in a step")
    return bench.check("builds", "passed", found=told)


def check_network(
    task: Task, data: StudyData, config: Config, *, seed: int, device: torch.device, where: str, whole: bool = True
) -> list[Check]:
    """All checks of one network.

    Args:
        whole: False: only what tells the smallest and the largest network from the others: whether it overfits.

    Raises:
        UserCodeError: the user's code raised: not a finding, but a bug with its own frame.
    """
    bench = _Bench(task=task, data=data, config=config, seed=seed, device=device, where=where)
    if not whole:
        return [_overfit_two(bench)]
    with seeded(epoch_seed(seed, 0, "preflight"), device), user_code("training"):
        wiring = _wiring(bench)
        found = [check for check in wiring if check is not None]
        if any(check.status == "failed" and check.code in ("trains", "finite") for check in found):
            rest = set(NETWORK_CODES) - {check.code for check in found}
            return found + bench.skipped("an earlier check failed", *(c for c in NETWORK_CODES if c in rest))
        found += [_init_loss(bench), _logits(bench), _leak(bench), _eval_mode(bench)]
        if has_own_fit(task):
            some = bench.inputs[:BATCH]
            found.append(check_modes(task, data, config, some, seed=seed, device=device, where=where))
        found += _learning(bench)
        found.append(_overfit_two(bench))
    return found


NETWORK_CODES = (
    "trains", "optimizer", "finite", "gradients", "activations", "loss-at-init", "logits", "batch-leak", "eval-mode",
    "loss-falls", "beats-zero-input", "val-like-train", "inputs", "targets", "symmetry", "repeats", "overfit-two",
)  # fmt: skip


# What a single step tells


def _wiring(bench: _Bench) -> Iterator[Check | None]:
    model = bench.model()
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not named:
        total = sum(1 for _ in model.parameters())
        cause = "every parameter has requires_grad=False" if total else "layers kept in a plain list or dict"
        yield bench.check(
            "trains",
            "failed",
            found=f"0 of {total} parameters train",
            expected="1 or more",
            cause=cause,
            look_at="nn.ModuleList instead of a list; requires_grad of the last layers",
        )
        return
    yield bench.check("trains", "passed", found=f"{sum(p.numel() for p in named.values()):,} numbers train")
    yield _optimizer(bench, model, named)
    yield from _one_step(bench, model, named)


def _optimizer(bench: _Bench, model: nn.Module, named: dict[str, nn.Parameter]) -> Check:
    if has_own_fit(bench.task):
        return bench.check("optimizer", "skipped", reason="the task has its own training loop")
    optimizer = build_optimizer(bench.task, model, bench.config)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    left_out = [name for name, param in named.items() if id(param) not in held]
    if not left_out:
        return bench.check("optimizer", "passed", found=f"{len(named)} of {len(named)}")
    return bench.check(
        "optimizer",
        "failed",
        found=f"{len(left_out)} of {len(named)} parameters are left out: {_some(left_out)}",
        expected="0 left out",
        cause="optimizer() was given a part of the model",
        look_at="Task.optimizer(): all of params; freeze what is not to train with requires_grad=False",
    )


def _one_step(bench: _Bench, model: nn.Module, named: dict[str, nn.Parameter]) -> Iterator[Check | None]:
    """Forward and backward once, watched layer by layer."""
    model.train()
    with LayerWatch(model) as watch:
        loss = bench.loss(model(bench.inputs), bench.target)
    if watch.first_bad or not bool(torch.isfinite(loss)):
        yield _not_finite(bench, watch, float(loss.detach()))
        return
    loss.backward()
    bad = [name for name, param in named.items() if param.grad is not None and not bool(param.grad.isfinite().all())]
    if bad:
        yield bench.check(
            "finite",
            "failed",
            found=f"the gradient of {_some(bad)} is not finite",
            expected="finite",
            cause="a square root, logarithm or division at zero, whose slope is infinite there",
            look_at=f"what is done with the output of {bad[0].rpartition('.')[0] or bad[0]}: add a small number first",
        )
        return
    yield bench.check("finite", "passed")
    yield _gradients(bench, watch, named)
    yield _activations(bench, watch.activations)


def _not_finite(bench: _Bench, watch: LayerWatch, loss: float) -> Check:
    where = watch.first_bad or "the loss"
    again = ""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in watch.model.modules()):
        bare = bench.model().train()
        for module in bare.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = nn.Identity().forward  # type: ignore[method-assign]
        with torch.no_grad():
            clean = bool(torch.isfinite(bench.score(bare(bench.inputs), bench.target)))
        again = f"; without batch norm it is {'finite' if clean else 'not finite either'}"
    return bench.check(
        "finite",
        "failed",
        found=f"first at {where}{again}" if watch.first_bad else f"the loss is {loss}, the outputs are finite{again}",
        expected="finite",
        cause=f"a logarithm, division, square root or overflow in {where}",
        look_at=f"{where}: its inputs are finite, its output is not" if watch.first_bad else "loss()",
    )


def _gradients(bench: _Bench, watch: LayerWatch, named: dict[str, nn.Parameter]) -> Check:
    without = [name for name, param in named.items() if param.grad is None]
    detached = [name for name in without if name.rpartition(".")[0] in watch.called]
    if detached:
        return bench.check(
            "gradients",
            "failed",
            found=f"none reaches {_some(detached)}, though {'they are' if len(detached) > 1 else 'it is'} used",
            expected=f"a gradient for each of {len(named)}",
            cause="detach(), .data, .item(), no_grad() or numpy between these layers and the loss",
            look_at=f"forward(), after {detached[-1].rpartition('.')[0]}",
        )
    if without:
        return bench.check(
            "gradients",
            "warned",
            found=f"{_some(without)} {'are' if len(without) > 1 else 'is'} not used",
            expected="all in use",
            cause="layers that forward() does not call",
            look_at="call them, or leave them out",
        )
    return bench.check("gradients", "passed", found=f"{len(named)} of {len(named)}")


def _activations(bench: _Bench, activations: list[Activation]) -> Check:
    if not activations:
        return bench.check("activations", "skipped", reason="no relu, sigmoid or tanh was met")
    worst = max(activations, key=lambda each: each.bad_share)
    told = f"{worst.bad_share:.0%} of the units of {worst.where} are {worst.word} for all of {len(bench.target)} rows"
    if worst.bad_share < DEAD:
        return bench.check("activations", "passed", found=told if worst.bad_share > 0 else "")
    return bench.check(
        "activations",
        "failed" if worst.bad_share == 1.0 else "warned",
        found=told,
        expected=f"below {DEAD:.0%}",
        cause="dead ReLUs: weights or biases that start far below zero, or inputs of a wild scale"
        if worst.word == "dead"
        else "weights or inputs of too large a scale",
        look_at=f"the layer before {worst.where}: its initial weights and bias",
    )


# What an untrained network tells


def _init_loss(bench: _Bench) -> Check:
    """Against the loss of a model that is undecided: ln K for K classes, ln 2 for a yes or no."""
    if type(bench.task).loss is not Task.loss:
        return bench.check("loss-at-init", "skipped", reason="the task has a loss of its own")
    outputs, losses = bench.data.info.outputs, []
    with torch.no_grad():
        for shift in range(3):
            model = build_model(
                bench.task, bench.config, bench.data, seed=bench.seed + shift, device=bench.device
            ).train()
            losses.append(float(bench.score(model(bench.inputs), bench.target)))
    found = sorted(losses)[1]
    if outputs == "logits":
        n_classes = bench.data.info.n_classes or 2
        expected, words = math.log(n_classes), f"ln({n_classes}) = {math.log(n_classes):.3f}"
    elif outputs == "binary_logits":
        expected, words = math.log(2), "ln(2) = 0.693"
    else:
        return _init_squares(bench, found)
    if found <= WILD * expected:
        return bench.check("loss-at-init", "passed", found=f"{found:.3g}", expected=words)
    return bench.check(
        "loss-at-init",
        "failed",
        found=f"{found:.3g}",
        expected=f"about {words}",
        cause="wild initial weights: the model is sure of classes before it has seen any",
        look_at="the initialisation of the last layers; the scale of the inputs",
    )


def _init_squares(bench: _Bench, found: float) -> Check:
    """A regression that starts far from the targets' mean spends its first epochs on getting there."""
    y = bench.target.double()
    constant = float(((y - y.mean(dim=0)) ** 2).mean())
    words = f"{constant:.3g}, that of the mean"
    if found <= 10 * WILD * max(constant, 1e-12):
        return bench.check("loss-at-init", "passed", found=f"{found:.3g}", expected=words)
    return bench.check(
        "loss-at-init",
        "warned",
        found=f"{found:.3g}",
        expected=f"about {words}",
        cause="outputs start far from the targets",
        look_at=f"begin with the bias {float(y.mean()):.3g} in the last layer, or standardise the targets",
    )


def _logits(bench: _Bench) -> Check:
    """Outputs that sum to 1, or stay within (0, 1) whatever goes in, are no logits."""
    outputs = bench.data.info.outputs
    if outputs == "values":
        return bench.check("logits", "skipped", reason="outputs are numbers")
    if type(bench.task).loss is not Task.loss:
        return bench.check("logits", "skipped", reason="the task has a loss of its own")
    model = bench.model().eval()
    with torch.no_grad():
        given = [model(bench.inputs)]
        if bench.inputs.is_floating_point():
            given.append(model(100.0 * bench.inputs))
    output = torch.cat([each.reshape(-1) for each in given])
    within = bool(((output >= 0) & (output <= 1)).all()) and float(output.std()) > 0
    sums = outputs == "logits" and all(
        bool(torch.allclose(o.sum(dim=1), torch.ones(()).to(o), atol=1e-4)) for o in given
    )
    if not within:
        return bench.check("logits", "passed")
    layer = "softmax" if sums else "sigmoid"
    return bench.check(
        "logits",
        "failed",
        found="every output lies in [0, 1]" + (", each row sums to 1" if sums else ""),
        expected="numbers of any sign",
        cause=f"a {layer} at the end of the model, which the loss applies once more",
        look_at=f"leave out the last {layer}: the loss takes logits",
    )


def _leak(bench: _Bench) -> Check:
    """Evaluated beside other rows, an example's output stays what it was."""
    n = min(8, len(bench.inputs))
    if n < 3:
        return bench.check("batch-leak", "skipped", reason="train has fewer than 3 rows")
    model = bench.model().eval()
    inputs = bench.inputs[:n]
    with torch.no_grad():
        before = model(inputs)
        others = inputs.clone()
        others[1:] = bench.inputs.flip(0)[: n - 1]
        after = model(others)
        alone = model(inputs[:1]) if len(inputs) else before[:1]
    scale = float(before.abs().max()) + 1e-12
    moved = float((after[0] - before[0]).abs().max()) / scale
    apart = float((alone[0] - before[0]).abs().max()) / scale
    if math.isfinite(moved) and max(moved, apart) <= 1e-3:
        return bench.check("batch-leak", "passed", found=f"outputs move by {moved:.1g}")
    return bench.check(
        "batch-leak",
        "failed",
        found=f"output 0 changes by {max(moved, apart):.1%} when only the other inputs change",
        expected="no change, in evaluation",
        cause="a view, reshape or transpose that mixes the batch dimension, or a statistic over the batch",
        look_at="forward(): reshape with the batch first; softmax, norm and mean over dim=1 or later",
    )


def _eval_mode(bench: _Bench) -> Check:
    model = bench.model().eval()
    with torch.no_grad():
        first, second = model(bench.inputs[:BATCH]), model(bench.inputs[:BATCH])
    if torch.equal(first, second):
        return bench.check("eval-mode", "passed")
    return bench.check(
        "eval-mode",
        "failed",
        found=f"two evaluations of the same rows differ by {float((first - second).abs().max()):.2g}",
        expected="the same",
        cause="dropout or noise that does not ask whether the model is training",
        look_at="F.dropout(x, p, training=self.training), or nn.Dropout",
    )


# What a short training tells


@dataclass(kw_only=True)
class _Learned:
    model: nn.Module
    first: float
    last: float
    best_val: float
    final_val: float


def _learning(bench: _Bench) -> list[Check]:
    real, again = _learn(bench, bench.inputs), _learn(bench, bench.inputs, steps=20)
    once_more = _learn(bench, bench.inputs, steps=20)
    zeroed = _learn(bench, torch.zeros_like(bench.inputs), zero=True)
    same = all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), once_more.model.state_dict().values(), strict=True)
    )
    if not math.isfinite(real.last):
        reason = f"the loss became {real.last} at Adam's {SAFE_LRS[0]:g}"
        return bench.skipped(
            reason, "loss-falls", "beats-zero-input", "val-like-train", "inputs", "targets", "symmetry"
        )
    found = [_falls(bench, real)]
    if _telling_rows(bench) < FEWEST_TELLING:
        reason = "val has too few rows beside the commonest class"
        found += bench.skipped(reason, "beats-zero-input", "val-like-train")
    else:
        found += [_beats_zero(bench, real, zeroed), _val_like_train(bench, real)]
    found += [_sees_inputs(bench, real.model), _sees_targets(bench, real.model), _symmetry(bench, real.model)]
    found.append(
        bench.check("repeats", "passed")
        if same
        else bench.check(
            "repeats",
            "warned",
            found="20 steps from the same seed gave other weights",
            expected="the same" + ("" if bench.device.type == "cpu" else ", to tolerance"),
            cause="a random source that the seed does not reach, or kernels that are not deterministic",
            look_at="random numbers from a generator of your own: seed it in model(), or use torch's",
        )
    )
    return found


def _telling_rows(bench: _Bench) -> int:
    """Rows of val that are not of its commonest class: on the others alone, a constant is as good as any model."""
    target = bench.data.targets("val")
    if target.is_floating_point():
        return len(target)
    return len(target) - int(torch.bincount(target.reshape(-1)).max() / max(1, target[0].numel()))


def _learn(bench: _Bench, inputs: Tensor, *, steps: int = LEARN_STEPS, zero: bool = False) -> _Learned:
    """A short training at a safe rate, on LEARN_ROWS rows; val is looked at every 20 steps."""
    with seeded(epoch_seed(bench.seed, 1, "preflight"), bench.device):
        model = bench.model()
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.Adam(params, lr=SAFE_LRS[0])
        rows = itertools.cycle(range(0, len(inputs), BATCH))
        val = next(bench.data.batches("val", batch_size=LEARN_ROWS))
        first = _loss(bench, model, inputs, bench.target)
        vals = [_loss(bench, model, torch.zeros_like(val[0]) if zero else val[0], val[1])]
        for step, start in zip(range(steps), rows):  # noqa: B905 - the rows never end
            batch = slice(start, start + BATCH)
            if len(inputs[batch]) < 2:
                continue
            model.train()
            optimizer.zero_grad()
            loss = bench.loss(model(inputs[batch]), bench.target[batch])
            if not bool(torch.isfinite(loss)):
                return _Learned(
                    model=model, first=first, last=float(loss.detach()), best_val=math.inf, final_val=math.inf
                )
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if step % 20 == 19:
                vals.append(_loss(bench, model, torch.zeros_like(val[0]) if zero else val[0], val[1]))
        last = _loss(bench, model, inputs, bench.target)
    return _Learned(model=model, first=first, last=last, best_val=min(vals), final_val=vals[-1])


def _loss(bench: _Bench, model: nn.Module, inputs: Tensor, target: Tensor) -> float:
    model.eval()
    info = bench.data.info
    with torch.no_grad():
        output = model(inputs)
        own_loss = type(bench.task).loss is not Task.loss
        check_output(output, target, info.outputs, n_classes=info.n_classes, own_loss=own_loss)
        return float(bench.score(output, target))


def _falls(bench: _Bench, real: _Learned) -> Check:
    seen = f"{real.first:.3g} to {real.last:.3g} in {LEARN_STEPS} steps"
    if real.last < real.first - 1e-3 * abs(real.first):
        return bench.check("loss-falls", "passed", found=seen)
    return bench.check(
        "loss-falls",
        "warned",
        found=seen,
        expected="lower",
        cause="a sign that is wrong in the loss, or a model that does not get its inputs or targets",
        look_at="loss(); whether rows and targets are in the same order",
    )


def _beats_zero(bench: _Bench, real: _Learned, zeroed: _Learned) -> Check:
    """On val, so that rows learned by heart do not count."""
    seen = f"{real.best_val:.3g} against {zeroed.best_val:.3g} on val"
    fitted = real.last < zeroed.last - 0.02 * abs(zeroed.last)
    if real.best_val < zeroed.best_val - 0.005 * abs(zeroed.best_val):
        return bench.check("beats-zero-input", "passed", found=seen)
    if not fitted and not math.isfinite(zeroed.best_val):
        return bench.check("beats-zero-input", "skipped", reason="zeroed inputs give no finite loss")
    return bench.check(
        "beats-zero-input",
        "warned",
        found=seen,
        expected="lower with the real inputs",
        cause="inputs that say nothing of the targets: rows and labels in another order, or a hard problem"
        + (" (train was learned by heart)" if fitted else ""),
        look_at="a few rows with their targets, as the model gets them",
    )


def _val_like_train(bench: _Bench, real: _Learned) -> Check:
    seen = f"val {real.final_val:.3g}, train {real.last:.3g}"
    if real.last < 0.05 * abs(real.first) or real.final_val >= EASIER * real.last:
        return bench.check("val-like-train", "passed", found=seen)
    return bench.check(
        "val-like-train",
        "warned",
        found=seen,
        expected=f"at least {EASIER:g} of train's",
        cause="val rows that are easier, that stand in train, or have fewer classes",
        look_at="how the split was made",
    )


def _sees_inputs(bench: _Bench, model: nn.Module) -> Check:
    model.eval()
    with torch.no_grad():
        output = model(bench.inputs[:BATCH])
    spread = float((output - output[:1]).abs().max())
    if spread > 1e-6 * (float(output.abs().max()) + 1e-12):
        return bench.check("inputs", "passed")
    return bench.check(
        "inputs",
        "failed",
        found=f"{len(output)} different inputs give one output",
        expected="outputs that differ",
        cause="an input that is overwritten or multiplied by zero, or layers that all saturate",
        look_at="forward(): is its argument used?",
    )


def _sees_targets(bench: _Bench, model: nn.Module) -> Check:
    if len(torch.unique(bench.target)) < 2:
        return bench.check("targets", "skipped", reason="train has one target alone")
    model.eval()
    with torch.no_grad():
        output = model(bench.inputs)
        losses = {
            float(bench.score(output, bench.target.roll(shift, dims=0))) for shift in (0, 1, 7, len(bench.target) // 2)
        }
    if len(losses) > 1:
        return bench.check("targets", "passed")
    return bench.check(
        "targets",
        "failed",
        found=f"shuffled targets give the same loss, {next(iter(losses)):.3g}",
        expected="another loss",
        cause="a loss that is computed without its target",
        look_at="loss()",
    )


def _symmetry(bench: _Bench, model: nn.Module) -> Check:
    """Units that began alike get the same gradients, and stay alike: a layer of them is one unit."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or not isinstance(weight, Tensor):
            continue
        rows = weight.detach().reshape(len(weight), -1)
        if len(rows) > 2 and weight.requires_grad and bool((rows - rows[0]).abs().max() <= 1e-7):
            return bench.check(
                "symmetry",
                "failed",
                found=f"after {LEARN_STEPS} steps all {len(rows)} units of {name} are one and the same",
                expected="units that differ",
                cause="weights that all begin at one value, zero for instance",
                look_at=f"the initialisation of {name}: random, as torch's default is",
            )
    return bench.check("symmetry", "passed")


def _overfit_two(bench: _Bench) -> Check:
    """Two examples of different target, at a fixed safe rate, without dropout."""
    pair = _two_examples(bench)
    if pair is None:
        return bench.check("overfit-two", "skipped", reason="train has no two different targets")
    inputs, target = bench.inputs[pair], bench.target[pair]
    best, goal, steps = math.inf, 0.0, 0
    with seeded(epoch_seed(bench.seed, 2, "preflight"), bench.device), user_code("training"):
        for lr in SAFE_LRS:
            model = bench.model()
            with torch.no_grad():
                start = _loss(bench, model, inputs, target)
            goal = _goal(bench, start, target)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
            for step in range(1, OVERFIT_STEPS + 1):
                _without_dropout(model)
                optimizer.zero_grad()
                loss = bench.loss(model(inputs), target)
                value = float(loss.detach())
                if not math.isfinite(value):
                    break
                if value < best:
                    best, steps = value, step
                if best <= goal:
                    return bench.check("overfit-two", "passed", found=f"loss {best:.2g} after {steps} steps")
                if not loss.requires_grad:
                    break
                loss.backward()
                optimizer.step()
    return bench.check(
        "overfit-two",
        "failed",
        found=f"loss {best:.3g} at best, in {OVERFIT_STEPS} steps of Adam at {', '.join(f'{lr:g}' for lr in SAFE_LRS)}",
        expected=f"{goal:.2g} or lower",
        cause="inputs or gradients that do not get through, or a loss that the targets do not pull down",
        look_at="forward() from its end: the last layer, then what feeds it",
    )


def _goal(bench: _Bench, start: float, target: Tensor) -> float:
    if bench.data.info.outputs == "values" and type(bench.task).loss is Task.loss:
        y = target.double()
        return 0.05 * max(float(((y - y.mean(dim=0)) ** 2).mean()), 1e-12)
    return max(0.1 * start, 0.05) if start > 0 else start - 0.5 * abs(start)


def _two_examples(bench: _Bench) -> Tensor | None:
    flat = bench.target.reshape(len(bench.target), -1)
    other = (flat != flat[0]).any(dim=1).nonzero()
    return None if not len(other) else torch.tensor([0, int(other[0])], device=bench.target.device)


def _without_dropout(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, nn.RNNBase):
            module.dropout = 0.0


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
