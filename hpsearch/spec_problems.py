"""Everything that is wrong with a space.yaml, in the project's words and with its place.

pydantic says what is wrong inside a section; here that becomes a `Problem`, with a did-you-mean for misspellings and
for the words of other tools. What ties sections together (a `when` and its parent, `per` and the parameters) is checked
over all that is right by itself, so that one slip does not hide another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from hpsearch.errors import Problem
from hpsearch.job import Value
from hpsearch.own_config import config_slips
from hpsearch.space import Parameter, Space, condition_circle, same_value
from hpsearch.spec_model import (
    FORMS,
    Form,
    Range,
    Section,
    Spec,
    accepted_values,
    as_found,
    as_written,
    flat_parameters,
    form_of,
    forms_in,
    is_number,
)
from hpsearch.yaml_reader import Document, Loc, Place, shown


def check_document(document: Document) -> tuple[Spec | None, list[tuple[Place, Problem]]]:
    """The spec, or None, and every problem with its place."""
    found = [(_place_in(problem.where, document.name), problem) for problem in document.problems]
    raw = document.value
    if not isinstance(raw, dict):
        if not found:
            code, what = ("empty", "the file is empty") if raw is None else ("type", "the file is not a mapping")
            hint = "the README has one to start from" if raw is None else "it starts with name: …"
            place = Place(line=1, column=1)
            found.append((place, Problem(code=code, where=document.where(place), what=what, hint=hint)))
        return None, found
    report = _Report(document)
    raw = _without_unbuilt(raw, report)
    spec = None
    try:
        spec = clean = Spec.model_validate(raw)
    except ValidationError as error:
        bad: set[Loc] = set()
        for slip in error.errors(include_url=False):
            loc = _without_tags(slip["loc"])
            bad.add(loc[: 2 if loc[:1] == ("parameters",) else 1])
            _translate(slip, loc, raw, report)
        clean = Spec.model_validate(_without(raw, bad))
    _check_relations(clean, raw, report)
    return spec, found + report.problems


def _without_tags(loc: Loc) -> Loc:
    """pydantic's loc less the tags of the forms; parameters.optimizer.<choices>.choices.sgd.beta.<range>.min has 2."""
    return tuple(step for i, step in enumerate(loc) if loc[0] != "parameters" or i % 4 != 2)


class _Report:
    """Collects problems with their places."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[tuple[Place, Problem]] = []

    def add(self, code: str, loc: Loc, what: str, hint: str = "", *, at_key: bool = False) -> None:
        place = self.document.key_place(loc) if at_key else self.document.place(loc)
        self.problems.append((place, Problem(code=code, where=self.document.where(place), what=what, hint=hint)))


def _place_in(where: str, name: str) -> Place:
    """The place that `where` tells, to sort by."""
    match = re.fullmatch(r":(\d+):(\d+)", where.removeprefix(name))
    return Place(line=int(match[1]), column=int(match[2])) if match else Place(line=0, column=0, override=where)


def _without(raw: Mapping[str, Any], bad: set[Loc]) -> dict[str, Any]:
    """What is right by itself, with stand-ins for what is needed."""
    needed = {"name": "unnamed", "task": "task.py:Task", "parameters": {}}
    clean = {**needed, **{key: value for key, value in raw.items() if (key,) not in bad}}
    if isinstance(clean["parameters"], dict):
        parameters = clean["parameters"].items()
        clean["parameters"] = {key: form for key, form in parameters if ("parameters", key) not in bad}
    return clean


def _without_unbuilt(raw: Mapping[str, Any], report: _Report) -> dict[str, Any]:
    """The file less the keys of the contract whose turn has not come, each of which is reported."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}

    def refuse(loc: Loc, what: str, hint: str, *, at_key: bool = True) -> None:
        report.add("not-built-yet", loc, f"{what} is not built yet", hint, at_key=at_key)

    for key in [key for key in kept if key in Spec.NOT_BUILT]:
        refuse((key,), f"`{key}`", "leave it out")
        del kept[key]
    section = _section(kept, "early_stopping")
    if section.get("type") == "hyperband":
        refuse(("early_stopping", "type"), "`type: hyperband`", "write type: asha, sha, median or none", at_key=False)
        del section["type"]
    section = _section(kept, "finish")
    if section.get("enabled", bool(section)) is True:
        refuse(("finish",), "`finish`", "write enabled: false")
        section.pop("enabled", None)
    return kept


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key)
    return section if isinstance(section, dict) else {}


# --- pydantic's errors in the project's words -------------------------------------------------------------------------

_SECTIONS: dict[str, type[Section]] = {
    key: field.annotation
    for key, field in Spec.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
_PARAMETER_KEYS = frozenset({"when"}).union(*FORMS.values())

_ELSEWHERE = {  # another tool's word -> (whose it is, what it is called here)
    "grace_period": ("Ray", "early_stopping.min_epochs"),
    "max_t": ("Ray", "early_stopping.max_epochs"),
    "max_iter": ("Hyperband", "early_stopping.max_epochs"),
    "min_iter": ("Hyperband", "early_stopping.min_epochs"),
    "min_resource": ("Optuna", "early_stopping.min_epochs"),
    "max_resource": ("Optuna", "early_stopping.max_epochs"),
    "eta": ("the paper", "early_stopping.reduction_factor"),
    "epochs": ("the training loop", "early_stopping.max_epochs"),
    "scheduler": ("Ray", "early_stopping"),
    "pruner": ("Optuna", "early_stopping"),
    "early_terminate": ("W&B", "early_stopping"),
    "num_samples": ("Ray", "search.trials"),
    "n_trials": ("Optuna", "search.trials"),
    "max_trials": ("Vizier", "search.trials"),
    "run_cap": ("W&B", "search.trials"),
    "sampler": ("Optuna", "search.method"),
    "search_alg": ("Ray", "search.method"),
    "algorithm": ("Vizier", "search.method"),
    "mode": ("Ray", "metric.goal"),
    "direction": ("Optuna", "metric.goal"),
    "objective": ("Katib", "metric"),
    "time_budget_s": ("Ray", "budget.hours"),
    "timeout": ("Optuna", "budget.hours"),
    "resources_per_trial": ("Ray", "resources"),
    "num_cpus": ("Ray", "resources.cpus"),
    "num_gpus": ("Ray", "resources.gpus"),
    "cpu": ("Ray", "resources.cpus"),
    "gpu": ("Ray", "resources.gpus"),
    "points_to_evaluate": ("Ray", "baseline"),
    "enqueue_trial": ("Optuna", "baseline"),
    "cv": ("scikit-learn", "evaluate.folds"),
    "n_splits": ("scikit-learn", "evaluate.folds"),
    "n_repeats": ("scikit-learn", "evaluate.repeats"),
    "experiment_name": ("MLflow", "mlflow.experiment"),
    "model_name": ("MLflow", "mlflow.registered_model"),
    "registered_model_name": ("MLflow", "mlflow.registered_model"),
    "param_space": ("Ray", "parameters"),
    "search_space": ("NNI", "parameters"),
    "config": ("Ray", "parameters"),
    "params": ("Optuna", "parameters"),
    "space": ("DeepHyper", "parameters"),
    "program": ("W&B", "task"),
    "random_state": ("scikit-learn", "seed"),
    "study_name": ("Optuna", "name"),
    "ensemble_size": ("DeepHyper", "ensemble.size"),
}
_PARAMETER_ELSEWHERE = {
    "low": ("Optuna", "min"),
    "high": ("Optuna", "max"),
    "lower": ("Ray", "min"),
    "upper": ("Ray", "max"),
    "log": ("Optuna", "distribution: log_uniform"),
    "log_scale": ("Vizier", "distribution: log_uniform"),
    "q": ("Ray", "step"),
    "choice": ("Ray", "values"),
    "options": ("Syne Tune", "values"),
    "categories": ("DeepHyper", "values"),
    "categorical": ("Ray", "values"),
    "condition": ("ConfigSpace", "when"),
    "type": ("Vizier", "min and max (whole numbers give integers), or values"),
}
_OPTIONS = {  # words for one of a key's values
    "bayes": "tpe", "bayesian": "tpe", "optuna": "tpe", "qmc": "sobol", "quasirandom": "sobol", "halton": "sobol",
    "loguniform": "log_uniform", "log": "log_uniform", "log-uniform": "log_uniform",
    "log_uniform_values": "log_uniform",
    "min": "minimize", "minimise": "minimize", "max": "maximize", "maximise": "maximize",
    "successive_halving": "sha", "synchronous": "sha", "asynchyperband": "asha", "off": "none", "no": "none",
    "lr_find": "lr_range", "lr-range": "lr_range",
    "bfloat16": "bf16", "bf16-mixed": "bf16", "16": "bf16", "float16": "bf16", "fp16": "bf16", "half": "bf16",
    "32": "float32", "fp32": "float32", "float": "float32",
}  # fmt: skip
_NOWHERE = {
    "patience": "trials are compared with each other at rungs; there is no patience",
    "n_jobs": "the number of workers is given when launching: --workers",
    "num_workers": "the number of workers is given when launching: --workers",
    "workers": "the number of workers is given when launching: --workers",
    "max_concurrent_trials": "the number of workers is given when launching: --workers",
    "max_concurrent": "the number of workers is given when launching: --workers",
    "address": "the cluster's address is given when launching: --address",
    "run_dir": "the run directory is given when launching: --run-dir",
    "tracking_uri": "set MLFLOW_TRACKING_URI, or give --tracking-uri when launching",
}


def _translate(slip: Mapping[str, Any], loc: Loc, raw: Mapping[str, Any], report: _Report) -> None:
    """One of pydantic's errors as a problem."""
    kind, given, limits = slip["type"], slip["input"], slip.get("ctx") or {}
    key = _key_of(loc)
    if kind == "extra_forbidden":
        _unknown_key(loc, raw, report)
    elif kind == "missing":
        owner = "the file" if len(loc) == 1 else f"`{shown(str(loc[-2]))}`"
        report.add("missing-key", loc[:-1], f"{owner} needs `{loc[-1]}`", _HINTS.get(str(loc[-1]), ""))
    elif kind == "union_tag_not_found":
        _no_form(loc, given, report)
    elif kind == "literal_error":
        _not_an_option(loc, key, given, report)
    elif kind in _TYPES or kind in ("int_from_float", "model_attributes_type"):
        _wrong_type(kind, loc, key, given, report)
    elif kind == "finite_number":
        report.add("not-finite", loc, f"`{key}` is not a finite number (got {given})")
    elif kind in _LIMITS:
        word, name = _LIMITS[kind]
        limit = limits[name]
        limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        report.add("range", loc, f"`{key}` is {word} {limit} (got {as_found(given)})")
    elif "what" in limits:
        report.add(kind, loc, str(limits["what"]).replace("{key}", key), str(limits["hint"]))
    else:
        report.add("invalid", loc, f"`{key}`: {slip['msg']} (got {as_found(given)})")


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_HINTS = {
    "name": "name: digits",
    "task": "task: my_task.py:MyTask, the class that gives data and models",
    "parameters": "parameters: {lr: {distribution: log_uniform, min: 1e-5, max: 1.0}}",
    "min": "a range has both ends: min and max",
    "max": "a range has both ends: min and max",
}
_EXAMPLES: dict[Loc, str] = {
    ("budget", "disk"): "such as 10GiB",
    ("name",): "put it in quotes",
    ("metric", "name"): "such as val_loss",
}


def _wrong_type(kind: str, loc: Loc, key: str, given: object, report: _Report) -> None:
    wanted = _TYPES.get(kind, "a mapping")
    if given is None:
        hint = f"write {loc[-1]}: {{}}" if loc[-2:-1] == ("choices",) else "give it a value, or leave the key out"
        report.add("empty", loc, f"`{key}` is empty, where {wanted} is expected", hint)
        return
    hint = ""
    if wanted in ("a whole number", "a number") and isinstance(given, str) and is_number(given):
        hint = "text in quotes is no number"
    elif wanted == "a whole number" and isinstance(given, float) and given.is_integer() and abs(given) < 1e15:
        hint = f"write {int(given)}"
    elif wanted == "true or false" and str(given).lower() in ("yes", "no", "on", "off"):
        hint = f"write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
    elif wanted == "text":
        hint = _EXAMPLES.get(loc, "" if isinstance(given, dict | list) else "put it in quotes")
    elif wanted == "a list" and isinstance(given, str):
        hint = f"write [{as_written(given)}]"
    elif wanted == "a mapping" and len(loc) == 1 and (hint := _section_hint(str(loc[0]), given)):
        pass
    elif loc == ("metric",) and isinstance(given, str):
        hint = f"write metric: {{name: {as_written(given)}}}"
    report.add("type", loc, f"`{key}` is {wanted} (got {as_found(given)})", hint)


_MAIN_KEYS = {"search": "trials", "evaluate": "folds", "confirm": "trials", "ensemble": "size", "lr_range": "seeds"}


def _section_hint(section: str, given: object) -> str:
    """How to write what was meant by a single value in place of a section; "" where nobody knows."""
    word = str(given).lower()
    if section == "finish":
        return "leave it out: it is not built yet"
    fields = _SECTIONS[section].model_fields if section in _SECTIONS else {}
    if "enabled" in fields and word in ("true", "yes", "on", "false", "no", "off", "none"):
        return f"write {{enabled: {'true' if word in ('true', 'yes', 'on') else 'false'}}}"
    if isinstance(given, bool):
        return ""
    if isinstance(given, int) and section in _MAIN_KEYS:
        return f"write {{{_MAIN_KEYS[section]}: {given}}}"
    if section == "early_stopping" and isinstance(given, str):
        return f"write {{type: {as_written(given)}}}"
    if section == "search" and isinstance(given, str):
        return f"write {{method: {as_written(given)}}}"
    return ""


def _not_an_option(loc: Loc, key: str, given: object, report: _Report) -> None:
    if loc == ("search", "method") and given in ("grid", "grid_search"):
        what = "`method: grid` is not offered: on equal budgets random search does better, since each trial tries new "
        what += "values of every parameter (128 grid points found what 12 to 16 random trials find)"
        report.add("grid", loc, what, "write method: sobol, or random")
        return
    options = _options_at(loc)
    hint = ""
    if isinstance(given, str) or (isinstance(given, int) and not isinstance(given, bool)):
        word = str(given).lower()
        near = _OPTIONS.get(word) or next(iter(get_close_matches(word, options, 1)), "")
        hint = f"did you mean {near}?" if near in options else ""
    elif given is None:
        hint = "give it a value, or leave the key out"
    listed = f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else options[0]
    report.add("option", loc, f"`{key}` is {listed} (got {as_found(given)})", hint)


def _options_at(loc: Loc) -> list[str]:
    """The values that a key can have."""
    model: type[Section] = Spec if len(loc) == 1 else _SECTIONS.get(str(loc[0]), Range)
    annotation = model.model_fields[str(loc[-1])].annotation
    literals = [annotation, *getattr(annotation, "__args__", ())]
    return [
        str(option) for part in literals for option in getattr(part, "__args__", ()) if isinstance(option, str | int)
    ]


def _unknown_key(loc: Loc, raw: Mapping[str, Any], report: _Report) -> None:
    """What an unknown key may have meant: a misspelling, another tool's word, or a key of another section."""
    key = str(loc[-1])
    if loc[0] == "parameters":
        form = form_of(_at(raw, loc[:-1])) or ""
        known = sorted(FORMS.get(form, _PARAMETER_KEYS) | {"when"})
        if key in _PARAMETER_KEYS:
            what = f"`{key}` does not go with {' and '.join(sorted(FORMS[form] & set(_at(raw, loc[:-1]))))}"
            report.add("unknown-key", loc, what, f"a parameter with {form[1:-1]} has: {', '.join(known)}", at_key=True)
            return
        owner, hint = f"`{shown(str(loc[-2]))}`", _parameter_hint(key, known)
    elif len(loc) == 1:
        known = list(Spec.model_fields)
        owner, hint = report.document.name, _key_hint(key, known, "")
    else:
        known = sorted(_SECTIONS[str(loc[0])].model_fields, key="enabled".__eq__)  # the less telling one last
        owner, hint = f"`{loc[0]}`", _key_hint(key, known, str(loc[0]))
    what = f"`{shown(key)}` is not a key of {owner} (known: {', '.join(known)})"
    report.add("unknown-key", loc, what, hint, at_key=True)


def _key_hint(key: str, known: Sequence[str], section: str) -> str:
    """A hint for an unknown key of a section, or of the whole file (section "")."""
    word = key.lower().replace("-", "_")
    if word in known:
        return f"did you mean {word}?"
    if word in _NOWHERE:
        return _NOWHERE[word]
    if word in _ELSEWHERE:
        whose, here = _ELSEWHERE[word]
        owner, _, leaf = here.rpartition(".")
        called = f"{whose}'s {word} is called {leaf} here"
        return called if owner == section else f"{called}, under `{owner}`" if owner else f"{called}, at the top"
    owners = [name for name, model in _SECTIONS.items() if word in model.model_fields and word != "enabled"]
    if owners:
        return f"`{word}` belongs under `{'` or `'.join(owners)}`"
    if near := get_close_matches(word, known, 1):
        return f"did you mean {near[0]}?"
    if section and word in Spec.model_fields:
        return f"`{word}` belongs at the top, not under `{section}`"
    return ""


def _parameter_hint(key: str, known: Sequence[str]) -> str:
    word = key.lower().replace("-", "_")
    if word in _PARAMETER_ELSEWHERE:
        whose, here = _PARAMETER_ELSEWHERE[word]
        return f"{whose}'s {word} is written {here} here"
    near = get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def _no_form(loc: Loc, given: object, report: _Report) -> None:
    """A parameter that is written in none of the ways, or in two at once."""
    key = shown(str(loc[-1]))
    ways = "value, values, min and max, or choices"
    if given is None:
        report.add("empty", loc, f"`{key}` is empty", f"a parameter has {ways}")
    elif isinstance(given, list):
        hint = f"write {key}: {{values: [{', '.join(map(as_written, given[:4]))}{', …' if len(given) > 4 else ''}]}}"
        report.add("parameter-form", loc, f"`{key}` is a list, and a parameter is a mapping", hint)
    elif not isinstance(given, dict):
        hint = f"write {key}: {{value: {as_written(given)}}}"
        report.add("parameter-form", loc, f"`{key}` is a single value, and a parameter is a mapping", hint)
    elif found := [name for name in ("value", "values", "min", "max", "choices") if name in given]:
        what = f"`{key}` has {', '.join(found[:-1])} and {found[-1]}, which exclude each other"
        report.add("parameter-form", loc, what, f"a parameter has one of: {ways}")
    else:
        words = [str(word) for word in given if word not in _PARAMETER_KEYS]
        hints = dict.fromkeys(hint for word in words if (hint := _parameter_hint(word, sorted(_PARAMETER_KEYS))))
        got = f" (got {', '.join(map(shown, given))})" if given else ""
        report.add("parameter-form", loc, f"`{key}` has none of {ways}{got}", "; ".join(hints))


# --- what ties the sections together ----------------------------------------------------------------------------------


def _check_relations(spec: Spec, raw: Mapping[str, Any], report: _Report) -> None:
    """Problems between parts that are each right; parts that are wrong by themselves are passed over."""
    written = raw.get("parameters")
    written = written if isinstance(written, dict) else {}
    if raw.get("parameters") == {}:
        report.add("empty", ("parameters",), "`parameters` is empty", "there is nothing to search; name at least one")
    known = dict(_written_names((), written))
    parameters = tuple(flat_parameters(spec.parameters))
    before = len(report.problems)
    _check_names(written, report)
    for loc, form in forms_in((), spec.parameters):
        _check_conditions(loc, form, parameters, known, report)
    if circle := condition_circle(parameters):
        ring = " waits for ".join(f"`{name}`" for name in circle)
        report.add("when-circle", _way_to(circle[0], spec), f"`when` goes in a circle: {ring}", "leave one of them out")
    if len(report.problems) == before and known.keys() == {parameter.name for parameter in parameters}:
        for parameter in Space(parameters=parameters).never():
            what = f"`{parameter.name}` can never occur: its conditions exclude each other"
            report.add("never", _way_to(parameter.name, spec), what, "mend its `when`, or leave it out")
        if spec.baseline is not None and len(report.problems) == before:
            _check_baseline(spec.baseline, Space(parameters=parameters), report)
    _check_bounds_from(spec, report)
    _check_per(spec, parameters, known, report)
    if not (spec.resources.cpus or spec.resources.gpus or spec.resources.custom):  # thousands of them would fit
        what = "`resources.cpus` is above 0 where a worker holds nothing else"
        report.add("range", ("resources", "cpus"), what, "write cpus: 1, or a share such as 0.5")
    if spec.evaluate.enabled and not spec.shuffle:
        what = "`evaluate` cuts the rows into folds by chance, and shuffle: false says that their order matters"
        hint = "leave `evaluate` out: a later part of the sequence as val is the honest measure there"
        report.add("folds", ("evaluate",), what, hint, at_key=True)


def _check_baseline(given: Mapping[str, Value], space: Space, report: _Report) -> None:
    """A config of the user's has a value for each parameter that it calls for, and no other."""
    for slip in config_slips(space, given):
        way = ("baseline",) if slip.name is None else ("baseline", slip.name)
        report.add("baseline", way, slip.what, slip.hint, at_key=True)


def _way_to(name: str, spec: Spec) -> Loc:
    return next(("parameters", *loc) for loc, _ in forms_in((), spec.parameters) if loc[-1] == name)


def _written_names(loc: Loc, raw: Mapping[str, Any]) -> Iterator[tuple[str, Loc]]:
    """Every parameter's name and way below `parameters`, also of those that are wrong."""
    for name, form in raw.items():
        yield name, (*loc, name)
        choices = form.get("choices") if isinstance(form, dict) else None
        for choice, inner in choices.items() if isinstance(choices, dict) else ():
            if isinstance(inner, dict):
                yield from _written_names((*loc, name, "choices", choice), inner)


def _check_names(raw: Mapping[str, Any], report: _Report) -> None:
    """Names that config keys can have, each in one place of the space, or under several choices of one parent."""
    seen: dict[str, Loc] = {}
    for name, loc in _written_names((), raw):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            what = f"`{shown(name)}` is not a name: a letter or `_`, then letters, digits and `_`, 100 in all"
            better = re.sub(r"\W", "_", name, flags=re.ASCII)
            hint = f"write {better}" if re.fullmatch(r"[A-Za-z_]\w{0,99}", better) and better != name else ""
            report.add("name", ("parameters", *loc), what, hint, at_key=True)
        first = seen.setdefault(name, loc)
        siblings = len(loc) == len(first) > 1 and loc[:-2] == first[:-2] and loc[-2] != first[-2]
        if first != loc and not siblings:
            place = report.document.key_place(("parameters", *first))
            line = f"line {place.line}" if not place.override else place.override
            what = f"`{shown(name)}` is the name of two parameters (first in {line})"
            hint = "one name may come back only under another choice of the same parent"
            report.add("duplicate-parameter", ("parameters", *loc), what, hint, at_key=True)


def _check_conditions(
    loc: Loc, form: Form, parameters: Sequence[Parameter], known: Mapping[str, Loc], report: _Report
) -> None:
    """Every `when` names a parent with listed values, and values that this can take."""
    for parent, accepted in form.when.items():
        way = ("parameters", *loc, "when", parent)
        own = [parameter for parameter in parameters if parameter.name == parent]
        if not own:
            if parent in known:
                continue  # wrong by itself, and reported
            near = get_close_matches(parent, list(known), 1)
            hint = f"did you mean {near[0]}?" if near else f"parameters: {', '.join(map(shown, known))}"
            report.add("when-unknown", way, f"`when` names `{shown(parent)}`, which is no parameter", hint, at_key=True)
        elif not all(parameter.values for parameter in own):
            what = f"`when` names `{parent}`, which is a range; it needs a parameter with listed values"
            report.add("when-range", way, what, f"give `{parent}` values: […] or choices", at_key=True)
        else:
            values = [value for parameter in own for value in parameter.values]
            for value in accepted_values(accepted):
                if any(same_value(value, other) for other in values):
                    continue
                near = get_close_matches(str(value), [str(other) for other in values], 1)
                what = f"`{parent}` is never {as_written(value)} (it is one of: {', '.join(map(as_written, values))})"
                report.add("when-value", way, what, f"did you mean {near[0]}?" if near else "")


def _check_bounds_from(spec: Spec, report: _Report) -> None:
    """`bounds_from: lr_range` is for a log-uniform `lr`, with the stage switched on and ramps that reach it."""
    for loc, form in forms_in((), spec.parameters):
        if not isinstance(form, Range) or form.bounds_from is None:
            continue
        way = ("parameters", *loc, "bounds_from")
        if loc[-1] != "lr":
            what = f"`{loc[-1]}` takes bounds_from: lr_range, which measures `lr` alone"
            report.add("bounds-from", way, what, "leave bounds_from out")
        elif form.distribution != "log_uniform":
            what = "`lr` takes bounds_from: lr_range, so it is log-uniform"
            report.add("bounds-from", way, what, "write distribution: log_uniform")
        elif not spec.lr_range.enabled:
            what = "`lr` takes bounds_from: lr_range, which is switched off"
            report.add("bounds-from", way, what, "leave bounds_from out, or lr_range.enabled: false")
        elif form.min > spec.lr_range.max or form.max < spec.lr_range.min:
            what = f"`lr` lies in {form.min} to {form.max}, where no ramp comes ({spec.lr_range.min} to "
            report.add("bounds-from", way, f"{what}{spec.lr_range.max})", "widen lr_range's min and max")


def _check_per(spec: Spec, parameters: Sequence[Parameter], known: Mapping[str, Loc], report: _Report) -> None:
    """`per` names searched parameters with listed values, together with all that these depend on."""
    per = spec.lr_range.per or ()
    for i, name in enumerate(per):
        way: Loc = ("lr_range", "per", i)
        own = [parameter for parameter in parameters if parameter.name == name]
        if name in per[:i]:
            report.add("per", way, f"`per` names `{name}` twice")
        elif not own:
            if name in known:
                continue  # wrong by itself, and reported
            near = get_close_matches(name, list(known), 1)
            hint = f"did you mean {near[0]}?" if near else ""
            report.add("per", way, f"`per` names `{shown(name)}`, which is no parameter", hint)
        elif any(parameter.kind != "categorical" for parameter in own):
            kind = "a constant" if own[0].kind == "constant" else "a range"
            what = f"`per` names `{name}`, which is {kind}; branches are made by values or choices"
            report.add("per", way, what, "leave it out")
        else:
            for parent in dict.fromkeys(c.parent for parameter in own for c in parameter.conditions):
                searched = any(p.name == parent and p.searched for p in parameters)
                if searched and parent not in per:
                    what = f"`per` names `{name}`, which exists only under some values of `{parent}`"
                    report.add("per", way, what, f"add {parent} to per")


def _key_of(loc: Loc) -> str:
    """What a message calls a place: the parameter or section, or a key with its owner; an index alone says nothing."""
    names = [step for step in loc if isinstance(step, str)]
    if loc[0] == "parameters" and len(names) % 3 == 2:  # a parameter: parameters.a, or parameters.a.choices.b.c
        return shown(names[-1])
    return shown(".".join(names[-2:]))


def _at(raw: Any, loc: Loc) -> Any:
    for step in loc:
        raw = raw[step]
    return raw
