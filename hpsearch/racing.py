"""Which of the best few trials is the best: fresh seeds spent where the order is unsure, and how sure it is then.

The search reports the best of many noisy scores, which is better than the truth. So the leaders are trained again with
fresh seeds and measured on rows that the search never ranked on. Scores of one candidate differ by seed; that spread is
pooled over the candidates, since three scores tell little of their own.

Source: the race is after Maron and Moore 1994 (Hoeffding races); the chance of being best is Thompson's, with the
reference prior of a common variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

FEWEST_SEEDS = 2  # of every candidate: one score has no spread
SURE = 0.95  # chance of the leader at which the race is over
CONTENDER = 0.05  # a candidate with less chance than this gets no further seed
DRAWS = 4_000  # of the means, for the chances; their error is below 0.01
ROUNDING = 1e-9  # relative; scores that differ by less are equal


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A candidate's place in the race. Scores are minimised."""

    trial: int
    mean: float  # over its seeds; flatters whoever is first a little, as any best of several does
    corrected: float  # the mean without what being chosen for it is worth; the mean itself for all but the first
    low: float | None  # about `corrected`, by the spread of seeds, 95 %; None where nothing is known of the spread
    high: float | None
    n_seeds: int
    chance: float  # that it is the best of all candidates


def standings(scores: Mapping[int, Sequence[float]], *, seed: int, level: float = 0.95) -> tuple[Standing, ...]:
    """The candidates, best mean first; ties: the lower trial number.

    Args:
        scores: by trial, one finite score per seed, minimised; candidates without a score are left out.
        seed: of the draws behind the chances; equal scores and seed give equal standings.

    >>> [s.trial for s in standings({3: [0.2, 0.22], 5: [0.1, 0.12]}, seed=0)]
    [5, 3]
    """
    from scipy.stats import t as student

    known = {trial: np.asarray(values, dtype=np.float64) for trial, values in sorted(scores.items()) if len(values)}
    if not known:
        return ()
    for trial, values in known.items():
        if not np.isfinite(values).all():
            raise ValueError(f"trial {trial}: a score is not finite")
    variance, freedom = _pooled(list(known.values()))
    chances, luck = _chances(list(known.values()), variance, freedom, seed)
    first = min(known, key=lambda trial: (float(known[trial].mean()), trial))
    found = []
    for (trial, values), chance in zip(known.items(), chances, strict=True):
        mean = float(values.mean())
        corrected = mean + luck if trial == first else mean
        half = None
        if variance is not None:
            half = float(student.ppf(0.5 + level / 2, freedom)) * math.sqrt(variance / len(values))
        found.append(
            Standing(
                trial=trial,
                mean=mean,
                corrected=corrected,
                low=None if half is None else corrected - half,
                high=None if half is None else corrected + half,
                n_seeds=len(values),
                chance=float(chance),
            )
        )
    return tuple(sorted(found, key=lambda standing: (standing.mean, standing.trial)))


def next_run(
    scores: Mapping[int, Sequence[float]],
    under_way: Mapping[int, int],
    *,
    candidates: Sequence[int],
    n_seeds: int,
    seed: int,
) -> tuple[int, int] | None:
    """The candidate to train next, and the number of its seed from 0; None when no further run would tell more.

    Every candidate gets FEWEST_SEEDS; after these, whoever may still be the best, the one with the fewest seeds first.
    The answer depends on what has come back and what is under way alone.

    Args:
        scores: by trial, what has come back; a run that diverged counts as a candidate that is out.
        under_way: by trial, runs that have not come back.
        candidates: best searched first.
        n_seeds: the most that one candidate gets.
    """
    begun = {trial: len(scores.get(trial, ())) + under_way.get(trial, 0) for trial in candidates}
    first = min(n_seeds, FEWEST_SEEDS)
    for count in range(first):
        for trial in candidates:
            if begun[trial] == count:
                return trial, count
    if any(len(scores.get(trial, ())) < first for trial in candidates):
        return None  # who is worth more seeds is known when the first have come back
    table = standings({trial: scores[trial] for trial in candidates}, seed=seed)
    if table[0].chance >= SURE:
        return None
    open_ = [standing for standing in table if standing.chance > CONTENDER and begun[standing.trial] < n_seeds]
    if not open_:
        return None
    chosen = min(open_, key=lambda standing: (begun[standing.trial], standing.mean, standing.trial))
    return chosen.trial, begun[chosen.trial]


def seed_spread(scores: Mapping[int, Sequence[float]]) -> float | None:
    """Standard deviation between seeds of one config, pooled over configs; None where no config has two scores.

    >>> round(seed_spread({3: [0.2, 0.4], 5: [0.6, 0.8]}), 3)
    0.141
    """
    groups = [np.asarray(values, dtype=np.float64) for values in scores.values() if len(values)]
    variance, _ = _pooled(groups)
    return None if variance is None else math.sqrt(variance)


def _pooled(groups: Sequence[FloatArray]) -> tuple[float | None, int]:
    """Variance within candidates, and its degrees of freedom; None where no candidate has two scores."""
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None, 0
    return float(sum(((values - values.mean()) ** 2).sum() for values in groups) / freedom), freedom


def _chances(groups: Sequence[FloatArray], variance: float | None, freedom: int, seed: int) -> tuple[FloatArray, float]:
    """Each candidate's chance to be the best; and by how much, on average, the mean of whoever comes out first is below
    what it would be in fresh runs (a parametric bootstrap of the choice)."""
    means = np.array([values.mean() for values in groups])
    if variance is None or variance == 0.0:
        return shares_of_least(means[None, :])[0], 0.0
    rng = np.random.default_rng(seed)
    sigma_D1 = np.sqrt(variance * freedom / rng.chisquare(freedom, size=(DRAWS, 1)))
    sizes = np.array([len(values) for values in groups])
    drawn_DK = means + sigma_D1 / np.sqrt(sizes) * rng.standard_normal((DRAWS, len(groups)))
    shares_DK = shares_of_least(drawn_DK)
    luck = float((shares_DK * (means - drawn_DK)).sum() / DRAWS)
    return np.asarray(shares_DK.mean(axis=0), dtype=np.float64), luck


def shares_of_least(drawn_DK: FloatArray) -> FloatArray:
    """Who is the least of each row, in shares that sum to 1; those that differ from it by rounding alone share it.

    >>> shares_of_least(np.array([[1.0, 3.0, 1.0], [2.0, 1.0, 3.0]])).tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """
    slack_D1 = ROUNDING * np.abs(drawn_DK).max(axis=1, keepdims=True)
    least_DK = drawn_DK <= drawn_DK.min(axis=1, keepdims=True) + slack_D1
    return np.asarray(least_DK / least_DK.sum(axis=1, keepdims=True), dtype=np.float64)
