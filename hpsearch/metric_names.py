"""The metrics that a study can name, and which way each is better. What they compute is row 3's (`named_metrics`)."""

from __future__ import annotations

from dataclasses import dataclass

from hpsearch.job import Outputs


@dataclass(frozen=True, kw_only=True)
class NamedMetric:
    """A figure of merit that needs no code of the user's."""

    name: str
    higher_is_better: bool
    means: str
    outputs: tuple[Outputs, ...]  # the meanings of a model's output that it is defined for


_CLASSES: tuple[Outputs, ...] = ("logits", "binary_logits")

NAMED_METRICS: dict[str, NamedMetric] = {
    metric.name: metric
    for metric in (
        NamedMetric(name="accuracy", higher_is_better=True, means="share of right predictions", outputs=_CLASSES),
        NamedMetric(
            name="balanced_accuracy",
            higher_is_better=True,
            means="mean over classes of the share of each that is found",
            outputs=_CLASSES,
        ),
        NamedMetric(
            name="f1",
            higher_is_better=True,
            means="harmonic mean of precision and recall; of class 1 of two, else the mean over classes",
            outputs=_CLASSES,
        ),
        NamedMetric(
            name="roc_auc",
            higher_is_better=True,
            means="area under the ROC curve; above two classes the mean of one against the rest",
            outputs=_CLASSES,
        ),
        NamedMetric(
            name="average_precision",
            higher_is_better=True,
            means="area under the precision-recall curve; above two classes the mean of one against the rest",
            outputs=_CLASSES,
        ),
        NamedMetric(
            name="top5",
            higher_is_better=True,
            means="share of rows whose class is among the five likeliest",
            outputs=("logits",),
        ),
        NamedMetric(
            name="log_loss", higher_is_better=False, means="mean of -log(probability of the truth)", outputs=_CLASSES
        ),
        NamedMetric(
            name="iou",
            higher_is_better=True,
            means="intersection over union; of class 1 of two, else the mean over classes",
            outputs=_CLASSES,
        ),
        NamedMetric(name="mse", higher_is_better=False, means="mean squared error", outputs=("values",)),
        NamedMetric(name="mae", higher_is_better=False, means="mean absolute error", outputs=("values",)),
        NamedMetric(
            name="r2", higher_is_better=True, means="share of the variance that is explained", outputs=("values",)
        ),
    )
}
