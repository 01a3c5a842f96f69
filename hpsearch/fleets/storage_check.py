"""Asks every node of a cluster to write to storage and to read what others wrote, before anything is trained."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from hpsearch.archive import Archive
from hpsearch.errors import StorageError
from hpsearch.fleets import Launch
from hpsearch.storage import Storage
from hpsearch.worker import Executor

CHECK_S = 120.0  # that the nodes may take, all of them at once
LATER_S = 60.0  # that a node which comes later may take to find its way to storage
AGAIN_S = 5.0
FOLDER = "tokens"
_SAME_FOLDER = "a folder has to be the same one on every machine, on NFS or another shared file system"

MakeExecutor = Callable[[], Executor]


def check_here(uri: str, expect: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write a token and read it back, and what others have written too; gives the token's name and content.

    Raises:
        StorageError: one of these cannot be done.
    """
    storage = Storage(uri)
    name, content = f"{FOLDER}/{uuid.uuid4().hex}", uuid.uuid4().hex
    storage.write(name, content.encode())
    for wanted, text in {name: content, **(expect or {})}.items():
        try:
            found = storage.read(wanted)
        except StorageError as error:
            if not error.gone:
                raise
            found = b""
        if found != text.encode():
            whose = "what it has just written" if wanted == name else "what another node has written"
            raise StorageError(
                f"{storage} does not give back {whose}",
                hint=_SAME_FOLDER,
            )
    return {name: content}


def check_driver(uri: str) -> None:
    """The same from this process alone.

    Raises:
        StorageError: it cannot be done.
    """
    _forget(uri, check_here(uri))


def check_nodes(uri: str, *, timeout_s: float = CHECK_S) -> frozenset[str]:
    """Have every living node of the cluster write a token, and read its own and the driver's; gives their ids.

    Raises:
        StorageError: some node cannot; each is named with its reason.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tokens = check_here(uri)
    names = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}
    if set(names) == {ray.get_runtime_context().get_node_id()}:
        _forget(uri, tokens)
        return frozenset(names)
    ask: Any = ray.remote(check_here)
    pin = {"num_cpus": 0, "max_retries": 0}
    asked = {
        ask.options(**pin, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)).remote(
            uri, tokens
        ): node
        for node in names
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    reasons: dict[str, StorageError] = {}
    written = dict(tokens)
    for answer in answered:
        try:
            written |= ray.get(answer)
        except Exception as error:
            reasons[asked[answer]] = _reason(error)
    for answer in silent:
        ray.cancel(answer, force=True)
        reasons[asked[answer]] = StorageError(f"it has not answered for {timeout_s:.0f} s")
    _forget(uri, written)
    if reasons:
        told = "".join(f"\n  {names.get(node, node)}: {error.message}" for node, error in sorted(reasons.items()))
        hints = {error.hint: None for error in reasons.values() if error.hint}
        raise StorageError(
            f"{len(reasons)} of {len(names)} nodes cannot use {Storage(uri)}:{told}", hint="; ".join(hints)
        )
    return frozenset(names)


def checked(make_executor: MakeExecutor, launch: Launch) -> MakeExecutor:
    """What makes such an executor once this node was seen to reach storage; nodes may come while a study runs."""

    def make() -> Executor:
        import ray

        uri, node = launch.spec.storage, ray.get_runtime_context().get_node_id()
        if uri is not None and node not in launch.checked_nodes:
            _check_later_node(Archive(uri, launch.spec.name, launch.uid), node)
        return make_executor()

    return make


def _check_later_node(archive: Archive, node: str) -> None:
    """A storage that is out of reach for everyone is waited for; longer than this, and the study should be told."""
    import ray

    give_up_at = time.monotonic() + LATER_S
    while True:
        try:
            check_driver(archive.storage.uri)
            if archive.owner() is None:
                raise StorageError(f"{archive} is not there", hint=_SAME_FOLDER)
            return
        except StorageError as error:
            if time.monotonic() > give_up_at:
                name = f"{ray.util.get_node_ip_address()} (node {node[:8]})"
                raise StorageError(
                    f"{name}, which came later, cannot use storage: {error.message}", hint=error.hint
                ) from None
            time.sleep(AGAIN_S)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} (node {node['NodeID'][:8]})"


def _reason(error: Exception) -> StorageError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, StorageError):
        return cause
    return StorageError(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")


def _forget(uri: str, tokens: Mapping[str, str]) -> None:
    """Delete the tokens of a check; one that stays behind does no harm."""
    with contextlib.suppress(StorageError):
        for name in tokens:
            Storage(uri).delete(name)
