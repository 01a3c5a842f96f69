"""What every test may count on: quiet libraries, no one's real MLflow or Ray, and markers that skip with their reason.

The environment is set here, before any test imports a library that reads it, so `pytest` alone and `./scripts/test` run
the same tests.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A developer's own server or cluster is no place for tests.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "RAY_ADDRESS"):
    os.environ.pop(name, None)

# Workers of a cluster that a test starts find `tests` too; what was shipped to them comes before it.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
)

os.environ.update(
    OMP_NUM_THREADS="1",  # workers share the cores; also what makes "to the bit" hold
    MPLBACKEND="agg",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),  # else Ray writes one into the user's home
    NO_COLOR="1",  # whole messages are compared
    COLUMNS="200",  # and must not be wrapped
)

# A shell that runs tests in the background has them ignore Ctrl-C, and so would all that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Properties get the same examples every time, so a red build is red again; a cold import is no reason to fail.
settings.register_profile("hpsearch", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("hpsearch")


pytest.register_assert_rewrite("tests.contracts")  # else an assertion that fails there says nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that none of several processes begins one when the others are done; and skip what
    this machine cannot run, and say why."""
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    real = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in long, item.path not in real))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a study's run directory will be."""
    return tmp_path / "run"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A folder, as `storage:` names it."""
    (tmp_path / "storage").mkdir()
    return str(tmp_path / "storage")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout: where space.yaml files, scripts and documents are."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder(repository: Path) -> Path:
    """Where real data may lie that the project does not ship: `shared/data` beside the checkout, there or not."""
    return repository.parent / "shared" / "data"
