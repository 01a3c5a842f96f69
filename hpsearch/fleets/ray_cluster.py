"""A Ray cluster as hpsearch meets it: how to reach it, what it has, and where in it we are."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpsearch.errors import ClusterError
from hpsearch.fleets.node_folder import sweep
from hpsearch.fleets.placement import Ask, Autoscaler, Bundle, asked, fitting, in_words, prospect, refusal
from hpsearch.spec import Resources

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NAMESPACE = "hpsearch"
KNOCK_S = 0.25  # for a raylet that lives to accept a connection
REACH_S = 5.0  # to see whether anything listens at an address; ray itself tries for minutes
GRACE_S = 10.0  # that further nodes may take to join a cluster without an autoscaler, as under Slurm
LOOK_EVERY_S = 1.0  # at the nodes, while there is no room

Say = Callable[[str], None]


def be_quiet() -> None:
    """Set what ray reads when it is imported, where the user has not."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)


def connect(address: str | None, archive: Path | None = None) -> None:
    """Join the cluster at an address, or begin one of our own.

    Args:
        address: "auto" or "host:port", on a node of it; None: a cluster on this machine that ends with this process.
        archive: what every worker is to find in front of its Python path, as `shipping.pack` made it.

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
    if archive is not None:
        options |= {"runtime_env": {"working_dir": str(archive)}}
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # a Ray job, which we may be, brings a working_dir too
    try:
        if address is not None:
            _knock(address)
        sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(**options)
        signal.signal(signal.SIGTERM, sigterm)  # ray's own would end the driver without a word
    except Exception as error:  # ray raises plain Exceptions too, where its own processes are too slow to start
        raise _unreachable(address, error) from None
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _mute_raylets()


def _unreachable(address: str | None, error: Exception) -> ClusterError:
    """What to do about a cluster that is not there, or that would not start."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if address is None:
        return ClusterError(
            f"Ray did not start on this machine: {first_line}",
            hint="launch again with --resume, when the machine has less to do; nothing that was finished is lost",
        )
    return ClusterError(
        f"Ray cannot be reached at {address}: {first_line}",
        hint="start the cluster (ray up cluster.yaml), or leave out --address to work on this machine",
    )


def _mute_raylets() -> None:
    """Keep off stdout, which carries results only, what raylets say of every process that dies.

    They say it whatever `log_to_driver` is; the study says it in its own words.
    """
    import ray

    if hasattr(ray._private.worker, "print_to_stdstream"):  # private to ray: at worst its lines are back
        ray._private.worker.print_to_stdstream = lambda *said, **how: None


def head_address() -> str:
    """Where the head of the cluster listens that was joined."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def is_closed(address: str) -> bool:
    """Whether nobody listens at host:port any more; no answer at all is no evidence."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


class GoneNodes:
    """Finds nodes that have gone since the cluster began.

    Ray is told at once of a node that takes its leave (SIGTERM), but counts missed heartbeats of one whose processes
    were killed: 15 s, and a minute of one that fell silent (2.60). So its raylet is knocked at as well: a closed port
    where one was open says that it is dead.
    """

    def __init__(self) -> None:
        self._open: set[str] = set()  # ids of nodes whose raylet was not closed once

    def __call__(self) -> frozenset[str]:
        """Ids of the nodes that are gone."""
        import ray

        return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"] or self._has_closed(node))

    def _has_closed(self, node: dict[str, Any]) -> bool:
        closed = is_closed(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        if not closed:
            self._open.add(node["NodeID"])
        return closed and node["NodeID"] in self._open


def nodes() -> list[Bundle]:
    """What each living node has in all, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def await_room(
    resources: Resources,
    *,
    own_machine: bool,
    say: Say,
    grace_s: float = GRACE_S,
    look_every_s: float = LOOK_EVERY_S,
) -> int:
    """Workers that the cluster can hold now, at least one; returns once one fits.

    Waits for nodes that an autoscaler may bring, without end and with a word; for nodes that nobody has announced, only
    as long as those of a cluster that is just starting may take.

    Args:
        own_machine: the cluster is this machine, and will never be more.
        say: told what is waited for, once.
        grace_s: how long nodes may take to join a cluster that has no autoscaler, or none that says so.

    Raises:
        UsageError: no worker will ever fit.
    """
    ask = asked(resources)
    have = nodes()
    if fitting(have, ask, at_most=1):
        return fitting(have, ask)
    if own_machine:
        raise refusal(have, ask, own_machine=True)
    deadline = time.monotonic() + grace_s
    said = False
    with _requested(ask):
        while True:
            have, scaler = nodes(), autoscaler()
            outlook = prospect(have, ask, scaler)
            if outlook == "fits":
                return fitting(have, ask)
            told_its_types = scaler is not None and scaler.node_types is not None
            if outlook == "never" and (told_its_types or time.monotonic() > deadline):
                raise refusal(have, ask, own_machine=False, autoscaler=scaler)
            if not said:
                say(f"waiting for nodes: a worker asks for {in_words(ask)}")
                said = True
            time.sleep(look_every_s)


def autoscaler() -> Autoscaler | None:
    """What the cluster's autoscaler says of itself; None where there is none that brings nodes.

    Ray has no public word for this, so three places are asked that may be gone in another version; whatever cannot be
    read counts as silence.
    """
    for ask in (_configured_node_types, _word_of_autoscaler_v2, _word_of_autoscaler_v1):
        try:
            found = ask()
        except Exception:  # private to ray: anything may have changed
            continue
        if found is not None:
            return found
    return None


def _configured_node_types() -> Autoscaler | None:
    """From the configuration that some platforms (KubeRay among them) leave with the cluster."""
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = [] if config is None else [group for group in config.node_group_configs if group.max_count]
    return Autoscaler(node_types=tuple(dict(group.resources) for group in groups)) if groups else None


def _word_of_autoscaler_v2() -> Autoscaler | None:
    """Its state: what it was asked for and found no node type for; its own judgement, renewed every few seconds."""
    import ray
    from ray.core.generated import autoscaler_pb2

    gcs: Any = ray._private.worker.global_worker
    reply: Any = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    reply.ParseFromString(gcs.gcs_client.get_cluster_status())
    if not reply.HasField("autoscaling_state"):
        return None
    word = reply.autoscaling_state
    requests = [
        *word.infeasible_resource_requests,
        *(request for gang in word.infeasible_gang_resource_requests for request in gang.requests),
        *(
            by_count.request
            for constraint in word.infeasible_cluster_resource_constraints
            for by_count in constraint.resource_requests
        ),
    ]
    return Autoscaler(refused=tuple(dict(request.resources_bundle) for request in requests))


def _word_of_autoscaler_v1() -> Autoscaler | None:
    """Its report: it brings nodes where their types have names of the user's; without a configuration of its own it
    calls each running node a type, "node_" and the node's id. The types themselves are read from its file where this
    is the head."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get("__autoscaling_status"))
    types = report["autoscaler_report"]["active_nodes"]
    known = {f"node_{node['NodeID']}" for node in ray.nodes()}
    if not types or set(types) <= known:
        return None
    try:
        return Autoscaler(node_types=_node_types_of(int(report["monitor_pid"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Autoscaler()


def _node_types_of(monitor_pid: int) -> tuple[Bundle, ...] | None:
    """The node types in the file that a monitor on this machine was started with; None where it does not tell all."""
    import yaml

    arguments = Path(f"/proc/{monitor_pid}/cmdline").read_text().split("\0")
    file = next(a.partition("=")[2] for a in arguments if a.startswith("--autoscaling-config="))
    types = yaml.safe_load(Path(file).read_text())["available_node_types"].values()
    resources = [kind.get("resources") for kind in types if kind.get("max_workers", 1)]
    return tuple(resources) if resources and all(resources) else None


@contextmanager
def _requested(ask: Ask) -> Iterator[None]:
    """While inside, the autoscaler sees that room for one worker is wanted; afterwards the workers themselves ask."""
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = placement_group([dict(bundle) for bundle in ask.bundles])
    try:
        yield
    finally:
        remove_placement_group(wanted)


def sweep_nodes(timeout_s: float) -> None:
    """Remove what ended workers shared on the cluster's nodes; what is out of reach is left to a later launch."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    swept: Any = ray.remote(num_cpus=0)(sweep)
    with suppress(Exception):  # the cluster may be gone, and nothing depends on it
        tasks = [
            swept.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            ).remote(wait_s=timeout_s / 2)
            for node in ray.nodes()
            if node["Alive"]
        ]
        ray.wait(tasks, num_returns=len(tasks), timeout=timeout_s)


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
