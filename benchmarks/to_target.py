"""Wall time to a test accuracy: hpsearch whole, against the best single model of Ray Tune's random search with ASHA.

    python benchmarks/to_target.py                                     # digits, five seeds: some minutes
    python benchmarks/to_target.py --data digits --data /data/mnist.npz --seeds 10

Per seed, both search the same space over the same networks and data, with 64 trials, up to 27 epochs, halving by 3 from
epoch 1, one thread per process, two at a time. Their commands run in turns; time counts from a command's start, its
imports and Ray's start included.

    Ray Tune    random search and ASHA, with the settings that were fastest when measured (peers/tune_best.py). It ranks
                by val_loss over all of val. Models are not saved, which spares it what its user would need.
    hpsearch    `hpsearch launch` as it is: checks, LR range, search, ensemble, export, MLflow (SQLite). It ranks by
                val_loss over one half of val, and chooses the ensemble on the other.

**The target** is the test accuracy of the model that Tune ends with: the epoch of the trial with the lowest val_loss.
**Tune's time** is when its best model so far (by val_loss, at each of its reports) first had that test accuracy, which
may well be before the end. **hpsearch's time** is when its best model so far first has it: by val_loss at each result
in the journal; from the moment that the ensemble is chosen, the ensemble. Where none of these has it, the seed is a
miss, and its ratio counts as 0. During the runs nothing looks at test: the best models so far are trained again from
their seeds afterwards, up to their epoch, and measured then (`off by` is by how much their val_loss then differs).

The ratio is Tune's time over hpsearch's, told as the median over seeds with its percentile bootstrap interval; with
five seeds that interval is close to their range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._record import keep
from benchmarks._tree import run_measured
from benchmarks.engines import parameters
from benchmarks.peers import launch
from benchmarks.peers._order import Order, read_answer, write_order

SPACE = """
name: to-target
task: {task}
metric: {{name: val_loss, goal: minimize}}
seed: {seed}
search: {{method: sobol, trials: {trials}}}
parameters:
  lr: {{distribution: log_uniform, min: 1e-5, max: 1.0, bounds_from: lr_range}}
  batch_size: {{values: [32, 64, 128]}}
  optimizer: {{values: [adamw, sgd]}}
  momentum: {{min: 0.8, max: 0.99, when: {{optimizer: sgd}}}}
  weight_decay: {{distribution: log_uniform, min: 1e-6, max: 1e-1}}
  width: {{values: [64, 128, 256]}}
  depth: {{min: 1, max: 3}}
  dropout: {{min: 0.0, max: 0.5}}
lr_range: {{per: [optimizer], min: 1e-5, max: 10, steps: 100, seeds: 5}}
early_stopping: {{type: asha, min_epochs: 1, max_epochs: {epochs}, reduction_factor: 3}}
ensemble: {{pool: 20, size: 5}}
resources: {{threads: {threads}, gpus: {gpus}}}
"""
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model that came to be known."""

    at_s: float  # since the command's start
    trial: int
    epoch: int
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """The best model so far, from `at_s` on."""

    at_s: float
    what: str  # "trial 17, epoch 9", "ensemble"
    test_accuracy: float
    off_by: float = 0.0  # val_loss as trained again, less what it was; of an ensemble, which is not, 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One tool's run at one seed."""

    steps: tuple[Step, ...]
    whole_s: float
    stages_s: Mapping[str, float] = field(default_factory=dict)  # of hpsearch's own account

    @property
    def off_by(self) -> float:
        return max((abs(step.off_by) for step in self.steps), default=0.0)

    @property
    def final(self) -> Step:
        """What the tool ends with."""
        return self.steps[-1]


def incumbents(points: Iterable[Point]) -> list[Point]:
    """The points that were the best so far when they came to be known, in the order of time; NaN never is."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: point.at_s):
        if point.val_loss < (found[-1].val_loss if found else float("inf")):
            found.append(point)
    return found


def first_with(steps: Sequence[Step], target: float) -> Step | None:
    """The first best-so-far with at least this test accuracy; None: it was never reached."""
    return next((step for step in steps if step.test_accuracy >= target - 1e-9), None)


def median_interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the median."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(values, dtype=np.float64), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both search."""

    data: str
    rows: int
    n_trials: int
    epochs: int
    workers: int
    threads: int
    gpus: float

    @property
    def name(self) -> str:
        return "digits" if self.data == "digits" else f"mnist, {self.rows:,} rows"

    @property
    def env(self) -> dict[str, str]:
        return launch.environment(self.data, self.rows, self.threads)

    def space(self, seed: int) -> str:
        return SPACE.format(
            task=launch.TASK,
            seed=seed,
            trials=self.n_trials,
            epochs=self.epochs,
            threads=self.threads,
            gpus=self.gpus,
        )


class TrainedAgain:
    """Test accuracies of models that a run had on its way, by training them again."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from benchmarks.peers import problem
        from benchmarks.peers.task import Study

        self._device = torch.device("cuda" if setting.gpus else "cpu")
        self._splits = problem.as_tensors(problem.load(), str(self._device))
        self._task = Study()

    def of_tune(self, points: Sequence[Point], configs: Sequence[Mapping[str, Any]]) -> list[Step]:
        """The best models so far of a run of Tune's."""
        from benchmarks.peers.problem import PlainTraining

        steps = []
        for trial, wanted in _by_trial(points).items():
            training = PlainTraining(self._splits, configs[trial])
            while wanted:
                val_loss = training.epoch()["val_loss"]
                if (point := wanted.pop(training.n_epochs, None)) is not None:
                    steps.append(_step(point, training.measure("test")["test_accuracy"], val_loss))
        return sorted(steps, key=lambda step: step.at_s)

    def of_hpsearch(self, points: Sequence[Point], drawn: Mapping[int, Any], study_seed: int) -> list[Step]:
        """The best single models so far of a study's; `drawn` are its TrialDrawn events."""
        from hpsearch.training.data import StudyData
        from hpsearch.training.loop import DefaultTraining
        from hpsearch.training.measure import evaluate

        data = StudyData.load(self._task, study_seed=study_seed, cut_ensemble=True, device=self._device)
        steps = []
        for trial, wanted in _by_trial(points).items():
            event = drawn[trial]
            training = DefaultTraining(
                self._task, data, event.config, trial=trial, seed=event.seed, device=self._device
            )
            while wanted:
                val_loss = training.train_epoch().metrics["val_loss"]
                if (point := wanted.pop(training.epoch, None)) is not None:
                    accuracy = evaluate(training.model, self._task, data, "test")["accuracy"]
                    steps.append(_step(point, accuracy, val_loss))
        return sorted(steps, key=lambda step: step.at_s)


def _by_trial(points: Sequence[Point]) -> dict[int, dict[int, Point]]:
    """Points by trial and epoch."""
    found: dict[int, dict[int, Point]] = {}
    for point in points:
        found.setdefault(point.trial, {})[point.epoch] = point
    return found


def _step(point: Point, test_accuracy: float, val_loss: float) -> Step:
    return Step(
        at_s=point.at_s,
        what=f"trial {point.trial}, epoch {point.epoch}",
        test_accuracy=test_accuracy,
        off_by=val_loss - point.val_loss,
    )


def run_tune(setting: Setting, seed: int, folder: Path, again: TrainedAgain) -> Run:
    """One run of Ray Tune, and its best models so far."""
    folder.mkdir(parents=True)
    order = Order(
        n_trials=setting.n_trials,
        max_epochs=setting.epochs,
        workers=setting.workers,
        threads=setting.threads,
        gpus=setting.gpus,
        seed=seed,
        space=parameters(setting.space(seed)),
        reduction_factor=3,
    )
    write_order(order, folder / "order.json")
    command = [sys.executable, "-m", "benchmarks.peers.tune_best", "order.json"]
    cost = run_measured(command, cwd=folder, env=setting.env)
    trials = read_answer(cost.stdout).trials
    points = [
        Point(at_s=at - cost.began, trial=n, epoch=epoch, val_loss=val_loss)
        for n, trial in enumerate(trials)
        for epoch, val_loss, at in trial["curve"]
    ]
    steps = again.of_tune(incumbents(points), [trial["config"] for trial in trials])
    return Run(steps=tuple(steps), whole_s=cost.wall_s)


def run_hpsearch(setting: Setting, seed: int, folder: Path, again: TrainedAgain, overrides: Sequence[str]) -> Run:
    """One launch, its best single models so far, and its ensemble."""
    from hpsearch.events import Finished, Selected, TrialDrawn
    from hpsearch.journal import read_journal

    told, cost = launch.launch(
        setting.space(seed), folder, workers=setting.workers, env=setting.env, overrides=overrides
    )
    entries = read_journal(folder / "run")
    drawn = {entry.event.trial: entry.event for entry in entries if isinstance(entry.event, TrialDrawn)}
    points = [
        Point(at_s=entry.time - cost.began, trial=entry.event.trial, epoch=epoch, val_loss=metrics["val_loss"])
        for entry in entries
        if isinstance(entry.event, Finished) and entry.event.trial is not None
        for epoch, metrics, _ in entry.event.epochs
    ]
    steps = again.of_hpsearch(incumbents(points), drawn, seed)
    ensemble = told["ensemble"]
    assert isinstance(ensemble, dict)
    chosen = next(entry.time for entry in reversed(entries) if isinstance(entry.event, Selected))
    together = Step(at_s=chosen - cost.began, what="ensemble", test_accuracy=ensemble["test"]["accuracy"])
    stages = told["stages_s"]
    assert isinstance(stages, dict)
    return Run(steps=(*steps, together), whole_s=cost.wall_s, stages_s=stages)


def compared(tune: Run, hpsearch: Run) -> dict[str, Any]:
    """One seed's row."""
    target = tune.final.test_accuracy
    theirs, ours = first_with(tune.steps, target), first_with(hpsearch.steps, target)
    assert theirs is not None  # its last model has it
    return {
        "target": target,
        "tune(s)": round(theirs.at_s, 2),
        "hpsearch(s)": None if ours is None else round(ours.at_s, 2),
        "by": "missed" if ours is None else ours.what,
        "ratio": 0.0 if ours is None else round(theirs.at_s / ours.at_s, 3),
        "hpsearch_ends_with": hpsearch.final.test_accuracy,
        "tune_whole(s)": round(tune.whole_s, 2),
        "hpsearch_whole(s)": round(hpsearch.whole_s, 2),
        "hpsearch_stages(s)": dict(hpsearch.stages_s),
        "off_by": max(tune.off_by, hpsearch.off_by),
    }


def show(seed: int, row: Mapping[str, Any]) -> None:
    ours = "missed" if row["hpsearch(s)"] is None else f"{row['hpsearch(s)']:.1f}"
    print(
        f"{seed:4d}  {row['target']:7.4f}  {row['tune(s)']:8.1f}  {ours:>12}  {row['ratio']:5.2f}  {row['by']:>19}"
        f"  {row['hpsearch_ends_with']:10.4f}  {row['tune_whole(s)']:10.1f}  {row['hpsearch_whole(s)']:15.1f}"
        f"  {row['off_by']:.0e}",
        flush=True,
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the seeds."""
    ratios = [row["ratio"] for row in rows]
    low, high = median_interval(ratios)
    return {
        "median_ratio": statistics.median(ratios),
        "interval": [round(low, 3), round(high, 3)],
        "missed": sum(row["hpsearch(s)"] is None for row in rows),
        "seeds": len(rows),
        "median_whole(s)": {
            tool: statistics.median(row[f"{tool}_whole(s)"] for row in rows) for tool in ("tune", "hpsearch")
        },
        "median_stages(s)": {
            stage: statistics.median(row["hpsearch_stages(s)"].get(stage, 0.0) for row in rows)
            for stage in rows[0]["hpsearch_stages(s)"]
        },
    }


def measure(setting: Setting, n_seeds: int, folder: Path, overrides: Sequence[str]) -> dict[str, object]:
    """Both tools at every seed, in turns."""
    import torch

    torch.set_num_threads(setting.threads)  # as in the runs: results differ in their last bits otherwise
    os.environ.update({key: setting.env[key] for key in ("BENCHMARK_DATA", "BENCHMARK_ROWS")})
    again = TrainedAgain(setting)
    print(f"{setting.name}: {setting.n_trials} trials of up to {setting.epochs} epochs, {setting.workers} at a time")
    print(f"seed   target   tune(s)   hpsearch(s)  ratio  {'by':>19}   ends with    whole(s)  hpsearch whole  off by")
    rows, runs = [], []
    for seed in range(n_seeds):
        tune = run_tune(setting, seed, folder / f"tune-{seed}", again)
        ours = run_hpsearch(setting, seed, folder / f"hpsearch-{seed}", again, overrides)
        rows.append({"seed": seed, **compared(tune, ours)})
        runs.append({"seed": seed, "tune": asdict(tune), "hpsearch": asdict(ours)})
        show(seed, rows[-1])
    told = summary(rows)
    low, high = told["interval"]
    print(
        f"{setting.name}: {told['median_ratio']:.2f} times as fast to the target ({low:.2f} to {high:.2f}, 95 %, "
        f"{told['seeds']} seeds), {told['missed']} missed"
    )
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in told["median_stages(s)"].items())
    print(f"hpsearch's stages, medians in s: {stages}\n", flush=True)
    return {"data": setting.name, "summary": told, "rows": rows, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--data", action="append", help="digits, or the path of an mnist.npz; repeatable")
    parser.add_argument("--rows", type=int, default=5_000, help="of MNIST that are trained on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=27, help="of a full trial")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch, per process")
    parser.add_argument("--gpus", type=float, default=0.0, help="per worker, such as 0.5")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of hpsearch's space.yaml")
    args = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as name:
        for data in args.data or ["digits"]:
            setting = Setting(
                data=data if data == "digits" else str(Path(data).resolve()),
                rows=args.rows,
                n_trials=args.trials,
                epochs=args.epochs,
                workers=args.workers,
                threads=args.threads,
                gpus=args.gpus,
            )
            measured.append(measure(setting, args.seeds, Path(name, Path(data).stem), args.overrides))
    keep(
        "to_target",
        "seconds until the test accuracy that Ray Tune's random search with ASHA ends with; ratio 0: missed",
        measured,
        packages=["torch", "ray", "mlflow", "scikit-learn"],
        workers=args.workers,
        threads=args.threads,
        gpus=args.gpus,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    main()
