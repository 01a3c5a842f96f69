"""What can happen in a study: the vocabulary of its journal.

Each event is a fact that was measured, drawn or decided, so that nothing has to be decided a second time when the
journal is read again. What can be computed from these (a trial's state, the rungs, the verdict) is not an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from hpsearch.job import Config, Outcome


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A driver took the study up: the first event, and one more for each resume."""

    type: ClassVar[str] = "opened"
    study: str
    uid: str  # the same for the life of a study; tells two studies of one name apart
    spec: Mapping[str, object]
    spec_text: str
    environment: Mapping[str, object] = field(default_factory=dict)  # versions, hardware, git commit, command line
    code: Mapping[str, str] = field(default_factory=dict)  # sha256 of the task's file and those it imports, by name


@dataclass(frozen=True, kw_only=True)
class DataSeen:
    """The first worker told what Task.data() gave; every later one must tell the same."""

    type: ClassVar[str] = "data"
    info: Mapping[str, object]  # job.DataInfo


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A worker's process began; an earlier one of this name is gone."""

    type: ClassVar[str] = "arrived"
    worker: str
    node: str = ""  # Ray's id of its node, "" in the driver's process
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class StageBegan:
    type: ClassVar[str] = "stage-began"
    stage: str


@dataclass(frozen=True, kw_only=True)
class StageEnded:
    type: ClassVar[str] = "stage-ended"
    stage: str
    reason: str = ""  # the budget that ended it early


@dataclass(frozen=True, kw_only=True)
class RangeMeasured:
    """The learning rates worth searching in one branch of the space."""

    type: ClassVar[str] = "lr-range"
    branch: Config
    lr: float | None  # None: no ramp gave a finite loss; the user's own bounds are searched
    low: float
    high: float
    spread_decades: float
    at_edge: bool
    confirmed: bool  # constant-rate probes were run
    per_seed_lr: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrialDrawn:
    type: ClassVar[str] = "trial"
    trial: int
    config: Config
    seed: int
    baseline: bool = False  # the user's own config, one trial more than were asked for


@dataclass(frozen=True, kw_only=True)
class Leased:
    """A job went to a worker. `trial` and `to_epoch` are told for training alone."""

    type: ClassVar[str] = "leased"
    key: str
    worker: str
    trial: int | None = None
    from_epoch: int = 0
    to_epoch: int = 0
    beside: str = ""  # key of a job in this worker's hands whose program it was asked for to share


@dataclass(frozen=True, kw_only=True)
class Returned:
    """A lease ended without a result: the worker was lost, or made no progress."""

    type: ClassVar[str] = "returned"
    key: str
    worker: str
    reason: str
    blamed: bool = False  # the job may be why: a process or a machine died in it, or it hung


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A job's result, its blobs already on disk. `epochs` are (epoch, metrics, seconds).

    `values` may hold `unkept`, refs of checkpoints that are not on disk: nobody would ask for them, or there was no
    room. With `no_room` the latter, and the best checkpoint among them was wanted for the ensemble.
    """

    type: ClassVar[str] = "finished"
    key: str
    worker: str
    outcome: Outcome
    trial: int | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    epochs: tuple[tuple[int, dict[str, float], float], ...] = ()
    message: str = ""
    frame: str = ""
    traceback: str = ""
    seconds: float = 0.0
    attempt: str = ""  # told where the job may be given out again: a copy of this result is no second failure
    final: bool = False  # a crash that is no accident: the job is not tried again
    digests: Mapping[str, str] = field(default_factory=dict)  # ref -> digest of its bytes, of each blob that was kept
    stored: tuple[str, ...] = ()  # of these, refs that the worker put into storage, and that are not here


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Checkpoints are there no more. Told before the files are deleted."""

    type: ClassVar[str] = "dropped"
    refs: tuple[str, ...]
    no_room: bool = False  # they were wanted for the ensemble; without it they can be had again by training


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A blob is not what was written, or is gone. What was computed stays; whoever needs the blob has it made again."""

    type: ClassVar[str] = "damaged"
    ref: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class OutOfRoom:
    """budget.disk does not hold the checkpoints that cannot be done without; the search ends with those there are."""

    type: ClassVar[str] = "out-of-room"
    ref: str  # what could not be kept
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A trial that cannot be paused was told to give its worker back."""

    type: ClassVar[str] = "stopped"
    trial: int


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """How the best few stand after fresh seeds, the best first: trial, searched, confirmed, low, high, optimism, seeds,
    chance; scores in the metric's own unit."""

    type: ClassVar[str] = "confirmed"
    epoch_of_search: int  # epochs that the search had trained; a search that went on confirms again
    standings: tuple[Mapping[str, object], ...]
    out: tuple[int, ...] = ()  # trials whose fresh run diverged or crashed
    reason: str = ""  # the budget that ended it early


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How the best few stand after cross-validation, the best first: trial, searched, mean, corrected, low, high,
    epoch, folds, scores, chance; in the metric's own unit. Those that were given up come last, with fewer folds."""

    type: ClassVar[str] = "evaluated"
    epoch_of_search: int  # epochs that the search had trained; a search that went on evaluates again
    folds: int
    repeats: int
    standings: tuple[Mapping[str, object], ...]
    out: tuple[int, ...] = ()  # trials of which the training on some fold diverged or crashed
    reason: str = ""  # the budget that ended it early


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The ensemble that was chosen on the ensemble split."""

    type: ClassVar[str] = "selected"
    n_trials: int  # the study's size when it was chosen; a study that grew chooses again
    best: int  # the best single trial by the study's metric
    pool: tuple[int, ...]
    members: tuple[tuple[int, float], ...]  # trial, weight
    scores: tuple[float, ...] = ()  # on the ensemble split, after each round of the selection
    single_score: float | None = None  # the best single candidate's on the same split


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Ensemble against best single trial on the test split: metric, value, low, high, better (None: undecided)."""

    type: ClassVar[str] = "compared"
    n_trials: int
    gain: Mapping[str, object]
    intervals: Mapping[str, object] = field(default_factory=dict)  # of the ensemble's and the best's own test scores
    over_baseline: Mapping[str, object] = field(default_factory=dict)
    """What is delivered minus the best prediction that ignores the inputs, on rows that chose nothing: metric, value,
    low, high, better (True or False; None: not known), split, n_rows."""
    over_own: Mapping[str, object] = field(default_factory=dict)
    """The best single trial minus the trial of the user's own config, with the same keys and `trial`."""
    over_linear: Mapping[str, object] = field(default_factory=dict)
    """The best single trial minus a linear model, with the keys of `over_baseline` (better None: no difference shown);
    empty where there was none, or no rows that chose nothing."""


@dataclass(frozen=True, kw_only=True)
class StorageBehind:
    """What is known here is not all in storage, and is not being sent: a lost disk would take it along."""

    type: ClassVar[str] = "storage-behind"
    reason: str
    n_entries: int  # of this journal, that storage has not got


@dataclass(frozen=True, kw_only=True)
class StorageCaughtUp:
    """Storage has everything again."""

    type: ClassVar[str] = "storage-caught-up"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The driver let the study go."""

    type: ClassVar[str] = "ended"
    reason: str  # "done", "interrupted", "failed: …", "no usable trial"
    message: str = ""


Event = (
    Opened
    | DataSeen
    | Arrived
    | StageBegan
    | StageEnded
    | RangeMeasured
    | TrialDrawn
    | Leased
    | Returned
    | Finished
    | Dropped
    | Damaged
    | OutOfRoom
    | Stopped
    | Evaluated
    | Confirmed
    | Selected
    | Compared
    | StorageBehind
    | StorageCaughtUp
    | Ended
)

EVENT_TYPES: dict[str, type[Event]] = {
    cls.type: cls
    for cls in (
        Opened,
        DataSeen,
        Arrived,
        StageBegan,
        StageEnded,
        RangeMeasured,
        TrialDrawn,
        Leased,
        Returned,
        Finished,
        Dropped,
        Damaged,
        OutOfRoom,
        Stopped,
        Evaluated,
        Confirmed,
        Selected,
        Compared,
        StorageBehind,
        StorageCaughtUp,
        Ended,
    )
}


def to_json(event: Event) -> dict[str, object]:
    """The event as a JSON object; fields at their default are left out, which keeps the journal small."""
    fields = type(event).__dataclass_fields__
    body = {k: v for k, v in vars(event).items() if v or fields[k].default != v}
    return {"type": event.type, **body}


def from_json(body: Mapping[str, object]) -> Event:
    """The event that `to_json` wrote.

    Raises:
        ValueError: the type is unknown, or its fields are not those of this version.
    """
    fields = dict(body)
    cls = EVENT_TYPES.get(str(fields.pop("type", "")))
    if cls is None:
        raise ValueError(f"an event of type {body.get('type')!r} is not known to this version")
    for name in ("epochs", "members", "pool", "scores", "per_seed_lr", "refs", "stored", "standings", "out"):
        if name in fields and name in cls.__dataclass_fields__:
            rows = fields[name]
            assert isinstance(rows, list)
            fields[name] = tuple(tuple(row) if isinstance(row, list) else row for row in rows)
    try:
        return cls(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"an event of type {cls.type!r} has other fields than this version's: {error}") from None
