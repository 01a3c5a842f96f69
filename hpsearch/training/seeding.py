"""Global random state, lent and given back.

Models draw their weights and dropout masks from torch's global generators, and user code may draw from numpy's or
Python's. Each piece of training is seeded from what it is (trial seed, epoch), so nothing of that state has to be
carried in a checkpoint; and what the process had before is put back, since it belongs to whoever called us.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def borrowed_rng(device: torch.device) -> Iterator[None]:
    """Puts the global state of Python's, numpy's and torch's generators (the CPU's and `device`'s) back at the end."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - it is the global state that is guarded here
    cpu_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All global generators seeded inside, as before outside.

    Args:
        seed: in [0, 2**63).
        device: where the model is.
    """
    with borrowed_rng(device):
        seed_all(seed, device)
        yield


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds the global generators of Python, numpy, torch's CPU and `device`; `seed` in [0, 2**63)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from it
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 300 to look for other devices
    else:
        torch.manual_seed(seed)
