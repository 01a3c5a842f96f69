"""Jobs and their results: all that passes between a study and its workers.

A job's result depends on nothing but the job (and the task and its data), so a lost job is simply given out again.
Everything here is plain data; torch is not needed to build, send or record it.

A *blob* is bytes that are too large for the journal: a checkpoint, an array of predictions, an exported graph. It
travels with the result and is kept on the driver's disk under its reference before the result counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Scalar = bool | int | float | str | None
Value = Scalar | list[Scalar]
Config = dict[str, Value]
"""One value for every active parameter of a space; JSON through and through."""

SplitName = Literal["train", "val", "ensemble", "test"]
Precision = Literal["float32", "bf16"]
Outputs = Literal["logits", "values", "binary_logits"]
"""What a model's output means: class logits, numbers, or one logit per independent yes/no label."""


@dataclass(frozen=True, kw_only=True)
class RampJob:
    """Train a fresh network while the learning rate rises geometrically; no epoch ends, nothing is kept."""

    key: str  # "ramp/optimizer=adamw/2"
    config: Config  # without lr
    seed: int
    lr_min: float
    lr_max: float
    steps: int
    kind: Literal["ramp"] = "ramp"


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """Train a fresh network for some steps at its config's constant lr."""

    key: str  # "probe/optimizer=adamw/0.004/0"
    config: Config  # with lr
    seed: int
    steps: int
    kind: Literal["probe"] = "probe"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train a trial from one epoch to another.

    With from_epoch > 0 and no checkpoint the worker trains the earlier epochs again and reports only the later
    ones: so it is with a `fit` of the user's that gives no state.
    """

    key: str  # "train/17/3-9"
    trial: int
    config: Config
    seed: int  # the trial's
    from_epoch: int
    to_epoch: int
    checkpoint: str | None = None  # blob reference of the trial's last checkpoint
    best: float | None = None  # objective of the best epoch so far (minimised), None before the first
    kind: Literal["train"] = "train"


@dataclass(frozen=True, kw_only=True)
class RebuildJob:
    """Train a trial from its start to its best epoch once more, for that epoch's weights; nothing else is told."""

    key: str  # "rebuild/17/5"
    trial: int
    config: Config
    seed: int  # the trial's
    epoch: int
    checkpoint: str  # blob reference under which the weights were kept, and will be
    kind: Literal["rebuild"] = "rebuild"


@dataclass(frozen=True, kw_only=True)
class ConfirmJob:
    """Train a trial's config afresh with another seed, and measure its best epoch on rows never ranked on."""

    key: str  # "confirm/17/27/0"
    trial: int
    config: Config
    seed: int  # not the trial's
    epochs: int
    kind: Literal["confirm"] = "confirm"


@dataclass(frozen=True, kw_only=True)
class FoldJob:
    """Train a trial's config afresh on all folds but one, and follow it on that one."""

    key: str  # "fold/17/27/5/0/3"
    trial: int
    config: Config
    seed: int  # not the trial's
    epochs: int
    folds: int
    repeat: int  # from 0; each cuts the rows anew
    fold: int  # from 0; the one that is held out
    kind: Literal["fold"] = "fold"


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """Ask the data, or a network of the space, what preflight asks."""

    key: str  # "check/network/trial 0"
    what: Literal["data", "network", "overfit", "step", "batch"]
    corner: str  # where in the space, in plain words; "" for the data
    config: Config
    seed: int  # of the network's initial weights
    kind: Literal["check"] = "check"


@dataclass(frozen=True, kw_only=True)
class BaselineJob:
    """Measure what a study is held against, on every split."""

    key: str  # "baseline/constant"
    name: Literal["constant", "linear"]
    seed: int  # the study's
    kind: Literal["baseline"] = "baseline"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trial's best checkpoint and its weight in an ensemble."""

    trial: int
    config: Config
    checkpoint: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Predict a split with the weighted mean of some members, and measure it. One member: a single model."""

    key: str  # "evaluate/ensemble-split/17", "evaluate/test/best", "evaluate/test/ensemble"
    members: tuple[Member, ...]
    split: SplitName
    keep_predictions: bool
    kind: Literal["evaluate"] = "evaluate"


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Write members as graphs and weights that need neither the user's code nor trust."""

    key: str  # "export/17"
    members: tuple[Member, ...]
    kind: Literal["export"] = "export"


Job = (
    RampJob | ProbeJob | TrainJob | RebuildJob | FoldJob | ConfirmJob | CheckJob | BaselineJob | EvaluateJob | ExportJob
)


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one epoch of training gave."""

    epoch: int  # 1 for the first
    metrics: dict[str, float]  # with their split: train_loss, val_loss, val_accuracy, …
    seconds: float


Outcome = Literal["done", "diverged", "out_of_memory", "crashed", "unusable", "damaged"]
"""unusable: nothing wrong with the trial, but what was asked cannot be given (a graph that cannot be exported).
damaged: a blob that the job needs is gone or altered; the worker gives the job back, and nothing is recorded of it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a job, well or badly. `values` is JSON and goes into the journal; blobs go to the disk.

    What `values` holds when the outcome is "done":

    ramp      {"losses": [float, …], "batch_size": int, "epochs": float}; shorter than `steps` when NaN ended it
    probe     {"losses": [float, …], "batch_size": int, "epochs": float}
    train     {"checkpoint": ref | None, "best_checkpoint": ref | None, "resumable": bool, "n_parameters": int}; None
              for the best: an earlier job holds it. "lanes": int, where other trials shared its program, is how many
              there were at once, itself included. `epochs` beside `values` has the curve. So when it is "diverged".
    rebuild   {"best_checkpoint": ref}
    fold      {"n_rows": {"train": int, "val": int}}; `epochs` beside `values` has the curve
    confirm   {"metrics": {…} of the ensemble split, "val": {…}, "epoch": int, "n_rows": int, "row_scores": ref}
    check     {"checks": [checks.Check as JSON, …]}; of a batch, which is looked at by a person: {"checks": [], "batch":
              ref, "shape": […], "dtype": "float32", "kind": "pictures" | "rows", "note": str, "n_not_finite": int,
              "low", "high", "mean", "std": float, "counts": [int, …]}; or "reason" alone where there is none
    baseline  {"metrics": {split: {…}}, "row_scores": {split: ref}}; "unusable" with a message where it makes no sense
    evaluate  {"metrics": {"loss": …, "accuracy": …}, "n_rows": int, "predictions": ref | None,
              "targets": ref | None, "row_scores": ref}
    export    {"members": {"17": {"onnx": ref | None, "weights": ref, "max_difference": float, "reason": str}},
              "input_shape": […], "input_dtype": "float32"}

    When it is "damaged": {"ref": the blob's}.
    """

    key: str
    outcome: Outcome = "done"
    values: Mapping[str, object] = field(default_factory=dict)
    epochs: tuple[EpochMetrics, ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)  # ref -> digest of blobs that the worker put into storage
    message: str = ""  # for a bad outcome: what was found, in one line
    frame: str = ""  # the user's own frame, "file.py:12 in model"
    traceback: str = ""
    seconds: float = 0.0
    attempt: str = ""  # the same for a result and its copies, another for each attempt; "" where nobody sends twice


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What a worker found when it called Task.data(). Two workers of a study must find the same."""

    fingerprint: str
    test_fingerprint: str  # of the test split alone, "" without one; names the split across studies
    n_rows: dict[str, int]  # by split, with val and ensemble as cut
    outputs: Outputs
    n_classes: int | None  # None for numbers
    input_shape: tuple[int, ...]  # of one example
    input_dtype: str
    metrics: tuple[str, ...]  # as a trial will report them, with their split; () when only training will tell
    resumable: bool = True  # False: the task has its own `fit`, and only its first report tells


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A job in a worker's hands."""

    job: Job
    worker: str


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A study's answer to a worker that asks for work."""

    jobs: tuple[Job, ...] = ()
    ended: bool = False  # nothing will come any more; the worker may go
    error: str = ""  # the worker is refused, with this reason
    lease_s: float = 0.0  # how long a job may be silent between two signs of life; 0: not said
    first_lease_s: float = 0.0  # the same before its first


def evaluation_key(split: str, members: Sequence[tuple[int, float]]) -> str:
    """Key of the job that measures some trials, weighted, on a split.

    >>> evaluation_key("test", [(17, 0.75), (3, 0.25)])
    'evaluate/test/17*0.75+3*0.25'
    """
    if len(members) == 1:
        return f"evaluate/{split}/{members[0][0]}"
    return f"evaluate/{split}/" + "+".join(f"{trial}*{weight:.6g}" for trial, weight in members)


def fold_key(trial: int, epochs: int, folds: int, repeat: int, fold: int) -> str:
    """Key of the job that trains a trial's config without one fold.

    >>> fold_key(17, 27, 5, 0, 3)
    'fold/17/27/5/0/3'
    """
    return f"fold/{trial}/{epochs}/{folds}/{repeat}/{fold}"


def fresh_epochs(key: str) -> int:
    """Epochs of a job that trains a config afresh, on a fold or with another seed; 0 of others.

    >>> fresh_epochs("fold/17/27/5/0/3"), fresh_epochs("confirm/17/9/0"), fresh_epochs("train/17/3-9")
    (27, 9, 0)
    """
    kind, *rest = key.split("/")
    return int(rest[1]) if kind in ("fold", "confirm") else 0


def train_key(trial: int, from_epoch: int, to_epoch: int) -> str:
    """Key of the job that trains a trial from one epoch to another.

    >>> train_key(17, 3, 9)
    'train/17/3-9'
    """
    return f"train/{trial}/{from_epoch}-{to_epoch}"


def train_parts(key: str) -> tuple[int, int, int] | None:
    """Trial, from_epoch and to_epoch of a training job's key; None for other jobs.

    >>> train_parts("train/17/3-9"), train_parts("export/17")
    ((17, 3, 9), None)
    """
    kind, _, rest = key.partition("/")
    if kind != "train":
        return None
    trial, _, epochs = rest.partition("/")
    first, _, last = epochs.partition("-")
    return int(trial), int(first), int(last)


def rebuild_key(trial: int, epoch: int) -> str:
    """Key of the job that trains a trial's best epoch again.

    >>> rebuild_key(17, 5)
    'rebuild/17/5'
    """
    return f"rebuild/{trial}/{epoch}"


def rebuild_parts(key: str) -> tuple[int, int] | None:
    """Trial and epoch of a rebuilding job's key; None for other jobs.

    >>> rebuild_parts("rebuild/17/5"), rebuild_parts("train/17/3-9")
    ((17, 5), None)
    """
    kind, _, rest = key.partition("/")
    if kind != "rebuild":
        return None
    trial, _, epoch = rest.partition("/")
    return int(trial), int(epoch)
