"""A worker in the process that Tune gave it, and a worker that is several processes.

With several GPUs a worker is a group that Ray Train places and sets torch.distributed up for: Tune's process holds no
GPU and only waits for the others. Rank 0 is the worker as the study knows it; `training.group` keeps all in step.
When a group breaks, its host tells the study what became of the job at hand, where that is known, and starts another;
when a process of it was lost, the host ends as well, and Tune begins it anew like any worker that died.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hpsearch.errors import ClusterError, ProcessSpent
from hpsearch.fleets import Launch
from hpsearch.fleets.node_folder import launch_folder
from hpsearch.fleets.placement import asked
from hpsearch.fleets.storage_check import checked
from hpsearch.fleets.study_actor import ActorClient, work_for
from hpsearch.worker import Executor

if TYPE_CHECKING:
    from pathlib import Path

    from hpsearch.training.group import Group, GroupExecutor

BACKEND = "HPSEARCH_GROUP_BACKEND"  # of torch.distributed; gloo to try a group without GPUs, else Ray's choice: NCCL
GROUP_WAIT_S = 1800  # of a collective of `fit`, in which one rank has hung


@runtime_checkable
class Shares(Protocol):
    """An executor that can share its data, and what it measures, with the other workers of its machine."""

    def share(self, folder: Path) -> None: ...


def host_worker(study: str, namespace: str, launch: Launch, name: str, *, backend: str | None = None) -> None:
    """A worker's life, in the process that Tune gave it.

    Args:
        study: name of its actor, which no other launch has.
        backend: of a group; None: NCCL.

    Raises:
        ProcessSpent: another process has to go on.
        ClusterError: a process of the group was lost.
    """
    if launch.spec.resources.gpus > 1:
        _host_group(study, namespace, launch, name, backend)
    else:
        make_executor = checked(lambda: _executor(launch, study), launch)
        work_for(study, namespace, name, launch.carried(make_executor))


def _executor(launch: Launch, study: str) -> Executor:
    """What a process runs jobs with; what it loads and measures shared with the other processes of this launch on the
    machine."""
    executor = launch.executor()
    if isinstance(executor, Shares):
        folder = launch_folder(study)
        if folder is not None:
            executor.share(folder)
    return executor


def _host_group(study: str, namespace: str, launch: Launch, name: str, backend: str | None) -> None:
    """Start groups, one after another, until one comes to the study's end."""
    import ray

    client = ActorClient(ray.get_actor(study, namespace))
    while True:
        spent = _run_group(study, namespace, launch, name, backend)
        if spent is None:
            return
        result = getattr(spent, "result", None)
        if result is not None:
            client.push(name, [result])
            client.settle()


def _run_group(study: str, namespace: str, launch: Launch, name: str, backend: str | None) -> ProcessSpent | None:
    """Why a group ended before the study did; None when it did not."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    members = asked(launch.spec.resources).members

    def life(config: dict[str, Any]) -> None:
        _rank_life(study, namespace, launch, name, on_gpu=backend != "gloo")

    storage = tempfile.mkdtemp(prefix="hpsearch-group-")  # nothing is kept there, but Train wants a place
    try:
        TorchTrainer(
            life,
            train_loop_config={},
            scaling_config=ScalingConfig(
                num_workers=len(members), use_gpu=True, resources_per_worker=dict(members[0]), placement_strategy="PACK"
            ),
            torch_config=TorchConfig(backend=backend, timeout_s=GROUP_WAIT_S),
            run_config=RunConfig(
                name=f"{name}-group", storage_path=storage, failure_config=FailureConfig(max_failures=0)
            ),
        ).fit()
    except WorkerGroupError as error:
        return why_spent(error.worker_failures)
    except TrainingFailedError as error:
        raise ClusterError(f"Ray Train gave up the processes of {name}: {error}") from None
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return None


def why_spent(failures: Mapping[int, BaseException]) -> ProcessSpent:
    """Of the failures by rank, the one that tells what became of the group.

    Raises:
        ClusterError: a process was lost, which counts before what the others say: they felt it too.
    """
    causes = {rank: _cause(failure) for rank, failure in sorted(failures.items())}
    lost = {rank: cause for rank, cause in causes.items() if not isinstance(cause, ProcessSpent)}
    for rank, cause in lost.items():
        raise ClusterError(f"rank {rank} of the group was lost: {type(cause).__name__}: {cause}")
    spent = [cause for cause in causes.values() if isinstance(cause, ProcessSpent)]
    if not spent:
        raise ClusterError("the group was lost, and nobody says how")
    return next((cause for cause in spent if getattr(cause, "result", None) is not None), spent[0])


def _cause(failure: BaseException) -> BaseException:
    """What a process raised, without what Ray put around it."""
    cause = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return failure if not isinstance(cause, BaseException) else _cause(cause)


def _rank_life(study: str, namespace: str, launch: Launch, name: str, *, on_gpu: bool) -> None:
    """The life of one process of a group, in which torch.distributed is set up."""
    from ray.train.torch import get_device

    from hpsearch.training.group import Group, GroupExecutor, Member, follow

    group = Group(device=str(get_device()) if on_gpu else "cpu")

    def make_member() -> Member:
        member: Any = _executor(launch, study)
        return member  # type: ignore[no-any-return]

    if group.rank:
        follow(group, make_member)
        return
    made: list[GroupExecutor] = []

    def make_executor() -> Executor:
        made.append(GroupExecutor(group, make_member))
        return made[0]

    work_for(study, namespace, name, launch.carried(checked(make_executor, launch)))
    _dismiss(group, made)


def _dismiss(group: Group, made: list[GroupExecutor]) -> None:
    """Let the other ranks go, which wait for jobs; or, before there was an executor, for rank 0 to make one."""
    if made:
        made[0].dismiss()
    else:
        group.abandon()


def group_backend() -> str | None:
    """The backend that the environment of this process asks for; None: NCCL."""
    return os.environ.get(BACKEND) or None
