"""Do the figures of a verdict hold? Simulated studies at prediction level, with the truth known.

A zoo of models predicts a population of rows; each study draws its val, ensemble and test rows from it, ranks models on
val, chooses an ensemble greedily on the ensemble rows, and tells the ensemble's test score and its gain over the best
single model with 95 % intervals: all by the functions that a launch uses. The truth is the same score over the whole
population. Models differ in skill and confidence, rows in difficulty, so that losses have the long tails of confident
networks.

Then the best few are trained again, as `confirm` does: how far the searched and the confirmed score are from the truth
on average. And on random labels: how often a study claims to be better than ignoring the inputs.

    python benchmarks/coverage.py [--studies 2000]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _record import keep
from numpy.typing import NDArray

from hpsearch.intervals import Interval, mean_interval, paired_interval, wilson_interval
from hpsearch.racing import next_run, standings
from hpsearch.selection import select_greedy
from hpsearch.stages.ensemble import BASELINE_LEVEL, beyond_noise

N_MODELS, N_CLASSES, N_POPULATION = 24, 10, 200_000
FloatArray = NDArray[np.float64]


class Zoo:
    """Models and a population: probabilities of each model for each row, and the rows' classes."""

    def __init__(self, seed: int, *, informative: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.y_N = rng.integers(0, N_CLASSES, N_POPULATION)
        truth_NC = np.eye(N_CLASSES, dtype=np.float32)[self.y_N]
        difficulty_N1 = rng.gamma(2.0, 1.5, (N_POPULATION, 1)).astype(np.float32)
        shared_NC = rng.standard_normal((N_POPULATION, N_CLASSES), dtype=np.float32)
        self.probs_MNC = np.empty((N_MODELS, N_POPULATION, N_CLASSES), dtype=np.float32)
        for m in range(N_MODELS):
            skill, confidence = rng.uniform(1.0, 1.6), rng.uniform(0.8, 2.0)
            own_NC = rng.standard_normal((N_POPULATION, N_CLASSES), dtype=np.float32)
            signal = skill * difficulty_N1 * truth_NC if informative else 0.0
            logits = confidence * (signal + 0.8 * shared_NC + 0.6 * own_NC)
            self.probs_MNC[m] = softmax(logits)

    def nll(self, probs_NC: NDArray[np.float32], rows: NDArray[np.int64] | slice = slice(None)) -> FloatArray:
        """Loss of each row."""
        y = self.y_N[rows]
        return -np.log(np.maximum(probs_NC[np.arange(len(y)), y].astype(np.float64), 1e-12))


def softmax(logits_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    e = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True), dtype=np.float32)


def holds(interval: Interval, truth: float) -> bool | None:
    if interval.low is None or interval.high is None:
        return None
    return interval.low <= truth <= interval.high


def study(zoo: Zoo, n: int, rng: np.random.Generator, truths: FloatArray) -> dict[str, bool | None]:
    """Whether each interval of one study's verdict holds the truth."""
    rows = rng.choice(N_POPULATION, size=3 * n, replace=False)
    val, ensemble, test = rows[:n], rows[n : 2 * n], rows[2 * n :]
    val_M = [zoo.nll(zoo.probs_MNC[m, val], val).mean() for m in range(N_MODELS)]
    order = np.argsort(val_M)
    pool, best = order[:12], int(order[0])
    chosen = select_greedy([zoo.probs_MNC[m, ensemble] for m in pool], zoo.y_N[ensemble], "logits", size=5)
    members = [(int(pool[index]), weight) for index, weight in chosen.members]
    mixed_NC = sum(weight * zoo.probs_MNC[m] for m, weight in members)
    all_rows = zoo.nll(mixed_NC)
    of_ensemble, of_best = all_rows[test], zoo.nll(zoo.probs_MNC[best, test], test)
    truth, seed = float(all_rows.mean()), int(rng.integers(2**31))
    right = mixed_NC.argmax(axis=1) == zoo.y_N
    return {
        "test score": holds(mean_interval(of_ensemble, seed=seed), truth),
        "gain": holds(paired_interval(of_ensemble, of_best, seed=seed), truth - truths[best]),
        "accuracy": holds(wilson_interval(int(right[test].sum()), n), float(right.mean())),
    }


def coverage(n_studies: int, sizes: tuple[int, ...]) -> list[dict[str, object]]:
    told = []
    zoos = 4  # of different models, so that no one zoo decides
    for n in sizes:
        found: dict[str, list[bool]] = {"test score": [], "gain": [], "accuracy": []}
        for z in range(zoos):
            zoo = Zoo(z)
            truths = np.array([zoo.nll(probs).mean() for probs in zoo.probs_MNC])
            rng = np.random.default_rng([z, n])
            for _ in range(n_studies // zoos):
                for name, value in study(zoo, n, rng, truths).items():
                    if value is not None:
                        found[name].append(value)
        for name, values in found.items():
            share = float(np.mean(values)) if values else float("nan")
            told.append({"rows": n, "interval": name, "holds": round(share, 4), "of": len(values)})
            print(f"{n:6} rows  {name:12} holds in {share:.1%} of {len(values)} studies", flush=True)
    return told


def confirmation(n_studies: int) -> dict[str, float]:
    """Mean distance of the searched and of the confirmed score from the truth of the config that won."""
    rng = np.random.default_rng(5)
    searched, confirmed, right = [], [], []
    for _ in range(n_studies):
        truth_K = 0.30 + 0.02 * rng.standard_normal(64)  # of 64 configs, a mean over seeds
        once_K = truth_K + 0.02 * rng.standard_normal(64)  # the search saw one seed, on few rows
        leaders = [int(k) for k in np.argsort(once_K)[:3]]
        scores: dict[int, list[float]] = {k: [] for k in leaders}
        while (run := next_run(scores, {}, candidates=leaders, n_seeds=3, seed=0)) is not None:
            scores[run[0]].append(truth_K[run[0]] + 0.02 * rng.standard_normal())
        winner = standings(scores, seed=0)[0]
        searched.append(once_K[leaders[0]] - truth_K[leaders[0]])
        confirmed.append(winner.corrected - truth_K[winner.trial])
        right.append(winner.trial == min(leaders, key=lambda k: truth_K[k]))
    return {
        "searched_bias": float(np.mean(searched)),
        "confirmed_bias": float(np.mean(confirmed)),
        "ratio": float(np.mean(confirmed) / np.mean(searched)),
        "winner_is_best_of_leaders": float(np.mean(right)),
        "studies": n_studies,
    }


def random_labels(n_studies: int, sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """How often a study whose inputs say nothing claims to be better than ignoring them; at most 1 % is meant."""
    told = []
    for n in sizes:
        claims = 0
        for index in range(n_studies):
            rng = np.random.default_rng([9, n, index])
            y = rng.integers(0, 3, 2 * n)
            shares = np.bincount(y[:n], minlength=3) / n  # of train
            logits_MNC = 0.3 * rng.standard_normal((16, 2 * n, 3)) + np.log(shares)
            probs = np.exp(logits_MNC) / np.exp(logits_MNC).sum(axis=2, keepdims=True)
            loss_MN = -np.log(probs[:, np.arange(2 * n), y])
            best = int(loss_MN[:, :n].mean(axis=1).argmin())
            rows, constant = loss_MN[best, n:], -np.log(shares[y[n:]])
            gain = paired_interval(rows, constant, seed=index, level=BASELINE_LEVEL)
            claims += beyond_noise(rows, constant, gain, "minimize", index)
        told.append({"rows": n, "claims": claims, "of": n_studies})
        print(f"{n:6} rows  random labels called better than the baseline: {claims} of {n_studies}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 360, 2000])
    options = parser.parse_args()
    began = time.perf_counter()
    sizes = tuple(options.rows)
    covered = coverage(options.studies, sizes)
    bias = confirmation(options.studies)
    print("bias of the searched score {searched_bias:.4f}, of the confirmed one {confirmed_bias:.4f}".format(**bias))
    claims = random_labels(options.studies, (50, 100, 360))
    measured = {"coverage": covered, "confirmation": bias, "random_labels": claims}
    keep(
        "coverage",
        "shares of simulated studies whose intervals hold the truth",
        measured,
        packages=("numpy", "scipy"),
        seconds=round(time.perf_counter() - began),
    )


if __name__ == "__main__":
    main()
