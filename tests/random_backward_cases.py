"""Random configurations of the gradients' kernels: the families that `tests.random_cases` has of them."""

import torch

from segmenter.kernels import (
    attention,
    attention_backward,
    checks,
    configs_backward,
    launch,
    layernorm_backward,
    layernorm_mlp_backward,
    linear_backward,
    mask_head_backward,
    pixels_to_tokens_backward,
    reference,
    reference_backward,
    upsample_cross_entropy,
)
from tests.support.draws import HALF, LENGTHS, Case, Draw, attention_config, widths
from tests.support.parity import DEVICE


def attention_backward_case(draw: Draw) -> Case:
    """Packed, or q, k and v with as many keys as queries, which share the definition."""
    dtype, h, d = draw.dtype(), draw.choice((1, 1, 2)), draw.choice((8, 16, 24, 32, 48, 64, 80, 128))
    N = draw.choice(LENGTHS)
    B, h = (draw.choice((1, 2)), h) if N < 40 else (1, 1)
    qkv = draw.tensor(B, N, 3 * h * d, dtype=dtype, scale=draw.choice((1.0, 1.0, 1e-3, 0.1, 2.0)))
    grad = draw.tensor(B, N, h * d, dtype=dtype, scale=draw.magnitude())
    chosen, with_lse = (attention_config(draw, dtype), attention_config(draw, dtype)), draw.maybe(0.3)
    rows = -(-N // 128) * 128
    grad_lse = draw.tensor(B, h, rows, dtype=torch.float32) if with_lse else None
    o, lse = torch.ops.segmenter.attention_lse(qkv, h)

    def call(grad, qkv, o, lse, grad_lse):
        if chosen == (None, None):
            return attention_backward.attention_backward(grad, qkv, o, lse, grad_lse, h)
        x, out = attention.packed(qkv, h), launch.empty(qkv.shape, qkv.dtype, qkv.device)
        grads, heads = (out.view(x.shape),) * 3, (h, 0, h, 2 * h)
        attention_backward._run(grad, (x, x, x), (o, lse), grad_lse, grads, heads, d**-0.5, chosen)
        return out

    def definition(*t):
        return reference.attention_backward(*t, h)

    what = f"B={B} N={N} h={h} d={d} {dtype} lse={with_lse} {chosen}"
    frobenius = 4.0 if dtype == torch.float32 else HALF
    args = (grad, qkv, draw.placed(o), draw.placed(lse), grad_lse)
    return Case(args, call, definition, what, max_ratio=4.0, frobenius=frobenius, terms=900)


def layernorm_backward_case(draw: Draw) -> Case:
    """One of the three gradients, of a LayerNorm by itself or one that a residual stream goes past."""
    dtype, shape, d = draw.dtype(), draw.batch(), draw.choice((2, 8, 17, 64, 100, 192, 255, 257, 384, 600))
    x = draw.tensor(*shape, d, dtype=dtype, scale=draw.choice((1.0, 0.1, 20.0)), mean=draw.choice((0.0, 0.0, 3.0)))
    grad, weight = draw.tensor(*shape, d, dtype=dtype, scale=draw.magnitude()), draw.tensor(d, dtype=dtype, mean=1.0)
    added = draw.tensor(*shape, d, dtype=dtype) if draw.maybe(0.4) else None
    which, eps = draw.choice((0, 0, 1, 2)), draw.choice((1e-5, 1e-6, 0.1))
    needed = tuple(i == which or draw.maybe(0.5) for i in range(3))
    config = configs_backward.SumsConfig(draw.choice((4, 8)), draw.choice((128, 256)), 4, draw.choice((1, 2, 5)))

    def call(grad, x, weight, added):
        if added is None:
            return layernorm_backward.layernorm_backward(grad, x, weight, dtype, eps, needed)[which]
        rows, types = (checks.as_rows(t) for t in (grad, x, added)), [dtype if need else None for need in needed]
        grad_rows, x_rows, added_rows = rows
        dense = launch.rows_contiguous(weight)
        found = layernorm_backward.run(grad_rows, x_rows, dense, eps, tuple(types), added_rows, config)[which]
        return found.view(x.shape) if which == 0 else found

    def definition(grad, x, weight, added):
        found = reference_backward.layernorm_backward(grad, x, weight, dtype, eps)[which]
        return found if added is None or which else found + added

    what = f"{shape} d={d} {dtype} eps={eps} added={added is not None} {needed} {which} {config}"
    frobenius = 3.0 if dtype == torch.float32 else 1.2
    return Case((grad, x, weight, added), call, definition, what, frobenius=frobenius, terms=200)


def linear_backward_case(draw: Draw) -> Case:
    """One of the three gradients, behind a GELU or not, of a result that may be wider than the weights."""
    dtype, shape, (k, n), gelu = draw.dtype(), draw.batch(), widths(draw), draw.maybe(0.5)
    wide = draw.choice((dtype, dtype, torch.float32))
    grad, x = draw.tensor(*shape, n, dtype=wide, scale=draw.magnitude()), draw.tensor(*shape, k, dtype=dtype)
    weight = draw.tensor(n, k, dtype=dtype, scale=k**-0.5)
    bias = draw.tensor(n, dtype=dtype) if draw.maybe(0.8) else None
    which = draw.choice(range(2 if bias is None else 3))
    needed = tuple(i == which or draw.maybe(0.5) for i in range(3))

    def call(*t):
        return linear_backward.linear_backward(*t, gelu, needed)[which]

    return Case(
        (grad, x, weight, bias), call, lambda *t: reference_backward.linear_backward(*t, gelu)[which],
        f"{shape} {k}->{n} {dtype} grad={wide} gelu={gelu} bias={bias is not None} {needed} {which}",
        max_ratio=4.0, frobenius=3.0 if dtype == torch.float32 else 1.4, terms=900,
    )  # fmt: skip


def layernorm_mlp_backward_case(draw: Draw) -> Case:
    """One of the seven gradients."""
    dtype, shape, d = draw.dtype(), draw.batch(), draw.choice((16, 31, 48, 64, 100))
    hidden, wide, which = (
        draw.choice((16, 40, 65, 128)),
        draw.choice((dtype, dtype, torch.float32)),
        draw.choice(range(7)),
    )
    x, grad = draw.tensor(*shape, d, dtype=wide), draw.tensor(*shape, d, dtype=wide, scale=draw.magnitude())
    norm = [draw.tensor(d, dtype=wide, scale=0.3, mean=mean) for mean in (1.0, 0.0)]
    fc1, fc1_bias = draw.tensor(hidden, d, dtype=dtype, scale=d**-0.5), draw.tensor(hidden, dtype=dtype)
    fc2 = draw.tensor(d, hidden, dtype=dtype, scale=hidden**-0.5)
    needed, tanh = tuple(i == which or draw.maybe(0.5) for i in range(7)), draw.maybe(0.3)

    def call(*args):
        return layernorm_mlp_backward.layernorm_mlp_backward(*args, needed=needed, tanh=tanh)[which]

    def definition(*args):
        return reference_backward.layernorm_mlp_backward(*args, tanh=tanh)[which]

    what = f"{shape} d={d} hidden={hidden} {dtype} x={wide} tanh={tanh} {needed} {which}"
    frobenius = 3.0 if dtype == torch.float32 else 1.4
    args = (grad, x, *norm, fc1, fc1_bias, fc2)
    return Case(args, call, definition, what, max_ratio=4.0, frobenius=frobenius, terms=900)


def mask_head_backward_case(draw: Draw) -> Case:
    """One of the five gradients; few classes leave them to chance."""
    dtype, d = draw.dtype(), draw.choice((16, 32, 48, 64, 96))
    K = draw.choice((4, 5, 15, 16, 17, 19, 33, 60) if draw.maybe(0.8) else (127, 128, 130, 260))
    B, N = draw.choice((1, 2)), draw.choice(LENGTHS if K < 100 else LENGTHS[:8])
    patches = draw.tensor(B, N, d, dtype=dtype, scale=draw.choice((1.0, 0.1, 10.0)))
    classes = draw.tensor(B, K, d, dtype=dtype)
    projections = [draw.tensor(d, d, dtype=dtype, scale=d**-0.5) for _ in range(2)]
    weight = draw.tensor(K, dtype=draw.choice((dtype, torch.float32)), scale=0.3, mean=1.0) if draw.maybe(0.8) else None
    which, eps = draw.choice(range(5)), draw.choice((1e-5, 1e-3))
    needed = [i == which or draw.maybe(0.3) for i in range(5)]
    sizes = (draw.choice((16, 32, 64)), draw.choice((16, 32, 64)), 4, 2, draw.maybe(0.6))
    config = None if draw.maybe(0.4) else configs_backward.MaskHeadBackwardConfig(*sizes)

    def call(*t):
        if config is None:
            return mask_head_backward.mask_head_backward(*t, eps, needed)[which]
        return mask_head_backward._run(*t, eps, needed, config)[which]

    return Case(
        (draw.tensor(B, N, K, dtype=dtype, scale=draw.magnitude()), patches, classes, *projections, weight), call,
        lambda *t: mask_head_backward.mask_head_backward_reference(*t, eps, [True] * 5)[which],
        f"B={B} N={N} K={K} d={d} {dtype} eps={eps} which={which} {needed} affine={weight is not None} {config}",
        max_ratio=4.0, frobenius=3.0 if dtype == torch.float32 else 1.5, terms=900,
    )  # fmt: skip


def pixels_to_tokens_backward_case(draw: Draw) -> Case:
    dtype, P, d = draw.dtype(), draw.choice((1, 3, 8, 8, 14, 16)), draw.choice((16, 31, 48, 65))
    H, W = draw.choice(LENGTHS[:10]), draw.choice(LENGTHS)
    if P < 8:  # every patch of every tile is interpreted
        H, W = min(H, 5), min(W, 17)
    B = draw.choice((1, 2, 3)) if H * W < 500 else 1
    dy = draw.tensor(B, -(-H // P) * -(-W // P), d, dtype=dtype, scale=draw.magnitude())
    sizes = (draw.choice((16, 32, 64)), draw.choice((32, 64)), draw.choice((32, 64, 128)), 4, 2)
    config = None if draw.maybe(0.4) else configs_backward.PatchWeightsConfig(*sizes)

    def call(dy, pixels):
        if config is None:
            return pixels_to_tokens_backward.pixels_to_tokens_backward(dy, pixels, P)
        return pixels_to_tokens_backward._run(dy, pixels, P, config)

    return Case(
        (dy, draw.images(B, H, W)), call,
        lambda *t: pixels_to_tokens_backward.pixels_to_tokens_backward_reference(*t, P),
        f"{B}x{H}x{W} P={P} d={d} {dtype} {config}", terms=dy.shape[0] * dy.shape[1],
    )  # fmt: skip


def upsample_cross_entropy_case(draw: Draw) -> Case:
    """The loss and the weights that it counts, or the gradient; few pixels and classes, which the interpreter sees one
    by one."""
    dtype, P, K = draw.dtype(), draw.choice((1, 2, 3, 4, 8)), draw.choice((2, 3, 5, 16, 17, 19))
    most, B = draw.choice((1, 2, 3) if P < 3 else (1, 2) if P < 8 else (1,)), draw.choice((1, 1, 2) if P < 4 else (1,))
    H, W = (max(1, most * P - draw.choice((0, 0, 1, P - 1))) for _ in range(2))
    masks = draw.tensor(B, -(-H // P), -(-W // P), K, dtype=dtype, scale=draw.choice((1.0, 5.0, 20.0)))
    labels = torch.randint(0, K, (B, H, W), generator=draw.generator)
    labels[torch.rand(B, H, W, generator=draw.generator) < draw.choice((0.0, 0.2, 1.0))] = 255
    weight = draw.tensor(K, dtype=torch.float32).abs() if draw.maybe(0.4) else None
    smoothing, which = draw.choice((0.0, 0.0, 0.1)), draw.choice((0, 2, 2))

    def call(masks, labels, weight):
        return upsample_cross_entropy.upsample_cross_entropy(masks, labels, weight, P, 255, smoothing)[which]

    def definition(masks, labels, weight):
        return reference.upsample_cross_entropy(masks, labels.long(), weight, P, 255, smoothing, True)[which]

    what = f"{B}x{H}x{W} P={P} K={K} {dtype} weight={weight is not None} smoothing={smoothing} {which}"
    args = (masks, draw.placed(labels.to(DEVICE)), weight)
    return Case(args, call, definition, what, max_ratio=4.0, frobenius=4.0, terms=B * H * W)
