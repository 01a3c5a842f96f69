"""Verbs for a cluster that this machine is no part of: `--address http://head:8265`.

The study runs there as a job. Here its progress is followed, and its result printed as if it had run here.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from hpsearch.cli.output import print_json, say, tool
from hpsearch.errors import Problem, SpecError, UsageError
from hpsearch.fleets.shipping import STUDY, pack, pack_alone
from hpsearch.spec import Spec

if TYPE_CHECKING:
    from hpsearch.fleets.job_log import Outcome
    from hpsearch.fleets.submission import Head

# Where MLflow is and who we are there, if this machine's environment says so.
PRIVATE = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
INTERRUPTED = 130
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_remote(address: str | None) -> bool:
    """Whether an address is that of a dashboard, to be submitted to."""
    return address is not None and address.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class Order:
    """A study to be run on another machine's cluster."""

    verb: str  # "launch" or "lr-find"
    space: Path
    spec: Spec
    address: str
    run_dir: Path | None = None  # on the head; relative: within ~/hpsearch-runs
    workers: int | None = None
    overrides: tuple[str, ...] = ()
    tracking_uri: str | None = None
    flags: tuple[str, ...] = ()  # passed on as they are

    @property
    def remote_run_dir(self) -> str:
        from hpsearch.fleets.submission import plain_run_dir

        default = self.spec.name if self.verb == "launch" else f"runs/{self.spec.name}-lr-find"
        return plain_run_dir(self.run_dir.as_posix()) if self.run_dir is not None else default

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of hpsearch on the head; no secret among them."""
        return (
            self.verb,
            f"{STUDY}/{self.space.resolve().name}",
            "--address=auto",
            # A sweep finds a new one for itself there.
            *([f"--run-dir={self.remote_run_dir}"] if self.verb == "launch" or self.run_dir is not None else []),
            *([f"--workers={self.workers}"] if self.workers else []),
            *(f"--set={override}" for override in self.overrides),
            *self.flags,
        )


def run_there(order: Order) -> None:
    """Submit a study, follow it, print its result; exits with its code.

    Raises:
        UsageError: it cannot be sent, or runs there already.
        ClusterError: the cluster is out of reach, or could not run it.
    """
    from hpsearch.fleets.submission import Head, LostTouch, shown_run_dir

    _check_task_lies_within(order)
    private = private_variables(order.tracking_uri, os.environ)
    address = without_credentials(order.address)
    with tempfile.TemporaryDirectory(prefix="hpsearch-submission-") as scratch:
        shipment, archive = pack(order.space.resolve().parent, Path(scratch))
        head = Head(order.address, told_address=address)
        try:
            job = head.submit(
                order.arguments,
                archive=archive,
                typed=_typed(),
                study=order.spec.name,
                run_dir=order.remote_run_dir,
                private=private,
            )
        except KeyboardInterrupt:
            say(f"interrupted; whether it was sent: hpsearch status {order.spec.name} --address {address}")
            raise
    say(
        f"{shipment.n_files} files ({shipment.n_bytes / 2**20:.1f} MiB) sent to {address}; "
        f"job {job.id}, run directory there {shown_run_dir(job.run_dir)}"
    )
    try:
        outcome = head.follow(job.id, show=say)
    except KeyboardInterrupt:
        say(f"detached; job {job.id} goes on there.\n{_how_to_find(job.study, job.id, address)}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except LostTouch as error:
        raise LostTouch(
            f"{error.message}; job {job.id} may go on there", hint=_how_to_find(job.study, job.id, address).lstrip()
        ) from None
    click.echo(outcome.stdout, nl=False)
    raise click.exceptions.Exit(outcome.exit_code)


def status_there(run: str, address: str, *, as_json: bool) -> None:
    """Where a study stands that was submitted to a cluster: its job, and what `status` says on the head.

    Raises:
        UsageError: there is no such study.
        ClusterError: the cluster is out of reach.
    """
    import json

    from hpsearch.fleets.submission import Head, find, plain_run_dir, shown_run_dir

    told_address = without_credentials(address)
    head = Head(address, told_address=told_address)
    jobs = head.jobs()
    job = find(jobs, run)
    run_dir = job.run_dir if job is not None else plain_run_dir(run)
    summary = _ask(head, ["status", run_dir, "--json"]) if as_json else _ask(head, ["status", run_dir])
    told_job = None
    if job is not None:
        told_job = {
            "id": job.id,
            "address": told_address,
            "status": job.status,
            "exit_code": job.exit_code,
            "started_at": job.started_at or None,
            "ended_at": job.ended_at or None,
        }
    if summary.exit_code and job is None:
        known = ", ".join(dict.fromkeys(job.study for job in jobs)) or "none"
        raise UsageError(
            f"no study {run!r} on {told_address}: no job of it, and nothing in {shown_run_dir(run_dir)}",
            hint=f"studies submitted there: {known}",
        )
    if as_json:
        found = json.loads(summary.stdout) if not summary.exit_code else {}
        print_json({**(found or {"study": job.study if job else run, "run_dir": run_dir}), "job": told_job})
        return
    if job is not None:
        click.echo(f"job {job.id} on {told_address}: {job.status.lower()}{_times(job.started_at, job.ended_at)}")
    if summary.exit_code:
        click.echo(f"nothing in {shown_run_dir(run_dir)} yet")
        return
    lines = [line for line in summary.stdout.splitlines() if not line.startswith("go on: ")]
    click.echo("\n".join(lines))
    if len(lines) < len(summary.stdout.splitlines()):
        click.echo(f"go on: hpsearch launch SPACE --address {told_address} --run-dir {run_dir} --resume")


def ask_there(verb: str, run: str, address: str, *options: str, tracking_uri: str | None = None) -> None:
    """Print what a verb that reads a run directory says on the head; exits with its code."""
    from hpsearch.fleets.submission import Head, find, plain_run_dir

    head = Head(address, told_address=without_credentials(address))
    job = find(head.jobs(), run)
    run_dir = job.run_dir if job is not None else plain_run_dir(run)
    private = private_variables(tracking_uri, os.environ) if verb == "sync" else {}
    outcome = _ask(head, [verb, run_dir, *options], private, show=True)
    click.echo(outcome.stdout, nl=False)
    raise click.exceptions.Exit(outcome.exit_code)


def private_variables(tracking_uri: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job on the head: where MLflow is, and what opens it.

    A store in a file of this machine is not passed on: there it would be another file.

    >>> private_variables(None, {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "HOME": "/root"})
    {'MLFLOW_TRACKING_URI': 'http://mlflow:5000'}
    >>> private_variables(None, {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
    {}
    >>> private_variables("sqlite:////srv/mlflow.db", {})  # named for this study: a file of the head's
    {'MLFLOW_TRACKING_URI': 'sqlite:////srv/mlflow.db'}
    """
    found = {name: environ[name] for name in PRIVATE if environ.get(name)}
    if tracking_uri is not None:
        return found | {"MLFLOW_TRACKING_URI": tracking_uri}
    uri = found.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://", "databricks")):
        found.pop("MLFLOW_TRACKING_URI", None)
    elif urlsplit(uri).hostname in LOOPBACK:
        say(
            "warning[mlflow]: MLFLOW_TRACKING_URI names this machine's loopback, which on the head is the head's own\n"
            "  hint: --tracking-uri with an address that the head can reach"
        )
    return found


def without_credentials(address: str) -> str:
    from hpsearch.tracker.outbox import redact

    return redact(address).rstrip("/")


def _ask(head: Head, arguments: Sequence[str], private: Mapping[str, str] | None = None, show: bool = False) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="hpsearch-submission-") as scratch:
        return head.ask(arguments, archive=pack_alone(Path(scratch)), private=private, show=say if show else None)


def _check_task_lies_within(order: Order) -> None:
    """Only the folder of space.yaml is sent."""
    module = order.spec.task.rpartition(":")[0]
    folder = order.space.resolve().parent
    if module.endswith(".py") and not (folder / module).resolve().is_relative_to(folder):
        raise SpecError(
            [
                Problem(
                    code="task-file",
                    where=f"{order.space}: task",
                    what=f"`{module}` lies outside the folder of {order.space.name}, which is all that is sent",
                    hint="move the task, or space.yaml",
                )
            ]
        )


def _typed() -> str:
    """This command as it was given, without credentials; nothing but the tracking URI may hold any."""
    from hpsearch.tracker.outbox import redact

    return shlex.join(["hpsearch", *(_redacted(word, redact) for word in sys.argv[1:])])


def _redacted(word: str, redact: Callable[[str], str]) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={redact(value)}" if "://" in value else word
    return redact(word) if "://" in word else word


def _how_to_find(study: str, job_id: str, address: str) -> str:
    rows = [
        ("where it stands", f"{tool('hpsearch')} status {study} --address {address}"),
        ("its log", f"{tool('ray')} job logs {job_id} --follow --address {address}"),
        ("end it", f"{tool('ray')} job stop {job_id} --address {address}"),
    ]
    return "\n".join(f"  {what + ':':<17}{command}" for what, command in rows)


def _times(started_at: float, ended_at: float) -> str:
    def told(at: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))

    if not started_at:
        return ""
    return f", from {told(started_at)} to {told(ended_at)}" if ended_at else f", since {told(started_at)}"
