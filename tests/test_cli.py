"""The command line, in process: what is printed where, and with which exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hpsearch.cli import UNBUILT, VERBS, run
from hpsearch.events import Finished
from hpsearch.journal import Journal
from tests.projects import in_project
from tests.test_verdict import SPEC, losses, opened, trained

TASK = """
import torch
import hpsearch

class Blobs(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(600) % 3
        x = torch.randn(600, 4, generator=generator) + 2.0 * torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:300], y[:300]), val=(x[300:450], y[300:450]), test=(x[450:], y[450:]))

    def model(self, config):
        width = config["width"]
        return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
"""

SPACE = """
name: blobs
task: task.py:Blobs
preflight: {enabled: false}
search: {trials: 8}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {values: [8, 16]}
lr_range: {seeds: 2, steps: 30}
early_stopping: {max_epochs: 4, reduction_factor: 2}
ensemble: {pool: 4, size: 2}
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    with in_project(tmp_path, task=TASK, space=SPACE) as folder:
        yield folder


def edit(project: Path, old: str, new: str) -> None:
    """Change the task or the space."""
    for name in ("task.py", "space.yaml"):
        text = (project / name).read_text()
        (project / name).write_text(text.replace(old, new))


def launch(*arguments: str) -> int:
    return run(["launch", "space.yaml", "--fleet", "local", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose study is done; shared by tests that only read it."""
    project = tmp_path_factory.mktemp("finished")
    (project / "task.py").write_text(TASK)
    (project / "space.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert launch() == 0
    return project


@pytest.fixture
def done(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return finished


# The whole job


def test_launch_json_is_one_object_with_the_contracts_keys(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    told = json.loads(out)
    assert set(told) == {
        "study", "run_dir", "seed", "epochs", "wall_s", "stages_s", "trials", "lr_range", "best", "diagnosis",
        "baseline", "baselines", "ensemble", "mlflow", "lanes", "precision",
    }  # fmt: skip
    assert told["trials"]["total"] == 8
    assert {row["branch"]["optimizer"] for row in told["lr_range"]} == {"adamw", "sgd"}
    assert set(told["best"]["val"]) == set(told["best"]["test"]) == {"loss", "accuracy"}
    assert abs(sum(member["weight"] for member in told["ensemble"]["members"]) - 1) < 1e-9
    assert set(told["ensemble"]["gain"]) == {"metric", "value", "low", "high", "better"}
    assert told["mlflow"]["alias"] == "champion"
    assert told["epochs"]["search"] >= 8


def test_launch_ends_with_a_verdict_that_names_the_next_command(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch() == 0
    captured = capsys.readouterr()
    assert "blobs: 8 trials" in captured.out
    assert "hpsearch pull blobs --alias champion" in captured.out
    assert "search" in captured.err


def test_pulled_ensemble_predicts_what_the_study_measured(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "blobs", "--out", "pulled", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["members"]
    assert members
    namespace: dict[str, object] = {}
    exec(TASK, namespace)
    x, y = namespace["Blobs"]().data().test  # type: ignore[operator]
    np.savez("inputs.npz", inputs=x.numpy())
    assert run(["predict", "pulled", "inputs.npz", "--out", "out.npz"]) == 0
    predictions = np.load("out.npz")["predictions"]
    told = json.loads((done / "runs/blobs/package/ensemble.json").read_text())
    assert float((predictions.argmax(1) == y.numpy()).mean()) == pytest.approx(told["metrics"]["test"]["accuracy"])
    nll = -np.log(predictions[np.arange(len(y)), y.numpy()]).mean()
    assert nll == pytest.approx(told["metrics"]["test"]["loss"], rel=1e-4)


def test_top_json_lists_every_trial_best_first(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "runs/blobs", "-k", "1000", "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert len(trials) == 8
    losses = [trial["val"]["loss"] for trial in trials]
    assert losses == sorted(losses)
    assert {"trial", "config", "state", "epoch", "val"} <= set(trials[0])


def test_top_is_a_table(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "runs/blobs", "-k", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:5] == ["rank", "trial", "state", "val_loss", "epoch"]
    assert out[0].split()[-1] == "diagnosis"
    assert out[4].startswith("8 trials: ")
    assert all(line.startswith(("note: ", "  hint: ")) for line in out[5:])


def test_top_tells_the_smallest_models_that_are_as_good(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "runs/blobs", "--smallest-within", "1se", "-k", "1000", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["best", "within", "standard_error", "threshold", "trials"]
    assert run(["top", "runs/blobs", "--json"]) == 0
    assert told["best"] == json.loads(capsys.readouterr().out)["trials"][0]
    assert told["best"]["n_parameters"] in (4 * 8 + 8 + 8 * 3 + 3, 4 * 16 + 16 + 16 * 3 + 3)
    assert told["within"] == "1se"
    assert told["threshold"] == pytest.approx(told["best"]["val"]["loss"] + told["standard_error"])
    sizes = [(trial["n_parameters"], trial["val"]["loss"]) for trial in told["trials"]]
    assert sizes == sorted(sizes)
    assert told["best"] in told["trials"]
    assert all(loss <= told["threshold"] for _, loss in sizes)

    assert run(["top", "runs/blobs", "--smallest-within", "1se", "-k", "1"]) == 0
    header, first, last = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["parameters", "trial", "state", "val_loss", "epoch"]
    assert first.split()[0] == str(sizes[0][0])
    assert f"within 1se of trial {told['best']['trial']}'s" in last


@pytest.mark.parametrize("within", ["1sd", "-1se"])
def test_top_refuses_what_is_no_number_of_standard_errors(
    within: str, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["top", "runs/blobs", "--smallest-within", within]) == 2
    assert capsys.readouterr().err == (
        f"error[usage]: --smallest-within takes a number of standard errors (got '{within}')\n"
        "  hint: write 1se, or 0.5se, or 2se\n"
    )


def test_top_says_what_has_to_be_measured_before_the_smallest_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(name: str, spec: dict[str, object], *more: Finished) -> str:
        journal = Journal.open(tmp_path / name)
        for event in (opened(spec), *trained(0, losses(0.3)), *more):
            journal.append(event)
        journal.close()
        assert run(["top", str(tmp_path / name), "--smallest-within", "1se"]) == 2
        return capsys.readouterr().err

    unknown = "error[usage]: the standard error of trial 0's val_loss is not known"
    confirm = "  hint: write confirm: {seeds: 3} into space.yaml, whose stage measures it; then launch with --resume\n"
    waiting = "  hint: wait for it, or go on with hpsearch launch --resume\n"
    alone = {**SPEC, "ensemble": {"enabled": False}}
    assert asked("a", SPEC) == f"{unknown} before stage ensemble has ended\n{waiting}"
    assert asked("b", {**SPEC, "confirm": {"enabled": True}}) == f"{unknown} before stage confirm has ended\n{waiting}"
    assert asked("c", alone) == f"{unknown}, and no stage of this study measures it\n{confirm}"
    values = {"metrics": {"loss": 0.3}, "row_scores": "rows.safetensors"}
    rows = Finished(key="evaluate/ensemble/0", worker="w", outcome="done", values=values)
    (tmp_path / "d").mkdir()
    save_file({"accuracy": np.ones(9)}, tmp_path / "d/rows.safetensors")
    assert asked("d", SPEC, rows) == f"{unknown}: the metric is no mean over rows\n{confirm}"
    assert "has a score and a known number of parameters" in nothing_trained(tmp_path / "e", capsys)


def nothing_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    journal = Journal.open(folder)
    journal.append(opened())
    journal.close()
    assert run(["top", str(folder), "--smallest-within", "1se"]) == 2
    return capsys.readouterr().err


def test_status_tells_that_it_is_done(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "runs/blobs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"


def test_note_is_kept_and_synced(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["note", "runs/blobs", "sgd wants more warm-up", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == "sgd wants more warm-up"
    assert run(["sync", "runs/blobs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waiting"] == 0


def test_empty_note_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["note", "runs/blobs", "  "]) == 2


def test_lr_find_measures_and_draws(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lr-find", "space.yaml", "--fleet", "local", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["lr_range"]) == 2
    assert Path(told["plot"]).read_bytes()[:4] == b"\x89PNG"
    assert told["mlflow"]["run_id"]


def test_resume_of_a_finished_study_says_the_same(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert launch("--json", "--resume") == 0
    second = json.loads(capsys.readouterr().out)
    for key in ("best", "ensemble", "trials", "epochs", "lr_range"):
        assert second[key] == first[key]
    assert second["mlflow"]["run_id"] == first["mlflow"]["run_id"]


def test_resume_of_a_study_that_is_through_starts_no_workers(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fleet(*anything: object) -> None:
        raise AssertionError("a fleet was made")

    before = (done / "runs/blobs/journal.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("hpsearch.cli.launch.make_fleet", fleet)
        assert launch("--resume") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{done}/runs/blobs holds this study, done; nothing is left to train\n")
    assert captured.out.startswith("blobs: 8 trials: ")
    assert (done / "runs/blobs/journal.jsonl").read_bytes() == before


def test_verdict_ends_with_the_run_directory_and_its_plots(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--resume") == 0
    n = len(list((done / "runs/blobs/plots").glob("*.png")))
    assert capsys.readouterr().out.splitlines()[-1] == f"run directory: runs/blobs; {n} plots in runs/blobs/plots"


def test_sync_finds_the_tracking_uri_of_the_launch(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--set", "search.trials=2", "--tracking-uri", "sqlite:///other.db") == 0
    capsys.readouterr()
    assert run(["sync", "runs/blobs"]) == 0
    assert capsys.readouterr().out.startswith(f"sqlite:///{project / 'other.db'} ")
    assert not (project / "mlflow.db").exists()


def test_resume_where_there_is_nothing_starts_afresh(project: Path) -> None:
    assert launch("--resume", "--set", "search.trials=2") == 0


def test_set_overrides_a_key(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--json", "--dry-run", "--set", "search.trials=3") == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 3


def test_dry_run_starts_nothing(project: Path) -> None:
    assert launch("--dry-run") == 0
    assert not (project / "runs").exists()


def test_dry_run_counts_confirmation_and_folds_and_stops_at_the_budget(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--set", "confirm={trials: 3, seeds: 3}", "--set", "evaluate={folds: 2, trials: 3}")
    assert launch("--dry-run", "--set", "lr_range.per=[]", "--set", "budget.epochs=5", *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "LR range: 2 ramps of 30 steps in 1 branch" in lines
    assert "epochs: about 16 of 32 without early stopping; budget.epochs ends the search at 5" in lines
    assert "folds: 6 trainings of the best 3, 24 epochs at most" in lines
    assert "confirmation: 9 trainings at most, of the best 3, 36 epochs at most" in lines


def test_dry_run_says_what_is_behind_and_that_a_gpu_is_missing(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["launch", "space.yaml", "--dry-run", "--resume", "--set", "resources.gpus=1"]) == 0
    out = capsys.readouterr().out
    assert "warning[gpu]: a worker asks for 1 GPU, and torch finds none on this machine\n" in out
    assert re.search(r"runs/blobs holds this study, done: 8 trials and \d+ epochs are behind it", out)


# What users get wrong


@pytest.mark.parametrize("verb", UNBUILT)
def test_verb_that_is_not_built_says_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "anything", "--else"]) == 2
    assert f"`hpsearch {verb}`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lunch"], "No such command 'lunch'"),
        (["launch"], "Missing argument 'SPACE'"),
        (["launch", "space.yaml", "--workers", "0"], "--workers"),
        (["launch", "space.yaml", "--fleet", "slurm"], "--fleet"),
        (["launch", "space.yaml", "--fleet", "local", "--address", "auto"], "--fleet local does not use"),
        (
            ["launch", "space.yaml", "--fleet", "local", "--set", "resources.gpus=4"],
            "error[usage]: resources.gpus is 4, and a worker of several GPUs is several processes, which --fleet local "
            "does not start: it runs everything in this one\n"
            "  hint: leave --fleet out, or try it with --set resources.gpus=1",
        ),
        (["lr-find", "space.yaml", "--fleet", "local", "--set", "resources.gpus=2"], "resources.gpus is 2"),
        (["launch", "nowhere.yaml"], "nowhere.yaml"),
        (["validate", "."], "."),
        (["status", "nowhere"], "holds no study"),
        (["top", "nowhere"], "holds no study"),
        (["sync", "nowhere"], "holds no study"),
        (["note", "nowhere", "text"], "holds no study"),
        (["predict", "nowhere", "x.npz", "--out", "y.npz"], "x.npz is not there"),
        (["pull", "m", "--alias", "a", "--version", "1"], "two things"),
    ],
)
def test_wrong_command_line_is_exit_2_with_one_message(
    project: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(arguments)
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert code == 2


def test_error_with_json_is_an_object_on_stdout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "nowhere.yaml", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["exit_code"] == 2


def test_all_problems_of_a_space_are_told_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "search: {trials: 8}", "search: {trials: 0}\nserach: 1")
    assert run(["validate", "space.yaml"]) == 2
    err = capsys.readouterr().err
    assert "space.yaml:5:18" in err
    assert "`serach`" in err
    assert "2 problems" in err


def test_second_launch_into_the_same_directory_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 2
    err = capsys.readouterr().err
    assert "error[usage]: runs/blobs holds this study already\n  hint: to go on with it: " in err
    assert err.rstrip().endswith("--run-dir runs/blobs --resume")


def test_second_launch_says_what_was_edited_and_the_command_that_goes_on(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["launch", "space.yaml", "--fleet", "local", "--set", "search.trials=12"]
    monkeypatch.setattr("sys.argv", ["hpsearch", *arguments])
    assert run(arguments) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "error[usage]: runs/blobs holds this study already; since it was opened last:"
    assert second == "  search.trials: 8 -> 12: 4 more trials"
    assert third.startswith("  hint: to go on with it: ")
    assert third.endswith(
        "hpsearch launch space.yaml --fleet local --set search.trials=12 --run-dir runs/blobs --resume"
    )


def test_second_launch_offers_no_resume_with_what_it_would_refuse(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--set", "seed=3") == 2
    err = capsys.readouterr().err
    assert "  seed: 0 -> 3: the study cannot go on with it, since " in err
    assert "  hint: put back what it cannot go on with, or choose another --run-dir" in err
    assert "--resume" not in err


def test_sweep_into_a_directory_that_holds_one_offers_another(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["lr-find", "space.yaml", "--fleet", "local", "--run-dir", "sweep"]
    assert run(sweep) == 0
    assert run(sweep) == 2
    assert "  hint: choose another --run-dir\n" in capsys.readouterr().err


def test_dry_run_of_a_resume_says_what_was_edited_and_starts_nothing(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = (done / "runs/blobs/journal.jsonl").read_bytes()
    edits = ["--set", "search.trials=12", "--set", "early_stopping.max_epochs=8", "--set", "parameters.lr.max=0.1"]
    assert launch("--resume", "--dry-run", "--json", *edits) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["trials"] == 12
    assert captured.err.splitlines() == [
        "edited: search.trials: 8 -> 12: 4 more trials",
        "edited: early_stopping.max_epochs: 4 -> 8: complete trials are paused and may go on",
        "edited: parameters.lr: narrower (1e-4..1 -> 1e-4..0.1): new trials draw from it, old ones stay as evidence; "
        "its ranges are concluded anew from the ramps that were run",
    ]
    assert launch("--resume", "--dry-run", "--set", "seed=3") == 2
    assert (done / "runs/blobs/journal.jsonl").read_bytes() == journal


def test_resume_says_which_code_has_changed_and_goes_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "search.trials=2", "--resume"]
    (project / "layers.py").write_text("import torch\nReLU = torch.nn.ReLU\n")
    edit(project, "import hpsearch\n", "import hpsearch\nimport layers\n")
    assert launch(*few, "--json") == 0
    first = capsys.readouterr()
    assert "edited" not in first.err
    (project / "layers.py").write_text("import torch\nReLU = torch.nn.SiLU\n")
    assert launch(*few, "--json") == 0
    captured = capsys.readouterr()
    assert "edited: layers.py has changed since trials 0..1 were trained; they stay as evidence\n" in captured.err
    assert json.loads(captured.out).keys() == json.loads(first.out).keys()
    assert launch(*few) == 0
    assert "edited" not in capsys.readouterr().err


def test_study_that_never_got_to_its_data_goes_on_with_another_task(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "broken.py").write_text(
        "import no_such_package\nimport hpsearch\n\nclass Blobs(hpsearch.Task):\n    pass\n"
    )
    few = ("--set", "search.trials=1")
    assert launch("--set", "task=broken.py:Blobs", *few) == 1
    capsys.readouterr()
    assert launch("--resume", *few) == 0
    told = "edited: task: broken.py:Blobs -> task.py:Blobs: nothing was measured yet\n"
    assert told in capsys.readouterr().err
    assert launch("--resume", *few, "--set", "task=broken.py:Blobs") == 2


def test_second_launch_says_that_the_first_is_at_work(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.cli.resume.is_locked", lambda run_dir: True)
    assert launch() == 2
    err = capsys.readouterr().err
    assert "runs/blobs holds this study already, and another launch is at work on it" in err
    assert "status runs/blobs" in err


def test_directory_of_another_study_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--run-dir", "runs/blobs", "--resume", "--set", "name=other") == 2
    assert "belongs to another study, 'blobs'" in capsys.readouterr().err


def test_resume_with_another_space_names_what_differs(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--resume", "--set", "parameters.lr.max=0.5", "--set", "seed=3", "--set", "shuffle=false") == 2
    err = capsys.readouterr().err
    assert "error[other-study]: runs/blobs: seed: 0 -> 3: the study cannot go on with it, since it cuts " in err
    assert "error[other-study]: runs/blobs: shuffle: true -> false: the study cannot go on with it, since " in err
    assert "parameters.lr" not in err


def test_run_directory_that_cannot_be_written_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "file").write_text("in the way")
    assert launch("--run-dir", "file/run") == 2
    assert "cannot be written" in capsys.readouterr().err


USER_ERRORS = {
    "import": ("import hpsearch\n", "import hpsearch\nimport no_such_package\n", "no_such_package", 1),
    "syntax": ("def data(self):", "def data(self:", "task.py", 2),
    "class": ("class Blobs", "class Blob", "Blob", 2),
    "data": ("return hpsearch.Splits(", "raise OSError('on fire')\n        return hpsearch.Splits(", "on fire", 1),
    "model": ("return torch.nn.S", "raise ValueError('odd width')\n        return torch.nn.S", "odd width", 1),
    "shape": ("torch.nn.Linear(4, width", "torch.nn.Linear(5, width", "shape", 1),
    "classes": ("torch.nn.Linear(width, 3)", "torch.nn.Linear(width, 2)", "2", 1),
    "metric": ("name: blobs\n", "name: blobs\nmetric: {name: val_auc}\n", "auc", 1),
}


@pytest.mark.parametrize("error", USER_ERRORS)
def test_users_error_ends_in_one_message_without_our_traceback(
    project: Path, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, expected, code = USER_ERRORS[error]
    edit(project, old, new)
    assert launch() == code
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err
    assert "internal error" not in err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("torch.nn.Linear(4, width", "torch.nn.Linear(7, width"),
            "error[task]: task.py:12 in model: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            ("width, 3)", "width, 1)", "y[:300]", "y[:300].float()", "y[300:450]", "y[300:450].float()",
             "y[450:]", "y[450:].float()"),
            "error[task]: the model's output is (300, 1) and the targets are (300,), which would broadcast\n"
            "  hint: squeeze the output: output.squeeze(-1), or give targets of its shape: y.reshape(-1, 1)",
        ),
    ],
    ids=["a layer of a wrong size", "targets of another shape"],
)  # fmt: skip
def test_what_every_job_fails_at_is_told_once_at_the_users_own_place(
    project: Path, change: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for old, new in zip(change[::2], change[1::2], strict=True):
        edit(project, old, new)
    edit(project, "preflight: {enabled: false}\n", "")
    assert launch() == 1
    err = capsys.readouterr().err
    assert expected in re.sub(r"\(\d+,", "(300,", err)
    assert err.count(expected.splitlines()[0].split(": ")[-1][-20:]) == 1
    assert "warning[crashed]" not in err


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        (
            "{name: val_acuracy, goal: maximize}",
            "error[task]: the study's metric `val_acuracy` is not among those of the task (known: train_loss, "
            "val_loss, val_accuracy)\n"
            "  hint: did you mean val_accuracy? else give it in Task.metrics(), or name one of these, and its goal, "
            "under `metric` in space.yaml\n",
        ),
        (
            "{name: val_r2}",
            "error[task]: the metric `r2` is not for models that predict classes (those are: accuracy, "
            "balanced_accuracy, f1, roc_auc, average_precision, top5, log_loss, iou)\n",
        ),
    ],
)
def test_metric_that_the_task_has_not_is_an_error_before_anything_is_trained(
    project: Path, metric: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, "name: blobs\n", f"name: blobs\nmetric: {metric}\n")
    assert launch() == 1
    assert capsys.readouterr().err == f"starting the workers\n{error}"
    assert run(["check", "space.yaml"]) == 1
    assert capsys.readouterr().err == error


def test_gpu_that_is_not_there_is_said_without_a_traceback(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["check", "space.yaml"], ["launch", "space.yaml", "--fleet", "local"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: False)
            assert run([*command, "--set", "resources.gpus=1"]) == 2
        assert capsys.readouterr().err == (
            "error[usage]: a worker asks for 1 GPU; torch finds none on this machine\n"
            "  hint: --set resources.gpus=0 does without, and --address names a cluster that has one\n"
        )
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("x[:300], y[:300]", "x[:0], y[:0]", "train"),
        ("x[:300], y[:300]", "x[:300], y[:299]", "train"),
        ("val=(x[300:450], y[300:450])", "val=(x[300:450], y[300:450] + 7)", "val"),
        ("val=(x[300:450], y[300:450])", "val=(x[300:450] / 0, y[300:450])", "val"),
        ("val=(x[300:450], y[300:450])", "val=(x[300:450, :2], y[300:450])", "val"),
        ("train=(x[:300], y[:300])", "train=x[:300]", "train"),
    ],
    ids=["no rows", "lengths", "targets out of range", "nan", "shapes", "not a pair"],
)
def test_splits_that_cannot_be_trained_on_are_named(
    project: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, old, new)
    assert launch() == 1
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err
    assert "internal error" not in err


def test_search_without_a_usable_trial_is_exit_3(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = "def loss(self, output, target):\n        return output.sum() * float('nan')\n\n    "
    edit(project, "def model(self, config):", loss + "def model(self, config):")
    assert launch("--set", "search.trials=3") == 3
    assert "none of 3 trials left a finite checkpoint" in capsys.readouterr().err


def test_what_the_users_code_prints_does_not_spoil_stdout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "def model(self, config):", "def model(self, config):\n        print('building')")
    assert launch("--json", "--set", "search.trials=2") == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "building" in captured.err


def test_resume_command_does_not_tell_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpsearch.cli.resume import command_again

    uri = "http://ann:S3CRET@127.0.0.1:9"
    monkeypatch.setattr(
        "sys.argv", ["hpsearch", "launch", "space.yaml", "--tracking-uri", uri, f"--tracking-uri={uri}"]
    )
    again = command_again(Path("runs/blobs"))
    assert "S3CRET" not in again
    assert again.endswith("--run-dir runs/blobs --resume")


# MLflow out of reach

NOWHERE = "http://127.0.0.1:9"


def test_launch_goes_on_without_mlflow_and_names_sync(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--tracking-uri", NOWHERE, "--json", "--set", "search.trials=2") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mlflow"]["run_id"] is None
    assert "hpsearch sync" in captured.err
    assert run(["sync", "runs/blobs", "--tracking-uri", "sqlite:///mlflow.db"]) == 0


@pytest.mark.parametrize("arguments", [["pull", "blobs"], ["sync", "runs/blobs"]])
def test_pull_and_sync_need_mlflow(done: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--tracking-uri", NOWHERE]) == 4
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["blob"], "blob"), (["blobs", "--version", "77"], "77"), (["blobs", "--alias", "chapion"], "champion")],
    ids=["name", "version", "alias"],
)
def test_pull_of_what_is_not_there_names_what_is(
    done: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pull", *arguments, "--out", "nothing"]) == 2
    assert expected in capsys.readouterr().err
    assert not (done / "nothing").exists()


def test_predict_refuses_inputs_of_another_shape(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("wrong.npz", inputs=np.zeros((3, 5), np.float32))
    assert run(["predict", "runs/blobs/package", "wrong.npz", "--out", "o.npz"]) == 2
    assert "has shape (3, 5); the model takes (N, 4) of float32" in capsys.readouterr().err
