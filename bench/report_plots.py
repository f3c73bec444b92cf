"""What all plots of the benchmark share: colours, style, and SVG text that is the same bytes every time.

    with style():
        figure = new_figure(6, 3, "Images a second")
        ...
    svg = to_svg(figure)

A plot is drawn in the colours of light ground. A page that it stands in (bench/report_page.py) swaps the colours named
here for CSS variables, so that it is readable on dark ground too. matplotlib is imported when something is drawn.
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
    """Of a provider: its colour on light and on dark ground, its marker in matplotlib and in a line of text."""

    light: str
    dark: str
    marker: str
    glyph: str


# Okabe and Ito's palette, safe for the colour-blind, lightened or darkened where needed.
LOOKS = {
    "eager": Look("#5f6368", "#b4b8bd", "o", "●"),
    "published": Look("#5f6368", "#b4b8bd", "o", "●"),
    "sdpa": Look("#0072b2", "#5aaeea", "s", "■"),
    "sdpa-flash": Look("#0072b2", "#5aaeea", "s", "■"),
    "sdpa-cudnn": Look("#3f9fd0", "#9bd6f7", "D", "◆"),
    "sdpa-efficient": Look("#00805c", "#35c79b", "^", "▲"),
    "sdpa-math": Look("#948200", "#f0e442", "v", "▼"),
    "compile": Look("#b0538a", "#e6a6cb", "P", "✚"),
    "bands": Look("#b87400", "#ffb833", "s", "■"),
    "pruned": Look("#8a5a00", "#ffcf70", "D", "◆"),
    "triton": Look("#c94f00", "#ff9248", "o", "●"),
}
OTHERS = (
    Look("#4b5fbd", "#a3b1ff", "D", "◆"),
    Look("#7a6a53", "#d6c3a5", "^", "▲"),
    Look("#8a3ffc", "#c9a6ff", "v", "▼"),
    Look("#007d79", "#5fd4cf", "P", "✚"),
)
INK, SOFT, LINE, GROUND, BAD = "#1b1f24", "#59636e", "#d5dae0", "#ffffff", "#b3261e"
TINTS = ("#e8f1fa", "#fbefe3", "#e9f5ee", "#f4ecf6")  # areas behind a plot
DARK = {  # colour on light ground -> on dark ground
    INK: "#e8eaed",
    SOFT: "#a5adb6",
    LINE: "#3a4149",
    GROUND: "#14171b",
    BAD: "#ff8a80",
    **dict(zip(TINTS, ("#1c2b3a", "#38291a", "#1b3224", "#2f2236"), strict=True)),
    **{look.light: look.dark for look in (*LOOKS.values(), *OTHERS)},
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def look(provider: str) -> Look:
    """How a provider is drawn; unknown ones get a fixed one of four."""
    return LOOKS.get(provider) or OTHERS[sum(map(ord, provider)) % len(OTHERS)]


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for every plot."""
    import matplotlib

    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it: texts are as wide everywhere
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # names are shown as they are
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "figure.facecolor": GROUND,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(settings):
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
    svg = svg[svg.index("<svg ") :].replace(
        "<svg ", f'<svg role="img" font-family="{FONT}" stroke-linejoin="round" ', 1
    )
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "").replace("'DejaVu Sans';", f"{FONT};")
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # nothing refers to matplotlib's numbered names
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    return re.sub(r"\n\s*", "\n", svg)


# ---------------------------------------------------------------------------------------------------------------------
# Bars


class Bar(NamedTuple):
    """One bar with `text` and, smaller, `note` behind it. Without a value, `note` (the reason) stands in its place."""

    label: str
    provider: str
    value: float | None
    text: str = ""
    note: str = ""
    bad: bool = False


def shortened(words: str, inches: float, size: float = 9) -> str:
    """`words`, cut to about this width."""
    most = max(4, int(inches * 120 / size))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


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
        for y, bar in enumerate(items):
            beside = {"textcoords": "offset points", "va": "center"}
            axes.annotate(shortened(bar.label, left), (0, y), (-6, 0), ha="right", **beside)
            if bar.value is None:
                axes.annotate(shortened(bar.note, room, 8), (0, y), (2, 0), color=SOFT, fontsize=8, **beside)
                continue
            tip = f"tip:{bar.label}: {bar.text} {bar.note}"
            axes.barh(y, bar.value, height=0.6, color=look(bar.provider).light, gid=tip)
            words = axes.annotate(bar.text, (bar.value, y), (5, 0), **beside)
            said = {"color": BAD, "weight": "bold"} if bar.bad else {"color": SOFT}
            axes.annotate(bar.note, (1, 0.5), (7, 0), xycoords=words, fontsize=8, **said, **beside)
        return to_svg(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


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
    with style():
        figure = new_figure(3.9, 2.8, title)
        axes = figure.add_axes((0.19, 0.16, 0.78, 0.74))
        axes.set(xscale="log", yscale="log", xlabel=x_name, ylim=(low, high))
        axes.set_title(shortened(title, 3, 9.5))
        axes.minorticks_off()
        ticks = _ticks(low, high, binary=form(1).endswith("B"))
        axes.set_yticks(ticks, [re.sub(r"\.0+(?= |x|$)", "", form(tick)) for tick in ticks])
        axes.set_xticks(_apart(xs), [f"{x:,.0f}" for x in _apart(xs)])
        if len(xs) == 1:
            axes.set_xlim(xs[0] / 2, xs[0] * 2)
        axes.plot(*zip(*floor, strict=True), ":", color=INK, linewidth=1.2, marker="_" if len(floor) == 1 else "")
        if square:
            x, y = max((point.x, point.y) for point in shown if point.x == min(shown, key=lambda one: one.x).x)
            end = min(xs[-1], x * math.sqrt(high / y))
            axes.plot((x, end), (y, y * (end / x) ** 2), "--", color=SOFT, linewidth=1)
        for provider in dict.fromkeys(point.provider for point in shown):
            full = [(point.x, point.y) for point in shown if point.provider == provider and not point.hollow]
            joined = {x: statistics.median_high(y for at, y in full if at == x) for x, _ in sorted(full)}
            axes.plot(joined.keys(), joined.values(), color=look(provider).light)
        for point in points:
            _mark(axes, point, f"{point.x:,.0f} {x_name}", form, failing)
        return to_svg(figure)


def _mark(axes: Any, point: Point, where: str, form: Callable[[float], str], failing: Sequence[str]) -> None:
    """The provider's mark; a cross at the top, in a line of its own for each provider, for what failed."""
    colour, _, marker, _ = look(point.provider)
    if point.y is None:
        y, place = 0.96 - 0.07 * failing.index(point.provider), axes.get_xaxis_transform()
        tip = f"tip:{point.provider} at {where}: {point.reason}"
        axes.plot(point.x, y, "x", color=colour, transform=place, markeredgewidth=2, gid=tip)
    else:
        tip, face = f"tip:{point.provider}: {form(point.y)} at {where}", GROUND if point.hollow else colour
        axes.plot(point.x, point.y, marker, color=colour, markerfacecolor=face, gid=tip)


def _ticks(low: float, high: float, binary: bool) -> list[float]:
    """At most six round values: powers of ten, with 2 and 5 where there is room; of two for what is in bytes."""
    base, every = (2.0, [(1,)]) if binary else (10.0, [(1, 2, 5), (1, 3), (1,)])
    powers = [base**e for e in range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)]
    choices = [[n * power for power in powers for n in steps if low <= n * power <= high] for steps in every]
    found = next((choice for choice in choices if len(choice) <= 6), choices[-1])
    return found[:: math.ceil(len(found) / 6) or 1]


def _apart(xs: Sequence[float]) -> list[float]:
    """Those of `xs` that have room for a label on a logarithmic axis."""
    kept = [xs[0]]
    for x in xs:
        if math.log(x / kept[-1]) > math.log(xs[-1] / xs[0]) / 6:
            kept.append(x)
    return kept
