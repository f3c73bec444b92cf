"""LayerNorm over the last dimension, (x - mean) / sqrt(variance + eps) * weight + bias.

    x (..., N)  ->  (..., N), or the mean and 1/sqrt(variance + eps) of every row alone

x is read once. Statistics are float32, the variance that of centred values: E[x^2] - E[x]^2 loses everything where the
mean is much larger than the deviation. The output may have another type than x (float32 residual stream, bfloat16
matrix product), which saves the separate cast. Used by itself in front of matrix products (kernels/linear.py) and over
class axes of 2 to 1,000 columns.

Limits: none on shapes. Rows of up to 8,192 columns stay in registers; longer ones are read three times. The gradient
is kernels/layernorm_backward.py's.
Reference: `reference.layernorm`. Test: tests/kernels/test_layernorm.py.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, reference
from segmenter.kernels.checks import as_rows, check_affine
from segmenter.kernels.layernorm_backward import LAYERNORM_BACKWARD
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _load_block(x_rows, offs_n, mask_m, N: tl.constexpr, EVEN: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32, 0 outside."""
    mask = mask_m[:, None]
    if not EVEN:
        mask = mask & (offs_n[None, :] < N)
    return tl.load(x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _centre(x, mean, offs_n, N: tl.constexpr, EVEN: tl.constexpr):
    """x - mean, and 0 in the padding, which would otherwise enter the variance as -mean."""
    x = x - mean[:, None]
    if not EVEN:
        x = tl.where(offs_n[None, :] < N, x, 0.0)
    return x


@triton.jit
def _store_block(x, rstd, W, B, y_rows, offs_n, mask_m, N: tl.constexpr, EVEN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                 HAS_BIAS: tl.constexpr):  # fmt: skip
    """Stores centred x * rstd * W + B."""
    y = x * rstd[:, None]
    mask_n = offs_n < N
    if HAS_WEIGHT:
        y = y * tl.load(W + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(B + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None]
    if not EVEN:
        mask = mask & mask_n[None, :]
    tl.store(y_rows[:, None] + offs_n[None, :], y.to(y_rows.dtype.element_ty), mask=mask)


@triton.jit
def _layernorm_fwd_kernel(
    X, W, B, Y, Mean, Rstd,  # (M, N), (N,) or None twice, and either (M, N) or (M,) float32 twice
    stride_x, n_rows, eps,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,  # Mean and Rstd are stored, instead of Y
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < n_rows
    x_rows = X + rows * stride_x
    offs_n = tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = N % BLOCK_N == 0
    if N <= BLOCK_N:
        x = _load_block(x_rows, offs_n, mask_m, N, EVEN)
        mean = tl.sum(x, 1) / N
        x = _centre(x, mean, offs_n, N, EVEN)
        variance = tl.sum(x * x, 1) / N
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for n_0 in tl.range(0, N, BLOCK_N):
            total += _load_block(x_rows, n_0 + offs_n, mask_m, N, EVEN)
        mean = tl.sum(total, 1) / N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for n_0 in tl.range(0, N, BLOCK_N):
            x = _load_block(x_rows, n_0 + offs_n, mask_m, N, EVEN)
            x = _centre(x, mean, n_0 + offs_n, N, EVEN)
            total += x * x
        variance = tl.sum(total, 1) / N
    rstd = tl.rsqrt(variance + eps)
    if STATISTICS:
        tl.store(Mean + rows, mean, mask=mask_m)
        tl.store(Rstd + rows, rstd, mask=mask_m)
    elif N <= BLOCK_N:
        _store_block(x, rstd, W, B, Y + rows * N, offs_n, mask_m, N, EVEN, HAS_WEIGHT, HAS_BIAS)
    else:
        for n_0 in tl.range(0, N, BLOCK_N):
            x = _load_block(x_rows, n_0 + offs_n, mask_m, N, EVEN) - mean[:, None]
            _store_block(x, rstd, W, B, Y + rows * N, n_0 + offs_n, mask_m, N, EVEN, HAS_WEIGHT, HAS_BIAS)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    config: configs.LayerNormConfig | None = None,
) -> torch.Tensor:
    """LayerNorm of x (M, N), dense rows, in `dtype`."""
    y = launch.empty(x.shape, dtype, x.device)
    if y.numel():
        _launch(x, weight, bias, y, None, None, eps, config)
    return y


def statistics(
    x: torch.Tensor, eps: float, config: configs.LayerNormConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/sqrt(variance + eps) of the rows of x (M, N), float32 (M,) each."""
    mean, rstd = (launch.empty(x.shape[:1], torch.float32, x.device) for _ in range(2))
    if x.numel():
        _launch(x, None, None, None, mean, rstd, eps, config)
    return mean, rstd


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    eps: float,
    config: configs.LayerNormConfig | None,
) -> None:
    n_rows, n = x.shape
    c = config or configs.layernorm(n)
    flags = (weight is not None, bias is not None, y is None)
    scalars = (x.stride(0), n_rows, eps, n, c.block_m, c.block_n, *flags)
    options = {"num_warps": c.num_warps, "num_stages": 1}
    plan = launch.Plan(_layernorm_fwd_kernel, triton.cdiv(n_rows, c.block_m), (None,) * 6, scalars, options)
    plan.run(x, weight, bias, y, mean, rstd)


def _layernorm_kernel(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    launch.check_device(x, weight, bias)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            launch.check_floats(name, tensor)
    check_affine(x, weight, bias)
    weight, bias = (None if t is None else launch.rows_contiguous(t) for t in (weight, bias))
    return run(as_rows(x), weight, bias, eps, x.dtype).view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _layernorm_fake(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float):
    check_affine(x, weight, bias)
    return x.new_empty(x.shape)


def _layernorm_flops(x: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 8 * math.prod(x)  # mean 1, centre 1, variance 2, scale 2, affine 2


def _layernorm_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    x, weight, bias, eps = inputs
    return *LAYERNORM_BACKWARD(*grads, x, weight, None if bias is None else bias.dtype, eps, needed[:3]), None


def _in_float32(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(t.float() if isinstance(t, torch.Tensor) else t for t in args)


_layernorm = define(
    "layernorm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    kernel=_layernorm_kernel,
    reference=lambda x, weight, bias, eps: reference.layernorm(x, weight, bias, eps).contiguous(),
    fake=_layernorm_fake,
    flops=_layernorm_flops,
    autocast=_in_float32,
    backward=_layernorm_backward,
)


def layernorm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    """LayerNorm over the last dimension; its gradient is kernels/layernorm_backward.py's, for which x is kept.

    Args:
        x: (..., d), bfloat16, float16 or float32. Any strides; a copy is made if the last dimension is not dense or the
            rows do not lie at one distance.
        weight, bias: (d,), of any of these types, or None.
        eps: added to the variance.
    Returns:
        (..., d), the type of x. Under autocast float32, as eager PyTorch does.
    Raises:
        KernelError: another type or device. ValueError: shapes do not fit.
    """
    launch.check_device(x, weight, bias)
    forbid_forward_mode()
    return _layernorm(x, weight, bias, eps)
