"""Where workers fit: what one asks for, what nodes have, and the words for what can never be had.

Functions of values, so that a cluster of any shape can be tried without one. A worker must fit on one node, so totals
over a cluster decide nothing. A worker with several GPUs is several processes, each on a node of its own if need be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpsearch.errors import UsageError
from hpsearch.spec import Resources

GRAIN = 1e-4  # ray counts resources in ten-thousandths
HOST_CPUS = 0.01  # of a worker that is a group: the process that Tune keeps, which only waits for the others

Bundle = Mapping[str, float]
"""Amounts by the name that ray knows them by ("CPU", "GPU", "highmem"); none is 0."""
Prospect = Literal["fits", "may-come", "never"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one worker asks for."""

    host: Bundle  # of the process that Tune keeps alive: the worker itself, or the host of a group
    members: tuple[Bundle, ...] = ()  # of a group, one per process

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Everything, each to be found on one node."""
        return (self.host, *self.members)


@dataclass(frozen=True, kw_only=True)
class Autoscaler:
    """What is known of what could bring nodes."""

    node_types: tuple[Bundle, ...] | None = None  # that it may start; None: it does not say
    refused: tuple[Bundle, ...] = ()  # asked of it, and fit for none of them by its own word


def asked(resources: Resources) -> Ask:
    """What one worker with these resources asks for.

    A worker with several GPUs holds none itself: each of its processes asks for one GPU and an even share of the rest.

    >>> from hpsearch.spec import Resources
    >>> asked(Resources(cpus=4, gpus=0.5, custom={"highmem": 1}))
    Ask(host={'CPU': 4.0, 'GPU': 0.5, 'highmem': 1.0}, members=())
    >>> asked(Resources(cpus=4, gpus=2, custom={"accelerator_type:A100": 0.001}))
    Ask(host={'CPU': 0.01}, members=({'GPU': 1.0, 'CPU': 1.995, 'accelerator_type:A100': 0.0005}, \
{'GPU': 1.0, 'CPU': 1.995, 'accelerator_type:A100': 0.0005}))
    """
    if resources.gpus <= 1:
        amounts = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
        # Tune refuses to place what asks for nothing.
        return Ask(host={name: float(amount) for name, amount in amounts.items() if amount} or {"CPU": GRAIN})
    n = int(resources.gpus)
    host = min(HOST_CPUS, resources.cpus) or GRAIN
    cpus = math.floor((resources.cpus - host) / n / GRAIN + 1e-6) * GRAIN if resources.cpus > host else 0.0
    shares = {name: math.ceil(amount / n / GRAIN - 1e-6) * GRAIN for name, amount in resources.custom.items()}
    member = {"GPU": 1.0} | {name: round(amount, 4) for name, amount in {"CPU": cpus, **shares}.items() if amount}
    return Ask(host={"CPU": host}, members=(member,) * n)


def fitting(nodes: Sequence[Bundle], ask: Ask, *, at_most: int = 10_000) -> int:
    """How many workers fit on these nodes together, counting what nodes have, not what is free.

    Exact for workers of one process; groups are placed one after another, on one node where they fit on one.

    >>> fitting([{"CPU": 4, "GPU": 1}, {"CPU": 2, "GPU": 1}], Ask(host={"CPU": 3, "GPU": 1}))
    1
    """
    if not ask.members:
        return min(at_most, sum(_times(node, ask.host) for node in nodes))
    free = [dict(node) for node in nodes]
    n = 0
    while n < at_most and _place(free, ask):
        n += 1
    return n


def prospect(nodes: Sequence[Bundle], ask: Ask, autoscaler: Autoscaler | None) -> Prospect:
    """Whether a worker fits now, may fit on a node that the autoscaler brings, or never will.

    With an autoscaler that says nothing of its node types, what it has not refused may come.
    """
    if fitting(nodes, ask, at_most=1):
        return "fits"
    if autoscaler is None:
        return "never"
    if any(_same(bundle, refused) for bundle in ask.bundles for refused in autoscaler.refused):
        return "never"
    if autoscaler.node_types is None:
        return "may-come"
    kinds = (*nodes, *autoscaler.node_types)
    return "may-come" if all(any(_times(kind, bundle) for kind in kinds) for bundle in ask.bundles) else "never"


def in_words(ask: Ask) -> str:
    """What a worker asks for, as people say it.

    >>> in_words(Ask(host={"CPU": 4.0, "GPU": 0.5}))
    '4 CPU, 0.5 GPU'
    >>> in_words(Ask(host={"CPU": 0.01}, members=({"GPU": 1.0, "CPU": 2.0},) * 4))
    '4 times 1 GPU, 2 CPU'
    """
    if ask.members:
        return f"{len(ask.members)} times {_listed(ask.members[0])}"
    return _listed(ask.host)


def refusal(
    nodes: Sequence[Bundle], ask: Ask, *, own_machine: bool, autoscaler: Autoscaler | None = None
) -> UsageError:
    """Why a worker can never be placed: what it asks for, and the most that any node has of it."""
    bundle = ask.members[0] if ask.members else ask.host
    types = autoscaler.node_types or () if autoscaler is not None else ()
    most = {name: max((node.get(name, 0.0) for node in (*nodes, *types)), default=0.0) for name in bundle}
    short = [name for name, amount in bundle.items() if most[name] < amount - GRAIN / 2]
    found = ", ".join(f"{most[name]:g} {name}" if most[name] else f"no {name}" for name in short)
    if own_machine:
        found = f"this machine has {found}"
    elif types:
        found = f"the most that a node has, or one that the autoscaler brings, is {found}"
    else:
        found = f"the most that a node has is {found}"
    if not short:
        in_all = {name: sum(node.get(name, 0.0) for node in nodes) for name in bundle}
        found = f"no node has them together; all nodes have {_listed(in_all)}"
    keys = " or ".join(sorted({f"resources.{_key(name)}" for name in short or bundle}))
    another = "name a cluster with --address" if own_machine else "add a node that has it"
    return UsageError(f"a worker asks for {in_words(ask)}; {found}", hint=f"lower {keys} in space.yaml, or {another}")


def _key(name: str) -> str:
    return {"CPU": "cpus", "GPU": "gpus"}.get(name, "custom")


def _listed(bundle: Bundle) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _times(node: Bundle, bundle: Bundle) -> int:
    """How often a bundle fits on a node."""
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())


def _place(free: list[dict[str, float]], ask: Ask) -> bool:
    """Take a worker's bundles from the nodes; False, and the nodes spoilt, when they do not fit."""
    whole = sorted(free, key=lambda node: -_times(node, ask.members[0]))
    for bundle in (*ask.members, ask.host):
        node = next((node for node in whole if _times(node, bundle)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def _same(one: Bundle, other: Bundle) -> bool:
    names = {name for name in (*one, *other) if one.get(name) or other.get(name)}
    return all(math.isclose(one.get(name, 0.0), other.get(name, 0.0), abs_tol=GRAIN / 2) for name in names)
