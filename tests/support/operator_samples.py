"""A sample call of every operator of `torch.ops.segmenter`, for the rules that all of them have to keep.

A new operator needs one entry in SAMPLES; tests/kernels/test_operators.py fails until it has it.
"""

import dataclasses
from collections.abc import Callable

import torch

from tests.support.parity import DEVICE, randn


def operator(name):
    return getattr(torch.ops.segmenter, name).default


def near_one(n, seed, dtype):
    return 1 + 0.1 * randn(n, seed=seed, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Sample:
    """How to call one operator. `make(dtype, B, N)` gives arguments in the order of its schema."""

    make: Callable
    flops: Callable  # of (B, N), written down here again on purpose
    autocast: torch.dtype  # of the first result for float32 arguments under autocast to bfloat16
    batch_like: tuple[int, ...] = (0,)  # arguments that begin with (B, N)
    classes_like: tuple[int, ...] = ()  # arguments of which only the first dimension varies
    trimmed: bool = False  # the second result is padded beyond N
    bitwise: bool = True  # whether every layout gives the same bits; not where a library multiplies
    differentiable: bool = True
    first: bool = False  # only the first result is the public function's
    traced: bool = True  # with its gradient; not where the definition goes by blocks, of sizes that tracing must know


def attention_args(dtype, B=2, N=5):
    return randn(B, N, 3 * 2 * 8, dtype=dtype), 2


def cross_attention_args(dtype, B=2, N=5):
    return (*(randn(B, n, 2, 8, seed=i, dtype=dtype) for i, n in enumerate((N, N, N))), 0.3)


def attention_backward_args(dtype, B=2, N=5):
    qkv, n_heads = attention_args(dtype, B, N)
    o, lse = (t.detach() for t in operator("attention_lse")(qkv, n_heads))
    return randn(B, N, 16, seed=1, dtype=dtype), qkv, o, lse, randn(*lse.shape, seed=2), n_heads


def cross_attention_backward_args(dtype, B=2, N=5):
    q, k, v, scale = cross_attention_args(dtype, B, N)
    o, lse = (t.detach() for t in operator("cross_attention_lse")(q, k, v, scale))
    return randn(B, N, 16, seed=3, dtype=dtype), q, k, v, o, lse, randn(*lse.shape, seed=4), scale, True, True


def rotate_args(dtype, B=2, N=5):
    """Up to two extra tokens before the patches."""
    tables = (randn(max(0, N - 2), 8, seed=i, dtype=dtype) for i in (1, 2))
    return randn(B, N, 4, 8, dtype=dtype), *tables, False, False


def attention_rows_args(dtype, B=2, N=5):
    return randn(B, N, 2, 8, dtype=dtype), randn(B, N, 2, 8, seed=1, dtype=dtype), 0.3


def attention_statistics_args(dtype, B=2, N=5):
    """CLS before a row of patches."""
    q, k, scale = attention_rows_args(dtype, B, N)
    return q, k, [1, max(1, N - 1)], min(1, N - 1), scale


def attention_transposed_args(dtype, B=2, N=5):
    q, k, scale = attention_rows_args(dtype, B, N)
    return q, k, randn(B, N, 2, 3, seed=2), scale


def layernorm_args(dtype, B=2, N=5):
    return randn(B, N, 24, dtype=dtype), near_one(24, 1, dtype), randn(24, seed=2, dtype=dtype), 1e-5


def layernorm_backward_args(dtype, B=2, N=5):
    x, weight, bias, eps = layernorm_args(dtype, B, N)
    return randn(B, N, 24, seed=3, dtype=dtype), x, weight, bias.dtype, eps, [True, True, True]


def linear_args(dtype, B=2, N=5):
    x, residual = randn(B, N, 32, dtype=dtype), randn(B, N, 48, seed=1, dtype=dtype)
    weight, bias, layer_scale = (
        randn(48, 32, seed=2, dtype=dtype) / 6,
        *(randn(48, seed=i, dtype=dtype) for i in (3, 4)),
    )
    return x, weight, bias, residual, True, layer_scale


def layernorm_linear_args(dtype, B=2, N=5):
    x, w, b = randn(B, N, 32, dtype=dtype), near_one(32, 1, dtype), randn(32, seed=2, dtype=dtype)
    return x, w, b, randn(48, 32, seed=3, dtype=dtype) / 6, randn(48, seed=4, dtype=dtype), 1e-5, True


def linear_backward_args(dtype, B=2, N=5):
    x, weight, bias, _, gelu, _ = linear_args(dtype, B, N)
    return randn(B, N, 48, seed=4, dtype=dtype), x, weight, bias, gelu, [True] * 3


def layernorm_linear_backward_args(dtype, B=2, N=5):
    added = randn(B, N, 32, seed=6, dtype=dtype)
    return randn(B, N, 48, seed=5, dtype=dtype), *layernorm_linear_args(dtype, B, N), [True] * 5, added


def layernorm_mlp_args(dtype, B=2, N=5):
    x, w, b = randn(B, N, 32, dtype=dtype), near_one(32, 1, dtype), randn(32, seed=2, dtype=dtype)
    fc1, fc2 = randn(64, 32, seed=3, dtype=dtype) / 6, randn(32, 64, seed=4, dtype=dtype) / 8
    return x, w, b, fc1, randn(64, seed=5, dtype=dtype), fc2, randn(32, seed=6, dtype=dtype), 1e-5


def scaled_mlp_args(dtype, B=2, N=5):
    return *layernorm_mlp_args(dtype, B, N), randn(32, seed=7, dtype=dtype)


def layernorm_mlp_backward_args(dtype, B=2, N=5):
    *tensors, _, eps = layernorm_mlp_args(dtype, B, N)
    return randn(B, N, 32, seed=8, dtype=dtype), *tensors, eps, [True] * 7


def attention_half_args(dtype, B=2, N=5):
    *of_qkv, eps, _ = layernorm_linear_args(dtype, B, N)
    weight, bias = randn(32, 16, seed=5, dtype=dtype) / 4, randn(32, seed=6, dtype=dtype)
    return *of_qkv, weight, bias, 2, eps, True, randn(32, seed=7, dtype=dtype)


def mask_head_args(dtype, B=2, N=5):
    patches, classes = randn(B, N, 32, dtype=dtype), randn(B, 7, 32, seed=1, dtype=dtype)
    projections = (randn(32, 32, seed=i, dtype=dtype) / 6 for i in (2, 3))
    return patches, classes, *projections, near_one(7, 4, dtype), randn(7, seed=5, dtype=dtype), 1e-5


def mask_head_backward_args(dtype, B=2, N=5):
    *tokens, norm_weight, _, eps = mask_head_args(dtype, B, N)
    return randn(B, N, 7, seed=6, dtype=dtype), *tokens, norm_weight, eps, [True] * 5


def pixels_to_tokens_args(dtype, B=2, N=5):
    """N rows of one patch of 4 x 4 pixels, padded at the bottom and on the right."""
    pixels = torch.randint(0, 256, (B, 4 * N - 1, 3, 3), generator=torch.Generator().manual_seed(0)).byte().to(DEVICE)
    weight, table = randn(32, 48, seed=1, dtype=dtype) / 6, randn(4, 32, seed=2)
    return pixels, weight, table, randn(2, 32, seed=3, dtype=dtype), randn(2 + N, 32, seed=4, dtype=dtype), 4


def pixels_to_tokens_backward_args(dtype, B=2, N=5):
    return randn(B, N, 32, seed=5, dtype=dtype), pixels_to_tokens_args(dtype, B, N)[0], 4


def windows_argmax_args(dtype, B=2, N=5):
    """Three tiles of one window, which the interpreter takes long enough for. N says nothing: sizes are numbers."""
    return randn(B, 1, 1, 2, 3, dtype=dtype), [0], [0], [8, 8], [7, 8], [7, 8]


def queries_argmax_args(dtype, B=2, N=5):
    """Three queries, two windows that overlap, and an image of another size than the canvas. N says nothing."""
    masks, classes = (randn(B, 2, 3, *rest, seed=i, dtype=dtype) for i, rest in enumerate(((2, 2), (4,))))
    return masks, classes, [0], [0, 3], [4, 4], [4, 7], [5, 6]


def upsample_cross_entropy_args(dtype, B=2, N=5):
    """One patch of 4 x 4 pixels. N says nothing: labels vary with the batch alone."""
    labels = torch.randint(0, 3, (B, 4, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return randn(B, 1, 1, 3, dtype=dtype), labels, near_one(3, 2, FP32), 4, 2, 0.1, True


BF16, FP32 = torch.bfloat16, torch.float32
SAMPLES = {
    "attention": Sample(attention_args, lambda B, N: 4 * B * 2 * N * N * 8, BF16),
    "attention_lse": Sample(attention_args, lambda B, N: 4 * B * 2 * N * N * 8, BF16, trimmed=True),
    "cross_attention": Sample(cross_attention_args, lambda B, N: 4 * B * 2 * N * N * 8, BF16, (0, 1, 2)),
    "cross_attention_lse": Sample(
        cross_attention_args, lambda B, N: 4 * B * 2 * N * N * 8, BF16, (0, 1, 2), trimmed=True
    ),
    "rotate": Sample(rotate_args, lambda B, N: 3 * B * (N - 2) * 4 * 8, FP32, (0,), (1, 2)),
    "attention_rows": Sample(attention_rows_args, lambda B, N: 2 * B * 2 * N * N * 8, FP32, (0, 1), traced=False),
    "attention_statistics": Sample(
        attention_statistics_args, lambda B, N: 2 * B * 2 * N * N * 8, FP32, (0, 1), traced=False
    ),
    "attention_transposed": Sample(
        attention_transposed_args, lambda B, N: 2 * B * 2 * N * N * (8 + 3), FP32, (0, 1, 2), traced=False
    ),
    "attention_backward": Sample(attention_backward_args, lambda B, N: 10 * B * 2 * N * N * 8, FP32, (0, 1, 2), (3, 4)),
    "cross_attention_backward": Sample(
        cross_attention_backward_args, lambda B, N: 10 * B * 2 * N * N * 8, FP32, (0, 1, 2, 3, 4), (5, 6)
    ),
    "layernorm": Sample(layernorm_args, lambda B, N: 8 * B * N * 24, FP32),
    "layernorm_backward": Sample(layernorm_backward_args, lambda B, N: 16 * B * N * 24, FP32, (0, 1)),
    "linear": Sample(linear_args, lambda B, N: 2 * B * N * 32 * 48, FP32, (0, 3)),  # as its residual
    "layernorm_linear": Sample(layernorm_linear_args, lambda B, N: 2 * B * N * 32 * 48, BF16),
    "linear_backward": Sample(linear_backward_args, lambda B, N: 4 * B * N * 32 * 48, FP32, (0, 1), bitwise=False),
    "layernorm_linear_backward": Sample(
        layernorm_linear_backward_args, lambda B, N: 4 * B * N * 32 * 48, FP32, (0, 1, 9), bitwise=False
    ),
    "layernorm_mlp": Sample(scaled_mlp_args, lambda B, N: 4 * B * N * 32 * 64, FP32),  # as x, its residual
    "layernorm_mlp_hidden": Sample(layernorm_mlp_args, lambda B, N: 4 * B * N * 32 * 64, FP32, bitwise=False),
    "layernorm_mlp_backward": Sample(
        layernorm_mlp_backward_args, lambda B, N: 8 * B * N * 32 * 64, FP32, (0, 1), bitwise=False
    ),
    "attention_half": Sample(
        attention_half_args, lambda B, N: B * N * (2 * 4 * 16 * 32 + 4 * N * 16), FP32, bitwise=False, first=True
    ),
    "mask_head": Sample(
        mask_head_args, lambda B, N: 2 * B * 32 * (32 * N + 32 * 7 + 7 * N), FP32, classes_like=(1,), bitwise=False
    ),
    "mask_head_backward": Sample(
        mask_head_backward_args, lambda B, N: 4 * B * 32 * (32 * N + 32 * 7 + 7 * N), FP32, (0, 1), (2,), bitwise=False
    ),
    "pixels_to_tokens": Sample(pixels_to_tokens_args, lambda B, N: 2 * B * N * 48 * 32, FP32, classes_like=(4,)),
    "pixels_to_tokens_backward": Sample(
        pixels_to_tokens_backward_args, lambda B, N: 2 * B * N * 48 * 32, FP32, batch_like=(0, 1)
    ),
    "windows_argmax": Sample(
        windows_argmax_args, lambda B, N: 0, torch.uint8, batch_like=(), classes_like=(0,), differentiable=False
    ),
    "queries_argmax": Sample(
        queries_argmax_args,
        lambda B, N: 2 * B * 2 * 3 * 3 * 16,
        torch.uint8,
        batch_like=(),
        classes_like=(0, 1),
        differentiable=False,
        traced=False,
    ),
    "upsample_cross_entropy": Sample(
        upsample_cross_entropy_args, lambda B, N: 11 * B * 12 * 3, FP32, (), (0, 1), differentiable=False
    ),
}
