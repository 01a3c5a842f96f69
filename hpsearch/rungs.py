"""When a trial may go on: early stopping as functions of the values seen so far.

A trial trains to a *rung*, is paused there with its value, and goes on when its rule says so. A rule is told what has
happened (`record`, `promote`, `withdraw`) and asked what may happen next (`promotable`, `best_paused`,
`keeps_going`); it knows no clock, no worker and no disk, so that replaying a journal's events gives the same decisions.

A trial that diverged or failed is *withdrawn* by the study; a value that is not finite is refused, so that no NaN ever
takes a place in a ranking. Values are minimised; equal values rank by trial number, the lower one first.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

RuleName = Literal["asha", "sha", "median", "none"]

MEDIAN_GRACE = 5  # other trials at a rung before their median means anything; also Optuna's default


def rung_epochs(min_epochs: int, max_epochs: int, reduction_factor: int) -> tuple[int, ...]:
    """Epochs at which trials are compared, lowest first.

    Found by multiplying, since int(log(243) / log(3)) is 4, not 5.

    Args:
        min_epochs: epochs every trial gets before it can be paused; >= 1.
        max_epochs: epochs of a full trial; a trial this long is complete.
        reduction_factor: eta in the paper; the best 1/eta of a rung go on; >= 2.

    Returns:
        Increasing epochs within [min_epochs, max_epochs). Empty when the two are equal.

    Raises:
        ValueError: the epochs are out of order, or reduction_factor is below 2.

    Source: Li et al. 2020, arXiv:1810.05934.

    >>> rung_epochs(min_epochs=1, max_epochs=243, reduction_factor=3)
    (1, 3, 9, 27, 81)
    """
    _check_order(min_epochs, max_epochs)
    if reduction_factor < 2:
        raise ValueError(f"reduction_factor must be 2 or more (got {reduction_factor})")
    epochs = []
    epoch = min_epochs
    while epoch < max_epochs:
        epochs.append(epoch)
        epoch *= reduction_factor
    return tuple(epochs)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A paused trial and the epochs that it may be trained for next: after from_epoch, up to and with to_epoch."""

    trial: int
    from_epoch: int
    to_epoch: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a trial has come, whatever rungs it was trained to: its curve, as a rule sees it."""

    trial: int
    best_by_epoch: tuple[tuple[int, float], ...]  # (epoch, best value up to it), lowest epoch first; finite values only
    withdrawn: bool = False  # it diverged, failed or was let go

    @property
    def epoch(self) -> int:
        """The last one, 0 before the first."""
        return self.best_by_epoch[-1][0] if self.best_by_epoch else 0

    def value_at(self, epoch: int) -> float | None:
        """The best value up to an epoch that the trial has reached, None before its first."""
        place = bisect_left(self.best_by_epoch, (epoch + 1,))
        return self.best_by_epoch[place - 1][1] if place else None


class StoppingRule(Protocol):
    """Decides which trials go on. Every call costs O(rungs · log trials) comparisons; with `fits` or `prefer`,
    `promotable` looks at each that may go on."""

    first_target: int
    """Epochs that a fresh trial trains for before anything is asked."""

    epochs: tuple[int, ...]
    """Epochs at which trials are compared, lowest first; `max_epochs` is not one of them."""

    def record(self, trial: int, epoch: int, value: float) -> None:
        """The trial has trained to `epoch` with this value; it is paused there, or complete at max_epochs.

        The same trial and epoch a second time are ignored, whatever the value; so is a trial that was withdrawn.

        Raises:
            ValueError: the value is not finite, no trial is compared at `epoch`, or a later epoch came before.
        """

    def withdraw(self, trial: int) -> None:
        """The trial diverged or failed: nobody waits for it any more, and it is never promoted.

        It keeps its place in the rungs that it reached with a finite value.
        """

    def promotable(
        self, fits: Callable[[int], bool] | None = None, prefer: Callable[[int], bool] | None = None
    ) -> Promotion | None:
        """The next paused trial that may go on, from the highest rung that has one. Looking changes nothing.

        Args:
            fits: of a trial: others are not wanted now.
            prefer: of a trial: such a one is taken before a better one of its rung, since both may go on.
        """

    def promote(self, trial: int, from_epoch: int) -> None:
        """The trial has been given out from that rung. Saying so twice is saying it once.

        Raises:
            ValueError: the trial was never recorded at `from_epoch`.
        """

    def best_paused(self) -> Promotion | None:
        """For the end-game: the best paused trial of the highest rung that holds one, going to max_epochs."""

    def restore(self, standings: Iterable[Standing]) -> None:
        """Take up trials that were trained under other rungs; said once, to a new rule.

        A trial has its place at every rung that it passed, with its best value up to there, and is paused at the
        highest of them, wherever beyond it it stands. One as far as max_epochs is complete.
        """

    def may_yet_go_on(self, trial: int, epoch: int, value: float, *, n_trials: int, end_game: int) -> bool:
        """Whether a trial that is, or would be, paused at `epoch` with this value can still be given out.

        True as long as it could be if all that are still to come were worse, so True is no promise.

        Args:
            n_trials: those drawn and still to be drawn.
            end_game: how many trials the end-game may still take.
        """

    def keeps_going(self, trial: int, epoch: int) -> bool:
        """Asked right after `record`, for a trial that cannot be paused: does it train on, or end here?

        False at max_epochs, where the trial is complete.

        Raises:
            ValueError: the trial was never recorded at `epoch`.
        """


def make_rule(
    type: RuleName,  # the key's name in space.yaml
    *,
    min_epochs: int,
    max_epochs: int,
    reduction_factor: int,
    n_trials: int,
) -> StoppingRule:
    """The rule that space.yaml's `early_stopping` names; each takes what it needs of the settings.

    Raises:
        ValueError: a setting is out of range, or there is no such rule.
    """
    match type:
        case "asha":
            return PromotionAsha(min_epochs, max_epochs, reduction_factor)
        case "sha":
            return SynchronousHalving(min_epochs, max_epochs, reduction_factor, n_trials)
        case "median":
            return MedianRule(min_epochs, max_epochs)
        case "none":
            return NoStopping(max_epochs)
    raise ValueError(f"there is no early stopping rule {type!r} (known: asha, sha, median, none)")


class _Rung:
    """The trials that reached one epoch, ranked: by value, then by number."""

    def __init__(self, epoch: int, next_epoch: int) -> None:
        self.epoch = epoch
        self.next_epoch = next_epoch
        self.value_of: dict[int, float] = {}
        self.ranking: list[tuple[float, int]] = []
        self.paused: list[tuple[float, int]] = []  # the part of the ranking that nobody has promoted or withdrawn

    def __len__(self) -> int:
        return len(self.ranking)

    def add(self, trial: int, value: float) -> None:
        self.value_of[trial] = value
        insort(self.ranking, (value, trial))
        insort(self.paused, (value, trial))

    def release(self, trial: int) -> None:
        """The trial is not paused here any more, if it was; its place in the ranking stays."""
        if trial in self.value_of:
            entry = (self.value_of[trial], trial)
            at = bisect_left(self.paused, entry)
            if at < len(self.paused) and self.paused[at] == entry:
                del self.paused[at]

    def rank(self, trial: int) -> int:
        """0 for the best."""
        return bisect_left(self.ranking, (self.value_of[trial], trial))


class _Ladder:
    """The bookkeeping that all rules share. What differs is who of a rung may go on: `_may_go_on`.

    A rule must never let a trial go on and hold back a better one of the same rung, so only the best paused trial of
    each rung has to be looked at.
    """

    def __init__(self, epochs: Sequence[int], max_epochs: int) -> None:
        self.epochs = tuple(epochs)
        targets = (*self.epochs, max_epochs)
        self.first_target = targets[0]
        self._max_epochs = max_epochs
        self._rungs = {epoch: _Rung(epoch, target) for epoch, target in zip(self.epochs, targets[1:], strict=True)}
        self._highest_first = tuple(reversed(self._rungs.values()))
        self._furthest: dict[int, int] = {}  # trial -> the last epoch recorded
        self._withdrawn: set[int] = set()
        self._n_withdrawn: Counter[int] = Counter()  # by the last epoch that they were recorded at

    def record(self, trial: int, epoch: int, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"trial {trial} at epoch {epoch}: a value must be finite to be ranked (got {value})")
        if epoch != self._max_epochs and epoch not in self._rungs:
            raise ValueError(
                f"trial {trial}: trials are not compared at epoch {epoch}, "
                f"but at {', '.join(map(str, (*self.epochs, self._max_epochs)))}"
            )
        if trial in self._withdrawn or self._was_recorded(trial, epoch):
            return
        if epoch < self._furthest.get(trial, 0):
            raise ValueError(f"trial {trial}: epoch {epoch} was recorded after epoch {self._furthest[trial]}")
        self._furthest[trial] = epoch
        if epoch in self._rungs:
            self._rungs[epoch].add(trial, self._rankable(trial, value))

    def withdraw(self, trial: int) -> None:
        if trial not in self._withdrawn:
            self._n_withdrawn[self._furthest.get(trial, 0)] += 1
        self._withdrawn.add(trial)
        for rung in self._highest_first:
            rung.release(trial)

    def promotable(
        self, fits: Callable[[int], bool] | None = None, prefer: Callable[[int], bool] | None = None
    ) -> Promotion | None:
        for rung in self._highest_first:
            fitting = (trial for trial in self._free_to_go(rung) if fits is None or fits(trial))
            first = next(fitting, None)
            if first is None:
                continue
            trial = first
            if prefer is not None and not prefer(first):
                trial = next((other for other in fitting if prefer(other)), first)
            return Promotion(trial=trial, from_epoch=rung.epoch, to_epoch=rung.next_epoch)
        return None

    def _free_to_go(self, rung: _Rung) -> Iterator[int]:
        """The paused trials of a rung that may leave it, best first."""
        for _, trial in rung.paused:
            if not self._may_go_on(rung, rung.rank(trial)):
                return
            yield trial

    def promote(self, trial: int, from_epoch: int) -> None:
        if from_epoch == self._max_epochs or not self._was_recorded(trial, from_epoch):
            raise ValueError(f"trial {trial} is not paused at epoch {from_epoch}")
        self._rungs[from_epoch].release(trial)

    def best_paused(self) -> Promotion | None:
        for rung in self._highest_first:
            if rung.paused:
                return Promotion(trial=rung.paused[0][1], from_epoch=rung.epoch, to_epoch=self._max_epochs)
        return None

    def restore(self, standings: Iterable[Standing]) -> None:
        for standing in standings:
            passed = [epoch for epoch in (*self.epochs, self._max_epochs) if epoch <= standing.epoch]
            for epoch in passed:
                value = standing.value_at(epoch)
                if value is not None:
                    _Ladder.record(self, standing.trial, epoch, value)
            for epoch in passed[:-1]:
                self._rungs[epoch].release(standing.trial)
            if standing.withdrawn:
                _Ladder.withdraw(self, standing.trial)

    def keeps_going(self, trial: int, epoch: int) -> bool:
        if not self._was_recorded(trial, epoch):
            raise ValueError(f"trial {trial} was not recorded at epoch {epoch}")
        if epoch == self._max_epochs or trial in self._withdrawn:
            return False
        rung = self._rungs[epoch]
        return self._may_train_on(rung, rung.rank(trial))

    def may_yet_go_on(self, trial: int, epoch: int, value: float, *, n_trials: int, end_game: int) -> bool:
        if trial in self._withdrawn:
            return False
        rung = self._rungs[epoch]
        place = (rung.value_of.get(trial, value), trial)
        if place <= self._last_to_go_on(rung, self._most_at(rung, n_trials)):
            return True
        better = sum(len(other.paused) for other in self._highest_first if other.epoch > epoch)
        return better + bisect_left(rung.paused, place) < end_game

    def _most_at(self, rung: _Rung, n_trials: int) -> int:
        """How many trials the rung can hold in the end."""
        most = n_trials - self._n_withdrawn[0]
        for below in self._rungs.values():
            if below is rung:
                break
            n_stuck = len(below.paused) - bisect_right(below.paused, self._last_to_go_on(below, most))
            most -= n_stuck + self._n_withdrawn[below.epoch]
        return max(most, len(rung))

    def _last_to_go_on(self, rung: _Rung, most: int) -> tuple[float, float]:
        """The worst place (value, trial) from which a trial can go on, if the rung comes to hold `most` trials.

        Those to come are taken to be worse than all who are there, which is the best that can happen to these.
        """
        reach = self._reach(rung, most)
        if reach > len(rung):
            return (math.inf, math.inf)
        return rung.ranking[reach - 1] if reach else (-math.inf, -math.inf)

    def _reach(self, rung: _Rung, most: int) -> int:
        """How many of the best can go on in the end, where the rung comes to hold `most` trials."""
        raise NotImplementedError  # abstract, as _may_go_on, of which it is the limit

    def _was_recorded(self, trial: int, epoch: int) -> bool:
        if epoch == self._max_epochs:
            return self._furthest.get(trial) == epoch
        return epoch in self._rungs and trial in self._rungs[epoch].value_of

    def _rankable(self, trial: int, value: float) -> float:
        """What a trial is ranked by at a rung."""
        del trial
        return value

    def _may_go_on(self, rung: _Rung, rank: int) -> bool:
        """Whether the trial of this rank may leave the rung. True for a rank is true for every better one."""
        raise NotImplementedError  # abstract: the rules differ in this alone

    def _may_train_on(self, rung: _Rung, rank: int) -> bool:
        """The same for a trial that cannot wait for others."""
        return self._may_go_on(rung, rank)


class PromotionAsha(_Ladder):
    """Asynchronous successive halving: whoever is in the best floor(n/eta) of the n trials at a rung may go on.

    Trials that wait are looked at again whenever the rung grows. A trial that went on may be overtaken by later ones,
    so that more than floor(n/eta) leave a rung in the end: the price of not waiting. At any moment, though, only a
    trial within the best floor(n/eta) is given out.

    A trial that cannot be paused trains on while it is in the best floor(n/eta), or the best so far.

    Source: Li et al. 2020, arXiv:1810.05934, algorithm 2.
    """

    def __init__(self, min_epochs: int, max_epochs: int, reduction_factor: int) -> None:
        super().__init__(rung_epochs(min_epochs, max_epochs, reduction_factor), max_epochs)
        self._reduction_factor = reduction_factor

    def _may_go_on(self, rung: _Rung, rank: int) -> bool:
        return rank < len(rung) // self._reduction_factor

    def _reach(self, rung: _Rung, most: int) -> int:
        return most // self._reduction_factor

    def _may_train_on(self, rung: _Rung, rank: int) -> bool:
        return rank < max(1, len(rung) // self._reduction_factor)


class SynchronousHalving(_Ladder):
    """Successive halving: a rung is decided when all of its trials have come, whatever their order.

    How many are expected:

    - The lowest rung waits for `n_trials` different trials. One that is withdrawn before it gets there is waited for
      no longer and leaves no value: n is the number of values.
    - Of the n values at a decided rung, the best floor(n/eta) are chosen, and the next rung waits for them. A chosen
      trial that is withdrawn on the way leaves the next rung one value poorer; nobody takes its place, since whoever
      did would have to be found out after the others had gone on.
    - When `n_trials` was raised and the events of the shorter study are replayed, some trials have gone on before
      their rung was decided; the next rung waits for these as well.
    - A rung of which none is chosen ends the ladder; `best_paused` carries on from there.

    So who goes on depends on each trial's own values and end alone, for any number of workers. A trial that cannot be
    paused cannot wait either: for those `keeps_going` compares with the values so far, as PromotionAsha does.

    Source: Jamieson and Talwalkar 2016, arXiv:1502.07943.
    """

    def __init__(self, min_epochs: int, max_epochs: int, reduction_factor: int, n_trials: int) -> None:
        super().__init__(rung_epochs(min_epochs, max_epochs, reduction_factor), max_epochs)
        if n_trials < 1:
            raise ValueError(f"n_trials must be 1 or more (got {n_trials})")
        self._reduction_factor = reduction_factor
        self._n_trials = n_trials
        self._arrived: set[int] = set()  # at the lowest rung, or withdrawn before it
        self._n_decided = 0  # rungs, from the lowest
        self._awaited: set[int] = set()  # by the lowest undecided rung, unless that is the lowest of all

    def record(self, trial: int, epoch: int, value: float) -> None:
        if len(self._arrived) == self._n_trials and trial not in self._arrived:
            raise ValueError(f"trial {trial} is one more than the {self._n_trials} trials expected")
        super().record(trial, epoch, value)
        self._arrive(trial)

    def withdraw(self, trial: int) -> None:
        super().withdraw(trial)
        self._arrive(trial)

    def restore(self, standings: Iterable[Standing]) -> None:
        standings = tuple(standings)
        super().restore(standings)  # all of them before anything is decided: nobody is on the way yet
        self._arrived.update(s.trial for s in standings if s.withdrawn or s.trial in self._furthest)
        self._decide_what_can_be()

    def _arrive(self, trial: int) -> None:
        """Decides the rungs that waited for nobody but this trial, lowest first."""
        self._arrived.add(trial)
        if trial in self._awaited and not self._is_on_its_way(trial):
            self._awaited.remove(trial)
        self._decide_what_can_be()

    def _decide_what_can_be(self) -> None:
        while self._n_decided < len(self.epochs) and self._all_have_come():
            self._decide(self._rungs[self.epochs[self._n_decided]])

    def _all_have_come(self) -> bool:
        return not self._awaited if self._n_decided else len(self._arrived) >= self._n_trials

    def _decide(self, rung: _Rung) -> None:
        self._n_decided += 1
        chosen = {trial for _, trial in rung.ranking[: len(rung) // self._reduction_factor]}
        gone = rung.value_of.keys() - {trial for _, trial in rung.paused}
        self._awaited = {trial for trial in chosen | gone if self._is_on_its_way(trial)}

    def _is_on_its_way(self, trial: int) -> bool:
        """Whether the lowest undecided rung has still to see the trial."""
        awaited_at = (*self.epochs, self._max_epochs)[self._n_decided]
        return trial not in self._withdrawn and self._furthest[trial] < awaited_at

    def _may_go_on(self, rung: _Rung, rank: int) -> bool:
        is_decided = rung.epoch in self.epochs[: self._n_decided]
        return is_decided and rank < len(rung) // self._reduction_factor

    def _reach(self, rung: _Rung, most: int) -> int:
        return most // self._reduction_factor

    def _may_train_on(self, rung: _Rung, rank: int) -> bool:
        return rank < max(1, len(rung) // self._reduction_factor)


class MedianRule(_Ladder):
    """A trial goes on while its best value so far is not worse than the median of the others' at the same epoch.

    Trials are compared every `min_epochs`. Where fewer than 5 others have been, everyone goes on. A trial that was
    held back may go on later, when worse ones have come.

    Source: Golovin et al. 2017 (Google Vizier), section 3.2.2, with the others' best in place of their mean.
    """

    def __init__(self, min_epochs: int, max_epochs: int) -> None:
        _check_order(min_epochs, max_epochs)
        super().__init__(range(min_epochs, max_epochs, min_epochs), max_epochs)
        self._best_of: dict[int, float] = {}

    def _rankable(self, trial: int, value: float) -> float:
        best = self._best_of[trial] = min(value, self._best_of.get(trial, math.inf))
        return best

    def _may_go_on(self, rung: _Rung, rank: int) -> bool:
        n_others = len(rung) - 1
        if n_others < MEDIAN_GRACE:
            return True
        lower, upper = (
            rung.ranking[place + (place >= rank)][0]  # leaves the trial itself out
            for place in ((n_others - 1) // 2, n_others // 2)
        )
        return rung.ranking[rank][0] <= lower / 2 + upper / 2  # halved first: the sum of two floats may overflow

    def _reach(self, rung: _Rung, most: int) -> int:
        if len(rung) <= MEDIAN_GRACE:
            return most
        reach = (most - 1) // 2 + 1
        while most <= len(rung) and reach and not self._may_go_on(rung, reach - 1):
            reach -= 1  # of those who are all there the median is known
        return reach

    def _last_to_go_on(self, rung: _Rung, most: int) -> tuple[float, float]:
        value, _ = super()._last_to_go_on(rung, most)
        return (value, math.inf if value > -math.inf else value)  # equal values are at the median together


class NoStopping(_Ladder):
    """Every trial trains to max_epochs at once; nothing is ever paused or compared."""

    def __init__(self, max_epochs: int) -> None:
        _check_order(1, max_epochs)
        super().__init__((), max_epochs)


def _check_order(min_epochs: int, max_epochs: int) -> None:
    if not 1 <= min_epochs <= max_epochs:
        raise ValueError(f"1 <= min_epochs <= max_epochs is needed (got {min_epochs} and {max_epochs})")
