"""What can go wrong, and what the reader may do about it.

    HpsearchError
    ├─ SpecError          mend the file; carries every Problem(code, where, what, hint)
    ├─ UsageError         mend the command line or choose another run directory
    ├─ NotBuiltYet        the verb or key is promised and not there yet; leave it out
    ├─ PreflightError     mend the network, the data or the budget
    ├─ NoUsableTrial      widen or lower the space; no trial left a finite checkpoint
    ├─ TrialDiverged      recorded and searched on; not retried
    ├─ TrialFailed        retried with the same seed; carries the remote traceback
    ├─ UserCodeError      mend the task: message and the user's own frame
    │  └─ OtherDataError  seed data(), or begin a new study where the data changed on purpose
    ├─ JournalError       the study's record is damaged; names the line
    │  └─ DamagedBlob     a checkpoint or another file is; it is made again
    ├─ StorageError       mend the way to `storage:`, then hpsearch launch --resume; what was finished is kept
    ├─ TrackerError       the outbox has it; hpsearch sync later
    └─ ClusterError       resume later: hpsearch launch --resume

Exit codes stand beside the classes, so that the command line has nothing to decide.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where, which rule, what was found, what to do."""

    code: str
    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"error[{self.code}]: {self.where}: {self.what}" if self.where else f"error[{self.code}]: {self.what}"
        return f"{line}\n  hint: {self.hint}" if self.hint else line


class HpsearchError(Exception):
    """Something a user can cause or meet. `str()` is complete: it is printed without a traceback."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return str(Problem(code=self.code, where="", what=self.message, hint=self.hint))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy(), self.args))


def _rebuild(cls: type[HpsearchError], state: dict[str, object], args: tuple[object, ...]) -> HpsearchError:
    """The error as it was raised; exceptions with keyword arguments cannot cross a process without this."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class SpecError(HpsearchError):
    """space.yaml is not a study; every problem is told at once."""

    exit_code = 2
    code = "spec"

    def __init__(self, problems: Sequence[Problem], *, file: str = "space.yaml") -> None:
        """
        Args:
            file: that they are in, as the user called it; "" where each names its own place.
        """
        self.problems = tuple(problems)
        self.file = file
        super().__init__("\n".join(map(str, self.problems)))

    def __str__(self) -> str:
        n = len(self.problems)
        where = f" in {self.file}" if self.file else ""
        closing = f"{n} problem{'s' if n != 1 else ''}{where}; nothing was started."
        return "\n".join([*map(str, self.problems), closing])


class UsageError(HpsearchError):
    """A wrong command line, or a run directory that cannot be used."""

    exit_code = 2
    code = "usage"


class NotBuiltYet(UsageError):
    """A verb or key of the contract whose turn has not come."""

    code = "not-built-yet"


class PreflightError(HpsearchError):
    """The network, the data or the budget would waste the search."""

    code = "preflight"


class NoUsableTrial(HpsearchError):
    """The search ended without one finite checkpoint."""

    exit_code = 3
    code = "no-usable-trial"


class TrialDiverged(HpsearchError):
    """A loss or metric stopped being finite; the config is at fault."""

    code = "diverged"


class TrialFailed(HpsearchError):
    """A trial ended by an exception; carries the remote traceback."""

    code = "failed"

    def __init__(self, message: str, *, traceback: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback


class UserCodeError(HpsearchError):
    """The task raised, or gave something that cannot be trained on."""

    code = "task"

    def __init__(self, message: str, *, frame: str = "", hint: str = "", traceback: str = "") -> None:
        super().__init__(message, hint=hint)
        self.frame = frame
        self.traceback = traceback

    def __str__(self) -> str:
        return str(Problem(code=self.code, where=self.frame, what=self.message, hint=self.hint))


class OtherDataError(UserCodeError):
    """Task.data() gives other rows than the study began with, or another worker got."""


class JournalError(HpsearchError):
    """The record of a study cannot be read or written."""

    code = "journal"


class StorageError(HpsearchError):
    """The place that `storage:` names is not there, refuses, or does not answer."""

    exit_code = 4
    code = "storage"

    def __init__(self, message: str, *, hint: str = "", gone: bool = False) -> None:
        """
        Args:
            gone: the place answers, and does not have what was asked for.
        """
        super().__init__(message, hint=hint)
        self.gone = gone


class InStorage(StorageError):
    """What a worker asked the study for lies in storage, where the worker reads it itself."""

    def __init__(self, ref: str, digest: str) -> None:
        super().__init__(f"{ref} is not here but in storage")
        self.ref = ref
        self.digest = digest


class DamagedBlob(JournalError):
    """A file of the run directory is gone, cut short or altered. What it held can be made again."""

    def __init__(self, ref: str, why: str, *, hint: str = "hpsearch launch --resume makes it again") -> None:
        super().__init__(f"{ref} is damaged: {why}", hint=hint)
        self.ref = ref
        self.why = why


class TrackerError(HpsearchError):
    """MLflow is out of reach, or refuses."""

    exit_code = 4
    code = "mlflow"


class ClusterError(HpsearchError):
    """Ray is out of reach, or gave way."""

    exit_code = 4
    code = "ray"


class ProcessSpent(Exception):
    """This process of a worker has to end, and another to take its place. Nobody is told: nothing went wrong that a
    person could mend, and what it had done is kept."""


def internal_error(error: Exception) -> HpsearchError:
    """A defect of hpsearch itself, with the traceback that a report of it needs."""
    text = "".join(traceback.format_exception(error))
    return HpsearchError(
        f"internal error: {type(error).__name__}: {error}", hint=f"please report this, with what follows\n{text}"
    )
