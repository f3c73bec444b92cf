"""The parts of the report about one result file: header, where ours stands, operations, what is missing.

Whatever a file does not have is said to be missing; nothing raises because of it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import report_rows as rr
from bench import report_svg as svg
from bench.report_html import Cell, Head, Html, Line, facts, figures, section, table, tag
from bench.report_rows import NO_VALUE, Results, Row

SHOWN = 12  # shapes whose bars are drawn without being asked for

TITLES = {
    "attention": ("Attention, one encoder layer", "Packed qkv to output: softmax(q k^T / 8) v, heads of 64."),
    "attention-backward": ("Attention with its gradient", "Forward and backward in one call, as training does."),
    "layernorm-mlp": ("LayerNorm and MLP, one encoder layer", "x + fc2(gelu(fc1(layer_norm(x))))."),
    "mask-head": ("Mask head", "Decoded patch and class tokens to class masks."),
    "masks-to-labels": ("Masks to labels", "Low-resolution masks of regions, as after training, to a label a pixel."),
    "noise-to-labels": ("Noise to labels", "The same of noise, where nearly every class could win: the worst case."),
    "loss": ("Loss", "Upsampling, cross-entropy, and the gradient of the low-resolution masks."),
    "train-step": ("Training step", "Forward, loss, backward, SGD with momentum; a whole batch, by the wall clock."),
}


# ---------------------------------------------------------------------------------------------------------------------
# Header


def state_badge(result: Results) -> Html:
    """Whether the run was completed."""
    complete = result.content.get("complete")
    said = {True: "complete", False: "cut short"}.get(complete, "not recorded whether complete")
    return tag("span", said, class_="badge" if complete is True else "badge bad")


def header(result: Results, link: str | None, gpu_known: bool) -> list[Any]:
    """Machine, stack, command, ceilings.

    Args:
        link: where the result file is. gpu_known: the page has a file of a GPU.
    """
    m, ceilings = result.machine, result.ceilings
    rates = [
        (
            rr.number(ceilings.get("flops_per_second")),
            "TFLOP/s of matrix products",
            rr.number(ceilings.get("flops_spread")),
        ),
        (rr.number(ceilings.get("bytes_per_second")), "of copies", rr.number(ceilings.get("bytes_spread"))),
    ]
    said = []
    for (rate, what, noise), scale in zip(rates, (1e12, 1e9), strict=True):
        if rate:
            unit = "" if scale == 1e12 else "GB/s "
            around = f" (±{100 * noise:.1f} %)" if noise is not None else ""
            said.append(f"{rr.significant(rate / scale)} {unit}{what}{around}")
    gpu = [f"{key} {m[key]}" for key in ("capability", "multiprocessors", "driver_version") if m.get(key)]
    gpu += [
        f"{text} {m[key]}"
        for key, text in (
            ("power.limit", "power limit"),
            ("clocks.max.sm", "at most"),
            ("clocks.max.mem", "memory at most"),
        )
        if m.get(key)
    ]
    pairs = [
        ("Machine", result.device),
        ("GPU" if result.on_gpu else "Processor", ", ".join(gpu) if result.on_gpu else _processor(m)),
        ("Memory", rr.memory(rr.number(m.get("memory_bytes")))),
        ("Host", _processor(m) if result.on_gpu else NO_VALUE),
        (
            "Stack",
            ", ".join(f"{k} {m[k]}" for k in ("torch", "triton", "numpy", "python", "cuda", "cudnn") if m.get(k)),
        ),
        ("Commit", m.get("commit")),
        ("Date", result.content.get("datetime")),
        ("Command", m.get("command") and tag("code", m["command"])),
        ("float32 products", m.get("float32_matmul_precision")),
        (f"Ceilings, measured in {ceilings.get('dtype', 'the same run')}", "; ".join(said) or "not measured"),
        ("While measuring", _states(result.rows)),
        ("File", tag("a", result.path.name, href=link) if link else result.path.name),
    ]
    parts: list[Any] = [
        tag("p", tag("span", result.device if result.on_gpu else "CPU", class_="badge"), state_badge(result)),
        facts((name, value) for name, value in pairs if value and value != NO_VALUE),
    ]
    if not result.on_gpu:
        more = "" if gpu_known else " GPU figures are not measured yet, and none is claimed."
        parts.append(tag("p", f"Measured on a CPU: this file says nothing about GPUs.{more}", class_="note"))
    if result.left_out:
        parts.append(tag("p", f"{rr.counted(result.left_out, 'row')} without a usable time left out.", class_="note"))
    return [*parts, _steps(result)]


def _processor(machine: dict[str, Any]) -> str:
    parts = [rr.cpu_name(machine)]
    parts += [f"{machine[key]} {key}" for key in ("cores", "threads") if machine.get(key)]
    return ", ".join([*parts, *([str(machine["cpu_capability"])] if machine.get("cpu_capability") else [])])


CLOCK_REASONS = {  # bits of nvidia-smi's clocks_event_reasons.active
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}


def _states(rows: Iterable[Row]) -> str:
    """Range of what `state` holds over all rows: clocks, power, load; and how often what held the clocks back."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        state = row.info.get("state")
        for key, value in (state if isinstance(state, dict) else {}).items():
            seen.setdefault(str(key), []).append(str(value))
    said = []
    for key, values in seen.items():
        masks = [int(value, 16) for value in values if re.fullmatch(r"0x[0-9a-fA-F]+", value)]
        numbers = [n for n in (_leading(value) for value in values) if n is not None]
        if masks:
            held = {text: sum(bool(mask & bit) for mask in masks) for bit, text in CLOCK_REASONS.items()}
            counts = [f"{text} in {count} of {len(masks)} rows" for text, count in held.items() if count]
            said.append(f"clocks held by: {', '.join(counts) or 'nothing'}")
        elif len(numbers) == len(values):
            unit = values[0].partition(" ")[2]
            ends = dict.fromkeys((f"{min(numbers):g}", f"{max(numbers):g}"))
            said.append(f"{key} {' to '.join(ends)} {unit}".strip())
        else:
            said.append(f"{key} {', '.join(sorted(set(values)))}")
    return "; ".join(said)


def _leading(value: str) -> float | None:
    try:
        return float(value.split(" ")[0])
    except ValueError:
        return None


def _steps(result: Results) -> Html | None:
    steps = [step for step in result.content.get("steps") or [] if isinstance(step, dict)]
    if not steps:
        return None
    lines = [
        Line(
            [
                Cell(step.get("name", NO_VALUE)),
                Cell(step.get("state", NO_VALUE), class_="text"),
                Cell(rr.duration(seconds := rr.number(step.get("seconds"))), seconds),
            ],
            None if step.get("state") == "done" else "gone",
        )
        for step in steps
    ]
    done = sum(step.get("state") == "done" for step in steps)
    inner = table([Head("step"), Head("state"), Head("time")], lines, "Steps of the run")
    return tag("details", tag("summary", f"{done} of {len(steps)} steps done"), inner)


# ---------------------------------------------------------------------------------------------------------------------
# Cells that several tables have


def ratio_cell(base: Row | None, row: Row) -> Cell:
    """Speed against another row. Slower than it, beyond the spread, is said in words if the row is ours."""
    ratio = rr.speed(base, row)
    if base is None or ratio is None:
        return Cell(NO_VALUE)
    found = rr.verdict(base, row)
    star = "" if base.timing == row.timing else "*"
    title = f"against {base.provider}: {found}" + (f"; timed by {row.timing}, not {base.timing}" if star else "")
    text = rr.times(ratio) + star
    if base is row:
        return Cell(text, ratio, "soft", "this row itself")
    if row.ours and found == rr.SLOWER:
        return Cell(f"{text} slower", ratio, "slow", title)
    return Cell(text, ratio, "best" if found == rr.FASTER and row.ours else None, title)


def spread_cell(row: Row) -> Cell:
    quartiles = f"quartiles {rr.duration(row.q1)} to {rr.duration(row.q3)}, {rr.significant(row.rounds)} rounds"
    return Cell(rr.spread(row), row.iqr, title=quartiles)


def floor_cell(row: Row) -> Cell:
    value = row.get("percent_of_floor")
    if value is not None and value > 105:
        return Cell(f"{rr.percent(value)} ?", value, "slow", "above the ceiling: the formula or the ceiling is off")
    return Cell(rr.percent(value), value)


def cell(form: Callable[[float | None], str], value: float | None) -> Cell:
    return Cell(form(value), value)


OP_HEADS = (
    Head("model and picture", "the shape is that of this model's layer"),
    Head("tokens", "of one picture in the encoder"),
    Head("provider"),
    Head("median", "time of a call, a whole batch"),
    Head("spread", "half the interquartile range, relative to the median"),
    Head("images/s"),
    Head("vs eager", "how many times faster than eager"),
    Head("vs best sdpa", "how many times faster than the fastest backend of scaled_dot_product_attention"),
    Head("TFLOP/s", "of matrix products"),
    Head("of ceiling", "of the measured rate of matrix products"),
    Head("GB/s", "of the fewest bytes that have to move"),
    Head("of ceiling", "of the measured rate of copies"),
    Head("of floor", "100 % is the time that no implementation can beat on this machine"),
    Head("peak memory", "what one call needs beyond what was there"),
    Head("labels as fp32", "share of pixels labelled as the published way labels them in float32"),
    Head("compile", "time of compiling, not in the median"),
    Head("type"),
    Head("timed by", "graph: events around a CUDA graph; events: around plain calls; wall: the wall clock"),
    Head("check before timing"),
)


def measured_table(rows: Sequence[Row], caption: str) -> Html:
    """The table of any kind of row: every shape by every provider."""
    lines, before = [], None
    for group in rr.grouped(rows).values():
        for row in group.by_provider.values():
            best = "best" if row is group.best else None
            classes = [row.ours and "ours", before is not None and row.group != before and "next"]
            before = row.group
            cells = [
                Cell(row.label),
                cell(lambda v: NO_VALUE if v is None else f"{v:,.0f}", row.tokens),
                Cell(row.provider, class_="who"),
                Cell(rr.duration(row.median), row.median, best),
                spread_cell(row),
                cell(rr.significant, row.get("images_per_second")),
                ratio_cell(group.eager, row),
                ratio_cell(group.sdpa, row),
                cell(rr.significant, row.get("tflops")),
                cell(rr.percent, row.get("percent_flops")),
                cell(rr.significant, row.get("gbps")),
                cell(rr.percent, row.get("percent_bytes")),
                floor_cell(row),
                cell(rr.memory, row.get("peak_bytes")),
                cell(rr.share, row.get("agreement")),
                cell(rr.duration, row.get("compile_seconds")),
                Cell(row.dtype),
                Cell(row.timing),
                Cell(row.info.get("gate") or NO_VALUE, class_="check soft"),
            ]
            lines.append(Line(cells, " ".join(filter(None, classes)) or None))
    return table(OP_HEADS, lines, caption)


def legend(names: Iterable[str], *more: str) -> Html:
    """Which line is which provider; `more` are explanations without a picture."""
    keys = [tag("span", Html(svg.key(name)), name) for name in dict.fromkeys(names)]
    return tag("div", keys, [tag("span", text) for text in more], class_="legend")


# ---------------------------------------------------------------------------------------------------------------------
# Where ours stands


def summary(result: Results, prefix: str) -> Html | None:
    """For each kind: our rows against eager, the best sdpa and the fastest other provider; the slower ones listed."""
    lines, slower = [], []
    for kind in ("model", *rr.OPERATIONS, "long"):
        groups = rr.grouped(result.of(kind)).values()
        for provider in rr.OURS:
            ours = [(group, group.by_provider[provider]) for group in groups if provider in group.by_provider]
            if not ours:
                continue
            against = [(group.other, row) for group, row in ours if group.other is not None]
            found = [_judged(*pair) for pair in against]
            slower += [pair for pair, said in zip(against, found, strict=True) if said == rr.SLOWER]
            spans = [
                rr.span([r for group, row in ours if (r := rr.speed(pick(group), row)) is not None])
                for pick in (lambda g: g.eager, lambda g: g.sdpa, lambda g: g.other)
            ]
            counts = [found.count(said) for said in (rr.FASTER, rr.SAME, rr.SLOWER)]
            cells = [Cell(kind), Cell(provider, class_="who"), Cell(len(ours), len(ours)), *map(Cell, spans)]
            cells += [Cell(n, n, "slow" if i == 2 and n else None) for i, n in enumerate(counts)]
            lines.append(Line([*cells, Cell(len(found) - sum(counts) or NO_VALUE)]))
    if not lines:
        return None
    texts = (
        "what",
        "ours",
        "shapes",
        "vs eager",
        "vs best sdpa",
        "vs fastest other",
        "faster",
        "no difference",
        "slower",
    )
    heads = [*map(Head, texts), Head("undecided", "faster but timed in another way, or of unknown spread")]
    text = (
        "Times faster, median over shapes and range. The counts are against the fastest other provider of each shape."
    )
    title = "Where our code stands"
    return section(f"{prefix}summary", title, tag("p", text), table(heads, lines, title), _slower(slower))


def _judged(base: Row, row: Row) -> str:
    """The verdict, but nothing counts as faster because the other was timed with its launches."""
    found = rr.verdict(base, row)
    return rr.UNKNOWN if found == rr.FASTER and base.timing != row.timing else found


def _slower(pairs: Sequence[tuple[Row, Row]]) -> Html:
    """(fastest other, ours) where ours is slower."""
    if not pairs:
        return tag("p", "None of our rows is slower than the fastest other provider, beyond the spread.")
    items = [
        tag(
            "li",
            f"{row.kind}, {row.label}: {row.provider} ",
            tag("span", rr.times(rr.speed(base, row)), class_="slow"),
            f" of {base.provider}'s speed ({rr.duration(row.median)} against {rr.duration(base.median)})",
        )
        for base, row in sorted(pairs, key=lambda pair: rr.speed(*pair) or 0)
    ]
    title = tag(
        "span", f"Slower than the fastest other provider: {rr.counted(len(pairs), 'row')}, slowest first", class_="slow"
    )
    return tag("details", tag("summary", title), tag("ul", items), open="" if len(pairs) <= SHOWN else None)


# ---------------------------------------------------------------------------------------------------------------------
# Operations


def _plot_of(kind: str) -> tuple[Callable[[Row], str], Callable[[Row], float | None], str]:
    """(panel of a row, its x, name of x): models of one width share a panel, but the tail of inference has no width."""
    if kind in ("masks-to-labels", "noise-to-labels", "loss"):
        return (
            (lambda r: f"Patches of {r.shape.get('patch', '?')}"),
            (lambda r: rr.number(r.shape.get("size"))),
            "pixels a side",
        )
    return (lambda r: f"Seg-{r.shape.get('model', '?')}"), (lambda r: r.tokens), "tokens"


def _panel_order(item: tuple[str, Any]) -> tuple[int, str]:
    """By width of the model or size of the patches."""
    last = re.split(r"[ -]", item[0])[-1]
    return (int(last) if last.isdigit() else "TSBL".find(last), item[0])


def panels(rows: Sequence[Row], kind: str, relative: bool = False) -> list[str]:
    """Time of one picture by its size, a plot for each width of model; full marks are the largest batch of each x.

    Args:
        relative: how many times the floor instead of the time.
    """
    panel_of, x_of, x_name = _plot_of(kind)
    found: dict[str, list[tuple[float, float, Row]]] = {}
    for row in rows:
        x, batch = x_of(row), rr.number(row.shape.get("batch")) or 1
        if x and row.shape:
            found.setdefault(panel_of(row), []).append((x, batch, row))
    plots = []
    for name, points in sorted(found.items(), key=_panel_order):
        largest: dict[float, float] = {}
        for x, batch, _ in points:
            largest[x] = max(batch, largest.get(x, 0))
        series: dict[str, svg.Series] = {}
        floor: dict[float, float] = {}
        for x, batch, row in points:
            unit = row.get("floor_seconds") if relative else batch
            if not unit:
                continue
            one = series.setdefault(row.provider, svg.Series(row.provider))
            (one.points if batch == largest[x] else one.loose).append((x, row.median / unit))
            if row.get("floor_seconds") and batch == largest[x]:
                floor[x] = row.get("floor_seconds") / unit
        form = rr.times if relative else rr.duration
        plots += [svg.panel(name, list(series.values()), x_name, form, sorted(floor.items()))] if series else []
    return plots


def operation(result: Results, kind: str, prefix: str) -> Html | None:
    """Plots and table of one kind of operation."""
    rows = result.of(kind)
    title, text = TITLES.get(kind, (kind, ""))
    if not rows and not result.missing(kind):
        return None
    if not rows:
        return section(f"{prefix}{kind}", title, tag("p", "Nothing measured; reasons below."), level=3)
    plots, relative = panels(rows, kind), panels(rows, kind, relative=True)
    marks = "Full marks: the largest batch; hollow: smaller batches. Dotted: the floor."
    parts = [
        tag("p", text),
        legend([row.provider for row in rows], "┄ floor") if plots else None,
        figures(plots, f"Time of one picture. {marks}"),
        tag("details", tag("summary", "The same in times of the floor"), figures(relative)) if relative else None,
        measured_table(rows, title),
    ]
    return section(f"{prefix}{kind}", title, *parts, level=3)


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


def unavailable(result: Results, prefix: str) -> Html:
    """Everything that could not be measured, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for entry in result.unavailable:
        key = (str(entry["kind"]), str(entry["provider"]), str(entry["reason"]))
        reasons.setdefault(key, []).append(rr.shape_label(entry.get("shape"), {}) or str(entry["name"]))
    if not reasons:
        return section(
            f"{prefix}missing", "Not measured", tag("p", "The file lists nothing that could not be measured.")
        )
    lines = []
    for (kind, provider, reason), names in reasons.items():
        shown = (
            names[0] if len(names) == 1 else tag("details", tag("summary", f"{len(names)} shapes"), "; ".join(names))
        )
        lines.append(
            Line([Cell(kind), Cell(provider, class_="who"), Cell(reason, class_="text"), Cell(shown, class_="text")])
        )
    heads = [Head("what"), Head("provider"), Head("reason"), Head("where")]
    text = f"{rr.counted(len(result.unavailable), 'row')} could not be measured, for these reasons."
    return section(f"{prefix}missing", "Not measured", tag("p", text), table(heads, lines, "Not measured"))
