"""Rotary positions: pairs of columns of queries and keys, turned by angles of their tokens.

    x (B, N, h, d), cos and sin of the last n tokens (n, d)  ->  (B, N, h, d)

x is read where the product left it, as a view: the queries and keys of packed qkv (B, N, 3*h*d) are its first 2 h heads
and are turned in one launch, while the values stay where they are and attention reads them there. Tokens before the
last n (CLS, registers) are copied. Against eager PyTorch, which negates and joins halves, multiplies twice, adds, and
joins the extra tokens again, twice, that is one read and one write of queries and keys.

Why a kernel of its own. It reads and writes 2/3 of qkv once: 4 N h d elements of about 30 that pass between memory and
a block's kernels, 6.3 MB an image and layer at ViT-B/16, 512x512, in bfloat16.
- In the epilogue of the product that traffic would be saved. But both columns of a pair would have to be in one tile,
  of whole heads, in each of its configurations; and without a GELU or a residual the product is the library's
  (`configs.linear_by_library`), which has no such epilogue.
- In front of attention's products every program would turn all keys of its head again, once for each block of queries
  (9 times at N = 1025), and keys would go through registers on their way: no asynchronous copies from memory into what
  the tensor cores read.
- In place it would be as much traffic, and what autograd has kept would be overwritten.

A program takes a block of tokens of a few heads, and reads the tables once for them if they are the same for all heads.
Arithmetic is float32, whatever the types. The gradient of x is the same kernel with the transposed matrices; that of
the tables (learned frequencies) is the reference's.

Limits: d even; anything else goes.
Reference: `reference_rotary.rotate`. Test: tests/kernels/test_rotate.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, launch
from segmenter.kernels.operators import define, forbid_forward_mode
from segmenter.kernels.reference_rotary import rotate as rotate_reference
from segmenter.kernels.reference_rotary import table_shape


@triton.jit
def _load_pairs(rows, inside, other, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both columns of each pair, (BLOCK_N, PAIRS) float32 twice, of rows that begin at the pointers `rows`."""
    if INTERLEAVED:  # dense columns, which are taken apart in registers
        cols = tl.arange(0, 2 * PAIRS)
        mask = inside[:, None] & (cols[None, :] < HEAD_DIM)
        x = tl.load(rows[:, None] + cols[None, :], mask=mask, other=other).to(tl.float32)
        a, b = tl.split(x.reshape([rows.shape[0], PAIRS, 2]))
    else:
        cols = tl.arange(0, PAIRS)
        mask = inside[:, None] & (cols[None, :] < HEAD_DIM // 2)
        a = tl.load(rows[:, None] + cols[None, :], mask=mask, other=other).to(tl.float32)
        b = tl.load(rows[:, None] + HEAD_DIM // 2 + cols[None, :], mask=mask, other=other).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(rows, inside, a, b, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        cols = tl.arange(0, 2 * PAIRS)
        y = tl.join(a, b).reshape([rows.shape[0], 2 * PAIRS])
        mask = inside[:, None] & (cols[None, :] < HEAD_DIM)
        tl.store(rows[:, None] + cols[None, :], y.to(rows.dtype.element_ty), mask=mask)
    else:
        cols = tl.arange(0, PAIRS)
        mask = inside[:, None] & (cols[None, :] < HEAD_DIM // 2)
        tl.store(rows[:, None] + cols[None, :], a.to(rows.dtype.element_ty), mask=mask)
        tl.store(rows[:, None] + HEAD_DIM // 2 + cols[None, :], b.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    X, Cos, Sin, Y,  # (B, N, HEADS, HEAD_DIM), (b, TABLES, n, HEAD_DIM) twice, as X but contiguous
    stride_xb, stride_xn, stride_xh, stride_cb, stride_ct, stride_cn, stride_sb, stride_st, stride_sn,
    n_tokens, n_extra, n_blocks,
    HEADS: tl.constexpr, TABLES: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # a power of two that holds HEAD_DIM // 2
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,  # tokens and heads a program
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    N_GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    pid = tl.program_id(0)  # those of one block of tokens run side by side: they share the tables in the cache
    h_0 = (pid % N_GROUPS) * GROUP
    block = pid // N_GROUPS % n_blocks
    b = (pid // N_GROUPS // n_blocks).to(tl.int64)
    rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = rows < n_tokens
    turned = inside & (rows >= n_extra)
    cos_rows = Cos + b * stride_cb + (rows - n_extra) * stride_cn
    sin_rows = Sin + b * stride_sb + (rows - n_extra) * stride_sn
    if TABLES == 1:
        cos_a, cos_b = _load_pairs(cos_rows, turned, 1.0, HEAD_DIM, PAIRS, INTERLEAVED)
        sin_a, sin_b = _load_pairs(sin_rows, turned, 0.0, HEAD_DIM, PAIRS, INTERLEAVED)
    for h in tl.range(h_0, tl.minimum(h_0 + GROUP, HEADS)):
        if TABLES > 1:
            t = tl.cast(h % TABLES, tl.int64)
            cos_a, cos_b = _load_pairs(cos_rows + t * stride_ct, turned, 1.0, HEAD_DIM, PAIRS, INTERLEAVED)
            sin_a, sin_b = _load_pairs(sin_rows + t * stride_st, turned, 0.0, HEAD_DIM, PAIRS, INTERLEAVED)
        x_rows = X + b * stride_xb + rows * stride_xn + tl.cast(h, tl.int64) * stride_xh
        x_a, x_b = _load_pairs(x_rows, inside, 0.0, HEAD_DIM, PAIRS, INTERLEAVED)
        if TRANSPOSED:
            y_a = x_a * cos_a + x_b * sin_b
            y_b = x_b * cos_b - x_a * sin_a
        else:
            y_a = x_a * cos_a - x_b * sin_a
            y_b = x_b * cos_b + x_a * sin_b
        y_a = tl.where(turned[:, None], y_a, x_a)  # 0 times an infinity of the other column would be NaN
        y_b = tl.where(turned[:, None], y_b, x_b)
        y_rows = Y + ((b * n_tokens + rows) * HEADS + h) * HEAD_DIM
        _store_pairs(y_rows, inside, y_a, y_b, HEAD_DIM, PAIRS, INTERLEAVED)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _run(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    transposed: bool,
    config: configs.RotateConfig | None = None,
) -> torch.Tensor:
    """Of tensors of checked types; `config`: instead of the table's choice."""
    _, tables, n, d = table_shape(x, cos, sin)
    B, N, h, _ = x.shape
    y = launch.empty(x.shape, x.dtype, x.device)
    if y.numel() == 0:
        return y
    x, cos, sin = (launch.rows_contiguous(tensor) for tensor in (x, cos, sin))
    pairs = triton.next_power_of_2(d // 2)
    c = config or configs.rotate()
    block_n = max(1, c.elements // (2 * pairs))
    n_blocks = triton.cdiv(N, block_n)
    cos_strides, sin_strides = (table.expand(B, tables, n, d).stride()[:3] for table in (cos, sin))
    scalars = (
        *x.stride()[:3], *cos_strides, *sin_strides, N, N - n, n_blocks,
        h, tables, d, pairs, block_n, c.heads, interleaved, transposed,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": 1}
    programs = B * n_blocks * triton.cdiv(h, c.heads)
    launch.Plan(_rotate_kernel, programs, (None,) * 4, scalars, options).run(x, cos, sin, y)
    return y


def _rotate_host(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False, transposed: bool = False
) -> torch.Tensor:
    launch.check_device(x, cos, sin)
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        launch.check_floats(name, tensor)
    return _run(x, cos, sin, interleaved, transposed)


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _rotate_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *flags: bool) -> torch.Tensor:
    table_shape(x, cos, sin)
    return x.new_empty(x.shape)


def _rotate_flops(x: tuple[int, ...], cos: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 3 * x[0] * cos[-2] * x[2] * x[3]  # two products and a sum for each element


def _rotate_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple | None:
    _, cos, sin, interleaved, transposed = inputs
    if needed[1] or needed[2]:
        return None
    return _rotate(*grads, cos, sin, interleaved, not transposed), None, None, None, None


def _as_they_are(dtype: torch.dtype, args: tuple) -> tuple:
    """Sums and products of other types are no business of autocast; x comes from a product, in its type already."""
    return args


_rotate = define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> Tensor",
    kernel=_rotate_host,
    reference=rotate_reference,
    fake=_rotate_fake,
    flops=_rotate_flops,
    autocast=_as_they_are,
    backward=_rotate_backward,
)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False, transposed: bool = False
) -> torch.Tensor:
    """Rotary positions: pairs (a, b) of columns become (a cos_a - b sin_a, b cos_b + a sin_b).

    Args:
        x: (B, N, h, d), bfloat16, float16 or float32, d even: queries, keys, or both side by side. Any
            strides; a copy is made if the last dimension is not dense.
        cos, sin: (n, d) of the last n tokens, n <= N, of any of these types; tokens before them stay as they are. Or
            (b, t, n, d): b is 1 or B, and t divides h: head i takes table i mod t.
        interleaved: pairs are columns 2 i and 2 i + 1, else i and i + d / 2.
        transposed: multiply by the transposed matrices, which is the gradient of the other.
    Returns:
        (B, N, h, d), contiguous, the type of x; computed in float32 and rounded once.
    Raises:
        KernelError: another type or device. ValueError: shapes that do not belong together.
    """
    launch.check_device(x, cos, sin)
    forbid_forward_mode()
    return _rotate(x, cos, sin, interleaved, transposed)
