"""Plots of the report as SVG text: bars, and lines on logarithmic axes. Nothing to install, the same bytes every time.

Colours are CSS variables, so that one page has light and dark plots; `standalone` puts the light ones in. Providers
differ in colour (safe for the colour-blind) and in their marker.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]

# name -> colours on light and on dark ground, marker. Okabe and Ito's palette, lightened or darkened where needed.
STYLES = {
    "eager": ("#5f6368", "#b4b8bd", "circle"),
    "published": ("#5f6368", "#b4b8bd", "circle"),
    "sdpa": ("#0072b2", "#5aaeea", "square"),
    "sdpa-flash": ("#0072b2", "#5aaeea", "square"),
    "sdpa-cudnn": ("#3f9fd0", "#9bd6f7", "diamond"),
    "sdpa-efficient": ("#00805c", "#35c79b", "triangle"),
    "sdpa-math": ("#948200", "#f0e442", "down"),
    "compile": ("#b0538a", "#e6a6cb", "plus"),
    "bands": ("#b87400", "#ffb833", "square"),
    "pruned": ("#8a5a00", "#ffcf70", "diamond"),
    "triton": ("#c94f00", "#ff9248", "circle"),
}
OTHERS = (
    ("#4b5fbd", "#a3b1ff", "diamond"),
    ("#7a6a53", "#d6c3a5", "triangle"),
    ("#8a3ffc", "#c9a6ff", "down"),
    ("#007d79", "#5fd4cf", "plus"),
)
THEME = {  # variable -> light, dark
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#59636e", "#a5adb6"),
    "line": ("#d5dae0", "#3a4149"),
    "ground": ("#ffffff", "#14171b"),
    "bad": ("#b3261e", "#ff8a80"),
}
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'


def style(name: str) -> tuple[str, str, str]:
    """(light, dark, marker) of a provider; unknown ones get a fixed one of four."""
    return STYLES.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


def variable(name: str) -> str:
    """The CSS variable of a provider's colour."""
    light = style(name)[0]
    return f"--p{light[1:]}"


def css_variables(dark: bool) -> str:
    """Declarations of all variables."""
    found = [f"--{name}:{values[dark]}" for name, values in THEME.items()]
    providers = dict.fromkeys((*STYLES.values(), *OTHERS))
    return ";".join(dict.fromkeys([*found, *(f"--p{light[1:]}:{(light, dim)[dark]}" for light, dim, _ in providers)]))


def standalone(svg: str) -> str:
    """`svg` with its own ground and fixed light colours, for where no style sheet reaches: an image in a README."""
    for declaration in css_variables(dark=False).split(";"):
        name, value = declaration.split(":")
        svg = svg.replace(f"var({name})", value)
    head, _, rest = svg.partition(">")
    width, height = re.findall(r"viewBox=\"0 0 (\S+) (\S+)\"", head)[0]
    ground = f'<rect width="100%" height="100%" rx="8" fill="{THEME["ground"][0]}"/>'
    return f'{head} width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">{ground}{rest}\n'


def text(x: float, y: float, words: str, size: float = 12, anchor: str = "start", fill: str = "ink", more="") -> str:
    """A line of text, escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="var(--{fill})"{more}>'
        f"{html.escape(words)}</text>"
    )


def shortened(words: str, width: float, size: float = 12) -> str:
    """`words`, cut to about `width` units."""
    most = max(4, int(width / (0.54 * size)))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "line", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--{colour})"{more}/>'


def marker(name: str, x: float, y: float, title: str = "", hollow: bool = False, r: float = 3.6) -> str:
    """A provider's mark at a place; `title` is shown when pointed at."""
    kind = style(name)[2]
    shapes = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
        "diamond": f"M{x:.1f} {y - 1.35 * r:.1f}l{1.35 * r:.1f} {1.35 * r:.1f}l{-1.35 * r:.1f} {1.35 * r:.1f}"
        f"l{-1.35 * r:.1f} {-1.35 * r:.1f}z",
        "triangle": f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z",
        "down": f"M{x:.1f} {y + 1.2 * r:.1f}l{1.2 * r:.1f} {-2.1 * r:.1f}h{-2.4 * r:.1f}z",
        "plus": f"M{x - 1.2 * r:.1f} {y:.1f}h{2.4 * r:.1f}M{x:.1f} {y - 1.2 * r:.1f}v{2.4 * r:.1f}",
    }
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    colour = f"var({variable(name)})"
    fill = "var(--ground)" if hollow else colour
    drawn = f'<path d="{shapes[kind]}"' if kind in shapes else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"'
    return (
        f'{drawn} fill="{fill}" stroke="{colour}" stroke-width="{2.2 if kind == "plus" else 1.4}">{inner}{_end(kind)}'
    )


def _end(kind: str) -> str:
    return "</circle>" if kind == "circle" else "</path>"


def key(name: str) -> str:
    """A small picture of a provider's line and mark, for a legend."""
    return (
        '<svg class="key" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">'
        f'<line x1="0" y1="6" x2="26" y2="6" stroke="var({variable(name)})" stroke-width="1.8"/>'
        f"{marker(name, 13, 6)}</svg>"
    )


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" {FONT} aria-label="{html.escape(title)}">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bars


@dataclass(frozen=True)
class Bar:
    """One bar. Without a value, `note` (the reason) is written in its place.

    Attributes:
        value: its length. text: written behind it. note: written smaller behind that. bad: drawn as a warning.
    """

    label: str
    provider: str
    value: float | None
    text: str = ""
    note: str = ""
    bad: bool = False


def bars(title: str, items: Sequence[Bar], width: float, aside: float = 0, unit: str = "") -> str:
    """Horizontal bars from zero.

    Args:
        aside: room for labels left of the bars; 0 puts them above, for narrow screens.
        unit: written at the top right.
    """
    step, thick, top = (30, 17, 34) if aside else (37, 13, 34)
    most = max((bar.value or 0 for bar in items), default=0) or 1
    behind = max(
        (_width(bar.text, 12) + 14 + _width(bar.note, 11) for bar in items if bar.value is not None), default=0
    )
    room = max(60.0, width - (aside or 8) - behind - 8)
    parts = [text(8, 20, shortened(title, width - 16 - _width(unit, 11), 13), 13, more=' font-weight="600"')]
    parts.append(text(width - 8, 20, unit, 11, "end", "soft"))
    for i, bar in enumerate(items):
        y = top + i * step
        if aside:
            parts.append(text(aside - 8, y + thick / 2 + 4, shortened(bar.label, aside - 12), 12, "end"))
        else:
            parts.append(text(8, y + 10, shortened(bar.label, width - 16), 12))
        left, y = (aside, y) if aside else (8, y + 15)
        if bar.value is None:
            parts.append(text(left, y + thick / 2 + 4, shortened(bar.note, width - left - 8, 11), 11, fill="soft"))
            continue
        long = max(1.0, bar.value / most * room)
        full = html.escape(f"{bar.label}: {bar.text} {bar.note}")
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{long:.1f}" height="{thick}" rx="2" '
            f'fill="var({variable(bar.provider)})"><title>{full}</title></rect>'
        )
        parts.append(text(left + long + 6, y + thick / 2 + 4, bar.text, 12))
        after = left + long + 14 + _width(bar.text, 12)
        heavy = ' font-weight="700"' if bar.bad else ""
        parts.append(text(after, y + thick / 2 + 4, bar.note, 11, fill="bad" if bar.bad else "soft", more=heavy))
    return _svg(width, top + len(items) * step + 4, title, parts)


def _width(words: str, size: float) -> float:
    return 0.58 * size * len(words)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


@dataclass
class Series:
    """Points of one provider. `loose` ones are hollow and not joined; `failed` are x values without a result."""

    name: str
    points: list[Point] = field(default_factory=list)
    loose: list[Point] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)

    def positive(self) -> "Series":
        """Without what has no place on logarithmic axes."""
        points, loose = ([point for point in found if min(point) > 0] for found in (self.points, self.loose))
        return Series(self.name, points, loose, [(x, reason) for x, reason in self.failed if x > 0])

    @property
    def joined(self) -> list[Point]:
        """One point for each x: the median of those there."""
        columns: dict[float, list[float]] = {}
        for x, y in self.points:
            columns.setdefault(x, []).append(y)
        return [(x, sorted(ys)[len(ys) // 2]) for x, ys in sorted(columns.items())]


@dataclass(frozen=True)
class Axis:
    """Logarithmic. `low` and `high` are data, `start` and `end` where they come to lie."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, binary: bool = False, most: int = 6) -> list[float]:
        """Round values: powers of ten, with 2 and 5 where there is room; of two for what is counted in KiB and MiB."""
        if binary:
            found = [2.0**e for e in range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)]
            return found[:: math.ceil(len(found) / most) or 1]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]


def _axis(values: Iterable[float], start: float, end: float) -> Axis:
    found = list(values) or [1.0]
    low, high = min(found), max(found)
    margin = max((high / low) ** 0.06, 1.15)
    return Axis(low / margin, high * margin, start, end)


def panel(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_format: Callable[[float], str],
    floor: Sequence[Point] = (),
    guide: Point | None = None,
    binary: bool = False,
    width: float = 380,
    height: float = 270,
) -> str:
    """Lines on two logarithmic axes.

    Args:
        y_format: a value for people. floor: points of a dotted line below which nothing can be.
        guide: a point through which a dashed line of slope two goes: what grows with the square.
        binary: y is in bytes.
    """
    series = [one.positive() for one in series]
    floor = [point for point in floor if min(point) > 0]
    left, right, top, bottom = 62, width - 12, 34, height - 40
    failing = [one for one in series if one.failed]  # each has a line of its own for its marks, above the plot
    failed = [x for one in failing for x, _ in one.failed]
    points = [point for one in series for point in (*one.points, *one.loose)]
    x_axis = _axis([*(x for x, _ in points), *failed], left, right)
    y_axis = _axis([*(y for _, y in points), *(y for _, y in floor)], bottom, top + 12 * len(failing))
    parts = [text(8, 18, shortened(title, width - 16, 13), 13, more=' font-weight="600"')]
    for value in y_axis.ticks(binary):
        y, label = y_axis(value), re.sub(r"\.0+(?= |x|$)", "", y_format(value))
        parts += [line(left, y, right, y), text(left - 6, y + 4, label, 11, "end", "soft")]
    last = -math.inf
    for value in sorted({x for x, _ in points} | set(failed)):
        label, x = f"{value:,.0f}", x_axis(value)
        parts.append(line(x, bottom, x, bottom + 4, "soft"))
        if x - _width(label, 11) / 2 > last + 4:
            last = x + _width(label, 11) / 2
            parts.append(text(x, bottom + 17, label, 11, "middle", "soft"))
    parts += [line(left, bottom, right, bottom, "soft"), text((left + right) / 2, height - 6, x_name, 11, "middle")]
    parts += _guides(x_axis, y_axis, floor, guide)
    for one in series:
        parts += _drawn(one, x_axis, y_axis, x_name, y_format)
    for i, one in enumerate(failing):
        parts += [_cross(one.name, x_axis(x), top + 12 * i, f"at {x:,.0f} {x_name}: {why}") for x, why in one.failed]
    return _svg(width, height, title, parts)


def _guides(x_axis: Axis, y_axis: Axis, floor: Sequence[Point], guide: Point | None) -> list[str]:
    parts = []
    if len(floor) > 1:
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in floor)
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--ink)" stroke-dasharray="1.5 3"/>')
    elif floor:
        x, y = x_axis(floor[0][0]), y_axis(floor[0][1])
        parts.append(line(x - 14, y, x + 14, y, "ink", ' stroke-dasharray="1.5 3"'))
    if guide is not None:
        x0, y0 = guide
        x1 = min(x_axis.high, x0 * math.sqrt(y_axis.high / y0))
        y1 = y0 * (x1 / x0) ** 2
        parts.append(line(x_axis(x0), y_axis(y0), x_axis(x1), y_axis(y1), "soft", ' stroke-dasharray="6 4"'))
    return parts


def _cross(name: str, x: float, y: float, said: str) -> str:
    title = f"<title>{html.escape(f'{name} {said}')}</title>"
    return (
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" fill="none" '
        f'stroke="var({variable(name)})" stroke-width="2.2">{title}</path>'
    )


def _drawn(one: Series, x_axis: Axis, y_axis: Axis, x_name: str, y_format: Callable[[float], str]) -> list[str]:
    colour, parts = f"var({variable(one.name)})", []
    if len(one.joined) > 1:
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in one.joined)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    for hollow, points in ((False, one.points), (True, one.loose)):
        for x, y in points:
            said = f"{one.name}: {y_format(y)} at {x:,.0f} {x_name}"
            parts.append(marker(one.name, x_axis(x), y_axis(y), said, hollow))
    return parts
