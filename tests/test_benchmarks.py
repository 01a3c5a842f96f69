"""What the benchmarks compute, on small inputs. No timing is asserted."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import engines, ensemble, lanes, scale, to_target
from benchmarks._lane_worker import Case
from benchmarks._tree import Process, descendants
from benchmarks.lanes import Measured
from benchmarks.peers._order import Answer, Order, read_answer, write_order
from benchmarks.to_target import Point, Run, Step
from hpsearch.sampler import trial_seed
from hpsearch.selection import select_greedy


@pytest.mark.parametrize("name", ["_tree", "lanes", "ensemble"])
def test_examples_in_docstrings_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert found.attempted
    assert not found.failed


# Process trees


def test_descendants_are_all_below_a_process_and_it_is_not_one_of_them() -> None:
    tree = [Process(pid=pid, parent=parent, began=0, cpu_s=0.0, rss_mib=1.0) for pid, parent in TREE.items()]
    assert {process.pid for process in descendants(tree, 10)} == {11, 12, 13, 14, 15}


TREE = {1: 0, 10: 1, 11: 10, 12: 11, 13: 12, 14: 12, 15: 14, 20: 1}

MEASURED = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from benchmarks._tree import run_measured
orphan = "import time; time.sleep(0.3); sum(range(3_000_000))"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}]); bytearray(80 << 20); print(7)"
print(json.dumps(asdict(run_measured([sys.executable, "-c", child], cwd=Path("."), env=os.environ))))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which is Linux's")
def test_a_commands_cost_holds_processes_that_outlive_it(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, cwd=repository, timeout=60
    )
    cost = json.loads(done.stdout)
    assert cost["stdout"].strip() == "7"
    alone = subprocess.run(
        [sys.executable, "-c", "import resource; sum(range(3_000_000)); print(resource.getrusage(0).ru_utime)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert cost["cpu_s"] > float(alone.stdout)  # the orphan's work and the command's own start
    assert cost["peak_mib"] > 1


# Engines


def setting(**changes: Any) -> engines.Setting:
    return replace(
        engines.Setting(data="digits", n_trials=5, epochs=2, rows=100, workers=2, threads=1, gpus=0.0), **changes
    )


def test_engines_are_given_the_configs_that_a_launch_draws() -> None:
    configs = engines.draw_configs(setting().space)
    assert [config["seed"] for config in configs] == [trial_seed(0, n) for n in range(5)]
    assert len({config["lr"] for config in configs}) == 5
    assert all({"lr", "weight_decay", "dropout", "batch_size", "width"} < set(config) for config in configs)


def test_parameters_are_told_as_they_are_written() -> None:
    told = engines.parameters(setting().space)
    assert told["batch_size"] == {"value": 64}
    assert told["width"] == {"values": [32, 64, 128]}
    assert told["lr"] == {"distribution": "log_uniform", "min": 1e-4, "max": 1e-1}


def test_a_ratio_over_one_means_that_hpsearch_is_faster() -> None:
    ours = {"ms/trial": 2.0, "whole(s)": 10.0, "CPU(s)": 5.0}
    theirs = {"ms/trial": 5.0, "whole(s)": 8.0, "CPU(s)": 5.0}
    assert engines.ratios(theirs, ours) == {"search": 2.5, "whole": 0.8, "CPU": 1.0}


def test_orders_and_answers_survive_the_way_to_a_peer_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers._order import read_order

    order = Order(n_trials=2, max_epochs=3, configs=({"lr": 0.1}, {"lr": 0.2}), gpus=0.5)
    write_order(order, tmp_path / "order.json")
    monkeypatch.setattr(sys, "argv", ["peer", str(tmp_path / "order.json")])
    assert read_order() == order
    assert order.device == "cuda"
    answer = Answer(search_s=1.0, n_trials=2, n_epochs=6, best_val_loss=0.5, trials=[])
    assert read_answer("noise\n" + json.dumps(asdict(answer)) + "\n") == answer


def test_every_engine_trains_the_same_data_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.peers import problem
    from benchmarks.peers.task import Study

    monkeypatch.setenv("BENCHMARK_DATA", "digits")
    task, arrays = Study(), problem.load()
    given = task.data()
    assert np.array_equal(given.train[0], arrays["train"][0])
    assert {name: len(y) for name, (_, y) in arrays.items()} == {"train": 897, "val": 450, "test": 450}
    config = {"width": 8, "depth": 2, "batch_size": 64, "lr": 1e-2, "seed": 3}
    splits = problem.as_tensors(arrays)
    rows = [problem.PlainTraining(splits, config).epoch() for _ in range(2)]
    training = problem.PlainTraining(splits, config)
    rows.append(training.epoch())
    assert str(training.model) == str(task.model(config))
    assert rows[0] == rows[1] == rows[2]
    assert training.n_epochs == 1
    assert 0 < training.measure("test")["test_accuracy"] <= 1
    assert torch.isfinite(torch.tensor(rows[0]["val_loss"]))


def test_mnist_is_cut_into_rows_that_no_other_split_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import problem

    n = 2_100
    images = np.arange(n, dtype=np.uint16).view(np.uint8).reshape(n, 1, 2)  # a number of its own in each
    labels = np.arange(n) % 10
    path = tmp_path / "mnist.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:5], test_labels=labels[:5])
    monkeypatch.setenv("BENCHMARK_DATA", str(path))
    monkeypatch.setenv("BENCHMARK_ROWS", "60")
    cut = problem.load()
    assert {name: x.shape for name, (x, _) in cut.items()} == {"train": (60, 2), "val": (2_000, 2), "test": (5, 2)}
    rows = {name: {tuple(row) for row in x.tolist()} for name, (x, _) in cut.items()}
    assert len(rows["train"]) == 60
    assert not rows["train"] & rows["val"]


# To target


def point(at_s: float, val_loss: float, trial: int = 0, epoch: int = 1) -> Point:
    return Point(at_s=at_s, trial=trial, epoch=epoch, val_loss=val_loss)


def step(at_s: float, test_accuracy: float, what: str = "trial 0, epoch 1") -> Step:
    return Step(at_s=at_s, what=what, test_accuracy=test_accuracy)


def test_the_best_so_far_are_in_the_order_of_time_and_never_nan() -> None:
    points = [point(3.0, 0.4), point(1.0, 0.9), point(2.0, math.nan), point(4.0, 0.5), point(5.0, 0.3)]
    assert [found.at_s for found in to_target.incumbents(points)] == [1.0, 3.0, 5.0]


def test_a_target_is_reached_by_the_first_model_that_has_it() -> None:
    steps = [step(1.0, 0.8), step(2.0, 0.95), step(3.0, 0.9)]
    found = to_target.first_with(steps, 0.9)
    assert found is not None
    assert found.at_s == 2.0
    assert to_target.first_with(steps, 0.96) is None


def test_the_target_is_what_tune_ends_with_and_its_time_when_it_first_had_that() -> None:
    tune = Run(steps=(step(2.0, 0.8), step(6.0, 0.97), step(9.0, 0.95)), whole_s=12.0)
    ours = Run(steps=(step(1.0, 0.9), step(4.0, 0.96, "ensemble")), whole_s=7.0)
    row = to_target.compared(tune, ours)
    assert row["target"] == 0.95
    assert (row["tune(s)"], row["hpsearch(s)"], row["ratio"], row["by"]) == (6.0, 4.0, 1.5, "ensemble")


def test_a_target_that_is_never_reached_is_told_as_missed_and_counts_as_zero() -> None:
    tune = Run(steps=(step(2.0, 0.97),), whole_s=12.0)
    missed = to_target.compared(tune, Run(steps=(step(1.0, 0.9),), whole_s=7.0))
    hit = to_target.compared(tune, Run(steps=(step(1.0, 0.98),), whole_s=7.0))
    assert (missed["hpsearch(s)"], missed["by"], missed["ratio"]) == (None, "missed", 0.0)
    told = to_target.summary([missed, hit, hit])
    assert (told["missed"], told["seeds"], told["median_ratio"]) == (1, 3, 2.0)
    assert told["interval"] == [0.0, 2.0]


def test_the_medians_interval_lies_within_the_values_and_is_the_same_again() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    low, high = to_target.median_interval(values)
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert to_target.median_interval(values) == (low, high)
    assert to_target.median_interval([2.0] * 5) == (2.0, 2.0)


def test_models_are_trained_again_to_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import problem

    monkeypatch.setenv("BENCHMARK_DATA", "digits")
    monkeypatch.setenv("BENCHMARK_ROWS", "100")
    again = to_target.TrainedAgain(
        to_target.Setting(data="digits", rows=100, n_trials=2, epochs=2, workers=1, threads=1, gpus=0.0)
    )
    config = {"width": 8, "batch_size": 128, "lr": 1e-2, "seed": 3}
    training = problem.PlainTraining(problem.as_tensors(problem.load()), config)
    losses = [training.epoch()["val_loss"] for _ in range(2)]
    points = [point(5.0, losses[0], epoch=1), point(7.0, losses[1] + 0.25, epoch=2)]
    steps = again.of_tune(points, [config])
    assert [found.at_s for found in steps] == [5.0, 7.0]
    assert [found.off_by for found in steps] == [0.0, pytest.approx(-0.25)]
    assert steps[1].test_accuracy == training.measure("test")["test_accuracy"]


# Ensemble


def test_the_plain_loop_picks_what_select_greedy_picks() -> None:
    probs_MNC, targets = ensemble.made_up_models(12, 300, 4)
    for size in (2, 5, 12):
        selection = select_greedy(list(probs_MNC), targets, "logits", size=size)
        weights = dict(selection.members)
        assert ensemble.select_plainly(probs_MNC, targets, size=size) == pytest.approx(weights)
        score = ensemble.ensemble_score(probs_MNC, targets, weights)
        assert score == pytest.approx(selection.scores[selection.best_round - 1], rel=1e-6)


def test_a_peer_that_does_not_run_is_told_with_its_reason(tmp_path: Path) -> None:
    weights, _, why = ensemble.ask_peer("autogluon", str(tmp_path / "python"), tmp_path, 3, 5)
    assert weights is None
    assert "No such file" in why
    np.save(tmp_path / "probs.npy", np.ones((3, 4, 2), dtype=np.float32) / 2)
    np.save(tmp_path / "targets.npy", np.zeros(4, dtype=np.int64))
    weights, _, why = ensemble.ask_peer("deephyper", sys.executable, tmp_path, 3, 5)
    assert weights is None
    assert why == "ModuleNotFoundError: No module named 'deephyper'"


def test_an_unknown_peer_is_refused() -> None:
    assert ensemble.read_peers(["deephyper=/x/python"]) == {"deephyper": "/x/python"}
    with pytest.raises(SystemExit, match=r"--peer is autogluon\|deephyper=PYTHON"):
        ensemble.read_peers(["sklearn=/x/python"])


# Scale


def test_a_simulated_study_is_told_whole_and_as_it_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "STEPS", (10, 20))
    found = scale.measure(tmp_path / "run", n_workers=3, n_trials=24)
    assert [row["trials"] for row in found.growth] == [10, 20, 24]
    assert found.total["trials"] == 24
    assert found.total["jobs given"] > 24
    assert set(scale.TOTALS) <= set(found.total)
    assert all(set(scale.GROWTH) <= set(row) for row in found.growth)


# Lanes


def fused(lanes: int, rate: float) -> Measured:
    return Measured(kind="fused", processes=1, lanes=lanes, rate=rate)


def alone(processes: int, rate: float) -> Measured:
    return Measured(kind="plain" if processes == 1 else "processes", processes=processes, lanes=0, rate=rate)


def test_widening_ends_where_it_fails_or_does_not_pay_any_more() -> None:
    rates = {1: 10.0, 2: 20.0, 4: 19.0, 8: 18.0, 16: 40.0}
    rows = [*lanes.widen(lambda n: fused(n, rates[n]), [*rates], lambda: False)]
    assert [row.lanes for row in rows] == [1, 2, 4, 8]
    rows = [*lanes.widen(lambda n: replace(fused(n, n), error="out" if n == 4 else ""), [*rates], lambda: False)]
    assert [row.error for row in rows] == ["", "", "out"]
    assert [row.lanes for row in lanes.widen(lambda n: fused(n, n), [*rates], lambda: True)] == [1]


def test_a_summary_holds_the_best_widths_against_the_best_processes() -> None:
    rows = [
        *(alone(1, 100.0), alone(2, 150.0), alone(4, 140.0), fused(1, 90.0), fused(8, 600.0), fused(16, 500.0)),
        Measured(kind="auto", processes=1, lanes=8, rate=600.0),
        Measured(kind="large", processes=1, lanes=8, rate=1200.0),
    ]
    told = lanes.summary(rows)
    assert (told["processes"], told["lanes"], told["auto_lanes"]) == (2, 8, 8)
    assert (told["fused_over_plain"], told["fused_over_processes"], told["share_of_roofline"]) == (6.0, 4.0, 0.5)


def test_a_network_that_cannot_be_fused_has_no_ratios_and_a_reason() -> None:
    rows = [alone(1, 100.0), Measured(kind="fused", processes=1, lanes=1, error="LanesRefused: it decides by values")]
    told = lanes.summary(rows)
    assert told["fused_over_plain"] is told["share_of_roofline"] is told["auto_over_processes"] is None
    assert told["route"] == "LanesRefused: it decides by values"
    lanes.show_summary({"odd": told})


def test_one_lane_is_the_plain_loop_in_as_many_processes_as_do_best() -> None:
    many, widths = [alone(1, 100.0), alone(2, 150.0)], [fused(1, 90.0), fused(4, 300.0)]
    assert lanes.rate_of(1, many, widths) == 150.0
    assert lanes.rate_of(4, many, widths) == 300.0
    assert lanes.rate_of(8, many, widths) == 0.0


class RecordedBench:
    """Answers with made-up rates, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int, int, int]] = []

    def measure(self, kind: lanes.Kind, case: Case, processes: int = 1) -> Measured:
        self.asked.append((kind, case.lanes, case.times_batch, case.threads, processes))
        row = Measured(kind=kind, processes=processes, lanes=case.lanes, threads=case.threads)
        return replace(row, rate=100.0 * processes * max(1, case.lanes), lanes=4 if kind == "auto" else case.lanes)


@pytest.fixture
def asked() -> list[tuple[str, int, int, int, int]]:
    bench = RecordedBench()
    plan = lanes.Plan(device="cpu", widths=[1, 2, 4], processes=[2], fused_processes=2)
    rows = [*lanes.measure_network("mlp", bench, plan, lambda: False)]  # type: ignore[arg-type]
    assert [row.rate for row in rows if row.kind in ("auto", "large")] == [800.0, 800.0]
    return bench.asked


def test_on_a_cpu_lanes_are_fused_in_as_many_processes_as_there_are_cores(
    asked: list[tuple[str, int, int, int, int]],
) -> None:
    assert asked == [
        ("plain", 0, 1, 1, 1),
        ("processes", 0, 1, 1, 2),
        ("fused", 1, 1, 1, 2),
        ("fused", 2, 1, 1, 2),
        ("fused", 4, 1, 1, 2),
        ("auto", 0, 1, 1, 2),
        ("large", 0, 4, 1, 2),
        ("threads", 4, 1, 2, 1),
        ("threads", 8, 1, 2, 1),
    ]


def test_plans_widen_by_powers_of_two() -> None:
    assert lanes.make_plan("cuda", quick=False, max_lanes=20).widths == [1, 2, 4, 8, 16]
    assert lanes.make_plan("cuda", quick=True, max_lanes=None).widths == [1, 4, 16, 64]
    assert lanes.make_plan("cuda", quick=False, max_lanes=None).fused_processes == 1


def test_on_a_cpu_lanes_are_held_against_a_process_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.lanes.os.cpu_count", lambda: 4)
    plan = lanes.make_plan("cpu", quick=False, max_lanes=None)
    assert (plan.processes, plan.fused_processes) == ([4], 4)


@pytest.mark.parametrize("name", lanes.NAMES)
def test_networks_give_a_logit_per_class(name: str) -> None:
    import torch

    from benchmarks._lane_networks import N_CLASSES, NETWORKS, Synthetic, lane_config

    network = NETWORKS[name]
    splits = Synthetic(network, 4).data()
    assert network.make()(splits.train[0][:2]).shape == (2, N_CLASSES)
    assert lane_config(network, 0, 8) != lane_config(network, 1, 8)
    assert torch.isfinite(splits.train[0]).all()


def test_a_case_is_timed_over_whole_epochs_once_it_is_told_to_go() -> None:
    import torch

    from benchmarks._lane_worker import timed

    told: list[str] = []
    threads = torch.get_num_threads()
    try:
        plain = timed(Case(network="mlp", seconds=0.01), "cpu", told.append)
        large = timed(Case(network="mlp", seconds=0.01, times_batch=2), "cpu", told.append)
    finally:
        torch.set_num_threads(threads)
    assert told == ["", ""]
    for found in (plain, large):
        assert found.lane_steps % 50 == 0
        assert found.seconds > 0


@pytest.mark.slow
def test_a_worker_answers_a_case_and_tells_what_stands_in_its_way(repository: Path) -> None:
    cases = [Case(network="mlp", seconds=0.01), Case(network="no such network")]
    done = subprocess.run(
        [sys.executable, "benchmarks/_lane_worker.py", "cpu"],
        input=f"{json.dumps(asdict(cases[0]))}\ngo\n{json.dumps(asdict(cases[1]))}\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=repository,
        timeout=120,
    )
    hello, ready, timed, error = map(json.loads, done.stdout.splitlines())
    assert hello["hello"] > 0
    assert ready == {"ready": True, "route": ""}
    assert timed["lane_steps"] % 50 == 0
    assert timed["seconds"] > 0
    assert error == {"error": "KeyError: 'no such network'"}
