"""Result files as one page, as the README's tables, and compared with each other.

python -m bench.report RESULTS.json --out report.html          one page that needs nothing else, also on a phone
python -m bench.report A.json B.json --out report.html         B is compared with A, then both in full
python -m bench.report A.json B.json --text                    the comparison only, in the terminal
python -m bench.report GPU.json CPU.json --readme README.md    writes the tables between the README's markers
python -m bench.report GPU.json CPU.json --readme README.md --check      exit 1 if they are not what the files give

A difference between two files counts only beyond their spread: see bench/report_rows.py for the rule. Needs nothing but
Python's own library.
"""

import argparse
import os
import sys
from pathlib import Path

from bench import report_markdown
from bench.report_figures import waterfall_svg, waterfalls
from bench.report_page import report
from bench.report_rows import Results, compare, read
from bench.report_svg import standalone
from bench.results import ResultsError


def write(path: Path, text: str) -> None:
    """Writes a temporary file beside `path` and renames it: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
        for title, steps in waterfalls(result).items():
            return standalone(waterfall_svg(f"{title} · {result.device}", steps))
    raise ResultsError("no waterfall in these files")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, metavar="report.html", help="the page")
    parser.add_argument("--readme", type=Path, metavar="README.md", help="file whose marked blocks are generated")
    parser.add_argument("--waterfall-svg", type=Path, metavar="PATH", help="the waterfall as an image for the README")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if --readme or the image is not as given"
    )
    parser.add_argument("--text", action="store_true", help="print the comparison of two files")
    args = parser.parse_args(argv)
    if not (args.out or args.readme or args.waterfall_svg or args.text):
        parser.error("say what to make: --out, --readme, --waterfall-svg or --text")
    if args.text and len(args.results) != 2:
        parser.error("--text compares two files")
    if args.check and not (args.readme or args.waterfall_svg):
        parser.error("--check needs --readme or --waterfall-svg")
    inputs = {path.resolve() for path in args.results}
    if inputs & {path.resolve() for path in (args.out, args.readme, args.waterfall_svg) if path}:
        parser.error("a results file would be written over")
    return args


def run(args: argparse.Namespace) -> int:
    """Does what was asked; returns the exit status.

    Raises:
        ResultsError, MarkerError, OSError: something cannot be used; the message says what.
    """
    results, stale = [read(path) for path in args.results], []
    made: list[tuple[Path, str]] = []
    if args.readme:
        old = args.readme.read_text(encoding="utf-8")
        try:
            new = report_markdown.replaced(old, results, args.readme.parent)
        except report_markdown.MarkerError as error:
            raise report_markdown.MarkerError(f"{args.readme}: {error}") from None
        stale += [f"{args.readme}, block {name}" for name in report_markdown.differing(old, new)]
        made.append((args.readme, new))
    if args.waterfall_svg:
        image = waterfall(results)
        if not args.waterfall_svg.exists() or args.waterfall_svg.read_text(encoding="utf-8") != image:
            stale.append(str(args.waterfall_svg))
        made.append((args.waterfall_svg, image))
    if args.text:
        print(report_markdown.comparison(compare(*results)))
    if args.check:
        for what in stale:
            print(f"{what}: not what the result files give; generate it with python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    if args.out:
        made.append((args.out, report(results, [link_to(path, args.out) for path in args.results])))
    for path, text in made:
        write(path, text)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ResultsError, report_markdown.MarkerError, OSError) as error:
        print(f"python -m bench.report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
