"""A batch exactly as the model receives it, made small enough to be looked at.

What a Dataset, `augment`, a wrong axis or a forgotten division by 255 did to the inputs is seen at a glance, and
nowhere but just before the network. With the default loop it is the first batch that trial 0 is trained on; with a
`fit` of the user's own, what its model is first called with in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.job import CheckJob, Config, Result
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checks.modes import few_rows
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.loop import augmentation, read_settings
from hpsearch.training.own_loop import OwnTraining
from hpsearch.training.seeding import seeded
from hpsearch.training.user_code import is_out_of_memory

EXAMPLES = 16  # of the batch, that are shown
SIDE = 128  # of a picture, in pixels at most
NUMBERS = 512  # of an example that is no picture
BINS = 48  # of the histogram
PART = 1 << 22  # numbers that are looked at together
LIMIT_S = 20.0  # for a loop of the user's own to call its model

CHANNELS = (1, 3, 4)  # of what is taken for a picture
REF = "preflight/batch.safetensors"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model was given, on the CPU; `reason` says why there is nothing."""

    inputs: Tensor | None = None  # (B, …)
    before: Tensor | None = None  # the same examples before `augment`
    target: Tensor | None = None  # None: only the user's loop knows
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A batch as it is kept: what of it is drawn, and what is told of the whole."""

    told: Mapping[str, object]  # JSON
    tensors: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # "received", and where they are known "before", "target"


def run_batch(job: CheckJob, task: Task, data: StudyData, *, device: torch.device, shuffle: bool) -> Result:
    """A batch as the job's network receives it; `job.Result` tells what is in it.

    Raises:
        UserCodeError: as `received_batch`.
    """
    try:
        found = shown(received_batch(task, data, job.config, seed=job.seed, device=device, shuffle=shuffle))
    except UserCodeError:
        raise
    except Exception as error:  # inputs that nobody foresaw: a figure is not worth a launch
        if is_out_of_memory(error):
            raise
        found = Shown(told={"reason": f"the inputs cannot be looked at ({type(error).__name__})"})
    if not found.tensors:
        return Result(key=job.key, values={"checks": [], **found.told})
    return Result(
        key=job.key, values={"checks": [], "batch": REF, **found.told}, blobs={REF: save(dict(found.tensors))}
    )


def received_batch(
    task: Task, data: StudyData, config: Config, *, seed: int, device: torch.device, shuffle: bool
) -> Batch:
    """The first batch that a trial of this config and seed is trained on.

    Raises:
        UserCodeError: the user's Dataset or `augment` raised.
    """
    if has_own_fit(task):
        return _of_own_loop(task, data, config, seed=seed, device=device)
    batch_size = read_settings(config, n_train=data.n_rows("train")).batch_size

    augment, before = augmentation(task), list[Tensor]()

    def watched(x: Tensor, generator: torch.Generator) -> Tensor:
        assert augment is not None
        before.append(x.detach().cpu().clone())  # now: it may be changed in place
        return augment(x, generator)

    with seeded(epoch_seed(seed, 1, "train"), device):  # as in training: a Dataset may draw from global state
        batches = data.train_batches(
            batch_size=batch_size, seed=seed, epoch=1, shuffle=shuffle, augment=None if augment is None else watched
        )
        inputs, target = next(iter(batches))
    return Batch(inputs=inputs.detach().cpu(), before=before[0] if before else None, target=target.cpu())


def shown(batch: Batch) -> Shown:
    """What is kept of a batch: a few examples, small, and the figures of the whole."""
    if batch.inputs is None:
        return Shown(told={"reason": batch.reason})
    if batch.inputs.is_complex():
        return Shown(told={"reason": "inputs are complex numbers"})
    if not batch.inputs.numel():
        return Shown(told={"reason": "inputs have no numbers"})
    kind, received, note = small(batch.inputs)
    tensors = {"received": received}
    if batch.before is not None:
        before = small(batch.before)
        if before[0] == kind:
            tensors["before"] = before[1]
    if batch.target is not None and batch.target[0].numel() <= SIDE:
        tensors["target"] = _plain(batch.target[:EXAMPLES]).contiguous().clone()
    told = {
        "shape": list(batch.inputs.shape),
        "dtype": str(batch.inputs.dtype).removeprefix("torch."),
        "kind": kind,
        "note": note,
        **_figures(batch.inputs),
    }
    return Shown(told=told, tensors=tensors)


def small(inputs: Tensor) -> tuple[Literal["pictures", "rows"], Tensor, str]:
    """The first examples of a batch as pictures (N, H, W) or (N, H, W, 3), or as rows (N, F), and what was left out.

    >>> kind, pictures, note = small(torch.zeros(32, 3, 256, 256))
    >>> kind, tuple(pictures.shape), note
    ('pictures', (16, 128, 128, 3), 'averaged down from 256 × 256')
    """
    x = _plain(inputs[:EXAMPLES].detach())
    if x.ndim <= 2:
        rows = x.reshape(len(x), -1)
        n = rows.shape[1]
        return "rows", rows[:, :NUMBERS].contiguous().clone(), f"the first {NUMBERS} of {n:,}" if n > NUMBERS else ""
    notes = []
    if x.ndim == 3:
        x = x.unsqueeze(1)
    while x.ndim > 4 or (x.ndim == 4 and not {x.shape[1], x.shape[-1]} & {*CHANNELS}):
        axis = 2 if x.ndim > 4 and x.shape[1] in CHANNELS else 1
        middle = x.shape[axis] // 2
        notes.append(f"index {middle} of {x.shape[axis]} along axis {axis}")
        x = x.select(axis, middle)
        if x.ndim == 3:
            x = x.unsqueeze(1)
    if x.shape[1] not in CHANNELS:
        x = x.movedim(-1, 1)
    height, width = x.shape[-2:]
    if max(height, width) > SIDE:
        size = min(height, SIDE), min(width, SIDE)
        x, how = _smaller(x, size)
        notes.append(f"{how} from {height} × {width}")
    if x.shape[1] == 4:
        notes.append("the first 3 of 4 channels")
    pictures = x[:, :3].movedim(1, -1) if x.shape[1] >= 3 else x[:, 0]
    return "pictures", pictures.contiguous().clone(), "; ".join(notes)


def _plain(x: Tensor) -> Tensor:
    """In a type that numpy has too."""
    if x.is_floating_point():
        return x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.to(torch.uint8) if x.dtype == torch.bool else x


def _smaller(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Numbers of things have no mean; their every n-th is shown."""
    if x.is_floating_point() or x.dtype == torch.uint8:
        return F.adaptive_avg_pool2d(x if x.is_floating_point() else x.float(), size), "averaged down"
    rows, columns = (torch.linspace(0, full - 1, n).long() for full, n in zip(x.shape[-2:], size, strict=True))
    return x[..., rows, :][..., columns], "thinned out"


@np.errstate(over="ignore", invalid="ignore")  # sums of numbers near the end of the floats are left out
def _figures(inputs: Tensor) -> dict[str, object]:
    """What is told of all numbers of a batch; those that are not finite are counted, and left out of the rest."""
    n, low, high, total = 0, np.inf, -np.inf, 0.0
    for numbers in _finite_parts(inputs):
        n += len(numbers)
        low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
        total += float(numbers.sum())
    told: dict[str, object] = {"n_not_finite": inputs.numel() - n}
    if not n:
        return told
    told |= {"low": low, "high": high}
    mean = total / n
    apart = np.spacing(max(abs(low), abs(high))) * BINS
    if not np.isfinite([mean, high - low]).all() or high - low <= apart:
        return told  # nothing that a histogram could show
    squares, counts = 0.0, np.zeros(BINS, dtype=np.int64)
    for numbers in _finite_parts(inputs):
        squares += float(((numbers - mean) ** 2).sum())
        counts += np.histogram(numbers, bins=BINS, range=(low, high))[0]
    if np.isfinite(squares):
        told |= {"mean": mean, "std": float(np.sqrt(squares / n)), "counts": counts.tolist()}
    return told


def _finite_parts(inputs: Tensor) -> Iterator[NDArray[np.float64]]:
    """All finite numbers as float64, in parts: a batch of pictures would take gigabytes."""
    for part in inputs.detach().reshape(-1).split(PART):
        numbers = part.double().numpy()
        finite = numbers[np.isfinite(numbers)]
        if len(finite):
            yield finite


class _Seen(BaseException):
    """The model was called. No Exception, or the user's code might take it for one of its own."""


class _TooLong(BaseException):
    """The time is up."""


def _of_own_loop(task: Task, data: StudyData, config: Config, *, seed: int, device: torch.device) -> Batch:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Batch(reason="the loop runs on several GPUs together")
    training = OwnTraining(task, few_rows(data, config), config, trial=0, seed=seed, device=device)
    end, calls = time.monotonic() + LIMIT_S, list[Tensor]()

    def hook(is_whole: bool) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if is_whole and module.training and torch.is_grad_enabled():
                calls.extend(found.detach().cpu().clone() for found in list(_tensors([arguments, keywords]))[:1])
                raise _Seen
            if time.monotonic() > end:
                raise _TooLong

        return watch

    modules = training.model.named_modules()  # by name: `fit` may train a copy
    hooks = [module.register_forward_pre_hook(hook(name == ""), with_kwargs=True) for name, module in modules]
    reason = "fit() does not train the model as a whole"
    try:
        training.train_epoch()
    except _Seen:
        reason = "fit() calls the model with something else than tensors"
    except _TooLong:
        reason = f"fit() did not train the model as a whole in {LIMIT_S:.0f} s"
    except (TrialDiverged, UserCodeError) as error:
        reason = f"fit() does not run on a few rows: {error.message}"
    finally:
        for each in hooks:  # parts of it may be another model's too
            each.remove()
        with suppress(UserCodeError):
            training.close()
    return Batch(inputs=calls[0]) if calls else Batch(reason=reason)


def _tensors(given: Any) -> Iterator[Tensor]:
    """Tensors of examples in what a model is called with, the first argument's first."""
    if isinstance(given, Tensor):
        if given.ndim and len(given):
            yield given
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _tensors(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _tensors(value)
