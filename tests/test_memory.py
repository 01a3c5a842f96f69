"""A GPU's memory, told by numbers: room for a worker, and what a worker keeps. No GPU is asked."""

from __future__ import annotations

import pytest
import torch

from hpsearch.errors import ClusterError
from hpsearch.training.memory import LOOK_EVERY_S, WAIT_S, DeviceMemory, MemoryGuard, guard_of, hoarded, shortage

GIB = 1 << 30


def memory(*, free: float = 40.0, held: float = 0.0, total: float = 40.0) -> DeviceMemory:
    """Given in GiB."""
    return DeviceMemory(device="cuda:0 (H)", total=int(total * GIB), free=int(free * GIB), held=int(held * GIB))


class FakeGpu:
    """A probe whose answers are given; the last stays. `release` drops what is not in use."""

    def __init__(self, *answers: DeviceMemory, after_release: DeviceMemory | None = None) -> None:
        self.answers = list(answers)
        self.after_release = after_release
        self.looks = 0
        self.releases = 0

    def look(self) -> DeviceMemory:
        self.looks += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def release(self) -> None:
        self.releases += 1
        if self.after_release is not None:
            self.answers = [self.after_release]


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def guard(gpu: FakeGpu, time: Time | None = None, *, share: float = 0.25) -> MemoryGuard:
    time = time or Time()
    return MemoryGuard(gpu, share=share, clock=time.clock, sleep=time.sleep)


@pytest.mark.parametrize(
    ("share", "free", "enough"),
    [
        (1.0, 40.0, True),
        (1.0, 32.0, True),
        (1.0, 31.9, False),
        (0.25, 8.0, True),
        (0.25, 7.9, False),
        (4.0, 32.0, True),
    ],
)
def test_four_fifths_of_the_share_have_to_be_free(share: float, free: float, enough: bool) -> None:
    assert (shortage(memory(free=free), share) == "") is enough


def test_what_the_process_holds_itself_is_not_in_its_way() -> None:
    assert shortage(memory(free=30.0, held=5.0), 1.0) == ""


def test_a_worker_with_room_begins_at_once() -> None:
    time = Time()
    guard(FakeGpu(memory()), time).await_room()
    assert time.now == 0.0


def test_a_worker_waits_for_a_process_before_it_to_let_go() -> None:
    time = Time()
    guard(FakeGpu(memory(free=1.0), memory(free=1.0), memory(free=9.0)), time).await_room()
    assert time.now == 2 * LOOK_EVERY_S


def test_a_gpu_that_stays_full_is_an_error_that_names_it() -> None:
    time = Time()
    with pytest.raises(ClusterError) as caught:
        guard(FakeGpu(memory(free=3.0)), time).await_room()
    assert caught.value.message == (
        "cuda:0 (H) has 3.0 GiB free of 40.0 GiB (37.0 GiB are in use), and this worker is to have 10.0 GiB"
    )
    assert caught.value.hint == "end what else runs there (nvidia-smi shows it), or lower resources.gpus to share it"
    assert WAIT_S <= time.now < WAIT_S + LOOK_EVERY_S + 1e-9


def test_a_worker_that_gives_back_is_not_even_asked_to_release() -> None:
    gpu = FakeGpu(memory(held=1.0))
    watched = guard(gpu)
    watched.await_room()
    assert watched.judge(data_bytes=GIB) == ""
    assert gpu.releases == 0


def test_a_cache_that_can_be_released_is_no_reason_to_go() -> None:
    gpu = FakeGpu(memory(), memory(held=9.0), after_release=memory(held=0.5))
    watched = guard(gpu)
    watched.await_room()
    assert watched.judge(data_bytes=0) == ""
    assert gpu.releases == 1


def test_memory_that_grows_from_job_to_job_is_hoarded() -> None:
    gpu = FakeGpu(memory())
    watched = guard(gpu)
    watched.await_room()
    gpu.answers = [memory(held=2.0)]
    assert watched.judge(data_bytes=GIB) == ""
    gpu.answers = [memory(held=4.0)]
    assert watched.judge(data_bytes=GIB) == "it holds 4.0 GiB of cuda:0 (H) after a job, where 1.0 GiB are its own"


def test_what_is_left_after_the_first_job_is_a_cache_that_every_process_would_build_again() -> None:
    gpu = FakeGpu(memory(), memory(held=6.0))
    watched = guard(gpu)
    watched.await_room()
    assert [watched.judge(data_bytes=0) for _ in range(3)] == ["", "", ""]


def test_data_that_are_put_on_the_gpu_later_are_not_hoarded() -> None:
    gpu = FakeGpu(memory(), memory(held=0.1), memory(held=8.0))
    watched = guard(gpu)
    watched.await_room()
    assert watched.judge(data_bytes=0) == ""
    assert watched.judge(data_bytes=8 * GIB) == ""


def test_slack_is_a_tenth_of_the_share_and_at_least_half_a_gib() -> None:
    assert hoarded(memory(held=1.4), 0.25, base=GIB // 2) == ""
    assert hoarded(memory(held=1.6), 0.25, base=GIB // 2) != ""
    assert hoarded(memory(held=0.4, total=2.0), 0.25, base=0) == ""


def test_the_hosts_memory_has_no_guard() -> None:
    assert guard_of(1.0)(torch.device("cpu")) is None
    assert guard_of(1.0)(torch.device("cuda", 0)) is not None
