"""The adapters that a real launch uses. Named functions of modules, so that Ray's workers can be sent them."""

from __future__ import annotations

from pathlib import Path

from hpsearch.corners import corners
from hpsearch.errors import UserCodeError
from hpsearch.lane_groups import group_sizes
from hpsearch.sampler import RandomSampler, Sampler, SobolSampler
from hpsearch.spec import Spec
from hpsearch.worker import Executor

GROUPS_FROM = 256  # configs, drawn when a worker begins: some milliseconds


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
        UserCodeError: the task does not load, or has no `fit` that could share the work of several GPUs.
    """
    from hpsearch.task import has_own_fit, load_task
    from hpsearch.training.executor import TorchExecutor
    from hpsearch.training.memory import guard_of

    task = load_task(spec.task, folder)
    task.metric_names = tuple(dict.fromkeys([*task.metric_names, *spec.metric_names]))
    task.precision = spec.precision
    gpus = spec.resources.gpus
    if gpus > 1 and not has_own_fit(task):
        raise UserCodeError(
            f"resources.gpus is {gpus:g}, and {type(task).__name__} has no fit() of its own, which would have to share "
            "a trial's work among them: the default loop trains on one GPU",
            hint="write gpus: 1, and as many workers train as many trials at once; or write fit(), see hpsearch.Trial",
        )
    return TorchExecutor(
        task,
        study_seed=spec.seed,
        threads=spec.resources.threads,
        device="cuda" if gpus else "cpu",
        cut_ensemble=spec.cuts_val,
        metric=spec.metric.name,
        goal=spec.metric.goal,
        shuffle=spec.shuffle,
        lanes=None if spec.resources.lanes == "auto" else spec.resources.lanes,
        group_sizes=_group_sizes(spec) if spec.resources.lanes == "auto" else None,
        guard_memory=guard_of(min(gpus, 1.0)),
        example=next(iter(corners(spec.space, spec.per).values()), None),
    )


def _group_sizes(spec: Spec) -> dict[str, float]:
    """Trials of each group in the study, from its first configs; of tpe, from those of a random search."""
    sampler = RandomSampler(spec.space, spec.seed)
    drawn = (sampler.config(number, lambda _: {}) for number in range(min(spec.search.trials, GROUPS_FROM)))
    return group_sizes([config for config in drawn if config is not None], spec.search.trials)
