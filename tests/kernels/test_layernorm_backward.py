"""The gradient of LayerNorm by its kernel: numbers, subsets, memory. Second derivatives are in test_operators.py."""

import itertools

import pytest
import torch

from segmenter.kernels import column_sums, configs_backward, launch, reference, reference_backward
from segmenter.kernels import layernorm_backward as kernel
from segmenter.kernels.launch import KernelError
from segmenter.kernels.layernorm import layernorm
from tests.support.gradients import check_gradients, doubled, gradients
from tests.support.huge_offsets import FAR, far_apart
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

FP32, BF16 = torch.float32, torch.bfloat16
by_dtype = pytest.mark.parametrize("dtype", [FP32, torch.float16, BF16], ids=str)


def inputs(*shape, dtype=FP32, seed=0, scale=1.0, offset=0.0):
    """The gradient of the result, x, weight and bias."""
    n = shape[-1]
    x = (randn(*shape, seed=seed) * scale + offset).to(dtype)
    return randn(*shape, seed=seed + 3, dtype=dtype), x, *(randn(n, seed=seed + i, dtype=dtype) for i in (1, 2))


def definition(*args):
    return reference.layernorm(*args).contiguous()


@pytest.fixture
def launched(monkeypatch):
    """Plans as they are launched."""
    plans, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: plans.append(self) or run(self, *tensors))
    return plans


@by_dtype
@pytest.mark.parametrize("n", [1, 17, 64, 150, 257, 600, 1100, 4100])
def test_parity(n, dtype, guarded_outputs):
    grad, *args = inputs(37 if n < 100 else 11 if n < 1000 else 3, n, dtype=dtype, seed=n, scale=2.0, offset=1.0)
    check_gradients(layernorm, definition, args, grad)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "programs"), [(70, 48, 3), (5, 48, 7), (21, 200, 2), (1, 130, 1)])
def test_many_steps_and_rows_longer_than_a_block(m, n, programs, dtype, guarded_outputs):
    """More row blocks than programs, fewer, and columns cut as they are beyond 8,192."""
    grad, *args = inputs(m, n, dtype=dtype, seed=m, offset=0.5)
    added = randn(m, n, seed=9)
    config = configs_backward.SumsConfig(4, 64, 4, programs)
    ours = kernel.run(grad, args[0], args[1], 1e-5, (FP32, dtype, dtype), added, config)
    exact = list(reference_backward.layernorm_backward(grad.double(), *doubled(args[:2]), FP32))
    eager = list(reference_backward.layernorm_backward(grad, *args[:2], dtype))
    exact[0], eager[0] = exact[0] + added, eager[0] + added
    for o, x, e in zip(ours, exact, eager, strict=True):
        assert_parity(o, x, e, frobenius=2.5 if o.dtype == FP32 else 1.1, terms=m)


def test_rows_of_the_table_that_are_left_out_above(launched, guarded_outputs):
    """And rows with a few columns more than any block has."""
    for n in (128, 2100, 8200):
        grad, *args = inputs(2, n, seed=n)
        check_gradients(layernorm, definition, args, grad)
    names = [plan.kernel.fn.__name__ for plan in launched]
    assert names.count("_row_statistics_kernel") == 1
    configs = {c.block_n for n in (8192, 8193) if (c := configs_backward.layernorm_backward(3, n))}
    assert configs == {8192, 1024}


@pytest.mark.parametrize("needed", [s for s in itertools.product([0, 1], repeat=3) if any(s)], ids=str)
def test_each_subset_of_gradients(needed, launched, guarded_outputs):
    grad, *args = inputs(37, 48)
    only = [i for i, need in enumerate(needed) if need]
    exact = gradients(definition, doubled(args), grad, only)
    for _ in range(2):  # from notes, too
        launched.clear()
        ours = gradients(layernorm, args, grad, only)
        for o, x in zip(ours, exact, strict=True):
            assert (o is None) == (x is None)
            if o is not None:
                torch.testing.assert_close(o.double(), x, rtol=1e-5, atol=1e-5)
    backward = "_column_parts_kernel" if needed == (0, 0, 1) else "_layernorm_bwd_kernel"
    parts = ["_partial_sums_kernel"] * (needed[1] + needed[2])
    assert [plan.kernel.fn.__name__ for plan in launched] == ["_layernorm_fwd_kernel", backward, *parts]


@pytest.mark.parametrize("which", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
def test_without_affine(which):
    grad, x, weight, bias = inputs(9, 150)
    args = (x, weight if which[0] else None, bias if which[1] else None)
    check_gradients(layernorm, definition, args, grad)


@pytest.mark.parametrize(("stream", "product"), [(FP32, BF16), (FP32, torch.float16), (BF16, FP32)], ids=str)
def test_types(stream, product, guarded_outputs):
    """x of a wide stream, its gradient from a narrow product, parameters of either type: rounded once, each."""
    grad, x, weight, _ = inputs(37, 192, seed=5)
    grad, x, weight = grad.to(product), x.to(stream), weight.to(product)
    ours = kernel.run(grad, x, weight, 1e-5, (stream, product, FP32))
    want = kernel.run(grad.float(), x.float(), weight.float(), 1e-5, (FP32, FP32, FP32))
    for o, w, dtype in zip(ours, want, (stream, product, FP32), strict=True):
        assert_bitwise_equal(o, w.to(dtype))


def test_the_gradient_of_the_stream_is_added_in_float32():
    """Where it is much larger than the rest: rounding both would lose what the LayerNorm gives."""
    grad, x, weight, _ = inputs(20, 64, dtype=BF16)
    added = 300 * randn(20, 64, seed=8)
    dx = kernel.run(grad, x, weight, 1e-5, (FP32, None, None), added)[0]
    exact = reference_backward.layernorm_backward(grad.double(), x.double(), weight.double(), None)[0]
    torch.testing.assert_close((dx - added).double(), exact, rtol=1e-3, atol=2e-4)


def test_eps_counts():
    grad, *args = inputs(8, 48, scale=1e-3)
    for eps in (1e-6, 1e-2):
        check_gradients(lambda *t, eps=eps: layernorm(*t, eps), lambda *t, eps=eps: definition(*t, eps), args, grad)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_mean_much_larger_than_deviation(offset):
    grad, x, weight, bias = inputs(64, 192, offset=offset)
    exact = gradients(definition, doubled((x, weight, bias)), grad)
    ours, eager = (gradients(f, (x, weight, bias), grad) for f in (layernorm, definition))
    for o, e, want in zip(ours, eager, exact, strict=True):
        assert (o - want).abs().max() <= 4 * (e - want).abs().max() + 1e-6 * want.abs().max()


def test_nan_stays_in_its_row_of_dx_and_reaches_every_sum_it_is_in():
    for place in ("x", "grad"):
        grad, x, weight, bias = inputs(6, 192)
        (x if place == "x" else grad)[1, 3] = float("nan")
        dx, d_weight, d_bias = gradients(layernorm, (x, weight, bias), grad)
        assert dx[1].isnan().all() and not dx[[0, 2, 3, 4, 5]].isnan().any()
        assert d_weight.isnan().all() if place == "x" else d_weight.isnan().nonzero().tolist() == [[3]]
        assert d_bias.isnan().nonzero().tolist() == ([] if place == "x" else [[3]])


def test_bitwise_repeatable():
    grad, *args = inputs(300, 48, dtype=BF16)
    first = gradients(layernorm, args, grad)
    for a, b in zip(gradients(layernorm, args, grad), first, strict=True):
        assert_bitwise_equal(a, b)


def test_the_number_of_parts_knows_the_shape_alone(monkeypatch, launched):
    grad, *args = inputs(300, 48)
    grids = []
    for name in ("sm_80", "sm_90", "gfx942"):
        monkeypatch.setattr(launch, "architecture", lambda tensor, name=name: name)
        launched.clear()
        kernel.run(grad, args[0], args[1], 1e-5, (FP32, FP32, FP32))
        grids.append([(plan.grid, plan.scalars) for plan in launched])
    assert grids[0] == grids[1] == grids[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    grad, x, weight, bias = inputs(2, 37, 48, dtype=BF16)
    placed = LAYOUTS[layout](grad)
    x, upstream = x[: len(placed)], guarded(placed)
    ours = gradients(layernorm, (x, weight, bias), upstream)
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    for a, b in zip(ours, gradients(layernorm, (x, weight, bias), placed.contiguous()), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
def test_offsets_beyond_int32():
    grad, x, weight, _ = inputs(3, 48, dtype=torch.float16)
    far = [far_apart((3, 48), (FAR, 1)) for _ in range(3)]
    for place, t in zip(far, (grad, x, x), strict=True):
        place.copy_(t)
    for block_n in (64, 32):
        config = configs_backward.SumsConfig(2, block_n, 1, 2)
        ours = kernel.run(far[0], far[1], weight, 1e-5, (FP32, FP32, FP32), far[2], config)
        want = kernel.run(grad, x, weight, 1e-5, (FP32, FP32, FP32), x, config)
        for a, b in zip(ours, want, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("shape", [(0, 48), (3, 0), (2, 0, 16)])
def test_empty(shape):
    for _ in range(3):  # from notes, too
        grad, *args = inputs(*shape)
        dx, *sums = gradients(layernorm, args, grad)
        assert dx.shape == shape
        for t in sums:
            assert_bitwise_equal(t, torch.zeros(shape[-1], device=DEVICE))


def test_one_dimension():
    grad, *args = inputs(48)
    check_gradients(layernorm, definition, args, grad)


def test_half_precision_by_autocast():
    """x is float32 there, and so are all gradients; inside and outside of autocast the same ones."""
    grad, *args = inputs(9, 48)
    with torch.autocast(DEVICE, BF16):
        inside = gradients(layernorm, args, grad)
    for a, b in zip(inside, gradients(layernorm, args, grad), strict=True):
        assert_bitwise_equal(a, b)


def test_what_is_kept():
    """x and the parameters; not the result."""
    sizes = []
    _, x, weight, bias = inputs(9, 48, dtype=torch.float16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layernorm(x.requires_grad_(), weight, bias)
    assert sorted(sizes) == [96, 96, 9 * 96]


BAD_CALLS = [
    (0, lambda t: t.half(), KernelError, "grad must be one of float32, got torch.float16"),
    (0, lambda t: t[1:], ValueError, r"grad must be .5, 48., got .4, 48."),
    (1, lambda t: t.double(), KernelError, "x must be one of"),
    (2, lambda t: t[1:], ValueError, "LayerNorm's weight must be"),
    (1, lambda t: t.to("meta"), KernelError, "one device"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    args = [*inputs(5, 48)[:3], FP32]
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        kernel.layernorm_backward(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Sums over rows


@pytest.mark.parametrize("sums", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (70, 130), (129, 48), (5, 300)])
def test_sums_and_rounding_in_one_pass(m, n, dtype, sums, guarded_outputs):
    x = guarded(2 * randn(m, n, seed=m) + 0.25)
    for config in (None, configs_backward.SumsConfig(16, 32, 4, 3)):
        y, total = column_sums.passed_on(x, dtype, sums, config=config)
        assert y is x if dtype == FP32 else torch.equal(y, x.to(dtype))
        assert_parity(total, x.double().sum(0), x.sum(0).to(sums), terms=m, frobenius=2.5)
        assert torch.equal(column_sums.passed_on(x, dtype, None, config=config)[0], y)


def test_sums_over_no_rows():
    y, total = column_sums.passed_on(torch.empty(0, 5, device=DEVICE), BF16, BF16)
    assert y.shape == (0, 5) and y.dtype == BF16
    assert_bitwise_equal(total, torch.zeros(5, dtype=BF16, device=DEVICE))
