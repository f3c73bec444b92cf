"""The attention layers of a model, and what passes through them: queries and keys as they are, hooks and all.

A layer is told by its parts: a fused projection `qkv`, an output projection `proj`, a number of heads. Its queries and
keys are what `qkv` really returns, and what `proj` is really given has to be what they make of the values: a layer that
does more (rotary or relative positions, norms of queries and keys, masks) is refused rather than shown wrongly.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.errors import InputError
from segmenter.ops import AUTO, Operators

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}  # of the norm; TF32 products stay below. Half types: 0.1


class AnalysisError(InputError):
    """Attention cannot be looked at as asked; the message says why and what to do."""


class Seen(NamedTuple):
    """Queries and keys of a layer in one call.

    Attributes:
        q, k: (B, N, h, d) views, in the type that the layer computed in.
        scale: of the scores. ops: the operators for them.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    ops: Operators


def attention_layers(module: nn.Module) -> list[nn.Module]:
    """The attention layers of an encoder or a decoder, from the first on.

    Raises:
        AnalysisError: there are none.
    """
    found = [m for m in module.modules() if {"qkv", "proj"} <= m._modules.keys() and _heads(m)]
    if not found:
        raise AnalysisError(
            f"{type(module).__name__} has no attention layers with qkv and proj; segmenter.load_any(model, n_cls=1, "
            "decoder='linear') makes a model that has of plain ViTs of transformers and others"
        )
    return found


def _heads(attention: nn.Module) -> int:
    return getattr(attention, "heads", None) or getattr(attention, "num_heads", 0)


@contextlib.contextmanager
def watched(layers: dict[int, nn.Module], visit: Callable[[int, Seen], None]) -> Iterator[None]:
    """Within it, `visit(number, seen)` is called as each of these layers is computed.

    What other hooks make of a result of `qkv` is in it. While these hooks are there, blocks run their attention layer
    by layer.

    Raises:
        AnalysisError: a layer computes something else than attention, or was not called once.
    """
    calls = dict.fromkeys(layers, 0)
    passing: dict[int, torch.Tensor] = {}
    handles = []

    def projected(number: int, qkv: Any) -> None:
        passing[number] = qkv

    def attended(number: int, attention: nn.Module, o: Any) -> None:
        calls[number] += 1
        qkv = passing.pop(number, None)
        seen = None if qkv is None else _seen(attention, qkv, o)
        if seen is None:
            raise AnalysisError(
                f"attention layer {number} ({type(attention).__name__}) computes something else than softmax(q k^T) v "
                "of its projections, such as rotary positions or norms of q and k: its maps would not be what it does"
            )
        visit(number, seen)

    try:
        for number, attention in layers.items():
            qkv, proj = attention._modules["qkv"], attention._modules["proj"]
            handles.append(qkv.register_forward_hook(lambda m, args, out, n=number: projected(n, out)))
            before = lambda m, args, n=number, a=attention: attended(n, a, args[0])  # noqa: E731
            handles.append(proj.register_forward_pre_hook(before, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if wrong := [str(number) for number, n in calls.items() if n != 1]:
        raise AnalysisError(
            f"attention layers {', '.join(wrong)} were not called once; compiled models cannot be watched"
        )


@torch.no_grad()
def _seen(attention: nn.Module, qkv: Any, o: Any) -> Seen | None:
    """None unless o (B, N, h*d) is what queries, keys and values in qkv (B, N, 3*h*d) give, in three rows of each."""
    h = _heads(attention)
    if not isinstance(qkv, torch.Tensor) or qkv.ndim != 3 or qkv.shape[2] % (3 * h):
        return None
    q, k, v = qkv.unflatten(2, (3, h, -1)).unbind(2)
    if not isinstance(o, torch.Tensor) or o.shape != (*qkv.shape[:2], qkv.shape[2] // 3):
        return None
    scale = getattr(attention, "scale", None)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    ops = getattr(attention, "ops", AUTO).on(qkv)
    rows = torch.tensor(sorted({0, o.shape[1] // 2, o.shape[1] - 1}), device=o.device)
    p = ops.attention_rows(q[:, rows], k, scale)
    expected = torch.einsum("bhrm,bmhd->brhd", p, v.to(p.dtype)).flatten(2)
    difference = (o[:, rows].to(p.dtype) - expected).norm()
    if not difference <= TOLERANCE.get(qkv.dtype, 0.1) * expected.norm():
        return None
    return Seen(q, k, scale, ops)
