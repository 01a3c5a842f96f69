"""A budget is a decision of values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.budget import Budget, Spent, exhausted

NOTHING = Spent(hours=0.0, worker_hours=0.0, epochs=0)
MUCH = Spent(hours=1e6, worker_hours=1e6, epochs=10**9, out_of_room=True)


def test_without_limits_nothing_is_ever_exhausted() -> None:
    assert exhausted(Budget(), MUCH) == ""


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(hours=2.5), "budget.hours: 2.5"),
        (Budget(gpu_hours=8, gpus_per_worker=1), "budget.gpu_hours: 8"),
        (Budget(epochs=100), "budget.epochs: 100"),
        (Budget(disk_bytes=1000), "budget.disk: 1000 bytes, which holds no more checkpoints"),
        (Budget(hours=2.5, epochs=100), "budget.hours: 2.5"),
    ],
)
def test_limit_that_is_reached_is_named(budget: Budget, told: str) -> None:
    assert exhausted(budget, MUCH) == told
    assert exhausted(budget, NOTHING) == ""


def test_limit_is_reached_when_it_is_met_and_not_before() -> None:
    spent = Spent(hours=1.0, worker_hours=1.0, epochs=10, out_of_room=False)
    assert exhausted(Budget(epochs=11), spent) == ""
    assert exhausted(Budget(epochs=10), spent) == "budget.epochs: 10"
    assert exhausted(Budget(hours=math.nextafter(1.0, 2.0)), spent) == ""
    assert exhausted(Budget(hours=1.0), spent) == "budget.hours: 1"


def test_zero_is_a_limit() -> None:
    assert exhausted(Budget(epochs=0), NOTHING) == "budget.epochs: 0"


@given(gpus=st.floats(0.0, 8.0), hours=st.floats(0.0, 100.0), limit=st.floats(0.01, 100.0))
def test_gpu_hours_are_worker_hours_times_gpus(gpus: float, hours: float, limit: float) -> None:
    spent = Spent(hours=0.0, worker_hours=hours, epochs=0)
    assert bool(exhausted(Budget(gpu_hours=limit, gpus_per_worker=gpus), spent)) is (gpus * hours >= limit)


def test_workers_without_a_gpu_spend_no_gpu_hours() -> None:
    assert exhausted(Budget(gpu_hours=0.1), MUCH) == ""
