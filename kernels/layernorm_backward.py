"""The gradient of LayerNorm over the last dimension, from x and the gradient of the result alone.

    dY, x (..., N), weight (N,)  ->  dx (..., N), dweight (N,), dbias (N,)

With xn = (x - mean) * rstd and g = dY * weight: dx = rstd * (g - mean of g - xn * mean of g * xn), means over a row;
dweight = sum of dY * xn, dbias = sum of dY, sums over all rows. Mean and rstd are computed again, in float32, from x,
which has to be read anyway: nothing but x is kept for the backward pass. What reaches x past the LayerNorm, the
gradient of a residual stream, is added before dx is rounded once.

Each of P programs takes every P-th block of rows and keeps its sums for dweight and dbias in registers, float32;
kernels/partial_sums.py adds the P parts in a fixed order. P follows from the shape alone. So there are no atomics, and
a second run gives the same bits. (Liger's kernel has parts for each multiprocessor, which differ with the device.)

Limits: none on shapes. Rows of up to 8,192 columns stay in registers; of longer ones four float32 numbers each are
computed first, and columns are cut between programs.
Reference: `reference_backward.layernorm_backward`. Test: tests/kernels/test_layernorm_backward.py.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import column_sums, configs_backward, launch, partial_sums, reference_backward
from segmenter.kernels.checks import as_rows, check_affine
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _load(x_rows, offs_n, N: tl.constexpr, EVEN: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32 of rows that exist, 0 beyond the last column."""
    if EVEN:
        x = tl.load(x_rows[:, None] + offs_n[None, :])
    else:
        x = tl.load(x_rows[:, None] + offs_n[None, :], mask=offs_n[None, :] < N, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _centre(x, mean, offs_n, N: tl.constexpr, EVEN: tl.constexpr):
    """x - mean, and 0 beyond the last column, which would otherwise enter the sums as -mean."""
    x = x - mean[:, None]
    if not EVEN:
        x = tl.where(offs_n[None, :] < N, x, 0.0)
    return x


@triton.jit
def _row_statistics_kernel(
    DY, X, W, Stats,  # (M, N) twice, (N,) or None; (M, 4) float32: mean, rstd, mean of g, mean of g * xn
    stride_dy, stride_x, n_rows, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Of one row, longer than a block."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = N % BLOCK_N == 0
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for n_0 in tl.range(0, N, BLOCK_N):
        total += _load(X + row * stride_x, n_0 + offs_n, N, EVEN)
    mean = tl.sum(total, 1) / N
    squares = tl.zeros([1, BLOCK_N], tl.float32)
    of_g = tl.zeros([1, BLOCK_N], tl.float32)
    of_product = tl.zeros([1, BLOCK_N], tl.float32)
    for n_0 in tl.range(0, N, BLOCK_N):
        x = _centre(_load(X + row * stride_x, n_0 + offs_n, N, EVEN), mean, n_0 + offs_n, N, EVEN)
        g = _load(DY + row * stride_dy, n_0 + offs_n, N, EVEN)
        if HAS_WEIGHT:
            g *= tl.load(W + n_0 + offs_n, mask=n_0 + offs_n < N, other=0.0).to(tl.float32)[None, :]
        squares += x * x
        of_g += g
        of_product += g * x
    rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)
    tl.store(Stats + 4 * row, mean)
    tl.store(Stats + 4 * row + 1, rstd)
    tl.store(Stats + 4 * row + 2, tl.sum(of_g, 1) / N)
    tl.store(Stats + 4 * row + 3, tl.sum(of_product, 1) / N * rstd)


@triton.jit
def _layernorm_bwd_kernel(
    DY, X, W, Added, DX, Parts, Stats,  # (M, N) twice, (N,), (M, N) twice, (1 or 2, P, N) float32, as above
    stride_dy, stride_x, stride_a, n_rows, n_parts, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_ADDED: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,  # which sums are parts, in this order
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = N % BLOCK_N == 0
    part = tl.program_id(0) // N_BLOCKS
    offs_n = (tl.program_id(0) % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_WEIGHT:
        weight = tl.load(W + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tl.cdiv(tl.cdiv(n_rows, BLOCK_M) - part, n_parts)
    for i in tl.range(0, steps):
        offs_m = (i * n_parts + part).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = offs_m < n_rows
        rows = tl.minimum(offs_m, n_rows - 1)  # beyond the last row: that again, with a gradient of 0
        dy = tl.where(inside[:, None], _load(DY + rows * stride_dy, offs_n, N, EVEN), 0.0)
        x = _load(X + rows * stride_x, offs_n, N, EVEN)
        if N_BLOCKS == 1:
            x = _centre(x, tl.sum(x, 1) / N, offs_n, N, EVEN)
            rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
        else:
            x = _centre(x, tl.load(Stats + 4 * rows), offs_n, N, EVEN)
            rstd = tl.load(Stats + 4 * rows + 1)
        x = x * rstd[:, None]
        if NEED_WEIGHT:
            d_weight += dy * x
        if NEED_BIAS:
            d_bias += dy
        if NEED_X:
            g = dy * weight[None, :] if HAS_WEIGHT else dy
            if N_BLOCKS == 1:
                mean_g, mean_product = tl.sum(g, 1) / N, tl.sum(g * x, 1) / N
            else:
                mean_g = tl.load(Stats + 4 * rows + 2)
                mean_product = tl.load(Stats + 4 * rows + 3)
            dx = (g - mean_g[:, None] - x * mean_product[:, None]) * rstd[:, None]
            if HAS_ADDED:
                dx += _load(Added + rows * stride_a, offs_n, N, EVEN)
            mask = inside[:, None]
            if not EVEN:
                mask = mask & (offs_n[None, :] < N)
            tl.store(DX + rows[:, None] * N + offs_n[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    row = part.to(tl.int64)
    if NEED_WEIGHT:
        tl.store(Parts + row * N + offs_n, tl.sum(d_weight, 0), mask=offs_n < N)
        row += n_parts
    if NEED_BIAS:
        tl.store(Parts + row * N + offs_n, tl.sum(d_bias, 0), mask=offs_n < N)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def run(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    needed: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    added: torch.Tensor | None = None,
    config: configs_backward.SumsConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, weight and bias.

    Args:
        grad: (M, N), x: (M, N), dense rows. weight: (N,), dense, or None.
        needed: the type of each gradient that is needed, else None.
        added: (M, N), dense rows, added to the gradient of x.
        config: instead of the table's choice.
    """
    (m, n), device = x.shape, x.device
    dx = None if needed[0] is None else launch.empty((m, n), needed[0], device)
    if x.numel() == 0:
        return dx, *(None if dtype is None else column_sums.zeros(n, dtype, device) for dtype in needed[1:])
    if dx is None and needed[1] is None:
        return None, None, None if needed[2] is None else column_sums.passed_on(grad, grad.dtype, needed[2])[1]
    c = config or configs_backward.layernorm_backward(m, n)
    n_sums = sum(dtype is not None for dtype in needed[1:])
    parts = launch.empty((n_sums, c.programs, n), torch.float32, device) if n_sums else None
    stats = _row_statistics(grad, x, weight, eps, c.block_n) if n > c.block_n else None
    flags = (weight is not None, added is not None, *(dtype is not None for dtype in needed))
    strides = (grad.stride(0), x.stride(0), 0 if added is None else added.stride(0))
    scalars = (*strides, m, c.programs, eps, n, c.block_m, c.block_n, *flags)
    options = {"num_warps": c.num_warps, "num_stages": 1}
    programs = c.programs * triton.cdiv(n, c.block_n)
    plan = launch.Plan(_layernorm_bwd_kernel, programs, (None,) * 7, scalars, options)
    plan.run(grad, x, weight, added, dx, parts, stats)
    each = iter(() if parts is None else parts.unbind())
    return dx, *(None if dtype is None else partial_sums.add(next(each), (n,), dtype) for dtype in needed[1:])


def _row_statistics(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, block_n: int
) -> torch.Tensor:
    m, n = x.shape
    stats = launch.empty((m, 4), torch.float32, x.device)
    scalars = (grad.stride(0), x.stride(0), m, eps, n, block_n, weight is not None)
    plan = launch.Plan(_row_statistics_kernel, m, (None,) * 4, scalars, {"num_warps": 4, "num_stages": 1})
    plan.run(grad, x, weight, stats)
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def check_grad(grad: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises KernelError or ValueError unless grad is that of a result of this shape and type."""
    launch.check_floats("grad", grad, (dtype,))
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"grad must be {tuple(shape)}, got {tuple(grad.shape)}")


def or_empty(gradients: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operators return tensors: one without elements, of the type of `like`, for each gradient that is not needed."""
    return tuple(launch.empty((0,), like.dtype, like.device) if t is None else t for t in gradients)


def gradients_fake(
    shapes: tuple, dtypes: tuple[torch.dtype | None, ...], like: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What a host function returns, for fake tensors: gradients of these shapes and types, those of no type empty."""
    pairs = zip(shapes, dtypes, strict=True)
    return tuple(like.new_empty(0) if t is None else like.new_empty(shape, dtype=t) for shape, t in pairs)


def _types(x: torch.Tensor, weight: torch.Tensor | None, bias_dtype: torch.dtype | None, needed: list[bool]) -> tuple:
    dtypes = (x.dtype, None if weight is None else weight.dtype, bias_dtype)
    return tuple(dtype if need else None for dtype, need in zip(dtypes, needed, strict=True))


def _layernorm_backward_kernel(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    needed: list[bool],
) -> tuple[torch.Tensor, ...]:
    launch.check_device(grad, x, weight)
    launch.check_floats("x", x)
    if weight is not None:
        launch.check_floats("weight", weight)
        weight = launch.rows_contiguous(weight)
    check_affine(x, weight, None)
    check_grad(grad, x.shape, x.dtype)
    dx, *others = run(as_rows(grad), as_rows(x), weight, eps, _types(x, weight, bias_dtype, needed))
    return or_empty((None if dx is None else dx.view(x.shape), *others), x)


def _layernorm_backward_fake(
    grad: Any, x: torch.Tensor, weight: torch.Tensor | None, bias_dtype: Any, eps: float, needed: list[bool]
) -> tuple[torch.Tensor, ...]:
    return gradients_fake((x.shape, x.shape[-1:], x.shape[-1:]), _types(x, weight, bias_dtype, needed), x)


def _layernorm_backward_flops(grad: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 16 * math.prod(grad)  # normalised rows 5, g 1, its two sums 3, dx 4, sums over rows 3


LAYERNORM_BACKWARD = define(
    "layernorm_backward(Tensor grad, Tensor x, Tensor? weight, ScalarType? bias_dtype, float eps, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_layernorm_backward_kernel,
    reference=reference_backward.layernorm_backward,
    fake=_layernorm_backward_fake,
    flops=_layernorm_backward_flops,
    autocast=lambda dtype, args: args,  # as they were in the forward pass
)


def layernorm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float = 1e-5,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `layernorm(x, weight, bias, eps)`, which calls it by itself in a backward pass.

    Args:
        grad: of the result, (..., d), the type of x. Any strides, as for x.
        x: (..., d), bfloat16, float16 or float32. weight: (d,), of any of these types, or None.
        bias_dtype: the type of the bias, or None if there is none.
        needed: which of the gradients of x, weight and bias are.
    Returns:
        (..., d), (d,) and (d,), of the types of x, weight and bias; what is not needed or not there has no elements.
    Raises:
        KernelError: another type or device. ValueError: shapes do not fit.
    """
    launch.check_device(grad, x, weight)
    forbid_forward_mode()
    return LAYERNORM_BACKWARD(grad, x, weight, bias_dtype, eps, needed)
