"""Whole launches on labels that the inputs do not explain: how many claim to beat what ignores the inputs?

    python benchmarks/random_labels.py                 # 20 launches, several minutes
    python benchmarks/random_labels.py --launches 3

Each launch has data, labels and a study seed of its own: 12 trials of a network that can learn the training rows by
heart, ranked on 200 rows, an ensemble chosen on 200 others and held against the constant answer on 400 test rows. A
launch is right when it says so (exit code 3) and moves no alias; exit code 0 is a claim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep

NOTHING_BETTER = 3  # exit code

TASK = """
import torch
from torch import nn

import hpsearch


class Chance(hpsearch.Task):
    def data(self):
        g = torch.Generator().manual_seed({seed})

        def rows(n):
            return torch.randn(n, 20, generator=g), torch.randint(0, 3, (n,), generator=g)

        return hpsearch.Splits(train=rows(600), val=rows(400), test=rows(400))

    def model(self, config):
        return nn.Sequential(nn.Linear(20, config["width"]), nn.ReLU(), nn.Linear(config["width"], 3))
"""
SPACE = """
name: chance-{seed}
task: task.py:Chance
seed: {seed}
search: {{trials: 12}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-4, max: 0.1, bounds_from: lr_range}}
  width: {{values: [16, 64]}}
  weight_decay: {{distribution: log_uniform, min: 1e-5, max: 1.0}}
early_stopping: {{type: asha, min_epochs: 1, max_epochs: 9, reduction_factor: 3}}
lr_range: {{seeds: 3, steps: 60}}
"""


def launch(folder: Path, seed: int) -> dict[str, object]:
    """What one launch said."""
    (folder / "task.py").write_text(TASK.format(seed=seed))
    (folder / "space.yaml").write_text(SPACE.format(seed=seed))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-m", "hpsearch", "launch", "space.yaml", "--fleet", "local", "--json"]
    done = subprocess.run(
        [*command, "--tracking-uri", f"sqlite:///{folder}/mlflow.db"],
        cwd=folder,
        env=env | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, NOTHING_BETTER):
        raise SystemExit(f"launch {seed} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    return {
        "seed": seed,
        "exit_code": done.returncode,
        "claims": done.returncode == 0,
        "alias": told["mlflow"]["alias"],
        "best_test_loss": told["best"]["test"]["loss"],
        "ensemble_test_loss": told["ensemble"]["test"]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=20)
    options = parser.parse_args()
    began = time.perf_counter()
    rows = []
    for seed in range(options.launches):
        with tempfile.TemporaryDirectory() as name:
            rows.append(launch(Path(name), seed))
        print(rows[-1], flush=True)
    n_claims = sum(bool(row["claims"]) for row in rows)
    print(f"{n_claims} of {len(rows)} launches on random labels claim to beat the constant answer")
    keep(
        "random_labels",
        "what whole launches said of labels that the inputs do not explain; losses in nats",
        rows,
        packages=("torch", "numpy"),
        launches=len(rows),
        claims=n_claims,
        seconds=round(time.perf_counter() - began),
    )


if __name__ == "__main__":
    main()
