"""The profile's plots: scaling, roofline, memory over time. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.long_sequences import OUT_OF_MEMORY
from bench.profile_tables import Line, Profile, Span, pattern
from bench.report_plots import INK, SOFT, TINTS, look, new_figure, shortened
from bench.timing import Ceilings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
LEAST_NAMED = 0.055  # of the width of the plot: narrower regions get no name
SMALL = {"fontsize": 8, "color": SOFT}


def _rows(title: str, heights: Sequence[float], **kwargs: Any) -> tuple["Figure", list[Any]]:
    """A figure and its axes from top to bottom, of so many inches each."""
    figure = new_figure(WIDTH, sum(heights) + 0.4, title)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights}, **kwargs)
    return figure, list(axes[:, 0])


def _numbers(axis: Any, subs: Sequence[int] = (1,)) -> None:
    """Numbers instead of powers on a logarithmic axis, at these multiples of powers of ten."""
    axis.get_major_locator().set_params(subs=subs)
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("")


def scaling(lines: Sequence[Line], title: str) -> "Figure | None":
    """The lines of scaling.csv: time, peak memory, attention's share by tokens; None if nothing was measured."""
    if not any(line["ms"] for line in lines):
        return None
    figure, axes = _rows(title, (3.4, 3.0, 1.9), sharex=True)
    tokens = sorted({line["tokens"] for line in lines})
    units = {"ms": "ms a call", "peak_mib": "peak MiB beyond the model", "attention_percent": "attention, % of time"}
    for ax, (key, unit) in zip(axes, units.items(), strict=True):
        found = [line for line in lines if line[key]]
        for provider in dict.fromkeys(line["provider"] for line in found):
            points = [(line["tokens"], line[key]) for line in found if line["provider"] == provider]
            colour, marker = look(provider)
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=provider)
        ax.set(xscale="log", yscale="linear" if key == "attention_percent" else "log", ylabel=unit)
        if key == "attention_percent" or not found:
            continue
        most = max(found, key=lambda line: line[key])
        ax.set_ylim(min(line[key] for line in found) / 1.5, 1.5 * most[key])
        guide = [most[key] * (count / most["tokens"]) ** 2 for count in tokens]
        ax.plot(tokens, guide, "--", color=SOFT, linewidth=1, zorder=1, label="quadratic")
        _numbers(ax.yaxis, (1, 2, 5))
    for count in tokens:
        gone = [(line["provider"], line["reason"]) for line in lines if line["tokens"] == count and line["reason"]]
        words = [f"{name}: {OUT_OF_MEMORY if reason == OUT_OF_MEMORY else 'not run'}" for name, reason in gone]
        axes[0].text(count, 0.02, "\n".join(words), ha="right", transform=axes[0].get_xaxis_transform(), **SMALL)
    axes[0].legend()
    axes[2].set(ylim=(0, 100), xlabel="tokens of the encoder")
    axes[2].set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes[2].minorticks_off()
    return figure


def roofline(profiles: Sequence[Profile], roofs: Ceilings, title: str) -> "Figure | None":
    """Every region that has matrix products as a point below the measured ceilings, by provider; None without any."""
    found = {p.provider: [line for line in p.regions if line["tflops"] and line["gbps"]] for p in profiles}
    found = {provider: sorted(lines, key=lambda line: -line["tflops"]) for provider, lines in found.items() if lines}
    if not found:
        return None
    figure, axes = _rows(title, [3.0] * len(found), sharex=True, sharey=True)
    ceiling, slope = roofs.flops_per_second / 1e12, roofs.bytes_per_second / 1e12
    every = [line for lines in found.values() for line in lines]
    intensities = [ceiling / slope, *(1e3 * line["tflops"] / line["gbps"] for line in every)]
    rates = [ceiling, *(line["tflops"] for line in every)]
    left, right = min(intensities) / 2, 2 * max(intensities)
    for ax, (provider, lines) in zip(axes, found.items(), strict=True):
        colour, marker = look(provider)
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(rates) / 2, 3 * max(rates)), ylabel="TFLOP/s")
        ax.set_title(provider)
        ax.plot([left, ceiling / slope, right], [left * slope, ceiling, ceiling], color=INK, zorder=1)
        ax.text(right, 1.15 * ceiling, f"matrix product: {ceiling:.3g} TFLOP/s ", ha="right", **SMALL)
        ax.text(0.99, 0.03, f"slope: copy, {1e3 * slope:.3g} GB/s", transform=ax.transAxes, ha="right", **SMALL)
        arrow = {"arrowstyle": "-", "color": colour, "alpha": 0.45, "lw": 0.7, "relpos": (0, 0.5)}
        beside = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False, "arrowprops": arrow}
        for i, line in enumerate(lines):
            point, name = (1e3 * line["tflops"] / line["gbps"], line["tflops"]), short_region(line["region"])
            ax.plot(*point, marker, color=colour)
            place = (1.03, 0.97 - 0.97 * i / max(len(lines) - 1, 8))
            ax.annotate(f"{name}  {line['share_percent']:.1f} %", point, place, fontsize=8, **beside)
        _numbers(ax.xaxis)
        _numbers(ax.yaxis)
    axes[-1].set_xlabel("intensity, FLOP of matrix products for each byte read or written")
    return figure


def short_region(region: str) -> str:
    """For narrow places: "enc attn" for "encoder.blocks.*.attn"."""
    parts = {"encoder.blocks.*.": "enc ", "decoder.blocks.*.": "dec ", "encoder.": "", "decoder.": ""}
    return next((short + region.removeprefix(long) for long, short in parts.items() if region.startswith(long)), region)


def memory(profiles: Sequence[Profile], title: str) -> "Figure | None":
    """Bytes that tensors hold during one forward, with the regions above; None if nobody knows them."""
    found = [p for p in profiles if len(p.memory) > 2]
    if not found:
        return None
    figure, axes = _rows(title, [2.4] * len(found))
    for ax, profile in zip(axes, found, strict=True):
        times, held = [1e3 * time for time, _ in profile.memory], [count / 2**20 for _, count in profile.memory]
        most, last, colour = max(held), times[-1], look(profile.provider).light
        ax.fill_between(times, held, step="post", color=colour, alpha=0.25, lw=0)
        ax.step(times, held, where="post", color=colour, lw=1)
        ax.set(xlim=(0, last), ylim=(0, 1.16 * most), ylabel="MiB")
        ax.set_title(profile.provider, pad=18)
        at = times[held.index(most)]
        ax.text(at, 1.03 * most, f" peak {most:,.4g} MiB ", ha="right" if at > 0.7 * last else "left", fontsize=8)
        for i, (name, start, end) in enumerate(outermost(profile.spans)):
            ax.axvspan(1e3 * start, 1e3 * end, color=TINTS[i % len(TINTS)], lw=0, zorder=0)
            width, middle = 1e3 * (end - start) / last, 500 * (start + end)
            if width > LEAST_NAMED:
                name = shortened(name, 0.9 * WIDTH * width, 8)
                ax.text(middle, 1.03, name, ha="center", transform=ax.get_xaxis_transform(), **SMALL)
    axes[-1].set_xlabel("ms since the start of the forward, on the host's clock")
    return figure


def outermost(spans: Sequence[Span]) -> list[Span]:
    """The regions inside encoder and decoder; the blocks of one after the other as one."""
    found: list[Span] = []
    for region, start, end in spans:
        name = pattern(region).removesuffix(".*")
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], end)
        elif name not in ("encoder", "decoder") and (not found or start >= found[-1][2]):
            found.append((name, start, end))
    return found
