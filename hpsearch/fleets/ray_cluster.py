"""A Ray cluster as hpsearch meets it: how to reach it, what it has, and where in it we are."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import Any

from hpsearch.errors import ClusterError, UsageError
from hpsearch.spec import Resources

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NAMESPACE = "hpsearch"
REACH_S = 5.0  # to see whether anything listens at an address; ray itself tries for minutes


def be_quiet() -> None:
    """Set what ray reads when it is imported, where the user has not."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)


def connect(address: str | None) -> None:
    """Join the cluster at an address, or begin one of our own.

    Args:
        address: "auto", "host:port", "ray://host:port"; None: a cluster on this machine that ends with this process.

    Raises:
        ClusterError: nobody answers there.
    """
    import ray

    # With no address a cluster of our own, or ray would join any that it finds on this host.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        options |= {"address": address}
    try:
        if address is not None:
            _knock(address)
        sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(**options)
        signal.signal(signal.SIGTERM, sigterm)  # ray's own would end the driver without a word
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
        where = f"at {address}" if address else "on this machine"
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"Ray cannot be reached {where}: {first_line}",
            hint="start the cluster (ray up cluster.yaml), or leave out --address to work on this machine",
        ) from None
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def room(resources: Resources) -> int:
    """Workers that the cluster can hold now; at least one, which may wait for a node."""
    import ray

    have = ray.cluster_resources()
    n_workers = int(have.get("CPU", 0) // max(resources.cpus, 1e-9))
    if resources.gpus:
        n_workers = min(n_workers, int(have.get("GPU", 0) / resources.gpus))
    return max(1, n_workers)


def check_machine(resources: Resources) -> None:
    """Refuse what one machine can never give.

    Raises:
        UsageError: a worker asks for more than there is.
    """
    import ray

    have = ray.cluster_resources()
    for name, asked in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if asked > have.get(name, 0):
            raise UsageError(
                f"a worker asks for {asked:g} {name}, this machine has {have.get(name, 0):g}",
                hint=f"lower resources.{name.lower()}s in space.yaml, or name a cluster with --address",
            )


def this_node() -> Any:
    """The scheduling strategy that pins an actor to the driver's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at host:port; other forms of an address are ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
