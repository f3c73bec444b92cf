"""Rows of results as tables, one definition for the page and for Markdown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import report_rows as rr
from bench.report_page import NO_VALUE, Cell, Column, Table, html
from bench.report_rows import Comparison, Group, Results, Row

CHANGES = {rr.SLOWER: "slow", rr.FASTER: "best"}


def cell(form: Callable[[float | None], str], value: float | None, look: str = "", title: str | None = None) -> Cell:
    """A number."""
    return Cell(form(value), value, look, title)


def text(value: Any, look: str = "", title: str | None = None) -> Cell:
    """Words, or a dash for none."""
    return Cell(value or NO_VALUE, look=look, title=title)


def info(name: str, form: Callable[[float | None], str]) -> Callable[[Row | None], Cell]:
    """Makes the cell of a number of a row's `extra_info`."""
    return lambda row: cell(form, row and row.get(name))


def ratio(base: Row | None, row: Row | None, slower: str = " slower", always: bool = False) -> Cell:
    """Speed against another row. What is slower than that, beyond the spread, says so if it is ours, or `always`."""
    speed = rr.speed(base, row)
    if speed is None:
        return Cell(NO_VALUE)
    found, star = rr.verdict(base, row), "" if base.timing == row.timing else "*"
    title = f"against {base.provider}: {found}" + (f"; timed by {row.timing}, not {base.timing}" if star else "")
    if base is row:
        return Cell(rr.times(speed), speed, "soft", "this row itself")
    if not (row.ours or always):
        return Cell(rr.times(speed) + star, speed, title=title)
    end = slower if found == rr.SLOWER else ""
    return Cell(rr.times(speed) + star + end, speed, CHANGES.get(found, ""), title)


def duration(row: Row, best: bool) -> Cell:
    return cell(rr.duration, row.median, "best" if best else "")


def spread(row: Row | None) -> Cell:
    """Half the interquartile range, relative."""
    if row is None or row.iqr is None:
        return Cell(NO_VALUE)
    quartiles = f"quartiles {rr.duration(row.q1)} to {rr.duration(row.q3)}, {rr.significant(row.rounds)} rounds"
    return Cell(f"±{50 * row.iqr:.1f} %", row.iqr, title=quartiles)


def of_floor(row: Row) -> Cell:
    """The least possible time over the measured one, in percent."""
    value = row.get("percent_of_floor")
    if value is not None and value > 105:
        return Cell(f"{rr.percent(value)} ?", value, "slow", "above the ceiling: the formula or the ceiling is off")
    return cell(rr.percent, value)


pace, peak_memory = info("images_per_second", rr.significant), info("peak_bytes", rr.memory)
alike = info("agreement", rr.share)


class Measured(NamedTuple):
    """A row, the rows of its shape, and whether it is the first of them."""

    row: Row
    group: Group
    first: bool


SPREAD_HINT = "half the interquartile range, relative to the median"
SDPA_HINT = "how many times faster than the fastest backend of scaled_dot_product_attention"
AGREEMENT_HINT = "share of pixels labelled as the published way labels them in float32"
TIMING_HINT = "graph: events around a CUDA graph; events: around plain calls; wall: the wall clock"
MEASURED = (
    Column("model and image", "the shape is that of this model's layer", lambda m: Cell(m.row.label)),
    Column("tokens", "of one image in the encoder", lambda m: cell(rr.whole, m.row.tokens)),
    Column("provider", None, lambda m: Cell(m.row.provider, look="who")),
    Column("median", "time of a call, a whole batch", lambda m: duration(m.row, m.row is m.group.best)),
    Column("spread", SPREAD_HINT, lambda m: spread(m.row)),
    Column("images/s", None, lambda m: pace(m.row)),
    Column("vs eager", "how many times faster than eager", lambda m: ratio(m.group.eager, m.row)),
    Column("vs best sdpa", SDPA_HINT, lambda m: ratio(m.group.sdpa, m.row)),
    Column("TFLOP/s", "of matrix products", lambda m: cell(rr.significant, m.row.get("tflops"))),
    Column("of ceiling", "measured rate of matrix products", lambda m: cell(rr.percent, m.row.get("percent_flops"))),
    Column("GB/s", "of the fewest bytes that have to move", lambda m: cell(rr.significant, m.row.get("gbps"))),
    Column("of ceiling", "measured rate of copies", lambda m: cell(rr.percent, m.row.get("percent_bytes"))),
    Column("of floor", "100 %: the least time possible on this machine", lambda m: of_floor(m.row)),
    Column("peak memory", "what one call needs beyond what was there", lambda m: peak_memory(m.row)),
    Column("labels as fp32", AGREEMENT_HINT, lambda m: alike(m.row)),
    Column("compile", "not in the median", lambda m: cell(rr.duration, m.row.get("compile_seconds"))),
    Column("type", None, lambda m: Cell(m.row.dtype)),
    Column("timed by", TIMING_HINT, lambda m: Cell(m.row.timing)),
    Column("check before timing", None, lambda m: text(m.row.info.get("gate"), "check soft")),
)


def measured(rows: Sequence[Row], caption: str) -> Table:
    """Any kind of row: every shape by every provider."""
    found = [
        Measured(row, group, i == 0)
        for group in rr.grouped(rows).values()
        for i, row in enumerate(group.by_provider.values())
    ]
    return Table.of(caption, MEASURED, found, lambda m: " ".join(["ours"] * m.row.ours + ["next"] * m.first))


# ---------------------------------------------------------------------------------------------------------------------
# Waterfall


@dataclass
class Step:
    """One technique more than the step before. Without a row, `reason` says why. `first`, `before`: measured ones."""

    order: float
    name: str
    text: str
    row: Row | None
    reason: str = ""
    first: Row | None = None
    before: Row | None = None

    @property
    def slower(self) -> bool:
        return bool(self.before and self.row) and rr.verdict(self.before, self.row) == rr.SLOWER


def waterfalls(result: Results) -> dict[str, list[Step]]:
    """Title (what was timed) -> steps in order. A missing step joins the waterfall of its shape, or else the first."""
    found: dict[str, list[Step]] = {}
    for row in result.of("waterfall"):
        order = row.get("step")
        title = row.label if row.shape or row.info.get("model") else str(row.info.get("speed_model") or "one model")
        steps = found.setdefault(title, [])
        steps.append(Step(len(steps) if order is None else order, row.provider, str(row.info.get("text") or ""), row))
    for entry in result.missing("waterfall"):
        title = rr.shape_label(entry.get("shape"), {})
        steps = found.setdefault(title if title in found or not found else next(iter(found)), [])
        place = re.fullmatch(r"waterfall-(\d+)", str(entry["name"]))  # as the benchmark names its rows
        order = float(place[1]) if place else rr.number(entry.get("step"))
        order = max((step.order for step in steps), default=0) + 1 if order is None else order
        steps.append(Step(order, str(entry["provider"]), str(entry.get("text") or ""), None, str(entry["reason"])))
    for steps in found.values():
        steps.sort(key=lambda step: step.order)
        first = before = None
        for step in steps:
            first = first or step.row
            step.first, step.before, before = first, before, step.row or before
    return found


def _pace_of(step: Step) -> Cell:
    return pace(step.row) if step.row else Cell(f"not measured: {step.reason}", look="reason")


def _miou(row: Row | None) -> Cell:
    count = row and row.get("miou_pictures")
    return cell(rr.points, row and row.get("miou"), title=f"{rr.significant(count)} images")


STEPS_HINT = "share of the example photographs' pixels that the shipped model labels as in the first step"
STEPS = (
    Column("step", None, lambda s: Cell(s.name, s.order)),
    Column("what changes", None, lambda s: text(s.text, "text")),
    Column("images/s", None, _pace_of),
    Column("vs first", None, lambda s: cell(rr.times, rr.speed(s.first, s.row))),
    Column("vs step before", None, lambda s: ratio(s.before, s.row, ", slower than the step before", always=True)),
    Column("spread", SPREAD_HINT, lambda s: spread(s.row)),
    Column("peak memory", None, lambda s: peak_memory(s.row)),
    Column("labels as fp32", STEPS_HINT, lambda s: alike(s.row)),
    Column("mIoU", "in percent, of the shipped model on CamVid's test set", lambda s: _miou(s.row)),
    Column("type, timed by", None, lambda s: text(s.row and f"{s.row.dtype}, {s.row.timing}")),
)


def waterfall(title: str, steps: Sequence[Step]) -> Table:
    """One technique more on each line."""
    return Table.of(f"Waterfall, {title}", STEPS, steps, lambda step: "" if step.row else "gone")


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def _ours(group: Group) -> Row | None:
    return next((group.by_provider[name] for name in rr.OURS if name in group.by_provider), None)


def _named_pace(row: Row | None, name: str = "") -> Cell:
    value = row and row.get("images_per_second")
    return Cell(f"{rr.significant(value)} ({name})" if name else rr.significant(value), value)


def _memories(group: Group) -> Cell:
    before, after = (peak_memory(row).text for row in (group.eager, _ours(group)))
    return Cell(NO_VALUE if before == after == NO_VALUE else f"{before} → {after}")


MODELS = (
    Column("model", None, lambda found: Cell(f"{found[0][1]}, {found[0][2]}")),
    Column("eager", None, lambda found: _named_pace(found[1].eager)),
    Column("best sdpa", None, lambda found: _named_pace(sdpa := found[1].sdpa, sdpa and sdpa.provider[5:])),
    Column("compile", None, lambda found: _named_pace(found[1].by_provider.get("compile"))),
    Column("ours", None, lambda found: _named_pace(row := _ours(found[1]), row and row.provider)),
    Column("vs eager", None, lambda found: ratio(found[1].eager, _ours(found[1]))),
    Column("vs best sdpa", None, lambda found: ratio(found[1].sdpa, _ours(found[1]))),
    Column("vs compile", None, lambda found: ratio(found[1].by_provider.get("compile"), _ours(found[1]))),
    Column("peak memory", "eager's → ours", lambda found: _memories(found[1])),
)


def models(result: Results) -> Table:
    """A line for each shape: images a second by provider, and how ours compares."""
    return Table.of("Whole models, images a second", MODELS, rr.grouped(result.of("model")).items())


# ---------------------------------------------------------------------------------------------------------------------
# Peers

GROUPS = {"poster": 0, "today": 1, "variant": 2}  # of bench/peers.yml, in this order


class Peer(NamedTuple):
    """A model beside ours. `row` is None where nothing was measured; `reason` then says why."""

    name: str
    info: dict[str, Any]
    row: Row | None
    reason: str = ""

    def said(self, key: str) -> Any:
        """What was published: im_s, ss and ms (mIoU in percent), params_m, crop, source, gpu."""
        return rr.dictionary(self.info.get("published")).get(key)

    def published(self, key: str) -> float | None:
        return rr.number(self.said(key))


def _published_pace(peer: Peer) -> Cell:
    value, gpu = peer.published("im_s"), peer.said("gpu")
    return cell(rr.significant, value) if value is None or not gpu else Cell(f"{rr.significant(value)} ({gpu})", value)


def _million(count: float | None) -> Cell:
    return Cell(NO_VALUE if count is None else f"{rr.significant(count)} M", count)


def _source(peer: Peer) -> Cell:
    source = str(peer.said("source") or NO_VALUE)
    return Cell(html.link(source, source) if source.startswith("https://") else source, look="text")


BUILT_HINT = "of the network that was timed, without what only training uses"
GROUP_HINT = "poster: rows of Segmenter's ICCV 2021 poster; today: later models; variant: nothing is published"
PEERS = (
    Column("model", None, lambda p: Cell(p.name)),
    Column("images/s here", "random weights, on the machine of this file", lambda p: pace(p.row)),
    Column("published images/s", "not measured here", _published_pace),
    Column("published mIoU", "ADE20K, one scale, in percent", lambda p: cell(rr.points, p.published("ss"))),
    Column("published, multi-scale", "mIoU on ADE20K in percent", lambda p: cell(rr.points, p.published("ms"))),
    Column("its windows", "their side in pixels for that mIoU", lambda p: cell(rr.significant, p.published("crop"))),
    Column("parameters here", BUILT_HINT, lambda p: _million(p.row and (n := p.row.get("parameters")) and n / 1e6)),
    Column("published parameters", None, lambda p: _million(p.published("params_m"))),
    Column("input here", None, lambda p: text(p.row and rr.input_label(p.row.info))),
    Column("TFLOP/s", None, lambda p: cell(rr.significant, p.row and p.row.get("tflops"))),
    Column("spread", SPREAD_HINT, lambda p: spread(p.row)),
    Column("peak memory", None, lambda p: peak_memory(p.row)),
    Column("type", None, lambda p: text(p.row and p.row.dtype)),
    Column("group", GROUP_HINT, lambda p: text(p.info.get("group"))),
    Column("source of what is published", None, _source),
    Column("remark", None, lambda p: text(p.reason and f"not measured: {p.reason}", "text")),
)


def peers(result: Results) -> Table:
    """Other models, measured here and those of which there are published figures only, by group."""
    found = [Peer(row.provider, row.info, row) for row in result.of("peers")]
    found += [Peer(str(e["provider"]), e, None, str(e["reason"])) for e in result.missing("peers")]
    found.sort(key=lambda peer: GROUPS.get(str(peer.info.get("group")), len(GROUPS)))
    return Table.of("Peers", PEERS, found, lambda p: "gone" if p.row is None else "ours" * (p.info.get("ours") is True))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

PAIRS = (
    Column("model and image", None, lambda p: Cell(p.after.label)),
    Column("what", None, lambda p: Cell(p.after.kind, look="check")),
    Column("provider", None, lambda p: Cell(p.after.provider, look="who")),
    Column("type, timed by", None, lambda p: Cell(f"{p.after.dtype}, {p.after.timing}")),
    Column("A", None, lambda p: cell(rr.duration, p.before.median)),
    Column("B", None, lambda p: cell(rr.duration, p.after.median)),
    Column("spread A", SPREAD_HINT, lambda p: spread(p.before)),
    Column("spread B", SPREAD_HINT, lambda p: spread(p.after)),
    Column("memory A", "peak", lambda p: peak_memory(p.before)),
    Column("memory B", "peak", lambda p: peak_memory(p.after)),
    Column("B's speed", None, lambda p: cell(rr.times, rr.speed(p.before, p.after), CHANGES.get(p.verdict, ""))),
    Column("B is", None, lambda p: Cell(p.verdict, look=f"check {CHANGES.get(p.verdict, '')}")),
)


def pairs(found: Comparison) -> Table:
    """Rows of both files."""
    return Table.of("Rows of both files", PAIRS, found.pairs, lambda pair: "ours" if pair.after.ours else "")
