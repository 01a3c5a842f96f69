"""The verdict: what a study came to, as the object that `launch --json` ends with.

Computed from the study's state alone; what only this launch knows (its wall time, MLflow's answers) is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpsearch.events import Confirmed, Evaluated
from hpsearch.job import evaluation_key
from hpsearch.space_diagnosis import Remark, findings, reference, remarks
from hpsearch.spec import Spec
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState
from hpsearch.winner import winner

STAGE_NAMES = ("preflight", "lr_range", "search", "baselines", "evaluate", "confirm", "ensemble")
ALWAYS_TOLD = ("lr_range", "search", "ensemble")  # though they took no time


def verdict(
    state: StudyState,
    *,
    run_dir: str,
    wall_s: float,
    stages_s: Mapping[str, float],
    mlflow: Mapping[str, object],
) -> dict[str, object]:
    """The whole outcome, JSON through and through.

    Args:
        stages_s: seconds of what is no stage of the study: its start, and tracking after its end.
    """
    assert state.opened is not None
    return {
        "study": state.name,
        "run_dir": run_dir,
        "seed": state.opened.spec.get("seed", 0),
        "epochs": epochs(state),
        "wall_s": round(wall_s, 2),
        "stages_s": {
            "start": round(stages_s.get("start", 0.0), 2),
            **{
                name: round(state.stage_s.get(name, 0.0), 2)
                for name in STAGE_NAMES
                if name in state.stage_s or name in ALWAYS_TOLD
            },
            "tracking": round(stages_s.get("tracking", 0.0), 2),
        },
        "trials": trial_counts(state),
        "lanes": lanes(state),
        "precision": str(state.opened.spec.get("precision", "float32")),
        "lr_range": lr_ranges(state),
        "best": _best(state),
        "diagnosis": diagnosis(state),
        "baselines": baselines(state),
        "baseline": own_config(state),
        "ensemble": _ensemble(state),
        "mlflow": dict(mlflow),
    }


def epochs(state: StudyState) -> dict[str, int]:
    """Epochs trained per stage; those of the ramps by the examples they saw."""
    return {
        "lr_range": round(state.ramp_epochs),
        "search": sum(trial.epoch for trial in state.trials.values()),
        "evaluate": state.n_fold_epochs,
        "confirm": state.n_confirm_epochs,
        "finish": 0,
    }


def trial_counts(state: StudyState) -> dict[str, int]:
    """Trials by what became of them."""
    counts = state.counts()
    always = [TrialState.COMPLETE, TrialState.STOPPED, TrialState.DIVERGED, TrialState.FAILED]
    others = [s for s in TrialState if s not in always and counts[s]]  # while the search goes on
    return {"total": len(state.trials), **{str(s): counts[s] for s in [*always, *others]}}


def lanes(state: StudyState) -> dict[str, int]:
    """How many trials of the search shared a program with others, of how many that were trained, and how many were in
    one program at most (1: each was trained by itself)."""
    trained = [trial.lanes for trial in state.trials.values() if trial.epoch]
    return {"trials": sum(n > 1 for n in trained), "of": len(trained), "most": max(trained, default=1)}


def lr_ranges(state: StudyState) -> list[dict[str, object]]:
    """The measured range of each branch."""
    return [
        {
            "branch": measured.branch,
            "lr": measured.lr,
            "low": measured.low,
            "high": measured.high,
            "spread_decades": _rounded(measured.spread_decades),
            "confirmed": measured.confirmed,
            "at_edge": measured.at_edge,
        }
        for measured in state.ranges
    ]


def diagnosis(state: StudyState) -> dict[str, object]:
    """What the curves say of the best trial, and all trials of their space: words with their numbers."""
    best = _single(state)
    return {
        "best": [] if best is None else [said.words for said in findings(best, reference(state, state.baseline_loss))],
        "space": [{"name": said.name, "words": said.words, "hint": said.hint} for said in space_remarks(state)],
    }


def baselines(state: StudyState) -> dict[str, object]:
    """What the study is held against, by name and split; those that made no sense with their reason; and whether what
    is delivered is better than ignoring the inputs."""
    told: dict[str, object] = {}
    for key, result in state.results.items():
        if key.startswith("baseline/"):
            name = key.removeprefix("baseline/")
            told[name] = result.values["metrics"] if result.outcome == "done" else {"skipped": result.message}
    if state.opened is not None:
        spec = Spec.from_dump(dict(state.opened.spec))
        metric = spec.metric.name.removeprefix("val_")
        told |= {name: {"given": {metric: value}} for name, value in spec.baselines.items()}
    over = dict(state.compared.over_baseline) if state.compared is not None else {}
    linear = dict(state.compared.over_linear) if state.compared is not None else {}
    return {**told, "gain": over or None} | ({"gain_over_linear": linear} if linear else {})


def space_remarks(state: StudyState) -> tuple[Remark, ...]:
    """What all trials together say about their space."""
    if state.opened is None:
        return ()
    spec = Spec.from_dump(dict(state.opened.spec))
    return remarks(state, spec.space, spec.per)


def top(state: StudyState, k: int | None = None) -> list[dict[str, object]]:
    """The ranking of the search, best first, diverged and failed last; all of it without `k`.

    The winner is marked once the ensemble is chosen: fresh seeds or folds may have another opinion than the search.
    """
    known = reference(state, state.baseline_loss)
    best = winner(state)
    return [
        {
            "trial": trial.number,
            "winner": best is not None and best.final and best.trial == trial.number,
            "config": trial.config,
            "state": str(trial.state),
            "baseline": trial.baseline,
            "epoch": trial.best_epoch if trial.best_epoch is not None else trial.epoch,
            "epochs_trained": trial.epoch,
            "n_parameters": trial.n_parameters,
            "val": val_metrics(trial),
            "diagnosis": [str(said.finding) for said in findings(trial, known)],
        }
        for trial in state.ranking()[:k]
    ]


def val_metrics(trial: TrialRecord) -> dict[str, float]:
    """Validation metrics of a trial's best epoch, named without their split."""
    return {k.removeprefix("val_"): v for k, v in trial.best_metrics.items() if k.startswith("val_")}


def measured_metrics(state: StudyState, split: str, members: Sequence[tuple[int, float]]) -> dict[str, float]:
    """What some weighted trials scored on a split; empty when that was not measured."""
    result = state.results.get(evaluation_key(split, members))
    metrics = result.values.get("metrics") if result is not None and result.outcome == "done" else None
    return dict(metrics) if isinstance(metrics, Mapping) else {}


def _single(state: StudyState) -> TrialRecord | None:
    """The best single trial: as it was when the ensemble was chosen, or as far as the study has come."""
    found = winner(state)
    return None if found is None else state.trials[found.trial]


def _best(state: StudyState) -> dict[str, object] | None:
    best = _single(state)
    if best is None:
        return None
    return {
        "trial": best.number,
        "config": best.config,
        "epoch": best.best_epoch,
        "val": val_metrics(best),
        "test": measured_metrics(state, "test", [(best.number, 1.0)]),
        "test_intervals": _intervals(state, "best"),
        "chosen": chosen(state),
        "evaluated": _standing(state.evaluated, best.number),
        "confirmed": _standing(state.confirmed, best.number),
    }


def chosen(state: StudyState) -> dict[str, object] | None:
    """By what the best trial is the best, and who is so by the search alone; None before any trial can be used."""
    found = winner(state)
    if found is None:
        return None
    return {
        "by": found.by,
        "metric": found.metric,
        "value": found.value,
        "scores": found.n_scores,
        "place": found.place,
        "of": found.of,
        "final": found.final,
        "searched_best": found.searched,
    }


def own_config(state: StudyState) -> dict[str, object] | None:
    """How the user's own config did: its rank among all trials, and the winner's lead over it. None without one."""
    own = state.own_trial
    if own is None:
        return None
    over = dict(state.compared.over_own) if state.compared is not None else {}
    rank = next(place for place, trial in enumerate(state.ranking(), start=1) if trial is own)
    return {
        "trial": own.number,
        "state": str(own.state),
        "rank": rank,
        "of": len(state.trials),
        "epoch": own.best_epoch if own.best_epoch is not None else own.epoch,
        "val": val_metrics(own),
        "test": measured_metrics(state, "test", [(own.number, 1.0)]),
        "gain": over if over.get("trial") == own.number else None,
        "untold": _untold(state, own),
    }


def _untold(state: StudyState, own: TrialRecord) -> str | None:
    """Why the winner's lead over the user's own config cannot be told; None where it can, or is not known yet."""
    compared, n_rows = state.compared, state.data.n_rows if state.data is not None else {}
    if compared is None or compared.over_own or "test" in n_rows or state.opened is None or not own.usable:
        return None
    if Spec.from_dump(dict(state.opened.spec)).cuts_val and not state.confirmed_order:
        return None
    return "whether the winner beats it is not told: there is no test split, and all other rows had a part in choosing"


def _standing(ranked: Evaluated | Confirmed | None, trial: int) -> Mapping[str, object] | None:
    """What folds, or fresh seeds on fresh rows, say of a trial; None where it was not looked into."""
    rows = ranked.standings if ranked is not None else ()
    return next((row for row in rows if row["trial"] == trial), None)


def _ensemble(state: StudyState) -> dict[str, object] | None:
    selected = state.selected
    if selected is None:
        return None
    return {
        "members": [{"trial": trial, "weight": weight} for trial, weight in selected.members],
        "val": measured_metrics(state, "val", selected.members),
        "test": measured_metrics(state, "test", selected.members),
        "test_intervals": _intervals(state, "ensemble"),
        "gain": _gain(state),
    }


def _gain(state: StudyState) -> dict[str, object]:
    nothing: dict[str, object] = {"metric": None, "value": None, "low": None, "high": None, "better": None}
    return {**nothing, **(state.compared.gain if state.compared is not None else {})}


def _intervals(state: StudyState, whose: str) -> Mapping[str, object]:
    intervals = state.compared.intervals.get(whose, {}) if state.compared is not None else {}
    return intervals if isinstance(intervals, Mapping) else {}


def _rounded(decades: float) -> float | None:
    return round(decades, 3) if decades < float("inf") else None
