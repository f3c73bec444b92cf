"""Random configurations of every kernel: shapes, types, layouts, magnitudes, tiles, each from a seed.

    python -m tests.random_cases --op attention --seed 123            one case, as printed by a failure
    python -m tests.random_cases --cases 5000 --first-seed 1000       many, of all operators in turn

Every case compares with float64 and with eager PyTorch in the same type (labels with the right ones), puts NaN guards
around all inputs and outputs, and sees that inputs stay as they were. `pytest tests/kernels/test_random_cases.py` runs
the first few hundred.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Collection

from tests import conftest  # sets up the interpreter  # isort: skip
import torch
from tqdm import tqdm

from segmenter.kernels import (
    attention,
    configs,
    launch,
    layernorm,
    layernorm_mlp,
    linear,
    mask_head,
    pixels_to_tokens,
    queries_argmax,
    reference,
    reference_queries,
    reference_rotary,
    rotate,
    upsample_argmax,
)
from segmenter.kernels.blocks import fits_rows
from segmenter.kernels.reference import explicit_cross_attention as explicit_cross
from tests.random_backward_cases import (
    attention_backward_case,
    layernorm_backward_case,
    layernorm_mlp_backward_case,
    linear_backward_case,
    mask_head_backward_case,
    pixels_to_tokens_backward_case,
    upsample_cross_entropy_case,
)
from tests.random_map_cases import attention_rows_case, attention_statistics_case, attention_transposed_case
from tests.support.draws import FAR_LENGTHS, HALF, LENGTHS, Case, Draw, attention_config, linear_config, widths
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded
from tests.support.upsampling import MASKS, expected_labels


def attention_case(draw: Draw) -> Case:
    dtype, h, d = draw.dtype(), draw.choice((1, 1, 2, 3)), draw.choice((8, 16, 24, 32, 48, 64, 80, 128))
    near = draw.maybe(0.8)
    N = draw.choice(LENGTHS if near else FAR_LENGTHS)
    B, h = (draw.choice((1, 2, 3)), h) if N < 40 else (1, min(h, 2) if near else 1)
    config, with_lse = attention_config(draw, dtype), draw.maybe(0.2)
    qkv = draw.tensor(B, N, 3 * h * d, dtype=dtype, scale=draw.magnitude())

    def call(x):
        if config is None:
            return attention.attention(x, h)
        x = attention.packed(x, h)
        return attention._run(x, x, x, (h, 0, h, 2 * h), d**-0.5, with_lse, config)[0]

    what = f"B={B} N={N} h={h} d={d} {dtype} lse={with_lse} {config}"
    frobenius = 4.0 if dtype == torch.float32 else HALF
    return Case((qkv,), call, lambda x: reference.explicit_attention(x, h), what, frobenius=frobenius, terms=d + N)


def cross_attention_case(draw: Draw) -> Case:
    dtype, B, h, d = draw.dtype(), draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((8, 16, 32, 40, 64))
    N, M = draw.choice(LENGTHS), draw.choice(LENGTHS)
    q, k, v = (draw.tensor(B, n, h, d, dtype=dtype, scale=draw.magnitude()) for n in (N, M, M))
    scale = draw.choice((d**-0.5, 0.1, 1.0))
    frobenius = 4.0 if dtype == torch.float32 else HALF
    return Case(
        (q, k, v), lambda *t: attention.cross_attention(*t, scale=scale), lambda *t: explicit_cross(*t, scale),
        f"B={B} N={N} M={M} h={h} d={d} {dtype} scale={scale}", frobenius=frobenius, terms=d + M,
    )  # fmt: skip


def rotate_case(draw: Draw) -> Case:
    dtype, tables, interleaved, transposed = draw.dtype(), draw.dtype(), draw.maybe(0.5), draw.maybe(0.3)
    B, N, h, d = draw.choice((1, 2, 3)), draw.choice(LENGTHS), draw.choice((1, 2, 3, 6)), 2 * draw.choice(range(1, 41))
    lead = (draw.choice((1, B)), draw.choice([t for t in (1, 2, 3, 6) if h % t == 0])) if draw.maybe(0.5) else ()
    n = draw.choice(range(N + 1))
    config = configs.RotateConfig(draw.choice((64, 512, 4096)), draw.choice((1, 2, 4)), 4) if draw.maybe(0.5) else None
    args = draw.tensor(B, N, h, d, dtype=dtype), *(draw.tensor(*lead, n, d, dtype=tables) for _ in range(2))

    def call(*t):
        if config is None:
            return rotate.rotate(*t, interleaved, transposed)
        return rotate._run(*t, interleaved, transposed, config)

    return Case(
        args, call, lambda *t: reference_rotary.rotate(*t, interleaved, transposed),
        f"B={B} N={N} n={n} h={h} d={d} {dtype} {lead} {tables} {interleaved} {transposed} {config}",
        frobenius=2.0 if dtype == torch.float32 else 1.1,
    )  # fmt: skip


def layernorm_case(draw: Draw) -> Case:
    dtype, shape, d = draw.dtype(), draw.batch(), draw.choice((2, 8, 17, 64, 100, 192, 255, 256, 257, 384, 600, 768))
    x = draw.tensor(*shape, d, dtype=dtype, scale=draw.choice((1.0, 0.01, 50.0)), mean=draw.choice((0.0, 0.0, 3.0)))
    affine = [draw.tensor(d, dtype=dtype, mean=mean) for mean in (1.0, 0.0)]
    eps = draw.choice((1e-5, 1e-6, 0.1))
    return Case(
        (x, *affine), lambda *t: layernorm.layernorm(*t, eps), lambda *t: reference.layernorm(*t, eps),
        f"{shape} d={d} {dtype} eps={eps}", frobenius=2.5 if dtype == torch.float32 else 1.1,
    )  # fmt: skip


def linear_case(draw: Draw) -> Case:
    dtype, shape, (k, n) = draw.dtype(), draw.batch(), widths(draw)
    gelu, config = draw.maybe(0.5), linear_config(draw, dtype)
    ours = config is not None or draw.maybe(0.3)
    x = draw.tensor(*shape, k, dtype=dtype, scale=draw.magnitude())
    weight = draw.tensor(n, k, dtype=dtype, scale=k**-0.5)
    bias = draw.tensor(n, dtype=dtype) if draw.maybe(0.7) else None
    wide = draw.choice((dtype, dtype, torch.float32))
    residual = draw.tensor(*shape, n, dtype=wide) if draw.maybe(0.5) else None

    def call(x, weight, bias, residual):
        if not ours:
            return linear.linear(x, weight, bias, residual, gelu)
        weight, bias = (None if t is None else launch.rows_contiguous(t) for t in (weight, bias))
        rows = None if residual is None else layernorm.as_rows(residual)
        return linear.product(layernorm.as_rows(x), weight, bias, rows, gelu, config=config).view(*shape, n)

    return Case(
        (x, weight, bias, residual), call, lambda *t: reference.linear(*t, gelu=gelu),
        f"{shape} {k}->{n} {dtype} residual={None if residual is None else wide} gelu={gelu} ours={ours} {config}",
        frobenius=2.0 if dtype == torch.float32 else 1.1, terms=k,
    )  # fmt: skip


def layernorm_linear_case(draw: Draw) -> Case:
    dtype, shape, (k, n) = draw.dtype(), draw.batch(), widths(draw)
    wide, gelu = draw.choice((dtype, dtype, torch.float32)), draw.maybe(0.5)
    strategies = [None, "library", "separate", "fold"] + ["rows"] * (2 * fits_rows(k))
    strategy = draw.choice(strategies)
    if strategy == "fold":
        wide = dtype
    x = draw.tensor(*shape, k, dtype=wide, scale=draw.choice((1.0, 10.0)), mean=draw.choice((0.0, 0.5)))
    norm = [draw.tensor(k, dtype=wide, scale=0.3, mean=mean) for mean in (1.0, 0.0)]
    weight = draw.tensor(n, k, dtype=dtype, scale=k**-0.5)
    bias = draw.tensor(n, dtype=dtype) if draw.maybe(0.7) else None

    def call(x, norm_weight, norm_bias, weight, bias):
        if strategy is None:
            return linear.layernorm_linear(x, norm_weight, norm_bias, weight, bias, gelu=gelu)
        dense = [None if t is None else launch.rows_contiguous(t) for t in (norm_weight, norm_bias, weight, bias)]
        use_gelu = gelu and strategy != "library"
        y = linear.normalised_product(layernorm.as_rows(x), *dense, 1e-5, use_gelu, strategy=strategy)
        return y.view(*shape, n)

    def definition(*t):
        return reference.layernorm_linear(*t, gelu=gelu and strategy != "library")

    what = f"{shape} {k}->{n} {dtype} x={wide} gelu={gelu} strategy={strategy}"
    frobenius = 3.0 if dtype == torch.float32 else 1.5 if strategy == "fold" else 1.1
    return Case((x, *norm, weight, bias), call, definition, what, max_ratio=4.0, frobenius=frobenius, terms=k)


def layernorm_mlp_case(draw: Draw) -> Case:
    dtype, shape, d = draw.dtype(), draw.batch(), draw.choice((16, 32, 48, 64, 96, 100, 192))
    hidden, wide = draw.choice((32, 64, 128, 4 * d)), draw.choice((dtype, dtype, torch.float32))
    single = dtype != torch.float32 and fits_rows(d) and draw.maybe(0.7)
    x = draw.tensor(*shape, d, dtype=wide)
    norm = [draw.tensor(d, dtype=wide, scale=0.3, mean=mean) for mean in (1.0, 0.0)]
    fc1, fc1_bias = draw.tensor(hidden, d, dtype=dtype, scale=d**-0.5), draw.tensor(hidden, dtype=dtype)
    fc2, fc2_bias = draw.tensor(d, hidden, dtype=dtype, scale=hidden**-0.5), draw.tensor(d, dtype=dtype)
    config = configs.MlpConfig(draw.choice((16, 32, 64)), 32, 4, 2, draw.maybe(0.5))

    tanh = draw.maybe(0.3)

    def call(x, *parameters):
        if not single:
            return layernorm_mlp.layernorm_mlp(x, *parameters, tanh=tanh)
        dense, how = [launch.rows_contiguous(t) for t in parameters], {"strategy": "single", "config": config}
        return layernorm_mlp.run(layernorm.as_rows(x), *dense, 1e-5, **how, tanh=tanh).view(x.shape)

    def definition(*t):
        return reference.layernorm_mlp(*t, tanh=tanh)

    what = f"{shape} d={d} hidden={hidden} {dtype} x={wide} tanh={tanh} {config if single else 'as chosen'}"
    args = (x, *norm, fc1, fc1_bias, fc2, fc2_bias)
    frobenius = 2.5 if dtype == torch.float32 else 1.1
    return Case(args, call, definition, what, frobenius=frobenius, terms=d + hidden)


def mask_head_case(draw: Draw) -> Case:
    dtype, d, K = draw.dtype(), draw.choice((16, 32, 48, 64, 96)), draw.choice((4, 5, 7, 15, 16, 17, 19, 33, 60))
    B, N = draw.choice((1, 2)), draw.choice(LENGTHS)
    patches = draw.tensor(B, N, d, dtype=dtype, scale=draw.choice((1.0, 0.1, 10.0)))
    classes = draw.tensor(B, K, d, dtype=dtype)
    projections = [draw.tensor(d, d, dtype=dtype, scale=d**-0.5) for _ in range(2)]
    norm = [draw.tensor(K, dtype=dtype, scale=0.3, mean=mean) for mean in (1.0, 0.0)] if draw.maybe(0.8) else [None] * 2
    eps = draw.choice((1e-5, 1e-3))
    return Case(
        (patches, classes, *projections, *norm),
        lambda *t: mask_head.mask_head(*t, eps), lambda *t: reference.mask_head(*t, eps),
        f"B={B} N={N} K={K} d={d} {dtype} eps={eps} affine={norm[0] is not None}",
        frobenius=2.5 if dtype == torch.float32 else 1.2, terms=2 * d,
    )  # fmt: skip


def pixels_to_tokens_case(draw: Draw) -> Case:
    dtype, P, d = draw.dtype(), draw.choice((1, 3, 8, 8, 14, 16, 16, 32)), draw.choice((16, 31, 48, 64, 96, 192))
    B, H, W = draw.choice((1, 2, 3)), draw.choice(LENGTHS), draw.choice(LENGTHS)
    if P < 8:
        H, W = min(H, 17), min(W, 17)
    n, E, stream = -(-H // P) * -(-W // P), draw.choice((1, 2)), draw.choice((dtype, dtype, torch.float32))
    weight = draw.tensor(d, 3, P, P, dtype=dtype, scale=(3 * P * P) ** -0.5)
    bias = draw.tensor(d, dtype=dtype) if draw.maybe(0.7) else None
    extra, positions = draw.tensor(E, d, dtype=stream), draw.tensor(E + n, d, dtype=stream)
    statistics = draw.choice((((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
    config = None if draw.maybe(0.4) else linear_config(draw, dtype)

    def call(pixels, weight, bias, extra, positions):
        if config is None:
            return pixels_to_tokens.normalized_pixels_to_tokens(pixels, weight, bias, extra, positions, *statistics)
        fold = reference.fold_normalization(weight, bias, *statistics, dtype, (H, W))
        return pixels_to_tokens._run(pixels, *fold, extra.contiguous(), positions.contiguous(), P, config)

    return Case(
        (draw.images(B, H, W), weight, bias, extra, positions), call,
        lambda *t: reference.pixels_to_tokens(*t, *statistics),
        f"{B}x{H}x{W} P={P} d={d} E={E} {dtype} stream={stream} {config}", terms=3 * P * P,
    )  # fmt: skip


def windows_argmax_case(draw: Draw) -> Case:
    """Few tiles and classes, each of which the interpreter takes long for."""
    grid, K, size, window, starts = [], draw.choice((1, 2, 3, 4)), [], [], []
    for axis in range(2):
        grid.append(draw.choice((1, 2, 3) if axis == 0 else (1, 1, 2)))
        size.append(draw.choice((grid[-1] * 8, grid[-1] * 14, 3, 17, 40)))
        window.append(size[-1] - draw.choice((0, 0, 1, size[-1] // 3)))
        more = draw.choice((0, 0, 1)) if axis == 0 or len(starts[0]) == 1 else 0
        starts.append((0, *(draw.choice((1, window[-1] // 2 + 1, window[-1])) for _ in range(more))))
    shape = tuple(s[-1] + n for s, n in zip(starts, window, strict=True))
    geometry = (*starts, tuple(size), tuple(window), shape)
    n, B, kind, dtype = len(starts[0]) * len(starts[1]), draw.choice((1, 1, 1, 2)), draw.choice(MASKS), draw.dtype()
    dtype = torch.float32 if kind == "close" else dtype  # beyond the range of float16
    masks = MASKS[kind](B * n, *grid, K, draw.random.randrange(2**31)).unflatten(0, (B, n))

    def call(masks):
        return upsample_argmax.windows_argmax(masks, *geometry)

    what = f"B={B} grid={grid} K={K} {geometry} {kind} {dtype}"
    args = (draw.placed(masks.to(dtype).to(DEVICE)),)
    return Case(args, call, lambda masks: expected_labels(masks, *geometry).to(DEVICE), what, labels=True)


def queries_argmax_case(draw: Draw) -> Case:
    """What is compared is the exact score of each pixel's label."""
    dtype, B, Q, C = (
        draw.dtype(),
        draw.choice((1, 1, 2)),
        draw.choice((1, 3, 16, 17, 33)),
        draw.choice((1, 2, 5, 17, 33)),
    )
    window, starts, canvas, shape = (draw.choice((4, 6, 9)), draw.choice((5, 8))), [], [], []
    for axis, n in enumerate(window):
        more = draw.choice((0, 0, 1, 2)) if axis == 0 else draw.choice((0, 1))
        starts.append(tuple(itertools.accumulate([0, *(draw.choice((1, n // 2 + 1, n + 1)) for _ in range(more))])))
        canvas.append(max(starts[-1][-1] + 1, starts[-1][-1] + n + draw.choice((0, 0, 1, -1))))
        shape.append(draw.choice((canvas[-1], 2 * canvas[-1] + 1, max(1, canvas[-1] // 2))))
    n, grid = len(starts[0]) * len(starts[1]), (draw.choice((1, 2, 3)), draw.choice((1, 2)))
    geometry = *starts, window, tuple(canvas), tuple(shape)
    masks = draw.tensor(B, n, Q, *grid, dtype=dtype, scale=draw.choice((1.0, 4.0)))
    classes = draw.tensor(B, n, Q, C + 1, dtype=dtype, scale=draw.choice((0.1, 2.0)))

    def exact(*queries):
        return reference_queries.queries_scores(*(t.double() for t in queries), *geometry)

    def of_labels(labels, *queries):
        return exact(*queries).gather(1, labels.long().unsqueeze(1)).squeeze(1).to(dtype)

    def definition(*queries):
        if queries[0].dtype == torch.float64:
            return exact(*queries).amax(1)
        return of_labels(reference_queries.queries_argmax(*queries, *geometry), *queries)

    def call(*queries):
        return of_labels(queries_argmax.queries_argmax(*queries, *geometry), *queries)

    what = f"B={B} Q={Q} C={C} grid={grid} {geometry} {dtype}"
    return Case((masks, classes), call, definition, what, frobenius=4.0, terms=Q)


FORWARD: dict[str, Callable[[Draw], Case]] = {
    "attention": attention_case,
    "cross_attention": cross_attention_case,
    "layernorm": layernorm_case,
    "linear": linear_case,
    "layernorm_linear": layernorm_linear_case,
    "layernorm_mlp": layernorm_mlp_case,
    "mask_head": mask_head_case,
    "pixels_to_tokens": pixels_to_tokens_case,
    "windows_argmax": windows_argmax_case,
    "queries_argmax": queries_argmax_case,
    "attention_rows": attention_rows_case,
    "attention_statistics": attention_statistics_case,
    "attention_transposed": attention_transposed_case,
    "rotate": rotate_case,
}
BACKWARD: dict[str, Callable[[Draw], Case]] = {
    "attention_backward": attention_backward_case,
    "layernorm_backward": layernorm_backward_case,
    "linear_backward": linear_backward_case,
    "layernorm_mlp_backward": layernorm_mlp_backward_case,
    "mask_head_backward": mask_head_backward_case,
    "pixels_to_tokens_backward": pixels_to_tokens_backward_case,
    "upsample_cross_entropy": upsample_cross_entropy_case,
}
FAMILIES = FORWARD | BACKWARD


def numbered(index: int, families: Collection[str] = FAMILIES) -> tuple[str, int]:
    """(op, seed) of the n-th case: the families take turns."""
    names = list(families)
    return names[index % len(names)], index // len(names)


def run_case(op: str, seed: int) -> None:
    """Raises AssertionError, with the command that runs it again, unless all holds."""
    draw = Draw(op, seed)
    case = FAMILIES[op](draw)
    context = f"python -m tests.random_cases --op {op} --seed {seed}   # {case.what} {'/'.join(draw.layouts)}"
    try:
        inputs = tuple(guarded(t) if t is not None else None for t in case.args)
        with conftest.guarded_allocations():
            actual = case.call(*inputs)
        for before, after in zip(case.args, inputs, strict=True):
            if before is not None:
                assert_bitwise_equal(after, before, "of an input")
                check_guards(after, "of an input")
        with conftest.guarded_allocations():  # at other addresses, from notes of the first call
            again = case.call(*(None if t is None else guarded(t) for t in case.args))
        assert_bitwise_equal(again, actual, "of the second call")
        assert actual.is_contiguous() and again.is_contiguous(), "the result is not contiguous"
        if case.labels:
            assert_bitwise_equal(actual, case.definition(*case.args), "of the labels")
            return
        exact = case.definition(*(None if t is None else t.double() for t in case.args))
        eager = case.definition(*case.args)
        luck = 2.0 if actual.numel() < 1024 else 1.0  # a norm of few numbers is a matter of chance
        limits = {"max_ratio": luck * case.max_ratio, "frobenius": luck * case.frobenius}
        assert_parity(actual, exact, eager, **limits, terms=case.terms)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n  {context}") from error


def failures(
    first: int,
    count: int,
    only: str | None = None,
    progress: bool = False,
    families: Collection[str] = FAMILIES,
) -> list[str]:
    """Messages of the cases that fail, of `families` in turn or of one alone."""
    found = []
    for index in tqdm(range(first, first + count), disable=not progress, unit="case"):
        op, seed = (only, index) if only else numbered(index, families)
        try:
            run_case(op, seed)
        except AssertionError as error:
            found.append(str(error))
            if progress:
                tqdm.write(f"{error}\n")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_cases", description=__doc__.split("\n")[0])
    parser.add_argument("--op", choices=FAMILIES, help="only this operator")
    parser.add_argument("--seed", type=int, help="one case; needs --op")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first case")
    args = parser.parse_args(argv)
    if args.seed is not None:
        if args.op is None:
            parser.error("--seed needs --op")
        args.first_seed, args.cases = args.seed, 1
    torch.set_num_threads(1)
    found = failures(args.first_seed, args.cases, args.op, progress=True)
    print(f"{args.cases - len(found)} of {args.cases} cases right")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
