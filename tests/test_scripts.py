"""The scripts a newcomer starts with, on a machine made of fakes: no network, no real environment, milliseconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Stands for every Python there is: it writes down how it was called, and .venv/bin/python is a copy of it.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-c import sys; sys.exit"*) exit "${FAKE_UNSUITABLE:-0}" ;;
  "-c import ensurepip, venv") exit "${FAKE_NO_VENV:-0}" ;;
  "--version") echo "Python 3.12.${FAKE_PATCH:-0}"; exit ;;
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip install"*) echo "what pip said"; echo "$*" >> "$CALLS"; exit "${FAKE_PIP:-0}" ;;
esac
echo "$*" >> "$CALLS"
"""
TOOLS = ["bash", "sh", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "tail", "date", "env"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def machine(tmp_path: Path, repository: Path) -> Path:
    """A folder with the repository's scripts and, on PATH, nothing but a few tools and the fake Python."""
    clone = tmp_path / "a clone"
    shutil.copytree(repository / "scripts", clone / "scripts")
    shutil.copytree(repository / ".ci", clone / ".ci")
    (clone / "pyproject.toml").write_text("[project]\n")
    (clone / "constraints.txt").write_text("six==1.17.0\n")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    python = tmp_path / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def run(machine: Path) -> Run:
    """Run a script of the clone from somewhere else, with settings of the fake Python as keywords."""

    def run(script: str, *args: str, clone: str = "a clone", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [machine / clone / script, *args],
            cwd=machine,
            env={"PATH": str(machine / "bin"), "CALLS": str(machine / "calls"), "HOME": str(machine), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def calls(machine: Path) -> Callable[[], list[str]]:
    """What Python was asked to do since the last time, the first three words of each."""

    def calls() -> list[str]:
        path = machine / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [" ".join(line.split()[:3]) for line in lines]

    return calls


@pytest.mark.parametrize("name", ["setup", "demo", "test", "check", "bench", "cluster-test", "../.ci/run"])
def test_scripts_are_executable_bash_that_stops_at_the_first_error(repository: Path, name: str) -> None:
    path = repository / "scripts" / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True)


def test_setup_installs_once_and_is_silent_afterwards(run: Run, calls: Callable[[], list[str]]) -> None:
    first = run("scripts/setup")
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""
    assert first.stderr.startswith("hpsearch: installing into .venv with Python 3.12.0, once; ")
    assert first.stderr.count("\n") == 1
    assert calls() == ["-m venv --clear", "-m pip install"]
    again = run("scripts/setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert calls() == []


def test_setup_installs_the_checkout_with_its_tests_at_the_pinned_versions(run: Run, machine: Path) -> None:
    run("scripts/setup")
    pip = (machine / "calls").read_text().splitlines()[-1]
    assert pip.endswith("--constraint constraints.txt --editable .[dev]")


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_setup_installs_again_into_the_same_environment_when_a_version_changes(
    run: Run, machine: Path, calls: Callable[[], list[str]], file: str
) -> None:
    run("scripts/setup")
    calls()
    (machine / "a clone" / file).write_text("# another\n")
    assert run("scripts/setup").returncode == 0
    assert calls() == ["-m pip install"]


def test_setup_keeps_an_environment_that_someone_made_with_a_torch_of_their_own(
    run: Run, machine: Path, calls: Callable[[], list[str]]
) -> None:
    (machine / "a clone" / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(machine / "bin" / "python3", machine / "a clone" / ".venv" / "bin" / "python")
    assert run("scripts/setup").returncode == 0
    assert calls() == ["-m pip install"]


def test_setup_makes_a_new_environment_after_a_move_or_with_another_python(
    run: Run, machine: Path, calls: Callable[[], list[str]]
) -> None:
    run("scripts/setup")
    calls()
    (machine / "a clone").rename(machine / "moved")
    assert run("scripts/setup", clone="moved").returncode == 0
    assert calls() == ["-m venv --clear", "-m pip install"]
    assert run("scripts/setup", clone="moved", FAKE_PATCH="1").returncode == 0
    assert calls() == ["-m venv --clear", "-m pip install"]


def test_setup_shows_what_pip_said_when_it_fails_and_tries_again_next_time(
    run: Run, calls: Callable[[], list[str]]
) -> None:
    failed = run("scripts/setup", FAKE_PIP="1")
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "failed\nwhat pip said\n"
        "hpsearch: the installation failed; its whole output is in .venv/install.log, and the next run tries again.\n"
    )
    calls()
    assert run("scripts/setup").returncode == 0
    assert calls() == ["-m pip install"]


def test_setup_without_a_suitable_python_says_which_it_needs(run: Run, machine: Path) -> None:
    script = machine / "a clone" / "scripts" / "setup"
    none = run("scripts/setup", FAKE_UNSUITABLE="1")
    assert (none.returncode, none.stdout, none.stderr) == (
        1,
        "",
        "hpsearch: found no Python 3.11 to 3.13 on PATH.\n"
        f"hpsearch: install one, or name one: PYTHON=/path/to/python {script}\n",
    )
    named = run("scripts/setup", PYTHON="/nowhere/python")
    assert (named.returncode, named.stderr) == (1, "hpsearch: PYTHON=/nowhere/python is not a Python 3.11 to 3.13.\n")


def test_setup_without_venv_or_ensurepip_says_what_to_install(run: Run) -> None:
    missing = run("scripts/setup", FAKE_NO_VENV="1")
    assert missing.returncode == 1
    assert missing.stderr.startswith(
        "hpsearch: python3 has no venv or no ensurepip, which make virtual environments.\n"
    )
    assert "apt install python3-venv" in missing.stderr


def test_demo_launches_the_digits_study_into_a_run_directory_of_its_own(run: Run, machine: Path) -> None:
    run("scripts/setup")
    hpsearch = machine / "a clone" / ".venv" / "bin" / "hpsearch"
    hpsearch.write_text('#!/bin/sh\necho "$PWD: $*"\nexit 3\n')
    hpsearch.chmod(0o755)
    done = run("scripts/demo", "--set", "seed=1")
    assert done.returncode == 3  # the study's own exit code
    assert done.stderr == ""
    where, _, rest = done.stdout.partition(": launch search_spaces/digits.yaml --run-dir runs/demo-")
    assert where == str(machine / "a clone")
    assert rest.endswith(" --set seed=1\n")


@pytest.mark.parametrize(
    ("source", "code", "closing"),
    [
        ("def test_it(): assert True", 0, "1 passed"),
        ("def test_it(): assert False", 1, "1 failed"),
        ("", 5, "no tests ran"),
    ],
)
def test_ci_ends_with_pytests_closing_line_and_exit_code(
    run: Run, machine: Path, source: str, code: int, closing: str
) -> None:
    clone = machine / "a clone"
    run("scripts/setup")
    python = clone / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exec "{sys.executable}" -P "$@" -p no:cacheprovider tests\necho "Python 3.12.0"\n'
    )
    (clone / "tests").mkdir()
    (clone / "tests" / "test_it.py").write_text(source)
    done = run(".ci/run")
    assert done.returncode == code, done.stdout + done.stderr
    assert closing in done.stdout.splitlines()[-1]


def test_bench_without_a_known_name_lists_the_benchmarks(run: Run, machine: Path) -> None:
    run("scripts/setup")
    (machine / "a clone" / "benchmarks").mkdir()
    (machine / "a clone" / "benchmarks" / "study_cost.py").write_text("")
    for tool in ("find", "sort", "sed", "basename"):
        (machine / "bin" / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    unknown = run("scripts/bench", "nothing")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "usage: ./scripts/bench NAME [arguments]\nbenchmarks:\n  study_cost\n"
