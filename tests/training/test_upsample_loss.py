"""The loss of upsampled masks, against F.cross_entropy of F.interpolate, and that it never holds the pixels' logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segmenter.training import upsample_loss
from segmenter.training.upsample_loss import upsample_cross_entropy

IGNORE = 255


def example(B=2, n_cls=7, h=3, w=4, patch_size=8, cut=(3, 1), dtype=torch.float64, ignored=0.2, seed=0):
    """Masks, and labels of which some do not count; `cut`: what the last patches of the image lack, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    masks = 3 * torch.randn(B, n_cls, h, w, generator=generator, dtype=torch.float64)
    cut = [min(n, patch_size - 1) for n in cut]
    shape = (B, h * patch_size - cut[0], w * patch_size - cut[1])
    labels = torch.randint(0, n_cls, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return masks.to(dtype).requires_grad_(), labels


def logits_of(masks, labels, patch_size):
    size = [n * patch_size for n in masks.shape[2:]]
    logits = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
    return logits[..., : labels.shape[1], : labels.shape[2]]


def eager(masks, labels, patch_size, weight=None, smoothing=0.0):
    """(loss, logits) of all pixels at once."""
    logits = logits_of(masks, labels, patch_size)
    options = {"weight": weight, "ignore_index": IGNORE, "label_smoothing": smoothing, "reduction": "sum"}
    return F.cross_entropy(logits, labels, **options), logits


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("patch_size", [1, 4, 5, 16])
def test_equals_the_loss_of_all_pixels(patch_size, weighted, smoothing, rows, monkeypatch):
    """Loss, gradient and counts, however many rows are computed at a time."""
    for shape in (
        {},
        {"B": 1, "n_cls": 1, "h": 1, "w": 1},
        {"n_cls": 5, "h": 1, "w": 6},
        {"h": 5, "w": 1, "cut": (0, 9)},
    ):
        masks, labels = example(patch_size=patch_size, **shape)
        monkeypatch.setattr(upsample_loss, "CHUNK_BYTES", rows * labels.shape[2] * masks.shape[1] * 8)
        weight = torch.rand(masks.shape[1], dtype=torch.float64) + 0.5 if weighted else None
        want, logits = eager(masks, labels, patch_size, weight, smoothing)
        got = upsample_cross_entropy(masks, labels, patch_size, weight, IGNORE, smoothing)
        torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
        upstream = torch.tensor(-1.7, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(want, masks, upstream)
        torch.testing.assert_close(torch.autograd.grad(got.loss, masks, upstream)[0], gradient, rtol=1e-11, atol=1e-12)
        counted = labels != IGNORE
        assert got.valid == counted.sum() and got.correct == ((logits.argmax(1) == labels) & counted).sum()
        weights = torch.ones(256, dtype=torch.float64) if weight is None else F.pad(weight, (0, 256 - len(weight)))
        torch.testing.assert_close(got.weight, weights[labels][counted].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_cls", [2, 19, 150])
def test_parity(dtype, n_cls):
    """Not further from float64 than twice what PyTorch is in the same type, and a rounding of the largest gradient."""
    masks, labels = example(n_cls=n_cls, patch_size=16, dtype=dtype)
    exact = masks.detach().double().requires_grad_()
    want, _ = eager(exact, labels, 16)
    (gradient,) = torch.autograd.grad(want / labels.numel(), exact)
    theirs, _ = eager(masks.float() if dtype != torch.float32 else masks, labels, 16)
    (their_gradient,) = torch.autograd.grad(theirs / labels.numel(), masks)
    got = upsample_cross_entropy(masks, labels, 16)
    assert got.loss.dtype == torch.float32
    assert (got.loss - want).abs() <= 2 * (theirs - want).abs() + 1e-6 * want
    (ours,) = torch.autograd.grad(got.loss / labels.numel(), masks)
    assert ours.dtype == dtype
    limit = 2 * (their_gradient - gradient).abs().max() + torch.finfo(dtype).eps * gradient.abs().max()
    assert (ours - gradient).abs().max() <= limit


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_the_same_under_autocast(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    masks, labels = example(B=1, n_cls=5, h=2, w=2, patch_size=4, dtype=torch.float32)
    plain = upsample_cross_entropy(masks, labels, 4, impl=impl).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = upsample_cross_entropy(masks, labels, 4, impl=impl).loss
        (gradient,) = torch.autograd.grad(got, masks)
    assert torch.equal(got, plain) and torch.equal(gradient, torch.autograd.grad(plain, masks)[0])


def test_gradcheck():
    masks, labels = example(B=1, n_cls=3, h=2, w=2, patch_size=4)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, labels, 4, weight, IGNORE, 0.1).loss, masks)


def test_gradients_of_a_mean_over_many_pixels_do_not_vanish_in_half_precision():
    """Each is far below the smallest float16; what a gradient scaler multiplies it with comes before the rounding."""
    masks, labels = example(dtype=torch.float16)
    got = upsample_cross_entropy(masks, labels, 8)
    (gradient,) = torch.autograd.grad(got.loss * 1e-9 * 2.0**16, masks, retain_graph=True)
    (plain,) = torch.autograd.grad(got.loss, masks)
    torch.testing.assert_close(gradient.float(), plain.float() * 1e-9 * 2**16, rtol=2e-3, atol=1e-7)
    assert gradient.count_nonzero() > 0.9 * gradient.numel()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_pixel_that_counts_is_no_loss_and_no_gradient(smoothing):
    masks, labels = example(ignored=1.1)
    masks.data[0, 0] = math.inf
    got = upsample_cross_entropy(*example(ignored=1.1), 8, None, IGNORE, smoothing)
    assert (got.loss, got.weight, got.valid, got.correct) == (0, 0, 0, 0)
    masks, labels = example(ignored=1.1)
    upsample_cross_entropy(masks, labels, 8, None, IGNORE, smoothing).loss.backward()
    assert not masks.grad.any()


@pytest.mark.parametrize("score", [1e4, 88.8, -1e4])
def test_large_scores_overflow_nothing(score):
    masks, labels = example(dtype=torch.float32)
    masks = (masks.detach() + score * (torch.arange(7) == 2)[:, None, None]).requires_grad_()
    want, _ = eager(masks, labels, 8)
    got = upsample_cross_entropy(masks, labels, 8)
    torch.testing.assert_close(got.loss, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, masks) for x in (got.loss, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_may_lie_anyhow_and_stay_what_they_are():
    masks, labels = example(dtype=torch.float32)
    want = upsample_cross_entropy(masks, labels, 8)
    (gradient,) = torch.autograd.grad(want.loss, masks)
    others = (
        (masks.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), labels.to(torch.uint8)),
        (masks.detach().repeat_interleave(2, 3)[..., ::2], labels.repeat_interleave(2, 2)[..., ::2].int()),
    )
    for x, y in others:
        x, before = x.requires_grad_(), (x.clone(), y.clone())
        got = upsample_cross_entropy(x, y, 8)
        assert torch.equal(got.loss, want.loss) and torch.equal(torch.autograd.grad(got.loss, x)[0], gradient)
        assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_the_same_every_time_and_twice_through_one_graph():
    masks, labels = example(dtype=torch.float32)
    loss = upsample_cross_entropy(masks, labels, 8).loss
    first, second = (torch.autograd.grad(loss, masks, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(upsample_cross_entropy(masks, labels, 8).loss, loss)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(loss, masks, create_graph=True)[0].sum().backward()


def test_nothing_is_kept_and_computed_for_a_gradient_that_nobody_wants():
    masks, labels = example(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        plain = upsample_cross_entropy(masks.detach(), labels, 8)
        assert not kept and not plain.loss.requires_grad
        upsample_cross_entropy(masks, labels, 8)
    assert [(x.shape, x.dtype) for x in kept] == [((2, 3, 4, 7), torch.float32)]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return out


def test_the_logits_of_all_pixels_are_never_held():
    masks, labels = example(B=2, n_cls=150, h=16, w=16, patch_size=16, cut=(0, 0), dtype=torch.float32)
    logits = 4 * labels.numel() * 150
    with Largest() as ours:
        upsample_cross_entropy(masks, labels, 16).loss.backward()
    with Largest() as theirs:
        eager(masks, labels, 16)[0].backward()
    assert theirs.nbytes >= logits
    assert ours.nbytes < logits / 30


@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_the_kernel_gives_the_same(weighted, smoothing, monkeypatch):
    pytest.importorskip("triton")
    masks, labels = example(dtype=torch.float32, patch_size=4)
    weight = torch.rand(7) + 0.5 if weighted else None
    want = upsample_cross_entropy(masks, labels, 4, weight, IGNORE, smoothing)
    monkeypatch.setattr(upsample_loss, "in_chunks", None)
    got = upsample_cross_entropy(masks, labels, 4, weight, IGNORE, smoothing, impl="triton")
    torch.testing.assert_close(got, want)
    (ours,), (theirs,) = (torch.autograd.grad(x.loss, masks) for x in (got, want))
    torch.testing.assert_close(ours, theirs)
    assert got.loss.dtype == torch.float32 and got.valid.dtype == torch.int64


def test_all_images_at_once_as_on_a_gpu(monkeypatch):
    """Where each step costs launches, it is taken for the whole batch."""
    masks, labels = example(B=3, dtype=torch.float64)
    weight = torch.rand(7, dtype=torch.float64) + 0.5
    want = upsample_cross_entropy(masks, labels, 8, weight, IGNORE, 0.1)
    (gradient,) = torch.autograd.grad(want.loss, masks)
    monkeypatch.setattr(upsample_loss, "at_once", lambda x, row: (len(x), 1 << 30))
    got = upsample_cross_entropy(masks, labels, 8, weight, IGNORE, 0.1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.loss, masks)[0], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(2, 21, 31)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(2, 21, 31, dtype=torch.bool)}, TypeError, "integers, got torch.bool"),
        ({"labels": torch.zeros(1, 21, 31, dtype=torch.long)}, ValueError, r"got \(2, 3, 4, 7\) and \(1, 21, 31\)"),
        ({"labels": torch.zeros(21, 31, dtype=torch.long)}, ValueError, "expected masks"),
        ({"labels": torch.zeros(2, 25, 31, dtype=torch.long)}, ValueError, "4 x 4 patches of 8, the masks 3 x 4"),
        (
            {"labels": torch.full((2, 21, 31), 7)},
            ValueError,
            "label 7 is neither one of the 7 classes nor ignore_index",
        ),
        ({"labels": torch.full((2, 21, 31), -1)}, ValueError, "label -1 is neither"),
        ({"class_weight": torch.ones(6)}, ValueError, r"class weights must be \(7,\).* got \(6,\)"),
        ({"label_smoothing": 1.1}, ValueError, "from 0 to 1, got 1.1"),
    ],
)
def test_errors(change, error, message):
    masks, labels = example()
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**{"masks": masks, "labels": labels, "patch_size": 8, **change})
