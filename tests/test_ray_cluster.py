"""Room on real Ray clusters: counted, waited for, or refused; with and without an autoscaler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hpsearch.errors import UsageError
from hpsearch.fleets import ray_cluster
from hpsearch.fleets.placement import Autoscaler
from hpsearch.fleets.ray_cluster import await_room, be_quiet
from hpsearch.spec import Resources

pytestmark = pytest.mark.ray

WAIT_S = 120.0  # for a node to come, on a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with two cores, and the driver joined to it; tests add nodes."""
    be_quiet()
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def test_room_is_counted_from_the_nodes(cluster: Any) -> None:
    said: list[str] = []
    assert await_room(Resources(cpus=0.5), own_machine=False, say=said.append) == 4
    assert said == []


def test_what_no_node_has_is_an_error_after_a_short_grace(cluster: Any) -> None:
    said: list[str] = []
    with pytest.raises(UsageError) as caught:
        await_room(Resources(custom={"highmem": 1}), own_machine=False, say=said.append, grace_s=0.3, look_every_s=0.05)
    assert caught.value.message == "a worker asks for 1 CPU, 1 highmem; the most that a node has is no highmem"
    assert said == ["waiting for nodes: a worker asks for 1 CPU, 1 highmem"]


def test_what_this_machine_has_not_is_an_error_at_once(cluster: Any) -> None:
    with pytest.raises(UsageError, match="a worker asks for 1 CPU, 1 GPU; this machine has no GPU"):
        await_room(Resources(gpus=1), own_machine=True, say=pytest.fail, grace_s=3600.0)


def test_an_autoscaler_without_such_a_kind_of_node_is_an_error_at_once(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "autoscaler", lambda: Autoscaler(node_types=({"CPU": 64.0},)))
    with pytest.raises(UsageError, match="the most that a node has, or one that the autoscaler brings, is no GPU"):
        await_room(Resources(gpus=1), own_machine=False, say=pytest.fail, grace_s=3600.0)


def test_a_head_that_nobody_configured_has_no_autoscaler(cluster: Any) -> None:
    assert ray_cluster.autoscaler() is None


def test_a_place_in_ray_that_is_gone_counts_as_silence(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Autoscaler:
        raise AttributeError("module 'ray._private.state' has no attribute 'state'")

    monkeypatch.setattr(ray_cluster, "_configured_node_types", gone)
    monkeypatch.setattr(ray_cluster, "_word_of_autoscaler_v2", gone)
    monkeypatch.setattr(ray_cluster, "_word_of_autoscaler_v1", lambda: Autoscaler())
    assert ray_cluster.autoscaler() == Autoscaler()


def test_workers_wait_for_a_node_that_comes_later_and_say_so_once(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "autoscaler", lambda: Autoscaler())  # one that may bring anything
    said: list[str] = []
    room: list[int] = []

    def wait() -> None:
        room.append(await_room(Resources(gpus=0.5), own_machine=False, say=said.append, grace_s=0.0, look_every_s=0.1))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(timeout=1.0)
    assert room == []
    cluster.add_node(num_cpus=1, num_gpus=2)
    waiting.join(timeout=WAIT_S)
    assert room == [1]  # the node has one core
    assert said == ["waiting for nodes: a worker asks for 1 CPU, 0.5 GPU"]
