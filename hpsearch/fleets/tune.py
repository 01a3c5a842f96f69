"""TuneFleet: Ray Tune hosts the workers. The only module that imports ray.

A Tune trial is a worker, not a config: Tune places it, restarts it when its process or node dies, and asks the
autoscaler for nodes; it pulls its jobs from the study, an actor pinned to the driver's node. How Tune is held, each
tried: the trainable is a function, since a class is checkpointed at its end and then wants a shared filesystem; `fit`
runs in a thread without Tune's signal handler, since it would swallow Ctrl-C; a Stopper that reads the study ends it,
also with workers pending.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from hpsearch.errors import ClusterError, HpsearchError, UsageError, internal_error
from hpsearch.fleets import Launch, Watch
from hpsearch.job import Assignment, DataInfo, Result
from hpsearch.journal import JournalTail
from hpsearch.worker import LooksAhead, Worker

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
JOBS_AT_ONCE = 8  # that a worker may hold while they are shorter than a call
LOOK_EVERY_S = 0.03  # at the journal
PING_EVERY_S = 2.0  # whether the study's process is alive
KEEP_S = 60.0  # that a study at its end may take to keep what was pushed
STOP_S = 5.0  # the same after Ctrl-C or SIGTERM, which may have ended Ray's own processes too
REACH_S = 5.0  # to see whether anything listens at an address; ray itself tries for minutes


class TuneFleet:
    """A fleet of Ray workers: on this machine, or on the cluster at an address."""

    def __init__(self, launch: Launch, *, workers: int | None = None, address: str | None = None) -> None:
        """
        Args:
            workers: how many; None: as many as the cluster's cores (or GPUs) hold.
            address: of a running cluster ("auto", "host:port", "ray://host:port"); None: a cluster of our own.
        """
        self._launch = launch
        self._n_workers = workers
        self._address = address
        self._ended = threading.Event()
        self._fit: threading.Thread | None = None
        self._fit_error: BaseException | None = None
        self._scratch = tempfile.mkdtemp(prefix="hpsearch-tune-")
        self._study: Any = None  # a handle of StudyActor; its remote methods have no types to check
        self._connected = False

    def run(self, watch: Watch) -> None:
        for key, value in QUIET.items():  # read when ray is imported
            os.environ.setdefault(key, value)
        import ray

        # Half a second of imports, while Ray's processes start.
        threading.Thread(target=importlib.import_module, args=("ray.tune",), daemon=True).start()
        self._connect()
        tail = JournalTail(self._launch.run_dir)
        earlier = list(tail.new_entries())  # of earlier drivers, which have ended too
        watch(earlier)
        name, namespace = f"study-{uuid.uuid4().hex}", "hpsearch"
        n_workers = self._n_workers or self._room()
        self._check_resources()
        self._study = (
            ray.remote(StudyActor)
            .options(
                name=name,
                namespace=namespace,
                num_cpus=0,
                max_concurrency=2 * n_workers + 8,
                scheduling_strategy=_this_node(),
            )
            .remote(self._launch)
        )
        keep_s = KEEP_S
        try:
            self._fit = threading.Thread(target=self._host, args=(n_workers, name, namespace), name="tune", daemon=True)
            self._fit.start()
            _get(self._study.ready.remote())
            self._follow(tail, watch, earlier[-1].fence if earlier else 0)
        except KeyboardInterrupt:
            keep_s = STOP_S
            with contextlib.suppress(HpsearchError):
                _get(self._study.stop.remote("interrupted"), timeout_s=STOP_S)
            raise
        finally:
            self._ended.set()
            try:
                failure = _get(self._study.close.remote(), timeout_s=keep_s)
            except HpsearchError as error:
                failure = error
            watch(list(tail.new_entries()))
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the workers, leave the cluster; a cluster of our own ends with it."""
        self._ended.set()
        if self._fit is not None:
            self._fit.join(timeout=STOP_S)
        if self._connected:  # else a Ctrl-C may have come while ray was still being imported
            import ray

            if self._study is not None:
                ray.kill(self._study)
            ray.shutdown()
            self._connected = False
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _connect(self) -> None:
        import ray

        # With no address a cluster of our own, or ray would join any that it finds on this host.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "hpsearch"}
        if self._address is None:
            options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        else:
            options |= {"address": self._address}
        try:
            if self._address is not None:
                _knock(self._address)
            sigterm = signal.getsignal(signal.SIGTERM)
            ray.init(**options)
            signal.signal(signal.SIGTERM, sigterm)  # ray's own would end the driver without a word
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            where = f"at {self._address}" if self._address else "on this machine"
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ClusterError(
                f"Ray cannot be reached {where}: {first_line}",
                hint="start the cluster (ray up cluster.yaml), or leave out --address to work on this machine",
            ) from None
        self._connected = True
        for name in ("ray", "ray.tune", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def _room(self) -> int:
        """Workers that the cluster can hold now; at least one, which may wait for a node."""
        import ray

        have, resources = ray.cluster_resources(), self._launch.spec.resources
        room = int(have.get("CPU", 0) // max(resources.cpus, 1e-9))
        if resources.gpus:
            room = min(room, int(have.get("GPU", 0) / resources.gpus))
        return max(1, room)

    def _check_resources(self) -> None:
        """Refuse what one machine can never give; a cluster may bring a node for it."""
        import ray

        if self._address is not None:
            return
        have, resources = ray.cluster_resources(), self._launch.spec.resources
        for name, asked in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if asked > have.get(name, 0):
                raise UsageError(
                    f"a worker asks for {asked:g} {name}, this machine has {have.get(name, 0):g}",
                    hint=f"lower resources.{name.lower()}s in space.yaml, or name a cluster with --address",
                )

    def _host(self, n_workers: int, study: str, namespace: str) -> None:
        """Have Tune keep the workers alive until the study has ended; runs in a thread of its own."""
        from ray import tune
        from ray.tune.progress_reporter import TrialProgressCallback

        resources, launch = self._launch.spec.resources, self._launch

        class StudyEnded(tune.Stopper):
            def __init__(self, ended: threading.Event | None) -> None:
                self._ended = ended

            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return self._ended is not None and self._ended.is_set()

            def __reduce__(self) -> tuple[type, tuple[None]]:
                # Tune saves its stopper for a restore that nobody will ask for; an Event cannot be saved.
                return (StudyEnded, (None,))

        class Silent(TrialProgressCallback):
            def _print(self, msg: str) -> None:
                """Without this, `verbose=0` still tells stdout of each worker that ends."""

        def work(config: dict[str, Any]) -> None:
            work_for(study, namespace, launch, f"worker-{config['worker']}")

        try:
            tune.Tuner(
                tune.with_resources(work, {"cpu": resources.cpus, "gpu": resources.gpus}),
                param_space={"worker": tune.grid_search(list(range(n_workers)))},  # one Tune trial per worker
                tune_config=tune.TuneConfig(reuse_actors=False),
                run_config=tune.RunConfig(
                    name="workers",
                    storage_path=self._scratch,
                    verbose=0,
                    callbacks=[Silent()],
                    stop=StudyEnded(self._ended),
                    failure_config=tune.FailureConfig(max_failures=-1),
                ),
            ).fit()
        except BaseException as error:
            self._fit_error = error

    def _follow(self, tail: JournalTail, watch: Watch, earlier_fence: int) -> None:
        assert self._fit is not None
        pinged = time.monotonic()
        while True:
            entries = list(tail.new_entries())
            watch(entries)
            if any(entry.event.type == "ended" and entry.fence > earlier_fence for entry in entries):
                return
            if not self._fit.is_alive():
                raise ClusterError(
                    f"Ray Tune gave up hosting the workers: {self._fit_error or 'all of them returned'}",
                    hint="hpsearch launch --resume goes on from here",
                )
            if time.monotonic() - pinged > PING_EVERY_S:
                _get(self._study.ready.remote(), timeout_s=60.0)
                pinged = time.monotonic()
            time.sleep(LOOK_EVERY_S)


class StudyActor:
    """The study in a process of its own: the same methods, opened from a launch."""

    def __init__(self, launch: Launch) -> None:
        self._error: HpsearchError | None = None
        try:
            self._study = launch.open_study(background=True)
        except HpsearchError as error:  # raised from `ready`, where the driver can tell it from a lost actor
            self._error = error
        except Exception as error:
            self._error = internal_error(error)

    def ready(self) -> None:
        if self._error is not None:
            raise self._error

    def arriving(self, worker: str) -> None:
        self.ready()
        self._study.arriving(worker)

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        return self._study.hello(worker, info)

    def pull(self, worker: str, slots: int, timeout_s: float) -> Assignment:
        return self._study.pull(worker, slots, timeout_s)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._study.push(worker, results)

    def progress(self, key: str) -> None:
        self._study.progress(key)

    def fetch(self, ref: str) -> bytes:
        return self._study.fetch(ref)

    def broken(self, worker: str, error: HpsearchError) -> None:
        if self._error is None:
            self._study.broken(worker, error)

    def stop(self, reason: str) -> None:
        if self._error is None:
            self._study.stop(reason)

    def close(self) -> HpsearchError | None:
        """Keep what was pushed; why the study stopped early, None when it did not."""
        if self._error is not None:
            return self._error
        self._study.close()
        return self._study.failure


class ActorClient(LooksAhead):
    """The study actor, as a worker sees it. Raises ClusterError when it is gone."""

    def __init__(self, study: Any) -> None:
        self._study = study
        self._ahead: Any = None
        self._unread: list[Any] = []  # answers to pushes, read a few later so that nobody waits for the driver

    def arriving(self, worker: str) -> None:
        _get(self._study.arriving.remote(worker))

    def hello(self, worker: str, info: DataInfo) -> Assignment:
        answer: Assignment = _get(self._study.hello.remote(worker, info))
        return answer

    def pull(self, worker: str, slots: int = 1, timeout_s: float = 0.0) -> Assignment:
        asked, self._ahead = self._ahead, None
        answer: Assignment = _get(asked if asked is not None else self._study.pull.remote(worker, slots, timeout_s))
        return answer

    def look_ahead(self, worker: str, slots: int, timeout_s: float) -> None:
        self._ahead = self._study.pull.remote(worker, slots, timeout_s)

    def push(self, worker: str, results: Sequence[Result]) -> None:
        self._unread.append(self._study.push.remote(worker, results))
        if len(self._unread) > 4:
            _get(self._unread.pop(0))

    def progress(self, key: str) -> None:
        self._study.progress.remote(key)

    def fetch(self, ref: str) -> bytes:
        content: bytes = _get(self._study.fetch.remote(ref))
        return content

    def broken(self, worker: str, error: HpsearchError) -> None:
        _get(self._study.broken.remote(worker, error))


def work_for(study: str, namespace: str, launch: Launch, name: str) -> None:
    """A worker's life, in the process that Tune gave it."""
    import ray

    client = ActorClient(ray.get_actor(study, namespace))
    Worker(name, client, launch.executor, most_at_once=JOBS_AT_ONCE).run()


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at host:port; other forms of an address are ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_S).close()


def _this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)


def _get(ref: Any, timeout_s: float | None = None) -> Any:
    """The answer to a remote call; its own HpsearchError, or ClusterError when the study is gone."""
    import ray

    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        raise (cause if isinstance(cause, HpsearchError) else internal_error(error)) from None
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise ClusterError(
            f"the study's process is gone: {type(error).__name__}", hint="hpsearch launch --resume goes on from here"
        ) from None
