"""q, k and v as views by head, checked: what attention, its gradient and its maps share on the host's side."""

import torch
import triton

from segmenter.kernels import configs, launch, reference

LSE_ROWS = 128  # log-sum-exp is stored in multiples of this many rows, +inf beyond N, for unmasked reading
_MAX_ROW_STRIDE = 2**31 // 128  # offsets within a tile are 32 bits


def check_head(d: int) -> None:
    """Raises KernelError unless the kernels take heads of d columns."""
    if d % 8 or not 8 <= d <= configs.MAX_HEAD_DIM:
        limit = f"a multiple of 8 up to {configs.MAX_HEAD_DIM}"
        raise launch.KernelError(f'head_dim must be {limit}, got {d}; use impl="eager"')


def head_padding(d: int) -> int:
    """Columns of the tiles of heads of d columns: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(d))


def addressable(x: torch.Tensor) -> torch.Tensor:
    """(B, N, ...) itself, or a copy if its last dimension is not dense or its rows are too far apart."""
    return launch.rows_contiguous(x) if x.shape[1] < 2 or x.stride(1) <= _MAX_ROW_STRIDE else launch.contiguous(x)


def packed(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(B, N, 3*h*d) as (B, N, 3*h, d), a view unless the last dimension is not dense."""
    launch.check_device(qkv)
    launch.check_floats("qkv", qkv)
    B, N, C = reference.packed_shape(qkv, n_heads)
    check_head(C // (3 * n_heads))
    return addressable(qkv).view(B, N, 3 * n_heads, C // (3 * n_heads))


def check_separate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises KernelError or ValueError unless the kernels take these q (B, N, h, d), k and v (B, M, h, d)."""
    launch.check_device(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        launch.check_floats(name, tensor, (q.dtype,) if q.dtype in launch.FLOATS else launch.FLOATS)
    reference.cross_shape(q, k, v)
    check_head(q.shape[-1])


def lse_rows(n_queries: int) -> int:
    """Rows that log-sum-exp is stored in."""
    return (n_queries + LSE_ROWS - 1) // LSE_ROWS * LSE_ROWS
