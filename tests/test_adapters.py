"""What a spec makes of the executor: every setting of it reaches the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpsearch.cli.adapters import make_executor
from hpsearch.spec import parse_spec
from hpsearch.training import executor
from tests.tasks import blobs

SPACE = """
name: given
task: task.py:Blobs
search: {trials: 40}
metrics: [balanced_accuracy]
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
  width: {values: [16, 32]}
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks for an executor with some overrides, and gives what it was made with."""
    (tmp_path / "task.py").write_text(blobs("def model(self, config):\n    return torch.nn.Linear(4, 3)"))
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(executor, "TorchExecutor", lambda task, **settings: made.append({"task": task, **settings}))

    def ask(*overrides: str) -> dict[str, Any]:
        make_executor(parse_spec(SPACE, overrides=overrides), tmp_path)
        return made.pop()

    return ask


def test_executor_knows_how_many_trials_of_each_group_the_study_will_have(given: Any) -> None:
    settings = given()
    assert settings["lanes"] is None
    sizes = settings["group_sizes"]
    assert set(sizes) == {'{"width": 16}', '{"width": 32}'}
    assert sum(sizes.values()) == pytest.approx(40)
    assert min(sizes.values()) > 8


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_that_are_said_are_not_measured(given: Any, lanes: int) -> None:
    settings = given(f"resources.lanes={lanes}")
    assert (settings["lanes"], settings["group_sizes"]) == (lanes, None)


def test_settings_of_the_spec_reach_the_executor(given: Any) -> None:
    settings = given(
        "seed=7", "shuffle=false", "resources.threads=2", "precision=bf16", "metric.name=val_accuracy",
        "metric.goal=maximize", "ensemble.enabled=false",
    )  # fmt: skip
    expected = {
        "study_seed": 7, "shuffle": False, "threads": 2, "metric": "val_accuracy", "goal": "maximize",
        "cut_ensemble": False, "device": "cpu",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert settings["example"]["width"] in (16, 32)
    assert settings["task"].precision == "bf16"
    assert "balanced_accuracy" in settings["task"].metric_names


def test_precision_and_device_are_float32_on_a_cpu_unless_said(given: Any) -> None:
    settings = given()
    assert (settings["task"].precision, settings["device"], settings["cut_ensemble"]) == ("float32", "cpu", True)
