"""What MLflow should hear about a study, computed from its state; nothing here imports mlflow.

An operation has a key (which run or which part of it) and a revision (what it would say). It is due when MLflow has not
acknowledged that revision of that key, so the same function serves a launch that sends as it goes, a resume, and a
`hpsearch sync` a week later.

    study              the study's own run, with its settings and space.yaml
    parent/settings    tags that a resume may change
    parent/data        sizes and fingerprints of the splits
    parent/best        the best objective so far, stepped by the epochs trained in the whole study
    lr-range           child run: learning rates worth searching, with their curves
    trial/17           child run of a trial, sent once it is final
    parent/batch       the figure of a batch as the model receives it
    parent/search      plots of the search, once more when there is more to draw: baselines, scores of rows
    ensemble/64        child run of the ensemble chosen among 64 trials, and its registered version; one that is chosen
                       again, after more epochs or by other settings, is another run and another version
    parent/result/64   test scores and gain
    parent/lead/64     the best trial's lead over the user's own config
    parent/note        notes and verdict in words
    parent/status      how the study ended

Numbers are told in the user's own unit: what is minimised inside as -accuracy is `objective` = accuracy here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from hpsearch.events import Selected, to_json
from hpsearch.job import Config, EpochMetrics
from hpsearch.notes import Note
from hpsearch.number_text import number
from hpsearch.report.figures import Topic, drawn_from
from hpsearch.sentences import baseline_lines, ensemble_line, fold_words, gain_line, own_config_lines, seed_words
from hpsearch.space_diagnosis import findings
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState
from hpsearch.verdict import baselines, measured_metrics, space_remarks
from hpsearch.winner import winner

RunStatus = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]


STATUS_OF_TRIAL: Mapping[TrialState, RunStatus] = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.STOPPED: "KILLED",
    TrialState.DIVERGED: "FAILED",
    TrialState.FAILED: "FAILED",
}

TAG_UID = "hpsearch.study_uid"
TAG_OP = "hpsearch.op"
TAG_TEST = "hpsearch.test_fingerprint"
TAG_TEST_METRIC = "hpsearch.test_metric"
TAG_TEST_VALUE = "hpsearch.test_value"
TAG_GOAL = "hpsearch.goal"

# Settings that are tags, since params cannot be changed. Once anything was edited, all settings are told as tags too.
OFTEN_EDITED = ("search.trials", "budget.", "resources.", "mlflow.", "ensemble.pool", "ensemble.size")

_MAX_PARAM, _MAX_TAG = 6000, 8000  # characters; MLflow refuses or cuts what is longer


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a metric."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is written into one run."""

    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)  # artifact name -> its text
    plots: Topic | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data of a study as MLflow's dataset column shows it."""

    name: str
    digest: str
    profile: str  # JSON


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """Create the study's run."""

    key: str
    revision: str
    name: str
    start_ms: int
    content: Content


@dataclass(frozen=True, kw_only=True)
class UpdateStudy:
    """Write more into the study's run."""

    key: str
    revision: str
    content: Content
    dataset: Dataset | None = None


@dataclass(frozen=True, kw_only=True)
class SetStatus:
    """End the study's run, or take it up again."""

    key: str
    revision: str
    status: RunStatus
    end_ms: int


@dataclass(frozen=True, kw_only=True)
class LogChild:
    """Create a child run, or write again into the one that is there, and end it."""

    key: str
    revision: str
    name: str
    start_ms: int
    end_ms: int
    status: RunStatus
    content: Content


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a registered model's version tells about the ensemble; `None`s: no test split, or not measured."""

    key: str  # of the ensemble's run; a study has one version for each
    model: str
    alias: str
    members: tuple[tuple[int, float], ...]
    test_fingerprint: str
    metric: str  # without its split
    goal: Literal["minimize", "maximize"]
    test_value: float | None
    description: str
    beats_baseline: bool | None = None


@dataclass(frozen=True, kw_only=True)
class LogEnsemble:
    """Log the ensemble's child run and register the model."""

    key: str
    revision: str
    child: LogChild
    registration: Registration


Operation = OpenStudy | UpdateStudy | SetStatus | LogChild | LogEnsemble


def due_operations(
    state: StudyState,
    acknowledged: Mapping[str, str],
    *,
    notes: Sequence[Note] = (),
    running: bool = True,
) -> Iterator[Operation]:
    """Operations that MLflow has not acknowledged, in the order in which they must be sent.

    Costs next to nothing for what is acknowledged already, so it may be asked twice a second.

    Args:
        acknowledged: revision by key, as the outbox remembers them.
        running: a driver holds the study. Without one, a study that did not end was interrupted.
    """
    if state.opened is None:
        return
    for operation in _all(state, acknowledged, notes, running):
        if acknowledged.get(operation.key) != operation.revision:
            yield operation


def _all(
    state: StudyState, acknowledged: Mapping[str, str], notes: Sequence[Note], running: bool
) -> Iterator[Operation]:
    yield from _study(state)
    yield from _data(state)
    batch = drawn_from("batch", state)
    if batch:
        yield UpdateStudy(key="parent/batch", revision=batch, content=Content(plots="batch"))
    if "lr_range" in state.ended_stages and state.ranges:
        yield _lr_range(state)
    for trial in list(state.trials.values()):  # the study may draw another meanwhile
        yield from _trial(state, trial, acknowledged)
    yield from _improvements(state, acknowledged)
    if state.search_ended:
        yield UpdateStudy(
            key="parent/search",
            revision=drawn_from("search", state),
            content=Content(plots="search", tags=_counts(state) | _remarks(state)),
        )
    if "ensemble" in state.ended_stages and state.selected is not None:
        yield _ensemble(state, state.selected)
        yield _result(state, state.selected)
        yield from _lead(state, state.selected)
    text = note_text(state, notes)
    if text:
        yield UpdateStudy(
            key="parent/note", revision=_digest(text), content=Content(tags={"mlflow.note.content": text[:_MAX_TAG]})
        )
    yield from _status(state, acknowledged, running)


# The study's own run


def _study(state: StudyState) -> Iterator[Operation]:
    opened = state.opened
    assert opened is not None
    settings = _flatten(opened.spec)
    assert state.first_opened is not None
    at_first = _flatten(state.first_opened.spec)
    fixed = {k: v for k, v in at_first.items() if not k.startswith(OFTEN_EDITED)}
    changeable = {f"hpsearch.{k}": v for k, v in settings.items() if state.edited or k.startswith(OFTEN_EDITED)}
    environment = dict(opened.environment)
    tags = {
        TAG_UID: opened.uid,
        TAG_OP: "study",
        "mlflow.user": str(environment.get("user") or ""),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": str(environment.get("command") or opened.spec.get("task", "")),
        "mlflow.source.git.commit": str(environment.get("git_commit") or ""),
        "hpsearch.metric": _metric(state)[0],
        TAG_GOAL: _metric(state)[1],
    }
    yield OpenStudy(
        key="study",
        revision="1",  # params cannot be changed once they are logged, so this is said once
        name=opened.study,
        start_ms=_ms(state.opened_at),
        content=Content(
            params={k: v[:_MAX_PARAM] for k, v in fixed.items()},
            tags={k: v for k, v in tags.items() if v},
        ),
    )
    # A resume may bring more trials, a wider space, another budget, another machine.
    now = changeable | {f"hpsearch.env.{k}": v for k, v in _flatten(environment).items()}
    texts = {"environment.json": json.dumps(environment, indent=1, default=str) + "\n"}
    if opened.spec_text:
        texts["space.yaml"] = opened.spec_text
    yield UpdateStudy(
        key="parent/settings",
        revision=_digest(json.dumps([now, opened.spec_text])),
        content=Content(tags={k: v[:_MAX_TAG] for k, v in now.items()}, texts=texts),
    )


def _data(state: StudyState) -> Iterator[Operation]:
    data = state.data
    if data is None:
        return
    params = {f"data.n_{split}": str(n) for split, n in data.n_rows.items()}
    params |= {
        "data.outputs": data.outputs,
        "data.n_classes": _text(data.n_classes),
        "data.input_shape": _text(list(data.input_shape)),
        "data.input_dtype": data.input_dtype,
    }
    yield UpdateStudy(
        key="parent/data",
        revision=data.fingerprint,
        content=Content(params=params, tags={"hpsearch.data_fingerprint": data.fingerprint}),
        dataset=Dataset(
            name=state.name,
            digest=hashlib.sha256(data.fingerprint.encode()).hexdigest()[:16],  # MLflow takes 36 characters at most
            profile=json.dumps({f"n_{split}": n for split, n in data.n_rows.items()}),
        ),
    )


def _improvements(state: StudyState, acknowledged: Mapping[str, str]) -> Iterator[Operation]:
    n = len(state.improvements)
    if n == 0:
        return
    told = acknowledged.get("parent/best", "")
    first = int(told) if told.isdecimal() else 0
    points = [
        Point(name="best_objective", value=_sign(state) * i.objective, step=i.epochs, time_ms=_ms(i.time))
        for i in state.improvements[first:n]
    ]
    yield UpdateStudy(key="parent/best", revision=str(n), content=Content(points=tuple(points)))


def _status(state: StudyState, acknowledged: Mapping[str, str], running: bool) -> Iterator[Operation]:
    told = acknowledged.get("parent/status")
    if state.ended is not None:
        reason = state.ended.reason
        status: RunStatus = "FINISHED" if reason == "done" else "KILLED" if reason == "interrupted" else "FAILED"
        yield SetStatus(
            key="parent/status", revision=f"{status}@{state.last_at}", status=status, end_ms=_ms(state.last_at)
        )
    elif not running:
        yield SetStatus(
            key="parent/status", revision=f"KILLED@{state.last_at}", status="KILLED", end_ms=_ms(state.last_at)
        )
    elif told is not None and told != "RUNNING":
        yield SetStatus(key="parent/status", revision="RUNNING", status="RUNNING", end_ms=0)


# Children


def _lr_range(state: StudyState) -> LogChild:
    params: dict[str, str] = {}
    points: list[Point] = []
    end_ms = _ms(state.began.get("lr_range", state.opened_at) + state.stage_s.get("lr_range", 0.0))
    for found in state.ranges:
        label = _branch_label(found.branch)
        values = {"lr": found.lr, "low": found.low, "high": found.high, "spread_decades": found.spread_decades}
        for name, value in values.items():
            params[label + name] = _text(value)
            if value is not None:
                points.append(Point(name=label + name, value=value, step=0, time_ms=end_ms))
        params[label + "confirmed"] = _text(found.confirmed)
        params[label + "at_edge"] = _text(found.at_edge)
    ramps = {
        key: {"losses": result.values.get("losses"), "outcome": result.outcome}
        for key, result in list(state.results.items())
        if key.startswith(("ramp/", "probe/"))
    }
    suggestions = [
        {"branch": r.branch, "lr": r.lr, "low": r.low, "high": r.high, "spread_decades": r.spread_decades}
        for r in state.ranges
    ]
    # Ranges that were concluded anew have a run of their own: params cannot be changed.
    key = f"lr-range/{state.range_edits + 1}" if state.range_edits else "lr-range"
    return LogChild(
        key=key,
        revision=str(len(state.ranges)),
        name="lr-range",
        start_ms=_ms(state.began.get("lr_range", state.opened_at)),
        end_ms=end_ms,
        status="FINISHED",
        content=Content(
            params=_distinct(params),
            tags=_child_tags(state, key),
            points=tuple(points),
            texts={"lr_range.json": json.dumps(suggestions, indent=1), "ramps.json": json.dumps(ramps)},
            plots="lr-range",
        ),
    )


def _trial(state: StudyState, trial: TrialRecord, acknowledged: Mapping[str, str]) -> Iterator[LogChild]:
    trial_state = trial.state
    if trial_state not in STATUS_OF_TRIAL:
        return
    key, revision = f"trial/{trial.number}", f"{trial_state}@{trial.epoch}"
    if acknowledged.get(key) == revision:
        return  # before its curve is copied: this is asked for every trial, every time
    yield LogChild(
        key=key,
        revision=revision,
        name=f"trial-{trial.number:04d}",
        start_ms=_ms(_start(trial)),
        end_ms=_ms(_end(trial)),
        status=STATUS_OF_TRIAL[trial_state],
        content=Content(
            params=trial_params(trial),
            tags=_child_tags(state, key)
            | {"hpsearch.trial": str(trial.number), "hpsearch.state": trial_state.value}
            | ({"hpsearch.baseline": "true"} if trial.baseline else {})
            | {"hpsearch.diagnosis": ", ".join(each.finding for each in findings(trial))}
            | ({"mlflow.note.content": _failure(trial)} if trial.message else {}),
            points=tuple(_curve(trial) + _final(state, trial)),
        ),
    )


def trial_params(trial: TrialRecord) -> dict[str, str]:
    """A trial's config as MLflow keeps it, its seed, and log10_lr: the compare page has a linear axis."""
    params = {_name(name): _text(value)[:_MAX_PARAM] for name, value in trial.config.items()}
    lr = trial.config.get("lr")
    if isinstance(lr, int | float) and lr > 0:
        params.setdefault("log10_lr", f"{math.log10(lr):.6g}")
    params.setdefault("trial_seed", str(trial.seed))
    return params


def epoch_times(rows: Sequence[EpochMetrics], *, start: float, end: float) -> list[float]:
    """When each epoch ended, unix s, laid out backwards from the trial's last result.

    Pauses at rungs are not recorded by epoch, so epochs before one are told later than they were; never before `start`.
    """
    times = [end] * len(rows)
    for i in range(len(rows) - 2, -1, -1):
        times[i] = max(start, times[i + 1] - max(0.0, rows[i + 1].seconds))
    return times


def _curve(trial: TrialRecord) -> list[Point]:
    times = epoch_times(trial.curve, start=_start(trial), end=_end(trial))
    points = []
    for row, time in zip(trial.curve, times, strict=True):
        values = {_name(name): value for name, value in row.metrics.items()} | {"epoch_seconds": row.seconds}
        points += [Point(name=n, value=v, step=row.epoch, time_ms=_ms(time)) for n, v in values.items()]
    return points


def _final(state: StudyState, trial: TrialRecord) -> list[Point]:
    """`objective`, by which trials are compared, and what else was measured at that epoch."""
    if trial.best_objective is None or trial.best_epoch is None:
        return []
    values = {"objective": _sign(state) * trial.best_objective, "best_epoch": float(trial.best_epoch)}
    values |= {f"best/{_name(name)}": value for name, value in trial.best_metrics.items()}
    return [Point(name=n, value=v, step=trial.epoch, time_ms=_ms(_end(trial))) for n, v in values.items()]


def _ensemble(state: StudyState, selected: Selected) -> LogEnsemble:
    choice = _choice(state, selected)
    key = f"ensemble/{selected.n_trials}"
    run_key = f"{key}/{choice}"  # a run of its own: params cannot be changed, and a registered version names its run
    end = state.began.get("ensemble", state.opened_at) + state.stage_s.get("ensemble", 0.0)
    params = {f"member.{i}": f"trial {trial}, weight {weight:g}" for i, (trial, weight) in enumerate(selected.members)}
    params |= {"size": str(len(selected.members)), "best_single": str(selected.best)}
    points = [
        Point(name="ensemble_split_score", value=score, step=i, time_ms=_ms(end))
        for i, score in enumerate(selected.scores, start=1)
    ]
    for split in ("val", "test"):
        points += _points(split + "_", measured_metrics(state, split, selected.members), end)
    metric, goal, value = _test_score(state, selected)
    test = _fingerprint_if_used(state, selected)
    description = f"Ensemble of {len(selected.members)} from {selected.n_trials} trials of the study {state.name}."
    child = LogChild(
        key=run_key,
        revision=choice,
        name="ensemble",
        start_ms=_ms(state.began.get("ensemble", state.opened_at)),
        end_ms=_ms(end),
        status="FINISHED",
        content=Content(
            params=params,
            tags=_child_tags(state, run_key) | ({"hpsearch.tested_on": test} if test else {}),
            points=tuple(points),
            plots="ensemble",
        ),
    )
    spec_mlflow = _mapping(state.opened.spec.get("mlflow") if state.opened else None)
    registration = Registration(
        key=run_key,
        model=str(spec_mlflow.get("registered_model") or state.name),
        alias=str(spec_mlflow.get("alias") or "champion"),
        members=selected.members,
        test_fingerprint=test,
        metric=metric,
        goal=goal,
        test_value=value,
        description=description,
        beats_baseline=state.beats_baseline,
    )
    return LogEnsemble(key=key, revision=choice, child=child, registration=registration)


def _choice(state: StudyState, selected: Selected) -> str:
    """A digest that changes when another ensemble was chosen, or the same one of trials that had trained further.

    To 6 digits: a study that grew measures its ensemble again, and a GPU's last bits make no other ensemble.
    """
    compared = state.compared
    if compared is not None:
        compared = dataclasses.replace(compared, over_own={}, over_linear={})  # they say nothing of what is registered
    trials = [number for number, _ in selected.members] + [selected.best]
    told = {
        "selected": to_json(selected),
        "compared": to_json(compared) if compared is not None and compared.n_trials == selected.n_trials else None,
        "checkpoints": [state.trials[number].best_ref for number in trials],
    }
    return _digest(json.dumps(_to_6_digits(told), sort_keys=True))[:8]


def _to_6_digits(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): _to_6_digits(v) for k, v in value.items()}
    return [_to_6_digits(v) for v in value] if isinstance(value, list | tuple) else value


def _result(state: StudyState, selected: Selected) -> UpdateStudy:
    """The verdict in numbers. The tag on the test split is what makes its uses countable."""
    time = state.began.get("ensemble", state.opened_at) + state.stage_s.get("ensemble", 0.0)
    best = ((selected.best, 1.0),)
    points = _points("ensemble/test_", measured_metrics(state, "test", selected.members), time)
    points += _points("best/test_", measured_metrics(state, "test", best), time)
    compared = state.compared
    if compared is not None and compared.n_trials == selected.n_trials:
        points += _difference("gain", compared.gain, time)
    for name, measured in baselines(state).items():
        for split, metrics in _mapping(measured).items():
            points += _points(f"baseline/{name}/{split}_", _numbers(metrics), time)
    for row in state.evaluated.standings if state.evaluated is not None else ():
        told = {key: row[key] for key in ("searched", "mean", "corrected", "low", "high", "folds", "chance")}
        points += _points(f"evaluate/trial-{row['trial']}/", _numbers(told), time)
        scores = row["scores"]
        for fold, score in enumerate(scores if isinstance(scores, list | tuple) else ()):
            name = f"evaluate/trial-{row['trial']}/score"
            points.append(Point(name=name, value=float(score), step=fold, time_ms=_ms(time)))
    for row in state.confirmed.standings if state.confirmed is not None else ():
        told = {key: row[key] for key in ("searched", "confirmed", "optimism", "chance")}
        points += _points(f"confirm/trial-{row['trial']}/", _numbers(told), time)
    test = _fingerprint_if_used(state, selected)
    tags = {"hpsearch.best_trial": str(selected.best)} | ({TAG_TEST: test} if test else {})
    return UpdateStudy(
        key=f"parent/result/{selected.n_trials}",
        revision=_choice(state, selected),
        content=Content(points=tuple(points), tags=tags),
    )


def _lead(state: StudyState, selected: Selected) -> Iterator[UpdateStudy]:
    """Told by itself: a config of the user's that comes or goes makes no other ensemble, and nothing is said twice."""
    over = state.compared.over_own if state.compared is not None else {}
    own = state.own_trial
    if own is not None and over.get("trial") == own.number:
        time = state.began.get("ensemble", state.opened_at) + state.stage_s.get("ensemble", 0.0)
        yield UpdateStudy(
            key=f"parent/lead/{selected.n_trials}",
            revision=_digest(json.dumps(_to_6_digits(over), sort_keys=True))[:8],
            content=Content(points=tuple(_difference("lead_over_baseline", over, time))),
        )


def _difference(what: str, gain: Mapping[str, object], time: float) -> list[Point]:
    """A difference of two models with its interval, as far as it is known."""
    metric = _name(str(gain.get("metric", "loss")))
    numbers = {suffix: gain.get(name) for name, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))}
    return [
        Point(name=f"{what}/{metric}{suffix}", value=float(number), step=0, time_ms=_ms(time))
        for suffix, number in numbers.items()
        if isinstance(number, int | float)
    ]


# Words


def note_text(state: StudyState, notes: Sequence[Note]) -> str:
    """The description of the study's run, in Markdown: verdict first, then the user's notes; "" without either."""
    lines: list[str] = []
    best = winner(state) if state.search_ended else None
    if best is not None:
        trial = state.trials[best.trial]
        value = number(trial.best_metrics.get(state.metric))
        told = f"{best.trial}, {state.metric} {value} at epoch {trial.best_epoch}: {best.rule}"
        lines += [f"**Best trial**: {told}.", ""]
    for title, words in (("Cross-validated", fold_words(state)), ("Confirmed with fresh seeds", seed_words(state))):
        if words:
            metric = state.metric.removeprefix("val_")
            lines += [f"**{title}**, by the mean {metric}: {', '.join(words)}.", ""]
    selected = state.selected
    if selected is not None and "ensemble" in state.ended_stages:
        members = ", ".join(f"{trial} ({weight:.2g})" for trial, weight in selected.members)
        lines += [f"**Ensemble**: trials {members}.", ""] if len(selected.members) > 1 else []
        alone = ensemble_line(state).removeprefix("the ensemble is ")
        lines += [f"**Ensemble**: {alone}.", ""] if alone else []
        lines += _gain_words(state, selected)
    held_against = [*baseline_lines(state), *own_config_lines(state)] if selected is not None else []
    if held_against:
        lines += ["**Held against**", "", *(f"- {line}" for line in held_against), ""]
    if state.ended is not None and state.ended.reason != "done":
        lines += [f"**Ended**: {state.ended.reason}. {state.ended.message}".rstrip(), ""]
    if notes:
        lines += ["**Notes**", ""] + [f"- {_when(note.time)}: {note.text}" for note in notes]
    return "\n".join(lines).strip()


def _gain_words(state: StudyState, selected: Selected) -> list[str]:
    compared = state.compared
    if compared is None or compared.n_trials != selected.n_trials or "value" not in compared.gain:
        return []
    return [f"**On the test split**: {gain_line(state, compared.gain)}.", ""]


def _when(time: float) -> str:
    """To the minute.

    >>> _when(0.0)
    '1970-01-01 00:00 UTC'
    """
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _failure(trial: TrialRecord) -> str:
    return (trial.message + (f"\n\nat {trial.frame}" if trial.frame else ""))[:_MAX_TAG]


# Small parts


def _child_tags(state: StudyState, key: str) -> dict[str, str]:
    environment = state.opened.environment if state.opened else {}
    user = str(environment.get("user") or "")
    return {TAG_UID: state.uid, TAG_OP: key} | ({"mlflow.user": user} if user else {})


def _counts(state: StudyState) -> dict[str, str]:
    return {f"hpsearch.trials.{name.value}": str(n) for name, n in state.counts().items() if n}


def _remarks(state: StudyState) -> dict[str, str]:
    """What all trials together say about their space, one tag."""
    said = "; ".join(remark.words for remark in space_remarks(state))
    return {"hpsearch.remarks": said[:_MAX_TAG]} if said else {}


def _metric(state: StudyState) -> tuple[str, Literal["minimize", "maximize"]]:
    metric = _mapping(state.opened.spec.get("metric") if state.opened else None)
    return str(metric.get("name", "val_loss")), "maximize" if metric.get("goal") == "maximize" else "minimize"


def _sign(state: StudyState) -> float:
    return -1.0 if _metric(state)[1] == "maximize" else 1.0


def _test_score(state: StudyState, selected: Selected) -> tuple[str, Literal["minimize", "maximize"], float | None]:
    """The study's metric on test, or the loss where the metric is not measured there."""
    found = measured_metrics(state, "test", selected.members)
    name, goal = _metric(state)
    metric = name.removeprefix("val_")
    if metric not in found and "loss" in found:
        metric, goal = "loss", "minimize"
    return metric, goal, found.get(metric)


def _fingerprint_if_used(state: StudyState, selected: Selected) -> str:
    used = bool(
        measured_metrics(state, "test", selected.members) or measured_metrics(state, "test", ((selected.best, 1.0),))
    )
    return state.data.test_fingerprint if used and state.data is not None else ""


def _points(prefix: str, metrics: Mapping[str, float], time: float) -> list[Point]:
    return [Point(name=prefix + _name(k), value=v, step=0, time_ms=_ms(time)) for k, v in metrics.items()]


def _branch_label(branch: Config) -> str:
    """Prefix of a branch's numbers: "" when there is one branch, else its values, "adamw/"."""
    return "-".join(_name(_text(value)) for value in branch.values()) + "/" if branch else ""


def _distinct(params: Mapping[str, str]) -> dict[str, str]:
    return {_name(k): v for k, v in params.items()}


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Dotted keys of a nested mapping; a parameter of the space stays whole, as one line of JSON.

    >>> _flatten({"seed": 0, "search": {"trials": 64}, "parameters": {"lr": {"min": 0.1}}})
    {'seed': '0', 'search.trials': '64', 'parameters.lr': '{"min":0.1}'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = prefix + _name(str(key))
        if isinstance(value, Mapping) and prefix != "parameters.":
            flat |= _flatten(value, name + ".")
        elif value is not None:
            flat[name] = _text(value)
    return flat


def _text(value: object) -> str:
    """A value as its YAML reader would take it back."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def _name(name: str) -> str:
    """A name that MLflow takes for params, metrics and tags: no leading slash, no `..`, no odd characters."""
    cleaned = re.sub(r"[^\w.\- :/]", "_", name)
    parts = [part for part in cleaned.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:200] or "_"


def _numbers(found: object) -> dict[str, float]:
    return {str(k): float(v) for k, v in _mapping(found).items() if isinstance(v, int | float)}


def _mapping(found: object) -> Mapping[str, object]:
    return found if isinstance(found, Mapping) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _start(trial: TrialRecord) -> float:
    return trial.drawn_at if trial.started_at is None else trial.started_at


def _end(trial: TrialRecord) -> float:
    return max(_start(trial), trial.ended_at or 0.0)


def _ms(time: float) -> int:
    return round(time * 1000)
