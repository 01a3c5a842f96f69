"""What a peer is asked to do, and what it answers: JSON on disk, and JSON in its last line.

Every peer is `python -m benchmarks.peers.NAME ORDER.json`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Order:
    """The same search for every peer; `configs` for given ones, or a `space` to draw from."""

    n_trials: int
    max_epochs: int
    workers: int = 2
    threads: int = 1  # of torch, per process
    gpus: float = 0.0  # per worker
    seed: int = 0
    configs: tuple[dict[str, Any], ...] = ()
    space: dict[str, Any] = field(default_factory=dict)  # parameters as space.yaml has them
    reduction_factor: int | None = None  # of ASHA from epoch 1 on; None: every trial trains all epochs

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a peer did. Times are unix times or seconds."""

    search_s: float  # from the first trial's start, data and torch loaded, to the last one's end
    n_trials: int
    n_epochs: int
    best_val_loss: float
    trials: Sequence[dict[str, Any]] = ()  # where asked for: config, and its curve as (epoch, val_loss, unix time)


def read_order() -> Order:
    """The order that the command line names."""
    body = json.loads(Path(sys.argv[1]).read_text())
    return Order(**{**body, "configs": tuple(body["configs"])})


def write_order(order: Order, path: Path) -> None:
    path.write_text(json.dumps(asdict(order)))


def give(answer: Answer) -> None:
    print(json.dumps(asdict(answer)))


def read_answer(stdout: str) -> Answer:
    """The answer in a peer's last line."""
    return Answer(**json.loads(stdout.strip().splitlines()[-1]))
