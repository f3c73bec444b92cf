"""What attention is looked at by: rows, statistics, products with the transposed matrix; kernels and definitions.

All is compared with the matrix written out in float64. What all operators share is in test_operators.py.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from segmenter.kernels import attention_rows as rows_kernel
from segmenter.kernels import attention_statistics as statistics_kernel
from segmenter.kernels import attention_transposed as transposed_kernel
from segmenter.kernels import configs_maps, launch, reference, reference_maps
from segmenter.kernels.attention import attention, cross_attention
from segmenter.kernels.attention_rows import attention_rows
from segmenter.kernels.attention_statistics import attention_statistics
from segmenter.kernels.attention_transposed import attention_transposed
from segmenter.kernels.configs import AttentionConfig
from segmenter.kernels.launch import KernelError
from tests.support.largest import Largest
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = {  # grid, tokens before it, tokens after it
    "cls": ((5, 13), 1, 0),
    "square": ((8, 8), 0, 0),
    "row": ((1, 17), 2, 0),
    "column": ((70, 1), 1, 0),
    "registers": ((9, 7), 5, 0),
    "classes": ((4, 9), 0, 19),
    "both": ((7, 10), 1, 70),
    "one": ((1, 1), 0, 2),
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# Float32 adds the rounding of the log-sum-exp, which eager PyTorch does not need.
LIMITS = {torch.float32: {"max_ratio": 4.0, "frobenius": 4.0}}


def q_and_k(B, N, h, d, dtype=torch.float32, M=None, seed=0):
    """Packed as in a model, unless there are other keys than queries."""
    if M is None:
        return randn(B, N, 3, h, d, dtype=dtype, seed=seed).unbind(2)[:2]
    return randn(B, N, h, d, dtype=dtype, seed=seed), randn(B, M, h, d, dtype=dtype, seed=seed + 1)


def matrix(q, k, scale=None):
    """The whole of it, (B, h, N, M), in float64."""
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    return (q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def written_out(q, k, grid, first, scale=None):
    """The statistics, of the whole matrix."""
    p, n = matrix(q, k, scale), grid[0] * grid[1]
    entropy = torch.special.entr(p).sum(-1)
    of_patches = p[..., first : first + n]
    extra = p[..., :first].sum(-1) + p[..., first + n :].sum(-1)
    of_patches = of_patches / of_patches.sum(-1, keepdim=True)
    axes = (torch.arange(side, dtype=torch.float64, device=p.device) for side in grid)
    places = torch.cartesian_prod(*axes).view(n, 2)
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    own = torch.zeros(p.shape[-2], n, dtype=torch.float64, device=p.device)
    own[first : first + n] = distance
    centre = of_patches @ places
    means = [(of_patches * d).sum(-1) for d in (own, own.square())]
    return torch.stack([entropy, extra, centre[..., 0], centre[..., 1], *means])


def check_statistics(found, q, k, grid, first, scale=None, **limits):
    exact = written_out(q, k, grid, first, scale)
    eager = reference_maps.attention_statistics(q, k, grid, first, scale)
    assert len(found) == len(reference_maps.STATISTICS)
    for name, *three in zip(reference_maps.STATISTICS, found, exact, eager, strict=True):
        assert_parity(*three, **limits or LIMITS.get(q.dtype, {}), context=name)


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


@pytest.mark.parametrize("block", [1, 50, 700, 2**21])
@pytest.mark.parametrize("kind", GRIDS)
def test_definition_of_statistics(kind, block, monkeypatch):
    """By blocks of any size, down to a row of a head."""
    monkeypatch.setattr(reference_maps, "BLOCK", block)
    grid, first, after = GRIDS[kind]
    q, k = (t.double() for t in q_and_k(2, first + grid[0] * grid[1] + after, 3, 8))
    found = reference_maps.attention_statistics(q, k, grid, first, 0.7)
    torch.testing.assert_close(found, written_out(q, k, grid, first, 0.7), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 50, 700, 2**21])
def test_definitions_of_rows_and_transposed(block, monkeypatch):
    monkeypatch.setattr(reference_maps, "BLOCK", block)
    q, k = (t.double() for t in q_and_k(2, 23, 3, 8, M=31))
    x = randn(2, 23, 3, 4, seed=5).double()
    torch.testing.assert_close(reference_maps.attention_rows(q, k), matrix(q, k), rtol=1e-12, atol=1e-12)
    found, want = reference_maps.attention_transposed(q, k, x), torch.einsum("bhnm,bnhr->bmhr", matrix(q, k), x)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_transposed_is_the_gradient_of_the_values():
    q, k = (t.double() for t in q_and_k(1, 17, 2, 8, M=21))
    v, x = (randn(1, n, 2, 8, seed=i).double() for i, n in ((3, 21), (4, 17)))
    v.requires_grad_()
    (want,) = torch.autograd.grad(reference.explicit_cross_attention(q, k, v, 0.3), v, x.flatten(2))
    torch.testing.assert_close(reference_maps.attention_transposed(q, k, x, 0.3), want)


def test_identities_of_attention_with_other_values():
    """Entropy, centre and squared distance by `attention` alone, as one would without a kernel of their own."""
    grid, n = (6, 9), 54
    q, k = (t.double() for t in q_and_k(1, n, 2, 16))
    found = reference_maps.attention_statistics(q, k, grid, 0)
    of_keys, lse = reference.cross_attention_lse(q, k, k, 0.25)
    entropy = lse - 0.25 * (q * of_keys.view_as(q)).sum(-1).transpose(1, 2)
    torch.testing.assert_close(found[0], entropy)
    y, x = (axis.flatten().double() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    values = torch.stack([y, x, y * y + x * x], -1)
    o = matrix(q, k) @ values
    torch.testing.assert_close(found[2:4], o[..., :2].movedim(-1, 0))
    squared = (y * y + x * x) - 2 * (y * o[..., 0] + x * o[..., 1]) + o[..., 2]
    torch.testing.assert_close(found[5], squared)


def test_why_statistics_have_a_kernel_of_their_own():
    """Attention's result is rounded to the type of the values, and then little is left of these differences."""
    side = 128
    axis = torch.arange(side, dtype=torch.float64)
    places = torch.cartesian_prod(axis, axis)
    query = places[100 * side + 100]
    squared = (places - query).square().sum(-1)
    p = (-squared / 2).softmax(0)  # looks about one patch far
    exact = (p * squared).sum()
    values = torch.cat([places, places.square().sum(-1, keepdim=True)], -1)
    o = (p @ values).bfloat16().double()
    by_attention = query.square().sum() - 2 * (query * o[:2]).sum() + o[2]
    assert 1.9 < exact < 2.1 and abs(by_attention - exact) > 20


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("kind", GRIDS)
@by_dtype
def test_statistics(dtype, kind, guarded_outputs):
    grid, first, after = GRIDS[kind]
    d = (32, 64, 80)[list(GRIDS).index(kind) % 3]
    q, k = q_and_k(1, first + grid[0] * grid[1] + after, 2, d, dtype)
    check_statistics(attention_statistics(q, k, grid, first), q, k, grid, first)


@pytest.mark.parametrize(("d", "h"), [(8, 3), (16, 1), (32, 2), (48, 2), (64, 1), (80, 2), (128, 1)])
def test_statistics_of_head_dimensions(d, h, guarded_outputs):
    for dtype in DTYPES:
        q, k = q_and_k(2 if d < 32 else 1, 36, h, d, dtype, seed=d)
        check_statistics(attention_statistics(q, k, (5, 7), 1, 0.3), q, k, (5, 7), 1, 0.3, frobenius=2.0)


@pytest.mark.parametrize(("R", "M"), [(1, 66), (3, 129), (17, 34), (64, 130), (70, 1)])
@by_dtype
def test_rows(dtype, R, M, guarded_outputs):
    d = {1: 80, 3: 64}.get(R, 32)
    q, k = q_and_k(1, R, 2, d, dtype, M)
    assert_parity(attention_rows(q, k), matrix(q, k), reference_maps.attention_rows(q, k), **LIMITS.get(dtype, {}))


@pytest.mark.parametrize(("N", "M", "R"), [(66, 67, 1), (33, 130, 5), (65, 31, 20), (9, 2, 3), (40, 1, 70)])
@by_dtype
def test_transposed(dtype, N, M, R, guarded_outputs):
    d = {1: 80, 5: 64}.get(R, 32)
    q, k = q_and_k(1, N, 2, d, dtype, M)
    x = randn(1, N, 2, R, seed=7)
    exact = torch.einsum("bhnm,bnhr->bmhr", matrix(q, k), x.double())
    eager = reference_maps.attention_transposed(q, k, x)
    assert_parity(attention_transposed(q, k, x), exact, eager, **LIMITS.get(dtype, {}))


def shipped(table):
    return [pytest.param(row.config, kind, id=f"{row.config.block_m}x{row.config.block_n}-{kind}")
            for row in table for kind in DTYPES if row.kind == "half" or kind == torch.float32]  # fmt: skip


@pytest.mark.parametrize(("config", "dtype"), shipped(configs_maps.ATTENTION_STATISTICS))
def test_configurations_of_statistics(config, dtype, guarded_outputs):
    for grid in ((2, config.block_n), (3, config.block_n // 2 + 1)):
        q, k = q_and_k(1, 1 + grid[0] * grid[1], 1, 32, dtype)
        found = statistics_kernel._run(q, k, grid, 1, 0.2, config)
        check_statistics(found, q, k, grid, 1, 0.2)


@pytest.mark.parametrize(("config", "dtype"), shipped(configs_maps.ATTENTION_ROWS))
def test_configurations_of_rows(config, dtype, guarded_outputs):
    for M in (config.block_n, 2 * config.block_n + 1):
        q, k = q_and_k(1, config.block_m + 1, 1, 32, dtype, M)
        exact, eager = matrix(q, k, 0.2), reference_maps.attention_rows(q, k, 0.2)
        assert_parity(rows_kernel._run(q, k, 0.2, config), exact, eager, **LIMITS.get(dtype, {}))


@pytest.mark.parametrize(("config", "dtype"), shipped(configs_maps.ATTENTION_TRANSPOSED))
def test_configurations_of_transposed(config, dtype, guarded_outputs):
    for N in (config.block_m, 2 * config.block_m + 1):
        q, k = q_and_k(1, N, 1, 32, dtype, config.block_n + 1)
        x = randn(1, N, 1, 17, seed=3)
        exact = torch.einsum("bhnm,bnhr->bmhr", matrix(q, k, 0.2), x.double())
        found = transposed_kernel._run(q, k, x, 0.2, config)
        assert_parity(found, exact, reference_maps.attention_transposed(q, k, x, 0.2), **LIMITS.get(dtype, {}))


@triton.jit
def _places_kernel(Y, X, grid_w, per_w, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    y, x = statistics_kernel._place(i.to(tl.float32), grid_w, per_w)
    tl.store(Y + i, y)
    tl.store(X + i, x)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 97, 128, 1000, 1023, 2**20 - 1])
def test_places_of_all_patches_are_exact(width):
    size = statistics_kernel.MAX_PATCHES
    y, x = torch.empty(2, size, device=DEVICE).unbind(0)
    _places_kernel[(1,)](y, x, width, 1 / width, size)
    i = torch.arange(size, device=DEVICE)
    assert torch.equal(y.long(), i // width) and torch.equal(x.long(), i % width)


def test_rows_sum_to_one_and_are_what_attention_weighs_by():
    q, k = q_and_k(1, 5, 2, 32, M=67)
    v = randn(1, 67, 2, 32, seed=9)
    p = attention_rows(q, k)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]), rtol=1e-6, atol=0)
    o = torch.einsum("bhnm,bmhd->bnhd", p, v).flatten(2)
    torch.testing.assert_close(o, cross_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_one_column_for_all_heads_may_be_expanded():
    q, k = q_and_k(2, 19, 3, 8)
    x = randn(2, 19, 1, 2, seed=4).expand(-1, -1, 3, -1)
    assert_bitwise_equal(attention_transposed(q, k, x), attention_transposed(q, k, x.contiguous()))
    turned = randn(2, 19, 2, 3, seed=4).transpose(2, 3)
    assert_bitwise_equal(attention_transposed(q, k, turned), attention_transposed(q, k, turned.contiguous()))


def test_images_and_heads_are_independent():
    q, k = q_and_k(2, 36, 3, 8)
    x = randn(2, 36, 3, 2, seed=4)
    functions = {
        "statistics": (lambda q, k, x: attention_statistics(q, k, (5, 7), 1), 1, 2),
        "rows": (lambda q, k, x: attention_rows(q, k), 0, 1),
        "transposed": (attention_transposed, 0, 2),
    }
    for name, (function, image, head) in functions.items():
        both = function(q, k, x)
        assert_bitwise_equal(function(q[1:], k[1:], x[1:]), both.narrow(image, 1, 1), name)
        one = function(q[:, :, 1:2], k[:, :, 1:2], x[:, :, 1:2])
        assert_bitwise_equal(one, both.narrow(head, 1, 1), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_over_patches_where_all_attention_is_elsewhere(dtype):
    """CLS takes all but e^-200: more than float32 can hold beside it."""
    q, k = (t.clone() for t in q_and_k(1, 36, 1, 16, dtype))
    q[..., 0], k[..., 0] = 4, 0
    k[:, 0], k[:, 0, :, 0] = 0, 200
    found = attention_statistics(q, k, (5, 7), 1)
    assert (found[1] == 1).all() and found[4, ..., 1:].min() > 0.5
    check_statistics(found, q, k, (5, 7), 1)


@pytest.mark.parametrize("offset", [0, 300, -300])
def test_entropy_of_attention_to_one_key_is_small_and_right(offset):
    """It does not drown in the size of the scores."""
    N = 24
    k = torch.cat([torch.eye(N), torch.ones(N, 8)], 1)[None, :, None].to(DEVICE)
    q = torch.cat([12 * torch.eye(N), torch.full((N, 8), offset / 8)], 1)[None, :, None].to(DEVICE)
    found = attention_statistics(q, k, (4, 6), 0, 1.0)[0]
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), written_out(q, k, (4, 6), 0, 1.0)[0], rtol=3e-5, atol=1e-7)


def test_equal_scores_give_the_middle():
    q = torch.zeros(1, 36, 1, 16, device=DEVICE)
    entropy, extra, y, x, *_ = attention_statistics(q, q, (5, 7), 1)
    for found, want in ((entropy, math.log(36)), (extra, 1 / 36), (y, 2.0), (x, 3.0)):
        torch.testing.assert_close(found, torch.full_like(found, want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", ["query", "key"])
def test_nan_contract(part):
    """NaN in a query makes its numbers NaN, in a key those of the head."""
    q, k = (t.clone() for t in q_and_k(1, 40, 2, 16))
    (q if part == "query" else k)[0, 7, 1, 3] = math.nan
    x = randn(1, 40, 2, 1, seed=2)
    bad = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    bad[1, 7 if part == "query" else slice(None)] = True
    found = attention_statistics(q, k, (5, 7), 1)[:, 0]
    assert_bitwise_equal(found[:4].isnan(), bad.expand(4, 2, 40))
    places = bad.clone()
    places[:, [0, *range(36, 40)]] = False  # no place, no distance
    assert_bitwise_equal(found[4:].isnan(), places.expand(2, 2, 40))
    assert_bitwise_equal(attention_rows(q, k)[0].isnan().any(-1), bad)
    spoiled = attention_transposed(q, k, x)[0, :, :, 0].isnan()
    assert spoiled[:, 1].all() and not spoiled[:, 0].any()


def test_nan_beyond_the_tokens_stays_there():
    """What lies behind the last key, and between heads of 48 columns, is not theirs."""
    wide = torch.full((1, 80, 2, 64), math.nan, device=DEVICE)
    q, k = randn(1, 36, 2, 48), randn(1, 36, 2, 48, seed=1)
    placed = []
    for t in (q, k):
        held = wide.clone()
        held[:, :36, :, :48] = t
        placed.append(held[:, :36, :, :48])
    x = randn(1, 36, 2, 2, seed=2)
    assert_bitwise_equal(attention_statistics(*placed, (5, 7), 1), attention_statistics(q, k, (5, 7), 1))
    assert_bitwise_equal(attention_rows(*placed), attention_rows(q, k))
    assert_bitwise_equal(attention_transposed(*placed, x), attention_transposed(q, k, x))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def of_4097_tokens(rows, statistics, transposed):
    """Calls all three; the most elements that anything had."""
    q, k = q_and_k(1, 4097, 1, 8)
    x = torch.zeros(1, 4097, 1, 2, device=DEVICE)
    with Largest() as largest:
        rows(q[:, :64], k, 0.3)
        statistics(q, k, (64, 64), 1, 0.3)
        transposed(q, k, x, 0.3)
    return largest.numel


def test_no_matrix_in_the_definitions():
    names = ("attention_rows", "attention_statistics", "attention_transposed")
    largest = of_4097_tokens(*(getattr(reference_maps, name) for name in names))
    assert 64 * 4097 < largest <= reference_maps.BLOCK < 4097**2


def test_no_matrix_beside_the_kernels():
    """They are recorded, not run."""
    with launch.recorded("sm_90") as launches:
        largest = of_4097_tokens(rows_kernel._attention_rows_kernel, statistics_kernel._attention_statistics_kernel,
                                 transposed_kernel._attention_transposed_kernel)  # fmt: skip
    names = [item.plan.kernel.fn.__name__ for item in launches]
    own = [f"_attention_{name}_fwd_kernel" for name in ("rows", "statistics", "transposed")]
    assert names == ["_attention_fwd_kernel", *own[:2], "_attention_fwd_kernel", own[2]]
    assert largest == 64 * 4097


# ---------------------------------------------------------------------------------------------------------------------
# Errors and gradients


def zeros(N=36, h=2, d=8, **kwargs):
    return torch.zeros(1, N, h, d, device=kwargs.pop("device", DEVICE), **kwargs)


BAD_CALLS = [
    (lambda: attention_rows(zeros(), zeros(d=16)), ValueError, "q must be"),
    (lambda: attention_rows(zeros(), zeros(N=0)), ValueError, "no keys"),
    (lambda: attention_rows(zeros().double(), zeros().double()), KernelError, "q must be one of"),
    (lambda: attention_rows(zeros(d=136), zeros(d=136)), KernelError, "up to 128, got 136"),
    (lambda: attention_rows(zeros(), zeros(device="meta")), KernelError, "one device"),
    (lambda: attention_statistics(zeros(), zeros(), (6, 6), 1), ValueError, "6 x 6 patches .* not within 36 tokens"),
    (lambda: attention_statistics(zeros(), zeros(), (6, 6), -1), ValueError, "from token -1 on"),
    (lambda: attention_statistics(zeros(), zeros(), (0, 6), 0), ValueError, "each at least 1"),
    (lambda: attention_statistics(zeros(), zeros(N=5), (1, 5), 0), ValueError, "same tokens, got 36 and 5"),
    (lambda: attention_transposed(zeros(), zeros(), zeros(N=5)), ValueError, "x must be .B, N, h, R."),
    (lambda: attention_transposed(zeros(), zeros(), zeros(d=0)), ValueError, "R at least 1"),
    (lambda: attention_transposed(zeros(), zeros(), zeros().half()), KernelError, "x must be one of float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_many_patches():
    q = zeros(N=1).expand(1, 2**20 + 1, 2, 8)
    message = "1 x 1048577 patches are more than 1048576; use impl="
    with launch.recorded("sm_90"), pytest.raises(KernelError, match=message):
        statistics_kernel._attention_statistics_kernel(q, q, (1, 2**20 + 1), 0, 1.0)


def test_rows_of_many_heads_and_images_stay_on_the_first_grid_axis():
    with launch.recorded("sm_90") as launches:
        attention_rows(torch.zeros(65_536, 1, 1, 8), torch.zeros(65_536, 1, 1, 8))
    assert [item.plan.grid[1:] for item in launches] == [(1, 1)] * 2
    assert launches[1].plan.grid[0] == 65_536


def test_scale_by_default_is_that_of_the_head():
    q, k = q_and_k(1, 36, 2, 8)
    x = randn(1, 36, 2, 1, seed=2)
    for default, given in (
        (attention_rows(q, k), attention_rows(q, k, 8**-0.5)),
        (attention_statistics(q, k, (5, 7), 1), attention_statistics(q, k, (5, 7), 1, 8**-0.5)),
        (attention_transposed(q, k, x), attention_transposed(q, k, x, 8**-0.5)),
    ):
        assert_bitwise_equal(default, given)


def test_log_sum_exp_for_others_is_that_of_attention():
    qkv = randn(1, 66, 3 * 16)
    q, k, _ = qkv.view(1, 66, 3, 1, 16).unbind(2)
    found = rows_kernel.log_sum_exp(q, k, 0.25)
    assert_bitwise_equal(found[..., :66], attention(qkv, 1, return_lse=True)[1])
    assert (found[..., 66:] == math.inf).all()


@pytest.mark.parametrize("config", [AttentionConfig(16, 16, 4, 1), AttentionConfig(32, 64, 4, 2)], ids=str)
def test_tiles_do_not_matter(config):
    q, k = q_and_k(1, 71, 1, 16)
    x = randn(1, 71, 1, 3, seed=2)
    for ours, usual in (
        (rows_kernel._run(q, k, 0.25, config), attention_rows(q, k)),
        (statistics_kernel._run(q, k, (5, 14), 1, 0.25, config), attention_statistics(q, k, (5, 14), 1)),
        (transposed_kernel._run(q, k, x, 0.25, config), attention_transposed(q, k, x)),
    ):
        torch.testing.assert_close(ours, usual, rtol=2e-5, atol=2e-6)
