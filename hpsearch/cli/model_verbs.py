"""`pull` and `predict`: the best ensemble, without the project that trained it."""

from __future__ import annotations

from pathlib import Path

import click

from hpsearch.cli.output import counted, json_option, print_json, say


@click.command("pull")
@click.argument("model")
@click.option("--alias", default=None, help="Default: champion.")
@click.option("--version", default=None, help="A version's number, instead of an alias.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: MODEL in this directory.")
@click.option("--tracking-uri", default=None, help="Instead of MLFLOW_TRACKING_URI.")
@json_option
def pull(
    model: str, alias: str | None, version: str | None, out: Path | None, tracking_uri: str | None, as_json: bool
) -> None:
    """Take MODEL, a registered ensemble, from the MLflow registry and verify every byte of it."""
    from hpsearch.errors import UsageError

    if alias is not None and version is not None:
        raise UsageError("--alias and --version name two things", hint="give one of them")
    from hpsearch.tracker import pull as pull_model

    pulled = pull_model(
        model,
        alias=None if version is not None else alias or "champion",
        version=version,
        out=out or Path(model),
        tracking_uri=tracking_uri,
    )
    summary = {
        "model": model,
        "version": pulled.version,
        "out": str(pulled.out),
        "members": [{"trial": m.trial, "weight": m.weight} for m in pulled.package.members],
    }
    if as_json:
        print_json(summary)
    else:
        say(f"{model} version {pulled.version}: {counted(len(pulled.package.members), 'member')}, verified.")
        click.echo(str(pulled.out))


@click.command("predict")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("inputs", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="An .npz file to write.")
@json_option
def predict(folder: Path, inputs: Path, out: Path, as_json: bool) -> None:
    """Predictions of the pulled ensemble in FOLDER for INPUTS, an .npz file with an array `inputs`."""
    from hpsearch.predict import predict_file

    predictions = predict_file(folder, inputs, out)
    if as_json:
        print_json({"out": str(out), "shape": list(predictions.shape)})
    else:
        say(f"{len(predictions)} predictions.")
        click.echo(str(out))
