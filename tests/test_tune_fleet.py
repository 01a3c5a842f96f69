"""TuneFleet keeps the contract with real Ray, and survives a killed worker.

Most tests share one cluster, as a launch with --address does; two have one of their own, as a launch without.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpsearch.errors import ClusterError, UsageError
from hpsearch.fleets import Fleet, Launch
from hpsearch.fleets.tune import TuneFleet
from hpsearch.job import TrainJob
from hpsearch.journal import read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import Entry
from tests import fakes
from tests.contracts.fleet import SPACE, FleetContract

pytestmark = pytest.mark.ray


class SuicidalExecutor(fakes.FakeExecutor):
    """Its process is killed in trial 5, once."""

    def __init__(self, mark: Path) -> None:
        super().__init__(crash=self._kill_once)
        self._mark = mark

    def _kill_once(self, job: TrainJob) -> str:
        if job.trial == 5 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ""


def suicidal_executor(spec: Spec, folder: Path) -> SuicidalExecutor:
    return SuicidalExecutor(folder / "killed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def own_cluster(launch: Launch) -> Fleet:
    return TuneFleet(launch, workers=2)


class TestTuneFleet(FleetContract):
    @pytest.fixture
    def fleet(self, cluster: Any) -> Callable[[Launch], Fleet]:
        return lambda launch: TuneFleet(launch, workers=2, address=cluster.address)

    def test_study_runs_to_its_end(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        super().test_study_runs_to_its_end(own_cluster, launch)

    def test_interrupt_keeps_what_was_finished(self, fleet: Callable[[Launch], Fleet], launch: Launch) -> None:
        super().test_interrupt_keeps_what_was_finished(own_cluster, launch)

    def test_killed_worker_is_restarted_and_its_job_done(self, launch: Launch) -> None:
        state = self.run(own_cluster, dataclasses.replace(launch, make_executor=suicidal_executor))
        assert (launch.folder / "killed").exists()
        assert state.done
        assert len(state.trials) == 27
        assert all(trial.crashes == 0 for trial in state.trials.values())
        returned = [entry.event for entry in read_journal(launch.run_dir) if entry.event.type == "returned"]
        assert any(event.key == "train/5/0-1" for event in returned)  # type: ignore[union-attr]

    def test_ray_that_is_out_of_reach_is_told(self, launch: Launch) -> None:
        fleet = TuneFleet(launch, address="127.0.0.1:1")
        try:
            with pytest.raises(ClusterError, match=r"Ray cannot be reached at 127\.0\.0\.1:1"):
                fleet.run(_ignore)
        finally:
            fleet.close()

    def test_resources_that_the_machine_can_never_give_are_an_error_at_once(self, launch: Launch) -> None:
        spec = parse_spec(SPACE, overrides=["resources.cpus=4000"])
        fleet = TuneFleet(dataclasses.replace(launch, spec=spec))
        try:
            with pytest.raises(UsageError, match="a worker asks for 4000 CPU"):
                fleet.run(_ignore)
        finally:
            fleet.close()


def _ignore(entries: Sequence[Entry]) -> None:
    """Watches nothing."""
