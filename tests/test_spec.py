"""space.yaml: the contract's example, every default, and every problem with its place."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.errors import SpecError
from hpsearch.spec import Budget, Spec, json_schema, parse_spec, read_spec
from hpsearch.yaml_reader import read_document, write_yaml

EXAMPLE = """\
name: digits
task: digits_task.py:Digits          # file.py:Class beside this file, or package.module:Class
metric: {name: val_loss, goal: minimize}
seed: 0
search: {method: sobol, trials: 64}  # sobol | random | tpe
parameters:                          # value | values | min+max (+ distribution, step) | choices; `when`
  lr:           {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  batch_size:   {values: [32, 64, 128]}
  optimizer:    {values: [adamw, sgd]}
  momentum:     {min: 0.8, max: 0.99, when: {optimizer: sgd}}
  weight_decay: {distribution: log_uniform, min: 1e-6, max: 1e-1}
  width:        {values: [64, 128, 256]}
  depth:        {min: 1, max: 3}     # two integers: integers; two floats: reals
preflight: {enabled: false}
lr_range: {per: [optimizer], min: 1e-5, max: 10, steps: 100, seeds: 5}
early_stopping: {type: asha, min_epochs: 1, max_epochs: 27, reduction_factor: 3}
ensemble: {pool: 20, size: 5}
resources: {cpus: 1, gpus: 0, lanes: auto}   # per worker
budget: {hours: 2, gpu_hours: null, disk: 10GiB}
mlflow: {experiment: digits, registered_model: digits, alias: champion}
"""
CONTRACT = EXAMPLE.replace("{enabled: false}", "{enabled: true}").replace(
    "ensemble:", "finish: {trials: 8, extra_epochs: 9}\nensemble:"
)
HEAD = "name: digits\ntask: digits_task.py:Digits\n"
SMALL = HEAD + "parameters:\n  depth: {min: 1, max: 3}\n"


def problems(text: str, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, overrides=overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def parameter_problems(*lines: str) -> list[str]:
    """Of a file whose parameters start in line 4, column 3."""
    return problems(HEAD + "parameters:\n" + "".join(f"  {line}\n" for line in lines))


def parameters(*lines: str) -> Spec:
    return parse_spec(HEAD + "parameters:\n" + "".join(f"  {line}\n" for line in lines))


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_the_contracts_example_is_a_study() -> None:
    spec = parse_spec(EXAMPLE)
    assert spec.space.names == ("lr", "batch_size", "optimizer", "momentum", "weight_decay", "width", "depth")
    assert spec.space.n_dims == 7
    assert spec.space.measured == ("lr",)
    assert spec.measures_lr
    assert spec.per == ("optimizer",)
    assert [parameter.kind for parameter in spec.space.parameters] == [
        "real", "categorical", "categorical", "real", "real", "categorical", "integer",
    ]  # fmt: skip
    assert spec.lr_range.max == 10.0
    assert spec.budget.disk_bytes == 10 * 2**30
    assert spec.space.config([0.0] * 7) == {
        "lr": 1e-5, "batch_size": 32, "optimizer": "adamw", "weight_decay": 1e-6, "width": 64, "depth": 1,
    }  # fmt: skip


def test_name_task_and_parameters_are_enough_and_the_rest_has_defaults() -> None:
    dumped = parse_spec(SMALL).dump()
    assert dumped == {
        "name": "digits",
        "task": "digits_task.py:Digits",
        "metric": {"name": "val_loss", "goal": "minimize"},
        "metrics": [],
        "seed": 0,
        "search": {"method": "sobol", "trials": 64},
        "parameters": {"depth": {"min": 1, "max": 3}},
        "preflight": {"enabled": True, "allow": []},
        "lr_range": {"enabled": True, "per": None, "min": 1e-5, "max": 10.0, "steps": 100, "seeds": 5},
        "early_stopping": {
            "enabled": True, "type": "asha", "min_epochs": 1, "max_epochs": 27, "reduction_factor": 3,
        },
        "finish": {"enabled": False, "trials": 8, "extra_epochs": 9},
        "baselines": {},
        "baseline": None,
        "evaluate": {"enabled": False, "folds": 5, "repeats": 1, "trials": 8},
        "confirm": {"enabled": False, "trials": 3, "seeds": 3},
        "ensemble": {"enabled": True, "pool": 20, "size": 5},
        "resources": {"cpus": 1.0, "gpus": 0.0, "custom": {}, "lanes": "auto", "threads": 1},
        "budget": {"hours": None, "gpu_hours": None, "epochs": None, "disk": None},
        "mlflow": {"experiment": "digits", "registered_model": "digits", "alias": "champion"},
        "storage": None,
        "shuffle": True,
        "precision": "float32",
    }  # fmt: skip


def test_every_stage_can_be_switched_off() -> None:
    stages = ("preflight", "lr_range", "early_stopping", "finish", "evaluate", "confirm", "ensemble")
    spec = parse_spec(SMALL + "".join(f"{stage}: {{enabled: false}}\n" for stage in stages))
    assert [getattr(spec, stage).enabled for stage in stages] == [False] * 7
    assert spec.early_stopping.rule == "none"


def test_two_whole_ends_give_integers_and_a_point_gives_reals() -> None:
    spec = parameters(
        "a: {min: 1, max: 3}", "b: {min: 1, max: 3.0}", "c: {min: 8, max: 512, distribution: log_uniform}"
    )
    assert [p.kind for p in spec.space.parameters] == ["integer", "real", "integer"]
    assert spec.space.parameters[2].log


def test_values_keep_their_types_and_lists() -> None:
    spec = parameters("layers: {values: [[64, 64], [128], 32]}", "flag: {values: [true, 1, no, null, 1e-4]}")
    assert spec.space.config([0.0, 0.0])["layers"] == [64, 64]
    assert spec.space.parameters[1].values == (True, 1, "no", None, 1e-4)


def test_choices_are_flat_in_the_config_and_may_share_names_and_nest() -> None:
    spec = parameters(
        "optimizer:",
        "  choices:",
        "    adamw: {beta: {min: 0.9, max: 0.99}}",
        "    sgd:",
        "      beta: {value: 0.9}",
        "      nesterov: {choices: {yes: {damp: {value: 0}}, no: {}}}",
        "    rmsprop: {}",
        "warm: {value: 3, when: {optimizer: [adamw, sgd]}}",
    )
    assert spec.per == ("optimizer", "nesterov")
    config = spec.space.config
    assert config([0.1, 0.0, 0.0]) == {"optimizer": "adamw", "beta": 0.9, "warm": 3}
    assert config([0.5, 0.5, 0.2]) == {"optimizer": "sgd", "beta": 0.9, "nesterov": "yes", "damp": 0, "warm": 3}
    assert config([0.5, 0.5, 0.7]) == {"optimizer": "sgd", "beta": 0.9, "nesterov": "no", "warm": 3}
    assert config([0.9, 0.5, 0.2]) == {"optimizer": "rmsprop"}
    assert spec.space.branches(spec.per) == (
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "nesterov": "yes"},
        {"optimizer": "sgd", "nesterov": "no"},
        {"optimizer": "rmsprop"},
    )


def test_a_choices_own_parameters_stay_with_it_when_another_choice_has_its_name() -> None:
    spec = parameters(
        "net:",
        "  choices:",
        "    mlp: {norm: {values: [batch, none]}}",
        "    cnn: {norm: {choices: {batch: {decay: {value: 0.9}}, group: {}}}}",
        "    linear: {norm: {min: 1, max: 2}}",
    )
    configs = [spec.space.config([net, 0.1, 0.1, 0.1]) for net in (0.1, 0.5, 0.9)]
    assert configs == [
        {"net": "mlp", "norm": "batch"},
        {"net": "cnn", "norm": "batch", "decay": 0.9},
        {"net": "linear", "norm": 1},
    ]
    assert spec.space.size() == 6
    assert spec.per == ("net",)


def test_branches_are_made_by_optimizer_only_where_it_is_searched() -> None:
    assert parameters("optimizer: {value: sgd}").per == ()
    assert parameters("optimizer: {values: [sgd, adam]}", "width: {values: [1, 2]}").per == ("optimizer",)
    assert parameters("net: {values: [a, b]}", "optimizer: {values: [sgd, adam], when: {net: a}}").per == (
        "net",
        "optimizer",
    )


@pytest.mark.parametrize(
    ("disk", "n_bytes"),
    [("10GiB", 10 * 2**30), ("1.5 KiB", 1536), ("500MB", 500_000_000), ("7B", 7), ("2TB", 2 * 10**12)],
)
def test_disk_sizes(disk: str, n_bytes: int) -> None:
    assert Budget(disk=disk).disk_bytes == n_bytes


def test_overrides_change_add_and_are_checked_like_the_file() -> None:
    spec = parse_spec(EXAMPLE, overrides=["search.trials=8", "parameters.lr.max=0.1", "parameters.width={value: 32}"])
    assert spec.search.trials == 8
    assert spec.parameters["lr"].max == 0.1  # type: ignore[union-attr]
    assert spec.space.config([0.0] * 6)["width"] == 32
    assert problems(EXAMPLE, ["parameters.lr.max=-1"]) == [
        "error[log-bounds]: --set parameters.lr.max: `lr` is log-uniform, so 0 < min < max is needed "
        "(got min=1e-05, max=-1)"
    ]
    assert problems(EXAMPLE, ["ensemble.size=30", "serch.trials=3"]) == [
        "error[ensemble-size]: --set ensemble.size: `ensemble` needs size <= pool (got size=30, pool=20)"
        "\n  hint: members come from the pool",
        "error[unknown-key]: --set serch.trials: `serch` is not a key of space.yaml (known: name, task, metric, "
        "metrics, seed, search, parameters, preflight, lr_range, early_stopping, finish, baselines, "
        "baseline, evaluate, confirm, "
        "ensemble, resources, budget, mlflow, storage, shuffle, precision)"
        "\n  hint: did you mean search?",
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_spec_reports_all_problems_with_lines() -> None:
    text = (
        EXAMPLE.replace("min: 1e-5, max: 1.0", "min: 0.0, max: 0.1")
        .replace("type: asha", "grace_period: 4")
        .replace("{optimizer: sgd}", "{optimizer: sdg}")
        .replace("[optimizer]", "[depth]")
        .replace("alias", "alas")
    )
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert str(caught.value) == (
        "error[log-bounds]: space.yaml:7:3: `lr` is log-uniform, so 0 < min < max is needed (got min=0.0, max=0.1)\n"
        "  hint: write min: 1e-6, or distribution: uniform if zero is meant\n"
        "error[when-value]: space.yaml:10:57: `optimizer` is never sdg (it is one of: adamw, sgd)\n"
        "  hint: did you mean sgd?\n"
        "error[per]: space.yaml:15:18: `per` names `depth`, which is a range; branches are made by values or choices\n"
        "  hint: leave it out\n"
        "error[unknown-key]: space.yaml:16:18: `grace_period` is not a key of `early_stopping` "
        "(known: type, min_epochs, max_epochs, reduction_factor, enabled)\n"
        "  hint: Ray's grace_period is called min_epochs here\n"
        "error[unknown-key]: space.yaml:20:56: `alas` is not a key of `mlflow` "
        "(known: experiment, registered_model, alias)\n"
        "  hint: did you mean alias?\n"
        "5 problems in space.yaml; nothing was started."
    )


def test_grid_is_refused_with_the_reason() -> None:
    assert problems(SMALL + "search: {method: grid}\n") == [
        "error[grid]: space.yaml:5:18: `method: grid` is not offered: on equal budgets random search does better, "
        "since each trial tries new values of every parameter (128 grid points found what 12 to 16 "
        "random trials find)\n"
        "  hint: write method: sobol, or random"
    ]


@pytest.mark.parametrize(
    ("written", "found", "hint"),
    [
        ("preflight: no", '"no"', "write {enabled: false}"),
        ("lr_range: off", '"off"', "write {enabled: false}"),
        ("ensemble: false", "false", "write {enabled: false}"),
        ("evaluate: 3", "3", "write {folds: 3}"),
        ("search: 20", "20", "write {trials: 20}"),
        ("early_stopping: sha", '"sha"', "write {type: sha}"),
        ("finish: true", "true", "leave it out: it is not built yet"),
    ],
)
def test_single_value_in_place_of_a_section_is_told_how_to_write_it(written: str, found: str, hint: str) -> None:
    key = written.partition(":")[0]
    place = f"space.yaml:5:{len(key) + 3}"
    assert problems(SMALL + f"{written}\n") == [
        f"error[type]: {place}: `{key}` is a mapping (got {found})\n  hint: {hint}"
    ]


def test_worker_that_asks_for_nothing_is_refused() -> None:
    assert problems(SMALL + "resources: {cpus: 0}\n") == [
        "error[range]: space.yaml:5:19: `resources.cpus` is above 0 where a worker holds nothing else\n"
        "  hint: write cpus: 1, or a share such as 0.5"
    ]
    assert parse_spec(SMALL + "resources: {cpus: 0, gpus: 1}\n").resources.cpus == 0


def test_metric_that_is_nearly_a_known_one_is_asked_about() -> None:
    assert problems(SMALL + "metric: {name: val_acuracy}\n") == [
        "error[goal]: space.yaml:5:1: `metric.goal` is needed, since `val_acuracy` does not tell what is better\n"
        "  hint: did you mean val_accuracy? for a metric of the task's own write metric: {name: val_acuracy, goal: "
        "maximize}, or minimize"
    ]


@pytest.mark.parametrize(
    ("written", "found", "hint"),
    [
        ("fp8", '"fp8"', ""),
        ("bfloat16", '"bfloat16"', "\n  hint: did you mean bf16?"),
        ("16", "16", "\n  hint: did you mean bf16?"),
        ("flaot32", '"flaot32"', "\n  hint: did you mean float32?"),
    ],
)
def test_option_of_a_key_at_the_top_is_named(written: str, found: str, hint: str) -> None:
    assert problems(SMALL + f"precision: {written}\n") == [
        f"error[option]: space.yaml:5:12: `precision` is float32 or bf16 (got {found}){hint}"
    ]


def test_the_contracts_later_keys_answer_not_built_yet() -> None:
    assert problems(CONTRACT) == [
        "error[not-built-yet]: space.yaml:17:1: `finish` is not built yet\n  hint: write enabled: false",
    ]
    assert parse_spec(CONTRACT, overrides=["finish.enabled=false"]).finish.trials == 8


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        *((f"{key}: {{}}", f"space.yaml:5:1: `{key}` is not built yet\n  hint: leave it out") for key in ("distill",)),
        (
            "early_stopping: {type: hyperband}",
            "space.yaml:5:24: `type: hyperband` is not built yet\n  hint: write type: asha, sha, median or none",
        ),
        ("finish: {enabled: true}", "space.yaml:5:1: `finish` is not built yet\n  hint: write enabled: false"),
    ],
)
def test_what_comes_later_says_so(lines: str, message: str) -> None:
    assert problems(SMALL + lines + "\n") == [f"error[not-built-yet]: {message}"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("seed: -1", "error[range]: space.yaml:5:7: `seed` is at least 0 (got -1)"),
        (
            "search: {trials: 1e2}",
            "error[type]: space.yaml:5:18: `search.trials` is a whole number (got 100.0)\n  hint: write 100",
        ),
        (
            "search: {trials: '64'}",
            'error[type]: space.yaml:5:18: `search.trials` is a whole number (got "64")\n'
            "  hint: text in quotes is no number",
        ),
        (
            "search: {trials: true}",
            "error[type]: space.yaml:5:18: `search.trials` is a whole number (got true)",
        ),
        (
            "search: {method: sobel}",
            'error[option]: space.yaml:5:18: `search.method` is sobol, random or tpe (got "sobel")\n'
            "  hint: did you mean sobol?",
        ),
        (
            "metric: {goal: max}",
            'error[option]: space.yaml:5:16: `metric.goal` is minimize or maximize (got "max")\n'
            "  hint: did you mean maximize?",
        ),
        (
            "metric: {name: loss}",
            'error[metric]: space.yaml:5:16: `metric.name` starts with val_ (got "loss")\n  hint: val_loss?',
        ),
        (
            "metric: {name: test_loss}",
            'error[metric]: space.yaml:5:16: `metric.name` starts with val_ (got "test_loss")\n'
            "  hint: val_loss: trials are ranked on the validation split, and on no other",
        ),
        (
            "metric: val_loss",
            'error[type]: space.yaml:5:9: `metric` is a mapping (got "val_loss")\n'
            "  hint: write metric: {name: val_loss}",
        ),
        (
            "n_trials: 3",
            "error[unknown-key]: space.yaml:5:1: `n_trials` is not a key of space.yaml (known: name, task, metric, "
            "metrics, seed, search, parameters, preflight, lr_range, early_stopping, finish, baselines, "
            "baseline, evaluate, confirm, "
            "ensemble, resources, budget, mlflow, storage, shuffle, precision)\n"
            "  hint: Optuna's n_trials is called trials here, under `search`",
        ),
        (
            "search: {max_t: 3}",
            "error[unknown-key]: space.yaml:5:10: `max_t` is not a key of `search` (known: method, trials)\n"
            "  hint: Ray's max_t is called max_epochs here, under `early_stopping`",
        ),
        (
            "search: {seed: 3}",
            "error[unknown-key]: space.yaml:5:10: `seed` is not a key of `search` (known: method, trials)\n"
            "  hint: `seed` belongs at the top, not under `search`",
        ),
        (
            "early_stopping: {max-epochs: 3}",
            "error[unknown-key]: space.yaml:5:18: `max-epochs` is not a key of `early_stopping` (known: type, "
            "min_epochs, max_epochs, reduction_factor, enabled)\n  hint: did you mean max_epochs?",
        ),
        (
            "search: {patience: 3}",
            "error[unknown-key]: space.yaml:5:10: `patience` is not a key of `search` (known: method, trials)\n"
            "  hint: trials are compared with each other at rungs; there is no patience",
        ),
        (
            "early_stopping: {min_epochs: 9, max_epochs: 3}",
            "error[epochs]: space.yaml:5:1: `early_stopping` needs min_epochs <= max_epochs "
            "(got min_epochs=9, max_epochs=3)",
        ),
        (
            "early_stopping: {reduction_factor: 1}",
            "error[range]: space.yaml:5:36: `early_stopping.reduction_factor` is at least 2 (got 1)",
        ),
        (
            "ensemble: {pool: 3}",
            "error[ensemble-size]: space.yaml:5:1: `ensemble` needs size <= pool (got size=5, pool=3)\n"
            "  hint: members come from the pool",
        ),
        (
            "ensemble: true",
            "error[type]: space.yaml:5:11: `ensemble` is a mapping (got true)\n  hint: write {enabled: true}",
        ),
        (
            "ensemble:",
            "error[empty]: space.yaml:5:10: `ensemble` is empty, where a mapping is expected\n"
            "  hint: give it a value, or leave the key out",
        ),
        ("lr_range: {min: 0}", "error[range]: space.yaml:5:17: `lr_range.min` is above 0 (got 0)"),
        (
            "lr_range: {min: 1, max: .1}",
            "error[bounds]: space.yaml:5:1: `lr_range` needs min < max (got min=1.0, max=0.1)",
        ),
        (
            "lr_range: {per: optimizer}",
            'error[type]: space.yaml:5:17: `lr_range.per` is a list (got "optimizer")\n  hint: write [optimizer]',
        ),
        (
            "lr_range: {per: [dept]}",
            "error[per]: space.yaml:5:18: `per` names `dept`, which is no parameter\n  hint: did you mean depth?",
        ),
        (
            "resources: {lanes: 0}",
            "error[option]: space.yaml:5:20: `resources.lanes` is auto or a whole number of at least 1 (got 0)",
        ),
        (
            "resources: {lanes: true}",
            "error[option]: space.yaml:5:20: `resources.lanes` is auto or a whole number of at least 1 (got true)",
        ),
        (
            "resources: {lanes: many}",
            'error[option]: space.yaml:5:20: `resources.lanes` is auto or a whole number of at least 1 (got "many")',
        ),
        (
            "resources: {custom: {GPU: 1}}",
            'error[custom]: space.yaml:5:13: `resources.custom` names "GPU", which has a key of its own\n'
            "  hint: write resources.gpus",
        ),
        (
            "resources: {custom: {a b: 1}}",
            "error[custom]: space.yaml:5:13: `resources.custom` holds names of Ray's resources (got \"a b\")\n"
            "  hint: such as accelerator_type:A100, or what `ray start --resources` named",
        ),
        (
            "resources: {custom: {highmem: 0}}",
            "error[custom]: space.yaml:5:13: `resources.custom` holds amounts of at least 0.0001, Ray's finest "
            "(got highmem: 0.0)\n  hint: leave it out if none is needed",
        ),
        (
            "resources: {gpus: 1.5}",
            "error[gpus]: space.yaml:5:19: `resources.gpus` above 1 is a whole number (got 1.5)\n"
            "  hint: only a single GPU can be shared",
        ),
        (
            "budget: {disk: 10}",
            "error[type]: space.yaml:5:16: `budget.disk` is text (got 10)\n  hint: such as 10GiB",
        ),
        (
            "budget: {disk: 10 gigs}",
            'error[disk]: space.yaml:5:16: `budget.disk` is a number above 0 and a unit (got "10 gigs")\n'
            "  hint: such as 10GiB; units: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB",
        ),
        (
            "budget: {hours: .inf}",
            "error[not-finite]: space.yaml:5:17: `budget.hours` is not a finite number (got inf)",
        ),
        ("budget: {hours: 0}", "error[range]: space.yaml:5:17: `budget.hours` is above 0 (got 0)"),
        (
            "shuffle: no",
            'error[type]: space.yaml:5:10: `shuffle` is true or false (got "no")\n  hint: write false',
        ),
        (
            "mlflow: {registered_model: a/b}",
            "error[name]: space.yaml:5:28: `mlflow.registered_model` holds no `/` and no `:`, "
            'which part names in MLflow (got "a/b")',
        ),
        (
            "mlflow: {alias: latest}",
            "error[name]: space.yaml:5:17: `mlflow.alias` is a letter, then letters, digits, `_`, `-`, "
            'and neither latest nor v1 (got "latest")\n  hint: such as champion',
        ),
        ("seed: 1\nseed: 2", "error[duplicate-key]: space.yaml:6:1: `seed` is given twice (first in line 5)\n"
            "  hint: keep one of them"),
    ],
)  # fmt: skip
def test_wrong_section_is_told_with_place_rule_finding_and_hint(lines: str, problem: str) -> None:
    assert problems(SMALL + lines + "\n") == [problem]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["a: 3"], "error[parameter-form]: space.yaml:4:6: `a` is a single value, and a parameter is a mapping\n"
            "  hint: write a: {value: 3}"),
        (["a: [x, y]"], "error[parameter-form]: space.yaml:4:3: `a` is a list, and a parameter is a mapping\n"
            "  hint: write a: {values: [x, y]}"),
        (["a:"], "error[empty]: space.yaml:4:5: `a` is empty\n"
            "  hint: a parameter has value, values, min and max, or choices"),
        (["a: {}"], "error[parameter-form]: space.yaml:4:3: `a` has none of value, values, min and max, or choices"),
        (["a: {low: 1, high: 2}"], "error[parameter-form]: space.yaml:4:3: `a` has none of value, values, min and max, "
            "or choices (got low, high)\n  hint: Optuna's low is written min here; Optuna's high is written max here"),
        (["a: {value: 1, values: [2]}"], "error[parameter-form]: space.yaml:4:3: `a` has value and values, "
            "which exclude each other\n  hint: a parameter has one of: value, values, min and max, or choices"),
        (["a: {min: 1}"], "error[missing-key]: space.yaml:4:3: `a` needs `max`\n"
            "  hint: a range has both ends: min and max"),
        (["a: {min: 1, max: 1}"], "error[bounds]: space.yaml:4:3: `a` needs min < max (got min=1, max=1)\n"
            "  hint: for one fixed value write value: 1"),
        (["a: {min: 2, max: 1}"], "error[bounds]: space.yaml:4:3: `a` needs min < max (got min=2, max=1)\n"
            "  hint: swap them?"),
        (["a: {min: 1, max: .nan}"], "error[not-finite]: space.yaml:4:20: `a.max` is not a finite number (got nan)"),
        (["a: {min: '1', max: 2}"], 'error[type]: space.yaml:4:12: `a.min` is a number (got "1")\n'
            "  hint: text in quotes is no number"),
        (["a: {min: false, max: 2}"], "error[type]: space.yaml:4:12: `a.min` is a number (got false)"),
        (["a: {min: 0, max: 9007199254740993}"], "error[range]: space.yaml:4:20: `a.max` lies beyond 2^53, "
            "where whole numbers are no longer exact (got 9007199254740993)"),
        (["a: {min: 0, max: 9, step: 0.5}"], "error[step]: space.yaml:4:3: `a` goes from whole number to whole number, "
            "so its step is one too (got step=0.5)\n  hint: write min: 0.0 for real values"),
        (["a: {min: 0.0, max: 1, step: 2}"], "error[step]: space.yaml:4:3: `a` needs 0 < step <= max - min "
            "(got min=0.0, max=1, step=2)"),
        (["a: {min: 1, max: 9, step: 2, distribution: log_uniform}"], "error[step]: space.yaml:4:3: `a` is log-uniform "
            "and has a step; equal steps are uniform\n  hint: leave `step` out"),
        (["a: {min: 0.0, max: 1.0, step: 1e-12}"], "error[step]: space.yaml:4:3: `a` has more than a billion steps "
            "(got step=1e-12)\n  hint: leave `step` out"),
        (["a: {min: 1, max: 9, distribution: loguniform}"], "error[option]: space.yaml:4:37: `a.distribution` is "
            'uniform or log_uniform (got "loguniform")\n  hint: did you mean log_uniform?'),
        (["a: {values: []}"], "error[empty]: space.yaml:4:7: `a.values` is empty\n  hint: name at least one value"),
        (["a: {values: 3}"], "error[type]: space.yaml:4:15: `a.values` is a list (got 3)\n"
            "  hint: write [3], or use `value`"),
        (["a: {values: [1, 2, 1.0]}"], "error[duplicate-value]: space.yaml:4:7: `a.values` has 1.0 twice\n"
            "  hint: each value has the same chance; keep one of them"),
        (["a: {values: [{b: 1}]}"], "error[type]: space.yaml:4:7: `a.values` holds plain values: numbers, text, true, "
            "false, null (got a mapping)"),
        (["a: {values: [1], min: 3}"], "error[parameter-form]: space.yaml:4:3: `a` has values and min, "
            "which exclude each other\n  hint: a parameter has one of: value, values, min and max, or choices"),
        (["a: {values: [1], distribution: uniform}"], "error[unknown-key]: space.yaml:4:20: `distribution` does not go "
            "with values\n  hint: a parameter with values has: values, when"),
        (["a: {values: [1], wen: {}}"], "error[unknown-key]: space.yaml:4:20: `wen` is not a key of `a` "
            "(known: values, when)\n  hint: did you mean when?"),
        (["a: {choices: {}}"], "error[empty]: space.yaml:4:3: `a` has no choices\n  hint: name at least one"),
        (["a: {choices: {b: }}"], "error[empty]: space.yaml:4:19: `choices.b` is empty, where a mapping is expected\n"
            "  hint: write b: {}"),
        (["a: {choices: {b: {c: {min: 2, max: 1}}}}"], "error[bounds]: space.yaml:4:21: `c` needs min < max "
            "(got min=2, max=1)\n  hint: swap them?"),
        (["a-b: {value: 1}"], "error[name]: space.yaml:4:3: `a-b` is not a name: a letter or `_`, then letters, digits "
            "and `_`, 100 in all\n  hint: write a_b"),
        (["a: {choices: {x: {b: {value: 1}}}}", "b: {value: 1}"], "error[duplicate-parameter]: space.yaml:5:3: `b` is "
            "the name of two parameters (first in line 4)\n"
            "  hint: one name may come back only under another choice of the same parent"),
        (["a: {value: 1, when: {b: 1}}"], "error[when-unknown]: space.yaml:4:24: `when` names `b`, "
            "which is no parameter\n  hint: parameters: a"),
        (["abc: {values: [1, 2]}", "d: {value: 1, when: {abd: 1}}"], "error[when-unknown]: space.yaml:5:24: `when` "
            "names `abd`, which is no parameter\n  hint: did you mean abc?"),
        (["a: {min: 1, max: 2}", "b: {value: 1, when: {a: 1}}"], "error[when-range]: space.yaml:5:24: `when` names "
            "`a`, which is a range; it needs a parameter with listed values\n  hint: give `a` values: […] or choices"),
        (["a: {values: [1, 2]}", "b: {value: 1, when: {a: true}}"], "error[when-value]: space.yaml:5:27: `a` is never "
            "true (it is one of: 1, 2)"),
        (["a: {values: [1, 2]}", "b: {value: 1, when: {a: []}}"], "error[empty]: space.yaml:5:24: `when.a` accepts no "
            "value\n  hint: name the values under which the parameter exists"),
        (["a: {values: [1], when: {b: 1}}", "b: {values: [1], when: {a: 1}}"], "error[when-circle]: space.yaml:4:3: "
            "`when` goes in a circle: `a` waits for `b` waits for `a`\n  hint: leave one of them out"),
        (["a: {values: [1], when: {a: 1}}"], "error[when-circle]: space.yaml:4:3: `when` goes in a circle: `a` waits "
            "for `a`\n  hint: leave one of them out"),
        (["a: {choices: {x: {b: {values: [1]}}, y: {}}}", "c: {value: 1, when: {a: y, b: 1}}"],
            "error[never]: space.yaml:5:3: `c` can never occur: its conditions exclude each other\n"
            "  hint: mend its `when`, or leave it out"),
        (["a: {min: 1, max: 2, bounds_from: lr_range}"], "error[bounds-from]: space.yaml:4:36: `a` takes bounds_from: "
            "lr_range, which measures `lr` alone\n  hint: leave bounds_from out"),
        (["lr: {min: 0.1, max: 0.2, bounds_from: lr_range}"], "error[bounds-from]: space.yaml:4:41: `lr` takes "
            "bounds_from: lr_range, so it is log-uniform\n  hint: write distribution: log_uniform"),
        (["lr: {min: 0.1, max: 0.2, bounds_from: lr_rang}"], "error[option]: space.yaml:4:41: `lr.bounds_from` is "
            'lr_range (got "lr_rang")\n  hint: did you mean lr_range?'),
        (["lr: {min: 20.0, max: 30.0, distribution: log_uniform, bounds_from: lr_range}"],
            "error[bounds-from]: space.yaml:4:70: `lr` lies in 20.0 to 30.0, where no ramp comes (1e-05 to 10.0)\n"
            "  hint: widen lr_range's min and max"),
        (["lr: {value: 0.1, bounds_from: lr_range}"], "error[unknown-key]: space.yaml:4:20: `bounds_from` does not go "
            "with value\n  hint: a parameter with value has: value, when"),
    ],
)  # fmt: skip
def test_wrong_parameter_is_told_with_place_rule_finding_and_hint(lines: list[str], problem: str) -> None:
    assert parameter_problems(*lines) == [problem]


def test_bounds_from_a_stage_that_is_off_is_refused() -> None:
    assert problems(EXAMPLE, ["lr_range.enabled=false"]) == [
        "error[bounds-from]: space.yaml:7:79: `lr` takes bounds_from: lr_range, which is switched off\n"
        "  hint: leave bounds_from out, or lr_range.enabled: false"
    ]


def test_per_needs_searched_lists_and_what_they_depend_on() -> None:
    text = HEAD + (
        "parameters:\n  a: {values: [1, 2]}\n  b: {values: [1, 2], when: {a: 1}}\n  c: {value: 1}\n"
        "lr_range: {per: [b, c, b]}\n"
    )
    assert problems(text) == [
        "error[per]: space.yaml:7:18: `per` names `b`, which exists only under some values of `a`\n"
        "  hint: add a to per",
        "error[per]: space.yaml:7:21: `per` names `c`, which is a constant; branches are made by values or choices\n"
        "  hint: leave it out",
        "error[per]: space.yaml:7:24: `per` names `b` twice",
    ]


def test_needed_keys_are_named() -> None:
    assert problems("seed: 0\n") == [
        "error[missing-key]: space.yaml:1:1: the file needs `name`\n  hint: name: digits",
        "error[missing-key]: space.yaml:1:1: the file needs `task`\n"
        "  hint: task: my_task.py:MyTask, the class that gives data and models",
        "error[missing-key]: space.yaml:1:1: the file needs `parameters`\n"
        "  hint: parameters: {lr: {distribution: log_uniform, min: 1e-5, max: 1.0}}",
    ]
    assert problems(HEAD + "parameters: {}\n") == [
        "error[empty]: space.yaml:3:1: `parameters` is empty\n  hint: there is nothing to search; name at least one"
    ]


@pytest.mark.parametrize("task", ["Digits", "digits.py", "a.py:", ":A", "a.py:B:C", "a.py:1B", "a..b:C"])
def test_task_has_one_of_two_forms(task: str) -> None:
    assert problems(SMALL.replace("digits_task.py:Digits", f"'{task}'")) == [
        f'error[task-form]: space.yaml:2:7: `task` is file.py:Class or package.module:Class (got "{task}")\n'
        "  hint: such as digits_task.py:Digits, the file lying beside this one"
    ]


@pytest.mark.parametrize("name", ["a/b", "", "-a", "../x", "a b", "x" * 101])
def test_study_name_is_fit_for_a_directory(name: str) -> None:
    (problem,) = problems(SMALL.replace("name: digits", f"name: '{name}'"))
    assert problem.startswith("error[name]: space.yaml:1:7: `name` is a letter or digit, then")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "",
            "error[empty]: space.yaml:1:1: the file is empty\n  hint: the README has one to start from",
        ),
        (
            "~",
            "error[empty]: space.yaml:1:1: the file is empty\n  hint: the README has one to start from",
        ),
        ("- 1\n", "error[type]: space.yaml:1:1: the file is not a mapping\n  hint: it starts with name: …"),
        ("hello", "error[type]: space.yaml:1:1: the file is not a mapping\n  hint: it starts with name: …"),
    ],
)
def test_a_file_that_is_no_mapping_is_told_once(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_missing_file_is_told_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SMALL)
    with pytest.raises(SpecError) as caught:
        read_spec(tmp_path / "spcae.yaml")
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        "error[no-file]: spcae.yaml: no such file\n  hint: did you mean space.yaml?\n"
        "1 problem in spcae.yaml; nothing was started."
    )
    with pytest.raises(SpecError, match="is a directory, not a file"):
        read_spec(tmp_path)


# --- nothing raises anything else -------------------------------------------------------------------------------------

wrong = st.sampled_from(
    [
        None, True, -1, 0, 1.5, 1e300, float("inf"), float("nan"), "", "x", "no", [], [1], [[1]], {}, {"x": 1}, [None],
        {"enabled": 3}, {"min": 1, "max": 2}, {"values": [1, 2]}, {"choices": {"x": {"lr": {"value": 1}}}}, "<range>",
        {"value": 1, "when": {"lr": 3}}, {"value": 1, "when": {"depth": {}}}, 2**60, "\x00\x1b", {"<range>": {}},
    ]
)  # fmt: skip


def every_way(value: object, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(inner for step, below in items for inner in every_way(below, (*way, step)))]


@given(st.data())
def test_any_change_to_the_example_is_a_study_or_problems_with_places(data: st.DataObject) -> None:
    value = read_document(EXAMPLE, name="space.yaml").value
    for _ in range(data.draw(st.integers(1, 4))):
        way = data.draw(st.sampled_from(every_way(value)[1:]))
        inner = value
        for step in way[:-1]:
            inner = inner[step]
        new = deepcopy(data.draw(wrong))
        if isinstance(inner, dict) and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(["x", "<range>", "when", "choices", "enabled", "a b", "lr"]))] = new
        else:
            inner[way[-1]] = new
    try:
        spec = parse_spec(write_yaml(value))
    except SpecError as error:
        for problem in error.problems:
            assert problem.where.startswith("space.yaml:")
            assert "{" + "key}" not in problem.what
            assert problem.code != "invalid"  # pydantic's own words, which no rule of ours has put better
            assert str(problem).replace("\n  hint: ", "").isprintable()
    else:
        assert Spec.from_dump(json.loads(json.dumps(spec.dump()))) == spec
        spec.space.config([0.5] * spec.space.n_dims)


# --- round trips ------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-1e9, 1e9) | st.text(max_size=4)


@st.composite
def forms(draw: st.DrawFn, depth: int = 0, parents: tuple[tuple[str, list[Any]], ...] = ()) -> dict[str, Any]:
    """One parameter as a mapping of YAML."""
    form: dict[str, Any]
    kind = draw(
        st.sampled_from(["value", "values", "integer", "real", "log", "step", "choices"][: 7 if depth < 2 else 6])
    )
    if kind == "value":
        form = {"value": draw(scalars | st.lists(scalars, max_size=3))}
    elif kind == "values":
        form = {"values": draw(st.lists(st.integers(0, 9) | st.text(max_size=2), min_size=1, max_size=4, unique=True))}
    elif kind == "integer":
        low = draw(st.integers(-50, 50))
        form = {"min": low, "max": low + draw(st.integers(1, 50))}
    elif kind == "real":
        low_r = draw(st.floats(-1e6, 1e6))
        form = {"min": low_r, "max": low_r + draw(st.floats(1.0, 1e6))}
    elif kind == "log":
        low_l = draw(st.floats(1e-300, 1e6))
        form = {"min": low_l, "max": low_l * draw(st.floats(1.5, 1e6)), "distribution": "log_uniform"}
    elif kind == "step":
        form = {"min": 0.0, "max": draw(st.floats(1, 99)), "step": draw(st.floats(0.01, 1))}
    else:
        names = draw(st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), min_size=1, max_size=3, unique=True))
        form = {"choices": {}}
        for name in names:
            inner = draw(st.lists(forms(depth=depth + 1), max_size=2))
            form["choices"][name] = {f"p{depth}_{i}": child for i, child in enumerate(inner)}
    if parents and draw(st.booleans()):
        parent, values = draw(st.sampled_from(parents))
        accepted = draw(st.sampled_from(values))
        form["when"] = {parent: accepted if not isinstance(accepted, list) and draw(st.booleans()) else [accepted]}
    return form


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A valid space.yaml as plain values; names are made distinct by where they stand."""
    parents: tuple[tuple[str, list[Any]], ...] = ()
    parameters: dict[str, Any] = {}
    for i in range(draw(st.integers(1, 5))):
        form = draw(forms(parents=parents))
        name = f"top{i}"
        if "choices" in form:
            form["choices"] = {c: renamed(inner, name, c) for c, inner in form["choices"].items()}
        if "when" not in form and (values := form.get("values") or list(form.get("choices", ()))):
            parents = (*parents, (name, values))
        parameters[name] = form
    file: dict[str, Any] = {"name": "study", "task": "a.b:C", "parameters": parameters}
    optional: dict[str, Any] = {
        "seed": draw(st.integers(0, 2**63 - 1)),
        "search": {"method": draw(st.sampled_from(["sobol", "random", "tpe"])), "trials": draw(st.integers(1, 999))},
        "metric": {"name": "val_accuracy", "goal": "maximize"},
        "lr_range": {"per": [name for name, _ in parents], "min": draw(st.floats(1e-9, 1e-3))},
        "early_stopping": {"enabled": draw(st.booleans()), "reduction_factor": draw(st.integers(2, 9))},
        "budget": {"hours": draw(st.none() | st.floats(0.1, 99)), "disk": "3.5 GB"},
        "mlflow": {"experiment": draw(st.text("aé: #'\"-", min_size=1, max_size=5).filter(str.strip))},
        "shuffle": draw(st.booleans()),
    }
    file.update({key: optional[key] for key in draw(st.lists(st.sampled_from(sorted(optional)), unique=True))})
    return file


def renamed(inner: dict[str, Any], prefix: str, choice: str = "") -> dict[str, Any]:
    """Nested parameters with names that tell where they stand, so that no two of different parents are alike."""
    result = {}
    for name, form in inner.items():
        new = f"{prefix}_{name}"
        if "choices" in form:
            form = {
                **form,
                "choices": {c: renamed(deeper, f"{new}_{choice}", c) for c, deeper in form["choices"].items()},
            }
        result[new] = form
    return result


@given(files())
def test_spec_to_yaml_and_to_dump_and_back_is_the_identity(file: dict[str, Any]) -> None:
    spec = parse_spec(write_yaml(file))
    dumped = spec.dump()
    for again in (parse_spec(write_yaml(dumped)), Spec.from_dump(json.loads(json.dumps(dumped)))):
        assert again == spec
        assert again.space == spec.space
        assert again.space.names == spec.space.names
        assert repr(again.dump()) == repr(dumped)
        assert Spec.changes(spec, again) == ()


@given(files(), st.integers(0, 2**32))
def test_every_config_of_a_file_is_json_and_lies_in_the_space(file: dict[str, Any], seed: int) -> None:
    chance = random.Random(seed)
    spec = parse_spec(write_yaml(file))
    config = spec.space.config([chance.random() for _ in range(spec.space.n_dims)])
    assert json.loads(json.dumps(config)) == config
    for parameter in spec.space.parameters:
        active = all(condition.holds(config) for condition in parameter.conditions)
        assert not active or parameter.name in config
        if active and not parameter.values:
            assert parameter.low <= config[parameter.name] <= parameter.high  # type: ignore[operator]


def test_changes_tell_key_old_and_new() -> None:
    old = parse_spec(EXAMPLE)
    new = parse_spec(EXAMPLE, overrides=["search.trials=128", "parameters.lr.max=0.5", "parameters.extra={value: 1}"])
    assert Spec.changes(old, new) == (
        ("search.trials", 64, 128),
        ("parameters.lr.max", 1.0, 0.5),
        ("parameters.extra", None, {"value": 1}),
    )


def test_another_order_of_parameters_is_a_change() -> None:
    old = parameters("a: {min: 1, max: 2}", "b: {min: 1, max: 2}")
    new = parameters("b: {min: 1, max: 2}", "a: {min: 1, max: 2}")
    assert Spec.changes(old, new) == (("parameters", ["a", "b"], ["b", "a"]),)


def test_whole_numbers_and_reals_are_different_bounds() -> None:
    assert Spec.changes(parameters("a: {min: 1, max: 2}"), parameters("a: {min: 1, max: 2.0}")) == (
        ("parameters.a.max", 2, 2.0),
    )


# --- for editors ------------------------------------------------------------------------------------------------------


@cache
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_accepts_the_contracts_example() -> None:
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for text in (CONTRACT, EXAMPLE, SMALL):
        assert list(validator().iter_errors(read_document(text, name="space.yaml").value)) == []


@given(files())
def test_schema_accepts_what_the_parser_accepts(file: dict[str, Any]) -> None:
    parse_spec(write_yaml(file))
    assert list(validator().iter_errors(file)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("seed: 0", "sed: 0"),
        ("trials: 64", "trails: 64"),
        ("trials: 64", "trials: many"),
        ("method: sobol", "method: grid"),
        ("name: digits\n", ""),
        ("when: {", "wen: {"),
        ("{values: [64, 128, 256]}", "{values: []}"),
        ("{values: [64, 128, 256]}", "{values: [64], min: 3}"),
        ("{min: 1, max: 3}", "{min: 1}"),
        ("{min: 1, max: 3}", "3"),
        ("reduction_factor: 3", "reduction_factor: 1"),
    ],
)
def test_schema_refuses_what_an_editor_should_underline(before: str, after: str) -> None:
    assert before in EXAMPLE
    value = read_document(EXAMPLE.replace(before, after), name="space.yaml").value
    assert list(validator().iter_errors(value)) != []


def test_every_key_of_the_schema_is_described_and_has_its_default() -> None:
    schema = json_schema()
    for name, section in schema["$defs"].items():
        assert section["description"], name
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"
            assert "default" in field or key in section.get("required", []) or key == "when", f"{name}.{key}"
    assert schema["required"] == ["name", "task", "parameters"]
    assert schema["properties"]["early_stopping"]["default"]["max_epochs"] == 27


def test_reading_a_file_needs_neither_numpy_nor_any_of_the_large_libraries() -> None:
    code = (
        "import sys, hpsearch.spec; hpsearch.spec.json_schema(); "
        "print([m for m in ('numpy', 'scipy', 'torch', 'ray', 'mlflow', 'optuna') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("{name: val_accuracy}", "maximize"),
        ("{name: val_balanced_accuracy}", "maximize"),
        ("{name: val_mae}", "minimize"),
        ("{name: val_accuracy, goal: minimize}", "minimize"),
        ("{}", "minimize"),
    ],
)
def test_goal_follows_the_metrics_name_unless_it_is_written(metric: str, goal: str) -> None:
    assert parse_spec(SMALL + f"metric: {metric}\n").metric.goal == goal


def test_goal_of_a_metric_whose_name_does_not_tell_must_be_written() -> None:
    assert problems(SMALL + "metric: {name: val_score}\n") == [
        "error[goal]: space.yaml:5:1: `metric.goal` is needed, since `val_score` does not tell what is better\n"
        "  hint: write metric: {name: val_score, goal: maximize}, or minimize"
    ]
