"""Preflight's checks: each planted bug is found and named, and sound networks pass."""

from __future__ import annotations

import pytest
import torch

from hpsearch.checks import NAMES, Check
from hpsearch.task import Task
from hpsearch.training.checks.data_report import check_data
from hpsearch.training.checks.network import NETWORK_CODES, check_network, check_step
from hpsearch.training.data import StudyData
from tests.networks import PLANTED, SOUND

CPU = torch.device("cpu")


def checked(task: Task, seed: int = 0) -> dict[str, Check]:
    data = StudyData.load(task, study_seed=0, cut_ensemble=True, device=CPU)
    found = check_data(data) + check_network(task, data, {}, seed=seed, device=CPU, where="trial 0")
    assert len({check.code for check in found}) == len(found)
    return {check.code: check for check in found}


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found_and_named(bug: str) -> None:
    make, code = PLANTED[bug]
    found = checked(make())[code]
    assert found.status in ("failed", "warned"), found
    assert found.found
    assert found.expected
    assert found.cause
    assert found.look_at


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("seed", range(2))
def test_sound_network_passes(name: str, seed: int) -> None:
    found = checked(SOUND[name](), seed)
    bad = {code: check for code, check in found.items() if check.status == "failed"}
    warned = {code for code, check in found.items() if check.status == "warned"}
    assert not bad
    assert warned <= ({"imbalance"} if name == "1:100" else set())


def test_every_check_of_a_network_is_told_and_known() -> None:
    found = checked(SOUND["mlp"]())
    assert set(NETWORK_CODES) <= set(found)
    assert set(found) <= set(NAMES)
    assert all(check.reason for check in found.values() if check.status == "skipped")


def test_step_at_a_corner_tells_the_size_of_its_network() -> None:
    task = SOUND["mlp"]()
    data = StudyData.load(task, study_seed=0, cut_ensemble=True, device=CPU)
    found = check_step(task, data, {"batch_size": 16}, seed=0, device=CPU, where="smallest")
    assert (found.status, found.where, found.found) == ("passed", "smallest", "1,604 parameters")


def test_check_is_plain_data() -> None:
    check = checked(SOUND["mlp"]())["loss-at-init"]
    assert Check.of(check.as_json()) == check
