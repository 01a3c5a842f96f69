"""A user's folder: a task, a space.yaml, and whatever a launch leaves there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def in_project(folder: Path, *, task: str, space: str) -> Iterator[Path]:
    """The folder with these two files, as the working directory; MLflow's database lies in it too."""
    (folder / "task.py").write_text(task)
    (folder / "space.yaml").write_text(space)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder
