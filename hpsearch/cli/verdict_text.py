"""The verdict as a person reads it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpsearch.cli.output import interval, number, table, tool
from hpsearch.cli.run_verbs import counts_line, remark_lines
from hpsearch.events import Confirmed, Evaluated
from hpsearch.sentences import (
    baseline_lines,
    ensemble_line,
    gain_line,
    own_config_lines,
    training_line,
    winner_line,
)
from hpsearch.state import StudyState
from hpsearch.tracker.outbox import redact
from hpsearch.verdict import baselines
from hpsearch.winner import ranking_mean

if TYPE_CHECKING:
    from hpsearch.tracker import SyncReport


def verdict_text(
    state: StudyState, outcome: Mapping[str, object], report: SyncReport | None, tracking_uri: str | None
) -> str:
    """A short readable verdict: best trial, ensemble, test scores with intervals, MLflow, the next command."""
    best, ensemble = _mapping(outcome["best"]), _mapping(outcome["ensemble"])
    span = "in all" if len(state.resumed_at) <= 1 else "of this launch"
    lines = [f"{outcome['study']}: {counts_line(state)} {outcome['wall_s']} s {span}.", ""]
    if training_line(state):
        lines.insert(1, training_line(state))
    lines.append(_scores(best, ensemble))
    if best:
        config = ", ".join(f"{k}={number(v)}" for k, v in _mapping(best["config"]).items())
        whose = "" if state.metric == "val_loss" else f" (its best {state.metric})"
        lines.append(f"trial {best['trial']}, epoch {best['epoch']}{whose}: {config}")
        lines.append(winner_line(state))
    members = ensemble.get("members")
    if isinstance(members, list) and len(members) > 1:
        told = ", ".join(f"trial {m['trial']} × {m['weight']:.2f}" for m in members)
        lines.append(f"ensemble: {told}")
    if ensemble_line(state):
        lines.append(ensemble_line(state))
    if not isinstance(members, list) or _differs(members, best):
        lines.append(gain_line(state, _mapping(ensemble.get("gain"))))
    lines += _evaluated_lines(state)
    lines += _confirmed_lines(state)
    lines += _baseline_lines(state)
    lines += own_config_lines(state)
    lines += [f"trial {best['trial']}: {said}" for said in _listed(_mapping(outcome["diagnosis"]).get("best"))]
    lines += _notes(state) + remark_lines(state)
    if report is not None and report.test_uses is not None and report.test_uses > 1:
        lines.append(
            f"note: {report.test_uses} studies of this experiment have opened this test split, this one included"
        )
    lines.append("")
    lines += _mlflow_lines(_mapping(outcome["mlflow"]), str(outcome["run_dir"]), tracking_uri)
    if report is not None and report.alias is None and report.alias_why:
        lines.append(f"  the alias stays where it is: {report.alias_why}")
    return "\n".join(lines)


def lr_table(state: StudyState) -> str:
    """The measured ranges as a table."""
    rows = []
    for measured in state.ranges:
        branch = ", ".join(f"{k}={v}" for k, v in measured.branch.items()) or "all"
        notes = [
            *(["confirmed by probes"] if measured.confirmed else []),
            *(["at an edge"] if measured.at_edge else []),
        ]
        figures = [number(measured.lr), number(measured.low), number(measured.high), number(measured.spread_decades)]
        rows.append([branch, *figures, ", ".join(notes)])
    return table(["branch", "lr", "low", "high", "spread (decades)", ""], rows)


def _scores(best: Mapping[str, object], ensemble: Mapping[str, object]) -> str:
    """Best trial and ensemble, row by row; test columns carry their 95 % interval."""
    rows, header = [], [""]
    names = list(_mapping(best.get("val")))
    has_test = bool(_mapping(best.get("test")))
    header += [f"val {name}" for name in names] + ([f"test {name}" for name in names] if has_test else [])
    members = ensemble.get("members")
    n_members = len(members) if isinstance(members, list) else 0
    sources = [(f"best trial, {best.get('trial')}", best)]
    if isinstance(members, list) and _differs(members, best):
        sources.append((f"ensemble of {n_members}", ensemble))
    for title, source in sources:
        val, test, bounds = (_mapping(source.get(key)) for key in ("val", "test", "test_intervals"))
        cells = [number(val.get(name)) for name in names]
        if has_test:
            cells += [interval(test.get(name), bounds.get(name)) for name in names]
        rows.append([title, *cells])
    text = table(header, rows)
    return text + (
        "\n(95 % intervals; val ranked the trials, so its figures flatter)" if has_test else "\n(no test split)"
    )


def _differs(members: list[dict[str, object]], best: Mapping[str, object]) -> bool:
    """Whether the ensemble is anything but the best trial alone."""
    return [member["trial"] for member in members] != [best.get("trial")]


def _evaluated_lines(state: StudyState) -> list[str]:
    """What the folds say of the best few, and who was given up on the way."""
    found = state.evaluated
    if found is None:
        return []
    rows = [
        [
            f"trial {row['trial']}",
            number(row["searched"]),
            interval(row["mean"], row),
            str(row["epoch"]),
            f"{row['folds']} of {found.folds * found.repeats}",
            "given up" if row["chance"] is None else f"{float(str(row['chance'])):.0%}",
        ]
        for row in found.standings
    ]
    metric, epoch = state.metric.removeprefix("val_"), "folds' epoch"
    header = ["cross-validated", f"searched {metric}", f"mean {metric} of folds", epoch, "folds", "chance by folds"]
    lines = ["", *table(header, rows).splitlines()] if rows else []
    if rows:
        lines.append(_mean_note(found.standings[0], "corrected", len(rows)))
    lines += _cut_short("cross-validation", found, "folds of each")
    if found.out:
        told = ", ".join(map(str, found.out))
        lines.append(f"note: out of the race, since training on some fold went wrong: trial {told}")
        lines += [f"  {why}" for why in _faults(state, found.out)]
    return lines


def _cut_short(what: str, found: Evaluated | Confirmed, of: str) -> list[str]:
    """How a stage went that a budget ended; nothing of one that was not."""
    if not found.reason:
        return []
    if found.standings:
        return [f"note: {what} was ended by {found.reason}; the order is by what there was"]
    return [f"note: {what} was ended by {found.reason}, with too few {of} to tell: the order before it stands"]


def _mean_note(first: Mapping[str, object], corrected: str, n: int) -> str:
    """How a table is ordered, and what the mean of whoever comes first is worth."""
    told = "(ranked by the mean, with 95 % intervals"
    if n > 1 and first[corrected] != ranking_mean(first):
        told += f"; the first of {n} is flattered by being so: {number(first[corrected])} is expected of it"
    return f"{told})"


def _faults(state: StudyState, trials: Sequence[int]) -> list[str]:
    """What went wrong on the folds of some trials, each message once, with the first trial that met it."""
    first: dict[str, int] = {}
    for trial in trials:
        for key, run in state.results.items():
            if key.startswith(f"fold/{trial}/") and run.outcome != "done":
                first.setdefault(run.message, trial)
                break
    return [f"trial {trial}: {message}" for message, trial in first.items()]


def _confirmed_lines(state: StudyState) -> list[str]:
    """What fresh seeds on fresh rows say of the best few, and how far the search flattered them."""
    if state.confirmed is None:
        return []
    rows = [
        [
            f"trial {row['trial']}",
            number(row["searched"]),
            interval(ranking_mean(row), row),
            number(row["optimism"]),
            str(row["seeds"]),
            f"{float(str(row['chance'])):.0%}",
        ]
        for row in state.confirmed.standings
    ]
    metric = state.metric.removeprefix("val_")
    title = f"mean {metric} of seeds, fresh rows"
    header = ["confirmed", f"searched {metric}", title, "optimism", "seeds", "chance by seeds"]
    lines = ["", *table(header, rows).splitlines()] if rows else []
    if rows:
        lines.append(_mean_note(state.confirmed.standings[0], "confirmed", len(rows)))
    lines += _cut_short("confirmation", state.confirmed, "fresh seeds of each")
    if state.confirmed.out:
        told = ", ".join(map(str, state.confirmed.out))
        lines.append(f"note: out of the race, since a fresh run went wrong: trial {told}")
    return lines


def _baseline_lines(state: StudyState) -> list[str]:
    """What the study is held against, on the split that tells."""
    lines = baseline_lines(state)
    over = _mapping(baselines(state).get("gain"))
    if over.get("better") is False:
        lines.append(
            f"warning: nothing here is better than ignoring the inputs: {over['split']} {over['metric']} differs by "
            f"{interval(over['value'], over)} on {over['n_rows']} rows. No version becomes champion."
        )
        lines.append("  hint: do the inputs say anything of the targets? Are rows and labels in the same order?")
    return lines


def _notes(state: StudyState) -> list[str]:
    """What a reader should know before trusting the best trial's config."""
    return [f"note: the search was ended by {state.budget_spent}"] if state.budget_spent else []


def _mlflow_lines(mlflow: Mapping[str, object], run_dir: str, tracking_uri: str | None) -> list[str]:
    if not mlflow.get("run_id"):
        where = f" --tracking-uri {shlex.quote(redact(tracking_uri))}" if tracking_uri else ""
        sync = f"{tool('hpsearch')} sync {shlex.quote(run_dir)}{where}"
        return [f"MLflow has not got this study yet; {sync} sends what waits."]
    uri = str(mlflow["tracking_uri"])
    lines = [f"MLflow: {uri}, experiment {mlflow['experiment_id']}, run {mlflow['run_id']}"]
    page = f"/#/experiments/{mlflow['experiment_id']}/runs?compareRunsMode=CHART"
    if uri.startswith("http"):
        lines.append(f"  open it:  {uri.rstrip('/')}{page}")
    else:
        lines.append(f"  open it:  {tool('mlflow')} ui --backend-store-uri {shlex.quote(uri)}")
        lines.append(f"            then http://127.0.0.1:5000{page}")
    if mlflow.get("model"):
        where = f" --tracking-uri {shlex.quote(uri)}" if tracking_uri else ""
        name, version, alias = mlflow["model"], mlflow["version"], mlflow.get("alias")
        select = f"--alias {alias}" if alias else f"--version {version}"
        lines.append(f"  model {name}, version {version}" + (f", alias {alias}" if alias else ""))
        lines.append(f"  get it:   {tool('hpsearch')} pull {shlex.quote(str(name))} {select} --out {name}-model{where}")
    return lines


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
