"""The profile's plots: scaling, roofline, memory over time. matplotlib is imported when one is drawn."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.long_sequences import OUT_OF_MEMORY, Point
from bench.profile_tables import Profile, Span, pattern
from bench.report_plots import INK, SOFT, TINTS, look, new_figure
from bench.timing import Ceilings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
LEAST_NAMED = 0.055  # of the width of the plot: narrower regions get no name


def _rows(title: str, heights: Sequence[float], **kwargs: Any) -> tuple["Figure", list[Any]]:
    """A figure and its axes from top to bottom, of so many inches each."""
    figure = new_figure(WIDTH, sum(heights) + 0.4, title)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights}, **kwargs)
    return figure, list(axes[:, 0])


def _numbers(axis: Any, dense: bool = False) -> None:
    """Numbers instead of powers on a logarithmic axis; `dense`: also at 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if dense else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def scaling(points: Sequence[Point], title: str) -> "Figure | None":
    """Time, peak memory and attention's share against tokens; None if nothing was measured."""
    if not any(p.seconds for p in points):
        return None
    figure, axes = _rows(title, (3.4, 3.0, 1.9), sharex=True)
    _against_tokens(axes[0], points, lambda p: p.seconds and 1e3 * p.seconds, "ms a call")
    _against_tokens(axes[1], points, lambda p: p.peak_bytes and p.peak_bytes / 2**20, "peak MiB beyond the model")
    _lines(axes[2], points, lambda p: None if p.attention is None else 100 * p.attention)
    axes[2].set(ylim=(0, 100), ylabel="attention, % of time", xlabel="tokens of the encoder")
    axes[2].set_xticks(sorted({p.tokens for p in points}))
    axes[2].xaxis.set_major_formatter("{x:,g}")
    axes[2].minorticks_off()
    axes[0].legend(loc="upper left")
    return figure


def _lines(ax: Any, points: Sequence[Point], value: Callable[[Point], float | None]) -> None:
    """One line a provider, of the points that have a value."""
    for provider in dict.fromkeys(p.provider for p in points):
        line = [(p.tokens, value(p)) for p in points if p.provider == provider and value(p) is not None]
        if line:
            ax.plot(*zip(*line, strict=True), color=look(provider).light, marker=look(provider).marker, label=provider)


def _against_tokens(ax: Any, points: Sequence[Point], value: Callable[[Point], float | None], label: str) -> None:
    """One quantity of all providers on logarithmic axes, two guides, and crosses where memory ran out."""
    ax.set(xscale="log", yscale="log", ylabel=label)
    _lines(ax, points, lambda p: value(p) or None)
    y, x = max(((value(p), p.tokens) for p in points if value(p)), default=(0, 0))
    gone = [p for p in points if p.reason == OUT_OF_MEMORY]
    if y:
        tokens, (bottom, top) = sorted({p.tokens for p in points}), ax.get_ylim()
        for name, power, dashes in (("quadratic", 2, (4, 3)), ("linear", 1, (1, 2.5))):
            guide = [y * (count / x) ** power for count in tokens]
            ax.plot(tokens, guide, color=SOFT, ls=(0, dashes), lw=1, zorder=1, label=name)
        ax.set_ylim(bottom, max(top, y * (3.0 if gone else 1.3)))
    drawn = {p.provider for p in points if p.seconds}
    skipped = [p for p in points if p.reason and p not in gone and p.provider in drawn]
    notes = [(p.tokens, 0.97 - 0.07 * i, f"{p.provider}: out of memory x", "right") for i, p in enumerate(gone)]
    for count in sorted({p.tokens for p in skipped}):
        names = "\n".join(p.provider for p in skipped if p.tokens == count)
        notes.append((count, 0.02, f"not run:\n{names}", "center"))
    for count, height, text, side in notes:
        ax.text(count, height, text, fontsize=7.5, color=SOFT, ha=side, va="bottom" if height < 0.1 else "top",
                transform=ax.get_xaxis_transform())  # fmt: skip
    bottom, top = ax.get_ylim()
    _numbers(ax.yaxis, dense=top / bottom < 1e3)


def roofline(profiles: Sequence[Profile], roofs: Ceilings, title: str) -> "Figure | None":
    """Every region that has matrix products as a point below the measured ceilings, by provider; None without any."""
    points = {}  # provider -> (intensity, TFLOP/s, region, share in percent), the fastest first
    for p in profiles:
        kept = [line for line in p.regions if line["tflops"] and line["gbps"]]
        if kept := [(1e3 * r["gflop"] / r["mbytes"], r["tflops"], r["region"], r["share_percent"]) for r in kept]:
            points[p.provider] = sorted(kept, key=lambda point: -point[1])
    if not points:
        return None
    figure, axes = _rows(title, [3.0] * len(points), sharex=True, sharey=True)
    ceiling, slope = roofs.flops_per_second / 1e12, roofs.bytes_per_second / 1e12
    x, y = zip(*((x, y) for lines in points.values() for x, y, *_ in lines), strict=True)
    left, right, bottom = min(*x, ceiling / slope) / 2, max(*x, ceiling / slope) * 2, min(y) / 2
    for ax, (provider, lines) in zip(axes, points.items(), strict=True):
        colour, marker = look(provider).light, look(provider).marker
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 3 * ceiling), ylabel="TFLOP/s")
        ax.set_title(provider)
        ax.plot([left, ceiling / slope, right], [left * slope, ceiling, ceiling], color=INK, zorder=1)
        small = {"fontsize": 8, "color": SOFT, "ha": "right"}
        ax.text(right, 1.15 * ceiling, f"matrix product: {ceiling:.3g} TFLOP/s ", **small)
        ax.text(0.99, 0.03, f"slope: copy, {1e3 * slope:.3g} GB/s", transform=ax.transAxes, **small)
        ax.scatter([x for x, *_ in lines], [y for _, y, *_ in lines], s=30, c=colour, marker=marker)
        for i, (x, y, region, share) in enumerate(lines):
            ax.annotate(
                f"{short_region(region)}  {share:.1f} %", (x, y), (1.03, 0.97 - 0.97 * i / max(len(lines) - 1, 8)),
                textcoords="axes fraction", fontsize=8, va="center", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.45, "lw": 0.7, "relpos": (0, 0.5)},
            )  # fmt: skip
        _numbers(ax.xaxis)
        _numbers(ax.yaxis)
    axes[-1].set_xlabel("intensity, FLOP of matrix products for each byte read or written")
    return figure


def short_region(region: str) -> str:
    """For narrow places: "enc attn" for "encoder.blocks.*.attn"."""
    parts = {"encoder.blocks.*.": "enc ", "decoder.blocks.*.": "dec ", "encoder.": "", "decoder.": ""}
    long = next((long for long in parts if region.startswith(long)), "")
    return parts.get(long, "") + region.removeprefix(long)


def memory(profiles: Sequence[Profile], title: str) -> "Figure | None":
    """Bytes that tensors hold during one forward, with the regions above; None if nobody knows them."""
    found = [p for p in profiles if len(p.memory) > 2]
    if not found:
        return None
    figure, axes = _rows(title, [2.4] * len(found))
    for ax, profile in zip(axes, found, strict=True):
        times = [1e3 * time for time, _ in profile.memory]
        held, colour = [count / 2**20 for _, count in profile.memory], look(profile.provider).light
        ax.fill_between(times, held, step="post", color=colour, alpha=0.25, lw=0)
        ax.step(times, held, where="post", color=colour, lw=1)
        ax.set(xlim=(0, times[-1]), ylim=(0, 1.16 * max(held)), ylabel="MiB")
        ax.set_title(profile.provider, pad=18)
        at = times[held.index(max(held))]
        side = "right" if at > 0.7 * times[-1] else "left"
        ax.text(at, 1.03 * max(held), f" peak {max(held):,.4g} MiB ", fontsize=8.5, ha=side)
        for i, (name, start, end) in enumerate(outermost(profile.spans)):
            ax.axvspan(1e3 * start, 1e3 * end, color=TINTS[i % len(TINTS)], lw=0, zorder=0)
            width = 1e3 * (end - start) / times[-1]
            text = name if len(name) < 125 * width else name.rpartition(".")[2]  # an inch has 16 characters
            if width > LEAST_NAMED:
                ax.text(500 * (start + end), 1.03, text[: int(125 * width)], transform=ax.get_xaxis_transform(),
                        fontsize=7.5, color=SOFT, ha="center")  # fmt: skip
    axes[-1].set_xlabel("ms since the start of the forward, on the host's clock")
    return figure


def outermost(spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    """(name, start, end) of the regions inside encoder and decoder; the blocks of one after the other as one."""
    inner = [span for span in spans if span[0] not in ("encoder", "decoder")]
    inner = [one for one in inner if not any(o[1] <= one[1] < one[2] <= o[2] for o in inner if o != one)]
    found = []
    for name, group in itertools.groupby(inner, key=lambda span: pattern(span[0])):
        inside = list(group)
        count = f" x{len(inside)}" if len(inside) > 1 else ""
        found.append((name.removesuffix(".*") + count, inside[0][1], inside[-1][2]))
    return found
