"""A study that is killed at any moment, any number of times, and resumed is the study that nobody killed.

Real launches of a real torch task, their whole process group ended by SIGKILL at seeded random moments of every stage;
and, with fake workers, journals cut at every byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hpsearch.events import Finished
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.journal import FILE_NAME, Journal, JournalTail, read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry, StudyState
from tests import fakes
from tests.tasks import blobs

# Dropout and batch norm: what is drawn or remembered beside the weights must come back too.
TASK = blobs(
    """
    def model(self, config):
        time.sleep(0.03)  # so that a kill comes within a job, not ten jobs later
        width = config["width"]
        return torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Dropout(0.2),
            torch.nn.Linear(width, 3),
        )
    """,
    imports="import time",
)

SPACE = """
name: blobs
task: task.py:Blobs
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {values: [8, 16]}
lr_range: {seeds: 2, steps: 30}
early_stopping: {type: RULE, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
"""

# What a launch imports, loaded once: each launch is then a fork of this process, in a session and group of its own.
FORKED = """
import json, os, sys
import mlflow, onnxscript, torch
import hpsearch.cli.launch, hpsearch.cli.tracking, hpsearch.fleets.local, hpsearch.training.executor
from hpsearch.cli import main

print("ready", flush=True)
for line in sys.stdin:
    folder, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["hpsearch", *arguments]
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Launches:
    """Starts `hpsearch launch` in a project, each in a process group of its own. One at a time."""

    def __init__(self, project: Path) -> None:
        self.project = project

    def start(self) -> int:
        """The process group's id."""
        raise NotImplementedError  # abstract: as a shell does it, or by forking

    def ended(self) -> bool:
        """Whether the launch that was started last has ended of itself."""
        raise NotImplementedError  # abstract: see start

    def wait(self) -> tuple[int, str, str]:
        """Exit status (negative: the signal that ended it), stdout, stderr."""
        raise NotImplementedError  # abstract: see start

    @property
    def run_dir(self) -> Path:
        return self.project / "runs" / "blobs"

    @property
    def command(self) -> list[str]:
        store = f"sqlite:///{self.project}/mlflow.db"
        return ["launch", "space.yaml", "--fleet", "local", "--resume", "--json", "--tracking-uri", store]


class Plain(Launches):
    """As a shell starts them."""

    def start(self) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpsearch", *self.command],
            cwd=self.project,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> tuple[int, str, str]:
        out, err = self._process.communicate(timeout=120)
        return self._process.returncode, out, err


class Forked(Launches):
    """Without the seconds that torch and MLflow take to import."""

    def __init__(self, project: Path, parent: subprocess.Popen[str]) -> None:
        super().__init__(project)
        self._parent = parent

    def start(self) -> int:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps([str(self.project), self.command]) + "\n")
        self._parent.stdin.flush()
        self._group = self._number()
        return self._group

    def ended(self) -> bool:
        try:
            os.kill(self._group, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> tuple[int, str, str]:
        return self._number(), (self.project / "out").read_text(), (self.project / "err").read_text()

    def _number(self) -> int:
        assert self._parent.stdout is not None
        return int(self._parent.stdout.readline())


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[[Path], Forked]]:
    """Launches that fork from one process, which ends with the module's tests."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        yield lambda project: Forked(project, parent)
        parent.stdin.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = (
        "import sys; from hpsearch.tracker.mlflow_writer import make_client as m; m(sys.argv[1]).search_experiments()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{path}"], check=True, capture_output=True)
    return path


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill a launch: `after_s` seconds after the journal tells of so many results, or so many ends."""

    stage: str  # "start", "tracking" or a stage's name
    after_s: float
    n_results: int = 0
    n_ends: int = 0

    def has_come(self, run_dir: Path) -> bool:
        return count(run_dir, "finished") >= self.n_results and count(run_dir, "ended") >= self.n_ends


def bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def count(run_dir: Path, event: str) -> int:
    """Events of a type that are on the disk."""
    return bytes_of(run_dir / FILE_NAME).count(f'"type":"{event}"'.encode())


def moments(uncut: Sequence[Entry], kills: Mapping[str, int], rng: random.Random) -> list[Moment]:
    """Seeded random moments of each stage, in the order in which a study lives through them.

    Args:
        uncut: the journal of the study that nobody killed.
        kills: how often to kill it, by stage.
    """
    stage_of = []  # of each result
    state = StudyState()
    for entry in uncut:
        if isinstance(entry.event, Finished):
            stage_of.append(state.stage)
        state.apply(entry.event, entry.time)
    found = []
    for stage, n_kills in kills.items():
        if stage in ("start", "tracking"):
            longest_s = 1.5 if stage == "start" else 0.05
            found += [Moment(stage=stage, after_s=rng.uniform(0.0, longest_s)) for _ in range(n_kills)]
        else:
            places = [n + 1 for n, name in enumerate(stage_of) if name == stage][:-2]  # a kill may come late
            chosen = sorted(rng.sample(places, n_kills))
            found += [Moment(stage=stage, n_results=n, after_s=rng.uniform(0.0, 0.03)) for n in chosen]
    return found


def kill_at(launches: Launches, moment: Moment) -> str:
    """Start a launch, end its whole group at that moment, and tell the stage that was hit."""
    run_dir = launches.run_dir
    if moment.stage == "tracking":
        moment = replace(moment, n_ends=count(run_dir, "ended") + 1)
    elif moment.stage != "start":  # at least one result more than the last launch left
        moment = replace(moment, n_results=max(moment.n_results, count(run_dir, "finished") + 1))
    group = launches.start()
    while not moment.has_come(run_dir) and not launches.ended():
        time.sleep(0.001)
    time.sleep(moment.after_s)
    with contextlib.suppress(ProcessLookupError):  # MLflow may have had little left to be told
        os.killpg(group, signal.SIGKILL)
    code, _, err = launches.wait()
    assert code == -signal.SIGKILL or (code == 0 and moment.stage == "tracking"), err
    if b"\n" not in bytes_of(run_dir / FILE_NAME):
        return "start"
    state = StudyState.of(read_journal(run_dir))
    return "tracking" if state.done else state.stage or "start"


def project(folder: Path, rule: str, store: Path) -> Path:
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    (folder / "space.yaml").write_text(SPACE.replace("RULE", rule))
    shutil.copy(store, folder / "mlflow.db")
    return folder


def run_through(launches: Launches) -> dict[str, object]:
    """The verdict of a launch that nobody kills."""
    launches.start()
    code, out, err = launches.wait()
    assert code == 0, err
    told: dict[str, object] = json.loads(out)
    return told


def figures(told: Mapping[str, object]) -> dict[str, object]:
    """Of a verdict what must not depend on kills: all but times, places and MLflow's numbers."""
    return {k: v for k, v in told.items() if k not in ("run_dir", "wall_s", "stages_s", "mlflow")}


def study_of(state: StudyState) -> dict[str, object]:
    """All that a study came to, but for times."""
    assert state.selected is not None
    assert state.compared is not None
    return {
        "trials": {
            n: (t.config, t.seed, [(row.epoch, row.metrics) for row in t.curve], t.state, t.checkpoint)
            for n, t in state.trials.items()
        },
        "ranges": state.ranges,
        "selected": state.selected,
        "compared": state.compared,
        "results": {key: (r.outcome, r.values) for key, r in state.results.items()},
    }


def finished_in(run_dir: Path) -> list[Finished]:
    return [entry.event for entry in read_journal(run_dir) if isinstance(entry.event, Finished)]


def require_no_epoch_twice(run_dir: Path) -> None:
    reached: dict[int, int] = {}
    for event in finished_in(run_dir):
        for epoch, _, _ in event.epochs:
            assert event.trial is not None
            assert epoch == reached.get(event.trial, 0) + 1
            reached[event.trial] = epoch


def prove(folder: Path, rule: str, store: Path, kills: Mapping[str, int], start: Callable[[Path], Launches]) -> None:
    """Launch twice, kill the second again and again, and compare."""
    whole = start(project(folder / "whole", rule, store))
    cut = start(project(folder / "cut", rule, store))
    uncut_verdict = run_through(whole)
    uncut = finished_in(whole.run_dir)
    journal = cut.run_dir / FILE_NAME
    hit = []
    before = b""
    for moment in moments(read_journal(whole.run_dir), kills, random.Random(2026)):
        hit.append(kill_at(cut, moment))
        # Nothing that was on the disk is ever told otherwise: configs, seeds and curves go on from where they stood.
        assert bytes_of(journal).startswith(before)
        before = bytes_of(journal)[: bytes_of(journal).rfind(b"\n") + 1]
    verdict = run_through(cut)
    assert bytes_of(journal).startswith(before)
    assert set(hit) == set(kills), hit

    assert study_of(StudyState.of(read_journal(cut.run_dir))) == study_of(StudyState.of(read_journal(whole.run_dir)))
    assert figures(verdict) == figures(uncut_verdict)
    assert [event.key for event in finished_in(cut.run_dir)] == [event.key for event in uncut]
    require_no_epoch_twice(cut.run_dir)
    require_the_same_in_mlflow(cut.project / "mlflow.db", whole.project / "mlflow.db")


def require_the_same_in_mlflow(store: Path, other: Path) -> None:
    """Runs, points and versions, each once; read from the tables, which costs no import."""

    def content(path: Path) -> object:
        with contextlib.closing(sqlite3.connect(path)) as database:
            runs = database.execute("SELECT name, status FROM runs ORDER BY name").fetchall()
            points = database.execute(
                "SELECT runs.name, key, step, value FROM metrics JOIN runs USING (run_uuid)"
                " WHERE key LIKE 'val_%' OR key LIKE 'train_%' ORDER BY runs.name, key, step"
            ).fetchall()
            versions = database.execute("SELECT name, version FROM model_versions").fetchall()
            return runs, points, versions

    assert content(store) == content(other)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_command_that_is_killed_and_given_again_gives_the_study_that_nobody_killed(
    tmp_path: Path, store: Path, forked: Callable[[Path], Launches]
) -> None:
    """Synchronous halving: which trials go on does not even depend on who came first."""
    kills = {"search": 1, "tracking": 1}
    # The whole study is launched from one process, the killed one each time as a shell does it.
    prove(tmp_path, "sha", store, kills, lambda folder: (Plain if folder.name == "cut" else forked)(folder))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("rule", "kills"),
    [
        ("sha", {"start": 1, "preflight": 1, "lr_range": 1, "search": 3, "ensemble": 2, "tracking": 1}),
        ("asha", {"lr_range": 1, "search": 3, "ensemble": 1}),
    ],
)
def test_launch_killed_many_times_gives_the_study_that_nobody_killed(
    rule: str, kills: Mapping[str, int], tmp_path: Path, store: Path, forked: Callable[[Path], Launches]
) -> None:
    """With one worker asynchronous halving is the same study too: what was lost is what is given out next."""
    prove(tmp_path, rule, store, kills, forked)


# Cut journals

FAKED = """
name: cut
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
lr_range: {seeds: 2, steps: 20}
early_stopping: {type: RULE, min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
"""
LAST_BYTES = 1024


class Hapless(fakes.FakeExecutor):
    """Some learning rates diverge, and trial 4 crashes at every second rung."""

    def __init__(self) -> None:
        super().__init__(diverge_above=0.05, crash=lambda job: "ValueError: bad" if job.trial == 4 else "")


def make_hapless(spec: Spec, folder: Path) -> Hapless:
    return Hapless()


def faked(run_dir: Path, rule: str) -> StudyState:
    """The study of fake workers in a run directory, begun or gone on with; milliseconds."""
    launch = Launch(
        run_dir=run_dir,
        spec=parse_spec(FAKED.replace("RULE", rule)),
        folder=run_dir,
        make_sampler=fakes.make_sampler,
        make_executor=make_hapless,
        lock_wait_s=0,
    )
    LocalFleet(launch).run(lambda entries: None)
    return StudyState.of(read_journal(run_dir))


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine's power cut leaves is not the question, and hundreds of studies are run."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def cut_after(whole: Path, cut: Path, n_bytes: int) -> Path:
    """A copy of a run directory whose journal ends after so many bytes."""
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(whole, cut)
    with (cut / FILE_NAME).open("r+b") as file:
        file.truncate(n_bytes)
    return cut


def test_journal_cut_at_any_byte_of_its_last_kilobyte_loses_at_most_the_cut_line(tmp_path: Path, no_sync: None) -> None:
    uncut = faked(tmp_path / "whole", "asha")
    raw = (tmp_path / "whole" / FILE_NAME).read_bytes()
    entries = read_journal(tmp_path / "whole")
    copy = cut_after(tmp_path / "whole", tmp_path / "copy", 0)
    assert len(raw) > LAST_BYTES
    for n_bytes in range(len(raw) - LAST_BYTES, len(raw)):
        (copy / FILE_NAME).write_bytes(raw[:n_bytes])
        n_whole = raw[:n_bytes].count(b"\n")
        assert read_journal(copy) == entries[:n_whole]
        assert list(JournalTail(copy).new_entries()) == entries[:n_whole]
        with contextlib.closing(Journal.open(copy, wait_s=0)) as journal:
            assert journal.entries == entries[:n_whole]
        assert (copy / FILE_NAME).read_bytes() == raw[: raw[:n_bytes].rfind(b"\n") + 1]
    ends = [n + 1 for n in range(len(raw) - LAST_BYTES, len(raw)) if raw[n : n + 1] == b"\n"]
    for n_bytes in [end - left for end in ends for left in (100, 1, 0)]:  # within a line, without its end, after it
        cut = cut_after(tmp_path / "whole", tmp_path / "cut", n_bytes)
        assert study_of(faked(cut, "asha")) == study_of(uncut), f"cut after {n_bytes} bytes"


@pytest.mark.parametrize("rule", ["asha", "sha"])
def test_journal_cut_within_any_line_gives_the_same_study(rule: str, tmp_path: Path, no_sync: None) -> None:
    uncut = faked(tmp_path / "whole", rule)
    rng = random.Random(7)
    n_bytes = 0
    for line in (tmp_path / "whole" / FILE_NAME).read_bytes().splitlines(keepends=True):
        cut = cut_after(tmp_path / "whole", tmp_path / "cut", n_bytes + rng.randrange(len(line)))
        before = finished_in(cut)
        assert study_of(faked(cut, rule)) == study_of(uncut), f"cut in {line[:80]!r}"
        after = finished_in(cut)
        assert after[: len(before)] == before
        assert [event.key for event in after] == [event.key for event in finished_in(tmp_path / "whole")]
        require_no_epoch_twice(cut)
        n_bytes += len(line)
