"""The figure of a batch: drawn for any numbers, on one scale, with targets and what was left out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hpsearch.report import batch_figure as module
from hpsearch.report.batch_figure import BatchPlot, batch_figure, batch_plot
from tests.drawn_figures import drawn_by

PLOT: dict[str, Any] = {
    "kind": "pictures",
    "received": np.linspace(-1, 2, 16 * 8 * 6).reshape(16, 8, 6),
    "before": None,
    "target": np.arange(16) % 4,
    "shape": [32, 1, 8, 6],
    "dtype": "float32",
    "note": "",
    "n_not_finite": 0,
    "low": -1.0,
    "high": 2.0,
    "mean": 0.5,
    "std": 0.8,
    "counts": [1, 2, 3],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return drawn_by(module, monkeypatch)


def plot(**changes: Any) -> BatchPlot:
    return BatchPlot(**(PLOT | changes))


def texts(figure: Figure) -> list[str]:
    return [text for part in [figure, *figure.subfigs] if (text := part.get_suptitle())]


def images(figure: Figure) -> list[Any]:
    return [image for panel in figure.axes for image in panel.images]


def test_each_example_stands_below_its_target_on_the_batchs_own_scale(drawn: list[Figure]) -> None:
    assert batch_figure(plot(note="averaged down from 64 × 48")).startswith(b"\x89PNG")
    (figure,) = drawn
    assert texts(figure) == [
        "A batch of 32 × 1 × 8 × 6, float32; each shown: averaged down from 64 × 48",
        "16 of 32 examples as the model receives them",
    ]
    shown = images(figure)
    assert [panel.get_title() for panel in figure.axes[:5]] == ["0", "1", "2", "3", "0"]
    assert {image.get_clim() for image in shown} == {(-1.0, 2.0)}
    assert np.array_equal(shown[3].get_array(), PLOT["received"][3])


def test_histogram_tells_the_figures_of_all_numbers(drawn: list[Figure]) -> None:
    batch_figure(plot(n_not_finite=3))
    panel = drawn[0].axes[-1]
    assert panel.get_title(loc="left") == (
        "1,536 numbers from -1 to 2, mean 0.5, standard deviation 0.8; 3 of 1,536 are NaN or infinite (red)"
    )
    (steps,) = panel.patches
    assert steps.get_data().values.tolist() == [1, 2, 3]  # type: ignore[attr-defined]
    assert steps.get_data().edges.tolist() == [-1, 0, 1, 2]  # type: ignore[attr-defined]


def test_before_and_after_augment_stand_below_each_other_example_by_example(drawn: list[Figure]) -> None:
    batch_figure(plot(before=PLOT["received"] + 0.5))
    (figure,) = drawn
    assert texts(figure)[1:] == ["8 of 32 examples before augment()", "8 of 32 examples as the model receives them"]
    shown = images(figure)
    assert len(shown) == 16
    assert np.allclose(shown[2].get_array(), shown[10].get_array() + 0.5)
    assert shown[2].get_clim() == shown[10].get_clim()  # what became brighter looks brighter


def test_inputs_that_augment_scales_have_a_scale_of_their_own_which_is_told(drawn: list[Figure]) -> None:
    before = np.tile(np.array([[0, 255]], dtype=np.uint8), (16, 8, 3))
    batch_figure(plot(before=before))
    assert texts(drawn[0])[1] == "8 of 32 examples before augment() (on a scale of their own: 0 to 255)"
    assert images(drawn[0])[0].get_clim() == (0.0, 255.0)


def test_rows_are_one_panel_with_targets_at_its_side(drawn: list[Figure]) -> None:
    rows = np.arange(24.0).reshape(4, 6)
    batch_figure(plot(kind="rows", received=rows, target=np.array([0.5, 1.5, -2.0, 3.25]), shape=[4, 6]))
    panel = drawn[0].axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0.5", "1.5", "-2", "3.25"]
    assert np.array_equal(panel.images[0].get_array(), rows)


def test_example_that_is_not_finite_is_red(drawn: list[Figure]) -> None:
    grey = PLOT["received"].copy()
    grey[0, 0, 0] = np.nan
    colour = np.stack([PLOT["received"]] * 3, axis=-1)
    colour[0, 0, 0, 1] = np.inf
    batch_figure(plot(received=grey, n_not_finite=1))
    batch_figure(plot(received=colour, shape=[32, 3, 8, 6], n_not_finite=1))
    first = images(drawn[0])[0]
    assert first.cmap(first.get_array())[0, 0].tolist()[:3] == pytest.approx([0xD5 / 255, 0x5E / 255, 0])
    assert images(drawn[1])[0].get_array()[0, 0].tolist() == [1, 0, 0]
    assert images(drawn[1])[0].get_array()[4, 0].tolist() != [1, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e308, 0.0, -1e-320])
@pytest.mark.parametrize("kind", ["pictures", "rows"])
def test_any_numbers_can_be_drawn(kind: str, value: float) -> None:
    received = np.full((2, 5, 5) if kind == "pictures" else (2, 5), value)
    known = value if np.isfinite(value) else None
    figures: dict[str, Any] = dict.fromkeys(("low", "high", "mean", "std"), known)
    assert batch_figure(plot(kind=kind, received=received, target=None, shape=[2, 5], counts=[], **figures)).startswith(
        b"\x89PNG"
    )


@pytest.mark.parametrize("size", [(1, 2), (2, 128), (128, 2)])
def test_pictures_of_any_size_keep_the_figure_small(size: tuple[int, int], drawn: list[Figure]) -> None:
    batch_figure(plot(received=np.zeros((16, *size))))
    width, height = drawn[0].get_size_inches()
    assert 3 < height < 9
    assert width < 10


def test_what_a_job_told_is_what_is_drawn() -> None:
    told = {name: PLOT[name] for name in PLOT if name not in ("received", "before", "target")}
    arrays = {"received": PLOT["received"], "target": PLOT["target"]}
    assert batch_plot(told, arrays) == BatchPlot(**(PLOT | arrays))


def test_of_a_batch_without_finite_numbers_a_job_tells_no_figures() -> None:
    told = {"kind": "rows", "shape": [2, 1], "dtype": "float32", "note": "", "n_not_finite": 2}
    found = batch_plot(told, {"received": np.full((2, 1), np.nan)})
    assert (found.low, found.mean, found.counts, found.target) == (None, None, (), None)
    assert batch_figure(found).startswith(b"\x89PNG")


def test_matplotlib_is_not_imported_before_a_figure_is_drawn() -> None:
    code = "import sys, hpsearch.report.batch_figure; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
