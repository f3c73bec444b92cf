"""`segmenter data check`: what is in a data set, and every file of it that cannot be used."""

import argparse
import json
import math
from typing import Any

from segmenter.cli.errors import OK, SOME_FAILED, CommandError
from segmenter.cli.output import err, out
from segmenter.data.check import CheckReport, SplitReport, check_dataset
from segmenter.data.datasets import find_source
from segmenter.data.label_files import DataError
from segmenter.inference.read_ahead import usual_workers


def run(args: argparse.Namespace) -> int:
    workers = args.workers or usual_workers()
    try:
        report = check_dataset(find_source(args.root, args.kind, args.classes), args.split, workers, bar=True)
    except DataError as error:
        raise CommandError(str(error)) from error
    for error in report.bad:
        err(f"segmenter: bad: {' '.join(str(error).split())}")
    for warning in report.warnings:
        err(f"segmenter: warning: {warning}")
    out(*(json.dumps(facts(report), indent=2).splitlines() if args.json else lines(report)))
    return SOME_FAILED if report.bad else OK


def facts(report: CheckReport) -> dict[str, Any]:
    """The report as it is written in JSON."""
    return {
        "kind": report.key,
        "folder": str(report.root),
        "n_cls": len(report.classes),
        "splits": {split.split: _split_facts(split, report) for split in report.splits},
        "never": [report.classes.names[i] for i in report.never()],
        "duplicates": [list(map(str, group)) for group in report.duplicates],
        "warnings": list(report.warnings),
    }


def _split_facts(split: SplitReport, report: CheckReport) -> dict[str, Any]:
    *shares, ignored = (None if math.isnan(share) else share for share in split.shares().tolist())  # JSON has no NaN
    rows = zip(report.classes.names, split.pixels.tolist(), shares, split.images.tolist(), strict=True)
    return {
        "samples": split.samples,
        "sizes": [{"width": w, "height": h, "pictures": n} for (w, h), n in split.sizes.most_common()],
        "classes": [
            {"id": i, "name": name, "pixels": pixels, "share": share, "pictures": images}
            for i, (name, pixels, share, images) in enumerate(rows)
        ],
        "ignored": {"pixels": split.ignored, "share": ignored},
        "bad": [{"file": str(error.file), "error": str(error)} for error in split.bad],
    }


def lines(report: CheckReport) -> list[str]:
    """The report as text; its table has each class's share of all pixels, and the number of images that hold it."""
    width = max(len(name) for name in ("ignored", *report.classes.names))
    text = [f"{report.key} in {report.root}, {len(report.classes)} classes"]
    for split in report.splits:
        text.append(f"{split.split}: {split.samples} samples, {len(split.bad)} bad files, {_sizes(split)}")
    text.append(f"{'':>4} {'':<{width}}" + "".join(f"{split.split:>11} %{'images':>10}" for split in report.splits))
    shares = [split.shares() for split in report.splits]
    for i, name in enumerate([*report.classes.names, "ignored"]):
        counts = [split.images[i] if i < len(report.classes) else "" for split in report.splits]
        cells = (f"{100 * share[i]:>13.3f}{count:>10}" for share, count in zip(shares, counts, strict=True))
        text.append(f"{i if i < len(report.classes) else '':>4} {name:<{width}}{''.join(cells)}".rstrip())
    if never := report.never():
        text.append(f"never occur: {', '.join(report.classes.names[i] for i in never)}")
    return text


def _sizes(split: SplitReport) -> str:
    """How many sizes there are, and the most frequent, the smallest and the largest of them."""
    if not split.sizes:
        return "nothing readable"
    (usual, count), *others = split.sizes.most_common()
    if not others:
        return f"all {_size(usual)}"
    low, high = (end(split.sizes, key=math.prod) for end in (min, max))
    return f"{len(split.sizes)} sizes: {_size(usual)} {count} times, from {_size(low)} to {_size(high)}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
