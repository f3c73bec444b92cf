"""Non-causal multi-head attention, softmax(q k^T / sqrt(d)) v, without the (N, N) scores in memory.

    qkv (B, N, 3*h*d), the fused projection's output  ->  (B, N, h*d), ready for the output projection

q, k and v are read straight out of the packed tensor and the result is written in token order, so nothing is permuted
or copied. Against explicit softmax that saves the scores and the probabilities: at Seg-B/16, 512x512, 12 * 1025**2
elements each, 50 MB an image and layer in bfloat16, written and read again.

One program computes BLOCK_M query rows of one head and walks over the keys with an online softmax (Milakov and
Gimelshein 2018; the blocked form is FlashAttention's). The main loop carries no mask. What is left over of the keys
is either one or two rows, which then start the softmax as plain vectors (the class token, and with DeiT the
distillation token, before a power of two of patches: 257, 1025, 4097), or one last masked tile (the mask decoder).
Scores, statistics and accumulator are float32; probabilities are rounded to v's type for the second product.

Limits: head_dim a multiple of 8 up to 128 (64 is what it is tuned for; others are padded to a power of two), float32
included; any N and any B*h that memory holds.
Reference: `reference.attention`, `reference.attention_lse`, `reference.cross_attention`. Test:
tests/kernels/test_attention.py.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, configs_backward, launch, reference
from segmenter.kernels.attention_backward import ATTENTION_BACKWARD, CROSS_ATTENTION_BACKWARD
from segmenter.kernels.blocks import LN2, LOG2E, load_tile
from segmenter.kernels.heads import LSE_ROWS, addressable, check_separate, head_padding, lse_rows, packed
from segmenter.kernels.operators import define, differentiated, forbid_forward_mode


@triton.jit
def _softmax_step(qk, v, m_i, l_i, acc, scale_log2, PRECISION: tl.constexpr):
    """Takes one tile of raw scores (M, N) and of values (N, D) into the running maximum (in log2 units), sum, output.

    Written so that scaling and subtracting the maximum become one multiply-add.
    """
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
    p = tl.exp2(qk * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def _attention_fwd_kernel(
    Q, K, V, Out, Lse, KRows, VRows,  # (B, N, heads, HEAD_DIM) each; Lse (B, h, n_lse); KRows, VRows: K, V as pointers
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh,
    q_head, k_head, v_head,  # where in the tensor's heads q, k and v begin
    n_heads, n_queries, n_keys, n_lse, n_blocks, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEELED: tl.constexpr,  # keys that start the softmax as single rows
    TAIL: tl.constexpr,  # whether a masked tile ends it
    STORE_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // n_blocks  # programs of one head run side by side: they share K and V in the L2 cache
    m_0 = (pid % n_blocks) * BLOCK_M
    b = bh // n_heads
    h = bh % n_heads
    offs_d = tl.arange(0, HEAD_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    if BLOCK_N == 16:  # float32 without tensor cores: with addresses kept from step to step sm_100 spills
        offs_n = offs_n.to(tl.int64)
    k_row = KRows + b.to(tl.int64) * stride_kb + (k_head + h).to(tl.int64) * stride_kh
    v_row = VRows + b.to(tl.int64) * stride_vb + (v_head + h).to(tl.int64) * stride_vh
    if not DESCRIPTORS:
        Q += b.to(tl.int64) * stride_qb + (q_head + h).to(tl.int64) * stride_qh
        K, V = k_row, v_row
    q = load_tile(Q, (b, q_head + h, m_0, 0), tl.arange(0, BLOCK_M), stride_qn, n_queries,
                  HEAD_DIM, HEAD_PAD, DESCRIPTORS)  # fmt: skip
    if PEELED > 0:
        k_0 = tl.load(k_row + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
        v_0 = tl.load(v_row + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
        m_i = tl.sum(q.to(tl.float32) * k_0[None, :], 1) * scale_log2
        l_i = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32) + v_0[None, :]
        if PEELED > 1:
            k_1 = tl.load(k_row + stride_kn + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
            v_1 = tl.load(v_row + stride_vn + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
            s_1 = tl.sum(q.to(tl.float32) * k_1[None, :], 1) * scale_log2
            m_new = tl.maximum(m_i, s_1)
            p_1 = tl.exp2(s_1 - m_new)
            alpha = tl.exp2(m_i - m_new)
            l_i = alpha + p_1
            acc = acc * alpha[:, None] + p_1[:, None] * v_1[None, :]
            m_i = m_new
    else:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)

    end = PEELED + (n_keys - PEELED) // BLOCK_N * BLOCK_N
    for n_0 in tl.range(PEELED, end, BLOCK_N):
        k = load_tile(K, (b, k_head + h, n_0, 0), offs_n, stride_kn, None, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        v = load_tile(V, (b, v_head + h, n_0, 0), offs_n, stride_vn, None, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        qk = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        m_i, l_i, acc = _softmax_step(qk, v, m_i, l_i, acc, scale_log2, PRECISION)
    if TAIL:  # noqa: SIM102
        # Always true, but a branch at run time: without one, ptxas of CUDA 12.8 serialises every wgmma of the function,
        # those of the loop too (its warning C7515).
        if end < n_keys:
            k = load_tile(K, (b, k_head + h, end, 0), offs_n, stride_kn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
            v = load_tile(V, (b, v_head + h, end, 0), offs_n, stride_vn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
            qk = tl.dot(q, k.T, input_precision=PRECISION)
            qk = tl.where((end + tl.arange(0, BLOCK_N))[None, :] < n_keys, qk, float("-inf"))
            m_i, l_i, acc = _softmax_step(qk, v, m_i, l_i, acc, scale_log2, PRECISION)

    offs_m = m_0 + tl.arange(0, BLOCK_M)
    if STORE_LSE:
        lse = (m_i + tl.log2(l_i)) * LN2  # natural logarithm
        lse = tl.where(offs_m < n_queries, lse, float("inf"))
        tl.store(Lse + bh.to(tl.int64) * n_lse + offs_m, lse, mask=offs_m < n_lse)
    acc = acc * (1.0 / l_i)[:, None]  # one division a row: dividing the tile costs 140 instructions more
    if DESCRIPTORS:
        Out.store([b, h, m_0, 0], acc.to(Out.dtype).reshape([1, 1, BLOCK_M, HEAD_PAD]))
    else:
        o_rows = Out + b.to(tl.int64) * stride_ob + m_0.to(tl.int64) * stride_on + h.to(tl.int64) * stride_oh
        pointers = o_rows + tl.arange(0, BLOCK_M)[:, None] * stride_on + offs_d[None, :]
        mask = (offs_m[:, None] < n_queries) & (offs_d[None, :] < HEAD_DIM)
        tl.store(pointers, acc.to(Out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launching. Everything below sees q, k and v as (B, N, heads, d) views and a first head in each.


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: tuple[int, int, int, int],
    scale: float,
    store_lse: bool,
    config: configs.AttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of 4-D views (B, N, heads, d).

    Args:
        heads: (h, first head of q, of k, of v).
        config: instead of the table's choice.
    Returns:
        (B, N, h*d), and the log-sum-exp (B, h, N rounded up to LSE_ROWS) or None.
    """
    B, n_queries, _, d = q.shape
    o = launch.empty((B, n_queries, heads[0] * d), q.dtype, q.device)
    lse = launch.empty((B, heads[0], lse_rows(n_queries)), torch.float32, q.device) if store_lse else None
    if o.numel() == 0:
        return o, lse
    plan = _plan(q, k, v, o, lse, heads, scale, launch.dot_precision(q.dtype), config)
    plan.run(q, k, v, o, lse, k, v)
    return o, lse


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Of the rows of scores of checked q (B, N, h, d) and k (B, M, h, d): (B, h, N rounded up to LSE_ROWS) float32,
    +inf beyond N. For host functions of other operators."""
    return _run(q, k, k, (q.shape[2], 0, 0, 0), scale, True)[1]


def _plan(q, k, v, o, lse, heads, scale, precision, config) -> launch.Plan:
    B, n_queries, _, d = q.shape
    n_keys, h, n_lse = k.shape[1], heads[0], 0 if lse is None else lse.shape[-1]
    head_pad = head_padding(d)
    c = config or configs.attention(launch.architecture(q), q.element_size(), head_pad, n_keys, precision)
    descriptors = c.descriptors and all(launch.fits_descriptor(t) for t in (q, k, v))
    o = o.view(B, n_queries, h, d)
    peeled = n_keys % c.block_n if n_keys % c.block_n in (1, 2) else 0
    n_blocks = triton.cdiv(max(n_queries, n_lse), c.block_m)
    tiles: list[launch.Tiles | None] = [None] * 7
    if descriptors:
        for i, (tensor, rows) in enumerate(((q, c.block_m), (k, c.block_n), (v, c.block_n), (o, c.block_m))):
            t = tensor.transpose(1, 2)
            tiles[i] = launch.Tiles(tuple(t.shape), t.stride(), (1, 1, rows, head_pad))
    scalars = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        *heads[1:], h, n_queries, n_keys, n_lse, n_blocks, scale * LOG2E.value,
        d, head_pad, c.block_m, c.block_n, peeled, (n_keys - peeled) % c.block_n > 0, n_lse > 0, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    return launch.Plan(_attention_fwd_kernel, B * h * n_blocks, tuple(tiles), scalars, options)


def _attention_kernel(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    x = packed(qkv, n_heads)
    return _run(x, x, x, (n_heads, 0, n_heads, 2 * n_heads), x.shape[-1] ** -0.5, False)[0]


def _attention_lse_kernel(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = packed(qkv, n_heads)
    return _run(x, x, x, (n_heads, 0, n_heads, 2 * n_heads), x.shape[-1] ** -0.5, True)


def _cross_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, store_lse: bool) -> Any:
    check_separate(q, k, v)
    return _run(addressable(q), addressable(k), addressable(v), (q.shape[2], 0, 0, 0), scale, store_lse)


def _cross_attention_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return _cross_kernel(q, k, v, scale, False)[0]


def _cross_attention_lse_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cross_kernel(q, k, v, scale, True)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _attention_fake(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    B, N, C = reference.packed_shape(qkv, n_heads)
    return qkv.new_empty(B, N, C // 3)


def _attention_lse_fake(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, N, C = reference.packed_shape(qkv, n_heads)
    return qkv.new_empty(B, N, C // 3), qkv.new_empty(B, n_heads, lse_rows(N), dtype=torch.float32)


def _cross_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    B, N, h, d = reference.cross_shape(q, k, v)
    return q.new_empty(B, N, h * d)


def _cross_attention_lse_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    B, N, h, d = reference.cross_shape(q, k, v)
    return q.new_empty(B, N, h * d), q.new_empty(B, h, lse_rows(N), dtype=torch.float32)


def padded(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pad = -lse.shape[-1] % LSE_ROWS
    return o.contiguous(), torch.nn.functional.pad(lse, (0, pad), value=math.inf)


# Gradients: (arguments, results, gradients of the results, which arguments need one) -> gradients of the arguments.


def uses_sdpa(keys: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the table of kernels/configs_backward.py has PyTorch compute the gradient for so many keys (dimension 1)
    of the type of `like`."""
    chosen = configs_backward.attention_by(launch.architecture(keys), like.element_size(), keys.shape[1])
    return chosen == "sdpa"


def _sdpa_backward(function: Callable, inputs: tuple, grad: torch.Tensor, needed: tuple[bool, ...]) -> tuple:
    """Of `function`, evaluated again."""
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() if need else x for x, need in zip(inputs, needed, strict=True))
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad))
    return tuple(next(found) if need else None for need in needed)


def _attention_lse_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    (qkv, n_heads), (o, lse), (grad, grad_lse) = inputs, outputs, grads
    if grad_lse is None and uses_sdpa(qkv, qkv):
        return _sdpa_backward(reference.attention, inputs, grad, needed)
    grad = torch.zeros_like(o) if grad is None else grad
    return ATTENTION_BACKWARD(grad, qkv, o, lse, grad_lse, n_heads), None


def _cross_attention_lse_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    (q, k, v, scale), (o, lse), (grad, grad_lse) = inputs, outputs, grads
    if grad_lse is None and uses_sdpa(k, k):
        return _sdpa_backward(reference.cross_attention, inputs, grad, needed)
    grad = torch.zeros_like(o) if grad is None else grad
    need_q, need_kv = needed[0], needed[1] or needed[2]
    found = CROSS_ATTENTION_BACKWARD(grad, q, k, v, o, lse, grad_lse, scale, need_q, need_kv)
    return *(gradient if need else None for gradient, need in zip(found, needed[:3], strict=True)), None


def _attention_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    """Of calls of the operator itself, in traced programs: the public function keeps the log-sum-exp instead."""
    return _attention_lse_backward(inputs, _attention_lse(*inputs), (*grads, None), needed)


def _cross_attention_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    outputs = _cross_attention_lse(*inputs)
    return _cross_attention_lse_backward(inputs, outputs, (*grads, None), needed)


def _flops(B: int, h: int, n_queries: int, n_keys: int, d: int) -> int:
    return 4 * B * h * n_queries * n_keys * d  # two products, two operations a multiply-add


def _packed_flops(qkv_shape: tuple[int, ...], n_heads: int, *args: Any, **kwargs: Any) -> int:
    B, N, C = qkv_shape
    return _flops(B, n_heads, N, N, C // (3 * n_heads))


def _cross_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return _flops(q[0], q[2], q[1], k[1], q[3])


def _cast_all(dtype: torch.dtype, args: tuple) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args)


_attention = define(
    "attention(Tensor qkv, int n_heads) -> Tensor",
    kernel=_attention_kernel,
    reference=lambda qkv, n_heads: reference.attention(qkv, n_heads).contiguous(),
    fake=_attention_fake,
    flops=_packed_flops,
    autocast=_cast_all,
    backward=_attention_backward,
)
_attention_lse = define(
    "attention_lse(Tensor qkv, int n_heads) -> (Tensor, Tensor)",
    kernel=_attention_lse_kernel,
    reference=lambda qkv, n_heads: padded(*reference.attention_lse(qkv, n_heads)),
    fake=_attention_lse_fake,
    flops=_packed_flops,
    autocast=_cast_all,
    backward=_attention_lse_backward,
    keep_results=(0, 1),
)
_cross_attention = define(
    "cross_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    kernel=_cross_attention_kernel,
    reference=lambda q, k, v, scale: reference.cross_attention(q, k, v, scale).contiguous(),
    fake=_cross_attention_fake,
    flops=_cross_flops,
    autocast=_cast_all,
    backward=_cross_attention_backward,
)
_cross_attention_lse = define(
    "cross_attention_lse(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    kernel=_cross_attention_lse_kernel,
    reference=lambda q, k, v, scale: padded(*reference.cross_attention_lse(q, k, v, scale)),
    fake=_cross_attention_lse_fake,
    flops=_cross_flops,
    autocast=_cast_all,
    backward=_cross_attention_lse_backward,
    keep_results=(0, 1),
)


def attention(
    qkv: torch.Tensor, n_heads: int, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Non-causal multi-head attention, softmax(q k^T / sqrt(d)) v; its gradient is kernels/attention_backward.py's.

    Args:
        qkv: (B, N, 3*h*d), bfloat16, float16 or float32: q, k and v blocks, each split by head. Any strides; a copy is
            made only if the last dimension is not dense.
        n_heads: h.
        return_lse: also return the log-sum-exp of each row of scaled scores.
    Returns:
        (B, N, h*d), the type of qkv; with `return_lse` a pair with (B, h, N) float32, natural logarithm.
    Raises:
        KernelError: another type, head_dim or device. ValueError: the columns are no multiple of 3 * n_heads.

    float32 is multiplied as `torch.set_float32_matmul_precision` says. A NaN in a query row makes that row NaN, one in
    a key or a value makes every row of its head NaN. Where a gradient is needed, qkv, the result and the log-sum-exp
    are kept for it: none of them may be written before the backward pass. Gradients of gradients are the reference's.
    """
    launch.check_device(qkv)
    forbid_forward_mode()
    if not (return_lse or differentiated(qkv)):
        return _attention(qkv, n_heads)
    o, lse = _attention_lse(qkv, n_heads)
    return (o, lse[..., : qkv.shape[1]]) if return_lse else o


def cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of separate tensors, with a number of keys of its own; otherwise as `attention`.

    Args:
        q: (B, N, h, d). k, v: (B, M, h, d), M >= 1. Any strides.
        scale: of the scores, by default d**-0.5.
        return_lse: also return the log-sum-exp of each row of scaled scores.
    Returns:
        (B, N, h*d); with `return_lse` a pair with (B, h, N) float32.
    """
    launch.check_device(q, k, v)
    forbid_forward_mode()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not (return_lse or differentiated(q, k, v)):
        return _cross_attention(q, k, v, scale)
    o, lse = _cross_attention_lse(q, k, v, scale)
    return (o, lse[..., : q.shape[1]]) if return_lse else o
