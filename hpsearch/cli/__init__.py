"""The front door: parse the command line, choose adapters, print, exit code.

stdout carries results only, stderr progress and logs. Each verb lives in a module that is imported when the verb is
called, so that `hpsearch --help` costs nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

import click

from hpsearch.cli.output import report_error
from hpsearch.errors import HpsearchError, NotBuiltYet

INTERRUPTED = 130

# verb -> module of its command, and its line in --help
VERBS = {
    "validate": ("spec_verbs", "Check a space.yaml, without torch or Ray."),
    "schema": ("spec_verbs", "The JSON Schema of space.yaml, for editors."),
    "check": ("check", "Preflight only: distrust the network before a search is spent on it."),
    "lr-find": ("launch", "Learning-rate range sweep only: table, plot, MLflow run."),
    "launch": ("launch", "The whole study: LR range, search, ensemble, MLflow."),
    "status": ("run_verbs", "Where a study stands."),
    "top": ("run_verbs", "The ranking of a study's trials."),
    "note": ("run_verbs", "Write a line into a study's logbook."),
    "sync": ("run_verbs", "Send to MLflow what it has not got yet."),
    "pull": ("model_verbs", "The best ensemble, from the MLflow registry."),
    "predict": ("model_verbs", "Predictions of a pulled ensemble."),
}

UNBUILT = {
    "init": "a working task file and space.yaml to start from",
    "plan": "trials, epochs, disk and time before anything is spent",
    "report": "one self-contained HTML page",
    "replay": "the same curves under other early-stopping settings",
    "repro": "train one trial of a study again",
}


class Verbs(click.Group):
    """The verbs, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *UNBUILT]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in UNBUILT:
            return _unbuilt(cmd_name)
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"hpsearch.cli.{VERBS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])
        with formatter.section("Promised, not built yet"):
            formatter.write_dl([(verb, line[0].upper() + line[1:] + ".") for verb, line in UNBUILT.items()])


def _unbuilt(verb: str) -> click.Command:
    def refuse(**_: object) -> None:
        raise NotBuiltYet(f"`hpsearch {verb}` ({UNBUILT[verb]}) is not built yet")

    return click.Command(
        verb,
        params=[click.Argument(["anything"], nargs=-1, type=click.UNPROCESSED)],
        callback=refuse,
        help=f"Not built yet: {UNBUILT[verb]}.",
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(package_name="hpsearch", message="hpsearch %(version)s")
def group() -> None:
    """From a PyTorch model and its data to the best ensemble, in MLflow."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `hpsearch` command. Exits with the codes of the contract."""
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    # Everything that was opened is closed by now. Taking ray's and mlflow's modules apart would cost another 0.7 s.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Exit code of a command line."""
    as_json = "--json" in arguments
    try:
        code = group.main(args=list(arguments), prog_name="hpsearch", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            report_error(error.format_message(), 2, code="usage", as_json=as_json, hint=_help_hint(error))
            return 2
        report_error(error.format_message(), error.exit_code, code="usage", as_json=as_json)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except HpsearchError as error:
        report_error(str(error), error.exit_code, code=error.code, as_json=as_json, formatted=True)
        return error.exit_code
    except BrokenPipeError:  # `hpsearch top … | head`
        sys.stderr.close()
        return 0
    return code if isinstance(code, int) else 0  # of a verb that ran elsewhere


def _help_hint(error: click.UsageError) -> str:
    return f"{error.ctx.command_path} --help" if error.ctx is not None else "hpsearch --help"
