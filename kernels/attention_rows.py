"""Rows of the attention matrix for chosen queries, softmax(q k^T / sqrt(d)) of a few q and all k: maps to look at.

    q (B, R, h, d), k (B, M, h, d)  ->  (B, h, R, M) float32

The log-sum-exp of the R rows comes from the attention kernel with v := k; with it a probability needs nothing but its
own score, so programs cut the result into tiles that do not wait for each other. No (M, M) matrix is in memory: of
16,385 tokens and 12 heads a row is 0.8 MB, the matrix 12.9 GB.

Limits: as attention's. Reference: `reference_maps.attention_rows`. Test: tests/kernels/test_attention_maps.py.
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


@triton.jit
def _attention_rows_fwd_kernel(
    Q, K, Lse, Out,  # (B, R, h, HEAD_DIM), (B, M, h, HEAD_DIM), (B, h, n_lse), (B, h, R, M)
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    n_heads, n_queries, n_keys, n_lse, n_blocks_m, n_blocks_n, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // (n_blocks_m * n_blocks_n)
    m_0 = (pid % n_blocks_m) * BLOCK_M  # programs of the same keys run side by side
    n_0 = (pid // n_blocks_m % n_blocks_n) * BLOCK_N
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    q = load_tile(Q, (m_0, 0), offs_m, stride_qn, n_queries, HEAD_DIM, HEAD_PAD, False)
    k = load_tile(K, (n_0, 0), offs_n, stride_kn, n_keys, HEAD_DIM, HEAD_PAD, False)
    lse = tl.load(Lse + bh.to(tl.int64) * n_lse + m_0 + offs_m)  # whole blocks; +inf beyond R
    p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - (lse * LOG2E)[:, None])  # [BLOCK_M, BLOCK_N]
    rows = bh.to(tl.int64) * n_queries + m_0 + offs_m
    pointers = Out + rows[:, None] * n_keys + n_0 + offs_n[None, :]
    tl.store(pointers, p, mask=(m_0 + offs_m[:, None] < n_queries) & (n_0 + offs_n[None, :] < n_keys))


def _run(q: torch.Tensor, k: torch.Tensor, scale: float, config: Any = None) -> torch.Tensor:
    """Of q (B, R, h, d) and k (B, M, h, d). config: instead of the table's choice."""
    (B, n_queries, h, d), n_keys = q.shape, k.shape[1]
    out = launch.empty((B, h, n_queries, n_keys), torch.float32, q.device)
    if out.numel() == 0:
        return out
    lse = log_sum_exp(q, k, scale)
    precision = launch.dot_precision(q.dtype)
    c = config or configs_maps.attention_rows(launch.architecture(q), q.element_size(), precision)
    n_blocks = triton.cdiv(n_queries, c.block_m), triton.cdiv(n_keys, c.block_n)
    scalars = (
        *q.stride()[:3], *k.stride()[:3], h, n_queries, n_keys, lse_rows(n_queries), *n_blocks, scale * LOG2E.value,
        d, head_padding(d), c.block_m, c.block_n, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    grid = B * h * n_blocks[0] * n_blocks[1]
    launch.Plan(_attention_rows_fwd_kernel, grid, (None,) * 4, scalars, options).run(q, k, lse, out)
    return out


def _attention_rows_kernel(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    check_separate(q, k, k)
    return _run(addressable(q), addressable(k), scale)


def _fake(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    B, R, h, _ = reference.cross_shape(q, k, k)
    return q.new_empty(B, h, R, k.shape[1], dtype=torch.float32)


def _flops(q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * q[3] * k[1]


_attention_rows = define(
    "attention_rows(Tensor q, Tensor k, float scale) -> Tensor",
    kernel=_attention_rows_kernel,
    reference=reference_maps.attention_rows,
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: (args[0].to(dtype), args[1].to(dtype), args[2]),
)


def attention_rows(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Attention of chosen queries to all keys, a row each.

    Args:
        q: (B, R, h, d), the chosen queries. k: (B, M, h, d), M >= 1. bfloat16, float16 or float32; any strides.
        scale: of the scores, by default d**-0.5.
    Returns:
        (B, h, R, M) float32; rows sum to 1, in float32 "high" and "medium" as far as TF32 goes.
    Raises:
        KernelError: another type, head_dim or device. ValueError: shapes that do not belong together.
    """
    launch.check_device(q, k)
    forbid_forward_mode()
    return _attention_rows(q, k, q.shape[-1] ** -0.5 if scale is None else float(scale))
