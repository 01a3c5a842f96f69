"""The forecast of a study's checkpoints: how many, how large, and whether they fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from hpsearch.forecast import MOST_MODELS, DiskForecast, forecast, n_checkpoints, sized_configs
from hpsearch.spec import Spec, parse_spec

SPACE = """
name: forecast
task: task.py:Sized
search: {trials: 81}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
  width: {values: [16, 4, 64]}
  depth: {distribution: uniform, min: 1, max: 3}
  block: {values: [thin, fat, plain]}
early_stopping: {type: asha, min_epochs: 1, max_epochs: 27, reduction_factor: 3}
ensemble: {pool: 6, size: 3}
"""
TASK = """
import torch
from torch import nn
from hpsearch import Splits, Task

class Sized(Task):
    def data(self):
        raise AssertionError("a forecast loads no data")

    def model(self, config):
        print("hello")
        width = config["width"] * {"thin": 1, "fat": 10, "plain": 2}[config["block"]]
        layers = [nn.Linear(8, width)] + [nn.Linear(width, width) for _ in range(config["depth"])]
        return nn.Sequential(*layers)
"""


def spec_of(*overrides: str) -> Spec:
    return parse_spec(SPACE, overrides=overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def weights(width: int, depth: int) -> int:
    return 4 * (9 * width + depth * (width + 1) * width)


def test_sizes_are_those_of_the_smallest_and_the_largest_network_of_the_space(folder: Path) -> None:
    found = forecast(spec_of(), folder, folder / "runs" / "new")
    assert found.reason == ""
    assert found.smallest is not None
    assert found.largest is not None
    smallest, largest = 3 * weights(4, 1), 3 * weights(640, 3)  # with Adam's two averages
    assert smallest < found.smallest < smallest + 6000
    assert largest < found.largest < largest + 10_000
    assert found.n_bytes == found.checkpoints * found.largest
    assert abs(found.free_bytes - shutil.disk_usage(folder).free) < 1 << 30
    assert not (folder / "runs").exists()


def test_few_models_are_built_however_many_choices_there_are() -> None:
    names = ", ".join(f"n{i}" for i in range(200))
    configs = [*sized_configs(parse_spec(SPACE.replace("thin, fat, plain", names)))]
    assert len(configs) == MOST_MODELS
    assert all(config not in configs[:i] for i, config in enumerate(configs))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (TASK + "raise ValueError('no data here')", "ValueError: no data here"),
        (TASK.replace('print("hello")', "1 / 0"), "ZeroDivisionError: division by zero"),
        ("", "`task.py` has no class `Sized`"),
        (None, "task.py"),
    ],
)
def test_task_that_cannot_be_asked_leaves_the_size_unknown_with_the_reason(
    folder: Path, source: str | None, told: str
) -> None:
    if source is None:
        (folder / "task.py").unlink()
    else:
        (folder / "task.py").write_text(source)
    found = forecast(spec_of(), folder, folder)
    assert (found.smallest, found.largest, found.n_bytes, found.fits) == (None, None, None, None)
    assert told in found.reason
    assert found.checkpoints > 0
    (line,) = found.lines()
    assert line.startswith(f"disk: at most {found.checkpoints} checkpoints; how large is not known: ")


def test_count_follows_the_rule_of_early_stopping() -> None:
    counts = {kind: n_checkpoints(spec_of(f"early_stopping.type={kind}")) for kind in ("asha", "sha", "median", "none")}
    assert counts == {"asha": 57, "sha": 54, "median": 98, "none": 11}
    assert n_checkpoints(spec_of("early_stopping.type=none", "ensemble.enabled=false")) == 3
    own = "baseline={lr: 0.1, block: thin, width: 4, depth: 2}"
    alone = ("early_stopping.type=none", "ensemble.enabled=false")
    assert n_checkpoints(spec_of(*alone, own)) == n_checkpoints(spec_of(*alone)) + 1


FOUND = DiskForecast(
    checkpoints=40, smallest=1 << 20, largest=1 << 21, reason="", budget_bytes=None, free_bytes=1 << 30
)


@pytest.mark.parametrize(
    ("change", "fits", "lines"),
    [
        ({}, True, ["disk: at most 40 checkpoints of 1 MiB to 2 MiB, 80 MiB together; free: 1 GiB"]),
        ({"smallest": 1 << 21}, True, ["disk: at most 40 checkpoints of 2 MiB, 80 MiB together; free: 1 GiB"]),
        (
            {"budget_bytes": 1 << 30},
            True,
            ["disk: at most 40 checkpoints of 1 MiB to 2 MiB, 80 MiB together; free: 1 GiB"],
        ),
        (
            {"budget_bytes": 10 << 20},
            False,
            [
                "disk: at most 40 checkpoints of 1 MiB to 2 MiB, 80 MiB together; free: 1 GiB",
                "note: budget.disk is 10 MiB: where that is too little, the worst ranked go, and are trained again "
                "from their start if they are promoted",
            ],
        ),
        (
            {"budget_bytes": 1 << 20},
            False,
            [
                "disk: at most 40 checkpoints of 1 MiB to 2 MiB, 80 MiB together; free: 1 GiB",
                "warning[disk]: budget.disk, 1 MiB, does not hold one of the largest\n"
                "  hint: raise it; a trial whose checkpoint cannot be kept is not used",
            ],
        ),
        (
            {"free_bytes": 5 << 20},
            False,
            [
                "disk: at most 40 checkpoints of 1 MiB to 2 MiB, 80 MiB together; free: 5 MiB",
                "warning[disk]: up to 80 MiB may be needed, and 5 MiB are free\n"
                "  hint: make room, choose another --run-dir, or set budget.disk, which is never exceeded",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, int], fits: bool, lines: list[str]) -> None:
    found = dataclasses.replace(FOUND, **change)  # type: ignore[arg-type]
    assert found.fits is fits
    assert found.as_json()["fits"] is fits
    assert found.lines() == lines
