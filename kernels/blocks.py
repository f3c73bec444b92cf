"""Device code that several kernels share: loading a tile, the order of blocks, the GELU, LayerNorm of whole rows.

GELU is x Phi(x). `tl.erf` costs 34 instructions an element, more than a narrow layer's matrix product. Half types are
served well by a sigmoid with a fitted argument: gelu(x) = x / (1 + 2^(-x Q(x^2))), Q a polynomial fitted to the exact
(erf) form. Its largest error over all x is 3.2e-6, a hundredth of the spacing of bfloat16 numbers near 0.1, at 12
instructions with the conversion to the half type. float32 takes `tl.erf`.

The approximation by tanh that some models are trained with, x / 2 (1 + tanh(k (x + c x^3))), has the same form without
a fit, Q = 2 k log2(e) (1 + c x^2), in every type.
"""

import torch
import triton
import triton.language as tl

from segmenter.kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(X, index, rows, stride, n_rows, WIDTH: tl.constexpr, COLS: tl.constexpr,
              DESCRIPTORS: tl.constexpr):  # fmt: skip
    """A tile of COLS columns of a matrix. 0 beyond WIDTH columns; and beyond n_rows rows, unless that is None.

    Args:
        X: with DESCRIPTORS a tensor descriptor, else a pointer to the matrix. index: where the tile begins, (...,
            row, column). stride: from row to row.
        rows: the tile's rows, counted from there. int32, and addresses within a tile stay from step to step (a tile
            must span less than 2**31 elements); int64, and they are computed anew.
    """
    if DESCRIPTORS:  # the copy engine fills with zeros what is outside
        x = X.load(index).reshape([rows.shape[0], COLS])
    else:
        row = index[len(index) - 2]
        cols = index[len(index) - 1] + tl.arange(0, COLS)
        if rows.dtype == tl.int64:
            pointers = X + (row + rows)[:, None] * stride + cols[None, :]
        else:
            pointers = X + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
        if n_rows is not None:
            mask = (row + rows)[:, None] < n_rows
            if WIDTH % COLS != 0:
                mask = mask & (cols[None, :] < WIDTH)
            x = tl.load(pointers, mask=mask, other=0.0)
        elif WIDTH % COLS != 0:
            x = tl.load(pointers, mask=cols[None, :] < WIDTH, other=0.0)
        else:
            x = tl.load(pointers)
    return x


@triton.jit
def program_block(n_blocks_m, N_BLOCKS_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row block and column block of this program of a product.

    Programs that run side by side share GROUP_M row blocks and a few column blocks: both stay in the L2 cache.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP_M * N_BLOCKS_N)
    within = pid % (GROUP_M * N_BLOCKS_N)
    group_rows = tl.minimum(n_blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def _sigmoid_of_tanh(x, FORM: tl.constexpr):
    """s = (1 + tanh(k (x + c x^3))) / 2, and 1 - s without cancellation; k = sqrt(2 / pi), c = 0.044715."""
    e = tl.exp2(tl.minimum(-x * (2.3022081981 + 0.1029432396 * x * x), 126.0))  # an infinity times 0 would be NaN
    if FORM == "tanh rcp":
        s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], tl.float32, True, 1)
    else:
        s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """GELU of float32 x: the exact one by "erf", or to within 3.2e-6 by "rcp" (NVIDIA's approximate reciprocal) or
    "divide"; that by tanh by "tanh rcp" or "tanh divide"."""
    if FORM == "erf":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORM == "tanh rcp" or FORM == "tanh divide":
        y = x * _sigmoid_of_tanh(x, FORM)[0]
    else:
        u = x * x
        q = -8.7909822e-5 + u * 3.2103803e-6
        q = 2.3020437 + u * (0.10522997 + u * (-3.6204740e-4 + u * q))  # positive everywhere, so |x| = inf is right too
        e = 1.0 + tl.exp2(-x * q)
        if FORM == "rcp":  # plain division adds a range check of five instructions
            y = x * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], tl.float32, True, 1)
        else:
            y = x / e
    return y


@triton.jit
def gelu_and_derivative(x, FORM: tl.constexpr):
    """GELU of float32 x and its derivative, Phi(x) + x phi(x) of the exact one, with the FORM that `gelu` has of it.

    In half types Phi is formula 7.1.26 of Abramowitz and Stegun, of the same exp2 as phi: errors of 7e-7 and 3e-7, a
    fifth of that of `gelu` there.
    """
    if FORM == "tanh rcp" or FORM == "tanh divide":
        s, rest = _sigmoid_of_tanh(x, FORM)
        y = x * s
        x = tl.maximum(x, -1e4)  # s is 2^-126 at least, which x^3 would make large from -1e13 on
        derivative = s + x * s * rest * (1.5957691216 + 0.2140644488 * x * x)
    else:
        y, derivative = _exact_gelu_and_derivative(x, FORM)
    return y, derivative


@triton.jit
def _exact_gelu_and_derivative(x, FORM: tl.constexpr):
    e = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
    if FORM == "erf":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        d = 1.0 + 0.23164189 * tl.abs(x)  # 0.3275911 / sqrt(2)
        if FORM == "rcp":
            t = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], tl.float32, True, 1)
        else:
            t = 1.0 / d
        p = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)  # the formula's coefficients, halved
        tail = t * (0.127414796 + t * (-0.142248368 + t * p)) * e
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return x * cdf, cdf + x * e * 0.3989422804014327


def gelu_form(dtype: torch.dtype, architecture: str, tanh: bool = False) -> str:
    """Which FORM of `gelu` to compile. Inline assembly exists neither in the interpreter nor on AMD."""
    if dtype == torch.float32:
        return "tanh divide" if tanh else "erf"
    form = "rcp" if architecture.startswith("sm_") and not launch.INTERPRETED else "divide"
    return f"tanh {form}" if tanh else form


@triton.jit
def normalised_rows(X, Gamma, Beta, row_0, stride_x, n_rows, eps, D: tl.constexpr, D1: tl.constexpr,
                    BLOCK_M: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """LayerNorm of BLOCK_M whole rows, as columns 0..D1 and D1..D in DTYPE; the first again if D1 == D.

    Tiles have powers of two, widths such as 192 have not: hence two column blocks, both powers of two. Rows beyond
    n_rows repeat the last one.
    """
    rows = tl.minimum(row_0 + tl.arange(0, BLOCK_M), n_rows - 1).to(tl.int64)
    offs_1 = tl.arange(0, D1)
    x_1 = tl.load(X + rows[:, None] * stride_x + offs_1[None, :]).to(tl.float32)
    if D1 < D:
        offs_2 = D1 + tl.arange(0, D - D1)
        x_2 = tl.load(X + rows[:, None] * stride_x + offs_2[None, :]).to(tl.float32)
        mean = (tl.sum(x_1, 1) + tl.sum(x_2, 1)) / D
        x_1 = x_1 - mean[:, None]
        x_2 = x_2 - mean[:, None]
        rstd = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / D + eps)
        gamma = tl.load(Gamma + offs_2).to(tl.float32)
        beta = tl.load(Beta + offs_2).to(tl.float32)
        y_2 = (x_2 * rstd[:, None] * gamma[None, :] + beta[None, :]).to(DTYPE)
    else:
        x_1 = x_1 - (tl.sum(x_1, 1) / D)[:, None]
        rstd = tl.rsqrt(tl.sum(x_1 * x_1, 1) / D + eps)
    gamma = tl.load(Gamma + offs_1).to(tl.float32)
    beta = tl.load(Beta + offs_1).to(tl.float32)
    y_1 = (x_1 * rstd[:, None] * gamma[None, :] + beta[None, :]).to(DTYPE)
    if D1 == D:
        y_2 = y_1
    return y_1, y_2


def power_of_two_columns(width: int) -> int:
    """The largest power of two up to `width`. What is left must be 0 or a power of two, at least 16, to be a tile."""
    return 1 << (width.bit_length() - 1)


def fits_rows(width: int) -> bool:
    """Whether rows of this width are one or two tiles, as `normalised_rows` takes them."""
    rest = width - power_of_two_columns(width)
    return width >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0))
