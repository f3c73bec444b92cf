"""What all plots of the benchmark share: colours, style, and SVG text that is the same bytes every time.

    with style():
        figure = new_figure(6, 3, "Images a second")
        ...
    svg = to_svg(figure)

A plot is drawn in the colours of light ground. A page that it stands in (bench/report_page.py) swaps the colours named
here for CSS variables, so that it is readable on dark ground too. matplotlib is imported when something is drawn.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

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
