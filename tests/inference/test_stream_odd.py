"""Streams with images that are none, and Ctrl-C while one is read."""

import numpy as np
import pytest
import torch

from segmenter import segment_stream
from segmenter.inference import stream as stream_module
from segmenter.inference.images import ImageError, read_image
from tests.inference.test_stream import assert_labels, images, reader_threads, save


def test_odd_tensors_and_arrays_fail_alone(model):
    dense = torch.zeros(3, 4, 4)
    odd = [dense.to("meta"), dense.to_sparse(), dense.to(torch.float8_e5m2), dense.to(torch.complex64).conj()]
    odd += [np.ma.array(np.zeros((4, 4)), mask=True), None, {}, b"a.png"]
    (image,) = images("A")
    sources = [source for one in odd for source in (one, image)]
    failed = []
    labels = list(segment_stream(model, sources, on_error=lambda index, source, error: failed.append((index, error))))
    assert [index for index, _ in failed] == list(range(0, 2 * len(odd), 2))
    assert all(isinstance(error, ImageError) for _, error in failed)
    assert_labels(model, labels[1::2], [image] * len(odd))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("kind", ["picture", "path"])
def test_ctrl_c_while_reading_is_what_it_is(model, tmp_path, monkeypatch, interrupt, kind):
    """Images are read by the main thread, at once; paths by others, whose turn it has to be."""
    sources = images("AAA") if kind == "picture" else save(tmp_path, images("AAA"))

    def read(source):
        if source is sources[1]:
            raise interrupt
        return read_image(source)

    monkeypatch.setattr(stream_module, "read_image", read)
    with pytest.raises(interrupt):
        list(segment_stream(model, sources))
    assert reader_threads() == []
