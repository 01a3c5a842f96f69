"""A GPU's memory: whether there is room for a worker, and whether a worker gives back what its jobs took.

Ray counts GPUs, not their memory: a GPU can be full of what Ray does not know (another user's job, a process that
outlived its worker). And a process can keep what a job took, in a cycle or a global of the user's, until the worker
that shares its GPU runs out. Both are decided by functions of numbers; CUDA is asked through a probe.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from hpsearch.errors import ClusterError

ROOM = 0.8  # of its share has to be free when a worker begins; the rest is left to contexts and displays
WAIT_S = 60.0  # for a process before it, or beside it, to let go; drivers take seconds after a kill
LOOK_EVERY_S = 2.0
SLACK = 0.1  # of its share may stay held beyond the data: workspaces of cuBLAS and cuDNN, compiled programs
SLACK_BYTES = 512 << 20  # at least that much
GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory of one GPU, in bytes."""

    device: str  # "cuda:0 (NVIDIA H100)"
    total: int
    free: int  # of all processes
    held: int  # by this process's tensors and torch's cache of them


class Probe(Protocol):
    """What can be asked about the GPU of this process."""

    def look(self) -> DeviceMemory: ...

    def release(self) -> None:
        """Give back everything that is not in use."""


class CudaProbe:
    """Asks CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def look(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(
            device=f"{self._device} ({torch.cuda.get_device_name(self._device)})",
            total=total,
            free=free,
            held=torch.cuda.memory_reserved(self._device),
        )

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def has_gpu() -> bool:
    """Whether torch finds a GPU here that it can use."""
    return torch.cuda.is_available()


def shortage(memory: DeviceMemory, share: float) -> str:
    """What is missing for a worker that is to have this share of a GPU; "" when there is room.

    >>> shortage(DeviceMemory(device="cuda:0", total=40 << 30, free=3 << 30, held=0), 0.25)
    'cuda:0 has 3.0 GiB free of 40.0 GiB (37.0 GiB are in use), and this worker is to have 10.0 GiB'
    >>> shortage(DeviceMemory(device="cuda:0", total=40 << 30, free=9 << 30, held=0), 0.25)
    ''
    """
    own = min(share, 1.0) * memory.total
    if memory.free + memory.held >= ROOM * own:
        return ""
    used = memory.total - memory.free
    return (
        f"{memory.device} has {memory.free / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB "
        f"({used / GIB:.1f} GiB are in use), and this worker is to have {own / GIB:.1f} GiB"
    )


def hoarded(memory: DeviceMemory, share: float, *, base: int) -> str:
    """What a worker keeps that it should have given back; "" while that is within reason.

    The rule: after a job, with everything unused released, a process holds no more than its base, and a tenth of its
    share, or 512 MiB, besides.

    Args:
        base: bytes that it may hold.

    >>> hoarded(DeviceMemory(device="cuda:0", total=40 << 30, free=0, held=9 << 30), 0.5, base=6 << 30)
    'it holds 9.0 GiB of cuda:0 after a job, where 6.0 GiB are its own'
    """
    spare = max(SLACK_BYTES, SLACK * min(share, 1.0) * memory.total)
    if memory.held <= base + spare:
        return ""
    return (
        f"it holds {memory.held / GIB:.1f} GiB of {memory.device} after a job, where {base / GIB:.1f} GiB are its own"
    )


class MemoryGuard:
    """Watches one worker's share of a GPU."""

    def __init__(
        self,
        probe: Probe,
        *,
        share: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            share: of the GPU that the worker was given, as in resources.gpus; 1 where it has it to itself.
        """
        self._probe = probe
        self._share = share
        self._clock = clock
        self._sleep = sleep
        self._base = 0  # held besides the data
        self._n_judged = 0

    def await_room(self) -> None:
        """Return when the worker's share is free; to be asked before anything is put there.

        Raises:
            ClusterError: it is still in use after a minute.
        """
        deadline = self._clock() + WAIT_S
        while True:
            memory = self._probe.look()
            missing = shortage(memory, self._share)
            if not missing:
                self._base = memory.held
                return
            if self._clock() >= deadline:
                raise ClusterError(
                    missing,
                    hint="end what else runs there (nvidia-smi shows it), or lower resources.gpus to share it",
                )
            self._sleep(LOOK_EVERY_S)

    def judge(self, data_bytes: int) -> str:
        """Why this process should make room for another, "" while it gives back what its jobs take.

        Its base is what it held before its first job, and its data. What is left over after the first job is added to
        that: a cache that every process would build again is no reason to end one. What grows after it is.

        A release, which costs milliseconds, is asked for only where the memory held is suspicious without one.

        Args:
            data_bytes: of the study's data that were put on the GPU.
        """
        self._n_judged += 1
        if not hoarded(self._probe.look(), self._share, base=self._base + data_bytes):
            return ""
        self._probe.release()
        memory = self._probe.look()
        if self._n_judged == 1:
            self._base = max(self._base, memory.held - data_bytes)
        return hoarded(memory, self._share, base=self._base + data_bytes)


def guard_of(share: float) -> Callable[[torch.device], MemoryGuard | None]:
    """What makes the guard of a worker's device: of a GPU's memory; of the host's there is none."""

    def guard(device: torch.device) -> MemoryGuard | None:
        return MemoryGuard(CudaProbe(device), share=share) if device.type == "cuda" else None

    return guard
