"""The corners of a space: each end that may break a network, named once."""

from __future__ import annotations

from hpsearch.corners import corners
from hpsearch.spec import parse_spec

SPEC = parse_spec(
    """
name: a
task: t.py:T
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
  optimizer: {values: [adamw, sgd]}
  momentum: {min: 0.5, max: 0.9, when: {optimizer: sgd}}
  width: {values: [256, 64, 128]}
  depth: {min: 1, max: 3}
"""
)


def test_smallest_and_largest_have_every_number_at_its_end_and_the_rate_in_the_middle() -> None:
    found = corners(SPEC.space, SPEC.per)
    assert {**found["smallest"], "lr": None} == {"lr": None, "optimizer": "adamw", "width": 64, "depth": 1}
    assert (found["largest"]["width"], found["largest"]["depth"]) == (256, 3)
    assert abs(float(str(found["largest"]["lr"])) - 0.01) < 1e-9


def test_extreme_rates_and_each_branch_are_corners_with_all_else_in_the_middle() -> None:
    found = corners(SPEC.space, SPEC.per)
    assert list(found)[:4] == ["smallest", "largest", "lowest lr", "highest lr"]
    assert found["lowest lr"]["lr"] == 1e-4
    assert float(str(found["highest lr"]["lr"])) > 0.999
    assert {"optimizer=adamw", "optimizer=sgd"} & set(found)
    assert any(config["optimizer"] == "sgd" and "momentum" in config for config in found.values())


def test_equal_corners_are_asked_once() -> None:
    spec = parse_spec("name: a\ntask: t.py:T\nparameters: {width: {value: 8}}")
    assert corners(spec.space, spec.per) == {"smallest": {"width": 8}}
