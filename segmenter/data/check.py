"""Reads a whole data set and tells what is in it, and what is wrong with it."""

import contextlib
import functools
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.data.advice import advice, nothing_to_learn, value_counts
from segmenter.data.datasets import CUSTOM, Dataset, Source
from segmenter.data.label_files import DataError
from segmenter.data.layouts import Sample, in_short
from segmenter.inference.read_ahead import Call, ReadAhead, behind

T = TypeVar("T")

MUCH_IGNORED = 0.5  # a larger share of pixels that do not count is worth a warning


@dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        split: its name. samples: how many good and bad pairs there are. bad: what is wrong, one error a file.
        sizes: (width, height) -> images. pixels, images: (n_cls,) int64, the pixels of each class, and the images
        that hold it. ignored: pixels that do not count. empty: samples without any other pixel. image_labels: samples
        whose label file is their image. All these are of good samples alone. values: value in the label files ->
        pixels, of all that can be read.
    """

    split: str
    samples: int
    pixels: np.ndarray
    images: np.ndarray
    ignored: int = 0
    empty: int = 0
    image_labels: int = 0
    values: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    bad: list[DataError] = field(default_factory=list)

    def add(self, facts: "_Facts") -> None:
        """One sample more."""
        self.bad += facts.errors
        self.values.update(facts.values)
        if facts.errors:
            return
        of_classes = facts.counts[: len(self.pixels)]
        self.pixels += of_classes
        self.images += of_classes > 0
        self.ignored += int(facts.counts[-1])
        self.empty += not of_classes.any()
        self.image_labels += facts.image_label
        self.sizes[facts.size] += 1

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


@dataclass
class _Facts:
    """Of one sample. `values`: in the label file -> pixels, if it can be read; the rest only of a good sample.

    Attributes:
        size: (width, height). counts: pixels of each label 0..ignore_index. fingerprint: tells the image's bytes from
        others. image_label: the label file is the image once more.
    """

    errors: list[DataError] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    counts: np.ndarray | None = None
    fingerprint: tuple[int, int] = (0, 0)
    image_label: bool = False

    def tried(self, step: Callable[..., T], *args: Any) -> T | None:
        """What `step` gives; a DataError is noted."""
        try:
            return step(*args)
        except DataError as error:
            self.errors.append(error)
            return None


def glance(dataset: Dataset, n: int = 64, seconds: float = 10.0) -> list[str]:
    """What is odd about the values in `n` label files, evenly spread, as far as one gets in `seconds`; in words.

    Raises:
        DataError: it has looked at all label files, and nothing can be learned from them.
    """
    values, looked, end = Counter(), 0, time.monotonic() + seconds
    for sample in dataset.spread(n):
        if time.monotonic() > end:
            break
        looked += 1
        with contextlib.suppress(DataError):  # training tells of it
            values.update(value_counts(dataset.ids.read(sample.label)))
    where = f"{dataset.root}: split {dataset.split}, {looked} of {len(dataset)} label files looked at"
    texts = advice(values, dataset.ids, dataset.classes.names, dataset.key == CUSTOM)
    if looked == len(dataset) and nothing_to_learn(values, dataset.ids, dataset.n_cls):
        raise DataError(f"{where}: {'; '.join(texts)}", dataset.root)
    return [f"{where}: {text}" for text in texts]


def check_dataset(
    source: Source, splits: Sequence[str] | None = None, workers: int = 1, bar: bool = False
) -> CheckReport:
    """Reads every image and label. Files that are bad raise nothing: they are in the report.

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
    seen: dict[tuple[int, int], dict[Path, set[str]]] = defaultdict(dict)  # fingerprint -> image -> splits
    total = sum(len(dataset) for dataset, _ in listings)
    with tqdm(total=total, unit="image", file=sys.stderr, disable=not bar or None) as shown:
        for dataset, problems in listings:
            n_cls = dataset.n_cls
            report = SplitReport(dataset.split, len(dataset), np.zeros(n_cls, np.int64), np.zeros(n_cls, np.int64))
            report.bad += problems
            for sample, facts in zip(dataset.samples, _examine_all(dataset, workers), strict=True):
                shown.update()
                report.add(facts)
                if not facts.errors:
                    seen[facts.fingerprint].setdefault(sample.image, set()).add(_split_of(sample, dataset, source))
            reports.append(report)
    duplicates = tuple(tuple(places) for places in seen.values() if len(set().union(*places.values())) > 1)
    report = CheckReport(source.key, source.base, source.classes, tuple(reports), duplicates, ())
    return replace(report, warnings=tuple(_warnings(report, source)))


def _split_of(sample: Sample, dataset: Dataset, source: Source) -> str:
    """The split that it is in; of trainval, which is two, the one that its name begins with."""
    return dataset.split if len(source.splits[dataset.split]) == 1 else sample.name.split("/")[0]


def _examine_all(dataset: Dataset, workers: int) -> Iterator[_Facts]:
    with contextlib.closing(ReadAhead(workers)) as threads:
        calls = (threads.put(Call(functools.partial(_examine, dataset), sample)) for sample in dataset.samples)
        yield from map(threads.result, behind(calls, 2 * workers))


def _examine(dataset: Dataset, sample: Sample) -> _Facts:
    facts = _Facts()
    pixels = facts.tried(dataset.read_pixels, sample)
    values = facts.tried(dataset.ids.read, sample.label)
    labels = None
    if values is not None:
        facts.values = value_counts(values)
        labels = facts.tried(dataset.ids.to_labels, values, dataset.n_cls, sample.label)
    if pixels is None or labels is None:
        return facts
    facts.tried(dataset.check_sizes, sample, pixels, labels)
    data = sample.image.read_bytes()
    facts.size = pixels.shape[1], pixels.shape[0]
    facts.counts = np.bincount(labels.ravel(), minlength=dataset.ignore_index + 1)
    facts.fingerprint = zlib.crc32(data), len(data)
    facts.image_label = sample.label.stat().st_size == len(data) and sample.label.read_bytes() == data
    return facts


def _warnings(report: CheckReport, source: Source) -> Iterator[str]:
    if report.duplicates:
        groups = in_short(" = ".join(map(str, group)) for group in report.duplicates)
        yield f"same bytes in several splits, {len(report.duplicates)} times: {groups}"
    for split in report.splits:
        if (share := split.shares()[-1]) > MUCH_IGNORED:
            yield f"{split.split}: {100 * share:.0f} % of the pixels are ignored"
        if split.empty:
            yield f"{split.split}: {split.empty} label files hold ignored pixels alone"
        if split.image_labels:
            yield f"{split.split}: {split.image_labels} label files are the image itself once more, byte for byte"
    yield from _advice(report, source)
    for name, parts in source.splits.items():
        if len(parts) == 1 and os.path.isdir(parts[0].images) and not parts[0].exists():
            part = parts[0]
            lacking = part.labels if part.names is None or os.path.isfile(part.names) else part.names
            yield f"{name}: left out, there is {part.images} but no {lacking}"


def _advice(report: CheckReport, source: Source) -> Iterator[str]:
    """What is odd about the values of all splits together, and of single ones."""
    of_source = source.ids, report.classes.names, source.key == CUSTOM
    told = advice(sum((split.values for split in report.splits), Counter()), *of_source)
    yield from told
    for split in report.splits:
        texts = advice(split.values, *of_source, whole=False)
        yield from (f"{split.split}: {text}" for text in texts if text not in told)
