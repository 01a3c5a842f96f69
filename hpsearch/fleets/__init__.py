"""Fleets keep workers alive where the resources are; the study gives them work.

Two implementations: `local` runs workers in this process, one job after another, for debugging and fast tests; `tune`
has Ray Tune host them. Both run the same study over the same journal, and pass the same tests.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpsearch.archive import INLINE_BYTES, Archive
from hpsearch.assembly import STAGES, MakeSampler, open_study
from hpsearch.carrier import Carrier
from hpsearch.fleets.shipping import Shipment
from hpsearch.journal import uid_of
from hpsearch.spec import Spec
from hpsearch.state import Entry
from hpsearch.study import Study
from hpsearch.worker import Executor

MakeExecutor = Callable[[Spec, Path], Executor]
Watch = Callable[[Sequence[Entry]], None]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that a fleet needs to know of one launch; can be sent to another process."""

    run_dir: Path
    spec: Spec
    folder: Path  # beside space.yaml: where the task is found
    make_sampler: MakeSampler
    make_executor: MakeExecutor
    spec_text: str = ""
    environment: Mapping[str, object] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)  # sha256 of the task's files by name
    stages: tuple[str, ...] = STAGES
    lock_wait_s: float = 30.0
    shipment: Shipment | None = None  # how the folder reaches other machines; None: there is only this one
    uid: str = ""  # of the study: the run directory's, or a new one
    inline_bytes: int = INLINE_BYTES  # of a result, that travel with it; more goes by way of storage
    checked_nodes: frozenset[str] = frozenset()  # Ray's nodes from which storage was read and written

    def __post_init__(self) -> None:
        # Workers have to know where in storage the study lies, before the study is open and without its run directory.
        if not self.uid:
            object.__setattr__(self, "uid", uid_of(self.run_dir) or uuid.uuid4().hex)

    def open_study(self, *, background: bool, inherit_leases: bool = False) -> Study:
        """The study of this launch.

        Args:
            background: a thread keeps what workers push, so that they need not wait.
            inherit_leases: the study's process was restarted under a driver and workers that live.
        """
        return open_study(
            self.run_dir,
            self.spec,
            make_sampler=self.make_sampler,
            spec_text=self.spec_text,
            environment=self.environment,
            code=self.code,
            stages=self.stages,
            background=background,
            wait_s=self.lock_wait_s,
            inherit_leases=inherit_leases,
            uid=self.uid,
        )

    def carried(self, make_executor: Callable[[], Executor]) -> Callable[[], Executor]:
        """What makes such an executor, its large results going by way of storage."""
        archive = Archive(self.spec.storage, self.spec.name, self.uid) if self.spec.storage else None
        return lambda: Carrier(make_executor(), archive, inline_bytes=self.inline_bytes)

    def executor(self) -> Executor:
        """What a worker of this launch runs jobs with."""
        return self.make_executor(self.spec, self.folder if self.shipment is None else self.shipment.here())


class Fleet(Protocol):
    """Runs a study to its end."""

    def run(self, watch: Watch) -> None:
        """Returns when the study has ended; `watch` is told every new entry of the journal, from this thread.

        Raises:
            HpsearchError: why the study stopped early.
            KeyboardInterrupt: after the study was stopped and kept.
        """

    def close(self) -> None:
        """Give back whatever the fleet holds. Ends only processes that the fleet started."""
