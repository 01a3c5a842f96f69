"""Both ends of the conversation between the study and its workers, without Ray; with it: tests/test_tune_faults.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from hpsearch.errors import ClusterError, JournalError
from hpsearch.fleets import study_actor
from hpsearch.fleets.study_actor import DEATHS_S, MOST_DEATHS, PING_EVERY_S, RIDE_OUT_S, Pulse, StudyActor
from hpsearch.leases import Seat


class Process:
    """The study's process as `Pulse` asks it: each question gets the next answer, None: none yet."""

    def __init__(self) -> None:
        self.answers: list[int | Exception | None] = []
        self.asked = 0
        self.ready = self

    def remote(self) -> object:
        self.asked += 1
        return object()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    process = Process()

    def answer(ref: Any, timeout_s: float | None = None) -> Any:
        given = process.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(study_actor, "is_answered", lambda ref: bool(process.answers))
    monkeypatch.setattr(study_actor, "answer", answer)
    return process


def test_process_is_asked_once_a_second_and_not_again_before_it_has_answered(process: Process) -> None:
    clock = Clock()
    pulse = Pulse(process, clock=clock)
    for _ in range(100):
        pulse.check()
        clock.now += PING_EVERY_S / 10
    assert process.asked == 1
    process.answers = [77]
    for _ in range(3):
        pulse.check()
    assert process.asked == 2


def test_silence_of_the_process_is_ridden_out_and_not_for_ever(process: Process) -> None:
    clock = Clock()
    pulse = Pulse(process, clock=clock)
    pulse.check()
    clock.now = RIDE_OUT_S
    pulse.check()
    clock.now = RIDE_OUT_S + 1
    with pytest.raises(ClusterError, match="the study's process has not answered for 120 s"):
        pulse.check()


def test_what_kept_the_study_from_being_opened_is_raised(process: Process) -> None:
    pulse = Pulse(process, clock=Clock())
    pulse.check()
    process.answers = [JournalError("journal.jsonl:7: the line is damaged")]
    with pytest.raises(JournalError, match=r"journal\.jsonl:7"):
        pulse.check()


def beat(pulse: Pulse, process: Process, clock: Clock, pid: int) -> None:
    """One question and its answer."""
    clock.now += PING_EVERY_S
    pulse.check()
    process.answers = [pid]
    pulse.check()


def test_process_that_died_too_often_in_a_short_time_is_given_up(process: Process) -> None:
    clock = Clock()
    pulse = Pulse(process, clock=clock)
    for pid in range(MOST_DEATHS):
        beat(pulse, process, clock, pid + 1)
    with pytest.raises(ClusterError, match="died 5 times within 10 minutes"):
        beat(pulse, process, clock, 99)


def test_process_that_dies_now_and_then_is_ridden_out(process: Process) -> None:
    clock = Clock()
    pulse = Pulse(process, clock=clock)
    for pid in range(10 * MOST_DEATHS):
        beat(pulse, process, clock, pid + 1)
        clock.now += DEATHS_S / (MOST_DEATHS - 1)


class RecordingStudy:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def workers(self) -> dict[str, Seat]:
        return {"a": Seat(node="n1", pid=11, alive=True)}

    def lost(self, worker: str, reason: str, *, blame_job: bool) -> None:
        self.calls.append((worker, reason, blame_job))

    def progress(self, worker: str, keys: Sequence[str]) -> None:
        self.calls += [(worker, key) for key in keys]


def actor_of(study: RecordingStudy, *, restarted: bool) -> StudyActor:
    actor = StudyActor.__new__(StudyActor)  # its __init__ asks Ray whether it was restarted
    vars(actor).update(_opened=study, _error=None, _restarted=restarted, _present=set())
    return actor


def test_loss_of_a_process_that_was_replaced_meanwhile_is_passed_over() -> None:
    study = RecordingStudy()
    actor = actor_of(study, restarted=False)
    actor.lost("a", 10, "its process died", True)
    assert study.calls == []
    actor.lost("a", 11, "its process died", True)
    assert study.calls == [("a", "its process died", True)]


def test_roll_call_is_answered_once_by_each_job_and_only_in_a_study_that_was_restarted() -> None:
    study = RecordingStudy()
    first = actor_of(study, restarted=False)
    first.present("a", ["k1"])
    assert study.calls == []
    second = actor_of(study, restarted=True)
    for _ in range(3):
        second.present("a", ["k1", "k2"])
    second.present("b", ["k1"])
    assert study.calls == [("a", "k1"), ("a", "k2"), ("b", "k1")]


def test_every_call_to_a_study_that_could_not_be_opened_raises_why() -> None:
    actor = StudyActor.__new__(StudyActor)
    vars(actor).update(_error=JournalError("damaged"), _restarted=True, _present=set())
    for call in (actor.ready, lambda: actor.pull("a", 1, 0.0), lambda: actor.push("a", ())):
        with pytest.raises(JournalError, match="damaged"):
            call()
    actor.stop("interrupted")
    assert isinstance(actor.close(), JournalError)
