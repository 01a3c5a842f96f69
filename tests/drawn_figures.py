"""The figures behind the bytes that a module draws, so that a test can ask what they show."""

from __future__ import annotations

from types import ModuleType

import pytest
from matplotlib.figure import Figure


def drawn_by(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Fills as the module makes its files."""
    figures: list[Figure] = []
    to_png = module.png

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return bytes(to_png(figure))

    monkeypatch.setattr(module, "png", keep)
    return figures
