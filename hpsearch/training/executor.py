"""Runs a study's jobs with torch: one worker's data, device and threads.

A job's result depends on the job, the task and its data alone. So a trial that goes on is always rebuilt from its
checkpoint, even where the very model is at hand; only bytes are remembered. The one exception is a user's `fit` that
cannot be paused: its generator is kept, since the alternative is to train the trial from its start again.

What a config or the user's code can cause is an outcome of the job, never an exception.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from hpsearch.errors import DamagedBlob, JournalError, TrialDiverged, UserCodeError
from hpsearch.job import (
    BaselineJob,
    CheckJob,
    Config,
    ConfirmJob,
    DataInfo,
    EpochMetrics,
    EvaluateJob,
    ExportJob,
    FoldJob,
    Job,
    ProbeJob,
    RampJob,
    RebuildJob,
    Result,
    TrainJob,
)
from hpsearch.lane_groups import may_share
from hpsearch.metric_names import NAMED_METRICS
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checkpoint import Checkpoint, pack, unpack
from hpsearch.training.data import StudyData
from hpsearch.training.folds import Folds
from hpsearch.training.group import Group, InStep
from hpsearch.training.lane_host import Lanes
from hpsearch.training.lane_jobs import Interrupted
from hpsearch.training.lanes import Predictor
from hpsearch.training.loop import DefaultTraining, Training, read_settings
from hpsearch.training.measure import split_output
from hpsearch.training.measure_jobs import Measuring, metric_names
from hpsearch.training.memory import MemoryGuard
from hpsearch.training.named_metrics import require_defined, unknown_metric
from hpsearch.training.outcome import Curve, require_continuable
from hpsearch.training.own_loop import OwnTraining
from hpsearch.training.process import borrowed_process, warm_up
from hpsearch.training.ramp_jobs import run_ramp
from hpsearch.training.remembered import Remembered
from hpsearch.training.user_code import describe, frame_told, is_out_of_memory
from hpsearch.training.width_notes import WidthNotes

REMEMBERED_BYTES = 256 << 20  # of checkpoints made here: asking the driver for them costs a journey
LIVE_FITS = 4  # generators of a user's `fit` that cannot be paused; each holds a model
ALIVE_S = 1.0  # between two signs of life within an epoch
NO_EPOCH = -math.inf  # as the best so far: the weights of no epoch are wanted

Fetch = Callable[[str], bytes]
Progress = Callable[[str, int], None]
More = Callable[[Job, int], Sequence[Job]]

T = TypeVar("T")


class TorchExecutor:
    """The jobs of one study on one worker; several trials of one group at once, where that pays."""

    def __init__(
        self,
        task: Task,
        *,
        study_seed: int,
        threads: int = 1,
        device: str = "auto",
        cut_ensemble: bool = True,
        metric: str = "val_loss",
        goal: Literal["minimize", "maximize"] = "minimize",
        shuffle: bool = True,
        lanes: int | None = 1,
        group_sizes: Mapping[str, float] | None = None,
        should_stop: Callable[[], bool] | None = None,
        guard_memory: Callable[[torch.device], MemoryGuard | None] | None = None,
        example: Config | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            task: the user's.
            study_seed: cuts the ensemble split from val.
            threads: of torch on the CPU, while a job runs; results differ in their last bits between one and two.
            device: "auto" (CUDA where there is one, else the CPU), or a torch device.
            cut_ensemble: whether the study chooses an ensemble, and so needs rows of val for it.
            metric: the study's, with its split; decides which epoch of a trial is its best.
            goal: whether that metric is minimised.
            shuffle: whether training rows come in another order each epoch.
            lanes: most trials that share a program; None: as many as are measured to pay.
            group_sizes: trials of each group (`lane_groups`) in the whole study, as far as is known.
            should_stop: asked between epochs; when it says yes, `run` ends without a result for the job at hand.
            example: a config of the study, whose untrained model tells whether the study's metric is one of the task's;
                None: only training will tell.
            guard_memory: gives the guard of a device's memory; None where memory is not shared with others.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.should_stop = should_stop
        self._task = task
        self._study_seed = study_seed
        self._threads = threads
        self._device = torch.device(device)
        self._cut_ensemble = cut_ensemble
        self._metric = metric
        self._sign = 1.0 if goal == "minimize" else -1.0
        self._shuffle = shuffle
        self._loaded: StudyData | None = None
        self._folds: Folds | None = None
        self._remembered = Remembered(REMEMBERED_BYTES)
        self._live: OrderedDict[int, OwnTraining] = OrderedDict()
        self._group: Group | None = None
        self._lanes = Lanes(1 if has_own_fit(task) else lanes, self._device, group_sizes)
        self._guard_memory = guard_memory
        self._example = example
        self._memory: MemoryGuard | None = None
        self._data_folder: Path | None = None

    def share(self, folder: Path) -> None:
        """Share data, and what is measured of lanes, with the other workers of this machine. Before data are loaded."""
        self._data_folder = folder
        self._lanes.share(WidthNotes(folder, setting=f"{self._device} {self._threads}"))

    def join(self, group: Group) -> None:
        """Train in step with the other processes of a group, on its device. Before the data are loaded."""
        self._group = group
        self._device = group.device
        self._remembered = Remembered(0)  # of a trial that goes on, all ranks begin with rank 0's bytes

    def describe(self, config: Config | None = None) -> DataInfo:
        """Loads the data and tells what they are.

        Args:
            config: with one, the metrics of the default loop are found by asking an untrained model about some rows.

        Raises:
            UserCodeError: the task or its data cannot be used, or the study's metric is none of the task's.
            ClusterError: the device's memory is in use by others.
        """
        own = has_own_fit(self._task)
        if self._guard_memory is not None and self._memory is None:
            self._memory = self._guard_memory(self._device)
            if self._memory is not None:
                self._memory.await_room()
        with borrowed_process(self._threads):
            warm_up()  # not after the data, for which it may have to wait until another worker has them
            metrics: tuple[str, ...] = ()
            if config is not None and not own:
                metrics = metric_names(self._task, self._data, config, seed=self._study_seed, device=self._device)
            elif self._example is not None and not own and self._metric != "val_loss":
                metrics = self._metrics_of(self._example)
            return replace(self._data.info, metrics=metrics, resumable=not own)

    def _metrics_of(self, config: Config) -> tuple[str, ...]:
        """The metrics that trials will report; () where an untrained model cannot be asked, which training will tell.

        Raises:
            UserCodeError: the study's metric is none of them.
        """
        bare = copy.copy(self._task)
        bare.metric_names = ()  # those of hpsearch's own may have no value on the few rows that are asked about
        try:
            own = metric_names(bare, self._data, config, seed=self._study_seed, device=self._device)
        except UserCodeError:
            return ()  # may be this config's alone; preflight and trials say it with their own place
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._free_memory()
            return ()
        if self._metric not in own:
            if self._metric.removeprefix("val_") not in NAMED_METRICS:
                raise unknown_metric(self._metric, own, self._data.info.outputs)
            require_defined(self._metric.removeprefix("val_"), self._data.info.outputs)
        return tuple(dict.fromkeys([*own, *(f"val_{name}" for name in self._task.metric_names)]))

    def fills(self, job: Job) -> bool:
        """Whether others would be taken beside this job."""
        return self._group is None and self._lanes.may_take(job)

    def run(self, jobs: Sequence[Job], fetch: Fetch, progress: Progress, more: More | None = None) -> Iterator[Result]:
        """One result per job, in order; those that share a program as each ends.

        Args:
            jobs: of this study.
            fetch: gives a blob by its reference; what it raises is passed on, except that a blob is damaged or gone.
            progress: told (job key, epochs behind the trial) after every epoch, and between batches once a second, of
                the jobs that are worked on; others of this call wait for them.
            more: gives further jobs for free lanes; None: there are none.
        """
        waiting = deque(jobs)
        try:
            while waiting:
                job = waiting.popleft()
                if more is None or not self.fills(job):
                    result = self._run(job, fetch, progress)
                    self._lanes.trained_plainly(job, result, self._n_steps_of)
                    yield result
                    continue
                beside = [job, *(other for other in waiting if may_share(job, other))]
                waiting = deque(other for other in waiting if other not in beside)
                host = _Plain(self, fetch, progress)
                yield from self._lanes.run(beside, host, more)
        except Interrupted:
            return

    def worn(self) -> str:
        """Why this process should make room for another: it keeps the memory of its GPU. "" while it does not."""
        if self._memory is None or self._live:  # a generator that is kept alive keeps its model, and may
            return ""
        return self._memory.judge(self._data.placed_bytes)

    def close(self) -> None:
        """Ends the generators of a user's `fit` that are still alive."""
        while self._live:
            self._live.popitem()[1].close()

    def _run(self, job: Job, fetch: Fetch, progress: Progress) -> Result:
        start = time.perf_counter()
        with borrowed_process(self._threads), self._signs_of_life([job], progress):
            result = self._outcome(job, lambda: self._result(job, fetch, progress))
        if result.outcome == "out_of_memory":
            self._free_memory()
        return replace(result, seconds=time.perf_counter() - start)

    def _outcome(self, job: Job, work: Callable[[], T]) -> T | Result:
        """What some work gives; or the job's result, when it cannot be done."""
        try:
            return work()
        except UserCodeError as error:
            message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
            return Result(
                key=job.key,
                outcome="crashed",
                message=message,
                frame=frame_told(error, type(self._task).model),
                traceback=error.traceback,
            )
        except DamagedBlob as error:  # nobody's fault: the study has it made again, and gives the job out once more
            return Result(key=job.key, outcome="damaged", values={"ref": error.ref}, message=error.why)
        except JournalError as error:
            return Result(key=job.key, outcome="crashed", message=error.message)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Result(key=job.key, outcome="out_of_memory", message=describe(error))

    def _free_memory(self) -> None:
        """Give back all that is not needed to go on: this job is tried again alone, and others are on the machine."""
        with suppress(UserCodeError):  # of a `finally` in the user's generator; what counts is the memory
            self.close()
        self._live.clear()
        self._lanes.forget()
        self._folds = None
        self._remembered.clear()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _result(self, job: Job, fetch: Fetch, progress: Progress) -> Result:
        match job:
            case TrainJob():
                return self._train(job, fetch, progress)
            case RampJob() | ProbeJob():
                return run_ramp(job, self._task, self._data, device=self._device, shuffle=self._shuffle)
            case RebuildJob():
                return self._rebuild(job, fetch, progress)
            case FoldJob():
                return self._fold(job, fetch, progress)
            case ConfirmJob():
                return self._confirm(job, fetch, progress)
            case CheckJob():
                return self._check(job)
            case BaselineJob():
                return self._measuring(fetch).baseline(job)
            case EvaluateJob():
                return self._measuring(fetch).evaluate(job)
            case ExportJob():
                return self._measuring(fetch).export(job)

    # Training

    def _train(self, job: TrainJob, fetch: Fetch, progress: Progress) -> Result:
        steps, training = self._begun(job, fetch)
        with _closed_on_error(training):
            curve = self._train_epochs(job, steps, progress)
            with self._signs_of_life([job], progress, steps.epoch):
                result = curve.result(job, steps, self._data.on_batch)
        self._remember(result)
        if isinstance(training, OwnTraining) and result.outcome == "done" and not training.resumable:
            self._keep_alive(job.trial, training)
        else:
            _close(training)
        return result

    def _remember(self, result: Result) -> None:
        for ref, content in result.blobs.items():
            self._remembered.put(ref, content)

    def _rebuild(self, job: RebuildJob, fetch: Fetch, progress: Progress) -> Result:
        """The weights of a trial's epoch as its training gave them, by training it again."""
        with self._afresh(job, job.epoch, fetch, progress, best=NO_EPOCH) as (curve, steps):
            weights = None if curve.diverged else steps.checkpoint(weights_only=True)
            content = b"" if weights is None else pack(weights, self._data.on_batch)
        if curve.diverged:
            message = f"trained again, {curve.diverged}, as it was not the first time"
            return Result(key=job.key, outcome="diverged", message=message)
        self._remembered.put(job.checkpoint, content)
        return Result(key=job.key, values={"best_checkpoint": job.checkpoint}, blobs={job.checkpoint: content})

    def _confirm(self, job: ConfirmJob, fetch: Fetch, progress: Progress) -> Result:
        """A config trained afresh, its best epoch on val measured on the ensemble split; nothing of it is kept."""
        with self._afresh(job, job.epochs, fetch, progress) as (curve, _):
            pass
        if curve.diverged:
            return Result(key=job.key, outcome="diverged", message=curve.diverged)
        assert curve.best is not None
        row = next(row for row in curve.rows if row.epoch == curve.best.epoch)
        val = {name.removeprefix("val_"): value for name, value in row.metrics.items() if name.startswith("val_")}
        measuring = self._measuring(fetch)
        output = split_output(measuring.model_of(job.config, curve.best), self._data, "ensemble")
        result = measuring.measured(job.key, [output], [1.0], "ensemble", keep=False)
        return replace(result, values={**result.values, "val": val, "epoch": curve.best.epoch})

    def _fold(self, job: FoldJob, fetch: Fetch, progress: Progress) -> Result:
        """A config trained afresh without one fold, and followed on it; of the training itself nothing is kept."""
        if self._folds is None:
            self._folds = Folds(self._data, study_seed=self._study_seed)
        data = self._folds.without(job.fold, folds=job.folds, repeat=job.repeat)
        missing = self._folds.missing_class(data, job.folds)
        try:
            with self._afresh(job, job.epochs, fetch, progress, best=NO_EPOCH, data=data) as (curve, _):
                pass
        except UserCodeError as error:
            if missing:  # the likeliest cause of a metric that has no value, in the search's own splits it had one
                error.message, error.hint = f"{error.message}; {missing}", "write fewer folds under `evaluate`"
            raise
        values = {"n_rows": dict(data.info.n_rows)}
        if curve.diverged:
            rows, why = tuple(curve.rows), f"{curve.diverged}; {missing}" if missing else curve.diverged
            return Result(key=job.key, outcome="diverged", values=values, epochs=rows, message=why)
        return Result(key=job.key, values=values, epochs=tuple(curve.rows))

    @contextmanager
    def _afresh(
        self,
        job: RebuildJob | ConfirmJob | FoldJob,
        epochs: int,
        fetch: Fetch,
        progress: Progress,
        *,
        best: float | None = None,
        data: StudyData | None = None,
    ) -> Iterator[tuple[Curve, Training]]:
        """A job's trial, trained from its start; inside it is where it ended, afterwards it is gone.

        Args:
            best: epochs whose objective is not below it are not wanted.
            data: other rows than the study's own splits.
        """
        fresh = TrainJob(
            key=job.key, trial=job.trial, config=job.config, seed=job.seed, from_epoch=0, to_epoch=epochs, best=best
        )
        self._forget_live(job.trial)
        steps, training = self._begun(fresh, fetch, data)
        with _closed_on_error(training):
            yield self._train_epochs(fresh, steps, progress), steps
        _close(training)

    def _forget_live(self, trial: int) -> None:
        live = self._live.pop(trial, None)
        if live is not None:
            live.close()

    def _begun(self, job: TrainJob, fetch: Fetch, data: StudyData | None = None) -> tuple[Training, Training]:
        """A job's training as its epochs are asked for (in step with a group's other ranks), and this process's own.

        Args:
            data: other rows than the study's own splits.
        """
        if self._group is None:
            training = self._training(job, fetch, data)
            return training, training
        in_step = InStep(self._group, job.key, lambda: self._training(job, fetch, data), self.should_stop)
        return in_step, in_step.training

    def _train_epochs(self, job: TrainJob, training: Training, progress: Progress) -> Curve:
        curve = Curve(objective=job.best)
        while training.epoch < job.to_epoch:
            if self._asked_to_stop(training):
                raise Interrupted
            try:
                with self._signs_of_life([job], progress, training.epoch):
                    row = training.train_epoch()
                value = self._objective(row)
            except TrialDiverged as error:
                curve.diverged = error.message
                break
            progress(job.key, row.epoch)
            if row.epoch <= job.from_epoch:
                continue
            if curve.add(row, value):
                # Of the last epoch no copy is needed: nothing changes the model any more.
                curve.best = training.checkpoint(weights_only=True, copy=row.epoch < job.to_epoch)
        return curve

    def _asked_to_stop(self, training: Training) -> bool:
        if isinstance(training, InStep):
            return training.stop
        return self.should_stop is not None and self.should_stop()

    def _training(self, job: TrainJob, fetch: Fetch, data: StudyData | None = None) -> Training:
        if job.to_epoch <= job.from_epoch:
            raise ValueError(f"{job.key} trains from epoch {job.from_epoch} to {job.to_epoch}")
        live = self._live.pop(job.trial, None)
        if live is not None:
            if live.epoch == job.from_epoch and job.checkpoint is None:
                return live
            live.close()
        checkpoint = None if job.checkpoint is None else self._checkpoint(job.checkpoint, fetch)
        if checkpoint is not None:
            require_continuable(job, checkpoint)
        if has_own_fit(self._task):
            return OwnTraining(
                self._task,
                data or self._data,
                job.config,
                trial=job.trial,
                seed=job.seed,
                device=self._device,
                rank=0 if self._group is None else self._group.rank,
                world_size=1 if self._group is None else self._group.size,
                checkpoint=checkpoint,
            )
        return DefaultTraining(
            self._task,
            data or self._data,
            job.config,
            trial=job.trial,
            seed=job.seed,
            device=self._device,
            shuffle=self._shuffle,
            checkpoint=checkpoint,
        )

    def _keep_alive(self, trial: int, training: OwnTraining) -> None:
        self._live[trial] = training
        if len(self._live) > LIVE_FITS:
            self._live.popitem(last=False)[1].close()

    def _n_steps_of(self, job: TrainJob) -> int:
        """Optimizer steps of one of its epochs."""
        n_train = self._data.n_rows("train")
        return self._data.n_train_batches(read_settings(job.config, n_train=n_train).batch_size)

    def _objective(self, row: EpochMetrics) -> float:
        if self._metric not in row.metrics:
            raise unknown_metric(self._metric, list(row.metrics), self._data.info.outputs)
        return self._sign * row.metrics[self._metric]

    def _check(self, job: CheckJob) -> Result:
        if job.what == "batch":
            from hpsearch.training.checks.batch import run_batch

            return run_batch(job, self._task, self._data, device=self._device, shuffle=self._shuffle)
        from hpsearch.training.checks import run_check

        found = run_check(
            job.what, self._task, self._data, job.config, seed=job.seed, device=self._device, where=job.corner
        )
        return Result(key=job.key, values={"checks": [check.as_json() for check in found]})

    # What is at hand

    def _measuring(self, fetch: Fetch) -> Measuring:
        return Measuring(self._task, self._data, device=self._device, read=lambda ref: self._checkpoint(ref, fetch))

    @property
    def _data(self) -> StudyData:
        if self._loaded is None:
            self._loaded = StudyData.load(
                self._task,
                study_seed=self._study_seed,
                cut_ensemble=self._cut_ensemble,
                device=self._device,
                share=self._data_folder,
            )
        return self._loaded

    def _checkpoint(self, ref: str, fetch: Fetch) -> Checkpoint:
        content = self._remembered.get(ref)
        return unpack(fetch(ref) if content is None else content, ref=ref)

    @contextmanager
    def _signs_of_life(self, jobs: Sequence[Job], progress: Progress, epoch: int = 0) -> Iterator[None]:
        """While inside, every job tells between its batches that it is alive, once a second."""
        data = self._data
        due = time.perf_counter() + ALIVE_S

        def tell() -> None:
            nonlocal due
            now = time.perf_counter()
            if now >= due:
                due = now + ALIVE_S
                for job in jobs:
                    progress(job.key, epoch)

        outer, data.on_batch = data.on_batch, tell
        try:
            yield
        finally:
            data.on_batch = outer


class _Plain:
    """The executor to its lanes (`lane_host.Plain`)."""

    def __init__(self, executor: TorchExecutor, fetch: Fetch, progress: Progress) -> None:
        self._executor = executor
        self._fetch = fetch
        self._progress = progress

    def begin(self, job: TrainJob) -> DefaultTraining | Result:
        def begun() -> DefaultTraining:
            training = self._executor._training(job, self._fetch)
            assert isinstance(training, DefaultTraining)
            return training

        with borrowed_process(self._executor._threads):
            return self._executor._outcome(job, begun)

    def begin_ramp(self, job: RampJob) -> DefaultTraining | Result:
        def begun() -> DefaultTraining:
            return DefaultTraining(
                self._executor._task,
                self._executor._data,
                {**job.config, "lr": job.lr_min},
                trial=0,
                seed=job.seed,
                device=self._executor._device,
                shuffle=self._executor._shuffle,
            )

        with borrowed_process(self._executor._threads):
            return self._executor._outcome(job, begun)

    def begin_predictor(self, job: EvaluateJob) -> Predictor | Result:
        measuring = self._executor._measuring(self._fetch)
        return self._executor._outcome(job, lambda: measuring.predictor(job.members[0]))

    def measured(self, job: EvaluateJob, output: Tensor, target: Tensor) -> Result:
        measuring, given, keep = self._executor._measuring(self._fetch), [(output, target)], job.keep_predictions
        return self._executor._outcome(job, lambda: measuring.measured(job.key, given, [1.0], job.split, keep=keep))

    def alone(self, job: Job) -> Result:
        return self._executor._run(job, self._fetch, self._progress)

    def objective(self, row: EpochMetrics) -> float:
        return self._executor._objective(row)

    def told(self, job: TrainJob, epoch: int) -> None:
        self._progress(job.key, epoch)

    @contextmanager
    def at_work(self, jobs: Sequence[Job]) -> Iterator[None]:
        with borrowed_process(self._executor._threads), self._executor._signs_of_life(jobs, self._progress):
            yield

    def stopped(self) -> bool:
        return self._executor.should_stop is not None and self._executor.should_stop()

    def result(self, job: TrainJob, curve: Curve, training: DefaultTraining) -> Result:
        with self.at_work([job]):
            alive = self._executor._data.on_batch
            return self._executor._outcome(job, lambda: curve.result(job, training, alive))

    def remember(self, result: Result) -> None:
        self._executor._remember(result)

    def free_memory(self) -> None:
        self._executor._free_memory()


@contextmanager
def _closed_on_error(training: Training) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _close(training, quietly=True)
        raise


def _close(training: Training, *, quietly: bool = False) -> None:
    """Ends a user's generator; `quietly` when an error is on its way already, which a second one would hide."""
    if not isinstance(training, OwnTraining):
        return
    try:
        training.close()
    except UserCodeError:
        if not quietly:
            raise
