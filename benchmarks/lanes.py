"""Lane-steps per second: many trials in one program, against one at a time and against processes that share the device.

    python benchmarks/lanes.py                          # on the GPU where there is one, else the CPU; under ten minutes
    python benchmarks/lanes.py --device cpu --networks mlp gru
    python benchmarks/lanes.py --quick                  # two networks, three widths: a minute

Needs torch and numpy, and of hpsearch what trains (safetensors); data are made up, with MNIST's and CIFAR's shapes. A
lane-step is one optimizer step of one trial. Rows of the table:

    plain loop       one trial in one process, as with `lanes: 1`
    k processes      a trial in each, at the same time, sharing the GPU or the cores: what every other tool does. On a
                     GPU k is raised while that helps; the best k counts. With --mps they share it through NVIDIA's
                     multi-process service, where it can be started
    fused, L lanes   one process trains L trials at once, each with its own rates, seed and data order. On a CPU as many
                     processes as there are cores, one thread each, all fused, since that is how workers run there
    fused, threads   on a CPU: one process with a thread per core instead
    lanes: auto      the number of lanes that a worker takes by itself, measured as workers do, and the rate of the row
                     with that many
    one large batch  the plain loop on batches L times as large, at the best L: the same arithmetic for one trial, told
                     in lane-steps. Fused over this is the share of the roofline

Every row is timed over whole epochs, in processes that stay, after the first epochs (in which kernels are chosen,
graphs captured and routes tried). Epochs include measuring 64 rows of val, fused or not; of large batches the steps
alone are timed, so that the roofline is not told too low.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._lane_worker import Case, Timed
from benchmarks._record import gpu_names, keep

WORKER = Path(__file__).with_name("_lane_worker.py")
NAMES = ("mlp", "cnn", "resnet18", "gru", "transformer")
ANSWER_S = 180.0  # that a case may take to get ready, or to end
GPU_PROCESSES = (2, 4, 8, 16)


class NoAnswerError(RuntimeError):
    """A worker did not answer in time, or went."""


class Worker:
    """A process that times cases."""

    def __init__(self, device: str, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(env),
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            raise NoAnswerError("the process is gone") from None

    def hear(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Its next answer."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise NoAnswerError(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            raise NoAnswerError(f"the process ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


Kind = Literal["plain", "processes", "fused", "auto", "threads", "large"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table."""

    kind: Kind
    processes: int
    lanes: int  # in each process; 0: the plain loop
    threads: int = 1
    rate: float = 0.0  # lane-steps/s, of all processes
    peak_mib: float = 0.0
    route: str = ""
    error: str = ""

    @property
    def words(self) -> str:
        beside = f", {self.processes} processes" if self.processes > 1 else ""
        match self.kind:
            case "plain":
                return "plain loop"
            case "processes":
                return f"{self.processes} processes"
            case "fused":
                return f"fused{beside}"
            case "auto":
                return f"`lanes: auto` takes{beside}"
            case "threads":
                return f"fused, {self.threads} threads"
            case "large":
                return f"one large batch{beside}"


class Bench:
    """The processes of one device."""

    def __init__(self, device: str, *, seconds: float, env: Mapping[str, str]) -> None:
        self._device = device
        self._seconds = seconds
        self._env = env
        self._workers: list[Worker] = []

    def measure(self, kind: Kind, case: Case, processes: int = 1) -> Measured:
        """A case in some processes at once; what stands in its way is told, not raised."""
        row = Measured(kind=kind, processes=processes, lanes=case.lanes, threads=case.threads)
        try:
            timed = self._together(replace(case, seconds=self._seconds), processes)
        except NoAnswerError as error:
            self.close()
            return replace(row, error=str(error))
        except RuntimeError as error:
            return replace(row, error=str(error))
        return replace(
            row,
            lanes=timed[0].chosen or row.lanes,
            rate=sum(each.lane_steps / each.seconds for each in timed),
            peak_mib=sum(each.peak_mib for each in timed),
            route=timed[0].route,
        )

    def close(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def _together(self, case: Case, processes: int) -> list[Timed]:
        new = [Worker(self._device, self._env) for _ in range(processes - len(self._workers))]
        self._workers += new
        for worker in new:
            worker.hear()
        workers = self._workers[:processes]
        for worker in workers:
            worker.tell(json.dumps(asdict(case)))
        heard = [worker.hear() for worker in workers]
        errors = [answer["error"] for answer in heard if "error" in answer]
        ready = [worker for worker, answer in zip(workers, heard, strict=True) if "error" not in answer]
        for worker in ready:
            worker.tell("go")
        answers = [worker.hear() for worker in ready]
        errors += [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RuntimeError(errors[0])
        return [Timed(**answer) for answer in answers]


def past_its_best(rates: Sequence[float]) -> bool:
    """Whether widening has stopped to pay: the last two are no better than the best before them.

    >>> past_its_best([100, 190, 180]), past_its_best([100, 190, 180, 150]), past_its_best([100, 90, 120])
    (False, True, False)
    """
    return len(rates) > 2 and max(rates[-2:]) <= 1.02 * max(rates[:-2])


def widen(
    measure: Callable[[int], Measured], widths: Sequence[int], time_is_up: Callable[[], bool]
) -> Iterator[Measured]:
    """One row per width, until one fails, widening does not pay any more, or time is up."""
    rates: list[float] = []
    for width in widths:
        if rates and (time_is_up() or past_its_best(rates)):
            return
        row = measure(width)
        yield row
        if row.error:
            return
        rates.append(row.rate)


def best_of(rows: Sequence[Measured]) -> Measured | None:
    """The fastest row; None where each failed."""
    return max((row for row in rows if not row.error), key=lambda row: row.rate, default=None)


def powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How far a network is measured."""

    device: str
    widths: Sequence[int]
    processes: Sequence[int]
    fused_processes: int  # that are fused side by side: 1 on a GPU, one per core on a CPU


def measure_network(name: str, bench: Bench, plan: Plan, time_is_up: Callable[[], bool]) -> Iterator[Measured]:
    """All rows of a network, the plain loop's first."""
    plain = Case(network=name)
    first = bench.measure("plain", plain)
    yield first
    if first.error:
        return
    many = []
    for row in widen(lambda k: bench.measure("processes", plain, k), plan.processes, time_is_up):
        many.append(row)
        yield row
    side_by_side = plan.fused_processes
    fused = []
    for row in widen(
        lambda lanes: bench.measure("fused", replace(plain, lanes=lanes), side_by_side), plan.widths, time_is_up
    ):
        fused.append(row)
        yield row
    auto = bench.measure("auto", replace(plain, choose=True), side_by_side)
    yield replace(auto, rate=rate_of(auto.lanes, [first, *many], fused))
    best = best_of(fused)
    if best is None:
        return
    large = bench.measure("large", replace(plain, times_batch=best.lanes), side_by_side)
    yield replace(large, lanes=best.lanes, rate=large.rate * best.lanes)
    if side_by_side > 1:
        for lanes in (best.lanes, best.lanes * side_by_side):
            yield bench.measure("threads", replace(plain, lanes=lanes, threads=side_by_side))


def rate_of(lanes: int, alone: Sequence[Measured], fused: Sequence[Measured]) -> float:
    """The rate that so many lanes were measured at; 0 where they were not. One lane is the plain loop, in as many
    processes as do best."""
    best = best_of(alone) if lanes == 1 else best_of([row for row in fused if row.lanes == lanes])
    return best.rate if best else 0.0


def summary(rows: Sequence[Measured]) -> dict[str, Any]:
    """What a network comes to. A ratio is None where either side of it could not be measured."""

    def of(kind: Kind) -> list[Measured]:
        return [row for row in rows if row.kind == kind]

    plain, processes = best_of(of("plain")), best_of(of("processes"))
    fused, large, auto = best_of(of("fused")), best_of(of("large")), best_of(of("auto"))
    many = best_of([row for row in (plain, processes) if row is not None])

    def over(row: Measured | None, other: Measured | None) -> float | None:
        return None if row is None or other is None or not other.rate else round(row.rate / other.rate, 3)

    return {
        "plain(steps/s)": plain and round(plain.rate, 1),
        "processes": many and many.processes,
        "processes(steps/s)": many and round(many.rate, 1),
        "lanes": fused and fused.lanes,
        "fused(lane-steps/s)": fused and round(fused.rate, 1),
        "route": fused.route if fused else next((row.error for row in of("fused")), ""),
        "fused_over_plain": over(fused, plain),
        "fused_over_processes": over(fused, many),
        "auto_lanes": auto and auto.lanes,
        "auto_over_processes": over(auto, many) or None,  # not measured with that many
        "share_of_roofline": over(fused, large),
    }


def show_row(row: Measured, plain_rate: float) -> None:
    lanes = str(row.lanes) if row.lanes else "-"
    if row.error:
        print(f"  {row.words:<28}  {lanes:>5}  {row.error}", flush=True)
        return
    memory = f"{row.peak_mib:8,.0f}" if row.peak_mib else f"{'-':>8}"
    print(
        f"  {row.words:<28}  {lanes:>5}  {row.rate:12,.1f}  {row.rate / plain_rate:9.2f}x  {memory}  {row.route}",
        flush=True,
    )


def show_summary(found: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("fused_over_plain", "fused_over_processes", "auto_over_processes", "share_of_roofline")
    print(
        f"{'':<12}  {'plain':>10}  {'processes':>16}  {'fused':>18}  over plain  over processes     auto (L)  roofline"
    )
    for name, told in found.items():
        ratios = [f"{told[column]:.2f}" if told[column] is not None else "-" for column in columns]
        processes = f"{told['processes(steps/s)'] or 0:,.0f} (k={told['processes']})"
        auto = f"{ratios[2]} ({told['auto_lanes']})"
        fused = f"{told['fused(lane-steps/s)']:,.0f} (L={told['lanes']})" if told["lanes"] else "not fused"
        print(
            f"{name:<12}  {told['plain(steps/s)'] or 0:10,.0f}  {processes:>16}  {fused:>18}  {ratios[0]:>10}  "
            f"{ratios[1]:>14}  {auto:>11}  {ratios[3]:>8}"
        )


@contextlib.contextmanager
def multi_process_service() -> Iterator[Mapping[str, str]]:
    """NVIDIA's multi-process service of our own, and the environment in which processes find it.

    Raises:
        SystemExit: it is not installed, or does not start.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        raise SystemExit("--mps needs nvidia-cuda-mps-control, which is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        if subprocess.run([control, "-d"], env=env, check=False).returncode != 0:
            raise SystemExit("nvidia-cuda-mps-control does not start here; leave --mps out")
        try:
            yield env
        finally:
            subprocess.run([control], input="quit\n", text=True, env=env, check=False, timeout=30)


def make_plan(device: str, quick: bool, max_lanes: int | None) -> Plan:
    """How far a device's networks are measured."""
    if device == "cpu":
        cores = os.cpu_count() or 1
        widths = powers(max_lanes or 32)
        return Plan(
            device=device,
            widths=widths[:4:2] if quick else widths,
            processes=[cores] if cores > 1 else [],
            fused_processes=cores,
        )
    widths = powers(max_lanes or 512)
    return Plan(
        device=device,
        widths=widths[:7:2] if quick else widths,
        processes=GPU_PROCESSES[:2] if quick else GPU_PROCESSES,
        fused_processes=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=None, help="default: all of them")
    parser.add_argument("--max-lanes", type=int, default=None, help="512 on a GPU, 32 in each process on a CPU")
    parser.add_argument("--seconds", type=float, default=None, help="of every row; 1.5, with --quick 0.3")
    parser.add_argument("--minutes", type=float, default=8.5, help="in all; each network may take its share")
    parser.add_argument("--quick", action="store_true", help="mlp and cnn, few widths, short rows")
    parser.add_argument("--mps", action="store_true", help="processes share the GPU through NVIDIA's service")
    args = parser.parse_args()
    device = ("cuda" if gpu_names() else "cpu") if args.device == "auto" else args.device
    names = args.networks or (NAMES[:2] if args.quick else NAMES)
    seconds = args.seconds or (0.3 if args.quick else 1.5)
    plan = make_plan(device, args.quick, args.max_lanes)
    deadline = time.monotonic() + 60 * args.minutes
    measured: dict[str, list[Measured]] = {}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(multi_process_service()) if args.mps else os.environ
        env = {**service, "OMP_NUM_THREADS": "1"}
        bench = Bench(device, seconds=seconds, env=env)
        stack.callback(bench.close)
        for n, name in enumerate(names):
            share = (deadline - time.monotonic()) / (len(names) - n)
            until = time.monotonic() + share
            rows = measured[name] = []
            print(f"{name} on {device}")
            print(f"  {'':<28}  {'lanes':>5}  {'lane-steps/s':>12}  {'over plain':>10}  {'MiB':>8}  route")

            for row in measure_network(name, bench, plan, lambda until=until: time.monotonic() > until):  # type: ignore[misc]
                rows.append(row)
                show_row(row, rows[0].rate or 1.0)
    found = {name: summary(rows) for name, rows in measured.items()}
    print()
    show_summary(found)
    keep(
        f"lanes_{device}",
        "steps of all trials together per second, over whole epochs",
        {name: {"summary": found[name], "rows": [asdict(row) for row in rows]} for name, rows in measured.items()},
        packages=["torch", "numpy"],
        device=device,
        seconds=seconds,
        quick=args.quick,
        mps=args.mps,
    )


if __name__ == "__main__":
    main()
