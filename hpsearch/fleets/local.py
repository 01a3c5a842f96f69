"""LocalFleet: workers in this process, one job after another, in a fixed order."""

from __future__ import annotations

from hpsearch.errors import HpsearchError
from hpsearch.fleets import Launch, Watch
from hpsearch.fleets.storage_check import check_driver
from hpsearch.journal import JournalTail
from hpsearch.worker import Worker


class LocalFleet:
    """A fleet that needs no Ray. Equal launches give equal journals, but for times."""

    def __init__(self, launch: Launch, *, workers: int = 1) -> None:
        self._launch = launch
        self._n_workers = workers

    def run(self, watch: Watch) -> None:
        if self._launch.spec.storage is not None:
            check_driver(self._launch.spec.storage)
        study = self._launch.open_study(background=False)
        tail = JournalTail(self._launch.run_dir)
        try:
            executor = self._launch.carried(self._launch.executor)  # data are loaded once per worker, as on any fleet
            names = [f"worker-{index}" for index in range(self._n_workers)]
            workers = {name: Worker(name, study, executor) for name in names}
            at_work = {name: worker for name, worker in workers.items() if worker.begin()}
            while not study.ended:
                before = study.n_events
                for name, worker in at_work.items():
                    try:
                        worker.step()
                    except HpsearchError as error:  # as in a worker's own loop: the study ends with this word
                        study.broken(name, error)
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
