"""The gradient of an MLP's hidden layer, before its GELU: dA = (dY W) * gelu'(a), as one product.

    dY (M, K), W (K, N), a (M, N)  ->  dA (M, N), gelu(a) (M, N), sum of dA over rows (N,)

The epilogue reads the pre-activation a once and makes all three of it and of the float32 accumulator. gelu(a), which
W's gradient is a product with, need not be kept since the forward pass, and is not read for dA. Sums for the first
layer's bias are one float32 row for each row block, added in a fixed order by kernels/partial_sums.py: no atomics.

W is that of fc2, (d, d_ff), so unlike in kernels/linear.py its rows are what is added over.

Limits: any sizes. Reference: `reference_backward.linear_backward` with a GELU's derivative. Test:
tests/kernels/test_layernorm_mlp_backward.py.
"""

import torch
import triton
import triton.language as tl

from segmenter.kernels import column_sums, configs, configs_backward, launch, partial_sums
from segmenter.kernels.blocks import gelu_and_derivative, gelu_form, load_tile, program_block


@triton.jit
def _gelu_bwd_kernel(
    DY, W, A, DA, H, Parts,  # (M, K), (K, N), (M, N) three times, (row blocks, N) float32
    stride_dy, stride_w, n_rows, n_blocks_m,
    N: tl.constexpr,
    K: tl.constexpr,  # a constant: see kernels/linear.py
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FORM: tl.constexpr,  # of `gelu_and_derivative`
    STORE_H: tl.constexpr,  # whether gelu(a) is stored
    SUMS: tl.constexpr,  # whether dA is summed over rows
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_m, block_n = program_block(n_blocks_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    m_0, n_0 = block_m * BLOCK_M, block_n * BLOCK_N
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    offs_n = n_0 + tl.arange(0, BLOCK_N)
    dy_rows = tl.minimum(offs_m, n_rows - 1).to(tl.int64)  # beyond the last row that again
    w_rows = tl.arange(0, BLOCK_K).to(tl.int64)
    k_rows = K if K % BLOCK_K != 0 else None

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k_0 in tl.range(0, K, BLOCK_K):
        dy = load_tile(DY, (m_0, k_0), dy_rows - m_0, stride_dy, None, K, BLOCK_K, DESCRIPTORS)
        w = load_tile(W, (k_0, n_0), w_rows, stride_w, k_rows, N, BLOCK_N, DESCRIPTORS)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)

    mask_n = offs_n < N
    mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
    at = dy_rows[:, None] * N + offs_n[None, :]
    # The copy engine reads zeros beyond the edges and writes nothing there.
    a = A.load([m_0, n_0]) if DESCRIPTORS else tl.load(A + at, mask=mask, other=0.0)
    h, derivative = gelu_and_derivative(a.to(tl.float32), FORM)
    d_a = acc * derivative
    if DESCRIPTORS:
        DA.store([m_0, n_0], d_a.to(DA.dtype))
    else:
        d_a = tl.where(mask, d_a, 0.0)  # rows beyond the last would enter the sums
        tl.store(DA + at, d_a.to(DA.dtype.element_ty), mask=mask)
    if STORE_H:
        if DESCRIPTORS:
            H.store([m_0, n_0], h.to(H.dtype))
        else:
            tl.store(H + at, h.to(H.dtype.element_ty), mask=mask)
    if SUMS:
        tl.store(Parts + block_m.to(tl.int64) * N + offs_n, tl.sum(d_a, 0), mask=mask_n)


def run(
    grad: torch.Tensor,
    weight: torch.Tensor,
    pre_activation: torch.Tensor,
    with_h: bool,
    with_sums: bool,
    config: configs.LinearConfig | None = None,
    tanh: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dA (M, N), gelu(a) (M, N) or None, the column sums of dA (N,) or None, all of weight's type.

    Args:
        grad: (M, K), weight: (K, N), of one type, dense rows. pre_activation: a (M, N), contiguous, of that type.
        with_h, with_sums: whether those are needed. config: instead of the table's choice. tanh: of the GELU by tanh.
    """
    (m, n), dtype, device = pre_activation.shape, weight.dtype, weight.device
    d_a = launch.empty((m, n), dtype, device)
    h = launch.empty((m, n), dtype, device) if with_h else None
    if d_a.numel() == 0:
        return d_a, h, column_sums.zeros(n, dtype, device) if with_sums else None
    precision = launch.dot_precision(dtype)
    c = config or configs_backward.gelu_backward(launch.architecture(grad), weight.element_size(), m, n, precision)
    n_blocks_m = triton.cdiv(m, c.block_m)
    parts = launch.empty((n_blocks_m, n), torch.float32, device) if with_sums else None
    _plan(grad, weight, pre_activation, d_a, h, with_sums, tanh, precision, c).run(
        grad, weight, pre_activation, d_a, h, parts
    )
    if parts is None:
        return d_a, h, None
    return d_a, h, partial_sums.add(parts, (n,), dtype)


def _plan(grad, weight, pre_activation, d_a, h, with_sums, tanh, precision, c) -> launch.Plan:
    (m, n), k = pre_activation.shape, weight.shape[0]
    matrices = (grad, weight, pre_activation, d_a, h)
    descriptors = c.descriptors and all(t is None or launch.fits_descriptor(t) for t in matrices)
    tiles: list[launch.Tiles | None] = [None] * 6
    if descriptors:
        blocks = ((c.block_m, c.block_k), (c.block_k, c.block_n), *((c.block_m, c.block_n),) * 3)
        for i, (tensor, block) in enumerate(zip(matrices, blocks, strict=True)):
            if tensor is not None:
                tiles[i] = launch.Tiles(tuple(tensor.shape), tensor.stride(), block)
    n_blocks_m = triton.cdiv(m, c.block_m)
    scalars = (
        grad.stride(0), weight.stride(0), m, n_blocks_m, n, k, c.block_m, c.block_n, c.block_k, c.group_m,
        gelu_form(weight.dtype, launch.architecture(grad), tanh), h is not None, with_sums, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    return launch.Plan(_gelu_bwd_kernel, n_blocks_m * triton.cdiv(n, c.block_n), tuple(tiles), scalars, options)
