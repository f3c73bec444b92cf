"""The parts of the page: two files compared, then each file's parts, then how everything was measured.

Whatever a file does not have is said to be missing; nothing raises because of it.
"""

import re
from collections.abc import Sequence
from typing import Any

from bench import report_plots as plots
from bench import report_rows as rr
from bench import report_tables as tables
from bench.report_page import Section, html, page
from bench.report_rows import Comparison, Results, Row

OPERATIONS = {
    "attention": ("Attention, one encoder layer", "Packed qkv to output: softmax(q k^T / 8) v, heads of 64."),
    "attention-backward": ("Attention with its gradient", "Forward and backward in one call, as training does."),
    "layernorm-mlp": ("LayerNorm and MLP, one encoder layer", "x + fc2(gelu(fc1(layer_norm(x))))."),
    "mask-head": ("Mask head", "Decoded patch and class tokens to class masks."),
    "masks-to-labels": ("Masks to labels", "Low-resolution masks of regions, as after training, to a label a pixel."),
    "noise-to-labels": ("Noise to labels", "The same of noise, where nearly every class could win: the worst case."),
    "loss": ("Loss", "Upsampling, cross-entropy, and the gradient of the low-resolution masks."),
    "attention-half-backward": ("Attention half with its gradients", "x + proj(attention(qkv(layer_norm(x))))."),
    "layernorm-mlp-backward": ("LayerNorm and MLP with their gradients", "As above, and all of its seven gradients."),
    "linear-backward": ("fc1 with its gradients", "gelu(x W^T + b), and the gradients of x, W and b."),
    "layernorm-backward": ("LayerNorm with its gradients", "Of x, weight and bias."),
    "mask-head-backward": ("Mask head with its gradients", "Of tokens, projections and the LayerNorm over classes."),
    "pixels-to-tokens-backward": ("Bytes to tokens with gradients", "Of all but the bytes."),
    "layernorm-mlp-scaled": ("LayerNorm and MLP with LayerScale", "x + s fc2(gelu(fc1(layer_norm(x)))), as in DINOv2."),
    "rotate": ("Rotary positions", "Queries and keys of one layer, turned by the angles of their patches."),
    "queries-to-labels": ("Queries to labels", "Masks and classes of 100 queries, as EoMT's, to a label a pixel."),
    "attention-statistics": ("Attention statistics", "Six numbers of every row of the attention matrix."),
    "attention-transposed": ("Sums over queries", "The transposed attention matrix times 16 columns."),
    "attention-rows": ("Attention rows", "Those of 16 queries of each head."),
    "train-step": ("Training step", "Forward, loss, backward, SGD with momentum; a whole batch, by the wall clock."),
}
TAIL = ("masks-to-labels", "noise-to-labels", "loss")  # of inference and training: the model's width is not in them


def report(results: Sequence[Results]) -> str:
    """The document of one file, or of two with their comparison at the top."""
    two = len(results) == 2
    sections = [Section("comparison", "Comparison", comparison(Comparison(*results)), "Comparison")] if two else []
    for group, result in enumerate(results, 1):
        sections += of_file(result, f"f{group}-" if two else "", group)
    sections.append(Section("method", "How measured", METHOD, "How measured", len(results) + 1))
    names = " and ".join(dict.fromkeys(result.device for result in results))
    return page(f"segmenter: benchmark on {names}", sections)


def of_file(result: Results, prefix: str, group: int) -> list[Section]:
    """The parts of one file that it has something for. `prefix`: of their anchors, where the page has two files."""
    peers, missing = tables.peers(result), tables.unavailable(result)
    parts = (
        ("run", f"{result.path.name}: machine and run" if prefix else "Machine and run", header(result)),
        ("slower", "Slower than others", slower(result)),
        ("waterfall", "Waterfall: what each technique brings", waterfall(result)),
        ("model", "Whole models: images to labels", models(result)),
        ("operations", "Single operations", operations(result, prefix) or ["This file has no single operations."]),
        ("peers", "Peers", [peers if peers.lines else "This file has no peers."]),
        ("long", "Long sequences", long_sequences(result)),
        ("missing", "Not measured", [missing if missing.lines else "The file lists nothing that was not measured."]),
    )
    return [Section(prefix + id_, title, found, title.partition(":")[0], group) for id_, title, found in parts if found]


def comparison(found: Comparison) -> list[Any]:
    """Two files side by side."""
    notes = [html.paragraph(note, "note") for note in found.notes()]
    return [*notes, rr.RULE, html.items(found.facts()), tables.pairs(found) if found.pairs else None]


CLOCK_REASONS = {  # bits of nvidia-smi's clocks_event_reasons.active that mean a slower GPU
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def header(result: Results) -> list[Any]:
    """Machine, software, command, ceilings, and what has to be known before a figure is believed."""
    facts = {key: rr.memory(rr.number(v)) if key.endswith("_bytes") else v for key, v in result.facts.items()}
    for name, unit, what in (("flops", 1e12, "TFLOP/s of matrix products"), ("bytes", 1e9, "GB/s of copies")):
        rate, noise = (rr.number(result.ceilings.get(f"{name}_{end}")) for end in ("per_second", "spread"))
        around = "" if noise is None else f" (±{100 * noise:.1f} %)"
        facts[f"ceiling of {name}, measured"] = f"{rr.significant(rate / unit)} {what}{around}" if rate else "none"
    steps = rr.dictionaries(result.content.get("steps"))
    facts["steps"] = ", ".join(f"{step.get('name')}: {step.get('state')}" for step in steps)
    facts |= {"while measuring": states(result.rows), "date": result.content.get("datetime"), "file": result.path.name}
    notes = [] if result.on_gpu else ["Measured on a CPU: this file says nothing about GPUs."]
    notes += ["The run was cut short."] if result.content.get("complete") is False else []
    notes += [f"{rr.counted(result.left_out, 'row')} without a usable time left out."] if result.left_out else []
    shown = html.facts([(name, value) for name, value in facts.items() if value])
    return [shown, *(html.paragraph(note, "note") for note in notes)]


def states(rows: Sequence[Row]) -> str:
    """What held the clocks back in how many rows, and the range of clock, temperature and a CPU's load."""
    seen, said = [rr.dictionary(row.info.get("state")) for row in rows], []
    masks = [str(state.get("clocks_event_reasons.active")) for state in seen]
    masks = [int(mask, 16) for mask in masks if re.fullmatch("0x[0-9a-fA-F]+", mask)]
    for bit, reason in CLOCK_REASONS.items():
        count = sum(mask & bit > 0 for mask in masks)
        said += [f"{reason} in {count} of {len(masks)} rows"] if count else []
    for key in ("clocks.sm", "temperature.gpu", "load_1min"):
        values = [float(found[0]) for state in seen if (found := re.match(r"\d+(\.\d+)?", str(state.get(key))))]
        said += [f"{key} {min(values):g} to {max(values):g}"] if values else []
    return ", ".join(said)


def slower(result: Results) -> list[Any]:
    """What a reader should see first; nothing if the file has no row of ours."""
    table = tables.slower(result)
    none = "None of our rows is slower than the fastest other provider, beyond the spread."
    said = f"Slower than the fastest other provider, beyond the spread: {rr.counted(len(table.lines), 'row')}."
    return [said, table] if table.lines else [none] * any(row.ours for row in result.rows)


def waterfall_svg(title: str, steps: Sequence[Row]) -> str:
    """Bars of images a second, one technique more on each: the first grey, the fastest orange, the others blue."""
    best, items = rr.fastest(row for row in steps if row.median), []
    for row in steps:
        look = "eager" if row is row.first else "triton" if row is best else "sdpa-flash"
        notes, miou = [rr.times(rr.speed(row.first, row))], row.get("miou")
        notes += [] if row.peak is None else [rr.memory(row.peak)]
        notes += [] if miou is None else [f"mIoU {rr.points(miou)}"]
        slower = tables.ratio(row.before, row, always=True).look == "slow"
        items.append(_bar(row, look, [*notes, "slower than the step before"] if slower else notes, slower))
    return plots.bars(title, items, 8.6)


def _bar(row: Row, look: str, notes: Sequence[str], slower: bool) -> plots.Bar:
    if not row.median:
        return plots.Bar(row.provider, look, None, row.reason)
    pace = row.get("images_per_second") or 1 / row.median
    return plots.Bar(row.provider, look, pace, " · ".join([rr.significant(pace), *notes]), slower)


def waterfall(result: Results) -> list[Any]:
    """Figure and table of every waterfall of the file."""
    blocks = ["One technique more on each line; what each costs in accuracy and memory beside it."]
    found = result.waterfalls()
    for title, steps in found.items():
        blocks += [html.plots([waterfall_svg(title, steps)], wide=True), tables.waterfall(title, steps)]
    return blocks if found else ["This file has no waterfall."]


def models(result: Results) -> list[Any]:
    """Bars for each shape and the tables of all."""
    rows, svgs = result.of("model"), []
    for group in rr.grouped(rows):
        items = []
        for row in [*group.rows, *(row for row in result.missing("model") if row.label == group.label)]:
            speeds = [tables.ratio(base, row) for base in (group.eager, group.sdpa) if row.ours and base]
            slower = any(speed.look == "slow" for speed in speeds)
            items.append(_bar(row, row.provider, [speed.text for speed in speeds], slower))
        svgs.append(plots.bars(f"{group.label}, {group.dtype}", items, 4.5))
    found = [
        "uint8 images on the device in, labels out, a whole batch, by the wall clock until the device is done.",
        html.plots(svgs, "Behind our bars: how many times faster than eager · than the best sdpa backend."),
        tables.models(result),
        tables.measured(rows, "Whole models"),
    ]
    return found if rows else ["This file has no whole models."]


def operations(result: Results, prefix: str) -> list[Section]:
    """A part for each kind of operation."""
    others = ("model", "peers", "waterfall", "long")
    caption = "Time of one image. Full marks: the largest batch; hollow: smaller batches."
    found = []
    for kind in dict.fromkeys((*OPERATIONS, *(row.kind for row in result.rows if row.kind not in others))):
        rows, (title, text) = result.of(kind), OPERATIONS.get(kind, (kind, ""))
        blocks = [text, html.plots(curves(rows), caption), tables.measured(rows, title)]
        blocks = blocks if rows else ["Nothing measured; reasons below."]
        found += [Section(prefix + kind, title, blocks, level=3)] if rows or result.missing(kind) else []
    return found


def long_sequences(result: Results) -> list[Any]:
    """Time and memory by tokens, with what grows with the square of them, and where memory ran out."""
    measured = result.of("long")
    rows = measured + [row for row in result.missing("long") if "out of memory" in row.reason]
    svgs = [*curves(rows, square=True), *curves([row for row in rows if not row.median or row.peak], True, square=True)]
    found = [html.plots(svgs, "Time of one image, and peak memory."), tables.measured(measured, "Long sequences")]
    return found if rows else []


def curves(rows: Sequence[Row], peak: bool = False, square: bool = False) -> list[str]:
    """Time of one image by its size, or peak memory, a plot for each width of model.

    Full marks are the largest batch of each size. The tail of inference has no width: by size of the patches. Rows
    without a time ran out of memory.
    """
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.shape and row.kind in TAIL:
            found.setdefault(f"Patches of {row.shape.patch}", []).append((row.shape.size, row))
        elif row.shape:
            found.setdefault(f"Seg-{row.shape.model}", []).append((row.tokens, row))
    svgs = []
    for name, marks in found.items():
        points, floor = [], {}
        largest = {x: row.shape.batch for x, row in sorted(marks, key=lambda mark: mark[1].shape.batch)}
        for x, row in marks:
            batch, least = row.shape.batch, row.get("floor_seconds")
            y = row.median and (row.peak if peak else row.median / batch)
            points.append(plots.Point(row.provider, x, y, hollow=batch < largest[x]))
            if least and batch == largest[x] and not peak:
                floor[x] = least / batch
        x_name, form = "pixels a side" if name.startswith("Patches") else "tokens", rr.memory if peak else rr.duration
        title = f"{name}, peak memory" if peak else name
        svgs.append(plots.lines(title, points, x_name, form, sorted(floor.items()), square))
    return svgs


PROVIDERS = {  # as bench/providers.py and bench/models.py define them
    "eager": "the published code's order of work in plain PyTorch: explicit score matrices, full-resolution logits",
    "sdpa-…": "the same with scaled_dot_product_attention held to one backend; whole models without the softmax",
    "compile": "torch.compile (max-autotune) of the scaled_dot_product_attention form",
    "bands": "labels in bands of rows: the full-resolution logits are never held whole",
    "pruned": "ours without kernels: only classes that can win somewhere are upsampled",
    "triton": "ours: the kernels",
}
METHOD = (
    "Times are medians, of the same inputs for all providers:",
    html.facts(PROVIDERS.items()),
    "What the columns say:",
    html.facts({c.name: c.hint for c in (*tables.PEERS, *tables.STEPS, *tables.MEASURED) if c.hint}.items()),
    f"A speed of ours is called slower by the same rule as in comparisons. {rr.RULE}",
)
