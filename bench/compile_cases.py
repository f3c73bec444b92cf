"""What `bench.compile_report` compiles: calls of the public operators that between them reach every kernel we ship.

A row a call. Launches that would compile to the same binary are compiled once, so rows may overlap freely.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # of every width of the model: 64 columns each
# Keys left over by blocks of any power of two from 32 to 128: none, one and two (which start the softmax), many.
SHORT = {"even": 256, "1 left": 257, "2 left": 258, "ragged": 300}
LONG = {"even": 1024, "1 left": 1025, "2 left": 1026, "ragged": 1100}
CLASSES = (19, 150, 256, 300)

EVERYWHERE, HOPPER, FULL = range(3)  # compiled by default on all architectures; by default on sm_90; with --full


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `tier`: EVERYWHERE, HOPPER or FULL; `precision`: of float32 products."""

    op: str
    what: str
    dtype: str
    call: Callable[..., object]
    arguments: tuple
    tier: int
    precision: str = "highest"

    def run(self) -> None:
        """Makes the call, with uninitialised CPU tensors; to be used while launches are recorded."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            self.call(TYPES[self.dtype], *self.arguments)
        finally:
            torch.set_float32_matmul_precision(before)


def cases() -> list[Case]:
    """All of them."""
    return [
        *_attention_cases(),
        *_linear_cases(),
        *_layernorm_cases(),
        *_mlp_cases(),
        *_mask_head_cases(),
        *_labels_cases(),
        *_pixels_cases(),
    ]


def _precisions(dtype: str) -> tuple[str, ...]:
    return ("highest", "high") if dtype == "fp32" else ("highest",)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _attention(dtype: torch.dtype, n: int, heads: int, d: int, return_lse: bool) -> None:
    from segmenter.kernels.attention import attention

    attention(torch.empty(2, n, 3 * heads * d, dtype=dtype), heads, return_lse)


def _cross_attention(dtype: torch.dtype, n: int, m: int, heads: int, d: int) -> None:
    from segmenter.kernels.attention import cross_attention

    q, k = torch.empty(2, n, heads, d, dtype=dtype), torch.empty(2, m, heads, d, dtype=dtype)
    cross_attention(q, k, k)


def _attention_case(dtype: str, n: int, heads: int, d: int, lse: bool, tier: int, precision: str = "highest") -> Case:
    what = f"N={n} h={heads} d={d}" + (" lse" if lse else "")
    return Case("attention", what, dtype, _attention, (n, heads, d, lse), tier, precision)


def _attention_cases() -> Iterator[Case]:
    for left, n in [*LONG.items(), *(("short " + left, n) for left, n in SHORT.items())]:
        for heads in HEADS.values():
            default = heads < 16  # 16 heads specialise on their divisibility, and compile to nearly the same again
            tier = EVERYWHERE if left in ("1 left", "ragged") else HOPPER
            yield _attention_case("bf16", n, heads, 64, False, tier if default else FULL)
            half = HOPPER if left in ("1 left", "ragged", "short 1 left") else FULL
            yield _attention_case("fp16", n, heads, 64, False, half if default else FULL)
        yield _attention_case("bf16", n, 12, 64, True, HOPPER if left in ("1 left", "ragged") else FULL)
        for d in (32, 80, 128):
            tier = HOPPER if left in ("1 left", "ragged") else FULL
            yield _attention_case("bf16", n, 12, d, False, EVERYWHERE if (d, left) == (128, "ragged") else tier)
            yield _attention_case("fp16", n, 12, d, False, FULL)
        for d in (32, 64, 80, 128):
            for precision in _precisions("fp32"):
                tier = HOPPER if d in (64, 128) and left == "ragged" else FULL
                tier = EVERYWHERE if d == 64 and left == "1 left" else tier
                yield _attention_case("fp32", n, 12, d, False, tier, precision)
    for dtype in TYPES:
        for n, m in ((1024, 150), (150, 1174)):
            tier = HOPPER if dtype == "bf16" else FULL
            yield Case("attention", f"cross N={n} M={m}", dtype, _cross_attention, (n, m, 6, 64), tier)


# ---------------------------------------------------------------------------------------------------------------------
# Products


def _linear(dtype: torch.dtype, rows: int, k: int, n: int, gelu: bool, residual: str) -> None:
    from segmenter.kernels.linear import linear

    x, weight, bias = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
    added = torch.empty(rows, n, dtype=TYPES[residual]) if residual else None
    linear(x, weight, bias, residual=added, gelu=gelu)


def _layernorm_linear(dtype: torch.dtype, rows: int, k: int, n: int, gelu: bool, stream: str) -> None:
    from segmenter.kernels.linear import layernorm_linear

    x, norm = torch.empty(rows, k, dtype=TYPES[stream]), torch.empty(k, dtype=TYPES[stream])
    weight, bias = torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
    layernorm_linear(x, norm, norm, weight, bias, gelu=gelu)


def _layernorm_mlp(dtype: torch.dtype, rows: int, d: int, stream: str) -> None:
    from segmenter.kernels.layernorm_mlp import layernorm_mlp

    x, norm = torch.empty(rows, d, dtype=TYPES[stream]), torch.empty(d, dtype=TYPES[stream])
    fc1, bias1 = torch.empty(4 * d, d, dtype=dtype), torch.empty(4 * d, dtype=dtype)
    fc2, bias2 = torch.empty(d, 4 * d, dtype=dtype), torch.empty(d, dtype=dtype)
    layernorm_mlp(x, norm, norm, fc1, bias1, fc2, bias2)


def _product_tier(dtype: str, width: int, precision: str = "highest", rows: int = 8200) -> int:
    if rows != 8200:
        return HOPPER if (dtype, width) == ("bf16", 384) else FULL
    if dtype == "bf16":
        return EVERYWHERE if width in (192, 768) else HOPPER
    if dtype == "fp16":
        return HOPPER if width in (192, 768) else FULL
    return EVERYWHERE if width == 384 else FULL


def _linear_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for precision in _precisions(dtype):
            for width in HEADS:
                for rows in (257, 8200):
                    tier = _product_tier(dtype, width, precision, rows)
                    for name, k, n, gelu, residual in (
                        ("qkv", width, 3 * width, False, ""),
                        ("proj + residual", width, width, False, dtype),
                        ("fc1 + gelu", width, 4 * width, True, ""),
                        ("fc2 + residual", 4 * width, width, False, dtype),
                    ):
                        what = f"{name} M={rows} K={k} N={n}"
                        arguments = (rows, k, n, gelu, residual)
                        yield Case("linear", what, dtype, _linear, arguments, tier, precision)
    for width in HEADS:  # what a half-precision product adds to a float32 residual stream, as under autocast
        tier = HOPPER if width == 384 else FULL
        what = f"proj + fp32 residual M=8200 K={width} N={width}"
        yield Case("linear", what, "bf16", _linear, (8200, width, width, False, "fp32"), tier)
        yield Case("linear", f"150 classes M=8200 K={width}", "bf16", _linear, (8200, width, 150, False, ""), tier)


def _mlp_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for precision in _precisions(dtype):
            for width in HEADS:
                for rows in (257, 8200):
                    tier = _product_tier(dtype, width, precision, rows)
                    shape = f"M={rows} D={width}"
                    arguments = (rows, width, 3 * width, False, dtype)
                    yield Case("layernorm_linear", f"qkv {shape}", dtype, _layernorm_linear, arguments, tier, precision)
                    arguments = (rows, width, dtype)
                    yield Case("layernorm_mlp", shape, dtype, _layernorm_mlp, arguments, tier, precision)
    for width in HEADS:
        tier, what = HOPPER if width in (192, 384) else FULL, f"fp32 stream M=8200 D={width}"
        arguments = (8200, width, 3 * width, False, "fp32")
        yield Case("layernorm_linear", f"qkv {what}", "bf16", _layernorm_linear, arguments, tier)
        yield Case("layernorm_mlp", what, "bf16", _layernorm_mlp, (8200, width, "fp32"), tier)


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def _layernorm(dtype: torch.dtype, rows: int, n: int, weight: str) -> None:
    from segmenter.kernels.layernorm import layernorm

    affine = torch.empty(n, dtype=TYPES[weight])
    layernorm(torch.empty(rows, n, dtype=dtype), affine, affine)


def _layernorm_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for n in (*HEADS, 300, 10_000):
            tier = EVERYWHERE if dtype == "bf16" and n == 768 else HOPPER if dtype == "bf16" else FULL
            yield Case("layernorm", f"D={n}", dtype, _layernorm, (8200, n, dtype), tier)
    yield Case("layernorm", "D=384 fp32 weights", "bf16", _layernorm, (8200, 384, "fp32"), HOPPER)


def _mask_head(dtype: torch.dtype, n: int, n_cls: int, d: int) -> None:
    from segmenter.kernels.mask_head import mask_head

    tokens, proj, norm = torch.empty(2, n + n_cls, d, dtype=dtype), torch.empty(d, d, dtype=dtype), torch.empty(n_cls)
    mask_head(tokens[:, :n], tokens[:, n:], proj, proj, norm.to(dtype), norm.to(dtype))


def _mask_head_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for precision in _precisions(dtype):
            for d in HEADS:
                for n_cls in CLASSES:
                    tier = HOPPER if dtype == "bf16" and (d == 384 or n_cls == 150) else FULL
                    tier = HOPPER if (dtype, d, n_cls) == ("fp16", 384, 150) else tier
                    tier = EVERYWHERE if dtype != "fp16" and (d, n_cls) == (768, 150) else tier
                    arguments = (1024, n_cls, d)
                    yield Case("mask_head", f"K={n_cls} D={d}", dtype, _mask_head, arguments, tier, precision)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def _labels(dtype: torch.dtype, size: int, patch: int, n_cls: int, score: str | None) -> None:
    from segmenter.kernels.upsample_argmax import upsample_argmax

    upsample_argmax(torch.empty(2, -(-size // patch), -(-size // patch), n_cls, dtype=dtype), (size, size), None, score)


def _window_labels(dtype: torch.dtype, patch: int, n_cls: int) -> None:
    from segmenter.kernels.upsample_argmax import windows_argmax

    masks = torch.empty(1, 6, 512 // patch, 512 // patch, n_cls, dtype=dtype)
    windows_argmax(masks, (0, 88), (0, 300, 512), (512, 512), (512, 512), (600, 1024))


def _labels_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for patch in (8, 16, 32, 14):
            for n_cls in CLASSES:
                what = f"size=640 P={patch} K={n_cls}"
                tier = EVERYWHERE if (dtype, patch, n_cls) == ("bf16", 16, 150) else HOPPER if dtype == "bf16" else FULL
                yield Case("upsample_argmax", what, dtype, _labels, (640, patch, n_cls, None), tier)
        for score in ("probability", "margin"):
            tier = HOPPER if dtype == "bf16" else FULL
            yield Case("upsample_argmax", f"size=640 P=16 K=150 {score}", dtype, _labels, (640, 16, 150, score), tier)
        tier = EVERYWHERE if dtype == "bf16" else FULL
        yield Case("windows_argmax", "600x1024 P=16 K=150", dtype, _window_labels, (16, 150), tier)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def _pixels(dtype: torch.dtype, batch: int, side: int, patch: int, d: int, stream: str) -> None:
    from segmenter.kernels.pixels_to_tokens import pixels_to_tokens

    weight, table = torch.empty(d, 3 * patch**2, dtype=dtype), torch.empty(4, d)
    extra = torch.empty(2, d, dtype=TYPES[stream])
    positions = torch.empty(2 + (-(-side // patch)) ** 2, d, dtype=TYPES[stream])
    pixels = torch.empty(batch, side, side, 3, dtype=torch.uint8)
    pixels_to_tokens(pixels, weight, table, extra, positions, patch)


def _pixels_cases() -> Iterator[Case]:
    for dtype in TYPES:
        for precision in _precisions(dtype):
            for d in HEADS:
                for patch, sides in ((8, (512, 300)), (16, (512, 500)), (32, (512, 500)), (14, (518, 500))):
                    for side, batch in ((side, batch) for side in sides for batch in (1, 32)):
                        common = dtype == "bf16" or (dtype == "fp32" and batch == 32)
                        tier = EVERYWHERE if common and (d, patch) == (768, 16) else FULL
                        if tier == FULL and dtype == "bf16":
                            tier = EVERYWHERE if (d, patch, batch) == (768, 14, 32) else HOPPER if d == 384 else FULL
                        tier = HOPPER if (dtype, d, patch) == ("fp16", 768, 16) else tier
                        what, arguments = f"{batch}x{side}x{side} P={patch} D={d}", (batch, side, patch, d, dtype)
                        yield Case("pixels_to_tokens", what, dtype, _pixels, arguments, tier, precision)
    for side in (512, 500):  # positions and extra tokens stay float32 under autocast
        what = f"fp32 stream 32x{side}x{side} P=16 D=768"
        yield Case("pixels_to_tokens", what, "bf16", _pixels, (32, side, 16, 768, "fp32"), HOPPER)
