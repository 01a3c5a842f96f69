"""The adapters that a real launch uses. Named functions of modules, so that Ray's workers can be sent them."""

from __future__ import annotations

from pathlib import Path

from hpsearch.sampler import RandomSampler, Sampler, SobolSampler
from hpsearch.spec import Spec
from hpsearch.worker import Executor


def make_sampler(spec: Spec) -> Sampler:
    """The sampler that `search.method` names."""
    match spec.search.method:
        case "sobol":
            return SobolSampler(spec.space, spec.seed)
        case "random":
            return RandomSampler(spec.space, spec.seed)
        case "tpe":
            from hpsearch.tpe import TpeSampler

            return TpeSampler(spec.space, spec.seed)


def make_executor(spec: Spec, folder: Path) -> Executor:
    """The executor that trains with torch.

    Raises:
        UserCodeError: the task does not load.
    """
    from hpsearch.task import load_task
    from hpsearch.training.executor import TorchExecutor

    task = load_task(spec.task, folder)
    task.metric_names = tuple(dict.fromkeys([*task.metric_names, *spec.metric_names]))
    return TorchExecutor(
        task,
        study_seed=spec.seed,
        threads=spec.resources.threads,
        device="cuda" if spec.resources.gpus else "cpu",
        cut_ensemble=spec.ensemble.enabled,
        metric=spec.metric.name,
        goal=spec.metric.goal,
        shuffle=spec.shuffle,
    )
