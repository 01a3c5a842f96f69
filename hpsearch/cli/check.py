"""`check`: preflight alone, and how its verdicts are told."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from hpsearch.checks import Check
from hpsearch.cli.launch import check_fleet, make_fleet, make_launch
from hpsearch.cli.output import json_option, print_json
from hpsearch.cli.spec_verbs import SPACE
from hpsearch.cli.tracking import Keepsakes
from hpsearch.errors import OtherDataError, PreflightError, SpecError
from hpsearch.fleets import Fleet, Launch
from hpsearch.journal import FILE_NAME
from hpsearch.spec import read_spec
from hpsearch.stages.preflight import checks, kept_batch
from hpsearch.state import Entry, StudyState

WIDTH = 66  # of the names, dotted to the verdict


@click.command("check")
@click.argument("space", type=SPACE)
@click.option("--run-dir", type=click.Path(path_type=Path), default=None, help="Default: runs/<name>-check.")
@click.option("--workers", type=click.IntRange(min=1), default=None)
@click.option("--address", default=None, help="A Ray cluster, whose nodes are to train: auto, or host:port.")
@click.option(
    "--fleet", type=click.Choice(["tune", "local"]), default=None, help="Default: local; tune with --address."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, dotted; repeatable.")
@json_option
def check(
    space: Path,
    run_dir: Path | None,
    workers: int | None,
    address: str | None,
    fleet: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Preflight of SPACE alone: distrust the network and its data before anything is spent."""
    began = time.monotonic()
    spec = read_spec(space, overrides)
    if not spec.preflight.enabled:
        spec = spec.model_copy(update={"preflight": spec.preflight.model_copy(update={"enabled": True})})
    spec = spec.model_copy(update={"storage": None})
    where = fleet or ("local" if address is None else "tune")
    check_fleet(where, address, spec)
    run_dir = run_dir or Path("runs") / f"{spec.name}-check"
    run = make_launch(spec, space, run_dir, ("preflight",))
    state, failure = _asked(run, lambda: make_fleet(run, where, workers, address))
    found = checks(state)
    plots = [str(run_dir / "plots" / name) for name in Keepsakes(run_dir).try_to_draw("batch", state)]
    counts = {word: sum(each.status == word for each in found) for word in ("passed", "warned", "failed", "skipped")}
    if as_json:
        print_json(
            {
                "study": spec.name,
                "run_dir": str(run_dir),
                **counts,
                "checks": [each.as_json() for each in found],
                "plots": plots,
                "wall_s": round(time.monotonic() - began, 2),
            }
        )
    else:
        click.echo(f"{'space.yaml is valid'.ljust(WIDTH, '.')}Passed")
        for line in check_lines(found):
            click.echo(line)
        for line in batch_lines(state, plots):
            click.echo(line)
        told = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        click.echo(f"{told} in {time.monotonic() - began:.0f} s. Nothing was searched.")
    if failure is not None:
        click.get_current_context().exit(failure.exit_code)


def _asked(run: Launch, fleet: Callable[[], Fleet]) -> tuple[StudyState, PreflightError | None]:
    """The verdicts. Those of the same code, data and space are in the run directory already, and are not repeated."""
    for attempt in (1, 2):
        state, at_work = StudyState(), fleet()

        def watch(entries: Sequence[Entry], state: StudyState = state) -> None:
            for entry in entries:
                state.apply(entry.event, entry.time)

        try:
            # stdout carries results only: what the user's code prints in this process is progress.
            with contextlib.redirect_stdout(sys.stderr):
                at_work.run(watch)
        except PreflightError as error:
            return state, error
        except (SpecError, OtherDataError):
            if attempt == 2 or not (run.run_dir / FILE_NAME).exists():
                raise
            shutil.rmtree(run.run_dir)  # verdicts on another space, or on other data
        else:
            return state, None
        finally:
            at_work.close()
    raise AssertionError("the second attempt returns or raises")


def check_lines(found: Sequence[Check]) -> list[str]:
    """A line per check, dotted to its verdict; failures and warnings with their cause."""
    lines = []
    for check in _without_repeats(found):
        title = check.name + (f" ({check.where})" if check.where and check.code in ("builds", "overfit-two") else "")
        number = f"   {check.found}" if check.found and check.status == "passed" else ""
        reason = f"   {check.reason}" if check.status == "skipped" else ""
        lines.append(f"{title.ljust(WIDTH, '.')}{check.status.capitalize()}{number}{reason}")
        if check.status in ("failed", "warned"):
            lines.append(f"  {check.found} (expected {check.expected})")
            lines.append(f"  likeliest: {check.cause}")
            lines.append(f"  hint: {check.look_at}")
            if check.status == "failed":
                lines.append(f"  to let it pass: preflight: {{allow: [{check.code}]}}")
    return lines


def batch_lines(state: StudyState, plots: Sequence[str]) -> list[str]:
    """Where to look at a batch, or why there is none to look at."""
    if plots:
        return [f"look at a batch as the model receives it: {', '.join(plots)}"]
    reason = kept_batch(state).get("reason")
    return [f"no figure of a batch: {reason}"] if reason else []


def _without_repeats(found: Sequence[Check]) -> list[Check]:
    """Corners that passed are one line: what they have in common needs no repeating."""
    steps = [check for check in found if check.code == "builds"]
    if all(check.status == "passed" for check in steps) and len(steps) > 1:
        sizes = [check for check in steps if check.where in ("smallest", "largest")] or steps[:1]
        return [check for check in found if check.code != "builds" or check in sizes]
    return list(found)
