"""`status`, `top`, `note`, `sync`: the verbs that read a run directory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hpsearch.blobs import BlobStore
from hpsearch.cli.output import counted, json_option, number, print_json, say, table
from hpsearch.errors import UsageError
from hpsearch.events import Returned
from hpsearch.journal import is_locked, read_journal
from hpsearch.notes import add_note
from hpsearch.parsimony import AsGood, as_good, measured_error, read_within, row_scores_of, sized
from hpsearch.sentences import own_config_lines, training_line, winner_line
from hpsearch.space_diagnosis import findings, reference
from hpsearch.spec import Spec
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord, TrialState
from hpsearch.verdict import (
    chosen,
    diagnosis,
    epochs,
    lanes,
    lr_ranges,
    own_config,
    space_remarks,
    trial_counts,
    val_metrics,
)
from hpsearch.verdict import top as ranking
from hpsearch.winner import Winner, winner

RUN = click.Path(path_type=Path)
there_option = click.option("--address", default=None, help="Of a study that was submitted there: http://head:8265.")


def state_of(run: Path) -> StudyState:
    """The study of a run directory.

    Raises:
        UsageError: there is none.
        JournalError: its journal is damaged.
    """
    state = StudyState.of(read_journal(run))
    if state.opened is None:
        raise UsageError(f"{run} holds a journal without a study", hint="launch into this directory once more")
    if not is_locked(run):  # what a driver held when it went is in nobody's hands
        for lease in list(state.leases.values()):
            state.apply(Returned(key=lease.key, worker=lease.worker, reason="the driver went"), state.last_at)
    return state


@click.command("status")
@click.argument("run", type=RUN)
@there_option
@json_option
def status(run: Path, address: str | None, as_json: bool) -> None:
    """Where the study of RUN, a run directory, stands; with --address RUN may be the study's name."""
    if address is not None:
        from hpsearch.cli.remote import status_there

        status_there(str(run), address, as_json=as_json)
        return
    state = state_of(run)
    going = is_locked(run)
    best = winner(state)
    word = "running" if going else state.ended.reason if state.ended else "killed"
    counts = trial_counts(state)
    summary = {
        "study": state.name,
        "run_dir": str(run),
        "state": word,
        "stage": state.stage if going else "",
        "trials": counts,
        "running": sum(1 for trial in state.trials.values() if trial.state is TrialState.RUNNING) if going else 0,
        "epochs": epochs(state),
        "lanes": lanes(state),
        "precision": str(state.opened.spec.get("precision", "float32")) if state.opened is not None else None,
        "lr_range": lr_ranges(state),
        "best": None if best is None else _best(state.trials[best.trial]) | {"chosen": chosen(state)},
        "baseline": own_config(state),
        "diagnosis": diagnosis(state),
        "message": state.ended.message if state.ended else "",
    }
    if as_json:
        print_json(summary)
        return
    click.echo(f"{state.name}: {word}" + (f", in stage {state.stage}" if going and state.stage else ""))
    click.echo(counts_line(state))
    if training_line(state):
        click.echo(training_line(state))
    if best is not None:
        click.echo(best_text(state, best))
    for line in own_config_lines(state) + remark_lines(state):
        click.echo(line)
    if state.ended and state.ended.message:
        click.echo(state.ended.message)
    if not going and not state.done:
        click.echo(f"go on: hpsearch launch SPACE --run-dir {run} --resume")


def best_text(state: StudyState, best: Winner) -> str:
    """Who is the best, with the figures of its best epoch; how it was chosen, and who is the best by the search alone.

    As long as the study goes on, that is who is the best so far.
    """
    told = [_figures(state.trials[best.trial])]
    if best.final or best.by != "search":
        told.append(f"  {best.rule}")
    if best.searched != best.trial:
        told.append(f"  by the search alone: {_figures(state.trials[best.searched])}")
    return ("best " if best.final else "best so far: ") + "\n".join(told)


def _figures(trial: TrialRecord) -> str:
    figures = ", ".join(f"val_{name} {number(value)}" for name, value in val_metrics(trial).items())
    return f"trial {trial.number} at epoch {trial.best_epoch}: {figures}"


def _best(trial: TrialRecord) -> dict[str, object]:
    return {"trial": trial.number, "epoch": trial.best_epoch, "val": val_metrics(trial)}


@click.command("top")
@click.argument("run", type=RUN)
@click.option("-k", default=5, show_default=True, type=click.IntRange(min=1), help="How many trials.")
@click.option(
    "--smallest-within",
    default=None,
    metavar="1se",
    help="Instead: the smallest models whose score is within so many standard errors of the best.",
)
@there_option
@json_option
def top(run: Path, k: int, smallest_within: str | None, address: str | None, as_json: bool) -> None:
    """The ranking of RUN's trials by the search alone: by the best epoch of each; the winner is marked."""
    times = read_within(smallest_within) if smallest_within is not None else None
    if address is not None:
        from hpsearch.cli.remote import ask_there

        within = [f"--smallest-within={smallest_within}"] if smallest_within is not None else []
        ask_there("top", str(run), address, f"-k{k}", *within, *(["--json"] if as_json else []))
    state = state_of(run)
    if times is not None:
        _smallest(run, state, k, times, str(smallest_within), as_json=as_json)
        return
    rows = ranking(state, k)
    if as_json:
        print_json({"trials": rows})
        return
    click.echo(top_table(state, k))
    known = winner(state)
    if known is not None and known.final and known.trial != known.searched:
        click.echo(f"ranked by the search alone; {winner_line(state)}")
    click.echo(counts_line(state))
    for line in remark_lines(state):
        click.echo(line)


def top_table(state: StudyState, k: int) -> str:
    """The ranking as a table: the study's metric, then the parameters that differ between these trials."""
    assert state.opened is not None
    spec = Spec.from_dump(dict(state.opened.spec))
    metric = spec.metric.name
    trials = state.ranking()[:k]
    names = [p.name for p in spec.space.searched]
    shown = [name for name in dict.fromkeys(names) if any(name in trial.config for trial in trials)]
    known = reference(state, state.baseline_loss)
    rows = []
    for rank, trial in enumerate(trials, start=1):
        value = trial.best_metrics.get(metric)
        epoch = trial.best_epoch if trial.best_epoch is not None else trial.epoch
        name_of = _marked(state, trial.number)
        cells = [number(trial.config.get(name, "")) if name in trial.config else "" for name in shown]
        said = ", ".join(found.finding for found in findings(trial, known) if not trial.diverged)
        rows.append([str(rank), name_of, str(trial.state), number(value), str(epoch), *cells, said])
    return table(["rank", "trial", "state", metric, "epoch", *shown, "diagnosis"], rows)


def _marked(state: StudyState, number: int) -> str:
    """`24 (baseline)`, `4 (winner)`: what a ranking by the search does not tell of a trial."""
    best = winner(state)
    marks = ["baseline"] if state.trials[number].baseline else []
    marks += ["winner"] if best is not None and best.final and best.trial == number else []
    return f"{number} ({', '.join(marks)})" if marks else str(number)


def _smallest(run: Path, state: StudyState, k: int, times: float, within: str, *, as_json: bool) -> None:
    """The `k` smallest trials within some standard errors of the best score.

    Raises:
        UsageError: no trial has a score and a size yet, or the standard error is not known.
    """
    assert state.opened is not None
    spec = Spec.from_dump(dict(state.opened.spec))
    trials = sized(state)
    if not trials:
        raise UsageError(f"no trial of {run} has a score and a known number of parameters", hint=f"hpsearch top {run}")
    best = min(trials, key=lambda each: (each.score, each.trial)).trial
    with contextlib.closing(BlobStore(run)) as store:
        error = measured_error(state, best, store.arrays)
    if error is None:
        raise _unknown_error(state, spec, best)
    found = as_good(trials, error=error, times=times)
    sign = 1.0 if spec.metric.goal == "minimize" else -1.0
    if as_json:
        rows = {row["trial"]: row for row in ranking(state)}
        print_json(
            {
                "best": rows[best],
                "within": within,
                "standard_error": error,
                "threshold": sign * found.threshold,
                "trials": [rows[each.trial] for each in found.trials[:k]],
            }
        )
        return
    metric = spec.metric.name
    click.echo(_smallest_table(state, spec, found, k, sign))
    bound = "at most" if spec.metric.goal == "minimize" else "at least"
    known = winner(state)
    other = known is not None and known.final and known.trial != best
    click.echo(
        f"{len(found.trials)} of {len(trials)} trials have {metric} {bound} {number(sign * found.threshold)}: "
        f"within {within} of {'the searched best, ' if other else ''}trial {best}'s {number(sign * found.best.score)} "
        f"(1se is {number(error)})"
    )
    if known is not None and other:
        within_it = any(each.trial == known.trial for each in found.trials)
        click.echo(f"the winner, trial {known.trial}, is {'one' if within_it else 'none'} of them: {known.rule}")


def _smallest_table(state: StudyState, spec: Spec, found: AsGood, k: int, sign: float) -> str:
    shown = found.trials[:k]
    configs = {each.trial: state.trials[each.trial].config for each in shown}
    searched = dict.fromkeys(p.name for p in spec.space.searched)
    names = [name for name in searched if any(name in config for config in configs.values())]
    rows = [
        [
            f"{each.n_parameters:,}",
            _marked(state, each.trial),
            str(state.trials[each.trial].state),
            number(sign * each.score),
            str(state.trials[each.trial].best_epoch),
            *(number(configs[each.trial][name]) if name in configs[each.trial] else "" for name in names),
        ]
        for each in shown
    ]
    return table(["parameters", "trial", "state", spec.metric.name, "epoch", *names], rows)


def _unknown_error(state: StudyState, spec: Spec, best: int) -> UsageError:
    """What would have to be measured for the standard error to be known."""
    what = f"the standard error of trial {best}'s {spec.metric.name} is not known"
    if row_scores_of(state, best) is not None:
        return UsageError(
            f"{what}: the metric is no mean over rows",
            hint="write confirm: {seeds: 3} into space.yaml, whose stage measures it; then launch with --resume",
        )
    stages = [*(["confirm"] if spec.confirm.enabled else []), *(["ensemble"] if spec.ensemble.enabled else [])]
    if not stages:
        return UsageError(
            f"{what}, and no stage of this study measures it",
            hint="write confirm: {seeds: 3} into space.yaml, whose stage measures it; then launch with --resume",
        )
    return UsageError(
        f"{what} before stage {stages[0]} has ended",
        hint="wait for it, or go on with hpsearch launch --resume",
    )


def remark_lines(state: StudyState) -> list[str]:
    """What all trials together say about their space, with what to do about it."""
    lines = []
    for remark in space_remarks(state):
        lines.append(f"note: {remark.words}")
        if remark.hint:
            lines.append(f"  hint: {remark.hint}")
    return lines


def counts_line(state: StudyState) -> str:
    """`64 trials: 5 complete, 55 stopped, 4 diverged, 0 failed. 203 of 1,728 epochs trained.`"""
    counts = trial_counts(state)
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if name != "total")
    trained = epochs(state)["search"]
    full = sum(trial.max_epochs for trial in state.trials.values())
    return f"{counted(counts['total'], 'trial')}: {told}. {trained:,} of {full:,} epochs trained."


@click.command("note")
@click.argument("run", type=RUN)
@click.argument("text")
@json_option
def note(run: Path, text: str, as_json: bool) -> None:
    """Write TEXT into the logbook of RUN; `hpsearch sync` takes it to MLflow."""
    state = state_of(run)
    kept = add_note(run, text)
    if as_json:
        print_json({"study": state.name, "note": kept.text, "number": kept.number})
    else:
        click.echo(f"noted as number {kept.number}; hpsearch sync {run} takes it to MLflow.")


@click.command("sync")
@click.argument("run", type=RUN)
@click.option("--tracking-uri", default=None, help="Instead of MLFLOW_TRACKING_URI.")
@there_option
@json_option
def sync(run: Path, tracking_uri: str | None, address: str | None, as_json: bool) -> None:
    """Send to MLflow what it has not got of RUN yet."""
    if address is not None:
        from hpsearch.cli.remote import ask_there

        ask_there("sync", str(run), address, *(["--json"] if as_json else []), tracking_uri=tracking_uri)
    state = state_of(run)
    from hpsearch.cli.tracking import make_tracker
    from hpsearch.cli.tracking_uri import remembered_uri

    tracking_uri = tracking_uri or remembered_uri(state)
    with contextlib.closing(make_tracker(run, tracking_uri)) as tracker:
        report = tracker.sync(state, running=is_locked(run))
    report.raise_for_error()
    if as_json:
        print_json({"study": state.name, "sent": report.sent, "waiting": report.waiting, "mlflow": report.as_json()})
    else:
        say(f"{counted(report.sent, 'operation')} sent, {report.waiting} waiting.")
        click.echo(f"{report.tracking_uri} experiment {report.experiment_id} run {report.run_id}")
