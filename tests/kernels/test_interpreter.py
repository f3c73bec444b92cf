"""What the tests stand on: Triton's interpreter, as patched, computes what torch computes."""

import pytest
import torch
import triton
import triton.language as tl

from segmenter.kernels import attention, launch, reference
from tests.support import interpreter
from tests.support.parity import assert_bitwise_equal

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="there is a GPU: nothing is interpreted")


@triton.jit
def dot_kernel(A, B, C, D, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b, c = tl.load(A + i * SIZE + j), tl.load(B + i * SIZE + j), tl.load(C + i * SIZE + j)
    tl.store(D + i * SIZE + j, tl.dot(a, b.T, c, input_precision="ieee"))


@triton.jit
def cast_kernel(X, Y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def cast_and_add_kernel(X, Y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(X + i).to(tl.bfloat16)
    tl.store(Y + i, x.to(tl.float32) + 1.0)


@triton.jit
def arithmetic_kernel(X, Y, Z, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(Z + i, tl.load(X + i) * 3.0 + tl.load(Y + i) - 0.375)


@triton.jit
def shapes_kernel(X, Y, SIZE: tl.constexpr, SCALE: tl.constexpr):
    """A scalar, a row, a column and two matrices of one shape."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(X + i * SIZE + j)
    total = tl.sum(x, 1)[:, None] + tl.sum(x, 0)[None, :] + SCALE
    tl.store(Y + i * SIZE + j, total * x + tl.erf(x))


@triton.jit
def integers_kernel(X, Y, SIZE: tl.constexpr, OPERATION: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(X + i)
    if OPERATION == "add":
        x = x + x
    elif OPERATION == "sub":
        x = -2 - x
    else:
        x = x * x
    tl.store(Y + i, x)


@triton.jit
def zeros_kernel(X, SIZE: tl.constexpr):
    tl.store(X + tl.arange(0, 16), tl.zeros([SIZE], tl.float32))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot(dtype):
    a, b, c = randn(32, 32).to(dtype), randn(32, 32, seed=1).to(dtype), randn(32, 32, seed=2)
    d = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, d, 32)
    torch.testing.assert_close(d.double(), a.double() @ b.double().T + c, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dot_of_small_integers_is_exact(dtype):
    a, b, c = (randn(16, 16, seed=i).mul(4).round() for i in range(3))
    d = torch.empty(16, 16)
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), c, d, 16)
    assert_bitwise_equal(d, a @ b.T + c)


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    65504.0,
    3.3e38,
    3.4e38,
    -3.4e38,
    1e-30,
    1e-40,
    float("inf"),
    -float("inf"),
    float("nan"),
]
TIES = [1.00390625, 1.01171875, -1.00390625, 1.0039063]  # half-way between two bfloat16: down, up, down; just above: up


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_from_float32(dtype):
    x = torch.cat([torch.tensor(SPECIAL + TIES), randn(1024 - len(SPECIAL) - len(TIES)) * 100])
    y = torch.empty(1024, dtype=dtype)
    cast_kernel[(1,)](x, y, 1024)
    assert_bitwise_equal(y, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_widening_to_float32(dtype):
    x = torch.cat([torch.tensor(SPECIAL), randn(256 - len(SPECIAL)) * 100]).to(dtype)
    y = torch.empty(256)
    cast_kernel[(1,)](x, y, 256)
    assert_bitwise_equal(y, x.float())


def test_there_and_back():
    x, y = randn(64), torch.empty(64)
    cast_and_add_kernel[(1,)](x, y, 64)
    assert_bitwise_equal(y, x.bfloat16().float() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic(dtype):
    x, y, z = randn(64).to(dtype), randn(64, seed=1).to(dtype), torch.empty(64, dtype=dtype)
    x[0] = 1e-40  # subnormal, or 0 in float16
    arithmetic_kernel[(1,)](x, y, z, 64)
    assert_bitwise_equal(z, x * 3 + y - 0.375)


@pytest.mark.parametrize("size", [1, 8, 16])
def test_shapes(size):
    x, y = randn(size, size), torch.empty(size, size)
    shapes_kernel[(1,)](x, y, size, 0.5)
    wide = x.double()
    want = (wide.sum(1, keepdim=True) + wide.sum(0) + 0.5) * wide + torch.special.erf(wide)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("operation", "right", "wrong"), [("add", 2**30 - 1, 2**30), ("sub", 2**31 - 2, 2**31 - 1), ("mul", 46340, 46341)]
)
def test_sums_of_32_bits_that_do_not_fit_are_errors(operation, right, wrong):
    """Compiled, they would wrap around silently. (Offsets of large tensors need 64 bits.)"""
    y = torch.empty(16, dtype=torch.int32)
    integers_kernel[(1,)](torch.full((16,), right, dtype=torch.int32), y, 16, operation)
    assert (y == {"add": 2 * right, "sub": -2 - right, "mul": right**2}[operation]).all()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow"):
        integers_kernel[(1,)](torch.full((16,), wrong, dtype=torch.int32), y, 16, operation)


def test_a_size_that_is_no_integer_is_an_error_although_it_equals_one():
    x = torch.empty(16)
    zeros_kernel[(1,)](x, 16)
    assert not x.any()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="constexpr.int"):
        zeros_kernel[(1,)](x, 16.0)


def test_patching_again_changes_nothing():
    before = interpreter.interp.InterpreterBuilder.create_dot
    interpreter.patch()
    assert interpreter.interp.InterpreterBuilder.create_dot is before


def test_outputs_of_kernels_are_poisoned_and_those_of_others_are_not():
    assert attention.torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert attention.torch.empty(3, dtype=torch.int32).dtype == torch.int32
    assert attention.torch is not torch and attention.torch.empty is not torch.empty
    assert reference.torch is torch
