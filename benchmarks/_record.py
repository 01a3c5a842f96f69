"""Keeps what a benchmark measured: one JSON file per benchmark, with versions, hardware and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
"""Where records go; elsewhere for a trial run that must not replace one."""


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_names() -> list[str]:
    """The GPUs of this machine, by the driver's word."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    return told.stdout.strip().splitlines() if told.returncode == 0 else []


def keep(name: str, what: str, measured: object, *, packages: Sequence[str] = (), **more: object) -> Path:
    """Write benchmarks/results/<name>.json.

    Args:
        what: was measured, with its unit, in one sentence.
        measured: the raw results.
        packages: whose versions belong to them.
        more: settings of the run.
    """
    versions: Mapping[str, str] = {package: metadata.version(package) for package in packages}
    hardware: dict[str, object] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before(1min)": round(os.getloadavg()[0], 2),
    }
    if gpus := gpu_names():
        hardware["gpus"] = gpus
    record = {
        "what": what,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **versions},
        **more,
        "measured": measured,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {os.path.relpath(path)}")
    return path
