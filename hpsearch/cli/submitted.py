"""A verb on the head of a cluster, for someone elsewhere: what `fleets/submission.py` submits as a job.

    python -m hpsearch.cli.submitted [--secrets KEY] [--typed COMMAND] -- launch study/space.yaml --address auto …

A job's log holds stdout and stderr alike, so the result goes into it as marked lines at the end. The working directory
becomes ~/hpsearch-runs: the one that the job starts in belongs to Ray, which removes it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpsearch.errors import ClusterError
from hpsearch.fleets.job_log import BEGUN, Outcome, encode_result
from hpsearch.fleets.submission import BASE, take_secrets

WITH_SPACE = ("launch", "lr-find")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb, mark its result in the log, and exit with its code."""
    parser = argparse.ArgumentParser(prog="python -m hpsearch.cli.submitted", description=__doc__)
    parser.add_argument("--secrets", default="", help="the key under which variables wait to be taken")
    parser.add_argument("--typed", default="", help="the command as it was given elsewhere")
    parser.add_argument("verb", nargs="+")
    told = parser.parse_args(arguments)
    print(f"\n{BEGUN}", flush=True)
    outcome = run_verb(told.verb, secrets=told.secrets, typed=told.typed)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError), open(1, "wb", buffering=0, closefd=False) as log:
        log.write(encode_result(outcome).encode())  # at once, so that no other thread's line comes between
    os._exit(outcome.exit_code)  # as the command line itself does: taking ray's modules apart would cost a second


def run_verb(verb: Sequence[str], *, secrets: str = "", typed: str = "") -> Outcome:
    """What a verb prints, run in BASE."""
    words = list(verb)
    if words[0] in WITH_SPACE:
        words[1] = str(Path(words[1]).resolve())
    base = Path(BASE).expanduser()
    base.mkdir(parents=True, exist_ok=True)
    os.chdir(base)
    # A command to go on is told as it has to be typed there, not as it runs here.
    sys.argv = shlex.split(typed) or ["hpsearch", *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = _run(words, secrets)
    return Outcome(stdout=printed.getvalue(), exit_code=code)


def _run(words: Sequence[str], secrets: str) -> int:
    from hpsearch.cli import run
    from hpsearch.cli.output import report_error

    try:
        if secrets:
            os.environ.update(take_secrets(secrets))
    except ClusterError as error:
        report_error(str(error), error.exit_code, code=error.code, as_json="--json" in words, formatted=True)
        return error.exit_code
    try:
        return run(words)
    except Exception:  # a defect of ours: its traceback, and the code that it would have given anywhere
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
