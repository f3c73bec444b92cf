"""The gradient of attention, without the (N, N) scores in memory: dQ, dK, dV from q, k, v, o, dO and the log-sum-exp.

    dO (B, N, h*d), qkv (B, N, 3*h*d), o, lse (B, h, N)  ->  dqkv (B, N, 3*h*d), ready for the projection's backward

With S = scale q k^T and P = exp(S - lse), the probabilities: dV = P^T dO; dS = P (dO V^T - delta), delta the sum over
a row of dO * O less the gradient of lse; dQ = scale dS K; dK = scale dS^T Q (Dao et al. 2022, FlashAttention, appendix
B). P is computed again from the scores, once for dK and dV and once for dQ: seven products where five would do, but no
two programs add to the same element. So there are no atomics, and a second run gives the same bits. Three kernels:

- delta, and lse in log2, one row each, for the other two to read.
- dK and dV of BLOCK_N keys, walking over the queries. Scores are computed transposed, k q^T, so that no result of a
  product is ever transposed for the next one.
- dQ of BLOCK_M queries, walking over the keys.

What does not fill a tile ends each loop. Queries beyond N need no mask on the scores: their lse is +inf, so P is 0, and
delta is 0 there (0 times NaN would be NaN). Keys beyond N do in dQ: a key of zeros scores 0, and exp(-lse) overflows
where all scores are far below 0. In dK and dV they are rows of their own, which are not stored.

Scores, P, dS and sums are float32; P and dS are rounded to the operands' type for the second product.

Limits: as attention's. Reference: `reference.attention_backward`, `reference.cross_attention_backward`. Test:
tests/kernels/test_attention_backward.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_backward, launch, reference
from segmenter.kernels.blocks import LOG2E, load_tile
from segmenter.kernels.heads import addressable, check_separate, head_padding, lse_rows, packed
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _attention_delta_kernel(
    DO, Out, Lse, DLse, Stats,  # (B, N, heads, HEAD_DIM) twice, (B, h, n_lse) twice; Stats (B, h, 2, n_lse)
    stride_db, stride_dn, stride_dh, stride_ob, stride_on, stride_oh, stride_lb, stride_lh, stride_ln,
    n_heads, n_queries, n_lse, n_blocks,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // n_blocks
    m_0 = (pid % n_blocks) * BLOCK_M
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    DO += b * stride_db + h * stride_dh
    Out += b * stride_ob + h * stride_oh
    do = load_tile(DO, (m_0, 0), offs_m, stride_dn, n_queries, HEAD_DIM, HEAD_PAD, False)
    o = load_tile(Out, (m_0, 0), offs_m, stride_on, n_queries, HEAD_DIM, HEAD_PAD, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # 0 beyond N
    rows = m_0 + offs_m
    if HAS_DLSE:
        pointers = DLse + b * stride_lb + h * stride_lh + rows.to(tl.int64) * stride_ln
        delta -= tl.load(pointers, mask=rows < n_queries, other=0.0)
    lse = tl.load(Lse + bh.to(tl.int64) * n_lse + rows)  # whole blocks; +inf beyond N
    lse = tl.where(rows < n_queries, lse * LOG2E, float("inf"))
    stats = Stats + bh.to(tl.int64) * 2 * n_lse + rows
    tl.store(stats, lse)
    tl.store(stats + n_lse, delta)


@triton.jit
def _dq_step(q, do, k, v, lse, delta, dq, scale_log2, n_left, PRECISION: tl.constexpr):
    """Adds what one tile of keys gives to dQ of a tile of queries; of n_left keys, or of all if that is None."""
    p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if n_left is not None:
        p = tl.where(tl.arange(0, k.shape[0])[None, :] < n_left, p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _store_tile(X, index, x, stride, n_rows, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Stores rows from row `index[2]` of a head on; `X` a descriptor, else a pointer to the head."""
    if DESCRIPTORS:
        X.store(index, x.to(X.dtype).reshape([1, 1, x.shape[0], HEAD_PAD]))
    else:
        rows = tl.arange(0, x.shape[0])
        cols = tl.arange(0, HEAD_PAD)
        pointers = X + tl.cast(index[2], tl.int64) * stride + rows[:, None] * stride + cols[None, :]
        mask = (index[2] + rows[:, None] < n_rows) & (cols[None, :] < HEAD_DIM)
        tl.store(pointers, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _attention_dkdv_kernel(
    Q, K, V, DO, DK, DV, Stats,  # (B, N, heads, HEAD_DIM) each; Stats (B, h, 2, n_lse): lse in log2, and delta
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    q_head, k_head, v_head,  # where in the tensor's heads q, k and v begin, and so their gradients
    n_heads, n_queries, n_keys, n_lse, n_blocks, scale_log2, scale,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # whether part of the last tile of queries is beyond them
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // n_blocks  # programs of one head run side by side: they share Q and dO in the L2 cache
    n_0 = (pid % n_blocks) * BLOCK_N
    b = bh // n_heads
    h = bh % n_heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if not DESCRIPTORS:
        Q += b.to(tl.int64) * stride_qb + (q_head + h).to(tl.int64) * stride_qh
        K += b.to(tl.int64) * stride_kb + (k_head + h).to(tl.int64) * stride_kh
        V += b.to(tl.int64) * stride_vb + (v_head + h).to(tl.int64) * stride_vh
        DO += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
        DK += b.to(tl.int64) * stride_dkb + (k_head + h).to(tl.int64) * stride_dkh
        DV += b.to(tl.int64) * stride_dvb + (v_head + h).to(tl.int64) * stride_dvh
    Lse = Stats + bh.to(tl.int64) * 2 * n_lse + offs_m
    Delta = Lse + n_lse
    k = load_tile(K, (b, k_head + h, n_0, 0), offs_n, stride_kn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
    v = load_tile(V, (b, v_head + h, n_0, 0), offs_n, stride_vn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
    dk = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)

    # The copy engine fills with zeros what is beyond N by itself.
    rows = n_queries if TAIL and not DESCRIPTORS else None
    for m_0 in tl.range(0, n_queries, BLOCK_M):
        q = load_tile(Q, (b, q_head + h, m_0, 0), offs_m, stride_qn, rows, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        do = load_tile(DO, (b, h, m_0, 0), offs_m, stride_on, rows, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        lse, delta = tl.load(Lse + m_0), tl.load(Delta + m_0)
        p = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    _store_tile(DK, [b, k_head + h, n_0, 0], dk * scale, stride_dkn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
    _store_tile(DV, [b, v_head + h, n_0, 0], dv, stride_dvn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)


@triton.jit
def _attention_dq_kernel(
    Q, K, V, DO, DQ, Stats,  # as above
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_dqb, stride_dqn, stride_dqh,
    q_head, k_head, v_head,
    n_heads, n_queries, n_keys, n_lse, n_blocks, scale_log2, scale,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # whether part of the last tile of keys is beyond them
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // n_blocks
    m_0 = (pid % n_blocks) * BLOCK_M
    b = bh // n_heads
    h = bh % n_heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if not DESCRIPTORS:
        Q += b.to(tl.int64) * stride_qb + (q_head + h).to(tl.int64) * stride_qh
        K += b.to(tl.int64) * stride_kb + (k_head + h).to(tl.int64) * stride_kh
        V += b.to(tl.int64) * stride_vb + (v_head + h).to(tl.int64) * stride_vh
        DO += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
        DQ += b.to(tl.int64) * stride_dqb + (q_head + h).to(tl.int64) * stride_dqh
    stats = Stats + bh.to(tl.int64) * 2 * n_lse + m_0 + offs_m
    lse, delta = tl.load(stats), tl.load(stats + n_lse)
    q = load_tile(Q, (b, q_head + h, m_0, 0), offs_m, stride_qn, n_queries, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
    do = load_tile(DO, (b, h, m_0, 0), offs_m, stride_on, n_queries, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
    dq = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)

    # With descriptors the main loop carries no mask. With pointers a second body would spill, so all steps are masked.
    MASKED: tl.constexpr = TAIL and not DESCRIPTORS
    end = n_keys if MASKED else n_keys // BLOCK_N * BLOCK_N
    rows = n_keys if MASKED else None
    for n_0 in tl.range(0, end, BLOCK_N):
        k = load_tile(K, (b, k_head + h, n_0, 0), offs_n, stride_kn, rows, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        v = load_tile(V, (b, v_head + h, n_0, 0), offs_n, stride_vn, rows, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
        dq = _dq_step(q, do, k, v, lse, delta, dq, scale_log2, n_keys - n_0 if MASKED else None, PRECISION)
    if TAIL and DESCRIPTORS:  # noqa: SIM102
        if end < n_keys:  # always true, but a branch at run time: see kernels/attention.py
            k = load_tile(K, (b, k_head + h, end, 0), offs_n, stride_kn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
            v = load_tile(V, (b, v_head + h, end, 0), offs_n, stride_vn, n_keys, HEAD_DIM, HEAD_PAD, DESCRIPTORS)
            dq = _dq_step(q, do, k, v, lse, delta, dq, scale_log2, n_keys - end, PRECISION)

    _store_tile(DQ, [b, q_head + h, m_0, 0], dq * scale, stride_dqn, n_queries, HEAD_DIM, HEAD_PAD, DESCRIPTORS)


# ---------------------------------------------------------------------------------------------------------------------
# Launching. As in kernels/attention.py, q, k and v are (B, N, heads, d) views with a first head in each.


def _run(
    grad: torch.Tensor,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    saved: tuple[torch.Tensor, torch.Tensor],
    grad_lse: torch.Tensor | None,
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    heads: tuple[int, int, int, int],
    scale: float,
    chosen: tuple[Any, Any] = (None, None),
) -> None:
    """Writes the gradients of 4-D views (B, N, heads, d).

    Args:
        grad: of o, (B, N, h*d). qkv: q, k and v. saved: o (B, N, h*d) and lse (B, h, n_lse). grad_lse: like lse.
        grads: where those of q, k and v are written, with the same heads; of k and v both are there, or both None.
        heads: (h, first head of q, of k, of v).
        chosen: configurations of dK and dV, and of dQ, instead of the table's choices.
    """
    (q, k, v), (o, lse), (dq, dk, dv), h = qkv, saved, grads, heads[0]
    B, n_queries, d = q.shape[0], q.shape[1], q.shape[-1]
    grad = grad if launch.fits_descriptor(grad) else launch.contiguous(grad)  # stride 0 does not fit
    do, o = (addressable(t).view(B, n_queries, h, d) for t in (grad, o))
    stats = launch.empty((B, h, 2, lse.shape[-1]), torch.float32, q.device)
    if stats.numel() > 0:
        lse = launch.contiguous(lse)
        _plan_delta(do, o, lse, grad_lse).run(do, o, lse, grad_lse, stats)
    if dk is not None and dv is not None and dk.numel() > 0:
        _plan(_attention_dkdv_kernel, (q, k, v, do, dk, dv), heads, scale, chosen[0]).run(q, k, v, do, dk, dv, stats)
    if dq is not None and dq.numel() > 0:
        _plan(_attention_dq_kernel, (q, k, v, do, dq), heads, scale, chosen[1]).run(q, k, v, do, dq, stats)


def _plan_delta(do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None) -> launch.Plan:
    B, n_queries, h, d = do.shape
    c = configs_backward.attention_delta(launch.architecture(do))
    n_blocks = lse.shape[-1] // c.block_m  # blocks divide LSE_ROWS
    scalars = (
        *do.stride()[:3], *o.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        h, n_queries, lse.shape[-1], n_blocks, d, head_padding(d), c.block_m, grad_lse is not None,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": 1}
    return launch.Plan(_attention_delta_kernel, B * h * n_blocks, (None,) * 5, scalars, options)


def _plan(kernel: Any, tensors: tuple, heads: tuple[int, int, int, int], scale: float, config: Any) -> launch.Plan:
    """Of dK and dV, or of dQ, by the kernel; `tensors` are all of its arguments but the last, `stats`."""
    q, k, _, do = tensors[:4]
    B, n_queries, h, d = do.shape
    n_keys, head_pad, precision, of_keys = k.shape[1], head_padding(d), launch.dot_precision(q.dtype), len(tensors) > 5
    table = configs_backward.attention_dkdv if of_keys else configs_backward.attention_dq
    c = config or table(launch.architecture(q), q.element_size(), head_pad, n_queries if of_keys else n_keys, precision)
    descriptors = c.descriptors and n_queries > 0 and all(launch.fits_descriptor(t) for t in tensors[:4])
    tail = (n_queries % c.block_m if of_keys else n_keys % c.block_n) > 0
    n_blocks = triton.cdiv(n_keys, c.block_n) if of_keys else triton.cdiv(n_queries, c.block_m)
    tiles: list[launch.Tiles | None] = [None] * (len(tensors) + 1)
    if descriptors:
        rows = (c.block_m, c.block_n, c.block_n, c.block_m, *((c.block_n, c.block_n) if of_keys else (c.block_m,)))
        for i, (tensor, block) in enumerate(zip(tensors, rows, strict=True)):
            t = tensor.transpose(1, 2)
            tiles[i] = launch.Tiles(tuple(t.shape), t.stride(), (1, 1, block, head_pad))
    scalars = (
        *(stride for tensor in tensors for stride in tensor.stride()[:3]),
        *heads[1:], h, n_queries, n_keys, lse_rows(n_queries), n_blocks, scale * LOG2E.value, scale,
        d, head_pad, c.block_m, c.block_n, tail, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    return launch.Plan(kernel, B * h * n_blocks, tuple(tiles), scalars, options)


def _check(grad: torch.Tensor, q: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None) -> None:
    """Raises KernelError or ValueError unless these belong to q (B, N, h, d)."""
    launch.check_device(grad, q, o, lse, dlse)
    B, N, h, d = q.shape
    wanted = (B, N, h * d), (B, h, lse_rows(N))
    for name, tensor, shape in (("grad", grad, 0), ("o", o, 0), ("lse", lse, 1), ("grad_lse", dlse, 1)):
        if tensor is None:
            continue
        launch.check_floats(name, tensor, (torch.float32,) if shape else (q.dtype,))
        if tuple(tensor.shape) != wanted[shape]:
            raise ValueError(f"{name} must be {wanted[shape]}, got {tuple(tensor.shape)}")


def _attention_backward_kernel(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    n_heads: int,
) -> torch.Tensor:
    x = packed(qkv, n_heads)
    d = x.shape[-1]
    _check(grad, x[:, :, :n_heads], o, lse, grad_lse)
    dqkv = launch.empty(qkv.shape, qkv.dtype, qkv.device)
    out, heads = dqkv.view(x.shape), (n_heads, 0, n_heads, 2 * n_heads)
    _run(grad, (x, x, x), (o, lse), grad_lse, (out, out, out), heads, d**-0.5)
    return dqkv


def _cross_attention_backward_kernel(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    need_q: bool,
    need_kv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_separate(q, k, v)
    _check(grad, q, o, lse, grad_lse)
    needed = ((q, need_q), (k, need_kv), (v, need_kv))
    dq, dk, dv = (launch.empty(t.shape if need else (0,), t.dtype, t.device) for t, need in needed)
    inputs = addressable(q), addressable(k), addressable(v)
    grads = (dq if need_q else None, dk if need_kv else None, dv if need_kv else None)
    _run(grad, inputs, (o, lse), grad_lse, grads, (q.shape[2], 0, 0, 0), scale)
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _attention_backward_fake(grad: Any, qkv: torch.Tensor, *others: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _cross_attention_backward_fake(
    grad: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Any, lse: Any, grad_lse: Any, scale: float,
    need_q: bool, need_kv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dq, dk, dv = (t.new_empty(t.shape if need else (0,)) for t, need in ((q, need_q), (k, need_kv), (v, need_kv)))
    return dq, dk, dv


def _flops(B: int, h: int, n_queries: int, n_keys: int, d: int) -> int:
    return 10 * B * h * n_queries * n_keys * d  # five products, as PyTorch counts; what is computed twice is no work


def _packed_flops(grad: Any, qkv: tuple, o: Any, lse: Any, grad_lse: Any, n_heads: int, **kwargs: Any) -> int:
    B, N, C = qkv
    return _flops(B, n_heads, N, N, C // (3 * n_heads))


def _cross_flops(grad: Any, q: tuple, k: tuple, *args: Any, **kwargs: Any) -> int:
    return _flops(q[0], q[2], q[1], k[1], q[3])


def _as_they_are(dtype: torch.dtype, args: tuple) -> tuple:
    """What is saved has the type of the forward pass already, and lse is float32."""
    return args


ATTENTION_BACKWARD = define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor o, Tensor lse, Tensor? grad_lse, int n_heads) -> Tensor",
    kernel=_attention_backward_kernel,
    reference=reference.attention_backward,
    fake=_attention_backward_fake,
    flops=_packed_flops,
    autocast=_as_they_are,
)
CROSS_ATTENTION_BACKWARD = define(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? grad_lse, "
    "float scale, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor)",
    kernel=_cross_attention_backward_kernel,
    reference=reference.cross_attention_backward,
    fake=_cross_attention_backward_fake,
    flops=_cross_flops,
    autocast=_as_they_are,
)


def attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    n_heads: int,
) -> torch.Tensor:
    """The gradient of packed attention; `attention(qkv, n_heads)` calls it by itself in a backward pass.

    Args:
        grad: of o, (B, N, h*d), the type of qkv. Any strides; a copy is made where some are 0 or not a multiple of 16
            bytes.
        qkv: (B, N, 3*h*d). o, lse: what `torch.ops.segmenter.attention_lse` returned, (B, N, h*d) and (B, h, n_lse),
            n_lse being N rounded up to 128.
        grad_lse: of lse, (B, h, n_lse), or None for zeros; what is beyond N is not looked at.
        n_heads: h.
    Returns:
        (B, N, 3*h*d), the type of qkv.
    Raises:
        KernelError: another type, head_dim or device. ValueError: shapes that do not belong together.
    """
    launch.check_device(grad, qkv)
    forbid_forward_mode()
    return ATTENTION_BACKWARD(grad, qkv, o, lse, grad_lse, n_heads)


def cross_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    need_q: bool = True,
    need_kv: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q (B, N, h, d), k and v (B, M, h, d); otherwise as `attention_backward`.

    Args:
        need_q, need_kv: whether those are needed; what is not is empty, and not computed.
    """
    launch.check_device(grad, q, k, v)
    forbid_forward_mode()
    return CROSS_ATTENTION_BACKWARD(grad, q, k, v, o, lse, grad_lse, scale, need_q, need_kv)
