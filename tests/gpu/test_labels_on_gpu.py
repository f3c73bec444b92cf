"""Masks to labels at full sizes: every label of every pixel, memory that stays small, graphs, offsets beyond 2**31."""

import pytest
import torch
import torch.nn.functional as F

from segmenter import create_segmenter, preset
from segmenter.inference.windows import windows_of
from segmenter.kernels import device_tables, reference
from segmenter.kernels.upsample_argmax import upsample_argmax, windows_argmax
from tests.gpu.conftest import size
from tests.support.upsampling import MASKS, expected_labels, near_masks, random_masks, smooth_masks

FULL = (512, 512)


def interpolated(masks, full, crop=None):
    """Labels by way of F.interpolate of contiguous float32."""
    crop = crop or full
    logits = F.interpolate(masks.float().permute(0, 3, 1, 2).contiguous(), full, mode="bilinear", align_corners=False)
    return logits[..., : crop[0], : crop[1]].argmax(1).to(reference.label_dtype(masks.shape[-1]))


def assert_same_labels(got, want, what):
    assert got.dtype == want.dtype and got.shape == want.shape, what
    wrong = got != want
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} labels differ: {what}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("K", size((2, 3, 11, 19, 59, 150, 256, 300), (5,)))  # of 3, a CPU rounds otherwise
def test_labels_are_those_of_interpolate(kind, K, dtype, device):
    """The padding of 500 x 333 is cut off."""
    if kind == "close" and dtype == torch.float16:
        pytest.skip("beyond its range")
    for patch in (8, 16, 32, 14):
        for crop in size(((512, 512), (640, 640), (500, 333)), ((120, 10),)):
            grid = [-(-side // patch) for side in crop]
            full = tuple(n * patch for n in grid)
            if sum(full) <= 128:  # F.interpolate on a CPU rounds otherwise there
                continue
            masks = MASKS[kind](size(2, 1), *grid, K, patch + K).to(device, dtype)
            what = f"{kind} K={K} patch={patch} {crop} {dtype}"
            assert_same_labels(upsample_argmax(masks, full, crop), interpolated(masks, full, crop), what)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("K", size((19, 150), (2,)))
def test_overlapping_windows(kind, K, device):
    """Against the published way on the device, and against arithmetic written out on the host."""
    window, stride, patch, shape = size((512, 300, 16, (768, 1100)), (16, 10, 8, (26, 16)))
    windows = windows_of(shape, window, stride, patch)
    n = len(windows.tops) * len(windows.lefts)
    masks = MASKS[kind](n, window // patch, window // patch, K, 1)[None].to(device)
    got = windows_argmax(masks, *windows.geometry)
    assert_same_labels(got.cpu(), expected_labels(masks, *windows.geometry), f"{kind} K={K}")
    if device.type == "cuda":
        assert_same_labels(got, reference.windows_argmax(masks, *windows.geometry), f"{kind} K={K}, published way")


def test_again_and_again(device):
    masks = random_masks(size(4, 1), *size((32, 32), (2, 2)), size(150, 3)).to(device).bfloat16()
    full = size(FULL, (32, 32))
    first = upsample_argmax(masks, full)
    for _ in range(size(100, 2)):
        assert torch.equal(upsample_argmax(masks, full), first)


def peak(function):
    """Bytes that a call allocates beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.card
def test_full_resolution_scores_are_never_held(device):
    """Of a whole model from bytes to labels, and of the kernel; the measure sees the scores where there are any."""
    n_cls, side, patch = 150, 1024, 16
    scores = n_cls * side * side * 4
    masks = smooth_masks(1, side // patch, side // patch, n_cls).to(device)
    upsample_argmax(masks, (side, side))  # compiles
    assert peak(lambda: upsample_argmax(masks, (side, side))) < scores / 100
    assert peak(lambda: reference.upsample_argmax(masks, (side, side))) >= scores

    torch.manual_seed(0)
    model = create_segmenter(preset("Seg-T-Mask/16", n_cls=n_cls, image_size=512), impl="triton").eval()
    model = model.to(device, torch.bfloat16)
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
    options = {"window_size": 512, "window_stride": 512}
    model.segment(pixels, **options)
    assert peak(lambda: model.segment(pixels, **options)) < scores / 4
    assert peak(lambda: model.segment(pixels, **options, return_probabilities=True)) > peak(
        lambda: model.segment(pixels, **options)
    )


@pytest.mark.card
def test_graph_capture_and_replay_with_changed_masks(device):
    masks = smooth_masks(2, 32, 32, 150).to(device)
    upsample_argmax(masks, FULL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = upsample_argmax(masks, FULL)
    for seed, kind in enumerate(MASKS):
        masks.copy_(MASKS[kind](2, 32, 32, 150, seed))
        graph.replay()
        assert torch.equal(out, upsample_argmax(masks, FULL)), kind


@pytest.mark.card
def test_a_graph_keeps_the_tables_it_points_to(device, monkeypatch):
    """Even when so many shapes come that tables are thrown away."""
    masks = smooth_masks(1, 8, 8, 19).to(device)
    upsample_argmax(masks, (128, 128))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = upsample_argmax(masks, (128, 128))
    want = interpolated(masks, (128, 128))
    monkeypatch.setattr(device_tables, "MAX_TABLES", 1)
    for side in range(129, 140):
        upsample_argmax(masks, (side, side))
    torch.full((1 << 24,), 7, dtype=torch.int32, device=device)  # takes what was given back
    out.fill_(0)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.card
def test_side_stream(device):
    masks = smooth_masks(1, 32, 32, 150).to(device)
    want, stream, late = upsample_argmax(masks, FULL), torch.cuda.Stream(), torch.zeros_like(masks)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(masks)
        got = upsample_argmax(late, FULL)
    stream.synchronize()
    assert torch.equal(got, want)


def free_memory():
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.card
def test_masks_beyond_2_to_the_31_elements(device):
    """The last images of a batch; the rest is memory that is not looked at again."""
    h, w, K = 128, 128, 1024
    B = 2**31 // (h * w * K) + 2
    if free_memory() < 2.2 * B * h * w * K:
        pytest.skip("needs 5 GB of free memory on the device")
    masks = torch.zeros(B, h, w, K, dtype=torch.bfloat16, device=device)
    assert masks[-1].storage_offset() >= 2**31
    masks[-2:] = near_masks(2, h, w, K).to(device).bfloat16() + smooth_masks(2, h, w, K).to(device).bfloat16()
    got = upsample_argmax(masks, (200, 200))
    assert torch.equal(got[-2:], upsample_argmax(masks[-2:].clone(), (200, 200)))
    assert not got[0].any()


@pytest.mark.card
def test_labels_beyond_2_to_the_31(device):
    side, B = 4096, 130
    if free_memory() < 3 * B * side * side:
        pytest.skip("needs 7 GB of free memory on the device")
    masks = random_masks(B, 4, 4, 3).to(device)
    got = upsample_argmax(masks, (side, side))
    assert got.numel() > 2**31
    for i in (0, B - 1):
        assert torch.equal(got[i], upsample_argmax(masks[i : i + 1], (side, side))[0])
