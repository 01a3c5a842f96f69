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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

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
    Job,
    Member,
    ProbeJob,
    RampJob,
    RebuildJob,
    Result,
    SplitName,
    TrainJob,
)
from hpsearch.lr_curve import ramp_lrs
from hpsearch.task import Task, has_own_fit
from hpsearch.training.checkpoint import Checkpoint, load_weights, pack, unpack
from hpsearch.training.data import StudyData, epoch_seed
from hpsearch.training.group import Group, InStep
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
from hpsearch.training.own_loop import OwnTraining
from hpsearch.training.ramp import ramp_losses
from hpsearch.training.seeding import seed_all, seeded
from hpsearch.training.user_code import describe, frame_of, is_out_of_memory, user_code

REMEMBERED_BYTES = 256 << 20  # of checkpoints made here: asking the driver for them costs a journey
LIVE_FITS = 4  # generators of a user's `fit` that cannot be paused; each holds a model
EXPORT_ROWS = 16  # real rows that an exported graph is compared on
ALIVE_S = 1.0  # between two signs of life within an epoch

Fetch = Callable[[str], bytes]
Progress = Callable[[str, int], None]


class Interrupted(Exception):
    """The worker was asked to stop between two epochs; the job has no result and will be given out again."""


class TorchExecutor:
    """The jobs of one study on one worker; several at once are run one after another."""

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
        self._remembered = _Remembered(REMEMBERED_BYTES)
        self._live: OrderedDict[int, OwnTraining] = OrderedDict()
        self._group: Group | None = None
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

    def run(self, jobs: Sequence[Job], fetch: Fetch, progress: Progress) -> Iterator[Result]:
        """One result per job, in order.

        Args:
            jobs: of this study.
            fetch: gives a blob by its reference; what it raises is passed on, except that a blob is damaged or gone.
            progress: told (job key, epochs behind the trial) after every epoch, and between batches once a second.
        """
        for job in jobs:
            try:
                result = self._run(job, fetch, progress)
            except Interrupted:
                return
            yield result

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
        try:
            with self._borrowed_process(), self._signs_of_life(job, progress):
                result = self._result(job, fetch, progress)
        except UserCodeError as error:
            message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
            result = Result(
                key=job.key, outcome="crashed", message=message, frame=self._frame(error), traceback=error.traceback
            )
        except DamagedBlob as error:  # nobody's fault: the study has it made again, and gives the job out once more
            result = Result(key=job.key, outcome="damaged", values={"ref": error.ref}, message=error.why)
        except JournalError as error:
            result = Result(key=job.key, outcome="crashed", message=error.message)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result = Result(key=job.key, outcome="out_of_memory", message=describe(error))
        if result.outcome == "out_of_memory":
            self._free_memory()
        return replace(result, seconds=time.perf_counter() - start)

    def _free_memory(self) -> None:
        """Give back all that is not needed to go on: this job is tried again alone, and others are on the machine."""
        with suppress(UserCodeError):  # of a `finally` in the user's generator; what counts is the memory
            self.close()
        self._live.clear()
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
            result = _diverged(job, steps, curve) if curve.diverged else _trained(job, steps, curve)
        except BaseException:
            _close(training, quietly=True)
            raise
        for ref, content in result.blobs.items():
            self._remembered.put(ref, content)
        if isinstance(training, OwnTraining) and result.outcome == "done" and not training.resumable:
            self._keep_alive(job.trial, training)
        else:
            _close(training)
        return result

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
            content = b"" if curve.diverged else pack(steps.checkpoint(weights_only=True))
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

    def _forget_live(self, trial: int) -> None:
        live = self._live.pop(trial, None)
        if live is not None:
            live.close()

    def _begun(self, job: TrainJob, fetch: Fetch) -> tuple[Training, Training]:
        """A job's training as its epochs are asked for (in step with a group's other ranks), and this process's own."""
        if self._group is None:
            training = self._training(job, fetch)
            return training, training
        in_step = InStep(self._group, job.key, lambda: self._training(job, fetch), self.should_stop)
        return in_step, in_step.training

    def _train_epochs(self, job: TrainJob, training: Training, progress: Progress) -> _Curve:
        curve = _Curve(objective=job.best)
        while training.epoch < job.to_epoch:
            if self._asked_to_stop(training):
                raise Interrupted
            try:
                with self._signs_of_life(job, progress, training.epoch):
                    row = training.train_epoch()
                value = self._objective(row)
            except TrialDiverged as error:
                curve.diverged = error.message
                break
            progress(job.key, row.epoch)
            if row.epoch <= job.from_epoch:
                continue
            curve.rows.append(row)
            if curve.objective is None or value < curve.objective:
                curve.objective = value
                # Of the last epoch no copy is needed: nothing changes the model any more.
                curve.best = training.checkpoint(weights_only=True, copy=row.epoch < job.to_epoch)
        return curve

    def _asked_to_stop(self, training: Training) -> bool:
        if isinstance(training, InStep):
            return training.stop
        return self.should_stop is not None and self.should_stop()

    def _training(self, job: TrainJob, fetch: Fetch) -> Training:
        if job.to_epoch <= job.from_epoch:
            raise ValueError(f"{job.key} trains from epoch {job.from_epoch} to {job.to_epoch}")
        live = self._live.pop(job.trial, None)
        if live is not None:
            if live.epoch == job.from_epoch and job.checkpoint is None:
                return live
            live.close()
        checkpoint = None if job.checkpoint is None else self._checkpoint(job.checkpoint, fetch)
        if checkpoint is not None:
            _require_continuable(job, checkpoint)
        if has_own_fit(self._task):
            return OwnTraining(
                self._task,
                self._data,
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
            self._data,
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

        models = {member.trial: (self._member(member, fetch), member.config) for member in job.members}
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
    def _signs_of_life(self, job: Job, progress: Progress, epoch: int = 0) -> Iterator[None]:
        """While inside, every job tells between its batches that it is alive, once a second."""
        data = self._data
        due = time.perf_counter() + ALIVE_S

        def tell() -> None:
            nonlocal due
            now = time.perf_counter()
            if now >= due:
                due = now + ALIVE_S
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


@dataclass(kw_only=True)
class _Curve:
    """What a job's epochs gave so far."""

    objective: float | None  # minimised; of the best epoch, also of earlier jobs
    rows: list[EpochMetrics] = field(default_factory=list)
    best: Checkpoint | None = None  # weights of the best epoch, when it is one of this job's
    diverged: str = ""


def _warm_up() -> None:
    """One step of a network that nobody wants: torch loads what its optimizers need, a second, with the first."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.zeros(2, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint_ref(trial: int, epoch: int, *, best: bool = False) -> str:
    """Where a checkpoint is kept.

    >>> checkpoint_ref(17, 27), checkpoint_ref(17, 5, best=True)
    ('checkpoints/trial-0017-e0027.safetensors', 'checkpoints/trial-0017-best-e0005.safetensors')
    """
    return f"checkpoints/trial-{trial:04d}-{'best-' if best else ''}e{epoch:04d}.safetensors"


def _trained(job: TrainJob, training: Training, curve: _Curve) -> Result:
    blobs: dict[str, bytes] = {}
    last = training.checkpoint()
    last_ref = checkpoint_ref(job.trial, last.epoch) if last.resumable else None
    if last_ref is not None:
        blobs[last_ref] = pack(last)
    best_ref = None
    if curve.best is not None:
        if last_ref is not None and curve.best.epoch == last.epoch:
            best_ref = last_ref
        else:
            best_ref = checkpoint_ref(job.trial, curve.best.epoch, best=True)
            blobs[best_ref] = pack(curve.best)
    values = {
        "checkpoint": last_ref,
        "best_checkpoint": best_ref,
        "resumable": last.resumable,
        "n_parameters": _n_parameters(training.model),
    }
    return Result(key=job.key, values=values, epochs=tuple(curve.rows), blobs=blobs)


def _diverged(job: TrainJob, training: Training, curve: _Curve) -> Result:
    """The curve up to the bad epoch, and the best weights before it: a trial may be used up to where it went wrong."""
    blobs: dict[str, bytes] = {}
    best_ref = None
    if curve.best is not None:
        best_ref = checkpoint_ref(job.trial, curve.best.epoch, best=True)
        blobs[best_ref] = pack(curve.best)
    return Result(
        key=job.key,
        outcome="diverged",
        values={
            "checkpoint": None,
            "best_checkpoint": best_ref,
            "resumable": False,
            "epoch": training.epoch + 1,
            "n_parameters": _n_parameters(training.model),
        },
        epochs=tuple(curve.rows),
        blobs=blobs,
        message=curve.diverged,
    )


def _n_parameters(model: nn.Module) -> int:
    """All numbers that a model has learned or was given, frozen ones too; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _require_continuable(job: TrainJob, checkpoint: Checkpoint) -> None:
    """Raises DamagedBlob when a job's checkpoint is not the one that the job goes on from."""
    assert job.checkpoint is not None
    if (checkpoint.trial, checkpoint.epoch) != (job.trial, job.from_epoch):
        raise DamagedBlob(
            job.checkpoint,
            f"it is of trial {checkpoint.trial} at epoch {checkpoint.epoch}, "
            f"not of trial {job.trial} at epoch {job.from_epoch}",
        )
    if not checkpoint.resumable:
        raise DamagedBlob(job.checkpoint, f"it holds weights alone, so trial {job.trial} cannot go on from it")


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
