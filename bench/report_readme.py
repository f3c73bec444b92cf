"""The generated tables of README.md and bench/results/README.md, between their markers.

    <!-- bench:headline:start --> ... <!-- bench:headline:end -->

What stands between the markers is replaced, nothing else is touched. README.md has short tables: `headline`, at most
ten steps of the first waterfall, and `models`, five whole models; `waterfalls`, `all-models` and `peers` are long.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench import report_rows as rr
from bench import report_tables as tables
from bench.report_page import Table, markdown_text
from bench.report_rows import Results

ROOT = Path(__file__).resolve().parents[1]
LONG_TABLES = "bench/results/README.md"
MARKER = re.compile(r"<!-- bench:([\w-]+):(start|end) -->")


class MarkerError(ValueError):
    """A README's markers are missing or wrong; the message says how."""


def _relative(path: Path, folder: Path) -> str:
    """`path` as a link in a file of `folder` says it."""
    return os.path.relpath(path.resolve(), folder.resolve()).replace(os.sep, "/")


def _shortened(table: Table, folder: Path, most: int | None, what: str) -> list[str]:
    """The table, or its first lines and how many more there are: a link where `folder` is in this checkout."""
    more, where = len(table.lines[most:]) if most else 0, LONG_TABLES
    if folder.resolve().is_relative_to(ROOT):
        where = f"[{LONG_TABLES}]({_relative(ROOT / LONG_TABLES, folder)})"
    said = [f"{rr.counted(more, f'more {what}')} in {where}."] if more else []
    return [Table(table.caption, table.columns, table.lines[:most]).markdown(), *said]


def waterfalls(result: Results, folder: Path, count: int | None = None, most: int | None = None) -> list[str]:
    """One technique more on each line: so many waterfalls of so many steps, or all."""
    parts, columns = [], ("step", "images/s", "vs first", "vs step before", "peak memory", "labels as fp32", "mIoU")
    for title, steps in list(tables.waterfalls(result).items())[:count]:
        table = tables.waterfall(title, steps).only(*columns)
        parts += [f"{markdown_text(title)}:", *_shortened(table, folder, most, "step")]
        images = max((step.row.get("miou_pictures") or 0 for step in steps if step.row), default=0)
        parts += [f"mIoU: the shipped model on {images:.0f} images of CamVid's test set."] if images else []
    return parts


def models(result: Results, folder: Path, most: int | None = None) -> list[str]:
    """Whole models, the most telling ones first."""
    table = tables.models(result)
    said = "Images a second; ours: triton where it runs, else pruned."
    return [said, *_shortened(table, folder, most, "shape")] if table.lines else []


def peers(result: Results, _folder: Path) -> list[str]:
    """Other models measured here, beside published figures."""
    table = tables.peers(result).only(
        "model", "images/s here", "published images/s", "published mIoU", "published, multi-scale", "input here"
    )
    return [table.markdown()] if table.lines else []


BLOCKS: dict[str, tuple[Callable[..., list[str]], str]] = {
    "headline": (partial(waterfalls, count=1, most=10), "the waterfall"),
    "waterfalls": (waterfalls, "the waterfall"),
    "models": (partial(models, most=5), "whole models"),
    "all-models": (models, "whole models"),
    "peers": (peers, "peers"),
}


def _measured_on(result: Results, folder: Path) -> str:
    """Machine, stack and file in a line: every figure of a README names them."""
    path = _relative(result.path, folder)
    name = f"`{result.path.name}`" if path.startswith("..") else f"[{result.path.name}]({path})"
    state = "" if result.content.get("complete", True) else ", cut short"
    date = str(result.content.get("datetime") or "")[:10]
    stack = ", ".join(filter(None, [markdown_text(result.stack), date]))
    return f"**{markdown_text(result.device)}**, {stack}{state}: {name}"


def block(name: str, results: Sequence[Results], folder: Path) -> str:
    """One generated block for a README in `folder`."""
    make, what = BLOCKS[name]
    made = {result.path: make(result, folder) for result in results}
    parts = [
        part for result in results if made[result.path] for part in (_measured_on(result, folder), *made[result.path])
    ]
    without = [f"`{path.name}`" for path, found in made.items() if not found]
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
    return _BLOCK.sub(lambda old: f"{old[1]}\n{block(old[2], results, folder)}\n{old[4]}", text)


_BLOCK = re.compile(r"(<!-- bench:([\w-]+):start -->)(.*?)(<!-- bench:\2:end -->)", re.DOTALL)


def differing(old: str, new: str) -> list[str]:
    """Names of the blocks in which two texts differ."""
    a, b = ({found[2]: found[3] for found in _BLOCK.finditer(text)} for text in (old, new))
    return [name for name in b if a.get(name) != b[name]]
