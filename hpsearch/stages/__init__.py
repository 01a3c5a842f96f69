"""The stages of a study: from what the journal tells to the next jobs.

A stage owns no clock, disk or cluster. It is told every event, in order, also those of an earlier driver when a study
is resumed, and answers three questions: what may be done now, what can be concluded now, and whether it is through.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from hpsearch.events import Damaged, Dropped, Event, Finished, Opened
from hpsearch.job import Job


class Stage(Protocol):
    """One stage of a study."""

    name: str

    def apply(self, event: Event) -> None:
        """Take one more event into account; the study's state has it already."""

    def next_job(self, worker: str) -> Job | None:
        """A job that may run now, None when there is none at the moment. Looking changes nothing but caches."""

    def conclude(self) -> list[Event]:
        """Facts that follow from what is known and are not recorded yet."""

    def finished(self) -> bool:
        """Whether nothing is left to do or to conclude."""

    def lost(self, worker: str) -> None:
        """A worker is gone, with all that it held in memory."""


@runtime_checkable
class FillsLanes(Protocol):
    """A stage some of whose jobs may run in one program, a lane each."""

    def next_beside(self, worker: str, job: Job) -> Job | None:
        """A job that may run now in the program of one that the worker has in hand (`lane_groups.may_share`)."""


def may_reorder(event: Event) -> bool:
    """Whether an event may change which trials are the best, or what there is of them.

    Ranking ten thousand trials for every question would cost seconds, so stages remember theirs until then.
    """
    trained = isinstance(event, Finished) and (event.trial is not None or event.key.startswith("rebuild/"))
    return trained or isinstance(event, Opened | Dropped | Damaged)
