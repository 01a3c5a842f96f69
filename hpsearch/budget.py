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
    disk_bytes: int


def exhausted(budget: Budget, spent: Spent) -> str:
    """Which limit is reached, "" while there is room.

    >>> exhausted(Budget(hours=2.0), Spent(hours=2.0, worker_hours=8.0, epochs=90, disk_bytes=0))
    'budget.hours: 2'
    """
    limits = {
        "hours": (budget.hours, spent.hours),
        "gpu_hours": (budget.gpu_hours, spent.worker_hours * budget.gpus_per_worker),
        "epochs": (budget.epochs, spent.epochs),
        "disk": (budget.disk_bytes, spent.disk_bytes),
    }
    for name, (limit, value) in limits.items():
        if limit is not None and value >= limit:
            return f"budget.disk: {limit / 2**30:.3g} GiB" if name == "disk" else f"budget.{name}: {limit:g}"
    return ""
