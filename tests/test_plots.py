"""Figures of hpsearch/report/plots.py: that they are drawn for any values, and what their axes show."""

from __future__ import annotations

import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from hpsearch.lr_curve import ramp_lrs
from hpsearch.report import plots
from hpsearch.report.plots import (
    CurvePlot,
    LrRangePlot,
    ParameterPlot,
    SearchPoint,
    ensemble_figure,
    learning_curves_figure,
    lr_range_figure,
    search_figure,
)

LRS = [float(lr) for lr in ramp_lrs(1e-5, 10.0, 50)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the bytes, so that a test can ask what they show."""
    figures: list[Figure] = []
    to_png = plots._png

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return to_png(figure)

    monkeypatch.setattr(plots, "_png", keep)
    return figures


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def ramp(*, blow_up: float = 1e6) -> list[float]:
    return [2.3 - 2 * i / 35 if i < 35 else 0.3 + blow_up * (i - 34) for i in range(50)]


def branch(**changes: object) -> LrRangePlot:
    values: dict[str, object] = {
        "branch": "optimizer=sgd", "lrs": LRS, "losses": [ramp(), ramp()[:40], [*ramp()[:36], math.nan]],
        "median_curve": ramp()[:40] + [None] * 10, "lr": 0.05, "low": 0.005, "high": 0.15, "spread_decades": 0.1,
    }  # fmt: skip
    return LrRangePlot(**{**values, **changes})  # type: ignore[arg-type]


def test_ramp_that_blows_up_to_a_million_does_not_flatten_the_part_that_falls(drawn: list[Figure]) -> None:
    lr_range_figure([branch()])
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom < 0.3
    assert 2.3 < top < 4.0


def test_negative_losses_are_shown_whole(drawn: list[Figure]) -> None:
    lr_range_figure([branch(losses=[[v - 50 for v in ramp(blow_up=1.0)]], median_curve=())])
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom < -49.7
    assert top > -47.7


def test_lr_figure_has_a_panel_per_branch_and_names_all_it_shows(drawn: list[Figure]) -> None:
    lr_range_figure([branch(), branch(branch="optimizer=adamw", probes={1e-3: 1.0, 1e-2: 0.5, 1.0: math.inf})])
    first, second = drawn[0].axes
    assert first.get_title(loc="left") == "optimizer=sgd\nlr 0.05 in [0.005, 0.15] · seeds within 0.10 decades"
    assert second.get_title(loc="left").startswith("optimizer=adamw")
    assert first.get_xscale() == "log"
    assert first.get_xlabel() == "learning rate (log scale)"
    assert set(legend_of(drawn[0])) == {
        "single seeds",
        "median of seeds, smoothed",
        "interval to search",
        "suggestion",
        "constant rates",
        "constant rates, loss not finite",
    }
    assert len(first.lines) == 3 + 1 + 1  # every seed, the median, the suggestion


def test_branch_without_a_finite_loss_is_drawn_and_says_so(drawn: list[Figure]) -> None:
    size_of(lr_range_figure([branch(losses=[[], [math.nan]], median_curve=(), lr=None, low=None, high=None)]))
    assert "no suggestion" in drawn[0].axes[0].get_title(loc="left")


def test_losses_at_the_end_of_the_floats_can_be_drawn() -> None:
    size_of(lr_range_figure([branch(losses=[[1e308, -1e308, 1e308, 5e-324] * 10], median_curve=[1e308] * 40)]))
    size_of(lr_range_figure([branch(losses=[[0.0] * 50], median_curve=[0.0] * 50, probes={0.1: 1e308, 1.0: -1e308})]))


def curves() -> list[CurvePlot]:
    return [
        CurvePlot(trial=0, state="complete", epochs=range(1, 10), values=[1 / e for e in range(1, 10)]),
        CurvePlot(trial=1, state="stopped", epochs=[1], values=[1.5]),
        CurvePlot(trial=2, state="diverged", epochs=[1, 2], values=[0.01, math.nan]),
        CurvePlot(trial=3, state="failed", epochs=[], values=[]),
    ]


def test_best_trial_is_named_and_one_that_diverged_is_never_the_best(drawn: list[Figure]) -> None:
    size_of(learning_curves_figure(curves(), metric="val_loss", rungs=(1, 3)))
    assert legend_of(drawn[0]) == [
        "best: trial 0, 0.1111 at epoch 9",
        "1 complete",
        "1 stopped",
        "1 diverged",
        "1 failed",
    ]
    panel = drawn[0].axes[0]
    assert panel.get_ylabel() == "val_loss (lower is better)"
    assert [int(tick) for tick in panel.get_xticks()] == [1, 3, 9]


def test_maximised_metric_names_the_highest_value(drawn: list[Figure]) -> None:
    learning_curves_figure(curves(), metric="val_accuracy", goal="maximize")
    assert legend_of(drawn[0])[0] == "best: trial 1, 1.5 at epoch 1"
    assert "higher is better" in drawn[0].axes[0].get_ylabel()


def test_one_huge_value_is_counted_and_not_shown(drawn: list[Figure]) -> None:
    many = [CurvePlot(trial=t, state="stopped", epochs=[1], values=[1 + t / 50]) for t in range(50)]
    learning_curves_figure([*many, CurvePlot(trial=50, state="stopped", epochs=[1], values=[1e9])], metric="val_loss")
    panel = drawn[0].axes[0]
    assert panel.get_ylim()[1] < 10
    assert [text.get_text() for text in panel.texts] == ["1 value beyond the axis"]


def test_no_curves_give_an_empty_figure() -> None:
    size_of(learning_curves_figure([], metric="val_loss"))


def test_ensemble_figure_tells_the_kept_round_and_the_best_single_model(drawn: list[Figure]) -> None:
    size_of(ensemble_figure([0.2, 0.15, 0.12, 0.13], best_round=3, single_score=0.2))
    assert set(legend_of(drawn[0])) == {
        "best single: 0.2",
        "picks that were kept",
        "later picks, dropped",
        "kept: 0.12 after 3 picks",
    }
    size_of(ensemble_figure([0.2], best_round=1, single_score=0.2))
    with pytest.raises(ValueError, match="best_round must be within 1 to 2"):
        ensemble_figure([0.2, 0.1], best_round=3, single_score=0.2)


def points(n: int = 30) -> list[SearchPoint]:
    rng = np.random.default_rng(0)
    found = []
    for trial in range(n):
        lr = float(10 ** rng.uniform(-5, 0))
        config: dict[str, object] = {
            "lr": lr,
            "optimizer": "sgd" if trial % 2 else "adamw",
            "width": 2 ** (5 + trial % 3),
        }
        if trial % 2:
            config["momentum"] = float(rng.uniform(0.8, 0.99))
        diverged = lr > 0.3
        value = None if diverged else abs(math.log10(lr) + 2) + 0.1
        found.append(SearchPoint(trial=trial, state="diverged" if diverged else "complete", value=value, config=config))
    return found


def test_search_figure_has_a_panel_per_parameter_with_the_scale_of_its_kind(drawn: list[Figure]) -> None:
    names = ("lr", "optimizer", "width", "momentum")
    size_of(search_figure(points(), [ParameterPlot(name=n, log=n == "lr") for n in names], metric="val_loss"))
    lr, optimizer, width, momentum = drawn[0].axes
    assert [panel.get_xlabel() for panel in drawn[0].axes] == ["lr (log scale)", "optimizer", "width", "momentum"]
    assert [panel.get_xscale() for panel in drawn[0].axes] == ["log", "linear", "linear", "linear"]
    assert [label.get_text() for label in optimizer.get_xticklabels()] == ["adamw", "sgd"]
    assert [label.get_text() for label in width.get_xticklabels()] == ["32", "64", "128"]
    assert len(momentum.lines) == 15  # inactive in the other half
    assert len(lr.lines) == 30
    assert len({panel.get_ylim() for panel in drawn[0].axes}) == 1


@pytest.mark.parametrize(
    "values", [[], [None], [math.nan, math.inf], [0.0, 0.0], [-3.0, 5.0], [1e300, 1e-300, 1.0], [-1e308, 1e308]]
)
def test_any_values_can_be_drawn(values: list[float | None]) -> None:
    found = [
        SearchPoint(trial=i, state="stopped", value=v, config={"lr": 0.0, "flag": True, "many": [1, 2], "none": None})
        for i, v in enumerate(values)
    ]
    parameters = [ParameterPlot(name=name, log=True) for name in ("lr", "flag", "many", "none", "absent")]
    size_of(search_figure(found, parameters, metric="val_loss"))
    lines = [CurvePlot(trial=p.trial, state="odd", epochs=[1], values=[p.value or 0.0]) for p in found]
    size_of(learning_curves_figure(lines, metric="val_loss"))


def test_search_figure_never_names_a_diverged_trial_the_best(drawn: list[Figure]) -> None:
    found = [
        SearchPoint(trial=0, state="complete", value=0.5, config={"lr": 0.1}),
        SearchPoint(trial=1, state="diverged", value=0.1, config={"lr": 0.2}),
    ]
    search_figure(found, [ParameterPlot(name="lr", log=True)], metric="val_loss")
    assert legend_of(drawn[0])[0] == "best: trial 0, 0.5"


def test_figures_without_anything_to_draw_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one branch"):
        lr_range_figure([])
    with pytest.raises(ValueError, match="at least one parameter"):
        search_figure([], [], metric="val_loss")


def test_pyplot_is_never_imported_and_matplotlib_only_when_a_figure_is_drawn() -> None:
    code = (
        "import sys; from hpsearch.report.plots import ensemble_figure; print('matplotlib' in sys.modules);"
        "ensemble_figure([0.2], best_round=1, single_score=0.2);"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
