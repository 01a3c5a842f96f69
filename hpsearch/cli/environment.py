"""Where and with what a study runs, for its journal and its MLflow run."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("hpsearch", "torch", "ray", "optuna", "mlflow", "numpy", "scipy")


def environment(folder: Path) -> dict[str, object]:
    """Versions, hardware and the git commit of the task's folder; nothing of it is imported."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "host": platform.node(),
        "boot": _boot(),
        "cores": os.cpu_count() or 0,
        "user": _user(),
        "command": " ".join(["hpsearch", *sys.argv[1:2]]),  # its options may hold secrets
        **_git(folder),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _boot() -> str:
    """Names the time since this machine, or this container, was started; "" where the system does not tell."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        first_process = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{kernel}/{first_process[19]}"  # proc(5): starttime, of a container the time when it was started


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _git(folder: Path) -> dict[str, object]:
    """The commit of the folder and whether it has changes; empty where git or a repository is missing."""

    def ask(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
        return found.stdout.strip()

    try:
        return {"git_commit": ask("rev-parse", "HEAD"), "git_dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}
