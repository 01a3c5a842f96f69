"""Which config a trial gets.

Sobol and random are counter-based: config *i* is a function of (space, study seed, *i*), so it is the same for any
number of workers, after any resume, and when `trials` is raised later. A point of the unit cube is drawn over all
parameters of the space, and `Space.config` reads it; nothing here knows what a parameter is.

Where a learning rate's bounds are measured first, they are asked for with the config that the point gives without
them, since they depend on its branch. The same point is then read again, narrowed: a trial's other values do not
depend on the measurement.

numpy and SciPy are imported when the first point is drawn, not before: `scipy.stats` alone takes half a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from hpsearch.job import Config
from hpsearch.space import Bounds, Space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BoundsOf = Callable[[Config], Bounds | None]
"""From a config drawn without bounds to the measured bounds of its branch; {} when none apply to it, None when they
are not measured yet and the trial has to wait."""

BLOCK = 256  # Sobol points drawn at once, 2 µs for each; a power of two, or SciPy warns


class Sampler(Protocol):
    """Gives trials their configs."""

    in_any_order: bool
    """Whether a trial's config is the same whenever it is asked for."""

    def config(self, number: int, bounds: BoundsOf) -> Config | None:
        """The config of trial `number`, counted from 0; None while its bounds are not measured."""

    def restore(self, number: int, config: Config) -> None:
        """Trial `number` was drawn with this config, here or before the study was resumed."""

    def observe(self, number: int, config: Config, objective: float | None, epoch: int) -> None:
        """The trial has come to `epoch` with this objective (minimised); None: it diverged or failed."""


class _CounterBased:
    """A sampler that asks nobody how earlier trials went."""

    in_any_order = True

    def __init__(self, space: Space, study_seed: int) -> None:
        self._space = space
        self._study_seed = study_seed

    def config(self, number: int, bounds: BoundsOf) -> Config | None:
        point = self._point(number)
        config = self._space.config(point)
        measured = bounds(config)
        if measured is None:
            return None
        return self._space.config(point, bounds=measured) if measured else config

    def restore(self, number: int, config: Config) -> None:
        """Nothing: the config is drawn again when it is asked for."""

    def observe(self, number: int, config: Config, objective: float | None, epoch: int) -> None:
        """Nothing: later configs do not depend on it."""

    def _point(self, number: int) -> list[float]:
        raise NotImplementedError  # abstract: Sobol and random differ in this alone


class SobolSampler(_CounterBased):
    """Points of a scrambled Sobol sequence: as random as needed, and more even than chance.

    Each parameter alone is stratified: of the first 2^k trials, one lies in each 1/2^k of its range.

    Source: Owen 1998 (scrambling); Bousquet et al. 2017, arXiv:1706.03200 (quasi-random search).
    """

    def __init__(self, space: Space, study_seed: int) -> None:
        super().__init__(space, study_seed)
        self._points = _SobolPoints(space.n_dims, study_seed)

    def _point(self, number: int) -> list[float]:
        return self._points.at(number)


class RandomSampler(_CounterBased):
    """Independent uniform points: what statistics about random search assume.

    Source: Bergstra and Bengio 2012.
    """

    def _point(self, number: int) -> list[float]:
        import numpy as np

        _check_number(number)
        point: list[float] = (
            np.random.default_rng(derived_seed(self._study_seed, "random", number)).random(self._space.n_dims).tolist()
        )
        return point


def trial_seed(study_seed: int, number: int) -> int:
    """The seed of all that is random in a trial: initial weights, data order, dropout. In [0, 2^63).

    A hash, so that neighbouring trials and studies share nothing, and torch, numpy and `random` all take it.

    >>> trial_seed(0, 17)
    6804424940628260654
    """
    _check_number(number)
    return derived_seed(study_seed, "trial", number)


def derived_seed(study_seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) for one purpose: the first 63 bits of BLAKE2b over "study_seed/purpose/…" as text."""
    text = "/".join(map(str, (study_seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def ramp_config(space: Space, study_seed: int, branch: Config, index: int) -> Config:
    """What ramp `index` of a branch trains with: the branch's values, all others from point `index` of the study's
    Sobol sequence, whatever the study's own sampler. Without `lr` where that is searched, since the ramp sets it.

    Raises:
        ValueError: the space cannot have the branch's values, or the index is negative.
    """
    config = space.config(_SobolPoints(space.n_dims, study_seed).at(index), fixed=branch)
    if any(parameter.name == "lr" for parameter in space.searched):
        config.pop("lr", None)
    return config


class _SobolPoints:
    """A scrambled Sobol sequence as a list that nobody has to read from the start."""

    def __init__(self, n_dims: int, study_seed: int) -> None:
        self._n_dims = n_dims
        self._seed = derived_seed(study_seed, "sobol")
        self._blocks: dict[int, NDArray[np.float64]] = {}  # 8 bytes a coordinate, for as many as were asked for

    def at(self, number: int) -> list[float]:
        """Point `number`, each coordinate in [0, 1)."""
        _check_number(number)
        if self._n_dims == 0:
            return []
        block, place = divmod(number, BLOCK)
        if block not in self._blocks:
            self._blocks[block] = self._draw(block)
        point: list[float] = self._blocks[block][place].tolist()
        return point

    def _draw(self, block: int) -> NDArray[np.float64]:
        import numpy as np
        from scipy.stats import qmc

        sequence = qmc.Sobol(self._n_dims, scramble=True, rng=np.random.default_rng(self._seed))
        if block:
            sequence.fast_forward(block * BLOCK)
        points: NDArray[np.float64] = sequence.random(BLOCK)
        return points


def _check_number(number: int) -> None:
    if number < 0:
        raise ValueError(f"trials are counted from 0 (got {number})")
