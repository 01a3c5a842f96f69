"""A worker of several processes under Ray Train: what its host makes of their ends, and a study with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.cli.adapters import make_executor, make_sampler
from hpsearch.errors import ClusterError, ProcessSpent, UserCodeError
from hpsearch.events import Finished
from hpsearch.fleets import Launch
from hpsearch.fleets.ray_cluster import be_quiet
from hpsearch.fleets.tune import TuneFleet
from hpsearch.fleets.worker_group import BACKEND, group_backend, why_spent
from hpsearch.job import Result
from hpsearch.journal import read_journal
from hpsearch.spec import Spec, parse_spec
from hpsearch.state import StudyState
from hpsearch.training.group import GroupBroken

SPACE = """
name: group
task: task.py:Shared
preflight: {enabled: false}
search: {trials: 4}
parameters:
  lr: {distribution: log_uniform, min: 1e-3, max: 1.0}
early_stopping: {min_epochs: 1, max_epochs: 3}
ensemble: {pool: 3, size: 2}
resources: {cpus: 1, gpus: 2}
"""

TASK = """
import os, signal
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn import functional as F
import hpsearch

MARK = Path({mark!r})


def rows(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


class Shared(hpsearch.Task):
    def data(self):
        return hpsearch.Splits(train=rows(64, 0), val=rows(40, 1), test=rows(20, 2))

    def model(self, config):
        return torch.nn.Linear(6, 2)

    def fit(self, model, config, splits, trial):
        assert (trial.world_size, trial.rank) == (dist.get_world_size(), dist.get_rank())
        x, y = splits.train
        x, y = x[trial.rank :: trial.world_size], y[trial.rank :: trial.world_size]
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
        while True:
            if trial.number == 1 and trial.rank == 1:
                raise ValueError("an odd width")  # rank 0 is in all_reduce by then
            if trial.number == 2 and trial.rank == 1 and not MARK.exists():
                MARK.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= trial.world_size
            optimizer.step()
            with torch.no_grad():
                val = F.cross_entropy(model(splits.val[0]), splits.val[1])
            yield hpsearch.Report({{"val_loss": val.item()}}, state=lambda: {{"optimizer": optimizer.state_dict()}})
"""


class Wrapped(Exception):
    """As Ray Train hands over what a process raised."""

    def __init__(self, inner: BaseException) -> None:
        self._base_exc = inner


RESULT = Result(key="train/0/0-1", outcome="crashed")


def test_of_a_broken_group_the_rank_that_knows_the_jobs_outcome_is_believed() -> None:
    told = GroupBroken("out of step", RESULT)
    assert why_spent({1: Wrapped(told), 0: Wrapped(GroupBroken("closed by peer"))}) is told


def test_a_lost_process_counts_before_what_the_others_say() -> None:
    with pytest.raises(ClusterError, match="rank 1 of the group was lost: OSError: gone"):
        why_spent({0: Wrapped(GroupBroken("closed by peer", RESULT)), 1: OSError("gone")})


def test_a_group_that_is_only_spent_is_begun_anew() -> None:
    spent = ProcessSpent("it holds 9 GiB")
    assert why_spent({0: Wrapped(spent)}) is spent
    with pytest.raises(ClusterError):
        why_spent({})


def test_the_backend_is_rays_choice_unless_the_environment_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND, raising=False)
    assert group_backend() is None
    monkeypatch.setenv(BACKEND, "gloo")
    assert group_backend() == "gloo"


def test_several_gpus_for_the_default_loop_are_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "import hpsearch\n\nclass Shared(hpsearch.Task):\n    def data(self): ...\n    def model(self, config): ...\n"
    )
    with pytest.raises(UserCodeError) as caught:
        make_executor(parse_spec(SPACE), tmp_path)
    assert caught.value.message == (
        "resources.gpus is 2, and Shared has no fit() of its own, which would have to share a trial's work among them: "
        "the default loop trains on one GPU"
    )
    assert caught.value.hint.startswith("write gpus: 1, and as many workers train as many trials at once")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A node that says it has two GPUs; its processes train on the CPU."""
    be_quiet()
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(BACKEND, "gloo")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_on_groups_outlives_an_exception_and_a_killed_process_on_one_rank(cluster: Any, tmp_path: Path) -> None:
    task, mark, run_dir = tmp_path / "task", tmp_path / "killed", tmp_path / "run"
    task.mkdir()
    (task / "task.py").write_text(TASK.format(mark=str(mark)))
    spec: Spec = parse_spec(SPACE)
    launch = Launch(
        run_dir=run_dir, spec=spec, folder=task, make_sampler=make_sampler, make_executor=make_executor, lock_wait_s=5.0
    )
    fleet = TuneFleet(launch, address=cluster.address)
    try:
        fleet.run(lambda entries: None)
    finally:
        fleet.close()
    entries = read_journal(run_dir)
    state = StudyState.of(entries)
    assert state.done
    assert mark.exists()
    crashed = [e.event for e in entries if isinstance(e.event, Finished) and e.event.outcome == "crashed"]
    assert {(event.trial, event.message) for event in crashed} == {(1, "ValueError: an odd width (on rank 1 of 2)")}
    assert crashed[0].frame.startswith("task.py:")
    assert {number for number, trial in state.trials.items() if trial.curve} == {0, 2, 3}
    assert state.trials[2].crashes == 0
    assert not state.leases
