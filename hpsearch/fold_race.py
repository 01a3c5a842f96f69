"""Which of the best few trials is the best by cross-validation, and which need not be trained on all folds to know.

Each candidate is trained on the same folds, so two of them are compared fold by fold. After the first few folds, who is
clearly worse than the leader is given up, and its other folds are never trained. This goes fold by fold: what was given
up after three folds depends on the scores of these three alone, so it is the same for any number of workers.

Folds share most of their training rows, and their scores are not independent; the variance of their mean is corrected
for it.

Sources: Nadeau and Bengio 2003 (the corrected resampled t); Maron and Moore 1994 (races).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpsearch.racing import ROUNDING, shares_of_least

FloatArray = NDArray[np.float64]

FEWEST_ROWS = 2  # of a fold
FEWEST_FOLDS = 3  # of every candidate: from two, next to nothing can be told
GIVEN_UP = 0.05  # chance at which a candidate as good as the leader would look as bad
DRAWS = 4_000  # of the means, for the chances; their error is below 0.01

Curves = Mapping[int, Mapping[int, Sequence[float]]]
"""By trial, by number of the fold (counted through all repeats): the score after each epoch, minimised and finite."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Who is still in the race, and how far it has come."""

    contenders: tuple[int, ...]  # in the order of the candidates
    given_up: Mapping[int, int]  # trial -> after how many folds
    n_folds: int  # that all contenders have behind them


@dataclass(frozen=True, kw_only=True)
class FoldStanding:
    """A candidate's place. Scores are minimised."""

    trial: int
    mean: float  # over its folds, at `epoch`
    corrected: float  # the mean without what being chosen for it is worth; the mean itself for all but the first
    low: float | None  # about `corrected`, 95 %; None from a single fold, and where all folds scored the same
    high: float | None
    epoch: int  # where the mean over the folds is best
    scores: tuple[float, ...]  # of its folds, at that epoch
    chance: float | None  # that it is the best of those who finished; None for one that was given up

    @property
    def n_folds(self) -> int:
        return len(self.scores)


def run_race(curves: Curves, candidates: Sequence[int], *, folds: int, n_runs: int) -> Race:
    """The race as far as the curves tell of it.

    Args:
        candidates: the best searched first; those that went wrong are left out.
        folds: that the rows are cut into.
        n_runs: folds of all repeats.

    >>> flat = {0: {fold: [1.0 + fold / 100] for fold in range(3)}, 1: {fold: [9.0 + fold / 50] for fold in range(3)}}
    >>> run_race(flat, [0, 1], folds=5, n_runs=5)
    Race(contenders=(0,), given_up={1: 3}, n_folds=3)
    """
    contenders, given_up = list(candidates), dict[int, int]()
    for n_folds in range(n_runs):
        if not contenders or any(n_folds not in curves.get(trial, {}) for trial in contenders):
            return Race(contenders=tuple(contenders), given_up=given_up, n_folds=n_folds)
        if FEWEST_FOLDS <= n_folds + 1 < n_runs:
            worse = _clearly_worse(curves, contenders, n_folds + 1, folds)
            given_up |= dict.fromkeys(worse, n_folds + 1)
            contenders = [trial for trial in contenders if trial not in worse]
    return Race(contenders=tuple(contenders), given_up=given_up, n_folds=n_runs)


def wanted_folds(curves: Curves, candidates: Sequence[int], *, folds: int, n_runs: int) -> tuple[tuple[int, int], ...]:
    """What has to be trained next, as (trial, number of the fold); the first folds of all at once, then one by one."""
    race = run_race(curves, candidates, folds=folds, n_runs=n_runs)
    until = min(n_runs, max(FEWEST_FOLDS, race.n_folds + 1))
    return tuple(
        (trial, fold)
        for fold in range(race.n_folds, until)
        for trial in race.contenders
        if fold not in curves.get(trial, {})
    )


def fold_standings(
    curves: Curves, candidates: Sequence[int], *, folds: int, n_runs: int, seed: int, level: float = 0.95
) -> tuple[FoldStanding, ...]:
    """The candidates after a race: those who finished, best mean first; then those who were given up, the later first.

    Of a race that was ended early, by the folds that all contenders have; empty where these are too few to tell.

    Args:
        seed: of the draws behind the chances; equal scores and seed give equal standings.
    """
    race = run_race(curves, candidates, folds=folds, n_runs=n_runs)
    if race.n_folds < min(FEWEST_FOLDS, n_runs):
        return ()
    finished = {trial: _scores(curves[trial], race.n_folds) for trial in race.contenders}
    chances, luck = _chances([scores for _, scores in finished.values()], folds, seed)
    found = []
    for (trial, (epoch, scores)), chance in zip(finished.items(), chances, strict=True):
        found.append(_standing(trial, epoch, scores, folds, level, chance=float(chance)))
    found.sort(key=lambda each: (each.mean, each.trial))
    if found:
        epoch, scores = finished[found[0].trial]
        found[0] = _standing(found[0].trial, epoch, scores, folds, level, chance=found[0].chance, luck=luck)
    rest = [_standing(t, *_scores(curves[t], n), folds, level) for t, n in race.given_up.items()]
    return (*found, *sorted(rest, key=lambda each: (-each.n_folds, each.mean, each.trial)))


def variance_of_mean(scores_F: FloatArray, folds: int) -> float:
    """Variance of the mean over some folds, of all trainings on sets of this size.

    The sample variance counts 1/F for the folds that there are, and n_val / n_train = 1 / (folds - 1) for the rows that
    they share, however many repeats there are.

    >>> round(variance_of_mean(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 5), 3)
    1.125
    """
    return float((1 / len(scores_F) + 1 / (folds - 1)) * scores_F.var(ddof=1))


def _clearly_worse(curves: Curves, contenders: Sequence[int], n_folds: int, folds: int) -> list[int]:
    from scipy.stats import t as student

    scores = {trial: _scores(curves[trial], n_folds)[1] for trial in contenders}
    leader = min(contenders, key=lambda trial: (float(scores[trial].mean()), trial))
    worse = []
    for trial in contenders:
        gaps_F = scores[trial] - scores[leader]
        unit = float(np.abs(scores[leader]).max())
        gap, error = float(gaps_F.mean()), _error_of_mean(gaps_F, folds, unit)
        if error is not None and gap > 0 and gap > error * float(student.ppf(1 - GIVEN_UP, n_folds - 1)):
            worse.append(trial)
    return worse


def _error_of_mean(scores_F: FloatArray, folds: int, unit: float) -> float | None:
    """Standard error of a mean over folds; None from one fold, and where they do not differ but by rounding: a handful
    of equal scores (each fold one row better, say) tells nothing of how far the next may be from them.

    Args:
        unit: how large the numbers are that rounding is relative to.
    """
    if len(scores_F) < 2 or float(np.ptp(scores_F)) <= ROUNDING * unit:
        return None
    return math.sqrt(variance_of_mean(scores_F, folds))


def _scores(of_folds: Mapping[int, Sequence[float]], n_folds: int) -> tuple[int, FloatArray]:
    """The epoch at which the mean over the first folds is best, the earlier of equals; and their scores there.

    One epoch for all: each fold's own best would flatter the more, the noisier a fold is.
    """
    curves_FE = np.array([of_folds[fold] for fold in range(n_folds)], dtype=np.float64)
    if not np.isfinite(curves_FE).all():
        raise ValueError("a score is not finite")
    best = int(curves_FE.mean(axis=0).argmin())
    return best + 1, curves_FE[:, best]


def _standing(
    trial: int,
    epoch: int,
    scores_F: FloatArray,
    folds: int,
    level: float,
    *,
    chance: float | None = None,
    luck: float = 0.0,
) -> FoldStanding:
    from scipy.stats import t as student

    mean, half = float(scores_F.mean()), None
    error = _error_of_mean(scores_F, folds, float(np.abs(scores_F).max()))
    if error is not None:
        half = float(student.ppf(0.5 + level / 2, len(scores_F) - 1)) * error
    return FoldStanding(
        trial=trial,
        mean=mean,
        corrected=mean + luck,
        low=None if half is None else mean + luck - half,
        high=None if half is None else mean + luck + half,
        epoch=epoch,
        scores=tuple(scores_F.tolist()),
        chance=chance,
    )


def _chances(groups: Collection[FloatArray], folds: int, seed: int) -> tuple[FloatArray, float]:
    """Each one's chance to be the best; and by how much, on average, the mean of whoever comes out first is below what
    it would be on other folds. The means are drawn together: a fold that is hard for one is hard for all."""
    if not groups:
        return np.empty(0), 0.0
    scores_KF = np.array(list(groups))
    means_K, n = scores_KF.mean(axis=1), scores_KF.shape[1]
    residuals_KF = scores_KF - means_K[:, None]
    if n < 2 or not residuals_KF.any():
        return shares_of_least(means_K[None, :])[0], 0.0
    rng = np.random.default_rng(seed)
    normal_DF = rng.standard_normal((DRAWS, n))
    unsure_D1 = np.sqrt((n - 1) / rng.chisquare(n - 1, size=(DRAWS, 1)))
    of_rows = math.sqrt((1 / n + 1 / (folds - 1)) / (n - 1))
    drawn_DK = means_K + of_rows * (unsure_D1 * normal_DF) @ residuals_KF.T
    chances_K = shares_of_least(drawn_DK).mean(axis=0)
    # What was chosen for is mostly what differs from fold to fold and seed to seed; what folds share, candidates share
    # too. With the variance of the chances the correction would be twice what it should be (benchmarks/folds.py).
    drawn_DK = means_K + math.sqrt(1 / n / (n - 1)) * normal_DF @ residuals_KF.T
    luck = float((shares_of_least(drawn_DK) * (means_K - drawn_DK)).sum() / DRAWS)
    return chances_K, max(0.0, luck)
