"""What a study keeps in checkpoints/: decided by `retention`, held here against the disk.

Room is made before anything is written, so that budget.disk is never exceeded, not even between two files; and a file
is deleted only when the journal has on disk that it is to be. A kill between the two leaves a file that no event names,
which the next driver deletes.

All of it is asked by the study, which holds its lock. Each result costs O(log n): the whole is looked through only when
an eighth of it has changed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hpsearch.blobs import BlobStore, is_checkpoint
from hpsearch.errors import DamagedBlob, JournalError
from hpsearch.events import Damaged, Dropped, Event, Finished, OutOfRoom, StageEnded, Stopped
from hpsearch.job import Result, rebuild_key, rebuild_parts, train_parts
from hpsearch.retention import LOOK_THROUGH, Price, SortKey, Worth, is_among_best, price_of_best, price_of_last
from hpsearch.stages import Stage
from hpsearch.stages.ensemble import EnsembleStage
from hpsearch.stages.search import Search
from hpsearch.state import StudyState
from hpsearch.trial import TrialRecord

MOST_DAMAGES = 3  # of one file, before the disk is to blame
_ABOVE_ALL: Price = (len(Worth), 0, 0.0, 0)


@dataclass(kw_only=True)
class Admission:
    """What becomes of the checkpoints of some results."""

    events: list[Event] = field(default_factory=list)  # to be recorded, and on disk, before the blobs are written
    unkept: set[str] = field(default_factory=set)  # refs that are not to be written
    no_room: set[str] = field(default_factory=set)  # those of them that the ensemble would have wanted

    def values(self, result: Result) -> dict[str, object]:
        """What is recorded of a result, with the checkpoints that are not kept named."""
        unkept = [ref for ref in result.blobs if ref in self.unkept]
        more: dict[str, object] = {"unkept": unkept} if unkept else {}
        if any(ref in self.no_room for ref in unkept):
            more["no_room"] = True
        return {**result.values, **more}


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A checkpoint that came with a result."""

    ref: str
    n_bytes: int
    price: Price


class Keeping:
    """The checkpoints of one study, and which of them go."""

    def __init__(
        self, state: StudyState, blobs: BlobStore, stages: Iterable[Stage], *, limit_bytes: int | None = None
    ) -> None:
        """
        Args:
            state: after all events so far; every later one is told to `apply`.
            limit_bytes: budget.disk.
        """
        stages = list(stages)
        self._state = state
        self._blobs = blobs
        self._limit = math.inf if limit_bytes is None else limit_bytes
        self._search = next((stage for stage in stages if isinstance(stage, Search)), None)
        ensemble = next((stage for stage in stages if isinstance(stage, EnsembleStage)), None)
        # A launch without an ensemble stage may be followed by one with it.
        self._pool, self._size = (sys.maxsize, 1) if ensemble is None else ensemble.n_kept
        self._refs: dict[int, frozenset[str]] = {}  # trial -> its checkpoints
        self._trial_of: dict[str, int] = {}
        self._ranked: list[SortKey] = []  # of all trials with a best checkpoint, best first
        self._keys: dict[int, SortKey] = {}  # trial -> its entry there
        self._gone: set[str] = set()  # named by no event any more, and still on disk
        self._cheapest: list[tuple[Price, str]] = []  # heap; entries may be out of date, and are looked at again
        self._n_changes = sys.maxsize  # trials that changed since all was looked through
        self._leaving: set[str] = set()  # to be dropped by events that are being prepared
        self._n_damages: Counter[str] = Counter()
        for number in state.trials:
            self._look(number)

    def begin(self) -> list[Event]:
        """What has to be recorded before a study is taken up; what a crash left behind is deleted."""
        self._blobs.tidy(self._state.owners)
        self._leaving = set()
        found = damaged_exports(self._state, self._blobs)
        events: list[Event] = [event for event in map(self.damaged, found) if event is not None]
        excess = self._blobs.n_bytes() - self._limit
        if excess > 0:
            victims, _ = self._victims(excess, _ABOVE_ALL)
            events += self._dropped(victims)
            events += [
                OutOfRoom(ref=ref, n_bytes=self._blobs.size(ref))
                for price, ref in victims
                if price[0] == Worth.BEST and not self._state.out_of_room
            ][:1]
        return events

    def apply(self, event: Event) -> None:
        """Take one more event into account; the study's state has it already."""
        match event:
            case Finished():
                parts = rebuild_parts(event.key)
                number = event.trial if parts is None else parts[0]
                if number is not None:
                    self._gone |= {r for r in event.digests if is_checkpoint(r) and r not in self._state.owners}
                    self._look(number)
            case Dropped(refs=refs):
                for ref in refs:
                    self._forget(ref)
            case Damaged(ref=ref):
                self._n_damages[ref] += 1
                self._forget(ref)
            case Stopped(trial=trial):
                self._look(trial)
            case StageEnded():
                self._n_changes = sys.maxsize
            case _:
                pass

    # Damage

    def damaged(self, error: DamagedBlob) -> Damaged | None:
        """The event of damage that was met, None where it is known, or concerns nothing that is kept."""
        known = error.ref in self._state.owners or error.ref in self._state.digests
        return Damaged(ref=error.ref, message=error.why) if known else None

    def failure(self, ref: str) -> JournalError | None:
        """Why a study should end rather than make a blob once more."""
        if self._n_damages[ref] < MOST_DAMAGES:
            return None
        return JournalError(
            f"{ref} was damaged {MOST_DAMAGES} times since this launch began",
            hint="is the disk sound? Copy the run directory to another, then hpsearch launch --resume",
        )

    # Coming

    def is_short(self, results: Iterable[Result]) -> bool:
        """Whether there may be no room for all checkpoints of some results: what can be deleted should be, first."""
        coming = sum(len(blob) for result in results for ref, blob in result.blobs.items() if is_checkpoint(ref))
        return coming > self._limit - self._blobs.n_bytes()

    def admit(self, results: Sequence[Result]) -> Admission:
        """Which checkpoints of some results are written, and what goes for them."""
        admission = self._admission(results)
        # A file of the same name that was to be deleted is written anew.
        self._gone -= {ref for result in results for ref in result.blobs if ref not in admission.unkept}
        return admission

    def _admission(self, results: Sequence[Result]) -> Admission:
        admission = Admission()
        self._leaving = set()
        offers: list[_Offer] = []
        replaced: list[str] = []
        for result in results:
            offers += self._offers(result, replaced)
        offers.sort(key=lambda offer: offer.price, reverse=True)
        admission.unkept |= {offer.ref for offer in offers if offer.price[0] == Worth.NOTHING}
        wanted = [offer for offer in offers if offer.price[0] > Worth.NOTHING]
        free = self._limit - self._blobs.n_bytes()
        if sum(offer.n_bytes for offer in wanted) <= free:
            return admission
        going: list[tuple[Price, str]] = []
        for offer in wanted:
            while offer.n_bytes > free and replaced:
                ref = replaced.pop()
                if ref not in self._leaving:
                    self._leaving.add(ref)
                    going.append(((Worth.REPLACED, 0, 0.0, 0), ref))
                    free += self._blobs.size(ref)
            if offer.n_bytes > free:
                victims, found = self._victims(offer.n_bytes - free, offer.price)
                going += victims
                free += found
            if offer.n_bytes <= free:
                free -= offer.n_bytes
                continue
            admission.unkept.add(offer.ref)
            if offer.price[0] >= Worth.POOL:
                admission.no_room.add(offer.ref)
            if offer.price[0] == Worth.BEST and not self._state.out_of_room:
                admission.events = [OutOfRoom(ref=offer.ref, n_bytes=offer.n_bytes)]
        admission.events += self._dropped(going)
        return admission

    def _offers(self, result: Result, replaced: list[str]) -> list[_Offer]:
        """The checkpoints of a result that ended well; those that it replaces are added to `replaced`."""
        if result.outcome not in ("done", "diverged"):
            return []
        prices: dict[str, Price] = {}
        train, rebuild = train_parts(result.key), rebuild_parts(result.key)
        last, best = (result.values.get(name) for name in ("checkpoint", "best_checkpoint"))
        if rebuild is not None:
            key = self._state.trials[rebuild[0]].sort_key
            asked_for = price_of_best(key, 0, pool=self._pool, size=self._size)  # whatever its place by now
            prices[str(best)] = max(self._price_of_best(rebuild[0], key), asked_for)
        elif train is not None:
            trial = self._state.trials[train[0]]
            epoch = result.epochs[-1].epoch if result.epochs else trial.epoch
            objective = self._objective_after(trial, result)
            key = (result.outcome == "diverged", objective is None, objective or 0.0, trial.number)
            if best is not None:
                prices[str(best)] = self._price_of_best(trial.number, key)
            if last is not None:
                price = price_of_last(
                    trial.number,
                    epoch,
                    objective,
                    leased=False,
                    may_continue=self._may_continue(trial.number, epoch, objective),
                    is_best=len(self._ranked) < self._size or key <= self._ranked[self._size - 1],
                )
                prices[str(last)] = max(price, prices.get(str(last), price))
            now = {last, best or trial.best_checkpoint}
            replaced += [ref for ref in (trial.checkpoint, trial.best_checkpoint) if ref is not None and ref not in now]
        return [
            _Offer(ref=ref, n_bytes=len(result.blobs[ref]), price=price)
            for ref, price in prices.items()
            if ref in result.blobs and is_checkpoint(ref)
        ]

    def _price_of_best(self, number: int, key: SortKey) -> Price:
        """Of a best checkpoint that is to come. What it would push out of the pool is judged with it in its place."""
        place = self._place(key) - (self._keys.get(number, key) < key)
        if place < self._pool:
            self._rank(number, key)
        return price_of_best(key, place, pool=self._pool, size=self._size, wanted=self._is_wanted(number))

    def _objective_after(self, trial: TrialRecord, result: Result) -> float | None:
        values = [trial.best_objective] + [
            self._state.objective(row.metrics) for row in result.epochs if self._state.metric in row.metrics
        ]
        return min((value for value in values if value is not None and math.isfinite(value)), default=None)

    # Going

    def sweep(self) -> list[Event]:
        """The checkpoints that nobody will ask for, when enough has happened since they were looked for."""
        self._leaving = set()
        return self._dropped(self._useless()) if self._is_due() else []

    def take_dropped(self) -> list[str]:
        """Files that may be deleted once all that was recorded is on disk."""
        gone, self._gone = [ref for ref in self._gone if ref not in self._state.owners], set()
        return gone

    def _is_due(self) -> bool:
        return self._n_changes * LOOK_THROUGH >= max(1, len(self._trial_of))

    def _useless(self) -> list[tuple[Price, str]]:
        """Looks through all checkpoints; gives those that nobody will ask for."""
        prices = [(self._price(ref), ref) for ref in self._trial_of if ref not in self._leaving]
        useless = [entry for entry in prices if entry[0][0] == Worth.NOTHING]
        self._n_changes = 0
        self._leaving |= {ref for _, ref in useless}
        if self._limit < math.inf:
            self._cheapest = [entry for entry in prices if entry[0][0] > Worth.NOTHING]
            heapq.heapify(self._cheapest)
        return useless

    def _victims(self, n_bytes: float, price: Price) -> tuple[list[tuple[Price, str]], int]:
        """The cheapest checkpoints that make up some bytes, all of them cheaper than `price`, and their bytes.

        Where so many bytes cannot be had, only what nobody will ask for goes; what lost its worth since all was looked
        through may be missed.
        """
        victims = self._useless() if self._is_due() else []
        found = self._n_bytes_of(victims)
        if found >= n_bytes:
            return victims, found
        paid = self._cheaper(n_bytes - found, price)
        if found + self._n_bytes_of(paid) < n_bytes and price < _ABOVE_ALL:
            for entry in paid:
                heapq.heappush(self._cheapest, entry)
                self._leaving.discard(entry[1])
            return victims, found
        return victims + paid, found + self._n_bytes_of(paid)

    def _cheaper(self, n_bytes: float, price: Price) -> list[tuple[Price, str]]:
        taken: list[tuple[Price, str]] = []
        while n_bytes > 0 and self._cheapest and self._cheapest[0][0] < price:
            then, ref = heapq.heappop(self._cheapest)
            if ref not in self._trial_of or ref in self._leaving:
                continue
            now = self._price(ref)
            if now > then:
                heapq.heappush(self._cheapest, (now, ref))
                continue
            taken.append((now, ref))
            self._leaving.add(ref)
            n_bytes -= self._blobs.size(ref)
        return taken

    def _n_bytes_of(self, entries: Iterable[tuple[Price, str]]) -> int:
        return sum(self._blobs.size(ref) for _, ref in entries)

    def _dropped(self, going: Iterable[tuple[Price, str]]) -> list[Event]:
        kinds: dict[bool, list[str]] = {False: [], True: []}
        for price, ref in going:
            kinds[price[0] >= Worth.POOL].append(ref)
        return [Dropped(refs=tuple(refs), no_room=no_room) for no_room, refs in kinds.items() if refs]

    # Prices

    def _price(self, ref: str) -> Price:
        trial = self._state.trials[self._trial_of[ref]]
        price = _NOTHING
        if ref == trial.checkpoint:
            price = price_of_last(
                trial.number,
                trial.epoch,
                trial.best_objective,
                leased=trial.leased is not None,
                may_continue=self._may_continue(trial.number, trial.epoch, trial.best_objective),
                is_best=not trial.failed and is_among_best(trial, self._ranked, self._size),
            )
        if ref == trial.best_checkpoint:
            chosen = self._state.selected
            is_chosen = chosen is not None and trial.number in {chosen.best, *(number for number, _ in chosen.members)}
            place = 0 if is_chosen else self._place(trial.sort_key)
            wanted = self._is_wanted(trial.number)
            price = max(price, price_of_best(trial.sort_key, place, pool=self._pool, size=self._size, wanted=wanted))
        return price

    def _is_wanted(self, number: int) -> bool:
        """Whether a best checkpoint is asked for whatever its place: that of a config of the user's is measured at the
        end, and one that was trained again was trained for somebody. Dropped, it would be trained again for ever."""
        trial = self._state.trials[number]
        return trial.baseline or rebuild_key(number, trial.best_epoch or 0) in self._state.results

    def _may_continue(self, number: int, epoch: int, objective: float | None) -> bool:
        return self._search is None or self._search.may_continue(number, epoch, objective)

    def _place(self, key: SortKey) -> int:
        return bisect_left(self._ranked, key)

    def _rank(self, number: int, key: SortKey | None) -> None:
        """Give a trial its place among those with a best checkpoint, or take it out."""
        before = self._keys.pop(number, None)
        if before is not None:
            del self._ranked[bisect_left(self._ranked, before)]
        if key is not None:
            self._keys[number] = key
            insort(self._ranked, key)

    # What there is

    def _look(self, number: int) -> None:
        """Take up what a trial has now."""
        trial = self._state.trials[number]
        before = self._refs.pop(number, frozenset())
        now = frozenset(ref for ref in (trial.checkpoint, trial.best_checkpoint) if ref is not None)
        if now:
            self._refs[number] = now
        self._gone = (self._gone | (before - now)) - now
        self._rank(number, None if trial.best_checkpoint is None else trial.sort_key)
        for ref in before - now:
            del self._trial_of[ref]
        for ref in now - before:
            self._trial_of[ref] = number
            if self._limit < math.inf:
                heapq.heappush(self._cheapest, (self._price(ref), ref))
        self._n_changes = min(self._n_changes + 1, sys.maxsize)

    def _forget(self, ref: str) -> None:
        number = self._trial_of.get(ref)
        if number is not None:
            self._look(number)
        self._gone.add(ref)


def damaged_exports(state: StudyState, blobs: BlobStore) -> list[DamagedBlob]:
    """What is wrong with the files that the ensemble is packed from; they are read when all is over, so nobody else
    would notice in time."""
    found = []
    exports = [result for key, result in state.results.items() if key.startswith("export/")]
    for ref in itertools.chain.from_iterable(result.digests for result in exports):
        try:
            blobs.read(ref, state.digests.get(ref, ""))
        except DamagedBlob as error:
            found.append(error)
    return found


_NOTHING: Price = (Worth.NOTHING, 0, 0.0, 0)
