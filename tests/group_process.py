"""One process of a group, for tests: `python -m tests.group_process SCENARIO RANK SIZE PORT OUT`.

Rank 0 does what a worker does with its executor, the others follow; each writes what came of it to OUT.RANK.json. On
the CPU, over gloo: what passes between the ranks is the same as between GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hpsearch.errors import HpsearchError
from hpsearch.job import Config, EvaluateJob, Job, Member, RampJob, Result, TrainJob
from hpsearch.task import Report, Splits, Task, Trial
from hpsearch.training.executor import TorchExecutor
from hpsearch.training.group import Group, GroupBroken, GroupExecutor, follow

SETTLE_S = 2.0


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


class Shared(Task):
    """Each rank trains on its share of the rows and adds the gradients up, as DistributedDataParallel does. What
    `config` asks for goes wrong, on the rank that it names or on all."""

    def data(self) -> Splits:
        return Splits(train=rows(64, 0), val=rows(40, 1), test=rows(20, 2))

    def model(self, config: Config) -> nn.Module:
        return nn.Linear(6, 2)

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        x, y = splits.train
        x, y = x[trial.rank :: trial.world_size], y[trial.rank :: trial.world_size]
        optimizer = torch.optim.SGD(model.parameters(), lr=float(str(config["lr"])), momentum=0.9)
        if trial.state is not None:
            optimizer.load_state_dict(trial.state["optimizer"])
        here = config.get("rank") in (None, trial.rank)
        while True:
            if here:
                go_wrong(str(config.get("before", "")))
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if trial.world_size > 1:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= trial.world_size
            optimizer.step()
            if here:
                go_wrong(str(config.get("after", "")))
            with torch.no_grad():
                val = F.cross_entropy(model(splits.val[0]), splits.val[1]).item()
            if here and config.get("after") == "nan":
                val = float("nan")
            yield Report(
                {"train_loss": loss.item(), "val_loss": val + trial.rank},  # rank 0's is what counts
                state=None if config.get("stateless") else lambda: {"optimizer": optimizer.state_dict()},
            )


def go_wrong(how: str) -> None:
    if how == "raise":
        raise ValueError("an odd width")
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


class DifferentData(Shared):
    def data(self) -> Splits:
        return Splits(train=rows(64, dist.get_rank()), val=rows(40, 1))


class DataOnRank0(Shared):
    def data(self) -> Splits:
        if dist.get_rank() == 1:
            raise FileNotFoundError("digits.csv")
        return super().data()


def train(number: int, epochs: tuple[int, int], checkpoint: str | None = None, **config: Any) -> TrainJob:
    from_epoch, to_epoch = epochs
    return TrainJob(
        key=f"train/{number}/{from_epoch}-{to_epoch}",
        trial=number,
        config={"lr": 0.1, **config},
        seed=number + 5,
        from_epoch=from_epoch,
        to_epoch=to_epoch,
        checkpoint=checkpoint,
    )


SOUND: list[Job] = [
    train(0, (0, 2)),
    train(1, (0, 1), after="nan", rank=1),
    train(2, (0, 1), before="raise"),
    RampJob(key="ramp/0", config={}, seed=1, lr_min=1e-4, lr_max=1.0, steps=5),
    train(3, (0, 1), before="memory"),
    train(4, (0, 1), stateless=True),
    train(0, (2, 4), checkpoint="checkpoints/trial-0000-e0002.safetensors"),
    train(4, (1, 2), stateless=True),
    EvaluateJob(
        key="evaluate/test/0",
        members=(Member(trial=0, config={"lr": 0.1}, checkpoint="checkpoints/trial-0000-e0004.safetensors"),),
        split="test",
        keep_predictions=False,
    ),
]
SCENARIOS: dict[str, list[Job]] = {
    "sound": SOUND,
    "raises-in-the-middle": [train(0, (0, 1), before="raise", rank=1)],
    "raises-at-the-end": [train(0, (0, 1), after="raise", rank=1)],
    "killed": [train(0, (0, 1), before="kill", rank=1)],
}


def executor(task: Task) -> TorchExecutor:
    return TorchExecutor(task, study_seed=0, device="cpu", cut_ensemble=False)


def works(group: Group, make: Callable[[], TorchExecutor], jobs: list[Job]) -> list[dict[str, Any]]:
    """Rank 0: what came of each job; the other ranks follow."""
    if group.rank:
        follow(group, make)
        return []
    blobs: dict[str, bytes] = {}
    told: list[dict[str, Any]] = []
    ours = GroupExecutor(group, make)
    try:
        ours.describe()
        for result in ours.run(jobs, blobs.__getitem__, lambda key, epoch: None):
            blobs |= result.blobs
            told.append(as_json(result))
    except HpsearchError as error:
        told.append({"error": type(error).__name__, "message": error.message})
    ours.dismiss()
    return told


def as_json(result: Result) -> dict[str, Any]:
    return {
        "key": result.key,
        "outcome": result.outcome,
        "message": result.message,
        "frame": result.frame,
        "curve": [row.metrics for row in result.epochs],
        "values": {k: v for k, v in result.values.items() if k in ("metrics", "resumable", "losses")},
    }


def main() -> None:
    scenario, rank, size, port, out = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(size), timeout=timedelta(seconds=120))
    group = Group(device="cpu", settle_s=SETTLE_S)
    told: dict[str, Any] = {}
    try:
        told["jobs"] = works(group, lambda: executor(Shared()), SCENARIOS[scenario])
        if scenario == "sound":
            told["different-data"] = works(group, lambda: executor(DifferentData()), [])
            told["data-on-rank-0"] = works(group, lambda: executor(DataOnRank0()), [])
    except GroupBroken as error:
        told["broken"] = error.message
        told["result"] = None if error.result is None else as_json(error.result)
    Path(f"{out}.{rank}.json").write_text(json.dumps(told))
    if "broken" in told:
        sys.stdout.flush()
        os._exit(0)  # as Ray ends them: others may be in a collective for ever


if __name__ == "__main__":
    main()
