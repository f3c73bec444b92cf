"""Random cases of what attention is looked at by: see `tests.random_cases`."""

import torch

from segmenter.kernels import attention_rows, attention_statistics, attention_transposed, reference_maps
from tests.support.draws import LENGTHS, Case, Draw


def _q_and_k(draw: Draw, n_keys: int | None = None) -> tuple:
    """(q, k, scale, words)."""
    dtype, B, h, d = draw.dtype(), draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((8, 16, 32, 40, 64, 80))
    N = draw.choice(LENGTHS)
    M = N if n_keys is None else n_keys
    q, k = (draw.tensor(B, n, h, d, dtype=dtype, scale=draw.magnitude()) for n in (N, M))
    scale = draw.choice((d**-0.5, 0.1))
    return q, k, scale, f"B={B} N={N} M={M} h={h} d={d} {dtype} scale={scale}"


def attention_rows_case(draw: Draw) -> Case:
    q, k, scale, what = _q_and_k(draw, draw.choice(LENGTHS))
    return Case(
        (q, k), lambda *t: attention_rows.attention_rows(*t, scale),
        lambda *t: reference_maps.attention_rows(*t, scale),
        what, frobenius=4.0, terms=q.shape[3],
    )  # fmt: skip


def attention_statistics_case(draw: Draw) -> Case:
    """One of the six, since they differ in size."""
    q, k, scale, what = _q_and_k(draw)
    N, rows = q.shape[1], draw.choice((1, 2, 3, 5))
    grid = (rows, draw.choice(range(1, N // rows + 1))) if rows <= N else (1, N)
    first, number = draw.choice(range(N - grid[0] * grid[1] + 1)), draw.choice(range(6))
    args = grid, first, scale
    return Case(
        (q, k), lambda *t: attention_statistics.attention_statistics(*t, *args)[number],
        lambda *t: reference_maps.attention_statistics(*t, *args)[number],
        f"{what} {grid} first={first} {reference_maps.STATISTICS[number]}", frobenius=4.0, terms=q.shape[3] + N,
    )  # fmt: skip


def attention_transposed_case(draw: Draw) -> Case:
    q, k, scale, what = _q_and_k(draw, draw.choice(LENGTHS))
    x = draw.tensor(*q.shape[:3], draw.choice((1, 2, 7, 17, 66)), dtype=torch.float32)
    return Case(
        (q, k, x), lambda *t: attention_transposed.attention_transposed(*t, scale),
        lambda *t: reference_maps.attention_transposed(*t, scale),
        f"{what} R={x.shape[3]}", frobenius=4.0, terms=q.shape[3] + q.shape[1],
    )  # fmt: skip
