"""The parts of the report with a figure of their own: the waterfall, whole models, long sequences, peers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import report_rows as rr
from bench import report_svg as svg
from bench.report_html import Cell, Head, Html, Line, figures, section, table, tag
from bench.report_rows import NO_VALUE, Group, Results, Row
from bench.report_sections import SHOWN, legend, measured_table, spread_cell

WIDE, NARROW, ASIDE = 840, 350, 250


# ---------------------------------------------------------------------------------------------------------------------
# Waterfall


@dataclass(frozen=True)
class Step:
    """One technique more than the step before. Without a row, `reason` says why."""

    order: float
    name: str
    text: str
    row: Row | None
    reason: str = ""


def waterfalls(result: Results) -> dict[str, list[Step]]:
    """Title (what was timed) -> steps in order. A missing step joins the waterfall of its shape, or else the first."""
    found: dict[str, list[Step]] = {}
    for row in result.of("waterfall"):
        order = row.get("step")
        title = row.label if row.shape or row.info.get("model") else str(row.info.get("speed_model") or "one model")
        steps = found.setdefault(title, [])
        steps.append(Step(len(steps) if order is None else order, row.provider, _step_text(row.info), row))
    for entry in result.missing("waterfall"):
        title = rr.shape_label(entry.get("shape"), {})
        steps = found.setdefault(title if title in found or not found else next(iter(found)), [])
        place = re.fullmatch(r"waterfall-(\d+)", str(entry["name"]))  # as bench_waterfall.py names its rows
        order = float(place[1]) if place else rr.number(entry.get("step"))
        order = max((step.order for step in steps), default=0) + 1 if order is None else order
        steps.append(Step(order, str(entry["provider"]), _step_text(entry), None, str(entry["reason"])))
    return {title: sorted(steps, key=lambda step: step.order) for title, steps in found.items()}


def _step_text(info: dict[str, Any]) -> str:
    return str(info.get("text") or "")


def pace(row: Row | None) -> float | None:
    """Images a second."""
    return None if row is None else row.get("images_per_second")


def waterfall_svg(title: str, steps: Sequence[Step], narrow: bool = False) -> str:
    """Bars of images a second, one technique more on each."""
    aside = 0 if narrow else min(ASIDE, 24 + 7 * max(len(step.name) for step in steps))
    rows = [step.row for step in steps if step.row is not None]
    first, items, before = (rows[0] if rows else None), [], None
    for step in steps:
        if step.row is None:
            items.append(svg.Bar(step.name, step.name, None, note=f"not measured: {step.reason}"))
            continue
        slower = before is not None and rr.verdict(before, step.row) == rr.SLOWER
        note = " · ".join(
            part
            for part in (
                rr.times(rr.speed(first, step.row)),
                rr.memory(step.row.get("peak_bytes")),
                f"mIoU {rr.points(step.row.get('miou'))}" if step.row.get("miou") is not None else "",
                "slower" if slower else "",
            )
            if part not in ("", NO_VALUE)
        )
        value = pace(step.row)
        value = 1 / step.row.median if value is None else value
        items.append(svg.Bar(step.name, _colour(step, rows), value, rr.significant(value), note, slower))
        before = step.row
    return svg.bars(title, items, NARROW if narrow else WIDE, aside, "images/s")


def _colour(step: Step, rows: Sequence[Row]) -> str:
    """First step grey, the fastest orange, the others blue: which technique a step is stands in its name."""
    return "eager" if step.row is rows[0] else "triton" if step.row is rr.fastest(rows) else "sdpa-flash"


def waterfall(result: Results, prefix: str) -> Html:
    """Figure and table of every waterfall of the file."""
    parts: list[Any] = [tag("p", "One technique more on each line; what each costs in accuracy and memory beside it.")]
    found = waterfalls(result)
    if not found:
        parts.append(tag("p", "This file has no waterfall."))
    for title, steps in found.items():
        both = [
            waterfall_svg(title, steps).replace("<svg ", '<svg class="wide" ', 1),
            waterfall_svg(title, steps, narrow=True).replace("<svg ", '<svg class="narrow" ', 1),
        ]
        parts += [tag("figure", tag("div", Html("".join(both)), class_="plot broad")), _waterfall_table(title, steps)]
    return section(f"{prefix}waterfall", "Waterfall: what each technique brings", *parts)


def _waterfall_table(title: str, steps: Sequence[Step]) -> Html:
    first, before, lines = next((step.row for step in steps if step.row), None), None, []
    for i, step in enumerate(steps, 1):
        row = step.row
        if row is None:
            said = ": ".join(filter(None, (step.text, f"not measured: {step.reason}")))
            lines.append(Line([Cell(step.name, i), Cell(said, class_="text"), *[Cell(NO_VALUE)] * 8], "gone"))
            continue
        ratio = None if before is None else rr.speed(before, row)
        slower = before is not None and rr.verdict(before, row) == rr.SLOWER
        cells = [
            Cell(step.name, i),
            Cell(step.text or NO_VALUE, class_="text"),
            Cell(rr.significant(pace(row)), pace(row)),
            Cell(rr.times(rr.speed(first, row)), rr.speed(first, row)),
            Cell(rr.times(ratio) + (" slower" if slower else ""), ratio, "slow" if slower else None),
            spread_cell(row),
            Cell(rr.memory(row.get("peak_bytes")), row.get("peak_bytes")),
            Cell(rr.share(row.get("agreement")), row.get("agreement")),
            Cell(
                rr.points(row.get("miou")),
                row.get("miou"),
                title=f"{rr.significant(row.get('miou_pictures'))} pictures",
            ),
            Cell(f"{row.dtype}, {row.timing}"),
        ]
        lines.append(Line(cells))
        before = row
    heads = [
        Head("step"),
        Head("what changes"),
        Head("images/s"),
        Head("vs first"),
        Head("vs step before"),
        Head("spread", "half the interquartile range, relative to the median"),
        Head("peak memory"),
        Head(
            "labels as fp32",
            "share of the example photographs' pixels that the shipped model labels as in the first step",
        ),
        Head("mIoU", "in percent, of the shipped model on CamVid's test set"),
        Head("type, timed by"),
    ]
    return table(heads, lines, f"Waterfall, {title}")


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def model_bars(key: tuple[str, str, str], group: Group, missing: Iterable[dict[str, Any]]) -> str:
    """Images a second of one shape, a bar for each provider."""
    items = []
    for row in group.by_provider.values():
        notes, bad = [], False
        for base in (group.eager, group.sdpa):
            if row.ours and base is not None:
                slower = rr.verdict(base, row) == rr.SLOWER
                notes.append(f"{rr.times(rr.speed(base, row))}{' slower' if slower else ''}")
                bad = bad or slower
        value = pace(row)
        value = 1 / row.median if value is None else value
        items.append(svg.Bar(row.provider, row.provider, value, rr.significant(value), " · ".join(notes), bad))
    for entry in missing:
        items.append(svg.Bar(str(entry["provider"]), str(entry["provider"]), None, note=str(entry["reason"])))
    return svg.bars(f"{key[1]}, {key[2]}", items, 420, 112, "images/s")


def models(result: Results, prefix: str) -> Html:
    """Bars for each shape and the table of all."""
    rows, title = result.of("model"), "Whole models: pictures to labels"
    if not rows:
        return section(f"{prefix}model", title, tag("p", "This file has no whole models."))
    missing: dict[str, list[dict[str, Any]]] = {}
    for entry in result.missing("model"):
        missing.setdefault(rr.shape_label(entry.get("shape"), {}), []).append(entry)
    plots = [model_bars(key, group, missing.get(key[1], ())) for key, group in rr.grouped(rows).items()]
    more = None
    if len(plots) > SHOWN:
        more = tag("details", tag("summary", f"{rr.counted(len(plots) - SHOWN, 'more shape')}"), figures(plots[SHOWN:]))
    text = "uint8 pictures on the device in, labels out, a whole batch, by the wall clock until the device is done."
    caption = "Behind our bars: how many times faster than eager · than the best sdpa backend."
    return section(
        f"{prefix}model", title, tag("p", text), figures(plots[:SHOWN], caption), more, measured_table(rows, title)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Long sequences


def long_sequences(result: Results, prefix: str) -> Html | None:
    """Time and memory by tokens, with what grows with the square of them, and where memory ran out."""
    rows, missing = result.of("long"), result.missing("long")
    if not rows and not missing:
        return None
    title, plots = "Long sequences", []
    for model in dict.fromkeys(_model(row) for row in rows):
        mine = [row for row in rows if _model(row) == model and row.tokens]
        failed = [entry for entry in missing if _failed_at(entry) and _failed_model(entry) in (model, "")]
        for what, value, form in (
            ("time of a call", lambda r: r.median, rr.duration),
            ("peak memory", lambda r: r.get("peak_bytes"), rr.memory),
        ):
            series = {row.provider: svg.Series(row.provider) for row in mine}
            for row in mine:
                if value(row):
                    series[row.provider].points.append((row.tokens, value(row)))
            for entry in failed:
                name = str(entry["provider"])
                series.setdefault(name, svg.Series(name)).failed.append((_failed_at(entry), str(entry["reason"])))
            points = [point for one in series.values() for point in one.points]
            if points:
                guide = max((p for p in points if p[0] == min(x for x, _ in points)), key=lambda p: p[1])
                name = f"{model}: {what}" if model else what.capitalize()
                floor = sorted({(r.tokens, r.get("floor_seconds")) for r in mine if r.get("floor_seconds")})
                floor = floor if what == "time of a call" else []
                plots.append(
                    svg.panel(name, list(series.values()), "tokens", form, floor, guide, form is rr.memory, height=320)
                )
    names = [row.provider for row in rows] + [str(entry["provider"]) for entry in missing]
    keys = legend(names, "╌ grows with the square", "┄ floor", "× out of memory")
    return section(f"{prefix}long", title, keys, figures(plots), _failures(missing), measured_table(rows, title))


def _model(row: Row) -> str:
    return str(row.info.get("model") or "")


def _failed_model(entry: dict[str, Any]) -> str:
    shape = rr.known_shape(entry.get("shape"))
    return shape.name if shape else ""


def _failed_at(entry: dict[str, Any]) -> float | None:
    """Tokens at which memory ran out; None for any other reason."""
    if not str(entry["reason"]).startswith("out of memory"):
        return None
    shape = rr.known_shape(entry.get("shape"))
    tokens = (entry.get("shape") or {}).get("tokens") if isinstance(entry.get("shape"), dict) else None
    return rr.number(tokens) or (float(shape.tokens) if shape else rr.number(entry.get("tokens")))


def _failures(missing: Sequence[dict[str, Any]]) -> Html | None:
    if not missing:
        return None
    items = []
    for entry in missing:
        shape = rr.known_shape(entry.get("shape"))
        where = f"{shape.tokens:,} tokens" if shape else str(entry["name"])
        items.append(tag("li", f"{entry['provider']} at {where}: {entry['reason']}"))
    return tag("details", tag("summary", f"{rr.counted(len(items), 'point')} without a result"), tag("ul", items))


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def published(row: dict[str, Any]) -> dict[str, Any]:
    """What others published of a peer: im_s, ss, ms, params_m, source, gpu; any of them may be missing."""
    found = row.get("published")
    return found if isinstance(found, dict) else {}


GROUPS = ("poster", "today", "variant")  # of bench/peers.yml, in this order


@dataclass(frozen=True)
class Peer:
    """A model beside ours. `row` is None where nothing was measured; `reason` then says why."""

    name: str
    info: dict[str, Any]
    row: Row | None
    reason: str = ""

    def published(self, key: str) -> float | None:
        """A published number: im_s, ss and ms (mIoU in percent), params_m, crop."""
        return rr.number(self.said.get(key))

    @property
    def said(self) -> dict[str, Any]:
        """All that was published, also `source` and `gpu`."""
        found = self.info.get("published")
        return found if isinstance(found, dict) else {}


def all_peers(result: Results) -> list[Peer]:
    """Measured ones and those of which there are published figures only, by group."""
    found = [Peer(row.provider, row.info, row) for row in result.of("peers")]
    found += [Peer(str(e["provider"]), e, None, str(e["reason"])) for e in result.missing("peers")]

    def place(peer: Peer) -> int:
        group = peer.info.get("group")
        return GROUPS.index(group) if group in GROUPS else len(GROUPS)

    return sorted(found, key=place)


PEER_HEADS = (
    Head("model"),
    Head("images/s here", "random weights, on the machine of this file"),
    Head("published images/s", "not measured here"),
    Head("its GPU"),
    Head("published mIoU", "ADE20K, single scale, in percent; not measured here"),
    Head("published, multi-scale", "mIoU on ADE20K in percent; not measured here"),
    Head("its windows", "side in pixels of the windows that the published mIoU was measured with"),
    Head("parameters here", "of the network that was timed, without what only training uses"),
    Head("published parameters"),
    Head("input here"),
    Head("TFLOP/s"),
    Head("spread", "half the interquartile range, relative to the median"),
    Head("peak memory"),
    Head("type"),
    Head("group", "poster: rows of Segmenter's ICCV 2021 poster; today: later models; variant: nothing is published"),
    Head("source of what is published"),
    Head("remark"),
)


def peers(result: Results, prefix: str) -> Html:
    """Other models, measured here, beside what was published of them."""
    title, found = "Peers", all_peers(result)
    if not found:
        return section(f"{prefix}peers", title, tag("p", "This file has no peers."))
    text = (
        "“images/s here” is measured: random weights, pictures on the device to labels; ours as impl=auto runs here. "
        "Columns called published are other people's figures on other machines, not measured here."
    )
    lines = [Line(_peer_cells(peer), _peer_class(peer)) for peer in found]
    return section(f"{prefix}peers", title, tag("p", text), table(PEER_HEADS, lines, title))


def _peer_class(peer: Peer) -> str | None:
    return "gone" if peer.row is None else "ours" if peer.info.get("ours") is True else None


def _peer_cells(peer: Peer) -> list[Cell]:
    row, said = peer.row, peer.said
    get = row.get if row else lambda _: None
    source = str(said.get("source") or NO_VALUE)
    built = get("parameters") and get("parameters") / 1e6
    crop = peer.published("crop")

    def million(value: float | None) -> Cell:
        return Cell(NO_VALUE if value is None else f"{rr.significant(value)} M", value)

    return [
        Cell(peer.name),
        Cell(rr.significant(pace(row)), pace(row), "best"),
        Cell(rr.significant(peer.published("im_s")), peer.published("im_s")),
        Cell(said.get("gpu") or NO_VALUE),
        Cell(rr.points(peer.published("ss")), peer.published("ss")),
        Cell(rr.points(peer.published("ms")), peer.published("ms")),
        Cell(rr.significant(crop), crop),
        million(built),
        million(peer.published("params_m")),
        Cell((row and rr.input_label(row.info)) or NO_VALUE),
        Cell(rr.significant(get("tflops")), get("tflops")),
        Cell(NO_VALUE) if row is None else spread_cell(row),
        Cell(rr.memory(get("peak_bytes")), get("peak_bytes")),
        Cell(NO_VALUE if row is None else row.dtype),
        Cell(peer.info.get("group") or NO_VALUE),
        Cell(tag("a", source, href=source) if source.startswith("https://") else source, class_="text"),
        Cell(f"not measured: {peer.reason}" if peer.reason else NO_VALUE, class_="text"),
    ]
