"""TuneFleet: Ray Tune hosts the workers.

A Tune trial is a worker, not a config: Tune places it, restarts it when its process or node dies, and asks the
autoscaler for nodes; it pulls its jobs from the study, an actor pinned to the driver's node. How Tune is held, each
tried: the trainable is a function, since a class is checkpointed at its end and then wants a shared filesystem; `fit`
runs in a thread without Tune's signal handler, since it would swallow Ctrl-C; a Stopper that reads the study ends it,
also with workers pending.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
import time
import uuid
from typing import Any

from hpsearch.errors import ClusterError, HpsearchError
from hpsearch.fleets import Launch, Watch
from hpsearch.fleets.node_folder import sweep
from hpsearch.fleets.placement import asked
from hpsearch.fleets.ray_cluster import (
    NAMESPACE,
    GoneNodes,
    Say,
    await_room,
    be_quiet,
    connect,
    head_address,
    is_closed,
    sweep_nodes,
    this_node,
)
from hpsearch.fleets.roll_call import NodeWatch, RollCall
from hpsearch.fleets.shipping import pack
from hpsearch.fleets.storage_check import check_nodes
from hpsearch.fleets.study_actor import RESTARTED, RESUME, Pulse, StudyActor, answer, is_answered
from hpsearch.fleets.tune_scratch import TuneScratch
from hpsearch.fleets.worker_group import group_backend, host_worker
from hpsearch.journal import JournalTail

LOOK_EVERY_S = 0.03  # at the journal
HEAD_GONE_S = 20.0  # without a word from the cluster's head; Ray itself would end this process after 60
KEEP_S = 60.0  # that a study at its end may take to keep what was pushed
HEADLESS_S = 1.0  # the same when the cluster's head has gone as well
STOP_S = 5.0  # the same when Ray's own processes may have gone: after Ctrl-C or SIGTERM, or without a head
SWEEP_S = 2.0  # that the workers' shared files may take to be let go


class TuneFleet:
    """A fleet of Ray workers: on this machine, or on the cluster at an address."""

    def __init__(
        self, launch: Launch, *, workers: int | None = None, address: str | None = None, say: Say = lambda line: None
    ) -> None:
        """
        Args:
            workers: how many; None: as many as the cluster's nodes hold when it starts.
            address: of a running cluster that this machine is a node of ("auto", "host:port"); None: one of our own.
            say: told, a line each, what a person should know: that workers wait for nodes.
        """
        self._say = say
        self._launch = launch
        self._n_workers = workers
        self._address = address
        self._ended = threading.Event()
        self._fit: threading.Thread | None = None
        self._fit_error: BaseException | None = None
        self._scratch = TuneScratch()
        self._roll_call = RollCall()
        self._nodes = NodeWatch(GoneNodes())
        self._study: Any = None  # a handle of StudyActor; its remote methods have no types to check
        self._connected = False
        self._head = ""  # where the cluster's head listens

    def run(self, watch: Watch) -> None:
        be_quiet()
        import ray

        # Half a second of imports, while Ray's processes start.
        threading.Thread(target=importlib.import_module, args=("ray.tune",), daemon=True).start()
        archive = None
        if self._address is not None:  # other machines have neither the task's folder nor this hpsearch
            shipment, archive = pack(self._launch.folder, self._scratch.path)
            self._launch = dataclasses.replace(self._launch, shipment=shipment)
        connect(self._address, archive)
        self._connected = True
        self._head = head_address()
        tail = JournalTail(self._launch.run_dir)
        earlier = list(tail.new_entries())  # of earlier drivers, which have ended too
        watch(earlier)
        name = f"study-{uuid.uuid4().hex}"
        resources = self._launch.spec.resources
        room = await_room(resources, own_machine=self._address is None, say=self._say)
        n_workers = self._n_workers or room
        if n_workers > room:
            self._say(f"{room} of {n_workers} workers fit; the others wait for room")
        if self._launch.spec.storage is not None:
            checked = check_nodes(self._launch.spec.storage)
            self._launch = dataclasses.replace(self._launch, checked_nodes=checked)
        self._study = (
            ray.remote(StudyActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=2 * n_workers + 8,
                scheduling_strategy=this_node(),
                **RESTARTED,
            )
            .remote(self._launch)
        )
        keep_s = KEEP_S
        try:
            self._fit = threading.Thread(target=self._host, args=(n_workers, name), name="tune", daemon=True)
            self._fit.start()
            self._nodes.start()
            self._follow(tail, watch, earlier[-1].fence if earlier else 0)
        except KeyboardInterrupt:
            keep_s = 0.0  # should a second one come, or the study be gone
            with contextlib.suppress(HpsearchError):
                self._word(self._study.stop.remote("interrupted"), STOP_S)
                keep_s = STOP_S
            raise
        except ClusterError:
            keep_s = STOP_S
            raise
        finally:
            self._ended.set()
            failure = self._close_study(keep_s) if keep_s else None
            watch(list(tail.new_entries()))
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the workers, leave the cluster; a cluster of our own ends with it."""
        self._ended.set()
        self._nodes.stop()
        if self._connected and is_closed(self._head):
            # Ray would wait for the head for a minute; what it left on this machine ends with this process.
            self._connected = False
        if self._fit is not None and self._connected:
            self._fit.join(timeout=STOP_S)
        if self._connected:  # else a Ctrl-C may have come while ray was still being imported
            import ray

            if self._study is not None:
                ray.kill(self._study)
            if self._address is not None:
                sweep_nodes(timeout_s=SWEEP_S)
            ray.shutdown()
            self._connected = False
            if self._address is None:  # the workers have just been killed
                sweep(wait_s=SWEEP_S)
        self._scratch.close()

    def _host(self, n_workers: int, study: str) -> None:
        """Have Tune keep the workers alive until the study has ended; runs in a thread of its own."""
        from ray import tune
        from ray.tune.progress_reporter import TrialProgressCallback

        resources, launch, roll_call = self._launch.spec.resources, self._launch, self._roll_call
        backend = group_backend()  # of this process's environment; a worker's may be another

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

        class Deaths(tune.Callback):
            """Tells the driver of workers' processes that ended, when Tune knows and has begun no other yet."""

            def __init__(self, roll_call: RollCall | None) -> None:
                self._roll_call = roll_call

            def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                if self._roll_call is not None:
                    self._roll_call.died(worker_name(trial.config), time.monotonic())

            def __reduce__(self) -> tuple[type, tuple[None]]:
                return (Deaths, (None,))  # saved as a StudyEnded is

        def worker_name(config: dict[str, Any]) -> str:
            return f"worker-{config['worker']}"

        def work(config: dict[str, Any]) -> None:
            host_worker(study, NAMESPACE, launch, worker_name(config), backend=backend)

        try:
            tune.Tuner(
                tune.with_resources(work, tune.PlacementGroupFactory([dict(asked(resources).host)])),
                param_space={"worker": tune.grid_search(list(range(n_workers)))},  # one Tune trial per worker
                tune_config=tune.TuneConfig(reuse_actors=False),
                run_config=tune.RunConfig(
                    name="workers",
                    storage_path=str(self._scratch.path),
                    verbose=0,
                    callbacks=[Silent(), Deaths(roll_call)],
                    stop=StudyEnded(self._ended),
                    failure_config=tune.FailureConfig(max_failures=-1),
                ),
            ).fit()
        except BaseException as error:
            self._fit_error = error

    def _follow(self, tail: JournalTail, watch: Watch, earlier_fence: int) -> None:
        """Watch the study until it has ended, and over all that it needs: its process, Tune, the head, the workers.

        Raises:
            HpsearchError: it could not be opened.
            ClusterError: something that it needs is gone for good.
        """
        assert self._fit is not None
        pulse = Pulse(self._study)
        while True:
            entries = list(tail.new_entries())
            watch(entries)
            if any(entry.event.type == "ended" and entry.fence > earlier_fence for entry in entries):
                return
            if not self._fit.is_alive():
                answer(self._study.ready.remote(), timeout_s=STOP_S)  # workers go too when a study cannot be read again
                raise ClusterError(
                    f"Ray Tune gave up hosting the workers: {self._fit_error or 'all of them returned'}", hint=RESUME
                )
            if self._nodes.silent_s > HEAD_GONE_S:
                raise ClusterError(f"the head of the Ray cluster has not answered for {HEAD_GONE_S:.0f} s", hint=RESUME)
            pulse.check()
            self._roll_call.take(entries)
            for loss in self._roll_call.losses(self._nodes.dead, time.monotonic()):
                # Not waited for: a study that is being restarted is told when it is back.
                self._study.lost.remote(loss.worker, loss.pid, loss.reason, loss.blame_job)
            time.sleep(LOOK_EVERY_S)

    def _close_study(self, keep_s: float) -> HpsearchError | None:
        """Why the study stopped early; waits until what was pushed is kept, or for as long as it may take."""
        try:
            failure: HpsearchError | None = self._word(self._study.close.remote(), keep_s)
        except HpsearchError as error:
            return error
        return failure

    def _word(self, question: Any, timeout_s: float) -> Any:
        """The study's answer; waited for no longer than makes sense, since all of a cluster may have gone at once.

        Raises:
            HpsearchError: the study's own, or a ClusterError when there is no answer.
        """
        asked_at = time.monotonic()
        while not is_answered(question, within_s=0.1):
            waited_s = time.monotonic() - asked_at
            if waited_s > timeout_s or (waited_s > HEADLESS_S and is_closed(self._head)):
                raise ClusterError("the study's process does not answer", hint=RESUME)
        return answer(question)
