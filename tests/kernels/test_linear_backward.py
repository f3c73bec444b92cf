"""The gradients of linear layers: numbers, types, subsets, what runs and what is kept."""

import itertools

import pytest
import torch

from segmenter.kernels import blocks, column_sums, launch, linear_backward, reference
from segmenter.kernels.launch import KernelError
from segmenter.kernels.linear import layernorm_linear, linear
from tests.support.gradients import check_gradients, doubled, gradients
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, check_guards, guarded, randn

FP32, BF16 = torch.float32, torch.bfloat16
by_dtype = pytest.mark.parametrize("dtype", [FP32, torch.float16, BF16], ids=str)


def linear_args(m, k, n, dtype=FP32, seed=0):
    """The gradient of the result, x, weight and bias."""
    weight, bias = randn(n, k, seed=seed + 1) / k**0.5, randn(n, seed=seed + 2)
    return tuple(t.to(dtype) for t in (randn(m, n, seed=seed + 3), randn(m, k, seed=seed), weight, bias))


def norm_args(m, k, n, dtype=FP32, stream=None, seed=0):
    """The gradient of the result, x, LayerNorm's parameters, weight and bias."""
    grad, x, weight, bias = linear_args(m, k, n, dtype, seed)
    norm = 1 + 0.3 * randn(k, seed=seed + 4), randn(k, seed=seed + 5)
    return (
        grad,
        *((2 * t + 1).to(stream or dtype) for t in (x.float(),)),
        *(t.to(stream or dtype) for t in norm),
        weight,
        bias,
    )


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels as they are launched."""
    names, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *t: names.append(self.kernel.fn.__name__) or run(self, *t))
    return names


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 1), (37, 48, 130), (67, 192, 31)])
@by_dtype
def test_linear(m, k, n, gelu, dtype, guarded_outputs):
    grad, *args = linear_args(m, k, n, dtype, seed=m)
    check_gradients(
        lambda *t: linear(*t, gelu=gelu), lambda *t: reference.linear(*t, gelu=gelu), args, grad, terms=m + n
    )


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("stream", [None, FP32], ids=str)
@by_dtype
def test_layernorm_linear(dtype, stream, gelu, guarded_outputs):
    grad, *args = norm_args(37, 48, 100, dtype, stream)
    ours, defined = ((lambda *t, f=f: f(*t, gelu=gelu)) for f in (layernorm_linear, definition))
    check_gradients(ours, defined, args, grad, terms=137, max_ratio=3.0)


def definition(x, norm_weight, norm_bias, weight, bias, eps=1e-5, gelu=False):
    """`reference.layernorm_linear` for LayerNorms of another type than x."""
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    return reference.layernorm_linear(x.to(wide), norm_weight.to(wide), norm_bias.to(wide), weight, bias, eps, gelu)


@pytest.mark.parametrize("stream", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_the_gradient_of_a_residual_is_that_of_the_result(stream, gelu):
    """Of its own type; the product's is rounded to the product's type, as under autocast."""
    grad, *args = linear_args(37, 48, 64, BF16)
    residual, grad = randn(37, 64, seed=7, dtype=stream), randn(37, 64, seed=8, dtype=stream)
    ours = check_gradients(
        lambda *t: linear(*t, gelu=gelu), lambda *t: reference.linear(*t, gelu=gelu), (*args, residual), grad
    )
    assert_bitwise_equal(ours[3], grad)
    (alone,) = gradients(lambda r: linear(*args, r, gelu), [residual], grad)
    assert_bitwise_equal(alone, grad)


@pytest.mark.parametrize("needed", [s for s in itertools.product([0, 1], repeat=3) if any(s)], ids=str)
def test_each_subset_of_gradients(needed, launched, guarded_outputs):
    grad, *args = linear_args(37, 48, 64)
    only = [i for i, need in enumerate(needed) if need]
    for gelu in (False, True):
        exact = gradients(lambda *t, gelu=gelu: reference.linear(*t, gelu=gelu), doubled(args), grad, only)
        for _ in range(2):  # from notes, too
            launched.clear()
            ours = gradients(lambda *t, gelu=gelu: linear(*t, gelu=gelu), args, grad, only)
            for o, x in zip(ours, exact, strict=True):
                assert (o is None) == (x is None)
                if o is not None:
                    torch.testing.assert_close(o.double(), x, rtol=1e-5, atol=2e-5)
        names = [name for name in launched if name != "_linear_fwd_kernel"]
        assert names == ["_column_parts_kernel"] * (gelu or needed[2]) + ["_partial_sums_kernel"] * needed[2]


@pytest.mark.parametrize("place", range(5))
def test_only_one_gradient_of_layernorm_linear(place, launched, guarded_outputs):
    grad, *args = norm_args(37, 48, 64)
    ours = gradients(layernorm_linear, args, grad, [place])
    exact = gradients(reference.layernorm_linear, doubled(args), grad, [place])
    torch.testing.assert_close(ours[place].double(), exact[place], rtol=1e-5, atol=1e-4)
    assert [i for i, t in enumerate(ours) if t is not None] == [place]
    assert ("_layernorm_bwd_kernel" in launched) == (place in (0, 1))
    assert launched.count("_layernorm_fwd_kernel") == 1 + (place == 3)


def test_without_bias():
    grad, *args, _ = norm_args(37, 48, 64, BF16)
    check_gradients(lambda *t: layernorm_linear(*t, None), lambda *t: definition(*t, None), args, grad)
    check_gradients(linear, reference.linear, (args[0], args[3]), grad)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_of_float32_products(precision):
    """That of PyTorch's products, whichever is set; without a GPU both are exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        grad, *args = norm_args(37, 48, 64)
        exact = gradients(reference.layernorm_linear, doubled(args), grad)
        for o, x in zip(gradients(layernorm_linear, args, grad), exact, strict=True):
            assert (o - x).abs().max() <= (1e-5 if precision == "highest" else 5e-3) * x.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_precision_by_autocast(launched):
    """Weights have float32 gradients, of products in bfloat16. One pass rounds the stream's gradient and sums it."""
    grad, x, weight, bias = linear_args(37, 48, 64)
    residual = randn(37, 64, seed=9)

    def under_autocast(function):
        def call(*args):
            with torch.autocast(DEVICE, BF16):
                return function(*args)

        return call

    args = (x, weight, bias, residual)
    ours = gradients(under_autocast(linear), args, grad)
    eager = gradients(under_autocast(reference.linear), args, grad)
    exact = gradients(reference.linear, doubled(args), grad)
    for o, e, want in zip(ours, eager, exact, strict=True):
        assert o.dtype == FP32
        assert (o - want).norm() <= 1.1 * (e - want).norm() + 1e-6 * want.norm()
    assert launched[-2:] == ["_column_parts_kernel", "_partial_sums_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    grad, x, *others = norm_args(12, 48, 32, BF16)
    placed = LAYOUTS[layout](grad.view(2, 6, 32))
    x, upstream = x.view(2, 6, 48)[: len(placed)], guarded(placed)
    ours = gradients(layernorm_linear, (x, *others), upstream)
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    for a, b in zip(ours, gradients(layernorm_linear, (x, *others), placed.contiguous()), strict=True):
        eps = torch.finfo(BF16).eps
        torch.testing.assert_close(a, b, rtol=eps, atol=eps * b.abs().max().item())  # a library multiplies


@pytest.mark.parametrize(("m", "n"), [(0, 16), (5, 0), (0, 0)])
def test_empty(m, n):
    for _ in range(3):  # from notes, too
        grad, *args = norm_args(m, 48, n)
        for gelu in (False, True):
            ours = gradients(lambda *t, gelu=gelu: layernorm_linear(*t, gelu=gelu), args, grad)
            for o, x in zip(ours, args, strict=True):
                assert_bitwise_equal(o, torch.zeros_like(x))


def test_what_is_kept():
    """The arguments, nothing else: neither normalised rows nor results."""
    sizes = []
    _, *args = norm_args(9, 48, 64, torch.float16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layernorm_linear(args[0].requires_grad_(), *args[1:], gelu=True)
    assert sorted(sizes) == sorted(t.nbytes for t in args)


BAD_CALLS = [
    (0, lambda t: t.half(), KernelError, "grad must be one of float32, got torch.float16"),
    (0, lambda t: t[1:], ValueError, r"grad must be .5, 64., got .4, 64."),
    (1, lambda t: t.half(), KernelError, "x must be one of float32"),
    (2, lambda t: t[:, 1:], ValueError, "weight must be"),
    (3, lambda t: t[1:], ValueError, "bias must be"),
    (1, lambda t: t.to("meta"), KernelError, "one device"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    args = list(linear_args(5, 48, 64))
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        linear_backward.linear_backward(*args)
    if at in (0, 2):
        args = [args[0], args[1], *norm_args(5, 48, 64)[2:4], *args[2:]]
        with pytest.raises(error, match=message):
            linear_backward.layernorm_linear_backward(*args)


# ---------------------------------------------------------------------------------------------------------------------
# The derivative of the GELU


@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=str)
def test_gelu_and_its_derivative_of_all_sizes(dtype, guarded_outputs):
    """Of float32 pre-activations by each form. Absolute errors: that of the formula is 7e-7."""
    x = torch.linspace(-12, 12, 1501, device=DEVICE).to(dtype)[:, None].contiguous()
    y, _ = column_sums.passed_on(torch.ones_like(x, dtype=FP32), FP32, None, x)
    exact = torch.ops.aten.gelu_backward(torch.ones_like(x, dtype=torch.float64), x.double())
    assert (y - exact).abs().max() <= (3e-7 if dtype == FP32 else 5e-7)


def test_gelu_derivative_at_the_ends():
    """As eager PyTorch has it: NaN at infinities, for 0 times infinity."""
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0, -60.0, 60.0]], device=DEVICE)
    for dtype in (FP32, torch.float16):
        y, _ = column_sums.passed_on(torch.ones_like(x), FP32, None, x.to(dtype))
        want = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        torch.testing.assert_close(y, want, rtol=0, atol=5e-7, equal_nan=True)


def test_forms():
    assert blocks.gelu_form(FP32, "sm_90") == "erf" and blocks.gelu_form(BF16, "gfx942") == "divide"
