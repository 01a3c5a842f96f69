"""300 one-epoch trials of a tiny network on two workers: hpsearch against Ray Tune with its best settings, in one run.

    python benchmarks/engines.py
    python benchmarks/engines.py --repeats 5

Both train the same configs (drawn once, from the same space), the same network, data and optimizer for one epoch on
two worker processes of one thread each. Tune's best settings are those that were fastest when measured: actors
reused, auto-loggers off, quiet, no checkpoints, results reported once, torch warmed up before the first trial is
timed. hpsearch runs as users run it, `hpsearch launch`, with every result synced to disk, checkpoints kept, MLflow
(SQLite), the ensemble and its export included in `whole`.

Two ratios: the search (from the first trial's start on a worker that has its data to the last result) and the whole
process, which for Tune has neither ensemble nor tracker in it. Runs alternate,
so that a machine that grows slower hurts both; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep

N_TRIALS = 300

TASK = '''
import torch
import hpsearch


def data():
    """1,024 rows of 16 numbers in 4 classes, and as many more for val and test."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)
    y = torch.arange(3072) % 4
    return centres[y] + torch.randn(3072, 16, generator=generator), y


def network(width):
    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))


class Tiny(hpsearch.Task):
    def data(self):
        x, y = data()
        return hpsearch.Splits(
            train=(x[:1024], y[:1024]), val=(x[1024:2048], y[1024:2048]), test=(x[2048:], y[2048:])
        )

    def model(self, config):
        return network(config["width"])
'''

SPACE = f"""
name: tiny
task: tiny_task.py:Tiny
search: {{method: random, trials: {N_TRIALS}}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-4, max: 1e-1}}
  weight_decay: {{distribution: log_uniform, min: 1e-6, max: 1e-2}}
  batch_size: {{value: 64}}
  width: {{values: [16, 32, 64]}}
early_stopping: {{type: none, max_epochs: 1}}
ensemble: {{pool: 20, size: 5}}
"""

TUNE = '''
"""The same trials under Ray Tune. Prints seconds of the search and of the fit."""
import json, logging, os, sys, tempfile, time

os.environ.update(
    RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_USAGE_STATS_ENABLED="0",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0", OMP_NUM_THREADS="1",
)
import ray
from ray import tune

configs = json.load(open(sys.argv[1]))


class Trainable(tune.Trainable):
    """Reused actors: the data are loaded once per process, as hpsearch's workers do."""

    def setup(self, config):
        import torch
        import tiny_task

        torch.set_num_threads(1)
        if not hasattr(Trainable, "loaded"):
            Trainable.loaded = tiny_task.data()
            # One step beforehand, as hpsearch's workers do: torch loads a second's worth of modules with the first.
            network = tiny_task.network(2)
            optimizer = torch.optim.AdamW(network.parameters())
            network(torch.zeros(2, 16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        self.begin(config)

    def begin(self, config):
        import torch
        import tiny_task

        self.began = time.time()
        self.config = config["trial"]
        torch.manual_seed(self.config["seed"])
        self.network = tiny_task.network(self.config["width"])
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.config["lr"], weight_decay=self.config["weight_decay"], fused=True
        )

    def reset_config(self, new_config):
        self.begin(new_config)
        return True

    def step(self):
        import torch

        x, y = Trainable.loaded
        order = torch.randperm(1024)
        x_epoch, y_epoch = x[:1024][order], y[:1024][order]
        self.network.train()
        for start in range(0, 1024, 64):
            loss = torch.nn.functional.cross_entropy(
                self.network(x_epoch[start : start + 64]), y_epoch[start : start + 64]
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.network.eval()
        with torch.no_grad():
            output = self.network(x[1024:2048])
            val_loss = torch.nn.functional.cross_entropy(output, y[1024:2048]).item()
            accuracy = (output.argmax(1) == y[1024:2048]).float().mean().item()
        return {"val_loss": val_loss, "val_accuracy": accuracy, "began": self.began, "ended": time.time(), "done": True}

    def save_checkpoint(self, checkpoint_dir):
        return None


ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
)
with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(Trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(reuse_actors=True, metric="val_loss", mode="min"),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    ).fit()
    fit_s = time.perf_counter() - start
    rows = [result.metrics for result in results]
    search_s = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    assert len(results) == len(configs) and not results.errors
    best = results.get_best_result().metrics["val_loss"]
ray.shutdown()
print(json.dumps({"search(s)": search_s, "fit(s)": fit_s, "best_val_loss": best}))
'''


def run(command: list[str], folder: Path) -> tuple[dict[str, object], float]:
    """The JSON that a command printed last, and its wall time in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1]), time.perf_counter() - start


def hpsearch(folder: Path, nth: int) -> dict[str, object]:
    """One launch, as a user starts it."""
    run_dir = folder / f"run-{nth}"
    command = [
        sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--json", "--workers", "2",
        "--run-dir", str(run_dir), "--tracking-uri", f"sqlite:///{folder}/mlflow-{nth}.db",
    ]  # fmt: skip
    told, whole_s = run(command, folder)
    trials = told["trials"]
    assert isinstance(trials, dict)
    assert trials["complete"] == N_TRIALS, trials
    stages = told["stages_s"]
    best = told["best"]
    assert isinstance(stages, dict)
    assert isinstance(best, dict)
    return {
        "search(s)": stages["search"],
        "whole(s)": round(whole_s, 2),
        "best_val_loss": best["val"]["loss"],
        "stages(s)": stages,
    }


def ray_tune(folder: Path) -> dict[str, object]:
    """The same trials under Tune."""
    told, whole_s = run([sys.executable, "tune_run.py", "configs.json"], folder)
    return {
        "search(s)": round(float(str(told["search(s)"])), 2),
        "fit(s)": round(float(str(told["fit(s)"])), 2),
        "whole(s)": round(whole_s, 2),
        "best_val_loss": told["best_val_loss"],
    }


def draw_configs() -> list[dict[str, object]]:
    """The configs that the launch draws, so that both engines train the same."""
    from hpsearch.sampler import RandomSampler, trial_seed
    from hpsearch.spec import parse_spec

    spec = parse_spec(SPACE)
    sampler = RandomSampler(spec.space, spec.seed)
    configs = (sampler.config(number, lambda _: {}) for number in range(N_TRIALS))
    return [{**(config or {}), "seed": trial_seed(spec.seed, n)} for n, config in enumerate(configs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny_task.py").write_text(TASK)
        (folder / "space.yaml").write_text(SPACE)
        (folder / "tune_run.py").write_text(TUNE)
        (folder / "configs.json").write_text(json.dumps(draw_configs()))
        for nth in range(args.repeats):
            ours.append(hpsearch(folder, nth))
            print(f"hpsearch: {ours[-1]}", flush=True)
            theirs.append(ray_tune(folder))
            print(f"Ray Tune: {theirs[-1]}", flush=True)
    ratios = {}
    for what in ("search(s)", "whole(s)"):
        mine, peer = (statistics.median(float(str(row[what])) for row in rows) for rows in (ours, theirs))
        ratios[what] = round(peer / mine, 2)
        print(f"{what}: hpsearch {mine:.2f}, Ray Tune at its best {peer:.2f}: {peer / mine:.2f} times as fast")
    what = f"{N_TRIALS} one-epoch trials of a tiny network, two workers, seconds"
    measured = {"hpsearch": ours, "ray_tune": theirs}
    keep("engines", what, measured, packages=["torch", "ray", "mlflow"], ratios=ratios)


if __name__ == "__main__":
    main()
