"""The keys of space.yaml with their defaults, each section checked by itself.

One pydantic model per section; a `Parameter` of the space is written in one of four forms. Rules within a section are
here, what ties sections together is in `spec_problems`. Errors carry a code, what was found, and a hint; where it was
found is added by whoever knows the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hpsearch.checks import NAMES
from hpsearch.job import Config, Precision, Scalar, Value
from hpsearch.metric_names import NAMED_METRICS
from hpsearch.space import Condition, Parameter, Space, same_value
from hpsearch.storage import read_uri
from hpsearch.task_source import TASK
from hpsearch.yaml_reader import Loc, shown

MAX_WHOLE = 2**53  # above it floats, and so JSON readers elsewhere, no longer tell neighbours apart
MAX_STEPS = 10**9


def _slip(code: str, what: str, hint: str = "") -> PydanticCustomError:
    """A problem as pydantic carries it; `{key}` in `what` becomes the key it was found at."""
    return PydanticCustomError(code, "{what}", {"what": what, "hint": hint})


def _scalar(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise _slip("not-finite", f"`{{key}}` is not a finite number (got {value})")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_WHOLE:
        raise _slip("range", f"`{{key}}` lies beyond 2^53, where whole numbers are no longer exact (got {value})")
    if not isinstance(value, bool | int | float | str | None):
        raise _slip("type", f"`{{key}}` holds plain values: numbers, text, true, false, null (got {as_found(value)})")
    return value


def _value(value: object) -> object:
    return [_scalar(item) for item in value] if isinstance(value, list) else _scalar(value)


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = "text in quotes is no number" if isinstance(value, str) and is_number(value) else ""
        raise _slip("type", f"`{{key}}` is a number (got {as_found(value)})", hint)
    return _scalar(value)


def _listed(values: object) -> object:
    if not isinstance(values, list):
        raise _slip(
            "type", f"`{{key}}` is a list (got {as_found(values)})", f"write [{as_written(values)}], or use `value`"
        )
    if not values:
        raise _slip("empty", "`{key}` is empty", "name at least one value")
    checked = [_value(value) for value in values]
    for i, value in enumerate(checked):
        if any(same_value(value, earlier) for earlier in checked[:i]):  # type: ignore[arg-type]
            hint = "each value has the same chance; keep one of them"
            raise _slip("duplicate-value", f"`{{key}}` has {as_found(value)} twice", hint)
    return checked


def _accepted(value: object) -> object:
    if not isinstance(value, list):
        return _scalar(value)
    if not value:
        raise _slip("empty", "`{key}` accepts no value", "name the values under which the parameter exists")
    return [_value(item) for item in value]


def _study_name(name: str) -> str:
    if not STUDY.fullmatch(name):
        what = f"`{{key}}` is a letter or digit, then letters, digits, `.`, `_`, `-`, 100 in all (got {as_found(name)})"
        raise _slip("name", what, "the run directory and the MLflow run are called like this")
    return name


def _task_name(task: str) -> str:
    if not TASK.fullmatch(task):
        what = f"`{{key}}` is file.py:Class or package.module:Class (got {as_found(task)})"
        raise _slip("task-form", what, "such as digits_task.py:Digits, the file lying beside this one")
    return task


def _metric_name(name: str) -> str:
    if not re.fullmatch(r"val_[A-Za-z0-9_]+", name):
        hint = f"val_{name}?" if re.fullmatch(r"[A-Za-z0-9_]+", name) and "_" not in name else "such as val_loss"
        if name.startswith(("train_", "test_", "ensemble_")):
            hint = f"val_{name.partition('_')[2]}: trials are ranked on the validation split, and on no other"
        raise _slip("metric", f"`{{key}}` starts with val_ (got {as_found(name)})", hint)
    return name


def _metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in NAMED_METRICS:
            near = get_close_matches(name.removeprefix("val_"), NAMED_METRICS, 1)
            hint = f"did you mean {near[0]}?" if near else "others are given by Task.metrics()"
            raise _slip("metric", f"`{{key}}` has no metric {as_found(name)} (known: {', '.join(NAMED_METRICS)})", hint)
    if len(set(names)) < len(names):
        raise _slip("duplicate-value", "`{key}` has a name twice", "keep one of them")
    return names


def _check_codes(codes: tuple[str, ...]) -> tuple[str, ...]:
    for code in codes:
        if code not in NAMES:
            near = get_close_matches(code, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NAMES)}"
            raise _slip("check", f"`{{key}}` names no check (got {as_found(code)})", hint)
    return codes


def _disk(size: str) -> str:
    if not (match := DISK.fullmatch(size)) or float(match[1]) == 0:
        hint = "such as 10GiB; units: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise _slip("disk", f"`{{key}}` is a number above 0 and a unit (got {as_found(size)})", hint)
    return size


def _storage(uri: str | None) -> str | None:
    if uri is not None:
        try:
            read_uri(uri)
        except ValueError as error:
            raise _slip("storage", *error.args) from None
    return uri


def _mlflow_name(name: str | None) -> str | None:
    if name is not None and (not name.strip() or len(name) > 200 or not name.isprintable()):
        raise _slip("name", f"`{{key}}` is printable text of 1 to 200 characters (got {as_found(name)})")
    return name


def _model_name(name: str | None) -> str | None:
    if name is not None and re.search(r"[/:]", name):
        raise _slip("name", f"`{{key}}` holds no `/` and no `:`, which part names in MLflow (got {as_found(name)})")
    return _mlflow_name(name)


def _gpus(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise _slip("gpus", f"`{{key}}` above 1 is a whole number (got {gpus})", "only a single GPU can be shared")
    return gpus


def _custom(custom: dict[str, float]) -> dict[str, float]:
    for name, amount in custom.items():
        key = OWN_KEYS.get(name.lower())
        if key is not None:
            raise _slip("custom", f"`{{key}}` names {as_found(name)}, which has a key of its own", f"write {key}")
        if not RESOURCE.fullmatch(name):
            what = f"`{{key}}` holds names of Ray's resources (got {as_found(name)})"
            raise _slip("custom", what, "such as accelerator_type:A100, or what `ray start --resources` named")
        if amount < GRAIN:
            what = f"`{{key}}` holds amounts of at least {GRAIN:.4f}, Ray's finest (got {name}: {as_found(amount)})"
            raise _slip("custom", what, "leave it out if none is needed" if amount == 0 else "")
    return custom


def _lanes(lanes: object) -> object:
    if lanes != "auto" and (isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1):
        raise _slip("option", f"`{{key}}` is auto or a whole number of at least 1 (got {as_found(lanes)})")
    return lanes


def _alias(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,99}", name) or re.fullmatch(r"v\d+|latest", name, re.IGNORECASE):
        what = (
            f"`{{key}}` is a letter, then letters, digits, `_`, `-`, and neither latest nor v1 (got {as_found(name)})"
        )
        raise _slip("name", what, "such as champion")
    return name


RESOURCE = re.compile(r"[A-Za-z_][\w.:-]{0,199}")
GRAIN = 1e-4  # Ray counts resources in ten-thousandths
OWN_KEYS = {
    **dict.fromkeys(("cpu", "cpus", "num_cpus"), "resources.cpus"),
    **dict.fromkeys(("gpu", "gpus", "num_gpus"), "resources.gpus"),
}
STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DISK = re.compile(r"(\d+(?:\.\d+)?) ?(B|[KMGT]i?B)")
_DISK_UNITS = {"B": 1, **{f"{u}{i}B": (1024 if i else 1000) ** p for p, u in enumerate("KMGT", 1) for i in ("", "i")}}

_SCALAR_SCHEMA: dict[str, Any] = {"type": ["boolean", "number", "string", "null"]}
_VALUE_SCHEMA: dict[str, Any] = {"anyOf": [_SCALAR_SCHEMA, {"type": "array", "items": _SCALAR_SCHEMA}]}

AnyValue = Annotated[Value, PlainValidator(_value), WithJsonSchema(_VALUE_SCHEMA)]
Number = Annotated[int | float, PlainValidator(_number), WithJsonSchema({"type": "number"})]
Values = Annotated[
    list[Value],
    PlainValidator(_listed),
    WithJsonSchema({"type": "array", "items": _VALUE_SCHEMA, "minItems": 1, "uniqueItems": True}),
]
Accepted = Annotated[
    Scalar | list[Value],
    PlainValidator(_accepted),
    WithJsonSchema({"anyOf": [_SCALAR_SCHEMA, {"type": "array", "items": _VALUE_SCHEMA, "minItems": 1}]}),
]


class Section(BaseModel):
    """A mapping of space.yaml: no other keys, no silent conversions, no change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


LOWER_IS_BETTER = frozenset({"loss", "nll", "error", "mse", "mae", "rmse", "brier", "perplexity"})
HIGHER_IS_BETTER = frozenset({"accuracy", "acc", "f1", "auc", "precision", "recall", "r2", "iou", "dice", "top5"})


class Metric(Section):
    """What trials are ranked by."""

    name: Annotated[str, AfterValidator(_metric_name)] = Field(
        default="val_loss",
        description="a metric of the validation split: val_loss, val_accuracy, or one of the task's own",
    )
    goal: Literal["minimize", "maximize"] = Field(
        default="minimize",
        description="whether lower or higher is better; needed where the name does not tell",
    )

    @model_validator(mode="before")
    @classmethod
    def _goal_follows_the_name(cls, raw: Any) -> Any:
        """A goal that nobody wrote is never guessed wrongly in silence: the worst trial would win."""
        if not isinstance(raw, dict) or "goal" in raw or not isinstance(raw.get("name"), str):
            return raw
        known = NAMED_METRICS.get(raw["name"].removeprefix("val_"))
        if known is not None:
            return {**raw, "goal": "maximize" if known.higher_is_better else "minimize"}
        words = raw["name"].removeprefix("val_").split("_")
        if LOWER_IS_BETTER.intersection(words):
            return {**raw, "goal": "minimize"}
        if HIGHER_IS_BETTER.intersection(words):
            return {**raw, "goal": "maximize"}
        hint = f"write metric: {{name: {raw['name']}, goal: maximize}}, or minimize"
        near = get_close_matches(raw["name"].removeprefix("val_"), ["loss", *NAMED_METRICS], 1)
        if near:
            hint = f"did you mean val_{near[0]}? for a metric of the task's own {hint}"
        raise _slip("goal", f"`{{key}}.goal` is needed, since `{raw['name']}` does not tell what is better", hint)


class Search(Section):
    """How configs are drawn."""

    method: Literal["sobol", "random", "tpe"] = Field(
        default="sobol",
        description="sobol: spread evenly (scrambled Sobol); random: independent; tpe: learns from what came",
    )
    trials: int = Field(default=64, ge=1, description="how many configs are tried")


class _Form(Section):
    when: dict[str, Accepted] = Field(
        default_factory=dict,
        description="the parameter exists only where each of these parameters has the value, or one of the values",
    )


class Constant(_Form):
    """One value, in every config."""

    value: AnyValue = Field(description="a number, text, true, false, null, or a list of these")


class Listed(_Form):
    """One of some values, each with the same chance."""

    values: Values = Field(description="the values; lists among them are handed over as lists")


class Range(_Form):
    """A number between two ends, both included: whole if both ends are, else real."""

    min: Number = Field(description="the lowest value")
    max: Number = Field(description="the highest value")
    distribution: Literal["uniform", "log_uniform"] = Field(
        default="uniform", description="log_uniform: each factor of ten has the same chance; needs 0 < min"
    )
    step: Number | None = Field(
        default=None,
        description="values are min, min + step, … up to max; uniform only",
        json_schema_extra={"exclusiveMinimum": 0},
    )
    bounds_from: Literal["lr_range"] | None = Field(
        default=None,
        description="lr_range: the learning rate's interval is measured first, within min and max; only for lr",
    )

    @property
    def whole(self) -> bool:
        """Whether it gives integers."""
        return isinstance(self.min, int) and isinstance(self.max, int)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.min, self.max
        got = f"(got min={low}, max={high})"
        if self.distribution == "log_uniform" and not 0 < low < high:
            small = "1e-6" if high > 1e-6 else f"{high / 100:g}"
            hint = f"write min: {small}, or distribution: uniform if zero is meant" if low <= 0 < high else ""
            raise _slip("log-bounds", f"`{{key}}` is log-uniform, so 0 < min < max is needed {got}", hint)
        if not low < high:
            hint = f"for one fixed value write value: {low}" if low == high else "swap them?"
            raise _slip("bounds", f"`{{key}}` needs min < max {got}", hint)
        if self.step is None:
            return self
        if self.distribution == "log_uniform":
            raise _slip("step", "`{key}` is log-uniform and has a step; equal steps are uniform", "leave `step` out")
        if self.whole and not isinstance(self.step, int):
            hint = f"write min: {float(low)} for real values"
            raise _slip("step", f"`{{key}}` goes from whole number to whole number, so its step is one too "
                                f"(got step={self.step})", hint)  # fmt: skip
        if not 0 < self.step <= high - low:
            what = f"`{{key}}` needs 0 < step <= max - min (got min={low}, max={high}, step={self.step})"
            raise _slip("step", what)
        if (high - low) / self.step > MAX_STEPS:
            raise _slip("step", f"`{{key}}` has more than a billion steps (got step={self.step})", "leave `step` out")
        return self


class Choices(_Form):
    """One of some named choices, each with parameters of its own."""

    choices: dict[str, dict[str, ParameterForm]] = Field(
        description="choice -> its own parameters, which may be none; they appear in the config beside the choice"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.choices:
            raise _slip("empty", "`{key}` has no choices", "name at least one")
        return self


Form = Constant | Listed | Range | Choices

FORMS: dict[str, frozenset[str]] = {
    "<value>": frozenset({"value"}),
    "<values>": frozenset({"values"}),
    "<range>": frozenset({"min", "max", "distribution", "step", "bounds_from"}),
    "<choices>": frozenset({"choices"}),
}


_FORM_OF: dict[type, str] = {Constant: "<value>", Listed: "<values>", Range: "<range>", Choices: "<choices>"}


def form_of(raw: object) -> str | None:
    """Which way of writing a parameter this is; None for none, or for two at once."""
    if type(raw) in _FORM_OF:  # a form already; pydantic asks again when it writes one out
        return _FORM_OF[type(raw)]
    if not isinstance(raw, dict):
        return None
    found = [form for form, keys in FORMS.items() if keys & raw.keys()]
    if len(found) == 2 and "<range>" in found and not {"min", "max"} & raw.keys():
        found.remove("<range>")  # `values` with a stray `distribution`: that key is the problem, not the form
    return found[0] if len(found) == 1 else None


ParameterForm = Annotated[
    Annotated[Constant, Tag("<value>")]
    | Annotated[Listed, Tag("<values>")]
    | Annotated[Range, Tag("<range>")]
    | Annotated[Choices, Tag("<choices>")],
    Discriminator(form_of),
]


class Preflight(Section):
    """Checks of the network before anything is spent on it."""

    enabled: bool = Field(default=True, description="false: nothing is checked; recorded in MLflow")
    allow: Annotated[tuple[str, ...], AfterValidator(_check_codes)] = Field(
        default=(),
        strict=False,
        description="checks that may fail without stopping the launch, by code: loss-at-init, overlap, …",
        json_schema_extra={"items": {"enum": list(NAMES)}},
    )


class LrRange(Section):
    """Measures which learning rates are worth searching, for parameters with `bounds_from: lr_range`."""

    enabled: bool = Field(default=True, description="false: the bounds of lr are searched as they stand")
    per: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="listed parameters whose every value is measured by itself; "
        "by default `optimizer` and those with `choices`, where they are searched",
    )
    min: float = Field(default=1e-5, gt=0, description="learning rate at the start of a ramp")
    max: float = Field(default=10.0, gt=0, description="learning rate at its end")
    steps: int = Field(default=100, ge=2, description="optimizer steps of a ramp")
    seeds: int = Field(default=5, ge=1, description="ramps per branch")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min < self.max:
            raise _slip("bounds", f"`{{key}}` needs min < max (got min={self.min}, max={self.max})")
        return self


class EarlyStopping(Section):
    """Which trials go on."""

    enabled: bool = Field(default=True, description="false: every trial is trained to max_epochs, as with type: none")
    type: Literal["asha", "sha", "median", "none"] = Field(
        default="asha",
        description="asha: asynchronous successive halving; sha: synchronous; median: the median rule; none",
    )
    min_epochs: int = Field(default=1, ge=1, description="epochs that every trial gets")
    max_epochs: int = Field(default=27, ge=1, description="epochs of a full trial")
    reduction_factor: int = Field(default=3, ge=2, description="the best 1/reduction_factor of a rung go on")

    @property
    def rule(self) -> Literal["asha", "sha", "median", "none"]:
        """The type in force: none where the stage is switched off."""
        return self.type if self.enabled else "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_epochs > self.max_epochs:
            got = f"(got min_epochs={self.min_epochs}, max_epochs={self.max_epochs})"
            raise _slip("epochs", f"`{{key}}` needs min_epochs <= max_epochs {got}")
        return self


class Finish(Section):
    """Trains the leaders longer, with a decaying learning rate."""

    enabled: bool = Field(
        default=False, description="not built yet: true is refused, and so are other keys without false"
    )
    trials: int = Field(default=8, ge=1, description="how many of the best trials go on")
    extra_epochs: int = Field(default=9, ge=1, description="for how many epochs")


class Confirm(Section):
    """Trains the best few again with fresh seeds, on rows that the search never ranked. Writing it switches it on."""

    enabled: bool = Field(default=True, description="false: the winner is told with the search's own score alone")
    trials: int = Field(default=3, ge=1, description="how many of the best trials are confirmed")
    seeds: int = Field(default=3, ge=1, description="the most fresh seeds that each of them gets")


class Evaluate(Section):
    """Cross-validates the best trials on folds of train and val together. Writing it switches it on."""

    enabled: bool = Field(default=True, description="false: the val split alone ranks")
    folds: int = Field(default=5, ge=2, description="parts that the rows are cut into; each is held out once")
    repeats: int = Field(default=1, ge=1, description="how often the rows are cut anew")
    trials: int = Field(default=8, ge=1, description="how many of the best trials are cross-validated")

    @property
    def n_runs(self) -> int:
        """Folds of all repeats: the most trainings that one trial gets."""
        return self.folds * self.repeats


class Ensemble(Section):
    """Chooses checkpoints that help each other."""

    enabled: bool = Field(default=True, description="false: the best single trial is what is registered")
    pool: int = Field(default=20, ge=1, description="how many of the best trials are candidates")
    size: int = Field(default=5, ge=1, description="the most members that an ensemble has")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size > self.pool:
            what = f"`{{key}}` needs size <= pool (got size={self.size}, pool={self.pool})"
            raise _slip("ensemble-size", what, "members come from the pool")
        return self


class Resources(Section):
    """What each worker has."""

    cpus: float = Field(default=1.0, ge=0, description="CPU cores, or a share of one")
    gpus: Annotated[float, AfterValidator(_gpus)] = Field(
        default=0.0,
        ge=0,
        description="GPUs: a share of one, one, or several; with several the task's own `fit` runs once on each, as "
        "the ranks of a torch.distributed group",
    )
    custom: Annotated[dict[str, float], AfterValidator(_custom)] = Field(
        default={},
        description="further resources of Ray's, by name: {highmem: 1, accelerator_type:A100: 0.001}; with several "
        "GPUs shared evenly among the worker's processes",
    )
    lanes: Annotated[Literal["auto"] | int, BeforeValidator(_lanes)] = Field(
        default="auto",
        description="trials of one shape that a worker trains at once, in one program; auto: as many as measured to "
        "pay; 1: bit-exact",
    )
    threads: int = Field(default=1, ge=1, description="threads of a worker's arithmetic; a setting of the study")


class Budget(Section):
    """Where training ends, whatever is left of it: the search, then `evaluate` and `confirm`, which go on with what
    there is by then. The ensemble is made all the same. null: no limit."""

    hours: float | None = Field(default=None, gt=0, description="wall-clock hours of the whole study")
    gpu_hours: float | None = Field(default=None, gt=0, description="hours times GPUs held")
    epochs: int | None = Field(
        default=None, ge=1, description="epochs trained, by the search, on folds and with fresh seeds together"
    )
    disk: Annotated[str, AfterValidator(_disk)] | None = Field(
        default=None, description="of all checkpoints: 10GiB, 500MB; ends the search alone"
    )

    @property
    def disk_bytes(self) -> int | None:
        """`disk` in bytes.

        >>> Budget(disk="1.5KiB").disk_bytes
        1536
        """
        match = DISK.fullmatch(self.disk) if self.disk is not None else None
        return int(float(match[1]) * _DISK_UNITS[match[2]]) if match else None


class Mlflow(Section):
    """Where the logbook lies in MLflow; its address comes from MLFLOW_TRACKING_URI or --tracking-uri."""

    experiment: Annotated[str | None, AfterValidator(_mlflow_name)] = Field(
        default=None, description="name of the experiment; by default the study's name"
    )
    registered_model: Annotated[str | None, AfterValidator(_model_name)] = Field(
        default=None, description="name of the registered ensemble; by default the study's name"
    )
    alias: Annotated[str, AfterValidator(_alias)] = Field(
        default="champion", description="moved to a new version only when it beats the old one"
    )


class Spec(Section):
    """A study, as space.yaml describes it."""

    name: Annotated[str, AfterValidator(_study_name)] = Field(
        description="the study's name: letters, digits, `.`, `_`, `-`",
        json_schema_extra={"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"},
    )
    task: Annotated[str, AfterValidator(_task_name)] = Field(
        description="file.py:Class, the file lying beside space.yaml, or package.module:Class",
        json_schema_extra={"pattern": r"^[^:]+:[^:]+$"},
    )
    metric: Metric = Metric()
    metrics: Annotated[tuple[str, ...], AfterValidator(_metric_names)] = Field(
        default=(),
        strict=False,
        description=f"measured beside the task's own, on each split: {', '.join(NAMED_METRICS)}",
        json_schema_extra={"items": {"enum": list(NAMED_METRICS)}},
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="the study's; configs, data order and weights follow from it"
    )
    search: Search = Search()
    parameters: dict[str, ParameterForm] = Field(
        description="name -> value | values | min and max (with distribution, step) | choices; any may have `when`",
        json_schema_extra={"minProperties": 1, "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,99}$"}},
    )
    preflight: Preflight = Preflight()
    lr_range: LrRange = LrRange()
    early_stopping: EarlyStopping = EarlyStopping()
    finish: Finish = Finish()
    baselines: dict[str, Number] = Field(
        default_factory=dict,
        description="values of the study's metric to be held against, by name: {human: 0.98}; measured by themselves: "
        "ignoring the inputs, and a linear model",
    )
    baseline: dict[str, AnyValue] | None = Field(
        default=None,
        description="a config of yours, a value for each parameter that is searched; trained to the end beside the "
        "search, as one trial more: {lr: 3e-4, width: 128} where these two are searched",
    )
    evaluate: Evaluate = Evaluate(enabled=False)
    confirm: Confirm = Confirm(enabled=False)
    ensemble: Ensemble = Ensemble()
    resources: Resources = Resources()
    budget: Budget = Budget()
    mlflow: Mlflow = Mlflow()
    storage: Annotated[str | None, AfterValidator(_storage)] = Field(
        default=None,
        description="s3://bucket/prefix, gs://bucket/prefix, file:///folder or an absolute path that every machine "
        "reaches: the study is mirrored there, and large checkpoints go by way of it",
    )
    shuffle: bool = Field(
        default=True, description="whether each epoch has an order of its own; false for data in sequence"
    )
    precision: Precision = Field(
        default="float32",
        description="of the networks' forward passes; bf16: bfloat16 where torch's autocast holds it to be safe, all "
        "else in float32",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_default_to_the_study(cls, raw: Any) -> Any:
        mlflow = raw.get("mlflow", {}) if isinstance(raw, dict) else None
        if not isinstance(mlflow, dict) or not isinstance(raw.get("name"), str) or not STUDY.fullmatch(raw["name"]):
            return raw
        given = {key: value for key, value in mlflow.items() if value is not None}
        return {**raw, "mlflow": {"experiment": raw["name"], "registered_model": raw["name"], **given}}

    @cached_property
    def space(self) -> Space:
        """The parameters, flat and in the file's order."""
        return Space(parameters=tuple(flat_parameters(self.parameters)))

    @property
    def per(self) -> tuple[str, ...]:
        """The parameters that make the branches of the LR range, whether written down or by default."""
        return self.lr_range.per if self.lr_range.per is not None else _default_per(self.parameters, self.space)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics that are asked for by name: those listed, and the one that trials are ranked by."""
        ranked = self.metric.name.removeprefix("val_")
        return tuple(dict.fromkeys([*self.metrics, *([ranked] if ranked in NAMED_METRICS else [])]))

    @cached_property
    def baseline_config(self) -> Config | None:
        """The user's own config, whole, in the order of the file; a parameter of one value need not be written."""
        return None if self.baseline is None else self.space.completed(self.baseline)

    @property
    def cuts_val(self) -> bool:
        """Whether half of val is set aside, for what must not be ranked on."""
        return self.ensemble.enabled or self.confirm.enabled

    @property
    def measures_lr(self) -> bool:
        """Whether the LR range stage has anything to measure."""
        return self.lr_range.enabled and bool(self.space.measured)

    @property
    def experiment(self) -> str:
        return self.mlflow.experiment or self.name

    @property
    def registered_model(self) -> str:
        return self.mlflow.registered_model or self.name

    def task_file(self, space_path: Path) -> Path | None:
        """The task's file, where `task` names one; None for package.module:Class."""
        module, _, _ = self.task.rpartition(":")
        return space_path.parent / module if module.endswith(".py") else None

    def dump(self) -> dict[str, Any]:
        """Plain JSON values, every default written out; the order of parameters counts. Parameters stay short."""
        plain = self.model_dump(mode="json", exclude={"parameters"})
        forms = {name: form.model_dump(mode="json", exclude_defaults=True) for name, form in self.parameters.items()}
        return {key: forms if key == "parameters" else plain[key] for key in type(self).model_fields}

    @classmethod
    def from_dump(cls, dumped: Mapping[str, Any]) -> Spec:
        """The spec that `dump` was called on.

        Raises:
            ValueError: not the dump of a valid spec of this version.
        """
        return cls.model_validate(dict(dumped))

    @staticmethod
    def changes(old: Spec, new: Spec) -> tuple[tuple[str, Any, Any], ...]:
        """What differs, as (dotted key, old value, new value); None where a key is absent.

        Parameters in another order are a change as well, told with both orders: Sobol's coordinates follow it.
        """
        return tuple(_differences(old.dump(), new.dump(), ""))

    NOT_BUILT: ClassVar[frozenset[str]] = frozenset({"distill"})


Choices.model_rebuild()
Spec.model_rebuild()


def flat_parameters(forms: Mapping[str, Form], inherited: tuple[Condition, ...] = ()) -> Iterator[Parameter]:
    """Flat parameters in file order; those of a choice exist under it.

    They take over its parameter's conditions too: another choice further out may have a parameter of the same name.
    """
    for name, form in forms.items():
        own = (Condition(parent=parent, values=tuple(accepted_values(values))) for parent, values in form.when.items())
        conditions = (*inherited, *own)
        if isinstance(form, Constant):
            yield Parameter(name=name, kind="constant", values=(form.value,), conditions=conditions)
        elif isinstance(form, Listed):
            yield Parameter(name=name, kind="categorical", values=tuple(form.values), conditions=conditions)
        elif isinstance(form, Range):
            yield Parameter(
                name=name,
                kind="integer" if form.whole else "real",
                low=form.min,
                high=form.max,
                log=form.distribution == "log_uniform",
                step=form.step,
                conditions=conditions,
                bounds_from=form.bounds_from,
            )
        else:
            yield Parameter(name=name, kind="categorical", values=tuple(form.choices), conditions=conditions)
            for choice, inner in form.choices.items():
                yield from flat_parameters(inner, (*conditions, Condition(parent=name, values=(choice,))))


def _default_per(forms: Mapping[str, Form], space: Space) -> tuple[str, ...]:
    """`optimizer` and those with choices, where they are searched, and whatever these depend on, in file order."""
    wanted = {str(loc[-1]) for loc, form in forms_in((), forms) if loc[-1] == "optimizer" or isinstance(form, Choices)}
    searched = {p.name for p in space.parameters if p.kind == "categorical"}
    searched -= {p.name for p in space.parameters if p.kind != "categorical"}
    wanted &= searched
    while more := {c.parent for p in space.parameters if p.name in wanted for c in p.conditions} & searched - wanted:
        wanted |= more
    return tuple(name for name in space.names if name in wanted)


def _differences(old: Any, new: Any, way: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new or type(old) is not type(new):
            yield way, old, new
        return
    for key in dict.fromkeys([*old, *new]):
        yield from _differences(old.get(key), new.get(key), f"{way}.{key}" if way else key)
    shared = [key for key in old if key in new]
    if way.split(".")[0] == "parameters" and shared != [key for key in new if key in old]:
        yield way, list(old), list(new)


def forms_in(loc: Loc, parameters: Mapping[str, Form]) -> Iterator[tuple[Loc, Form]]:
    """Every parameter with its way below `parameters`, in file order."""
    for name, form in parameters.items():
        yield (*loc, name), form
        if isinstance(form, Choices):
            for choice, inner in form.choices.items():
                yield from forms_in((*loc, name, "choices", choice), inner)


def accepted_values(values: Any) -> list[Value]:
    return list(values) if isinstance(values, list) else [values]


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def as_found(value: object) -> str:
    """A found value, short, with text in quotes so that it is told from a number."""
    if isinstance(value, str):
        return f'"{shown(value)}"'
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return shown(f"[{', '.join(map(as_found, value[:8]))}{', …' if len(value) > 8 else ''}]")
    return as_written(value)


def as_written(value: object) -> str:
    """A value as one would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return shown(f"[{', '.join(map(as_written, value[:8]))}{', …' if len(value) > 8 else ''}]")
    return shown(str(value))
