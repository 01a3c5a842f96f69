"""Ensemble: choose the checkpoints that help each other, then open the test split once.

The pool's predictions are scored on the ensemble split, which the search never ranked on. When the members are chosen,
they and the best single trial are measured on the test split, and each member is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpsearch.events import Compared, Event, Finished, Selected
from hpsearch.intervals import Interval, better, mean_interval, paired_interval, sign_flip_chance, wilson_interval
from hpsearch.job import EvaluateJob, ExportJob, Job, Member, RebuildJob, SplitName, evaluation_key, rebuild_key
from hpsearch.lane_groups import may_share
from hpsearch.selection import select_greedy
from hpsearch.stages import may_reorder
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

if TYPE_CHECKING:
    import numpy as np


BASELINE_LEVEL = 0.98  # of the interval: a study of random labels is called better than the baseline in 1 of 100


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """How many candidates, how many members, and by which measure the gain is told."""

    pool: int
    size: int
    n_trials: int
    study_seed: int
    metric: str  # the study's metric without its split
    goal: Literal["minimize", "maximize"]
    confirmed: int = 0  # trials of which fresh seeds or folds choose the best
    combine: bool  # False: `ensemble: {enabled: false}`, the best single trial alone is measured and packaged
    cut: bool = True  # False: nothing of val was set aside, and the ensemble split is another name for it


class EnsembleStage:
    """Pool, selection, test, export."""

    name = "ensemble"

    def __init__(
        self, settings: EnsembleSettings, state: StudyState, *, arrays: Callable[[str], dict[str, np.ndarray]]
    ) -> None:
        """
        Args:
            arrays: reads the named arrays of a blob.
        """
        self._settings = settings
        self._state = state
        self._arrays = arrays
        self._pool: list[TrialRecord] | None = None  # as of the last event that could change it

    def apply(self, event: Event) -> None:
        if may_reorder(event):
            self._pool = None

    def lost(self, worker: str) -> None:
        """No evaluation lives in a worker's memory."""

    def next_job(self, worker: str) -> Job | None:
        jobs = self._free_jobs()
        missing = {member.trial: None for job in jobs for member in job.members if self._is_missing(member.trial)}
        rebuilds = (self._rebuild(self._state.trials[trial]) for trial in missing)
        rebuild = next((job for job in rebuilds if self._free(job.key)), None)
        if rebuild is not None:
            return rebuild
        return next((job for job in jobs if self._ready(job)), None)

    def next_beside(self, worker: str, job: Job) -> Job | None:
        return next((other for other in self._free_jobs() if may_share(job, other) and self._ready(other)), None)

    def conclude(self) -> list[Event]:
        if self._selected() is None:
            selected = self._select()
            return [] if selected is None else [selected]
        if not self._compared() and self._is_over([*self._test_jobs(), *self._own_jobs()]):
            return [self._compare()]
        return []

    def finished(self) -> bool:
        if not self.pool():
            return True
        if self._selected() is None:
            return self._settings.combine and self._is_over(self._pool_jobs()) and not self._candidates()
        return self._is_over(self._jobs()) and self._compared()

    def pool(self) -> list[TrialRecord]:
        """Candidates, best first: usable trials with the best metric."""
        if self._pool is None:
            self._pool = self._state.candidates(self._settings.pool if self._settings.combine else 1)
        return self._pool

    @property
    def n_kept(self) -> tuple[int, int]:
        """How many of the best trials are candidates, for one thing or another, and how many may be members."""
        pool, size = (self._settings.pool, self._settings.size) if self._settings.combine else (1, 1)
        return max(pool, self._settings.confirmed), size

    # Jobs

    def _jobs(self) -> list[EvaluateJob | ExportJob]:
        if self._selected() is None:
            return list(self._pool_jobs())
        return [*self._export_jobs(), *self._test_jobs(), *self._own_jobs(), *self._val_jobs()]

    def _pool_jobs(self) -> list[EvaluateJob]:
        if not self._settings.combine:
            return []
        return [self._evaluate([(trial, 1.0)], "ensemble", keep=True) for trial in self.pool()]

    def _test_jobs(self) -> list[EvaluateJob]:
        if not self._has_test():
            return []
        models = [self._best(), self._members(), *self._own()]
        return [self._evaluate(model, "test", keep=False) for model in models]

    def _own_jobs(self) -> list[EvaluateJob]:
        """What the trial of the user's own config is held against the best by, where there is no test split."""
        if self._has_test() or self._best_was_chosen_by_these_rows() or not self._own():
            return []
        return [self._evaluate(model, "ensemble", keep=True) for model in (self._best(), *self._own())]

    def _best_was_chosen_by_these_rows(self) -> bool:
        """Whether the ensemble split chose the best single trial: the best of many noisy scores is better on its own
        rows than on any others, so its lead there says nothing."""
        return not self._settings.cut or bool(self._state.confirmed_order)

    def _val_jobs(self) -> list[EvaluateJob]:
        return [self._evaluate(self._members(), "val", keep=False)]

    def _export_jobs(self) -> list[ExportJob]:
        """One job for all members: those of one architecture share a graph, and the exporter is loaded once."""
        members = tuple(_member(trial, weight) for trial, weight in self._members())
        name = "+".join(str(member.trial) for member in members)
        return [ExportJob(key=f"export/{name}", members=members)]

    def _evaluate(self, members: list[tuple[TrialRecord, float]], split: SplitName, *, keep: bool) -> EvaluateJob:
        return EvaluateJob(
            key=evaluation_key(split, [(trial.number, weight) for trial, weight in members]),
            members=tuple(_member(trial, weight) for trial, weight in members),
            split=split,
            keep_predictions=keep,
        )

    def _rebuild(self, trial: TrialRecord) -> RebuildJob:
        """The best epoch of a trial once more, whose checkpoint was dropped or is damaged."""
        assert trial.best_epoch is not None
        assert trial.best_ref is not None
        return RebuildJob(
            key=rebuild_key(trial.number, trial.best_epoch),
            trial=trial.number,
            config=trial.config,
            seed=trial.seed,
            epoch=trial.best_epoch,
            checkpoint=trial.best_ref,
        )

    def _free_jobs(self) -> list[EvaluateJob | ExportJob]:
        """Those that nobody has or has done, in the order in which they are given out."""
        return [job for job in self._jobs() if self._free(job.key)]

    def _ready(self, job: EvaluateJob | ExportJob) -> bool:
        return not any(self._is_missing(member.trial) for member in job.members)

    def _is_missing(self, trial: int) -> bool:
        return self._state.trials[trial].best_checkpoint is None

    def _free(self, key: str) -> bool:
        return key not in self._state.results and key not in self._state.leases

    def _is_over(self, jobs: Sequence[EvaluateJob | ExportJob]) -> bool:
        return all(job.key in self._state.results for job in jobs)

    # What is known

    def _has_test(self) -> bool:
        return self._state.data is not None and "test" in self._state.data.n_rows

    def _selected(self) -> Selected | None:
        selected = self._state.selected
        # One of more trials stands: those that were drawn stay when `trials` is lowered.
        if selected is None or selected.n_trials < self._settings.n_trials:
            return None
        needed = (selected.best, *(trial for trial, _ in selected.members))
        return selected if all(self._state.trials[trial].usable for trial in needed) else None

    def _compared(self) -> bool:
        compared = self._state.compared
        return compared is not None and compared.n_trials >= self._settings.n_trials

    def _best(self) -> list[tuple[TrialRecord, float]]:
        selected = self._selected()
        assert selected is not None
        return [(self._state.trials[selected.best], 1.0)]

    def _own(self) -> list[list[tuple[TrialRecord, float]]]:
        """The trial of the user's own config, as a model to be measured; none where it is the best, or of no use."""
        trial = self._state.own_trial
        best = self._selected()
        assert best is not None
        usable = trial is not None and trial.usable and trial.number != best.best
        return [[(trial, 1.0)]] if trial is not None and usable else []

    def _members(self) -> list[tuple[TrialRecord, float]]:
        selected = self._selected()
        assert selected is not None
        return [(self._state.trials[trial], weight) for trial, weight in selected.members]

    def _candidates(self) -> list[tuple[TrialRecord, Finished]]:
        """Pool trials whose predictions are there."""
        jobs = zip(self.pool(), self._pool_jobs(), strict=True)
        results = [(trial, self._state.results.get(job.key)) for trial, job in jobs]
        return [(trial, result) for trial, result in results if result is not None and result.outcome == "done"]

    # Conclusions

    def _select(self) -> Selected | None:
        pool = self.pool()
        if not pool:
            return None
        best = next((n for n in self._state.leaders if self._state.trials[n].usable), pool[0].number)
        if not self._settings.combine:
            return Selected(n_trials=self._settings.n_trials, best=best, pool=(best,), members=((best, 1.0),))
        if not self._is_over(self._pool_jobs()):
            return None
        candidates = self._candidates()
        if not candidates:
            return None
        assert self._state.data is not None
        blobs = [self._arrays(str(result.values["predictions"])) for _, result in candidates]
        targets = self._arrays(str(candidates[0][1].values["targets"]))["targets"]
        chosen = select_greedy(
            [blob["predictions"] for blob in blobs], targets, self._state.data.outputs, size=self._settings.size
        )
        return Selected(
            n_trials=self._settings.n_trials,
            best=best,
            pool=tuple(trial.number for trial in pool),
            members=tuple((candidates[index][0].number, weight) for index, weight in chosen.members),
            scores=chosen.scores,
            single_score=chosen.single_score,
        )

    def _compare(self) -> Compared:
        if not self._has_test():
            return Compared(
                n_trials=self._settings.n_trials,
                gain={},
                over_baseline=self._over_baseline_untested(),
                over_own={} if self._best_was_chosen_by_these_rows() else self._over_own("ensemble"),
            )
        best, ensemble, *_ = (self._state.results[job.key] for job in self._test_jobs())
        if best.outcome != "done" or ensemble.outcome != "done":
            return Compared(n_trials=self._settings.n_trials, gain={})
        of_best = self._arrays(str(best.values["row_scores"]))
        of_ensemble = self._arrays(str(ensemble.values["row_scores"]))
        metric = self._settings.metric if self._settings.metric in of_best else "loss"
        goal = self._settings.goal if metric == self._settings.metric else "minimize"
        seed = self._settings.study_seed
        gain = paired_interval(of_ensemble[metric], of_best[metric], seed=seed)
        return Compared(
            n_trials=self._settings.n_trials,
            gain={"metric": metric, **_numbers(gain), "better": better(gain, goal)},
            intervals={"best": _row_intervals(of_best, seed), "ensemble": _row_intervals(of_ensemble, seed)},
            over_baseline=self._over_baseline(of_ensemble, "test"),
            over_own=self._over_own("test"),
            over_linear=self._over_linear(of_best, "test"),
        )

    def _over_own(self, split: SplitName) -> dict[str, object]:
        """The best single trial against that of the user's own config, row by row."""
        models = [self._best(), *self._own()]
        keys = [evaluation_key(split, [(trial.number, weight) for trial, weight in model]) for model in models]
        results = [self._state.results[key] for key in keys if key in self._state.results]
        if len(results) < 2 or any(result.outcome != "done" for result in results):
            return {}
        best, own = (self._arrays(str(result.values["row_scores"])) for result in results)
        metric = self._settings.metric if self._settings.metric in best and self._settings.metric in own else "loss"
        goal = self._settings.goal if metric == self._settings.metric else "minimize"
        gain = paired_interval(best[metric], own[metric], seed=self._settings.study_seed)
        told = {"metric": metric, **_numbers(gain), "better": better(gain, goal), "split": split}
        return {"trial": models[1][0][0].number, **told, "n_rows": len(best[metric])}

    def _over_baseline_untested(self) -> dict[str, object]:
        """Without a test split the best single trial is held against the baseline, on the rows that chose the ensemble.
        Where they chose the trial too, it may be told that it is no better, since they flatter it, but not that it is.
        """
        (trial, _), *_ = self._best()
        result = self._state.results.get(evaluation_key("ensemble", [(trial.number, 1.0)]))
        if result is None or result.outcome != "done":
            return {}
        told = self._over_baseline(self._arrays(str(result.values["row_scores"])), "ensemble")
        unknown = self._best_was_chosen_by_these_rows() and told.get("better") is True
        return {**told, "better": None} if unknown else told

    def _over_linear(self, rows: Mapping[str, np.ndarray], split: SplitName) -> dict[str, object]:
        """A model against the linear one, row by row; empty where there is none."""
        linear = self._baseline_rows("linear", split)
        if not linear:
            return {}
        metric = self._settings.metric if self._settings.metric in rows and self._settings.metric in linear else "loss"
        goal = self._settings.goal if metric == self._settings.metric else "minimize"
        gain = paired_interval(rows[metric], linear[metric], seed=self._settings.study_seed)
        told = {"metric": metric, **_numbers(gain), "better": better(gain, goal)}
        return {**told, "split": split, "n_rows": len(rows[metric])}

    def _baseline_rows(self, name: str, split: SplitName) -> Mapping[str, np.ndarray]:
        """A baseline's scores of rows; empty where it was not measured there."""
        result = self._state.results.get(f"baseline/{name}")
        refs = result.values.get("row_scores") if result is not None and result.outcome == "done" else None
        return self._arrays(str(refs[split])) if isinstance(refs, Mapping) and split in refs else {}

    def _over_baseline(self, rows: Mapping[str, np.ndarray], split: SplitName) -> dict[str, object]:
        constant = self._baseline_rows("constant", split)
        if not constant:
            return {}
        metric = (
            self._settings.metric if self._settings.metric in rows and self._settings.metric in constant else "loss"
        )
        goal = self._settings.goal if metric == self._settings.metric else "minimize"
        gain = paired_interval(rows[metric], constant[metric], seed=self._settings.study_seed, level=BASELINE_LEVEL)
        return {
            "metric": metric,
            **_numbers(gain),
            "better": beyond_noise(rows[metric], constant[metric], gain, goal, self._settings.study_seed),
            "split": split,
            "n_rows": len(rows[metric]),
        }


def beyond_noise(
    rows_N: np.ndarray, baseline_N: np.ndarray, gain: Interval, goal: Literal["minimize", "maximize"], seed: int
) -> bool:
    """Whether rows are better than a baseline's by more than chance would have it in 1 % of all studies."""
    if gain.low is not None:
        return better(gain, goal) is True
    a, b = (rows_N, baseline_N) if goal == "minimize" else (baseline_N, rows_N)
    return sign_flip_chance(a, b, seed=seed) <= (1 - BASELINE_LEVEL) / 2


def _member(trial: TrialRecord, weight: float) -> Member:
    assert trial.best_ref is not None
    return Member(trial=trial.number, config=trial.config, checkpoint=trial.best_ref, weight=weight)


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _row_intervals(rows: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float | None]]:
    """Intervals of a model's own test scores; proportions by Wilson, means by bootstrap-t."""
    intervals = {}
    for name, values in rows.items():
        if name == "accuracy":
            interval = wilson_interval(int(values.sum()), len(values))
        else:
            interval = mean_interval(values, seed=seed)
        intervals[name] = _numbers(interval)
    return intervals
