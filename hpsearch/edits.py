"""What became of a space.yaml between two launches of one study, in words, and whether the study can go on with it.

A study goes on from what it knows: trials keep their configs, seeds and curves as evidence, and what is new follows
the new file. It cannot go on where old and new trials could no longer be compared, or old ones no longer continued.
Every key has its verdict here, one that a later version adds included: it is refused until it has one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpsearch.job import Config, Value
from hpsearch.rungs import rung_epochs
from hpsearch.space import same_value
from hpsearch.spec import EarlyStopping, Spec
from hpsearch.spec_model import Choices, Constant, Form, Listed, Range, as_found, flat_parameters, forms_in
from hpsearch.state import lr_bounds

NEW_STUDY = "put it back, or choose another --run-dir for a new study"

# Why a study cannot go on with another value.
FIXED: Mapping[str, str] = {
    "name": "its journal and its MLflow runs bear the name",
    "task": "trials of two tasks cannot be compared",
    "metric.name": "its trials were ranked by the old one, and their best epochs kept by it",
    "metric.goal": "its trials were ranked by the old one, and their best epochs kept by it",
    "seed": "it cuts the ensemble split from val, and every config and trial's seed follows from it",
    "shuffle": "its trials saw their training rows in the old order",
    "precision": "its trials were trained, and their checkpoints measured, in the old one",
}
CUT = "rows of val are set aside for it, so old and new trials would be ranked on other rows"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One thing that is not as it was when the study was opened last."""

    key: str  # dotted, as --set takes it
    words: str  # what was, what is, and what follows from it; begins with the key
    refused: bool = False  # the study cannot go on with it
    hint: str = ""  # what to do instead


def edits(old: Spec, new: Spec, configs: Mapping[int, Config]) -> tuple[Edit, ...]:
    """What differs, in the order of the file; empty when nothing does.

    Args:
        old: what the study was opened with last.
        new: what it would go on with.
        configs: of the trials drawn so far, by number.
    """
    found: list[Edit] = []
    for key, before, after in Spec.changes(old, new):
        if key.split(".")[0] == "parameters":
            continue
        change = f"{key}: {_shown(before)} -> {_shown(after)}"
        if key in FIXED:
            found.append(_refusal(key, change, FIXED[key]))
        elif key in ("ensemble.enabled", "confirm.enabled") and old.cuts_val != new.cuts_val:
            found.append(_refusal(key, change, CUT))
        elif (words := _what_follows(key, old, new, configs)) is not None:
            found.append(Edit(key=key, words=f"{change}: {words}" if words else change))
        else:
            found.append(_refusal(key, change, "whether old and new trials could be compared is not known"))
    return (*found, *_parameter_edits(old, new, configs))


def early_edits(old: Spec, new: Spec) -> tuple[Edit, ...]:
    """What differs where no worker has got as far as its data yet: the study can go on with all of it."""
    return tuple(
        Edit(key=key, words=f"{key}: {_shown(before)} -> {_shown(after)}: nothing was measured yet")
        for key, before, after in Spec.changes(old, new)
    )


def code_edits(old: Mapping[str, str], new: Mapping[str, str], trials: Collection[int]) -> tuple[str, ...]:
    """Which files of the task are not what they were, a line for each.

    Args:
        old: sha256 by file name, when the study was opened last; nothing is told where that was not recorded.
        new: the same now.
        trials: numbers of those drawn so far.
    """
    if not old or not new:
        return ()
    since = f" since {trials_named(trials)} {'was' if len(trials) == 1 else 'were'} trained" if trials else ""
    stay = f"; {'it stays' if len(trials) == 1 else 'they stay'} as evidence" if trials else ""
    told = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            what = "is imported no more" if name not in new else "is new" if name not in old else "has changed"
            told.append(f"{name} {what}{since}{stay}")
    return tuple(told)


def trials_named(numbers: Collection[int]) -> str:
    """Trials by number, short.

    >>> trials_named([3]), trials_named([0, 1, 2]), trials_named([0, 2, 9])
    ('trial 3', 'trials 0..2', 'trials 0, 2 and 9')
    """
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return f"trial {ordered[0]}"
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"trials {ordered[0]}..{ordered[-1]}"
    if len(ordered) > 5:
        return f"{len(ordered)} trials, {ordered[0]} to {ordered[-1]},"
    return f"trials {', '.join(map(str, ordered[:-1]))} and {ordered[-1]}"


# Keys with which a study can go on


def _what_follows(key: str, old: Spec, new: Spec, configs: Mapping[int, Config]) -> str | None:
    """What a study makes of a key's new value, "" where that needs no words; None for a key without a verdict."""
    match key.split("."):
        case ["search", "trials"]:
            return _trials(old.search.trials, new.search.trials, configs)
        case ["search", "method"]:
            return f"new trials are drawn by {new.search.method}, old ones keep their configs"
        case ["early_stopping", "max_epochs"]:
            longer = new.early_stopping.max_epochs > old.early_stopping.max_epochs
            complete = f"trials that have come to epoch {new.early_stopping.max_epochs} are complete"
            return "complete trials are paused and may go on" if longer else complete
        case ["early_stopping", _]:
            return _comparison(new.early_stopping)
        case ["lr_range", "enabled"]:
            return f"new trials draw from {'the measured ranges' if new.lr_range.enabled else 'the bounds of lr'}"
        case ["lr_range", "per"]:
            return "branches that have no range yet are ramped"
        case ["lr_range", "seeds"]:
            more = new.lr_range.seeds - old.lr_range.seeds
            ramps = f"{more} more ramp{'s' if more > 1 else ''} per branch, and " if more > 0 else ""
            return f"{ramps}the ranges are concluded anew"
        case ["lr_range", "min" | "max" | "steps"]:
            return "the ramps are run again, and new trials draw from what they give"
        case ["ensemble", "enabled"]:
            return "the ensemble is chosen again" if new.ensemble.enabled else "the best single trial is registered"
        case ["baseline", *_]:
            return _own_config(old, new)
        case ["evaluate", "enabled"]:
            on = new.evaluate.enabled
            return "the best trials are cross-validated" if on else "nothing is cross-validated any more"
        case ["evaluate", "folds"]:
            return "the best trials are cross-validated again, on other folds"
        case ["evaluate", _]:
            return "the best trials are cross-validated again, with the folds that are trained"
        case ["confirm", "enabled"]:
            return "the best trials are confirmed" if new.confirm.enabled else "nothing is confirmed any more"
        case ["confirm", _]:
            return "the best trials are confirmed again, with the runs that are there"
        case ["ensemble", "pool" | "size"]:
            more = new.ensemble.size - old.ensemble.size
            trained = ", and as many trials are trained to the end" if more > 0 and key == "ensemble.size" else ""
            return f"the ensemble is chosen again{trained}"
        case ["resources", "gpus" | "lanes" | "threads"]:
            return "epochs trained from now on may differ from the old ones' in their last bits"
        case ["storage"]:
            return "all of the study is mirrored there anew" if new.storage else "the study is mirrored no more"
        case ["mlflow", "experiment"]:
            return "runs that are there stay in the old one"
        case ["confirm", *_]:
            return "the best few are confirmed again"
        case ["baselines", *_]:
            return "held against from now on"
        case ["metrics"]:
            return "epochs trained from now on are measured by them"
        case ["resources" | "budget" | "mlflow" | "preflight" | "finish", *_]:
            return ""
    return None


def _own_config(old: Spec, new: Spec) -> str:
    if new.baseline is None:
        return "its trial stays, as one among the others"
    if old.baseline is None:
        return "trained to the end beside the search, as one trial more"
    return "trained as one trial more, the old config's stays"


def _trials(before: int, after: int, configs: Mapping[int, Config]) -> str:
    if after > before:
        return f"{after - before} more trial{'s' if after - before > 1 else ''}"
    to_come = sum(number not in configs for number in range(after))
    drawn = (
        f"{len(configs)} {'is' if len(configs) == 1 else 'are'} drawn and {'stays' if len(configs) == 1 else 'stay'}"
    )
    return f"{drawn}, {to_come} more to come" if to_come else f"no new ones beyond the {len(configs)} that are drawn"


def _comparison(stopping: EarlyStopping) -> str:
    rungs = rung_epochs(stopping.min_epochs, stopping.max_epochs, stopping.reduction_factor)
    if stopping.rule == "none" or not rungs:
        return "trials are not compared any more, each goes on to its last epoch"
    if stopping.rule == "median":
        often = "every epoch" if stopping.min_epochs == 1 else f"every {stopping.min_epochs} epochs"
        return f"trials are compared anew by their curves, {often}"
    return f"trials are compared anew by their curves, at epochs {', '.join(map(str, rungs))}"


# Parameters


def _parameter_edits(old: Spec, new: Spec, configs: Mapping[int, Config]) -> Iterator[Edit]:
    if not any(key.split(".")[0] == "parameters" for key, _, _ in Spec.changes(old, new)):
        return
    before, after = (dict(_forms(spec)) for spec in (old, new))
    lacking = _lacking(new, configs)
    for key, form in after.items():
        known = before.get(key)
        if lacking.get(key):
            why = f"{trials_named(lacking[key])} would need it and {'has' if len(lacking[key]) == 1 else 'have'} none"
            hint = "give it to a new choice or under a new value, or choose another --run-dir for a new study"
            yield _refusal(key, f"{key}: {'new' if known is None else 'under other conditions'}", why, hint)
        elif known is None:
            yield Edit(key=key, words=f"{key}: new ({_domain(form)}): no old trial is without it")
        elif words := "; ".join(_form_edits(known, form)):
            yield Edit(key=key, words=f"{key}: {words}{_ranges_follow(old, new, key)}")
    for key, form in before.items():
        if key not in after and not any(key.startswith(f"{parent}.") for parent in before.keys() - after.keys()):
            yield Edit(key=key, words=f"{key}: removed ({_domain(form)}): new trials do not have it, old ones keep it")
    shared = [[key for key in keys if key in before and key in after] for keys in (before, after)]
    if shared[0] != shared[1]:
        yield Edit(key="parameters", words="parameters: in another order: new trials draw other values")


def _forms(spec: Spec) -> Iterator[tuple[str, Form]]:
    """Every parameter by its dotted key, in file order."""
    for loc, form in forms_in((), spec.parameters):
        yield ".".join(("parameters", *map(str, loc))), form


def _lacking(new: Spec, configs: Mapping[int, Config]) -> dict[str, list[int]]:
    """By key, the trials that the parameter would belong to, and that do not have it."""
    keys = [key for key, _ in _forms(new)]
    lacking: dict[str, list[int]] = {}
    for key, parameter in zip(keys, flat_parameters(new.parameters), strict=True):
        for number, config in configs.items():
            if parameter.name not in config and all(condition.holds(config) for condition in parameter.conditions):
                lacking.setdefault(key, []).append(number)
    return lacking


def _form_edits(old: Form, new: Form) -> Iterator[str]:
    if isinstance(old, Range) and isinstance(new, Range):
        yield from _interval_edits(old, new)
    elif isinstance(old, Range) or isinstance(new, Range):
        yield f"was {_domain(old)}, now {_domain(new)}: new trials draw from it, old ones stay as evidence"
    else:
        yield from _value_edits(old, new)
    if old.when != new.when:
        yield "exists under other conditions: new trials follow them"


def _interval_edits(old: Range, new: Range) -> Iterator[str]:
    low, high = new.min - old.min, new.max - old.max
    change = f"({_domain(old)} -> {_domain(new)})"
    if low <= 0 <= high and (low or high):
        yield f"wider {change}: new trials draw from it, old ones stay"
    elif high <= 0 <= low and (low or high):
        yield f"narrower {change}: new trials draw from it, old ones stay as evidence"
    elif low or high:
        yield f"moved {change}: new trials draw from it, old ones stay as evidence"
    if old.distribution != new.distribution:
        yield f"{new.distribution}, no longer {old.distribution}: new trials are drawn so"
    if (old.step, old.whole) != (new.step, new.whole):
        steps = "without steps" if new.step is None else f"in steps of {_number(new.step)}"
        yield f"{'whole' if new.whole else 'real'} numbers {steps}: new trials draw these"
    if old.bounds_from != new.bounds_from:
        measured = "within the measured range" if new.bounds_from else "within its own bounds"
        yield f"new trials draw it {measured}"


def _value_edits(old: Form, new: Form) -> Iterator[str]:
    kind = "choice" if isinstance(new, Choices) else "value"
    before, after = _values(old), _values(new)
    gained = [value for value in after if not any(same_value(value, other) for other in before)]
    lost = [value for value in before if not any(same_value(value, other) for other in after)]
    if gained:
        it, plural = ("it", "") if len(gained) == 1 else ("them", "s")
        yield f"new {kind}{plural} {_named(gained)}: new trials may have {it}"
    if lost:
        yield f"no more {_named(lost)}: old trials that have {'it' if len(lost) == 1 else 'them'} stay as evidence"
    if not gained and not lost and before != after:
        yield "values in another order: new trials draw others"


def _ranges_follow(old: Spec, new: Spec, key: str) -> str:
    """What an edited parameter means for the measured learning rates."""
    name = key.split(".")[-1]
    if not (old.measures_lr and new.measures_lr):
        return ""
    if name == "lr" and lr_bounds(old.dump()["parameters"]) != lr_bounds(new.dump()["parameters"]):
        return "; its ranges are concluded anew from the ramps that were run"
    known = [repr(branch) for branch in old.space.branches(old.per)]
    more = any(repr(branch) not in known for branch in new.space.branches(new.per))
    return "; new branches are ramped first" if name in new.per and more else ""


def _values(form: Form) -> list[Value]:
    if isinstance(form, Constant):
        return [form.value]
    if isinstance(form, Listed):
        return list(form.values)
    return list(form.choices) if isinstance(form, Choices) else []


def _domain(form: Form) -> str:
    """What a parameter can be, short: `1e-4..0.1`, `adamw, sgd`."""
    if isinstance(form, Range):
        return f"{_number(form.min)}..{_number(form.max)}"
    return ", ".join(_shown(value) for value in _values(form))


def _named(values: list[Value]) -> str:
    return ", ".join(f"`{_shown(value)}`" for value in values)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(inner)}' for key, inner in value.items())}}}"
    return _number(value) if isinstance(value, float) else as_found(value)


def _number(value: float) -> str:
    """As one would write it.

    >>> [_number(value) for value in (0.0001, 0.1, 3e-05, 64, 1.0)]
    ['1e-4', '0.1', '3e-5', '64', '1']
    """
    if isinstance(value, int):
        return str(value)
    plain = f"{value:.12g}"
    mantissa, _, exponent = f"{value:.11e}".partition("e")
    short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return short if abs(value) < 0.01 and len(short) < len(plain) else plain.replace("e-0", "e-").replace("e+0", "e+")


def _refusal(key: str, change: str, why: str, hint: str = NEW_STUDY) -> Edit:
    return Edit(key=key, words=f"{change}: the study cannot go on with it, since {why}", refused=True, hint=hint)
