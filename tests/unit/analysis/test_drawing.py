"""The data that figures hand to matplotlib's artists, and that equal data give equal files."""

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex

from trainer.analysis.drawing import (
    CYCLE,
    REC,
    SEARCH,
    TASK_COLOURS,
    Bar,
    Curve,
    bars_with_intervals,
    colour_of,
    curves_with_intervals,
    heat_map,
    kde_contours,
    number,
    scatter_two_groups,
    spread,
    write_figure,
)
from trainer.analysis.space import Projection, density_contours
from trainer.errors import DataError

NAMES = ("search", "rec")


def panels(figure: Any) -> list[Any]:
    """Its axes, as what they are at run time: matplotlib's stubs know the base classes of artists alone."""
    return list(figure.axes)


def texts(axes):
    return {text.get_text(): text for text in axes.texts}


@pytest.fixture(scope="module")
def projection():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 60, 2))
    return Projection(first, second + np.array([3.0, 0.0]), "pca", (0.7, 0.2), 0)


# ---- bars --------------------------------------------------------------------------------------------------


def test_bars_carry_values_intervals_and_colours_of_tasks():
    bars = [
        *(Bar("GenSR", 0.5, 0.45, 0.6, "rec"), Bar("GenSR", 0.75, 0.7, 0.8, "search")),
        *(Bar("SASRec", 0.4, 0.35, 0.45, "rec"),),
    ]
    (axes,) = panels(bars_with_intervals({"ndcg@10": bars}))
    assert axes.get_title(loc="left") == "ndcg@10"
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.75, 0.4]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == [REC, SEARCH, REC]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["GenSR", "SASRec"]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert centres == pytest.approx([-0.2, 0.2, 0.8])  # the label's place less or plus half a bar
    ends = [lines.get_segments()[0] for lines in axes.collections]
    np.testing.assert_allclose([end[:, 0] for end in ends], [[0.45, 0.6], [0.7, 0.8], [0.35, 0.45]])
    assert list(texts(axes)) == ["0.500  rec", "0.750  search", "0.400  rec"]
    assert texts(axes)["0.500  rec"].get_position()[0] > 0.6  # beyond the interval


def test_bars_of_differences_reach_to_both_sides():
    bars = [Bar("with", 0.02, 0.01, 0.03), Bar("without", -0.04, -0.05, -0.03), Bar("equal", 0.0)]
    (axes,) = panels(bars_with_intervals({"difference": bars}))
    left, right = axes.get_xlim()
    assert left < -0.05 and right > 0.03
    assert list(texts(axes)) == ["0.020", "−0.040", "0.000"]
    assert texts(axes)["−0.040"].get_position()[0] > 0
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 1


def test_values_of_negative_bars_do_not_touch_the_names():
    bars = [Bar("GenSR seed-0", value, value - 0.2, 0.06, "recommendation") for value in (-0.165, -0.049)]
    bars.append(Bar("GenSR seed-0", -0.1, -0.2, 0.0, "search"))
    figure = bars_with_intervals({"MINE": bars})
    figure.canvas.draw()
    (axes,) = panels(figure)
    names = max(label.get_window_extent().x1 for label in axes.get_yticklabels())
    assert all(text.get_window_extent().x0 > names for text in texts(axes).values())


def test_a_metric_has_a_panel_of_its_own_and_bars_start_at_zero():
    figure = bars_with_intervals({name: [Bar("GenSR", 0.5)] for name in ("recall@5", "recall@10", "mrr")})
    assert [axes.get_title(loc="left") for axes in panels(figure)] == ["recall@5", "recall@10", "mrr"]
    assert all(axes.get_xlim()[0] == 0 for axes in panels(figure))
    assert not figure.legends and all(axes.get_legend() is None for axes in panels(figure))


# ---- curves ------------------------------------------------------------------------------------------------


def test_curves_carry_points_bands_and_names():
    curves = [
        Curve("search", [1, 10, 100], [0.1, 0.2, 0.3], [0.0, 0.1, 0.2], [0.2, 0.3, 0.4], task="search"),
        Curve("mean", [1, 10, 100], [0.1, 0.1, 0.1]),
        Curve("best", [1, 10], [0.5, 0.6]),
    ]
    (axes,) = panels(curves_with_intervals({"recall@5": curves}, "step", log_x=True))
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.1], [10, 0.2], [100, 0.3]])
    assert [line.get_color() for line in axes.lines] == [SEARCH, CYCLE[0], CYCLE[1]]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert {(1.0, 0.0), (100.0, 0.2), (1.0, 0.2), (100.0, 0.4)} <= corners
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "step"
    names = texts(axes)
    assert list(names) == ["search", "mean", "best"]
    assert names["best"].get_position()[1] == pytest.approx(0.6)
    assert [names[name].get_color() for name in names] == [line.get_color() for line in axes.lines]


@pytest.mark.parametrize("steps", [[1], [1, 2], [5, 10], [0, 3]])
def test_whole_numbers_have_ticks_at_whole_numbers(steps: list[int]) -> None:
    """A picture of a short run shows no step 1.2."""
    (axes,) = panels(curves_with_intervals({"loss": [Curve("a", steps, steps)]}, "step"))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    (axes,) = panels(curves_with_intervals({"m": [Curve("a", [0.1, 2.0], [1, 2])]}, "τ"))
    assert not all(float(tick).is_integer() for tick in axes.get_xticks())


def test_what_is_nearly_constant_looks_so():
    (axes,) = panels(curves_with_intervals({"m": [Curve("a", [1, 2], [0.5, 0.501])]}, "step", least_span=0.2))
    bottom, top = axes.get_ylim()
    assert top - bottom == pytest.approx(0.2) and bottom < 0.5 < top
    (axes, *_) = panels(heat_map([[0.5, 0.501]], ["a"], ["x", "y"], "t", least_span=0.2))
    assert axes.images[0].get_clim() == pytest.approx((0.4005, 0.6005))


def test_long_names_leave_room_for_bars_and_title():
    figure = bars_with_intervals({"Recommendation: NDCG@10": [Bar("without hold-out of the CF table", 0.3)]})
    figure.canvas.draw()
    (axes,) = panels(figure)
    title = axes.get_tightbbox()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_names_of_curves_do_not_touch():
    assert spread([0.0, 10.0], 1.0) == [0.0, 10.0]
    assert spread([5.0, 5.0, 5.0], 1.0) == [4.0, 5.0, 6.0]
    assert spread([1.0, 0.9, 0.0], 0.5) == pytest.approx([1.2, 0.7, 0.0])
    assert spread([0.0, 0.4, 0.9], 1.0) == pytest.approx([-0.5666667, 0.4333333, 1.4333333])
    assert spread([], 1.0) == []


@pytest.mark.parametrize("seed", range(5))
def test_spread_keeps_order_and_gap(seed):
    heights = np.random.default_rng(seed).random(8)
    placed = np.array(spread(list(heights), 0.1))
    order = np.argsort(heights)
    assert (np.diff(placed[order]) > 0.1 - 1e-9).all()
    assert placed.mean() == pytest.approx(heights.mean())


# ---- heat maps ---------------------------------------------------------------------------------------------


def test_heat_map_writes_its_numbers_and_leaves_gaps():
    table = np.array([[0.5, -0.25], [np.nan, 0.0]])
    (axes,) = panels(heat_map(table, ["wq", "wk"], ["layer 0", "layer 1"], "cosine", centre=0.0))
    (image,) = axes.images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), table)
    assert image.get_clim() == (-0.5, 0.5)
    assert [text.get_text() for text in axes.texts] == ["0.50", "−0.25", "–", "0.00"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wq", "wk"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer 0", "layer 1"]


def test_numbers_can_be_read_on_light_and_dark_cells():
    (axes,) = panels(heat_map([[0.0, 1.0]], ["a"], ["x", "y"], "recall@5"))
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert [text.get_color() for text in axes.texts] == ["black", "white"]


def test_a_table_without_any_number_is_drawn():
    (axes,) = panels(heat_map([[np.nan]], ["a"], ["x"], "cosine", centre=0.0))
    assert [text.get_text() for text in axes.texts] == ["–"]


# ---- planes ------------------------------------------------------------------------------------------------


def test_scatter_shows_every_point_in_its_groups_colour(projection):
    (axes,) = panels(scatter_two_groups({"generative": projection}, NAMES))
    (points,) = axes.collections
    drawn = {
        (*place, to_hex(colour).upper())
        for place, colour in zip(points.get_offsets().data, points.get_facecolor(), strict=True)
    }
    wanted = {(*p, SEARCH) for p in projection.first} | {(*p, REC) for p in projection.second}
    assert drawn == wanted
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [("search", SEARCH), ("rec", REC)]
    assert axes.get_xlabel() == "component 1 (70% of the variance)"
    low, high = axes.get_xlim()
    assert low < projection.first[:, 0].min() and high > projection.second[:, 0].max()


def test_contours_are_drawn_at_the_stored_levels(projection):
    found = density_contours(projection, masses=(0.5, 0.9))
    (axes,) = panels(kde_contours({"generative": found}, NAMES))
    lines = [drawn for drawn in axes.collections if not drawn.filled]
    np.testing.assert_allclose(lines[0].levels, sorted(found.first_levels))
    np.testing.assert_allclose(lines[1].levels, sorted(found.second_levels))
    assert [to_hex(drawn.get_edgecolor()[0]).upper() for drawn in lines] == [SEARCH, REC]
    assert axes.get_xlabel() == "lines hold 50%, 90% of a group"
    for drawn in lines:  # nothing is cut off
        corners = np.concatenate([path.vertices for path in drawn.get_paths()])
        assert (corners[:, 0] > axes.get_xlim()[0]).all() and (corners[:, 0] < axes.get_xlim()[1]).all()
        assert (corners[:, 1] > axes.get_ylim()[0]).all() and (corners[:, 1] < axes.get_ylim()[1]).all()


# ---- colours and files -------------------------------------------------------------------------------------


def test_a_task_has_one_colour_everywhere():
    assert colour_of("GenSR", "rec") == colour_of("Recommendation") == colour_of("rec") == REC
    assert colour_of("GenSR", "src") == colour_of("search") == SEARCH
    assert colour_of("GenSR", place=1) == CYCLE[1]
    assert not set(TASK_COLOURS.values()) & set(CYCLE)


def test_number():
    assert [number(0.5), number(-0.0312, 2), number(float("nan"))] == ["0.500", "−0.03", "–"]


def test_equal_data_give_equal_files(tmp_path, projection):
    def draw(name):
        return [
            path.read_bytes()
            for kind, figure in (
                ("scatter", scatter_two_groups({"a": projection}, NAMES)),
                ("kde", kde_contours({"a": density_contours(projection)}, NAMES)),
                ("curves", curves_with_intervals({"b": [Curve("search", [1, 2], [3, 4])]}, "step")),
            )
            for path in write_figure(figure, tmp_path / name / kind)
        ]

    assert draw("first") == draw("second")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        *("curves.png", "curves.svg", "kde.png", "kde.svg", "scatter.png", "scatter.svg"),
    ]


def test_files_are_whole_and_undated(tmp_path):
    # A dot in the name is part of it, not a suffix to replace.
    png, svg = write_figure(bars_with_intervals({"mrr": [Bar("GenSR", 0.5)]}), tmp_path / "tau-0.07")
    assert (png.name, svg.name) == ("tau-0.07.png", "tau-0.07.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"dc:date|\b20\d\d-\d\d-\d\d", text)


def test_errors_say_what_is_wrong():
    with pytest.raises(DataError, match="nothing to draw"):
        bars_with_intervals({})
    with pytest.raises(DataError, match="nothing to draw: mrr"):
        bars_with_intervals({"mrr": []})
    with pytest.raises(DataError, match="nothing to draw: mrr"):
        curves_with_intervals({"mrr": []}, "step")
    with pytest.raises(DataError, match="curve GenSR: 2 x and 1 y"):
        curves_with_intervals({"mrr": [Curve("GenSR", [1, 2], [1])]}, "step")
    with pytest.raises(DataError, match=r"\(1, 2\) has 2 row and 2 column"):
        heat_map([[1, 2]], ["a", "b"], ["x", "y"], "t")
