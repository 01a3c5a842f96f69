"""Fleets keep workers alive where the resources are; the study gives them work.

Two implementations: `local` runs workers in this process, one job after another, for debugging and fast tests; `tune`
has Ray Tune host them. Both run the same study over the same journal, and pass the same tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpsearch.assembly import STAGES, MakeSampler, open_study
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
    stages: tuple[str, ...] = STAGES
    lock_wait_s: float = 30.0

    def open_study(self, *, background: bool) -> Study:
        """The study of this launch."""
        return open_study(
            self.run_dir,
            self.spec,
            make_sampler=self.make_sampler,
            spec_text=self.spec_text,
            environment=self.environment,
            stages=self.stages,
            background=background,
            wait_s=self.lock_wait_s,
        )

    def executor(self) -> Executor:
        """What a worker of this launch runs jobs with."""
        return self.make_executor(self.spec, self.folder)


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
