"""The fused loss against float64: loss, gradient and counts, in one pass and without the logits of pixels."""

import math

import pytest
import torch

from segmenter.kernels import configs_backward, reference
from segmenter.kernels.launch import KernelError
from segmenter.kernels.upsample_cross_entropy import MAX_CLASSES, upsample_cross_entropy
from tests.support.parity import DEVICE, assert_parity

IGNORE = 255


def example(B=2, K=7, h=2, w=3, P=4, cut=(1, 2), dtype=torch.float32, ignored=0.2, seed=0):
    """Masks and labels, some of which do not count; `cut`: what the last patches lack, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    masks = (3 * torch.randn(B, h, w, K, generator=generator)).to(dtype)
    shape = (B, h * P - min(cut[0], P - 1), w * P - min(cut[1], P - 1))
    labels = torch.randint(0, K, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return masks.to(DEVICE), labels.to(DEVICE)


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def weights(K):
    return torch.rand(K, generator=torch.Generator().manual_seed(9)).to(DEVICE) + 0.5


def check(masks, labels, weight, P, smoothing=0.0):
    arguments = (P, IGNORE, smoothing)
    sums, counts, gradient = upsample_cross_entropy(masks, labels, weight, *arguments)
    wide = None if weight is None else weight.double()
    exact_sums, exact_counts, exact = reference.upsample_cross_entropy(masks.double(), labels, wide, *arguments)
    their_sums, _, theirs = reference.upsample_cross_entropy(masks, labels, weight, *arguments)
    assert_parity(gradient, exact, theirs, terms=4 * P * P)  # pixels around a mask centre
    for ours, true, their in zip(sums, exact_sums, their_sums, strict=True):
        assert_parity(ours, true, their, terms=labels.numel())
    assert counts[0] == exact_counts[0]
    assert abs(counts[1] - exact_counts[1]) <= 1  # two classes may differ by less than a rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)])
def test_parity(dtype, weighted, smoothing):
    masks, labels = example(dtype=dtype)
    check(masks, labels, weights(7) if weighted else None, 4, smoothing)


@pytest.mark.more
@pytest.mark.parametrize("P", [1, 2, 5, 8, 14, 16, 32])
def test_patches(P):
    check(*example(B=1, h=2, w=2, P=P, cut=(3, 1)), None, P)


@pytest.mark.parametrize("K", [1, 2, 16, 17, 19, 150, 171, 255, 256, 257, 600])
def test_class_counts(K):
    """255 and 256 among them: the label that does not count is a class then, or one of the padding."""
    masks, labels = example(B=1, K=K, h=1, w=2)
    smoothing = 0.1 if K > 1 else 0.0  # of one class it cancels, but for roundings
    check(masks, labels if K < 256 else labels.clamp(max=254), weights(K), 4, smoothing)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (3, 3)])
def test_grids(grid):
    check(*example(h=grid[0], w=grid[1]), None, 4)


@pytest.mark.parametrize("table", configs_backward.UPSAMPLE_CROSS_ENTROPY, ids=lambda row: row.when or "else")
def test_shipped_configurations(table, monkeypatch):
    """Each on a call that any can run."""
    monkeypatch.setattr(configs_backward, "upsample_cross_entropy", lambda block_x, k_pad: table.config)
    P = max(4, table.config.block_x)
    check(*example(P=P, h=1, w=2), None, P)


def test_any_layout_and_type_of_labels():
    masks, labels = example()
    want = upsample_cross_entropy(masks, labels, None, 4)
    strange = masks.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for other in (labels.to(torch.uint8), labels.int(), labels.repeat_interleave(2, 2)[..., ::2]):
        assert same(upsample_cross_entropy(strange, other, None, 4), want)


def test_the_same_bits_every_time():
    masks, labels = example(K=150, P=8)
    assert same(*(upsample_cross_entropy(masks, labels, None, 8) for _ in range(2)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_pixel_that_counts(smoothing):
    masks, labels = example(ignored=1.1)
    assert not any(found.any() for found in upsample_cross_entropy(masks, labels, None, 4, IGNORE, smoothing))


def test_a_label_that_is_no_class_makes_the_loss_nan():
    for wrong in (7, -1, 300):
        masks, labels = example()
        labels[1, 2, 3] = wrong
        assert upsample_cross_entropy(masks, labels, None, 4)[0][0].isnan()
    assert math.isfinite(upsample_cross_entropy(*example(), None, 4)[0][0])


def test_ignore_index_may_be_any_number():
    masks, labels = example()
    want = upsample_cross_entropy(masks, labels, None, 4)
    assert same(upsample_cross_entropy(masks, torch.where(labels == IGNORE, -100, labels), None, 4, -100), want)


def test_of_equal_scores_the_lowest_class_counts():
    masks, labels = example()
    counts = upsample_cross_entropy(torch.zeros_like(masks), labels, None, 4)[1]
    assert counts.tolist() == [(labels != IGNORE).sum(), (labels == 0).sum()] and counts[1] > 0


@pytest.mark.parametrize("score", [1e4, 89.0, -1e4])
def test_large_scores(score):
    masks, labels = example()
    masks[..., 2] += score
    check(masks, labels, None, 4)


def test_without_a_gradient_nothing_of_its_size_is_allocated(guarded_outputs):
    masks, labels = example()
    *found, gradient = upsample_cross_entropy(masks, labels, None, 4, with_gradient=False)
    cells = 2 * 3 * 4
    assert [t.numel() for t in guarded_outputs] == [0, 0, 2 * cells, 2 * cells] and gradient.numel() == 0
    assert same(found, upsample_cross_entropy(masks, labels, None, 4)[:2])


def test_no_images():
    masks, labels = torch.ones(0, 2, 3, 7, device=DEVICE), torch.ones(0, 8, 12, dtype=torch.long, device=DEVICE)
    sums, counts, gradient = upsample_cross_entropy(masks, labels, None, 4)
    assert sums.tolist() == counts.tolist() == [0, 0] and gradient.shape == masks.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(2, 7, 10)}, TypeError, "labels must be integers"),
        ({"labels": torch.zeros(2, 9, 10, dtype=torch.long)}, ValueError, "3 x 3 patches of 4, the masks 2 x 3"),
        ({"labels": torch.zeros(7, 10, dtype=torch.long)}, ValueError, "expected masks"),
        ({"weight": torch.ones(6)}, ValueError, r"weights must be \(7,\)"),
        ({"masks": torch.zeros(2, 2, 3, 7, dtype=torch.float64)}, KernelError, "masks must be one of"),
        ({"masks": torch.zeros(2, 2, 3, MAX_CLASSES + 1)}, KernelError, "classes are more than"),
    ],
)
def test_errors(change, error, message):
    masks, labels = example()
    arguments = {"masks": masks, "labels": labels, "weight": None, **{k: v.to(DEVICE) for k, v in change.items()}}
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**arguments, patch_size=4)


def test_the_reference_is_pytorch():
    """Its gradient, which is by hand, is that of autograd."""
    masks, labels = example(dtype=torch.float64)
    masks.requires_grad_()
    weight = weights(7).double()
    sums, _, gradient = reference.upsample_cross_entropy(masks, labels, weight, 4, IGNORE, 0.1)
    torch.testing.assert_close(torch.autograd.grad(sums[0], masks)[0], gradient)
