"""Ray Tune as its tutorial has it: a function, tune.report after every epoch, and no setting changed.

Each trial is a process of its own, which imports torch and loads the data.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import ray
from ray import tune

from benchmarks.peers import problem
from benchmarks.peers._order import Answer, Order, give, read_order


def objective(config: dict[str, Any], order: Order) -> None:
    import torch

    began = time.time()
    torch.set_num_threads(order.threads)
    training = problem.PlainTraining(problem.as_tensors(problem.load(), order.device), config["trial"])
    for _ in range(order.max_epochs):
        row = training.epoch()
        tune.report({**row, "began": began, "at": time.time()})


def main() -> None:
    order = read_order()
    ray.init(address="local", num_cpus=order.workers)
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(objective, order=order), {"cpu": 1, "gpu": order.gpus}),
            param_space={"trial": tune.grid_search(list(order.configs))},
            tune_config=tune.TuneConfig(metric="val_loss", mode="min"),
            run_config=tune.RunConfig(storage_path=folder),
        ).fit()
        assert len(results) == order.n_trials, f"{len(results)} trials of {order.n_trials}"
        assert not results.errors, results.errors
        rows = [results[n].metrics or {} for n in range(len(results))]
    ray.shutdown()
    give(
        Answer(
            search_s=max(row["at"] for row in rows) - min(row["began"] for row in rows),
            n_trials=len(rows),
            n_epochs=sum(row["epoch"] for row in rows),
            best_val_loss=min(row["val_loss"] for row in rows),
        )
    )


if __name__ == "__main__":
    main()
