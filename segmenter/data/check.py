"""Reads a whole data set and tells what is in it, and what is wrong with it."""

import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.data.datasets import OWN, Dataset, Source
from segmenter.data.labels import DataError
from segmenter.data.layouts import Sample, in_short

MUCH_IGNORED = 0.5  # a larger share of pixels that do not count is worth a warning


@dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        split: its name. samples: how many good and bad pairs there are. bad: what is wrong, one error a file.
        sizes: (width, height) -> pictures. pixels, pictures: (n_cls,) int64, the pixels of each class, and the pictures
        that hold it. ignored: pixels that do not count. These four are of good samples alone.
    """

    split: str
    samples: int
    pixels: np.ndarray
    pictures: np.ndarray
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    bad: list[DataError] = field(default_factory=list)

    def shares(self) -> np.ndarray:
        """(n_cls + 1,) float64: shares of all pixels, of each class and of what is ignored; NaN if there are none."""
        counts = np.append(self.pixels, self.ignored)
        with np.errstate(invalid="ignore"):
            return counts / counts.sum()


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds.

    Attributes:
        splits: one report each. duplicates: files of the same bytes in different splits, as groups.
        warnings: what is no error but worth a look, in words.
    """

    key: str
    root: Path
    classes: ClassSet
    splits: tuple[SplitReport, ...]
    duplicates: tuple[tuple[Path, ...], ...]
    warnings: tuple[str, ...]

    @property
    def bad(self) -> list[DataError]:
        """Of all splits."""
        return [error for report in self.splits for error in report.bad]

    def never(self) -> list[int]:
        """The classes that occur in no split."""
        return np.flatnonzero(sum(report.pixels for report in self.splits) == 0).tolist()


@dataclass(frozen=True)
class _Facts:
    """Of one sample: (width, height), pixels of each label 0..ignore_index, and what tells its bytes from others."""

    size: tuple[int, int]
    counts: np.ndarray
    fingerprint: tuple[int, int]


def check_dataset(
    source: Source, splits: Sequence[str] | None = None, workers: int = 1, bar: bool = False
) -> CheckReport:
    """Reads every picture and label. Files that are bad raise nothing: they are in the report.

    Args:
        source: what `find_source` found. splits: their names; None: all that are there.
        workers: threads that read. bar: show a progress bar on stderr if that is a terminal.
    Raises:
        DataError: no such split, or an empty one.
    """
    names = source.present() if splits is None else list(dict.fromkeys(splits))
    if not names:
        raise DataError(f"{source.base}: none of the splits {', '.join(source.splits)} is there", source.base)
    listings = [source.listing(name) for name in names]
    reports = []
    seen: dict[tuple[int, int], dict[Path, str]] = defaultdict(dict)  # fingerprint -> picture -> split
    total = sum(len(dataset) for dataset, _ in listings)
    with tqdm(total=total, unit="picture", file=sys.stderr, disable=not bar or None) as shown:
        for dataset, problems in listings:
            n_cls = dataset.n_cls
            report = SplitReport(dataset.split, len(dataset), np.zeros(n_cls, np.int64), np.zeros(n_cls, np.int64))
            report.bad += problems
            for sample, facts in zip(dataset.samples, _examine_all(dataset, workers), strict=True):
                shown.update()
                if isinstance(facts, list):
                    report.bad += facts
                else:
                    _add(report, facts)
                    seen[facts.fingerprint].setdefault(sample.image, dataset.split)
            reports.append(report)
    duplicates = tuple(tuple(places) for places in seen.values() if len(set(places.values())) > 1)
    report = CheckReport(source.key, source.base, source.classes, tuple(reports), duplicates, ())
    return replace(report, warnings=tuple(_warnings(report, source)))


def _examine_all(dataset: Dataset, workers: int) -> Iterator[_Facts | list[DataError]]:
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda sample: _examine(dataset, sample), dataset.samples)
        finally:  # after Ctrl-C, do not read what is still queued
            pool.shutdown(wait=False, cancel_futures=True)


def _examine(dataset: Dataset, sample: Sample) -> _Facts | list[DataError]:
    try:
        pixels, labels = dataset.read(sample)
        data = sample.image.read_bytes()
    except DataError as error:
        return [error, *_label_error(dataset, sample, error)]
    counts = np.bincount(labels.ravel(), minlength=dataset.ignore_index + 1)
    return _Facts((pixels.shape[1], pixels.shape[0]), counts, (zlib.crc32(data), len(data)))


def _label_error(dataset: Dataset, sample: Sample, first: DataError) -> Iterator[DataError]:
    """What is wrong with the label as well, if `first` is about the picture."""
    if first.file != sample.label:
        try:
            dataset.read_labels(sample)
        except DataError as error:
            yield error


def _add(report: SplitReport, facts: _Facts) -> None:
    of_classes = facts.counts[: len(report.pixels)]
    report.pixels += of_classes
    report.pictures += of_classes > 0
    report.ignored += int(facts.counts[-1])
    report.sizes[facts.size] += 1


def _warnings(report: CheckReport, source: Source) -> Iterator[str]:
    if report.duplicates:
        groups = in_short(" = ".join(map(str, group)) for group in report.duplicates)
        yield f"same bytes in several splits, {len(report.duplicates)} times: {groups}"
    for split in report.splits:
        if (share := split.shares()[-1]) > MUCH_IGNORED:
            yield f"{split.split}: {100 * share:.0f} % of the pixels are ignored"
    last, never = len(report.classes) - 1, report.never()
    if source.key != OWN or len(never) == len(report.classes):
        return
    if 0 in never and not source.ids.reduce_zero:
        yield "class 0 never occurs: if 0 is no class in the label files and 1 the first one, say reduce_zero: true"
    if last in never and source.ids.reduce_zero:
        yield f"class {last} never occurs: if 0 is a class in the label files, say reduce_zero: false"
