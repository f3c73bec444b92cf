"""Rotary positions: numbers, both conventions, extra tokens, the libraries' formulas. What all operators share is in
test_operators.py."""

import pytest
import torch

from segmenter.kernels import configs, launch
from segmenter.kernels import rotate as kernel
from segmenter.kernels.attention import cross_attention
from segmenter.kernels.reference_rotary import rotate as definition
from segmenter.kernels.rotate import rotate
from tests.support.huge_offsets import FAR, far_apart
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, guarded, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both_conventions = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def inputs(B=2, N=37, h=3, d=16, n=35, dtype=torch.float32, tables=torch.float32, lead=()):
    """Tables without any structure: both columns of a pair have numbers of their own."""
    cos, sin = (randn(*lead, n, d, seed=i).to(tables) for i in (1, 2))
    return randn(B, N, h, d, dtype=dtype), cos, sin


def check(actual, args, *flags, **options):
    exact = definition(*(t.double() for t in args), *flags)
    assert_parity(actual, exact, definition(*args, *flags), **options)


def by_matrices(x, cos, sin, interleaved=False):
    """One matrix for each token, written out: (B, N, h, d) float64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    d, first = x.shape[-1], x.shape[1] - cos.shape[0]
    y = x.clone()
    for token in range(cos.shape[0]):
        matrix = torch.diag(cos[token])
        for i in range(d // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + d // 2)
            matrix[a, b], matrix[b, a] = -sin[token, a], sin[token, b]
        y[:, first + token] = x[:, first + token] @ matrix.T
    return y


@both_conventions
def test_the_definition_is_one_matrix_a_token(interleaved):
    x, cos, sin = inputs(N=7, n=4, d=6)
    want = by_matrices(x, cos, sin, interleaved)
    torch.testing.assert_close(definition(x.double(), cos.double(), sin.double(), interleaved), want)
    y = definition(want, cos.double(), sin.double(), interleaved, True)  # the transposed matrices, by an inner product
    left = (y * x.double()).sum()
    torch.testing.assert_close(left, (want * want).sum())
    assert_bitwise_equal(definition(x, cos, sin, interleaved)[:, :3], x[:, :3])


@both_conventions
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [2, 6, 24, 64, 130])
def test_parity(d, dtype, transposed, interleaved, guarded_outputs):
    """Of heads that fill a tile and that do not, more of them than a program takes, and a ragged number of tokens."""
    N = 37 if d < 64 else 19
    args = tuple(guarded(t) for t in inputs(B=1 + (d == 6), N=N, h=5, d=d, n=N - 3, dtype=dtype))
    check(rotate(*args, interleaved, transposed), args, interleaved, transposed)


@both_conventions
@pytest.mark.parametrize("n", [0, 1, 36, 37])
def test_extra_tokens_stay_to_the_last_bit(n, interleaved):
    """Whatever they hold: an infinity times a sine of zero would be NaN."""
    x, cos, sin = inputs(n=n)
    first = 37 - n
    if first:
        x[:, 0, :, 3], x[:, 0, :, 5], x[:, 0, :, 11] = torch.inf, torch.nan, -0.0
    y = rotate(x, cos, sin, interleaved)
    torch.testing.assert_close(y[:, :first], x[:, :first], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y[:, :first].signbit(), x[:, :first].signbit())
    check(y, (x, cos, sin), interleaved)


@both_conventions
@pytest.mark.parametrize("lead", [(1, 3), (2, 1), (2, 3), (1, 6), (2, 2)], ids=str)
def test_tables_by_image_and_head(lead, interleaved, guarded_outputs):
    """Head i takes table i mod t, as the keys behind the queries do."""
    args = tuple(guarded(t) for t in inputs(h=6, lead=lead))
    y = rotate(*args, interleaved)
    check(y, args, interleaved)
    x, cos, sin = args
    for b, head in ((0, 5), (1, 2)):
        tables = (t[b % lead[0], head % lead[1]] for t in (cos, sin))
        assert_bitwise_equal(
            y[b : b + 1, :, head : head + 1], rotate(x[b : b + 1, :, head : head + 1], *tables, interleaved)
        )


@pytest.mark.parametrize("tables", DTYPES, ids=str)
def test_types_of_tables(tables):
    """Computed in float32, rounded once, to the type of x."""
    for dtype in DTYPES:
        x, cos, sin = inputs(dtype=dtype, tables=tables)
        y = rotate(x, cos, sin)
        assert y.dtype == dtype
        assert_bitwise_equal(y, rotate(x.float(), cos.float(), sin.float()).to(dtype))


@both_conventions
def test_packed_queries_and_keys_are_read_where_they_are(interleaved):
    """In front of the values, and tables that are two halves of one tensor, with no copy of either."""
    B, N, H, d = 2, 21, 3, 16
    qkv, table = randn(B, N, 3 * H * d), randn(N - 1, 2 * d, seed=1)
    sin, cos = table.chunk(2, -1)
    qk, v = qkv.unflatten(2, (3 * H, d)).split((2 * H, H), 2)
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "call", lambda *args, **options: copies.append(args))
        both = rotate(qk, cos, sin, interleaved)
    assert copies == []
    q, k = both.split(H, 2)
    want = [definition(t, cos, sin, interleaved) for t in qkv.unflatten(2, (3, H, d)).unbind(2)[:2]]
    torch.testing.assert_close(torch.cat([q, k], 2), torch.cat(want, 2))
    scores = (torch.einsum("bnhd,bmhd->bhnm", *want) * d**-0.5).softmax(-1)
    want = torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2)
    torch.testing.assert_close(cross_attention(q, k, v), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [32, 128, 4096])
def test_configurations(elements):
    """Fewer tokens and heads a program than there are, and more."""
    args = tuple(guarded(t) for t in inputs(h=5))
    for heads in (1, 2, 8):
        y = kernel._run(*args, True, False, configs.RotateConfig(elements, heads, 4))
        assert_bitwise_equal(y, rotate(*args, True))


@both_conventions
def test_gradients(interleaved):
    """Of x by the kernel, with the transposed matrices; of tables, too, by the definition; of gradients."""
    args = inputs(N=9, n=7)
    for needed in ((True, False, False), (True, True, True)):
        grads = []
        for function, dtype in ((rotate, torch.float32), (definition, torch.float64)):
            leaves = [t.to(dtype).requires_grad_(need) for t, need in zip(args, needed, strict=True)]
            upstream = randn(*args[0].shape, seed=5).to(dtype)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads.append(torch.autograd.grad(function(*leaves, interleaved), wanted, upstream))
        for ours, want in zip(*grads, strict=True):
            torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_x_is_one_launch(monkeypatch):
    x, cos, sin = inputs()
    y, ran, run = rotate(x.requires_grad_(), cos, sin), [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda plan, *tensors: ran.append(plan.kernel) or run(plan, *tensors))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert ran == [kernel._rotate_kernel]
    assert_bitwise_equal(grad, rotate(torch.ones_like(y), cos, sin, False, True))


def test_formulas_of_the_libraries():
    """As timm and transformers turn queries, with their own tables of a grid that is no square."""
    timm_rope = pytest.importorskip("timm.layers.pos_embed_sincos")
    x = randn(2, 2 + 15, 3, 16)
    by_head = x.transpose(1, 2)[:, :, 2:]
    for half in (True, False):
        embed = timm_rope.RotaryEmbeddingDinoV3(16, rotate_half=half).to(DEVICE).get_embed((3, 5))
        sin, cos = embed.chunk(2, -1)
        want = timm_rope.apply_rot_embed_cat(by_head, embed, half=half).transpose(1, 2)
        torch.testing.assert_close(rotate(x, cos, sin, interleaved=not half)[:, 2:], want)
        assert (rotate(x, cos, sin, interleaved=half)[:, 2:] - want).abs().max() > 0.1
    modeling = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    want, _ = modeling.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), want.transpose(1, 2))


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
def test_offsets_beyond_int32():
    """Images, tokens and heads 1.25 * 2**30 elements apart, one after the other. Only the pages that are used exist."""
    _, cos, sin = inputs(n=3, d=8)
    for strides in ((FAR, 8, 24, 1), (8, FAR, 24, 1), (8, 48, FAR, 1)):
        x = far_apart((3, 3, 3, 8), strides)
        x.copy_(randn(3, 3, 3, 8))
        assert_bitwise_equal(rotate(x, cos, sin), rotate(x.contiguous(), cos, sin))


def test_errors():
    x, cos, sin = inputs()
    with pytest.raises(ValueError, match=r"cos and sin both \(n, d\)"):
        rotate(x, cos, sin[1:])
    with pytest.raises(ValueError, match=r"cos and sin both \(n, d\) or \(b, t, n, d\), got \(2, 37, 48\)"):
        rotate(x.flatten(2), cos, sin)
    with pytest.raises(ValueError, match="heads have 16 columns and cos 8"):
        rotate(x, cos[:, :8], sin[:, :8])
    with pytest.raises(ValueError, match="heads have 3 columns and cos 3.* even"):
        rotate(x[..., :3], cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match="cos has 35 rows, more than the 30 tokens"):
        rotate(x[:, :30], cos, sin)
    for lead in ((3, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"for {lead[0]} images and {lead[1]} heads, x has 2 and 3"):
            rotate(x, cos.expand(*lead, 35, 16), sin.expand(*lead, 35, 16))
    with pytest.raises(launch.KernelError, match="cos must be one of"):
        rotate(x, cos.double(), sin.double())


def test_nothing_to_turn():
    for shape in ((0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)):
        assert rotate(randn(*shape), randn(0, 8), randn(0, 8)).shape == shape
