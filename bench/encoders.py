"""What today's models have beside a plain ViT: rotary positions (DINOv3), labels from queries (EoMT)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench import gate, operations, shapes
from bench.operations import Operation, Tensors, compiled, random_tensor
from bench.shapes import Shape
from segmenter.kernels import reference_queries, reference_rotary
from segmenter.ops import load_kernels

_PROVIDERS = ("eager", "compile", "triton")


def _queries_and_keys(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """(B, N, 2 h, 64), a part of packed qkv as in a model, and the tables of its patches (n, 64)."""
    (qkv,) = operations.ATTENTION.inputs(shape, dtype, device)
    angles = random_tensor((shape.patches, shapes.HEAD_DIM // 2), torch.float32, device).repeat(1, 2)
    heads = qkv.unflatten(2, (3 * shape.n_heads, shapes.HEAD_DIM))
    return heads[:, :, : 2 * shape.n_heads], angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`reference_rotary.rotate` as models write it out, in the type of x: halves negated, joined, multiplied, added."""
    extra, x = x.tensor_split([x.shape[1] - len(cos)], 1)
    a, b = x.chunk(2, -1)
    return torch.cat([extra, x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]], 1)


def _rotate_call(provider: str, shape: Shape) -> Callable:
    return load_kernels().rotate if provider == "triton" else compiled(provider, rotated)


def _check_rotate(provider: str, shape: Shape, out: torch.Tensor, inputs: Tensors) -> str:
    x, *tables = inputs
    ends = operations._ends(x), *tables
    exact = reference_rotary.rotate(*(t.double() for t in ends))
    return gate.check(provider, operations._ends(out), exact, rotated(*ends))


ROTATE = Operation("rotate", _PROVIDERS, _queries_and_keys, _rotate_call, _check_rotate, shapes.rotate)


def _queries(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Masks (B, 1, Q, g, g) of four cells a patch side, one window an image, and classes (B, 1, Q, K + 1)."""
    grid = shapes.CELLS * (shape.size // shape.patch)
    masks = random_tensor((shape.batch, 1, shapes.QUERIES, grid, grid), dtype, device, 3.0)
    return masks, random_tensor((shape.batch, 1, shapes.QUERIES, shape.n_cls + 1), dtype, device, 2.0)


def _geometry(shape: Shape) -> tuple:
    """One window, which is the image."""
    return (0,), (0,), *[(shape.size, shape.size)] * 3


def query_scores(masks: torch.Tensor, classes: torch.Tensor, size: int) -> torch.Tensor:
    """Scores (B, K, size, size) of all classes at all pixels, as transformers computes them."""
    upsampled = F.interpolate(masks[:, 0], size=(size, size), mode="bilinear", align_corners=False)
    return torch.einsum("bqc,bqhw->bchw", classes[:, 0].softmax(-1)[..., :-1], upsampled.sigmoid())


def _labels_call(provider: str, shape: Shape) -> Callable:
    if provider in ("bands", "triton"):
        kernel = provider == "triton"
        operator = load_kernels().queries_argmax if kernel else reference_queries.queries_argmax
        return lambda masks, classes: operator(masks, classes, *_geometry(shape))
    return compiled(provider, lambda *tensors: query_scores(*tensors, shape.size).argmax(1).to(torch.uint8))


def _check_labels(provider: str, shape: Shape, labels: torch.Tensor, inputs: Tensors) -> str:
    masks, classes = map(operations._ends, inputs)
    scores = query_scores(masks.float(), classes.float(), shape.size)
    eager = _labels_call("eager", shape)(masks, classes)
    floor = 2**-9 if masks.dtype != torch.float32 else 8 * torch.finfo(torch.float32).eps  # of TF32 products
    return gate.check_labels(provider, operations._ends(labels), scores, eager, floor)


_LABELS = ("eager", "compile", "bands", "triton")
QUERIES_TO_LABELS = Operation(
    "queries-to-labels", _LABELS, _queries, _labels_call, _check_labels, shapes.queries_to_labels
)
