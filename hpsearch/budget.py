"""What a search may cost. A decision of values: the study measures, this module compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a search; None: no limit. Time counts only while a driver is at work."""

    hours: float | None = None
    gpu_hours: float | None = None
    epochs: int | None = None
    disk_bytes: int | None = None
    gpus_per_worker: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a search has cost so far."""

    hours: float
    worker_hours: float  # summed over workers
    epochs: int
    out_of_room: bool = False  # `disk` holds no more of the checkpoints that cannot be done without


def exhausted(budget: Budget, spent: Spent) -> str:
    """Which limit is reached, "" while there is room.

    >>> exhausted(Budget(hours=2.0), Spent(hours=2.0, worker_hours=8.0, epochs=90))
    'budget.hours: 2'
    """
    limits = {
        "hours": (budget.hours, spent.hours),
        "gpu_hours": (budget.gpu_hours, spent.worker_hours * budget.gpus_per_worker),
        "epochs": (budget.epochs, spent.epochs),
    }
    for name, (limit, value) in limits.items():
        if limit is not None and value >= limit:
            return f"budget.{name}: {limit:g}"
    if spent.out_of_room and budget.disk_bytes is not None:
        return f"budget.disk: {size_text(budget.disk_bytes)}, which holds no more checkpoints"
    return ""


def size_text(n_bytes: float) -> str:
    """Bytes as a person writes them.

    >>> size_text(3 * 2**30), size_text(1536), size_text(999)
    ('3 GiB', '1.5 KiB', '999 bytes')
    """
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes:.0f} bytes"
