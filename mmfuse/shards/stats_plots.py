"""The figures of the statistics page."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mmfuse.pages import COLORS, MUTED, Plot, style_axes, to_svg
from mmfuse.shards.probe import SHAPE_STEPS
from mmfuse.shards.sketch import Sketch

Show = Callable[[float], str]
_SIZE = (3.4, 1.9)
_MOST_CELLS = 1200


def draw_histogram(title: str, sketch: Sketch, *, show: Show, color: int = 0) -> list[Plot]:
    """Bars of a distribution with its median and its middle 90%; none where there is no value."""
    if not sketch.count:
        return []
    bars = sketch.bars()
    figure, axes = _figure()
    axes.stairs(bars.counts, bars.edges, fill=True, color=COLORS[color], linewidth=0, alpha=0.85)
    middle = sketch.quantile(0.5)
    axes.axvline(middle, color=MUTED, linewidth=0.9, dashes=(3, 2))
    if bars.logarithmic:
        _make_logarithmic(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=sketch.whole))
    if len(bars.counts) == 1:
        room = 2 * (bars.edges[1] - bars.edges[0])
        axes.set_xlim(bars.edges[0] - room, bars.edges[1] + room)
        axes.xaxis.set_major_locator(FixedLocator([middle]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
    note = f"median {show(middle)}"
    if sketch.largest > sketch.smallest:
        note += f", 90% in {show(sketch.quantile(0.05))} to {show(sketch.quantile(0.95))}"
    return [Plot(title, note, [], to_svg(figure, title))]


def draw_shapes(title: str, shapes: np.ndarray) -> list[Plot]:
    """Widths against heights on logarithmic axes, darker where there are more; none without pictures."""
    cells = np.argwhere(shapes)
    if not len(cells):
        return []
    cells = cells[np.argsort(-shapes[tuple(cells.T)], kind="stable")][:_MOST_CELLS]
    counts = shapes[tuple(cells.T)]
    strength = np.log1p(counts) / np.log1p(counts.max())
    figure, axes = _figure(height=2.6)
    for (x, y), alpha in zip(cells.tolist(), strength.tolist(), strict=True):
        corner = (2 ** (x / SHAPE_STEPS), 2 ** (y / SHAPE_STEPS))
        size = [edge * (2 ** (1 / SHAPE_STEPS) - 1) for edge in corner]
        axes.add_patch(Rectangle(corner, *size, color=COLORS[0], alpha=0.15 + 0.85 * alpha, linewidth=0))
    low, high = 2 ** ((cells.min() - 3) / SHAPE_STEPS), 2 ** ((cells.max() + 4) / SHAPE_STEPS)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.7, dashes=(3, 3), zorder=0)
    for axis, set_limits in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        axes.set(**{f"{axis.axis_name}scale": "log"})
        set_limits(low, high)
        axis.set_major_locator(LogLocator(2, numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda pixels, _: f"{pixels:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("width", fontsize=7.4, color=MUTED)
    axes.set_ylabel("height", fontsize=7.4, color=MUTED)
    return [Plot(title, "darker: more; dashed: square", [], to_svg(figure, title))]


def draw_shards(title: str, values: Sequence[float], *, show: Show, color: int = 0) -> list[Plot]:
    """One number a shard, in the order of the shards."""
    if len(values) < 2:
        return []
    figure, axes = _figure(height=1.5)
    heights = np.array(values, np.float64)
    if len(heights) > 400:  # a shard is thinner than a line then; the extremes must still be seen
        parts = np.array_split(heights, 400)
        places = np.linspace(1, len(heights), 400)
        axes.fill_between(places, [p.min() for p in parts], [p.max() for p in parts], color=COLORS[color], linewidth=1)
    else:
        axes.bar(np.arange(1, len(heights) + 1), heights, width=0.85, color=COLORS[color], linewidth=0, alpha=0.85)
    axes.set_ylim(0, 1.08 * heights.max() or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))
    note = f"median {show(float(np.median(heights)))}, {show(heights.min())} to {show(heights.max())}"
    return [Plot(title, note, [], to_svg(figure, title))]


def _figure(*, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.tick_params(which="minor", bottom=False, left=False)
    return figure, axes


def _make_logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0,), numticks=7))
    low, high = axes.get_xlim()
    if high < 1000 * low:
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=9))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(count: float) -> str:
    """1,200 -> 1.2k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"
