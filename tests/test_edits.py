"""What changed in a space.yaml between two launches, in words, and what a study refuses to go on with."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from typing import Any

import pytest

from hpsearch import edits as module
from hpsearch.edits import FIXED, Edit, code_edits, edits
from hpsearch.job import Config
from hpsearch.spec import Spec, parse_spec

SPACE = """
name: digits
task: task.py:Digits
search: {trials: 64}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 0.1, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {min: 16, max: 128}
  momentum: {min: 0.8, max: 0.99, when: {optimizer: sgd}}
  batch_size: {value: 64}
"""
ADAMW: Config = {"lr": 1e-3, "optimizer": "adamw", "width": 32, "batch_size": 64}
SGD: Config = {"lr": 1e-2, "optimizer": "sgd", "width": 64, "momentum": 0.9, "batch_size": 64}
DRAWN: dict[int, Config] = {0: ADAMW, 1: SGD, 2: ADAMW}


def spec_of(*overrides: str, space: str = SPACE) -> Spec:
    return parse_spec(space, overrides=overrides)


def of(
    old: str | tuple[str, str], *overrides: str, before: tuple[str, ...] = (), configs: Mapping[int, Config] = DRAWN
) -> tuple[Edit, ...]:
    """Edits of one replacement in the space, or of overrides alone."""
    space = SPACE
    if isinstance(old, tuple):
        assert old[0] in SPACE
        space = SPACE.replace(*old)
    elif old:
        overrides = (old, *overrides)
    return edits(spec_of(*before), spec_of(*overrides, space=space), configs)


def words(*args: Any, **kwargs: Any) -> list[str]:
    found = of(*args, **kwargs)
    assert not any(edit.refused for edit in found)
    assert all(edit.words.startswith(edit.key) for edit in found)
    return [edit.words for edit in found]


def test_nothing_changed_is_no_edit() -> None:
    assert of("") == ()
    assert edits(spec_of(), spec_of(space="# a comment\n" + SPACE.replace("0.1", "1e-1")), DRAWN) == ()


NOT_COMPARED = "trials are not compared any more, each goes on to its last epoch"
ANEW = "trials are compared anew by their curves"
AGAIN = "the ramps are run again, and new trials draw from what they give"
CHOSEN = "the ensemble is chosen again"


@pytest.mark.parametrize(
    ("key", "before", "after", "told"),
    [
        ("search.trials", "64", "128", "64 more trials"),
        ("search.trials", "64", "65", "1 more trial"),
        ("search.trials", "64", "2", "no new ones beyond the 3 that are drawn"),
        ("search.trials", "64", "32", "3 are drawn and stay, 29 more to come"),
        ("search.method", "sobol", "tpe", "new trials are drawn by tpe, old ones keep their configs"),
        ("early_stopping.max_epochs", "27", "81", "complete trials are paused and may go on"),
        ("early_stopping.max_epochs", "27", "9", "trials that have come to epoch 9 are complete"),
        ("early_stopping.min_epochs", "1", "2", f"{ANEW}, at epochs 2, 6, 18"),
        ("early_stopping.type", "asha", "median", f"{ANEW}, every epoch"),
        ("early_stopping.type", "asha", "none", NOT_COMPARED),
        ("early_stopping.enabled", "true", "false", NOT_COMPARED),
        ("lr_range.steps", "100", "200", AGAIN),
        ("lr_range.min", "1e-5", "1e-6", AGAIN),
        ("lr_range.seeds", "5", "7", "2 more ramps per branch, and the ranges are concluded anew"),
        ("lr_range.seeds", "5", "3", "the ranges are concluded anew"),
        ("ensemble.pool", "20", "30", CHOSEN),
        ("ensemble.size", "5", "7", f"{CHOSEN}, and as many trials are trained to the end"),
        ("ensemble.size", "5", "3", CHOSEN),
        ("resources.threads", "1", "2", "epochs trained from now on may differ from the old ones' in their last bits"),
        ("resources.cpus", "1", "2", ""),
        ("budget.hours", "null", "1.5", ""),
        ("mlflow.alias", "champion", "best", ""),
    ],
)
def test_a_setting_that_may_change_says_what_follows(key: str, before: str, after: str, told: str) -> None:
    expected = f"{key}: {before} -> {after}" + (f": {told}" if told else "")
    assert words(f"{key}={after}", before=(f"{key}={before}",)) == [expected]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("min: 1e-4, max: 0.1", "min: 1e-5, max: 1.0",
         "lr: wider (1e-4..0.1 -> 1e-5..1): new trials draw from it, old ones stay; "
         "its ranges are concluded anew from the ramps that were run"),
        ("max: 128", "max: 256", "width: wider (16..128 -> 16..256): new trials draw from it, old ones stay"),
        ("max: 128", "max: 64",
         "width: narrower (16..128 -> 16..64): new trials draw from it, old ones stay as evidence"),
        ("min: 16, max: 128", "min: 32, max: 256",
         "width: moved (16..128 -> 32..256): new trials draw from it, old ones stay as evidence"),
        ("max: 128", "max: 128, distribution: log_uniform",
         "width: log_uniform, no longer uniform: new trials are drawn so"),
        ("max: 128", "max: 128, step: 16", "width: whole numbers in steps of 16: new trials draw these"),
        ("min: 16, max: 128", "min: 16.0, max: 128", "width: real numbers without steps: new trials draw these"),
        ("{min: 16, max: 128}", "{values: [32, 64]}",
         "width: was 16..128, now 32, 64: new trials draw from it, old ones stay as evidence"),
        ("[adamw, sgd]", "[adamw, sgd, lion]",
         "optimizer: new value `lion`: new trials may have it; new branches are ramped first"),
        ("[adamw, sgd]", "[sgd]", "optimizer: no more `adamw`: old trials that have it stay as evidence"),
        ("[adamw, sgd]", "[sgd, adamw]", "optimizer: values in another order: new trials draw others"),
        ("{values: [adamw, sgd]}", "{choices: {adamw: {}, sgd: {}, lion: {}}}",
         "optimizer: new choice `lion`: new trials may have it; new branches are ramped first"),
        ("value: 64", "value: 128",
         "batch_size: new value `128`: new trials may have it; no more `64`: old trials that have it stay as evidence"),
        (", bounds_from: lr_range", "", "lr: new trials draw it within its own bounds"),
    ],
)  # fmt: skip
def test_an_edited_parameter_says_what_becomes_of_old_and_new_trials(old: str, new: str, told: str) -> None:
    assert words((old, new)) == [f"parameters.{told}"]


def test_other_conditions_are_told() -> None:
    before, after = SPACE.replace("sgd}}", "[sgd, adamw]}}"), SPACE
    assert [edit.words for edit in edits(spec_of(space=before), spec_of(space=after), {1: SGD})] == [
        "parameters.momentum: exists under other conditions: new trials follow them"
    ]


def test_new_choice_brings_parameters_of_its_own_that_no_old_trial_lacks() -> None:
    assert words(("{values: [adamw, sgd]}", "{choices: {adamw: {}, sgd: {}, lion: {beta: {min: 0.5, max: 0.9}}}}")) == [
        "parameters.optimizer: new choice `lion`: new trials may have it; new branches are ramped first",
        "parameters.optimizer.choices.lion.beta: new (0.5..0.9): no old trial is without it",
    ]


def test_removed_parameters_are_told_once_each() -> None:
    assert words(("  momentum: {min: 0.8, max: 0.99, when: {optimizer: sgd}}\n", "")) == [
        "parameters.momentum: removed (0.8..0.99): new trials do not have it, old ones keep it"
    ]
    assert [edit.key for edit in edits(
        spec_of(space=SPACE.replace("{value: 64}", "{choices: {a: {b: {value: 1}}}}")),
        spec_of(space=SPACE.replace("  batch_size: {value: 64}\n", "")), {},
    )] == ["parameters.batch_size"]  # fmt: skip


def test_parameters_in_another_order_draw_other_values() -> None:
    space = SPACE.replace("  width: {min: 16, max: 128}\n", "").replace(
        "  lr: {d", "  width: {min: 16, max: 128}\n  lr: {d"
    )
    assert [edit.words for edit in edits(spec_of(), spec_of(space=space), DRAWN)] == [
        "parameters: in another order: new trials draw other values"
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  width:", "  depth: {min: 1, max: 3}\n  width:", "depth: new: {}trials 0..2 would need it and have none"),
        ("  width:", "  depth: {value: 3}\n  width:", "depth: new: {}trials 0..2 would need it and have none"),
        ("  width:", "  nesterov: {values: [true, false], when: {optimizer: sgd}}\n  width:",
         "nesterov: new: {}trial 1 would need it and has none"),
        (", when: {optimizer: sgd}", "",
         "momentum: under other conditions: {}trials 0 and 2 would need it and have none"),
    ],
)  # fmt: skip
def test_parameter_that_old_trials_would_need_is_refused(old: str, new: str, told: str) -> None:
    (edit,) = of((old, new))
    assert edit.refused
    assert edit.words == "parameters." + told.format("the study cannot go on with it, since ")
    assert edit.hint == "give it to a new choice or under a new value, or choose another --run-dir for a new study"


def test_parameter_may_be_added_when_no_trial_would_need_it() -> None:
    added = ("  width:", "  depth: {min: 1, max: 3}\n  width:")
    assert words(added, configs={}) == ["parameters.depth: new (1..3): no old trial is without it"]
    conditional = ("  width:", "  nesterov: {values: [true, false], when: {optimizer: sgd}}\n  width:")
    assert words(conditional, configs={0: ADAMW}) == [
        "parameters.nesterov: new (true, false): no old trial is without it"
    ]


def test_parameter_that_was_removed_and_comes_back_is_refused_for_those_drawn_without_it() -> None:
    drawn: dict[int, Config] = {**DRAWN, 3: {k: v for k, v in ADAMW.items() if k != "width"}}
    without = SPACE.replace("  width: {min: 16, max: 128}\n", "")
    (edit,) = edits(spec_of(space=without), spec_of(), drawn)
    assert edit.words == (
        "parameters.width: new: the study cannot go on with it, since trial 3 would need it and has none"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("name=other", "name: digits -> other"),
        ("task=task.py:Letters", "task: task.py:Digits -> task.py:Letters"),
        ("metric.name=val_accuracy", "metric.name: val_loss -> val_accuracy"),
        ("metric.goal=maximize", "metric.goal: minimize -> maximize"),
        ("seed=3", "seed: 0 -> 3"),
        ("shuffle=false", "shuffle: true -> false"),
    ],
)
def test_what_would_make_old_trials_incomparable_is_refused_by_name(change: str, told: str) -> None:
    refused = [edit for edit in of(change) if edit.refused]
    key = change.partition("=")[0]
    edit = next(edit for edit in refused if edit.key == key)
    assert edit.words == f"{told}: the study cannot go on with it, since {FIXED[key]}"
    assert edit.hint == "put it back, or choose another --run-dir for a new study"


def test_what_sets_rows_of_val_aside_may_change_while_they_stay_aside() -> None:
    (edit,) = of("ensemble.enabled=false")
    assert edit.refused
    assert edit.words == (
        "ensemble.enabled: true -> false: the study cannot go on with it, since rows of val are set aside for it, "
        "so old and new trials would be ranked on other rows"
    )
    assert words("confirm.enabled=true", before=("confirm.enabled=false",)) == [
        "confirm.enabled: false -> true: the best trials are confirmed"
    ]
    assert words("confirm.enabled=true", "ensemble.enabled=false", before=("confirm.enabled=true",)) == [
        "ensemble.enabled: true -> false: the best single trial is registered"
    ]


def test_folds_may_be_asked_for_later_and_changed() -> None:
    assert words("evaluate.enabled=true") == ["evaluate.enabled: false -> true: the best trials are cross-validated"]
    assert words("evaluate.folds=10", before=("evaluate.folds=5",)) == [
        "evaluate.folds: 5 -> 10: the best trials are cross-validated again, on other folds"
    ]
    assert words("evaluate.repeats=2", before=("evaluate.repeats=1",)) == [
        "evaluate.repeats: 1 -> 2: the best trials are cross-validated again, with the folds that are trained"
    ]


def test_own_config_may_be_given_later_changed_and_left_out() -> None:
    config = "{lr: 3e-4, optimizer: adamw, width: 64}"
    own = f"baseline={config}"
    other = "baseline={lr: 1e-3, optimizer: adamw, width: 64}"
    assert words(own) == [f"baseline: null -> {config}: trained to the end beside the search, as one trial more"]
    assert words(other, before=(own,)) == [
        "baseline.lr: 3e-4 -> 1e-3: trained as one trial more, the old config's stays"
    ]
    assert words("", before=(own,)) == [f"baseline: {config} -> null: its trial stays, as one among the others"]


def test_storage_may_be_named_later_moved_and_left() -> None:
    uri = "s3://bucket/a"
    assert words(f"storage={uri}") == [f"storage: null -> {uri}: all of the study is mirrored there anew"]
    assert words("", before=(f"storage={uri}",)) == [f"storage: {uri} -> null: the study is mirrored no more"]


def test_every_key_of_space_yaml_has_a_verdict() -> None:
    """A key that is added later has to be thought about here."""
    known = spec_of().dump()
    for section, value in known.items():
        if section == "parameters":
            continue
        for key in [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]:
            verdict = module._what_follows(key, spec_of(), spec_of(), {})
            assert (key in FIXED) != (verdict is not None), key


def test_changed_task_code_is_told_by_file() -> None:
    old = {"task.py": "a", "nets.py": "b", "gone.py": "c"}
    new = {"task.py": "x", "nets.py": "b", "more.py": "d"}
    assert code_edits(old, new, range(18)) == (
        "gone.py is imported no more since trials 0..17 were trained; they stay as evidence",
        "more.py is new since trials 0..17 were trained; they stay as evidence",
        "task.py has changed since trials 0..17 were trained; they stay as evidence",
    )
    assert code_edits({"task.py": "a"}, {"task.py": "b"}, [4]) == (
        "task.py has changed since trial 4 was trained; it stays as evidence",
    )
    assert code_edits({"task.py": "a"}, {"task.py": "b"}, []) == ("task.py has changed",)


def test_code_that_was_not_recorded_is_not_said_to_have_changed() -> None:
    assert code_edits({}, {"task.py": "b"}, [0]) == ()
    assert code_edits({"task.py": "a"}, {"task.py": "a"}, [0]) == ()


def test_doctests_of_edits_hold() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
