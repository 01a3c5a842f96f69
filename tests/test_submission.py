"""A study submitted from elsewhere: `--address http://head:8265` against a real head with a dashboard on loopback."""

from __future__ import annotations

import asyncio
import doctest
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpsearch.cli import remote, run, submitted
from hpsearch.errors import ClusterError, UsageError
from hpsearch.fleets import Launch, submission
from hpsearch.fleets.job_log import BEGUN, Outcome, encode_result
from hpsearch.fleets.submission import RUN_DIR_KEY, STUDY_KEY, Head, LostTouch
from hpsearch.fleets.tune import TuneFleet
from hpsearch.journal import read_journal
from hpsearch.spec import parse_spec
from hpsearch.state import Entry, StudyState
from tests import fakes
from tests.contracts.fleet import SPACE as CONTRACT_SPACE
from tests.ray_head import RayHead, free_port, missing_for_a_dashboard, ray_head
from tests.test_cli import SPACE, TASK

with_dashboard = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # ray's, of aiohttp
    pytest.mark.skipif(
        bool(missing_for_a_dashboard()), reason=f"ray[default] is incomplete here: no {missing_for_a_dashboard()}"
    ),
]


def test_examples_hold() -> None:
    for module in (submission, remote):
        told = doctest.testmod(module)
        assert told.attempted > 0
        assert told.failed == 0


# A real head, one for all tests of this module


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head")) as started:
        yield started


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A laptop's folder; the task tells where its file was when it was run."""
    (tmp_path / "laptop").mkdir()
    note = f"\n\nwith open({str(tmp_path / 'ran')!r}, 'a') as notes:\n    print(__file__, file=notes)\n"
    (tmp_path / "laptop" / "task.py").write_text(TASK + note)
    (tmp_path / "laptop" / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path / "laptop")
    return tmp_path


def start(project: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """`hpsearch …` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "hpsearch", *arguments],
        cwd=project / "laptop",
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def hpsearch(project: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    process = start(project, *arguments, **env)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The same in this process, which has Ray imported already."""
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rename(project: Path, name: str) -> None:
    space = project / "laptop" / "space.yaml"
    space.write_text(space.read_text().replace("name: blobs", f"name: {name}"))


class TestOnACluster:
    pytestmark = with_dashboard

    def test_launch_gives_what_a_local_one_gives_and_status_finds_it_again(
        self, head: RayHead, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # MLflow is nowhere, with a password: the study goes on without, and nobody is told the password.
        nowhere = f"http://ann:S3CRET@127.0.0.1:{free_port()}"
        code, out, err = hpsearch(
            project, "launch", "space.yaml", "--address", head.dashboard, "--workers", "2", "--json",
            MLFLOW_TRACKING_URI=nowhere, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        )  # fmt: skip
        assert code == 0, err
        assert out.count("\n") == 1
        told = json.loads(out)
        assert told["trials"]["total"] == 8
        run_dir = head.home / "hpsearch-runs" / "blobs"
        assert told["run_dir"] == str(run_dir)
        assert StudyState.of(read_journal(run_dir)).done
        assert "2 files (0.0 MiB) sent to" in err
        assert "search …" in err
        assert "warning[mlflow]: MLFLOW_TRACKING_URI names this machine's loopback" in err
        assert "hpsearch sync" in err

        ran = set((project / "ran").read_text().split())
        assert ran
        assert not any(place.startswith(str(project)) for place in ran)  # the laptop's files were not there
        assert all(Path(place).name == "task.py" and "_ray_pkg_" in place for place in ran)

        everything = [path for path in (*head.session.rglob("*"), *head.home.rglob("*")) if path.is_file()]
        assert [path for path in everything if b"S3CRET" in path.read_bytes()] == []
        assert "S3CRET" not in out + err

        code, out, err = asked(capsys, "status", "blobs", "--address", head.dashboard)
        assert code == 0, err
        first, *summary = out.splitlines()
        assert first.startswith(f"job hpsearch-blobs-1 on {head.dashboard}: succeeded, from 20")
        assert summary[0] == "blobs: done"
        assert summary[1].startswith("8 trials: ")
        code, out, err = asked(capsys, "top", "blobs", "--address", head.dashboard, "-k", "3", "--json")
        assert code == 0, err
        assert len(json.loads(out)["trials"]) == 3
        assert [job.id for job in Head(head.dashboard).jobs()] == ["hpsearch-blobs-1"]  # the small ones are gone
        # What only the head can know ends there as it would here.
        code, out, err = asked(capsys, "launch", "space.yaml", "--address", head.dashboard, "--json")
        assert code == 2
        assert json.loads(out)["error"]["exit_code"] == 2
        assert "holds this study already" in err

    def test_detached_study_goes_on_is_refused_a_second_time_and_can_be_stopped_and_resumed(
        self, head: RayHead, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rename(project, "slow")
        slow = "def model(self, config):\n        import time; time.sleep(0.4)"
        (project / "laptop" / "task.py").write_text(TASK.replace("def model(self, config):", slow))
        command = ["launch", "space.yaml", "--address", head.dashboard, "--workers", "2", "--set", "search.trials=40"]
        process = start(project, *command)
        run_dir = head.home / "hpsearch-runs" / "slow"
        _until(lambda: (run_dir / "journal.jsonl").exists() and len(_state(run_dir).trials) > 3, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert out == ""
        assert "detached; job hpsearch-slow-1 goes on there." in err
        assert f"hpsearch status slow --address {head.dashboard}" in err
        assert f"ray job stop hpsearch-slow-1 --address {head.dashboard}" in err
        assert "Traceback" not in err

        code, out, err = asked(capsys, *command)
        assert (code, out) == (2, "")
        assert "study 'slow' runs there already, as job hpsearch-slow-1 in ~/hpsearch-runs/slow" in err
        code, out, err = asked(capsys, "status", "slow", "--address", head.dashboard, "--json")
        told = json.loads(out)
        assert (told["state"], told["job"]["status"], told["job"]["id"]) == ("running", "RUNNING", "hpsearch-slow-1")

        there = Head(head.dashboard)
        there._client.stop_job("hpsearch-slow-1")
        _until(lambda: there.job("hpsearch-slow-1").ended)
        log = there._client.get_job_logs("hpsearch-slow-1")
        assert (
            f"hpsearch launch space.yaml --address {head.dashboard} --workers 2" in log
        )  # how to go on, as typed here
        before = _state(run_dir)
        (project / "laptop" / "task.py").write_text(TASK)  # quick again
        code, out, err = hpsearch(project, *command[:-1], "search.trials=41", "--resume", "--json")
        assert code == 0, err
        assert json.loads(out)["trials"]["total"] == 41
        after = _state(run_dir)
        assert {n: after.trials[n].config for n in before.trials} == {n: t.config for n, t in before.trials.items()}

    def test_study_that_nobody_submitted_is_a_wrong_command_line(
        self, head: RayHead, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = asked(capsys, "status", "nothing", "--address", head.dashboard)
        assert (code, out) == (2, "")
        assert f"no study 'nothing' on {head.dashboard}: no job of it, and nothing in ~/hpsearch-runs/nothing" in err

    def test_wrong_token_is_told_in_words(self, head: RayHead, project: Path) -> None:
        code, out, err = hpsearch(project, "launch", "space.yaml", "--address", head.dashboard, RAY_AUTH_TOKEN="0" * 64)
        assert (code, out) == (4, "")
        assert f"error[ray]: the cluster at {head.dashboard} does not know our token" in err
        code, out, err = hpsearch(
            project, "status", "blobs", "--address", head.dashboard, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=""
        )
        assert code == 4
        assert "does not know our token" in err

    def test_workers_on_nodes_without_the_folder_run_the_copy_that_was_shipped(
        self, head: RayHead, tmp_path: Path
    ) -> None:
        import ray.cloudpickle

        folder = tmp_path / "study"
        folder.mkdir()
        (folder / "rows.txt").write_text("1 2 3")
        launch = Launch(
            run_dir=tmp_path / "run",
            spec=parse_spec(CONTRACT_SPACE, overrides=["search.trials=4"]),
            folder=folder,
            make_sampler=fakes.make_sampler,
            make_executor=executor_that_notes_its_folder,
        )
        watched: list[Entry] = []

        def watch(entries: Sequence[Entry]) -> None:
            if folder.exists():  # the first call: packed, and no worker has begun
                shutil.rmtree(folder)
            watched.extend(entries)

        for module in (fakes, sys.modules[__name__]):  # the head knows nothing of these tests
            ray.cloudpickle.register_pickle_by_value(module)
        fleet = TuneFleet(launch, workers=2, address=head.gcs)
        try:
            fleet.run(watch)
        finally:
            fleet.close()
        assert StudyState.of(read_journal(launch.run_dir)).done
        noted = set((head.home / "noted").read_text().split("\n")) - {""}
        assert noted
        assert all(place.endswith("/study 1 2 3") and "_ray_pkg_" in place for place in noted)


def executor_that_notes_its_folder(spec: Any, folder: Path) -> fakes.FakeExecutor:
    with (Path.home() / "noted").open("a") as notes:
        notes.write(f"{folder} {(folder / 'rows.txt').read_text()}\n")
    return fakes.FakeExecutor()


def _state(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir))


def _until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Without a cluster: what is out of reach, and a connection that breaks


def launch_at(address: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(["launch", "space.yaml", "--address", address])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_dashboard_that_is_not_there_is_told_with_how_to_reach_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    code, err = launch_at(address, capsys)
    assert code == 4
    assert f"error[ray]: no dashboard answers at {address}: " in err
    assert "ssh -L 8265:127.0.0.1:8265 HEAD" in err


def test_credentials_in_an_address_are_not_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = launch_at(f"http://ann:S3CRET@127.0.0.1:{free_port()}", capsys)
    assert code == 4
    assert "S3CRET" not in err


def test_address_that_is_no_url_is_a_wrong_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = launch_at("http://", capsys)
    assert code == 2
    assert "is no URL" in err


def test_something_else_that_answers_is_not_taken_for_a_dashboard(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to stderr."""

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code, err = launch_at(address, capsys)
        server.shutdown()
    assert code == 4
    assert f"what answers at {address} is no Ray dashboard" in err


def test_dashboard_that_never_answers_is_left(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        code, err = launch_at(address, capsys)
    assert code == 4
    assert time.monotonic() - began < 8
    assert f"the dashboard at {address} does not answer within" in err


def test_missing_extra_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        code, err = launch_at(f"http://127.0.0.1:{listening.getsockname()[1]}", capsys)
    assert code == 2
    assert "pip install 'hpsearch[cluster]'" in err


def test_address_of_the_environment_does_not_stand_in_for_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def client(address: str) -> object:
        seen.extend([address, os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_API_SERVER_ADDRESS")])
        return object()

    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setitem(sys.modules, "ray.job_submission", SimpleNamespace(JobSubmissionClient=client))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        Head(address)
    assert seen == [address, None, None]
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"


def test_rays_client_is_refused_with_what_to_use(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = launch_at("ray://head:10001", capsys)
    assert code == 2
    assert "submit it: --address http://head:8265" in err


def test_task_outside_the_folder_is_refused_before_anything_is_sent(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "task.py").write_text(TASK)
    space = project / "laptop" / "space.yaml"
    space.write_text(SPACE.replace("task.py:Blobs", "../task.py:Blobs"))
    code, err = launch_at("http://127.0.0.1:9", capsys)
    assert code == 2
    assert "`../task.py` lies outside the folder of space.yaml" in err


def test_dry_run_asks_no_cluster(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "space.yaml", "--address", "http://127.0.0.1:9", "--dry-run"]) == 0
    assert "Nothing was started." in capsys.readouterr().out


def test_secrets_of_the_command_line_are_not_passed_on_it(project: Path) -> None:
    order = remote.Order(
        verb="launch",
        space=Path("space.yaml"),
        spec=parse_spec(SPACE),
        address="http://head:8265",
        workers=3,
        overrides=("search.trials=4",),
        tracking_uri="http://ann:S3CRET@mlflow:5000",
        flags=("--resume", "--json"),
    )
    assert order.arguments == (
        "launch", "study/space.yaml", "--address=auto", "--run-dir=blobs", "--workers=3", "--set=search.trials=4",
        "--resume", "--json",
    )  # fmt: skip
    assert remote.private_variables(order.tracking_uri, {}) == {"MLFLOW_TRACKING_URI": order.tracking_uri}


def test_sweep_finds_its_own_run_directory_there(project: Path) -> None:
    order = remote.Order(
        verb="lr-find", space=Path("space.yaml"), spec=parse_spec(SPACE), address="http://head:8265", flags=("--json",)
    )
    assert order.arguments == ("lr-find", "study/space.yaml", "--address=auto", "--json")


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [(None, "blobs"), ("small", "small"), ("/data/x", "/data/x"), ("~/hpsearch-runs/y", "y")],
)
def test_run_directory_is_one_of_the_heads(run_dir: str | None, expected: str) -> None:
    order = remote.Order(
        verb="launch",
        space=Path("space.yaml"),
        spec=parse_spec(SPACE),
        address="http://head:8265",
        run_dir=None if run_dir is None else Path(run_dir).expanduser(),
    )
    assert order.remote_run_dir == expected


class FakeClient:
    """Ray's job client, with a log that a test writes and a line that a test cuts."""

    def __init__(self, log: str, *, cut_at: Sequence[int] = ()) -> None:
        self.log = log
        self.cuts = list(cut_at)
        self.down_for = 0  # questions that fail
        self.submitted: list[dict[str, Any]] = []
        self.status = "SUCCEEDED"
        self.existing: list[Any] = []

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.down_for:
            raise RuntimeError("cannot connect")
        end = self.cuts.pop(0) if self.cuts else len(self.log)
        for i in range(0, end, 10):
            await asyncio.sleep(0)
            yield self.log[i : min(i + 10, end)]
        if end < len(self.log):
            self.down_for = 2
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job_id: str) -> Any:
        if self.down_for:
            self.down_for -= 1
            raise ConnectionError("Failed to connect to Ray")
        return details(job_id, self.status if not self.cuts else "RUNNING")

    def get_job_logs(self, job_id: str) -> str:
        return self.log[: self.cuts[0]] if self.cuts else self.log

    def list_jobs(self) -> list[Any]:
        return self.existing

    def submit_job(self, **asked: Any) -> str:
        self.submitted.append(asked)
        if any(job.submission_id == asked["submission_id"] for job in self.existing):
            raise RuntimeError("Job with submission_id already exists")
        return str(asked["submission_id"])


def details(job_id: str, status: str, *, study: str = "blobs", message: str = "") -> Any:
    return SimpleNamespace(
        submission_id=job_id, job_id=None, metadata={STUDY_KEY: study, RUN_DIR_KEY: study}, status=status,
        start_time=1, end_time=None, driver_exit_code=None, message=message,
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_EVERY_S", "ENDING_S"):
        monkeypatch.setattr(submission, name, 0.01)


def head_with(client: FakeClient) -> Head:
    head = Head.__new__(Head)
    head.address = "http://head:8265"
    head._client = client
    return head


LOG = f"Running entrypoint\n\n{BEGUN}\n" + "".join(f"line {i}\n" for i in range(20))
DONE = Outcome(stdout="{}\n", exit_code=3)


def test_broken_connection_is_tried_again_and_nothing_is_shown_twice(quick: None) -> None:
    client = FakeClient(LOG + encode_result(DONE), cut_at=[60, 30, 100])
    shown: list[str] = []
    assert head_with(client).follow("hpsearch-blobs-1", shown.append) == DONE
    assert [line for line in shown if not line.startswith("note:")] == [f"line {i}" for i in range(20)]
    assert sum(line.startswith("note:") for line in shown) == 3


def test_head_that_stays_away_is_left_with_words(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "RETRY_S", 0.05)
    client = FakeClient(LOG, cut_at=[60] * 1000)
    client.get_job_info = _refuse  # type: ignore[method-assign]
    with pytest.raises(LostTouch, match="does not answer as it should"):
        head_with(client).follow("hpsearch-blobs-1", lambda line: None)


def _refuse(job_id: str) -> Any:
    raise ConnectionError("Failed to connect to Ray")


def test_silent_connection_is_doubted(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "SILENCE_S", 0.05)
    client = FakeClient(LOG + encode_result(DONE))
    whole = client.tail_job_logs
    hung: list[bool] = []

    async def hang_once(job_id: str) -> AsyncIterator[str]:
        if not hung:
            hung.append(True)
            yield client.log[:60]
            await asyncio.sleep(3600)
        async for chunk in whole(job_id):
            yield chunk

    client.tail_job_logs = hang_once  # type: ignore[method-assign]
    shown: list[str] = []
    assert head_with(client).follow("hpsearch-blobs-1", shown.append) == DONE
    assert shown == [f"line {i}" for i in range(20)]


@pytest.mark.parametrize(
    ("log", "message", "expected"),
    [
        ("Running entrypoint\n/bin/sh: 1: -m: not found\n", "", "the PATH of `ray start` on the head knows no python"),
        ("Running entrypoint\npython: No module named hpsearch\n", "", "every node needs hpsearch's dependencies"),
        ("", "Job supervisor actor died\nlast line", "last line"),
        (LOG, "", "line 19"),
    ],
)
def test_job_that_ends_without_a_word_of_ours_is_told_by_the_line_that_says_most(
    quick: None, log: str, message: str, expected: str
) -> None:
    client = FakeClient(log)
    client.get_job_info = lambda job_id: details(job_id, "FAILED", message=message)  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="ended without a result") as caught:
        head_with(client).follow("hpsearch-blobs-1", None)
    assert expected in caught.value.message
    assert "ray job logs hpsearch-blobs-1 --address http://head:8265" in caught.value.hint


def test_job_that_was_killed_is_interrupted(quick: None) -> None:
    client = FakeClient(LOG)
    client.status = "STOPPED"
    shown: list[str] = []
    assert head_with(client).follow("hpsearch-blobs-1", shown.append) == Outcome(stdout="", exit_code=130)
    assert shown[-1] == "job hpsearch-blobs-1 was stopped there; what was finished is kept, --resume goes on"


def submit(client: FakeClient, run_dir: str = "blobs") -> submission.Job:
    return head_with(client).submit(
        ["launch", "study/space.yaml"], archive=Path("a.zip"), typed="", study="blobs", run_dir=run_dir, private={}
    )


def test_second_launch_of_a_study_that_runs_is_refused(quick: None) -> None:
    client = FakeClient("")
    client.existing = [details("hpsearch-blobs-1", "SUCCEEDED"), details("hpsearch-blobs-2", "PENDING")]
    with pytest.raises(UsageError) as caught:
        submit(client)
    assert caught.value.message == "study 'blobs' runs there already, as job hpsearch-blobs-2 in ~/hpsearch-runs/blobs"
    assert "hpsearch status blobs --address http://head:8265" in caught.value.hint
    assert client.submitted == []
    assert submit(client, run_dir="elsewhere").id == "hpsearch-blobs-3"


def test_two_launches_at_once_want_the_same_number_and_one_is_refused(quick: None) -> None:
    client = FakeClient("")
    taken = details("hpsearch-blobs-1", "PENDING")
    asked: list[int] = []

    def list_jobs() -> list[Any]:
        asked.append(1)
        client.existing = [taken]
        return [] if len(asked) == 1 else [taken]  # the other one came between our look and our order

    client.list_jobs = list_jobs  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="runs there already, as job hpsearch-blobs-1"):
        submit(client)


def test_command_quotes_what_a_shell_would_take_apart(quick: None) -> None:
    client = FakeClient("")
    head_with(client).submit(
        ["launch", "study/my space.yaml", "--set=name=a;b"],
        archive=Path("a.zip"), typed="hpsearch launch 'my space.yaml'", study="x", run_dir="x", private={},
    )  # fmt: skip
    assert client.submitted[0]["entrypoint"] == (
        '"$(command -v python || command -v python3)" -m hpsearch.cli.submitted '
        """--typed 'hpsearch launch '"'"'my space.yaml'"'"'' -- launch 'study/my space.yaml' '--set=name=a;b'"""
    )
    assert client.submitted[0]["metadata"] == {STUDY_KEY: "x", RUN_DIR_KEY: "x", "hpsearch_verb": "launch"}
    assert client.submitted[0]["runtime_env"] == {"working_dir": "a.zip"}


# On the head


@pytest.fixture
def on_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a job begins: in a folder of Ray's, with a home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "package" / "study").mkdir(parents=True)
    (tmp_path / "package" / "study" / "task.py").write_text(TASK)
    (tmp_path / "package" / "study" / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path / "package")
    monkeypatch.setattr(sys, "argv", ["submitted"])
    return tmp_path


def test_verb_runs_in_the_base_folder_and_its_result_is_kept(on_head: Path) -> None:
    outcome = submitted.run_verb(["launch", "study/space.yaml", "--dry-run", "--run-dir=blobs", "--json"])
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["dry_run"]
    assert Path.cwd() == on_head / "home" / "hpsearch-runs"


def test_command_to_go_on_is_the_one_that_was_typed_elsewhere(on_head: Path) -> None:
    typed = "hpsearch launch space.yaml --address http://head:8265"
    submitted.run_verb(["status", "blobs"], typed=typed)
    assert sys.argv == typed.split()


def test_error_of_the_verb_is_its_exit_code(on_head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = submitted.run_verb(["status", "nothing", "--json"])
    assert outcome.exit_code == 2
    assert json.loads(outcome.stdout)["error"]["exit_code"] == 2
    assert "nothing holds no study" in capsys.readouterr().err


def test_secrets_that_are_gone_end_the_job_with_words(
    on_head: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(key: str) -> dict[str, str]:
        raise ClusterError("the tracking URI and its credentials, which are kept for ten minutes, are gone")

    monkeypatch.setattr(submitted, "take_secrets", gone)
    outcome = submitted.run_verb(["status", "blobs", "--json"], secrets="hpsearch-1.zip")
    assert outcome.exit_code == 4
    assert "are gone" in capsys.readouterr().err


def test_defect_of_ours_ends_with_its_traceback_and_code_1(
    on_head: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.cli.run_verbs.state_of", lambda run: 1 / 0)
    assert submitted.run_verb(["status", "blobs"]) == Outcome(stdout="", exit_code=1)
    assert "ZeroDivisionError" in capsys.readouterr().err
