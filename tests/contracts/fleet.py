"""What every fleet promises. Inherited by the tests of the local and the Tune fleet alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpsearch.errors import HpsearchError, NoUsableTrial, UserCodeError
from hpsearch.fleets import Fleet, Launch
from hpsearch.job import DataInfo, TrainJob
from hpsearch.journal import is_locked, read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.trial import TrialState
from tests import fakes

SPACE = """
name: contract
task: task.py:Task
preflight: {enabled: false}
search: {trials: 27}
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {values: [16, 32]}
lr_range: {seeds: 3}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 6, size: 3}
"""


def crashing_executor(spec: Spec, folder: Path) -> fakes.FakeExecutor:
    return fakes.FakeExecutor(crash=_crash)


def _crash(job: TrainJob) -> str:
    return "ValueError: width must be odd"


def diverging_executor(spec: Spec, folder: Path) -> fakes.FakeExecutor:
    return fakes.FakeExecutor(diverge_above=0.0)


class BrokenExecutor(fakes.FakeExecutor):
    def describe(self) -> DataInfo:
        raise UserCodeError("FileNotFoundError: digits.csv", frame="task.py:9 in data")


def broken_executor(spec: Spec, folder: Path) -> BrokenExecutor:
    return BrokenExecutor()


class FleetContract:
    """Subclasses give `fleet`."""

    @pytest.fixture
    def fleet(self) -> Callable[[Launch], Fleet]:
        raise NotImplementedError  # each fleet's own test class says how to make it

    @pytest.fixture
    def launch(self, tmp_path: Path) -> Launch:
        return Launch(
            run_dir=tmp_path / "run",
            spec=parse_spec(SPACE),
            folder=tmp_path,
            make_sampler=fakes.make_sampler,
            make_executor=fakes.make_executor,
            lock_wait_s=5.0,
        )

    def run(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> StudyState:
        """The study's state as a watcher of the fleet sees it."""
        seen: list[Entry] = []
        running = fleet(launch)
        try:
            running.run(lambda entries: seen.extend(entries))
        finally:
            running.close()
        assert [entry.seq for entry in seen] == [entry.seq for entry in read_journal(launch.run_dir)][-len(seen) :]
        return StudyState.of(read_journal(launch.run_dir))

    def test_study_runs_to_its_end(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        state = self.run(fleet, launch)
        assert state.done
        assert len(state.trials) == 27
        counts = state.counts()
        assert counts[TrialState.COMPLETE] >= 3
        assert counts[TrialState.COMPLETE] + counts[TrialState.STOPPED] == 27
        assert [r.branch for r in state.ranges] == [{"optimizer": "adamw"}, {"optimizer": "sgd"}]
        assert state.selected is not None
        assert 1 <= len(state.selected.members) <= 3
        assert state.compared is not None
        assert state.compared.gain["metric"] == "loss"
        assert not state.leases
        assert not is_locked(launch.run_dir)

    def test_trials_lie_within_the_measured_range(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        state = self.run(fleet, launch)
        for trial in state.trials.values():
            measured = state.range_of({"optimizer": trial.config["optimizer"]})
            assert measured is not None
            assert measured.low <= float(str(trial.config["lr"])) <= measured.high

    def test_study_that_is_done_has_nothing_to_do_when_resumed(
        self, fleet: Callable[[Launch], Fleet], launch: Launch
    ) -> None:
        before = self.run(fleet, launch)
        after = self.run(fleet, launch)
        assert after.done
        assert {n: t.curve for n, t in after.trials.items()} == {n: t.curve for n, t in before.trials.items()}
        assert after.selected == before.selected

    def test_more_trials_keep_the_earlier_ones(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        before = self.run(fleet, launch)
        spec = parse_spec(SPACE, overrides=["search.trials=40"])
        after = self.run(fleet, dataclasses.replace(launch, spec=spec))
        assert after.done
        assert len(after.trials) == 40
        for number, trial in before.trials.items():
            assert after.trials[number].config == trial.config
            assert after.trials[number].curve[: len(trial.curve)] == trial.curve
        assert after.selected is not None
        assert after.selected.n_trials == 40

    def test_bug_that_every_trial_hits_stops_the_study_with_the_users_frame(
        self, fleet: Callable[[Launch], Fleet], launch: Launch
    ) -> None:
        with pytest.raises(UserCodeError, match=r"task\.py:7 in model: ValueError: width must be odd"):
            self.run(fleet, dataclasses.replace(launch, make_executor=crashing_executor))
        state = StudyState.of(read_journal(launch.run_dir))
        assert len(state.trials) < 27
        assert state.ended is not None
        assert state.ended.reason == "failed"

    def test_search_in_which_all_diverge_says_so(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        with pytest.raises(NoUsableTrial, match="none of 27 trials left a finite checkpoint"):
            self.run(fleet, dataclasses.replace(launch, make_executor=diverging_executor))

    def test_task_whose_data_cannot_be_loaded_ends_the_study(
        self, fleet: Callable[[Launch], Fleet], launch: Launch
    ) -> None:
        with pytest.raises(UserCodeError, match=r"task\.py:9 in data: FileNotFoundError: digits\.csv"):
            self.run(fleet, dataclasses.replace(launch, make_executor=broken_executor))

    def test_interrupt_keeps_what_was_finished(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        running = fleet(launch)

        def interrupt(entries: Sequence[Entry]) -> None:
            if any(entry.event.type == "trial" for entry in entries):
                raise KeyboardInterrupt

        try:
            with pytest.raises(KeyboardInterrupt):
                running.run(interrupt)
        finally:
            running.close()
        stopped = StudyState.of(read_journal(launch.run_dir))
        assert stopped.ended is not None
        assert stopped.ended.reason == "interrupted"
        assert self.run(fleet, launch).done

    def test_directory_of_another_study_is_refused(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        self.run(fleet, launch)
        other = parse_spec(SPACE.replace("name: contract", "name: other"))
        with pytest.raises(HpsearchError, match="name: contract -> "):
            self.run(fleet, dataclasses.replace(launch, spec=other))
