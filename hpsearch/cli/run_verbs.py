"""`status`, `top`, `note`, `sync`: the verbs that read a run directory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from hpsearch.cli.output import json_option, number, print_json, say, table
from hpsearch.errors import NotBuiltYet, UsageError
from hpsearch.events import Returned
from hpsearch.journal import is_locked, read_journal
from hpsearch.notes import add_note
from hpsearch.space_diagnosis import findings, reference
from hpsearch.spec import Spec
from hpsearch.state import StudyState
from hpsearch.trial import TrialState
from hpsearch.verdict import diagnosis, epochs, lr_ranges, space_remarks, trial_counts, val_metrics
from hpsearch.verdict import top as ranking

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
    best = state.best()
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
        "lr_range": lr_ranges(state),
        "best": None if best is None else {"trial": best.number, "epoch": best.best_epoch, "val": val_metrics(best)},
        "diagnosis": diagnosis(state),
        "message": state.ended.message if state.ended else "",
    }
    if as_json:
        print_json(summary)
        return
    click.echo(f"{state.name}: {word}" + (f", in stage {state.stage}" if going and state.stage else ""))
    click.echo(counts_line(state))
    if best is not None:
        figures = ", ".join(f"val_{name} {number(value)}" for name, value in val_metrics(best).items())
        click.echo(f"best so far: trial {best.number} at epoch {best.best_epoch}: {figures}")
    for line in remark_lines(state):
        click.echo(line)
    if state.ended and state.ended.message:
        click.echo(state.ended.message)
    if not going and not state.done:
        click.echo(f"go on: hpsearch launch SPACE --run-dir {run} --resume")


@click.command("top")
@click.argument("run", type=RUN)
@click.option("-k", default=5, show_default=True, type=click.IntRange(min=1), help="How many trials.")
@click.option("--smallest-within", hidden=True, default=None)
@there_option
@json_option
def top(run: Path, k: int, smallest_within: str | None, address: str | None, as_json: bool) -> None:
    """The ranking of RUN's trials, by the best epoch of each."""
    if smallest_within is not None:
        raise NotBuiltYet("`top --smallest-within` is not built yet")
    if address is not None:
        from hpsearch.cli.remote import ask_there

        ask_there("top", str(run), address, f"-k{k}", *(["--json"] if as_json else []))
    state = state_of(run)
    rows = ranking(state, k)
    if as_json:
        print_json({"trials": rows})
        return
    click.echo(top_table(state, k))
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
        cells = [number(trial.config.get(name, "")) if name in trial.config else "" for name in shown]
        said = ", ".join(found.finding for found in findings(trial, known) if not trial.diverged)
        rows.append([str(rank), str(trial.number), str(trial.state), number(value), str(epoch), *cells, said])
    return table(["rank", "trial", "state", metric, "epoch", *shown, "diagnosis"], rows)


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
    return f"{counts['total']} trials: {told}. {trained:,} of {full:,} epochs trained."


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

    with contextlib.closing(make_tracker(run, tracking_uri)) as tracker:
        report = tracker.sync(state, running=is_locked(run))
    report.raise_for_error()
    if as_json:
        print_json({"study": state.name, "sent": report.sent, "waiting": report.waiting, "mlflow": report.as_json()})
    else:
        say(f"{report.sent} operations sent, {report.waiting} waiting.")
        click.echo(f"{report.tracking_uri} experiment {report.experiment_id} run {report.run_id}")
