"""What MLflow should hear, as a function of the study's state."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.events import Compared, Finished, Opened
from hpsearch.job import EpochMetrics
from hpsearch.journal import read_journal
from hpsearch.notes import Note
from hpsearch.state import StudyState
from hpsearch.tracker.operations import (
    LogChild,
    LogEnsemble,
    OpenStudy,
    Operation,
    SetStatus,
    UpdateStudy,
    due_operations,
    epoch_times,
    note_text,
)
from tests.tracked_study import START, UID, Script, whole_study, with_batch

MLFLOW_NAME = re.compile(r"[/\w.\- :]+")  # as MLflow 3.17 checks it on POSIX


def due(state: StudyState, acknowledged: dict[str, str] | None = None, **more: object) -> dict[str, Operation]:
    return {op.key: op for op in due_operations(state, acknowledged or {}, **more)}  # type: ignore[arg-type]


def child(operations: dict[str, Operation], key: str) -> LogChild:
    operation = operations[key]
    assert isinstance(operation, LogChild)
    return operation


def last_values(operation: LogChild | UpdateStudy) -> dict[str, float]:
    return {point.name: point.value for point in operation.content.points}


def test_whole_study_is_told_in_an_order_in_which_each_run_follows_its_parent() -> None:
    assert list(due(whole_study().state())) == [
        "study",
        "parent/settings",
        "parent/data",
        "lr-range",
        "trial/0",
        "trial/1",
        "trial/2",
        "trial/3",
        "parent/best",
        "parent/search",
        "ensemble/4",
        "parent/result/4",
        "parent/note",
        "parent/status",
    ]


def test_figure_of_a_batch_is_due_once_and_again_when_the_batch_is_another() -> None:
    told = due(with_batch("0f").state())
    assert list(told)[2:5] == ["parent/data", "parent/batch", "lr-range"]
    acknowledged = {key: op.revision for key, op in told.items()}
    assert due(with_batch("0f").state(), acknowledged) == {}
    operation = due(with_batch("10").state(), acknowledged)["parent/batch"]
    assert isinstance(operation, UpdateStudy)
    assert operation.content.plots == "batch"


def test_nothing_is_due_before_the_study_is_opened() -> None:
    assert due(StudyState()) == {}


def test_nothing_is_due_when_all_is_acknowledged() -> None:
    state = whole_study().state()
    acknowledged = {key: op.revision for key, op in due(state).items()}
    assert due(state, acknowledged) == {}


def test_runs_are_named_by_the_contract() -> None:
    told = due(whole_study("digits").state())
    study, ensemble = told["study"], told["ensemble/4"]
    assert isinstance(study, OpenStudy)
    assert isinstance(ensemble, LogEnsemble)
    names = [study.name, child(told, "trial/1").name, child(told, "lr-range").name, ensemble.child.name]
    assert names == ["digits", "trial-0001", "lr-range", "ensemble"]


def test_each_trial_state_has_its_run_status() -> None:
    told = due(whole_study().state())
    found = {k: child(told, f"trial/{k}").status for k in range(4)}
    assert found == {0: "FINISHED", 1: "KILLED", 2: "FAILED", 3: "FAILED"}
    states = [child(told, f"trial/{k}").content.tags["hpsearch.state"] for k in range(4)]
    assert states == ["complete", "stopped", "diverged", "failed"]


def test_paused_trial_waits_until_the_search_ends() -> None:
    script = Script().data().search_begins().trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0])
    assert "trial/1" not in due(script.state())
    assert "trial/0" in due(script.state())
    assert child(due(script.search_ends().state()), "trial/1").status == "KILLED"


def test_diverged_trial_is_told_at_once() -> None:
    script = Script().data().search_begins().trial(0, [math.nan], outcome="diverged")
    assert child(due(script.state()), "trial/0").content.tags["mlflow.note.content"].startswith("trial 0 diverged")


def test_trial_holds_every_epoch_of_every_metric_at_its_step_and_time() -> None:
    trial = child(due(whole_study().state()), "trial/0")
    losses = [(p.step, p.value) for p in trial.content.points if p.name == "val_loss"]
    assert losses == [(1, 0.9), (2, 0.6), (3, 0.4)]
    times = [p.time_ms for p in trial.content.points if p.name == "val_loss"]
    assert times == [trial.end_ms - 500, trial.end_ms - 250, trial.end_ms]
    assert START * 1000 < trial.start_ms <= times[0]


def test_trial_params_are_its_config_its_seed_and_log10_lr() -> None:
    script = Script().search_begins().trial(0, [1, 1, 1], config={"lr": 1e-5, "bn": True, "sizes": [8, 4], "x": None})
    assert child(due(script.state()), "trial/0").content.params == {
        "lr": "1e-05",
        "bn": "true",
        "sizes": "[8,4]",
        "x": "null",
        "log10_lr": "-5",
        "trial_seed": "100",
    }


def test_trial_without_lr_has_no_log10_lr() -> None:
    script = Script().search_begins().trial(0, [1, 1, 1], config={"width": 8})
    assert child(due(script.state()), "trial/0").content.params == {"width": "8", "trial_seed": "100"}


def test_objective_and_best_epoch_tell_the_best_epoch_not_the_last() -> None:
    script = Script().search_begins().trial(0, [0.9, 0.2, 0.4])
    found = last_values(child(due(script.state()), "trial/0"))
    assert (found["objective"], found["best_epoch"], found["best/val_loss"]) == (0.2, 2.0, 0.2)
    assert found["val_loss"] == 0.4


def test_maximised_metric_is_told_in_its_own_sign() -> None:
    script = Script(goal="maximize").search_begins().trial(0, [0.9, 0.3, 0.6])
    told = due(script.state())
    assert last_values(child(told, "trial/0"))["objective"] == pytest.approx(0.9)  # 1 - 0.3 / 3
    best = told["parent/best"]
    assert isinstance(best, UpdateStudy)
    assert last_values(best)["best_objective"] == pytest.approx(0.9)


def test_best_objective_steps_by_epochs_and_only_new_points_are_due() -> None:
    script = Script().search_begins().trial(0, [0.9]).trial(1, [0.7, 0.8]).trial(2, [0.75])
    first = due(script.state())["parent/best"]
    assert isinstance(first, UpdateStudy)
    assert [(p.step, p.value) for p in first.content.points] == [(1, 0.9), (3, 0.7)]
    acknowledged = {"parent/best": first.revision}
    assert "parent/best" not in due(script.state(), acknowledged)
    script.trial(0, [0.5], first=2)
    second = due(script.state(), acknowledged)["parent/best"]
    assert isinstance(second, UpdateStudy)
    assert [(p.step, p.value) for p in second.content.points] == [(5, 0.5)]


def test_trial_that_goes_on_after_a_resume_is_due_again() -> None:
    script = Script().data().search_begins().trial(0, [1.0]).search_ends().ends()
    acknowledged = {key: op.revision for key, op in due(script.state()).items()}
    script.resume(trials=8).search_begins().trial(0, [0.8, 0.7], first=2)
    again = due(script.state(), acknowledged)
    assert child(again, "trial/0").status == "FINISHED"
    status = again["parent/status"]
    assert isinstance(status, SetStatus)
    assert status.status == "RUNNING"


def test_settings_that_a_resume_may_change_are_tags_and_the_others_params() -> None:
    script = Script()
    first = due(script.state())
    study, settings = first["study"], first["parent/settings"]
    assert isinstance(study, OpenStudy)
    assert isinstance(settings, UpdateStudy)
    assert study.content.params["seed"] == "0"
    assert json.loads(study.content.params["parameters.lr"])["distribution"] == "log_uniform"
    assert "search.trials" not in study.content.params
    assert settings.content.tags["hpsearch.search.trials"] == "4"
    acknowledged = {key: op.revision for key, op in first.items()}
    changed = due(script.resume(trials=8).state(), acknowledged)
    assert list(changed) == ["parent/settings"]


def test_parent_tells_source_commit_user_and_space() -> None:
    told = due(Script().state())
    study, settings = told["study"], told["parent/settings"]
    assert isinstance(study, OpenStudy)
    assert isinstance(settings, UpdateStudy)
    tags = study.content.tags
    assert tags["mlflow.source.name"] == "hpsearch launch space.yaml"
    assert (tags["mlflow.source.git.commit"], tags["mlflow.user"]) == ("abc123", "ann")
    assert settings.content.texts["space.yaml"] == "name: digits\n"
    assert settings.content.tags["hpsearch.env.torch"] == "2.13"


@pytest.mark.parametrize(
    ("reason", "status"), [("done", "FINISHED"), ("interrupted", "KILLED"), ("failed: no memory", "FAILED")]
)
def test_end_of_the_study_is_the_status_of_its_run(reason: str, status: str) -> None:
    ended = due(Script().ends(reason).state())["parent/status"]
    assert isinstance(ended, SetStatus)
    assert ended.status == status


def test_study_without_a_driver_counts_as_interrupted() -> None:
    state = Script().data().state()
    assert "parent/status" not in due(state, running=True)
    ended = due(state, running=False)["parent/status"]
    assert isinstance(ended, SetStatus)
    assert (ended.status, ended.end_ms) == ("KILLED", round(state.last_at * 1000))


def test_ensemble_tells_the_study_metric_on_test_for_the_alias() -> None:
    ensemble = due(whole_study().state())["ensemble/4"]
    assert isinstance(ensemble, LogEnsemble)
    told = ensemble.registration
    assert (told.model, told.alias) == ("digits", "champion")
    assert (told.test_fingerprint, told.metric, told.goal, told.test_value) == ("test-split-1", "loss", "minimize", 0.3)
    assert last_values(ensemble.child)["test_loss"] == 0.3
    assert last_values(ensemble.child)["val_loss"] == 0.35


def chosen(*, first: int = 1, gain: float = -0.02, **ensemble: object) -> dict[str, Operation]:
    script = Script().data().search_begins().trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0])
    if first > 1:
        script.trial(1, [1.1] * 2, first=2)  # no better, but another checkpoint
    script.search_ends().ensemble(**ensemble)  # type: ignore[arg-type]
    script.events.insert(-1, (script.now, Compared(n_trials=4, gain={"metric": "loss", "value": gain})))
    return due(script.state())


def ensemble_keys(told: dict[str, Operation]) -> tuple[str, str, str]:
    ensemble = told["ensemble/4"]
    assert isinstance(ensemble, LogEnsemble)
    return ensemble.revision, ensemble.child.key, told["parent/result/4"].revision


@pytest.mark.parametrize(
    "changed", [{"members": ((1, 1.0),)}, {"best": 1}, {"gain": -0.03}, {"first": 2}], ids=lambda c: next(iter(c))
)
def test_ensemble_chosen_again_at_the_same_size_is_due_again_as_another_run(changed: dict[str, object]) -> None:
    before, after = ensemble_keys(chosen()), ensemble_keys(chosen(**changed))  # type: ignore[arg-type]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_same_ensemble_measured_again_by_other_last_bits_is_not_due() -> None:
    assert ensemble_keys(chosen(gain=-0.02)) == ensemble_keys(chosen(gain=-0.02 * (1 + 1e-9)))


def test_revision_is_the_same_in_memory_and_read_from_the_journal(tmp_path: Path) -> None:
    script = whole_study()
    read = StudyState.of(read_journal(script.write(tmp_path)))
    assert ensemble_keys(due(read)) == ensemble_keys(due(script.state()))


def test_counts_and_plots_of_a_search_that_went_on_with_the_same_trials_are_due_again() -> None:
    script = Script().data().search_begins().trial(0, [1.0]).search_ends()
    told = due(script.state())["parent/search"].revision
    script.resume().search_begins().trial(0, [0.8, 0.7], first=2).search_ends()
    assert "parent/search" in due(script.state(), {"parent/search": told})


def test_plots_of_the_search_are_due_again_with_each_baseline_that_arrives_after_them() -> None:
    script = Script().data().search_begins().trial(0, [1.0]).search_ends()
    for name in ("constant", "linear"):
        told = {key: op.revision for key, op in due(script.state()).items()}
        values = {"metrics": {"val": {"loss": 2.3}}}
        script.add(Finished(key=f"baseline/{name}", worker="w", outcome="done", values=values))
        assert list(due(script.state(), told)) == ["parent/search"]
    assert due(script.state(), {key: op.revision for key, op in due(script.state()).items()}) == {}


def test_study_without_a_test_split_claims_none() -> None:
    script = Script().data(test_fingerprint="").search_begins().trial(0, [0.9, 0.6, 0.4]).trial(1, [1.0])
    told = due(script.search_ends().ensemble(test_loss=None).ends().state())
    ensemble, result = told["ensemble/4"], told["parent/result/4"]
    assert isinstance(ensemble, LogEnsemble)
    assert isinstance(result, UpdateStudy)
    assert (ensemble.registration.test_fingerprint, ensemble.registration.test_value) == ("", None)
    assert "hpsearch.test_fingerprint" not in result.content.tags
    assert result.content.points == ()


def test_result_tells_test_scores_gain_and_the_split_that_was_used() -> None:
    result = due(whole_study().state())["parent/result/4"]
    assert isinstance(result, UpdateStudy)
    found = last_values(result)
    assert (found["gain/loss"], found["gain/loss_low"], found["gain/loss_high"]) == (-0.02, -0.03, -0.01)
    assert (found["ensemble/test_loss"], found["best/test_loss"]) == (0.3, pytest.approx(0.32))
    assert result.content.tags["hpsearch.test_fingerprint"] == "test-split-1"


def test_notes_and_verdict_are_the_description_of_the_run() -> None:
    text = note_text(whole_study().state(), [Note(number=1, time=0.0, text="sgd looks better")])
    assert text == (
        "**Best trial**: 0, val_loss 0.4 at epoch 3: chosen by its val_loss in the search, 0.4: first of 4.\n\n"
        "**Ensemble**: trials 0 (0.75), 1 (0.25).\n\n"
        "**On the test split**: ensemble − best trial, test loss: -0.02 [-0.03, -0.01]: better.\n\n"
        "**Notes**\n\n"
        "- 1970-01-01 00:00 UTC: sgd looks better"
    )


def test_each_further_note_makes_the_description_due_again() -> None:
    state = Script().state()
    one = [Note(number=1, time=0.0, text="a")]
    told = due(state, notes=one)["parent/note"]
    assert "parent/note" not in due(state, {"parent/note": told.revision}, notes=one)
    assert "parent/note" in due(state, {"parent/note": told.revision}, notes=[*one, Note(number=2, time=1.0, text="b")])


def test_lr_range_tells_numbers_and_curves() -> None:
    found = child(due(whole_study().state()), "lr-range")
    assert found.content.params["lr"] == "0.01"
    assert last_values(found)["high"] == 0.03
    assert json.loads(found.content.texts["ramps.json"])["ramp/all/0"]["losses"] == [2.0, 1.0, 3.0]


def test_children_can_be_found_again_by_study_and_key() -> None:
    told = due(whole_study().state())
    for key in ("trial/2", "lr-range"):
        tags = child(told, key).content.tags
        assert (tags["hpsearch.study_uid"], tags["hpsearch.op"]) == (UID, key)


@given(st.dictionaries(st.text(max_size=12), st.floats(), max_size=4), st.text(max_size=12))
def test_any_metric_and_parameter_name_is_one_that_mlflow_takes(metrics: dict[str, float], parameter: str) -> None:
    script = Script().search_begins().trial(0, [0.5, 0.5, 0.5], config={parameter: 1})
    state = script.state()
    state.trials[0].curve.append(EpochMetrics(epoch=4, metrics=metrics, seconds=1.0))
    trial = child(due(state), "trial/0")
    for name in [*trial.content.params, *(point.name for point in trial.content.points)]:
        assert MLFLOW_NAME.fullmatch(name), name
        assert not name.startswith("/")
        assert ".." not in name.split("/")


@given(st.lists(st.floats(min_value=0, max_value=100), max_size=30), st.floats(min_value=0, max_value=1000))
def test_epoch_times_rise_from_start_to_end(seconds: list[float], length: float) -> None:
    rows = [EpochMetrics(epoch=i + 1, metrics={}, seconds=s) for i, s in enumerate(seconds)]
    times = epoch_times(rows, start=1000.0, end=1000.0 + length)
    assert times == sorted(times)
    assert all(1000.0 <= t <= 1000.0 + length for t in times)
    assert not times or times[-1] == 1000.0 + length


def test_edited_settings_are_told_as_tags_and_the_params_stay() -> None:
    script = Script(max_epochs=3)
    before = due(script.state())
    assert "hpsearch.early_stopping.max_epochs" not in settings_of(before)
    edited = due(script.resume(max_epochs=9).state(), {"parent/settings": before["parent/settings"].revision})
    assert settings_of(edited)["hpsearch.early_stopping.max_epochs"] == "9"
    back = due(script.resume(max_epochs=3).state(), {"parent/settings": edited["parent/settings"].revision})
    assert settings_of(back)["hpsearch.early_stopping.max_epochs"] == "3"
    for told in (before, edited, back):
        study = told["study"]
        assert isinstance(study, OpenStudy)
        assert study.content.params["early_stopping.max_epochs"] == "3"


def settings_of(operations: dict[str, Operation]) -> dict[str, str]:
    operation = operations["parent/settings"]
    assert isinstance(operation, UpdateStudy)
    return dict(operation.content.tags)


def test_ranges_that_were_concluded_anew_have_a_run_of_their_own() -> None:
    """Params of a run cannot be changed; what trials were drawn from before stays to be seen."""
    script = Script().data().lr_range()
    old = due(script.state())["lr-range"]
    spec = dict(script.state().opened.spec)  # type: ignore[union-attr]
    spec["parameters"] = {"lr": {"distribution": "log_uniform", "min": 1e-5, "max": 0.1}, "width": {"values": [8, 16]}}
    script.add(Opened(study="digits", uid=UID, spec=spec, spec_text=""))
    assert "lr-range" not in "".join(due(script.state(), {"lr-range": old.revision}))
    found = child(due(script.lr_range().state(), {"lr-range": old.revision}), "lr-range/2")
    assert found.name == "lr-range"
    assert found.content.tags["hpsearch.op"] == "lr-range/2"
