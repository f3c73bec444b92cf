"""The memory layouts that a tensor may come in. Each function rebuilds a tensor in its layout; gaps hold NaN, or 0.

Values stay the same except where a layout cannot hold them: `expanded` repeats the first slice of the first dimension,
and `huge_stride` keeps only that slice unless some dimension already has size 1. So compare an operator on
`layout(t)` with the operator on `layout(t).contiguous()`.
"""

import math
from collections.abc import Callable

import torch

HUGE = 3331333  # a stride that nothing may ever multiply with anything but 0


def _gap(*shape: int, like: torch.Tensor) -> torch.Tensor:
    value = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def packed_slice(t: torch.Tensor) -> torch.Tensor:
    """The middle third of wider rows, as q, k and v are of the fused projection's output."""
    columns = t.shape[-1]
    wide = _gap(*t.shape[:-1], 3 * columns, like=t)
    wide[..., columns : 2 * columns] = t
    return wide[..., columns : 2 * columns]


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The two dimensions before the last exchanged in memory."""
    if t.ndim < 3:
        return contiguous(t)
    return t.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)


def row_padded(t: torch.Tensor) -> torch.Tensor:
    """Three elements between rows: no row but the first begins at a multiple of 16 bytes."""
    wide = _gap(*t.shape[:-1], t.shape[-1] + 3, like=t)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def offset_by_one(t: torch.Tensor) -> torch.Tensor:
    """Dense, but begins one element after an aligned address."""
    flat = _gap(t.numel() + 1, like=t)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 in the first dimension (of tensors with two or more)."""
    return contiguous(t[:1]).expand_as(t) if t.ndim > 1 else contiguous(t)


def huge_stride(t: torch.Tensor) -> torch.Tensor:
    """A dimension of size 1 with an absurd stride, which PyTorch allows and sometimes makes."""
    t = contiguous(t if 1 in t.shape[:-1] or t.ndim < 2 else t[:1])
    strides = [HUGE if size == 1 else s for size, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    return t.as_strided(t.shape, (*strides, t.stride(-1)))


def column_strided(t: torch.Tensor) -> torch.Tensor:
    """Every second element of wider rows."""
    wide = _gap(*t.shape[:-1], 2 * t.shape[-1], like=t)
    wide[..., ::2] = t
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    f.__name__: f
    for f in (
        contiguous, packed_slice, transposed, row_padded, offset_by_one, expanded, huge_stride, column_strided
    )
}  # fmt: skip
