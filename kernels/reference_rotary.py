"""Eager PyTorch definition of rotary positions: see `reference`."""

import torch


def table_shape(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, int, int, int]:
    """(b, t, n, d) of the tables. Raises ValueError unless they belong to x; see `rotate`."""
    if x.ndim != 4 or cos.shape != sin.shape or cos.ndim not in (2, 4):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, cos, sin))
        raise ValueError(f"x must be (B, N, h, d), cos and sin both (n, d) or (b, t, n, d), got {shapes}")
    (B, N, h, d), (b, t, n, columns) = x.shape, (1, 1, *cos.shape) if cos.ndim == 2 else cos.shape
    if columns != d or d % 2:
        raise ValueError(f"heads have {d} columns and cos {columns}: they must be as many, and an even number")
    if n > N:
        raise ValueError(f"cos has {n} rows, more than the {N} tokens")
    if b not in (1, B) or t < 1 or h % t:
        raise ValueError(f"cos is for {b} images and {t} heads, x has {B} and {h}: 1 or all, and a divisor, are needed")
    return b, t, n, d


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., d) as the two columns of each pair, (..., d/2) both."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False, transposed: bool = False
) -> torch.Tensor:
    """Rotary positions (Su et al., "RoFormer", 2021): turns pairs of columns of each head by angles of its token.

    With a, b the columns of a pair, (a cos_a - b sin_a, b cos_b + a sin_b), where cos_a is the column of `cos` that
    belongs to a. In tables of angles cos_a = cos_b and sin_a = sin_b, but nothing here needs that. Computed in float32
    or wider, and rounded once.

    Args:
        x: (B, N, h, d), d even: queries, keys, or both, by head.
        cos, sin: (n, d) of the last n tokens, n <= N; those before them (CLS, registers) stay as they are. Or
            (b, t, n, d): b is 1 or B, and t divides h: head i takes table i mod t.
        interleaved: pairs are columns 2 i and 2 i + 1 (EVA-02), else i and i + d / 2 (DINOv3).
        transposed: multiply by the transposed matrices, (a cos_a + b sin_b, b cos_b - a sin_a), which is the gradient
            of the other.
    Returns:
        (B, N, h, d), the type of x.
    Raises:
        ValueError: the shapes do not belong together.
    """
    _, t, n, _ = table_shape(x, cos, sin)
    first = x.shape[1] - n
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    a, b = _pairs(x[:, first:].to(wide), interleaved)
    if cos.ndim == 4:  # (b, n, h, d)
        cos, sin = (table.repeat(1, x.shape[2] // t, 1, 1).transpose(1, 2) for table in (cos, sin))
    else:
        cos, sin = cos[:, None], sin[:, None]
    (cos_a, cos_b), (sin_a, sin_b) = (_pairs(table.to(wide), interleaved) for table in (cos, sin))
    if transposed:
        pairs = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        pairs = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([x[:, :first], y.to(x.dtype)], dim=1)
