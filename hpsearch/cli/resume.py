"""What a launch says of the study that its run directory holds already."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Collection
from pathlib import Path

from hpsearch.assembly import check_resume
from hpsearch.blobs import BlobStore
from hpsearch.cli.output import say, tool
from hpsearch.edits import code_edits, early_edits, edits
from hpsearch.errors import UsageError
from hpsearch.job import Config
from hpsearch.journal import FILE_NAME, is_locked, read_journal
from hpsearch.keeping import damaged_exports
from hpsearch.spec import Spec
from hpsearch.state import StudyState
from hpsearch.task_code import task_code

LOCK_WAIT_S = 30.0


def check_new(run_dir: Path, spec: Spec, folder: Path, *, again: str = "") -> None:
    """Tell at once that a run directory is taken, and what the study in it would be resumed with.

    Args:
        folder: where space.yaml is.
        again: the command that goes on with the study, "" where there is none.

    Raises:
        UsageError: the directory holds a study.
    """
    state = _state_of(run_dir, spec)
    if state is None:
        return
    assert state.opened is not None
    old = Spec.from_dump(dict(state.opened.spec))
    found = edits(old, spec, _configs(state)) if state.data is not None else early_edits(old, spec)
    told = [edit.words for edit in found] + _code_edits(state, spec, folder)
    if is_locked(run_dir):
        raise UsageError(
            f"{run_dir} holds this study already, and another launch is at work on it",
            hint=f"where it stands: {tool('hpsearch')} status {shlex.quote(str(run_dir))}; another study needs another "
            "--run-dir",
        )
    message = f"{run_dir} holds this study already"
    if told:
        message = "\n  ".join([f"{message}; since it was opened last:", *told])
    hint = f"to go on with it: {again}" if again else "choose another --run-dir"
    if again and any(edit.refused for edit in found):
        hint = "put back what it cannot go on with, or choose another --run-dir"
    raise UsageError(message, hint=hint)


def check_resumed(run_dir: Path, spec: Spec, folder: Path) -> None:
    """Say what was edited since the study was opened last, a line for each; nothing where there is no study yet.

    Raises:
        UsageError: the directory holds another study.
        SpecError: the study cannot go on with what was edited.
    """
    state = _state_of(run_dir, spec)
    if state is None:
        return
    assert state.opened is not None
    old = Spec.from_dump(dict(state.opened.spec))
    for edit in check_resume(old, spec, run_dir, _configs(state), begun=state.data is not None):
        say(f"edited: {edit.words}")
    for line in _code_edits(state, spec, folder):
        say(f"edited: {line}")


def nothing_to_do(run_dir: Path, spec: Spec, folder: Path, stages: Collection[str]) -> bool:
    """Whether the study of a run directory is through, and a launch with this space would only find that out.

    Args:
        stages: that the launch may run.
    """
    state = _state_of(run_dir, spec)
    if state is None or not state.done or spec.storage is not None:  # storage may have to be sent what it lacks
        return False
    assert state.opened is not None
    asked = {
        "preflight": spec.preflight.enabled,
        "lr_range": spec.measures_lr,
        "search": True,
        "baselines": True,
        "evaluate": spec.evaluate.enabled,
        "confirm": spec.confirm.enabled,
        "ensemble": True,
    }
    return (
        all(stage in state.ended_stages for stage, wanted in asked.items() if wanted and stage in stages)
        and not Spec.changes(Spec.from_dump(dict(state.opened.spec)), spec)
        and not _code_edits(state, spec, folder)
        and not damaged_exports(state, BlobStore(run_dir))
    )


def wait_for_lock(run_dir: Path) -> None:
    """Give a killed driver's study, which can outlive it by seconds, the time to go.

    Raises:
        UsageError: another launch is at work.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    if is_locked(run_dir):
        say(f"{run_dir} is in use; waiting for it, {LOCK_WAIT_S:.0f} s at most")
    while is_locked(run_dir):
        if time.monotonic() > deadline:
            raise UsageError(
                f"the run directory {run_dir} is in use by another launch",
                hint="wait for it to end, or choose another --run-dir",
            )
        time.sleep(0.2)


def command_again(run_dir: Path) -> str:
    """This command line with --resume; the run directory is named, whatever the working directory's default is."""
    from hpsearch.tracker.outbox import redact

    arguments = [redact(a) if "://" in a else a for a in sys.argv[1:] if a != "--resume"]
    if not any(a.startswith("--run-dir") for a in arguments):
        arguments += ["--run-dir", str(run_dir)]
    return shlex.join([tool("hpsearch"), *arguments, "--resume"])


def earlier_study(run_dir: Path) -> StudyState:
    """The study as earlier drivers left it, empty where there is none; to be read, not changed."""
    path = (run_dir / FILE_NAME).resolve()
    if not path.exists():
        return StudyState()
    status = path.stat()
    return _folded(path.parent, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _folded(run_dir: Path, n_bytes: int, changed_ns: int) -> StudyState:
    """A launch asks several times, and 10,000 trials take half a second to read."""
    return StudyState.of(read_journal(run_dir))


def _state_of(run_dir: Path, spec: Spec) -> StudyState | None:
    """The study of a run directory, None where none was begun.

    Raises:
        UsageError: it has another name.
    """
    state = earlier_study(run_dir)
    if state.opened is None:
        return None
    if state.opened.study != spec.name:
        raise UsageError(
            f"{run_dir} belongs to another study, {state.opened.study!r} (this one is {spec.name!r})",
            hint="choose another --run-dir",
        )
    return state


def _code_edits(state: StudyState, spec: Spec, folder: Path) -> list[str]:
    assert state.opened is not None
    return list(code_edits(state.opened.code, task_code(spec.task, folder), state.trials))


def _configs(state: StudyState) -> dict[int, Config]:
    return {number: trial.config for number, trial in state.trials.items()}
