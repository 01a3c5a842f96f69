"""Greedy ensemble selection: `hpsearch.selection.select_greedy` against a plain loop that averages whole predictions.

    python benchmarks/ensemble.py            # under a minute
    python benchmarks/ensemble.py --models 50 --rows 2000

The plain loop makes the same picks and is timed at the smaller count of models only: at 1,000 models it would take
minutes and gigabytes of copies. Writes benchmarks/results/ensemble.json with versions, hardware and date.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.selection import EPSILON, select_greedy

T = TypeVar("T")


def made_up_models(n_models: int, n_rows: int, n_classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Probabilities of models of different skill that err on rows of their own, and the true classes."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, n_classes, n_rows)
    probs_MNC = np.empty((n_models, n_rows, n_classes), dtype=np.float32)
    for m in range(n_models):
        logits = rng.standard_normal((n_rows, n_classes)).astype(np.float32)
        logits[np.arange(n_rows), targets] += rng.uniform(1.0, 3.0)
        exp = np.exp(logits)
        probs_MNC[m] = exp / exp.sum(axis=1, keepdims=True)
    return probs_MNC, targets


def select_plainly(
    probs_MNC: NDArray[np.float32], targets: NDArray[np.int64], *, size: int = 5, rounds: int = 25
) -> dict[int, float]:
    """The same rule written down as one would say it: average all probabilities, then look up the truth's."""
    rows = np.arange(len(targets))

    def score(total_NC: NDArray[np.float64], n_picks: int) -> float:
        mean_NC = np.maximum(total_NC / n_picks, EPSILON)
        return float(-np.log(mean_NC[rows, targets]).mean())

    n_models = len(probs_MNC)
    order = np.argsort([score(p.astype(np.float64), 1) for p in probs_MNC], kind="stable")
    total = np.zeros(probs_MNC[0].shape)
    scores: list[float] = []
    for n, m in enumerate(order[: min(-(-size // 2), rounds)], start=1):
        total += probs_MNC[m]
        scores.append(score(total, n))
    n_start = int(np.argmin(scores)) + 1
    picks, scores = [int(m) for m in order[:n_start]], scores[:n_start]
    total = probs_MNC[picks].astype(np.float64).sum(axis=0)
    while len(picks) < rounds:
        members = sorted(set(picks))
        candidates = members if len(members) >= size else range(n_models)
        found = {m: score(total + probs_MNC[m], len(picks) + 1) for m in candidates}
        pick = min(found, key=lambda m: (found[m], m not in members, m))
        picks.append(pick)
        scores.append(found[pick])
        total += probs_MNC[pick]
    kept = picks[: int(np.argmin(scores)) + 1]
    return {m: kept.count(m) / len(kept) for m in set(kept)}


def best_of_three(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the least of three wall times in seconds: the one that other work disturbed least."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = call()
        times.append(time.perf_counter() - start)
    return answer, min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--models", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 25], help="caps on the different members")
    args = parser.parse_args()

    probs_MNC, targets = made_up_models(max(args.models), args.rows, args.classes)
    measured: list[dict[str, object]] = []
    print(f"{args.rows:,} rows, {args.classes} classes, 25 rounds")
    print(f"{'models':>6}  {'size':>4}  {'select_greedy(s)':>16}  {'plain loop(s)':>13}  {'ratio':>6}  same picks")
    for n_models in sorted(args.models):
        for size in args.sizes:
            probs = probs_MNC[:n_models]
            selection, ours_s = best_of_three(partial(select_greedy, list(probs), targets, "logits", size=size))
            row: dict[str, object] = {"models": n_models, "size": size, "select_greedy(s)": round(ours_s, 4)}
            if n_models == min(args.models):
                plain, plain_s = best_of_three(partial(select_plainly, probs, targets, size=size))
                same = plain == dict(selection.members)
                row |= {"plain_loop(s)": round(plain_s, 4), "ratio": round(plain_s / ours_s, 1), "same_picks": same}
                tail = f"{plain_s:13.2f}  {plain_s / ours_s:5.1f}x  {'yes' if same else 'NO'}"
            else:
                tail = f"{'not run':>13}"
            print(f"{n_models:6d}  {size:4d}  {ours_s:16.3f}  {tail}")
            measured.append(row)
    print("The plain loop runs at the smallest count of models only.")

    what = "greedy ensemble selection on probabilities, seconds of wall time, best of three runs"
    keep("ensemble", what, measured, packages=["numpy"], rows=args.rows, classes=args.classes, rounds=25)


if __name__ == "__main__":
    main()
