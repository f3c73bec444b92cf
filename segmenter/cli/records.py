"""What `segmenter eval` has counted, a line of JSON an image: so that a run can go on, and processes can be summed.

Each process appends to a file of its own, so no two write to one. A process that is killed while writing leaves at most
one line that is cut off; it is dropped.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segmenter.cli.resume import image_facts
from segmenter.data.datasets import Dataset, Sample
from segmenter.evaluation.evaluate import Counts
from segmenter.files import append, open_regular
from segmenter.text_files import parse_json

DIRECTORY = "records"
_MAX_LINE, _BLOCK = 100_000_000, 1 << 16  # bytes: an image's counts of thousands of classes; read at once
_NAME = re.compile(r"rank-(\d+)\.jsonl")

Facts = list[dict[str, int] | None]


def sample_facts(sample: Sample) -> Facts:
    """What tells whether image and label file are still the same."""
    return [image_facts(sample.image), image_facts(sample.label)]


class Records:
    """The records of one evaluation, below its output folder.

    Args:
        dataset: what is evaluated. boundary: whether boundaries are counted. settings: all else that the counts depend
            on besides image and label file, as JSON; records of other settings are left alone.
        rank, world: this process and how many. keep: the records that are there stay; else they are removed.
    """

    def __init__(
        self, output: Path, dataset: Dataset, boundary: bool, settings: Any, rank: int, world: int, keep: bool
    ):
        self._dataset, self._boundary = dataset, boundary
        self._samples = {sample.name: sample for sample in dataset.samples}
        self._settings = f"{zlib.crc32(json.dumps([settings, boundary], sort_keys=True).encode()):08x}"
        self.directory = output / DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        if not keep:  # each process removes its own, the first one also those of processes that are no more
            for number, path in self._files():
                if number == rank or (rank == 0 and number >= world):
                    path.unlink()
        self._path = self.directory / f"rank-{rank}.jsonl"
        if self._path.is_symlink():
            self._path.unlink()
        elif self._path.exists():
            os.truncate(self._path, _end_of_whole_lines(self._path))

    def add(self, sample: Sample, facts: Facts, counts: Counts) -> None:
        """Appends one image; `facts` are those from before it was read."""
        record = {"settings": self._settings, "sample": sample.name, "facts": facts, "counts": counts.to_json()}
        append(self._path, json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def done(self) -> tuple[set[str], int]:
        """Names of the samples that need not be done again, and how many records are of no use any more."""
        names = [name for name, _ in self._read()]
        return {name for name in names if name}, names.count(None)

    def total(self) -> tuple[Counts, set[str]]:
        """The sum over the samples of the data set, each once, and the names of those that it holds."""
        total, names = self._no_counts(), set()
        for name, counts in self._read():
            if name is not None and name not in names:
                total.merge(counts)
                names.add(name)
        return total, names

    def _read(self) -> Iterator[tuple[str | None, Counts | None]]:
        """(sample's name, counts) of each record of all processes; (None, None): cut off, or it does not fit."""
        for _, path in self._files():
            with open_regular(path) as file:
                while line := file.readline(_MAX_LINE):
                    try:
                        record = parse_json(line)
                        sample = self._samples[record["sample"]]
                        if (record["settings"], record["facts"]) != (self._settings, sample_facts(sample)):
                            raise ValueError
                        counts = self._no_counts()
                        counts.add_json(record["counts"])
                    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
                        yield None, None
                    else:
                        yield sample.name, counts

    def _no_counts(self) -> Counts:
        return Counts(self._dataset.n_cls, self._dataset.ignore_index, self._boundary)

    def _files(self) -> list[tuple[int, Path]]:
        paths = {int(match[1]): path for path in self.directory.iterdir() if (match := _NAME.fullmatch(path.name))}
        return sorted(paths.items())


def _end_of_whole_lines(path: Path) -> int:
    """Length of a file without a last line that was cut off."""
    with open_regular(path) as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(end - _BLOCK, 0)
            file.seek(begin)
            if (found := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + found + 1
            end = begin
    return 0
