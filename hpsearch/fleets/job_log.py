"""The log of a submitted job, which holds stdout and stderr alike: where hpsearch began, its progress, its result.

Written on the head (`encode_result`), read wherever it is followed (`JobLog`).
"""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

# Lines of a job's log that are not for a person. A control character begins them, so that no progress looks like one.
BEGUN = "\x1ehpsearch begun"
PART = "\x1ehpsearch part "  # base64 of a piece of the result; Ray cuts lines of 20,000 characters
RESULT = "\x1ehpsearch result"  # all parts were told
PART_CHARS = 8000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job that has ended printed on stdout, and its exit code."""

    stdout: str
    exit_code: int


def encode_result(outcome: Outcome) -> str:
    """The lines of log that tell a result."""
    text = json.dumps({"stdout": outcome.stdout, "exit_code": outcome.exit_code})
    parts = textwrap.wrap(base64.b64encode(text.encode()).decode(), PART_CHARS)
    return "".join(f"{line}\n" for line in ["", *(PART + part for part in parts), RESULT])


class JobLog:
    """A job's log taken apart as it comes: progress to be shown, and the result."""

    def __init__(self) -> None:
        self.begun = False
        self.outcome: Outcome | None = None
        self.before: list[str] = []  # lines from before hpsearch began: Ray's, or why it never did
        self._rest = ""  # of a line that has not ended
        self._n_blank = 0  # the last lines were empty; told only when a line of progress follows
        self._parts: list[str] = []

    def feed(self, text: str) -> list[str]:
        """The lines of progress that have come in full."""
        *lines, self._rest = (self._rest + text).split("\n")
        return [shown for line in lines for shown in self._read(line)]

    def _read(self, line: str) -> Iterator[str]:
        if line == BEGUN:
            self.begun = True
        elif line.startswith(PART):
            self._parts.append(line.removeprefix(PART))
        elif line == RESULT:
            told = json.loads(base64.b64decode("".join(self._parts)))
            self.outcome = Outcome(stdout=told["stdout"], exit_code=told["exit_code"])
        elif not self.begun:
            self.before.append(line)
        elif not line:
            self._n_blank += 1
        else:
            yield from [""] * self._n_blank
            self._n_blank = 0
            yield line
