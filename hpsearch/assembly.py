"""A study put together: run directory, journal, stages and settings from one spec.

What belongs to this launch alone (which fleet, which tracking URI) stays with the command line.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from hpsearch.blobs import BlobStore
from hpsearch.budget import Budget
from hpsearch.errors import Problem, SpecError
from hpsearch.events import Opened
from hpsearch.job import Config
from hpsearch.journal import Journal
from hpsearch.rungs import make_rule
from hpsearch.sampler import Sampler, ramp_config, trial_seed
from hpsearch.spec import Spec
from hpsearch.stages import Stage
from hpsearch.stages.ensemble import EnsembleSettings, EnsembleStage
from hpsearch.stages.lr_range import LrRange, LrRangeSettings
from hpsearch.stages.search import Search, SearchSettings
from hpsearch.state import StudyState
from hpsearch.study import Study

STAGES = ("lr_range", "search", "ensemble")
RAMP_SEEDS_FROM = 1 << 40  # trials never have such a number, so no ramp shares a trial's seed

# What may differ between a study and its resume: how much, where and with what, never what is asked.
CHANGEABLE = ("search.trials", "budget.", "resources.", "mlflow.", "ensemble.pool", "ensemble.size")

MakeSampler = Callable[[Spec], Sampler]


def open_study(
    run_dir: Path,
    spec: Spec,
    *,
    make_sampler: MakeSampler,
    spec_text: str = "",
    environment: Mapping[str, object] | None = None,
    stages: tuple[str, ...] = STAGES,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    background: bool = True,
    wait_s: float = 30.0,
    inherit_leases: bool = False,
) -> Study:
    """The study of a run directory, begun or gone on with.

    Args:
        inherit_leases: the study's process was restarted under a driver and workers that live.
        stages: which of the stages to run; those that the spec switches off are left out anyway.

    Raises:
        UsageError: the directory is in use or cannot be written.
        SpecError: the directory's study asks for something else.
        JournalError: its journal is damaged.
    """
    journal = Journal.open(run_dir, clock=clock, steady=monotonic, wait_s=wait_s)
    try:
        before = [entry.event for entry in journal.entries if isinstance(entry.event, Opened)]
        if before:  # asked first: the stages of another study could make nothing of these events
            check_resume(Spec.from_dump(dict(before[-1].spec)), spec, run_dir)
        state = StudyState()
        blobs = BlobStore(run_dir)
        told = make_stages(spec, state, make_sampler(spec), blobs, stages)
        for entry in journal.entries:
            state.apply(entry.event, entry.time)
            for stage in told:
                stage.apply(entry.event)
        opened = Opened(
            study=spec.name,
            uid=state.uid or uuid.uuid4().hex,
            spec=spec.dump(),
            spec_text=spec_text,
            environment=environment or {},
        )
        state.apply(opened, journal.append(opened).time)
        journal.commit()
        return Study(
            journal=journal,
            state=state,
            stages=told,
            blobs=blobs,
            budget=Budget(
                hours=spec.budget.hours,
                gpu_hours=spec.budget.gpu_hours,
                epochs=spec.budget.epochs,
                disk_bytes=spec.budget.disk_bytes,
                gpus_per_worker=spec.resources.gpus,
            ),
            clock=monotonic,
            background=background,
            inherit_leases=inherit_leases,
        )
    except BaseException:
        journal.close()
        raise


def make_stages(
    spec: Spec, state: StudyState, sampler: Sampler, blobs: BlobStore, names: tuple[str, ...] = STAGES
) -> list[Stage]:
    """The stages that the spec asks for, in order."""
    stages: list[Stage] = []
    if "lr_range" in names and (spec.measures_lr or "search" not in names):
        stages.append(_lr_range(spec, state))
    if "search" in names:
        stages.append(_search(spec, state, sampler))
    if "ensemble" in names:
        settings = EnsembleSettings(
            pool=spec.ensemble.pool,
            size=spec.ensemble.size,
            n_trials=spec.search.trials,
            study_seed=spec.seed,
            metric=spec.metric.name.removeprefix("val_"),
            goal=spec.metric.goal,
            combine=spec.ensemble.enabled,
        )
        stages.append(EnsembleStage(settings, state, arrays=blobs.arrays))
    return stages


def check_resume(old: Spec, new: Spec, run_dir: Path) -> None:
    """Refuse to go on with a study under settings that would change what it asked.

    Raises:
        SpecError: with one problem per setting.
    """
    problems = []
    for key, before, after in Spec.changes(old, new):
        fewer_trials = key == "search.trials" and _less(after, before)
        if fewer_trials or not key.startswith(CHANGEABLE):
            problems.append(
                Problem(
                    code="other-study",
                    where=str(run_dir),
                    what=f"its study has `{key}` = {before!r}, the space now has {after!r}",
                    hint="put it back, or choose another --run-dir for a new study"
                    if not fewer_trials
                    else "a study can grow, not shrink; choose another --run-dir for a new one",
                )
            )
    if problems:
        raise SpecError(problems)


def _less(after: object, before: object) -> bool:
    return isinstance(after, int) and isinstance(before, int) and after < before


def _lr_range(spec: Spec, state: StudyState) -> LrRange:
    low, high = _lr_bounds(spec)
    settings = LrRangeSettings(
        branches=spec.space.branches(spec.per),
        lr_min=spec.lr_range.min,
        lr_max=spec.lr_range.max,
        steps=spec.lr_range.steps,
        seeds=spec.lr_range.seeds,
        user_low=low,
        user_high=high,
    )

    def config_of(branch: Config, index: int) -> Config:
        return ramp_config(spec.space, spec.seed, branch, index)

    def seed_of(index: int) -> int:
        return trial_seed(spec.seed, RAMP_SEEDS_FROM + index)

    return LrRange(settings, state, config_of=config_of, seed_of=seed_of)


def _lr_bounds(spec: Spec) -> tuple[float, float]:
    """The user's bounds of lr; the ramp's own where lr is not searched over an interval."""
    for parameter in spec.space.parameters:
        if parameter.name == "lr" and parameter.low is not None and parameter.high is not None:
            return float(parameter.low), float(parameter.high)
    return spec.lr_range.min, spec.lr_range.max


def _search(spec: Spec, state: StudyState, sampler: Sampler) -> Search:
    stopping = spec.early_stopping
    rule = make_rule(
        stopping.rule,
        min_epochs=stopping.min_epochs,
        max_epochs=stopping.max_epochs,
        reduction_factor=stopping.reduction_factor,
        n_trials=spec.search.trials,
    )
    settings = SearchSettings(
        n_trials=spec.search.trials,
        max_epochs=stopping.max_epochs,
        study_seed=spec.seed,
        n_complete=spec.ensemble.size if spec.ensemble.enabled else 1,
        per=spec.per,
        measured=spec.space.measured if spec.measures_lr else (),
    )
    return Search(settings, state, sampler=sampler, rule=rule)
