"""What all plots of the benchmark share: colours, style, and SVG text that is the same bytes every time.

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
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Look(NamedTuple):
    """Of a provider: its colour, its marker in matplotlib and in a line of text."""

    light: str
    marker: str
    glyph: str


# Okabe and Ito's palette, safe for the colour-blind, darkened where needed.
LOOKS = {
    "eager": Look("#5f6368", "o", "●"),
    "published": Look("#5f6368", "o", "●"),
    "sdpa": Look("#0072b2", "s", "■"),
    "sdpa-flash": Look("#0072b2", "s", "■"),
    "sdpa-cudnn": Look("#3f9fd0", "D", "◆"),
    "sdpa-efficient": Look("#00805c", "^", "▲"),
    "sdpa-math": Look("#948200", "v", "▼"),
    "compile": Look("#b0538a", "P", "✚"),
    "bands": Look("#b87400", "s", "■"),
    "pruned": Look("#8a5a00", "D", "◆"),
    "triton": Look("#c94f00", "o", "●"),
}
OTHERS = (Look("#4b5fbd", "D", "◆"), Look("#7a6a53", "^", "▲"), Look("#8a3ffc", "v", "▼"), Look("#007d79", "P", "✚"))
INK, SOFT, LINE, GROUND, BAD = "#1b1f24", "#59636e", "#d5dae0", "#ffffff", "#b3261e"
TINTS = ("#e8f1fa", "#fbefe3", "#e9f5ee", "#f4ecf6")  # areas behind a plot
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def look(provider: str) -> Look:
    """How a provider is drawn; unknown ones get a fixed one of four."""
    return LOOKS.get(provider) or OTHERS[sum(map(ord, provider)) % len(OTHERS)]


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for every plot."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rc("font", family="DejaVu Sans", size=9)  # matplotlib brings it: texts are as wide everywhere
        matplotlib.rc("text", color=INK, parse_math=False)  # names are shown as they are
        matplotlib.rc("axes", titlesize=9.5, titleweight="bold", titlelocation="left", edgecolor=SOFT, labelcolor=INK)
        matplotlib.rc("axes", facecolor="none", axisbelow=True, grid=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color=LINE, linewidth=0.7)
        matplotlib.rc(("xtick", "ytick"), color=SOFT, labelsize=8.5)
        matplotlib.rc("legend", frameon=False)
        matplotlib.rc("figure", facecolor=GROUND)
        matplotlib.rc("lines", linewidth=1.6, markersize=5)
        yield


def new_figure(width: float, height: float, title: str) -> "Figure":
    """A figure of so many inches that belongs to no window system; `title` is read out in place of the plot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), label=title)


def to_svg(figure: "Figure") -> str:
    """The figure as one <svg> element that needs nothing else and may stand in HTML.

    Text stays text. The figure's label is its title for screen readers. An artist whose gid begins with "tip:" shows
    the rest of it when pointed at.
    """
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "segmenter", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={**nothing, "Title": figure.get_label() or "plot"})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    start = f'<svg role="img" font-family="{FONT}" stroke-linejoin="round" '
    svg = svg[svg.index("<svg ") :].replace("<svg ", start, 1)
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "").replace("'DejaVu Sans';", f"{FONT};")
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # nothing refers to matplotlib's numbered names
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    return re.sub(r"\n\s*", "\n", svg)


def shortened(words: str, inches: float, size: float = 9) -> str:
    """`words`, cut to about this width."""
    most = max(4, int(inches * 120 / size))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


class Bar(NamedTuple):
    """One bar with `text` and, smaller, `note` behind it. Without a value, `note` (the reason) stands in its place."""

    label: str
    provider: str
    value: float | None
    text: str = ""
    note: str = ""
    bad: bool = False


def bars(title: str, items: Sequence[Bar], width: float, unit: str) -> str:
    """Horizontal bars from zero, as SVG. `width` in inches; `unit` is written at the top right."""
    height = 0.45 + 0.29 * len(items)
    left = min(0.2 + 0.075 * max((len(bar.label) for bar in items), default=0), 0.4 * width)
    behind = max((len(bar.text) * 0.08 + len(bar.note) * 0.072 for bar in items if bar.value is not None), default=0)
    most = max((bar.value or 0 for bar in items), default=0) or 1
    with style():
        figure = new_figure(width, height, title)
        figure.text(0.08 / width, 1 - 0.21 / height, shortened(title, width - 1, 9.5), fontsize=9.5, weight="bold")
        figure.text(1 - 0.08 / width, 1 - 0.21 / height, unit, color=SOFT, fontsize=8, ha="right")
        room = width - left - 0.1
        axes = figure.add_axes((left / width, 0.05 / height, room / width, 1 - 0.4 / height))
        axes.set_axis_off()
        axes.set(xlim=(0, most / max(0.1, 1 - (behind + 0.3) / room)), ylim=(len(items) - 0.5, -0.5))
        beside, small = {"textcoords": "offset points", "va": "center"}, {"color": SOFT, "fontsize": 8}
        for y, bar in enumerate(items):
            axes.annotate(shortened(bar.label, left), (0, y), (-6, 0), ha="right", **beside)
            if bar.value is None:
                axes.annotate(shortened(bar.note, room, 8), (0, y), (2, 0), **small, **beside)
                continue
            tip = f"tip:{bar.label}: {bar.text} {bar.note}"
            axes.barh(y, bar.value, height=0.6, color=look(bar.provider).light, gid=tip)
            words = axes.annotate(bar.text, (bar.value, y), (5, 0), **beside)
            said = small | ({"color": BAD, "weight": "bold"} if bar.bad else {})
            axes.annotate(bar.note, (1, 0.5), (7, 0), xycoords=words, **said, **beside)
        return to_svg(figure)


class Point(NamedTuple):
    """Of a provider's line. Hollow ones are not joined. Without y, `reason` says why nothing is there."""

    provider: str
    x: float
    y: float | None
    hollow: bool = False
    reason: str = ""


def lines(
    title: str,
    points: Sequence[Point],
    x_name: str,
    form: Callable[[float], str],
    floor: Sequence[tuple[float, float]] = (),
    square: bool = False,
) -> str:
    """Lines on two logarithmic axes, as SVG; "" if no point has a value.

    Args:
        form: a value for people, "... B" if in bytes. floor: points of a dotted line below which nothing can be.
        square: a dashed line shows what grows with the square of x.
    """
    shown = [point for point in points if point.y]
    if not shown:
        return ""
    failing = list(dict.fromkeys(point.provider for point in points if point.y is None))
    xs, ys = sorted({point.x for point in points}), [*(point.y for point in shown), *(y for _, y in floor)]
    spread = max(max(ys) / min(ys), 2)
    low, high = min(ys) / spread**0.07, max(ys) * spread ** (0.07 + 0.07 * len(failing))
    low, high = (low, high) if high > 2.6 * low else (low / 1.6, high * 1.6)  # a round value is in it
    with style():
        figure = new_figure(3.9, 2.8, title)
        axes = figure.add_axes((0.19, 0.16, 0.78, 0.74))
        axes.set(xscale="log", yscale="log", xlabel=x_name, ylim=(low, high))
        axes.set_title(shortened(title, 3, 9.5))
        _ticks(axes, xs, form)
        axes.plot(*zip(*floor, strict=True), ":", color=INK, linewidth=1.2, marker="_" if len(floor) == 1 else "")
        if square:
            x, y = max((point.x, point.y) for point in shown if point.x == min(one.x for one in shown))
            end = min(xs[-1], x * math.sqrt(high / y))
            axes.plot((x, end), (y, y * (end / x) ** 2), "--", color=SOFT, linewidth=1)
        for provider in dict.fromkeys(point.provider for point in shown):
            full = [(point.x, point.y) for point in shown if point.provider == provider and not point.hollow]
            joined = {x: statistics.median_high(y for at, y in full if at == x) for x, _ in sorted(full)}
            axes.plot(joined.keys(), joined.values(), color=look(provider).light)
        for point in points:
            _mark(axes, point, f"{point.x:,.0f} {x_name}", form, failing)
        return to_svg(figure)


def _ticks(axes: Any, xs: Sequence[float], form: Callable[[float], str]) -> None:
    """At most six of `xs`, and round values of y: of powers of two for what is in bytes."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    base, subs = (2, (1,)) if form(1).endswith("B") else (10, (1, 2, 5) if high < 100 * low else (1,))
    axes.yaxis.set_major_locator(LogLocator(base, subs, numticks=7))
    axes.yaxis.set_major_formatter(lambda y, _: re.sub(r"\.0+(?= |x|$)", "", form(y)))
    axes.set_xticks(xs[:: math.ceil(len(xs) / 6)])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    if len(xs) == 1:
        axes.set_xlim(xs[0] / 2, xs[0] * 2)


def _mark(axes: Any, point: Point, where: str, form: Callable[[float], str], failing: Sequence[str]) -> None:
    """The provider's mark; a cross at the top, in a line of its own for each provider, for what failed."""
    colour, marker, _ = look(point.provider)
    if point.y is None:
        y, place = 0.96 - 0.07 * failing.index(point.provider), axes.get_xaxis_transform()
        tip = f"tip:{point.provider} at {where}: {point.reason}"
        axes.plot(point.x, y, "x", color=colour, transform=place, markeredgewidth=2, gid=tip)
    else:
        tip, face = f"tip:{point.provider}: {form(point.y)} at {where}", GROUND if point.hollow else colour
        axes.plot(point.x, point.y, marker, color=colour, markerfacecolor=face, gid=tip)
