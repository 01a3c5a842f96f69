"""The one way in which fused training says that it cannot: the trials are sound, only not together."""

from __future__ import annotations


class LanesRefused(Exception):
    """These trials cannot be trained as one program; each alone they can. `reason` says why in plain words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
