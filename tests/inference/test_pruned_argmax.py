"""Masks to labels in plain PyTorch: every label is F.interpolate's, whatever is pruned, and memory stays small."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segmenter.inference import pruned_argmax
from segmenter.kernels import reference
from tests.support.upsampling import MASKS, expected_labels, random_masks, smooth_masks

fused = pytest.mark.skipif(
    not torch.equal(
        torch.addcmul(*(torch.full((8,), x) for x in (-1.0, 1 + 2.0**-12, 1 + 2.0**-12))),
        torch.full((8,), 2.0**-11 + 2.0**-24),
    ),
    reason="addcmul rounds the product on this CPU",
)


SHIPPED = pruned_argmax.DENSE_ABOVE


def upsample_argmax(masks, size, crop=None):
    """Labels of masks (B, h, w, K) of one window."""
    crop = crop or size
    return pruned_argmax.windows_argmax(masks.unsqueeze(1), (0,), (0,), size, crop, crop)


@pytest.fixture(autouse=True, params=["pruned", "dense"])
def way(request, monkeypatch):
    """Both ways to upsample."""
    monkeypatch.setattr(pruned_argmax, "_pruning_pays", lambda rows, cols: True)
    monkeypatch.setattr(pruned_argmax, "DENSE_ABOVE", {"pruned": 2.0, "dense": -1.0}[request.param])
    return request.param


@fused
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("patch", "K"), [(8, 1), (14, 2), (16, 2), (32, 11), (8, 11), (14, 150), (16, 150), (32, 300), (8, 300)]
)
def test_equals_the_definition(kind, patch, K):
    h, w = 128 // patch + 1, 3
    masks, size = MASKS[kind](2, h, w, K, seed=K), (h * patch, w * patch)
    for crop in (None, (size[0] - 5, size[1] - patch // 2)):
        got = upsample_argmax(masks, size, crop)
        assert torch.equal(got, reference.upsample_argmax(masks, size, crop))
        assert got.dtype == (torch.uint8 if K <= 256 else torch.int16)


def test_windows_are_averaged_not_summed():
    """Two classes whose sums over three windows differ in the last bit, which dividing by three rounds away."""
    last = 1 + torch.arange(64) * 2.0**-22
    sums = 2 + last
    places = torch.nonzero((sums[1:] > sums[:-1]) & (sums[1:] / 3 == sums[:-1] / 3))[:, 0]
    assert len(places)
    for place in places:
        masks = torch.ones(1, 3, 3, 1, 2)  # the middle row of pixels is the third of window 0 and the first of window 2
        masks[0, 2, 0, 0] = last[place : place + 2]
        geometry = (0, 1, 2), (0,), (3, 1), (3, 1), (5, 1)
        got = pruned_argmax.windows_argmax(masks, *geometry)
        assert got[0, 2, 0] == 0, "of equals the first"
        assert torch.equal(got, expected_labels(masks, *geometry))


@fused
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_size_and_windows(data):
    cells = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    size = tuple(data.draw(st.integers(1, 50)) for _ in range(2))
    window = tuple(data.draw(st.integers(1, n)) for n in size)
    tops, lefts = (
        [0, *torch.tensor(data.draw(st.lists(st.integers(1, n), max_size=3))).cumsum(0).int().tolist()] for n in window
    )
    shape = (tops[-1] + window[0], lefts[-1] + window[1])
    K, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 99))
    n = len(tops) * len(lefts)
    masks = MASKS[data.draw(st.sampled_from(list(MASKS)))](n, *cells, K, seed)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_argmax, "STRIP_BYTES", data.draw(st.sampled_from([500, 1 << 23])))
        patch.setattr(pruned_argmax, "CHUNK_VALUES", data.draw(st.sampled_from([1, 1 << 16])))
        patch.setattr(pruned_argmax, "CHUNK_PIXELS", data.draw(st.sampled_from([500, 1 << 16])))
        got = pruned_argmax.windows_argmax(masks, tops, lefts, size, window, shape)
    assert torch.equal(got, expected_labels(masks, tops, lefts, size, window, shape))


def test_mask_rows_that_no_pixel_needs():
    """Fewer pixels than cells: the second row of pixels lies between the fourth and the fifth."""
    masks = random_masks(1, 5, 1, 2)
    assert torch.equal(upsample_argmax(masks, (2, 1)), reference.upsample_argmax(masks, (2, 1)))


def test_noise_is_dense_and_regions_are_not(monkeypatch):
    monkeypatch.setattr(pruned_argmax, "DENSE_ABOVE", SHIPPED)
    dense = []
    original = pruned_argmax._dense
    monkeypatch.setattr(pruned_argmax, "_dense", lambda *a: dense.append(a) or original(*a))
    upsample_argmax(smooth_masks(1, 16, 16, 40), (256, 256))
    assert not dense
    upsample_argmax(random_masks(1, 16, 16, 40), (256, 256))
    assert dense


def test_few_candidates_are_left_of_regions():
    """Three classes meet in few places, and one class is all there is in most."""
    masks = smooth_masks(1, 32, 32, 150)
    counted = []
    original = pruned_argmax._Corners.candidates

    def spy(self, winners):
        candidates = original(self, winners)
        counted.append((len(candidates), int(candidates.sum())))
        return candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_argmax._Corners, "candidates", spy)
        upsample_argmax(masks, (512, 512))
    tiles, candidates = (sum(x) for x in zip(*counted, strict=True))
    assert tiles < 33 * 33 * 3 / 4  # where regions of four by four cells meet
    assert candidates < 4 * tiles


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_widened(dtype):
    masks = random_masks(1, 9, 3, 7).to(dtype)
    assert torch.equal(upsample_argmax(masks, (144, 48)), reference.upsample_argmax(masks, (144, 48)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_masks_that_are_no_numbers_give_some_class(value):
    """No class is above the others then, and still there is one: who calls tells that scores are not finite."""
    masks = random_masks(1, 9, 3, 5)
    masks[0, 1, 1] = value
    masks[0, 5, 2, 3] = value
    assert upsample_argmax(masks, (144, 48)).max() < 5
    assert upsample_argmax(torch.full((1, 9, 3, 5), value), (144, 48)).max() < 5
