"""Result files as one page, as the READMEs' tables, and compared with each other.

python -m bench.report RESULTS.json --out report.html          one page that needs nothing else, also on a phone
python -m bench.report A.json B.json --out report.html         B is compared with A, then both in full
python -m bench.report A.json B.json --text                    the comparison only, in the terminal
python -m bench.report GPU.json CPU.json --readme              writes the tables between the markers of README.md and
                                                               bench/results/README.md, or of the files that are named
python -m bench.report GPU.json CPU.json --readme --check      exit 1 if they are not what the files give

A difference between two files counts only beyond their spread: see bench/report_rows.py for the rule.
"""

import argparse
import os
import sys
from pathlib import Path

from bench import report_readme
from bench import report_rows as rr
from bench import report_sections as sections
from bench import report_tables as tables
from bench.report_readme import MarkerError
from bench.report_rows import Comparison, Results
from bench.results import ResultsError
from segmenter.files import write_text

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "bench" / "results" / "README.md"]


def link_to(target: Path, page: Path) -> str | None:
    """`target` as seen from the page, if it lies below the page's folder or in the same checkout; else None.

    Any other path would tell the folders of this machine.
    """
    target, folder = target.resolve(), page.resolve().parent
    common = Path(os.path.commonpath([target, folder]))
    if common != folder and not (common / "pyproject.toml").exists():
        return None
    return os.path.relpath(target, folder).replace(os.sep, "/")


def waterfall(results: list[Results]) -> str:
    """The first waterfall there is, as an image for the README.

    Raises:
        ResultsError: no file has one.
    """
    for result in results:
        for title, steps in tables.waterfalls(result).items():
            return sections.waterfall_svg(f"{title} · {result.device}", steps)
    raise ResultsError("no waterfall in these files")


def comparison(found: Comparison) -> str:
    """Two files compared, for a terminal."""
    notes = [f"Note: {note}" for note in found.notes()]
    return "\n".join([*notes, tables.pairs(found).plain() + "\n" if found.pairs else "", *found.facts(), rr.RULE])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, metavar="report.html", help="the page")
    parser.add_argument("--readme", type=Path, nargs="*", metavar="README.md", help="files with generated blocks")
    parser.add_argument("--waterfall-svg", type=Path, metavar="PATH", help="the waterfall as an image for the README")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if --readme or the image is not as given"
    )
    parser.add_argument("--text", action="store_true", help="print the comparison of two files")
    args = parser.parse_args(argv)
    args.readme = READMES if args.readme == [] else args.readme or []
    if not (args.out or args.readme or args.waterfall_svg or args.text):
        parser.error("say what to make: --out, --readme, --waterfall-svg or --text")
    if args.text and len(args.results) != 2:
        parser.error("--text compares two files")
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
    results, stale = [Results(path) for path in args.results], []
    made: list[tuple[Path, str]] = []
    for path in args.readme:
        old = path.read_text(encoding="utf-8")
        try:
            new = report_readme.replaced(old, results, path.parent)
        except MarkerError as error:
            raise MarkerError(f"{path}: {error}") from None
        stale += [f"{path}, block {name}" for name in report_readme.differing(old, new)]
        made.append((path, new))
    if args.waterfall_svg:
        image = waterfall(results)
        if not args.waterfall_svg.exists() or args.waterfall_svg.read_text(encoding="utf-8") != image:
            stale.append(str(args.waterfall_svg))
        made.append((args.waterfall_svg, image))
    if args.text:
        print(comparison(rr.compare(*results)))
    if args.check:
        for what in stale:
            print(f"{what}: not what the result files give; generate it with python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    if args.out:
        made.append((args.out, sections.report(results, [link_to(path, args.out) for path in args.results])))
    for path, text in made:
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
