"""What Triton's interpreter cannot do, found out by asking it."""

import functools

import torch
import triton
import triton.language as tl

_SIZE = 16


@triton.jit
def _product_kernel(X, Y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(X + at).to(tl.bfloat16)
    tl.store(Y + at, tl.dot(x, x, input_precision="ieee"))


@functools.cache
def why_not_bfloat16() -> str | None:
    """Why the interpreter must not be given bfloat16, or None if it computes it as a GPU does.

    Released interpreters keep the bits in integers: products are of bit patterns, rounding cuts off. They may be
    repaired, so what counts is what a product of rounded numbers comes out as.
    """
    x = 1 + torch.arange(_SIZE * _SIZE).reshape(_SIZE, _SIZE) / 997  # no number of bfloat16 but the first
    y = torch.zeros_like(x)
    try:
        _product_kernel[(1,)](x, y, _SIZE)
    except Exception as error:  # whatever an interpreter raises that does not know the type
        return f"bfloat16 in Triton's interpreter, which fails at it ({type(error).__name__})"
    rounded = x.bfloat16().double()
    if torch.allclose(y.double(), rounded @ rounded, rtol=1e-6):
        return None
    return "bfloat16 in Triton's interpreter, which computes it wrongly"
