"""The LayerNorm kernel: numbers, limits. What all operators share is in test_operators.py."""

import pytest
import torch

from segmenter.kernels import configs, launch, reference
from segmenter.kernels import layernorm as kernel
from segmenter.kernels.layernorm import layernorm
from tests.support.huge_offsets import FAR, far_apart
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, guarded, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(*shape, dtype, seed=0, scale=1.0, offset=0.0):
    x = (randn(*shape, seed=seed) * scale + offset).to(dtype)
    return x, randn(shape[-1], seed=seed + 1, dtype=dtype), randn(shape[-1], seed=seed + 2, dtype=dtype)


def check(actual, args, eps=1e-5, **options):
    exact = reference.layernorm(*(None if t is None else t.double() for t in args), eps)
    assert_parity(actual, exact, reference.layernorm(*args, eps), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 48, 150, 192, 257, 384, 768, 1000, 1024, 1030, 4100])
def test_parity(n, dtype, guarded_outputs):
    args = inputs(37 if n < 1000 else 5, n, dtype=dtype, seed=n, scale=2.0, offset=1.0)
    args = tuple(guarded(t) for t in args)
    check(layernorm(*args), args, context=f"n={n} {dtype}")


@pytest.mark.parametrize("n", [64, 150, 193])
def test_rows_longer_than_a_block(n):
    """What happens beyond 8,192 columns, with smaller blocks."""
    args = tuple(guarded(t) for t in inputs(5, n, dtype=torch.float32, offset=3.0))
    config = configs.LayerNormConfig(2, 64, 1)
    check(kernel.run(*args, 1e-5, torch.float32, config), args)
    mean, rstd = kernel.statistics(args[0], 1e-5, config)
    x = args[0].double()
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert configs.layernorm(8193).block_n == 8192


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("n", [192, 768])
def test_mean_much_larger_than_deviation(n, ratio):
    x, weight, bias = inputs(64, n, dtype=torch.float32, seed=int(ratio), offset=ratio)
    exact = reference.layernorm(x.double(), weight.double(), bias.double())
    error = (layernorm(x, weight, bias) - exact).abs().max().item()
    eager = (reference.layernorm(x, weight, bias) - exact).abs().max().item()
    assert error <= 4 * eager + 1e-6, f"{error:.2e} against {eager:.2e} of eager"


def test_statistics():
    x = guarded(randn(130, 192) * 3 + 2)
    mean, rstd = kernel.statistics(x, 1e-3)
    x = x.double()
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.var(-1, correction=0) + 1e-3).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1.0])
def test_eps_counts(eps):
    args = inputs(8, 48, dtype=torch.float32, scale=1e-3)
    check(layernorm(*args, eps), args, eps)
    constant = torch.full((2, 48), 7.0, device=DEVICE)
    assert_bitwise_equal(layernorm(constant, None, None, eps), torch.zeros(2, 48, device=DEVICE))


def test_without_affine():
    x, weight, bias = inputs(9, 150, dtype=torch.float32)
    for args in ((x, None, None), (x, weight, None), (x, None, bias)):
        check(layernorm(*args), args)


def test_types_of_parameters_and_result():
    """Parameters of their own type; a result of another type than x is rounded once."""
    x, weight, bias = inputs(9, 192, dtype=torch.float32)
    wide = layernorm(x.bfloat16().float(), weight, bias)
    assert_bitwise_equal(layernorm(x.bfloat16(), weight, bias), wide.bfloat16())
    assert_bitwise_equal(kernel.run(x, weight, bias, 1e-5, torch.float16), layernorm(x, weight, bias).half())


def test_nan_and_infinity_stay_in_their_row():
    x, weight, bias = inputs(6, 192, dtype=torch.float32)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    check(layernorm(x, weight, bias), (x, weight, bias))


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
def test_offsets_beyond_int32():
    """Rows 1.25 * 2**30 elements apart, a stride that fits 32 bits. Only the pages that are used exist."""
    x = far_apart((3, 48), (FAR, 1))
    x.copy_(randn(3, 48))
    assert_bitwise_equal(layernorm(x, None, None), layernorm(x.contiguous(), None, None))


@pytest.mark.parametrize("shape", [(0, 48), (3, 0), (2, 0, 16)])
def test_empty(shape):
    assert layernorm(randn(shape), torch.ones(shape[-1], device=DEVICE), None).shape == shape


def test_one_dimension():
    args = inputs(48, dtype=torch.float32)
    check(layernorm(*args), args)


def test_errors():
    x, weight, bias = inputs(3, 16, dtype=torch.float32)
    with pytest.raises(launch.KernelError, match="float64.*eager"):
        layernorm(x.double(), weight, bias)
    with pytest.raises(launch.KernelError, match="weight must be one of"):
        layernorm(x, weight.double(), bias)
    with pytest.raises(ValueError, match=r"bias must be \(16,\), got \(15,\)"):
        layernorm(x, weight, bias[1:])
    with pytest.raises(ValueError, match="no dimension"):
        layernorm(x[0, 0], None, None)
    with pytest.raises(launch.KernelError, match="2\\*\\*31"):
        kernel.as_rows(torch.empty(1).expand(2**31, 16))
