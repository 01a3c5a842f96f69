"""What crashes and empty searches mean: from results to the one message that helps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hpsearch.errors import NoUsableTrial, UserCodeError
from hpsearch.state import StudyState
from hpsearch.trial import TrialState


@dataclass(frozen=True, kw_only=True)
class Crash:
    """How a job crashed: the job's subject (a trial, or a job that belongs to none), the message, the user's frame."""

    subject: str
    message: str
    frame: str


def common_crash(crashes: Sequence[Crash], n_subjects: int) -> UserCodeError | None:
    """The error that stops a study: the same frame and kind of exception from several subjects.

    A retry of one trial is one subject, so a single unlucky trial never stops a study.

    >>> rows = [Crash(subject=s, message="ValueError: bad", frame="t.py:3 in model") for s in ("1", "2", "2")]
    >>> common_crash(rows, 3) is None
    True
    """
    subjects: dict[tuple[str, str], set[str]] = defaultdict(set)
    for crash in crashes:
        kind = (crash.frame, sort_of(crash.message))
        subjects[kind].add(crash.subject)
        if len(subjects[kind]) >= n_subjects:
            what, hint = parted(crash.message)
            told = (
                f"the same error ended {n_subjects} jobs, so the study was stopped; mend the task or space.yaml, "
                "then launch again with --resume (after a change of data(): with a new --run-dir)"
            )
            return UserCodeError(
                what,
                frame=crash.frame,
                hint=f"{hint}\n  note: {told}" if hint else told,
            )
    return None


def sort_of(message: str) -> str:
    """What the messages of one bug have in common, whatever the shapes and numbers in them.

    >>> sort_of("RuntimeError: 2x4 and 7x8"), sort_of("the output is (300, 1)") == sort_of("the output is (2, 1)")
    ('RuntimeError', True)
    """
    return re.sub(r"\d+", "0", parted(message)[0].split(":")[0])


def parted(message: str) -> tuple[str, str]:
    """A crashed job's message and its hint, "" where there is none.

    >>> parted("loss() returned a list (hint: return its mean)")
    ('loss() returned a list', 'return its mean')
    """
    what, opening, hint = message.partition(" (hint: ")
    return (what, hint.removesuffix(")")) if opening else (message, "")


def no_usable_trial(state: StudyState) -> NoUsableTrial:
    """The error of a search that left no finite checkpoint, with what became of its trials."""
    counts = state.counts()
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    message = f"none of {len(state.trials)} trials left a finite checkpoint ({told or 'none was started'})"
    if state.out_of_room:
        return NoUsableTrial(message, hint="raise budget.disk: it does not hold one checkpoint")
    failed = Counter(
        f"{trial.frame}: {trial.message}" if trial.frame else trial.message
        for trial in state.trials.values()
        if trial.state is TrialState.FAILED
    )
    if failed:
        return NoUsableTrial(message, hint=f"the commonest failure: {failed.most_common(1)[0][0]}")
    if counts[TrialState.DIVERGED]:
        return NoUsableTrial(message, hint="lower lr's max, or bound it with bounds_from: lr_range")
    return NoUsableTrial(message, hint="raise search.trials or the budget")
