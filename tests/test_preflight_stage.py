"""Preflight in a study: first of all, once, and able to stop it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpsearch.checks import NAMES, Check
from hpsearch.cli import run
from hpsearch.cli.check import batch_lines, check_lines
from hpsearch.errors import PreflightError, SpecError, UserCodeError
from hpsearch.fleets import Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.job import CheckJob, Job, Result
from hpsearch.journal import read_journal
from hpsearch.spec import parse_spec
from hpsearch.stages import preflight
from hpsearch.stages.preflight import checks
from hpsearch.state import Entry, StudyState
from tests import fakes

SPACE = """
name: distrusted
task: task.py:Task
search: {trials: 3}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0}
  width: {values: [16, 32]}
early_stopping: {min_epochs: 1, max_epochs: 3}
ensemble: {pool: 2, size: 1}
"""


class Asked(fakes.FakeExecutor):
    """Answers checks as it is told to, by code."""

    def __init__(self, statuses: dict[str, str] | None = None, crash: bool = False) -> None:
        super().__init__()
        self._statuses = statuses or {}
        self._crash_checks = crash

    def run(self, jobs: Sequence[Job], fetch: Any, progress: Any) -> Iterator[Result]:
        for job in jobs:
            if not isinstance(job, CheckJob):
                yield from super().run([job], fetch, progress)
                continue
            self.ran.append(job.key)
            if self._crash_checks:
                yield Result(key=job.key, outcome="crashed", message="ValueError: bad", frame="task.py:3 in model")
            elif job.what == "network":
                found = [
                    Check(name=NAMES[code], code=code, status=status, found="7", expected="1", cause="x", look_at="y")  # type: ignore[arg-type]
                    for code, status in self._statuses.items()
                ]
                yield Result(key=job.key, values={"checks": [check.as_json() for check in found]})
            else:
                yield Result(key=job.key, values={"checks": []})


def launch(run_dir: Path, executor: fakes.FakeExecutor, *overrides: str, **more: Any) -> StudyState:
    seen: list[Entry] = []
    fleet = LocalFleet(
        Launch(
            run_dir=run_dir,
            spec=parse_spec(SPACE, overrides=overrides),
            folder=run_dir,
            make_sampler=fakes.make_sampler,
            make_executor=lambda spec, folder: executor,
            **more,
        )
    )
    fleet.run(seen.extend)
    return StudyState.of(seen)


def test_checks_come_before_any_other_job_and_ask_every_corner(tmp_path: Path) -> None:
    executor = Asked()
    launch(tmp_path, executor)
    kinds = [key.split("/")[0] for key in executor.ran]
    assert kinds.index("train") > max(i for i, kind in enumerate(kinds) if kind == "check")
    asked = [key for key in executor.ran if key.startswith("check/")]
    assert asked[:2] == ["check/network/trial 0", "check/data"]
    assert {"check/overfit/smallest", "check/step/highest lr", "check/step/lowest lr"} <= set(asked)
    assert asked.count("check/batch/trial 0") == 1


def test_failed_check_stops_the_study_before_any_search_job(tmp_path: Path) -> None:
    executor = Asked({"batch-leak": "failed", "drift": "warned"})
    with pytest.raises(PreflightError) as found:
        launch(tmp_path, executor)
    assert found.value.exit_code == 1
    assert str(found.value) == (
        "error[preflight]: 1 check failed, so nothing was searched\n"
        "  batch-leak: not true that one example's output ignores the others: 7 (expected 1)\n"
        "  hint: likeliest: x: y\n"
        "  hint: if it is meant: preflight: {allow: [batch-leak]}, or --skip-preflight"
    )
    assert not any(key.startswith("train/") for key in executor.ran)


def test_warning_lets_the_study_go_on(tmp_path: Path) -> None:
    state = launch(tmp_path, Asked({"drift": "warned"}))
    assert state.done
    assert [check.code for check in checks(state) if check.status == "warned"] == ["drift"]


def test_allowed_failure_lets_the_study_go_on_also_when_it_failed_before(tmp_path: Path) -> None:
    executor = Asked({"batch-leak": "failed"})
    with pytest.raises(PreflightError):
        launch(tmp_path, executor)
    before = len(executor.ran)
    state = launch(tmp_path, executor, "preflight.allow=[batch-leak]")
    assert state.done
    assert not any(key.startswith("check/") for key in executor.ran[before:])  # kept, not repeated


def test_study_of_a_version_without_the_batch_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        ask = preflight.check_jobs
        earlier.setattr(preflight, "check_jobs", lambda given: [job for job in ask(given) if job.what != "batch"])
        launch(tmp_path, Asked())
    executor = Asked()
    assert launch(tmp_path, executor, "search.trials=5").done
    assert executor.ran
    assert not any(key.startswith("check/") for key in executor.ran)


def test_verdicts_are_asked_anew_when_the_code_has_changed(tmp_path: Path) -> None:
    with pytest.raises(PreflightError):
        launch(tmp_path, Asked({"batch-leak": "failed"}), code={"task.py": "1"})
    with pytest.raises(PreflightError):
        launch(tmp_path, Asked({}), code={"task.py": "1"})
    executor = Asked({})
    assert launch(tmp_path, executor, code={"task.py": "2"}).done
    assert any(key.startswith("check/") for key in executor.ran)


def test_code_that_raises_in_a_check_ends_the_study_with_the_users_frame(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as found:
        launch(tmp_path, Asked(crash=True))
    assert found.value.frame == "task.py:3 in model"


def test_switched_off_it_asks_nothing(tmp_path: Path) -> None:
    executor = Asked({"batch-leak": "failed"})
    assert launch(tmp_path, executor, "preflight.enabled=false").done
    assert not any(key.startswith("check/") for key in executor.ran)


def test_check_that_does_not_exist_cannot_be_allowed() -> None:
    with pytest.raises(SpecError, match=r'names no check \(got "batchleak"\)\n  hint: did you mean batch-leak\?'):
        parse_spec(SPACE, overrides=["preflight.allow=[batchleak]"])


def test_line_of_a_check_tells_its_verdict_and_a_failure_its_cause() -> None:
    failed = Check(
        name=NAMES["batch-leak"], code="batch-leak", status="failed", found="7", expected="1", cause="x", look_at="y"
    )
    skipped = Check(name=NAMES["logits"], code="logits", status="skipped", reason="outputs are numbers")
    lines = check_lines([failed, skipped])
    assert lines[0].startswith("one example's output ignores the others....")
    assert lines[0].endswith("Failed")
    assert lines[1:5] == [
        "  7 (expected 1)",
        "  likeliest: x",
        "  hint: y",
        "  to let it pass: preflight: {allow: [batch-leak]}",
    ]
    assert lines[5].endswith("Skipped   outputs are numbers")


def test_why_there_is_no_figure_of_a_batch_is_told() -> None:
    state = StudyState()
    assert batch_lines(state, []) == []
    state.results["check/batch/trial 0"] = Result(key="", values={"checks": [], "reason": "inputs are complex numbers"})
    assert batch_lines(state, []) == ["no figure of a batch: inputs are complex numbers"]


TASK = """
import hpsearch, torch

class Leaky(hpsearch.Task):
    def data(self):
        g = torch.Generator().manual_seed(0)
        def split(n):
            y = torch.randint(0, 3, (n,), generator=g)
            x = torch.randn(n, 6, generator=g)
            x[torch.arange(n), y] += 2
            return x, y
        return hpsearch.Splits(train=split(300), val=split(200), test=split(200))

    def model(self, config):
        return Net(config["width"])

class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))

    def forward(self, x):
        return self.net(x)CHANGE
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK.replace("CHANGE", " - self.net(x).mean(dim=0)"))
    (tmp_path / "space.yaml").write_text(SPACE.replace("task.py:Task", "task.py:Leaky"))
    return tmp_path


def test_check_verb_finds_a_real_leak_and_passes_the_mended_task(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "space.yaml"]) == 1
    out = capsys.readouterr().out
    assert "one example's output ignores the others" in out
    assert "preflight: {allow: [batch-leak]}" in out
    assert "Nothing was searched." in out
    plot = "runs/distrusted-check/plots/batch.png"
    assert f"look at a batch as the model receives it: {plot}\n" in out
    (project / plot).unlink()
    (project / "task.py").write_text(TASK.replace("CHANGE", ""))
    assert run(["check", "space.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["failed"], told["study"]) == (0, "distrusted")
    assert {check["code"] for check in told["checks"]} <= set(NAMES)
    assert told["plots"] == [plot]
    assert (project / plot).read_bytes().startswith(b"\x89PNG")


def test_verdicts_of_check_are_kept_until_something_changes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "task.py").write_text(TASK.replace("CHANGE", ""))
    assert run(["check", "space.yaml"]) == 0
    run_dir = project / "runs" / "distrusted-check"
    before = sum(entry.event.type == "finished" for entry in read_journal(run_dir))
    assert run(["check", "space.yaml"]) == 0
    assert sum(entry.event.type == "finished" for entry in read_journal(run_dir)) == before
    (project / "task.py").write_text(TASK.replace("CHANGE", "").replace("manual_seed(0)", "manual_seed(1)"))
    assert run(["check", "space.yaml"]) == 0  # other data: asked anew, in place of the old ones
    capsys.readouterr()


def test_launch_stops_at_the_leak_and_goes_on_when_told_to(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "space.yaml", "--fleet", "local"]
    assert run(arguments) == 1
    assert "error[preflight]: 1 check failed, so nothing was searched" in capsys.readouterr().err
    assert run([*arguments, "--resume", "--skip-preflight"]) in (0, 3)
    assert "skip" in json.dumps([vars(e.event) for e in read_journal(project / "runs" / "distrusted")], default=str)
