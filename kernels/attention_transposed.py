"""The attention matrix, transposed, times a few columns: P^T x with P = softmax(q k^T / sqrt(d)).

    q (B, N, h, d), k (B, M, h, d), x (B, N, h, R)  ->  (B, M, h, R) float32

It is what attention's gradient computes for dV with dO := x (kernels/attention_backward.py), without the other three
products, in float32, and for any number of columns. A column of x says how much each query counts, and the result is
the sum of their attention rows: the mean row of a class's patches (1 / n at n of them), or one step of attention
rollout, r <- (P^T r + r) / 2 from the last layer down (Abnar and Zuidema 2020, written for chosen rows).

One program computes BLOCK_N keys and BLOCK_R columns and walks over the queries, whose log-sum-exp comes from the
attention kernel with v := k. Scores are computed transposed, k q^T, so that no result of a product is ever transposed
for the next one. Probabilities are float32, and so is x; the second product is in float32, of three TF32 ones
on NVIDIA, if q has a half type (TF32 alone cuts off more than rounding to that type), and else as
`torch.set_float32_matmul_precision` says. No atomics, no (N, M) matrix in memory.

Limits: as attention's. Reference: `reference_maps.attention_transposed`. Test:
tests/kernels/test_attention_maps.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_maps, launch, reference, reference_maps
from segmenter.kernels.attention import log_sum_exp
from segmenter.kernels.blocks import LOG2E, load_tile
from segmenter.kernels.heads import addressable, check_separate, head_padding, lse_rows
from segmenter.kernels.operators import define, forbid_forward_mode

MAX_COLUMNS = 64  # of x that a program holds


@triton.jit
def _attention_transposed_fwd_kernel(
    Q, K, X, Lse, Out,  # (B, N, h, HEAD_DIM), (B, M, h, HEAD_DIM), (B, N, h, R), (B, h, n_lse), (B, M, h, R)
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_xb, stride_xn, stride_xh, stride_xr,
    n_heads, n_queries, n_keys, n_columns, n_lse, n_blocks_n, n_blocks_r, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, PRECISION_OF_X: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // (n_blocks_n * n_blocks_r)  # programs of one head run side by side: they share Q in the L2 cache
    n_0 = (pid // n_blocks_r % n_blocks_n) * BLOCK_N
    r_0 = (pid % n_blocks_r) * BLOCK_R
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = r_0 + tl.arange(0, BLOCK_R)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    X += b * stride_xb + h * stride_xh + offs_r.to(tl.int64)[None, :] * stride_xr
    Lse += bh.to(tl.int64) * n_lse + offs_m
    k = load_tile(K, (n_0, 0), offs_n, stride_kn, n_keys, HEAD_DIM, HEAD_PAD, False)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m_0 in tl.range(0, n_queries, BLOCK_M):
        q = load_tile(Q, (m_0, 0), offs_m, stride_qn, n_queries, HEAD_DIM, HEAD_PAD, False)
        rows = m_0 + offs_m
        mask = (rows[:, None] < n_queries) & (offs_r[None, :] < n_columns)
        x = tl.load(X + rows.to(tl.int64)[:, None] * stride_xn, mask=mask, other=0.0)
        lse = tl.load(Lse + m_0) * LOG2E  # whole blocks; +inf beyond N, so that p is 0 there
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
        acc = tl.dot(p, x, acc, input_precision=PRECISION_OF_X)

    keys = n_0 + offs_n
    rows = (b * n_keys + keys) * n_heads + h
    pointers = Out + rows[:, None] * n_columns + offs_r[None, :]
    tl.store(pointers, acc, mask=(keys[:, None] < n_keys) & (offs_r[None, :] < n_columns))


def _run(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float, config: Any = None) -> torch.Tensor:
    """Of q (B, N, h, d), k (B, M, h, d) and x (B, N, h, R). config: instead of the table's choice."""
    (B, n_queries, h, d), n_keys, n_columns = q.shape, k.shape[1], x.shape[3]
    out = launch.empty((B, n_keys, h, n_columns), torch.float32, q.device)
    if out.numel() == 0:
        return out
    lse = log_sum_exp(q, k, scale)
    precision = launch.dot_precision(q.dtype)
    c = config or configs_maps.attention_transposed(launch.architecture(q), q.element_size(), precision)
    block_r = min(MAX_COLUMNS, max(16, triton.next_power_of_2(n_columns)))
    n_blocks = triton.cdiv(n_keys, c.block_n), triton.cdiv(n_columns, block_r)
    scalars = (
        *q.stride()[:3], *k.stride()[:3], *x.stride(), h, n_queries, n_keys, n_columns, lse_rows(n_queries), *n_blocks,
        scale * LOG2E.value, d, head_padding(d), c.block_m, c.block_n, block_r,
        precision, precision if q.dtype == torch.float32 else launch.wide_precision(q),
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    grid = B * h * n_blocks[0] * n_blocks[1]
    launch.Plan(_attention_transposed_fwd_kernel, grid, (None,) * 5, scalars, options).run(q, k, x, lse, out)
    return out


def _attention_transposed_kernel(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    check_separate(q, k, k)
    launch.check_device(q, x)
    launch.check_floats("x", x, (torch.float32,))
    reference_maps.check_columns(q, x)
    return _run(addressable(q), addressable(k), x, scale)


def _fake(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    reference.cross_shape(q, k, k)
    reference_maps.check_columns(q, x)
    return q.new_empty(k.shape[0], k.shape[1], k.shape[2], x.shape[3], dtype=torch.float32)


def _flops(q: tuple[int, ...], k: tuple[int, ...], x: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[1] * (q[3] + x[3])


_attention_transposed = define(
    "attention_transposed(Tensor q, Tensor k, Tensor x, float scale) -> Tensor",
    kernel=_attention_transposed_kernel,
    reference=reference_maps.attention_transposed,
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: (args[0].to(dtype), args[1].to(dtype), *args[2:]),
)


def attention_transposed(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """P^T x with P = softmax(scale q k^T): sums of attention rows, weighted by the columns of x.

    Args:
        q: (B, N, h, d). k: (B, M, h, d), M >= 1. bfloat16, float16 or float32; any strides.
        x: (B, N, h, R) float32, R >= 1, any strides: one that is the same for all heads may be expanded.
        scale: of the scores, by default d**-0.5.
    Returns:
        (B, M, h, R) float32.
    Raises:
        KernelError: another type, head_dim or device. ValueError: shapes that do not belong together.
    """
    launch.check_device(q, k, x)
    forbid_forward_mode()
    return _attention_transposed(q, k, x, q.shape[-1] ** -0.5 if scale is None else float(scale))
