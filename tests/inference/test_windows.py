"""Windows, and merging a few rows at a time: properties over random sizes, and equality with the published way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segmenter.inference.merge as merge_module
from bench.published import published_inference
from segmenter.inference.merge import View, inference, row_blocks
from segmenter.inference.windows import Windows, masks_of_images, resize, resized_shape, window_anchors
from segmenter.layers import pad_to_multiple
from tests.support.tiny import tiny_model

settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")


class Echo(torch.nn.Module):
    """A model whose masks are the patch means of the image: what goes in can be found again in what comes out."""

    def __init__(self, patch_size=4):
        super().__init__()
        self.patch_size = patch_size
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.calls = []

    def masks(self, im):
        self.calls.append(len(im))
        return F.avg_pool2d(pad_to_multiple(im, self.patch_size), self.patch_size)

    def forward(self, im):
        masks = self.masks(im)
        size = [side * self.patch_size for side in masks.shape[-2:]]
        return F.interpolate(masks, size, mode="bilinear")[..., : im.shape[-2], : im.shape[-1]]

    n_cls = 3


def image(h, w, seed=0):
    return torch.randn(1, 3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("length", "window", "stride", "want"),
    [
        (512, 512, 480, [0]),
        (683, 512, 512, [0, 171]),
        (1024, 512, 480, [0, 480, 512]),
        (2048, 768, 512, [0, 512, 1024, 1280]),
        (1024, 768, 512, [0, 256]),
    ],
)
def test_published_anchors(length, window, stride, want):
    assert window_anchors(length, window, stride) == want


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 100))
def test_anchors_cover_every_pixel_and_stay_inside(length, window, stride):
    window = min(window, length)
    stride = min(stride, window)
    anchors = window_anchors(length, window, stride)
    assert {p for a in anchors for p in range(a, a + window)} == set(range(length))
    assert anchors == sorted(set(anchors))
    assert all(b - a <= stride for a, b in zip(anchors, anchors[1:], strict=False))
    assert all(a % stride == 0 for a in anchors[:-1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 11, 1), "length 10 is smaller than the window 11"),
        ((10, 5, 0), "window_stride must be at least 1"),
        ((10, 5, 6), "would leave pixels out"),
    ],
)
def test_bad_windows(args, message):
    with pytest.raises(ValueError, match=message):
        window_anchors(*args)


@pytest.mark.parametrize(
    ("h", "w", "window", "want"),
    [
        (360, 480, 512, (512, 682)),  # 682.67 is truncated
        (480, 360, 512, (682, 512)),
        (512, 2000, 512, (512, 2000)),
        (600, 700, 512, (600, 700)),
        (100, 100, 96, (100, 100)),
        (1, 1, 64, (64, 64)),
    ],
)
def test_resize_rule(h, w, window, want):
    assert resized_shape(h, w, window) == want
    assert tuple(resize(image(h, w), window).shape[-2:]) == want


def test_resize_refuses_what_would_not_fit_in_memory():
    with pytest.raises(ValueError, match="image of 5000x1 would be enlarged to 2560000x512.*pad or cut it"):
        resize(image(1, 5000), 512)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 17))
def test_padding_property(h, w, multiple):
    padded = pad_to_multiple(torch.ones(1, 1, h, w), multiple)
    H, W = padded.shape[-2:]
    assert H % multiple == W % multiple == 0
    assert 0 <= H - h < multiple
    assert 0 <= W - w < multiple
    assert padded.sum() == h * w == padded[..., :h, :w].sum()


@st.composite
def settings_of_inference(draw):
    window = draw(st.integers(3, 40))
    return {
        "sizes": draw(st.lists(st.tuples(st.integers(2, 70), st.integers(2, 70)), min_size=1, max_size=3)),
        "flips": draw(st.lists(st.booleans(), min_size=3, max_size=3)),
        "ori_shape": draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
        "window": window,
        "stride": draw(st.integers(max(1, window // 4), window)),
        "batch": draw(st.integers(1, 5)),
        "patch": draw(st.sampled_from([3, 4, 8])),
        "block_bytes": draw(st.sampled_from([1, 5000, 1 << 30])),
    }


@settings(max_examples=40)
@given(settings_of_inference())
def test_row_blocks_equal_the_published_way(s):
    model = Echo(s["patch"])
    ims = [image(h, w, i) for i, (h, w) in enumerate(s["sizes"])]
    flips = s["flips"][: len(ims)]
    args = (s["ori_shape"], s["window"], s["stride"], s["batch"])
    want = published_inference(model, ims, flips, *args)
    before = merge_module.BLOCK_BYTES
    merge_module.BLOCK_BYTES = {"cpu": s["block_bytes"], "cuda": 0}
    try:
        got = inference(model, ims, [{"flip": f} for f in flips], *args)
    finally:
        merge_module.BLOCK_BYTES = before
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 90), st.integers(1, 90))
def test_rows_of_one_window_are_interpolate(H, W, h0, w0):
    """One cell a pixel, so the resize to the original size is all that happens."""
    masks = torch.randn(1, H, W, 3, generator=torch.Generator().manual_seed(0))
    view = View(masks, Windows((0,), (0,), masks.shape[1:3], (H, W), (H, W)))
    want = F.interpolate(masks.permute(0, 3, 1, 2), (h0, w0), mode="bilinear")[0].permute(1, 2, 0)
    # a source coordinate near 50 is rounded by up to 2e-6 (more with a fused multiply-add), and masks differ by up to 6
    torch.testing.assert_close(view.rows(0, h0, (h0, w0)), want, atol=3e-5, rtol=0)
    middle = h0 // 2
    torch.testing.assert_close(view.rows(middle, h0, (h0, w0)), want[middle:], atol=3e-5, rtol=0)


def test_windows_are_batched():
    model = Echo()
    masks, windows = masks_of_images(model, image(20, 36), 16, 10, 3)
    assert (windows.tops, windows.lefts) == ((0, 4), (0, 10, 20))
    assert model.calls == [3, 3]
    assert masks.shape == (1, 6, 4, 4, 3)


def test_merging_averages_logits_not_probabilities():
    """Two windows that overlap by half, with logits +a and -b there: the mean of logits decides."""
    masks = torch.tensor([8.0, -2.0])[:, None, None, None]  # one cell of four pixels a window, one class
    view = View(masks, Windows((0,), (0, 2), (4, 4), (4, 4), (4, 6)))
    row = view.rows(0, 1, (4, 6))[0, :, 0]
    assert row.tolist() == [8, 8, 3, 3, -2, -2]


def test_mean_of_probabilities_over_views():
    a, b = torch.randn(2, 1, 2, 2, 3).unbind(0)
    views = [View(m, Windows((0,), (0,), (2, 2), (2, 2), (2, 2))) for m in (a, b)]
    ((_, scores),) = row_blocks(views, (2, 2), probabilities=False)  # several views: probabilities anyway
    torch.testing.assert_close(scores, (a.softmax(-1) + b.softmax(-1))[0] / 2)


def test_flip_is_undone():
    view = View(torch.arange(4.0).reshape(1, 1, 4, 1), Windows((0,), (0,), (1, 4), (1, 4), (1, 4)), True)
    assert view.rows(0, 1, (1, 4)).flatten().tolist() == [3, 2, 1, 0]


def test_inference_of_a_real_model_sums_to_one():
    model = tiny_model()
    got = inference(model, [image(70, 90)], [{"flip": False}], (35, 45), 64, 48, 2)
    assert got.shape == (5, 35, 45)
    torch.testing.assert_close(got.sum(0), torch.ones(35, 45))
    assert got.std() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ims": []}, "at least one image"),
        ({"ims_metas": []}, "one ims_metas entry"),
        ({"ims": [torch.zeros(2, 3, 8, 8)]}, r"expected one image \(1, 3, h, w\), got \(2, 3, 8, 8\)"),
        ({"window_size": 0}, "window_size and batch_size must be at least 1"),
        ({"batch_size": 0}, "window_size and batch_size must be at least 1"),
        ({"window_stride": 0}, "window_stride must be at least 1"),
    ],
)
def test_bad_arguments(change, message):
    args = {
        "model": Echo(), "ims": [image(20, 20)], "ims_metas": [{"flip": False}], "ori_shape": (20, 20),
        "window_size": 16, "window_stride": 8, "batch_size": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        inference(**{**args, **change})
