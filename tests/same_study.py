"""What must hold between two records of a study, and within one: used where real processes were killed.

They answer with sentences, one per breach; nothing found is an empty list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpsearch.events import Finished, Leased, Returned
from hpsearch.job import Config
from hpsearch.state import Entry, StudyState
from hpsearch.trial import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A trial as it stood at some moment, without times and places."""

    config: Config
    seed: int
    curve: tuple[tuple[int, dict[str, float]], ...]  # epoch, metrics


def glance(state: StudyState) -> dict[int, Glance]:
    """Every trial of a study as it stands."""
    return {
        number: Glance(
            config=trial.config, seed=trial.seed, curve=tuple((row.epoch, row.metrics) for row in trial.curve)
        )
        for number, trial in state.trials.items()
    }


def differences(one: StudyState, other: StudyState) -> list[str]:
    """Where two runs of one study differ in anything but time and place: to the bit, and in every decision."""
    found = []
    if one.trials.keys() != other.trials.keys():
        found.append(f"trials {sorted(one.trials.keys() ^ other.trials.keys())} are in one of the two only")
    for number in sorted(one.trials.keys() & other.trials.keys()):
        mine, its = _outcome(one.trials[number]), _outcome(other.trials[number])
        found += [
            f"trial {number}: {what} is {mine[what]!r} and {its[what]!r}" for what in mine if mine[what] != its[what]
        ]
    if [*map(repr, sorted(one.ranges, key=repr))] != [*map(repr, sorted(other.ranges, key=repr))]:
        found.append("the learning-rate ranges differ")
    if one.selected != other.selected:
        found.append(f"the ensemble is {one.selected} and {other.selected}")
    if one.compared != other.compared:
        found.append(f"the comparison on the test split is {one.compared} and {other.compared}")
    return found


def held(entries: Sequence[Entry]) -> set[str]:
    """Keys of the jobs that are in workers' hands at a journal's end.

    Raises:
        AssertionError: a job was given out while somebody held it, or came back from nobody.
    """
    found: set[str] = set()
    for event in (entry.event for entry in entries):
        match event:
            case Leased(key=key):
                assert key not in found, f"{key} is given out twice"
                found.add(key)
            case Returned(key=key) | Finished(key=key):
                assert key in found, f"{key} came back from nobody"
                found.remove(key)
    return found


def lost(earlier: Mapping[int, Glance], later: Mapping[int, Glance]) -> list[str]:
    """What an earlier look at a study saw and a later one does not: a config, a seed, the beginning of a curve."""
    found = []
    for number, before in earlier.items():
        now = later.get(number)
        if now is None:
            found.append(f"trial {number} is gone")
        elif (now.config, now.seed) != (before.config, before.seed):
            found.append(f"trial {number} has another config or seed")
        elif now.curve[: len(before.curve)] != before.curve:
            found.append(f"trial {number} had {len(before.curve)} epochs that its curve does not begin with")
    return found


def twice(entries: Sequence[Entry]) -> list[str]:
    """Results that a journal holds without a lease, jobs it holds twice, and epochs that do not follow each other."""
    found = []
    leases: set[str] = set()
    done: set[str] = set()
    epochs: dict[int, int] = {}  # trial -> its last
    for entry in entries:
        event = entry.event
        if isinstance(event, Leased):
            leases.add(event.key)
        if not isinstance(event, Finished):
            continue
        if event.key not in leases:
            found.append(f"{event.key} was finished without a lease (entry {entry.seq})")
        leases.discard(event.key)
        if event.outcome == "done":
            if event.key in done:
                found.append(f"{event.key} was finished twice (entry {entry.seq})")
            done.add(event.key)
        for epoch, _, _ in event.epochs:
            assert event.trial is not None
            last = epochs.get(event.trial, 0)
            if epoch != last + 1:
                found.append(f"trial {event.trial} has epoch {epoch} after epoch {last} (entry {entry.seq})")
            epochs[event.trial] = epoch
    return found


def _outcome(trial: TrialRecord) -> dict[str, object]:
    """All of a trial but when, where and how long."""
    return {
        "its config": trial.config,
        "its seed": trial.seed,
        "its state": str(trial.state),
        "its best epoch": trial.best_epoch,
        "its curve": [(row.epoch, row.metrics) for row in trial.curve],
    }
