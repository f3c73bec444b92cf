"""The parts of the page: two files compared, then each file's parts, then how everything was measured.

Whatever a file does not have is said to be missing; nothing raises because of it.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from bench import report_plots as plots
from bench import report_rows as rr
from bench import report_tables as tables
from bench.report_page import NO_VALUE, Cell, Column, Line, Section, Table, html, page
from bench.report_rows import Comparison, Group, Results, Row

SHOWN = 12  # shapes whose bars are drawn without being asked for
OPERATIONS = {
    "attention": ("Attention, one encoder layer", "Packed qkv to output: softmax(q k^T / 8) v, heads of 64."),
    "attention-backward": ("Attention with its gradient", "Forward and backward in one call, as training does."),
    "layernorm-mlp": ("LayerNorm and MLP, one encoder layer", "x + fc2(gelu(fc1(layer_norm(x))))."),
    "mask-head": ("Mask head", "Decoded patch and class tokens to class masks."),
    "masks-to-labels": ("Masks to labels", "Low-resolution masks of regions, as after training, to a label a pixel."),
    "noise-to-labels": ("Noise to labels", "The same of noise, where nearly every class could win: the worst case."),
    "loss": ("Loss", "Upsampling, cross-entropy, and the gradient of the low-resolution masks."),
    "train-step": ("Training step", "Forward, loss, backward, SGD with momentum; a whole batch, by the wall clock."),
}


def report(results: Sequence[Results], links: Sequence[str | None]) -> str:
    """The document. Every file after the first is compared with the first.

    Args:
        links: where each result file is, as seen from the page; None for no link.
    """
    several, gpu_known = len(results) > 1, any(result.on_gpu for result in results)
    parts = [
        (
            f"comparison-{i}",
            f"Comparison{f' {i}' if len(results) > 2 else ''}",
            comparison(Comparison(results[0], other)),
            0,
        )
        for i, other in enumerate(results[1:], 1)
    ]
    for i, (result, link) in enumerate(zip(results, links, strict=True)):
        prefix, title = (f"f{i}-", f"{result.path.name}: machine and run") if several else ("", "Machine and run")
        parts += [(prefix + "run", title, header(result, link, gpu_known), i + 1)]
        parts += [(prefix + id_, title, blocks, i + 1) for id_, title, blocks in file_parts(result, prefix) if blocks]
    parts.append(("method", "How measured", METHOD, len(results) + 1))
    sections = [Section(id_, title, blocks, title.partition(":")[0], group) for id_, title, blocks, group in parts]
    names = " and ".join(dict.fromkeys(result.device for result in results))
    return page(f"segmenter: benchmark on {names}", sections)


def file_parts(result: Results, prefix: str) -> Iterable[tuple[str, str, list[Any]]]:
    """(anchor, title, blocks) of the parts of one file; no blocks, no part. `prefix`: of its anchors."""
    yield "summary", "Where our code stands", summary(result)
    yield "waterfall", "Waterfall: what each technique brings", waterfall(result)
    yield "model", "Whole models: images to labels", models(result)
    known = ("model", "peers", "waterfall", "long")
    kinds = dict.fromkeys((*OPERATIONS, *(row.kind for row in result.rows if row.kind not in known)))
    parts = [part for kind in kinds for part in operation(result, kind, prefix)]
    yield "operations", "Single operations", parts or ["This file has no single operations."]
    peers = tables.peers(result)
    yield "peers", "Peers", [PEERS, peers] if peers.lines else ["This file has no peers."]
    yield "long", "Long sequences", long_sequences(result)
    yield "missing", "Not measured", unavailable(result)


def comparison(found: Comparison) -> list[Any]:
    """Two files side by side."""
    only = (("A", found.only_before), ("B", found.only_after))
    return [
        f"{found.before.path.name} (A) and {found.after.path.name} (B)",
        *(html.paragraph(note, "note") for note in found.notes()),
        rr.RULE,
        html.items(found.facts()),
        tables.pairs(found) if found.pairs else None,
        *(
            html.fold(f"{rr.counted(len(rows), 'row')} only in {x}", [html.items(", ".join(row.key) for row in rows)])
            for x, rows in only
            if rows
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Header

# Bits of nvidia-smi's clocks_event_reasons.active.
CLOCK_REASONS = (
    *("idle", "application clocks", "software power cap", "hardware slowdown", "sync boost"),
    *("software thermal slowdown", "hardware thermal slowdown", "power brake", "display clocks"),
)

GPU_FACTS = ("capability", "multiprocessors", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def header(result: Results, link: str | None, gpu_known: bool) -> list[Any]:
    """Machine, stack, command, ceilings. `gpu_known`: the page has a file of a GPU."""
    m, complete = result.machine, result.content.get("complete")
    processor = [rr.cpu_name(m), *(f"{m[key]} {key}" for key in ("cores", "threads") if m.get(key))]
    products = _ceiling(result, "flops", 1e12, "TFLOP/s of matrix products")
    copies = _ceiling(result, "bytes", 1e9, "GB/s of copies")
    measured_in = result.ceilings.get("dtype", "the same run")
    facts = {
        "Machine": result.device,
        "GPU": rr.said(m, *GPU_FACTS) if result.on_gpu else None,
        "Host" if result.on_gpu else "Processor": ", ".join([*processor, *filter(None, [m.get("cpu_capability")])]),
        "Memory": rr.memory(rr.number(m.get("memory_bytes"))),
        "Stack": rr.said(m, "torch", "triton", "numpy", "python", "cuda", "cudnn"),
        "Commit": m.get("commit"),
        "Date": result.content.get("datetime"),
        "Command": m.get("command"),
        "float32 products": m.get("float32_matmul_precision"),
        f"Ceilings, measured in {measured_in}": "; ".join(filter(None, [products, copies])) or "not measured",
        "While measuring": _states(result.rows),
        "File": html.link(result.path.name, link) if link else result.path.name,
    }
    state = {True: "complete", False: "cut short"}.get(complete, "not recorded whether complete")
    badges = [html.span(result.device if result.on_gpu else "CPU", "badge")]
    badges.append(html.span(state, "badge" if complete is True else "badge bad"))
    unknown = "" if gpu_known else " GPU figures are not measured yet, and none is claimed."
    notes = [] if result.on_gpu else [f"Measured on a CPU: this file says nothing about GPUs.{unknown}"]
    notes += [f"{rr.counted(result.left_out, 'row')} without a usable time left out."] if result.left_out else []
    steps = rr.dictionaries(result.content.get("steps"))
    said = [f"{s.get('name')}: {s.get('state')}, {rr.duration(rr.number(s.get('seconds')))}" for s in steps]
    done = sum(step.get("state") == "done" for step in steps)
    return [
        html.paragraph(Markup(" ").join(badges)),
        html.facts([(name, value) for name, value in facts.items() if value and value != NO_VALUE]),
        *(html.paragraph(note, "note") for note in notes),
        html.fold(f"{done} of {len(steps)} steps done", [html.items(said)]) if steps else None,
    ]


def _ceiling(result: Results, name: str, unit: float, what: str) -> str:
    rate, noise = (rr.number(result.ceilings.get(f"{name}_{end}")) for end in ("per_second", "spread"))
    around = "" if noise is None else f" (±{100 * noise:.1f} %)"
    return f"{rr.significant(rate / unit)} {what}{around}" if rate else ""


def _states(rows: Iterable[Row]) -> str:
    """Range of what `state` holds over all rows: clocks, power, load; and how often what held the clocks back."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for key, value in rr.dictionary(row.info.get("state")).items():
            seen.setdefault(str(key), []).append(str(value))
    said = []
    for key, values in seen.items():
        masks = [int(value, 16) for value in values if re.fullmatch(r"0x[0-9a-fA-F]+", value)]
        numbers = [float(found[1]) for value in values if (found := re.match(r"(-?\d+\.?\d*)( |$)", value))]
        if masks:
            held = [(text, sum(mask >> bit & 1 for mask in masks)) for bit, text in enumerate(CLOCK_REASONS)]
            counts = [f"{text} in {count} of {len(masks)} rows" for text, count in held if count]
            said.append(f"clocks held by: {', '.join(counts) or 'nothing'}")
        elif len(numbers) == len(values):
            ends = dict.fromkeys((f"{min(numbers):g}", f"{max(numbers):g}"))
            said.append(f"{key} {' to '.join(ends)} {values[0].partition(' ')[2]}".strip())
        else:
            said.append(f"{key} {', '.join(sorted(set(values)))}")
    return "; ".join(said)


STANDINGS = (
    *map(Column, ("what", "ours", "shapes", "vs eager", "vs best sdpa", "vs fastest other")),
    *map(Column, ("faster", rr.SAME, "slower")),
    Column("undecided", "faster but timed in another way, or of unknown spread"),
)


def summary(result: Results) -> list[Any]:
    """For each kind: our rows against eager, the best sdpa and the fastest other provider; the slower ones listed."""
    lines, slower = [], []
    for kind, name in itertools.product(("model", *OPERATIONS, "long"), rr.OURS):
        ours = [row for group in rr.grouped(result.of(kind)) if (row := group.by_provider.get(name))]
        verdicts = [_judged(row) for row in ours if row.group.other]
        slower += [row for row in ours if row.group.other and _judged(row) == rr.SLOWER]
        speeds = [[rr.speed(getattr(row.group, base), row) for row in ours] for base in ("eager", "sdpa", "other")]
        counts = [verdicts.count(said) for said in (rr.FASTER, rr.SAME, rr.SLOWER, rr.UNKNOWN)]
        cells = [Cell(n, n, "slow" if i == 2 and n else "") for i, n in enumerate(counts)]
        if ours:
            spans = [Cell(rr.span([speed for speed in found if speed])) for found in speeds]
            lines.append(Line([Cell(kind), Cell(name, look="who"), Cell(len(ours)), *spans, *cells]))
    said = "Times faster: median over shapes, and range. Counts are against the fastest other provider of each shape."
    return [said, Table("Where our code stands", STANDINGS, lines), _slower(slower)] if lines else []


def _judged(row: Row) -> str:
    """Against the fastest other; but nothing counts as faster because the other was timed with its launches."""
    found = rr.verdict(row.group.other, row)
    return rr.UNKNOWN if found == rr.FASTER and row.group.other.timing != row.timing else found


def _slower(rows: Sequence[Row]) -> Any:
    """Those of ours that are slower than the fastest other."""
    if not rows:
        return "None of our rows is slower than the fastest other provider, beyond the spread."
    items = []
    for row in sorted(rows, key=lambda row: rr.speed(row.group.other, row)):
        other, speed = row.group.other, html.span(rr.times(rr.speed(row.group.other, row)), "slow")
        seconds = f"{rr.duration(row.median)} against {rr.duration(other.median)}"
        said = Markup("{}, {}: {} {} of {}'s speed ({})")
        items.append(said.format(row.kind, row.label, row.provider, speed, other.provider, seconds))
    title = f"Slower than the fastest other provider: {rr.counted(len(rows), 'row')}, slowest first"
    return html.fold(html.span(title, "slow"), [html.items(items)], open=len(rows) <= SHOWN)


# ---------------------------------------------------------------------------------------------------------------------
# Waterfall and whole models


def waterfall_svg(title: str, steps: Sequence[Row]) -> str:
    """Bars of images a second, one technique more on each: the first grey, the fastest orange, the others blue."""
    best, items = rr.fastest(row for row in steps if row.median), []
    for row in steps:
        look = "eager" if row is row.first else "triton" if row is best else "sdpa-flash"
        slower, miou = tables.slower_step(row), row.get("miou")
        notes = [rr.times(rr.speed(row.first, row)), tables.PEAK.cell(row).text]
        notes += [f"mIoU {rr.points(miou)}"] * (miou is not None) + ["slower than the step before"] * slower
        notes = [note for note in notes if note != NO_VALUE] if row.median else [tables.not_measured(row)]
        items.append(_bar(row, look, notes, slower))
    return plots.bars(title, items, 8.6, "images/s")


def _bar(row: Row, look: str, notes: Sequence[str], slower: bool = False) -> plots.Bar:
    if not row.median:
        return plots.Bar(row.provider, look, None, note=" · ".join(notes))
    pace = row.get("images_per_second")
    pace = 1 / row.median if pace is None else pace
    return plots.Bar(row.provider, look, pace, rr.significant(pace), " · ".join(notes), slower)


def waterfall(result: Results) -> list[Any]:
    """Figure and table of every waterfall of the file."""
    blocks = ["One technique more on each line; what each costs in accuracy and memory beside it."]
    found = result.waterfalls()
    for title, steps in found.items():
        blocks += [html.plots([waterfall_svg(title, steps)], wide=True), tables.waterfall(title, steps)]
    return blocks if found else ["This file has no waterfall."]


def model_bars(group: Group, missing: Iterable[Row]) -> str:
    """Images a second of one shape, a bar for each provider."""
    items = []
    for row in group.rows:
        bases = [base for base in (group.eager, group.sdpa) if row.ours and base is not None]
        slower = any(rr.verdict(base, row) == rr.SLOWER for base in bases)
        items.append(_bar(row, row.provider, [tables.ratio(base, row).text for base in bases], slower))
    items += [_bar(row, row.provider, [row.reason]) for row in missing]
    return plots.bars(group.name, items, 4.5, "images/s")


def models(result: Results) -> list[Any]:
    """Bars for each shape and the tables of all."""
    rows, missing = result.of("model"), result.missing("model")
    if not rows:
        return ["This file has no whole models."]
    groups = rr.grouped(rows)
    svgs = [model_bars(group, [row for row in missing if row.label == group.rows[0].label]) for group in groups]
    more, rest = f"{rr.counted(len(svgs) - SHOWN, 'more shape')}", svgs[SHOWN:]
    return [
        "uint8 images on the device in, labels out, a whole batch, by the wall clock until the device is done.",
        html.plots(svgs[:SHOWN], "Behind our bars: how many times faster than eager · than the best sdpa backend."),
        html.fold(more, [html.plots(rest)]) if rest else None,
        tables.models(result),
        tables.measured(rows, "Whole models"),
    ]


def panels(rows: Sequence[Row], relative: bool = False) -> list[str]:
    """Time of one image by its size, a plot for each width of model; full marks are the largest batch of each x.

    The tail of inference has no width: by size of the patches. `relative`: how many times the floor, not the time.
    """
    found: dict[str, list[tuple[float, float, Row]]] = {}
    tail = rows[0].kind in ("masks-to-labels", "noise-to-labels", "loss")
    for row in rows:
        name = f"Patches of {row.shape.get('patch', '?')}" if tail else f"Seg-{row.shape.get('model', '?')}"
        x = rr.number(row.shape.get("size")) if tail else row.tokens
        if x and row.shape:
            found.setdefault(name, []).append((x, rr.number(row.shape.get("batch")) or 1, row))
    svgs = []
    for name in sorted(found, key=lambda name: ("TSBL".find(name[-1]), len(name), name)):
        largest = {x: batch for x, batch, _ in sorted(found[name], key=lambda mark: mark[1])}
        points, floor = [], {}
        for x, batch, row in found[name]:
            least, hollow = row.get("floor_seconds"), batch < largest[x]
            unit = least if relative else batch
            if unit:
                points.append(plots.Point(row.provider, x, row.median / unit, hollow))
            if unit and least and not hollow:
                floor[x] = least / unit
        form, x_name = rr.times if relative else rr.duration, "pixels a side" if tail else "tokens"
        svgs.append(plots.lines(name, points, x_name, form, sorted(floor.items())))
    return [svg for svg in svgs if svg]


def operation(result: Results, kind: str, prefix: str) -> list[Section]:
    """Plots and table of one kind of operation; nothing if the file has none."""
    rows = result.of(kind)
    title, text = OPERATIONS.get(kind, (kind, ""))
    blocks: list[Any] = ["Nothing measured; reasons below."]
    if rows:
        svgs, relative = panels(rows), panels(rows, relative=True)
        caption = "Time of one image. Full marks: the largest batch; hollow: smaller batches. Dotted: the floor."
        providers = dict.fromkeys(row.provider for row in rows)
        blocks = [
            text or None,
            html.plots(svgs, caption, providers, ["┄ floor"]) if svgs else None,
            html.fold("The same in times of the floor", [html.plots(relative)]) if relative else None,
            tables.measured(rows, title),
        ]
    return [Section(prefix + kind, title, blocks, level=3)] if rows or result.missing(kind) else []


def long_sequences(result: Results) -> list[Any]:
    """Time and memory by tokens, with what grows with the square of them, and where memory ran out."""
    rows, missing = result.of("long"), result.missing("long")
    if not rows and not missing:
        return []
    svgs = []
    for model in dict.fromkeys(_model(row) for row in rows):
        mine = [row for row in rows if _model(row) == model and row.tokens]
        gone = [row for row in missing if row.reason.startswith("out of memory") and _model(row) in (model, "")]
        failed = [plots.Point(row.provider, x, None, reason=row.reason) for row in gone if (x := _tokens(row))]
        times = [plots.Point(row.provider, row.tokens, row.median) for row in mine]
        peaks = [plots.Point(row.provider, row.tokens, peak) for row in mine if (peak := row.get("peak_bytes"))]
        floor = sorted({(row.tokens, least) for row in mine if (least := row.get("floor_seconds"))})
        svgs.append(plots.lines(f"{model} time of a call", times + failed, "tokens", rr.duration, floor, square=True))
        svgs.append(plots.lines(f"{model} peak memory", peaks + failed, "tokens", rr.memory, square=True))
    svgs = [svg for svg in svgs if svg]
    names = dict.fromkeys(row.provider for row in rows + missing)
    return [
        html.plots(svgs, "", names, ["╌ grows with the square", "┄ floor", "× out of memory"]) if svgs else None,
        tables.measured(rows, "Long sequences"),
    ]


def _model(row: Row) -> str:
    shape = rr.known_shape(row.shape)
    return str(row.info.get("model") or (shape.name if shape else ""))


def _tokens(row: Row) -> float | None:
    """Of a row that says them or has a shape."""
    shape = rr.known_shape(row.shape)
    return float(shape.tokens) if shape else rr.number(row.shape.get("tokens")) or row.tokens


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and how the rest came about


MISSING = (
    Column("what", None, lambda item: Cell(item[0][0])),
    Column("provider", None, lambda item: Cell(item[0][1], look="who")),
    Column("reason", None, lambda item: Cell(item[0][2], look="text")),
    Column("where", None, lambda item: Cell("; ".join(item[1]), look="text")),
)


def unavailable(result: Results) -> list[Any]:
    """Everything that could not be measured, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in result.unavailable:
        where = rr.shape_label(row.shape, {}) or row.name
        reasons.setdefault((row.kind, row.provider, row.reason), []).append(where)
    if not reasons:
        return ["The file lists nothing that could not be measured."]
    said = f"{rr.counted(len(result.unavailable), 'row')} could not be measured, for these reasons."
    return [said, Table.of("Not measured", MISSING, reasons.items())]


PEERS = (
    "“images/s here” is measured: random weights, images on the device to labels; ours as impl=auto runs here. "
    "Columns called published are other people's figures on other machines, not measured here."
)
PROVIDERS = {  # as bench/providers.py and bench/models.py define them
    "eager": "the published code's order of work in plain PyTorch: explicit score matrices, full-resolution logits",
    "sdpa-…": "the same with scaled_dot_product_attention held to one backend; whole models without the softmax",
    "compile": "torch.compile (max-autotune) of the scaled_dot_product_attention form",
    "bands": "labels in bands of rows: the full-resolution logits are never held whole",
    "pruned": "ours without kernels: only classes that can win somewhere are upsampled",
    "triton": "ours: the kernels",
}
METHOD = (
    html.items([Markup("<b>{}</b>: {}").format(name, text) for name, text in PROVIDERS.items()]),
    "Nothing wrong is timed: before a row is timed its result is compared with an exact one, and has to be as near as "
    "eager PyTorch of the same precision is, within a factor of two in the worst element. What that gave stands in the "
    "column “check before timing”.",
    "Times are medians; the spread is half the interquartile range, relative to the median. All providers get the same "
    "inputs. Compiling and warming up are not in them.",
    "On a GPU an operation is timed by events around a CUDA graph (“graph”) that calls it once on each of several "
    "input sets, as many as exceed twice the last cache (at most 16), so that neither launches nor a warm cache are in "
    "the figure; where that cannot be captured, events stand around plain calls (“events”). Whole models, and "
    "everything on a CPU, are timed by the wall clock up to the end of the device's work (“wall”).",
    "Operations (TFLOP/s) count matrix products only, two a multiply-add; bytes (GB/s) are the fewest that have to "
    "move. The ceilings are a large matrix product and a large copy, measured in the same run. The floor is the "
    "larger of both times at those ceilings; “of floor” is floor over median.",
    "Peak memory is what one call needs beyond what was there before it: what torch allocates on a GPU, resident "
    "memory on a CPU.",
    "A speed of ours below 1x is called slower only beyond the spread, by the same rule as in comparisons; * marks a "
    "speed-up between rows that were timed in different ways.",
    rr.RULE,
)
