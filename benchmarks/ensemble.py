"""Greedy ensemble selection: `hpsearch.selection.select_greedy` against a plain loop, AutoGluon's and DeepHyper's.

    python benchmarks/ensemble.py                                     # 100 and 1,000 models: minutes
    python benchmarks/ensemble.py --models 50 --rows 2000
    python benchmarks/ensemble.py --peer deephyper=/tmp/dh/bin/python --peer autogluon=/tmp/ag/bin/python

The peers run in environments of their own, made beforehand, since they ask for other versions than hpsearch:

    python -m venv /tmp/ag && /tmp/ag/bin/pip install autogluon.core
    python -m venv /tmp/dh && /tmp/dh/bin/pip install deephyper

The plain loop averages whole predictions and applies the same rule as select_greedy, so its picks must be equal. The
peers' rules differ a little (peers/ensemble_selection.py), so of them it is told which part of the weight falls on the
same models, and the score of each one's ensemble: the negative log likelihood, of which lower is better. select_greedy
and the plain loop are timed three times (the least counts), a peer once. Preparing arrays is left out for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from hpsearch.selection import EPSILON, select_greedy

T = TypeVar("T")
Weights = Mapping[int, float]

ROUNDS = 25
PEERS = ("autogluon", "deephyper")
PEER = Path(__file__).with_name("peers") / "ensemble_selection.py"
PEER_TIMEOUT_S = 3600.0


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
    probs_MNC: NDArray[np.float32], targets: NDArray[np.int64], *, size: int = 5, rounds: int = ROUNDS
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


def overlap(these: Weights, those: Weights) -> float:
    """The part of the weight that falls on the same models: 1 when both are equal, 0 when they share none.

    >>> overlap({3: 0.5, 7: 0.5}, {3: 0.25, 8: 0.75})
    0.25
    """
    return sum(min(weight, those.get(m, 0.0)) for m, weight in these.items())


def ensemble_score(probs_MNC: NDArray[np.float32], targets: NDArray[np.int64], weights: Weights) -> float:
    """Negative log likelihood of the weighted mean, in nats."""
    rows = np.arange(len(targets))
    truth_N = sum(weight * probs_MNC[m][rows, targets].astype(np.float64) for m, weight in weights.items())
    return float(-np.log(np.maximum(truth_N, EPSILON)).mean())


def best_of_three(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the least of three wall times in seconds: the one that other work disturbed least."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = call()
        times.append(time.perf_counter() - start)
    return answer, min(times)


def ask_peer(library: str, python: str, folder: Path, n_models: int, size: int) -> tuple[Weights | None, float, str]:
    """A peer's weights, its seconds, and its version; None with the reason where it does not run."""
    command = [python, str(PEER), library, str(folder / "probs.npy"), str(folder / "targets.npy")]
    options = ["--models", str(n_models), "--size", str(size), "--rounds", str(ROUNDS)]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=PEER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, 0.0, str(error)
    if done.returncode != 0:
        return None, 0.0, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return {int(m): weight for m, weight in told["weights"].items()}, told["seconds"], told["version"]


def read_peers(given: list[str]) -> dict[str, str]:
    """Pythons by library, as in `--peer autogluon=/tmp/ag/bin/python`.

    Raises:
        SystemExit: of another form, or an unknown library.
    """
    peers = {}
    for text in given:
        library, _, python = text.partition("=")
        if library not in PEERS or not python:
            raise SystemExit(f"--peer is {'|'.join(PEERS)}=PYTHON (got {text!r})")
        peers[library] = python
    return peers


def show(row: Mapping[str, object]) -> None:
    if "why_not" in row:
        print(f"{row['models']:6}  {row['size']:4}  {row['by']:>13}  not run: {row['why_not']}", flush=True)
        return
    print(
        f"{row['models']:6}  {row['size']:4}  {row['by']:>13}  {row['seconds']:10.3f}  {row['ratio']:8.1f}x"
        f"  {row['overlap']:12.0%}  {row['members']:7}  {row['score']:9.5f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--models", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 25], help="caps on the different members")
    parser.add_argument("--peer", action="append", default=[], metavar="LIBRARY=PYTHON", help="repeatable")
    args = parser.parse_args()
    pythons = read_peers(args.peer)
    measured: list[dict[str, object]] = []
    versions = {}

    def tell(
        n_models: int, size: int, by: str, weights: Weights, seconds: float, *, ours: tuple[Weights, float]
    ) -> None:
        row = {
            "models": n_models,
            "size": size,
            "by": by,
            "seconds": round(seconds, 4),
            "ratio": round(seconds / ours[1], 2),
            "overlap": round(overlap(weights, ours[0]), 4),
            "members": len(weights),
            "score": round(ensemble_score(probs_MNC, targets, weights), 6),
        }
        measured.append(row)
        show(row)

    print(f"{args.rows:,} rows, {args.classes} classes, {ROUNDS} rounds; ratio and same picks against select_greedy")
    print(f"models  size  {'by':>13}  {'seconds':>10}  {'ratio':>9}  {'same picks':>12}  members  score(nat)")
    probs_MNC, targets = made_up_models(max(args.models), args.rows, args.classes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if pythons:
            np.save(folder / "probs.npy", probs_MNC)
            np.save(folder / "targets.npy", targets)
        for n_models in sorted(args.models):
            for size in args.sizes:
                probs = probs_MNC[:n_models]
                selection, ours_s = best_of_three(partial(select_greedy, list(probs), targets, "logits", size=size))
                ours = dict(selection.members), ours_s
                tell(n_models, size, "select_greedy", *ours, ours=ours)
                tell(
                    n_models,
                    size,
                    "plain loop",
                    *best_of_three(partial(select_plainly, probs, targets, size=size)),
                    ours=ours,
                )
                for library in PEERS:
                    if library == "autogluon" and size != max(args.sizes):
                        continue  # it knows no limit on members
                    if library not in pythons:
                        why = f"give --peer {library}=PYTHON of an environment that has it"
                    else:
                        weights, seconds, why = ask_peer(library, pythons[library], folder, n_models, size)
                        if weights is not None:
                            versions[library] = why
                            tell(n_models, size, library, weights, seconds, ours=ours)
                            continue
                    row: dict[str, object] = {"models": n_models, "size": size, "by": library, "why_not": why}
                    measured.append(row)
                    show(row)
    keep(
        "ensemble",
        "greedy ensemble selection on probabilities, seconds of wall time",
        measured,
        packages=["numpy"],
        rows=args.rows,
        classes=args.classes,
        rounds=ROUNDS,
        peers=versions,
    )


if __name__ == "__main__":
    main()
