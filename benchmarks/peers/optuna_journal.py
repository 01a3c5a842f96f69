"""Optuna in several processes on a journal: each trains its share of the trials."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.peers import problem
from benchmarks.peers._order import Answer, Order, give, read_order
from benchmarks.peers.optuna_one import Given, make_objective

NAME = "search"


def work(order: Order, path: str, n_trials: int, ready: Any, times: Any) -> None:
    """One process: loads, waits for the others, trains its share."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    splits = problem.as_tensors(problem.load(), order.device)
    problem.warm_up(splits, order.threads)
    study = optuna.load_study(study_name=NAME, storage=_storage(path), sampler=Given(order))
    ready.wait(timeout=600)  # a process that could not begin must not be waited for
    began = time.time()
    study.optimize(make_objective(order, splits), n_trials=n_trials)
    times.put((began, time.time()))


def _storage(path: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(path))


def main() -> None:
    order = read_order()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "journal.log"))
        study = optuna.create_study(study_name=NAME, storage=_storage(path))
        ready, times = context.Barrier(order.workers), context.Queue()
        # Shares are given out beforehand: asking after each trial how many there are costs Optuna more.
        shares = [order.n_trials // order.workers + (n < order.n_trials % order.workers) for n in range(order.workers)]
        workers = [context.Process(target=work, args=(order, path, share, ready, times)) for share in shares]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        spans = [times.get(timeout=1) for _ in workers]
        assert len(study.trials) == order.n_trials, f"{len(study.trials)} trials of {order.n_trials}"
        give(
            Answer(
                search_s=max(end for _, end in spans) - min(began for began, _ in spans),
                n_trials=order.n_trials,
                n_epochs=order.max_epochs * order.n_trials,
                best_val_loss=study.best_value,
            )
        )


if __name__ == "__main__":
    main()
