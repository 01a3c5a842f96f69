"""The metrics that a study can name, and which way each is better. What they compute is row 3's (`named_metrics`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpsearch.job import Outputs


@dataclass(frozen=True, kw_only=True)
class NamedMetric:
    """A figure of merit that needs no code of the user's."""

    name: str
    higher_is_better: bool
    means: str
    outputs: tuple[Outputs, ...]  # the meanings of a model's output that it is defined for
    least: float = -math.inf  # that it can be
    most: float = math.inf


_CLASSES: tuple[Outputs, ...] = ("logits", "binary_logits")

NAMED_METRICS: dict[str, NamedMetric] = {
    metric.name: metric
    for metric in (
        NamedMetric(
            name="accuracy",
            higher_is_better=True,
            means="share of right predictions",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="balanced_accuracy",
            higher_is_better=True,
            means="mean over classes of the share of each that is found",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="f1",
            higher_is_better=True,
            means="harmonic mean of precision and recall; of class 1 of two, else the mean over classes",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="roc_auc",
            higher_is_better=True,
            means="area under the ROC curve; above two classes the mean of one against the rest",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="average_precision",
            higher_is_better=True,
            means="area under the precision-recall curve; above two classes the mean of one against the rest",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="top5",
            higher_is_better=True,
            means="share of rows whose class is among the five likeliest",
            outputs=("logits",),
            least=0.0,
            most=1.0,
        ),
        NamedMetric(
            name="log_loss",
            higher_is_better=False,
            means="mean of -log(probability of the truth)",
            outputs=_CLASSES,
            least=0.0,
        ),
        NamedMetric(
            name="iou",
            higher_is_better=True,
            means="intersection over union; of class 1 of two, else the mean over classes",
            outputs=_CLASSES,
            least=0.0,
            most=1.0,
        ),
        NamedMetric(name="mse", higher_is_better=False, means="mean squared error", outputs=("values",), least=0.0),
        NamedMetric(name="mae", higher_is_better=False, means="mean absolute error", outputs=("values",), least=0.0),
        NamedMetric(
            name="r2",
            higher_is_better=True,
            means="share of the variance that is explained",
            outputs=("values",),
            most=1.0,
        ),
    )
}


def clipped(name: str, bound: float, *, seen: float) -> float:
    """A bound of a metric's interval, no further than the metric can be at all.

    Args:
        name: of the metric without its split; nothing is known of one that cannot be named.
        seen: a value of it; one that should not be possible shows that the user's metric of this name is another.

    >>> clipped("accuracy", 1.07, seen=0.9), clipped("accuracy", 107.0, seen=90.0), clipped("loss", -0.1, seen=0.9)
    (1.0, 107.0, -0.1)
    """
    metric = NAMED_METRICS.get(name)
    if metric is None or not metric.least <= seen <= metric.most:
        return bound
    return min(metric.most, max(metric.least, bound))
