"""The profile as tables and as one page that needs nothing else."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import profile_plots
from bench.long_sequences import COMPILE_MODE, Point
from bench.machine import SHORT
from bench.profile_tables import ELSEWHERE, TABLES, Line, Profile
from bench.report_page import NO_VALUE, Cell, Column, Section, Table, html, page
from bench.report_page import Line as Row
from bench.report_plots import style, to_svg
from bench.report_rows import significant, whole
from bench.shapes import Shape, forward_flops
from bench.timing import Ceilings
from segmenter.files import write_atomically, write_text

LINES_SHOWN = 25
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


class Run(NamedTuple):
    """What is profiled, on what, until when (`time.monotonic`) and where to; and what was found."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    roofs: Ceilings
    facts: dict[str, Any]  # of bench.machine
    deadline: float
    out: Path
    points: list[Point]
    profiles: list[Profile]

    @property
    def where(self) -> str:
        return self.facts["name"] if self.device.type == "cuda" else f"CPU ({self.facts['name']})"

    @property
    def title(self) -> str:
        s = self.shape
        return f"{s.name}, {s.size}x{s.size}, {s.tokens:,} tokens, batch {s.batch}, {SHORT[self.dtype]}, {self.where}"


def write(run: Run) -> None:
    """Writes the plots and report.html."""
    every, svgs = f"{run.shape.name}, batch {run.shape.batch}, {SHORT[run.dtype]}, {run.where}", {}
    with style():
        figures = {
            "scaling": profile_plots.scaling(scaling_lines(run.points), every),
            "roofline": profile_plots.roofline(run.profiles, run.roofs, run.title),
            "memory": profile_plots.memory(run.profiles, run.title),
        }
        for name, figure in figures.items():
            path = run.out / f"{name}.png"
            path.unlink(missing_ok=True)  # of an earlier run
            if figure is not None:
                write_atomically(path, functools.partial(figure.savefig, dpi=130))
                svgs[name] = to_svg(figure)
    write_text(run.out / "report.html", html_page(run, svgs))


def table(caption: str, lines: Sequence[Line]) -> Table:
    """Lines for every form that a report takes."""

    def cell(value: Any) -> Cell:
        if value is None or isinstance(value, str):
            shown = value or NO_VALUE
            return Cell(shown if len(shown) < 100 else f"{shown[:99]}…", None, "who" if value else "", shown)
        return Cell((whole if isinstance(value, int) else significant)(value), value)

    columns = [Column(name.replace("_", " "), HINTS.get(name)) for name in lines[0]]
    return Table(caption, columns, [Row([cell(value) for value in line.values()]) for line in lines])


def overviews(run: Run) -> list[Table]:
    """What to look at first: one line a provider, and one a point of the scaling; without those that are empty."""
    lines, flops = [], forward_flops(run.shape)
    for p in run.profiles:
        rate = p.seconds and flops / p.seconds
        most = f"{p.regions[0]['region']} {p.regions[0]['share_percent']:.0f} %" if p.regions else None
        line = {"provider": p.provider, "ms": p.seconds and 1e3 * p.seconds, "tflops": rate and rate / 1e12}
        line["percent_flops"] = rate and 100 * rate / run.roofs.flops_per_second
        line["profiled_ms"] = p.profiled_seconds and 1e3 * p.profiled_seconds
        line |= {"peak_mib": p.peak_bytes and MIB * p.peak_bytes, "most_time_in": p.reason or most}
        named = sum(line["share_percent"] for line in p.regions if line["region"] != ELSEWHERE)
        lines.append(line | {"in_regions_percent": named or None})
    points = sorted(scaling_lines(run.points), key=lambda line: line["tokens"])
    captioned = {f"Providers, {run.title}": lines, "Scaling": points}
    return [table(caption, found) for caption, found in captioned.items() if found]


def scaling_lines(points: Sequence[Point]) -> list[Line]:
    """One line a point: scaling.csv."""
    return [
        {"provider": p.provider, "tokens": p.tokens, "size": p.size, "ms": p.seconds and 1e3 * p.seconds}
        | {"spread_percent": p.spread and 100 * p.spread, "peak_mib": p.peak_bytes and MIB * p.peak_bytes}
        | {"attention_percent": p.attention and 100 * p.attention, "reason": p.reason}
        for p in points
    ]


def notes(run: Run) -> list[str]:
    """What a reader has to know."""
    on_gpu = run.device.type == "cuda"
    clock = "of their kernels on the GPU" if on_gpu else "on the CPU"
    found = [
        "One call is the network, from a normalised image to low-resolution masks, and the labels: by our kernel"
        " for triton, by full-resolution logits and argmax for all others. Weights are random.",
        f"Regions and operators have the time {clock} without what is inside them, from torch's profiler;"
        " the time of a call is measured without any. Operations are those of matrix products, bytes those of every"
        " input and output of an operator.",
        "A region has what is in none of its parts: encoder is the class token and the positions, decoder the class"
        " tokens. Stars stand for the layers' numbers.",
        "Attention's share is the time from q, k and v to the output, encoder and decoder, without a profiler.",
        f"compile is torch.compile({COMPILE_MODE}); no provider runs as a CUDA graph here. Its fused kernels compute"
        " several operators at once: their operations and bytes are unknown, their columns empty. It is one region,"
        " because compiled code knows no modules. What the program says is not always done: full-resolution logits,"
        " for one, can be fused away.",
    ]
    return found if on_gpu else [*found, "Measured on a CPU: nothing of this says how a GPU does."]


def html_page(run: Run, svgs: dict[str, str]) -> str:
    """report.html: everything in one file."""
    products, copies = run.roofs.flops_per_second / 1e12, run.roofs.bytes_per_second / 1e9
    known = {
        "Machine": run.where,
        "Command": run.facts["command"],
        "Software": "torch {torch}, triton {triton}, commit {commit}".format(**run.facts),
        "Ceilings, measured": f"{products:.3g} TFLOP/s of matrix products, {copies:.3g} GB/s of copies",
    }
    gpu = ("driver_version", "clocks.max.sm", "power.limit", "cuda")
    known |= {name: run.facts[name] for name in gpu if name in run.facts}
    sections = [Section("about", "What was measured", [html.facts(known.items()), html.items(notes(run))])]
    first = [block for t in overviews(run) for block in (html.paragraph(t.caption), t)]
    sections.append(Section("overview", "Overview", first, "Overview"))
    for name, svg in svgs.items():
        title, drawn = name.capitalize(), html.plots([svg], CAPTIONS[name], wide=True)
        sections.append(Section(name, title, [drawn], title))
    for p in run.profiles:
        inside: list[Any] = [p.reason or None]
        for name, (file, caption) in TABLES.items():
            if lines := getattr(p, name)[:LINES_SHOWN]:
                caption = f"{p.provider}: {caption}, the slowest first"
                inside += [html.paragraph(caption), table(caption, lines), f"All of it: {file}_{p.provider}.csv"]
        sections.append(Section(f"p-{p.provider}", p.provider, inside, p.provider, group=1))
    return page(f"Profile: {run.title}", sections)
