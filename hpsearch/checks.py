"""What a preflight check comes to: a name in plain words, a verdict, the number and the number that was expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

Status = Literal["passed", "failed", "warned", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of one network, or of the data."""

    name: str  # in plain words, what holds when it has passed
    code: str  # what `preflight: {allow: […]}` names it by: loss-at-init
    status: Status
    where: str = ""  # the corner of the space, "" for the data
    found: str = ""  # the number, or what was seen
    expected: str = ""
    cause: str = ""  # of a failure or warning, the likeliest
    look_at: str = ""  # where to look, or what to do
    reason: str = ""  # why it was skipped

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def of(cls, body: Mapping[str, object]) -> Check:
        """The check that `as_json` wrote."""
        return cls(**{field.name: body[field.name] for field in fields(cls) if field.name in body})  # type: ignore[arg-type]


# Every check by its code, with its name. What can only be a slip fails, and stops a launch; what may be the nature of
# the data or of a hard task warns, and is judged again by the study's baselines and diagnosis.
NAMES: Mapping[str, str] = {
    "builds": "the model is built, and a step of training runs",
    "trains": "the model has parameters that train",
    "optimizer": "the optimizer has every parameter that trains",
    "finite": "no layer gives NaN or infinity",
    "gradients": "every parameter in use gets a gradient",
    "loss-at-init": "loss at init is that of an undecided model",
    "logits": "outputs are logits, where the loss expects them",
    "targets": "the loss depends on the targets",
    "inputs": "the output depends on the inputs",
    "batch-leak": "one example's output ignores the others",
    "eval-mode": "evaluation repeats to the bit",
    "train-eval": "your loop sets training and evaluation mode",
    "symmetry": "units of a layer differ",
    "activations": "few units are dead or saturated",
    "overfit-two": "two examples can be overfitted",
    "loss-falls": "the loss falls at first",
    "beats-zero-input": "real inputs beat zeroed inputs",
    "val-like-train": "val is no easier than train",
    "repeats": "the same seed trains the same model",
    "finite-inputs": "inputs are finite",
    "input-scale": "inputs are of a scale that trains",
    "constant-features": "no feature is constant",
    "duplicate-features": "no feature is there twice",
    "overlap": "no row of train stands in another split",
    "classes": "every class is in every split",
    "imbalance": "classes are balanced",
    "drift": "splits look alike",
    "target-range": "targets are in range",
}
