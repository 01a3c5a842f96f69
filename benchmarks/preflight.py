"""Preflight on networks with a bug planted, and on sound ones over many seeds: found, false alarms, seconds.

python benchmarks/preflight.py [--seeds 20]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from _record import keep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/networks.py: the same tasks as the tests'
from hpsearch.checks import Check
from hpsearch.task import Task
from hpsearch.training.checks.data_report import check_data
from hpsearch.training.checks.network import check_network
from hpsearch.training.data import StudyData
from tests.networks import PLANTED, SOUND

CPU = torch.device("cpu")
MEANT = {("1:100", "imbalance")}  # a warning that is true of that task


def checked(task: Task, seed: int) -> tuple[list[Check], float]:
    """All checks of a task, and the seconds they took."""
    began = time.perf_counter()
    data = StudyData.load(task, study_seed=seed, cut_ensemble=True, device=CPU)
    found = check_data(data) + check_network(task, data, {}, seed=seed, device=CPU, where="trial 0")
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    n_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    missed, seconds = [], []
    for bug, (make, code) in PLANTED.items():
        found, took = checked(make(), 0)
        seconds.append(took)
        status = next((check.status for check in found if check.code == code), "not asked")
        others = [check.code for check in found if check.status == "failed" and check.code != code]
        print(f"{bug:40} {status:10} {took:5.1f} s   also failed: {', '.join(others) or 'none'}", flush=True)
        if status not in ("failed", "warned"):
            missed.append(bug)
    alarms = []
    for name, make in SOUND.items():
        told = []
        for seed in range(n_seeds):
            found, took = checked(make(), seed)
            seconds.append(took)
            told += [(seed, c.code, c.found) for c in found if c.status in ("failed", "warned")]
        told = [each for each in told if (name, each[1]) not in MEANT]
        alarms += [(name, *each) for each in told]
        print(f"{name:40} {len(told)} false alarms over {n_seeds} seeds  {told[:3]}", flush=True)
    print(f"found {len(PLANTED) - len(missed)} of {len(PLANTED)}; {len(alarms)} false alarms in "
          f"{len(SOUND) * n_seeds} networks; {median(seconds):.1f} s each")  # fmt: skip
    keep(
        "preflight",
        "planted bugs found, false alarms on sound networks, seconds for all checks of one network",
        {"planted": len(PLANTED), "missed": missed, "networks": len(SOUND) * n_seeds, "alarms": alarms,
         "median(s)": round(median(seconds), 2)},
        packages=("torch",),
    )  # fmt: skip


if __name__ == "__main__":
    main()
