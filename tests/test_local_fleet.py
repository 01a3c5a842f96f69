"""LocalFleet keeps the contract, and gives the same journal twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from hpsearch.fleets import Fleet, Launch
from hpsearch.fleets.local import LocalFleet
from hpsearch.journal import read_journal
from hpsearch.spec import parse_spec
from tests.contracts.fleet import SPACE, FleetContract


class TestLocalFleet(FleetContract):
    @pytest.fixture(params=[1, 3], ids=["1-worker", "3-workers"])
    def fleet(self, request: pytest.FixtureRequest) -> Callable[[Launch], Fleet]:
        return lambda launch: LocalFleet(launch, workers=request.param)

    def test_equal_launches_give_equal_journals(
        self, fleet: Callable[[Launch], Fleet], launch: Launch, tmp_path: object
    ) -> None:
        self.run(fleet, launch)
        again = dataclasses.replace(launch, run_dir=launch.run_dir.with_name("again"))
        self.run(fleet, again)
        first, second = (
            [entry.event for entry in read_journal(run_dir)][1:] for run_dir in (launch.run_dir, again.run_dir)
        )
        assert first == second

    def test_synchronous_halving_is_the_same_study_for_any_number_of_workers(self, launch: Launch) -> None:
        spec = parse_spec(SPACE, overrides=["early_stopping.type=sha"])
        curves = []
        for workers in (1, 2, 5):
            run = dataclasses.replace(launch, spec=spec, run_dir=launch.run_dir.with_name(f"w{workers}"))
            state = self.run(lambda launch, n=workers: LocalFleet(launch, workers=n), run)  # type: ignore[misc]
            curves.append({n: (t.config, t.curve) for n, t in state.trials.items()})
        assert curves[0] == curves[1] == curves[2]
