"""Result files as one page, as the READMEs' tables, and compared with each other.

python -m bench.report RESULTS.json --out report.html          one page that needs nothing else, also on a phone
python -m bench.report A.json B.json --out report.html         B is compared with A, then both in full
python -m bench.report A.json B.json --text                    the comparison only, in the terminal
python -m bench.report GPU.json CPU.json --readme              writes the tables between the markers of README.md and
                                                               bench/results/README.md, or of the files that are named
python -m bench.report GPU.json CPU.json --readme --check      exit 1 if they are not what the files give

A difference between two files counts only beyond their spread: see bench/report_rows.py for the rule. Markers are
<!-- bench:NAME:start --> and <!-- bench:NAME:end -->. README.md has short tables: `headline`, at most ten steps of the
first waterfall, and `models`, five whole models; `waterfalls`, `all-models` and `peers` are long.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import report_rows as rr
from bench import report_sections as sections
from bench import report_tables as tables
from bench.report_page import Table, markdown_text
from bench.report_rows import Results
from bench.results import ResultsError
from segmenter.files import write_text

ROOT = Path(__file__).resolve().parents[1]
LONG_TABLES = "bench/results/README.md"
READMES = [ROOT / "README.md", ROOT / LONG_TABLES]
MARKED = re.compile(r"(<!-- bench:([\w-]+):start -->)(.*?)(<!-- bench:\2:end -->)", re.DOTALL)


class MarkerError(ValueError):
    """A README's markers are missing or wrong; the message says how."""


def relative(path: Path, folder: Path) -> str:
    """`path` as a link in a file of `folder` says it."""
    return os.path.relpath(path.resolve(), folder.resolve()).replace(os.sep, "/")


def _shortened(table: Table, folder: Path, most: int | None, what: str) -> list[str]:
    """The table, or its first lines and how many more there are: a link where `folder` is in this checkout."""
    more, where = len(table.lines[most:]) if most else 0, LONG_TABLES
    if folder.resolve().is_relative_to(ROOT):
        where = f"[{LONG_TABLES}]({relative(ROOT / LONG_TABLES, folder)})"
    said = [f"{rr.counted(more, f'more {what}')} in {where}."] if more else []
    return [table._replace(lines=table.lines[:most]).markdown(), *said]


def waterfalls(result: Results, folder: Path, count: int | None = None, most: int | None = None) -> list[str]:
    """One technique more on each line: so many waterfalls of so many steps, or all."""
    parts, columns = [], ("step", "images/s", "vs first", "vs step before", "peak memory", "labels as fp32", "mIoU")
    for title, steps in list(result.waterfalls().items())[:count]:
        table = tables.waterfall(title, steps).only(*columns)
        parts += [f"{markdown_text(title)}:", *_shortened(table, folder, most, "step")]
        images = max(row.get("miou_pictures") or 0 for row in steps)
        parts += [f"mIoU: the shipped model on {images:.0f} images of CamVid's test set."] if images else []
    return parts


def models(result: Results, folder: Path, most: int | None = None) -> list[str]:
    """Whole models, the most telling ones first."""
    table = tables.models(result)
    said = "Images a second; ours: triton where it runs, else pruned."
    return [said, *_shortened(table, folder, most, "shape")] if table.lines else []


def peers(result: Results, _folder: Path) -> list[str]:
    """Other models measured here, beside published figures."""
    columns = ("model", "images/s here", "published images/s", "published mIoU", "published, multi-scale", "input here")
    table = tables.peers(result).only(*columns)
    return [table.markdown()] if table.lines else []


BLOCKS = {
    "headline": (partial(waterfalls, count=1, most=10), "the waterfall"),
    "waterfalls": (waterfalls, "the waterfall"),
    "models": (partial(models, most=5), "whole models"),
    "all-models": (models, "whole models"),
    "peers": (peers, "peers"),
}


def _measured_on(result: Results, folder: Path) -> str:
    """Machine, stack and file in a line: every figure of a README names them."""
    path = relative(result.path, folder)
    name = f"`{result.path.name}`" if path.startswith("..") else f"[{result.path.name}]({path})"
    state = "" if result.content.get("complete", True) else ", cut short"
    date = str(result.content.get("datetime") or "")[:10]
    stack = ", ".join(filter(None, [markdown_text(result.stack), date]))
    return f"**{markdown_text(result.device)}**, {stack}{state}: {name}"


def block(name: str, results: Sequence[Results], folder: Path) -> str:
    """One generated block for a README in `folder`."""
    (make, what), parts, without = BLOCKS[name], [], []
    for result in results:
        if made := make(result, folder):
            parts += [_measured_on(result, folder), *made]
        else:
            without.append(f"`{result.path.name}`")
    if without:
        parts.append(f"Not measured ({what}): {', '.join(without)}.")
    if not any(result.on_gpu for result in results):
        parts.append("No GPU figure has been measured yet.")
    return "\n\n".join(parts)


def replaced(path: Path, results: Sequence[Results]) -> str:
    """The text of a README with every marked block generated anew.

    Raises:
        MarkerError: there is no marker, one has an unknown name, or one has no partner.
    """
    text = path.read_text(encoding="utf-8")
    names = [found[2] for found in MARKED.finditer(text)]
    if not names or len(set(names)) < len(names) or text.count("<!-- bench:") != 2 * len(names):
        raise MarkerError(f"{path} needs pairs <!-- bench:NAME:start --> <!-- bench:NAME:end -->, each NAME once")
    if unknown := set(names) - set(BLOCKS):
        raise MarkerError(f"{path}: no block is called {', '.join(sorted(unknown))}; there are {', '.join(BLOCKS)}")
    return MARKED.sub(lambda old: f"{old[1]}\n{block(old[2], results, path.parent)}\n{old[4]}", text)


def differing(path: Path, new: str) -> list[str]:
    """The blocks in which a file is not `new`, or the whole file."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, after = ({found[2]: found[3] for found in MARKED.finditer(text)} for text in (old, new))
    return [f"{path}, block {name}" for name in after if before.get(name) != after[name]] or [str(path)] * (old != new)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="RESULTS.json")
    add("--out", type=Path, metavar="report.html", help="the page")
    add("--readme", type=Path, nargs="*", metavar="README.md", help="files with generated blocks")
    add("--waterfall-svg", type=Path, metavar="PATH", help="the waterfall as an image for the README")
    add("--check", action="store_true", help="write nothing; exit 1 if --readme or the image is not as given")
    add("--text", action="store_true", help="print the comparison of two files")
    args = parser.parse_args(argv)
    args.readme = READMES if args.readme == [] else args.readme or []
    if not (args.out or args.readme or args.waterfall_svg or args.text):
        parser.error("say what to make: --out, --readme, --waterfall-svg or --text")
    if args.text and len(args.results) != 2:
        parser.error("--text compares two files")
    if args.out and len(args.results) > 2:
        parser.error("--out shows one file, or two compared")
    if args.check and not (args.readme or args.waterfall_svg):
        parser.error("--check needs --readme or --waterfall-svg")
    inputs = {path.resolve() for path in args.results}
    if inputs & {path.resolve() for path in (args.out, *args.readme, args.waterfall_svg) if path}:
        parser.error("a results file would be written over")
    return args


def run(args: argparse.Namespace) -> int:
    """Does what was asked; returns the exit status.

    Raises:
        ResultsError, MarkerError, OSError: something cannot be used; the message says what.
    """
    results, made = [Results(path) for path in args.results], {}
    made |= {path: replaced(path, results) for path in args.readme}
    if args.waterfall_svg:
        found = [(result, *one) for result in results for one in result.waterfalls().items()]
        if not found:
            raise ResultsError("no waterfall in these files")
        result, title, steps = found[0]
        made[args.waterfall_svg] = sections.waterfall_svg(f"{title} · {result.device}", steps)
    if args.text:
        found = rr.Comparison(*results)
        table = [tables.pairs(found).markdown()] if found.pairs else []
        print(*found.notes(), *table, "\n".join(found.facts()), rr.RULE, sep="\n\n")
    if args.check:
        stale = [what for path, text in made.items() for what in differing(path, text)]
        for what in stale:
            print(f"{what}: not what the result files give; generate it with python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    if args.out:
        made[args.out] = sections.report(results)
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ResultsError, MarkerError, OSError) as error:
        print(f"python -m bench.report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
