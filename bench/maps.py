"""What attention is looked at by: rows of chosen queries, statistics, sums over queries (docs/attention.md).

Eager writes the whole matrix out where its definition asks for one, in float32 as an analysis would. Results are
checked by the definitions of `reference_maps`, which hold a block of it at a time.
"""

from collections.abc import Callable

import torch

from bench import gate, operations, shapes
from bench.operations import Operation, Tensors, compiled, random_tensor
from bench.shapes import Shape
from segmenter.kernels import reference_maps
from segmenter.kernels.reference_maps import STATISTICS
from segmenter.ops import load_kernels

PROVIDERS = ("eager", "compile", "triton")
FIRST = 1  # the token that is the first patch: CLS comes before it


def _q_and_k(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """(B, N, h, 64) each, parts of packed qkv as in a model."""
    (qkv,) = operations.ATTENTION.inputs(shape, dtype, device)
    q, k, _ = qkv.unflatten(2, (3, shape.n_heads, shapes.HEAD_DIM)).unbind(2)
    return q, k


def _chosen_q_and_k(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    q, k = _q_and_k(shape, dtype, device)
    return q[:, -shapes.MAP_ROWS :], k


def _q_k_and_columns(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    q, k = _q_and_k(shape, dtype, device)
    columns = (*q.shape[:3], shapes.MAP_ROWS)
    return q, k, random_tensor(columns, torch.promote_types(dtype, torch.float32), device)


def _matrix(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / 8), (B, h, N, M), float32 or wider."""
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT * shapes.HEAD_DIM**-0.5
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def explicit_statistics(q: torch.Tensor, k: torch.Tensor, side: int) -> torch.Tensor:
    """`reference_maps.attention_statistics` of CLS and side * side patches, of the whole matrix: (6, B, h, N)."""
    p = _matrix(q, k)
    of_patches = p[..., FIRST:] / p[..., FIRST:].sum(-1, keepdim=True)
    axis = torch.arange(side, dtype=p.dtype, device=p.device)
    places = torch.cartesian_prod(axis, axis)
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    distance = torch.cat([distance.new_zeros(FIRST, side * side), distance])
    y, x = (of_patches @ places).unbind(-1)
    means = ((of_patches * d).sum(-1) for d in (distance, distance.square()))
    return torch.stack([torch.special.entr(p).sum(-1), p[..., :FIRST].sum(-1), y, x, *means])


def explicit_sums(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`reference_maps.attention_transposed` of the whole matrix: (B, M, h, R)."""
    return (_matrix(q, k).mT @ x.transpose(1, 2)).transpose(1, 2)


def _operation(
    kind: str,
    inputs: Callable[[Shape, torch.dtype, torch.device], Tensors],
    explicit: Callable[[Shape], Callable],  # -> what eager and torch.compile compute
    definition: Callable[[Shape], Callable],  # -> what results are checked by
    kernel: Callable[[Shape], Callable],
    work: Callable[[Shape, int], shapes.Work],
    parts: tuple[str, ...] = (),  # names of what the result's first dimension holds, if that is not the image
) -> Operation:
    def call(provider: str, shape: Shape) -> Callable:
        return kernel(shape) if provider == "triton" else compiled(provider, explicit(shape))

    def check(provider: str, shape: Shape, out: torch.Tensor, tensors: Tensors) -> str:
        ends = [operations._ends(t) for t in tensors]
        exact, eager = definition(shape)(*(t.double() for t in ends)), definition(shape)(*ends)
        # float32 adds the rounding of the log-sum-exp, which eager does not need
        limits = {"max_ratio": 4.0, "frobenius": 4.0} if tensors[0].dtype == torch.float32 else {}
        if not parts:
            return gate.check(provider, operations._ends(out), exact, eager, **limits)
        out = operations._ends(out.transpose(0, 1)).transpose(0, 1)
        several = zip(parts, out, exact, eager, strict=True)
        return "; ".join(f"{name}: {gate.check(provider, *one, **limits)}" for name, *one in several)

    return Operation(kind, PROVIDERS, inputs, call, check, work)


def _statistics(function: Callable) -> Callable[[Shape], Callable]:
    """(shape) -> the function of q and k, which is told the grid."""

    def of(shape: Shape) -> Callable:
        grid = (shape.size // shape.patch,) * 2
        return lambda q, k: function(q, k, grid, FIRST)

    return of


ROWS = _operation(
    "attention-rows",
    _chosen_q_and_k,
    lambda shape: _matrix,  # of the chosen queries alone
    lambda shape: reference_maps.attention_rows,
    lambda shape: load_kernels().attention_rows,
    shapes.attention_rows,
)
STATISTICS_OF_ROWS = _operation(
    "attention-statistics",
    _q_and_k,
    lambda shape: lambda q, k: explicit_statistics(q, k, shape.size // shape.patch),
    _statistics(reference_maps.attention_statistics),
    lambda shape: _statistics(load_kernels().attention_statistics)(shape),
    shapes.attention_statistics,
    STATISTICS,
)
TRANSPOSED = _operation(
    "attention-transposed",
    _q_k_and_columns,
    lambda shape: explicit_sums,
    lambda shape: reference_maps.attention_transposed,
    lambda shape: load_kernels().attention_transposed,
    shapes.attention_transposed,
)
