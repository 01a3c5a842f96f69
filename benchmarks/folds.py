"""Cross-validation as a race, on a problem whose truth is known: what giving up early costs, and what intervals hold.

Ridge regression on few rows, eight penalties as the candidates, and to each score something of the fold's seed, as a
network's training has. A candidate's true score is its expected loss on new
rows when it is trained on as many rows as a fold leaves, over training sets; it is averaged from 4,000 of them.

python benchmarks/folds.py [--studies 1000]
"""

from __future__ import annotations

import argparse

import numpy as np
from _record import keep
from numpy.typing import NDArray

from hpsearch.fold_race import fold_standings, run_race

FloatArray = NDArray[np.float64]

N_FEATURES = 20
N_ROWS = 150
NOISE = 1.0
OF_SEED = 0.08  # standard deviation between seeds, of a score near 1.2
PENALTIES = np.geomspace(0.3, 3000.0, 8)


def drawn(rng: np.random.Generator, n: int, slope_D: FloatArray) -> tuple[FloatArray, FloatArray]:
    x_ND = rng.standard_normal((n, N_FEATURES))
    return x_ND, x_ND @ slope_D + NOISE * rng.standard_normal(n)


def fits(x_ND: FloatArray, y_N: FloatArray) -> FloatArray:
    """The slopes of all candidates, slopes_KD."""
    squares_D, turned_DD = np.linalg.eigh(x_ND.T @ x_ND)
    seen_D = turned_DD.T @ (x_ND.T @ y_N)
    return (seen_D / (squares_D + PENALTIES[:, None])) @ turned_DD.T


def true_scores(rng: np.random.Generator, n_rows: int, slope_D: FloatArray) -> FloatArray:
    """Expected squared error of each candidate, trained on `n_rows` rows."""
    total_K = np.zeros(len(PENALTIES))
    for _ in range(4_000):
        off_KD = fits(*drawn(rng, n_rows, slope_D)) - slope_D
        total_K += (off_KD**2).sum(axis=1) + NOISE**2
    return total_K / 4_000


def cross_validated(
    rng: np.random.Generator, slope_D: FloatArray, *, folds: int, repeats: int
) -> dict[int, dict[int, list[float]]]:
    x_ND, y_N = drawn(rng, N_ROWS, slope_D)
    curves: dict[int, dict[int, list[float]]] = {k: {} for k in range(len(PENALTIES))}
    for repeat in range(repeats):
        order = rng.permutation(N_ROWS)
        for fold in range(folds):
            held = order[fold::folds]
            rest = np.setdiff1d(order, held)
            errors_K = ((y_N[held] - fits(x_ND[rest], y_N[rest]) @ x_ND[held].T) ** 2).mean(axis=1)
            for k, error in enumerate(errors_K):
                curves[k][repeat * folds + fold] = [float(error + OF_SEED * rng.standard_normal())]
    return curves


def measured(n_studies: int, *, folds: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    slope_D = 0.25 * rng.standard_normal(N_FEATURES)
    truth_K = true_scores(rng, N_ROWS - N_ROWS // folds, slope_D)
    names, n_runs = range(len(PENALTIES)), folds * repeats
    found: dict[str, list[float]] = {}
    for _ in range(n_studies):
        curves = cross_validated(rng, slope_D, folds=folds, repeats=repeats)
        race = run_race(curves, names, folds=folds, n_runs=n_runs)
        first, *_ = fold_standings(curves, names, folds=folds, n_runs=n_runs, seed=0)
        of_all = min(names, key=lambda k: np.mean([score for (score,) in curves[k].values()]))
        (alone,) = fold_standings(curves, [3], folds=folds, n_runs=n_runs, seed=0)
        truth = truth_K[first.trial]
        assert first.low is not None
        assert first.high is not None
        assert alone.low is not None
        assert alone.high is not None
        told = {
            "share of folds trained": (len(race.contenders) * n_runs + sum(race.given_up.values())) / (8 * n_runs),
            "regret of the winner": truth - truth_K.min(),
            "regret had all folds been trained": truth_K[of_all] - truth_K.min(),
            "interval of one config holds the truth": float(alone.low <= truth_K[3] <= alone.high),
            "interval of the winner holds the truth": float(first.low <= truth <= first.high),
            "bias of the winner's mean": first.mean - truth,
            "bias of the winner's corrected mean": first.corrected - truth,
        }
        for name, value in told.items():
            found.setdefault(name, []).append(float(value))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    n_studies = parser.parse_args().studies
    results = {}
    for folds, repeats in ((5, 1), (10, 1), (5, 3)):
        results[f"{folds} folds, {repeats} times"] = told = measured(n_studies, folds=folds, repeats=repeats)
        print(f"{folds} folds, {repeats} times: {told}", flush=True)
    keep(
        "folds",
        "a race over folds on ridge regression: share of folds trained, regret and bias in squared error, coverage of "
        "intervals that are meant to hold the truth in 95 %",
        results,
        packages=("numpy", "scipy"),
        studies=n_studies,
        rows=N_ROWS,
    )


if __name__ == "__main__":
    main()
