"""Masks to labels by the kernel, in the interpreter: every label, not nearly every one."""

import pytest
import torch
import torch.nn.functional as F

from segmenter.kernels import launch, reference, upsample_tiles
from segmenter.kernels.upsample_argmax import _run, upsample_argmax, windows_argmax
from tests.support.parity import DEVICE
from tests.support.upsampling import (
    MASKS,
    WINDOWS,
    expected_labels,
    near_masks,
    random_masks,
    smooth_masks,
    tied_masks,
    upsampled,
)


def interpolated(masks, size, crop=None):
    """Labels by way of F.interpolate of contiguous float32."""
    crop = crop or size
    masks = masks.float().permute(0, 3, 1, 2).contiguous()
    logits = F.interpolate(masks.to(DEVICE), size, mode="bilinear").cpu()
    return logits[..., : crop[0], : crop[1]].argmax(1).to(reference.label_dtype(masks.shape[1]))


def labels(masks, *args, **kwargs):
    return upsample_argmax(masks.to(DEVICE), *args, **kwargs).cpu()


has_fma = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="a CPU without fma")


@has_fma
@pytest.mark.parametrize("size", [(128, 96), (1000, 77), (98, 126), (1, 200), (200, 1), (77, 518)])
def test_what_is_expected_is_what_interpolate_computes(size):
    """The arithmetic that all tests compare with is PyTorch's, where that has one for every pixel and class."""
    masks = random_masks(2, 7, 5, 11)
    want = F.interpolate(masks.permute(0, 3, 1, 2).contiguous(), size, mode="bilinear").permute(0, 2, 3, 1)
    assert torch.equal(upsampled(masks, size), want)


# Few tiles, and more than 128 rows and columns together: below, F.interpolate on a CPU rounds otherwise.
THIN = {8: (16, 1), 16: (1, 9), 32: (4, 1), 14: (9, 2)}


@has_fma
@pytest.mark.parametrize("patch", THIN)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_interpolate_and_argmax(patch, kind):
    h, w = THIN[patch]
    masks, size = MASKS[kind](1, h, w, 5, seed=patch), (h * patch, w * patch)
    assert torch.equal(labels(masks, size), interpolated(masks, size))


@has_fma
@pytest.mark.parametrize("K", [1, 2, 11, 19, 59, 150, 256, 300])
def test_class_counts(K):
    masks = smooth_masks(2, 1, 5, K, seed=K) if K > 19 else random_masks(2, 1, 5, K, seed=K)
    got = labels(masks, (20, 120), (16, 113))
    assert got.dtype == (torch.uint8 if K <= 256 else torch.int16)
    assert torch.equal(got, interpolated(masks, (20, 120), (16, 113)))
    assert len(got.unique()) > 1 or K == 1


@pytest.mark.parametrize("K", [60, 257])
def test_every_class_can_win(K):
    """Four cells with a quarter of the classes on top each, all within 1: none may be dropped."""
    masks = torch.zeros(1, 2, 2, K)
    for i, cell in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        masks[(0, *cell)] = torch.arange(K) % 4 == i
    masks += torch.randperm(K, generator=torch.Generator().manual_seed(1)) * 1e-3
    got = labels(masks, (6, 4))
    assert torch.equal(got, expected_labels(masks[:, None], (0,), (0,), (6, 4), (6, 4), (6, 4)))


@pytest.mark.parametrize(
    ("grid", "size", "crop"),
    [
        ((3, 2), (47, 31), None),  # no multiple of the grid
        ((3, 2), (48, 32), (41, 17)),  # cropped padding
        ((3, 4), (2, 3), None),  # smaller than the masks: some cells have no pixel
        ((1, 1), (70, 40), None),  # tiles of more than the longest interval
        ((2, 3), (13, 100), (1, 1)),
        ((5, 1), (5, 1), None),
    ],
)
def test_any_output_size(grid, size, crop):
    masks = random_masks(2, *grid, 5)
    crop = crop or size
    assert torch.equal(labels(masks, size, crop), expected_labels(masks[:, None], (0,), (0,), size, crop, crop))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_widened(dtype):
    masks = random_masks(2, 3, 2, 7).to(dtype)
    assert torch.equal(labels(masks, (24, 16)), expected_labels(masks[:, None], (0,), (0,), *[(24, 16)] * 3))
    tied = tied_masks(1, 2, 2, 6).to(dtype)
    assert torch.equal(labels(tied, (32, 32)), expected_labels(tied[:, None], (0,), (0,), *[(32, 32)] * 3))


def test_any_strides():
    masks = random_masks(2, 3, 2, 6).permute(0, 2, 1, 3)[..., ::2]
    assert torch.equal(labels(masks, (16, 24)), labels(masks.contiguous(), (16, 24)))


@pytest.mark.parametrize(("tops", "lefts", "cells", "size", "window", "shape"), WINDOWS)
def test_overlapping_windows(tops, lefts, cells, size, window, shape):
    n, B = len(tops) * len(lefts), 2 if len(lefts) == 1 else 1  # the interpreter takes seconds for an image
    masks = (random_masks if len(lefts) == 2 else tied_masks)(B * n, cells, cells, 3).unflatten(0, (B, n))
    geometry = (tops, lefts, (size, size), (window, window), shape)
    got = windows_argmax(masks.to(DEVICE), *geometry).cpu()
    assert torch.equal(got, expected_labels(masks, *geometry))


def test_the_average_of_windows_is_rounded():
    """Sums of three windows that differ by one rounding are equal once divided: then the lowest class wins."""
    masks = near_masks(3, 2, 2, 2)[None]
    geometry = ((0, 1, 2), (0,), (8, 8), (8, 8), (10, 8))
    want = expected_labels(masks, *geometry)
    sums = sum(upsampled(masks[:, i], (8, 8))[:, 2 - i : 8 - i] for i in range(3))  # rows that all three cover
    assert (sums.argmax(-1) != want[:, 2:8]).any()
    assert torch.equal(windows_argmax(masks.to(DEVICE), *geometry).cpu(), want)


def test_smooth_windows_of_many_classes():
    masks = smooth_masks(2, 4, 4, 150)[None]
    geometry = ((0,), (0, 20), (32, 32), (32, 32), (32, 52))
    assert torch.equal(windows_argmax(masks.to(DEVICE), *geometry).cpu(), expected_labels(masks, *geometry))


def test_nothing_is_written_outside_the_labels(guarded_outputs):
    """With tiles that end within a block of rows and columns, at every border."""
    labels(random_masks(1, 2, 2, 3), (22, 26), (21, 23))


def test_masks_that_are_no_numbers_give_some_class():
    masks = random_masks(1, 3, 3, 5)
    masks[0, 1, 1] = torch.nan
    masks[0, 2, 2, 3] = torch.inf
    assert labels(masks, (24, 24)).max() < 5
    assert labels(torch.full((1, 2, 2, 5), torch.nan), (16, 16)).max() < 5


def test_nothing_in_nothing_out():
    assert labels(random_masks(0, 3, 3, 5), (24, 24)).shape == (0, 24, 24)


@pytest.mark.parametrize(
    ("masks", "kwargs", "error", "message"),
    [
        (torch.zeros(2, 2, 5), {}, ValueError, r"masks must be \(B, h, w, K\), got \(2, 2, 5\)"),
        (torch.zeros(1, 2, 2, 0), {}, ValueError, "there are no classes"),
        (torch.zeros(1, 2, 2, 5), {"crop": (17, 16)}, ValueError, "sizes do not fit: 2 cells to 16 pixels"),
        (torch.zeros(1, 2, 2, 5), {"crop": (0, 16)}, ValueError, "sizes do not fit"),
        (torch.zeros(1, 2, 2, 5).double(), {}, launch.KernelError, "masks must be one of bfloat16, float16, float32"),
        (torch.zeros(1, 2, 2, 1025), {}, launch.KernelError, '1025 classes are more than 1024; use impl="eager"'),
    ],
)
def test_bad_arguments(masks, kwargs, error, message):
    with pytest.raises(error, match=message):
        upsample_argmax(masks.to(DEVICE), (16, 16), **kwargs)


def test_bad_windows():
    masks = torch.zeros(1, 2, 2, 2, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"masks must be \(B, 4, gh, gw, K\), one for each window"):
        windows_argmax(masks, (0, 8), (0, 8), (16, 16), (16, 16), (24, 24))
    with pytest.raises(ValueError, match="leave pixels out"):
        windows_argmax(masks, (0, 20), (0,), (16, 16), (16, 16), (36, 16))
    with pytest.raises(ValueError, match="do not go from 0 to 30 in order"):
        windows_argmax(masks, (0, 8), (0,), (16, 16), (16, 16), (30, 16))
    many = torch.zeros(1, 65, 1, 1, 1, device=DEVICE)
    with pytest.raises(launch.KernelError, match="65 windows over one pixel, more than 64; use a larger window_stride"):
        windows_argmax(many, range(65), (0,), (80, 8), (80, 8), (144, 8))
    assert not upsample_tiles.windows_fit(5, tuple(range(65)), (0,), (80, 8), (80, 8), (144, 8))
    assert upsample_tiles.windows_fit(1024, tuple(range(64)), (0,), (80, 8), (80, 8), (143, 8))


def test_rows_at_a_time_and_warps_do_not_matter():
    from segmenter.kernels.configs import UpsampleArgmaxConfig

    masks = random_masks(1, 2, 2, 4)[:, None].to(DEVICE)
    geometry = ((0,), (0,), (32, 32), (32, 32), (32, 32))
    want = _run(masks, *geometry)
    for config in (UpsampleArgmaxConfig(1, 1), UpsampleArgmaxConfig(4, 2)):
        assert torch.equal(_run(masks, *geometry, config), want)
