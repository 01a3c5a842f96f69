"""`launch` and `lr-find`: run a study and say what it came to."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpsearch.assembly import STAGES
from hpsearch.cli.adapters import make_executor, make_sampler
from hpsearch.cli.display import Display
from hpsearch.cli.environment import environment
from hpsearch.cli.output import counted, json_option, print_json, say
from hpsearch.cli.refill import refill
from hpsearch.cli.remote import Order, is_remote, run_there
from hpsearch.cli.resume import check_new, check_resumed, command_again, earlier_study, nothing_to_do, wait_for_lock
from hpsearch.cli.run_verbs import counts_line
from hpsearch.cli.spec_verbs import SPACE
from hpsearch.cli.tracking_uri import remembered_uri, to_remember
from hpsearch.cli.verdict_text import lr_table, verdict_text
from hpsearch.errors import NoUsableTrial, UsageError
from hpsearch.events import Arrived, Ended, Leased, StageBegan
from hpsearch.fleets import Fleet, Launch
from hpsearch.forecast import ConfirmForecast, FoldForecast, forecast
from hpsearch.rungs import rung_epochs
from hpsearch.spec import Spec, read_spec
from hpsearch.state import Entry, StudyState
from hpsearch.task_code import task_code
from hpsearch.verdict import epochs, lr_ranges, verdict

if TYPE_CHECKING:
    from hpsearch.tracker import SyncReport

GO_S = 15.0  # that Ray may take to go after an interruption


@click.command("launch")
@click.argument("space", type=SPACE)
@click.option("--run-dir", type=click.Path(path_type=Path), default=None, help="Default: runs/<name>.")
@click.option("--resume", is_flag=True, help="Go on with the study of the run directory; start where there is none.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Default: as many as the resources hold.")
@click.option("--address", default=None, help="A Ray cluster: auto on its head, http://head:8265 from elsewhere.")
@click.option("--fleet", type=click.Choice(["tune", "local"]), default="tune", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, dotted; repeatable.")
@click.option("--tracking-uri", default=None, help="Instead of MLFLOW_TRACKING_URI.")
@click.option("--skip-preflight", is_flag=True, help="Search without the checks; MLflow is told.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
def launch(
    space: Path,
    run_dir: Path | None,
    resume: bool,
    workers: int | None,
    address: str | None,
    fleet: str,
    overrides: tuple[str, ...],
    tracking_uri: str | None,
    skip_preflight: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """The whole study of SPACE, a space.yaml: LR range, search, ensemble, MLflow."""
    started_at = time.monotonic()
    spec = read_spec(space, overrides)
    check_fleet(fleet, address, spec)
    if address is not None and is_remote(address) and not dry_run:
        flags = {"--resume": resume, "--skip-preflight": skip_preflight, "--json": as_json}
        run_there(
            Order(
                verb="launch",
                space=space,
                spec=spec,
                address=address,
                run_dir=run_dir,
                workers=workers,
                overrides=overrides,
                tracking_uri=tracking_uri,
                flags=tuple(flag for flag, given in flags.items() if given),
            )
        )
    run_dir = run_dir or Path("runs") / spec.name
    folder = space.resolve().parent
    if dry_run:
        if resume:
            check_resumed(run_dir, spec, folder)
        _tell_plan(spec, run_dir, folder, as_json, lacks_gpu=address is None and _lacks_gpu(spec))
        return
    refill(run_dir, spec, resume=resume, again=command_again(run_dir))
    if resume:
        check_resumed(run_dir, spec, folder)
        wait_for_lock(run_dir)
    else:
        check_new(run_dir, spec, folder, again=command_again(run_dir))
    stages = tuple(stage for stage in STAGES if stage != "preflight" or not skip_preflight)
    tracking_uri = tracking_uri or remembered_uri(earlier_study(run_dir))
    run = make_launch(spec, space, run_dir, stages, tracking_uri)
    session = Session(run, tracking_uri, started_at)
    if resume and nothing_to_do(run_dir, spec, folder, stages):
        session.tell_again()
    else:
        session.run(make_fleet(run, fleet, workers, address), again=command_again(run_dir))
    outcome = session.verdict()
    if as_json:
        print_json(outcome)
    else:
        click.echo(verdict_text(session.state, outcome, session.report, tracking_uri))
        click.echo(_kept_line(run_dir))
    if session.state.beats_baseline is False:
        click.get_current_context().exit(NoUsableTrial.exit_code)


@click.command("lr-find")
@click.argument("space", type=SPACE)
@click.option("--run-dir", type=click.Path(path_type=Path), default=None, help="Default: a new runs/<name>-lr-find.")
@click.option("--workers", type=click.IntRange(min=1), default=None)
@click.option("--address", default=None, help="A Ray cluster, as of launch.")
@click.option("--fleet", type=click.Choice(["tune", "local"]), default="tune", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, dotted; repeatable.")
@click.option("--tracking-uri", default=None, help="Instead of MLFLOW_TRACKING_URI.")
@json_option
def lr_find(
    space: Path,
    run_dir: Path | None,
    workers: int | None,
    address: str | None,
    fleet: str,
    overrides: tuple[str, ...],
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """The learning rates worth searching in each branch of SPACE."""
    started_at = time.monotonic()
    spec = read_spec(space, overrides)
    check_fleet(fleet, address, spec)
    if address is not None and is_remote(address):
        run_there(
            Order(
                verb="lr-find",
                space=space,
                spec=spec,
                address=address,
                run_dir=run_dir,
                workers=workers,
                overrides=overrides,
                tracking_uri=tracking_uri,
                flags=("--json",) if as_json else (),
            )
        )
    run_dir = run_dir or _fresh(Path("runs") / f"{spec.name}-lr-find")
    check_new(run_dir, spec, space.resolve().parent)
    spec = spec.model_copy(update={"storage": None})  # some minutes' ramps, which must not be taken for the study
    run = make_launch(spec, space, run_dir, ("lr_range",))
    session = Session(run, tracking_uri, started_at)
    session.run(make_fleet(run, fleet, workers, address), again="")
    plot = run_dir / "plots" / "lr_range.png"
    if as_json:
        print_json(
            {
                "study": spec.name,
                "run_dir": str(run_dir),
                "lr_range": lr_ranges(session.state),
                "epochs": epochs(session.state)["lr_range"],
                "wall_s": round(session.wall_s, 2),
                "plot": str(plot) if plot.exists() else None,
                "mlflow": dict(session.mlflow),
            }
        )
    else:
        click.echo(lr_table(session.state))
        if plot.exists():
            click.echo(f"plot: {plot}")


class Session:
    """One launch from its start to its verdict: fleet, display and tracker around one state."""

    def __init__(self, run: Launch, tracking_uri: str | None, started_at: float) -> None:
        from hpsearch.cli.tracking import Tracking

        self.state = StudyState()
        self.mlflow: Mapping[str, object] = {}
        self.report: SyncReport | None = None
        self._run = run
        self._started_at = started_at
        self._start_s = 0.0
        self._tracking_s = 0.0
        self._tracking = Tracking(run, tracking_uri)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started_at

    def run(self, fleet: Fleet, *, again: str) -> None:
        """Run the study to its end, with MLflow told as it goes.

        Args:
            again: the command that goes on with an interrupted study, "" where there is none.
        """
        display = Display(self.state)

        earlier = earlier_study(self._run.run_dir)
        if earlier.done:
            say(f"{self._run.run_dir} holds this study, done; it goes on where there is more to do")
        elif earlier.trials:
            say(f"resuming {self._run.run_dir}: {counts_line(earlier)}")

        def watch(entries: Sequence[Entry]) -> None:
            new = [entry for entry in entries if entry.seq >= earlier.n_entries]
            if any(isinstance(entry.event, Arrived | Leased) for entry in new):
                self._tracking.start()  # workers begin first; MLflow would take their cores
            for entry in entries:
                self.state.apply(entry.event, entry.time)
            if not self._start_s and any(isinstance(entry.event, StageBegan | Ended) for entry in new):
                self._start_s = self.wall_s
            display.show(new)

        signal.signal(signal.SIGTERM, _interrupt)  # a spot node's notice is worth a Ctrl-C
        try:
            # stdout carries results only: what the user's code prints in this process is progress.
            with display, contextlib.redirect_stdout(sys.stderr):
                fleet.run(watch)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                say("interrupted; what was finished is kept." + (f" Go on: {again}" if again else ""))
            closing = _in_thread(fleet.close)
            self._tracking.close(self.state, timeout_s=5.0)
            closing.join(timeout=GO_S)
            raise
        closing = _in_thread(fleet.close)  # Ray takes seconds to go; MLflow is told meanwhile
        tracking_began = time.monotonic()
        self.report = self._tracking.close(self.state)
        self.mlflow = self.report.as_json()
        self._tracking_s = time.monotonic() - tracking_began
        closing.join()

    def tell_again(self) -> None:
        """Take a study that is through, with nothing to train: MLflow gets what it lacks, figures are kept."""
        say(f"{self._run.run_dir} holds this study, done; nothing is left to train")
        self.state = earlier_study(self._run.run_dir)
        began = time.monotonic()
        self.report = self._tracking.close(self.state)
        self.mlflow = self.report.as_json()
        self._tracking_s = time.monotonic() - began

    def verdict(self) -> dict[str, object]:
        """The object that `launch --json` ends with."""
        return verdict(
            self.state,
            run_dir=str(self._run.run_dir),
            wall_s=self.wall_s,
            stages_s={"start": self._start_s, "tracking": self._tracking_s},
            mlflow=self.mlflow,
        )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def make_fleet(run: Launch, fleet: str, workers: int | None, address: str | None) -> Fleet:
    """The fleet that --fleet names."""
    if fleet == "local":
        from hpsearch.fleets.local import LocalFleet

        return LocalFleet(run, workers=workers or 1)
    from hpsearch.fleets.tune import TuneFleet

    return TuneFleet(run, workers=workers, address=address, say=say)


def make_launch(
    spec: Spec, space: Path, run_dir: Path, stages: tuple[str, ...], tracking_uri: str | None = None
) -> Launch:
    """A launch of these stages, with what `hpsearch sync` has to know later.

    Args:
        tracking_uri: as the command line gave it.
    """
    folder = space.resolve().parent
    more: dict[str, object] = {} if "preflight" in stages else {"preflight": "skipped"}
    if tracking_uri is not None:
        more |= to_remember(tracking_uri)
    return Launch(
        run_dir=run_dir.resolve(),
        spec=spec,
        folder=folder,
        make_sampler=make_sampler,
        make_executor=make_executor,
        spec_text=space.read_text(encoding="utf-8"),
        environment=environment(folder) | more,
        code=task_code(spec.task, folder),
        stages=stages,
    )


def check_fleet(fleet: str, address: str | None, spec: Spec) -> None:
    """Raises UsageError where the fleet cannot be what the command line and the spec ask for."""
    if fleet == "local" and spec.resources.gpus > 1:
        raise UsageError(
            f"resources.gpus is {spec.resources.gpus:g}, and a worker of several GPUs is several processes, which "
            "--fleet local does not start: it runs everything in this one",
            hint="leave --fleet out, or try it with --set resources.gpus=1",
        )
    if fleet == "local" and _lacks_gpu(spec):
        raise UsageError(
            f"a worker asks for {spec.resources.gpus:g} GPU; torch finds none on this machine",
            hint="--set resources.gpus=0 does without, and --address names a cluster that has one",
        )
    if address is not None and fleet == "local":
        raise UsageError(
            "--address names a Ray cluster, which --fleet local does not use", hint="leave one of them out"
        )
    if address is not None and address.startswith("ray://"):
        host = address.removeprefix("ray://").rpartition(":")[0] or "HEAD"
        raise UsageError(
            f"--address {address}: a study is not driven through Ray's client, since its journal lies with its driver",
            hint=f"submit it: --address http://{host}:8265; or launch on the head with --address auto",
        )


def _lacks_gpu(spec: Spec) -> bool:
    """Whether workers ask for GPUs that torch does not find here."""
    if not spec.resources.gpus:
        return False
    from hpsearch.training.memory import has_gpu

    return not has_gpu()


def _kept_line(run_dir: Path) -> str:
    """Where everything lies, with the plots where there are some."""
    drawn = len(list((run_dir / "plots").glob("*.png")))
    plots = f"; {counted(drawn, 'plot')} in {run_dir / 'plots'}" if drawn else ""
    return f"run directory: {run_dir}{plots}"


def _fresh(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that is not there."""
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, sys.maxsize))
    return next(candidate for candidate in candidates if not candidate.exists())


def _tell_plan(spec: Spec, run_dir: Path, folder: Path, as_json: bool, *, lacks_gpu: bool) -> None:
    """What a launch would train and keep.

    Args:
        lacks_gpu: a worker asks for a GPU, and this machine, which is to train, has none.
    """
    stopping = spec.early_stopping
    halving = stopping.enabled and stopping.type in ("asha", "sha")
    rungs = rung_epochs(stopping.min_epochs, stopping.max_epochs, stopping.reduction_factor) if halving else ()
    branches = [*spec.space.branches(spec.per)] if spec.measures_lr else []
    rungs = (*rungs, stopping.max_epochs)
    with contextlib.redirect_stdout(sys.stderr):  # the task's code may print
        disk = forecast(spec, folder, run_dir)
    folds, confirmation = FoldForecast.of(spec), ConfirmForecast.of(spec)
    own = spec.baseline is not None
    earlier = earlier_study(run_dir)
    limit = spec.budget.epochs
    expected = _expected_epochs(spec, rungs[:-1]) + own * stopping.max_epochs
    plan = {
        "study": spec.name,
        "run_dir": str(run_dir),
        "dry_run": True,
        "trials": spec.search.trials,
        "searched_parameters": spec.space.n_dims,
        "rungs": rungs,
        "baseline": own,
        "epochs_without_stopping": (spec.search.trials + own) * stopping.max_epochs,
        "epochs_expected": expected if limit is None else min(limit, expected),
        "epochs_budget": limit,
        "done": earlier.done,
        "trials_behind": len(earlier.trials),
        "epochs_behind": epochs(earlier)["search"],
        "evaluate": None if folds is None else asdict(folds),
        "confirm": None if confirmation is None else asdict(confirmation),
        "ramps": len(branches) * spec.lr_range.seeds,
        "branches": branches,
        "disk": disk.as_json(),
    }
    if as_json:
        print_json(plan)
        return
    click.echo(
        f"{spec.name}: {counted(spec.search.trials, 'trial')} over "
        f"{counted(spec.space.n_dims, 'searched parameter')}" + (", and your baseline config" if own else "")
    )
    if branches:
        ramps = counted(len(branches) * spec.lr_range.seeds, "ramp")
        click.echo(f"LR range: {ramps} of {spec.lr_range.steps} steps in {counted(len(branches), 'branch')}")
    else:
        click.echo("LR range: none (no parameter has bounds_from: lr_range)")
    click.echo(f"ranked by {spec.metric.name}, {'lower' if spec.metric.goal == 'minimize' else 'higher'} is better")
    click.echo(f"rungs at epochs {', '.join(map(str, rungs))}")
    capped = f"; budget.epochs ends the search at {limit:,}" if limit is not None and limit < expected else ""
    click.echo(f"epochs: about {expected:,} of {plan['epochs_without_stopping']:,} without early stopping{capped}")
    for stage in (folds, confirmation):
        if stage is not None:
            click.echo(stage.line())
    for line in disk.lines():
        click.echo(line)
    if lacks_gpu:
        click.echo(
            f"warning[gpu]: a worker asks for {spec.resources.gpus:g} GPU, and torch finds none on this machine\n"
            "  hint: name a cluster with --address, or --set resources.gpus=0"
        )
    if earlier.opened is not None:
        what = "this study" if earlier.opened.study == spec.name else f"another study, {earlier.opened.study!r}"
        click.echo(
            f"{run_dir} holds {what}{', done' if earlier.done else ''}: {counted(len(earlier.trials), 'trial')} and "
            f"{counted(epochs(earlier)['search'], 'epoch')} are behind it, and are not trained again"
        )
    click.echo(f"run directory: {run_dir}. Nothing was started.")


def _expected_epochs(spec: Spec, rungs: tuple[int, ...]) -> int:
    """Epochs of a synchronous halving over these rungs, with the end-game; asynchronously 10 to 20 % more."""
    stopping, n = spec.early_stopping, spec.search.trials
    total, before, entering = 0, 0, n
    for rung in rungs:
        total += entering * (rung - before)
        before, entering = rung, entering // stopping.reduction_factor
    finishing = max(entering, min(spec.ensemble.size if spec.ensemble.enabled else 1, n)) if rungs else n
    return total + finishing * (stopping.max_epochs - before)


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
