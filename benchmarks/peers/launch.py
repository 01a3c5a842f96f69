"""hpsearch as a user starts it: a space.yaml, and `hpsearch launch`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks._tree import Cost, run_measured

ROOT = Path(__file__).resolve().parents[2]
TASK = "benchmarks.peers.task:Study"


def environment(data: str, rows: int, threads: int = 1) -> dict[str, str]:
    """Of every engine alike: whose data, how many threads, and where these modules are."""
    return {
        **os.environ,
        "BENCHMARK_DATA": data,
        "BENCHMARK_ROWS": str(rows),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
    }


def launch(
    space: str,
    run_dir: Path,
    *,
    workers: int,
    env: Mapping[str, str],
    flags: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> tuple[dict[str, object], Cost]:
    """What a launch of a space printed, and what it cost; MLflow beside the run directory."""
    run_dir.mkdir(parents=True)
    (run_dir / "space.yaml").write_text(space)
    command = [
        sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--json", "--workers", str(workers),
        "--run-dir", "run", "--tracking-uri", f"sqlite:///{run_dir}/mlflow.db", *flags,
        *(word for override in overrides for word in ("--set", override)),
    ]  # fmt: skip
    cost = run_measured(command, cwd=run_dir, env=env)
    return json.loads(cost.stdout.strip().splitlines()[-1]), cost
