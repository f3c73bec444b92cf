"""Streams on a GPU enqueue a batch while the one before is computed. Rehearsed on the CPU, where labels are there at
once: what is asked is the order of things, and that nothing of it shows."""

import numpy as np
import pytest
import torch

from segmenter.inference import stream as stream_module
from segmenter.inference.stream import results
from segmenter.inference.transfers import Download
from tests.inference.test_segment import image


@pytest.fixture
def events(monkeypatch):
    """Of batches, by the first pixel of their first image: ("run" or "fetch", that)."""
    found, enqueue, fetch = [], stream_module.enqueue, Download.fetch
    names = {}

    def spy(model, pixels, **options):
        name = int(pixels[0, 0, 0, 0])
        found.append(("run", name))
        download = enqueue(model, pixels, **options)
        names[id(download)] = name, download
        return download

    def spied(download):
        if id(download) in names:  # of the stream
            found.append(("fetch", names[id(download)][0]))
        return fetch(download)

    monkeypatch.setattr(stream_module, "enqueue", spy)
    monkeypatch.setattr(Download, "fetch", spied)
    monkeypatch.setattr(stream_module, "_computes_beside_the_host", lambda model: True)
    return found


def numbered(n, h=64, w=64):
    images = [image(h, w, seed=i).copy() for i in range(n)]
    for i, pixels in enumerate(images):
        pixels[0, 0, 0] = i
    return images


def test_two_batches_are_under_way_at_a_time(model, events):
    images = numbered(8)
    want = [model.segment(x) for x in images]
    got = list(model.segment_stream(images, batch_size=2))
    assert all(map(torch.equal, got, want))
    assert [e for e in events if e[1] % 2 == 0] == [
        ("run", 0), ("run", 2), ("fetch", 0), ("run", 4), ("fetch", 2), ("run", 6), ("fetch", 4), ("fetch", 6)
    ]  # fmt: skip


def test_one_image_at_a_time_where_nothing_waits(model, events):
    """A live stream, of which none is taken before the one before is given out."""
    taken = []

    def live():
        for i, pixels in enumerate(numbered(3)):
            taken.append(i)
            yield pixels

    for i, _ in enumerate(model.segment_stream(live(), batch_size=1, lookahead=1)):
        assert taken == list(range(i + 1))
    assert events == [(what, i) for i in range(3) for what in ("run", "fetch")]


def test_sizes_that_alternate(model, events):
    images = numbered(12)
    images = [x[:, : 64 - 8 * (i % 3)] for i, x in enumerate(images)]
    want = [model.segment(x) for x in images]
    for options in ({}, {"lookahead": 5}):
        got = list(model.segment_stream(images, batch_size=3, **options))
        assert all(map(torch.equal, got, want))
    assert events.count(("run", 0)) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: unspecified")])
def test_what_goes_wrong_ahead_is_met_in_its_turn(model, events, monkeypatch, error):
    """The batch before is given out first."""
    spied = stream_module.enqueue

    def failing(model, pixels, **options):
        if int(pixels[0, 0, 0, 0]) >= 2:
            events.append(("fails", int(pixels[0, 0, 0, 0])))
            raise error
        return spied(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", failing)
    given = []
    with pytest.raises(type(error)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        for labels in model.segment_stream(numbered(4), batch_size=2):
            given.append(labels)
    assert len(given) == 2
    assert events[:4] == [("run", 0), ("fails", 2), ("fetch", 0), ("fails", 2)]


def test_memory_for_one_batch_at_a_time(model, events, monkeypatch):
    """One under way leaves no room for another: nothing is halved for that."""
    spied, under_way, refused = stream_module.enqueue, [], []
    fetch = Download.fetch

    def limited(model, pixels, **options):
        if under_way:
            refused.append(int(pixels[0, 0, 0, 0]))
            raise torch.OutOfMemoryError("out of memory")
        under_way.append(1)
        return spied(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", limited)
    monkeypatch.setattr(Download, "fetch", lambda self: under_way.clear() or fetch(self))
    images = numbered(6)
    got = list(model.segment_stream(images, batch_size=2))
    assert len(got) == 6 and [e for e in events if e[0] == "run"] == [("run", 0), ("run", 2), ("run", 4)]
    assert refused == [2], "tried once"


def test_one_image_whose_scores_are_not_finite_fails_alone(model, events):
    """Which shows when labels are fetched: its batch is run again image by image, beside the next one."""
    images = numbered(6)
    want = [model.segment(x) for x in images]
    bad = np.full((64, 64, 3), 7, np.uint8)
    masks = model.masks_of_pixels

    def spoiled(pixels):
        found = masks(pixels).clone()
        found[(pixels == 7).flatten(1).all(1)] = float("nan")
        return found

    model.masks_of_pixels = spoiled
    images.insert(1, bad)
    found = list(results(model, images, batch_size=3, keep_pixels=True))
    assert [r.error is None for r in found] == [i != 1 for i in range(7)]
    assert "NaN or infinite scores" in str(found[1].error)
    assert all(torch.equal(r.labels, w) for r, w in zip(found[:1] + found[2:], want, strict=True))
    assert all(r.pixels is not None for r in found if r.error is None)
