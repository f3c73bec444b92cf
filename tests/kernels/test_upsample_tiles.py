"""The cutting of an image into tiles between mask cells."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from segmenter.kernels.upsample_tiles import (
    MAX_CLASSES,
    MAX_INTERVAL,
    axis,
    rounds_product,
    source_cells,
    windows_fit,
)
from tests.support.parity import DEVICE
from tests.support.upsampling import weights


@given(st.integers(1, 40), st.integers(1, 700), st.booleans())
def test_cells_and_weights(n_in, n_out, rounded):
    low, high, weight = source_cells(n_in, n_out, rounded)
    want_low, want_high, want_weight = weights(n_in, n_out, rounded)
    assert np.array_equal(low, want_low)
    assert weight.dtype == np.float32 and np.array_equal(weight, want_weight)
    assert np.array_equal(high[weight > 0], want_high[weight > 0])  # at weight 0 any cell will do
    assert ((high >= low) & (high < n_in)).all()


@st.composite
def cuts(draw):
    n_in = draw(st.integers(1, 9))
    n_out = draw(st.integers(1, 90))
    window = draw(st.integers(1, n_out))
    anchors = [0]
    for step in draw(st.lists(st.integers(1, window), max_size=5)):
        anchors.append(anchors[-1] + step)
    return tuple(anchors), window, n_in, n_out, anchors[-1] + window, draw(st.booleans())


@given(cuts())
def test_every_pixel_of_an_interval_lies_between_the_same_cells(cut):
    anchors, window, n_in, n_out, length, rounded = cut
    a = axis(*cut)
    assert a.length == length and a.starts[0] == 0
    assert (np.diff(a.starts) > 0).all() and a.longest <= MAX_INTERVAL
    low, high, weight = source_cells(n_in, n_out, rounded)
    for i, (start, stop) in enumerate(zip(a.starts, a.starts[1:], strict=False)):
        for pixel in range(start, stop):
            covering = [w for w, anchor in enumerate(anchors) if anchor <= pixel < anchor + window]
            assert covering == list(range(a.first[i], a.first[i] + a.count[i]))
            for slot, w in enumerate(covering):
                t = pixel - anchors[w]
                assert (a.low[slot, i], a.high[slot, i]) == (low[t], high[t])
                assert a.weight[slot, pixel] == weight[t]


def test_one_window_at_patch_16_is_cut_half_way_between_cells():
    assert axis((0,), 64, 4, 64, 64, False).starts.tolist() == [0, 8, 24, 40, 56, 64]


@pytest.mark.parametrize("n_in", [2, 3, 37])
def test_weights_are_those_of_interpolate(n_in):
    """Of PyTorch itself, on this machine: cells of 0 and 1 by turns, upsampled, are the weight where the first is 0."""
    cells = (torch.arange(n_in, device=DEVICE) % 2).float()
    want = F.interpolate(cells[None, None, :, None], (n_in * 14 + 3, 200), mode="bilinear")[0, 0, :, 0].cpu()
    low, high, weight = source_cells(n_in, n_in * 14 + 3, rounds_product(DEVICE))
    known = (low % 2 == 0) & (high > low)
    assert known.any() and np.array_equal(weight[known], want[known])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), 8, 0, 8, 8), "sizes do not fit: 0 cells to 8 pixels"),
        (((0,), 9, 1, 8, 9), "sizes do not fit"),
        (((), 8, 1, 8, 8), "do not go from 0 to 8"),
        (((1,), 8, 1, 8, 9), "do not go from 0 to 9"),
        (((0, 4), 8, 1, 8, 13), "do not go from 0 to 13"),
        (((0, 4, 4), 8, 1, 8, 12), "in order"),
        (((0, 9), 8, 1, 8, 17), "leave pixels out"),
    ],
)
def test_bad_cuts(arguments, message):
    with pytest.raises(ValueError, match=message):
        axis(*arguments, False)


def test_what_fits_the_kernel():
    """64 windows over a pixel in all, and 1,024 classes."""
    eight, nine = tuple(range(8)), tuple(range(9))
    square = {"size": (16, 16), "window": (16, 16)}
    assert windows_fit(MAX_CLASSES, eight, eight, shape=(23, 23), **square)
    assert not windows_fit(MAX_CLASSES + 1, eight, eight, shape=(23, 23), **square)
    assert not windows_fit(5, nine, eight, shape=(24, 23), **square)
    assert not windows_fit(5, eight, nine, shape=(23, 24), **square)
