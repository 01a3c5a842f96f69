"""Whether a new version takes the alias: a function of what both versions tell about themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a version's tags say about its test score."""

    version: str
    test_fingerprint: str  # "" where there was no test split
    metric: str
    goal: Literal["minimize", "maximize"]
    value: float | None
    beats_baseline: bool | None = None  # than ignoring the inputs, beyond noise; None: not known


@dataclass(frozen=True, kw_only=True)
class AliasDecision:
    """Whether the alias moves to the new version, and why, in words."""

    moves: bool
    why: str


def decide_alias(new: Scored, holder: Scored | None, *, alias: str) -> AliasDecision:
    """The alias moves to the first version, and later only to one that beats its holder on the same test split.

    Equal values do not move it: whoever serves the holder should not have to change for nothing. A value that is not
    finite never beats another. One that is no better than ignoring the inputs gets no alias, not even as the first.

    >>> old = Scored(version="1", test_fingerprint="f", metric="loss", goal="minimize", value=0.30)
    >>> new = Scored(version="2", test_fingerprint="f", metric="loss", goal="minimize", value=0.25)
    >>> decide_alias(new, old, alias="champion")
    AliasDecision(moves=True, why='test loss 0.25 against 0.3 of version 1')
    """
    if new.beats_baseline is False:
        return AliasDecision(moves=False, why=f"it is not better than ignoring the inputs, so it is not {alias}")
    if holder is None:
        return AliasDecision(moves=True, why=f"no version was {alias}")
    if holder.version == new.version:
        return AliasDecision(moves=True, why=f"it is {alias} already")
    stays = f"version {holder.version} stays {alias}"
    if not new.test_fingerprint:
        return AliasDecision(moves=False, why=f"{stays}: without a test split the two cannot be compared")
    if not holder.test_fingerprint:
        return AliasDecision(moves=False, why=f"{stays}: it was made without a test split")
    if new.test_fingerprint != holder.test_fingerprint:
        return AliasDecision(moves=False, why=f"{stays}: it was measured on another test split")
    if (new.metric, new.goal) != (holder.metric, holder.goal):
        return AliasDecision(moves=False, why=f"{stays}: it was measured by {holder.metric}, this one by {new.metric}")
    if new.value is None or holder.value is None:
        return AliasDecision(moves=False, why=f"{stays}: a test score is missing")
    scores = f"test {new.metric} {new.value:.4g} against {holder.value:.4g} of version {holder.version}"
    better = new.value < holder.value if new.goal == "minimize" else new.value > holder.value
    return AliasDecision(moves=better, why=scores if better else f"{stays}: {scores}")
