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
    BaselineLine,
    CurvePlot,
    LrRangePlot,
    ParameterPlot,
    SearchPoint,
    SizePoint,
    ensemble_figure,
    learning_curves_figure,
    lr_range_figure,
    pareto_figure,
    search_figure,
)
from tests.drawn_figures import drawn_by

LRS = [float(lr) for lr in ramp_lrs(1e-5, 10.0, 50)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return drawn_by(plots, monkeypatch)


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


# Baselines

NEAR = [BaselineLine(label="ignoring the inputs", value=1.3), BaselineLine(label="human", value=0.08)]


def flat(figure: Figure, panel: int = 0) -> list[float]:
    """Where a panel has horizontal baselines."""
    return [float(line.get_ydata()[0]) for line in figure.axes[panel].lines if line.get_color() == plots.BROWN]  # type: ignore[index]


def test_near_baselines_are_lines_below_the_curves_each_named_and_inside_the_axis(drawn: list[Figure]) -> None:
    learning_curves_figure(curves(), metric="val_loss", baselines=NEAR)
    panel = drawn[0].axes[0]
    assert flat(drawn[0]) == [1.3, 0.08]
    assert {"ignoring the inputs: 1.3", "human: 0.08"} <= set(legend_of(drawn[0]))
    lines = [line for line in panel.lines if line.get_color() == plots.BROWN]
    assert max(line.get_zorder() for line in lines) < min(
        line.get_zorder() for line in panel.lines if len(line.get_xdata()) > 2
    )
    assert len({str(line.get_linestyle()) + str(line._unscaled_dash_pattern) for line in lines}) == 2  # type: ignore[attr-defined]
    bottom, top = panel.get_ylim()
    assert bottom < 0.08 < 1.3 < top
    assert [text.get_text() for text in panel.texts] == []


def straight(values: list[float]) -> list[CurvePlot]:
    return [CurvePlot(trial=i, state="complete", epochs=[1, 2], values=[v, v]) for i, v in enumerate(values)]


def test_axis_grows_for_a_baseline_as_long_as_the_curves_keep_most_of_it(drawn: list[Figure]) -> None:
    values = [0.90 + i / 100 for i in range(11)]
    learning_curves_figure(straight(values), metric="val_loss")
    alone = drawn[0].axes[0].get_ylim()
    learning_curves_figure(straight(values), metric="val_loss", baselines=[BaselineLine(label="near", value=1.05)])
    bottom, top = drawn[1].axes[0].get_ylim()
    assert bottom == alone[0]
    assert alone[1] < 1.05 < top < 1.07


@pytest.mark.parametrize(
    ("goal", "far"), [("minimize", 2.3), ("minimize", -50.0), ("maximize", 3.0), ("maximize", -9.0)]
)
def test_far_baseline_leaves_the_axis_alone_and_is_named_at_the_edge_beyond_which_it_lies(
    drawn: list[Figure], goal: plots.Goal, far: float
) -> None:
    values = [0.90 + i / 100 for i in range(11)]
    learning_curves_figure(straight(values), metric="val_x", goal=goal)
    learning_curves_figure(
        straight(values), metric="val_x", goal=goal, baselines=[BaselineLine(label="a linear model", value=far)]
    )
    panel = drawn[1].axes[0]
    assert panel.get_ylim() == drawn[0].axes[0].get_ylim()
    assert flat(drawn[1]) == []
    (note,) = panel.texts
    assert note.get_text() == f"{'↑' if far > 1 else '↓'} a linear model: {far:g}"
    assert (note.get_position()[1] > 0.5) == (far > 1)
    # Curves begin at the worse end of the axis on the left, and end at the better one on the right.
    assert (note.get_position()[0] > 0.5) == ((far > 1) == (goal == "minimize"))


def test_far_baselines_on_one_side_and_a_count_of_values_beyond_do_not_lie_on_each_other(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label="one", value=40.0), BaselineLine(label="two", value=1e300)]
    learning_curves_figure(straight([*[1 + t / 50 for t in range(50)], 1e9]), metric="val_loss", baselines=lines)
    count, note = drawn[0].axes[0].texts
    assert (count.get_text(), note.get_text()) == ("2 values beyond the axis", "↑ one: 40\n↑ two: 1e+300")
    assert note.get_position()[1] < count.get_position()[1] - 0.04


def test_baseline_that_a_log_axis_has_no_place_for_is_named_below_it(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label="perfect", value=0.0), BaselineLine(label="unknown", value=math.nan)]
    learning_curves_figure(straight([10.0**-i for i in range(6)]), metric="val_loss", baselines=lines)
    assert drawn[0].axes[0].get_yscale() == "log"
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["↓ perfect: 0"]


def test_search_figure_has_baselines_in_every_panel_and_names_far_ones_once(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label="human", value=0.12), BaselineLine(label="far", value=900.0)]
    names = ("lr", "optimizer", "width")
    search_figure(points(), [ParameterPlot(name=n, log=n == "lr") for n in names], metric="val_loss", baselines=lines)
    assert [flat(drawn[0], panel) for panel in range(3)] == [[0.12]] * 3
    assert legend_of(drawn[0]).count("human: 0.12") == 1
    assert [len(panel.texts) for panel in drawn[0].axes] == [1, 0, 0]
    assert len({panel.get_ylim() for panel in drawn[0].axes}) == 1


def test_ensemble_figure_has_the_baseline_of_its_own_unit(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label="ignoring the inputs", value=2.3)]
    ensemble_figure([0.2, 0.15], best_round=2, single_score=0.2, baselines=lines)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["↑ ignoring the inputs: 2.3"]
    assert drawn[0].axes[0].get_ylim()[1] < 0.3


def test_legend_is_no_wider_than_the_figure(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label=f"number {i} of the published results", value=0.1 + i / 10) for i in range(4)]
    learning_curves_figure(curves(), metric="val_loss", baselines=lines)
    (legend,) = drawn[0].legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= drawn[0].bbox.width


# Score against size

SIZES = [
    SizePoint(trial=0, state="complete", value=0.3, n_parameters=1_000),
    SizePoint(trial=1, state="complete", value=0.2, n_parameters=20_000),
    SizePoint(trial=2, state="stopped", value=0.4, n_parameters=20_000),
    SizePoint(trial=3, state="diverged", value=None, n_parameters=90_000),
    SizePoint(trial=4, state="failed", value=math.nan, n_parameters=0),
]


def test_pareto_figure_marks_the_front_the_best_and_the_smallest_that_is_as_good(drawn: list[Figure]) -> None:
    lines = [BaselineLine(label="a linear model", value=0.35)]
    size_of(pareto_figure(SIZES, front=[0, 1], smallest=0, threshold=0.31, metric="val_loss", baselines=lines))
    panel = drawn[0].axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("parameters (log scale)", "val_loss (lower is better)")
    assert panel.get_xscale() == "log"
    assert flat(drawn[0]) == [0.35]
    stairs = [line for line in panel.lines if line.get_drawstyle() == "steps-post" and len(line.get_xdata())]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in stairs] == [([1_000, 20_000], [0.3, 0.2])]
    assert set(legend_of(drawn[0])) == {
        "best: trial 1, 0.2",
        "complete",
        "stopped",
        "diverged, no value",
        "failed, no value",
        "a linear model: 0.35",
        "no smaller one is better",
        "one standard error",
        "smallest within it: trial 0",
    }


def test_pareto_figure_without_a_known_error_or_a_sound_trial_marks_neither(drawn: list[Figure]) -> None:
    size_of(pareto_figure(SIZES, front=[0, 1], metric="val_accuracy", goal="maximize"))
    assert not [label for label in legend_of(drawn[0]) if "smallest within" in label or "error" in label]
    size_of(pareto_figure(SIZES[3:], front=[], metric="val_loss"))
    size_of(pareto_figure([SizePoint(trial=0, state="odd", value=1e308, n_parameters=10**12)], front=[0], metric="m"))


def test_winner_has_the_star_and_the_searched_best_is_told_as_such(drawn: list[Figure]) -> None:
    learning_curves_figure(curves(), metric="val_loss", winner=1, own=[0])
    assert legend_of(drawn[0])[:2] == ["best: trial 1, 1.5 at epoch 1", "searched best: trial 0, 0.1111 at epoch 9"]
    assert "your baseline config: trial 0" in legend_of(drawn[0])
    found = [
        SearchPoint(trial=trial, state="complete", value=value, config={"lr": 0.1 + trial})
        for trial, value in enumerate([0.3, 0.2, 0.4])
    ]
    search_figure(found, [ParameterPlot(name="lr")], metric="val_loss", winner=0, own=[2])
    assert legend_of(drawn[1])[:2] == ["best: trial 0, 0.3", "searched best: trial 1, 0.2"]
    assert "your baseline config: trial 2" in legend_of(drawn[1])
    stars = [line.get_ydata() for line in drawn[1].axes[0].lines if line.get_marker() == "*"]
    assert [list(np.atleast_1d(ys)) for ys in stars] == [[0.3]]
    pareto_figure(SIZES, front=[0, 1], metric="val_loss", winner=2)
    assert {"best: trial 2, 0.4", "searched best: trial 1, 0.2"} <= set(legend_of(drawn[2]))


def test_ensemble_figure_of_one_pick_says_that_none_helped(drawn: list[Figure]) -> None:
    ensemble_figure([0.24] * 25, best_round=1, single_score=0.24)
    panel = drawn[0].axes[0]
    assert [text.get_text() for text in panel.texts] == ["no pick helped: 24 more were tried"]
    assert set(legend_of(drawn[0])) == {"best single: 0.24", "kept: 0.24 after 1 pick"}
    assert panel.get_ylim() == pytest.approx((0.216, 0.264))


def test_figures_without_anything_to_draw_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        pareto_figure([], front=[], metric="val_loss")
    with pytest.raises(ValueError, match=r"no value is known of trials \[3\]"):
        pareto_figure(SIZES, front=[0, 3], metric="val_loss")
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
