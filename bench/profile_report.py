"""The profile as a short table, as summary.md and as one page that needs nothing else."""

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import profile_plots
from bench.long_sequences import COMPILE_MODE, Point
from bench.machine import SHORT
from bench.profile_tables import TABLES, Line, Profile
from bench.report_page import NO_VALUE, Cell, Column, Section, Table, html, page
from bench.report_page import Line as Row
from bench.report_plots import style, to_svg
from bench.shapes import Shape, forward_flops
from bench.timing import Ceilings
from segmenter.files import write_atomically, write_text

OPERATORS_SHOWN = 20
MIB = 2**-20
HINTS = {
    "layers": "regions that are together in this line",
    "ms": "of one forward, all layers",
    "share_percent": "of the time of all lines",
    "gflop": "matrix products",
    "mbytes": "inputs and outputs of the operators",
    "percent_flops": "of the measured matrix product",
    "percent_bytes": "of the measured copy",
    "percent_of_roof": "the least time that both ceilings allow, in percent of the time",
    "peak_mib": "most that tensors held at a time, beyond model and image; of a region with its parts",
    "profiled_ms": "with the profiler on",
    "in_regions_percent": "share of the time that lies in named regions",
    "registers": "a thread",
    "shared_bytes": "a block",
}
CAPTIONS = {
    "scaling": "Time, peak memory and attention's share against the number of tokens.",
    "roofline": "Parts of the model below the measured ceilings, with their share of the time. Bytes are inputs and"
    " outputs of operators, so a point can lie above the slope where a cache kept them. Parts without matrix products"
    " have no place here; the tables have them.",
    "memory": "Bytes that tensors hold during one forward beyond the model and the image.",
}
SCALING_CAPTIONS = {
    "ms": "Milliseconds a call, by tokens",
    "peak_mib": "Peak MiB beyond model and image, by tokens",
    "attention_percent": "Attention, percent of the time, by tokens",
}


class Report(NamedTuple):
    """All that was found. `facts`: of bench.results."""

    shape: Shape
    dtype: torch.dtype
    profiler: str
    roofs: Ceilings
    facts: dict[str, Any]
    profiles: list[Profile]
    points: list[Point]

    @property
    def title(self) -> str:
        s = self.shape
        return f"{s.name}, {s.size}x{s.size}, {s.tokens:,} tokens, batch {s.batch}, {SHORT[self.dtype]}, {self.where}"

    @property
    def where(self) -> str:
        return self.facts["name"] if self.facts["device"] == "cuda" else f"CPU ({self.facts['name']})"

    @property
    def software(self) -> str:
        return "torch {torch}, triton {triton}, commit {commit}".format(**self.facts)

    @property
    def ceilings(self) -> str:
        products, copies = self.roofs.flops_per_second / 1e12, self.roofs.bytes_per_second / 1e9
        return f"{products:.3g} TFLOP/s of {self.roofs.dtype} matrix products, {copies:.3g} GB/s of copies"


def write(report: Report, out: Path) -> None:
    """Writes the plots, summary.md and report.html into `out`."""
    svgs = {}
    for name in CAPTIONS:
        (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
    if matplotlib_is_there():
        s = report.shape
        with style():
            every = f"{s.name}, batch {s.batch}, {SHORT[report.dtype]}, {report.where}"
            figures = {
                "scaling": profile_plots.scaling(report.points, every),
                "roofline": profile_plots.roofline(report.profiles, report.roofs, report.title),
                "memory": profile_plots.memory(report.profiles, report.title),
            }
            for name, figure in figures.items():
                if figure is not None:
                    write_atomically(out / f"{name}.png", lambda file, figure=figure: figure.savefig(file, dpi=130))
                    svgs[name] = to_svg(figure)
    write_text(out / "summary.md", markdown(report))
    write_text(out / "report.html", html_page(report, svgs))


def matplotlib_is_there() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def text(value: Any) -> str:
    """A value for people: three digits."""
    if value is None or isinstance(value, str):
        return NO_VALUE if value is None else value
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"


def table(caption: str, lines: Sequence[Line]) -> Table:
    """Lines for every form that a report takes."""

    def cell(value: Any) -> Cell:
        shown, number = text(value), isinstance(value, int | float)
        look = "" if number or value is None else "who"
        return Cell(shown if len(shown) < 100 else f"{shown[:99]}…", value if number else None, look, shown)

    columns = [Column(name.replace("_", " "), HINTS.get(name)) for name in lines[0]]
    return Table(caption, columns, [Row([cell(value) for value in line.values()]) for line in lines])


def overview(report: Report) -> Table:
    """One line a provider."""
    lines, flops = [], forward_flops(report.shape)
    for p in report.profiles:
        rate = p.seconds and flops / p.seconds
        most = f"{p.regions[0]['region']} {p.regions[0]['share_percent']:.0f} %" if p.regions else None
        line = {"provider": p.provider, "ms": p.seconds and 1e3 * p.seconds, "tflops": rate and rate / 1e12}
        line["percent_flops"] = rate and 100 * rate / report.roofs.flops_per_second
        line["profiled_ms"] = p.profiled_seconds and 1e3 * p.profiled_seconds
        line |= {"peak_mib": p.peak_bytes and MIB * p.peak_bytes, "most_time_in": p.reason or most}
        lines.append(line | {"in_regions_percent": 100 * p.covered if p.regions else None})
    return table(f"Providers, {report.title}", lines)


def scaling_lines(points: Sequence[Point]) -> list[Line]:
    """One line a point: scaling.csv."""
    return [
        {"provider": p.provider, "tokens": p.tokens, "size": p.size, "ms": p.seconds and 1e3 * p.seconds}
        | {"spread_percent": p.spread and 100 * p.spread, "peak_mib": p.peak_bytes and MIB * p.peak_bytes}
        | {"attention_percent": p.attention and 100 * p.attention, "reason": p.reason}
        for p in points
    ]


def scaling_tables(points: Sequence[Point]) -> list[Table]:
    """One line a provider, one column a length."""
    lines, found = scaling_lines(points), []
    for key, caption in SCALING_CAPTIONS.items():
        by_provider: dict[str, Line] = {p.provider: {"provider": p.provider} for p in points}
        for line in sorted(lines, key=lambda line: line["tokens"]):
            by_provider[line["provider"]][f"{line['tokens']:,}"] = line["reason"] or line[key]
        if any(line[key] is not None or line["reason"] for line in lines):  # else of a compiled program alone
            found.append(table(caption, list(by_provider.values())))
    return found


def provider_tables(profile: Profile) -> list[tuple[Table, str]]:
    """The tables of one provider, each with the file that has all of it."""
    found = []
    for name, (file, caption) in TABLES.items():
        lines, caption = getattr(profile, name), f"{profile.provider}: {caption}"
        if name != "regions":
            lines, caption = lines[:OPERATORS_SHOWN], f"{caption}, the {OPERATORS_SHOWN} slowest"
        found += [(table(caption, lines), f"{file}_{profile.provider}.csv")] if lines else []
    return found


def notes(report: Report) -> list[str]:
    """What a reader has to know."""
    clock = "of their kernels on the GPU" if report.facts["device"] == "cuda" else "on the CPU"
    found = [
        "One call is the network, from a normalised image to low-resolution masks, and the labels: by our kernel"
        " for triton, by full-resolution logits and argmax for all others. Weights are random.",
        f"Regions and operators have the time {clock} without what is inside them, from {report.profiler}'s profiler;"
        " the time of a call is measured without any. Operations are those of matrix products, bytes those of every"
        " input and output of an operator.",
        "A region has what is in none of its parts: encoder is the class token and the positions, decoder the class"
        " tokens. Stars stand for the layers' numbers.",
        "Attention's share is the time from q, k and v to the output, encoder and decoder, without a profiler.",
        f"compile is torch.compile({COMPILE_MODE}); no provider runs as a CUDA graph here.",
    ]
    if not matplotlib_is_there():
        found.append("There are no plots, because matplotlib is not installed.")
    if report.facts["device"] != "cuda":
        found.append("Measured on a CPU: nothing of this says how a GPU does.")
    return [*found, *(f"{p.provider}: {note}" for p in report.profiles for note in p.notes)]


def markdown(report: Report) -> str:
    """summary.md."""
    parts = [
        f"# Profile: {report.title}",
        f"`{report.facts['command']}`; {report.software}.",
        f"Measured ceilings: {report.ceilings}.",
        "\n".join(f"- {note}" for note in notes(report)),
    ]
    tables = [*([overview(report)] if report.profiles else []), *scaling_tables(report.points)]
    parts += [f"**{t.caption}**\n\n{t.markdown()}" for t in tables]
    for p in report.profiles:
        parts += [f"## {p.provider}", *([p.reason] if p.reason else [])]
        parts += [f"**{t.caption}**\n\n{t.markdown()}\n\nAll of it: {file}" for t, file in provider_tables(p)]
    return "\n\n".join(parts) + "\n"


def html_page(report: Report, svgs: dict[str, str]) -> str:
    """report.html: everything in one file."""
    known = {"Machine": report.where, "Command": report.facts["command"], "Profiler": report.profiler}
    known |= {"Software": report.software, "Ceilings, measured": report.ceilings}
    gpu = ("driver_version", "clocks.max.sm", "power.limit", "cuda")
    known |= {name: report.facts[name] for name in gpu if name in report.facts}
    sections = [Section("about", "What was measured", [html.facts(known.items()), html.items(notes(report))])]
    parts: dict[str, list[Any]] = {"providers": [overview(report)] if report.profiles else []}
    parts |= {name: [html.plots([svgs[name]], CAPTIONS[name], wide=True)] if name in svgs else [] for name in CAPTIONS}
    for t in scaling_tables(report.points):
        parts["scaling"] += [html.paragraph(t.caption), t]
    titled = {name.capitalize(): inside for name, inside in parts.items() if inside}
    sections += [Section(title.lower(), title, inside, title) for title, inside in titled.items()]
    for p in report.profiles:
        found = ([html.paragraph(t.caption), t, f"All of it: {file}"] for t, file in provider_tables(p))
        inside = [p.reason or None, *itertools.chain(*found)]
        sections.append(Section(f"p-{p.provider}", p.provider, inside, p.provider, group=1))
    return page(f"Profile: {report.title}", sections)
