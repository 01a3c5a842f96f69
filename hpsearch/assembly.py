"""A study put together: run directory, journal, stages and settings from one spec.

What belongs to this launch alone (which fleet, which tracking URI) stays with the command line.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.archive import Archive
from hpsearch.blobs import BlobStore
from hpsearch.budget import Budget
from hpsearch.corners import corners
from hpsearch.edits import Edit, early_edits, edits
from hpsearch.errors import Problem, SpecError
from hpsearch.events import DataSeen, Opened, TrialDrawn
from hpsearch.job import Config
from hpsearch.journal import Journal
from hpsearch.mirror import Mirror
from hpsearch.own_config import same_config, sampled_below
from hpsearch.restore import bring_over
from hpsearch.rungs import StoppingRule, make_rule
from hpsearch.sampler import Sampler, SobolSampler, ramp_config, trial_seed
from hpsearch.spec import Spec
from hpsearch.stages import Stage
from hpsearch.stages.baselines import Baselines
from hpsearch.stages.confirm import Confirm, ConfirmSettings
from hpsearch.stages.ensemble import EnsembleSettings, EnsembleStage
from hpsearch.stages.evaluate import Evaluate, EvaluateSettings
from hpsearch.stages.lr_range import LrRange, LrRangeSettings
from hpsearch.stages.preflight import Preflight, PreflightSettings
from hpsearch.stages.search import Search, SearchSettings
from hpsearch.state import StudyState
from hpsearch.study import Study

if TYPE_CHECKING:
    import numpy as np

STAGES = ("preflight", "lr_range", "search", "baselines", "evaluate", "confirm", "ensemble")
RAMP_SEEDS_FROM = 1 << 40  # trials never have such a number, so no ramp shares a trial's seed

MakeSampler = Callable[[Spec], Sampler]


def open_study(
    run_dir: Path,
    spec: Spec,
    *,
    make_sampler: MakeSampler,
    spec_text: str = "",
    environment: Mapping[str, object] | None = None,
    code: Mapping[str, str] | None = None,
    stages: tuple[str, ...] = STAGES,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    background: bool = True,
    wait_s: float = 30.0,
    inherit_leases: bool = False,
    uid: str = "",
) -> Study:
    """The study of a run directory, begun or gone on with.

    Args:
        uid: of a study that is begun; "": one is drawn.
        code: sha256 of the task's files by name.
        inherit_leases: the study's process was restarted under a driver and workers that live.
        stages: which of the stages to run; those that the spec switches off are left out anyway.

    Raises:
        UsageError: the directory is in use or cannot be written.
        SpecError: the directory's study asks for something else.
        JournalError: its journal is damaged.
        StorageError: `storage:` fails, or another launch went on with the study from there.
    """
    journal = Journal.open(run_dir, clock=clock, steady=monotonic, wait_s=wait_s)
    try:
        before = [entry.event for entry in journal.entries if isinstance(entry.event, Opened)]
        drawn = {e.event.trial: e.event for e in journal.entries if isinstance(e.event, TrialDrawn)}
        if before:  # asked first: the stages of another study could make nothing of these events
            configs = {number: event.config for number, event in drawn.items()}
            begun = any(isinstance(entry.event, DataSeen) for entry in journal.entries)
            check_resume(Spec.from_dump(dict(before[-1].spec)), spec, run_dir, configs, begun=begun)
        state = StudyState()
        uid = (before[0].uid if before else uid) or uuid.uuid4().hex
        archive = Archive(spec.storage, spec.name, uid) if spec.storage else None
        blobs = BlobStore(run_dir, archive)
        told = make_stages(spec, state, make_sampler(spec), blobs, stages, drawn=drawn.values())
        for entry in journal.entries:
            state.apply(entry.event, entry.time)
            for stage in told:
                stage.apply(entry.event)
        mirror = None
        if archive is not None:
            mirror = Mirror(
                archive, journal, run_dir, fence=journal.fence, entries=journal.entries, restarted=inherit_leases
            )
            mirror.begin()
        earlier = before[-1].spec.get("storage") if before else None
        if isinstance(earlier, str) and earlier != spec.storage:
            bring_over(state.digests, blobs, Archive(earlier, spec.name, uid), archive)
        opened = Opened(
            study=spec.name,
            uid=uid,
            spec=spec.dump(),
            spec_text=spec_text,
            environment=environment or {},
            code=code or {},
        )
        state.apply(opened, journal.append(opened).time)
        for stage in told:
            stage.apply(opened)
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
            mirror=mirror,
        )
    except BaseException:
        journal.close()
        raise


def make_stages(
    spec: Spec,
    state: StudyState,
    sampler: Sampler,
    blobs: BlobStore,
    names: tuple[str, ...] = STAGES,
    *,
    drawn: Collection[TrialDrawn] = (),
) -> list[Stage]:
    """The stages that the spec asks for, in order.

    Args:
        drawn: the trials that the study has, all of its journal's.
    """
    stages: list[Stage] = []
    if "preflight" in names and spec.preflight.enabled:
        stages.append(_preflight(spec, state))
    if "lr_range" in names and (spec.measures_lr or "search" not in names):
        stages.append(_lr_range(spec, state))
    if "search" in names:
        stages.append(_search(spec, state, sampler, drawn))
    if "baselines" in names:
        stages.append(Baselines(state, study_seed=spec.seed))
    if "evaluate" in names and spec.evaluate.enabled:
        settings_of_folds = EvaluateSettings(
            trials=spec.evaluate.trials,
            folds=spec.evaluate.folds,
            repeats=spec.evaluate.repeats,
            study_seed=spec.seed,
            metric=spec.metric.name.removeprefix("val_"),
            goal=spec.metric.goal,
        )
        stages.append(Evaluate(settings_of_folds, state))
    if "confirm" in names and spec.confirm.enabled:
        stages.append(_confirm(spec, state, blobs))
    if "ensemble" in names:
        settings = EnsembleSettings(
            pool=spec.ensemble.pool,
            size=spec.ensemble.size,
            n_trials=spec.search.trials,
            study_seed=spec.seed,
            metric=spec.metric.name.removeprefix("val_"),
            goal=spec.metric.goal,
            confirmed=max(
                spec.confirm.trials if spec.confirm.enabled else 0,
                spec.evaluate.trials if spec.evaluate.enabled else 0,
            ),
            combine=spec.ensemble.enabled,
            cut=spec.cuts_val,
        )
        stages.append(EnsembleStage(settings, state, arrays=_verified(blobs, state)))
    return stages


def _confirm(spec: Spec, state: StudyState, blobs: BlobStore) -> Confirm:
    settings = ConfirmSettings(
        trials=spec.confirm.trials,
        seeds=spec.confirm.seeds,
        study_seed=spec.seed,
        metric=spec.metric.name.removeprefix("val_"),
        goal=spec.metric.goal,
    )
    return Confirm(settings, state, arrays=_verified(blobs, state))


def _verified(blobs: BlobStore, state: StudyState) -> Callable[[str], dict[str, np.ndarray]]:
    """Reads the arrays of a blob, which are what was written or a DamagedBlob is raised."""
    return lambda ref: blobs.arrays(ref, state.digests.get(ref, ""))


def check_resume(
    old: Spec, new: Spec, run_dir: Path, configs: Mapping[int, Config], *, begun: bool = True
) -> tuple[Edit, ...]:
    """What was edited since a study was opened last, where the study can go on with all of it.

    Args:
        configs: of the trials drawn so far, by number.
        begun: whether a worker has got as far as its data, so that something may have been measured.

    Raises:
        SpecError: with one problem per edit that it cannot go on with.
    """
    found = edits(old, new, configs) if begun else early_edits(old, new)
    problems = [
        Problem(code="other-study", where=str(run_dir), what=edit.words, hint=edit.hint)
        for edit in found
        if edit.refused
    ]
    if problems:
        raise SpecError(problems, file="")
    return found


def _preflight(spec: Spec, state: StudyState) -> Preflight:
    settings = PreflightSettings(
        first=SobolSampler(spec.space, spec.seed).config(0, lambda config: {}) or {},
        first_seed=trial_seed(spec.seed, 0),
        corners=corners(spec.space, spec.per),
        allow=spec.preflight.allow,
    )
    return Preflight(settings, state)


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


def _search(spec: Spec, state: StudyState, sampler: Sampler, drawn: Collection[TrialDrawn]) -> Search:
    stopping = spec.early_stopping
    n_trials = n_in_all(spec, drawn)

    def new_rule() -> StoppingRule:
        return make_rule(
            stopping.rule,
            min_epochs=stopping.min_epochs,
            max_epochs=stopping.max_epochs,
            reduction_factor=stopping.reduction_factor,
            n_trials=n_trials,
        )

    settings = SearchSettings(
        n_trials=spec.search.trials,
        max_epochs=stopping.max_epochs,
        study_seed=spec.seed,
        n_complete=spec.ensemble.size if spec.ensemble.enabled else 1,
        per=spec.per,
        measured=spec.space.measured if spec.measures_lr else (),
        stopping=spec.dump()["early_stopping"],
        baseline=spec.baseline_config,
    )
    return Search(settings, state, sampler=sampler, make_rule=new_rule)


def n_in_all(spec: Spec, drawn: Collection[TrialDrawn]) -> int:
    """How many trials the search comes to have. Those that were drawn stay when `trials` is lowered, and who waits for
    all trials waits for them too; a config of the user's own is one more."""
    own = {event.trial: event.config for event in drawn if event.baseline}
    wanted = spec.baseline_config
    to_come = wanted is not None and not any(same_config(config, wanted) for config in own.values())
    known = {*range(sampled_below(spec.search.trials, own)), *(event.trial for event in drawn)}
    return len(known) + to_come
