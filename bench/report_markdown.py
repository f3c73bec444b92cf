"""Result files as text: the README's tables between their markers, and the comparison for a terminal.

    <!-- bench:headline:start --> ... <!-- bench:headline:end -->      the waterfall; also `models` and `peers`

What stands between the markers is replaced, nothing else is touched.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report_rows as rr
from bench.report_figures import all_peers, pace, waterfalls
from bench.report_rows import NO_VALUE, Comparison, Results, Row

MARKER = re.compile(r"<!-- bench:([\w-]+):(start|end) -->")
SHAPES = 12  # rows of the table of models; the page has all


class MarkerError(ValueError):
    """The README's markers are missing or wrong; the message says how."""


def _text(value: object) -> str:
    """For a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def _measured_on(result: Results, folder: Path) -> str:
    """Machine, stack and file in a line: every figure of a README names them."""
    path = os.path.relpath(result.path.resolve(), folder.resolve()).replace(os.sep, "/")
    name = f"`{result.path.name}`" if path.startswith("..") else f"[{result.path.name}]({path})"
    state = "" if result.content.get("complete", True) else ", cut short"
    date = str(result.content.get("datetime") or "")[:10]
    return f"**{_text(result.device)}**, {', '.join(filter(None, [_text(result.stack), date]))}{state}: {name}"


def headline(result: Results) -> list[str]:
    """The waterfall: one technique more on each line."""
    lines = []
    for title, steps in waterfalls(result).items():
        rows, first, before = [], next((step.row for step in steps if step.row), None), None
        for step in steps:
            row = step.row
            if row is None:
                rows.append([_text(step.name), f"not measured: {_text(step.reason)}", *[NO_VALUE] * 4])
                continue
            slower = before is not None and rr.verdict(before, row) == rr.SLOWER
            speed = rr.times(rr.speed(first, row))
            rows.append(
                [
                    _text(step.name),
                    rr.significant(pace(row)),
                    f"**{speed}, slower than the step before**" if slower else speed,
                    rr.memory(row.get("peak_bytes")),
                    rr.share(row.get("agreement")),
                    rr.points(row.get("miou")),
                ]
            )
            before = row
        heads = ["step", "images/s", "speed", "peak memory", "labels as fp32", "mIoU"]
        lines += ["", f"{_text(title)}:", "", *_table(heads, rows)]
        pictures = max((step.row.get("miou_pictures") or 0 for step in steps if step.row), default=0)
        if pictures:
            lines += ["", f"mIoU: the shipped model on {pictures:.0f} pictures of CamVid's test set."]
    return lines


def models(result: Results) -> list[str]:
    """Whole models, a line for each shape: images a second by provider, and how ours compares."""
    rows = []
    groups = rr.grouped(result.of("model"))
    for (_, label, dtype), group in list(groups.items())[:SHAPES]:
        ours = next((group.by_provider[name] for name in rr.OURS if name in group.by_provider), None)
        compiled = group.by_provider.get("compile")
        memories = [rr.memory(row.get("peak_bytes")) if row else NO_VALUE for row in (group.eager, ours)]
        rows.append(
            [
                _text(f"{label}, {dtype}"),
                rr.significant(pace(group.eager)),
                NO_VALUE if group.sdpa is None else f"{rr.significant(pace(group.sdpa))} ({group.sdpa.provider[5:]})",
                rr.significant(pace(compiled)),
                NO_VALUE if ours is None else f"{rr.significant(pace(ours))} ({ours.provider})",
                *(_against(base, ours) for base in (group.eager, group.sdpa, compiled)),
                f"{memories[0]} → {memories[1]}",
            ]
        )
    if not rows:
        return []
    heads = ["model", "eager", "best sdpa", "compile", "ours", "vs eager", "vs best sdpa", "vs compile", "peak memory"]
    more = len(groups) - len(rows)
    said = "Images a second; ours: triton where it runs, else pruned."
    if more:
        said += f" {rr.counted(more, 'more shape')} in the report."
    return ["", said, "", *_table(heads, rows)]


def _against(base: Row | None, row: Row | None) -> str:
    if base is None or row is None:
        return NO_VALUE
    speed = rr.times(rr.speed(base, row))
    return f"**{speed}, slower**" if rr.verdict(base, row) == rr.SLOWER else speed


def peers(result: Results) -> list[str]:
    """Other models measured here, beside published figures."""
    rows = []
    for peer in all_peers(result):
        gpu = f" ({_text(peer.said['gpu'])})" if peer.said.get("gpu") else ""
        speed = peer.published("im_s")
        rows.append(
            [
                f"**{_text(peer.name)}**" if peer.info.get("ours") is True else _text(peer.name),
                rr.significant(pace(peer.row)),
                NO_VALUE if speed is None else rr.significant(speed) + gpu,
                rr.points(peer.published("ss")),
                rr.points(peer.published("ms")),
                (peer.row and _text(rr.input_label(peer.row.info))) or NO_VALUE,
            ]
        )
    heads = ["model", "images/s here", "published images/s", "published mIoU", "published, multi-scale", "input here"]
    return ["", *_table(heads, rows)] if rows else []


BLOCKS: dict[str, tuple[Callable[[Results], list[str]], str]] = {
    "headline": (headline, "the waterfall"),
    "models": (models, "whole models"),
    "peers": (peers, "peers"),
}


def block(name: str, results: Sequence[Results], folder: Path) -> str:
    """One generated block for a README in `folder`."""
    make, what = BLOCKS[name]
    parts, without = [], []
    for result in results:
        lines = make(result)
        if lines:
            parts.append("\n".join([_measured_on(result, folder), *lines]))
        else:
            without.append(f"`{result.path.name}`")
    if without:
        parts.append(f"Not measured ({what}): {', '.join(without)}.")
    if not any(result.on_gpu for result in results):
        parts.append("No GPU figure has been measured yet.")
    return "\n\n".join(parts)


def replaced(text: str, results: Sequence[Results], folder: Path) -> str:
    """`text` with every marked block generated anew.

    Raises:
        MarkerError: there is no marker, one has an unknown name, or one has no partner.
    """
    found = [(match[1], match[2]) for match in MARKER.finditer(text)]
    if not found:
        names = ", ".join(BLOCKS)
        raise MarkerError(f"no marker <!-- bench:NAME:start --> ... <!-- bench:NAME:end -->, NAME one of {names}")
    unknown = [name for name, _ in found if name not in BLOCKS]
    if unknown:
        raise MarkerError(f"the marker bench:{unknown[0]} is unknown; there are {', '.join(BLOCKS)}")
    names = [name for name, _ in found[::2]]
    if found != [(name, end) for name in names for end in ("start", "end")] or len(set(names)) < len(names):
        raise MarkerError("every marker bench:NAME:start needs one bench:NAME:end after it, and each NAME occurs once")
    for name in names:
        start, end = (f"<!-- bench:{name}:{which} -->" for which in ("start", "end"))
        before, rest = text.split(start)
        text = f"{before}{start}\n{block(name, results, folder)}\n{end}{rest.split(end)[1]}"
    return text


def differing(old: str, new: str) -> list[str]:
    """Names of the blocks in which two texts differ."""

    def blocks(text: str) -> dict[str, str]:
        pattern = r"<!-- bench:([\w-]+):start -->(.*?)<!-- bench:\1:end -->"
        return dict(re.findall(pattern, text, re.DOTALL))

    a, b = blocks(old), blocks(new)
    return [name for name in b if a.get(name) != b[name]]


def comparison(found: Comparison) -> str:
    """Two files compared, for a terminal."""
    lines = [f"A  {found.before.path.name}: {found.before.device}, {found.before.stack}"]
    lines += [f"B  {found.after.path.name}: {found.after.device}, {found.after.stack}", ""]
    lines += [f"{fact}: {a} -> {b}" for fact, a, b in found.differences()]
    lines += [f"Note: {note}" for note in found.notes()]
    heads = ("kind", "model and picture", "provider", "type", "timed by", "A", "B", "B's speed", "spread", "B is")
    rows = [
        (
            pair.after.kind,
            pair.after.label,
            pair.after.provider,
            pair.after.dtype,
            pair.after.timing,
            rr.duration(pair.before.median),
            rr.duration(pair.after.median),
            rr.times(pair.speed),
            f"{rr.spread(pair.before)} {rr.spread(pair.after)}",
            pair.verdict,
        )
        for pair in found.pairs
    ]
    if rows:
        widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
        lines += ["", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *rows))]
    lines.append("")
    for kind, counts in found.counts().items():
        lines.append(f"{kind}: " + ", ".join(f"{count} {said}" for said, count in counts.items() if count))
    lines += [
        f"timed differently, not compared: {x.kind}, {x.label}, {x.provider}: {x.timing} and {y.timing}"
        for x, y in found.timed_differently
    ]
    for which, only in (("A", found.only_before), ("B", found.only_after)):
        lines += [f"{rr.counted(len(only), 'row')} only in {which}"] if only else []
    return "\n".join([*lines, RULE])


RULE = (
    "Rule: faster or slower only if the quartile boxes do not overlap and the ratio of medians is beyond 3 % and "
    "beyond both relative interquartile ranges together (root of the sum of squares)."
)
