"""Which workers are gone, as the driver finds out: Tune tells of processes that died, Ray of nodes that did.

The study must know at once, not when a worker is back: where a node went there may be no room for another. And it must
know which it was, since a job that kills processes is to blame, and a machine that goes is not. What is known of the
workers is read from the journal, which the driver follows anyhow: nobody is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from hpsearch.events import Arrived, Leased
from hpsearch.state import Entry

NODE_KNOWN_S = 2.0  # a node's workers are found dead up to this long before the node is
LOOK_EVERY_S = 1.0  # at the nodes
LOOK_SHARE = 0.01  # of the driver's time, however many nodes there are …
LOOK_AT_LEAST_EVERY_S = 5.0  # … unless nodes that went would be noticed too late


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker's process that is gone."""

    worker: str
    pid: int
    reason: str
    blame_job: bool  # it died by itself, perhaps of its job


class RollCall:
    """Who has arrived, who has died. Times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._seats: dict[str, Arrived] = {}  # of workers not known to be gone
        self._lost: dict[str, Arrived] = {}  # of those that are, until they arrive anew
        self._died_at: dict[str, float] = {}

    def take(self, entries: Iterable[Entry]) -> None:
        """What the journal tells of arrivals.

        A worker whose node was taken for dead and only silent may ask for work once more, before Ray ends it: with a
        job in its hands it has to be told of again.
        """
        for entry in entries:
            event = entry.event
            if isinstance(event, Arrived):
                self._seats[event.worker] = event
                self._lost.pop(event.worker, None)
                self._died_at.pop(event.worker, None)  # the study has drawn its conclusions from the arrival
            elif isinstance(event, Leased) and event.worker in self._lost:
                self._seats[event.worker] = self._lost.pop(event.worker)

    def died(self, worker: str, now: float) -> None:
        """Tune's word that a worker's process has ended; may come from another thread."""
        self._died_at[worker] = now

    def losses(self, dead_nodes: Collection[str], now: float) -> list[Loss]:
        """Workers that are gone and were not told of before.

        Args:
            dead_nodes: ids of all nodes that have gone since the cluster began.
        """
        gone = [
            Loss(worker=seat.worker, pid=seat.pid, reason="its node went", blame_job=False)
            for seat in self._seats.values()
            if seat.node in dead_nodes
        ]
        for worker, died_at in list(self._died_at.items()):
            seat = self._seats.get(worker)
            if seat is None:
                del self._died_at[worker]
            elif seat.node not in dead_nodes and now - died_at > NODE_KNOWN_S:
                gone.append(Loss(worker=worker, pid=seat.pid, reason="its process died", blame_job=True))
        for loss in gone:
            self._lost[loss.worker] = self._seats.pop(loss.worker)
            self._died_at.pop(loss.worker, None)
        return gone


class NodeWatch:
    """Looks at the cluster's nodes from a thread of its own, since the question hangs when the head is gone."""

    def __init__(
        self, dead_nodes: Callable[[], frozenset[str]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            dead_nodes: asks the cluster; may take as long as it likes.
        """
        self._ask = dead_nodes
        self._clock = clock
        self._dead: frozenset[str] = frozenset()
        self._unanswered_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="node-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def dead(self) -> frozenset[str]:
        """Ids of the nodes that are gone, as of the last answer."""
        return self._dead

    @property
    def silent_s(self) -> float:
        """Seconds that the cluster's head has owed an answer; 0 while it owes none."""
        since = self._unanswered_since
        return 0.0 if since is None else self._clock() - since

    def stop(self) -> None:
        """Ask no more; returns when the last question is answered, or after a second."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def _look(self) -> None:
        pause_s = 0.0
        while not self._stopped.wait(pause_s):
            asked_at = self._clock()
            if self._unanswered_since is None:
                self._unanswered_since = asked_at
            try:
                self._dead = self._ask()
            except Exception:  # a head that cannot answer is silent; how long that may last is not decided here
                pause_s = LOOK_EVERY_S
                continue
            self._unanswered_since = None
            pause_s = min(max(LOOK_EVERY_S, (self._clock() - asked_at) / LOOK_SHARE), LOOK_AT_LEAST_EVERY_S)
