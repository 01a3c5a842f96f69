"""Who is gone, and whether its job is to blame; nodes that are looked at from a thread."""

from __future__ import annotations

import threading
import time

import pytest

from hpsearch.events import Arrived, Leased
from hpsearch.fleets.roll_call import NODE_KNOWN_S, Loss, NodeWatch, RollCall
from hpsearch.state import Entry


def arrived(worker: str, node: str, pid: int) -> Entry:
    return Entry(seq=0, fence=1, time=0.0, event=Arrived(worker=worker, node=node, pid=pid))


@pytest.fixture
def roll_call() -> RollCall:
    roll_call = RollCall()
    roll_call.take([arrived("a", "n1", 1), arrived("b", "n1", 2), arrived("c", "n2", 3)])
    return roll_call


def lost(worker: str, pid: int, *, blame_job: bool) -> Loss:
    reason = "its process died" if blame_job else "its node went"
    return Loss(worker=worker, pid=pid, reason=reason, blame_job=blame_job)


def test_nobody_is_gone_while_nobody_says_so(roll_call: RollCall) -> None:
    assert roll_call.losses(frozenset(), now=100.0) == []


def test_all_workers_of_a_dead_node_are_lost_once_and_no_job_is_to_blame(roll_call: RollCall) -> None:
    assert roll_call.losses({"n1"}, now=0.0) == [lost("a", 1, blame_job=False), lost("b", 2, blame_job=False)]
    assert roll_call.losses({"n1"}, now=1.0) == []


def test_process_that_died_alone_is_lost_once_and_its_job_is_to_blame(roll_call: RollCall) -> None:
    roll_call.died("a", now=10.0)
    assert roll_call.losses(frozenset(), now=10.0 + NODE_KNOWN_S) == []
    assert roll_call.losses(frozenset(), now=10.1 + NODE_KNOWN_S) == [lost("a", 1, blame_job=True)]
    assert roll_call.losses(frozenset(), now=99.0) == []


def test_process_that_died_with_its_node_blames_no_job_though_the_node_was_heard_of_later(roll_call: RollCall) -> None:
    roll_call.died("a", now=10.0)
    assert roll_call.losses(frozenset(), now=10.5) == []
    assert roll_call.losses({"n1"}, now=11.0) == [lost("a", 1, blame_job=False), lost("b", 2, blame_job=False)]
    assert roll_call.losses({"n1"}, now=99.0) == []


def test_worker_that_is_back_is_not_lost_for_its_earlier_process(roll_call: RollCall) -> None:
    roll_call.died("a", now=10.0)
    roll_call.take([arrived("a", "n2", 4)])
    assert roll_call.losses({"n1"}, now=99.0) == [lost("b", 2, blame_job=False)]
    roll_call.died("a", now=100.0)
    assert roll_call.losses({"n1"}, now=110.0) == [lost("a", 4, blame_job=True)]


def test_worker_of_a_dead_node_that_is_given_a_job_once_more_is_lost_once_more(roll_call: RollCall) -> None:
    roll_call.losses({"n2"}, now=0.0)
    leased = Leased(key="train/0/0-1", worker="c", trial=0, to_epoch=1)
    roll_call.take([Entry(seq=1, fence=1, time=0.0, event=leased)])
    assert roll_call.losses({"n2"}, now=1.0) == [lost("c", 3, blame_job=False)]
    assert roll_call.losses({"n2"}, now=2.0) == []


def test_death_of_a_process_that_never_arrived_loses_nothing(roll_call: RollCall) -> None:
    roll_call.died("new", now=10.0)
    assert roll_call.losses(frozenset(), now=99.0) == []
    roll_call.take([arrived("new", "n2", 5)])
    assert roll_call.losses(frozenset(), now=999.0) == []


def test_node_watch_tells_the_dead_and_how_long_the_head_is_silent() -> None:
    hanging, released = threading.Event(), threading.Event()

    def dead_nodes() -> frozenset[str]:
        if hanging.is_set():
            released.wait(10)
        return frozenset({"n1"})

    watch = NodeWatch(dead_nodes)
    watch.start()
    wait_for(lambda: watch.dead == {"n1"})
    assert watch.silent_s < 1.5
    hanging.set()
    wait_for(lambda: watch.silent_s > 2.0)
    released.set()
    hanging.clear()
    wait_for(lambda: watch.silent_s < 0.5)
    watch.stop()


def test_head_that_answers_with_an_error_is_silent() -> None:
    def dead_nodes() -> frozenset[str]:
        raise ConnectionError("no head")

    watch = NodeWatch(dead_nodes)
    watch.start()
    wait_for(lambda: watch.silent_s > 1.5)
    assert watch.dead == frozenset()
    watch.stop()


def test_looking_at_very_many_nodes_takes_a_hundredth_of_the_time_at_most() -> None:
    looks: list[float] = []

    def dead_nodes() -> frozenset[str]:
        looks.append(time.monotonic())
        time.sleep(0.03)
        return frozenset()

    watch = NodeWatch(dead_nodes)
    watch.start()
    wait_for(lambda: len(looks) == 2)
    watch.stop()
    assert looks[1] - looks[0] > 3.0


def test_head_that_is_slow_to_answer_is_not_silent_between_two_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node that has fallen silent makes the answer slower; the head is not to blame for it."""
    monkeypatch.setattr("hpsearch.fleets.roll_call.LOOK_AT_LEAST_EVERY_S", 0.5)
    now = [0.0]
    looks: list[float] = []

    def dead_nodes() -> frozenset[str]:
        looks.append(now[0])
        now[0] += 100.0
        return frozenset()

    watch = NodeWatch(dead_nodes, clock=lambda: now[0])
    watch.start()
    wait_for(lambda: len(looks) == 1 and watch.silent_s == 0.0)
    now[0] += 1000.0
    assert watch.silent_s == 0.0
    wait_for(lambda: len(looks) == 2)  # though 100 s were a hundredth of much more
    watch.stop()


def wait_for(true: object, seconds: float = 10.0) -> None:
    assert callable(true)
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
