"""Runs a study's jobs with torch: one worker's data, device and threads.

A job's result depends on the job, the task and its data alone. So a trial that goes on is always rebuilt from its
checkpoint, even where the very model is at hand; only bytes are remembered. The one exception is a user's `fit` that
cannot be paused: its generator is kept, since the alternative is to train the trial from its start again.

What a config or the user's code can cause is an outcome of the job, never an exception.
"""

from __future__ import annotations

import gc
import hashlib
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

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
    Member,
    ProbeJob,
    RampJob,
    RebuildJob,
    Result,
    SplitName,
    TrainJob,
)
from hpsearch.lane_groups import may_share
from hpsearch.lr_curve import ramp_lrs
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checkpoint import Checkpoint, load_weights, pack, unpack
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.folds import Folds
from hpsearch.training.group import Group, InStep
from hpsearch.training.lane_host import Lanes
from hpsearch.training.lane_jobs import Interrupted
from hpsearch.training.lanes import Predictor
from hpsearch.training.loop import (
    DefaultTraining,
    Training,
    augmentation,
    build_model,
    build_optimizer,
    checked_loss,
    read_settings,
    training_loss,
)
from hpsearch.training.measure import (
    mean_prediction,
    output_metrics,
    output_of,
    prediction_of,
    row_scores,
    split_output,
)
from hpsearch.training.memory import MemoryGuard
from hpsearch.training.outcome import Curve, require_continuable
from hpsearch.training.own_loop import OwnTraining
from hpsearch.training.precision import in_float32
from hpsearch.training.ramp import ramp_losses
from hpsearch.training.seeding import seed_all, seeded
from hpsearch.training.user_code import describe, frame_of, is_out_of_memory, user_code

REMEMBERED_BYTES = 256 << 20  # of checkpoints made here: asking the driver for them costs a journey
LIVE_FITS = 4  # generators of a user's `fit` that cannot be paused; each holds a model
EXPORT_ROWS = 16  # real rows that an exported graph is compared on
ALIVE_S = 1.0  # between two signs of life within an epoch

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
        should_stop: Callable[[], bool] | None = None,
        guard_memory: Callable[[torch.device], MemoryGuard | None] | None = None,
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
            should_stop: asked between epochs; when it says yes, `run` ends without a result for the job at hand.
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
        self._remembered = _Remembered(REMEMBERED_BYTES)
        self._live: OrderedDict[int, OwnTraining] = OrderedDict()
        self._group: Group | None = None
        self._lanes = Lanes(1 if has_own_fit(task) else lanes, self._device)
        self._guard_memory = guard_memory
        self._memory: MemoryGuard | None = None
        self._data_folder: Path | None = None

    def share_data(self, folder: Path) -> None:
        """Share the data with the other workers of this machine through a folder. Before the data are loaded."""
        self._data_folder = folder

    def join(self, group: Group) -> None:
        """Train in step with the other processes of a group, on its device. Before the data are loaded."""
        self._group = group
        self._device = group.device
        self._remembered = _Remembered(0)  # of a trial that goes on, all ranks begin with rank 0's bytes

    def describe(self, config: Config | None = None) -> DataInfo:
        """Loads the data and tells what they are.

        Args:
            config: with one, the metrics of the default loop are found by asking an untrained model about some rows.

        Raises:
            UserCodeError: the task or its data cannot be used.
            ClusterError: the device's memory is in use by others.
        """
        own = has_own_fit(self._task)
        if self._guard_memory is not None and self._memory is None:
            self._memory = self._guard_memory(self._device)
            if self._memory is not None:
                self._memory.await_room()
        with self._borrowed_process():
            metrics = () if config is None or own else self._metric_names(config)
            _warm_up()
            return replace(self._data.info, metrics=metrics, resumable=not own)

    def fills(self, job: Job) -> bool:
        """Whether others would be taken beside this job."""
        return self._group is None and self._lanes.may_take(job)

    def run(self, jobs: Sequence[Job], fetch: Fetch, progress: Progress, more: More | None = None) -> Iterator[Result]:
        """One result per job, in order; those that share a program as each ends.

        Args:
            jobs: of this study.
            fetch: gives a blob by its reference; what it raises is passed on, except that a blob is damaged or gone.
            progress: told (job key, epochs behind the trial) after every epoch, and between batches once a second.
            more: gives further jobs for free lanes; None: there are none.
        """
        waiting = deque(jobs)
        try:
            while waiting:
                job = waiting.popleft()
                if more is None or not self.fills(job):
                    result = self._run(job, fetch, progress)
                    self._lanes.trained_plainly(job, result.seconds)
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
        with self._borrowed_process(), self._signs_of_life([job], progress):
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
                key=job.key, outcome="crashed", message=message, frame=self._frame(error), traceback=error.traceback
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

    def _frame(self, error: UserCodeError) -> str:
        """The user's frame; where only torch's layers stand in the traceback, the method that put them together."""
        name = error.frame.split(":")[0]
        places = [line for line in error.traceback.splitlines() if line.strip().startswith('File "') and name in line]
        if places and all("/torch/" in place for place in places):
            return frame_of(type(self._task).model)
        return error.frame

    def _result(self, job: Job, fetch: Fetch, progress: Progress) -> Result:
        match job:
            case TrainJob():
                return self._train(job, fetch, progress)
            case RampJob():
                lrs = ramp_lrs(job.lr_min, job.lr_max, job.steps).tolist()
                # A task's own optimizer() or model() may read the rate: it is there, and the ramp scales it.
                return self._ramp(job, {**job.config, "lr": job.lr_min}, lrs, reference=job.lr_min)
            case ProbeJob():
                return self._ramp(job, job.config, None, reference=None)
            case RebuildJob():
                return self._rebuild(job, fetch, progress)
            case FoldJob():
                return self._fold(job, fetch, progress)
            case ConfirmJob():
                return self._confirm(job, fetch, progress)
            case CheckJob():
                return self._check(job)
            case BaselineJob():
                return self._baseline(job)
            case EvaluateJob():
                return self._evaluate(job, fetch)
            case ExportJob():
                return self._export(job, fetch)

    # Training

    def _train(self, job: TrainJob, fetch: Fetch, progress: Progress) -> Result:
        steps, training = self._begun(job, fetch)
        try:
            curve = self._train_epochs(job, steps, progress)
            with self._signs_of_life([job], progress, steps.epoch):
                result = curve.result(job, steps, self._data.on_batch)
        except BaseException:
            _close(training, quietly=True)
            raise
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
        self._forget_live(job.trial)
        again = TrainJob(
            key=job.key,
            trial=job.trial,
            config=job.config,
            seed=job.seed,
            from_epoch=0,
            to_epoch=job.epoch,
            best=-math.inf,  # no other epoch is wanted
        )
        steps, training = self._begun(again, fetch)
        try:
            curve = self._train_epochs(again, steps, progress)
            weights = None if curve.diverged else steps.checkpoint(weights_only=True)
            content = b"" if weights is None else pack(weights, self._data.on_batch)
        except BaseException:
            _close(training, quietly=True)
            raise
        _close(training)
        if curve.diverged:
            message = f"trained again, {curve.diverged}, as it was not the first time"
            return Result(key=job.key, outcome="diverged", message=message)
        self._remembered.put(job.checkpoint, content)
        return Result(key=job.key, values={"best_checkpoint": job.checkpoint}, blobs={job.checkpoint: content})

    def _confirm(self, job: ConfirmJob, fetch: Fetch, progress: Progress) -> Result:
        """A config trained afresh, its best epoch on val measured on the ensemble split; nothing of it is kept."""
        fresh = TrainJob(
            key=job.key, trial=job.trial, config=job.config, seed=job.seed, from_epoch=0, to_epoch=job.epochs
        )
        self._forget_live(job.trial)
        steps, training = self._begun(fresh, fetch)
        try:
            curve = self._train_epochs(fresh, steps, progress)
        except BaseException:
            _close(training, quietly=True)
            raise
        _close(training)
        if curve.diverged:
            return Result(key=job.key, outcome="diverged", message=curve.diverged)
        assert curve.best is not None
        row = next(row for row in curve.rows if row.epoch == curve.best.epoch)
        val = {name.removeprefix("val_"): value for name, value in row.metrics.items() if name.startswith("val_")}
        model = self._model_of(job.config, curve.best)
        result = self._measured(job.key, [split_output(model, self._data, "ensemble")], [1.0], "ensemble", keep=False)
        return replace(result, values={**result.values, "val": val, "epoch": curve.best.epoch})

    def _fold(self, job: FoldJob, fetch: Fetch, progress: Progress) -> Result:
        """A config trained afresh without one fold, and followed on it; of the training itself nothing is kept."""
        if self._folds is None:
            self._folds = Folds(self._data, study_seed=self._study_seed)
        data = self._folds.without(job.fold, folds=job.folds, repeat=job.repeat)
        fresh = TrainJob(
            key=job.key,
            trial=job.trial,
            config=job.config,
            seed=job.seed,
            from_epoch=0,
            to_epoch=job.epochs,
            best=-math.inf,  # no epoch's weights are wanted
        )
        self._forget_live(job.trial)
        steps, training = self._begun(fresh, fetch, data)
        try:
            curve = self._train_epochs(fresh, steps, progress)
        except BaseException:
            _close(training, quietly=True)
            raise
        _close(training)
        values = {"n_rows": dict(data.info.n_rows)}
        if curve.diverged:
            rows = tuple(curve.rows)
            return Result(key=job.key, outcome="diverged", values=values, epochs=rows, message=curve.diverged)
        return Result(key=job.key, values=values, epochs=tuple(curve.rows))

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

    def _objective(self, row: EpochMetrics) -> float:
        if self._metric not in row.metrics:
            raise UserCodeError(
                f"the study's metric `{self._metric}` is not among those of the task (known: {', '.join(row.metrics)})",
                hint="give it in Task.metrics(), or name one of these, and its goal, under `metric` in space.yaml",
            )
        return self._sign * row.metrics[self._metric]

    # LR range

    def _ramp(
        self, job: RampJob | ProbeJob, config: Config, lrs: list[float] | None, *, reference: float | None
    ) -> Result:
        """A ramp, or without `lrs` the same number of steps at the optimizer's own rates."""
        n_train = self._data.n_rows("train")
        settings = read_settings(config, n_train=n_train)
        model = build_model(self._task, config, self._data, seed=job.seed, device=self._device)
        optimizer = build_optimizer(self._task, model, config)
        loss_of = training_loss(self._task, self._data.info.outputs, settings.label_smoothing)
        if lrs is None:
            # A reference equal to the rates leaves each group its own.
            lrs, reference = [1.0] * job.steps, 1.0
        with seeded(epoch_seed(job.seed, 0, "ramp"), self._device), user_code("training"):
            losses = ramp_losses(
                model,
                optimizer,
                self._endless_batches(settings.batch_size, job.seed),
                checked_loss(self._task, self._data, loss_of),
                lrs,
                reference=reference,
                grad_clip_norm=settings.grad_clip_norm,
            )
        epochs = len(losses) * settings.batch_size / n_train
        return Result(key=job.key, values={"losses": losses, "batch_size": settings.batch_size, "epochs": epochs})

    def _endless_batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch after another, seeded as a trial's epochs are."""
        epoch = 0
        while True:
            epoch += 1
            seed_all(epoch_seed(seed, epoch, "train"), self._device)
            yield from self._data.train_batches(
                batch_size=batch_size,
                seed=seed,
                epoch=epoch,
                shuffle=self._shuffle,
                augment=augmentation(self._task),
            )

    # Prediction

    def _check(self, job: CheckJob) -> Result:
        from hpsearch.training.checks import run_check

        found = run_check(
            job.what, self._task, self._data, job.config, seed=job.seed, device=self._device, where=job.corner
        )
        return Result(key=job.key, values={"checks": [check.as_json() for check in found]})

    def _baseline(self, job: BaselineJob) -> Result:
        from hpsearch.training.baselines import Skipped, measure_baseline

        try:
            measured = measure_baseline(job.name, self._task, self._data, seed=job.seed)
        except Skipped as reason:
            return Result(key=job.key, outcome="unusable", message=str(reason))
        refs = {split: f"predictions/{_file_name(job.key)}-{split}-rows.safetensors" for split in measured}
        return Result(
            key=job.key,
            values={"metrics": {split: metrics for split, (metrics, _) in measured.items()}, "row_scores": refs},
            blobs={refs[split]: save_tensors(rows) for split, (_, rows) in measured.items()},
        )

    def _evaluate(self, job: EvaluateJob, fetch: Fetch) -> Result:
        if job.split not in self._data.info.n_rows:
            raise UserCodeError(f"the task has no {job.split} split", hint="give one in Task.data()")
        outputs = [split_output(self._member(member, fetch), self._data, job.split) for member in job.members]
        weights = [member.weight for member in job.members]
        return self._measured(job.key, outputs, weights, job.split, keep=job.keep_predictions)

    def _measured(
        self,
        key: str,
        given: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[float],
        split: SplitName,
        *,
        keep: bool,
    ) -> Result:
        """What some models' outputs, weighted, are worth on a split; `given` are (output, target) of each."""
        outputs, target = self._data.info.outputs, given[0][1]
        predictions = [prediction_of(output, outputs) for output, _ in given]
        if len(given) == 1:
            # A single model keeps its own output, so that its metrics are those of its training to the bit.
            prediction, output = predictions[0], given[0][0]
        else:
            prediction = mean_prediction(predictions, weights)
            output = output_of(prediction, outputs)
        metrics = output_metrics(self._task, output, target)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not bad and not bool(torch.isfinite(prediction).all()):
            return Result(key=key, outcome="diverged", message=f"predictions of the {split} split are not finite")
        if bad:
            return Result(key=key, outcome="diverged", message=f"{split}_{bad[0]} is {metrics[bad[0]]}")
        stem = f"predictions/{_file_name(key)}"
        with user_code("loss()"):
            rows = row_scores(self._task, outputs, output, target)
        blobs = {f"{stem}-rows.safetensors": save_tensors(rows)}
        refs: dict[str, str | None] = {"predictions": None, "targets": None}
        if keep:
            refs = {"predictions": f"{stem}.safetensors", "targets": f"predictions/targets-{split}.safetensors"}
            blobs[f"{stem}.safetensors"] = save_tensors({"predictions": prediction.cpu().contiguous()})
            blobs[f"predictions/targets-{split}.safetensors"] = save_tensors({"targets": target.cpu().contiguous()})
        values = {"metrics": metrics, "n_rows": len(target), **refs, "row_scores": f"{stem}-rows.safetensors"}
        return Result(key=key, values=values, blobs=blobs)

    def _export(self, job: ExportJob, fetch: Fetch) -> Result:
        from hpsearch.training.export import export_members  # onnx takes a second to import

        models = {member.trial: (in_float32(self._member(member, fetch)), member.config) for member in job.members}
        inputs, _ = next(self._data.batches("train", batch_size=EXPORT_ROWS))
        example = inputs if len(inputs) > 1 else torch.cat([inputs, inputs])
        with user_code("model.forward()"):
            values, blobs = export_members(models, example)
        return Result(key=job.key, values=values, blobs=blobs)

    def _member(self, member: Member, fetch: Fetch) -> nn.Module:
        return self._model_of(member.config, self._checkpoint(member.checkpoint, fetch))

    def _model_of(self, config: Config, checkpoint: Checkpoint) -> nn.Module:
        model = build_model(self._task, config, self._data, seed=checkpoint.seed, device=self._device)
        load_weights(model, checkpoint)
        return model.eval()

    # What is at hand

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

    def _metric_names(self, config: Config) -> tuple[str, ...]:
        model = build_model(self._task, config, self._data, seed=self._study_seed, device=self._device).eval()
        inputs, target = next(self._data.batches("val", batch_size=16))
        with torch.no_grad(), user_code("model.forward()"):
            output = model(inputs)
        return ("train_loss", *(f"val_{name}" for name in output_metrics(self._task, output, target)))

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

    @contextmanager
    def _borrowed_process(self) -> Iterator[None]:
        """The process as results depend on it: threads, and kernels that repeat to the bit. Put back at the end."""
        threads = torch.get_num_threads()
        cudnn = torch.backends.cudnn
        deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
        torch.set_num_threads(self._threads)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


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

        with self._executor._borrowed_process():
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

        with self._executor._borrowed_process():
            return self._executor._outcome(job, begun)

    def begin_predictor(self, job: EvaluateJob) -> Predictor | Result:
        executor = self._executor

        def begun() -> Predictor:
            model = executor._member(job.members[0], self._fetch)
            return Predictor(model=model, task=executor._task, data=executor._data, device=executor._device)

        return executor._outcome(job, begun)

    def measured(self, job: EvaluateJob, output: Tensor, target: Tensor) -> Result:
        given, keep = [(output, target)], job.keep_predictions
        return self._executor._outcome(
            job, lambda: self._executor._measured(job.key, given, [1.0], job.split, keep=keep)
        )

    def alone(self, job: Job, waiting: Sequence[Job] = ()) -> Result:
        def progress(key: str, epoch: int) -> None:
            self._progress(key, epoch)
            for other in waiting:
                self._progress(other.key, 0)

        return self._executor._run(job, self._fetch, progress)

    def objective(self, row: EpochMetrics) -> float:
        return self._executor._objective(row)

    def told(self, job: TrainJob, epoch: int) -> None:
        self._progress(job.key, epoch)

    @contextmanager
    def at_work(self, jobs: Sequence[Job]) -> Iterator[None]:
        with self._executor._borrowed_process(), self._executor._signs_of_life(jobs, self._progress):
            yield

    def stopped(self) -> bool:
        return self._executor.should_stop is not None and self._executor.should_stop()

    def remember(self, result: Result) -> None:
        self._executor._remember(result)

    def free_memory(self) -> None:
        self._executor._free_memory()


def _warm_up() -> None:
    """One step of a network that nobody wants: torch loads what its optimizers need, a second, with the first."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.zeros(2, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _close(training: Training, *, quietly: bool = False) -> None:
    """Ends a user's generator; `quietly` when an error is on its way already, which a second one would hide."""
    if not isinstance(training, OwnTraining):
        return
    try:
        training.close()
    except UserCodeError:
        if not quietly:
            raise


def _file_name(key: str) -> str:
    """A job's key as the name of a file; long ones are cut and told apart by a digest.

    >>> _file_name("evaluate/test/17*0.75+3*0.25")
    'evaluate-test-17x0.75+3x0.25'
    """
    name = re.sub(r"[^\w.+=-]", "-", key.replace("*", "x"), flags=re.ASCII)
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


class _Remembered:
    """The most recent blobs, as many as fit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._blobs: OrderedDict[str, bytes] = OrderedDict()

    def put(self, ref: str, content: bytes) -> None:
        self._n_bytes += len(content) - len(self._blobs.pop(ref, b""))
        self._blobs[ref] = content
        while self._n_bytes > self._max_bytes:
            _, dropped = self._blobs.popitem(last=False)
            self._n_bytes -= len(dropped)

    def clear(self) -> None:
        self._blobs.clear()
        self._n_bytes = 0

    def get(self, ref: str) -> bytes | None:
        content = self._blobs.get(ref)
        if content is not None:
            self._blobs.move_to_end(ref)
        return content
