"""A process of `lanes.py`: takes cases as lines of JSON, times them, answers in lines of JSON.

    python benchmarks/_lane_worker.py cuda

For each case it gets ready (network, data, first epochs, which also choose how the lanes are fused), says so, waits for
a word, and trains whole epochs for as long as it was asked to. So that several processes measure at the same time.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.training.loop import DefaultTraining

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WARM_UP_EPOCHS = 2
WARM_UP_S = 0.2  # at least; a GPU's clock rises meanwhile
FEWEST_STEPS = 4  # of an epoch of large batches
LARGEST_DATA_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to time."""

    network: str
    lanes: int = 0  # 0: the plain loop
    choose: bool = False  # ask what `lanes: auto` takes, instead
    times_batch: int = 1  # the plain loop on batches so many times as large
    threads: int = 1
    seconds: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What it gave."""

    lane_steps: int  # steps of all lanes together
    seconds: float
    peak_mib: float = 0.0  # of the device's memory, where it has its own
    route: str = ""
    chosen: int = 0  # lanes, where that was asked


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is timed: whole epochs."""

    train_epoch: Callable[[], Any]
    lane_steps: int  # of an epoch
    route: str


def timed(case: Case, device: str, go: Callable[[str], None]) -> Timed:
    """Time a case on a device; `go` is told when all is ready, with the route, and returns when it is to begin."""
    import torch

    torch.set_num_threads(case.threads)
    if case.choose:
        training, *_ = trainings_of(case, device)
        go("")
        began = time.perf_counter()
        chosen = chosen_lanes(training)
        return Timed(lane_steps=0, seconds=time.perf_counter() - began, chosen=chosen)
    gpu = device == "cuda"
    if gpu:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    ready = prepared(case, device)

    def train_for(seconds: float, at_least: int) -> tuple[int, float]:
        """Epochs trained, and the seconds that they took."""
        began, n_epochs = time.perf_counter(), 0
        while n_epochs < at_least or time.perf_counter() - began < seconds:
            ready.train_epoch()
            n_epochs += 1
        if gpu:
            torch.cuda.synchronize()
        return n_epochs, time.perf_counter() - began

    train_for(WARM_UP_S, WARM_UP_EPOCHS)
    go(ready.route)
    n_epochs, seconds = train_for(case.seconds, 1)
    return Timed(
        lane_steps=n_epochs * ready.lane_steps,
        seconds=seconds,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0,
        route=ready.route,
    )


def trainings_of(case: Case, device: str) -> list[DefaultTraining]:
    """The trials of a case at their start; of the plain loop one."""
    import torch

    from benchmarks._lane_networks import NETWORKS, Synthetic, lane_config
    from hpsearch.training.data import StudyData
    from hpsearch.training.loop import DefaultTraining

    network, place = NETWORKS[case.network], torch.device(device)
    batch_size = network.batch_on(device) * case.times_batch
    n_bytes = 4 * math.prod(network.shape) * batch_size
    steps = min(network.steps_on(device), max(FEWEST_STEPS, LARGEST_DATA_BYTES // n_bytes))
    task = Synthetic(network, steps * batch_size)
    data = StudyData.load(task, study_seed=0, cut_ensemble=False, device=place)
    return [
        DefaultTraining(task, data, lane_config(network, lane, batch_size), trial=lane, seed=lane, device=place)
        for lane in range(max(1, case.lanes))
    ]


def prepared(case: Case, device: str) -> Prepared:
    """A case ready to be trained.

    Raises:
        LanesRefused: its lanes cannot be fused.
    """
    trainings = trainings_of(case, device)
    first = trainings[0]
    steps = first.data.n_train_batches(first.settings.batch_size) * len(trainings)
    if case.lanes:
        train_epoch, route = fused(trainings)
        return Prepared(train_epoch=train_epoch, lane_steps=steps, route=route)
    if case.times_batch > 1:
        return Prepared(train_epoch=bare_loop(first), lane_steps=steps, route="")
    return Prepared(train_epoch=first.train_epoch, lane_steps=steps, route="")


def bare_loop(training: DefaultTraining) -> Callable[[], None]:
    """An epoch's steps and nothing else: of a few large batches, what an epoch costs besides would be a part."""
    from torch.nn import functional

    model, optimizer, data = training.model, training.optimizer, training.data
    batch_size = training.settings.batch_size
    model.train()

    def train_epoch() -> None:
        for inputs, target in data.train_batches(batch_size=batch_size, seed=0, epoch=1):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()

    return train_epoch


def fused(trainings: Sequence[DefaultTraining]) -> tuple[Callable[[], Any], str]:
    """How to train these together for an epoch, and by which route.

    Raises:
        LanesRefused: they cannot be.
    """
    from hpsearch.training.lanes import LaneGroup, LanesRefused, find_route

    route, why = find_route(trainings[:1])  # as a worker asks: with the first trial of a group
    if route is None:
        raise LanesRefused(why)
    return LaneGroup(trainings, route).train_epoch, f"gradients {route.gradients}, outputs {route.outputs}"


def chosen_lanes(training: DefaultTraining) -> int:
    """The lanes that `lanes: auto` takes for a group; 1 where it cannot be fused, or does not pay."""
    from hpsearch.training.lanes import best_width, find_route

    route, _ = find_route([training])
    return 1 if route is None else best_width([training], route=route).lanes


def serve(device: str) -> None:
    """Answer cases until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch's compilers print is no answer

    def say(**words: object) -> None:
        print(json.dumps(words), file=answers, flush=True)

    def wait(route: str) -> None:
        say(ready=True, route=route)
        sys.stdin.readline()

    say(hello=os.getpid())
    while line := sys.stdin.readline():
        try:
            say(**asdict(timed(Case(**json.loads(line)), device, wait)))
        except Exception as error:  # out of memory, or not to be fused: both are results
            say(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        _free(device)


def _free(device: str) -> None:
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve(sys.argv[1])
