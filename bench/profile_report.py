"""The profile as a short table, as summary.md and as one page that needs nothing else."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import profile_plots
from bench.long_sequences import COMPILE_MODE, Point
from bench.profiling import Profile, Row, replacing
from bench.report_html import Cell, Head, Html, Line, facts, page, section, table, tag
from bench.results import SHORT
from bench.shapes import Shape, forward_flops
from bench.timing import Ceilings

NONE = "–"  # an en dash: nothing known, nothing measured
OPERATORS_SHOWN, KERNELS_SHOWN = 20, 15
PICTURES = {
    "scaling": "Time and peak memory against the number of tokens. A cross: the provider ran out of memory there.",
    "roofline": "Operators with matrix products below the measured ceilings, with their share of the time. Bytes are"
    " inputs and outputs, so a point can lie above the slope where a cache kept them. Operators without matrix products"
    " (softmax, LayerNorm, copies) have no place here; the tables have them.",
    "memory": "Bytes that tensors hold during one forward beyond the model and the picture.",
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
        what = f"{s.name}, {s.size}x{s.size}, {s.tokens:,} tokens, batch {s.batch}"
        return f"{what}, {SHORT[self.dtype]}, {self.where}"

    @property
    def where(self) -> str:
        return self.facts["name"] if self.facts["device"] == "cuda" else f"CPU ({self.facts['name']})"


class Table(NamedTuple):
    """One table for every form that a report takes."""

    caption: str
    heads: Sequence[Head]
    rows: list[list[Cell]]


def write(report: Report, out: Path) -> None:
    """Writes the pictures, summary.md and report.html into `out`."""
    drawn = dict.fromkeys(PICTURES, False)
    if profile_plots.available():
        drawn = {
            "scaling": profile_plots.scaling(report.points, _scaling_title(report), out / "scaling.png"),
            "roofline": profile_plots.roofline(report.profiles, report.roofs, report.title, out / "roofline.png"),
            "memory": profile_plots.memory(report.profiles, report.title, out / "memory.png"),
        }
    for name, there in drawn.items():
        if not there:
            (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
    pictures = {name: (out / f"{name}.png").read_bytes() for name, there in drawn.items() if there}
    for name, text in (("summary.md", markdown(report)), ("report.html", html_page(report, pictures))):
        with replacing(out / name) as path:
            path.write_text(text, encoding="utf-8")


def _scaling_title(report: Report) -> str:
    s = report.shape
    return f"{s.name}, batch {s.batch}, {SHORT[report.dtype]}, {report.where}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures as text


def milliseconds(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell(NONE)
    ms = 1e3 * seconds
    return Cell(f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}", ms)


def mebibytes(count: float | None) -> Cell:
    if count is None:
        return Cell(NONE)
    value = count / 2**20
    return Cell(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", value)


def _number(value: float | None, form: str = ".3g") -> Cell:
    return Cell(NONE) if value is None else Cell(format(value, form), value)


def _percent(share: float | None) -> Cell:
    return Cell(NONE) if share is None else Cell(f"{share:.1f} %" if share < 99.95 else f"{share:.0f} %", share)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def overview(report: Report) -> Table:
    """One line a provider."""
    heads = [
        Head("provider"),
        Head("ms", "median of a forward, without a profiler"),
        Head("TFLOP/s", "matrix products of the whole forward"),
        Head("of ceiling", "of the measured matrix product"),
        Head("operators ms", "sum over operators; kernels only on a GPU"),
        Head("peak MiB", "tensors beyond model and picture"),
        Head("most time in"),
        Head("in regions", "share of the operators' time that lies in named regions"),
    ]
    rows = []
    flops = forward_flops(report.shape)
    for p in report.profiles:
        if p.seconds is None:
            rows.append([Cell(p.provider), *[Cell(NONE)] * 5, Cell(p.reason, class_="text"), Cell(NONE)])
            continue
        rate = flops / p.seconds
        first = p.regions[0] if p.regions else None
        most = f"{first.region} {100 * first.share:.0f} %" if first else NONE
        rows.append(
            [
                Cell(p.provider),
                milliseconds(p.seconds),
                _number(rate / 1e12),
                _percent(100 * rate / report.roofs.flops_per_second),
                milliseconds(p.operator_seconds),
                mebibytes(p.peak_bytes),
                Cell(most, class_="text"),
                _percent(100 * p.covered),
            ]
        )
    return Table(f"Providers, {report.title}", heads, rows)


def scaling_tables(report: Report) -> list[Table]:
    """Time and memory: one line a provider, one column a length."""
    tokens = sorted({p.tokens for p in report.points})
    providers = dict.fromkeys(p.provider for p in report.points)
    at = {(p.provider, p.tokens): p for p in report.points}
    heads = [Head("provider"), *(Head(f"{count:,}") for count in tokens)]
    found = []
    for caption, cell in (
        ("Milliseconds a call, by tokens", lambda p: milliseconds(p.seconds)),
        ("Peak MiB beyond model and picture, by tokens", lambda p: mebibytes(p.peak_bytes)),
    ):
        rows = []
        for provider in providers:
            line = [at[provider, count] for count in tokens]
            rows.append([Cell(provider), *(Cell(p.reason, class_="text") if p.reason else cell(p) for p in line)])
        found.append(Table(caption, heads, rows))
    return found


def row_table(caption: str, rows: Sequence[Row], roofs: Ceilings) -> Table:
    """Operators or regions."""
    by_operator = any(row.operator for row in rows)
    heads = [
        *([Head("operator")] if by_operator else []),
        Head("region"),
        Head("ms", "of one forward, all layers"),
        Head("share", "of the time of all operators"),
        Head("layers", "regions that are together in this line"),
        Head("calls", "of operators"),
        Head("launches", "kernels and copies"),
        Head("TFLOP/s", "matrix products"),
        Head("GB/s", "inputs and outputs of the operators"),
        Head("% FLOP", "of the measured matrix product"),
        Head("% bytes", "of the measured copy"),
        Head("% roof", "the least time that both ceilings allow, in percent of the time"),
    ]
    lines = []
    for row in rows:
        rates = row.rates(roofs)
        name = [Cell(row.operator), Cell(row.region, class_="who")] if by_operator else [Cell(row.region)]
        lines.append(
            [
                *name,
                milliseconds(row.seconds),
                _percent(100 * row.share),
                _number(row.layers, "d"),
                _number(row.calls, ",g"),
                _number(row.launches, ",g"),
                _number(rates["tflops"]),
                _number(rates["gbps"]),
                *(_number(rates[key], ".0f") for key in ("percent_flops", "percent_bytes", "percent_of_roof")),
            ]
        )
    return Table(caption, heads, lines)


def kernel_table(caption: str, profile: Profile) -> Table:
    """Kernels of the device."""
    heads = [
        Head("kernel"),
        Head("ms"),
        Head("share"),
        Head("launches"),
        Head("registers", "a thread"),
        Head("shared bytes", "a block"),
    ]
    rows = [
        [
            Cell(row.name if len(row.name) < 100 else row.name[:99] + "…", title=row.name),
            milliseconds(row.seconds),
            _percent(100 * row.share),
            _number(row.launches, ",g"),
            _number(row.registers, ",d"),
            _number(row.shared, ",d"),
        ]
        for row in profile.kernels[:KERNELS_SHOWN]
    ]
    return Table(caption, heads, rows)


def provider_tables(report: Report, profile: Profile) -> list[tuple[Table, str]]:
    """The tables of one provider, each with the file that has all of it."""
    name, shown = profile.provider, profile.operators[:OPERATORS_SHOWN]
    left_out = len(profile.operators) - len(shown)
    more = f", the {OPERATORS_SHOWN} slowest" if left_out else ""
    found = [
        (row_table(f"{name}: time by region", profile.regions, report.roofs), f"regions_{name}.csv"),
        (row_table(f"{name}: time by operator{more}", shown, report.roofs), f"kernels_{name}.csv"),
    ]
    if profile.kernels:
        found.append((kernel_table(f"{name}: kernels on the device", profile), f"device_kernels_{name}.csv"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The three forms


def notes(report: Report) -> list[str]:
    """What a reader has to know."""
    clock = "their kernels' time on the GPU" if report.facts["device"] == "cuda" else "their own time on the CPU"
    found = [
        "One call is the network, from a normalised picture to low-resolution masks, and the labels: by our kernel"
        " for triton, by full-resolution logits and argmax for all others. Weights are random.",
        f"Operators have {clock}, from {report.profiler}'s profiler; the time of a call is measured without any."
        " Operations are those of matrix products, bytes those of every input and output of an operator.",
        "A region has what is in none of its parts: encoder is the class token and the positions, decoder the class"
        " tokens. Stars stand for the layers' numbers.",
        f"compile is torch.compile({COMPILE_MODE}); no provider runs as a CUDA graph here.",
    ]
    if not profile_plots.available():
        found.append("There are no pictures, because matplotlib is not installed.")
    if report.facts["device"] != "cuda":
        found.append("Measured on a CPU: nothing of this says how a GPU does.")
    return [*found, *(f"{p.provider}: {note}" for p in report.profiles for note in p.notes)]


def short(report: Report) -> str:
    """What is printed at the end."""
    parts = [_plain(overview(report))]
    parts += [_plain(t) for t in scaling_tables(report) if t.rows]
    return "\n\n".join(parts)


def _plain(t: Table) -> str:
    lines = [[head.text for head in t.heads], *([str(cell.text) for cell in row] for row in t.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
               for line in lines]  # fmt: skip
    return "\n".join([t.caption, *(line.rstrip() for line in aligned)])


def markdown(report: Report) -> str:
    """summary.md."""
    roofs = report.roofs
    parts = [
        f"# Profile: {report.title}",
        f"`{report.facts['command']}`; torch {report.facts['torch']}, triton {report.facts['triton']}, commit"
        f" {report.facts['commit']}.",
        f"Measured ceilings: {roofs.flops_per_second / 1e12:.3g} TFLOP/s of {roofs.dtype} matrix products,"
        f" {roofs.bytes_per_second / 1e9:.3g} GB/s of copies.",
        "\n".join(f"- {note}" for note in notes(report)),
        _markdown_table(overview(report)),
        *(_markdown_table(t) for t in scaling_tables(report) if t.rows),
    ]
    for p in report.profiles:
        if p.reason:
            parts.append(f"## {p.provider}\n\n{p.reason}")
            continue
        parts.append(f"## {p.provider}")
        parts += [f"{_markdown_table(t)}\n\nAll of it: {file}" for t, file in provider_tables(report, p)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(t: Table) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("*", "\\*") for c in cells) + " |"

    heads = line(head.text for head in t.heads)
    return "\n".join(
        [f"**{t.caption}**", "", heads, "|---" + "|---:" * (len(t.heads) - 1) + "|"]
        + [line(cell.text for cell in row) for row in t.rows]
    )


def html_page(report: Report, pictures: dict[str, bytes]) -> str:
    """report.html: everything in one file, the pictures as data."""
    f, roofs = report.facts, report.roofs
    known = [
        ("Machine", report.where),
        ("Software", f"torch {f['torch']}, triton {f['triton']}, commit {f['commit']}"),
        ("Command", f["command"]),
        ("Matrix product, measured", f"{roofs.flops_per_second / 1e12:.3g} TFLOP/s ({roofs.dtype})"),
        ("Copy, measured", f"{roofs.bytes_per_second / 1e9:.3g} GB/s"),
        ("Profiler", report.profiler),
    ]
    known += [(name, f[name]) for name in ("driver_version", "clocks.max.sm", "power.limit", "cuda") if name in f]
    body = [facts(known), tag("ul", [tag("li", note) for note in notes(report)])]
    contents: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    if report.profiles:
        body.append(section("providers", "Providers", _html_table(overview(report))))
        contents[0].append(("providers", "Providers"))
    for name, caption in PICTURES.items():
        inside = [_picture(pictures[name], caption)] if name in pictures else []
        if name == "scaling" and report.points:
            inside += [tag("div", tag("h3", t.caption), _html_table(t)) for t in scaling_tables(report)]
        if not inside:
            continue
        body.append(section(name, name.capitalize(), *inside))
        contents[0].append((name, name.capitalize()))
    for p in report.profiles:
        inside = [tag("p", p.reason)] if p.reason else []
        for t, file in [] if p.reason else provider_tables(report, p):
            inside += [tag("h3", t.caption), _html_table(t), tag("p", "All of it: ", file)]
        body.append(section(f"p-{p.provider}", p.provider, *inside))
        contents[1].append((f"p-{p.provider}", p.provider))
    return page(f"Profile: {report.title}", contents, body)


def _picture(data: bytes, caption: str) -> Html:
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    image = tag("img", src=source, alt=caption, style="width:100%;min-width:620px;max-width:1040px;display:block")
    frame = tag("div", Html(str(image).replace("</img>", "")), style="overflow-x:auto;border-radius:6px", tabindex="0")
    return tag("figure", frame, tag("figcaption", caption))


def _html_table(t: Table) -> Html:
    lines = [Line([_breakable(cell) if i == 0 else cell for i, cell in enumerate(row)]) for row in t.rows]
    return table(t.heads, lines, t.caption)


def _breakable(cell: Cell) -> Cell:
    """A first cell, which is narrow on a phone, with places to break it."""
    text = str(cell.text)
    for mark in (".", "+", "::", "_"):
        text = text.replace(mark, mark + "\u200b")
    return cell if text == cell.text else Cell(text, cell.sort, cell.class_, cell.title)
