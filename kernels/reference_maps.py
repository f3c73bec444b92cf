"""Eager PyTorch definition of what attention maps are asked for: see `reference`. No (N, M) matrix is ever whole.

Rows of softmax(scale q k^T) do not depend on each other, so what is defined by rows is computed for a block of them at
a time, of at most BLOCK elements: memory grows with the number of tokens, not with its square. (Gradients keep every
block.) Scores have the type of q and k, as in `reference.attention_lse`; all that follows is in float32 or wider.
"""

from collections.abc import Iterator, Sequence

import torch

from segmenter.kernels import reference

BLOCK = 2**21  # scores at a time: 8 MB, about what stays in a processor's cache
STATISTICS = ("entropy", "extra", "y", "x", "distance", "squared_distance")  # in the order of `attention_statistics`


def check_grid(n_tokens: int, grid: Sequence[int], first: int) -> tuple[int, int]:
    """(patches, tokens that are none). Raises ValueError unless a grid with a patch lies within the tokens."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (rows, columns), each at least 1, got {tuple(grid)}")
    n_patches = grid[0] * grid[1]
    if first < 0 or first + n_patches > n_tokens:
        patches = f"{grid[0]} x {grid[1]} patches from token {first} on"
        raise ValueError(f"{patches} are not within {n_tokens} tokens")
    return n_patches, n_tokens - n_patches


def check_columns(q: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError unless x is (B, N, h, R), R >= 1, for q (B, N, h, d)."""
    if x.ndim != 4 or x.shape[:3] != q.shape[:3] or x.shape[3] == 0:
        raise ValueError(f"x must be (B, N, h, R), R at least 1, for q {tuple(q.shape)}, got {tuple(x.shape)}")


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(B, N, h, d) as (B*h, N, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _blocks(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(heads, queries, their scores (heads, queries, M)) of q (B*h, N, d) and k (B*h, M, d), BLOCK at a time."""
    H, N, M = q.shape[0], q.shape[1], k.shape[1]
    n_heads, n_rows = max(1, BLOCK // max(1, N * M)), max(1, BLOCK // M)
    for h in range(0, max(1, H), n_heads):  # one block at least, which may be empty
        heads = slice(h, h + n_heads)
        for i in range(0, max(1, N), n_rows):
            rows = slice(i, i + n_rows)
            yield heads, rows, _scores(q[heads, rows], k[heads], scale)


def attention_rows(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """softmax(scale q k^T) of chosen queries, q (B, R, h, d), and k (B, M, h, d): (B, h, R, M), float32 or wider.

    scale: d**-0.5 if None.
    """
    reference.cross_shape(q, k, k)
    return _scores(q.transpose(1, 2), k.transpose(1, 2), scale).softmax(-1)


def attention_transposed(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """P^T x with P = softmax(scale q k^T): sums of attention rows, weighted by the columns of x.

    Args:
        q: (B, N, h, d). k: (B, M, h, d). x: (B, N, h, R), float32 (float64 with float64).
        scale: d**-0.5 if None.
    Returns:
        (B, M, h, R), float32 or wider. Of a column of x with 1 / n at n queries and 0 elsewhere it is the mean of
        their attention rows.
    """
    B, _, h, _ = reference.cross_shape(q, k, k)
    check_columns(q, x)
    columns = _by_head(x)
    sums: list[torch.Tensor] = []
    for heads, rows, scores in _blocks(_by_head(q), _by_head(k), scale):
        added = scores.softmax(-1).transpose(1, 2) @ columns[heads, rows].to(scores.dtype)
        if rows.start == 0:
            sums.append(added)
        else:
            sums[-1] = sums[-1] + added
    return torch.cat(sums).unflatten(0, (B, h)).transpose(1, 2).contiguous()


def attention_statistics(
    q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], first: int, scale: float | None = None
) -> torch.Tensor:
    """Six numbers of each row of P = softmax(scale q k^T), rows and columns being the tokens of one image.

    Tokens are `first` others, patches in a grid row by row, and others again. With P' = softmax over the patches alone,
    which is P divided by what of it falls on patches:

        entropy             - sum of P log P, over all tokens, in nats
        extra               the share of P on tokens that are no patches
        y, x                the centre of P': sum of P' times row, or column, of the grid, from 0
        distance            sum of P' times the Euclidean distance to the query's own patch, in patches
        squared_distance    the same of its square

    Args:
        q, k: (B, N, h, d). grid: (rows, columns). first: the token that is the first patch. scale: d**-0.5 if None.
    Returns:
        (6, B, h, N), float32 or wider. Distances of queries that are no patches are 0.
    """
    B, N, h, _ = reference.cross_shape(q, k, k)
    if k.shape[1] != N:
        raise ValueError(f"q and k must be of the same tokens, got {N} and {k.shape[1]}")
    n_patches, _ = check_grid(N, grid, first)
    patches = slice(first, first + n_patches)
    wide = torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(N, device=q.device) - first  # of what is no patch as if the grid went on
    y, x = at.div(grid[1], rounding_mode="floor").to(wide), (at % grid[1]).to(wide)
    is_patch = (at >= 0) & (at < n_patches)
    found = torch.empty(len(STATISTICS), B * h, N, dtype=wide, device=q.device)
    for heads, rows, scores in _blocks(_by_head(q), _by_head(k), scale):
        log_p = scores.log_softmax(-1)
        of_patches = scores[..., patches].softmax(-1)
        squared = (y[rows, None] - y[patches]).square() + (x[rows, None] - x[patches]).square()
        distances = ((of_patches * d).sum(-1) for d in (squared.sqrt(), squared))
        numbers = (
            -(log_p * log_p.exp()).sum(-1),
            torch.cat([log_p[..., : patches.start], log_p[..., patches.stop :]], -1).exp().sum(-1),
            of_patches @ y[patches],
            of_patches @ x[patches],
            *(torch.where(is_patch[rows], d, 0.0) for d in distances),
        )
        # in place: small results kept between large blocks would keep the allocator from using those again
        found[:, heads, rows] = torch.stack(numbers)
    return found.unflatten(1, (B, h))
