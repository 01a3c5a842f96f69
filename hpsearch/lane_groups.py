"""Which trials may be trained, or asked, by one program, a lane each.

A lane has its own weights, seed, epoch, data order and numbers that only scale what a step does. What changes the
shapes of tensors or the graph of operations must agree: such trials are of one *group*. A config alone cannot tell all
of that, since a float may be a share of dropout or a multiple of the width; so this is a guess that is never too narrow
for the loop's own numbers, and the worker compares the networks themselves before it lets them share a program.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from hpsearch.job import Config, EvaluateJob, Job, RampJob, TrainJob

LANE_KEYS = frozenset({"lr", "weight_decay", "momentum", "grad_clip_norm", "label_smoothing", "warmup_epochs"})
"""Keys of the default loop that may differ from lane to lane, whatever their values."""


def group_key(config: Config) -> str:
    """What must agree: equal for two configs whose trials may share a program.

    Floats may differ, since most of a model's are rates; integers, names and switches make shapes and graphs.

    >>> group_key({"lr": 0.1, "dropout": 0.2, "width": 64, "optimizer": "sgd"})
    '{"optimizer": "sgd", "width": 64}'
    """
    kept = {key: value for key, value in config.items() if key not in LANE_KEYS and not isinstance(value, float)}
    return json.dumps(kept, sort_keys=True)


def group_sizes(configs: Sequence[Config], n_trials: int) -> dict[str, float]:
    """How many of a study's trials are of each group, estimated from some of their configs.

    >>> group_sizes([{"width": 64, "lr": 0.1}, {"width": 64, "lr": 0.2}, {"width": 8, "lr": 0.1}], 300)
    {'{"width": 64}': 200.0, '{"width": 8}': 100.0}
    """
    counts = Counter(group_key(config) for config in configs)
    return {group: count * n_trials / len(configs) for group, count in counts.items()}


def may_share(first: Job, other: Job) -> bool:
    """Whether two jobs may run in one program: trials in training, ramps, or single models asked, of one group."""
    if isinstance(first, TrainJob) and isinstance(other, TrainJob):
        return group_key(first.config) == group_key(other.config)
    if isinstance(first, RampJob) and isinstance(other, RampJob):
        alike = (first.lr_min, first.lr_max, first.steps) == (other.lr_min, other.lr_max, other.steps)
        return alike and group_key(first.config) == group_key(other.config)
    if isinstance(first, EvaluateJob) and isinstance(other, EvaluateJob):
        if first.split != other.split or len(first.members) != 1 or len(other.members) != 1:
            return False
        return group_key(first.members[0].config) == group_key(other.members[0].config)
    return False
