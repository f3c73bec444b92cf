"""Attention maps of chosen queries: of points, of classes, of class tokens; layer by layer, or rolled out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from segmenter.analysis.attention_layers import AnalysisError, Seen
from segmenter.analysis.subject import Point, Subject, pairs, subject
from segmenter.model import Segmenter


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Where chosen queries attend to, in one image. All tensors are float32 on the CPU.

    Attributes:
        maps: (layers, queries, heads, rows, columns), the share of a query's attention on each patch. Of a rollout,
            one head: heads are averaged on the way.
        others: (layers, queries, heads, E), the share on each token that is no patch, in the order of the model's
            tokens. With it all shares of a query sum to 1.
        part: "encoder" or "decoder". layers: their numbers, from 0. queries: their names, such as "point 120 33",
            "class road", "class token", or in models of other kinds "token 0".
        patches: of each query the (row, column) of its patch, None if it is no single patch.
        patch_size: pixels. pixels: (H, W, 3) uint8, the image that the model saw, rows and columns of patches from its
            top left corner on; None for models of other kinds.
    """

    maps: torch.Tensor
    others: torch.Tensor
    part: str
    layers: tuple[int, ...]
    queries: tuple[str, ...]
    patches: tuple[tuple[int, int] | None, ...]
    patch_size: int
    pixels: np.ndarray | None
    rollout: bool = False

    @property
    def mean(self) -> torch.Tensor:
        """The mean over heads, (layers, queries, rows, columns)."""
        return self.maps.mean(2)


@dataclasses.dataclass(frozen=True)
class _Query:
    """The mean of the rows of these tokens. Tokens count from the first patch; those before it are negative."""

    name: str
    tokens: torch.Tensor
    patch: tuple[int, int] | None = None


def attention(
    model: nn.Module,
    image: Any,
    *,
    points: Sequence[Point] | None = None,
    classes: Sequence[int | str] | int | str | None = None,
    layers: Sequence[int] | int | None = None,
    part: str = "encoder",
    rollout: bool = False,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int], Any] | None = None,
) -> AttentionMaps:
    """Attention maps of a whole image, of any size, by the model's operators: memory grows with the number of tokens,
    not with its square.

    Args:
        model: a `Segmenter` in evaluation mode, `accelerate`d or not; or another vision transformer with attention
            layers of `qkv` and `proj` (timm, the published code). Its hooks, and what they change, are honoured.
        image: a path, a PIL image, an array or a tensor, see `segmenter.inference.images.read_image`; it is padded to
            whole patches. For a model that is no `Segmenter` its own input, a float tensor (1, 3, H, W), normalised.
        points: (x, y) in pixels of the image, in a list or an array (n, 2): attention of the patches that hold them.
        classes: ids or names. In the decoder attention of their class tokens; in the encoder the mean over the patches
            that the model gives this class, for which it runs once more. Without points and classes: the tokens before
            the patches (class token, registers) in the encoder, all classes in the decoder.
        layers: their numbers from 0, negative ones from the end, each looked at once; all if None, of a rollout the
            last.
        part: "encoder" or "decoder" (of a mask transformer).
        rollout: attention rollout from each of the layers down to the first (Abnar and Zuidema, "Quantifying Attention
            Flow in Transformers", 2020): products of (A + I) / 2, A the mean over heads. Keeps queries and keys of all
            layers.
        size: pixels that the short side of the image is brought to first; None: as it is.
        dtype: compute type, as of `segment_image`.
        progress: called with the number of each layer that has been looked at.
    Returns:
        `AttentionMaps`.
    Raises:
        AnalysisError: points, classes or layers that do not exist, or a model whose attention is not softmax(q k^T) v.
        ImageError: the image cannot be read.
    """
    seen_by = subject(model, image, part, size, dtype)
    numbers = seen_by.chosen(layers if layers is not None or not rollout else -1)
    queries = [*_points(seen_by, points), *_classes(seen_by, classes)]
    asked = points is not None or classes is not None
    if asked and not queries:
        raise AnalysisError("there are no points and no classes to look from")
    found: dict[int, torch.Tensor] = {}
    kept: dict[int, Seen] = {}
    first = 0

    def visit(layer: int, seen: Seen, first_patch: int) -> None:
        nonlocal first, queries
        first = first_patch
        queries = queries or _others(seen_by, seen.q.shape[1], first)
        if rollout:
            kept[layer] = seen
        else:
            found[layer] = _rows(seen, queries, first).cpu()
        if progress is not None:
            progress(layer)

    with torch.inference_mode():
        seen_by.watch(range(max(numbers) + 1) if rollout else numbers, visit)
        if rollout:
            found = {layer: _rolled_out(kept, layer, queries, first).cpu() for layer in numbers}
    rows = torch.stack([found[layer] for layer in numbers]).float()  # (layers, queries, heads, N)
    end = first + seen_by.n_patches
    return AttentionMaps(
        maps=rows[..., first:end].unflatten(-1, seen_by.grid).clone(),
        others=torch.cat([rows[..., :first], rows[..., end:]], -1),
        part=part,
        layers=numbers,
        queries=tuple(query.name for query in queries),
        patches=tuple(query.patch for query in queries),
        patch_size=seen_by.patch_size,
        pixels=seen_by.pixels,
        rollout=rollout,
    )


def point_name(x: float, y: float) -> str:
    """How a point is called in `AttentionMaps.queries`."""
    return f"point {x:g} {y:g}"


def _points(of: Subject, points: Sequence[Point] | None) -> list[_Query]:
    found = []
    for point in pairs(points):
        row, column = of.patch_at(point)
        found.append(_Query(point_name(*point), torch.tensor([row * of.grid[1] + column]), (row, column)))
    return found


def _classes(of: Subject, classes: Sequence[int | str] | int | str | None) -> list[_Query]:
    ids = of.class_ids(classes)
    if of.part == "decoder":
        return [_Query(f"class {of.class_name(i)}", torch.tensor([of.n_patches + i])) for i in ids]
    labels = of.labels().flatten() if ids else torch.empty(0)
    found = []
    for i in ids:
        tokens = (labels == i).nonzero()[:, 0]
        if not len(tokens):
            present = ", ".join(of.class_name(int(c)) for c in labels.unique())
            raise AnalysisError(f"no patch of this image is {of.class_name(i)!r} to the model; it sees {present}")
        found.append(_Query(f"class {of.class_name(i)}", tokens))
    return found


def _others(of: Subject, n_tokens: int, first: int) -> list[_Query]:
    """All tokens that are no patches."""
    tokens = [*range(-first, 0), *range(of.n_patches, n_tokens - first)]
    if not tokens:
        raise AnalysisError("this model has no class token: give points or classes to look from")
    if of.part == "decoder":
        return [_Query(f"class {of.class_name(t - of.n_patches)}", torch.tensor([t])) for t in tokens]
    names = ("class token", "distillation token") if isinstance(of.model, Segmenter) else ()
    numbered = [*names, *(f"token {i}" for i in range(len(names), len(tokens)))]
    return [_Query(name, torch.tensor([t])) for name, t in zip(numbered, tokens, strict=False)]


def _weights(queries: list[_Query], n_tokens: int, first: int, like: torch.Tensor) -> torch.Tensor:
    """(1, N, 1, queries): what each token counts in each query; columns sum to 1."""
    wide = torch.promote_types(like.dtype, torch.float32)
    weights = torch.zeros(n_tokens, len(queries), dtype=wide)
    for i, query in enumerate(queries):
        weights[query.tokens + first, i] = 1 / len(query.tokens)
    return weights[None, :, None].to(like.device)


def _rows(seen: Seen, queries: list[_Query], first: int) -> torch.Tensor:
    """(queries, heads, N)."""
    if all(len(query.tokens) == 1 for query in queries):
        tokens = torch.cat([query.tokens for query in queries]).to(seen.q.device) + first
        return seen.ops.attention_rows(seen.q[:, tokens], seen.k, seen.scale)[0].transpose(0, 1)
    x = _weights(queries, seen.q.shape[1], first, seen.q).expand(-1, -1, seen.q.shape[2], -1)
    return seen.ops.attention_transposed(seen.q, seen.k, x, seen.scale)[0].permute(2, 1, 0)


def _rolled_out(kept: dict[int, Seen], top: int, queries: list[_Query], first: int) -> torch.Tensor:
    """(queries, 1, N): rows of the product of all (A + I) / 2 from layer `top` down, from the left."""
    r = _weights(queries, kept[top].q.shape[1], first, kept[top].q)  # (1, N, 1, queries)
    for layer in range(top, -1, -1):
        seen = kept[layer]
        attended = seen.ops.attention_transposed(seen.q, seen.k, r.expand(-1, -1, seen.q.shape[2], -1), seen.scale)
        r = (attended.mean(2, keepdim=True) + r) / 2
    return r[0].permute(2, 1, 0)
