"""What all plots of the benchmark share: colours, style, and SVG that is the same bytes every time.

    with style():
        figure = new_figure(6, 3, "Images a second")
        ...
        svg = to_svg(figure)

A plot is drawn in the colours of light ground; a page inverts their lightness where the ground is dark. matplotlib is
imported when something is drawn.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Look(NamedTuple):
    """A provider's colour and its marker."""

    light: str
    marker: str


# Okabe and Ito's palette, safe for the colour-blind, darkened where needed.
LOOKS = {
    "eager": Look("#5f6368", "o"),
    "sdpa-flash": Look("#0072b2", "s"),
    "sdpa-cudnn": Look("#3f9fd0", "D"),
    "sdpa-efficient": Look("#00805c", "^"),
    "sdpa-math": Look("#948200", "v"),
    "compile": Look("#b0538a", "P"),
    "bands": Look("#b87400", "s"),
    "pruned": Look("#8a5a00", "D"),
    "triton": Look("#c94f00", "o"),
}
OTHERS = (Look("#4b5fbd", "D"), Look("#7a6a53", "^"), Look("#8a3ffc", "v"), Look("#007d79", "P"))
INK, SOFT, LINE, GROUND, BAD = "#1b1f24", "#59636e", "#d5dae0", "#ffffff", "#b3261e"
TINTS = ("#e8f1fa", "#fbefe3", "#e9f5ee", "#f4ecf6")  # areas behind a plot


def look(provider: str) -> Look:
    """How a provider is drawn; unknown ones get a fixed one of four."""
    return LOOKS.get(provider) or OTHERS[sum(map(ord, provider)) % len(OTHERS)]


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for every plot."""
    import matplotlib

    with matplotlib.rc_context():
        # matplotlib brings DejaVu Sans, so texts are as wide everywhere; who views an SVG may not have it.
        matplotlib.rc("font", **{"family": "sans-serif", "sans-serif": ["DejaVu Sans"], "size": 9})
        matplotlib.rc("text", color=INK, parse_math=False)  # names are shown as they are
        matplotlib.rc("axes", titlesize=9.5, titleweight="bold", titlelocation="left", edgecolor=SOFT, labelcolor=INK)
        matplotlib.rc("axes", facecolor="none", axisbelow=True, grid=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color=LINE, linewidth=0.7)
        matplotlib.rc(("xtick", "ytick"), color=SOFT, labelsize=8.5)
        matplotlib.rc("legend", frameon=False)
        matplotlib.rc("figure", facecolor=GROUND)
        matplotlib.rc("lines", linewidth=1.6, markersize=5)
        matplotlib.rc("svg", hashsalt="segmenter", fonttype="none")  # the same identifiers every time; text stays text
        yield


def new_figure(width: float, height: float, title: str) -> "Figure":
    """A figure of so many inches that belongs to no window system; `title` is read out in place of the plot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), label=title)


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG file, within `style()`. Its label is the title."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Title": figure.get_label() or "plot"})
    return file.getvalue()


def shortened(words: str, inches: float, size: float = 9) -> str:
    """`words`, cut to about this width."""
    most = max(4, int(inches * 120 / size))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


class Bar(NamedTuple):
    """One bar with `text` behind it. Without a value, `text` is the reason and stands in its place."""

    label: str
    provider: str
    value: float | None
    text: str
    bad: bool = False


def bars(title: str, items: Sequence[Bar], width: float) -> str:
    """Horizontal bars of images a second, from zero, as SVG. `width` in inches."""
    title, rows = f"{title}, images/s", range(len(items))
    labels = [shortened(bar.label, 0.4 * width) for bar in items]
    room = 0.9 * width - 9 / 120 * max(map(len, labels), default=0)  # of the bars and what is behind them
    ends = [bar.value / max(0.1, 1 - 0.06 * len(bar.text) / room) for bar in items if bar.value]
    with style():
        figure = new_figure(width, 0.45 + 0.29 * len(items), title)
        figure.set_layout_engine("constrained")
        figure.suptitle(shortened(title, width, 9.5), x=0.01, ha="left", fontsize=9.5, weight="bold")
        axes = figure.subplots()
        axes.spines[:].set_visible(False)
        axes.grid(False)
        axes.tick_params(length=0, labelbottom=False)
        axes.set_yticks(rows, labels, color=INK)
        colours = [look(bar.provider).light for bar in items]
        drawn = axes.barh(rows, [bar.value or 0 for bar in items], 0.6, color=colours)
        words = axes.bar_label(drawn, [shortened(bar.text, room, 8) for bar in items], padding=3, fontsize=8)
        for word, bar in zip(words, items, strict=True):
            word.set(color=BAD if bar.bad else INK if bar.value else SOFT, weight="bold" if bar.bad else "normal")
        axes.set(xlim=(0, max(ends, default=1)), ylim=(len(items) - 0.5, -0.5))
        return to_svg(figure)


class Point(NamedTuple):
    """Of a provider's line. Hollow ones are not joined. Without y, memory ran out."""

    provider: str
    x: float
    y: float | None
    hollow: bool = False


def lines(
    title: str,
    points: Sequence[Point],
    x_name: str,
    form: Callable[[float], str],
    floor: Sequence[tuple[float, float]] = (),
    square: bool = False,
) -> str:
    """Lines on two logarithmic axes, as SVG; "" if no point has a value. Where memory ran out is a cross at the top.

    Args:
        form: a value for people, "... B" if in bytes. floor: points of a dotted line below which nothing can be.
        square: a dashed line shows what grows with the square of x.
    """
    from matplotlib.ticker import LogLocator

    shown = [point for point in points if point.y]
    if not shown:
        return ""
    failing = list(dict.fromkeys(point.provider for point in points if point.y is None))
    xs, ys = sorted({point.x for point in points}), [*(point.y for point in shown), *(y for _, y in floor)]
    spread, in_bytes = max(max(ys) / min(ys), 2), form(1).endswith("B")
    low, high = min(ys) / spread**0.07, max(ys) * spread ** (0.07 + 0.07 * len(failing))
    low, high = (low, high) if high > 2.6 * low else (low / 1.6, high * 1.6)  # a round value is in it
    with style():
        figure = new_figure(3.9, 3.4, title)
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel=x_name, ylim=(low, high))
        axes.set_title(shortened(title, 3, 9.5))
        # At most six of `xs`, and round values of y: powers of two of what is in bytes.
        axes.set_xticks(xs[:: math.ceil(len(xs) / 6)])
        if len(xs) == 1:
            axes.set_xlim(xs[0] / 2, xs[0] * 2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        base, steps = (2, (1,)) if in_bytes else (10, (1, 2, 5) if high < 100 * low else (1,))
        axes.yaxis.set_major_locator(LogLocator(base, steps, numticks=7))
        axes.yaxis.set_major_formatter(lambda y, _: re.sub(r"\.0+(?= |x|$)", "", form(y)))
        axes.minorticks_off()
        for provider in dict.fromkeys(point.provider for point in points):
            colour, marker = look(provider)
            mine = [point for point in points if point.provider == provider]
            full = [(point.x, point.y) for point in mine if point.y and not point.hollow]
            joined = {x: statistics.median_high(y for at, y in full if at == x) for x, _ in sorted(full)}
            axes.plot(joined.keys(), joined.values(), marker=marker, color=colour, label=provider)
            for point in mine:
                if point.y is None:
                    y, place = 0.96 - 0.07 * failing.index(provider), axes.get_xaxis_transform()
                    axes.plot(point.x, y, "x", color=colour, transform=place, markeredgewidth=2)
                elif point.hollow:
                    axes.plot(point.x, point.y, marker, color=colour, markerfacecolor=GROUND)
        if floor:
            axes.plot(*zip(*floor, strict=True), ":", color=INK, marker="_" if len(floor) == 1 else "", label="floor")
        if square:
            x, y = max((point.x, point.y) for point in shown if point.x == min(one.x for one in shown))
            end = min(xs[-1], x * math.sqrt(high / y))
            axes.plot((x, end), (y, y * (end / x) ** 2), "--", color=SOFT, linewidth=1, label="grows with the square")
        if failing:
            axes.plot([], [], "x", color=SOFT, markeredgewidth=2, label="out of memory")
        figure.legend(loc="outside lower left", ncols=3, fontsize=7.5)
        return to_svg(figure)
