"""A config of the user's own: what is wrong with it, and its trial beside the search."""

from __future__ import annotations

import dataclasses
import doctest
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hpsearch import own_config as module
from hpsearch.cli.run_verbs import top_table
from hpsearch.errors import SpecError
from hpsearch.events import TrialDrawn
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import DataInfo, EvaluateJob, Job, RebuildJob, Result, TrainJob
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.sentences import own_config_lines
from hpsearch.spec import parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.tpe import TpeSampler
from hpsearch.tracker.operations import LogChild, due_operations
from hpsearch.trial import TrialState
from hpsearch.verdict import own_config, space_remarks
from tests import fakes

SPACE = """
name: beside
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
  optimizer: {values: [adamw, sgd]}
  momentum: {min: 0.5, max: 0.9, when: {optimizer: sgd}}
  width: {min: 8, max: 64}
  batch_size: {value: 32}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 3, size: 2}
"""
OWN = "baseline={lr: 1e-8, optimizer: adamw, width: 128}"
BETTER = "baseline={lr: 0.01, optimizer: adamw, width: 128}"


def run(run_dir: Path, *overrides: str, workers: int = 1, make_executor=fakes.make_executor, make_sampler=None):  # type: ignore[no-untyped-def]
    launch = Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE, overrides=overrides),
        folder=run_dir,
        make_sampler=make_sampler or fakes.make_sampler,
        make_executor=make_executor,
    )
    seen: list[Entry] = []
    LocalFleet(launch, workers=workers).run(seen.extend)
    return StudyState.of(seen)


def problems(baseline: str) -> list[str]:
    with pytest.raises(SpecError) as raised:
        parse_spec(SPACE + f"baseline: {baseline}\n")
    return [problem.what + (f" ({problem.hint})" if problem.hint else "") for problem in raised.value.problems]


# What is written


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


def test_value_outside_its_range_is_the_users_own_affair() -> None:
    spec = parse_spec(SPACE, overrides=["baseline={width: 128, lr: 7, optimizer: adamw, batch_size: 500}"])
    assert spec.baseline_config == {"lr": 7, "optimizer": "adamw", "width": 128, "batch_size": 500}


def test_parameter_of_one_value_need_not_be_written() -> None:
    spec = parse_spec(SPACE, overrides=[OWN])
    assert spec.baseline_config == {"lr": 1e-8, "optimizer": "adamw", "width": 128, "batch_size": 32}


def test_study_without_the_key_has_no_config_of_the_users() -> None:
    assert parse_spec(SPACE).baseline_config is None


@pytest.mark.parametrize(
    ("baseline", "told"),
    [
        (
            "{optimizer: sgd, momentum: 0.9, width: 8}",
            ["`baseline` needs `lr` (a value for each parameter, such as lr: 0.0001)"],
        ),
        (
            "{lr: 1e-3, optimizer: sgd, width: 8}",
            ["`baseline` needs `momentum` (a value for each parameter, such as momentum: 0.5)"],
        ),
        (
            "{lr: 1e-3, optimizer: adamw, momentum: 0.9, width: 8}",
            ["`momentum` exists only with optimizer: sgd (leave it out)"],
        ),
        (
            "{lr: 1e-3, optimizer: adamm, width: 8}",
            ['`optimizer` is never "adamm" (it is one of: adamw, sgd) (did you mean adamw?)'],
        ),
        (
            "{lr: fast, optimizer: adamw, width: 8.0}",
            ['`lr` is a number (got "fast")', "`width` is a whole number (got 8.0) (write 8)"],
        ),
        (
            "{lr: 1e-3, optimizer: adamw, width: 8, widht: 8}",
            ["`widht` is no parameter (known: lr, optimizer, momentum, width, batch_size) (did you mean width?)"],
        ),
        ("{lr: 1e-3, optimizer: adamw, width: true}", ["`width` is a whole number (got true)"]),
    ],
)
def test_config_that_no_trial_could_have_is_refused(baseline: str, told: list[str]) -> None:
    assert problems(baseline) == told


def test_listed_numbers_admit_other_numbers_and_words_do_not() -> None:
    space = "name: a\ntask: t.py:T\nparameters:\n  size: {values: [32, 64]}\n  mode: {values: [low, 3]}\n"
    assert parse_spec(space + "baseline: {size: 48, mode: 3}\n").baseline_config == {"size": 48, "mode": 3}
    with pytest.raises(SpecError, match=r"`size` is never 48\.5"):
        parse_spec(space + "baseline: {size: 48.5, mode: low}\n")


# What is trained


@pytest.mark.parametrize("rule", ["asha", "sha", "median", "none"])
def test_own_config_is_one_trial_more_and_is_trained_to_the_end(tmp_path: Path, rule: str) -> None:
    state = run(tmp_path, OWN, f"early_stopping.type={rule}")
    own = state.own_trial
    assert own is not None
    assert (own.number, len(state.trials)) == (9, 10)
    assert own.config == {"lr": 1e-8, "optimizer": "adamw", "width": 128, "batch_size": 32}
    assert own.state is TrialState.COMPLETE
    assert state.ranking()[-1] is own
    assert state.done


@pytest.mark.parametrize("method", ["sobol", "random"])
def test_other_trials_are_what_they_would_be_without_it(tmp_path: Path, method: str) -> None:
    without = run(tmp_path / "a", f"search.method={method}")
    beside = run(tmp_path / "b", OWN, f"search.method={method}")
    assert {n: t.config for n, t in beside.trials.items() if not t.baseline} == {
        n: t.config for n, t in without.trials.items()
    }
    assert {n: t.seed for n, t in beside.trials.items() if n < 9} == {n: t.seed for n, t in without.trials.items()}


def test_trials_that_are_added_later_keep_their_numbers_and_configs(tmp_path: Path) -> None:
    run(tmp_path / "a", OWN)
    grown = run(tmp_path / "a", OWN, "search.trials=12")
    straight = run(tmp_path / "b", "search.trials=13")
    sampled = {n: t.config for n, t in grown.trials.items() if not t.baseline}
    assert sorted(sampled) == [*range(9), 10, 11, 12]
    assert sampled == {n: t.config for n, t in straight.trials.items() if n != 9}
    assert [t.number for t in grown.trials.values() if t.baseline] == [9]


def test_synchronous_halving_decides_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    one, three = (run(tmp_path / str(n), BETTER, "early_stopping.type=sha", workers=n) for n in (1, 3))
    assert {n: t.epoch for n, t in one.trials.items()} == {n: t.epoch for n, t in three.trials.items()}


def test_end_game_completes_as_many_others_as_without_it(tmp_path: Path) -> None:
    state = run(tmp_path, OWN, "early_stopping.type=sha", "search.trials=4")
    assert sum(t.state is TrialState.COMPLETE for t in state.trials.values() if not t.baseline) == 2


def test_tpe_learns_from_it_where_it_lies_in_the_space(tmp_path: Path) -> None:
    state = run(
        tmp_path,
        "search.method=tpe",
        "baseline={lr: 0.01, optimizer: adamw, width: 32}",
        make_sampler=lambda spec: TpeSampler(spec.space, spec.seed),
    )
    assert state.done
    assert len(state.trials) == 10
    assert state.own_trial is not None


def test_journal_cut_anywhere_gives_the_same_study(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", OWN)
    raw = (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True)
    last = next(i for i, line in enumerate(raw) if b'"stage":"search"' in line and b"stage-ended" in line)
    for cut in range(1, last + 2, 3):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(b"".join(raw[:cut]))
        again = run(folder, OWN)
        assert {n: (t.config, t.epoch, t.baseline) for n, t in again.trials.items()} == {
            n: (t.config, t.epoch, t.baseline) for n, t in whole.trials.items()
        }
        drawn = [e.event.trial for e in read_journal(folder) if isinstance(e.event, TrialDrawn)]
        assert len(drawn) == len(set(drawn)) == 10
        shutil.rmtree(folder)


class OwnLoop(fakes.FakeExecutor):
    """A loop that cannot be paused."""

    def describe(self) -> DataInfo:
        return dataclasses.replace(super().describe(), resumable=False)

    def _train(self, job: TrainJob) -> Result:
        result = super()._train(job)
        return dataclasses.replace(result, values={**result.values, "checkpoint": None, "resumable": False})


def test_loop_that_cannot_be_paused_takes_it_to_the_end_too(tmp_path: Path) -> None:
    state = run(tmp_path, OWN, make_executor=lambda spec, folder: OwnLoop())
    assert state.own_trial is not None
    assert state.own_trial.state is TrialState.COMPLETE
    assert state.done


def test_own_config_that_diverges_holds_nothing_up(tmp_path: Path) -> None:
    state = run(
        tmp_path,
        "baseline={lr: 99.0, optimizer: adamw, width: 128}",
        "early_stopping.type=sha",
        make_executor=lambda spec, folder: fakes.FakeExecutor(diverge_above=2.0),
    )
    assert state.own_trial is not None
    assert state.own_trial.state is TrialState.DIVERGED
    assert state.done
    assert own_config_lines(state) == ["your baseline config: trial 9, rank 10 of 10, diverged"]


class Recording(fakes.FakeExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[TrainJob] = []

    def _train(self, job: TrainJob) -> Result:
        self.jobs.append(job)
        return super()._train(job)


class Worsening(Recording):
    """The user's own config is best after its first epoch, so that its last checkpoint is nobody's best."""

    def _train(self, job: TrainJob) -> Result:
        result = super()._train(job)
        if job.trial != 9:
            return result
        rows = tuple(dataclasses.replace(row, metrics={"val_loss": 5.0 + row.epoch}) for row in result.epochs)
        values = {**result.values, "best_checkpoint": None if job.from_epoch else result.values["best_checkpoint"]}
        return dataclasses.replace(result, epochs=rows, values=values)


def test_it_goes_on_from_its_checkpoint_whatever_its_rank(tmp_path: Path) -> None:
    run(tmp_path)
    executor = Worsening()
    run(tmp_path, OWN, make_executor=lambda spec, folder: executor)
    asked = [(job.from_epoch, job.to_epoch, job.checkpoint is not None) for job in executor.jobs if job.trial == 9]
    assert asked == [(0, 1, False), (1, 3, True), (3, 9, True)]


# Edits


def test_own_config_that_is_written_later_is_trained_on_resume(tmp_path: Path) -> None:
    run(tmp_path)
    state = run(tmp_path, OWN)
    assert state.own_trial is not None
    assert state.own_trial.state is TrialState.COMPLETE
    assert state.own_trial.number == 9
    assert state.selected is not None
    assert state.compared is not None
    assert state.compared.over_own["trial"] == 9


def test_another_own_config_is_one_trial_more_and_the_old_one_stays(tmp_path: Path) -> None:
    run(tmp_path, OWN)
    state = run(tmp_path, BETTER)
    assert [t.number for t in state.trials.values() if t.baseline] == [9, 10]
    assert state.own_trial is state.trials[10]
    back = run(tmp_path, OWN)
    assert len(back.trials) == 11
    assert back.own_trial is back.trials[9]
    assert back.compared is not None
    assert back.compared.over_own["trial"] == 9


def test_rungs_that_are_edited_do_not_hold_it_back(tmp_path: Path) -> None:
    run(tmp_path, OWN)
    state = run(tmp_path, OWN, "early_stopping.max_epochs=18", "early_stopping.reduction_factor=2")
    assert state.own_trial is not None
    assert state.own_trial.epoch == 18


class Rebuilding(fakes.FakeExecutor):
    """Trains no trial a second time."""

    def run(
        self, jobs: Sequence[Job], fetch: Callable[[str], bytes], progress: Callable[[str, int], None]
    ) -> Iterator[Result]:
        assert not any(isinstance(job, RebuildJob) for job in jobs)
        yield from super().run(jobs, fetch, progress)


@pytest.mark.parametrize("overrides", [["ensemble.enabled=false"], ["ensemble.pool=2", "ensemble.size=2"]])
def test_its_checkpoint_is_kept_whatever_its_rank_and_however_small_the_pool(
    tmp_path: Path, overrides: list[str]
) -> None:
    own = "baseline={lr: 0.5, optimizer: adamw, width: 128}"
    state = run(tmp_path, own, *overrides, make_executor=lambda spec, folder: Rebuilding())
    assert state.done
    assert state.own_trial is not None
    assert state.own_trial.best_checkpoint is not None
    assert state.compared is not None
    assert state.compared.over_own["trial"] == 9


# What is told


def test_winners_lead_is_measured_row_by_row_on_test(tmp_path: Path) -> None:
    state = run(tmp_path, OWN)
    assert state.selected is not None
    told = own_config(state)
    assert told is not None
    assert (told["trial"], told["rank"], told["of"]) == (9, 10, 10)
    gain = told["gain"]
    assert gain["split"] == "test"  # type: ignore[index]
    assert gain["n_rows"] == fakes.N_ROWS  # type: ignore[index]
    best, own = (
        state.results[f"evaluate/test/{n}"].values["metrics"]["loss"]  # type: ignore[index]
        for n in (state.selected.best, 9)
    )
    assert gain["value"] == pytest.approx(best - own)  # type: ignore[index]
    (line,) = own_config_lines(state)
    assert line.startswith(
        f"your baseline config: trial 9, rank 10 of 10, complete; the winner, trial {state.selected.best}"
    )
    assert "test loss differs by " in line


class NoTest(fakes.FakeExecutor):
    def describe(self) -> DataInfo:
        info = super().describe()
        return dataclasses.replace(info, n_rows={k: n for k, n in info.n_rows.items() if k != "test"})


def test_without_a_test_split_the_ensembles_rows_tell(tmp_path: Path) -> None:
    state = run(tmp_path, OWN, make_executor=lambda spec, folder: NoTest())
    assert state.compared is not None
    assert state.compared.over_own["split"] == "ensemble"


@pytest.mark.parametrize("override", ["ensemble.enabled=false", "confirm.trials=2"])
def test_nothing_is_claimed_on_rows_that_chose_the_winner(tmp_path: Path, override: str) -> None:
    """Nothing of val was set aside, or fresh seeds were measured on what was."""
    state = run(tmp_path, OWN, override, make_executor=lambda spec, folder: NoTest())
    assert state.compared is not None
    assert state.compared.over_own == {}
    assert state.beats_baseline is None
    (line,) = own_config_lines(state)
    assert line == (
        "your baseline config: trial 9, rank 10 of 10, complete; whether the winner beats it is not told: there is no "
        "test split, and all other rows had a part in choosing"
    )


class Hopeless(NoTest):
    """Its models are no better than ignoring the inputs."""

    def _evaluate(self, job: EvaluateJob) -> Result:
        result = super()._evaluate(job)
        return dataclasses.replace(
            result, blobs={ref: save({"loss": np.full(fakes.N_ROWS, 9.0)}) if ref.endswith("rows") else content
                           for ref, content in result.blobs.items()}
        )  # fmt: skip


def test_rows_that_chose_the_winner_may_still_show_that_it_is_worth_nothing(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm.trials=2", make_executor=lambda spec, folder: Hopeless())
    assert state.beats_baseline is False


def test_own_config_that_wins_is_called_the_winner(tmp_path: Path) -> None:
    state = run(tmp_path, "baseline={lr: 0.01, optimizer: adamw, width: 128}")
    assert own_config_lines(state) == ["your baseline config: trial 9, rank 1 of 10, complete: it is the winner"]


def test_what_is_said_of_the_space_leaves_it_out(tmp_path: Path) -> None:
    """A rate below zero lies on no log axis; and a best value outside the range is at no edge of it."""
    own = "baseline={lr: -1.0, optimizer: adamw, width: 128}"
    state = run(tmp_path, own, make_executor=lambda spec, folder: Wild())
    assert state.own_trial is not None
    (remark,) = (each for each in space_remarks(state) if each.name == "diverged")
    assert " of 9 trials diverged" in remark.words


class Wild(fakes.FakeExecutor):
    """Diverges where the rate is high, and where it is the user's."""

    def _train(self, job: TrainJob) -> Result:
        lr = float(str(job.config["lr"]))
        if lr > 0.005 or lr < 0:
            return Result(key=job.key, outcome="diverged", message="val_loss is nan")
        return super()._train(job)


def of_the_choice(state: StudyState, acknowledged: Mapping[str, str]) -> dict[str, str]:
    """What MLflow is yet to hear of the ensemble and of what was measured at the end."""
    due = {operation.key: operation.revision for operation in due_operations(state, acknowledged)}
    return {key: due[key] for key in due if key.startswith(("ensemble/", "parent/result/", "parent/lead/"))}


def test_taking_it_out_again_registers_nothing_and_measures_nothing(tmp_path: Path) -> None:
    before = run(tmp_path, OWN)
    heard = of_the_choice(before, {})
    assert set(heard) == {"ensemble/9", "parent/result/9", "parent/lead/9"}
    state = run(tmp_path)
    assert state.selected == before.selected
    assert state.compared == before.compared
    assert own_config_lines(state) == []
    assert of_the_choice(state, heard) == {}


def test_one_that_is_written_later_and_changes_no_choice_registers_nothing(tmp_path: Path) -> None:
    heard = of_the_choice(run(tmp_path), {})
    assert set(heard) == {"ensemble/9", "parent/result/9"}
    assert set(of_the_choice(run(tmp_path, OWN), heard)) == {"parent/lead/9"}


def test_top_and_mlflow_mark_it(tmp_path: Path) -> None:
    state = run(tmp_path, OWN)
    assert "9 (baseline)" in top_table(state, 10)
    tagged = {
        operation.key
        for operation in due_operations(state, {})
        if isinstance(operation, LogChild) and operation.content.tags.get("hpsearch.baseline") == "true"
    }
    assert tagged == {"trial/9"}
