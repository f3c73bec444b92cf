"""Rows of results as tables, one definition for the page, for Markdown and for a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from bench import report_rows as rr
from bench.report_page import NO_VALUE, Cell, Column, Table, html
from bench.report_rows import Comparison, Group, Results, Row

CHANGES = {rr.SLOWER: "slow", rr.FASTER: "best"}
Form = Callable[[float | None], str]


def cell(form: Form, value: float | None, look: str = "", title: str | None = None) -> Cell:
    """A number."""
    return Cell(form(value), value, look, title)


def text(value: Any, look: str = "") -> Cell:
    """Words, or a dash for none."""
    return Cell(value or NO_VALUE, look=look)


def not_measured(row: Row) -> str:
    return f"not measured: {row.reason}"


def ratio(base: Row | None, row: Row | None, slower: str = " slower", always: bool = False) -> Cell:
    """Speed against another row. What is slower than that, beyond the spread, says so if it is ours, or `always`."""
    speed = rr.speed(base, row)
    if speed is None:
        return Cell(NO_VALUE)
    if base is row:
        return Cell(rr.times(speed), speed, "soft", "this row itself")
    found, star = rr.verdict(base, row), "" if base.timing == row.timing else "*"
    title = f"against {base.provider}: {found}" + (f"; timed by {row.timing}, not {base.timing}" if star else "")
    shown = found if row.ours or always else ""
    end = slower if shown == rr.SLOWER else ""
    return Cell(rr.times(speed) + star + end, speed, CHANGES.get(shown, ""), title)


def spread(row: Row) -> Cell:
    """Half the interquartile range, relative."""
    if row.iqr is None:
        return Cell(NO_VALUE)
    quartiles = f"quartiles {rr.duration(row.q1)} to {rr.duration(row.q3)}, {rr.significant(row.rounds)} rounds"
    return Cell(f"±{50 * row.iqr:.1f} %", row.iqr, title=quartiles)


def of_floor(row: Row) -> Cell:
    """The least possible time over the measured one, in percent."""
    value = row.get("percent_of_floor")
    if value is not None and value > 105:
        return Cell(f"{rr.percent(value)} ?", value, "slow", "above the ceiling: the formula or the ceiling is off")
    return cell(rr.percent, value)


def info(heading: str, hint: str | None, key: str, form: Form) -> Column:
    """A column of a number in `extra_info`."""
    return Column(heading, hint, lambda row: cell(form, row and row.get(key)))


# Columns that several tables have.
SPREAD_HINT = "half the interquartile range, relative to the median"
SPREAD = Column("spread", SPREAD_HINT, spread)
PACE = info("images/s", None, "images_per_second", rr.significant)
PEAK = info("peak memory", "what one call needs beyond what was there", "peak_bytes", rr.memory)
TFLOPS = info("TFLOP/s", "of matrix products", "tflops", rr.significant)

SDPA_HINT = "how many times faster than the fastest backend of scaled_dot_product_attention"
AGREEMENT_HINT = "share of pixels labelled as the published way labels them in float32"
TIMING_HINT = "graph: events around a CUDA graph; events: around plain calls; wall: the wall clock"
MEASURED = (
    Column("model and image", "the shape is that of this model's layer", lambda row: Cell(row.label)),
    Column("tokens", "of one image in the encoder", lambda row: cell(rr.whole, row.tokens)),
    Column("provider", None, lambda row: Cell(row.provider, look="who")),
    Column(
        "median",
        "time of a call, a whole batch",
        lambda row: cell(rr.duration, row.median, "best" * (row is row.group.best)),
    ),
    SPREAD,
    PACE,
    Column("vs eager", "how many times faster than eager", lambda row: ratio(row.group.eager, row)),
    Column("vs best sdpa", SDPA_HINT, lambda row: ratio(row.group.sdpa, row)),
    TFLOPS,
    info("of ceiling", "measured rate of matrix products", "percent_flops", rr.percent),
    info("GB/s", "of the fewest bytes that have to move", "gbps", rr.significant),
    info("of ceiling", "measured rate of copies", "percent_bytes", rr.percent),
    Column("of floor", "100 %: the least time possible on this machine", of_floor),
    PEAK,
    info("labels as fp32", AGREEMENT_HINT, "agreement", rr.share),
    info("compile", "not in the median", "compile_seconds", rr.duration),
    Column("type", None, lambda row: Cell(row.dtype)),
    Column("timed by", TIMING_HINT, lambda row: Cell(row.timing)),
    Column("check before timing", None, lambda row: text(row.info.get("gate"), "check soft")),
)


def measured(rows: Sequence[Row], caption: str) -> Table:
    """Any kind of row: every shape by every provider."""
    found = [row for group in rr.grouped(rows) for row in group.rows]
    return Table.of(caption, MEASURED, found, lambda row: "ours " * row.ours + "next" * (row is row.group.rows[0]))


def slower_step(row: Row) -> bool:
    """Whether a step is slower than the one before."""
    return bool(row.before and row.median) and rr.verdict(row.before, row) == rr.SLOWER


STEPS_HINT = "share of the example photographs' pixels that the shipped model labels as in the first step"
MIOU_HINT = "in percent, of the shipped model on CamVid's test set"
STEPS = (
    Column("step", None, lambda row: Cell(row.provider, row.order)),
    Column("what changes", None, lambda row: text(str(row.info.get("text") or ""), "text")),
    Column("images/s", None, lambda row: PACE.cell(row) if row.median else Cell(not_measured(row), look="reason")),
    Column("vs first", None, lambda row: cell(rr.times, rr.speed(row.first, row))),
    Column("vs step before", None, lambda row: ratio(row.before, row, ", slower than the step before", always=True)),
    SPREAD,
    PEAK,
    info("labels as fp32", STEPS_HINT, "agreement", rr.share),
    Column(
        "mIoU",
        MIOU_HINT,
        lambda row: cell(rr.points, row.get("miou"), title=f"{rr.whole(row.get('miou_pictures'))} images"),
    ),
    Column("type, timed by", None, lambda row: text(row.median and f"{row.dtype}, {row.timing}")),
)


def waterfall(title: str, steps: Sequence[Row]) -> Table:
    """One technique more on each line."""
    return Table.of(f"Waterfall, {title}", STEPS, steps, lambda row: "" if row.median else "gone")


def _named_pace(row: Row | None, prefix: str = "") -> Cell:
    value = row and row.get("images_per_second")
    return Cell(rr.significant(value) + (f" ({row.provider.removeprefix(prefix)})" if row else ""), value)


def _memories(group: Group) -> Cell:
    before, after = (PEAK.cell(row).text for row in (group.eager, group.ours))
    return Cell(NO_VALUE if before == after == NO_VALUE else f"{before} → {after}")


MODELS = (
    Column("model", None, lambda group: Cell(group.name)),
    Column("eager", None, lambda group: PACE.cell(group.eager)),
    Column("best sdpa", None, lambda group: _named_pace(group.sdpa, "sdpa-")),
    Column("compile", None, lambda group: PACE.cell(group.compile)),
    Column("ours", None, lambda group: _named_pace(group.ours)),
    Column("vs eager", None, lambda group: ratio(group.eager, group.ours)),
    Column("vs best sdpa", None, lambda group: ratio(group.sdpa, group.ours)),
    Column("vs compile", None, lambda group: ratio(group.compile, group.ours)),
    Column("peak memory", "eager's → ours", _memories),
)


def models(result: Results) -> Table:
    """A line for each shape: images a second by provider, and how ours compares."""
    return Table.of("Whole models, images a second", MODELS, rr.grouped(result.of("model")))


GROUPS = {"poster": 0, "today": 1, "variant": 2}  # of bench/peers.yml, in this order


def said(row: Row, key: str) -> Any:
    """What was published of a peer: im_s, ss and ms (mIoU in percent), params_m, crop, source, gpu."""
    return rr.dictionary(row.info.get("published")).get(key)


def published(heading: str, hint: str | None, key: str, form: Form) -> Column:
    """A column of a published number."""
    return Column(heading, hint, lambda row: cell(form, rr.number(said(row, key))))


def _published_pace(row: Row) -> Cell:
    value, gpu = rr.number(said(row, "im_s")), said(row, "gpu")
    return Cell(rr.significant(value) + (f" ({gpu})" if gpu and value is not None else ""), value)


def _source(row: Row) -> Cell:
    source = str(said(row, "source") or NO_VALUE)
    return Cell(html.link(source, source) if source.startswith("https://") else source, look="text")


BUILT_HINT = "of the network that was timed, without what only training uses"
GROUP_HINT = "poster: rows of Segmenter's ICCV 2021 poster; today: later models; variant: nothing is published"
PEERS = (
    Column("model", None, lambda row: Cell(row.provider)),
    info("images/s here", "random weights, on the machine of this file", "images_per_second", rr.significant),
    Column("published images/s", "not measured here", _published_pace),
    published("published mIoU", "ADE20K, one scale, in percent", "ss", rr.points),
    published("published, multi-scale", "mIoU on ADE20K in percent", "ms", rr.points),
    published("its windows", "their side in pixels for that mIoU", "crop", rr.significant),
    info("parameters here", BUILT_HINT, "parameters", rr.or_dash(lambda n: f"{rr.significant(n / 1e6)} M")),
    published("published parameters", None, "params_m", rr.or_dash(lambda n: f"{rr.significant(n)} M")),
    Column("input here", None, lambda row: text(row.median and rr.input_label(row.info))),
    TFLOPS,
    SPREAD,
    PEAK,
    Column("type", None, lambda row: text(row.median and row.dtype)),
    Column("group", GROUP_HINT, lambda row: text(row.info.get("group"))),
    Column("source of what is published", None, _source),
    Column("remark", None, lambda row: text("" if row.median else not_measured(row), "text")),
)


def peers(result: Results) -> Table:
    """Other models, measured here and those of which there are published figures only, by group."""
    found = result.of("peers") + result.missing("peers")
    found.sort(key=lambda row: GROUPS.get(str(row.info.get("group")), len(GROUPS)))
    return Table.of(
        "Peers", PEERS, found, lambda row: "ours" * (row.info.get("ours") is True) if row.median else "gone"
    )


PAIRS = (
    Column("model and image", None, lambda p: Cell(p.after.label)),
    Column("what", None, lambda p: Cell(p.after.kind, look="check")),
    Column("provider", None, lambda p: Cell(p.after.provider, look="who")),
    Column("A", None, lambda p: cell(rr.duration, p.before.median)),
    Column("B", None, lambda p: cell(rr.duration, p.after.median)),
    Column("B's speed", None, lambda p: cell(rr.times, rr.speed(p.before, p.after), CHANGES.get(p.verdict, ""))),
    Column("B is", None, lambda p: Cell(p.verdict, look=f"check {CHANGES.get(p.verdict, '')}")),
    Column("type, timed by", None, lambda p: Cell(f"{p.after.dtype}, {p.after.timing}")),
    Column("spread A", SPREAD_HINT, lambda p: spread(p.before)),
    Column("spread B", SPREAD_HINT, lambda p: spread(p.after)),
    Column("memory A", "peak", lambda p: PEAK.cell(p.before)),
    Column("memory B", "peak", lambda p: PEAK.cell(p.after)),
)


def pairs(found: Comparison) -> Table:
    """Rows of both files."""
    return Table.of("Rows of both files", PAIRS, found.pairs, lambda pair: "ours" if pair.after.ours else "")


def comparison_text(found: Comparison) -> str:
    """Two files compared, for a terminal."""
    notes = [f"Note: {note}" for note in found.notes()]
    return "\n".join([*notes, pairs(found).plain() + "\n" if found.pairs else "", *found.facts(), rr.RULE])
