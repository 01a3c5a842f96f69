"""Optuna in one process, its storage in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import optuna

from benchmarks.peers import problem
from benchmarks.peers._order import Answer, Order, give, read_order


class Given(optuna.samplers.BaseSampler):
    """Configs drawn elsewhere, by the way a sampler has: parameters are suggested and recorded as always."""

    def __init__(self, order: Order) -> None:
        self._configs = order.configs

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._configs[trial.number][param_name]


def make_objective(order: Order, splits: problem.Splits) -> Callable[[Any], float]:
    """What Optuna calls: suggests the space's parameters, trains, tells of every epoch."""

    def objective(trial: Any) -> float:
        config = {"seed": order.configs[trial.number]["seed"]}
        for name, parameter in order.space.items():
            config[name] = suggest(trial, name, parameter)
        training = problem.PlainTraining(splits, config)
        loss = float("nan")
        for _ in range(order.max_epochs):
            row = training.epoch()
            loss = row["val_loss"]
            trial.report(loss, training.n_epochs)
        return loss

    return objective


def suggest(trial: Any, name: str, parameter: dict[str, Any]) -> Any:
    """A space.yaml's parameter in Optuna's words."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return trial.suggest_categorical(name, parameter["values"])
    log = parameter.get("distribution") == "log_uniform"
    if isinstance(parameter["min"], int) and not log:
        return trial.suggest_int(name, parameter["min"], parameter["max"])
    return trial.suggest_float(name, parameter["min"], parameter["max"], log=log)


def main() -> None:
    order = read_order()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    splits = problem.as_tensors(problem.load(), order.device)
    problem.warm_up(splits, order.threads)
    study = optuna.create_study(sampler=Given(order))
    began = time.time()
    study.optimize(make_objective(order, splits), n_trials=order.n_trials)
    give(
        Answer(
            search_s=time.time() - began,
            n_trials=len(study.trials),
            n_epochs=order.max_epochs * len(study.trials),
            best_val_loss=study.best_value,
        )
    )


if __name__ == "__main__":
    main()
