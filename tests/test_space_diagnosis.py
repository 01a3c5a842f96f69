"""What all trials say about their space, and that chance is not taken for a rule."""

from __future__ import annotations

import numpy as np

from hpsearch.events import Compared, Finished, RangeMeasured
from hpsearch.job import Config, EpochMetrics
from hpsearch.space_diagnosis import edges, infeasible, nothing_overfits
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

SPEC = parse_spec(
    """
name: a
task: t.py:T
parameters:
  lr: {distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}
  dropout: {min: 0.0, max: 0.5}
  depth: {min: 1, max: 5}
  optimizer: {values: [adamw, sgd]}
"""
)


def trial(number: int, config: Config, *, diverged: bool = False, best: float = 0.5) -> TrialRecord:
    return TrialRecord(
        number=number,
        config=config,
        seed=number,
        max_epochs=8,
        drawn_at=0.0,
        diverged=diverged,
        best_objective=None if diverged else best,
        best_checkpoint=None if diverged else "c",
        curve=[EpochMetrics(epoch=1, metrics={"val_loss": best}, seconds=1.0)],
    )


def random_config(rng: np.random.Generator) -> Config:
    return {
        "lr": float(10 ** rng.uniform(-5, 0)),
        "dropout": float(rng.uniform(0, 0.5)),
        "depth": int(rng.integers(1, 6)),
        "optimizer": str(rng.choice(["adamw", "sgd"])),
    }


def test_best_at_the_end_of_its_range_with_the_others_leaning_there_is_told() -> None:
    leaders = [
        trial(n, {"lr": 0.01, "dropout": 0.25, "depth": depth, "optimizer": "adamw"})
        for n, depth in enumerate([5, 5, 4, 5, 1])
    ]
    (remark,) = edges(leaders, SPEC.space)
    assert remark.words == "the best depth (5) lies at the top of its range (1 to 5); 4 of the best 5 lie there"
    assert remark.hint == "a higher max of depth may do better"


def test_one_trial_at_an_end_among_others_elsewhere_is_chance() -> None:
    leaders = [
        trial(n, {"lr": 0.01, "dropout": dropout, "depth": 3, "optimizer": "adamw"})
        for n, dropout in enumerate([0.0, 0.2, 0.4, 0.3, 0.25])
    ]
    assert edges(leaders, SPEC.space) == []


def test_measured_range_is_the_range_that_counts() -> None:
    measured = [
        RangeMeasured(
            branch={"optimizer": "adamw"},
            lr=0.01,
            low=0.001,
            high=0.03,
            spread_decades=0.1,
            at_edge=False,
            confirmed=False,
        )
    ]
    leaders = [
        trial(n, {"lr": lr, "dropout": 0.25, "depth": 3, "optimizer": "adamw"})
        for n, lr in enumerate([0.03, 0.028, 0.02])
    ]
    assert edges(leaders, SPEC.space) == []
    (remark,) = edges(leaders, SPEC.space, measured, ["optimizer"])
    assert remark.words == "the best lr (0.03) lies at the top of its range (0.001 to 0.03); 3 of the best 3 lie there"


def test_false_alarms_of_edges_are_rare_where_nothing_matters() -> None:
    """Three numeric parameters whose values mean nothing; the best five of each study are five random trials."""
    rng = np.random.default_rng(1)
    alarms = sum(bool(edges([trial(n, random_config(rng)) for n in range(5)], SPEC.space)) for _ in range(500))
    # Measured: 38. Real ranges alarm in 0.7 % each; a range of five whole numbers, whose ends are 40 % of it, in 7 %.
    assert alarms < 60


def test_bound_that_parts_the_diverged_trials_is_told_with_its_counts() -> None:
    rng = np.random.default_rng(0)
    trials = []
    for n in range(60):
        config = random_config(rng)
        trials.append(trial(n, config, diverged=float(str(config["lr"])) > 0.1))
    n_bad = sum(each.diverged for each in trials)
    first, second = infeasible(trials, SPEC.space)
    assert first.words == f"{n_bad} of 60 trials diverged ({n_bad / 60:.0%})"
    assert second.words.startswith(f"{n_bad} of {n_bad} trials with lr > 0.")
    assert second.words.endswith(f"diverged, 0 of the {60 - n_bad} others")


def test_value_that_parts_the_diverged_trials_is_told() -> None:
    rng = np.random.default_rng(0)
    configs = [random_config(rng) for _ in range(40)]
    trials = [trial(n, c, diverged=c["optimizer"] == "sgd" and n % 3 > 0) for n, c in enumerate(configs)]
    assert any("trials with optimizer=sgd diverged" in remark.words for remark in infeasible(trials, SPEC.space))


def test_divergence_by_chance_blames_no_parameter() -> None:
    """4 parameters, each suspected with a chance of 1 % at most: over 300 studies about 12 false alarms, not 30."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(300):
        trials = [trial(n, random_config(rng), diverged=bool(rng.random() < 0.2)) for n in range(50)]
        alarms += any(remark.name == "infeasible" for remark in infeasible(trials, SPEC.space))
    assert alarms < 30


def test_space_in_which_nothing_overfits_is_told_and_one_in_which_something_does_is_not() -> None:
    state = StudyState(ended_stages={"search"})
    epochs = np.arange(1, 9)
    for n, rise in enumerate((0.0, 0.0)):
        record = trial(n, {"depth": 1})
        record.curve = [
            EpochMetrics(epoch=int(e), metrics={"train_loss": 1 / e, "val_loss": 1.05 / e + rise * e}, seconds=1.0)
            for e in epochs
        ]
        state.trials[n] = record
    remark = nothing_overfits(state)
    assert remark is not None
    assert remark.words == "none of 2 trials trained to the end overfits (the best: train_loss 0.125, val_loss 0.131)"
    state.trials[1].curve = [
        EpochMetrics(epoch=int(e), metrics={"train_loss": 1 / e, "val_loss": 0.5 + abs(e - 3) / 10}, seconds=1.0)
        for e in epochs
    ]
    assert nothing_overfits(state) is None


def leaders_at(**values: list[float | int]) -> list[TrialRecord]:
    names = list(values)
    rows = zip(*values.values(), strict=True)
    rest: Config = {"lr": 0.01, "dropout": 0.25, "depth": 3, "optimizer": "adamw"}
    return [trial(n, rest | dict(zip(names, row, strict=True))) for n, row in enumerate(rows)]


def test_no_edge_is_told_below_which_nothing_lies() -> None:
    assert edges(leaders_at(dropout=[0.001, 0.0, 0.02, 0.1, 0.01]), SPEC.space) == []
    assert edges(leaders_at(depth=[1, 1, 1, 2, 1]), SPEC.space) == []
    (remark,) = edges(leaders_at(dropout=[0.499, 0.5, 0.48, 0.4, 0.45]), SPEC.space)
    assert remark.hint == "a higher max of dropout may do better"
    (remark,) = edges(leaders_at(lr=[1e-5, 1.1e-5, 2e-5, 1e-5, 3e-5]), SPEC.space)  # a log range has no such end
    assert remark.hint == "a lower min of lr may do better"


def test_no_edge_is_told_of_a_range_of_a_few_values() -> None:
    few = parse_spec(
        "name: a\ntask: t.py:T\nparameters: {depth: {min: 2, max: 3}, width: {min: 0.5, max: 2.0, step: 0.5}}"
    )
    leaders = [trial(n, {"depth": 3, "width": 2.0}) for n in range(5)]
    assert edges(leaders, few.space) == []


def long_trials(train: float, val: float) -> StudyState:
    state = StudyState(ended_stages={"search"})
    for n in range(2):
        record = trial(n, {"depth": 1})
        record.curve = [
            EpochMetrics(epoch=e, metrics={"train_loss": train * 8 / e, "val_loss": val * 8 / e}, seconds=1.0)
            for e in range(1, 9)
        ]
        state.trials[n] = record
    return state


def baseline(name: str, loss: float) -> Finished:
    return Finished(key=f"baseline/{name}", worker="w", outcome="done", values={"metrics": {"val": {"loss": loss}}})


def test_capacity_is_advised_only_where_train_and_val_loss_are_near() -> None:
    assert nothing_overfits(long_trials(0.3, 0.37)) is not None
    assert nothing_overfits(long_trials(0.3, 0.38)) is None
    assert nothing_overfits(long_trials(0.000793, 0.0362)) is None


def test_capacity_is_not_advised_where_a_linear_model_is_as_good() -> None:
    for linear, told in ((0.33, False), (0.31, False), (0.5, True)):
        state = long_trials(0.3, 0.32)
        state.apply(baseline("constant", 1.0), 0.0)
        state.apply(baseline("linear", linear), 0.0)
        assert (nothing_overfits(state) is not None) == told, linear
    over = {"metric": "loss", "value": -0.01, "low": -0.1, "high": 0.1, "better": None, "split": "test", "n_rows": 99}
    state.apply(Compared(n_trials=2, gain={}, over_linear=over), 0.0)
    assert nothing_overfits(state) is None  # rows that chose nothing have the last word
