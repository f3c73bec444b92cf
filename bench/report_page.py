"""The page: comparison of two files, then each file's parts, then how everything was measured."""

from collections.abc import Sequence
from typing import Any

from bench import report_figures, report_sections
from bench import report_rows as rr
from bench.report_html import Cell, Head, Html, Line, page, section, table, tag
from bench.report_markdown import RULE
from bench.report_rows import Comparison, Results

CLASSES = {rr.SLOWER: "slow", rr.FASTER: "best"}


def report(results: Sequence[Results], links: Sequence[str | None]) -> str:
    """The document. Every file after the first is compared with the first.

    Args:
        links: where each result file is, as seen from the page; None for no link.
    """
    contents: list[list[tuple[str, str]]] = [[]]
    parts: list[Any] = []
    for i, other in enumerate(results[1:], 1):
        found = rr.compare(results[0], other)
        contents[0].append((f"comparison-{i}", f"Comparison{f' {i}' if len(results) > 2 else ''}"))
        parts.append(comparison(found, f"comparison-{i}"))
    for i, result in enumerate(results):
        gpu_known = any(other.on_gpu for other in results)
        made = _file(result, links[i], f"f{i}-" if len(results) > 1 else "", len(results) > 1, gpu_known)
        contents.append(made[0])
        parts += made[1]
    contents.append([("method", "How measured")])
    parts.append(method())
    names = " and ".join(dict.fromkeys(result.device for result in results))
    return page(f"segmenter: benchmark on {names}", contents, parts)


def _file(
    result: Results, link: str | None, prefix: str, several: bool, gpu_known: bool
) -> tuple[list[tuple[str, str]], list[Any]]:
    """(entries of the contents, parts) of one file."""
    title = f"{'File: ' + result.path.name if several else 'Machine and run'}"
    parts: list[Any] = [section(f"{prefix}run", title, *report_sections.header(result, link, gpu_known))]
    contents = [(f"{prefix}run", result.path.name if several else "Machine")]

    def add(name: str, text: str, part: Html | None) -> None:
        if part is not None:
            parts.append(part)
            contents.append((f"{prefix}{name}", text))

    add("summary", "Where we stand", report_sections.summary(result, prefix))
    add("waterfall", "Waterfall", report_figures.waterfall(result, prefix))
    add("model", "Whole models", report_figures.models(result, prefix))
    known = ("model", "peers", "waterfall", "long", *rr.OPERATIONS)
    others = [kind for kind in dict.fromkeys(row.kind for row in result.rows) if kind not in known]
    operations = [report_sections.operation(result, kind, prefix) for kind in (*rr.OPERATIONS, *others)]
    operations = [part for part in operations if part is not None]
    inner = operations or [tag("p", "This file has no single operations.")]
    add("operations", "Operations", section(f"{prefix}operations", "Single operations", *inner))
    add("peers", "Peers", report_figures.peers(result, prefix))
    add("long", "Long sequences", report_figures.long_sequences(result, prefix))
    add("missing", "Not measured", report_sections.unavailable(result, prefix))
    return contents, parts


def comparison(found: Comparison, id_: str) -> Html:
    """Two files side by side."""
    a, b = found.before, found.after
    facts = [Line([Cell(fact), Cell(x, class_="text"), Cell(y, class_="text")]) for fact, x, y in found.differences()]
    counts = [
        Line([Cell(kind), *(Cell(n, n, CLASSES.get(said) if n else None) for said, n in said_of.items())])
        for kind, said_of in found.counts().items()
    ]
    heads = [Head("what"), *(Head(text) for text in ("B faster", rr.SAME, "B slower", rr.UNKNOWN))]
    parts = [
        tag("p", tag("b", "A"), f" {a.path.name}: {a.device}, {a.stack}"),
        tag("p", tag("b", "B"), f" {b.path.name}: {b.device}, {b.stack}"),
        [tag("p", note, class_="note") for note in found.notes()],
        tag("p", RULE),
        table(heads, counts, "Verdicts by kind") if counts else None,
        _pairs(found) if found.pairs else None,
        _apart(found),
        tag("h3", "What differs between the two"),
        table([Head("fact"), Head("A"), Head("B")], facts, "Differences") if facts else tag("p", "Nothing recorded."),
    ]
    return section(id_, f"Comparison: {a.path.name} (A) and {b.path.name} (B)", *parts)


def _pairs(found: Comparison) -> Html:
    lines = []
    for pair in found.pairs:
        a, b = pair.before, pair.after
        bytes_a, bytes_b = a.get("peak_bytes"), b.get("peak_bytes")
        cells = [
            Cell(b.label),
            Cell(b.kind, class_="check"),
            Cell(b.provider, class_="who"),
            Cell(f"{b.dtype}, {b.timing}"),
            Cell(rr.duration(a.median), a.median),
            Cell(rr.duration(b.median), b.median),
            Cell(rr.times(pair.speed), pair.speed, CLASSES.get(pair.verdict)),
            Cell(pair.verdict, class_=CLASSES.get(pair.verdict)),
            Cell(rr.spread(a), a.iqr),
            Cell(rr.spread(b), b.iqr),
            Cell(rr.memory(bytes_a), bytes_a),
            Cell(rr.memory(bytes_b), bytes_b),
        ]
        lines.append(Line(cells, "ours" if b.ours else None))
    texts = ["model and picture", "what", "provider", "type, timed by", "A", "B", "B's speed", "B is", "spread A"]
    heads = [Head(text) for text in (*texts, "spread B", "peak memory A", "peak memory B")]
    return table(heads, lines, "Rows of both files")


def _apart(found: Comparison) -> Html | None:
    groups = [
        ("in both, but timed differently, so not compared", [x for x, _ in found.timed_differently]),
        ("only in A", found.only_before),
        ("only in B", found.only_after),
    ]
    made = [
        tag(
            "details",
            tag("summary", f"{rr.counted(len(rows), 'row')} {text}"),
            tag("ul", [tag("li", f"{row.kind}, {row.label}, {row.provider}, {row.dtype}") for row in rows]),
        )
        for text, rows in groups
        if rows
    ]
    return Html("".join(made)) if made else None


PROVIDERS = {  # as bench/providers.py and bench/models.py define them
    "eager": "the published code's order of work in plain PyTorch: explicit score matrices, full-resolution logits",
    "sdpa-…": "the same with scaled_dot_product_attention held to one backend; whole models without the softmax",
    "compile": "torch.compile (max-autotune) of the scaled_dot_product_attention form",
    "bands": "labels in bands of rows: the full-resolution logits are never held whole",
    "pruned": "ours without kernels: only classes that can win somewhere are upsampled",
    "triton": "ours: the kernels",
}
METHOD = (
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
    RULE,
)


def method() -> Html:
    """How figures came about, as bench/harness.py and bench/timing.py do it."""
    providers = tag("ul", [tag("li", tag("b", name), f": {text}") for name, text in PROVIDERS.items()])
    return section("method", "How measured", providers, [tag("p", text) for text in METHOD])
