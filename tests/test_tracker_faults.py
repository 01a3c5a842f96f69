"""MLflow slow, refusing, or silent: the search does not wait, the launch ends well, and a later sync makes it whole.

A real MLflow server stands behind a gate: a small HTTP server on the loopback interface that passes calls on, or does
to them what networks, proxies and overloaded servers do.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpsearch.cli import run
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.state import StudyState
from hpsearch.tracker import JournalFollower, Tracker, TrackerThread
from hpsearch.tracker.mlflow_writer import make_client
from hpsearch.tracker.operations import TAG_UID
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.test_cli import SPACE, TASK
from tests.test_tracker import client_of, package_for
from tests.tracked_study import whole_study

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")]

SECRETS = ("ann", "s3cret")
SLOW_S = 8.0  # per call: a search that waited for one call would show it
N_TRIALS = 4  # each is a run to make, over a wire that fails
TRIALS = [f"trial-{number:04d}" for number in range(N_TRIALS)]


@dataclass
class Manners:
    """What the gate does to a call."""

    delay_s: float = 0.0
    status: int = 0  # answered instead of passing on; 0: passed on
    headers: dict[str, str] = field(default_factory=dict)
    drops: bool = False  # the connection is cut without an answer
    loses: Callable[[str, str], bool] = lambda method, path: False  # passed on, and the answer cut


class Gate:
    """Between a client and a server."""

    def __init__(self, server: MlflowServer) -> None:
        self.manners = Manners()
        self.calls: list[str] = []
        self._patience = threading.Event()  # set: nobody waits any more
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def do(self) -> None:
                gate.calls.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                manners = gate.manners
                gate._patience.wait(manners.delay_s)
                if manners.drops:
                    self._cut()
                elif manners.status:
                    self._answer(manners.status, manners.headers, b"not now")
                else:
                    self._pass_on(body, lost=manners.loses(self.command, self.path))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do  # noqa: N815

            def _pass_on(self, body: bytes, *, lost: bool) -> None:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("authorization", "host")}
                with contextlib.closing(connection):
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    content = answer.read()
                if lost:
                    self._cut()
                else:
                    self._answer(answer.status, {"Content-Type": answer.headers["Content-Type"]}, content)

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def _cut(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what was called is in `calls`."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Nothing: a client may hang up."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.uri = f"http://{':'.join(SECRETS)}@127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Everything is passed on at once, also what is waiting."""
        self.manners = Manners()
        self._patience.set()

    def close(self) -> None:
        self._patience.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def gate(server: MlflowServer) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task and a space.yaml, which is the working directory."""
    (tmp_path / "task.py").write_text(TASK)
    space = SPACE.replace("trials: 8", f"trials: {N_TRIALS}")
    (tmp_path / "space.yaml").write_text(space.replace("name: blobs", f"name: {tmp_path.name}"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(gate: Gate) -> int:
    command = ["launch", "space.yaml", "--fleet", "local", "--run-dir", "run", "--tracking-uri", gate.uri]
    return run([*command, "--skip-preflight", "--json"])


def state_of(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir))


def names_in(server: MlflowServer, state: StudyState) -> list[str]:
    """The names of a study's runs, sorted; one that was made twice comes twice."""
    client = client_of(server.uri)
    experiment = client.get_experiment_by_name(state.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`{TAG_UID}` = '{state.uid}'", max_results=1000)
    return sorted(found_run.info.run_name or "" for found_run in found)


def require_whole(server: MlflowServer, state: StudyState) -> None:
    """Everything is there, once."""
    assert names_in(server, state) == sorted([*TRIALS, "lr-range", "ensemble", state.name])
    assert len(client_of(server.uri).search_model_versions(f"name = '{state.name}'")) == 1


def require_no_secrets(project: Path, *told: str) -> None:
    files = [path.read_text(errors="ignore") for path in project.rglob("*.jsonl")]
    for text in (*told, *files):
        assert not any(secret in text for secret in SECRETS[1:])


# Beside a launch


def test_search_does_not_wait_for_a_slow_mlflow(
    gate: Gate, server: MlflowServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.manners = Manners(delay_s=SLOW_S)

    def relieve() -> None:
        while b'"type":"ended"' not in (project / "run" / FILE_NAME).read_bytes()[-300:]:
            time.sleep(0.05)
        gate.open()

    def wait_and_relieve() -> None:
        while not (project / "run" / FILE_NAME).exists():
            time.sleep(0.05)
        relieve()

    relief = threading.Thread(target=wait_and_relieve)
    relief.start()
    assert launch(gate) == 0
    relief.join()
    state = state_of(project / "run")
    assert gate.calls
    assert state.stage_s["search"] < SLOW_S
    assert state.stage_s["lr_range"] < SLOW_S
    require_whole(server, state)
    require_no_secrets(project, *capsys.readouterr())


@pytest.mark.parametrize(
    ("manners", "reason"),
    [
        (Manners(status=500), "500"),
        (Manners(status=429, headers={"Retry-After": "3600"}), "429"),
        (Manners(status=401), "401"),
        (Manners(status=403), "403"),
        (Manners(drops=True), "aborted"),
    ],
    ids=["500", "429-for-an-hour", "401", "403", "dropped"],
)
def test_launch_ends_well_when_mlflow_refuses_and_a_later_sync_completes_it(
    gate: Gate,
    server: MlflowServer,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    manners: Manners,
    reason: str,
) -> None:
    gate.manners = manners
    assert launch(gate) == 0
    out, err = capsys.readouterr()
    verdict = json.loads(out)
    assert verdict["trials"]["total"] == N_TRIALS
    assert set(verdict["mlflow"].values()) == {None}
    (warning,) = [line for line in err.splitlines() if line.startswith("warning[mlflow]")]
    assert reason in warning
    assert f"send the rest later: hpsearch sync {project}/run" in warning
    assert "Traceback" not in err
    require_no_secrets(project, out, err)

    assert run(["sync", "run", "--tracking-uri", gate.uri]) == 4
    assert reason in capsys.readouterr().err
    gate.open()
    assert run(["sync", "run", "--tracking-uri", gate.uri]) == 0
    require_whole(server, state_of(project / "run"))
    require_no_secrets(project, *capsys.readouterr())


def test_mlflow_that_goes_in_the_search_and_is_back_in_the_ensemble_has_everything_once(
    gate: Gate, server: MlflowServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (project / "task.py").read_text()
    slow = "def model(self, config):\n        import time; time.sleep(0.1)"  # so that there is something to be missed
    (project / "task.py").write_text(text.replace("def model(self, config):", slow))
    journal = project / "run" / FILE_NAME

    def seen(event: str) -> bool:
        return journal.exists() and event.encode() in journal.read_bytes()

    def fail_and_recover() -> None:
        while not seen('"stage-began","stage":"search"'):
            time.sleep(0.02)
        gate.manners = Manners(drops=True)
        while not seen('"stage-began","stage":"ensemble"'):
            time.sleep(0.02)
        gate.open()

    outage = threading.Thread(target=fail_and_recover)
    outage.start()
    assert launch(gate) == 0
    outage.join()
    require_whole(server, state_of(project / "run"))
    require_no_secrets(project, *capsys.readouterr())


# One call after another


def test_answer_that_is_lost_makes_no_run_twice(gate: Gate, server: MlflowServer, tmp_path: Path) -> None:
    """The server does what it was asked, and the network loses the answer; the first time for each thing made."""
    script = whole_study("lost-answers", uid="e" * 16)
    lost: set[str] = set()

    def loses(method: str, path: str) -> bool:
        n_made = sum(call.startswith("POST") and path in call for call in gate.calls)
        first = method == "POST" and any(path.endswith(end) for end in ("create", "log-batch")) and n_made % 2 == 1
        if first:
            lost.add(path)
        return first

    gate.manners = Manners(loses=loses)
    tracker = Tracker(tmp_path, tracking_uri=gate.uri, package=package_for(tmp_path))
    state = script.state()
    for _ in range(60):
        report = tracker.sync(state)
        if report.error is None:
            break
    tracker.close()
    assert (report.error, report.waiting) == (None, 0)
    assert len(lost) >= 4, lost
    expected = ["ensemble", "lost-answers", "lr-range", *TRIALS[:4]]
    assert names_in(server, state) == sorted(expected)
    assert len(client_of(server.uri).search_model_versions("name = 'lost-answers'")) == 1


def test_one_dropped_call_is_not_worth_a_warning(gate: Gate, server: MlflowServer, tmp_path: Path) -> None:
    script = whole_study("hiccup", uid="d" * 16)
    script.write(tmp_path)
    dropped: list[str] = []

    def loses(method: str, path: str) -> bool:
        if path.endswith("log-batch") and not dropped:
            dropped.append(path)
            return True
        return False

    gate.manners = Manners(loses=loses)
    warned: list[str] = []
    tracker = Tracker(tmp_path, tracking_uri=gate.uri, package=package_for(tmp_path))
    thread = TrackerThread(tracker, JournalFollower(tmp_path), warn=warned.append, interval_s=0.05).start()
    report = thread.close(timeout_s=120)
    assert (report.error, report.waiting, warned) == (None, 0, [])
    assert dropped


# A process that dies


def test_store_whose_making_was_killed_is_made_by_the_next_process(tmp_path: Path) -> None:
    """MLflow makes its tables in dozens of steps, and opens no store that has only some of them."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = (
        "import sys; from hpsearch.tracker.mlflow_writer import make_client as m; m(sys.argv[1], write_ahead_log=True)"
    )
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, uri], cwd=tmp_path) as process:
        while process.poll() is None and not any(n_tables(path) > 40 for path in tmp_path.glob("mlflow.db*")):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    client = make_client(uri, write_ahead_log=True)
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("mlflow.db.new*"))


def n_tables(path: Path) -> int:
    """Tables of a SQLite file that another process is writing; 0 where it cannot be told."""
    if path.name.endswith(("-wal", "-shm", "-journal")):
        return 0
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
    ):
        (n,) = db.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
        return int(n)
    return 0
