"""A study goes on under an edited space.yaml: old trials keep what they have, and what is new follows the new file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpsearch.assembly import open_study
from hpsearch.cli.adapters import make_sampler
from hpsearch.errors import SpecError
from hpsearch.events import Event, Leased, Opened, RangeMeasured, Selected, StageBegan, TrialDrawn
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import Result, TrainJob
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.rungs import rung_epochs
from hpsearch.sampler import SobolSampler, trial_seed
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.trial import TrialState
from tests import fakes

SPACE = """
name: edited
task: task.py:Task
preflight: {enabled: false}
seed: 3
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 0.5, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {min: 8, max: 64}
lr_range: {seeds: 2, steps: 20}
early_stopping: {type: asha, min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is on disk is not the question here


def spec_of(*overrides: str, space: str = SPACE) -> Spec:
    return parse_spec(space, overrides=overrides)


def run(
    run_dir: Path,
    *overrides: str,
    space: str = SPACE,
    workers: int = 1,
    make_executor: Callable[[Spec, Path], fakes.FakeExecutor] = fakes.make_executor,
) -> StudyState:
    """Launch to the end, and check that the study kept what it had."""
    before = state_of(run_dir)
    launch = Launch(
        run_dir=run_dir,
        spec=spec_of(*overrides, space=space),
        folder=run_dir,
        make_sampler=make_sampler,
        make_executor=make_executor,
        lock_wait_s=0,
    )
    LocalFleet(launch, workers=workers).run(lambda entries: None)
    after = state_of(run_dir)
    assert_kept(before, after)
    assert_sound(run_dir, launch.spec)
    return after


def state_of(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir)) if (run_dir / FILE_NAME).exists() else StudyState()


def assert_kept(before: StudyState, after: StudyState) -> None:
    """No old trial has another config, seed or curve."""
    for number, trial in before.trials.items():
        assert after.trials[number].config == trial.config
        assert after.trials[number].seed == trial.seed
        assert after.trials[number].curve[: len(trial.curve)] == trial.curve


def assert_sound(run_dir: Path, spec: Spec) -> None:
    """A finished study that agrees with the spec it was opened with last."""
    state = state_of(run_dir)
    assert state.done
    assert not state.leases
    assert set(range(spec.search.trials)) <= set(state.trials)
    stopping = spec.early_stopping
    for trial in state.trials.values():
        assert [row.epoch for row in trial.curve] == list(range(1, trial.epoch + 1))
        assert trial.seed == trial_seed(spec.seed, trial.number)
        assert trial.epoch >= 1 or trial.diverged or trial.failed
    branches = [repr(found.branch) for found in state.ranges]
    assert len(branches) == len(set(branches))
    for leased in (event for event in last_driver(run_dir) if isinstance(event, Leased) and event.trial is not None):
        assert leased.to_epoch in targets(spec)
        assert leased.from_epoch < leased.to_epoch
    usable = [trial for trial in state.trials.values() if trial.usable and not trial.let_go]
    complete = [trial for trial in usable if trial.epoch >= stopping.max_epochs]
    assert len(complete) >= min(spec.ensemble.size, len(usable))
    assert state.selected is not None
    assert {number for number, _ in state.selected.members} <= set(state.trials)
    assert len(state.selected.members) <= spec.ensemble.size
    assert state.compared is not None


def targets(spec: Spec) -> set[int]:
    """Epochs that trials are trained to."""
    stopping = spec.early_stopping
    if stopping.rule == "none":
        return {stopping.max_epochs}
    if stopping.rule == "median":
        return {*range(stopping.min_epochs, stopping.max_epochs, stopping.min_epochs), stopping.max_epochs}
    return {
        *rung_epochs(stopping.min_epochs, stopping.max_epochs, stopping.reduction_factor),
        stopping.max_epochs,
    }


def last_driver(run_dir: Path) -> list[Event]:
    """Events since the study was opened last."""
    events = [entry.event for entry in read_journal(run_dir)]
    return events[max(i for i, event in enumerate(events) if isinstance(event, Opened)) :]


def outcome(state: StudyState) -> object:
    trials = {n: (t.config, t.seed, t.curve, t.state, t.checkpoint) for n, t in state.trials.items()}
    assert state.selected is not None
    assert state.compared is not None
    return trials, state.ranges, state.selected, state.compared.gain


def cut(whole: Path, to: Path, n_lines: int) -> None:
    """A copy of a run directory as a kill would have left it."""
    shutil.copytree(whole, to)
    lines = (to / FILE_NAME).read_bytes().splitlines(keepends=True)
    (to / FILE_NAME).write_bytes(b"".join(lines[:n_lines]))


def n_lines(run_dir: Path) -> int:
    return len((run_dir / FILE_NAME).read_bytes().splitlines())


def test_study_that_is_opened_again_with_the_same_file_is_not_edited(tmp_path: Path) -> None:
    """What is read back from the journal equals what was written, lists and numbers alike."""
    space = SPACE + "metrics: [f1]\nlr_range: {seeds: 2, per: [optimizer]}\n"
    space = space.replace("lr_range: {seeds: 2, steps: 20}\n", "")
    first = run(tmp_path, space=space)
    again = run(tmp_path, space=space)
    assert not again.edited
    assert outcome(again) == outcome(first)


# Early stopping


def test_longer_training_goes_on_with_complete_trials(tmp_path: Path) -> None:
    before = run(tmp_path)
    after = run(tmp_path, "early_stopping.max_epochs=27")
    assert len(after.trials) == 9
    trained = [e for e in last_driver(tmp_path) if isinstance(e, Leased) and e.trial is not None]
    assert {(e.from_epoch, e.to_epoch) for e in trained} == {(9, 27)}
    assert {e.trial for e in trained} <= {n for n, t in before.trials.items() if t.state is TrialState.COMPLETE}
    assert sum(t.state is TrialState.COMPLETE for t in after.trials.values()) == 2
    assert after.n_epochs == before.n_epochs + 2 * 18


def test_longer_training_of_nobody_complete_promotes_from_the_new_top_rung(tmp_path: Path) -> None:
    """With 9 at the last epoch, the best three of them belong to a rung now, and go on in the usual way."""
    run(tmp_path, "ensemble.size=4", "ensemble.pool=9", "early_stopping.type=none")
    after = run(tmp_path, "ensemble.size=1", "early_stopping.type=asha", "early_stopping.max_epochs=27")
    longest = sorted(number for number, trial in after.trials.items() if trial.epoch == 27)
    best = sorted(after.trials, key=lambda number: (fakes.val_loss(dict(after.trials[number].config), 9), number))
    assert longest == sorted(best[:3])


def test_shorter_training_takes_longer_trials_as_complete(tmp_path: Path) -> None:
    before = run(tmp_path)
    after = run(tmp_path, "early_stopping.max_epochs=3")
    assert after.n_epochs == before.n_epochs
    assert {n: t.curve for n, t in after.trials.items()} == {n: t.curve for n, t in before.trials.items()}
    assert {n for n, t in after.trials.items() if t.state is TrialState.COMPLETE} == {
        n for n, t in before.trials.items() if t.epoch >= 3
    }


def test_trial_between_two_rungs_goes_on_from_its_own_epoch(tmp_path: Path) -> None:
    """At 3 epochs a trial has passed rung 2, and its next is 4."""
    run(tmp_path)
    run(tmp_path, "early_stopping.min_epochs=2", "early_stopping.reduction_factor=2", "early_stopping.max_epochs=16")
    steps = {(e.from_epoch, e.to_epoch) for e in last_driver(tmp_path) if isinstance(e, Leased) and e.trial is not None}
    assert (1, 2) in steps
    assert {(e, t) for e, t in steps if e == 3} <= {(3, 4), (3, 16)}
    assert {(e, t) for e, t in steps if e == 9} <= {(9, 16)}


@pytest.mark.parametrize("rule", ["sha", "median", "none"])
@pytest.mark.parametrize("n_events", [12, 30, 45, None])
def test_study_goes_on_under_another_rule_wherever_it_was_killed(
    tmp_path: Path, rule: str, n_events: int | None
) -> None:
    run(tmp_path / "whole", workers=2)
    cut(tmp_path / "whole", tmp_path / "cut", n_events or n_lines(tmp_path / "whole"))
    run(tmp_path / "cut", f"early_stopping.type={rule}", workers=2)


def test_synchronous_halving_after_an_edit_is_decided_as_if_all_had_been_trained_under_it(tmp_path: Path) -> None:
    """Who goes on is a matter of values alone, so a study edited halfway ends with the same best trials."""
    sha = ("early_stopping.type=sha", "early_stopping.min_epochs=3", "early_stopping.max_epochs=27")
    run(tmp_path / "asha", "early_stopping.type=none", "early_stopping.max_epochs=3")
    edited = run(tmp_path / "asha", *sha)
    straight = run(tmp_path / "straight", *sha)
    assert {n: t.epoch for n, t in edited.trials.items()} == {n: t.epoch for n, t in straight.trials.items()}
    assert outcome(edited) == outcome(straight)


@pytest.mark.parametrize("rule", ["asha", "sha"])
def test_study_killed_anywhere_after_an_edit_ends_as_the_one_that_was_not(tmp_path: Path, rule: str) -> None:
    """Also across the edit itself, and with an era before and one after."""
    first = tmp_path / "first"
    run(first)
    for n_events in (25, 40):
        begun = tmp_path / f"begun-{n_events}"
        cut(first, begun, n_events)
        edit = (f"early_stopping.type={rule}", "early_stopping.min_epochs=2", "early_stopping.max_epochs=12")
        whole = tmp_path / f"whole-{n_events}"
        shutil.copytree(begun, whole)
        uncut = run(whole, *edit)
        for n in range(n_events + 1, n_lines(whole), 3):
            killed = tmp_path / f"killed-{n_events}-{n}"
            cut(whole, killed, n)
            assert outcome(run(killed, *edit)) == outcome(uncut)


def test_early_stopping_edited_back_and_forth_is_sound(tmp_path: Path) -> None:
    for overrides in (
        [],
        ["early_stopping.max_epochs=27"],
        [],
        ["early_stopping.reduction_factor=2", "search.trials=12"],
        ["early_stopping.enabled=false", "early_stopping.max_epochs=4", "search.trials=12"],
        ["search.trials=14"],
    ):
        run(tmp_path, *overrides)


def test_diverged_and_failed_trials_stay_so_under_new_rungs(tmp_path: Path) -> None:
    class Unlucky(fakes.FakeExecutor):
        def _train(self, job: TrainJob) -> Result:
            if job.trial == 1 and job.to_epoch > 1:
                return Result(key=job.key, outcome="diverged", message="val_loss is nan")
            if job.trial == 2:
                return Result(key=job.key, outcome="crashed", message="ValueError: odd", frame="t.py:1 in model")
            return super()._train(job)

    def unlucky(spec: Spec, folder: Path) -> fakes.FakeExecutor:
        return Unlucky()

    before = run(tmp_path, make_executor=unlucky)
    after = run(tmp_path, "early_stopping.max_epochs=27", "early_stopping.type=sha", make_executor=unlucky)
    for number in (1, 2):
        assert after.trials[number].state is before.trials[number].state
        assert after.trials[number].curve == before.trials[number].curve


def test_trials_that_cannot_pause_go_on_after_an_edit(tmp_path: Path) -> None:
    from tests.test_study import unpausable_executor

    run(tmp_path, make_executor=unpausable_executor)
    run(tmp_path, "early_stopping.max_epochs=27", "search.trials=12", make_executor=unpausable_executor)


def test_trial_whose_checkpoint_was_dropped_goes_on_all_the_same(tmp_path: Path) -> None:
    """Under the old rungs nobody could have wanted it; its job trains it again from the start, to the same curve."""
    given: list[TrainJob] = []

    class Listening(fakes.FakeExecutor):
        def _train(self, job: TrainJob) -> Result:
            given.append(job)
            return super()._train(job)

    def listening(spec: Spec, folder: Path) -> fakes.FakeExecutor:
        return Listening()

    run(tmp_path, "search.trials=30", make_executor=listening)
    given.clear()
    run(tmp_path, "search.trials=30", "early_stopping.reduction_factor=2", make_executor=listening)
    going_on = [job for job in given if job.from_epoch]
    assert all((tmp_path / job.checkpoint).exists() for job in going_on if job.checkpoint is not None)
    assert any(job.checkpoint is None for job in going_on)


# Number of trials


@pytest.mark.parametrize("rule", ["asha", "sha"])
@pytest.mark.parametrize("n_events", [14, 22, 30, None])
def test_fewer_trials_add_none_beyond_those_drawn(tmp_path: Path, rule: str, n_events: int | None) -> None:
    whole = tmp_path / "whole"
    run(whole, f"early_stopping.type={rule}", workers=3)
    cut(whole, tmp_path / "cut", n_events or n_lines(whole))
    before = state_of(tmp_path / "cut")
    after = run(tmp_path / "cut", f"early_stopping.type={rule}", "search.trials=4", workers=3)
    assert set(after.trials) == {*before.trials, *range(4)}
    again = run(tmp_path / "cut", f"early_stopping.type={rule}", "search.trials=11", workers=3)
    assert set(again.trials) == set(range(11))


def test_fewer_trials_than_a_finished_study_has_change_nothing(tmp_path: Path) -> None:
    before = run(tmp_path)
    after = run(tmp_path, "search.trials=4")
    assert outcome(after) == outcome(before)
    assert not any(isinstance(event, Leased | StageBegan) for event in last_driver(tmp_path))


# Parameters


def drawn_now(run_dir: Path) -> dict[int, dict[str, object]]:
    """Configs that the last driver drew."""
    return {e.trial: dict(e.config) for e in last_driver(run_dir) if isinstance(e, TrialDrawn)}


def test_wider_range_is_drawn_from_by_new_trials(tmp_path: Path) -> None:
    run(tmp_path)
    space = SPACE.replace("max: 64", "max: 640")
    run(tmp_path, "search.trials=20", space=space)
    drawn = drawn_now(tmp_path)
    assert set(drawn) == set(range(9, 20))
    assert any(int(str(config["width"])) > 64 for config in drawn.values())
    sampler = SobolSampler(spec_of(space=space).space, 3)
    for number, config in drawn.items():
        expected = sampler.config(number, lambda config: {})
        assert expected is not None
        assert {k: v for k, v in config.items() if k != "lr"} == {k: v for k, v in expected.items() if k != "lr"}


def test_narrower_range_keeps_old_trials_as_evidence(tmp_path: Path) -> None:
    before = run(tmp_path)
    assert any(int(str(trial.config["width"])) > 16 for trial in before.trials.values())
    after = run(tmp_path, "search.trials=20", space=SPACE.replace("max: 64", "max: 16"))
    assert all(int(str(config["width"])) <= 16 for config in drawn_now(tmp_path).values())
    assert after.selected is not None
    assert set(after.selected.pool) & set(before.trials)


def test_new_choice_is_ramped_and_drawn_with_its_own_parameters(tmp_path: Path) -> None:
    before = run(tmp_path)
    space = SPACE.replace(
        "{values: [adamw, sgd]}", "{choices: {adamw: {}, sgd: {}, lion: {beta: {min: 0.5, max: 0.9}}}}"
    )
    after = run(tmp_path, "search.trials=30", space=space)
    assert after.ranges[:2] == before.ranges
    assert [found.branch for found in after.ranges] == [{"optimizer": name} for name in ("adamw", "sgd", "lion")]
    ramps = [e.key for e in last_driver(tmp_path) if isinstance(e, Leased) and e.key.startswith("ramp/")]
    assert ramps == ["ramp/optimizer=lion/0", "ramp/optimizer=lion/1"]
    lions = [config for config in drawn_now(tmp_path).values() if config["optimizer"] == "lion"]
    assert lions
    assert all(0.5 <= float(str(config["beta"])) <= 0.9 for config in lions)
    low, high = after.ranges[2].low, after.ranges[2].high
    assert all(low <= float(str(config["lr"])) <= high for config in lions)


def test_removed_value_and_removed_parameter_are_not_drawn_any_more(tmp_path: Path) -> None:
    run(tmp_path)
    space = SPACE.replace("[adamw, sgd]", "[adamw]").replace("  width: {min: 8, max: 64}\n", "")
    run(tmp_path, "search.trials=16", space=space)
    drawn = drawn_now(tmp_path)
    assert len(drawn) == 7
    assert all(set(config) == {"lr", "optimizer"} and config["optimizer"] == "adamw" for config in drawn.values())


def test_parameter_that_old_trials_lack_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    journal = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(SpecError, match=r"parameters\.depth: new: .*trials 0\.\.8 would need it and have none"):
        run(tmp_path, space=SPACE.replace("  width:", "  depth: {min: 1, max: 3}\n  width:"))
    assert (tmp_path / FILE_NAME).read_bytes() == journal


def test_parameter_may_be_added_while_no_trial_is_drawn(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    first = next(i for i, e in enumerate(read_journal(tmp_path / "whole")) if isinstance(e.event, TrialDrawn))
    cut(tmp_path / "whole", tmp_path / "cut", first)
    after = run(tmp_path / "cut", space=SPACE.replace("  width:", "  depth: {min: 1, max: 3}\n  width:"))
    assert all("depth" in trial.config for trial in after.trials.values())


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_method_may_change_and_change_back(tmp_path: Path, method: str) -> None:
    run(tmp_path)
    space = SPACE.replace("max: 64", "max: 32").replace("[adamw, sgd]", "[adamw, lion]")
    run(tmp_path, f"search.method={method}", "search.trials=16", space=space)
    run(tmp_path, "search.trials=20", space=space)


# LR range


def measured_now(run_dir: Path) -> list[RangeMeasured]:
    return [e for e in last_driver(run_dir) if isinstance(e, RangeMeasured)]


def ramps_now(run_dir: Path) -> list[str]:
    return [e.key for e in last_driver(run_dir) if isinstance(e, Leased) and e.key.startswith("ramp/")]


def test_other_bounds_of_lr_are_concluded_from_the_ramps_there_are(tmp_path: Path) -> None:
    before = run(tmp_path)
    after = run(tmp_path, "search.trials=16", space=SPACE.replace("max: 0.5", "max: 0.02"))
    assert ramps_now(tmp_path) == []
    assert [found.branch for found in after.ranges] == [found.branch for found in before.ranges]
    assert all(found.high == 0.02 for found in after.ranges)
    assert all(found.high > 0.02 for found in before.ranges)
    assert all(float(str(config["lr"])) <= 0.02 for config in drawn_now(tmp_path).values())
    fresh = run(tmp_path.with_name("fresh"), space=SPACE.replace("max: 0.5", "max: 0.02"))
    assert [(r.lr, r.low, r.high) for r in after.ranges] == [(r.lr, r.low, r.high) for r in fresh.ranges]


@pytest.mark.parametrize("change", ["min=1e-4", "max=1.0", "steps=30"])
def test_ramps_of_other_settings_are_run_again(tmp_path: Path, change: str) -> None:
    before = run(tmp_path)
    after = run(tmp_path, f"lr_range.{change}", "search.trials=10")
    assert ramps_now(tmp_path) == [f"ramp/optimizer={name}/{n}" for name in ("adamw", "sgd") for n in (0, 1)]
    assert len(after.ranges) == 2
    assert after.ramp_epochs == 2 * before.ramp_epochs


def test_one_more_seed_is_one_more_ramp_per_branch(tmp_path: Path) -> None:
    run(tmp_path)
    after = run(tmp_path, "lr_range.seeds=3", "search.trials=10")
    assert ramps_now(tmp_path) == ["ramp/optimizer=adamw/2", "ramp/optimizer=sgd/2"]
    assert [len(found.per_seed_lr) for found in after.ranges] == [3, 3]


def test_ranges_and_search_that_were_both_through_are_reopened_in_order(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, "search.trials=12", "lr_range.steps=30")
    events = last_driver(tmp_path)
    first_drawn = next(i for i, e in enumerate(events) if isinstance(e, TrialDrawn))
    assert max(i for i, e in enumerate(events) if isinstance(e, RangeMeasured)) < first_drawn
    assert [e.stage for e in events if isinstance(e, StageBegan)] == ["lr_range", "search", "ensemble"]


def test_range_may_be_switched_off_and_on(tmp_path: Path) -> None:
    first = run(tmp_path)
    run(tmp_path, "lr_range.enabled=false", "search.trials=14", space=SPACE.replace(", bounds_from: lr_range", ""))
    low, high = min(r.low for r in first.ranges), max(r.high for r in first.ranges)
    assert any(not low <= float(str(config["lr"])) <= high for config in drawn_now(tmp_path).values())
    last = run(tmp_path, "search.trials=18")
    assert last.ranges == first.ranges
    assert ramps_now(tmp_path) == []
    assert all(low <= float(str(config["lr"])) <= high for config in drawn_now(tmp_path).values())


def test_range_may_be_asked_for_after_a_search_without_one(tmp_path: Path) -> None:
    run(tmp_path, space=SPACE.replace(", bounds_from: lr_range", ""))
    after = run(tmp_path, "search.trials=12")
    assert len(after.ranges) == 2
    assert len(drawn_now(tmp_path)) == 3


# Ensemble


@pytest.mark.parametrize("edit", [["ensemble.pool=8"], ["ensemble.size=3"], ["ensemble.pool=3", "ensemble.size=1"]])
def test_ensemble_is_chosen_again_by_its_own_settings(tmp_path: Path, edit: list[str]) -> None:
    run(tmp_path)
    after = run(tmp_path, *edit)
    assert sum(isinstance(event, Selected) for event in last_driver(tmp_path)) == 1
    assert after.selected is not None
    assert len(after.selected.pool) == spec_of(*edit).ensemble.pool


def test_ensemble_is_chosen_from_the_longer_trained_checkpoints(tmp_path: Path) -> None:
    before = run(tmp_path)
    after = run(tmp_path, "early_stopping.max_epochs=27", "ensemble.pool=6", "ensemble.size=3")
    assert before.selected is not None
    assert after.selected is not None
    assert len(after.selected.pool) == 6
    evaluated = [
        e.key for e in last_driver(tmp_path) if isinstance(e, Leased) and e.key.startswith("evaluate/ensemble")
    ]
    assert len(evaluated) == 6  # those of before were of other checkpoints


# Anything, any number of times

EDITS = st.lists(
    st.sampled_from(
        [
            "early_stopping.type=asha",
            "early_stopping.type=sha",
            "early_stopping.type=median",
            "early_stopping.type=none",
            "early_stopping.min_epochs=2",
            "early_stopping.max_epochs=4",
            "early_stopping.max_epochs=20",
            "early_stopping.reduction_factor=2",
            "search.trials=3",
            "search.trials=7",
            "search.trials=12",
            "search.method=random",
            "ensemble.size=1",
            "ensemble.pool=7",
            "lr_range.steps=25",
            "lr_range.seeds=3",
            "parameters.lr.max=0.05",
            "parameters.width.max=16",
            "parameters.width.max=100",
            'parameters.optimizer.values=["adamw", "sgd", "lion"]',
            'parameters.optimizer.values=["sgd"]',
        ]
    ),
    max_size=4,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(launches=st.lists(st.tuples(EDITS, st.floats(0, 1), st.integers(1, 3)), min_size=2, max_size=4))
def test_any_sequence_of_edits_and_kills_leaves_a_sound_study(
    tmp_path_factory: pytest.TempPathFactory, launches: Sequence[tuple[list[str], float, int]]
) -> None:
    run_dir = tmp_path_factory.mktemp("study")
    for number, (overrides, kill_at, workers) in enumerate(launches):
        whole = run_dir / f"{number}"
        if number:
            shutil.copytree(run_dir / f"{number - 1}-killed", whole)
        known = n_lines(whole) if number else 0
        state = run(whole, *overrides, workers=workers)
        replayed = reopened(whole, overrides)
        assert outcome(replayed) == outcome(state)
        cut(whole, run_dir / f"{number}-killed", known + round(kill_at * (n_lines(whole) - known)))


def reopened(run_dir: Path, overrides: Sequence[str]) -> StudyState:
    """The state of a finished study that is opened once more with the same spec: nothing is left to do."""
    study = open_study(run_dir, spec_of(*overrides), make_sampler=make_sampler, background=False, wait_s=0)
    assert study.ended
    study.close()
    entries: list[Entry] = read_journal(run_dir)
    return StudyState.of(entries)
