"""`validate` and `schema`: what can be said of a space.yaml without running anything."""

from __future__ import annotations

from pathlib import Path

import click

from hpsearch.cli.output import json_option, print_json
from hpsearch.spec import json_schema, read_spec

SPACE = click.Path(path_type=Path, dir_okay=True)  # read_spec tells what is wrong with a path


@click.command("validate")
@click.argument("space", type=SPACE)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, dotted; repeatable.")
@json_option
def validate(space: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check SPACE, a space.yaml, without torch or Ray and without running your code."""
    spec = read_spec(space, overrides)
    if as_json:
        print_json({"valid": True, "study": spec.name, "task": spec.task, "parameters": list(spec.space.names)})
    else:
        click.echo(f"{space} is valid: {spec.search.trials} trials over {spec.space.n_dims} searched parameters.")


@click.command("schema")
@json_option
def schema(as_json: bool) -> None:
    """The JSON Schema of space.yaml, for editors."""
    print_json(json_schema())
