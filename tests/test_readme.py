"""README.md: what it names exists, and what it shows runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from hpsearch.cli import UNBUILT, VERBS, group, run
from hpsearch.spec import Spec, read_spec
from hpsearch.task import load_task
from hpsearch.task_source import task_problems

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a study reads or leaves, as the README calls it; not files of this repository.
A_STUDYS_OWN = {"space.yaml", "my_task.py", "journal.jsonl", "inputs.npz", "predictions.npz", "predictions.npz."}
FILE_ENDINGS = (".py", ".yaml", ".toml", ".md", ".txt", ".json", ".sh")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, "" for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def without_blocks() -> str:
    return re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def inline_code() -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks())]


def named_files() -> list[str]:
    """Inline code that is a path: one with a known ending, or one that starts at a folder of the repository."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    paths = [code for code in inline_code() if re.fullmatch(r"(\./)?[\w.-]+(/[\w.-]+)*/?", code)]
    named = [
        path for path in paths if path.endswith((*FILE_ENDINGS, "/")) or path.lstrip("./").split("/")[0] in folders
    ]
    return sorted({path for path in named if path not in A_STUDYS_OWN and not path.startswith("runs/")})


def command_lines() -> list[list[str]]:
    """Every command of the blocks without a language, as words."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(\./scripts/|hpsearch |ray )", line)]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_the_checks_below_find_something_to_check() -> None:
    assert len(named_files()) > 20
    assert len(command_lines()) > 8
    assert len(blocks("yaml")) >= 1


@pytest.mark.parametrize("path", named_files())
def test_file_that_is_named_exists(path: str) -> None:
    places = (ROOT, ROOT / "hpsearch", ROOT / "search_spaces")  # modules and studies are named without their folder
    assert any((place / path).exists() for place in places)


def test_links_resolve() -> None:
    for target in sorted(set(re.findall(r"\]\(([^)\s]+)\)", README))):
        if re.match(r"https?://|mailto:", target):
            continue  # others' pages are theirs to keep
        path, _, anchor = target.partition("#")
        file = ROOT / path if path else ROOT / "README.md"
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_exists_with_its_options(words: list[str]) -> None:
    if words[0] == "ray":
        words = shlex.split(words[-1].partition("&& ")[2])  # what is run on the cluster
        if not words:
            return
    if words[0].startswith("./scripts/"):
        script = ROOT / words[0]
        assert script.is_file()
        assert script.stat().st_mode & 0o111, "a script can be executed"
        if words[0] == "./scripts/bench" and len(words) > 1:
            assert (ROOT / "benchmarks" / f"{words[1]}.py").is_file()
        return
    assert words[0] == "hpsearch"
    assert words[1] in VERBS
    command = group.get_command(click.Context(group), words[1])
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words[2:] if word.startswith("-")} <= known


def test_verbs_that_the_text_names_exist() -> None:
    verbs = {code.split()[1] for code in inline_code() if re.match(r"hpsearch [a-z]", code)}
    assert verbs
    assert verbs <= {*VERBS, *UNBUILT}


def test_verbs_said_to_be_missing_are_those_that_refuse() -> None:
    section = README.partition("## What it does not do")[2].partition("\n## ")[0]
    for verb in re.findall(r"\(`([a-z-]+)`\)", section):
        assert verb in UNBUILT or verb in Spec.model_fields


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's own study: each block under the name that its first line gives it."""
    for block in (*blocks("python"), *blocks("yaml")):
        name = re.match(r"# ([\w.-]+)\n", block)
        if name is not None:
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_baseline_of_the_text_is_one_of_its_own_space(project: Path) -> None:
    written = next(code for code in inline_code() if code.startswith("baseline: {"))
    (project / "space.yaml").write_text((project / "space.yaml").read_text() + written + "\n")
    assert read_spec(project / "space.yaml").baseline_config is not None


def test_text_names_each_verb_that_is_not_built() -> None:
    section = README.partition("## What it does not do")[2].partition("\n## ")[0]
    assert all(f"`{verb}`" in section for verb in UNBUILT)


@pytest.mark.parametrize("text", [text for text in blocks("yaml") if "parameters:" in text])
def test_space_is_valid_beside_its_task(project: Path, text: str) -> None:
    space = project / "space.yaml"
    space.write_text(text, encoding="utf-8")
    spec = read_spec(space)
    assert task_problems(spec.task, space, "task") == []
    load_task(spec.task, project)


@pytest.mark.slow
def test_study_runs_as_it_stands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "space.yaml"]) == 0
    capsys.readouterr()
    command = ["launch", "space.yaml", "--fleet", "local", "--set", "search.trials=2", "--json"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trials"]["total"] == 2
    assert told["best"]["test"]["accuracy"] > 0.5
    assert told["ensemble"]["members"]
    assert told["mlflow"]["model"] == "my-digits"
