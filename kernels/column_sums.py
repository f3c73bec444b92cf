"""Sums over rows in two stages, without atomics: gradients of biases and of LayerNorm's parameters.

    x (M, N)  ->  (N,): first (P, N) float32, one row a program, then their sum by kernels/partial_sums.py

P follows from the shape and a table that knows no device, so a second run, on whatever device, adds in the same order.
What else a gradient needs on its way is done in the same pass: it is rounded to the type of the next
product (the float32 gradient of a residual stream in front of bfloat16 weights), and multiplied by the derivative of a
GELU. Sums are of what is stored before it is rounded.

Limits: none on shapes. Reference: `reference_backward.linear_backward`. Test: tests/kernels/test_layernorm_backward.py.
"""

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_backward, launch, partial_sums
from segmenter.kernels.blocks import gelu_and_derivative, gelu_form


@triton.jit
def _column_parts_kernel(
    X, A, Y, Parts,  # (M, N) three times, (P, N) float32
    stride_x, n_rows, n_parts,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GELU: tl.constexpr,  # a FORM of `gelu_and_derivative` if x is to be multiplied by the derivative at A, or None
    STORE: tl.constexpr,  # whether that is stored as Y
    SUMS: tl.constexpr,  # whether it is summed
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // N_BLOCKS
    offs_n = (tl.program_id(0) % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tl.cdiv(tl.cdiv(n_rows, BLOCK_M) - part, n_parts)
    for i in tl.range(0, steps):
        rows = (i * n_parts + part).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < n_rows)[:, None] & mask_n[None, :]
        x = tl.load(X + rows[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GELU is not None:
            a = tl.load(A + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            x *= gelu_and_derivative(a, GELU)[1]
        if STORE:
            tl.store(Y + rows[:, None] * N + offs_n[None, :], x.to(Y.dtype.element_ty), mask=mask)
        total += x
    if SUMS:
        tl.store(Parts + part.to(tl.int64) * N + offs_n, tl.sum(total, 0), mask=mask_n)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def zeros(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(n,), the sums over no rows."""
    return launch.call(torch.zeros, n, dtype=dtype, device=device)


def passed_on(
    x: torch.Tensor,
    dtype: torch.dtype,
    sums: torch.dtype | None,
    pre_activation: torch.Tensor | None = None,
    config: configs_backward.SumsConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A gradient for the next product, and its column sums.

    Args:
        x: (M, N), dense rows. dtype: of the first result. sums: the type of the second, None if it is not needed.
        pre_activation: (M, N), contiguous, if x is the gradient of its GELU.
        config: instead of the table's choice.
    Returns:
        (M, N), x itself where nothing changes; and (N,), or None.
    """
    (m, n), device = x.shape, x.device
    store = pre_activation is not None or x.dtype != dtype
    if x.numel() == 0:
        return launch.empty((m, n), dtype, device) if store else x, None if sums is None else zeros(n, sums, device)
    if sums is None and pre_activation is None:
        return launch.call(torch.Tensor.to, x, dtype) if store else x, None
    c = config or configs_backward.column_sums(m, n)
    y = launch.empty((m, n), dtype, device) if store else None
    parts = None if sums is None else launch.empty((c.programs, n), torch.float32, device)
    form = None if pre_activation is None else gelu_form(pre_activation.dtype, launch.architecture(x))
    scalars = (x.stride(0), m, c.programs, n, c.block_m, c.block_n, form, store, parts is not None)
    options = {"num_warps": c.num_warps, "num_stages": 1}
    programs = c.programs * triton.cdiv(n, c.block_n)
    plan = launch.Plan(_column_parts_kernel, programs, (None,) * 4, scalars, options)
    plan.run(x, pre_activation, y, parts)
    return x if y is None else y, None if parts is None else partial_sums.add(parts, (n,), sums)
