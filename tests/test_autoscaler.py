"""Ray's own autoscaler, in both its versions: what it says of itself is what `await_room` needs to know."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpsearch.errors import UsageError
from hpsearch.fleets.ray_cluster import await_room, be_quiet, nodes
from hpsearch.spec import Resources

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 120.0  # for a node to come, on a busy machine
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def autoscaled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster whose autoscaler (Ray's own, of this version) brings nodes with a GPU: processes on this machine."""
    be_quiet()
    import ray
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{ray._private.services.get_node_ip_address()}:{port}"
    config = tmp_path / "cluster.yaml"
    config.write_text(json.dumps(autoscaling_config(address)))
    for name, value in {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1" if request.param == 2 else "0",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }.items():
        monkeypatch.setenv(name, value)
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1, "gcs_server_port": port, "autoscaling_config": str(config), "include_dashboard": False,
        },
    )  # fmt: skip
    for name in ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"):
        monkeypatch.delenv(name)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        end_monitor(config)
        ray.shutdown()
        made.shutdown()


def autoscaling_config(address: str) -> dict[str, object]:
    empty: dict[str, object] = {
        key: [] for key in ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands",
                            "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
                            "rsync_exclude", "rsync_filter")
    }  # fmt: skip
    return {
        **empty,
        "cluster_name": "pretended",
        "max_workers": 1,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu-node": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        "docker": {},
    }


def end_monitor(config: Path) -> None:
    """The nodes that the monitor started are its children, and nobody else's to end."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if f"--autoscaling-config={config}" in (process.info["cmdline"] or []):
            family = [process, *process.children(recursive=True)]
            for member in family:
                member.kill()
            psutil.wait_procs(family, timeout=30)


@pytest.mark.usefixtures("autoscaled")
def test_rays_own_autoscaler_brings_what_it_can_and_is_believed_when_it_cannot() -> None:
    said: list[str] = []
    with pytest.raises(UsageError, match="a worker asks for 64 CPU; the most that a node has"):
        await_room(Resources(cpus=64), own_machine=False, say=said.append, grace_s=8.0)
    said.clear()
    assert len(nodes()) == 1
    assert await_room(Resources(cpus=0.5, gpus=0.5), own_machine=False, say=said.append, grace_s=WAIT_S) == 2
    assert said == ["waiting for nodes: a worker asks for 0.5 CPU, 0.5 GPU"]
