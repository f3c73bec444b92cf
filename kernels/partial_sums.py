"""Partial sums of several programs, added in a fixed order: gradients of parameters, without atomics.

    partials (S, ...) float32  ->  (...), scale times the sum over S

Each program of a gradient's kernel stores what it added up; how many there are depends on shapes alone. One program
here takes a block of columns and walks over the S, so a second run gives the same bits.

Limits: none on shapes. Reference: a sum in float64. Test: tests/kernels/test_partial_sums.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_backward, launch


@triton.jit
def _partial_sums_kernel(
    Partials, Y,  # (n_partials, n), (n,)
    n_partials, n, scale,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for s_0 in tl.range(0, n_partials, BLOCK_S):
        rows = (s_0 + offs_s).to(tl.int64)
        mask = (rows < n_partials)[:, None] & (cols < n)[None, :]
        total += tl.load(Partials + rows[:, None] * n + cols[None, :], mask=mask, other=0.0)
    y = tl.sum(total, 0) * scale
    tl.store(Y + cols, y.to(Y.dtype.element_ty), mask=cols < n)


def add(partials: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """(*shape) of `dtype`, scale * partials.sum(0).

    Args:
        partials: (S, *shape) float32, contiguous; S = 0 gives zeros.
    """
    y = launch.empty(shape, dtype, partials.device)
    if y.numel() > 0:
        c = configs_backward.partial_sums(launch.architecture(partials))
        scalars = (partials.shape[0], y.numel(), scale, c.block_s, c.block_n)
        options = {"num_warps": c.num_warps, "num_stages": 1}
        programs = triton.cdiv(y.numel(), c.block_n)
        launch.Plan(_partial_sums_kernel, programs, (None, None), scalars, options).run(partials, y)
    return y
