"""The same search by hpsearch, Ray Tune and Optuna: wall, CPU, milliseconds per trial and epoch, peak memory.

    python benchmarks/engines.py                                       # digits, 60 and 300 trials: minutes
    python benchmarks/engines.py --trials 60 300 3000 --data digits --data /data/mnist.npz
    python benchmarks/engines.py --engines hpsearch tune-best --trials 300 --repeats 5 --set resources.lanes=1

All train the same configs (drawn once, at random, from the same space), the same networks, data and optimizer for the
same number of epochs, one thread per process. Each runs in a process of its own; engines take turns, so that a machine
that grows slower hurts all.

    hpsearch         `hpsearch launch`, two workers: every result synced to disk, checkpoints kept, MLflow (SQLite)
                     told. The ensemble and the checks before the search are off, since no peer does such work
    tune-best        Ray Tune with the settings that were fastest when measured (peers/tune_best.py), two at a time
    tune-stock       Ray Tune as its tutorial has it: a process per trial. At the smallest size alone, unless asked
                     (--stock-everywhere); its ratio is per trial
    optuna-one       Optuna in one process, storage in memory
    optuna-two       Optuna in two processes on a journal

`search` is from the first trial's start, in a process that has torch and the data, to the last result; `whole` is the
command's wall time. `ms/trial` and `ms/epoch` are of the search. `CPU` is user and system time of the whole process
tree, `peak` the largest sum of its resident memory, in which pages that two processes share count twice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from benchmarks._tree import Cost, run_measured
from benchmarks.peers import launch
from benchmarks.peers._order import Order, read_answer, write_order

SPACE = """
name: engines
task: {task}
seed: 0
search: {{method: random, trials: {trials}}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-4, max: 1e-1}}
  weight_decay: {{distribution: log_uniform, min: 1e-6, max: 1e-2}}
  dropout: {{min: 0.0, max: 0.5}}
  batch_size: {{value: 64}}
  width: {{values: [32, 64, 128]}}
early_stopping: {{type: none, max_epochs: {epochs}}}
ensemble: {{enabled: false}}
resources: {{threads: {threads}, gpus: {gpus}}}
"""
PEERS = {
    "tune-best": "tune_best",
    "tune-stock": "tune_stock",
    "optuna-one": "optuna_one",
    "optuna-two": "optuna_journal",
}
ENGINES = ("hpsearch", *PEERS)
COLUMNS = ("search(s)", "whole(s)", "CPU(s)", "ms/trial", "ms/epoch", "peak(MiB)")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One search, by every engine."""

    data: str  # "digits", or the path of mnist.npz
    n_trials: int
    epochs: int
    rows: int
    workers: int
    threads: int
    gpus: float

    @property
    def name(self) -> str:
        return "digits" if self.data == "digits" else f"mnist, {self.rows:,} rows"

    @property
    def space(self) -> str:
        return SPACE.format(
            task=launch.TASK, trials=self.n_trials, epochs=self.epochs, threads=self.threads, gpus=self.gpus
        )


def draw_configs(space: str) -> list[dict[str, Any]]:
    """The configs that a launch of a space draws, with the seeds of its trials, so that all engines train the same."""
    from hpsearch.sampler import RandomSampler, trial_seed
    from hpsearch.spec import parse_spec

    spec = parse_spec(space)
    sampler = RandomSampler(spec.space, spec.seed)
    configs = (sampler.config(number, lambda _: {}) for number in range(spec.search.trials))
    return [{**(config or {}), "seed": trial_seed(spec.seed, n)} for n, config in enumerate(configs)]


def parameters(space: str) -> dict[str, Any]:
    """The parameters of a space.yaml, as they are written."""
    from hpsearch.spec import parse_spec

    found = parse_spec(space).dump()["parameters"]
    assert isinstance(found, dict)
    return found


def row(*, search_s: float, n_trials: int, n_epochs: int, best_val_loss: float, cost: Cost) -> dict[str, float]:
    """What one run is told by."""
    return {
        "search(s)": round(search_s, 3),
        "whole(s)": round(cost.wall_s, 2),
        "CPU(s)": round(cost.cpu_s, 2),
        "ms/trial": round(1e3 * search_s / n_trials, 3),
        "ms/epoch": round(1e3 * search_s / n_epochs, 3),
        "peak(MiB)": round(cost.peak_mib),
        "best_val_loss": round(best_val_loss, 5),
    }


def run_hpsearch(setting: Setting, folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """One launch, as a user starts it."""
    env = launch.environment(setting.data, setting.rows, setting.threads)
    told, cost = launch.launch(
        setting.space, folder, workers=setting.workers, env=env, flags=["--skip-preflight"], overrides=overrides
    )
    trials, stages, epochs, best = told["trials"], told["stages_s"], told["epochs"], told["best"]
    assert isinstance(trials, dict)
    assert isinstance(stages, dict)
    assert isinstance(epochs, dict)
    assert isinstance(best, dict)
    assert trials["complete"] == setting.n_trials, trials
    return row(
        search_s=stages["search"],
        n_trials=setting.n_trials,
        n_epochs=epochs["search"],
        best_val_loss=best["val"]["loss"],
        cost=cost,
    )


def run_peer(engine: str, setting: Setting, folder: Path) -> dict[str, float]:
    """The same trials by another tool."""
    folder.mkdir(parents=True)
    order = Order(
        n_trials=setting.n_trials,
        max_epochs=setting.epochs,
        workers=setting.workers,
        threads=setting.threads,
        gpus=setting.gpus,
        configs=tuple(draw_configs(setting.space)),
        space=parameters(setting.space),
    )
    write_order(order, folder / "order.json")
    command = [sys.executable, "-m", f"benchmarks.peers.{PEERS[engine]}", "order.json"]
    env = launch.environment(setting.data, setting.rows, setting.threads)
    cost = run_measured(command, cwd=folder, env=env)
    answer = read_answer(cost.stdout)
    return row(
        search_s=answer.search_s,
        n_trials=answer.n_trials,
        n_epochs=answer.n_epochs,
        best_val_loss=answer.best_val_loss,
        cost=cost,
    )


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: statistics.median(run[column] for run in runs) for column in COLUMNS}


def ratios(of: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """How many times as fast hpsearch is: over 1, it is faster."""
    return {
        "search": round(of["ms/trial"] / ours["ms/trial"], 2),
        "whole": round(of["whole(s)"] / ours["whole(s)"], 2),
        "CPU": round(of["CPU(s)"] / ours["CPU(s)"], 2),
    }


def compare(
    setting: Setting, engines: Sequence[str], folder: Path, *, repeats: int, overrides: Sequence[str]
) -> dict[str, object]:
    """All engines' runs of a setting in turns, and the medians' table."""
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for repeat in range(repeats):
        for engine in engines:
            place = folder / f"{engine}-{repeat}"
            if engine == "hpsearch":
                found = run_hpsearch(setting, place, overrides)
            else:
                found = run_peer(engine, setting, place)
            runs[engine].append(found)
            print(f"  {engine}: {found}", flush=True)
    print(f"\n{setting.name}: {setting.n_trials:,} trials of {setting.epochs} epochs, medians of {repeats}")
    print(f"{'engine':>11}  " + "  ".join(f"{name:>10}" for name in COLUMNS) + "   search and whole over hpsearch's")
    table = {engine: medians(runs[engine]) for engine in engines}
    over = {}
    for engine, values in table.items():
        line = f"{engine:>11}  " + "  ".join(f"{values[name]:10,.1f}" for name in COLUMNS)
        if engine != "hpsearch" and "hpsearch" in table:
            over[engine] = ratios(values, table["hpsearch"])
            line += f"   {over[engine]['search']:.2f}x  {over[engine]['whole']:.2f}x"
        print(line)
    print(flush=True)
    return {
        "data": setting.name,
        "trials": setting.n_trials,
        "epochs": setting.epochs,
        "medians": table,
        "times_as_fast": over,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, nargs="+", default=[60, 300])
    parser.add_argument("--data", action="append", help="digits, or the path of an mnist.npz; repeatable")
    parser.add_argument("--rows", type=int, default=5_000, help="of MNIST that are trained on")
    parser.add_argument("--epochs", type=int, default=3, help="of every trial")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--stock-everywhere", action="store_true", help="tune-stock at every size, not the smallest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch, per process")
    parser.add_argument("--gpus", type=float, default=0.0, help="per worker, such as 0.5; optuna shares the first")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of hpsearch's space.yaml")
    parser.add_argument("--name", default="engines", help="of the record in results/")
    args = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as name:
        for data in args.data or ["digits"]:
            for n_trials in sorted(args.trials):
                setting = Setting(
                    data=data if data == "digits" else str(Path(data).resolve()),
                    n_trials=n_trials,
                    epochs=args.epochs,
                    rows=args.rows,
                    workers=args.workers,
                    threads=args.threads,
                    gpus=args.gpus,
                )
                stock = args.stock_everywhere or n_trials == min(args.trials)
                engines = [engine for engine in args.engines if engine != "tune-stock" or stock]
                place = Path(name, f"{Path(data).stem}-{n_trials}")
                measured.append(compare(setting, engines, place, repeats=args.repeats, overrides=args.overrides))
    keep(
        args.name,
        "the same search by each engine; seconds, milliseconds and MiB as the columns say",
        measured,
        packages=["torch", "ray", "mlflow", "optuna"],
        workers=args.workers,
        threads=args.threads,
        gpus=args.gpus,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    main()
