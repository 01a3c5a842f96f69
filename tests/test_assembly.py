"""A study put together from its spec: which stages, which settings, and what a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.assembly import STAGES, check_resume, make_stages, open_study
from hpsearch.blobs import BlobStore
from hpsearch.errors import JournalError, SpecError, UsageError
from hpsearch.events import Opened
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import RampJob, TrainJob
from hpsearch.journal import FILE_NAME, is_locked, read_journal
from hpsearch.sampler import trial_seed
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from hpsearch.study import Study
from tests import fakes

SPACE = """
name: assembled
task: task.py:Task
seed: 3
search: {trials: 4}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 0.5, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
lr_range: {seeds: 2}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 3, size: 2}
"""
INFO = fakes.FakeExecutor().describe()


def spec_of(*overrides: str, space: str = SPACE) -> Spec:
    return parse_spec(space, overrides=overrides)


def open_here(run_dir: Path, *overrides: str, space: str = SPACE, stages: tuple[str, ...] = STAGES) -> Study:
    return open_study(
        run_dir,
        spec_of(*overrides, space=space),
        make_sampler=fakes.make_sampler,
        spec_text="the text",
        environment={"python": "3.12"},
        stages=stages,
        background=False,
        wait_s=0,
    )


def finish(run_dir: Path, *overrides: str) -> StudyState:
    launch = Launch(
        run_dir=run_dir,
        spec=spec_of(*overrides),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=fakes.make_executor,
        lock_wait_s=0,
    )
    LocalFleet(launch).run(lambda entries: None)
    return StudyState.of(read_journal(run_dir))


def names(tmp_path: Path, *overrides: str, wanted: tuple[str, ...] = STAGES, space: str = SPACE) -> list[str]:
    spec = spec_of(*overrides, space=space)
    return [s.name for s in make_stages(spec, StudyState(), fakes.make_sampler(spec), BlobStore(tmp_path), wanted)]


# Stages


def test_stages_are_those_of_the_spec_in_order(tmp_path: Path) -> None:
    assert names(tmp_path) == ["preflight", "lr_range", "search", "baselines", "ensemble"]
    everything = names(tmp_path, "confirm.trials=2")
    assert everything == ["preflight", "lr_range", "search", "baselines", "confirm", "ensemble"]


def test_range_that_nothing_asks_for_is_not_measured(tmp_path: Path) -> None:
    assert names(tmp_path, space=SPACE.replace(", bounds_from: lr_range", "")) == [
        "preflight",
        "search",
        "baselines",
        "ensemble",
    ]


def test_sweep_alone_is_made_also_where_the_search_would_not_ask(tmp_path: Path) -> None:
    space = SPACE.replace(", bounds_from: lr_range", "")
    assert names(tmp_path, wanted=("lr_range",), space=space) == ["lr_range"]


def test_ensemble_that_is_switched_off_still_measures_and_packs_the_best(tmp_path: Path) -> None:
    assert names(tmp_path, "ensemble.enabled=false")[-1] == "ensemble"


def test_ramps_take_their_settings_and_branches_from_the_spec(tmp_path: Path) -> None:
    study = open_here(tmp_path, "lr_range.steps=50", "preflight.enabled=false")
    study.hello("w", INFO)
    jobs = study.pull("w", slots=4).jobs
    study.close()
    assert [job.key for job in jobs] == [f"ramp/optimizer={name}/{n}" for name in ("adamw", "sgd") for n in (0, 1)]
    assert all(isinstance(job, RampJob) and (job.steps, job.lr_min, job.lr_max) == (50, 1e-5, 10.0) for job in jobs)
    assert all("lr" not in job.config for job in jobs if isinstance(job, RampJob))


def test_ramps_share_no_seed_with_any_trial(tmp_path: Path) -> None:
    study = open_here(tmp_path, "preflight.enabled=false")
    study.hello("w", INFO)
    ramps = {job.seed for job in study.pull("w", slots=4).jobs if isinstance(job, RampJob)}
    study.close()
    assert len(ramps) == 2  # the same two in each branch
    assert not ramps & {trial_seed(3, number) for number in range(1000)}


# Opening


def test_first_event_tells_everything_of_the_launch(tmp_path: Path) -> None:
    open_here(tmp_path).close()
    opened = read_journal(tmp_path)[0].event
    assert isinstance(opened, Opened)
    assert (opened.study, opened.spec_text, opened.environment) == ("assembled", "the text", {"python": "3.12"})
    assert Spec.from_dump(dict(opened.spec)) == spec_of()


def test_resumed_study_keeps_its_uid_and_a_new_one_gets_its_own(tmp_path: Path) -> None:
    for folder in ("a", "a", "b"):
        open_here(tmp_path / folder).close()
    uids = [e.event.uid for e in read_journal(tmp_path / "a") if isinstance(e.event, Opened)]
    other = StudyState.of(read_journal(tmp_path / "b")).uid
    assert len(uids) == 2
    assert len({*uids, other}) == 2


def test_directory_in_use_is_refused_and_stays_in_use(tmp_path: Path) -> None:
    study = open_here(tmp_path)
    with pytest.raises(UsageError, match="is in use by another launch"):
        open_here(tmp_path)
    assert is_locked(tmp_path)
    study.close()
    assert not is_locked(tmp_path)


def test_damaged_journal_is_told_and_lets_the_lock_go(tmp_path: Path) -> None:
    open_here(tmp_path).close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"assembled", b"assembleD", 1))
    with pytest.raises(JournalError, match="the line is damaged"):
        open_here(tmp_path)
    assert not is_locked(tmp_path)


# Resume


@pytest.mark.parametrize(
    "change",
    [
        "search.trials=7",
        "budget.hours=1",
        "budget.epochs=100",
        "resources.cpus=2",
        "mlflow.alias=candidate",
        "ensemble.size=3",
    ],
)
def test_how_much_and_where_may_change(tmp_path: Path, change: str) -> None:
    finish(tmp_path)
    state = finish(tmp_path, change)
    assert state.done
    assert len(state.trials) == (7 if change == "search.trials=7" else 4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=4", "seed: 3 -> 4: the study cannot go on with it, since it cuts the ensemble split from val, "
                   "and every config and trial's seed follows from it"),
        ("task=task.py:Other", "task: task.py:Task -> task.py:Other: the study cannot go on with it, since trials of "
                               "two tasks cannot be compared"),
        ("metric.goal=maximize", "metric.goal: minimize -> maximize: the study cannot go on with it, since its trials "
                                 "were ranked by the old one, and their best epochs kept by it"),
    ],
)  # fmt: skip
def test_what_would_make_old_trials_incomparable_is_refused(tmp_path: Path, change: str, told: str) -> None:
    finish(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(SpecError) as raised:
        open_here(tmp_path, change)
    assert str(raised.value) == (
        f"error[other-study]: {tmp_path}: {told}\n"
        "  hint: put it back, or choose another --run-dir for a new study\n"
        "1 problem; nothing was started."
    )
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert not is_locked(tmp_path)


def test_parameter_that_the_trials_lack_is_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(SpecError, match=r"parameters\.width: new: .* since trials 0\.\.3 would need it and have none"):
        open_here(tmp_path, space=SPACE.replace("  optimizer:", "  width: {value: 8}\n  optimizer:"))


def test_every_refused_edit_is_told_at_once() -> None:
    edited = spec_of("seed=4", "search.trials=3", "budget.hours=1", "search.method=tpe", "shuffle=false")
    with pytest.raises(SpecError) as raised:
        check_resume(spec_of(), edited, Path("run"), {})
    assert [problem.what.partition(":")[0] for problem in raised.value.problems] == ["seed", "shuffle"]


def test_edits_that_the_study_goes_on_with_are_given_back() -> None:
    found = check_resume(spec_of(), spec_of("search.trials=6", "search.method=tpe"), Path("run"), {})
    assert [edit.key for edit in found] == ["search.method", "search.trials"]


def test_a_resume_is_compared_with_the_last_driver_not_the_first(tmp_path: Path) -> None:
    width = SPACE.replace("  optimizer:", "  width: {values: [8]}\n  optimizer:")
    open_here(tmp_path, space=width).close()  # draws nothing
    finish(tmp_path)
    with pytest.raises(SpecError, match=r"parameters\.width: new"):
        open_here(tmp_path, space=width)


def test_code_of_the_task_is_recorded_with_each_launch(tmp_path: Path) -> None:
    for digest in ("a", "b"):
        open_study(
            tmp_path,
            spec_of(),
            make_sampler=fakes.make_sampler,
            code={"task.py": digest},
            background=False,
            wait_s=0,
        ).close()
    opened = [entry.event.code for entry in read_journal(tmp_path) if isinstance(entry.event, Opened)]
    assert opened == [{"task.py": "a"}, {"task.py": "b"}]


def test_spec_that_only_looks_different_is_the_same_study(tmp_path: Path) -> None:
    finish(tmp_path)
    space = "# a comment\n" + SPACE.replace("max: 0.5", "max: 5e-1").replace("{trials: 4}", "\n  trials: 4")
    study = open_here(tmp_path, space=space)
    assert study.ended
    assert not any(isinstance(job, TrainJob) for job in study.pull("w").jobs)
    study.close()
