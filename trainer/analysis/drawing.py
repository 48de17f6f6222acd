"""The house style of figures: data in, a matplotlib Figure out, written as PNG and SVG.

    bars_with_intervals     compare systems
    curves_with_intervals   a value over steps, samples, a setting
    heat_map                a table of numbers
    scatter_two_groups      points of two tasks in a plane
    kde_contours            their densities

One metric a panel, since axes that hold two scales are misread. A task has one colour everywhere, from the
palette of Okabe & Ito (2008), which colour-blind readers can tell apart. Names stand at what they name; there
are no legends. The same data give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from trainer.errors import DataError
from trainer.runtime.files import atomic

if TYPE_CHECKING:
    from trainer.analysis.space import Contours, Projection

SEARCH, REC = "#0072B2", "#D55E00"  # blue, vermillion
TASK_COLOURS = {"search": SEARCH, "src": SEARCH, "recommendation": REC, "rec": REC}
# For what belongs to no task, in this order. Yellow is left out: it cannot be read on white.
CYCLE = ("#444444", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# metadata without what differs from one writing to the next
UNDATED: Mapping[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
Floats = NDArray[np.float64]
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.2  # inches
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "gensr",  # else the names inside an SVG are random
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Bar:
    """One bar: what is measured (a system), the task it is measured on or "", the value and its interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    task: str = ""


@dataclass(frozen=True)
class Curve:
    """One curve. x, y and, where there is an interval, low and high have equal lengths."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    task: str = ""


def write_figure(figure: Figure, path: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write path.png and path.svg, each atomically. → the paths, in the order of `formats`."""
    path, written = Path(path), []
    for suffix in formats:
        target = path.with_name(f"{path.name}.{suffix}")
        with matplotlib.rc_context(STYLE), atomic(target) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata=UNDATED[suffix])
        written.append(target)
    return written


def colour_of(label: str, task: str = "", place: int = 0) -> str:
    """A task's own colour; else, by its label if that names a task, or by its place among the others."""
    return TASK_COLOURS.get(task) or TASK_COLOURS.get(label.lower()) or CYCLE[place % len(CYCLE)]


def bars_with_intervals(metrics: Mapping[str, Sequence[Bar]]) -> Figure:
    """One panel a metric; lying bars, first on top, those of one label side by side, one for each task.

    Bars start at 0, so their lengths can be compared. The value is written to the right of the bar and
    its interval.
    """
    _need_data(metrics)
    most = max((len(bars) for bars in metrics.values()), default=0)
    longest = max((len(bar.label) for bars in metrics.values() for bar in bars), default=0)
    width = max(PANEL_WIDTH, 0.075 * longest + 2.8)  # inches: of the names, and for bars and title
    figure, panels = _panels(list(metrics), width=width, height=max(1.6, 0.7 + 0.28 * most))
    with matplotlib.rc_context(STYLE):
        for axes, bars in zip(panels, metrics.values(), strict=True):
            _draw_bars(axes, bars)
    return figure


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    labels = list(dict.fromkeys(bar.label for bar in bars))
    tasks = list(dict.fromkeys(bar.task for bar in bars))
    thick = 0.8 / len(tasks)
    left = min(0.0, *(bar.value if bar.low is None else bar.low for bar in bars))
    right = max(0.0, *(bar.value if bar.high is None else bar.high for bar in bars))
    if right - left < 1e-9:  # nothing but zeros, and what rounding leaves of them
        left, right = 0.0, 1.0
    span = right - left
    for bar in bars:
        height = labels.index(bar.label) + (tasks.index(bar.task) - (len(tasks) - 1) / 2) * thick
        colour = colour_of("", bar.task)
        axes.barh(height, bar.value, thick * 0.9, color=colour, alpha=0.75)
        ends = [0.0, bar.value]
        if bar.low is not None and bar.high is not None:
            ends += [bar.low, bar.high]
            middle, half = (bar.low + bar.high) / 2, (bar.high - bar.low) / 2
            axes.errorbar(middle, height, xerr=half, fmt="none", ecolor="black", elinewidth=1.0, capsize=2)
        task = bar.task if len(tasks) > 1 else ""
        text = f"{number(bar.value)}  {task}".strip()
        at = max(ends) + 0.02 * span  # also of a negative bar: left of it are the names
        axes.text(at, height, text, va="center", fontsize=8, color=colour)
    room = span * (0.25 if len(tasks) == 1 else 0.42)  # for the values
    axes.set_xlim(left - 0.05 * span if left < 0 else 0.0, right + room)
    axes.spines.left.set_visible(False)  # the line at 0 is what bars start from
    ticks = MaxNLocator(4 if left < 0 else 5, steps=[1, 2, 5, 10]).tick_values(left, right)
    axes.set_xticks([tick for tick in ticks if left - 0.1 * span <= tick <= right + 0.1 * span])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.grid(True)


def number(value: float, decimals: int = 3) -> str:
    """0.5 → 0.500, with a minus sign as wide as a plus; – for NaN."""
    return f"{value:.{decimals}f}".replace("-", "−") if np.isfinite(value) else "–"


def curves_with_intervals(
    metrics: Mapping[str, Sequence[Curve]], xlabel: str, log_x: bool = False, least_span: float = 0.0
) -> Figure:
    """One panel a metric; intervals as bands, each curve named at its right end. least_span: of the y axis,
    so that what is nearly constant looks so."""
    _need_data(metrics)
    figure, panels = _panels(list(metrics))
    with matplotlib.rc_context(STYLE):
        for axes, curves in zip(panels, metrics.values(), strict=True):
            if log_x:
                axes.set_xscale("log")
            elif all(float(x).is_integer() for curve in curves for x in curve.x):  # steps, say: no half ones
                axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.set_xlabel(xlabel)
            axes.grid(True)
            _draw_curves(axes, curves, least_span)
    return figure


def _draw_curves(axes: Any, curves: Sequence[Curve], least_span: float) -> None:
    others = [curve.label for curve in curves if curve.task not in TASK_COLOURS]
    colours = []
    for curve in curves:
        if not len(curve.x) == len(curve.y) > 0:
            raise DataError(f"curve {curve.label}: {len(curve.x)} x and {len(curve.y)} y")
        place = others.index(curve.label) if curve.label in others else 0
        colours.append(colour_of(curve.label, curve.task, place))
        axes.plot(curve.x, curve.y, color=colours[-1], linewidth=1.6, marker="o", markersize=3)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colours[-1], alpha=0.2, linewidth=0)
    axes.margins(x=0.03)
    bottom, top = axes.get_ylim()
    bottom, top = widened(bottom, top, least_span)
    axes.set_ylim(bottom, top)
    heights = spread([curve.y[-1] for curve in curves], gap=0.07 * (top - bottom))
    beside = axes.get_yaxis_transform()  # x in widths of the panel, y in values
    for curve, height, colour in zip(curves, heights, colours, strict=True):
        axes.text(1.02, height, curve.label, transform=beside, color=colour, va="center", fontsize=8)


def widened(low: float, high: float, least_span: float) -> tuple[float, float]:
    """The same middle, and at least that span."""
    more = max(0.0, least_span - (high - low)) / 2
    return low - more, high + more


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights for labels, in the order given, at least `gap` apart. Labels that would touch become a block
    around the mean of their own heights."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _bottom(groups[-1], heights, gap) - _top(groups[-2], heights, gap) < gap:
            last = groups.pop()
            groups[-1] += last
    placed = {
        i: _bottom(group, heights, gap) + gap * place for group in groups for place, i in enumerate(group)
    }
    return [placed[i] for i in range(len(heights))]


def _bottom(group: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(group, heights, gap) + gap * (len(group) - 1)


def heat_map(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    centre: float | None = None,
    decimals: int = 2,
    least_span: float = 0.0,
) -> Figure:
    """A table [R, C] with its numbers in coloured cells; NaN stays blank and says –. least_span: of numbers
    from the lightest to the darkest colour.

    centre: a value that is neither good nor bad, such as a cosine of 0: colours then run from purple over
    white to orange, equally far on both sides. Without it they run from light to dark.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape != (len(rows), len(columns)):
        raise DataError(f"a table of {table.shape} has {len(rows)} row and {len(columns)} column names")
    names = 0.4 + 0.075 * max(map(len, rows), default=0)  # inches, of the longest name and of the title
    width = names + max(0.62 * len(columns), 0.085 * len(title))
    figure, (axes,) = _panels([title], width=width, height=1.1 + 0.3 * len(rows))
    finite = table[np.isfinite(table)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    low, high = widened(low, high, least_span)
    if centre is not None:
        reach = max(abs(low - centre), abs(high - centre)) or 1.0
        low, high = centre - reach, centre + reach
    with matplotlib.rc_context(STYLE):
        image = axes.imshow(
            table, cmap="PuOr_r" if centre is not None else "Blues", vmin=low, vmax=high, aspect="auto"
        )
        for (row, column), value in np.ndenumerate(table):
            dark = np.isfinite(value) and _luminance(image.to_rgba(value)) < 0.5
            ink = "white" if dark else "black"
            axes.text(column, row, number(value, decimals), ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _luminance(rgba: Any) -> float:
    """Relative luminance of a colour, 0 black to 1 white (ITU-R BT.709 weights)."""
    return float(np.dot(np.asarray(rgba)[:3], (0.2126, 0.7152, 0.0722)))


def scatter_two_groups(projections: "Mapping[str, Projection]", names: tuple[str, str]) -> Figure:
    """One panel a projection; the points of two groups, whose names stand in the corner."""
    figure, panels = _panels(list(projections), height=PANEL_WIDTH + 0.2)
    colours = [colour_of(name, place=place) for place, name in enumerate(names)]
    with matplotlib.rc_context(STYLE):
        for axes, found in zip(panels, projections.values(), strict=True):
            points = np.concatenate([found.first, found.second])
            ink = np.repeat(colours, [len(found.first), len(found.second)])
            # In random order, so that neither group covers the other. As pixels in the SVG too: thousands of
            # paths are slow to open.
            order = np.random.default_rng(found.seed).permutation(len(points))
            axes.scatter(*points[order].T, s=6, alpha=0.35, c=ink[order], linewidths=0, rasterized=True)
            _name_groups(axes, names, colours)
            _plane(axes, found.method, found.explained)
            _square(axes, *np.concatenate([found.first, found.second]).T)
    return figure


def kde_contours(densities: "Mapping[str, Contours]", names: tuple[str, str]) -> Figure:
    """One panel a pair of densities; lines around the shares of each group that Contours.masses names."""
    figure, panels = _panels(list(densities), height=PANEL_WIDTH + 0.2)
    colours = [colour_of(name, place=place) for place, name in enumerate(names)]
    with matplotlib.rc_context(STYLE):
        for axes, found in zip(panels, densities.values(), strict=True):
            groups = ((found.first, found.first_levels), (found.second, found.second_levels))
            for (density, levels), colour in zip(groups, colours, strict=True):
                edges, top = sorted(set(levels)), 1.01 * density.max()
                for edge in edges:  # layers of colour add up: the denser, the darker
                    axes.contourf(found.x, found.y, density, levels=[edge, top], colors=colour, alpha=0.12)
                axes.contour(found.x, found.y, density, levels=edges, colors=colour, linewidths=1.2)
            _plane(axes, "", None)
            inside = (found.first >= min(found.first_levels)) | (found.second >= min(found.second_levels))
            _square(axes, found.x[inside.any(axis=0)], found.y[inside.any(axis=1)])
            _name_groups(axes, names, colours)
            shares = ", ".join(f"{mass:.0%}" for mass in found.masses)
            axes.set_xlabel(f"lines hold {shares} of a group", fontsize=8)
    return figure


def _square(axes: Any, x: Floats, y: Floats) -> None:
    """A square view of all these x and y, with a margin."""
    half = 0.54 * max(np.ptp(x), np.ptp(y))
    axes.set_xlim((x.min() + x.max()) / 2 - half, (x.min() + x.max()) / 2 + half)
    axes.set_ylim((y.min() + y.max()) / 2 - half, (y.min() + y.max()) / 2 + half)


def _plane(axes: Any, method: str, explained: tuple[float, ...] | None) -> None:
    """Axes of a projection: their numbers mean nothing, so there are none."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal")  # distances of both axes are alike
    for place, axis in enumerate((axes.xaxis, axes.yaxis)):
        if explained is not None:
            axis.set_label_text(f"component {place + 1} ({explained[place]:.0%} of the variance)", fontsize=8)
        elif method == "tsne":
            axis.set_label_text(f"t-SNE {place + 1}", fontsize=8)


def _name_groups(axes: Any, names: Sequence[str], colours: Sequence[str]) -> None:
    """Each group's name in its colour, in the corner: groups can lie on top of each other, names must not."""
    rim = [patheffects.withStroke(linewidth=3, foreground="white")]
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        axes.text(
            x=0.02,
            y=0.98 - 0.06 * place,
            s=name,
            transform=axes.transAxes,
            color=colour,
            va="top",
            fontweight="bold",
            path_effects=rim,
        )


def _need_data(metrics: Mapping[str, Sequence[Bar] | Sequence[Curve]]) -> None:
    if empty := [name for name, drawn in metrics.items() if not drawn]:
        raise DataError(f"there is nothing to draw: {', '.join(empty)}")


def _panels(
    titles: Sequence[str], width: float = PANEL_WIDTH, height: float = PANEL_HEIGHT
) -> tuple[Figure, list[Any]]:
    """A figure with a row of panels. No pyplot: it keeps figures alive and is not thread-safe."""
    if not titles:
        raise DataError("there is nothing to draw: no panel has data")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * len(titles), height))
        figure.set_layout_engine("constrained", w_pad=0.1)  # inches; names at the ends of curves need room
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, len(titles), squeeze=False)[0])
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
    return figure, panels
