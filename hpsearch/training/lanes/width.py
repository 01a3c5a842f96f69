"""How many lanes pay: measured on copies for a few widths, chosen by a rule."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hpsearch.training.lanes.epochs import epoch_masks, epoch_rates, fused
from hpsearch.training.lanes.feed import lane_batches
from hpsearch.training.lanes.forward import Forward, Route
from hpsearch.training.lanes.stack import Stack
from hpsearch.training.lanes.step import Step
from hpsearch.training.lanes.trial_step import copied
from hpsearch.training.loop import DefaultTraining, training_loss
from hpsearch.training.user_code import is_out_of_memory

WIDTHS = (2, 4, 8, 16, 32, 64)
GAIN = 1.2  # lanes are worth their trouble from here on: a lane that ends early leaves its place empty for an epoch
NEARLY = 0.9  # of the best: the narrowest such width is taken, since it fills sooner and holds less memory
WIDER = 1.15  # times the rate of the width before; where a width gained less, the next is not within NEARLY's reach
QUICK_STEPS_PER_S = 500.0  # of the plain loop: from here on few lanes are passed over at first
FIRST_IF_QUICK = 8
LONGEST_S = 0.5  # of measuring; whoever is this slow has little to gain
MEMORY_SHARE = 0.8  # of what is free on a GPU
MEASURE_S = 0.01  # of one width, after its warm-up
MIN_STEPS = 3
Batch = tuple[Tensor, Tensor]
WARM_UP_STEPS_GPU = 6  # a graph is captured within
STEPS_IN_ROW_GPU = 10  # between two waits for the GPU, which would cost as much as a small step


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What some number of lanes does in a second."""

    lanes: int  # 1: the plain loop
    steps_per_s: float  # of all lanes together
    n_bytes: int  # that all lanes together took on a GPU, activations included; 0 on a CPU


@dataclass(frozen=True, kw_only=True)
class Width:
    """The choice, and what it was made from."""

    lanes: int
    measured: tuple[Measurement, ...]


def choose_width(measured: Sequence[Measurement], *, free_bytes: int | None = None) -> int:
    """The number of lanes to train with: the narrowest of nearly the best, or 1 where lanes gain too little.

    Args:
        measured: the plain loop (lanes = 1) among them.
        free_bytes: of the GPU's memory; None where that is no question.

    >>> rates = {1: 1000.0, 2: 1500.0, 8: 3000.0, 16: 3100.0}
    >>> choose_width([Measurement(lanes=n, steps_per_s=rate, n_bytes=0) for n, rate in rates.items()])
    8
    """
    plain = max(found.steps_per_s for found in measured if found.lanes == 1)
    fits = [
        found
        for found in measured
        if found.lanes > 1 and (free_bytes is None or found.n_bytes <= MEMORY_SHARE * free_bytes)
    ]
    best = max((found.steps_per_s for found in fits), default=0.0)
    if best < GAIN * plain:
        return 1
    enough = max(GAIN * plain, NEARLY * best)
    return min(found.lanes for found in fits if found.steps_per_s >= enough)


def next_width(measured: Sequence[Measurement], widths: Sequence[int] = WIDTHS) -> int | None:
    """The width that is worth measuring next; None when there is none.

    Wider as long as that gains 15 %. A quick network, which spends its time on launching operations, begins with eight
    lanes, and is asked about fewer only where eight do not pay; a slow one begins with the fewest, since each step of
    eight would take as long as eight of its own.

    Args:
        measured: in the order of measuring, the plain loop first.
        widths: in increasing order.

    >>> rates = [(1, 3000.0), (8, 8000.0), (16, 9500.0), (32, 9600.0)]
    >>> found = [Measurement(lanes=n, steps_per_s=rate, n_bytes=0) for n, rate in rates]
    >>> [next_width(found[:n]) for n in range(1, 5)]
    [8, 16, 32, None]
    """
    plain, fused = measured[0], {found.lanes: found.steps_per_s for found in measured[1:]}
    if not fused:
        quick = plain.steps_per_s >= QUICK_STEPS_PER_S
        return next((width for width in widths if not quick or width >= FIRST_IF_QUICK), max(widths, default=None))
    widest, last = max(fused), measured[-1].lanes
    before = max((rate for width, rate in fused.items() if width < widest), default=0.0)
    if last == widest:
        wider = [width for width in widths if width > widest]
        pays = fused[widest] >= GAIN * plain.steps_per_s or min(fused) == min(widths)
        if wider and pays and fused[widest] >= WIDER * before:
            return wider[0]
    if max(fused.values()) >= GAIN * plain.steps_per_s:
        return None
    # Fewer, while they do better than more: what does not fit into the processor's caches may do so by halves.
    fewer = [width for width in widths if width < min(fused)]
    return fewer[-1] if fewer and fused[last] >= max(fused.values()) else None


def best_width(
    trainings: Sequence[DefaultTraining], widths: Sequence[int] = WIDTHS, *, route: Route, seconds: float = MEASURE_S
) -> Width:
    """Measures the plain step and fused steps of some widths, and chooses.

    Steps are those of the trainings' next epochs, on copies: the trainings, and all global random state, are left as
    they were. Each width takes a warm-up step (six on a GPU) and then `seconds`, but at least three steps (thirty on a
    GPU). Which widths is `next_width`'s choice; one that would not fit into memory, or runs out of it, is the last, and
    so is one that ends after half a second. For a small network on a CPU the whole takes about a tenth of a second.

    Args:
        trainings: alike; one is enough, since lanes may be copies of the same.
        widths: numbers of lanes above 1, in increasing order.
        route: as found by `find_route` for them.
        seconds: of measuring each width.
    """
    device = trainings[0].device
    free = None
    if device.type == "cuda":  # what this process holds unused is free to it
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    began = time.perf_counter()
    with fused(trainings):
        measured = [_measured(1, lambda: _plain_steps(copied(trainings[0])), device, seconds)]
        while (width := next_width(measured, widths)) is not None and time.perf_counter() - began < LONGEST_S:
            n_bytes = measured[-1].n_bytes * width // measured[-1].lanes
            if free is not None and n_bytes > MEMORY_SHARE * free:
                break
            try:
                lanes = [trainings[i % len(trainings)] for i in range(width)]
                measured.append(_measured(width, partial(_fused_steps, lanes, route), device, seconds))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
    return Width(lanes=choose_width(measured, free_bytes=free), measured=tuple(measured))


def _measured(lanes: int, begin: Callable[[], Callable[[], None]], device: torch.device, seconds: float) -> Measurement:
    """
    Args:
        begin: takes the memory that is wanted, and gives what makes a step.
    """
    gpu = device.type == "cuda"
    before = 0
    # One thread's own time, where that is all there is: what else the machine does is not the network's.
    clock = time.thread_time if not gpu and torch.get_num_threads() == 1 else time.perf_counter
    if gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    step = begin()
    for _ in range(WARM_UP_STEPS_GPU if gpu else 1):
        step()
    in_row = STEPS_IN_ROW_GPU if gpu else 1
    took: list[float] = []  # by a step, the fastest of which counts: a busy machine only ever adds
    while sum(took) * in_row < seconds or len(took) < MIN_STEPS:
        if gpu:
            torch.cuda.synchronize(device)
        start = clock()
        for _ in range(in_row):
            step()
        if gpu:
            torch.cuda.synchronize(device)
        took.append((clock() - start) / in_row)
    n_bytes = torch.cuda.max_memory_allocated(device) - before if gpu else 0
    return Measurement(lanes=lanes, steps_per_s=lanes / min(took), n_bytes=n_bytes)


def _plain_steps(training: DefaultTraining) -> Callable[[], None]:
    """What makes a step of a training of one's own, as its loop does."""
    model, optimizer, clip = training.model, training.optimizer, training.settings.grad_clip_norm
    loss_of = training_loss(training.task, training.data.info.outputs, training.settings.label_smoothing)
    trained = [param for param in model.parameters() if param.requires_grad]
    batches = cycle(
        lambda: training.data.train_batches(
            batch_size=training.settings.batch_size,
            seed=training.seed,
            epoch=training.epoch + 1,
            shuffle=training.shuffle,
            augment=training.augment,
        )
    )
    model.train()

    def step() -> None:
        inputs, target = next(batches)
        for param in trained:
            param.grad = None
        loss = loss_of(model(inputs), target)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()

    return step


def _fused_steps(lanes: Sequence[DefaultTraining], route: Route) -> Callable[[], None]:
    """What makes a step of so many lanes, which leaves the trainings alone."""
    stack = Stack(lanes, idle=route.idle)
    forward = Forward(lanes[0], stack, route)
    fused_step = Step(stack, forward)
    n_steps = lanes[0].data.n_train_batches(lanes[0].settings.batch_size)
    stack.keep()  # as an epoch does, for the memory
    stack.begin_epoch([lane.optimizer for lane in lanes], epoch_rates(lanes, n_steps))
    fused_step.begin_epoch(
        [lane.settings.grad_clip_norm for lane in lanes], [lane.settings.label_smoothing for lane in lanes]
    )
    epochs = [lane.epoch + 1 for lane in lanes]
    masks = epoch_masks(lanes, epochs)
    batches = cycle(lambda: lane_batches(lanes, epochs))
    steps = itertools.cycle(range(n_steps))

    def step() -> None:
        inputs, target = next(batches)
        t = next(steps)
        plan = forward.plan(inputs)
        fused_step(t, inputs, target, masks.draw(plan, n_steps - t) if plan else [], plan)

    return step


def cycle(begin: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Batches of an epoch, begun again whenever it ends."""
    while True:
        yield from begin()
