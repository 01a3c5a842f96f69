"""Fresh seeds for the best few: who gets them, what is recorded, and who is the best afterwards."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from hpsearch.events import Confirmed
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import ConfirmJob, Result
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.spec import parse_spec
from hpsearch.state import Entry, StudyState
from hpsearch.verdict import verdict
from tests import fakes

SPACE = """
name: confirmed
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
confirm: {trials: 3, seeds: 4}
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


def test_best_few_are_confirmed_and_the_winner_is_told_with_its_optimism(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert state.confirmed is not None
    assert {row["trial"] for row in state.confirmed.standings} == {t.number for t in state.candidates(3)}
    first = state.confirmed.standings[0]
    assert state.selected is not None
    assert state.confirmed_order[0] == state.selected.best == first["trial"]
    best = state.trials[state.confirmed_order[0]]
    assert first["searched"] == best.best_objective
    assert first["optimism"] == pytest.approx(0.1, abs=0.06)  # the fake's fresh runs are a tenth worse
    assert first["low"] < first["confirmed"] < first["high"]
    told = verdict(state, run_dir="", wall_s=0.0, stages_s={}, mlflow={})
    assert told["best"]["confirmed"] == first  # type: ignore[index]


def test_every_candidate_gets_two_seeds_and_none_more_than_asked(tmp_path: Path) -> None:
    state = run(tmp_path)
    keys = [key for key in state.results if key.startswith("confirm/")]
    for trial in state.candidates(3):
        runs = sum(key.startswith(f"confirm/{trial.number}/") for key in keys)
        assert 2 <= runs <= 4
    assert all(key.split("/")[2] == str(state.trials[int(key.split("/")[1])].epoch) for key in keys)


def test_number_of_workers_changes_nothing_but_the_order(tmp_path: Path) -> None:
    one, three = (run(tmp_path / str(n), "early_stopping.type=sha", workers=n) for n in (1, 3))
    assert {k for k in one.results if k.startswith("confirm/")} <= {
        k for k in three.results if k.startswith("confirm/")
    }
    assert one.confirmed_order[0] == three.confirmed_order[0]


def test_journal_cut_anywhere_in_the_stage_gives_the_same_winner(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    raw = (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(raw) if b'"key":"confirm/' in line)
    last = next(i for i, line in enumerate(raw) if b'"type":"confirmed"' in line)
    for cut in range(first, last + 2):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / FILE_NAME).write_bytes(b"".join(raw[:cut]))
        again = run(folder)
        assert again.confirmed == whole.confirmed
        assert sum(isinstance(entry.event, Confirmed) for entry in read_journal(folder)) == 1


class Unlucky(fakes.FakeExecutor):
    """The leader's fresh runs diverge."""

    def _confirm(self, job: ConfirmJob) -> Result:
        if job.key.endswith("/1"):
            return Result(key=job.key, outcome="diverged", message="val_loss is nan")
        return super()._confirm(job)


def test_study_whose_fresh_runs_all_go_wrong_still_ends_with_the_searched_best(tmp_path: Path) -> None:
    state = run(tmp_path, make_executor=lambda spec, folder: Unlucky())
    assert state.done
    assert state.confirmed is None or state.confirmed.standings == ()
    assert state.selected is not None
    assert state.selected.best == state.candidates(1)[0].number


def test_study_without_the_key_confirms_nothing(tmp_path: Path) -> None:
    state = run(tmp_path, "confirm.enabled=false")
    assert state.confirmed is None
    assert not any(key.startswith("confirm/") for key in state.results)


def test_longer_training_confirms_again(tmp_path: Path) -> None:
    run(tmp_path)
    state = run(tmp_path, "early_stopping.max_epochs=27")
    assert state.confirmed is not None
    assert any(key.split("/")[2] == "27" for key in state.results if key.startswith("confirm/"))
    assert sum(isinstance(entry.event, Confirmed) for entry in read_journal(tmp_path)) == 2


@pytest.mark.parametrize("overrides", [["ensemble.enabled=false"], ["ensemble.pool=2", "ensemble.size=2"]])
def test_winner_that_the_search_ranked_third_is_delivered(tmp_path: Path, overrides: list[str]) -> None:
    """Its checkpoint must be kept, or made again, though it is in no pool by the search's own order."""
    state = run(tmp_path, *overrides, make_executor=lambda spec, folder: Upset())
    third = state.candidates(3)[2].number
    assert state.selected is not None
    assert state.confirmed_order[0] == state.selected.best == third
    assert state.done


class Upset(fakes.FakeExecutor):
    """Fresh runs turn the search's order around."""

    def _confirm(self, job: ConfirmJob) -> Result:
        result = super()._confirm(job)
        loss = 2.0 - fakes.val_loss(job.config, job.epochs)
        return dataclasses.replace(result, values={**result.values, "metrics": {"loss": loss}})


def test_metric_that_only_a_loop_of_ones_own_tells_is_taken_from_its_val(tmp_path: Path) -> None:
    class OwnMetric(fakes.FakeExecutor):
        def _confirm(self, job: ConfirmJob) -> Result:
            result = super()._confirm(job)
            return dataclasses.replace(result, values={**result.values, "metrics": {"other": 1.0}})

    state = run(tmp_path, make_executor=lambda spec, folder: OwnMetric())
    assert state.confirmed is not None
    assert state.confirmed.standings


def test_fresh_run_that_crashes_once_is_tried_again_and_twice_is_out(tmp_path: Path) -> None:
    class Accident(fakes.FakeExecutor):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.left = times

        def _confirm(self, job: ConfirmJob) -> Result:
            if job.key.endswith("/0") and self.left:
                self.left -= 1
                return Result(key=job.key, outcome="crashed", message="OSError: once", frame="task.py:1 in data")
            return super()._confirm(job)

    once = run(tmp_path / "once", make_executor=lambda spec, folder: Accident(1))
    assert once.confirmed is not None
    assert once.confirmed.out == ()
    twice = run(tmp_path / "twice", make_executor=lambda spec, folder: Accident(2))
    assert twice.confirmed is not None
    assert len(twice.confirmed.standings) == 2
