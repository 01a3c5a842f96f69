"""What a study's checkpoints will take on disk, before anything is spent.

How many there are at most follows from the settings; how large one is, from the task's own model at the corners of the
space. Where the task cannot be asked the number is told alone, with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpsearch.budget import size_text
from hpsearch.corners import corners, end_of
from hpsearch.errors import HpsearchError, SpecError
from hpsearch.fold_race import FEWEST_FOLDS
from hpsearch.job import Config
from hpsearch.retention import n_kept_at_most
from hpsearch.rungs import rung_epochs
from hpsearch.space import Space
from hpsearch.spec import Spec

MOST_MODELS = 32  # that are built to find the largest and the smallest
ASYNCHRONOUS = 1.2  # times as many as 1/eta go on where nobody waits; measured are 1.1 to 1.2


@dataclass(frozen=True, kw_only=True)
class DiskForecast:
    """At most so many checkpoints, each between two sizes in bytes; None where they are not known, for a reason."""

    checkpoints: int
    smallest: int | None
    largest: int | None
    reason: str
    budget_bytes: int | None
    free_bytes: int

    @property
    def n_bytes(self) -> int | None:
        """Bytes of all, were each of the largest kind."""
        return None if self.largest is None else self.checkpoints * self.largest

    @property
    def fits(self) -> bool | None:
        """Whether there is room for all, by the budget and on the disk; None where the size is not known."""
        if self.n_bytes is None:
            return None
        return self.n_bytes <= min(self.free_bytes, self.free_bytes if self.budget_bytes is None else self.budget_bytes)

    def as_json(self) -> dict[str, object]:
        """The object `disk` of `launch --dry-run --json`; all sizes in bytes."""
        return {
            "checkpoints": self.checkpoints,
            "smallest_checkpoint": self.smallest,
            "largest_checkpoint": self.largest,
            "bytes": self.n_bytes,
            "reason": self.reason,
            "budget": self.budget_bytes,
            "free": self.free_bytes,
            "fits": self.fits,
        }

    def lines(self) -> list[str]:
        """The same for a person: what is needed, then what is in the way."""
        free = f"free: {size_text(self.free_bytes)}"
        if self.n_bytes is None or self.smallest is None or self.largest is None:
            return [f"disk: at most {self.checkpoints:,} checkpoints; how large is not known: {self.reason}; {free}"]
        same = self.smallest == self.largest
        each = size_text(self.largest) if same else f"{size_text(self.smallest)} to {size_text(self.largest)}"
        told = [
            f"disk: at most {self.checkpoints:,} checkpoints of {each}, {size_text(self.n_bytes)} together; {free}"
            + (f" ({self.reason})" if self.reason else "")
        ]
        if self.budget_bytes is not None and self.budget_bytes < self.largest:
            told.append(
                f"warning[disk]: budget.disk, {size_text(self.budget_bytes)}, does not hold one of the largest\n"
                "  hint: raise it; a trial whose checkpoint cannot be kept is not used"
            )
        elif self.budget_bytes is not None and self.budget_bytes < self.n_bytes:
            told.append(
                f"note: budget.disk is {size_text(self.budget_bytes)}: where that is too little, the worst ranked go, "
                "and are trained again from their start if they are promoted"
            )
        needed = self.n_bytes if self.budget_bytes is None else min(self.n_bytes, self.budget_bytes)
        if needed > self.free_bytes:
            told.append(
                f"warning[disk]: up to {size_text(needed)} may be needed, and {size_text(self.free_bytes)} are free\n"
                "  hint: make room, choose another --run-dir, or set budget.disk, which is never exceeded"
            )
        return told


def forecast(spec: Spec, folder: Path, run_dir: Path) -> DiskForecast:
    """What the checkpoints of a study take. Imports the task, and builds its model for some configs.

    Args:
        folder: beside space.yaml, where the task is found.
    """
    smallest, largest, reason = _sizes(spec, folder)
    return DiskForecast(
        checkpoints=n_checkpoints(spec),
        smallest=smallest,
        largest=largest,
        reason=reason,
        budget_bytes=spec.budget.disk_bytes,
        free_bytes=shutil.disk_usage(
            next(p for p in (run_dir.resolve(), *run_dir.resolve().parents) if p.exists())
        ).free,
    )


@dataclass(frozen=True, kw_only=True)
class FoldForecast:
    """What the stage `evaluate` trains: between two numbers of jobs, each of so many epochs at most."""

    trials: int
    fewest_jobs: int  # all but the winner are given up as soon as they can be
    most_jobs: int
    most_epochs: int  # of all jobs together

    @classmethod
    def of(cls, spec: Spec) -> FoldForecast | None:
        """None where the stage is off."""
        if not spec.evaluate.enabled:
            return None
        n_runs, trials = (
            spec.evaluate.n_runs,
            min(spec.evaluate.trials, spec.search.trials + (spec.baseline is not None)),
        )
        first = min(FEWEST_FOLDS, n_runs)
        return cls(
            trials=trials,
            fewest_jobs=trials * first + n_runs - first,
            most_jobs=trials * n_runs,
            most_epochs=trials * n_runs * spec.early_stopping.max_epochs,
        )

    def line(self) -> str:
        jobs = (
            f"{self.most_jobs:,}"
            if self.fewest_jobs == self.most_jobs
            else f"{self.fewest_jobs:,} to {self.most_jobs:,}"
        )
        return f"folds: {jobs} trainings of the best {self.trials}, {self.most_epochs:,} epochs at most"


@dataclass(frozen=True, kw_only=True)
class ConfirmForecast:
    """What the stage `confirm` trains: at most so many jobs of so many epochs in all."""

    trials: int
    most_jobs: int
    most_epochs: int  # of all jobs together

    @classmethod
    def of(cls, spec: Spec) -> ConfirmForecast | None:
        """None where the stage is off."""
        if not spec.confirm.enabled:
            return None
        trials = min(spec.confirm.trials, spec.search.trials + (spec.baseline is not None))
        jobs = trials * spec.confirm.seeds
        return cls(trials=trials, most_jobs=jobs, most_epochs=jobs * spec.early_stopping.max_epochs)

    def line(self) -> str:
        return (
            f"confirmation: {self.most_jobs:,} trainings at most, of the best {self.trials}, "
            f"{self.most_epochs:,} epochs at most"
        )


def n_checkpoints(spec: Spec) -> int:
    """The most checkpoints that a study keeps at once."""
    stopping, n_trials = spec.early_stopping, spec.search.trials + (spec.baseline is not None)
    pool, size = (spec.ensemble.pool, spec.ensemble.size) if spec.ensemble.enabled else (1, 1)
    pool += spec.baseline is not None  # kept whatever its rank
    rungs: tuple[int, ...] = ()
    overtaken = 1.0
    if stopping.rule in ("asha", "sha"):
        rungs = rung_epochs(stopping.min_epochs, stopping.max_epochs, stopping.reduction_factor)
        overtaken = ASYNCHRONOUS if stopping.rule == "asha" else 1.0
    elif stopping.rule == "median" and stopping.min_epochs < stopping.max_epochs:
        size = n_trials  # any of them may be held back, and go on later
    return n_kept_at_most(n_trials, rungs, stopping.reduction_factor, pool=pool, size=size, overtaken=overtaken)


def sized_configs(spec: Spec) -> Iterator[Config]:
    """Configs among which the largest and the smallest network are likely to be, MOST_MODELS of them at most.

    The corners of the space; and, since nobody knows which of several names makes the larger network, each choice of a
    list of names with all numbers at their low and at their high end.
    """
    seen: list[Config] = []
    for config in _candidates(spec.space, spec.per):
        if config not in seen:
            seen.append(config)
            yield config
        if len(seen) == MOST_MODELS:
            return


def _candidates(space: Space, per: tuple[str, ...]) -> Iterator[Config]:
    found = corners(space, per)
    yield from (found[name] for name in ("smallest", "largest") if name in found)
    for high in (True, False):
        point = [end_of(parameter, high=high) for parameter in space.searched]
        for parameter in space.searched:
            if parameter.kind == "categorical":
                yield from (space.config(point, fixed={parameter.name: value}) for value in parameter.values)
    yield from found.values()


def _sizes(spec: Spec, folder: Path) -> tuple[int | None, int | None, str]:
    from hpsearch.task import has_own_fit, load_task

    try:
        task = load_task(spec.task, folder)
        from hpsearch.training.size import checkpoint_bytes

        sizes = [checkpoint_bytes(task, config) for config in sized_configs(spec)]
    except SpecError as error:
        return None, None, "; ".join(problem.what for problem in error.problems)
    except HpsearchError as error:
        return None, None, error.message
    except (MemoryError, RuntimeError) as error:
        return None, None, f"the network cannot be built here: {error}"
    reason = "beside what the task's fit() keeps in its state" if has_own_fit(task) else ""
    return min(sizes), max(sizes), reason
