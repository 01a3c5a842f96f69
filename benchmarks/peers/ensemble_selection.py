"""Greedy ensemble selection by AutoGluon or DeepHyper, in whichever environment has one of them.

    PYTHON ensemble_selection.py autogluon PROBS.npy TARGETS.npy --rounds 25

A script of its own that needs nothing of hpsearch, so that a Python without it can run it. It prints one JSON object.

    autogluon    EnsembleSelection of autogluon.core on log loss: starts with the best model, no limit on members
    deephyper    GreedySelector on cross-entropy: starts with the best model, ends at `size` different members, or when
                 a round does not help
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from typing import Any

import numpy as np


def autogluon(probs_MNC: Any, targets: Any, *, size: int, rounds: int) -> tuple[dict[int, float], float, str]:
    """Weights by model, seconds, and the version."""
    from autogluon.core.metrics import log_loss
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    selection = EnsembleSelection(ensemble_size=rounds, problem_type="multiclass", metric=log_loss)
    predictions = list(probs_MNC)
    start = time.perf_counter()
    selection.fit(predictions, targets)
    seconds = time.perf_counter() - start
    weights = {int(m): float(selection.weights_[m]) for m in np.flatnonzero(selection.weights_)}
    return weights, seconds, metadata.version("autogluon.core")


def deephyper(probs_MNC: Any, targets: Any, *, size: int, rounds: int) -> tuple[dict[int, float], float, str]:
    """Weights by model, seconds, and the version."""
    from deephyper.ensemble.aggregator import MixedCategoricalAggregator
    from deephyper.ensemble.loss import CategoricalCrossEntropy
    from deephyper.ensemble.selector import GreedySelector

    selector = GreedySelector(
        CategoricalCrossEntropy(), MixedCategoricalAggregator(), k=size, k_init=1, max_it=rounds - 1, eps_tol=0.0
    )
    predictions = list(probs_MNC)
    start = time.perf_counter()
    members, weights = selector.select(targets, predictions)
    seconds = time.perf_counter() - start
    found = {int(m): float(weight) for m, weight in zip(members, weights, strict=True)}
    return found, seconds, metadata.version("deephyper")


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy ensemble selection by another library.")
    parser.add_argument("library", choices=["autogluon", "deephyper"])
    parser.add_argument("probs")
    parser.add_argument("targets")
    parser.add_argument("--models", type=int, required=True, help="the first so many")
    parser.add_argument("--size", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    probs_MNC, targets = np.load(args.probs)[: args.models], np.load(args.targets)
    select = {"autogluon": autogluon, "deephyper": deephyper}[args.library]
    weights, seconds, version = select(probs_MNC, targets, size=args.size, rounds=args.rounds)
    print(json.dumps({"weights": weights, "seconds": seconds, "version": version}))


if __name__ == "__main__":
    main()
