"""What every query of an image attends to, in six numbers: no matrix, one pass over the keys.

    q, k (B, N, h, d), a grid of patches among the N tokens  ->  (6, B, h, N) float32

These are entropy, the share on tokens that are no patches, the centre of attention (row, column), and the mean distance
and squared distance to the query's own patch: `reference_maps.attention_statistics` has the formulas. All but the mean
distance could be had of the attention kernel with other values (entropy = lse - scale q . (A k), v := k; the centre and
the squared distance with v := [y, x, y^2 + x^2]). But its result is rounded to the type of v, and entropy and squared
distance are small differences of large numbers: in bfloat16, on 128 x 128 patches, y^2 + x^2 alone is off by up to 64
(tests/kernels/test_attention_maps.py shows it). Here all sums are float32, of one exponential and one square root
a score, and there is no second product.

One program computes BLOCK_M queries of one head with an online softmax as in kernels/attention.py; but what is rescaled
when the maximum grows is a handful of vectors. Patches come first, then the other tokens, each with a maximum of their
own, so that means over patches hold even where nearly all attention is elsewhere. Entropy is summed relative to the
maximum, so it is right where it is near 0.

Limits: as attention's; 2^20 patches. Reference: `reference_maps.attention_statistics`. Test:
tests/kernels/test_attention_maps.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_maps, launch, reference, reference_maps
from segmenter.kernels.blocks import LN2, LOG2E, load_tile
from segmenter.kernels.heads import addressable, check_separate, head_padding
from segmenter.kernels.operators import define, forbid_forward_mode

MAX_PATCHES = 2**20  # whose rows float32 divides exactly

_LEAST = tl.constexpr(-1.0e30)  # below every score. Not -inf, which times a probability of 0 is NaN
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer


@triton.jit
def _place(i, grid_w, per_w):
    """Row and column of patches i (float32): exact up to 2^20 patches, and cheaper than dividing integers or floor,
    which the special unit would do. per_w: 1 / grid_w."""
    y = ((i + 0.5) * per_w - 0.5 + _ROUND) - _ROUND
    return y, i - y * grid_w


@triton.jit
def _softmax_step(q, k, m_i, l_i, t_i, scale_log2, n_left, PRECISION: tl.constexpr):
    """One tile of keys: weights p (M, N), the factor alpha (M,) for earlier sums, and the running maximum, sum of p,
    sum of p log2 p. Of `n_left` keys, or of all if that is None."""
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    if n_left is not None:
        s = tl.where(tl.arange(0, k.shape[0])[None, :] < n_left, s, _LEAST)
    m_new = tl.maximum(m_i, tl.max(s, 1))
    log_p = s - m_new[:, None]
    p = tl.exp2(log_p)
    shift = m_i - m_new
    alpha = tl.exp2(shift)
    t_i = alpha * (t_i + l_i * shift) + tl.sum(p * log_p, 1)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1), t_i


@triton.jit
def _patches_step(q, k, y_q, x_q, m_i, l_i, t_i, y_i, x_i, d_i, d2_i, scale_log2, j, n_left, grid_w, per_w,
                  PRECISION: tl.constexpr):  # fmt: skip
    """All running sums after one tile of patches with numbers j (float32); y_q, x_q: places of the queries."""
    p, alpha, m_i, l_i, t_i = _softmax_step(q, k, m_i, l_i, t_i, scale_log2, n_left, PRECISION)
    y, x = _place(j, grid_w, per_w)
    dy = y_q[:, None] - y[None, :]
    dx = x_q[:, None] - x[None, :]
    squared = dy * dy + dx * dx
    y_i = y_i * alpha + tl.sum(p * y[None, :], 1)
    x_i = x_i * alpha + tl.sum(p * x[None, :], 1)
    d_i = d_i * alpha + tl.sum(p * tl.sqrt(squared), 1)
    d2_i = d2_i * alpha + tl.sum(p * squared, 1)
    return m_i, l_i, t_i, y_i, x_i, d_i, d2_i


@triton.jit
def _attention_statistics_fwd_kernel(
    Q, K, Out,  # (B, N, h, HEAD_DIM) twice; (6, B, h, N)
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    n_batch_heads, n_heads, n_tokens, n_blocks, first, n_patches, grid_w, per_w, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # whether part of the last tile of patches is beyond them
    OTHERS: tl.constexpr,  # whether there are tokens that are no patches
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // n_blocks  # programs of one head run side by side: they share K in the L2 cache
    m_0 = (pid % n_blocks) * BLOCK_M
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    q = load_tile(Q, (m_0, 0), tl.arange(0, BLOCK_M), stride_qn, n_tokens, HEAD_DIM, HEAD_PAD, False)
    rows = m_0 + tl.arange(0, BLOCK_M)
    y_q, x_q = _place((rows - first).to(tl.float32), grid_w, per_w)
    numbers = offs_n.to(tl.float32)

    least = tl.full([BLOCK_M], _LEAST, tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    m_i, l_i, t_i, y_i, x_i, d_i, d2_i = least, zero, zero, zero, zero, zero, zero
    end = n_patches // BLOCK_N * BLOCK_N
    for j in tl.range(0, end, BLOCK_N):
        k = load_tile(K, (first + j, 0), offs_n, stride_kn, None, HEAD_DIM, HEAD_PAD, False)
        m_i, l_i, t_i, y_i, x_i, d_i, d2_i = _patches_step(
            q, k, y_q, x_q, m_i, l_i, t_i, y_i, x_i, d_i, d2_i, scale_log2, numbers + j, None, grid_w, per_w, PRECISION
        )
    if TAIL:
        k = load_tile(K, (first + end, 0), offs_n, stride_kn, first + n_patches, HEAD_DIM, HEAD_PAD, False)
        numbers += end
        n_left = n_patches - end
        m_i, l_i, t_i, y_i, x_i, d_i, d2_i = _patches_step(
            q, k, y_q, x_q, m_i, l_i, t_i, y_i, x_i, d_i, d2_i, scale_log2, numbers, n_left, grid_w, per_w, PRECISION
        )

    m_o, l_o, t_o = least, zero, zero  # of the other tokens
    if OTHERS:
        n_others = n_tokens - n_patches
        offs_d = tl.arange(0, HEAD_PAD)
        for j in tl.range(0, n_others, BLOCK_N):
            other = j + offs_n
            mask = (other[:, None] < n_others) & (offs_d[None, :] < HEAD_DIM)
            key = tl.where(other < first, other, other + n_patches).to(tl.int64)
            k = tl.load(K + key[:, None] * stride_kn + offs_d[None, :], mask=mask, other=0.0)
            _, _, m_o, l_o, t_o = _softmax_step(q, k, m_o, l_o, t_o, scale_log2, n_others - j, PRECISION)

    m = tl.maximum(m_i, m_o)
    a_i = tl.exp2(m_i - m)
    a_o = tl.exp2(m_o - m)
    total = l_i * a_i + l_o * a_o
    t = a_i * (t_i + l_i * (m_i - m)) + a_o * (t_o + l_o * (m_o - m))
    entropy = (tl.log2(total) - t / total) * LN2
    entropy = tl.where(entropy < 0.0, 0.0, entropy)  # by rounding; NaN stays
    is_patch = (rows >= first) & (rows < first + n_patches)
    mask = rows < n_tokens
    step = tl.cast(n_batch_heads, tl.int64) * n_tokens
    Out += bh.to(tl.int64) * n_tokens + rows
    tl.store(Out, entropy, mask=mask)
    tl.store(Out + step, l_o * a_o / total, mask=mask)
    tl.store(Out + 2 * step, y_i / l_i, mask=mask)
    tl.store(Out + 3 * step, x_i / l_i, mask=mask)
    tl.store(Out + 4 * step, tl.where(is_patch, d_i / l_i, 0.0), mask=mask)
    tl.store(Out + 5 * step, tl.where(is_patch, d2_i / l_i, 0.0), mask=mask)


def _run(
    q: torch.Tensor, k: torch.Tensor, grid: tuple[int, int], first: int, scale: float, config: Any = None
) -> torch.Tensor:
    """Of q and k (B, N, h, d). config: instead of the table's choice."""
    B, N, h, d = q.shape
    out = launch.empty((len(reference_maps.STATISTICS), B, h, N), torch.float32, q.device)
    if out.numel() == 0:
        return out
    precision, n_patches = launch.dot_precision(q.dtype), grid[0] * grid[1]
    architecture, head_pad = launch.architecture(q), head_padding(d)
    c = config or configs_maps.attention_statistics(architecture, q.element_size(), head_pad, precision)
    n_blocks = triton.cdiv(N, c.block_m)
    scalars = (
        *q.stride()[:3], *k.stride()[:3], B * h, h, N, n_blocks, first, n_patches, grid[1], 1 / grid[1],
        scale * LOG2E.value, d, head_pad, c.block_m, c.block_n, n_patches % c.block_n > 0, n_patches < N, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    launch.Plan(_attention_statistics_fwd_kernel, B * h * n_blocks, (None,) * 3, scalars, options).run(q, k, out)
    return out


def _check(q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], first: int) -> None:
    reference.cross_shape(q, k, k)
    if q.shape != k.shape:
        raise ValueError(f"q and k must be of the same tokens, got {q.shape[1]} and {k.shape[1]}")
    reference_maps.check_grid(q.shape[1], grid, first)


def _attention_statistics_kernel(
    q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], first: int, scale: float
) -> torch.Tensor:
    check_separate(q, k, k)
    _check(q, k, grid, first)
    if grid[0] * grid[1] > MAX_PATCHES:
        raise launch.KernelError(f'{grid[0]} x {grid[1]} patches are more than {MAX_PATCHES}; use impl="eager"')
    return _run(addressable(q), addressable(k), tuple(grid), first, scale)


def _fake(q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], first: int, scale: float) -> torch.Tensor:
    _check(q, k, grid, first)
    B, N, h, _ = q.shape
    return q.new_empty(len(reference_maps.STATISTICS), B, h, N, dtype=torch.float32)


def _flops(q: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[1] * q[2] * q[3]


_attention_statistics = define(
    "attention_statistics(Tensor q, Tensor k, int[] grid, int first, float scale) -> Tensor",
    kernel=_attention_statistics_kernel,
    reference=reference_maps.attention_statistics,
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: (args[0].to(dtype), args[1].to(dtype), *args[2:]),
)


def attention_statistics(
    q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], first: int, scale: float | None = None
) -> torch.Tensor:
    """Six numbers of each row of softmax(scale q k^T), rows and columns being the tokens of one image.

    Args:
        q, k: (B, N, h, d). bfloat16, float16 or float32; any strides.
        grid: (rows, columns) of the patches. first: the token that is the first of them; the others of the N tokens
            (class tokens, registers) come before and after.
        scale: of the scores, by default d**-0.5.
    Returns:
        (6, B, h, N) float32, in the order of `reference_maps.STATISTICS`: entropy in nats; the share on tokens that
        are no patches; row and column of the centre of what falls on patches; the mean Euclidean distance of that to
        the query's own patch, in patches, and the mean of its square, both 0 for queries that are no patches.
    Raises:
        KernelError: another type, head_dim or device, or more than 2^20 patches. ValueError: shapes that do not belong
            together, a grid beyond the tokens.
    """
    launch.check_device(q, k)
    forbid_forward_mode()
    return _attention_statistics(q, k, grid, first, q.shape[-1] ** -0.5 if scale is None else float(scale))
