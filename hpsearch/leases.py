"""How long a job may stay in a worker's hands without a sign of life.

A lease lives by progress, not by a heartbeat, which would outlive a hung step. How long a silence is too long is
measured: several times the longest one that ended well. The first sign of a job may take longer, since the first
batches load, compile and warm up. A decision of values: time comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FIRST_LEASE_S = 1800.0  # until any job was heard from: compilation, first batches
FIRST_LEASE_OWN_LOOP_S = 12 * 3600.0  # a `fit` of the user's is heard from once an epoch, whose length nobody knows
SHORTEST_FIRST_LEASE_S = 300.0  # another architecture may compile longer than those seen
SHORTEST_LEASE_OWN_LOOP_S = 3600.0  # another config's epoch may take many times as long as those seen
SHORTEST_LEASE_S = 60.0
SILENCES = 10.0  # times the longest silence that ended well
INHERIT_S = 15.0  # that workers have to announce their jobs to a study whose process was restarted
MOST_DEATHS = 3  # of workers' processes or machines in one job, before the job is to blame


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker's process runs."""

    node: str  # Ray's id of the node, "" in this process
    pid: int
    alive: bool


class LeaseBook:
    """Signs of life of the jobs that are given out. All times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}  # key -> time of its last sign of life, or of its lease
        self._began: set[str] = set()  # keys that have given a sign of life
        self._deadlines: dict[str, float] = {}  # of inherited leases, until their worker is heard from
        self._longest_first = 0.0
        self._longest = 0.0

    def begin(self, key: str, now: float) -> None:
        """The job was given out."""
        self._heard[key] = now
        self._began.discard(key)
        self._deadlines.pop(key, None)

    def inherit(self, keys: Iterable[str], now: float) -> None:
        """The jobs are in workers' hands, as a study says whose process has died; they have INHERIT_S to confirm it."""
        for key in keys:
            self.begin(key, now)
            self._deadlines[key] = now + INHERIT_S

    def heard(self, key: str, now: float, *, waiting: bool = False) -> None:
        """A sign of life.

        Args:
            waiting: the job's worker is at another job: nothing is learned of this one, whose time starts anew.
        """
        if key not in self._heard:
            return
        if key in self._deadlines:  # how long the worker was silent before, nobody knows, nor what it is at
            del self._deadlines[key]
            self._heard[key] = now
            return
        if not waiting:
            self._learn(key, now - self._heard[key])
        self._heard[key] = now

    def _learn(self, key: str, silence: float) -> None:
        if key in self._began:
            self._longest = max(self._longest, silence)
        else:
            self._longest_first = max(self._longest_first, silence)
        self._began.add(key)

    def end(self, key: str) -> None:
        """The job is in nobody's hands any more."""
        self._heard.pop(key, None)
        self._began.discard(key)
        self._deadlines.pop(key, None)

    def overdue(self, now: float, *, own_loop: bool = False) -> list[tuple[str, float]]:
        """Jobs that were silent for too long, each with the limit that it passed."""
        first_s = self.first_lease_s(own_loop=own_loop)
        next_s = first_s if own_loop else self.lease_s  # all signs of a `fit` are alike: an epoch's end
        late = [(key, INHERIT_S) for key, deadline in self._deadlines.items() if now > deadline]
        for key, at in self._heard.items():
            limit = next_s if key in self._began else first_s
            if key not in self._deadlines and now - at > limit:
                late.append((key, limit))
        return late

    @property
    def lease_s(self) -> float:
        """The longest silence that is allowed between two signs of life."""
        return max(SHORTEST_LEASE_S, SILENCES * self._longest)

    def first_lease_s(self, *, own_loop: bool = False) -> float:
        """The same before a job's first sign of life."""
        if not self._longest_first:
            return FIRST_LEASE_OWN_LOOP_S if own_loop else FIRST_LEASE_S
        shortest_s = SHORTEST_LEASE_OWN_LOOP_S if own_loop else SHORTEST_FIRST_LEASE_S
        return max(shortest_s, self.lease_s, SILENCES * self._longest_first)
