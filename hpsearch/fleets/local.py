"""LocalFleet: workers in this process, one job after another, in a fixed order."""

from __future__ import annotations

from hpsearch.fleets import Launch, Watch
from hpsearch.journal import JournalTail
from hpsearch.worker import Worker


class LocalFleet:
    """A fleet that needs no Ray. Equal launches give equal journals, but for times."""

    def __init__(self, launch: Launch, *, workers: int = 1) -> None:
        self._launch = launch
        self._n_workers = workers

    def run(self, watch: Watch) -> None:
        study = self._launch.open_study(background=False)
        tail = JournalTail(self._launch.run_dir)
        try:
            executor = self._launch.executor  # data are loaded once per worker, as on any fleet
            workers = [Worker(f"worker-{index}", study, executor) for index in range(self._n_workers)]
            at_work = [worker for worker in workers if worker.begin()]
            while not study.ended:
                before = study.n_events
                for worker in at_work:
                    worker.step()
                    watch(list(tail.new_entries()))
                assert before != study.n_events or study.ended, "the study waits for a result that no worker owes it"
        except KeyboardInterrupt:
            study.stop("interrupted")
            raise
        finally:
            study.close()
            watch(list(tail.new_entries()))
        if study.failure is not None:
            raise study.failure

    def close(self) -> None:
        """Nothing is held."""
