"""A study on a real cluster of hosts that lie on this machine, with faults, against the same study on one node.

    ./scripts/cluster-test                      # all faults, some minutes on two cores
    ./scripts/cluster-test --faults kill        # one node is switched off, another joins
    ./scripts/cluster-test --faults cut         # one node's network falls silent, and comes back
    ./scripts/cluster-test --require            # an error, not a skip, where namespaces are not allowed

Each host is a set of Linux namespaces (tests/namespaces.py): a network, processes and a /tmp of its own, the rest of
the file system read-only. The task lies on the head alone. The study halves synchronously, so that its outcome does
not depend on who worked when: configs, seeds, every number of every curve, the promoted trials and the ensemble must
be those of the undisturbed run on one node. Progress goes to stderr, the table to stdout. Exit code: 0 the same study
each time, or skipped · 1 not · 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpsearch.events import Arrived, Leased, Returned
from hpsearch.journal import FILE_NAME, read_journal
from hpsearch.leases import SHORTEST_FIRST_LEASE_S, SHORTEST_LEASE_S
from hpsearch.state import Entry, StudyState
from tests.namespaces import Host, Network, why_not
from tests.same_study import differences, twice
from tests.tasks import blobs

ROOT = Path(__file__).resolve().parents[1]
JOB_S = 1.0  # that each training job takes at least, so that a fault finds one under way
HOLD = "/tmp/hold"  # while a host has this file, its jobs do not end
FRESH_S = 0.4  # age of a lease, when its node is hit: the job is in its middle
WARM_TRIALS = 4  # with a first result before the fault comes
RUN_S = 300.0  # that a launch may take

LAYERS = """
import torch

def network(width):
    hidden = torch.nn.Linear(4, width)
    return torch.nn.Sequential(hidden, torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(width, 3))
"""

TASK = blobs(
    """
    def model(self, config):
        time.sleep(float(os.environ.get("JOB_S", 0)) if "lr" in config else 0)
        while os.path.exists(HOLD):
            time.sleep(0.05)
        return network(config["width"])
    """,
    # `layers` lies beside this file: the whole folder has to reach the nodes.
    imports=f"import os, time\nHOLD = {HOLD!r}\nfrom layers import network",
)

SPACE = """
name: cluster
task: task.py:Blobs
search: {trials: 18}
parameters:
  lr: {distribution: log_uniform, min: 1e-4, max: 1.0, bounds_from: lr_range}
  optimizer: {values: [adamw, sgd]}
  width: {values: [8, 16]}
lr_range: {seeds: 2, steps: 30}
early_stopping: {type: sha, min_epochs: 1, max_epochs: 9, reduction_factor: 3}
ensemble: {pool: 4, size: 2}
resources: {lanes: 1}
"""

NODES = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(json.dumps({node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}))
"""


def _passes(name: str) -> bool:
    """Whether an environment variable reaches the hosts: nobody's real cluster or logbook, but Ray's patience."""
    return name.startswith("RAY_health_check_") or not name.startswith(("RAY_", "MLFLOW_"))


class Failed(RuntimeError):
    """The test did not come to its end; says where."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    run: str
    what: str
    workers: int
    epochs: int
    again_s: float | None  # from the fault until the node's job was given out again
    wall_s: float
    found: Sequence[str]  # differences and doubles


class Cluster:
    """Ray on several hosts; the first is the head, and the only one that has the project."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.head = network.host()
        self.others: list[Host] = []
        self.node_ids: dict[str, str] = {}  # by address
        token = secrets.token_hex(32)
        self.env = {
            **{name: value for name, value in os.environ.items() if _passes(name)},
            "HOME": "/tmp/home",
            "JOB_S": str(JOB_S),  # inherited by the workers
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name, text in (("layers.py", LAYERS), ("task.py", TASK), ("space.yaml", SPACE)):
            self.head.write(f"/tmp/project/{name}", text)

    def start(self, n_nodes: int) -> None:
        """Ray on the head and on `n_nodes` - 1 further hosts."""
        self._ray(self.head, "--head", "--port=6379", "--include-dashboard=false", "--temp-dir=/tmp/ray")
        self.join(n_nodes - 1)

    def join(self, n_hosts: int = 1) -> list[Host]:
        """More hosts, in the cluster."""
        fresh = [self._network.host() for _ in range(n_hosts)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self._ray(host, f"--address={self.head.address}:6379"), fresh))
        self.others += fresh
        self._look()
        return fresh

    def _look(self) -> None:
        """Learn which node is which host."""
        told = self.head.check(sys.executable, "-c", NODES, env=self.env)
        # Ray may say something after it, of a node that has just gone.
        self.node_ids = json.loads(next(line for line in reversed(told.splitlines()) if line.startswith("{")))
        missing = [host.address for host in self.others if host.address not in self.node_ids]
        if missing:
            raise Failed(f"Ray does not know of {', '.join(missing)}")

    def drop(self, host: Host) -> None:
        """It is no longer one of us."""
        self.others.remove(host)
        self.node_ids.pop(host.address)

    def launch(self, name: str, *arguments: str, job_s: float = JOB_S) -> Run:
        """`hpsearch launch` on the head, in a run directory of its own."""
        return Run(self.head, name, arguments, {**self.env, "JOB_S": str(job_s)})

    def _ray(self, host: Host, *arguments: str) -> None:
        one_worker = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats")
        host.check("ray", "start", f"--node-ip-address={host.address}", *one_worker, *arguments, env=self.env)


class Run:
    """One launch on the head."""

    def __init__(self, head: Host, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._head = head
        self._run_dir = f"/tmp/project/runs/{name}"
        self._began = time.monotonic()
        self._process = head.start(
            *("sh", "-c", 'cd project && exec "$@"', "sh", sys.executable, "-m", "hpsearch"),
            *("launch", "space.yaml", "--run-dir", self._run_dir, "--tracking-uri", "sqlite:////tmp/project/mlflow.db"),
            *arguments,
            env=env,
        )
        self._said: list[str] = []
        self._ended = self._began
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def entries(self) -> list[Entry]:
        """The journal as it stands."""
        with tempfile.TemporaryDirectory() as copy:
            (Path(copy) / FILE_NAME).write_bytes(self._head.read(f"{self._run_dir}/{FILE_NAME}"))
            return read_journal(Path(copy))

    def wait_for(self, what: str, ready: Callable[[list[Entry]], bool], timeout_s: float = RUN_S) -> None:
        """Returns when the journal says so.

        Raises:
            Failed: the launch ended before, or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not ready(self.entries()):
            if self._process.poll() is not None:
                raise Failed(f"the launch ended with {self._process.returncode} before {what}\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"{timeout_s:.0f} s passed without {what}\n{self._last_words()}")
            time.sleep(0.05)

    def end(self) -> tuple[list[Entry], float]:
        """The whole journal, and how long the launch took in seconds.

        Raises:
            Failed: it did not end, or not with 0.
        """
        try:
            code = self._process.wait(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"the launch had not ended after {RUN_S:.0f} s\n{self._last_words()}") from None
        self._reader.join(timeout=10)
        if code:
            raise Failed(f"the launch ended with {code}\n{self._last_words()}")
        return self.entries(), self._ended - self._began

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):  # the pipe is closed with the network
            for line in self._process.stderr:
                self._said.append(line)
        self._ended = time.monotonic()

    def _last_words(self) -> str:
        return "".join(self._said[-25:])


def single(run: Run) -> tuple[StudyState, Row]:
    """The study on one node, undisturbed."""
    entries, wall_s = run.end()
    state = StudyState.of(entries)
    return state, _row("single", "one node, undisturbed", entries, state, None, wall_s)


def kill(cluster: Cluster, reference: StudyState) -> Row:
    """A node is switched off while it holds a job, and another one joins."""
    run = cluster.launch("kill", "--address", "auto")
    host, key = hit(cluster, run)
    say(f"{host.address} holds {key}: switched off")
    at = time.time()  # before: the study may know of it while the last processes end
    host.power_off()
    cluster.drop(host)
    others = [cluster.head, *cluster.others]
    for other in others:
        other.write(HOLD, "")  # to join takes ten seconds and more on a busy machine: work is left for who does
    (fresh,) = cluster.join()
    say(f"{fresh.address} has joined")
    run.wait_for(
        f"a job on {fresh.address}", lambda entries: bool(_leases_on(entries, cluster.node_ids[fresh.address]))
    )
    for other in others:
        other.check("rm", HOLD)
    entries, wall_s = run.end()
    n_jobs = len(_leases_on(entries, cluster.node_ids[fresh.address]))
    what = f"three nodes, one switched off, another one did {n_jobs} jobs"
    return _row("kill", what, entries, reference, _again_s(entries, key, at), wall_s)


def cut(cluster: Cluster, reference: StudyState) -> Row:
    """A node's network falls silent while it holds a job, and comes back when the job was given out again.

    Ray takes a node for dead after 5 questions, 3 s apart, that nobody answers within 10 s each; the study takes a job
    back that gave no sign of life for its lease. Whichever comes first.
    """
    run = cluster.launch("cut", "--address", "auto")
    host, key = hit(cluster, run)
    say(f"{host.address} holds {key}: its network falls silent")
    say(
        f"leases: {SHORTEST_FIRST_LEASE_S:.0f} s or more before a job's first sign of life, then {SHORTEST_LEASE_S:.0f}"
    )
    at = time.time()
    host.unplug()
    run.wait_for(f"{key} given out again", lambda entries: _again_s(entries, key, at) is not None)
    host.plug_in()
    say(f"{key} was given out again; the network is back after {time.time() - at:.0f} s")
    entries, wall_s = run.end()
    cluster.drop(host)
    reason = next(e.event.reason for e in entries if isinstance(e.event, Returned) and e.event.key == key)
    what = f"three nodes, one silent until: {reason}"
    return _row("cut", what, entries, reference, _again_s(entries, key, at), wall_s)


def hit(cluster: Cluster, run: Run) -> tuple[Host, str]:
    """A host other than the head in the middle of a training job, and the job's key; waits for it."""
    hosts = {cluster.node_ids[host.address]: host for host in cluster.others}
    found: list[tuple[Host, str]] = []

    def ready(entries: list[Entry]) -> bool:
        state = StudyState.of(entries)
        if sum(trial.epoch > 0 for trial in state.trials.values()) < WARM_TRIALS:
            return False
        since = time.time() - FRESH_S
        fresh = {entry.event.key for entry in entries if isinstance(entry.event, Leased) and entry.time > since}
        for lease in state.leases.values():
            seat = state.seats.get(lease.worker)
            if lease.key in fresh and lease.trial is not None and seat is not None and seat.node in hosts:
                found.append((hosts[seat.node], lease.key))
        return bool(found)

    run.wait_for("a node other than the head trained a trial", ready)
    return found[0]


def _again_s(entries: Sequence[Entry], key: str, at: float) -> float | None:
    """Seconds from the fault until the job's lease was given to somebody else; None: it was not."""
    returned = [e for e in entries if isinstance(e.event, Returned) and e.event.key == key and e.time > at]
    if not returned:
        return None
    given = [e.time for e in entries if isinstance(e.event, Leased) and e.event.key == key and e.seq > returned[0].seq]
    return given[0] - at if given else None


def _leases_on(entries: Sequence[Entry], node: str) -> list[str]:
    """Keys of the jobs that were given to workers on a node."""
    on_node: dict[str, bool] = {}
    keys = []
    for entry in entries:
        match entry.event:
            case Arrived(worker=worker):
                on_node[worker] = entry.event.node == node
            case Leased(worker=worker, key=key) if on_node.get(worker):
                keys.append(key)
    return keys


def _row(
    run: str, what: str, entries: Sequence[Entry], reference: StudyState, again_s: float | None, wall_s: float
) -> Row:
    state = StudyState.of(entries)
    found = [*differences(reference, state), *twice(entries)]
    if not state.done:
        found.append("the study has not ended well")
    if run != "single" and again_s is None:
        found.append("the fault met no job")
    workers = {(seat.node, seat.pid) for seat in _seats(entries)} or {("", 0)}  # of none: all in one process
    return Row(
        run=run, what=what, workers=len(workers), epochs=state.n_epochs, again_s=again_s, wall_s=wall_s, found=found
    )


def _seats(entries: Sequence[Entry]) -> list[Arrived]:
    return [entry.event for entry in entries if isinstance(entry.event, Arrived)]


def say(text: str) -> None:
    """Progress."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)


def show(rows: Sequence[Row]) -> None:
    """The table."""
    print("{:<7} {:<52} {:>7} {:>6} {:>13} {:>8}  {}".format(*HEADER))
    for row in rows:
        again = "-" if row.again_s is None else f"{row.again_s:.1f}"
        verdict = "yes" if not row.found else f"NO: {len(row.found)} differences"
        verdict = verdict if row.run != "single" or row.found else "-"
        print(f"{row.run:<7} {row.what:<52} {row.workers:>7} {row.epochs:>6} {again:>13} {row.wall_s:>8.1f}  {verdict}")
        for sentence in row.found[:10]:
            print(f"        {sentence}")


HEADER = ("run", "what happened", "workers", "epochs", "job again(s)", "wall(s)", "the same study")
BEGAN = time.monotonic()
FAULTS: dict[str, Callable[[Cluster, StudyState], Row]] = {"kill": kill, "cut": cut}


def test(faults: Sequence[str]) -> list[Row]:
    """The rows of the table; every host is gone when this returns."""
    with Network() as network:
        cluster = Cluster(network)
        say("the study on one node, in one process; meanwhile Ray on three nodes")
        undisturbed = cluster.launch("single", "--fleet", "local", job_s=0.0)
        cluster.start(3)
        reference, row = single(undisturbed)
        rows = [row]
        for fault in faults:
            say(f"{fault}: {(FAULTS[fault].__doc__ or '').splitlines()[0]}")
            rows.append(FAULTS[fault](cluster, reference))
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster-test", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--faults", nargs="+", choices=sorted(FAULTS), default=["kill", "cut"])
    parser.add_argument("--require", action="store_true", help="fail where namespaces are not allowed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return 1 if args.require else 0
    try:
        rows = test(args.faults)
    except Failed as error:
        print(f"cluster-test: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster-test: interrupted; every process and namespace of it has ended", file=sys.stderr)
        return 130
    show(rows)
    return 1 if any(row.found for row in rows) else 0


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
