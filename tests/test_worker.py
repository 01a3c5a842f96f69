"""The worker's loop: begin, ask, run, push, and how each kind of error ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from hpsearch.errors import ClusterError, HpsearchError, JournalError, ProcessSpent, UserCodeError
from hpsearch.job import Assignment, DataInfo, Job, ProbeJob, Result
from hpsearch.worker import BATCH_S, SHORT_JOB_S, TELL_S, LooksAhead, More, Worker, internal_error
from tests import fakes


def probe(number: int) -> ProbeJob:
    return ProbeJob(key=f"probe/{number}", config={"lr": 0.1}, seed=0, steps=2)


@dataclass
class FakeStudy:
    """Gives out what it was made with, then says that it has ended."""

    assignments: list[Assignment] = field(default_factory=list)
    answer: Assignment = field(default_factory=Assignment)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    errors: list[HpsearchError] = field(default_factory=list)
    pushes: list[int] = field(default_factory=list)  # results in each
    beside: list[Assignment] = field(default_factory=list)  # answers to a worker with free lanes
    waiting: list[list[str]] = field(default_factory=list)  # jobs kept by each sign of life of others

    def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
        """Told before the data are loaded; these tests look at what follows."""

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        self.calls.append(("hello", worker, info.fingerprint))
        return self.answer

    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
        self.calls.append(("pull", slots) if beside is None else ("pull beside", slots, beside.key))
        if beside is not None:
            return self.beside.pop(0) if self.beside else Assignment()
        return self.assignments.pop(0) if self.assignments else Assignment(ended=True)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self.calls += [("push", result.key) for result in results]
        self.pushes.append(len(results))

    def progress(self, worker: str, keys: Sequence[str], waiting: Sequence[str] = ()) -> None:
        self.calls.append(("progress", *keys))
        self.waiting.append(list(waiting))

    def fetch(self, ref: str) -> bytes:
        self.calls.append(("fetch", ref))
        return b""

    def broken(self, worker: str, error: HpsearchError) -> None:
        self.errors.append(error)


class AheadStudy(FakeStudy, LooksAhead):
    def look_ahead(self, worker: str, slots: int, timeout_s: float) -> None:
        self.calls.append(("look ahead", slots))


class Clock:
    """Seconds that pass only while an executor works."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("hpsearch.worker.time", clock)
    return clock


class TimedExecutor(fakes.FakeExecutor):
    """Each job takes `job_s` seconds of the clock."""

    def __init__(self, clock: Clock, job_s: float = 9.0) -> None:
        super().__init__()
        self._clock = clock
        self.job_s = job_s

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            self._clock.now += self.job_s
            progress(job.key, 1)
            yield Result(key=job.key)


class FailingExecutor(TimedExecutor):
    """Raises where it is told to, `run` when it is asked for its second result."""

    def __init__(self, clock: Clock, *, describe: Exception | None = None, run: Exception | None = None) -> None:
        super().__init__(clock)
        self._describe_error = describe
        self._run_error = run

    def describe(self) -> DataInfo:
        if self._describe_error is not None:
            raise self._describe_error
        return super().describe()

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for result in super().run(jobs, fetch, progress):
            yield result
            if self._run_error is not None:
                raise self._run_error


def test_worker_says_hello_then_pulls_runs_and_pushes_until_the_end(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),)), Assignment(), Assignment(jobs=(probe(2), probe(3)))])
    Worker("w", study, lambda: TimedExecutor(clock, 9.0)).run()
    assert study.calls == [
        ("hello", "w", "fake"),
        ("pull", 1),
        ("progress", "probe/1"),
        ("push", "probe/1"),
        ("pull", 1),
        ("pull", 1),
        ("progress", "probe/2"),
        ("push", "probe/2"),
        ("progress", "probe/3"),
        ("push", "probe/3"),
        ("pull", 1),
    ]


def test_result_of_a_long_job_is_pushed_before_the_next_is_run(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1), probe(2)))])
    Worker("w", study, lambda: FailingExecutor(clock, run=RuntimeError("ours"))).run()
    assert [call for call in study.calls if call[0] == "push"] == [("push", "probe/1")]


def test_tiny_jobs_are_asked_for_several_at_once_and_told_together(clock: Clock) -> None:
    jobs = [probe(n) for n in range(9)]
    study = FakeStudy([Assignment(jobs=(jobs[0],)), Assignment(jobs=tuple(jobs[1:5])), Assignment(jobs=(jobs[5],))])
    Worker("w", study, lambda: TimedExecutor(clock, BATCH_S / 8), most_at_once=4).run()
    assert [call for call in study.calls if call[0] == "pull"] == [("pull", 1), ("pull", 4), ("pull", 4), ("pull", 4)]
    assert study.pushes == [1, 4, 1]


def test_worker_asks_for_one_job_at_a_time_when_they_are_not_tiny(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),)), Assignment(jobs=(probe(2),))])
    Worker("w", study, lambda: TimedExecutor(clock, BATCH_S), most_at_once=8).run()
    assert [call for call in study.calls if call[0] == "pull"] == [("pull", 1)] * 3


def test_worker_never_asks_for_several_jobs_unless_it_is_told_to(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),)), Assignment(jobs=(probe(2),))])
    Worker("w", study, lambda: TimedExecutor(clock, 1e-6)).run()
    assert [call for call in study.calls if call[0] == "pull"] == [("pull", 1)] * 3


def test_last_jobs_are_run_when_the_end_comes_with_them() -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),), ended=True)])
    Worker("w", study, fakes.FakeExecutor).run()
    assert study.calls[-1] == ("push", "probe/1")


def test_task_that_cannot_be_loaded_is_told_and_nothing_is_asked() -> None:
    error = UserCodeError("ValueError: no such file", frame="task.py:3 in data")
    study = FakeStudy()
    Worker("w", study, lambda: FailingExecutor(Clock(), describe=error)).run()
    assert study.errors == [error]
    assert study.calls == []


def test_executor_that_cannot_be_made_is_told() -> None:
    def make() -> fakes.FakeExecutor:
        raise UserCodeError("ImportError: no module named timm")

    study = FakeStudy()
    assert not Worker("w", study, make).begin()
    assert [error.message for error in study.errors] == ["ImportError: no module named timm"]


def test_bug_of_ours_at_the_start_ends_the_study_with_its_traceback() -> None:
    study = FakeStudy()
    assert not Worker("w", study, lambda: FailingExecutor(Clock(), describe=KeyError("fingerprint"))).begin()
    (error,) = study.errors
    assert error.message == "internal error: KeyError: 'fingerprint'"
    assert "please report this" in error.hint
    assert "Traceback (most recent call last)" in error.hint


def test_refused_worker_says_why_and_asks_for_nothing() -> None:
    study = FakeStudy(answer=Assignment(error="Task.data() gave w other data"))
    Worker("w", study, fakes.FakeExecutor).run()
    assert [str(error) for error in study.errors] == [
        "error[task]: Task.data() gave w other data\n"
        "  hint: seed every random choice in Task.data(); data changed on purpose need a new --run-dir"
    ]
    assert study.calls == [("hello", "w", "fake")]


def test_study_that_is_gone_ends_the_worker_in_silence() -> None:
    class Gone(FakeStudy):
        def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
            raise ClusterError("the study is gone")

    study = Gone()
    Worker("w", study, fakes.FakeExecutor).run()
    assert study.errors == []


def test_bug_of_ours_in_a_job_is_told_and_the_worker_ends() -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),)), Assignment(jobs=(probe(2),))])
    Worker("w", study, lambda: FailingExecutor(Clock(), run=RuntimeError("shape"))).run()
    assert [error.message for error in study.errors] == ["internal error: RuntimeError: shape"]
    assert [call for call in study.calls if call[0] == "pull"] == [("pull", 1)]


def test_checkpoint_that_is_gone_ends_the_study_with_its_message() -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),))])
    Worker("w", study, lambda: FailingExecutor(Clock(), run=JournalError("c.safetensors cannot be read"))).run()
    assert [error.message for error in study.errors] == ["c.safetensors cannot be read"]


def test_error_of_the_study_met_in_an_answer_is_told_and_not_raised() -> None:
    class Defective(FakeStudy):
        def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
            raise HpsearchError("internal error: KeyError: 'lr'")

    study = Defective()
    Worker("w", study, fakes.FakeExecutor).run()
    assert [error.message for error in study.errors] == ["internal error: KeyError: 'lr'"]


def test_worker_whose_trials_cannot_pause_asks_for_one_at_a_time_and_never_ahead(clock: Clock) -> None:
    class Unpausable(TimedExecutor):
        def describe(self) -> DataInfo:
            return dataclasses.replace(super().describe(), resumable=False)

    study = AheadStudy([Assignment(jobs=(probe(n),)) for n in (1, 2)])
    Worker("w", study, lambda: Unpausable(clock, 0.001), most_at_once=8).run()
    assert [call for call in study.calls if call[0] in ("pull", "look ahead")] == [("pull", 1)] * 3


def test_next_jobs_are_asked_for_ahead_only_after_short_ones(clock: Clock) -> None:
    study = AheadStudy([Assignment(jobs=(probe(n),)) for n in (1, 2, 3)])
    executor = TimedExecutor(clock, 0.1)
    worker = Worker("w", study, lambda: executor)
    assert worker.begin()
    for executor.job_s in (SHORT_JOB_S / 2, 9.0, 9.0):
        worker.step()
    told = [call for call in study.calls if call[0] in ("push", "look ahead")]
    assert told == [("push", "probe/1"), ("look ahead", 1), ("push", "probe/2"), ("push", "probe/3")]


def test_internal_error_names_the_exception() -> None:
    assert str(internal_error(ZeroDivisionError("by zero"))).startswith(
        "error[error]: internal error: ZeroDivisionError: by zero\n  hint: please report this"
    )


@dataclass
class FakeAlarm:
    calls: list[float | None] = field(default_factory=list)  # seconds that it was armed with, None: disarmed

    def arm(self, silence_s: float) -> None:
        self.calls.append(silence_s)

    def disarm(self) -> None:
        self.calls.append(None)


class TalkingExecutor(TimedExecutor):
    """Says that a job is alive `n_signs` times, every `sign_s` seconds of the clock."""

    def __init__(self, clock: Clock, sign_s: float, n_signs: int) -> None:
        super().__init__(clock)
        self._sign_s, self._n_signs = sign_s, n_signs

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        for job in jobs:
            for epoch in range(self._n_signs):
                self._clock.now += self._sign_s
                progress(job.key, epoch)
            yield Result(key=job.key)


def signs(study: FakeStudy) -> int:
    return sum(call[0] == "progress" for call in study.calls)


def test_worker_tells_where_its_process_runs() -> None:
    seats = []

    class Hotel(FakeStudy):
        def arriving(self, worker: str, node: str = "", pid: int = 0) -> None:
            seats.append((worker, node, pid))

    Worker("w", Hotel(), fakes.FakeExecutor, node="n1", pid=77).run()
    assert seats == [("w", "n1", 77)]


def test_signs_of_life_are_told_once_a_second_however_short_an_epoch_is(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),))])
    Worker("w", study, lambda: TalkingExecutor(clock, 0.125, 80)).run()
    assert signs(study) == 10 / TELL_S


def test_job_shorter_than_a_second_tells_of_itself_by_its_result_alone(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),))])
    Worker("w", study, lambda: TalkingExecutor(clock, 0.125, 7)).run()
    assert signs(study) == 0


def test_long_leases_ask_for_fewer_signs_of_life(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1),), lease_s=300.0)])
    Worker("w", study, lambda: TalkingExecutor(clock, 1.0, 100)).run()
    assert signs(study) == 10


def test_jobs_that_wait_for_another_are_kept_by_its_signs_of_life(clock: Clock) -> None:
    study = FakeStudy([Assignment(jobs=(probe(1), probe(2), probe(3)))])
    Worker("w", study, lambda: TalkingExecutor(clock, 2.0, 1)).run()
    assert [call[1:] for call in study.calls if call[0] == "progress"] == [("probe/1",), ("probe/2",), ("probe/3",)]
    assert study.waiting == [["probe/2", "probe/3"], ["probe/3"], []]


def test_job_whose_result_is_untold_is_kept_while_the_next_takes_long(clock: Clock) -> None:
    class Slower(TimedExecutor):
        def run(
            self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
        ) -> Iterator[Result]:
            for job, seconds in zip(jobs, (BATCH_S / 2, 100.0), strict=True):
                self._clock.now += seconds
                progress(job.key, 0)
                yield Result(key=job.key)

    study = FakeStudy([Assignment(jobs=(probe(1), probe(2)))])
    Worker("w", study, lambda: Slower(clock)).run()
    assert [call for call in study.calls if call[0] == "progress"] == [("progress", "probe/1", "probe/2")]


def test_jobs_of_one_program_are_told_in_one_call(clock: Clock) -> None:
    class Program(TimedExecutor):
        def run(
            self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
        ) -> Iterator[Result]:
            for epoch in range(1, 4):
                self._clock.now += self.job_s
                for job in jobs:
                    progress(job.key, epoch)
            yield from (Result(key=job.key) for job in jobs)

    study = FakeStudy([Assignment(jobs=(probe(1), probe(2)))])
    Worker("w", study, lambda: Program(clock)).run()
    told = [call[1:] for call in study.calls if call[0] == "progress"]
    assert told == [("probe/1",), ("probe/1", "probe/2"), ("probe/1", "probe/2")]
    assert study.waiting == [["probe/2"], [], []]


def test_alarm_is_set_anew_by_each_sign_of_life_and_off_while_the_worker_waits(clock: Clock) -> None:
    alarm = FakeAlarm()

    class Listening(FakeStudy):
        def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0, beside: Job | None = None) -> Assignment:
            assert not alarm.calls or alarm.calls[-1] is None
            return super().pull(worker, slots, timeout_s)

    study = Listening([Assignment(jobs=(probe(1), probe(2)), lease_s=60.0, first_lease_s=300.0)])
    Worker("w", study, lambda: TalkingExecutor(clock, 2.0, 2), alarm=alarm).run()
    assert alarm.calls == [300.0] * 7 + [None]


def test_alarm_is_off_after_a_job_that_raised(clock: Clock) -> None:
    alarm = FakeAlarm()
    study = FakeStudy([Assignment(jobs=(probe(1),), lease_s=60.0, first_lease_s=300.0)])
    Worker("w", study, lambda: FailingExecutor(clock, run=RuntimeError("shape")), alarm=alarm).run()
    assert alarm.calls[-1] is None


def test_study_that_tells_no_lease_sets_no_alarm(clock: Clock) -> None:
    alarm = FakeAlarm()
    Worker("w", FakeStudy([Assignment(jobs=(probe(1),))]), lambda: TalkingExecutor(clock, 2.0, 2), alarm=alarm).run()
    assert alarm.calls == [None]


class WearingExecutor(fakes.FakeExecutor):
    """Unfit for more after its first job."""

    def worn(self) -> str:
        return "it holds 9 GiB" if self.ran else ""


class SettlingStudy(AheadStudy):
    def settle(self) -> None:
        self.calls.append(("settle",))


def test_worn_worker_pushes_what_it_has_and_makes_room_for_another_process(clock: Clock) -> None:
    study = SettlingStudy([Assignment(jobs=(probe(1),)), Assignment(jobs=(probe(2),))])
    with pytest.raises(ProcessSpent, match="it holds 9 GiB"):
        Worker("w", study, WearingExecutor).run()
    assert [call[0] for call in study.calls][-2:] == ["push", "settle"]
    assert sum(call[0] == "pull" for call in study.calls) == 1


def test_worn_worker_first_does_the_jobs_that_it_asked_for_ahead(clock: Clock) -> None:
    """Else they would be leased to a process that is gone, and counted as its deaths."""

    class WornLater(fakes.FakeExecutor):
        def worn(self) -> str:
            return "it holds 9 GiB" if len(self.ran) > 1 else ""

    made: list[WornLater] = []

    def make() -> WornLater:
        made.append(WornLater())
        return made[0]

    study = SettlingStudy([Assignment(jobs=(probe(n),)) for n in range(1, 6)])
    with pytest.raises(ProcessSpent):
        Worker("w", study, make, most_at_once=1).run()
    assert sum(call[0] == "look ahead" for call in study.calls) == 1
    assert sum(call[0] == "pull" for call in study.calls) == len(made[0].ran) == 3


def test_process_that_is_spent_while_it_begins_or_works_tells_the_study_of_no_error(clock: Clock) -> None:
    class SpentAtOnce(fakes.FakeExecutor):
        def describe(self) -> DataInfo:
            raise ProcessSpent("out of step")

    study = FakeStudy([Assignment(jobs=(probe(1),))])
    for make in (SpentAtOnce, lambda: FailingExecutor(clock, run=ProcessSpent("out of step"))):
        with pytest.raises(ProcessSpent):
            Worker("w", study, make).run()
    assert not any(call[0] == "broken" for call in study.calls)


class LaneExecutor(TimedExecutor):
    """Asks for two jobs more whenever one is done."""

    wear = ""

    def fills(self, job: Job) -> bool:
        return True

    def worn(self) -> str:
        return self.wear

    def run(
        self,
        jobs: Sequence[Job],
        fetch: Callable[[str], bytes],
        progress: Callable[[str, int], None],
        more: More | None = None,
    ) -> Iterator[Result]:
        assert more is not None
        waiting = list(jobs)
        while waiting:
            job = waiting.pop(0)
            self._clock.now += self.job_s
            yield Result(key=job.key)
            waiting += more(job, 2)


def test_free_lanes_are_filled_after_what_is_done_was_told(clock: Clock) -> None:
    further = [Assignment(jobs=(probe(2), probe(3))), Assignment()]
    study = AheadStudy([Assignment(jobs=(probe(1),)), Assignment()], beside=further)
    Worker("w", study, lambda: LaneExecutor(clock, 0.001), most_at_once=8).run()
    assert study.calls == [
        ("hello", "w", "fake"),
        ("pull", 1),
        ("push", "probe/1"),
        ("pull beside", 2, "probe/1"),
        ("push", "probe/2"),
        ("pull beside", 2, "probe/2"),
        ("push", "probe/3"),
        ("pull beside", 2, "probe/3"),
        ("pull", 1),  # nothing was asked ahead, and one job is asked for however short they are
        ("pull", 1),
    ]


def test_job_that_is_at_hand_already_is_not_begun_again(clock: Clock) -> None:
    study = FakeStudy(
        [Assignment(jobs=(probe(1), probe(2)))],
        beside=[Assignment(jobs=(probe(2), probe(3))), Assignment(jobs=(probe(3),))],
    )
    executor = LaneExecutor(clock)
    Worker("w", study, lambda: executor).run()
    assert [call[1] for call in study.calls if call[0] == "push"] == ["probe/1", "probe/2", "probe/3"]


def test_worn_executor_gets_no_more_lanes_and_makes_room(clock: Clock) -> None:
    executor = LaneExecutor(clock, 9.0)
    executor.wear = "it keeps the memory of its GPU"
    study = FakeStudy([Assignment(jobs=(probe(1),))], beside=[Assignment(jobs=(probe(2),))])
    with pytest.raises(ProcessSpent, match="memory"):
        Worker("w", study, lambda: executor).run()
    assert study.calls == [("hello", "w", "fake"), ("pull", 1), ("push", "probe/1")]


def test_lanes_are_not_filled_while_other_jobs_are_on_their_way(clock: Clock) -> None:
    class Undecided(LaneExecutor):
        def fills(self, job: Job) -> bool:
            return False

        def run(
            self,
            jobs: Sequence[Job],
            fetch: Callable[[str], bytes],
            progress: Callable[[str, int], None],
            more: More | None = None,
        ) -> Iterator[Result]:
            given.append(more is not None)
            for job in jobs:
                self._clock.now += self.job_s
                yield Result(key=job.key)

    given: list[bool] = []
    study = AheadStudy([Assignment(jobs=(probe(number),)) for number in range(3)])
    Worker("w", study, lambda: Undecided(clock, SHORT_JOB_S / 2), most_at_once=1).run()
    assert given == [True, False, False]  # from the second on the next was asked for ahead
