"""TuneFleet: Ray Tune hosts the workers.

A Tune trial is a worker, not a config: Tune places it, restarts it when its process or node dies, and asks the
autoscaler for nodes; it pulls its jobs from the study, an actor pinned to the driver's node. How Tune is held, each
tried: the trainable is a function, since a class is checkpointed at its end and then wants a shared filesystem; `fit`
runs in a thread without Tune's signal handler, since it would swallow Ctrl-C; a Stopper that reads the study ends it,
also with workers pending.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
import threading
import time
import uuid
from typing import Any

from hpsearch.errors import ClusterError, HpsearchError
from hpsearch.fleets import Launch, Watch
from hpsearch.fleets.ray_cluster import NAMESPACE, be_quiet, check_machine, connect, room, this_node
from hpsearch.fleets.study_actor import StudyActor, answer, work_for
from hpsearch.journal import JournalTail

LOOK_EVERY_S = 0.03  # at the journal
PING_EVERY_S = 2.0  # whether the study's process is alive
KEEP_S = 60.0  # that a study at its end may take to keep what was pushed
STOP_S = 5.0  # the same after Ctrl-C or SIGTERM, which may have ended Ray's own processes too


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
        be_quiet()
        import ray

        # Half a second of imports, while Ray's processes start.
        threading.Thread(target=importlib.import_module, args=("ray.tune",), daemon=True).start()
        connect(self._address)
        self._connected = True
        tail = JournalTail(self._launch.run_dir)
        earlier = list(tail.new_entries())  # of earlier drivers, which have ended too
        watch(earlier)
        name = f"study-{uuid.uuid4().hex}"
        resources = self._launch.spec.resources
        n_workers = self._n_workers or room(resources)
        if self._address is None:  # a cluster may bring a node
            check_machine(resources)
        self._study = (
            ray.remote(StudyActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=2 * n_workers + 8,
                scheduling_strategy=this_node(),
            )
            .remote(self._launch)
        )
        keep_s = KEEP_S
        try:
            self._fit = threading.Thread(target=self._host, args=(n_workers, name), name="tune", daemon=True)
            self._fit.start()
            answer(self._study.ready.remote())
            self._follow(tail, watch, earlier[-1].fence if earlier else 0)
        except KeyboardInterrupt:
            keep_s = STOP_S
            with contextlib.suppress(HpsearchError):
                answer(self._study.stop.remote("interrupted"), timeout_s=STOP_S)
            raise
        finally:
            self._ended.set()
            try:
                failure = answer(self._study.close.remote(), timeout_s=keep_s)
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

    def _host(self, n_workers: int, study: str) -> None:
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
            work_for(study, NAMESPACE, launch, f"worker-{config['worker']}")

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
                answer(self._study.ready.remote(), timeout_s=60.0)
                pinged = time.monotonic()
            time.sleep(LOOK_EVERY_S)
