"""The settings of torch that a whole process shares, lent to a job and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def borrowed_process(threads: int) -> Iterator[None]:
    """The process as results depend on it: threads, and kernels that repeat to the bit. Put back at the end."""
    before = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


def warm_up() -> None:
    """One step of a network that nobody wants: torch loads what its optimizers need, a second, with the first."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.zeros(2, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
