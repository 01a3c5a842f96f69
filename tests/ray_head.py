"""A Ray head with a dashboard on loopback, as `ray start --head` makes one: a cluster that a test is no part of.

It has ports, a temporary folder and a home of its own, and ends with the processes that it started, no others. Its
token is that of the tests, so that a test can be a driver on it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_S = 120.0
NEEDED = ("aiohttp_cors", "opencensus", "prometheus_client", "grpc", "virtualenv")  # of ray[default]


def missing_for_a_dashboard() -> list[str]:
    """What of ray[default] is not installed; the dashboard does not start without it."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(kw_only=True)
class RayHead:
    """A running head."""

    dashboard: str  # http://127.0.0.1:port
    gcs: str  # 127.0.0.1:port
    home: Path  # of its processes: where run directories lie
    session: Path  # ray's own files, logs among them
    token: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def ray_head(folder: Path, *, cpus: int = 2, env: Mapping[str, str] | None = None) -> Iterator[RayHead]:
    """A head under `folder`, gone when left."""
    ports = [free_port() for _ in range(3)]
    home = folder / "home"
    home.mkdir(parents=True)
    token = os.environ["RAY_AUTH_TOKEN"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_")) and k != "PYTHONPATH"}
    started_with = {
        **inherited,
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    # Sockets lie in the temporary folder, and a socket's path may have 107 characters: pytest's folders are too deep.
    with tempfile.TemporaryDirectory(prefix="hps-", ignore_cleanup_errors=True) as session:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}"]
        command += [f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={session}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        with (folder / "ray-start.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=started_with, start_new_session=True)
        head = RayHead(
            dashboard=f"http://127.0.0.1:{ports[1]}",
            gcs=f"127.0.0.1:{ports[0]}",
            home=home,
            session=Path(session),
            token=token,
            process=process,
        )
        try:
            _await(head, folder / "ray-start.log")
            yield head
        finally:
            _end(process)


def _await(head: RayHead, log: Path) -> None:
    """Until jobs can be submitted: the agent, which runs them, comes a few seconds after the dashboard."""
    deadline = time.monotonic() + START_S
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    while time.monotonic() < deadline:
        if head.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no Ray head within {START_S:.0f} s:\n{log.read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM has `ray start --block` end its daemons; what is left of its session is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
