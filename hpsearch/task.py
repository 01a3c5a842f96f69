"""The task: what a user writes, and how hpsearch finds it.

A task says what the data are and how a config becomes a model; everything else has a default. This module is imported
by every command, so it never imports torch itself: the defaults do, when they are called.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hpsearch.errors import Problem, SpecError, UserCodeError
from hpsearch.job import Config, Outputs, Precision
from hpsearch.task_source import TASK, task_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """The data of a study: one entry per split, train and val at least.

    An entry is a pair (x, y) of torch tensors or numpy arrays with one row per example, or a torch Dataset whose items
    are such pairs. Integer y are class numbers from 0; float y are numbers to predict.

    What becomes of them: float64 becomes torch's default dtype (float32), integer y become int64, every other dtype
    stays as given (uint8 images stay uint8; the model casts). Half of val is set aside to choose the ensemble.
    Leave `test` out and it is neither used nor claimed.
    """

    train: Any
    val: Any
    test: Any = None


@dataclass(frozen=True)
class Report:
    """What one epoch of a user's own `fit` gave.

    Args:
        metrics: by name with split, as in space.yaml: {"train_loss": 0.3, "val_loss": 0.4}.
        state: returns what `fit` needs to go on after this epoch, as (nested dicts and lists of) tensors and plain
            values; called only when the trial is paused or this is its best epoch. None: the trial cannot be paused.
    """

    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What a user's own `fit` is told of the trial that it trains.

    `epoch` epochs are behind it (0: a fresh start), and `state` is what the report of that epoch gave, else None.

    With `resources.gpus` above 1, `fit` runs once per GPU, at the same time, in processes of one torch.distributed
    group that is set up already (over NCCL): as `rank` of `world_size`, with `device` its own. The model has the same
    weights on every rank, and every rank is given all of the splits: wrap the one in DistributedDataParallel(model),
    and take a share of the other, such as x[trial.rank :: trial.world_size]. What rank 0 reports counts, and its state;
    all ranks have to yield equally often, and `state` is called on all of them, so that it may gather what is spread.
    The random seeds of all ranks are equal; who wants other dropout on each adds the rank to them.
    """

    epoch: int
    state: dict[str, Any] | None
    number: int
    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1


class Task:
    """A problem to search over. Write `data` and `model`; override any other method where its default does not fit."""

    outputs: Outputs | None = None
    """What the model's output means. None: class logits for integer targets, values for float targets. Say
    "binary_logits" where each output is the logit of a yes or no of its own."""

    metric_names: tuple[str, ...] = ()
    """Metrics by name beside those of `metrics`: f1, roc_auc, r2 and others; those of space.yaml's `metrics` and
    `metric` come in here by themselves."""

    precision: Precision = "float32"
    """Of forward(), "bf16" for bfloat16 under autocast; space.yaml's `precision` comes in here by itself."""

    def data(self) -> Splits:
        """The splits. Called once per worker, and must give every worker the same: seed what is random."""
        raise _not_written(self, "data", "return hpsearch.Splits(train=(x, y), val=(x, y), test=(x, y))")

    def model(self, config: Config) -> nn.Module:
        """A fresh network for this config. Its global torch RNG is seeded, so its weights depend on the trial alone."""
        raise _not_written(self, "model", "return the torch.nn.Module of this config")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar: cross-entropy for class logits, squared error for values, or binary
        cross-entropy for binary logits."""
        from torch.nn import functional

        meaning = outputs_of(self, target)
        if meaning == "logits":
            return functional.cross_entropy(output, target)
        if meaning == "binary_logits":
            return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype))
        return functional.mse_loss(output, target.to(output.dtype))

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        """Further measures of a whole split, by name without the split: `accuracy` for classes and binary labels, `mae`
        (mean absolute error) for values."""
        meaning = outputs_of(self, target)
        if meaning == "logits":
            return {"accuracy": (output.argmax(dim=1) == target).float().mean()}
        if meaning == "binary_logits":
            return {"accuracy": ((output > 0) == (target > 0.5)).float().mean()}
        return {"mae": (output - target).abs().mean()}

    def optimizer(self, params: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
        """The optimizer of this config; the default reads `optimizer`, `lr`, `weight_decay`, `momentum`."""
        from hpsearch.training.optim import make_optimizer

        return make_optimizer(params, config)

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs of a training batch, changed at random. Draw from `generator` (it lives on the inputs' device)."""
        return inputs

    def fit(self, model: nn.Module, config: Config, splits: Splits, trial: Trial) -> Iterator[Report]:
        """A training loop of your own: yields a Report after every epoch. Not called unless you write it; needed where
        a worker has several GPUs (see Trial)."""
        raise _not_written(self, "fit", "yield hpsearch.Report({...}) after every epoch")


def has_own_fit(task: Task) -> bool:
    """Whether the task brings its own training loop."""
    return type(task).fit is not Task.fit


def outputs_of(task: Task, target: Tensor) -> Outputs:
    """What the model's output means, given some targets."""
    if task.outputs is not None:
        return task.outputs
    return "values" if target.is_floating_point() else "logits"


def _not_written(task: Task, method: str, hint: str) -> UserCodeError:
    return UserCodeError(f"{type(task).__name__} has no {method}()", hint=hint)


def load_task(reference: str, folder: Path) -> Task:
    """An instance of the user's task.

    The task's own folder (of a file) or `folder` (of a module) goes to the front of sys.path, as `python file.py`
    would have it, so that its neighbours can be imported. A file is run once per content: to load it again unchanged
    gives a new instance of the same class.

    Args:
        reference: "file.py:Class", the file relative to `folder`, or "package.module:Class".
        folder: where space.yaml is.

    Raises:
        SpecError: the file or class is not there, or is not Python: what reading the source tells.
        UserCodeError: it raises on import or when it is made, is not a Task, or has no data() or model().
    """
    from hpsearch.training.user_code import user_code

    if not TASK.fullmatch(reference):
        hint = "write task: file.py:Class, or package.module:Class"
        raise SpecError([Problem(code="task", where="task", what=f"`{reference}` names no class", hint=hint)])
    problems = task_problems(reference, folder / "space.yaml", "task")
    if problems:
        raise SpecError(problems)
    source, _, name = reference.rpartition(":")
    with user_code(f"import of {source}"):
        module = _import_file(folder / source) if source.endswith(".py") else _import_module(source, folder)
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UserCodeError(f"{name} of {source} is not an hpsearch.Task", hint=f"class {name}(hpsearch.Task):")
    if _needs_arguments(cls):
        raise UserCodeError(
            f"{name}.__init__ takes arguments, but a task is made without any",
            hint="keep settings in class attributes, or in parameters of space.yaml with one value",
        )
    with user_code(f"{name}()"):
        task = cls()
    for method, hint in (("data", "it returns hpsearch.Splits"), ("model", "it returns a torch.nn.Module")):
        if getattr(cls, method) is getattr(Task, method):
            raise _not_written(task, method, hint)
    return task


def _import_file(path: Path) -> ModuleType:
    """Runs a file as a module named after its path and content, so that two tasks never take each other's place.

    Compiled here rather than by the import system, which would leave __pycache__ beside it, and take a file that was
    changed within a second, to the same size, for the old one.
    """
    path = path.resolve()
    source = path.read_bytes()
    digest = hashlib.blake2b(f"{path}\0".encode() + source, digest_size=6).hexdigest()
    name = f"hpsearch_task_{digest}_{path.stem if path.stem.isidentifier() else 'file'}"
    if name in sys.modules:
        return sys.modules[name]
    _search_first(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, folder: Path) -> ModuleType:
    _search_first(folder.resolve())
    return importlib.import_module(name)


def _search_first(folder: Path) -> None:
    importlib.invalidate_caches()  # files may be younger than the import system's listing of their folder
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _needs_arguments(cls: type[Task]) -> bool:
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return False
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in open_ended for p in parameters)
