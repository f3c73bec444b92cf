"""The records of an evaluation when their files are other than they were left."""

import os

import numpy as np
import pytest

from segmenter.cli import records
from segmenter.cli.records import Records, sample_facts
from segmenter.data.datasets import open_dataset
from segmenter.evaluation.evaluate import Counts
from tests.support.data_sets import make_data_set


@pytest.fixture
def dataset(tmp_path):
    make_data_set(tmp_path / "data", n=3)
    return open_dataset(str(tmp_path / "data"), "val")


def of_rank(dataset, tmp_path, rank=0):
    return Records(tmp_path / "out", dataset, False, {}, rank, 2, keep=True)


def add(kept, dataset, i):
    counts = Counts(dataset.n_cls, dataset.ignore_index, False)
    counts.update(np.full((2, 2), i), np.full((2, 2), i))
    kept.add(dataset.samples[i], sample_facts(dataset.samples[i]), counts)


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_a_line_that_was_cut_off_is_dropped(dataset, tmp_path, monkeypatch, block):
    monkeypatch.setattr(records, "_BLOCK", block)
    kept = of_rank(dataset, tmp_path)
    for i in (0, 1):
        add(kept, dataset, i)
    path = kept.directory / "rank-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"settings": "')
    kept = of_rank(dataset, tmp_path)
    assert path.read_bytes() == whole
    add(kept, dataset, 2)
    total, names = kept.total()
    assert (total.images, len(names)) == (3, 3)
    path.write_bytes(b"no line at all")
    of_rank(dataset, tmp_path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"[" * 100_000, b"[]", b'{"sample": []}', b"\xff", b"9" * 5000, b"null"])
def test_lines_that_are_no_records_are_of_no_use(dataset, tmp_path, line):
    kept = of_rank(dataset, tmp_path)
    add(kept, dataset, 0)
    with (kept.directory / "rank-1.jsonl").open("wb") as file:
        file.write(line + b"\n")
    assert kept.done() == ({dataset.samples[0].name}, 1)


def test_links_are_not_written_through_and_pipes_not_waited_for(dataset, tmp_path):
    (tmp_path / "out/records").mkdir(parents=True)
    (tmp_path / "precious").write_text("no line feed")
    (tmp_path / "out/records/rank-0.jsonl").symlink_to(tmp_path / "precious")
    add(of_rank(dataset, tmp_path), dataset, 0)
    assert (tmp_path / "precious").read_text() == "no line feed"
    os.mkfifo(tmp_path / "out/records/rank-1.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        of_rank(dataset, tmp_path, rank=1)
    with pytest.raises(OSError, match="no regular file"):
        of_rank(dataset, tmp_path).total()
