"""The profile's pictures: roofline, memory over time, scaling. matplotlib is imported when one is drawn."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.long_sequences import OUT_OF_MEMORY, Point
from bench.profiling import Profile, Row, pattern, replacing
from bench.report_svg import style
from bench.timing import Ceilings
from bench.traces import Stretch

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "down": "v", "plus": "P"}
WIDTH, DPI = 8.0, 130  # inches, dots an inch
INK, SOFT, LINE = "#1b1f24", "#59636e", "#d5dae0"
BANDS = ("#e8f1fa", "#fbefe3", "#e9f5ee", "#f4ecf6")
MOST_LABELS = 14
LEAST_NAMED = 0.055  # of the width of the plot: narrower regions get no name


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(height: float, rows: int, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A figure that belongs to no window system, and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **kwargs)[:, 0]
    for ax in axes:
        ax.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
        ax.grid(True, which="major", color=LINE, linewidth=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(SOFT)
    return figure, list(axes)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, facecolor="white", metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------------------------
# Roofline


def roofline(profiles: Sequence[Profile], roofs: Ceilings, title: str, path: Path) -> bool:
    """Every operator that has matrix products as a point below the measured ceilings: together, then by provider.

    Returns:
        False, and no file, if there is no point.
    """
    points = {p.provider: _points(p.operators) for p in profiles}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return False
    rows = [max(3.0, 0.62 + 0.21 * min(len(found), MOST_LABELS)) for found in points.values()]
    figure, axes = _figure(
        4.2 + sum(rows), 1 + len(points), gridspec_kw={"height_ratios": [4.2, *rows]}, sharex=True, sharey=True
    )
    every = list(itertools.chain(*points.values()))
    lowest, highest = min(x for _, x, _ in every), max(x for _, x, _ in every)
    ridge = roofs.flops_per_second / roofs.bytes_per_second
    left, right = min(lowest, ridge) / 3, max(highest, ridge) * 3
    for ax in axes:
        _roof(ax, roofs, left, right)
    for name, found in points.items():
        colour, marker = _look(name)
        axes[0].scatter(
            *zip(*((x, y) for _, x, y in found), strict=True), s=34, c=colour, marker=marker, label=name, lw=0
        )
    axes[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[0].set_title(title, fontsize=10.5, color=INK, loc="left")
    lows = [y for _, _, y in every] + [left * roofs.bytes_per_second / 1e12]
    axes[0].set_ylim(min(lows) / 2, roofs.flops_per_second / 1e12 * 3)
    axes[0].set_xlim(left, right)
    for ax, (name, found) in zip(axes[1:], points.items(), strict=True):
        _labelled(ax, name, found)
    axes[-1].set_xlabel("intensity, FLOP of matrix products for each byte read or written", fontsize=9.5, color=INK)
    _save(figure, path)
    return True


def _points(rows: Iterable[Row]) -> list[tuple[Row, float, float]]:
    """(row, FLOP a byte, TFLOP/s) of the rows that have both."""
    return [
        (row, row.work.flops / row.work.bytes, row.work.flops / row.seconds / 1e12)
        for row in rows
        if row.work is not None and row.work.flops and row.work.bytes and row.seconds
    ]


def _roof(ax: Any, roofs: Ceilings, left: float, right: float) -> None:
    ceiling, slope = roofs.flops_per_second / 1e12, roofs.bytes_per_second / 1e12
    ridge = ceiling / slope
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.plot([left, ridge, right], [left * slope, ceiling, ceiling], color=INK, lw=1.6, zorder=1)
    ax.annotate(
        f"matrix product: {ceiling:.3g} TFLOP/s", (right, ceiling), (-4, 3), textcoords="offset points",
        ha="right", fontsize=8.5, color=SOFT,
    )  # fmt: skip
    middle = math.sqrt(left * ridge)
    ax.annotate(
        f"copy: {1e3 * slope:.3g} GB/s", (middle, middle * slope), (9, -3), textcoords="offset points",
        ha="left", va="top", fontsize=8.5, color=SOFT,
    )  # fmt: skip
    ax.set_ylabel("TFLOP/s", fontsize=9.5, color=INK)
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis)


def _plain_ticks(axis: Any, dense: bool = False) -> None:
    """Numbers instead of powers on a logarithmic axis; `dense`: also at 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if dense else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _labelled(ax: Any, provider: str, found: list[tuple[Row, float, float]]) -> None:
    """One provider's points, named in a column on the right, each tied to its name."""
    colour, marker = _look(provider)
    shown = sorted(found, key=lambda point: -point[0].seconds)[:MOST_LABELS]
    rest = len(found) - len(shown)
    ax.set_title(provider + (f" ({rest} smaller ones without a name)" if rest else ""), fontsize=10, loc="left")
    ax.scatter([x for _, x, _ in found], [y for _, _, y in found], s=30, c=colour, marker=marker, lw=0, zorder=3)
    shown.sort(key=lambda point: -point[2])
    for i, (row, x, y) in enumerate(shown):
        height = 0.97 - i * (0.97 / max(len(shown), 8))
        ax.annotate(
            f"{short_region(row.region)} {short_operator(row.operator)}  {100 * row.share:.1f} %",
            (x, y), (1.02, height), textcoords="axes fraction", fontsize=8, color=INK, va="center", ha="left",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.45, "lw": 0.7, "shrinkA": 0, "shrinkB": 2,
                        "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


def short_region(region: str) -> str:
    """For narrow places: "enc attn" for "encoder.blocks.*.attn"."""
    parts = {"encoder.blocks.*.": "enc ", "decoder.blocks.*.": "dec ", "encoder.": "", "decoder.": ""}
    for long, short in parts.items():
        if region.startswith(long):
            return short + region.removeprefix(long)
    return region


def short_operator(operator: str) -> str:
    """For narrow places: "sdpa_flash" for "aten::_scaled_dot_product_flash_attention_for_cpu"."""
    name = operator.rpartition("::")[2]
    return name.replace("_scaled_dot_product_", "sdpa_").removesuffix("_for_cpu").removesuffix("_attention")


def _look(provider: str) -> tuple[str, str]:
    light, _, marker = style(provider)
    return light, MARKERS[marker]


# ---------------------------------------------------------------------------------------------------------------------
# Memory over time


def memory(profiles: Sequence[Profile], title: str, path: Path) -> bool:
    """Bytes that tensors hold during one forward, with the regions above. False, and no file, if nobody knows them."""
    found = [p for p in profiles if len(p.memory) > 2]
    if not found:
        return False
    figure, axes = _figure(0.6 + 2.5 * len(found), len(found))
    for ax, profile in zip(axes, found, strict=True):
        times = [1e3 * time for time, _ in profile.memory]
        held = [count / 2**20 for _, count in profile.memory]
        colour, _ = _look(profile.provider)
        ax.fill_between(times, held, step="post", color=colour, alpha=0.25, lw=0)
        ax.step(times, held, where="post", color=colour, lw=1)
        ax.set_xlim(0, times[-1])
        ax.set_ylim(0, 1.16 * max(held))
        ax.set_ylabel("MiB", fontsize=9.5, color=INK)
        top = max(range(len(held)), key=held.__getitem__)
        right = times[top] > 0.7 * times[-1]
        ax.annotate(
            f"peak {held[top]:,.4g} MiB", (times[top], held[top]), (-5 if right else 5, 3),
            textcoords="offset points", ha="right" if right else "left", fontsize=8.5, color=INK,
        )  # fmt: skip
        ax.set_title(profile.provider, fontsize=10, loc="left", pad=20)
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.yaxis.set_major_formatter("{x:,g}")
        _name_regions(ax, profile.stretches, times[-1])
    axes[-1].set_xlabel("ms since the start of the forward, on the host's clock", fontsize=9.5, color=INK)
    figure.suptitle(title, fontsize=10.5, color=INK, x=0.01, ha="left")
    _save(figure, path)
    return True


def _name_regions(ax: Any, stretches: Sequence[Stretch], width: float) -> None:
    """Shades the regions and writes their names above, layers of the same kind together."""
    for i, (name, count, start, end) in enumerate(merged(stretches)):
        ax.axvspan(1e3 * start, 1e3 * end, color=BANDS[i % len(BANDS)], lw=0, zorder=0)
        if 1e3 * (end - start) < LEAST_NAMED * width:
            continue
        text = name if count == 1 else f"{name.removesuffix('.*')} x{count}"
        room = 1e3 * (end - start) / width * 125  # characters, about
        if len(text) > room:  # "decoder x2" for "decoder.blocks x2", "mask_head" for "decoder.mask_head"
            text = name.rpartition(".")[2] if count == 1 else f"{name.partition('.')[0]} x{count}"
        if len(text) > room:
            text = text[: max(int(room) - 1, 1)] + "…"
        ax.annotate(
            text, (500 * (start + end), 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", fontsize=7.5, color=SOFT, annotation_clip=False,
        )  # fmt: skip


def merged(stretches: Iterable[Stretch]) -> list[tuple[str, int, float, float]]:
    """(name with stars, how many, start, end) of neighbours of the same kind."""
    found = []
    for name, group in itertools.groupby(stretches, key=lambda stretch: pattern(stretch.region)):
        inside = list(group)
        found.append((name, len(inside), inside[0].start, inside[-1].end))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


def scaling(points: Sequence[Point], title: str, path: Path) -> bool:
    """Time and peak memory against tokens. False, and no file, if nothing was measured."""
    if not any(p.seconds for p in points):
        return False
    figure, axes = _figure(8.2, 2, sharex=True)
    _against_tokens(axes[0], points, lambda p: p.seconds and 1e3 * p.seconds, "ms a call")
    _against_tokens(axes[1], points, lambda p: p.peak_bytes and p.peak_bytes / 2**20, "peak MiB beyond the model")
    tokens = sorted({p.tokens for p in points})
    axes[1].set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes[1].minorticks_off()
    axes[1].set_xlabel("tokens of the encoder", fontsize=9.5, color=INK)
    axes[0].set_title(title, fontsize=10.5, color=INK, loc="left")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    _save(figure, path)
    return True


def _against_tokens(ax: Any, points: Sequence[Point], value: Callable[[Point], float | None], label: str) -> None:
    """One quantity of all providers on logarithmic axes, a quadratic guide, and crosses where memory ran out."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    highest = (0.0, 0)
    for provider in dict.fromkeys(p.provider for p in points):
        line = [(p.tokens, value(p)) for p in points if p.provider == provider and value(p)]
        if not line:
            continue
        colour, marker = _look(provider)
        ax.plot(*zip(*line, strict=True), color=colour, marker=marker, ms=6, lw=1.7, label=provider)
        highest = max(highest, *((y, x) for x, y in line))
    y, x = highest
    if y:
        tokens = sorted({p.tokens for p in points})
        bottom, top = ax.get_ylim()
        for name, power, dashes in (("quadratic", 2, (4, 3)), ("linear", 1, (1, 2.5))):
            guide = [y * (count / x) ** power for count in tokens]
            ax.plot(tokens, guide, color=SOFT, ls=(0, dashes), lw=1, zorder=1, label=name)
        gone = [p for p in points if p.reason == OUT_OF_MEMORY]
        ax.set_ylim(bottom, max(top, y * (3.0 if gone else 1.3)))
        for i, p in enumerate(gone):
            height = 0.97 - 0.06 * i
            where = {"xycoords": ("data", "axes fraction"), "va": "center", "annotation_clip": False}
            colour, _ = _look(p.provider)
            ax.annotate("x", (p.tokens, height), ha="center", fontsize=11, weight="bold", color=colour, **where)
            ax.annotate(
                f"{p.provider}: out of memory", (p.tokens, height), (-8, 0), textcoords="offset points",
                ha="right", fontsize=8.5, color=colour, bbox={"facecolor": "white", "lw": 0, "pad": 1}, **where,
            )  # fmt: skip
    skipped = [p for p in points if p.reason and p.reason != OUT_OF_MEMORY]
    for tokens in sorted({p.tokens for p in skipped}):
        names = [p.provider for p in skipped if p.tokens == tokens]
        ax.annotate(
            "not run:\n" + "\n".join(names), (tokens, 0.02), xycoords=("data", "axes fraction"),
            ha="center", va="bottom", fontsize=7.5, color=SOFT, backgroundcolor="white",
        )  # fmt: skip
    bottom, top = ax.get_ylim()
    _plain_ticks(ax.yaxis, dense=top / bottom < 1e3)
    ax.set_ylabel(label, fontsize=9.5, color=INK)
