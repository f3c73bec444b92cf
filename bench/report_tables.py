"""Rows of results as tables, one definition for the page and for Markdown."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from bench import report_rows as rr
from bench.report_page import NO_VALUE, Cell, Column, Table
from bench.report_rows import Comparison, Group, Results, Row

CHANGES = {rr.SLOWER: "slow", rr.FASTER: "best"}
Form = Callable[[float | None], str]


def cell(form: Form, value: float | None, look: str = "", title: str | None = None) -> Cell:
    """A number."""
    return Cell(form(value), value, look, title)


def info(name: str, hint: str | None, key: str, form: Form) -> Column:
    """A column of a number in `extra_info`."""
    return Column(name, hint, lambda row: cell(form, row and row.get(key)))


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


def median(row: Row) -> Cell:
    return cell(rr.duration, row.median, "best" * (row is row.group.best))


# Columns that several tables have. The page lists all hints too.
LABEL = Column("model and image", "of a single operation: the model whose layer has its shape", lambda r: Cell(r.label))
KIND = Column("what", None, lambda row: Cell(row.kind, look="check"))
PROVIDER = Column("provider", None, lambda row: Cell(row.provider, look="who"))
REASON = Column("reason", None, lambda row: Cell(NO_VALUE if row.median else row.reason, look="text"))
SPREAD = Column("spread", "half the interquartile range, relative to the median", spread)
PACE = info("images/s", None, "images_per_second", rr.significant)
TFLOPS = info("TFLOP/s", "of matrix products only, two operations a multiply-add", "tflops", rr.significant)
PEAK_HINT = "what one call needs beyond what was there: what torch allocates on a GPU, resident memory on a CPU"
PEAK = info("peak memory", PEAK_HINT, "peak_bytes", rr.memory)
AGREEMENT_HINT = "share of pixels labelled as in float32 by the published way, or by a waterfall's first step"
AGREEMENT = info("labels as fp32", AGREEMENT_HINT, "agreement", rr.share)

EAGER_HINT = "how many times faster than eager; * marks rows that were timed in different ways"
SDPA_HINT = "how many times faster than the fastest backend of scaled_dot_product_attention"
CEILING_HINT = "of the rate that a large matrix product or a large copy reached in the same run"
FLOOR_HINT = "the larger of both times at those ceilings, over the median: 100 % is the best possible"
TIMING_HINT = (
    "graph: events around a CUDA graph that calls an operation once on each of several input sets, as many as exceed "
    "twice the last cache (at most 16), so that neither launches nor a warm cache are in the figure; events: around "
    "plain calls, where no graph can be captured; wall: the wall clock up to the end of the device's work"
)
GATE_HINT = (
    "nothing wrong is timed: a result is compared with an exact one, and has to be as near as eager PyTorch of the "
    "same precision is, within a factor of two in the worst element"
)
MEASURED = (
    LABEL,
    Column("tokens", "of one image in the encoder", lambda row: cell(rr.whole, row.tokens)),
    PROVIDER,
    Column("median", "time of a call, a whole batch, after compiling and warming up", median),
    SPREAD,
    PACE,
    Column("vs eager", EAGER_HINT, lambda row: ratio(row.group.eager, row)),
    Column("vs best sdpa", SDPA_HINT, lambda row: ratio(row.group.sdpa, row)),
    TFLOPS,
    info("of ceiling", CEILING_HINT, "percent_flops", rr.percent),
    info("GB/s", "of the fewest bytes that have to move", "gbps", rr.significant),
    info("of ceiling", CEILING_HINT, "percent_bytes", rr.percent),
    Column("of floor", FLOOR_HINT, of_floor),
    PEAK,
    AGREEMENT,
    info("compile time", "not in the median", "compile_seconds", rr.duration),
    Column("type", None, lambda row: Cell(row.dtype)),
    Column("timed by", TIMING_HINT, lambda row: Cell(row.timing)),
    Column("check before timing", GATE_HINT, lambda row: Cell(row.info.get("gate") or NO_VALUE, look="check soft")),
)


def measured(rows: Sequence[Row], caption: str) -> Table:
    """Any kind of row: every shape by every provider."""
    found = [row for group in rr.grouped(rows) for row in group.rows]
    return Table.of(caption, MEASURED, found, lambda row: "ours" * row.ours)


SLOWER = (
    LABEL,
    KIND,
    PROVIDER,
    Column("its speed", None, lambda row: ratio(row.group.other, row)),
    Column("median", None, median),
    Column("fastest other", None, lambda row: Cell(row.group.other.provider, look="who")),
    Column("its median", None, lambda row: median(row.group.other)),
)


def slower(result: Results) -> Table:
    """Those of our rows that are slower than the fastest other provider beyond the spread, slowest first."""
    ours = [row for group in rr.grouped(result.rows) for row in group.rows if row.provider in rr.OURS and group.other]
    found = [row for row in ours if rr.verdict(row.group.other, row) == rr.SLOWER]
    found.sort(key=lambda row: rr.speed(row.group.other, row))
    return Table.of("Slower than the fastest other provider", SLOWER, found)


def miou(row: Row) -> Cell:
    return cell(rr.points, row.get("miou"), title=f"{rr.whole(row.get('miou_pictures'))} images")


STEPS = (
    Column("step", None, lambda row: Cell(row.provider, row.order)),
    Column("what changes", None, lambda row: Cell(row.info.get("text") or NO_VALUE, look="text")),
    Column("images/s", None, lambda row: PACE.cell(row) if row.median else Cell(row.reason, look="reason")),
    Column("vs first", None, lambda row: cell(rr.times, rr.speed(row.first, row))),
    Column("vs step before", None, lambda row: ratio(row.before, row, ", slower than the step before", always=True)),
    SPREAD,
    PEAK,
    AGREEMENT,
    Column("mIoU", "in percent, of the shipped model on CamVid's test set", miou),
    Column("type, timed by", None, lambda row: Cell(f"{row.dtype}, {row.timing}" if row.median else NO_VALUE)),
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
    Column("model", None, lambda group: Cell(f"{group.label}, {group.dtype}")),
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


def _published_pace(row: Row) -> Cell:
    value, gpu = row.get("im_s"), row.info.get("gpu")
    return Cell(rr.significant(value) + (f" ({gpu})" if gpu and value is not None else ""), value)


def _source(row: Row) -> Cell:
    source = str(row.info.get("source") or NO_VALUE)
    link = Markup('<a href="{0}">{0}</a>').format(source)
    return Cell(link if source.startswith("https://") else source, look="text")


HERE_HINT = "random weights, images on the device to labels; ours as impl=auto runs here"
BUILT_HINT = "of the network that was timed, without what only training uses"
GROUP_HINT = "poster: rows of Segmenter's ICCV 2021 poster; today: later models; variant: nothing is published"
PEERS = (
    Column("model", None, lambda row: Cell(row.provider)),
    info("images/s here", HERE_HINT, "images_per_second", rr.significant),
    Column("published images/s", "other people's figures on other machines", _published_pace),
    info("published mIoU", "on ADE20K, one scale, in percent", "ss", rr.points),
    info("published, multi-scale", "mIoU on ADE20K in percent", "ms", rr.points),
    info("its windows", "their side in pixels for that mIoU", "crop", rr.significant),
    info("parameters here", BUILT_HINT, "parameters", rr.or_dash(lambda n: f"{rr.significant(n / 1e6)} M")),
    info("published parameters", None, "params_m", rr.or_dash(lambda n: f"{rr.significant(n)} M")),
    Column("input here", None, lambda row: Cell(row.median and rr.input_label(row.info) or NO_VALUE)),
    TFLOPS,
    SPREAD,
    PEAK,
    Column("type", None, lambda row: Cell(row.dtype if row.median else NO_VALUE)),
    Column("group", GROUP_HINT, lambda row: Cell(row.info.get("group") or NO_VALUE)),
    Column("source of what is published", None, _source),
    REASON,
)


def peers(result: Results) -> Table:
    """Other models, measured here and those of which there are published figures only, by group."""
    found = result.of("peers") + result.missing("peers")
    found.sort(key=lambda row: GROUPS.get(str(row.info.get("group")), len(GROUPS)))
    return Table.of("Peers", PEERS, found, lambda row: "gone" if not row.median else "ours" * row.ours)


PAIRS = (
    Column("model and image", None, lambda pair: LABEL.cell(pair.after)),
    Column("what", None, lambda pair: KIND.cell(pair.after)),
    Column("provider", None, lambda pair: PROVIDER.cell(pair.after)),
    Column("A", None, lambda pair: cell(rr.duration, pair.before.median)),
    Column("B", None, lambda pair: cell(rr.duration, pair.after.median)),
    Column("B's speed", None, lambda pair: cell(rr.times, rr.speed(*pair[:2]), CHANGES.get(pair.verdict, ""))),
    Column("B is", None, lambda pair: Cell(pair.verdict, look=f"check {CHANGES.get(pair.verdict, '')}")),
    Column("type, timed by", None, lambda pair: Cell(f"{pair.after.dtype}, {pair.after.timing}")),
    Column("spread A", None, lambda pair: spread(pair.before)),
    Column("spread B", None, lambda pair: spread(pair.after)),
    Column("memory A", None, lambda pair: PEAK.cell(pair.before)),
    Column("memory B", None, lambda pair: PEAK.cell(pair.after)),
)


def pairs(found: Comparison) -> Table:
    """Rows of both files."""
    return Table.of("Rows of both files", PAIRS, found.pairs, lambda pair: "ours" * pair.after.ours)


def unavailable(result: Results) -> Table:
    """Rows that could not be measured."""
    return Table.of("Not measured", (KIND, PROVIDER, LABEL, REASON), result.unavailable)
