"""The gradient of pixels to tokens: of weights by a kernel, of the rest by sums. What all operators share is in
test_operators.py."""

import itertools

import pytest
import torch

from segmenter.kernels import configs, configs_backward, launch, pixels_to_tokens, reference
from segmenter.kernels import pixels_to_tokens_backward as kernel
from segmenter.kernels.launch import KernelError
from tests.kernels.test_pixels_to_tokens import image, inputs, wide
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("weight", "bias", "extra_tokens", "pos_embed")
KERNELS = ["_pixels_to_tokens_bwd_kernel", "_partial_sums_kernel"]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def gradients(function, args, upstream):
    """Of weight, bias, extra tokens and positions, by name; `args` as for `reference.pixels_to_tokens`."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in zip(NAMES, args[1:5], strict=True) if t is not None}
    out = function(args[0], *(leaves.get(name) for name in NAMES), *args[5:])
    return dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], upstream.to(out.dtype)), strict=True))


def tokens_gradient(args, seed=9):
    return randn(args[0].shape[0], *args[4].shape, seed=seed, dtype=torch.promote_types(args[1].dtype, args[4].dtype))


def check(args, upstream=None, **where):
    """Every gradient by the rule of parity.

    Weights in half types are rounded twice, as the gradient of the folded weights and as theirs: hence 1.6 for 1.0. The
    kernel's own rounding is in `test_every_configuration`.
    """
    upstream = tokens_gradient(args) if upstream is None else upstream
    ours = gradients(pixels_to_tokens.normalized_pixels_to_tokens, args, upstream)
    exact = gradients(reference.pixels_to_tokens, wide(args), upstream)
    eager = gradients(reference.pixels_to_tokens, args, upstream)
    for name, gradient in ours.items():
        limits = {"terms": 900} if gradient.dtype == torch.float32 else {}
        if gradient.dtype == torch.float32 or gradient.numel() < 1024:
            limits |= {"frobenius": 2.0, "max_ratio": 3.0}
        elif name == "weight":
            limits |= {"frobenius": 1.6}
        assert_parity(gradient, exact[name], eager[name], **limits, context=f"{name} {where}")
    return ours


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels as they are launched."""
    names, run = [], launch.Plan.run

    def spy(plan, *tensors):
        names.append(plan.kernel.fn.__name__)
        return run(plan, *tensors)

    monkeypatch.setattr(launch.Plan, "run", spy)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("H", "W", "P", "E", "d"),
    [(34, 23, 16, 2, 48), (41, 64, 8, 1, 136), (30, 28, 14, 2, 31), (5, 1, 3, 1, 16)],
)
@by_dtype
def test_parity(dtype, H, W, P, E, d, guarded_outputs):
    if dtype == torch.float32 and P > 8:  # the kernel's tiles are small, and the interpreter slow
        H, W, P = H // 3, W // 3, 5
    check(inputs(2, H, W, P, E, min(d, 72) if dtype == torch.float32 else d, dtype), H=H, W=W, P=P)


def test_patches_of_32():
    check(inputs(1, 33, 32, 32, d=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=str)
def test_float32_stream(weights):
    """As under autocast: tokens are float32, and their gradient is rounded for the product as eager rounds it."""
    ours = check(inputs(2, 25, 24, 8, dtype=weights, stream=torch.float32))
    assert [ours[name].dtype for name in NAMES] == [weights, weights, torch.float32, torch.float32]


def test_without_bias():
    check(inputs(2, 25, 24, 8, dtype=torch.bfloat16, bias=False))


@pytest.mark.parametrize(("H", "W"), [(32, 48), (33, 48), (32, 47), (31, 33), (16, 7), (7, 16), (3, 5)])
def test_biases_of_the_four_kinds_of_patches(H, W):
    """By the operator itself, in rows of the table; one row or one column of patches is all border."""
    args = inputs(1, H, W, 16, d=16, dtype=torch.float16)
    fold = reference.fold_normalization(*args[1:3], *args[5:], torch.float16, (H, W))
    operands = [args[0], *fold, *args[3:5]]
    upstream = tokens_gradient(args)

    def table_gradient(function, dtype):
        tensors = [t.detach().to(dtype or t.dtype).requires_grad_(i == 1) for i, t in enumerate(operands[1:])]
        tokens = function(operands[0], *tensors, 16)
        return torch.autograd.grad(tokens, tensors[1], upstream.to(tokens.dtype))[0]

    ours = table_gradient(pixels_to_tokens.pixels_to_tokens, None)
    exact = table_gradient(pixels_to_tokens._pixels_to_tokens_reference, torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert (ours.abs().sum(1) > 0).sum() == (exact.abs().sum(1) > 0).sum() > 0


def test_reference_is_the_gradient_of_the_definition():
    pixels = image(2, 30, 17)
    dy, weight = randn(2, 8, 5).double(), randn(5, 192, seed=1).double().requires_grad_()
    zeros = [torch.zeros(*shape, dtype=torch.float64, device=DEVICE) for shape in ((4, 5), (1, 5), (13, 5))]
    tokens = pixels_to_tokens._pixels_to_tokens_reference(pixels, weight, *zeros, 8)
    (want,) = torch.autograd.grad(tokens[:, 1:], weight, randn(2, 12, 5).double())
    got = kernel.pixels_to_tokens_backward_reference(randn(2, 12, 5).double(), pixels, 8)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="dy must be"):
        kernel.pixels_to_tokens_backward_reference(dy, pixels, 8)


@pytest.mark.parametrize("programs", [1, 3, 4, 264])
def test_ranges_of_rows(programs, monkeypatch, guarded_outputs):
    """Whatever the number of programs, each patch counts once; there are no more partial sums than that."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    args = inputs(3, 70, 57, 8, d=40, dtype=torch.float16)
    guarded_outputs.clear()
    check(args, programs=programs)
    (found,) = (t.shape[0] for t in guarded_outputs if t.shape[1:] == (40, 192))
    assert found == {1: 1, 3: 1, 4: 2, 264: 4}[programs]


def test_the_number_of_programs_is_bounded():
    assert kernel.PROGRAMS == 264
    dy = torch.empty(1, 1, 768, dtype=torch.float16).expand(300, 1024, 768)
    pixels = torch.empty(1, 512, 512, 3, dtype=torch.uint8).expand(300, 512, 512, 3)
    with launch.recorded("sm_90") as launches:
        kernel._run(dy, pixels, 16)
    assert 200 < launches[0].plan.grid[0] <= 264 and launches[0].tensors[2].shape == (7, 768, 768)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(value):
    pixels, dy = image(1, 32, 33), randn(1, 6, 16)
    dy[0, 3, 5] = value
    got = kernel.pixels_to_tokens_backward(dy, pixels, 16)
    assert not got[5].isfinite().any() and got[torch.arange(16) != 5].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def test_what_is_needed_is_computed(launched):
    args = inputs(2, 30, 17, 8, E=2, d=16, dtype=torch.float16)
    fold = reference.fold_normalization(*args[1:3], *args[5:], torch.float16, (30, 17))
    operands, upstream = [*fold, *args[3:5]], tokens_gradient(args)

    def run(needed):
        leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(operands, needed, strict=True)]
        out = pixels_to_tokens.pixels_to_tokens(args[0], *leaves, 8)
        launched.clear()
        out.backward(upstream)
        return [leaf.grad for leaf in leaves]

    want = run([True] * 4)
    assert launched == KERNELS
    for needed in (*torch.eye(4, dtype=torch.bool).tolist(), [True, False, True, True], [False, True, True, True]):
        for got, expected, n in zip(run(needed), want, needed, strict=True):
            if n:
                assert_bitwise_equal(got, expected)
            else:
                assert got is None
        assert launched == (KERNELS if needed[0] else [])


def test_patches_are_never_in_memory(guarded_outputs):
    """Nothing is allocated that grows with the batch, but a copy of images that are not read in place."""
    sizes = []
    for B in (2, 6):
        guarded_outputs.clear()
        kernel.pixels_to_tokens_backward(randn(B, 6, 16, dtype=torch.float16), image(B, 32, 48), 16)
        sizes.append([t.shape[1:] for t in guarded_outputs])
        assert max(t.numel() for t in guarded_outputs if t.dtype == torch.float32) <= 2 * 16 * 768
    assert sizes[0] == sizes[1] == [(16, 768), (768,)]


def test_half_precision_by_autocast():
    args = inputs(2, 32, 48, 8)
    leaves = [t.clone().requires_grad_() for t in args[1:5]]
    upstream = tokens_gradient(args)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pixels_to_tokens.normalized_pixels_to_tokens(args[0], *leaves, *args[5:])
        inside = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    outside = torch.autograd.grad(out, leaves, upstream)
    exact = gradients(reference.pixels_to_tokens, wide(args), upstream).values()
    for i, o, want in zip(inside, outside, exact, strict=True):
        assert i.dtype == torch.float32
        assert_bitwise_equal(i, o)
        torch.testing.assert_close(i.double(), want, rtol=0.05, atol=0.01 * want.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    args = inputs(2, 15, 17, 8, d=32, dtype=torch.bfloat16)
    placed = LAYOUTS[layout](tokens_gradient(args))
    args[0] = args[0][: len(placed)]
    upstream = guarded(placed)
    leaves = [t.clone().requires_grad_() for t in args[1:5]]
    out = pixels_to_tokens.normalized_pixels_to_tokens(args[0], *leaves, *args[5:])
    ours = torch.autograd.grad(out, leaves, upstream)
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    want = gradients(pixels_to_tokens.normalized_pixels_to_tokens, args, placed.contiguous()).values()
    for o, w in zip(ours, want, strict=True):
        assert_bitwise_equal(o, w)


@pytest.mark.parametrize("around", [0, 1, 16])
def test_crops_of_larger_images(around, guarded_outputs):
    wider = image(2, 20, 24 + 2 * around)
    crop = wider[:, 2:18, around : 24 + around]
    before, dy = wider.clone(), randn(2, 6, 16, dtype=torch.float16)
    got = kernel.pixels_to_tokens_backward(dy, crop, 8)
    assert_bitwise_equal(got, kernel.pixels_to_tokens_backward(dy, crop.contiguous(), 8))
    assert_bitwise_equal(wider, before)


def test_images_and_rows_further_apart_than_32_bits_count():
    """Lazily committed memory."""
    if DEVICE == "cuda":
        pytest.skip("lazily committed memory is the CPU's")
    far = 2**30 + 64  # itself no 64-bit number, which would make its products 64-bit as well
    for pixels, strides, of_dy in (
        (image(3, 8, 8), (far, 32, 3, 1), (16, 16, 1)),  # rows at multiples of 16 bytes, or they are copied
        (image(1, 24, 8), (0, 2**27, 3, 1), (16, 16, 1)),
        (image(3, 8, 8), (192, 24, 3, 1), (far, 16, 1)),
        (image(1, 24, 8), (576, 24, 3, 1), (16, far, 1)),
    ):
        dy = randn(len(pixels), pixels.shape[1] // 8, 16, dtype=torch.float16)
        want = kernel.pixels_to_tokens_backward(dy, pixels, 8)
        spread = torch.empty(2**32, dtype=torch.uint8).as_strided(pixels.shape, strides).copy_(pixels)
        rows = torch.empty(2**31 + 2**10, dtype=torch.float16).as_strided(dy.shape, of_dy).copy_(dy)
        assert_bitwise_equal(kernel.pixels_to_tokens_backward(rows, spread, 8), want)


def test_no_images():
    args = inputs(0, 30, 17, 8)
    for _ in range(3):  # from notes, too
        for name, gradient in gradients(
            pixels_to_tokens.normalized_pixels_to_tokens, args, tokens_gradient(args)
        ).items():
            assert_bitwise_equal(gradient, torch.zeros_like(dict(zip(NAMES, args[1:5], strict=True))[name]), name)


@by_dtype
def test_backward_twice_is_equal_and_touches_nothing(dtype):
    args = inputs(2, 25, 24, 8, dtype=dtype)
    leaves, upstream = [t.clone().requires_grad_() for t in args[1:5]], tokens_gradient(args)
    before = [t.detach().clone() for t in (args[0], *leaves, upstream)]
    out = pixels_to_tokens.normalized_pixels_to_tokens(args[0], *leaves, *args[5:])
    first, second = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)
    for t, was in zip((args[0], *leaves, upstream), before, strict=True):
        assert_bitwise_equal(t.detach(), was)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and errors


def shipped():
    """Every configuration that some call chooses, with a type."""
    found = {}
    for architecture, (dtype, precision) in itertools.product(
        (*configs.ARCHITECTURES, "unknown"),
        ((torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")),
    ):
        config = configs_backward.patch_weights(architecture, dtype.itemsize, precision)
        found.setdefault((config, dtype))
    return list(found)


@pytest.mark.parametrize(("config", "dtype"), shipped(), ids=str)
def test_every_configuration(config, dtype, guarded_outputs):
    for P, (H, W) in ((8, (24, 56)), (5, (25, 11))):
        N = -(-H // P) * -(-W // P)
        dy, pixels = randn(2, N, 24, dtype=dtype), image(2, H, W)
        got = kernel._run(dy, pixels, P, config)
        exact, eager = (kernel.pixels_to_tokens_backward_reference(t, pixels, P) for t in (dy.double(), dy))
        assert_parity(got, exact, eager, terms=2 * N)


BAD_CALLS = [
    (0, lambda t: t.double(), KernelError, "dy must be one of"),
    (0, lambda t: t[:, 1:], ValueError, r"dy must be \(2, 6\) and a width, one row a patch, got \(2, 5, 16\)"),
    (1, lambda t: t.float(), KernelError, "pixels must be one of uint8"),
    (1, lambda t: t[..., :2], ValueError, r"pixels must be \(B, H, W, 3\)"),
    (1, lambda t: t.to("meta"), KernelError, "one device"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    args = [randn(2, 6, 16), image(2, 32, 48), 16]
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        kernel.pixels_to_tokens_backward(*args)
