"""The study: who holds which job, which result counts, and what a crash leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpsearch.assembly import make_stages, open_study
from hpsearch.blobs import BlobStore
from hpsearch.budget import Budget
from hpsearch.errors import HpsearchError, JournalError, NoUsableTrial, UserCodeError
from hpsearch.events import Event, Finished, Opened, Returned
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Assignment, DataInfo, Job, Result, TrainJob
from hpsearch.journal import FILE_NAME, Journal, read_journal
from hpsearch.leases import FIRST_LEASE_S, INHERIT_S, MOST_DEATHS, Seat
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.study import Study
from hpsearch.trial import TrialState
from hpsearch.worker import More, Worker
from tests import fakes
from tests.same_study import held

SPACE = """
name: leases
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
"""
INFO = fakes.FakeExecutor().describe()


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Study]]:
    """A new study in `tmp_path` with the fake clock, closed at the end; without `background` no thread is used."""
    made: list[Study] = []

    def study(*overrides: str, background: bool = False, budget: Budget | None = None) -> Study:
        spec = parse_spec(SPACE, overrides=overrides)
        journal = Journal.open(tmp_path, wait_s=0, clock=clock, steady=clock)
        state, blobs = StudyState(), BlobStore(tmp_path)
        stages = make_stages(spec, state, fakes.make_sampler(spec), blobs)
        opened = Opened(study=spec.name, uid="u", spec=spec.dump(), spec_text="")
        state.apply(opened, journal.append(opened).time)
        made.append(
            Study(
                journal=journal,
                state=state,
                stages=stages,
                blobs=blobs,
                budget=budget,
                clock=clock,
                background=background,
            )
        )
        return made[-1]

    yield study
    for each in made:
        each.close()


def taken_up(run_dir: Path, *overrides: str, background: bool = False, **environment: str) -> Study:
    """The study of a directory, begun or gone on with by a driver of its own.

    Args:
        environment: as the driver tells it: on which host it is, and since when that runs.
    """
    spec = parse_spec(SPACE, overrides=overrides)
    return open_study(
        run_dir, spec, make_sampler=fakes.make_sampler, environment=environment, background=background, wait_s=0
    )


def take(study: Study, worker: str) -> TrainJob:
    (job,) = study.pull(worker).jobs
    assert isinstance(job, TrainJob)
    return job


def answer(job: Job, executor: fakes.FakeExecutor | None = None) -> Result:
    (result,) = (executor or fakes.FakeExecutor()).run([job], lambda ref: b"", lambda key, epoch: None)
    return result


def crash(job: Job, message: str = "ValueError: bad", frame: str = "t.py:3 in model") -> Result:
    return Result(key=job.key, outcome="crashed", message=message, frame=frame)


def work(study: Study, worker: str = "w", executor: fakes.FakeExecutor | None = None) -> None:
    """One worker to the study's end."""
    runner = Worker(worker, study, lambda: executor or fakes.FakeExecutor())
    if runner.begin():
        while runner.step():
            pass


def finished(tmp_path: Path) -> list[Finished]:
    return [entry.event for entry in read_journal(tmp_path) if isinstance(entry.event, Finished)]


# Leases


def test_job_of_a_lost_worker_is_given_out_again(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("a", INFO)
    job = take(study, "a")
    study.lost("a")
    assert take(study, "b") == job


def test_trial_of_a_lost_worker_is_not_blamed(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("a", INFO)
    for _ in range(5):
        job = take(study, "a")
        study.lost("a")
    assert study.state.trials[job.trial].crashes == 0
    assert study.state.trials[job.trial].state is TrialState.WAITING


def test_second_copy_of_a_result_is_ignored(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("a", INFO)
    result = answer(take(study, "a"))
    study.push("a", [result])
    study.push("a", [result])
    study.push("a", [result, result])
    study.close()
    assert [event.key for event in finished(tmp_path)] == [result.key]


def test_two_copies_in_one_batch_count_once(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("a", INFO)
    result = answer(take(study, "a"))
    study.push("a", [result, result])
    study.close()
    assert len(finished(tmp_path)) == 1
    assert len(study.state.trials[0].curve) == 1


def test_result_of_a_job_that_nobody_holds_is_ignored(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("a", INFO)
    study.push("a", [Result(key="train/7/0-1"), Result(key="ramp/all/0"), Result(key="no such job")])
    study.close()
    assert finished(tmp_path) == []
    assert study.state.trials == {}


def test_worker_lost_while_its_result_is_kept_leaves_no_trial_behind(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that cannot be paused lives in its worker's memory; nobody may wait for a worker that is gone."""
    study = make("search.trials=1")
    study.hello("a", INFO)
    job = take(study, "a")
    keep = BlobStore.keep

    def lose(self: BlobStore, blobs: dict[str, bytes]) -> None:
        study.lost("a")
        keep(self, blobs)

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "keep", lose)
        study.push("a", [answer(job, Unpausable())])
    assert take(study, "b").key == "train/0/1-3"


def test_result_pushed_by_two_workers_counts_once(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("slow", INFO)
    result = answer(take(study, "slow"))
    study.lost("slow")
    study.hello("quick", INFO)
    assert answer(take(study, "quick")) == result
    study.push("slow", [result])  # it was not dead after all
    study.push("quick", [result])
    study.close()
    assert [(event.key, event.worker) for event in finished(tmp_path)] == [(result.key, "slow")]


def test_lease_without_progress_expires(make: Callable[..., Study], clock: Clock, tmp_path: Path) -> None:
    study = make()
    study.hello("hung", INFO)
    job = take(study, "hung")
    clock.now = FIRST_LEASE_S
    assert take(study, "other") != job
    clock.now = FIRST_LEASE_S + 1
    assert take(study, "third") == job
    study.close()
    returned = [entry.event for entry in read_journal(tmp_path) if isinstance(entry.event, Returned)]
    assert (returned[0].key, returned[0].worker, returned[0].reason) == (job.key, "hung", "no progress for 1800 s")


def test_progress_keeps_a_lease_alive(make: Callable[..., Study], clock: Clock) -> None:
    study = make()
    study.hello("slow", INFO)
    job = take(study, "slow")
    for _ in range(4):
        clock.now += study.pull("slow", slots=0).first_lease_s - 1
        study.progress("slow", [job.key])
        assert study.pull("other", slots=0).jobs == ()
    assert job.key in study.state.leases
    study.push("slow", [answer(job)])
    assert study.state.trials[job.trial].epoch == 1


def test_jobs_in_lanes_keep_their_leases_while_another_of_the_worker_is_trained_alone(
    make: Callable[..., Study], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneAfterTheOther(fakes.FakeExecutor):
        def fills(self, job: Job) -> bool:
            return True

        def run(
            self,
            jobs: Sequence[Job],
            fetch: Callable[[str], bytes],
            progress: Callable[[str, int], None],
            more: More | None = None,
        ) -> Iterator[Result]:
            assert more is not None
            for job in [*jobs, *more(jobs[-1], 3)]:
                for _ in range(100):
                    clock.now += 30.0
                    progress(job.key, 0)
                    assert study.pull("other", slots=0).jobs == ()
                yield answer(job)

    monkeypatch.setattr("hpsearch.worker.time", SimpleNamespace(perf_counter=clock))
    study = make()
    worker = Worker("w", study, OneAfterTheOther)
    worker.begin()
    worker.step()
    assert [record.epoch for record in study.state.trials.values()] == [1, 1, 1, 1]
    study.close()
    assert not any(isinstance(entry.event, Returned) for entry in read_journal(tmp_path))


def test_progress_of_an_unknown_job_is_passed_over(make: Callable[..., Study], clock: Clock) -> None:
    study = make()
    study.hello("w", INFO)
    study.progress("w", ["train/99/0-1"])
    clock.now = 10 * FIRST_LEASE_S
    assert take(study, "w").trial == 0


def test_job_that_hangs_whoever_takes_it_is_crashed_not_given_out_for_ever(
    make: Callable[..., Study], clock: Clock
) -> None:
    study = make()
    study.hello("w0", INFO)
    job = take(study, "w0")
    for n in range(1, MOST_DEATHS):
        clock.now += FIRST_LEASE_S + 1
        assert take(study, f"w{n}") == job
    clock.now += FIRST_LEASE_S + 1
    study.pull("other", slots=0)
    trial = study.state.trials[job.trial]
    assert (trial.crashes, trial.message) == (1, "no progress for 1800 s, 3 times")


def test_lease_is_several_of_the_longest_silence_that_ended_well(make: Callable[..., Study], clock: Clock) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    for _ in range(3):
        clock.now += 20.0
        study.progress("w", [job.key])
    told = study.pull("x", slots=0)
    assert (told.lease_s, told.first_lease_s) == (200.0, 300.0)
    clock.now += 200.0
    assert take(study, "other") != job
    clock.now += 1.5
    assert take(study, "third") == job


def test_result_that_comes_after_its_lease_counts_if_nobody_else_brought_it(
    make: Callable[..., Study], clock: Clock
) -> None:
    study = make()
    study.hello("slow", INFO)
    job = take(study, "slow")
    clock.now = FIRST_LEASE_S + 1
    study.pull("other", slots=0)
    assert job.key not in study.state.leases
    study.push("slow", [answer(job)])
    study.push("slow", [answer(job)])
    assert [row.epoch for row in study.state.trials[job.trial].curve] == [1]
    assert take(study, "other") != job


def test_study_ends_though_late_results_came_out_of_order(make: Callable[..., Study], clock: Clock) -> None:
    study = make("search.trials=2", "early_stopping.max_epochs=1")
    study.hello("late", INFO)
    first, second = (take(study, "late") for _ in range(2))
    clock.now = FIRST_LEASE_S + 1
    study.pull("other", slots=0)
    study.push("late", [answer(second)])
    study.push("late", [answer(first)])
    executor = fakes.FakeExecutor()
    for _ in range(40):
        study.push("late", [answer(job, executor) for job in study.pull("late", slots=4).jobs])
    assert study.ended
    assert study.failure is None


def test_worker_whose_nodes_go_while_it_loads_its_data_is_not_blamed_on_the_task(make: Callable[..., Study]) -> None:
    study = make()
    for n in range(4 * MOST_DEATHS):
        study.arriving("w", f"node-{n}", 100 + n)
        study.lost("w", "its node went")
    assert study.failure is None
    for n in range(MOST_DEATHS + 1):
        study.arriving("w", "node", n + 1)
    assert study.failure is not None


def test_disk_that_fails_while_nothing_happens_ends_the_study_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = taken_up(tmp_path, background=True)

    def fail(self: Study) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Study, "_keep_house", fail)
    deadline = time.monotonic() + 20
    while study.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "internal error: PermissionError: read-only" in str(study.failure)
    monkeypatch.undo()
    study.close()


def test_resume_after_the_budget_ended_the_search_keeps_what_came_after_it(tmp_path: Path) -> None:
    study = taken_up(tmp_path, "budget.epochs=6")
    study.hello("w", INFO)
    while not any(key.startswith("evaluate/") for key in study.state.results):
        study.push("w", [answer(job) for job in study.pull("w").jobs])
    before = {key for key in study.state.results if key.startswith("evaluate/")}
    study.close()
    again = taken_up(tmp_path, "budget.epochs=6")
    assert before <= set(again.state.results)
    assert again.state.search_ended
    again.close()


def test_sign_of_life_after_the_lease_takes_the_job_back_unless_another_has_it(
    make: Callable[..., Study], clock: Clock
) -> None:
    study = make()
    study.hello("slow", INFO)
    job = take(study, "slow")
    clock.now = FIRST_LEASE_S + 1
    study.pull("other", slots=0)
    study.progress("slow", [job.key])
    assert study.state.leases[job.key].worker == "slow"
    study.lost("slow")
    assert take(study, "other") == job
    study.progress("slow", [job.key])
    assert study.state.leases[job.key].worker == "other"


def reopened(tmp_path: Path, clock: Clock) -> Study:
    """The study of the same directory as a restarted process finds it: in a copy, since nobody was killed here."""
    spec = parse_spec(SPACE)
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    return open_study(
        copy,
        spec,
        make_sampler=fakes.make_sampler,
        clock=clock,
        monotonic=clock,
        background=False,
        inherit_leases=True,
    )


def test_restarted_study_leaves_jobs_with_workers_that_announce_them(
    make: Callable[..., Study], clock: Clock, tmp_path: Path
) -> None:
    first = make()
    first.arriving("alive", "n1", 11)
    first.hello("alive", INFO)
    kept, dropped = take(first, "alive"), take(first, "dead")
    first._journal.commit()
    study = reopened(tmp_path, clock)
    assert study.workers()["alive"] == Seat(node="n1", pid=11, alive=True)
    study.progress("alive", [kept.key])
    assert take(study, "new") not in (kept, dropped)
    clock.now += INHERIT_S + 1
    assert take(study, "new") == dropped
    study.push("alive", [answer(kept)])
    assert study.state.trials[kept.trial].epoch == 1
    study.close()


def test_worker_whose_process_died_is_blamed_on_its_job_and_a_node_is_not(
    make: Callable[..., Study],
) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    for _ in range(3 * MOST_DEATHS):
        study.lost("w", "its node went")
        study.arriving("w", "node", 1)
        study.hello("w", INFO)
        assert take(study, "w") == job
    for _ in range(MOST_DEATHS):
        study.lost("w", "its process died", blame_job=True)
        study.arriving("w", "node", 1)
        study.hello("w", INFO)
        if job.key not in study.state.leases:
            study.pull("w")
    assert study.state.trials[job.trial].crashes == 1


def test_job_that_ran_out_of_memory_is_tried_again_with_nothing_beside_it(make: Callable[..., Study]) -> None:
    study = make()
    for name in ("a", "b"):
        study.arriving(name, "node", 1)
        study.hello(name, INFO)
    study.arriving("c", "elsewhere", 1)
    big, small, far = take(study, "a"), take(study, "b"), take(study, "c")
    study.push("a", [Result(key=big.key, outcome="out_of_memory", message="out of memory")])
    assert study.pull("a").jobs == ()  # b is at work on the same node
    study.push("b", [answer(small)])
    assert take(study, "a") == big
    assert study.pull("b").jobs == ()
    study.push("c", [answer(far)])
    assert take(study, "c").trial not in (big.trial, small.trial)
    study.push("a", [Result(key=big.key, outcome="out_of_memory", message="out of memory")])
    assert study.state.trials[big.trial].failed
    assert study.pull("b").jobs != ()


def test_worker_restarted_under_its_name_finds_its_job_again(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    study.arriving("w")
    assert study.hello("w", INFO).error == ""
    assert take(study, "w") == job
    study.close()
    returned = [entry.event for entry in read_journal(tmp_path) if isinstance(entry.event, Returned)]
    assert [event.reason for event in returned] == ["its worker was restarted"]


def test_job_that_keeps_killing_its_process_is_crashed_not_given_out_for_ever(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    for _ in range(2 * MOST_DEATHS):
        assert take_or_same(study, job) == job
        study.arriving("w")
        study.hello("w", INFO)
    trial = study.state.trials[job.trial]
    assert trial.state is TrialState.FAILED
    assert trial.message.startswith("the worker's process died 3 times in this job")


def test_jobs_that_shared_a_process_which_died_are_given_out_singly_until_it_is_known_which_it_was(
    make: Callable[..., Study],
) -> None:
    study = make("preflight.enabled=false")
    study.hello("w", INFO)
    jobs = study.pull("w", 4).jobs
    deadly = jobs[2]
    assert isinstance(deadly, TrainJob)
    n_together = []
    while not study.state.trials[deadly.trial].failed:
        if deadly in jobs:
            n_together.append(len(jobs))
            assert n_together == [4] or study.pull("w", 4).jobs == ()  # not even asked for ahead
            study.lost("w", "its process died", blame_job=True)
            study.arriving("w", "node", 1)
            study.hello("w", INFO)
        else:
            study.push("w", [answer(job) for job in jobs])
        jobs = study.pull("w", 4).jobs
    assert set(n_together[1:]) == {1}
    assert all(trial.crashes == 0 for trial in study.state.trials.values() if trial.number != deadly.trial)


def die(study: Study) -> None:
    """The study's process is killed, its journal on disk."""
    study._journal.close()
    study._blobs.close()


def test_job_that_takes_the_machine_down_is_failed_after_several_launches_and_its_neighbour_is_not(
    tmp_path: Path,
) -> None:
    deadly, n_boots = 1, 0
    for n_boots in range(1, 99):
        study = taken_up(tmp_path, host="here", boot=str(n_boots))
        if study.state.trials and study.state.trials[deadly].failed:
            break
        for name in ("a", "b"):
            study.hello(name, INFO)
        hands: dict[str, Job] = {}
        while deadly not in {job.trial for job in hands.values() if isinstance(job, TrainJob)}:
            for name in sorted({"a", "b"} - hands.keys()):
                for job in study.pull(name).jobs:
                    hands[name] = job
            if n_boots > 1 and len(hands) == 1:  # after two deaths no two suspects are at work together
                (name, job), *_ = hands.items()
                if job.key != f"train/{deadly}/0-1":
                    study.push(name, [answer(hands.pop(name))])
        die(study)
    assert n_boots == MOST_DEATHS + 1
    trial = study.state.trials[deadly]
    assert (trial.crashes, trial.message) == (1, "the machine went down 3 times with this job at work")
    assert all(other.crashes == 0 for other in study.state.trials.values() if other is not trial)
    for name in ("a", "b"):
        study.hello(name, INFO)
        work(study, name)
    assert study.state.done
    study.close()


@pytest.mark.parametrize(("host", "boot"), [("here", "1"), ("host-{n}", "{n}")], ids=["killed", "moved"])
def test_driver_that_is_killed_or_moves_to_another_machine_blames_no_job(tmp_path: Path, host: str, boot: str) -> None:
    for n in range(2 * MOST_DEATHS):
        study = taken_up(tmp_path, host=host.format(n=n), boot=boot.format(n=n))
        study.hello("w", INFO)
        assert take(study, "w").trial == 0
        die(study)
    assert StudyState.of(read_journal(tmp_path)).deaths == {}


def test_deaths_of_a_job_are_counted_over_all_launches_until_the_task_is_mended(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    for n in range(MOST_DEATHS):
        study = taken_up(tmp_path)
        assert study.state.deaths.total() == n
        study.hello("w", INFO)
        job = take(study, "w")
        study.lost("w", "its process died", blame_job=True)
        die(study)
    state = StudyState.of(read_journal(tmp_path))
    assert state.trials[job.trial].crashes == 1
    assert state.deaths == {}
    state.apply(Returned(key=job.key, worker="w", reason="", blamed=True), 9.0)
    assert state.opened is not None
    state.apply(dataclasses.replace(state.opened, code={"task.py": "mended"}), 10.0)
    assert state.deaths == {}


def take_or_same(study: Study, job: TrainJob) -> TrainJob:
    """The job in the worker's hands, taken again when it was returned."""
    return job if job.key in study.state.leases else take(study, "w")


def test_worker_that_dies_before_its_data_are_loaded_ends_the_study(make: Callable[..., Study]) -> None:
    study = make()
    for _ in range(MOST_DEATHS):
        study.arriving("w")
        assert study.failure is None
    study.arriving("w")
    assert study.failure is not None
    assert "died 3 times while it loaded the task and its data" in study.failure.message


def test_question_of_a_dead_worker_takes_no_job(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("w", INFO)
    while study.pull("w").jobs:
        pass  # until all there is lies in its hands, and the next question has to wait
    answers: list[Assignment] = []
    asking = threading.Thread(target=lambda: answers.append(study.pull("w", timeout_s=60.0)))
    asking.start()
    time.sleep(0.1)
    study.arriving("w")
    asking.join(timeout=10)
    assert answers == [Assignment()]
    assert study.pull("w").jobs


def test_defect_met_while_a_result_is_kept_ends_the_study_with_a_word(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(background=True)
    study.hello("w", INFO)
    job = take(study, "w")
    monkeypatch.setattr(study._keeping, "sweep", lambda: 1 / 0)
    study.push("w", [answer(job)])
    deadline = time.monotonic() + 10
    while not study.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert study.failure is not None
    assert "internal error: ZeroDivisionError" in study.failure.message


def test_several_slots_are_filled_with_different_jobs(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("w", INFO)
    jobs = study.pull("w", slots=4).jobs
    assert len({job.key for job in jobs}) == 4
    assert set(study.state.leases) == {job.key for job in jobs}


def test_nothing_is_given_out_after_stop_but_results_still_count(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    study.stop("interrupted")
    assumed = study.pull("w")
    assert (assumed.jobs, assumed.ended) == ((), True)
    study.push("w", [answer(job)])
    study.close()
    assert [event.key for event in finished(tmp_path)] == [job.key]


# Data


def test_worker_with_other_data_is_refused_with_both_row_counts(make: Callable[..., Study]) -> None:
    study = make()
    assert study.hello("a", INFO).error == ""
    other = dataclasses.replace(INFO, fingerprint="other", n_rows={"train": 299, "val": 121})
    assert study.hello("b", other).error == (
        "Task.data() gave b other data than the first worker got "
        "(rows {'train': 299, 'val': 121}, the study's {'train': 300, 'val': 120, 'ensemble': 120, 'test': 120})"
    )
    assert study.hello("c", INFO).error == ""


def test_worker_with_other_data_stops_the_study_and_never_gets_a_job(make: Callable[..., Study]) -> None:
    class Unseeded(fakes.FakeExecutor):
        def describe(self) -> DataInfo:
            return dataclasses.replace(INFO, fingerprint="other")

    study = make()
    study.hello("a", INFO)
    refused = Unseeded()
    work(study, "b", refused)
    assert refused.ran == []
    assert isinstance(study.failure, UserCodeError)
    assert "Task.data() gave b other data" in study.failure.message
    assert study.failure.hint == "seed every random choice in Task.data(); data changed on purpose need a new --run-dir"


def test_data_that_changed_between_two_drivers_are_refused(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("a", INFO)
    study.close()
    again = taken_up(tmp_path)
    assert again.hello("a", dataclasses.replace(INFO, fingerprint="other")).error
    again.close()


# Crashes


def test_same_crash_of_three_trials_stops_the_study(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    jobs = study.pull("w", slots=3).jobs
    study.push("w", [crash(jobs[0], "ValueError: 1"), crash(jobs[1], "ValueError: 2")])
    assert study.failure is None
    study.push("w", [crash(jobs[2], "ValueError: 3")])
    assert isinstance(study.failure, UserCodeError)
    assert str(study.failure) == (
        "error[task]: t.py:3 in model: ValueError: 3\n"
        "  hint: the same error ended 3 jobs, so the study was stopped; mend the task or space.yaml, then launch again "
        "with --resume (after a change of data(): with a new --run-dir)"
    )
    assert study.pull("w").ended
    study.close()
    ended = StudyState.of(read_journal(tmp_path)).ended
    assert ended is not None
    assert (ended.reason, ended.message) == ("failed", str(study.failure))


class SlowDisk:
    """A disk on which a study's journal is stuck until it is let go."""

    def __init__(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        self._commit = study._journal.commit
        self._free = threading.Event()
        self.is_waited_for = threading.Event()
        monkeypatch.setattr(study._journal, "commit", self._stuck)

    def _stuck(self) -> None:
        if threading.current_thread().name == "keeper":
            self.is_waited_for.set()
            assert self._free.wait(20)
        self._commit()

    def let_go(self) -> None:
        self._free.set()


def test_worker_that_crashed_gets_nothing_before_its_crash_counts_however_slow_the_disk(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a bug that every trial hits ends them all, while the first three are on their way to the disk."""
    study = make(background=True)
    study.hello("w", INFO)
    study.hello("other", INFO)
    disk = SlowDisk(study, monkeypatch)
    first = take(study, "w")
    assert disk.is_waited_for.wait(20)
    study.push("w", [crash(first)])
    assert study.pull("w").jobs == ()
    assert take(study, "other").trial != first.trial  # nobody else waits
    disk.let_go()
    assert study.pull("w", timeout_s=20.0).jobs


def test_worker_is_given_several_jobs_only_of_the_kind_that_it_delivered_last(tmp_path: Path) -> None:
    """It asks for several since those it had were short: ramps and baselines tell nothing of a trial's length."""
    study = open_study(tmp_path, parse_spec(SMALL), make_sampler=fakes.make_sampler, background=False)
    study.hello("w", INFO)
    kinds: list[tuple[str, int]] = []
    while "train" not in dict(kinds[:-1]):
        jobs = study.pull("w", slots=2).jobs
        kinds.append((jobs[0].kind, len(jobs)))
        study.push("w", [answer(job) for job in jobs])
    study.close()
    assert kinds[0] == ("ramp", 2)
    assert [n for kind, n in kinds if kind == "train"] == [1, 2]


def test_events_are_applied_in_the_order_of_the_journal_while_a_result_waits_for_the_disk(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What an asynchronous rule decides depends on the order; a resumed study has only the journal's."""
    study = make("early_stopping.type=asha", background=True)
    applied: list[str] = []
    apply = study.state.apply

    def spied(event: Event, time: float) -> None:
        applied.append(event.type)
        apply(event, time)

    monkeypatch.setattr(study.state, "apply", spied)
    study.hello("a", INFO)
    disk = SlowDisk(study, monkeypatch)
    job = take(study, "a")
    study.push("a", [answer(job)])
    assert disk.is_waited_for.wait(20)
    take(study, "b")
    take(study, "c")
    disk.let_go()
    study.close()
    assert [entry.event.type for entry in read_journal(tmp_path)][-len(applied) :] == applied
    assert applied.index("finished") < len(applied) - 2


def test_retry_of_one_trial_is_not_a_second_witness(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("w", INFO)
    for _ in range(4):  # two trials, each twice
        job = take(study, "w")
        study.push("w", [crash(job)])
    assert study.failure is None
    assert [trial.state for trial in study.state.trials.values()] == [TrialState.FAILED] * 2


def test_different_crashes_do_not_stop_the_study(make: Callable[..., Study]) -> None:
    study = make()
    study.hello("w", INFO)
    for index, job in enumerate(study.pull("w", slots=6).jobs):
        study.push("w", [crash(job, frame=f"t.py:{index} in model")])
    assert study.failure is None


def test_search_without_a_usable_trial_says_what_became_of_them(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    work(study, executor=fakes.FakeExecutor(diverge_above=0.0))
    assert isinstance(study.failure, NoUsableTrial)
    assert study.failure.message == "none of 9 trials left a finite checkpoint (9 diverged)"
    study.close()
    ended = StudyState.of(read_journal(tmp_path)).ended
    assert ended is not None
    assert ended.reason == "no usable trial"


# Budget


def test_budget_of_epochs_ends_the_search_and_the_ensemble_still_comes(make: Callable[..., Study]) -> None:
    study = make(budget=Budget(epochs=4))
    work(study)
    assert study.failure is None
    assert study.state.done
    assert study.state.n_epochs <= 6  # a job may go over it, none is begun after
    assert study.state.selected is not None
    assert study.state.compared is not None


def test_budget_of_hours_ends_the_search_and_the_ensemble_still_comes(make: Callable[..., Study], clock: Clock) -> None:
    study = make(budget=Budget(hours=1.0))
    study.hello("w", INFO)
    for _ in range(3):
        study.push("w", [answer(take(study, "w"))])
    clock.now = 3600.0
    assert not any(isinstance(job, TrainJob) for job in study.pull("w", slots=9).jobs)
    study.lost("w")
    work(study)
    assert study.state.done
    assert len(study.state.trials) == 3
    assert study.state.selected is not None


def test_budget_waits_for_what_is_running(make: Callable[..., Study]) -> None:
    study = make(budget=Budget(epochs=2))
    study.hello("w", INFO)
    first, second = study.pull("w", slots=2).jobs
    study.push("w", [answer(first)])
    assert not any(isinstance(job, TrainJob) for job in study.pull("w").jobs)
    assert not study.state.search_ended
    study.push("w", [answer(second)])
    assert study.state.search_ended
    assert study.state.trials[1].epoch == 1


def test_gpu_hours_count_while_a_worker_holds_a_job_and_not_while_it_waits(
    make: Callable[..., Study], clock: Clock
) -> None:
    study = make(budget=Budget(gpu_hours=1.0, gpus_per_worker=0.5))
    study.hello("w", INFO)
    for hours, ends in ((1.5, False), (0.4, False), (0.2, True)):
        clock.now += 5 * 3600  # nothing is leased
        job = take(study, "w")
        clock.now += hours * 3600
        study.push("w", [answer(job)])
        study.pull("w", slots=0)
        assert study.state.search_ended is ends


def test_epochs_in_workers_hands_count_towards_the_budget(make: Callable[..., Study]) -> None:
    study = make(budget=Budget(epochs=3))
    study.hello("a", INFO)
    jobs = [take(study, name) for name in ("a", "b", "c")]
    assert not any(isinstance(job, TrainJob) for job in study.pull("d").jobs)
    for name, job in zip(("a", "b", "c"), jobs, strict=True):
        study.push(name, [answer(job)])
    assert study.state.n_epochs == 3
    assert study.state.search_ended


def test_lanes_take_no_more_than_the_budget(make: Callable[..., Study]) -> None:
    study = make(budget=Budget(epochs=3))
    study.hello("a", INFO)
    first = take(study, "a")
    assert len(study.pull("a", 8, beside=first).jobs) == 2


def test_last_new_trials_are_shared_among_the_workers_that_ask(make: Callable[..., Study]) -> None:
    study = make("search.trials=12")
    study.hello("a", INFO)
    first, second = take(study, "a"), take(study, "b")
    assert len(study.pull("a", 3, beside=first).jobs) == 3  # more are left than both could take
    assert len(study.pull("a", 7, beside=first).jobs) == 2  # with it half of the twelve
    assert len(study.pull("b", 7, beside=second).jobs) == 5
    study.lost("b")
    assert len(study.pull("a", 7, beside=first).jobs) == 6


def test_one_worker_alone_takes_all_that_its_lanes_hold(make: Callable[..., Study]) -> None:
    study = make("search.trials=12")
    study.hello("a", INFO)
    assert len(study.pull("a", 64, beside=take(study, "a")).jobs) == 11


# Disk


def test_full_disk_ends_the_study_and_what_was_kept_goes_on(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make()
    study.hello("w", INFO)
    study.push("w", [answer(take(study, "w"))])
    job = take(study, "w")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left on device"):
            study.push("w", [answer(job)])
    study.close()
    again = taken_up(tmp_path)
    assert again.state.trials[0].epoch == 1
    work(again)
    assert again.state.done
    again.close()


def test_disk_that_fills_within_a_line_leaves_a_study_that_can_be_resumed(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    study = make("search.trials=500")
    study.hello("w", INFO)
    size = (tmp_path / FILE_NAME).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        study.pull("w", slots=200)
        assert isinstance(study.failure, JournalError)
        assert len(read_journal(tmp_path)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    study.close()  # there is room again, and nothing was lost
    assert len(StudyState.of(read_journal(tmp_path)).trials) == 200


def test_full_disk_is_told_as_failure_when_a_thread_keeps(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(background=True)
    study.hello("w", INFO)
    job = take(study, "w")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        study.push("w", [answer(job)])
        for _ in range(200):
            if study.ended:
                break
            threading.Event().wait(0.02)
        assert isinstance(study.failure, JournalError)
    study.close()
    assert finished(tmp_path) == []


def test_replaced_checkpoints_are_deleted_and_the_last_and_best_are_kept(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    study = make()
    work(study)
    study.close()
    kept = {f"checkpoints/{path.name}" for path in (tmp_path / "checkpoints").iterdir()}
    named = {ref for t in study.state.trials.values() for ref in (t.checkpoint, t.best_checkpoint) if ref}
    assert kept == named


# Threads


def test_many_threads_and_500_trials_leave_a_consistent_journal(tmp_path: Path) -> None:
    study = taken_up(tmp_path, "search.trials=500", background=True)
    threads = [threading.Thread(target=work, args=(study, f"w{index}")) for index in range(8)]
    for thread in threads:
        thread.start()
    for index in range(20):  # workers that are taken for dead while they work
        study.lost(f"w{index % 8}")
        threading.Event().wait(0.01)
    for thread in threads:
        thread.join()
    study.close()

    entries = read_journal(tmp_path)
    assert [entry.seq for entry in entries] == list(range(len(entries)))
    assert held(entries) == set()

    replayed = StudyState.of(entries)
    assert replayed.done
    assert len(replayed.trials) == 500
    assert replayed.trials == study.state.trials
    assert replayed.results == study.state.results
    assert replayed.selected == study.state.selected
    for trial in replayed.trials.values():
        assert [row.epoch for row in trial.curve] == list(range(1, trial.epoch + 1))


def test_worker_that_is_lost_while_it_waits_for_work_is_given_none(tmp_path: Path) -> None:
    """Its question outlives it: a job given in answer would be in nobody's hands."""
    study = taken_up(tmp_path, "search.trials=1", background=True)
    study.hello("a", INFO)
    jobs = [job for _ in range(9) for job in study.pull("a").jobs]  # all there is for now
    waiting = threading.Thread(target=study.pull, args=("b",), kwargs={"timeout_s": 20.0})
    waiting.start()
    threading.Event().wait(0.05)
    study.lost("b")
    study.push("a", [answer(job) for job in jobs])
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    assert all(lease.worker != "b" for lease in study.state.leases.values())
    study.close()


def test_worker_that_waits_is_woken_by_the_result_it_waits_for(tmp_path: Path) -> None:
    study = taken_up(tmp_path, "search.trials=1", background=True)
    study.hello("a", INFO)
    job = take(study, "a")
    while beside := study.pull("c").jobs:  # the baselines, which nobody has to wait for
        study.push("c", [answer(other) for other in beside])
    given: list[Job] = []
    waiting = threading.Thread(target=lambda: given.extend(study.pull("b", timeout_s=20.0).jobs))
    waiting.start()
    study.push("a", [answer(job)])
    waiting.join(timeout=10.0)
    study.close()
    assert [job.key for job in given] == ["train/0/1-9"]


# Resume

SMALL = """
name: small
task: task.py:Task
preflight: {enabled: false}
search: {trials: 5}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
lr_range: {seeds: 2, steps: 20}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 3, size: 2}
"""


def launch_of(run_dir: Path, make_executor: Callable[[Spec, Path], fakes.FakeExecutor] = fakes.make_executor) -> Launch:
    return Launch(
        run_dir=run_dir,
        spec=parse_spec(SMALL),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=make_executor,
        lock_wait_s=0,
    )


def run(launch: Launch, workers: int = 1) -> StudyState:
    LocalFleet(launch, workers=workers).run(lambda entries: None)
    return StudyState.of(read_journal(launch.run_dir))


def outcome(state: StudyState) -> object:
    trials = {n: (t.config, t.seed, t.curve, t.state, t.checkpoint) for n, t in state.trials.items()}
    assert state.selected is not None
    assert state.compared is not None
    return trials, state.ranges, state.selected, state.compared.gain


class Unpausable(fakes.FakeExecutor):
    """As a `fit` of the user's own that gives no state: it trains on, or is let go."""

    def _train(self, job: TrainJob) -> Result:
        result = super()._train(job)
        return dataclasses.replace(result, values={**result.values, "checkpoint": None, "resumable": False})


def unpausable_executor(spec: Spec, folder: Path) -> Unpausable:
    return Unpausable()


class Unlucky(fakes.FakeExecutor):
    """Trial 1 diverges at its first rung, trial 2 crashes at every second."""

    def _train(self, job: TrainJob) -> Result:
        if job.trial == 1:
            return Result(key=job.key, outcome="diverged", message="val_loss is nan")
        return crash(job) if job.trial == 2 else super()._train(job)


def unlucky_executor(spec: Spec, folder: Path) -> Unlucky:
    return Unlucky()


@pytest.mark.parametrize(
    ("make_executor", "workers"),
    [(fakes.make_executor, 1), (fakes.make_executor, 2), (unpausable_executor, 2), (unlucky_executor, 2)],
    ids=["one-worker", "two-workers", "no-pausing", "diverging-and-crashing"],
)
def test_study_killed_at_any_event_goes_on_and_keeps_every_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_executor: Callable[[Spec, Path], fakes.FakeExecutor],
    workers: int,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is on disk is not the question, and there are many
    whole = tmp_path / "whole"
    uncut = run(launch_of(whole, make_executor), workers)
    lines = (whole / FILE_NAME).read_bytes().splitlines(keepends=True)
    for n_lines in range(len(lines) + 1):
        cut = tmp_path / f"cut-{n_lines}"
        shutil.copytree(whole, cut)
        (cut / FILE_NAME).write_bytes(b"".join(lines[:n_lines]))
        before = StudyState.of(read_journal(cut))
        after = run(launch_of(cut, make_executor), workers)
        assert after.done
        assert not after.leases
        assert len(after.trials) == 5
        for number, trial in before.trials.items():
            assert after.trials[number].config == trial.config
            assert after.trials[number].seed == trial.seed
            assert after.trials[number].curve[: len(trial.curve)] == trial.curve
        assert after.ranges[: len(before.ranges)] == before.ranges
        assert after.selected is not None
        if workers == 1:  # what is asked next depends on what is known alone, so nothing at all differs
            assert outcome(after) == outcome(uncut)


def test_replay_gives_the_state_that_the_driver_had(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    work(study)
    study.close()
    entries = read_journal(tmp_path)
    assert StudyState.of(entries) == study.state


def test_resumed_study_gives_out_what_the_stopped_one_would_have(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    for _ in range(5):
        study.push("w", [answer(take(study, "w"))])
    expected = [study.pull("w").jobs[0] for _ in range(3)]
    study.close()
    again = taken_up(tmp_path)
    again.hello("w", INFO)
    given = [again.pull("w").jobs[0] for _ in range(3)]
    assert sorted(given, key=lambda job: job.key) == sorted(expected, key=lambda job: job.key)
    again.close()


def test_job_that_a_killed_driver_had_given_out_goes_to_whoever_asks_first(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    study.close()
    again = taken_up(tmp_path)
    again.hello("another", INFO)
    assert take(again, "another") == job
    again.close()
    returned = [entry.event for entry in read_journal(tmp_path) if isinstance(entry.event, Returned)]
    assert [(event.key, event.worker, event.reason) for event in returned] == [(job.key, "w", "the driver went")]


def test_budget_counts_what_earlier_drivers_spent(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    for _ in range(3):
        study.push("w", [answer(take(study, "w"))])
    study.close()
    spent = study.state.n_epochs
    spec = parse_spec(SPACE, overrides=[f"budget.epochs={spent}"])
    again = open_study(tmp_path, spec, make_sampler=fakes.make_sampler, background=False, wait_s=0)
    work(again)
    again.close()
    assert again.state.n_epochs == spent
    assert again.state.done


def test_larger_budget_goes_on_where_the_smaller_ended(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make(budget=Budget(epochs=3))
    work(study)
    study.close()
    assert study.state.done
    assert study.state.n_epochs < 9
    again = taken_up(tmp_path)
    work(again)
    again.close()
    assert len(again.state.trials) == 9
    assert again.state.selected is not None
    assert set(again.state.selected.pool) == {trial.number for trial in again.state.ranking()[:4]}


def test_worker_that_cannot_begin_ends_the_study_with_its_error(make: Callable[..., Study]) -> None:
    study = make()
    error = UserCodeError("FileNotFoundError: digits.csv", frame="task.py:9 in data")
    study.broken("w", error)
    assert study.failure is error
    assert study.ended
    study.broken("v", HpsearchError("a later one"))
    assert study.failure is error


def test_watcher_of_a_study_sees_only_what_is_on_disk(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    study.hello("w", INFO)
    job = take(study, "w")
    result = answer(job)
    study.push("w", [result])
    seen: Sequence[Entry] = read_journal(tmp_path)
    assert any(isinstance(entry.event, Finished) for entry in seen)
    for ref, content in result.blobs.items():
        assert study.fetch(ref) == content
    study.close()
