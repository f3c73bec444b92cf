"""The gradients of an MLP half of a block: numbers, configurations of its product, subsets, what is kept."""

import itertools

import pytest
import torch

from segmenter.kernels import (
    configs,
    configs_backward,
    gelu_backward,
    launch,
    layernorm_mlp_backward,
    reference,
    reference_backward,
)
from segmenter.kernels.launch import KernelError
from segmenter.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_hidden
from tests.kernels.test_layernorm_mlp import mlp_args
from tests.support.gradients import check_gradients, doubled, gradients
from tests.support.huge_offsets import FAR, far_apart
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = configs.LinearConfig(32, 32, 16, 3, 4, 2)
by_dtype = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)


def definition(x, norm_weight, norm_bias, *others):
    """`reference.layernorm_mlp` for LayerNorms of another type than x."""
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    return reference.layernorm_mlp(x.to(wide), norm_weight.to(wide), norm_bias.to(wide), *others)


@pytest.fixture
def launched(monkeypatch):
    """Plans as they are launched."""
    plans, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: plans.append(self) or run(self, *tensors))
    return plans


def names(plans):
    return [plan.kernel.fn.__name__ for plan in plans]


# ---------------------------------------------------------------------------------------------------------------------
# All gradients


@by_dtype
@pytest.mark.parametrize(("m", "d", "hidden"), [(1, 16, 32), (37, 48, 100), (67, 64, 256), (31, 192, 130)])
def test_parity(m, d, hidden, dtype, guarded_outputs):
    args = mlp_args(m, d, dtype, hidden=hidden, seed=m)
    check_gradients(layernorm_mlp, definition, args, randn(m, d, seed=9, dtype=dtype), terms=m + hidden, max_ratio=3.0)


@by_dtype
@pytest.mark.parametrize("scaled", [False, True])
def test_gelu_by_tanh(scaled, dtype, guarded_outputs):
    """With the derivative of the approximation; LayerScale's gradient, too."""
    args, grad = mlp_args(37, 48, dtype, hidden=96), randn(37, 48, seed=9, dtype=dtype)
    args = (*args, randn(48, seed=8, dtype=dtype)) if scaled else args

    def by_tanh(function):
        return lambda *t: function(*t[:7], 1e-5, t[7] if scaled else None, True)

    check_gradients(by_tanh(layernorm_mlp), by_tanh(definition), args, grad, terms=130, max_ratio=3.0)
    if dtype == FP32:
        for only in range(7):  # each by itself, of which some need no product with the derivative
            ours, exact = (
                gradients(by_tanh(f), a, grad, [only]) for f, a in ((layernorm_mlp, args), (definition, doubled(args)))
            )
            torch.testing.assert_close(ours[only].double(), exact[only], rtol=1e-4, atol=1e-4)


def test_derivative_of_the_approximation(guarded_outputs):
    """Far out, where an exponential overflows or is none; and where the two forms differ most."""
    near, far = torch.linspace(-30, 30, 4001, device=DEVICE), torch.logspace(1.5, 18, 40, device=DEVICE)
    wide, narrow = (x.view(-1, 1).repeat(1, 16) for x in (torch.cat([-far, near, far]), near))
    for a, dtype in ((wide, FP32), (narrow, FP16)):
        x, ones = a.to(dtype), torch.ones(len(a), 1, dtype=dtype, device=DEVICE)
        weight = torch.ones(1, 16, dtype=dtype, device=DEVICE)
        d_a, h, _ = gelu_backward.run(ones, weight, x, True, False, tanh=True)
        exact = x.double().requires_grad_()
        want = torch.nn.functional.gelu(exact, approximate="tanh")
        (slope,) = torch.autograd.grad(want.sum(), exact)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(h.double(), want.detach(), rtol=4 * eps, atol=4e-6)
        torch.testing.assert_close(d_a.double(), slope, rtol=4 * eps, atol=4e-6)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_wide_stream_narrow_weights(dtype, guarded_outputs):
    """Under autocast x, and so the result and its gradient, stay float32: dx has the whole of both."""
    args = mlp_args(37, 48, dtype, stream=FP32)
    grad = randn(37, 48, seed=9)
    dx = check_gradients(layernorm_mlp, definition, args, grad, max_ratio=3.0)[0]
    assert dx.dtype == FP32
    small = (*args[:3], 1e-4 * args[3], *args[4:])  # nearly all of dx is the stream's own
    exact = gradients(definition, doubled(small), grad)[0]
    assert (gradients(layernorm_mlp, small, grad)[0] - exact).norm() < 1e-5 * grad.norm()


def test_half_precision_by_autocast():
    args, grad = mlp_args(37, 48, FP32), randn(37, 48, seed=9)

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast(DEVICE, BF16):
                return function(*inputs)

        return call

    ours, eager = (gradients(under_autocast(f), args, grad) for f in (layernorm_mlp, reference.layernorm_mlp))
    exact = gradients(reference.layernorm_mlp, doubled(args), grad)
    for o, e, want in zip(ours, eager, exact, strict=True):
        assert o.dtype == FP32
        assert (o - want).norm() <= 1.2 * (e - want).norm() + 1e-6 * want.norm()


SUBSETS = [*([i] for i in range(7)), [0, 6], [3, 4], [5, 6], [1, 2, 4]]


@pytest.mark.parametrize("only", SUBSETS, ids=str)
def test_subsets_of_gradients(only, launched, guarded_outputs):
    args, grad = mlp_args(9, 48, FP32, hidden=32), randn(9, 48, seed=9)
    exact = gradients(reference.layernorm_mlp, doubled(args), grad, only)
    for _ in range(2):  # from notes, too
        launched.clear()
        ours = gradients(layernorm_mlp, args, grad, only)
        for o, x in zip(ours, exact, strict=True):
            assert (o is None) == (x is None)
            if o is not None:
                torch.testing.assert_close(o.double(), x, rtol=1e-4, atol=2e-5)
    ran = names(launched)
    assert ("_gelu_bwd_kernel" in ran) == any(i < 5 for i in only)
    assert ("_layernorm_bwd_kernel" in ran) == bool({0, 1} & {*only})
    assert ran.count("_layernorm_fwd_kernel") == 1 + (only != [6])


def test_inputs_stay_and_a_second_run_gives_the_same_bits():
    args = [guarded(t) for t in mlp_args(70, 48, BF16)]
    before = [t.clone() for t in args]
    grad = guarded(randn(70, 48, seed=9, dtype=BF16))
    first = gradients(layernorm_mlp, args, grad)
    for a, b in zip(gradients(layernorm_mlp, args, grad), first, strict=True):
        assert_bitwise_equal(a, b)
    for t, b in zip(args, before, strict=True):
        assert_bitwise_equal(t.detach(), b)
        check_guards(t)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    x, *others = mlp_args(12, 48, BF16, hidden=32)
    placed = LAYOUTS[layout](randn(2, 6, 48, seed=9, dtype=BF16))
    x, upstream = x.view(2, 6, 48)[: len(placed)], guarded(placed)
    ours = gradients(layernorm_mlp, (x, *others), upstream)
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    for a, b in zip(ours, gradients(layernorm_mlp, (x, *others), placed.contiguous()), strict=True):
        eps = torch.finfo(BF16).eps
        torch.testing.assert_close(a, b, rtol=eps, atol=eps * b.abs().max().item())  # a library multiplies


def test_eps_counts():
    x, *parameters = mlp_args(20, 48, FP32)
    for eps in (1e-6, 1e-2):
        args = (1e-3 * x, *parameters, eps)
        check_gradients(layernorm_mlp, reference.layernorm_mlp, args, randn(20, 48, seed=9), terms=300, max_ratio=3.0)


@pytest.mark.parametrize(("m", "hidden"), [(0, 32), (0, 0), (5, 0)])
def test_empty(m, hidden):
    args = list(mlp_args(m, 48, FP32, hidden=32))
    if hidden == 0:
        args[3:6] = args[3][:0], args[4][:0], args[5][:, :0]
    grad = randn(m, 48, seed=9)
    for _ in range(3):  # from notes, too
        dx, *others, d_bias = gradients(layernorm_mlp, args, grad)
        assert_bitwise_equal(dx, grad)
        for o, x in zip(others, args[1:], strict=False):
            assert_bitwise_equal(o, torch.zeros_like(x))
        torch.testing.assert_close(d_bias, grad.sum(0))


def test_what_is_kept():
    """Level 1 of the memory that training may use: of what depends on the tokens, x alone."""
    sizes = []
    args = mlp_args(9, 48, FP16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layernorm_mlp(args[0].requires_grad_(), *args[1:])
    assert sorted(sizes) == sorted(t.nbytes for t in args)


@by_dtype
@pytest.mark.parametrize("stream", [None, FP32], ids=str)
def test_kept_hidden_layer(dtype, stream, guarded_outputs):
    """The same gradients, of what the forward pass returns besides its result."""
    args, grad = mlp_args(37, 48, dtype, hidden=100, stream=stream), randn(37, 48, seed=9, dtype=stream or dtype)

    def kept(*inputs):
        return layernorm_mlp_hidden(*inputs)[0]

    check_gradients(kept, definition, args, grad, terms=137, max_ratio=3.0)
    for only in ([0], [3], [4, 5]):
        ours, again = (gradients(f, args, grad, only) for f in (kept, layernorm_mlp))
        for i in only:
            eps = torch.finfo(again[i].dtype).eps
            torch.testing.assert_close(ours[i], again[i], rtol=4 * eps, atol=4 * eps * again[i].abs().max().item())


def test_what_is_kept_with_the_hidden_layer():
    """Level 0 of the memory that training may use: x and the hidden layer, not the result."""
    sizes = []
    args = list(mlp_args(9, 48, FP16, hidden=32))
    args[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layernorm_mlp_hidden(*args)
    assert sorted(sizes) == sorted([*(t.nbytes for t in args), 2 * 9 * 32])
    y, a = layernorm_mlp_hidden(*args)
    with torch.no_grad():
        a.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradient_of_the_hidden_layer_is_the_references():
    args, of_y, of_a = mlp_args(9, 48, FP32, hidden=32), randn(9, 48, seed=8), randn(9, 32, seed=9)

    def both(function):
        def call(*inputs):
            y, a = function(*inputs)
            return (y * of_y).sum() + (a * of_a).sum()

        return call

    ours = gradients(both(layernorm_mlp_hidden), args, torch.ones(()))
    want = gradients(both(reference_backward.layernorm_mlp_hidden), args, torch.ones(()))
    for o, w in zip(ours, want, strict=True):
        torch.testing.assert_close(o, w, rtol=1e-4, atol=1e-4)


BAD_CALLS = [
    (0, lambda t: t.half(), KernelError, "grad must be one of float32, got torch.float16"),
    (0, lambda t: t[1:], ValueError, r"grad must be .5, 48., got .4, 48."),
    (1, lambda t: t.double(), KernelError, "x must be one of"),
    (4, lambda t: t[:, 1:], ValueError, "fc1_weight must be"),
    (5, lambda t: t.half(), KernelError, "bias must be one of float32"),
    (6, lambda t: t[1:], ValueError, r"fc2_weight must be .48, 32., got .47, 32."),
    (6, lambda t: t.half(), KernelError, "fc2_weight must be one of float32"),
    (7, lambda t: t[1:], ValueError, r"pre_activation must be .5, 32., got .4, 32."),
    (7, lambda t: t.half(), KernelError, "pre_activation must be one of float32"),
    (2, lambda t: t.to("meta"), KernelError, "one device"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    args = [randn(5, 48, seed=9), *mlp_args(5, 48, FP32, hidden=32)[:6], randn(5, 32, seed=10)]
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        layernorm_mlp_backward.layernorm_mlp_backward(*args[:7], pre_activation=args[7])


# ---------------------------------------------------------------------------------------------------------------------
# The product


def product_args(m, k, n, dtype, seed=0):
    return tuple(
        t.to(dtype)
        for t in (randn(m, k, seed=seed), randn(k, n, seed=seed + 1) / k**0.5, 2 * randn(m, n, seed=seed + 2))
    )


def expected(grad, weight, a):
    d_a = torch.ops.aten.gelu_backward(grad @ weight, a)
    return d_a, torch.nn.functional.gelu(a), d_a.sum(0)


def check_product(args, config=None):
    ours = gelu_backward.run(*(guarded(t) for t in args), True, True, config)
    for o, x, e in zip(ours, expected(*doubled(args)), expected(*args), strict=True):
        assert_parity(o, x, e, frobenius=2.5 if o.dtype == FP32 else 1.1, terms=sum(args[1].shape), max_ratio=3.0)
    return ours


@by_dtype
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (33, 16, 40), (70, 48, 65), (37, 31, 33)])
def test_product(m, k, n, dtype, guarded_outputs):
    """Rows, columns and depths that fill no tile, by descriptors where strides allow it and by pointers."""
    args = product_args(m, k, n, dtype, seed=m)
    descriptors = configs.LinearConfig(32, 32, 16, 3, 4, 2, True)
    for a, b in zip(check_product(args, SMALL), check_product(args, descriptors), strict=True):
        assert_bitwise_equal(a, b)


def shipped_configs():
    """Every configuration that some call chooses, in one type of those that choose it."""
    found = {}
    for architecture, dtype, m, precision in itertools.product(
        (*configs.ARCHITECTURES, "unknown"), (FP32, BF16), (257, 8200), ("ieee", "tf32")
    ):
        size = torch.empty(0, dtype=dtype).element_size()
        config = configs_backward.gelu_backward(architecture, size, m, 3072, precision)
        found.setdefault(config, pytest.param(config, dtype, id=f"{architecture}-{dtype}-{m}".replace("torch.", "")))
    return list(found.values())


@pytest.mark.parametrize(("config", "dtype"), shipped_configs())
def test_shipped_configurations(config, dtype, guarded_outputs):
    check_product(product_args(config.block_m + 3, config.block_k + 8, config.block_n + 8, dtype), config)


def test_what_is_not_needed_is_not_made(guarded_outputs):
    args = product_args(33, 16, 40, FP16)
    full = gelu_backward.run(*args, True, True)
    for with_h, with_sums in itertools.product((True, False), repeat=2):
        d_a, h, sums = gelu_backward.run(*args, with_h, with_sums)
        assert_bitwise_equal(d_a, full[0])
        assert (h is not None, sums is not None) == (with_h, with_sums)


def test_h_is_what_the_forward_pass_made():
    """The same function, whose two forms differ by less than its rounding."""
    a = torch.linspace(-8, 8, 4096, device=DEVICE).view(64, 64)
    for dtype in (FP32, FP16, BF16):
        x = a.to(dtype)
        h = gelu_backward.run(torch.zeros_like(x), torch.zeros_like(x), x, True, False)[1]
        want = torch.nn.functional.gelu(x.double())
        assert (h - want).abs().max() <= 4e-7 + 0.51 * torch.finfo(dtype).eps * 8


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
def test_offsets_beyond_int32():
    grad, weight, a = product_args(3, 16, 32, FP16)
    far = far_apart((3, 16), (FAR, 1)), far_apart((16, 32), (FAR // 4, 1))
    far[0].copy_(grad)
    far[1].copy_(weight)
    for descriptors in (False, True):
        config = configs.LinearConfig(16, 16, 16, 1, 4, 2, descriptors)
        for o, want in zip(
            gelu_backward.run(*far, a, True, True, config),
            gelu_backward.run(grad, weight, a, True, True, config),
            strict=True,
        ):
            assert_bitwise_equal(o, want)
