"""Ray Tune with the settings that were fastest when measured.

Actors reused, automatic loggers off, quiet, no checkpoints, the data loaded once per process and torch warmed up before
a trial is timed; results reported once per trial, or once per epoch where ASHA has to see them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from typing import Any

os.environ.update(
    RAY_AIR_NEW_OUTPUT="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    RAY_USAGE_STATS_ENABLED="0",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
)
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from benchmarks.peers import problem
from benchmarks.peers._order import Answer, Order, give, read_order


def trainable(order: Order) -> type[tune.Trainable]:
    """A class whose actors live through many trials."""

    class Trial(tune.Trainable):
        splits: problem.Splits | None = None

        def setup(self, config: dict[str, Any]) -> None:
            if self.splits is None:  # the process's first trial
                splits = type(self).splits = problem.as_tensors(problem.load(), order.device)
                problem.warm_up(splits, order.threads)
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.began = time.time()
            assert self.splits is not None
            self.training = problem.PlainTraining(self.splits, new_config["trial"])
            return True

        def step(self) -> dict[str, Any]:
            row = self.training.epoch()
            while order.reduction_factor is None and row["epoch"] < order.max_epochs:
                row = self.training.epoch()
            return {**row, "began": self.began, "at": time.time(), "done": row["epoch"] >= order.max_epochs}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            return None

    return Trial


def domains(space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A space.yaml's parameters in Tune's words. A conditional parameter is drawn always, and read where it counts."""
    found: dict[str, Any] = {"seed": tune.randint(0, 2**31 - 1)}
    for name, parameter in space.items():
        if "value" in parameter:
            found[name] = parameter["value"]
        elif "values" in parameter:
            found[name] = tune.choice(parameter["values"])
        elif parameter.get("distribution") == "log_uniform":
            found[name] = tune.loguniform(parameter["min"], parameter["max"])
        elif isinstance(parameter["min"], int):
            found[name] = tune.randint(parameter["min"], parameter["max"] + 1)
        else:
            found[name] = tune.uniform(parameter["min"], parameter["max"])
    return found


class Curves(tune.Callback):
    """Every report of every trial, with the time when the driver had it."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, float, float]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.first = float("inf")
        self.last = 0.0

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.configs[trial.trial_id] = trial.config["trial"]
        self.rows.setdefault(trial.trial_id, []).append((result["epoch"], result["val_loss"], time.time()))
        self.first, self.last = min(self.first, result["began"]), max(self.last, result["at"])


def main() -> None:
    order = read_order()
    gpus = order.gpus * order.workers
    ray.init(
        address="local",
        num_cpus=order.workers,
        num_gpus=max(1, round(gpus)) if gpus else 0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    curves = Curves()
    given = {"trial": tune.grid_search(list(order.configs))} if order.configs else {"trial": domains(order.space)}
    scheduler = None
    if order.reduction_factor is not None:
        scheduler = ASHAScheduler(
            time_attr="epoch", max_t=order.max_epochs, grace_period=1, reduction_factor=order.reduction_factor
        )
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            tune.with_resources(trainable(order), {"cpu": 1, "gpu": order.gpus}),
            param_space=given,
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                metric="val_loss",
                mode="min",
                num_samples=1 if order.configs else order.n_trials,
                scheduler=scheduler,
                search_alg=None if order.configs else BasicVariantGenerator(random_state=order.seed),
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[curves]),
        ).fit()
        assert len(results) == order.n_trials, f"{len(results)} trials of {order.n_trials}"
        assert not results.errors, results.errors
    ray.shutdown()
    trials = [{"config": curves.configs[trial], "curve": rows} for trial, rows in curves.rows.items()]
    finite = [loss for rows in curves.rows.values() for _, loss, _ in rows if loss == loss]
    give(
        Answer(
            search_s=curves.last - curves.first,
            n_trials=order.n_trials,
            n_epochs=sum(rows[-1][0] for rows in curves.rows.values()),
            best_val_loss=min(finite),
            trials=trials if order.reduction_factor is not None else (),
        )
    )


if __name__ == "__main__":
    main()
