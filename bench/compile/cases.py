"""What `bench.compile_report` compiles: calls of the public operators that between them reach every kernel we ship.

Most are the examples of the rows of `segmenter.kernels.configs`, so no row is left out; the rest are what a row leaves
open: other types, numbers of keys, widths, epilogues. Launches that compile to the same binary are compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench import providers
from bench.compile import aot
from bench.machine import DTYPES
from segmenter.kernels import configs
from segmenter.kernels.attention import attention, cross_attention
from segmenter.kernels.attention_backward import attention_backward, cross_attention_backward
from segmenter.kernels.attention_rows import attention_rows
from segmenter.kernels.attention_statistics import attention_statistics
from segmenter.kernels.attention_transposed import attention_transposed
from segmenter.kernels.configs import ARCHITECTURES, SHARED_MEMORY, Row
from segmenter.kernels.configs_backward import TABLES
from segmenter.kernels.heads import lse_rows
from segmenter.kernels.launch import Launch
from segmenter.kernels.layernorm import layernorm
from segmenter.kernels.layernorm_backward import layernorm_backward
from segmenter.kernels.layernorm_mlp import layernorm_mlp
from segmenter.kernels.layernorm_mlp_backward import layernorm_mlp_backward
from segmenter.kernels.linear import layernorm_linear, linear
from segmenter.kernels.mask_head import mask_head
from segmenter.kernels.mask_head_backward import mask_head_backward
from segmenter.kernels.pixels_to_tokens import pixels_to_tokens
from segmenter.kernels.pixels_to_tokens_backward import pixels_to_tokens_backward
from segmenter.kernels.queries_argmax import queries_argmax
from segmenter.kernels.rotate import rotate
from segmenter.kernels.upsample_argmax import upsample_argmax, windows_argmax
from segmenter.kernels.upsample_cross_entropy import upsample_cross_entropy

WIDTHS = (192, 384, 768, 1024)  # of the model
CLASSES = (19, 150, 256, 300)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `architectures`: for which it is compiled by default; `precision`: of float32 products."""

    op: str
    dtype: str
    sizes: tuple[tuple[str, Any], ...]
    architectures: tuple[str, ...]
    precision: str = "highest"

    @property
    def what(self) -> str:
        """The sizes for people: "n=1025 d=64 lse"."""
        return " ".join(name if value is True else f"{name}={value}" for name, value in self.sizes if value)

    def call(self) -> partial:
        """The call of a public function, ready to be made, with uninitialised CPU tensors."""
        return CALLS[self.op](DTYPES[self.dtype], **dict(self.sizes))

    def launches(self, architecture: str) -> list[Launch]:
        """What the call launches on an architecture."""
        with providers.float32_products(self.precision), aot.recording(architecture) as launches:
            self.call()()
        return launches


def _case(op: str, kind: str, sizes: dict[str, Any], architectures: tuple[str, ...] = ()) -> Case:
    """A call. `kind`: a type, or "tf32" for float32 that is multiplied so."""
    dtype, precision = ("fp32", "high") if kind == "tf32" else (kind, "highest")
    return Case(op, dtype, tuple(sizes.items()), architectures, precision)


def case_of_row(table: str, row: Row) -> Case:
    """The row's example, on the architectures that every kernel is for or the row names, where it takes this row."""
    case = _case(table, row.kind if row.kind in ("fp32", "tf32") else "bf16", row.example)
    candidates = [a for a in SHARED_MEMORY if a in ARCHITECTURES or a in row.architectures]
    return dataclasses.replace(case, architectures=tuple(a for a in candidates if row in rows_of(case, a)))


def rows_of(case: Case, architecture: str) -> list[Row]:
    """The rows that the kernels of a call choose on an architecture."""
    found, look_up = [], configs.look_up

    def noting(*args: Any, **sizes: int) -> Row:
        found.append(look_up(*args, **sizes))
        return found[-1]

    configs.mlp.cache_clear()
    with mock.patch.object(configs, "look_up", noting):
        case.launches(architecture)
    return found


@functools.cache
def row_cases() -> tuple[Case, ...]:
    """The example of each row."""
    return tuple(case_of_row(table, row) for table, rows in TABLES.items() for row in rows)


@functools.cache
def cases() -> tuple[Case, ...]:
    """All of them, those of the rows first."""
    found = [*row_cases()]

    def add(default: bool | tuple[str, ...], op: str, kinds: str, **sizes: Any) -> None:
        """A call; compiled in these types on sm_90 or on the architectures named, with --full in all types on all."""
        here = default if isinstance(default, tuple) else ("sm_90",) if default else ()
        found.extend(_case(op, kind, sizes, here if kind in kinds.split() else ()) for kind in (*DTYPES, "tf32"))

    of_models = _attention_cases, _product_cases, _mask_cases, _pixel_cases, _map_cases
    for more in (*of_models, _backward_cases, _layer_backward_cases):
        more(add)
    return tuple(found)


def _attention_cases(add: Callable[..., None]) -> None:
    # Keys left over by blocks of any power of two from 32 to 128: none, one and two (which start the softmax), many.
    add(ARCHITECTURES, "attention", "bf16", n=1100)
    for n in (1024, 1025, 1026, 1100, 256, 257, 258, 300):
        many = n in (1025, 1100)
        add(n != 256, "attention", "bf16", n=n)
        add(many or n == 257, "attention", "fp16", n=n)
        add(many, "attention", "bf16", n=n, lse=True)
        add(n == 1100, "attention", "fp32 tf32", n=n)
        for d in (32, 80, 128):
            add(many, "attention", "bf16", n=n, d=d)
            add(n == 1100 and d == 128, "attention", "fp32 tf32", n=n, d=d)
        add(False, "attention", "", n=n, heads=16)  # specialised on being divisible by 16: nearly the same
    add(ARCHITECTURES, "attention", "bf16", n=1100, d=128)
    for n, m in ((1024, 150), (150, 1174)):
        add(True, "cross_attention", "bf16", n=n, m=m)
    # Both conventions, packed queries and keys and separate ones, heads that fill tiles and not, tables by head.
    for interleaved in (False, True):
        add(ARCHITECTURES, "rotate", "bf16", n=1029, interleaved=interleaved)
        add(True, "rotate", "bf16 fp32", n=1029, interleaved=interleaved, transposed=True)
        add(True, "rotate", "bf16", n=1029, d=80, interleaved=interleaved)
        add(True, "rotate", "fp16", n=1025, interleaved=interleaved, separate=True, by_head=True)


def _map_cases(add: Callable[..., None]) -> None:
    # Patches that fill tiles and that do not, tokens beside them or none, every head_dim, few columns and many.
    for n in (1025, 1024, 1029):
        add(ARCHITECTURES if n == 1025 else True, "attention_statistics", "bf16", n=n)
        add(True, "attention_statistics", "bf16", n=n, side=30)
    add(True, "attention_statistics", "fp16", n=1025)
    for d in (32, 80, 128):
        add(True, "attention_statistics", "bf16 fp32 tf32", n=1025, d=d)
    for op in ("attention_rows", "attention_transposed"):
        add(ARCHITECTURES, op, "bf16", n=1025)
        add(True, op, "fp16", n=1025)
        for d in (32, 80, 128):
            add(True, op, "bf16 fp32 tf32", n=1025, d=d)
    for r in (1, 100):
        add(True, "attention_rows", "bf16", n=1024, r=r)
        add(True, "attention_transposed", "bf16 fp32 tf32", n=1024, r=r)


def _backward_cases(add: Callable[..., None]) -> None:
    # Queries and keys that fill tiles and that do not, every head_dim, the gradient of the log-sum-exp.
    add(ARCHITECTURES, "attention_backward", "bf16", n=1100)
    for n in (1024, 1025, 4097):
        add(n == 1024, "attention_backward", "bf16 fp16", n=n)
        add(n == 1025, "attention_backward", "fp16", n=n, lse=True)
        for d in (32, 80, 128):
            add(n == 1025, "attention_backward", "bf16", n=n, d=d)
            add(n == 1025 and d == 128, "attention_backward", "fp16 fp32 tf32", n=n, d=d)
    for n, m in ((1024, 150), (150, 1174)):
        add(True, "cross_attention_backward", "bf16", n=n, m=m)
    for d in WIDTHS:
        for n_cls in CLASSES:
            small = d == 384 or n_cls == 150
            add(small, "mask_head_backward", "bf16", n_cls=n_cls, d=d)
            add(small and d == 384, "mask_head_backward", "fp16", n_cls=n_cls, d=d)
    add(ARCHITECTURES, "mask_head_backward", "bf16", n_cls=300)
    add(True, "mask_head_backward", "bf16", n_cls=150, stream="fp32")


def _layer_backward_cases(add: Callable[..., None]) -> None:
    for n in (*WIDTHS, 300, 10_000):
        add(n in (300, 384), "layernorm_backward", "bf16 fp32", n=n)
    add(ARCHITECTURES, "layernorm_mlp_backward", "bf16", m=8200, d=768, tanh=True)
    add(True, "layernorm_mlp_backward", "fp16 fp32", m=8200, d=768, tanh=True)
    for d in WIDTHS:
        for m in (257, 8200):
            add(m == 8200, "layernorm_mlp_backward", "bf16", m=m, d=d)
        add(d == 384, "layernorm_mlp_backward", "bf16", m=8200, d=d, stream="fp32")
        add(d == 768, "layernorm_mlp_backward", "fp16", m=8200, d=d)


def _product_cases(add: Callable[..., None]) -> None:
    # An epilogue each, and every width of the model; `stream`: float32 as under autocast.
    add(ARCHITECTURES, "linear", "bf16", m=8200, gelu=True)
    add(ARCHITECTURES, "linear", "bf16", m=8200, k=3072, residual=True)
    for op, sizes in (("linear", {"k": 1536, "n": 384, "residual": True}), ("layernorm_mlp", {"d": 192})):
        for m in (257, 8200, 65_600):
            add(ARCHITECTURES, op, "bf16", m=m, **sizes, scale=True)
    for d in (192, 768):  # in one kernel and in two
        add(ARCHITECTURES, "layernorm_mlp", "bf16", m=8200, d=d, tanh=True)
        add(True, "layernorm_mlp", "fp16 fp32", m=8200, d=d, tanh=True)
    for kinds, stream in (("fp16 fp32 tf32", ""), ("bf16", "fp32")):
        add(True, "linear", kinds, m=8200, k=768, n=768, residual=True, stream=stream, scale=True)
        add(True, "layernorm_mlp", kinds, m=8200, d=192, stream=stream, scale=True)
    for d in WIDTHS:
        for m in (257, 8200):
            for sizes in ({"k": d, "n": d, "residual": True}, {"k": 4 * d, "n": d, "residual": True},
                          {"k": d, "n": 4 * d, "gelu": True}, {"k": d, "n": 3 * d}):  # fmt: skip
                add(d == 384 or (m == 8200 and d < 1024), "linear", "bf16", m=m, **sizes)
                add((d, m) == (768, 8200), "linear", "fp16", m=m, **sizes)
        add(d == 384, "linear", "bf16", m=8200, k=d, n=d, residual=True, stream="fp32")
        add(d == 384, "linear", "bf16", m=8200, k=d, n=150)
        for op in ("layernorm_linear", "layernorm_mlp"):
            for stream in ("", "fp32"):
                add(d in (192, 384), op, "bf16", m=8200, d=d, stream=stream)
            add(d in (192, 768), op, "fp16", m=8200, d=d)
            add(False, op, "", m=257, d=d)
    for n in (*WIDTHS, 300, 10_000):
        add(n in (300, 384), "layernorm", "bf16", n=n)
    add(True, "layernorm", "bf16", n=384, weights="fp32")


def _mask_cases(add: Callable[..., None]) -> None:
    for d in WIDTHS:
        for n_cls in CLASSES:
            for batch in (2, 16):
                small = batch == 2 and d == 384
                add(small or (n_cls == 150 and d < 1024), "mask_head", "bf16", batch=batch, n_cls=n_cls, d=d)
                add(small and n_cls == 150, "mask_head", "fp16", batch=batch, n_cls=n_cls, d=d)
    for patch in (8, 16, 32, 14):
        for n_cls in CLASSES:
            add(patch == 16 or (n_cls == 150 and patch != 14), "upsample_argmax", "bf16", patch=patch, n_cls=n_cls)
    add(ARCHITECTURES, "windows_argmax", "bf16", n_cls=150)
    add(ARCHITECTURES, "queries_argmax", "bf16", n_cls=150)
    for n_cls in (*CLASSES, 133):
        add(n_cls in (19, 133), "queries_argmax", "bf16", n_cls=n_cls)
        add(n_cls == 300, "queries_argmax", "fp16", n_cls=n_cls)
    add(True, "queries_argmax", "bf16 fp32 tf32", n_cls=150, resized=False)
    add(ARCHITECTURES, "upsample_cross_entropy", "bf16", n_cls=150)
    for patch in (8, 16, 32, 14):
        for n_cls in CLASSES:
            add(True, "upsample_cross_entropy", "bf16", patch=patch, n_cls=n_cls)
    add(True, "upsample_cross_entropy", "fp32", n_cls=150, weighted=True)


def _pixel_cases(add: Callable[..., None]) -> None:
    # Sides that are and are no multiples of the patch, few rows and many.
    add(ARCHITECTURES, "pixels_to_tokens", "bf16", side=500)
    add(ARCHITECTURES, "pixels_to_tokens", "bf16", side=500, patch=14)
    for patch, sides in ((16, (512, 500)), (8, (512, 300)), (32, (512, 500)), (14, (518, 500))):
        for side in sides:
            for batch in (1, 32):
                sizes = {"batch": batch, "side": side, "patch": patch}
                add(patch != 32 or batch == 32, "pixels_to_tokens", "bf16", **sizes)
                add((patch, batch) == (16, 32), "pixels_to_tokens", "fp16 fp32 tf32", **sizes)
                for d in (192, 384, 1024):
                    add(False, "pixels_to_tokens", "", **sizes, d=d)
            add(patch == 16, "pixels_to_tokens", "bf16", side=side, stream="fp32")
        add(True, "pixels_to_tokens_backward", "bf16", batch=8, side=sides[1], patch=patch)
        add(patch == 16, "pixels_to_tokens_backward", "bf16 fp16 fp32 tf32", batch=8, side=sides[0], patch=patch)
    add(ARCHITECTURES, "pixels_to_tokens_backward", "bf16", batch=8, side=500, patch=14)
    for d in (192, 384, 1024):
        add(True, "pixels_to_tokens_backward", "bf16", batch=8, d=d)


# ---------------------------------------------------------------------------------------------------------------------
# The calls


def _empty(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.empty(*shape, dtype=dtype) for shape in shapes]


def _linear(
    dtype: torch.dtype, m: int, k: int = 768, n: int = 0, gelu=False, residual=False, stream="", scale=False
) -> partial:
    n, wide = n or (4 * k if gelu else 768), DTYPES.get(stream, dtype)
    added, factors = (
        torch.empty(*shape, dtype=wide) if used else None for shape, used in (((m, n), residual), ((n,), scale))
    )
    return partial(linear, *_empty(dtype, (m, k), (n, k), (n,)), residual=added, gelu=gelu, layer_scale=factors)


def _layernorm(dtype: torch.dtype, n: int, m: int = 8200, weights: str = "") -> partial:
    return partial(layernorm, *_empty(dtype, (m, n)), *_empty(DTYPES.get(weights, dtype), (n,), (n,)))


def _layernorm_backward(
    dtype: torch.dtype, n: int, m: int = 8200, stream: str = "", bias_only: bool = False
) -> partial:
    wide = DTYPES.get(stream, dtype)
    args = *_empty(wide, (m, n), (m, n)), *_empty(wide, (n,)), wide
    return partial(layernorm_backward, *args, needed=(not bias_only, not bias_only, True))


def _layernorm_linear(dtype: torch.dtype, m: int, d: int, gelu: bool = False, stream: str = "") -> partial:
    n = 4 * d if gelu else 3 * d
    normed = _empty(DTYPES.get(stream, dtype), (m, d), (d,), (d,))
    return partial(layernorm_linear, *normed, *_empty(dtype, (n, d), (n,)), gelu=gelu)


def _layernorm_mlp(dtype: torch.dtype, m: int, d: int, stream="", scale=False, tanh=False) -> partial:
    *normed, factors = _empty(DTYPES.get(stream, dtype), (m, d), (d,), (d,), (d,))
    weights = _empty(dtype, (4 * d, d), (4 * d,), (d, 4 * d), (d,))
    return partial(layernorm_mlp, *normed, *weights, layer_scale=factors if scale else None, tanh=tanh)


def _layernorm_mlp_backward(dtype: torch.dtype, m: int, d: int, stream: str = "", tanh: bool = False) -> partial:
    wide = DTYPES.get(stream, dtype)
    normed = _empty(wide, (m, d), (m, d), (d,), (d,))
    weights = _empty(dtype, (4 * d, d), (4 * d,), (d, 4 * d))
    return partial(layernorm_mlp_backward, *normed, *weights, tanh=tanh)


def _mask_head(dtype: torch.dtype, n_cls: int, d: int = 768, batch: int = 2, patches: int = 1024) -> partial:
    tokens, proj, norm = _empty(dtype, (batch, patches + n_cls, d), (d, d), (n_cls,))
    return partial(mask_head, tokens[:, :patches], tokens[:, patches:], proj, proj, norm, norm)


def _mask_head_backward(
    dtype: torch.dtype, n_cls: int, d: int = 768, batch: int = 2, patches: int = 1024, stream: str = ""
) -> partial:
    dy, tokens, proj = _empty(dtype, (batch, patches, n_cls), (batch, patches + n_cls, d), (d, d))
    norm = torch.empty(n_cls, dtype=DTYPES.get(stream, dtype))
    return partial(mask_head_backward, dy, tokens[:, :patches], tokens[:, patches:], proj, proj, norm)


def _labels(dtype: torch.dtype, n_cls: int, patch: int = 16, side: int = 640) -> partial:
    masks = torch.empty(2, -(-side // patch), -(-side // patch), n_cls, dtype=dtype)
    return partial(upsample_argmax, masks, (side, side))


def _loss(dtype: torch.dtype, n_cls: int, patch: int = 16, side: int = 512, weighted: bool = False) -> partial:
    masks = torch.empty(2, -(-side // patch), -(-side // patch), n_cls, dtype=dtype)
    weight = torch.empty(n_cls) if weighted else None
    smoothing = 0.1 if weighted else 0.0
    labels = torch.empty(2, side, side, dtype=torch.int64)
    return partial(upsample_cross_entropy, masks, labels, weight, patch, label_smoothing=smoothing)


def _queries(dtype: torch.dtype, n_cls: int, resized: bool = True, queries: int = 100, side: int = 512) -> partial:
    """Of EoMT for ADE20K: an image of 384 x 683 pixels, resized to 512 x 910, in two windows."""
    masks, classes = _empty(dtype, (2, 2, queries, side // 4, side // 4), (2, 2, queries, n_cls + 1))
    canvas, image = (side, side * 910 // 512), (side * 3 // 4, side * 683 // 512)
    lefts = (0, canvas[1] - side)
    return partial(queries_argmax, masks, classes, (0,), lefts, (side, side), canvas, image if resized else canvas)


def _pixels(dtype: torch.dtype, batch: int = 32, side: int = 512, patch: int = 16, d: int = 768, stream="") -> partial:
    tokens = _empty(DTYPES.get(stream, dtype), (2, d), (2 + (-(-side // patch)) ** 2, d))
    pixels, weight = torch.empty(batch, side, side, 3, dtype=torch.uint8), torch.empty(d, 3 * patch**2, dtype=dtype)
    return partial(pixels_to_tokens, pixels, weight, torch.empty(4, d), *tokens, patch)


def _pixels_backward(dtype: torch.dtype, batch: int, side: int = 512, patch: int = 16, d: int = 768) -> partial:
    tokens = torch.empty(batch, 1 + (-(-side // patch)) ** 2, d, dtype=dtype)
    return partial(
        pixels_to_tokens_backward, tokens[:, 1:], torch.empty(batch, side, side, 3, dtype=torch.uint8), patch
    )


def _attention_backward(dtype: torch.dtype, n: int, heads: int = 12, d: int = 64, lse: bool = False) -> partial:
    width, rows = heads * d, (2, heads, lse_rows(n))
    grad, qkv, o = _empty(dtype, (2, n, width), (2, n, 3 * width), (2, n, width))
    return partial(attention_backward, grad, qkv, o, torch.empty(rows), torch.empty(rows) if lse else None, heads)


def _cross_attention_backward(dtype: torch.dtype, n: int, m: int) -> partial:
    tensors = _empty(dtype, (2, n, 384), (2, n, 6, 64), (2, m, 6, 64), (2, m, 6, 64), (2, n, 384))
    return partial(cross_attention_backward, *tensors, torch.empty(2, 6, lse_rows(n)), None, 64**-0.5)


def _rotate(
    dtype: torch.dtype, n: int, d: int = 64, side: int = 32, interleaved=False, transposed=False, separate=False,
    by_head=False,
) -> partial:  # fmt: skip
    """Of twelve heads, with tables in float32."""
    x = torch.empty(2, n, 12, d, dtype=dtype) if separate else torch.empty(2, n, 36, d, dtype=dtype)[:, :, :24]
    table = torch.empty(1, 12, side * side, d) if by_head else torch.empty(side * side, d)
    return partial(rotate, x, table, table.clone(), interleaved, transposed)


def _q_and_k(dtype: torch.dtype, n: int, d: int, r: int = 0) -> list[torch.Tensor]:
    """Of six heads, packed as in a model; `r`: of so many queries."""
    q, k, _ = torch.empty(2, n, 3, 6, d, dtype=dtype).unbind(2)
    return [torch.empty(2, r, 6, d, dtype=dtype) if r else q, k]


def _attention_statistics(dtype: torch.dtype, n: int, d: int = 64, side: int = 32) -> partial:
    return partial(attention_statistics, *_q_and_k(dtype, n, d), (side, side), min(1, n - side * side))


def _attention_transposed(dtype: torch.dtype, n: int, d: int = 64, r: int = 16) -> partial:
    return partial(attention_transposed, *_q_and_k(dtype, n, d), torch.empty(2, n, 6, r))


CALLS: dict[str, Callable[..., partial]] = {
    "attention": lambda dtype, n, heads=12, d=64, lse=False: partial(
        attention, *_empty(dtype, (2, n, 3 * heads * d)), heads, lse
    ),
    "cross_attention": lambda dtype, n, m: partial(
        cross_attention, *_empty(dtype, (2, n, 6, 64), (2, m, 6, 64), (2, m, 6, 64))
    ),
    "rotate": _rotate,
    "attention_rows": lambda dtype, n, d=64, r=16: partial(attention_rows, *_q_and_k(dtype, n, d, r)),
    "attention_statistics": _attention_statistics,
    "attention_transposed": _attention_transposed,
    "attention_backward": _attention_backward,
    **dict.fromkeys(("attention_delta", "attention_dkdv", "attention_dq"), _attention_backward),
    "cross_attention_backward": _cross_attention_backward,
    "linear": _linear,
    "layernorm_linear": _layernorm_linear,
    "layernorm_mlp": _layernorm_mlp,
    "layernorm": _layernorm,
    "layernorm_backward": _layernorm_backward,
    "column_sums": partial(_layernorm_backward, bias_only=True),
    **dict.fromkeys(("layernorm_mlp_backward", "gelu_backward"), _layernorm_mlp_backward),
    "fold": lambda dtype, m, d: _layernorm_linear(dtype, m, d, gelu=True),
    "mask_head": _mask_head,
    **dict.fromkeys(("mask_head_backward", "unit_rows", "partial_sums"), _mask_head_backward),
    "upsample_argmax": _labels,
    "queries_argmax": _queries,
    "upsample_cross_entropy": _loss,
    "windows_argmax": lambda dtype, n_cls: partial(
        windows_argmax,
        *_empty(dtype, (1, 6, 32, 32, n_cls)), (0, 88), (0, 300, 512), (512, 512), (512, 512), (600, 1024),
    ),
    "pixels_to_tokens": _pixels,
    **dict.fromkeys(("pixels_to_tokens_backward", "patch_weights"), _pixels_backward),
}  # fmt: skip
