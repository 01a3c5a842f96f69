"""Folds for the best few: what is trained, what is given up, what is recorded, and who is the best afterwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from hpsearch.cli.verdict_text import verdict_text
from hpsearch.errors import PreflightError
from hpsearch.events import Evaluated, Opened, from_json
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.forecast import FoldForecast
from hpsearch.job import ConfirmJob, FoldJob, Result
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.spec import parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.tracker.operations import UpdateStudy, due_operations
from hpsearch.verdict import verdict
from tests import fakes

SPACE = """
name: folded
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
evaluate: {folds: 5, trials: 4}
ensemble: {pool: 4, size: 2}
"""


def run(run_dir: Path, *overrides: str, make_executor=fakes.make_executor, workers: int = 1) -> StudyState:  # type: ignore[no-untyped-def]
    launch = Launch(
        run_dir=run_dir,
        spec=parse_spec(SPACE, overrides=overrides),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=make_executor,
    )
    seen: list[Entry] = []
    LocalFleet(launch, workers=workers).run(seen.extend)
    return StudyState.of(seen)


def folds_of(state: StudyState, trial: int) -> list[str]:
    return sorted(key for key in state.results if key.startswith(f"fold/{trial}/"))


def test_best_few_are_ranked_by_their_mean_over_the_folds(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert state.evaluated is not None
    rows = state.evaluated.standings
    assert {row["trial"] for row in rows} == {trial.number for trial in state.candidates(4)}
    first = rows[0]
    runs = [state.results[key] for key in folds_of(state, first["trial"])]  # type: ignore[arg-type]
    assert first["folds"] == len(runs) == 5
    assert first["mean"] == pytest.approx(sum(run.epochs[-1][1]["val_loss"] for run in runs) / 5)
    assert first["low"] < first["corrected"] < first["high"]  # type: ignore[operator]
    assert state.selected is not None
    assert state.leaders[0] == state.selected.best == first["trial"]
    told = verdict(state, run_dir="", wall_s=0.0, stages_s={}, mlflow={})
    assert told["best"]["evaluated"] == first  # type: ignore[index]


def test_trial_that_is_clearly_worse_after_three_folds_gets_no_more(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert state.evaluated is not None
    n_folds = {row["trial"]: row["folds"] for row in state.evaluated.standings}
    assert 3 in n_folds.values()
    assert {trial: len(folds_of(state, trial)) for trial in n_folds} == n_folds  # type: ignore[arg-type]
    given_up = [row for row in state.evaluated.standings if row["folds"] == 3]
    assert all(row["chance"] is None for row in given_up)
    assert state.evaluated.standings[-1] in given_up


def test_trial_is_trained_on_a_fold_for_as_long_as_in_the_search(tmp_path: Path) -> None:
    state = run(tmp_path, "evaluate.trials=9", "early_stopping.type=sha")
    assert {state.trials[n].epoch for n in range(9)} == {1, 3, 9}
    for key, result in state.results.items():
        if key.startswith("fold/"):
            assert len(result.epochs) == state.trials[int(key.split("/")[1])].epoch


def test_repeats_cut_the_rows_anew(tmp_path: Path) -> None:
    state = run(tmp_path, "evaluate.folds=2", "evaluate.repeats=3")
    assert state.evaluated is not None
    first = state.evaluated.standings[0]
    epochs = state.trials[first["trial"]].epoch  # type: ignore[index]
    assert folds_of(state, first["trial"]) == [  # type: ignore[arg-type]
        f"fold/{first['trial']}/{epochs}/2/{repeat}/{fold}" for repeat in range(3) for fold in range(2)
    ]


def test_number_of_workers_changes_neither_jobs_nor_standings(tmp_path: Path) -> None:
    one, three = (run(tmp_path / str(n), "early_stopping.type=sha", workers=n) for n in (1, 3))
    assert {k for k in one.results if k.startswith("fold/")} == {k for k in three.results if k.startswith("fold/")}
    assert one.evaluated is not None
    assert three.evaluated is not None
    assert one.evaluated.standings == three.evaluated.standings


def test_journal_cut_anywhere_in_the_stage_gives_the_same_winner(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    raw = (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(raw) if b'"key":"fold/' in line)
    last = next(i for i, line in enumerate(raw) if b'"type":"evaluated"' in line)
    for cut in range(first, last + 2):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / FILE_NAME).write_bytes(b"".join(raw[:cut]))
        again = run(folder)
        assert again.evaluated == whole.evaluated
        assert {k for k in again.results if k.startswith("fold/")} == {
            k for k in whole.results if k.startswith("fold/")
        }
        assert sum(isinstance(entry.event, Evaluated) for entry in read_journal(folder)) == 1


class Upset(fakes.FakeExecutor):
    """Folds turn the search's order around."""

    def _fold(self, job: FoldJob) -> Result:
        result = super()._fold(job)
        rows = tuple(
            dataclasses.replace(row, metrics={"val_loss": 2.0 - row.metrics["val_loss"]}) for row in result.epochs
        )
        return dataclasses.replace(result, epochs=rows)


@pytest.mark.parametrize("overrides", [["ensemble.enabled=false"], ["ensemble.pool=2", "ensemble.size=2"]])
def test_winner_that_the_search_ranked_last_of_the_few_is_delivered(tmp_path: Path, overrides: list[str]) -> None:
    """Its checkpoint must be kept, or made again, though it is in no pool by the search's own order."""
    state = run(tmp_path, *overrides, make_executor=lambda spec, folder: Upset())
    assert state.selected is not None
    assert state.selected.best == state.candidates(4)[-1].number
    assert state.done


def test_confirm_takes_the_best_by_folds(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm.trials=2", make_executor=lambda spec, folder: Upset())
    assert state.evaluated is not None
    assert state.confirmed is not None
    rows = state.evaluated.standings[:2]
    assert set(state.confirmed_order) == {row["trial"] for row in rows if row["chance"] is not None}


class Unlucky(fakes.FakeExecutor):
    """The leader of the search diverges on one fold, or crashes there twice."""

    outcome = "diverged"

    def _fold(self, job: FoldJob) -> Result:
        if job.fold == 1 and job.trial == 3:
            return Result(key=job.key, outcome=self.outcome, message="val_loss is nan")  # type: ignore[arg-type]
        return super()._fold(job)


class Crashing(Unlucky):
    outcome = "crashed"


@pytest.mark.parametrize("executor", [Unlucky, Crashing])
def test_trial_that_goes_wrong_on_a_fold_is_out(tmp_path: Path, executor: type[fakes.FakeExecutor]) -> None:
    state = run(tmp_path, make_executor=lambda spec, folder: executor())
    assert state.evaluated is not None
    assert 3 in {trial.number for trial in state.candidates(4)}
    assert state.evaluated.out == (3,)
    assert 3 not in {row["trial"] for row in state.evaluated.standings}
    assert state.done


class Hopeless(fakes.FakeExecutor):
    def _fold(self, job: FoldJob) -> Result:
        return Result(key=job.key, outcome="diverged", message="val_loss is nan")


def test_study_whose_folds_all_go_wrong_ends_with_the_searched_best(tmp_path: Path) -> None:
    state = run(tmp_path, make_executor=lambda spec, folder: Hopeless())
    assert state.done
    assert state.evaluated is not None
    assert state.evaluated.standings == ()
    assert state.selected is not None
    assert state.selected.best == state.candidates(1)[0].number


def test_fresh_seeds_are_spent_on_the_searched_best_where_all_folds_went_wrong(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm={trials: 2, seeds: 2}", make_executor=lambda spec, folder: Hopeless())
    assert state.confirmed is not None
    assert set(state.confirmed_order) == {trial.number for trial in state.candidates(2)}


def test_fresh_seeds_are_not_spent_on_who_was_given_up_on_the_folds(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm={trials: 4, seeds: 2}")
    assert state.evaluated is not None
    left = {row["trial"] for row in state.evaluated.standings if row["chance"] is not None}
    assert len(left) < 4
    assert set(state.confirmed_order) == left


class Unseeded(fakes.FakeExecutor):
    """No fresh seed comes to anything."""

    def _confirm(self, job: ConfirmJob) -> Result:
        return Result(key=job.key, outcome="diverged", message="val_loss is nan")


def test_order_of_the_folds_stands_where_all_fresh_seeds_went_wrong(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm={trials: 2, seeds: 2}", make_executor=lambda spec, folder: Unseeded())
    assert state.evaluated is not None
    assert state.leaders == tuple(row["trial"] for row in state.evaluated.standings)


def test_study_without_the_key_trains_no_fold(tmp_path: Path) -> None:
    state = run(tmp_path, "evaluate.enabled=false")
    assert state.evaluated is None
    assert not any(key.startswith("fold/") for key in state.results)


def test_more_repeats_on_resume_use_the_folds_that_are_there(tmp_path: Path) -> None:
    before = run(tmp_path)
    state = run(tmp_path, "evaluate.repeats=2")
    assert state.evaluated is not None
    assert state.evaluated.repeats == 2
    assert {k for k in before.results if k.startswith("fold/")} <= set(state.results)
    leased = [e.event.key for e in read_journal(tmp_path) if e.event.type == "leased" and "fold/" in e.event.key]  # type: ignore[union-attr]
    assert len(leased) == len(set(leased))
    assert state.done


def test_longer_training_evaluates_again(tmp_path: Path) -> None:
    run(tmp_path)
    state = run(tmp_path, "early_stopping.max_epochs=27")
    assert any(key.split("/")[2] == "27" for key in state.results if key.startswith("fold/"))
    assert sum(isinstance(entry.event, Evaluated) for entry in read_journal(tmp_path)) == 2


def test_metric_that_is_maximised_is_told_in_its_own_unit(tmp_path: Path) -> None:
    state = run(tmp_path, "metric={name: val_accuracy, goal: maximize}")
    assert state.evaluated is not None
    first, second = state.evaluated.standings[:2]
    assert 0 < first["low"] < first["corrected"] <= first["mean"] < first["high"] < 1  # type: ignore[operator]
    assert first["mean"] > second["mean"] or second["folds"] < 5  # type: ignore[operator]


class NearlyRight(fakes.FakeExecutor):
    """Each fold but the last is all right."""

    def _fold(self, job: FoldJob) -> Result:
        result = super()._fold(job)
        right = 0.75 if job.fold == 4 else 1.0
        rows = tuple(dataclasses.replace(row, metrics={**row.metrics, "val_accuracy": right}) for row in result.epochs)
        return dataclasses.replace(result, epochs=rows)


def test_interval_of_a_proportion_ends_where_proportions_do(tmp_path: Path) -> None:
    accuracy = "metric={name: val_accuracy, goal: maximize}"
    state = run(tmp_path, accuracy, make_executor=lambda spec, folder: NearlyRight())
    assert state.evaluated is not None
    row = state.evaluated.standings[0]
    assert row["mean"] == pytest.approx(0.95)
    assert 0.0 < row["low"] < row["corrected"] < row["high"] == 1.0  # type: ignore[operator]


# Budgets


def text_of(state: StudyState) -> list[str]:
    outcome = verdict(state, run_dir="runs/folded", wall_s=0.0, stages_s={}, mlflow={})
    return verdict_text(state, outcome, None, None).splitlines()


def test_search_that_spent_the_budget_leaves_no_folds_and_its_order_stands(tmp_path: Path) -> None:
    state = run(tmp_path, "budget.epochs=12", "confirm.trials=2")
    assert state.done
    assert not any(key.startswith(("fold/", "confirm/")) for key in state.results)
    assert state.evaluated is not None
    assert state.confirmed is not None
    assert (state.evaluated.standings, state.evaluated.reason) == ((), "budget.epochs: 12")
    assert (state.confirmed.standings, state.confirmed.reason) == ((), "budget.epochs: 12")
    assert state.selected is not None
    assert state.selected.best == state.candidates(1)[0].number
    note = "was ended by budget.epochs: 12, with too few"
    assert f"note: cross-validation {note} folds of each to tell: the order before it stands" in text_of(state)
    assert f"note: confirmation {note} fresh seeds of each to tell: the order before it stands" in text_of(state)


@pytest.mark.parametrize("workers", [1, 3])
def test_budget_ends_the_race_with_the_folds_that_there_are(tmp_path: Path, workers: int) -> None:
    sha = "early_stopping.type=sha"
    whole = run(tmp_path / "whole", sha)
    first = 3 * sum(trial.epoch for trial in whole.candidates(4))
    limit = whole.n_epochs + first + 1
    assert limit < whole.n_epochs + whole.n_fold_epochs
    state = run(tmp_path / "short", sha, f"budget.epochs={limit}", workers=workers)
    assert state.evaluated is not None
    assert state.evaluated.reason == f"budget.epochs: {limit}"
    rows = state.evaluated.standings
    assert {row["trial"] for row in rows} == {trial.number for trial in state.candidates(4)}
    assert {row["folds"] for row in rows} == {3}
    assert first < state.n_fold_epochs < first + workers * 9 + 1
    assert state.selected is not None
    assert state.selected.best == rows[0]["trial"]
    reason = f"note: cross-validation was ended by budget.epochs: {limit}; the order is by what there was"
    assert reason in text_of(state)
    told = verdict(state, run_dir="", wall_s=0.0, stages_s={}, mlflow={})
    assert told["epochs"]["evaluate"] == state.n_fold_epochs  # type: ignore[index]
    more = run(tmp_path / "short", sha, "budget.epochs=999")
    assert more.done
    assert more.evaluated is not None
    assert whole.evaluated is not None
    assert more.evaluated.standings == whole.evaluated.standings
    assert more.n_fold_epochs == whole.n_fold_epochs


def test_order_of_two_folds_is_none(tmp_path: Path) -> None:
    sha = "early_stopping.type=sha"
    whole = run(tmp_path / "whole", sha)
    limit = whole.n_epochs + 2 * sum(trial.epoch for trial in whole.candidates(4))
    state = run(tmp_path / "short", sha, f"budget.epochs={limit}")
    assert state.evaluated is not None
    assert state.evaluated.standings == ()
    assert state.n_fold_epochs > 0
    assert state.leaders == ()


def test_budget_ends_fresh_seeds_with_those_that_there_are(tmp_path: Path) -> None:
    confirm = "confirm={trials: 3, seeds: 4}"
    whole = run(tmp_path / "whole", confirm, "evaluate.enabled=false")
    assert whole.n_confirm_epochs > 0
    first = [whole.n_epochs + n * sum(trial.epoch for trial in whole.candidates(3)) for n in (1, 2)]
    for limit, told in zip(first, (False, True), strict=True):
        state = run(tmp_path / str(limit), confirm, "evaluate.enabled=false", f"budget.epochs={limit}")
        assert state.done
        assert state.confirmed is not None
        assert bool(state.confirmed.standings) is told
        assert state.confirmed.reason in ("", f"budget.epochs: {limit}")
        assert state.n_epochs + state.n_confirm_epochs <= limit
        assert state.n_leased_epochs == 0


def test_folds_are_trained_though_the_disk_ended_the_search(tmp_path: Path) -> None:
    state = run(tmp_path, "budget.disk=30B", "ensemble={pool: 4, size: 4}")
    assert state.budget_spent.startswith("budget.disk: ")
    assert state.evaluated is not None
    assert state.evaluated.reason == ""
    assert state.n_fold_epochs > 0


def test_verdict_tells_each_candidate_with_its_interval_and_who_was_given_up(tmp_path: Path) -> None:
    state = run(tmp_path)
    outcome = verdict(state, run_dir="runs/folded", wall_s=0.0, stages_s={}, mlflow={})
    lines = verdict_text(state, outcome, None, None).splitlines()
    header = next(i for i, line in enumerate(lines) if "mean loss of folds" in line)
    assert state.evaluated is not None
    told = [line.split() for line in lines[header + 1 : header + 5]]
    assert [words[:2] for words in told] == [["trial", str(row["trial"])] for row in state.evaluated.standings]
    assert "5 of 5" in lines[header + 1]
    assert lines[header + 4].endswith("3 of 5  given up")


def test_verdict_names_who_is_out(tmp_path: Path) -> None:
    state = run(tmp_path, make_executor=lambda spec, folder: Unlucky())
    outcome = verdict(state, run_dir="runs/folded", wall_s=0.0, stages_s={}, mlflow={})
    assert "note: out of the race, since training on some fold went wrong: trial 3" in verdict_text(
        state, outcome, None, None
    )


class Faulty(fakes.FakeExecutor):
    """Each fold's training crashes for one reason."""

    def _fold(self, job: FoldJob) -> Result:
        return Result(key=job.key, outcome="crashed", message="ValueError: fold", frame="task.py:3 in metrics")


def test_folds_that_crash_alike_end_the_race_and_not_the_study(tmp_path: Path) -> None:
    state = run(tmp_path, make_executor=lambda spec, folder: Faulty())
    assert state.done
    assert state.evaluated is not None
    assert len(state.evaluated.out) == 4
    outcome = verdict(state, run_dir="runs/folded", wall_s=0.0, stages_s={}, mlflow={})
    lines = verdict_text(state, outcome, None, None).splitlines()
    note = next(i for i, line in enumerate(lines) if "out of the race" in line)
    assert lines[note + 1] == f"  trial {state.evaluated.out[0]}: ValueError: fold"


@pytest.mark.parametrize("resumed", [False, True])
def test_more_folds_than_the_rows_allow_are_refused_before_anything_is_trained(tmp_path: Path, resumed: bool) -> None:
    """train and val have 420 rows."""
    if resumed:
        run(tmp_path, "evaluate.enabled=false")
    before = len(list(read_journal(tmp_path))) if resumed else 0
    with pytest.raises(PreflightError) as raised:
        run(tmp_path, "evaluate.folds=211")
    assert raised.value.exit_code == 1
    assert raised.value.message == (
        "evaluate asks for 211 folds, and train and val have 420 rows together: a fold needs at least 2"
    )
    assert raised.value.hint == "write folds: 210, or fewer, under `evaluate`"
    assert not any(entry.event.type == "leased" for entry in list(read_journal(tmp_path))[before:])
    if resumed:
        assert run(tmp_path, "evaluate.folds=3").done


def test_mlflow_is_told_each_fold(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert state.evaluated is not None
    first = state.evaluated.standings[0]
    points = [
        point
        for operation in due_operations(state, {})
        if isinstance(operation, UpdateStudy)
        for point in operation.content.points
        if point.name == f"evaluate/trial-{first['trial']}/score"
    ]
    assert [(point.step, point.value) for point in points] == list(enumerate(first["scores"]))  # type: ignore[arg-type]


def test_plan_tells_trainings_and_epochs_before_they_are_spent() -> None:
    found = FoldForecast.of(parse_spec(SPACE))
    assert found == FoldForecast(trials=4, fewest_jobs=14, most_jobs=20, most_epochs=180)
    assert found.line() == "folds: 14 to 20 trainings of the best 4, 180 epochs at most"
    assert FoldForecast.of(parse_spec(SPACE, overrides=["evaluate.enabled=false"])) is None
    few = FoldForecast.of(parse_spec(SPACE, overrides=["search.trials=2", "evaluate.folds=2"]))
    assert few == FoldForecast(trials=2, fewest_jobs=4, most_jobs=4, most_epochs=36)


def test_journal_of_a_version_that_knew_no_folds_keeps_its_choice_on_resume(tmp_path: Path) -> None:
    """Its specs have neither key; taken up again, nothing is chosen anew."""
    run(tmp_path, "evaluate.enabled=false")
    journal = tmp_path / FILE_NAME
    lines = []
    for line in journal.read_text().splitlines():
        body = json.loads(line)
        if body["type"] == "opened":
            del body["spec"]["evaluate"], body["spec"]["baseline"]
        lines.append(body)
    state = StudyState()
    for body in lines:
        fields = {key: value for key, value in body.items() if key not in ("seq", "fence", "time", "crc")}
        state.apply(from_json(fields), body["time"])
    chosen = state.selected
    assert chosen is not None
    assert state.compared is not None
    state.apply(Opened(study="folded", uid="u", spec=parse_spec(SPACE, overrides=["evaluate.enabled=false"]).dump(),
                       spec_text=""), 1e10)  # fmt: skip
    assert state.selected is chosen
    assert state.compared is not None
