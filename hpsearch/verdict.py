"""The verdict: what a study came to, as the object that `launch --json` ends with.

Computed from the study's state alone; what only this launch knows (its wall time, MLflow's answers) is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpsearch.job import evaluation_key
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState

STAGE_NAMES = ("lr_range", "search", "ensemble")


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
            **{name: round(state.stage_s.get(name, 0.0), 2) for name in STAGE_NAMES},
            "tracking": round(stages_s.get("tracking", 0.0), 2),
        },
        "trials": trial_counts(state),
        "lr_range": lr_ranges(state),
        "best": _best(state),
        "ensemble": _ensemble(state),
        "mlflow": dict(mlflow),
    }


def epochs(state: StudyState) -> dict[str, int]:
    """Epochs trained per stage; those of the ramps by the examples they saw."""
    ramps = (r.values.get("epochs", 0.0) for key, r in state.results.items() if key.startswith(("ramp/", "probe/")))
    return {
        "lr_range": round(sum(float(str(epochs)) for epochs in ramps)),
        "search": sum(trial.epoch for trial in state.trials.values()),
        "finish": 0,
    }


def trial_counts(state: StudyState) -> dict[str, int]:
    """Trials by what became of them."""
    counts = state.counts()
    always = [TrialState.COMPLETE, TrialState.STOPPED, TrialState.DIVERGED, TrialState.FAILED]
    others = [s for s in TrialState if s not in always and counts[s]]  # while the search goes on
    return {"total": len(state.trials), **{str(s): counts[s] for s in [*always, *others]}}


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


def top(state: StudyState, k: int | None = None) -> list[dict[str, object]]:
    """The ranking, best first, diverged and failed last; all of it without `k`."""
    return [
        {
            "trial": trial.number,
            "config": trial.config,
            "state": str(trial.state),
            "epoch": trial.best_epoch if trial.best_epoch is not None else trial.epoch,
            "epochs_trained": trial.epoch,
            "val": val_metrics(trial),
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


def _best(state: StudyState) -> dict[str, object] | None:
    best = state.trials[state.selected.best] if state.selected is not None else state.best()
    if best is None:
        return None
    return {
        "trial": best.number,
        "config": best.config,
        "epoch": best.best_epoch,
        "val": val_metrics(best),
        "test": measured_metrics(state, "test", [(best.number, 1.0)]),
        "test_intervals": _intervals(state, "best"),
    }


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
