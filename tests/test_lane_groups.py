"""Which jobs may share a program, as far as a config tells."""

from __future__ import annotations

from dataclasses import replace

from hpsearch.job import Config, EvaluateJob, ExportJob, Member, RampJob, TrainJob
from hpsearch.lane_groups import may_share

SMALL: Config = {"lr": 0.1, "dropout": 0.2, "width": 16}


def member(trial: int, config: Config) -> Member:
    return Member(trial=trial, config=config, checkpoint=f"checkpoints/{trial}")


def evaluation(trial: int, config: Config = SMALL) -> EvaluateJob:
    return EvaluateJob(key=f"e/{trial}", members=(member(trial, config),), split="ensemble", keep_predictions=True)


def test_single_models_of_a_group_are_asked_together_about_the_same_split() -> None:
    first = evaluation(0)
    assert may_share(first, evaluation(1))
    assert may_share(first, evaluation(1, {**SMALL, "lr": 0.3, "dropout": 0.5}))
    assert may_share(first, replace(evaluation(1), keep_predictions=False))
    assert not may_share(first, evaluation(1, {**SMALL, "width": 32}))
    assert not may_share(first, replace(evaluation(1), split="test"))


def test_an_ensemble_shares_with_nobody() -> None:
    first = evaluation(0)
    ensemble = replace(first, members=(*first.members, member(1, SMALL)))
    assert not may_share(first, ensemble)
    assert not may_share(ensemble, first)
    assert not may_share(ensemble, ensemble)


def test_jobs_of_other_kinds_share_nothing() -> None:
    trial = TrainJob(key="t", trial=0, config=SMALL, seed=0, from_epoch=0, to_epoch=1)
    ramp = RampJob(key="r", config=SMALL, seed=0, lr_min=0.1, lr_max=1.0, steps=9)
    export = ExportJob(key="x", members=(member(0, SMALL),))
    jobs = [trial, ramp, export, evaluation(0)]
    assert [[may_share(job, other) for other in jobs] for job in jobs] == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, False, False],
        [False, False, False, True],
    ]
