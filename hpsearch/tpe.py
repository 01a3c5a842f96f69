"""Optuna's TPE as a sampler of ours: a trial's config depends on how earlier trials went.

What is known (who was drawn with what, how far it came, how well) is kept here; an Optuna study is only built from it
to be asked. Optuna's sampler is made anew for each trial, seeded by (study seed, trial number). So the next config is a
function of what is known, and replaying a journal's draws and results gives the same one as going on would have.

Trials that run have been told nothing about yet: the constant liar counts them as bad, so that workers do not all try
the same place. A trial that has been observed counts with its latest objective, paused or complete; one that diverged or failed
counts as worse than all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from hpsearch.job import Config, Value
from hpsearch.sampler import BoundsOf, derived_seed
from hpsearch.space import Bounds, Parameter, Space, same_value, steps_between

Coded = float | int
"""A value as Optuna sees it: a number as it is, a place in a list or on a ladder of steps as an integer from 0."""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A trial's config, and the same as Optuna sees it: active parameters, by key."""

    config: Config
    coded: dict[str, Coded]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """How a trial went, when last heard of. None: it diverged or failed."""

    objective: float | None


class TpeSampler:
    """Tree-structured Parzen estimator, multivariate, over groups of parameters where some are conditional.

    Not counter-based: config *i* depends on the order in which trials were drawn and observed. The first trials, until
    10 have been observed, are independent and uniform.

    Source: Bergstra et al. 2011; Falkner et al. 2018 (multivariate); Optuna's implementation.
    """

    def __init__(self, space: Space, study_seed: int) -> None:
        self._space = space
        self._study_seed = study_seed
        self._codes = tuple(_Code(parameter, key) for parameter, key in _keyed(space))
        self._drawn: dict[int, _Drawn] = {}  # in the order of drawing, which Optuna weighs trials by
        self._seen: dict[int, _Seen] = {}
        self._drafts: dict[int, _Drawn] = {}  # of trials that wait for measured bounds, which are not in these yet
        self._study: optuna.Study | None = None  # None: something changed that Optuna cannot be told
        self._place: dict[int, int] = {}  # trial -> its number in that Optuna study

    def config(self, number: int, bounds: BoundsOf) -> Config | None:
        """The trial's config, the same whenever it is asked for again; None while its bounds are not measured.

        `bounds` is asked with a stand-in for what is measured, the middle of the user's own range.
        """
        if number in self._drawn:
            return dict(self._drawn[number].config)
        draft = self._drafts.get(number)
        if draft is not None and bounds(self._with_stand_ins(draft)) is None:
            return None  # without asking Optuna again: many may wait, and each is asked for often
        with _quietly():
            drawn = self._draw(number, bounds, draft)
        if drawn is None:
            return None
        self._drafts.pop(number, None)
        self._add(number, drawn)
        return dict(drawn.config)

    def restore(self, number: int, config: Config) -> None:
        """Trial `number` was drawn with this config, here or before the study was resumed.

        Raises:
            ValueError: the config is not one of the space's.
        """
        drawn = _Drawn(config=dict(config), coded={})
        for code in self._codes:
            if code.is_active(config):
                drawn.coded[code.key] = code.encoded(config[code.parameter.name])
        if self._drawn.get(number) == drawn:
            return
        if number in self._drawn:
            self._study = None
        self._drafts.pop(number, None)
        self._drawn.pop(number, None)
        with _quietly():
            self._add(number, drawn)

    def observe(self, number: int, config: Config, objective: float | None, epoch: int) -> None:
        """The trial has come to `epoch` with this objective (minimised); None: it diverged or failed.

        Said several times for a trial, the last word counts.

        Raises:
            ValueError: the objective is not finite.
        """
        self.restore(number, config)
        seen = _Seen(objective=objective)
        before = self._seen.get(number)
        if seen == before:
            return
        self._seen[number] = seen
        if before is not None or self._study is None:
            self._study = None  # Optuna takes one result per trial
        elif objective is None:
            self._study.tell(self._place[number], state=TrialState.PRUNED)
        else:
            self._study.tell(self._place[number], objective)
