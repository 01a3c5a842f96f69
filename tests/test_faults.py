"""Faults that no machine is to blame for: two launches at once, a clock that jumps, NaN, a task that raises."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpsearch.assembly import open_study
from hpsearch.cli import run
from hpsearch.cli.adapters import make_executor, make_sampler
from hpsearch.events import Finished, Opened, StageEnded
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.spec import parse_spec
from hpsearch.state import StudyState
from hpsearch.study import Study
from hpsearch.trial import TrialState
from tests import fakes
from tests.same_study import twice
from tests.tasks import blobs

DAY_S, HOUR_S = 86_400.0, 3600.0


def state_of(run_dir: Path) -> StudyState:
    return StudyState.of(read_journal(run_dir))


# Two launches

SLOW_TASK = """
import time
import torch
import hpsearch

class Blobs(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(300) % 3
        x = torch.randn(300, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:150], y[:150]), val=(x[150:], y[150:]))

    def model(self, config):
        time.sleep(0.3)
        return torch.nn.Linear(4, 3)
"""

SLOW_SPACE = """
name: blobs
task: task.py:Blobs
preflight: {enabled: false}
search: {trials: 8}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {max_epochs: 3, reduction_factor: 3}
ensemble: {enabled: false}
"""


def start(project: Path) -> subprocess.Popen[str]:
    """`hpsearch launch space.yaml --resume` in a process of its own."""
    command = ["launch", "space.yaml", "--fleet", "local", "--resume", "--json", "--skip-preflight"]
    return subprocess.Popen(
        [sys.executable, "-m", "hpsearch", *command],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task that takes its time; it is the working directory."""
    (tmp_path / "task.py").write_text(SLOW_TASK)
    (tmp_path / "space.yaml").write_text(SLOW_SPACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_second_launch_is_refused_while_the_first_lives_which_is_unharmed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hpsearch.cli.resume.LOCK_WAIT_S", 1.0)  # a killed driver's study gets 30 s to go
    journal = project / "runs" / "blobs" / FILE_NAME
    with start(project) as first:
        while first.poll() is None and not (journal.exists() and b'"type":"finished"' in journal.read_bytes()):
            time.sleep(0.01)
        began = time.monotonic()
        assert run(["launch", "space.yaml", "--fleet", "local", "--resume"]) == 2
        assert time.monotonic() - began < 20.0
        told = capsys.readouterr().err
        assert "is in use by another launch" in told
        assert "wait for it to end, or choose another --run-dir" in told
        assert run(["launch", "space.yaml", "--fleet", "local"]) == 2
        assert "holds this study already" in capsys.readouterr().err
        assert first.poll() is None, "the first launch was over too soon to tell"
        out, err = first.communicate(timeout=120)
        assert first.returncode == 0, err
    assert json.loads(out)["trials"]["total"] == 8
    entries = read_journal(journal.parent)
    assert [type(entry.event) for entry in entries].count(Opened) == 1
    assert twice(entries) == []


@pytest.mark.slow
def test_two_launches_at_the_same_instant_make_one_study(project: Path) -> None:
    with start(project) as first, start(project) as second:
        for launch in (first, second):
            _, err = launch.communicate(timeout=120)
            # The later one waits for the directory: then it finds the study done, or gives up.
            assert launch.returncode in (0, 2), err
            assert "Traceback" not in err
        assert 0 in (first.returncode, second.returncode)
    entries = read_journal(project / "runs" / "blobs")
    assert twice(entries) == []
    state = StudyState.of(entries)
    assert state.done
    assert len(state.trials) == 8


# A clock that jumps

CLOCKED = """
name: clocked
task: task.py:Task
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
budget: {hours: 1}
"""
EPOCH_S = 30.0


class Clocks:
    """A wall clock that someone sets, and a steady one."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.steady = 500.0

    def open(self, run_dir: Path) -> Study:
        return open_study(
            run_dir,
            parse_spec(CLOCKED),
            make_sampler=fakes.make_sampler,
            clock=lambda: self.wall,
            monotonic=lambda: self.steady,
            background=False,
            wait_s=0,
        )

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def work(self, study: Study, n_jobs: int, jumps: Sequence[float]) -> float:
        """Some jobs of half a minute each, the wall clock set after every one; the seconds that passed."""
        study.arriving("w")
        study.hello("w", fakes.FakeExecutor().describe())
        began = self.steady
        for number in range(n_jobs):
            assignment = study.pull("w")
            for job in assignment.jobs:
                self.pass_time(EPOCH_S)
                study.push("w", list(fakes.FakeExecutor().run([job], lambda ref: b"", lambda key, epoch: None)))
            self.wall += jumps[number % len(jumps)]
            if assignment.ended:
                break
        return self.steady - began


@pytest.mark.parametrize("jumps", [(-HOUR_S,), (DAY_S,), (DAY_S, -HOUR_S, 0.0)], ids=["back", "forward", "both"])
def test_clock_that_jumps_and_down_time_use_up_no_budget(tmp_path: Path, jumps: tuple[float, ...]) -> None:
    clocks = Clocks()
    worked = 0.0
    for down_s, clock_set_by in ((0.0, 0.0), (2 * DAY_S, 0.0), (60.0, -HOUR_S), (60.0, DAY_S)):
        clocks.pass_time(down_s)
        clocks.wall += clock_set_by
        study = clocks.open(tmp_path)
        assert study.state.worked_s == pytest.approx(worked, abs=0.01)
        worked += clocks.work(study, 4, jumps)
        study.close()
    study = clocks.open(tmp_path)
    worked += clocks.work(study, 1000, jumps)
    study.close()
    entries = read_journal(tmp_path)
    state = StudyState.of(entries)
    assert state.done
    assert worked < HOUR_S
    assert len(state.trials) == 9
    assert {entry.event.reason for entry in entries if isinstance(entry.event, StageEnded)} == {""}
    times = [entry.time for entry in entries]
    assert times == sorted(times)
    assert sum(state.stage_s.values()) <= worked + 0.01


def test_hours_that_were_worked_do_use_up_the_budget_whatever_the_clock_says(tmp_path: Path) -> None:
    clocks = Clocks()
    study = clocks.open(tmp_path)
    worked = clocks.work(study, 3, (-HOUR_S,))
    clocks.pass_time(HOUR_S - worked + 1)
    clocks.work(study, 100, (-HOUR_S,))
    study.close()
    state = state_of(tmp_path)
    assert state.done
    assert state.budget_spent == "budget.hours: 1"
    assert len(state.trials) == 3


# NaN

NAN_TASK = """
import math
import torch
import hpsearch

SICK = {sick}

class Patient(torch.nn.Module):
    "Falls ill at the last batch of its second epoch, which is the short one."

    def __init__(self, illness):
        super().__init__()
        self.illness = illness if SICK else "none"
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        self.register_buffer("epochs", torch.zeros(()))

    def forward(self, x):
        out = self.layers(x)
        if not self.training:
            return out + 1e6 if self.illness == "metric" and self.epochs == 2 else out
        if len(x) == 64:
            return out
        self.epochs += 1
        if self.epochs < 2:
            return out
        if self.illness == "loss":
            return out * math.nan
        if self.illness == "infinite loss":
            return out * math.inf
        if self.illness == "gradient":
            return out + (out * 0).sqrt()  # finite; its gradient is 0 * inf
        if self.illness == "infinite gradient":
            return out + Overflow.apply(out)
        if self.illness == "buffer":
            self.layers[1].running_mean = torch.full((8,), math.nan)
        return out

class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.inf)

class Ward(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(600) % 3
        x = torch.randn(600, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:300], y[:300]), val=(x[300:450], y[300:450]), test=(x[450:], y[450:]))

    def model(self, config):
        return Patient(config["illness"])

    def metrics(self, output, target):
        return {{"spread": math.nan if output.abs().max() > 1e5 else output.std()}}
"""

ILLNESSES = ("loss", "infinite loss", "gradient", "infinite gradient", "buffer", "metric")
NAN_SPACE = f"""
name: ward
task: task.py:Ward
preflight: {{enabled: false}}
search: {{trials: 24}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-3, max: 1e-1}}
  illness: {{values: [none, {", ".join(ILLNESSES)}]}}
early_stopping: {{type: RULE, min_epochs: 1, max_epochs: 3, reduction_factor: 3}}
ensemble: {{pool: 3, size: 3}}
"""


def real(folder: Path, task: str, space: str) -> StudyState:
    """A study of a real task, in this process."""
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text(task)
    launch = Launch(
        run_dir=folder / "run",
        spec=parse_spec(space),
        folder=folder,
        make_sampler=make_sampler,
        make_executor=make_executor,
        stages=("search", "ensemble"),
        lock_wait_s=0,
    )
    LocalFleet(launch).run(lambda entries: None)
    return state_of(folder / "run")


def test_nan_anywhere_is_diverged_with_words_and_harms_nobody_else(tmp_path: Path) -> None:
    space = NAN_SPACE.replace("RULE", "none")
    sick = real(tmp_path / "sick", NAN_TASK.format(sick=True), space)
    healthy = real(tmp_path / "healthy", NAN_TASK.format(sick=False), space)
    said = {}
    assert sick.selected is not None
    assert len(sick.selected.pool) == 3
    for number, trial in sick.trials.items():
        illness = str(trial.config["illness"])
        undisturbed = healthy.trials[number]
        if illness == "none":
            assert trial.state is TrialState.COMPLETE
            assert [row.metrics for row in trial.curve] == [row.metrics for row in undisturbed.curve]
            continue
        said[illness] = trial.message
        assert trial.state is TrialState.DIVERGED
        # What was good before is kept, what was not is not.
        assert [row.metrics for row in trial.curve] == [row.metrics for row in undisturbed.curve[:1]]
        assert trial.checkpoint is None
        assert number not in (*sick.selected.pool, sick.selected.best)
    assert said == {
        "loss": "train_loss is nan",
        "infinite loss": said["infinite loss"],
        "gradient": "val_loss is nan",
        "infinite gradient": "val_loss is nan",
        "buffer": "val_loss is nan",
        "metric": "val_spread is nan",
    }
    assert said["infinite loss"] in ("train_loss is inf", "train_loss is nan")
    assert [trial.diverged for trial in sick.ranking()] == sorted(trial.diverged for trial in sick.trials.values())


@pytest.mark.parametrize("rule", ["asha", "sha"])
def test_trial_that_diverges_occupies_no_rung_and_keeps_none_waiting(tmp_path: Path, rule: str) -> None:
    state = real(tmp_path, NAN_TASK.format(sick=True), NAN_SPACE.replace("RULE", rule))
    assert state.done
    went_on = [trial for trial in state.trials.values() if trial.target > 1]
    ill = [trial for trial in went_on if trial.config["illness"] != "none"]
    assert ill, "none of those that fall ill in their second epoch was promoted to it"
    assert all(trial.state is TrialState.DIVERGED for trial in ill)
    complete = [trial for trial in state.trials.values() if trial.state is TrialState.COMPLETE]
    assert complete
    assert all(trial.config["illness"] == "none" for trial in complete)


# A task that raises

RAISING_TASK = blobs(
    """
    def model(self, config):
        limit = config["raises"] * RAISES
        attempts = Path(__file__).parent / f"{config['lr']}.attempts"
        n = int(attempts.read_text()) if attempts.exists() else 0
        attempts.write_text(str(n + 1))
        if n < limit:
            raise OSError(f"the lock of a cache file, attempt {n + 1}")
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
    """,
    imports="from pathlib import Path",
    rows=(300, 150, 150),
)

RAISING_SPACE = """
name: raising
task: task.py:Blobs
preflight: {enabled: false}
search: {trials: 9}
parameters:
  lr: {distribution: log_uniform, min: 1e-3, max: 1e-1}
  raises: {values: [VALUES]}  # how often
early_stopping: {type: none, max_epochs: 3}
ensemble: {pool: 9, size: 3}
"""


def test_trial_that_raises_now_and_then_is_retried_with_its_seed_and_comes_to_the_same(tmp_path: Path) -> None:
    space = RAISING_SPACE.replace("VALUES", "0, 1").replace("trials: 9", "trials: 4")
    raised = real(tmp_path / "raised", RAISING_TASK.replace("RAISES", "1"), space)
    never = real(tmp_path / "never", RAISING_TASK.replace("RAISES", "0"), space)
    crashes = [e.event for e in read_journal(tmp_path / "raised" / "run") if _crashed(e.event)]
    assert {event.trial for event in crashes} == {
        number for number, trial in raised.trials.items() if trial.config["raises"]
    }
    for number, trial in raised.trials.items():
        assert trial.state is TrialState.COMPLETE
        assert (trial.config, trial.seed) == (never.trials[number].config, never.trials[number].seed)
        assert [row.metrics for row in trial.curve] == [row.metrics for row in never.trials[number].curve]
    assert raised.selected == never.selected


def test_trial_that_raises_twice_fails_alone_with_its_words(tmp_path: Path) -> None:
    """Two such trials at most: a third would be taken for a bug that every trial hits."""
    space = RAISING_SPACE.replace("VALUES", "0, 2").replace("trials: 9", "trials: 4")
    state = real(tmp_path, RAISING_TASK.replace("RAISES", "1"), space)
    assert state.done
    failed = [trial for trial in state.trials.values() if trial.config["raises"]]
    assert 1 <= len(failed) <= 2
    assert state.selected is not None
    for trial in failed:
        assert trial.state is TrialState.FAILED
        assert trial.message == "OSError: the lock of a cache file, attempt 2"
        assert trial.frame.startswith("task.py:")
        assert trial.frame.endswith("in model")
        assert trial.number not in state.selected.pool
    others = [trial for trial in state.trials.values() if trial not in failed]
    assert all(trial.state is TrialState.COMPLETE for trial in others)


def _crashed(event: object) -> bool:
    return isinstance(event, Finished) and event.outcome == "crashed"


def test_bug_that_every_trial_hits_ends_the_launch_early_with_the_users_frame_once(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "task.py").write_text(SLOW_TASK.replace("time.sleep(0.3)", "width = config['width']"))
    assert run(["launch", "space.yaml", "--fleet", "local", "--skip-preflight"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    line = SLOW_TASK.splitlines().index("        time.sleep(0.3)") + 1
    assert err.count(f"task.py:{line} in model: KeyError: 'width'") == 1
    assert "Traceback" not in err
    assert len(state_of(project / "runs" / "blobs").trials) <= 3
