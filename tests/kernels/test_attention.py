"""The attention kernel: numbers, memory, limits, gradients. What all operators share is in test_operators.py."""

import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter.kernels import attention as kernel
from segmenter.kernels import configs, launch, reference
from segmenter.kernels.attention import attention, cross_attention
from segmenter.kernels.launch import KernelError
from segmenter.kernels.reference import explicit_cross_attention as explicit_cross
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FROBENIUS = {torch.float32: 1.5, torch.float16: 0.65, torch.bfloat16: 0.65}  # eager rounds scores and probabilities
LENGTHS = [1, 2, 3, 17, 63, 64, 65, 66, 127, 128, 129, 130, 197, 257]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(o, qkv, h, **kwargs):
    exact, eager = reference.explicit_attention(qkv.double(), h), reference.explicit_attention(qkv, h)
    assert_parity(o, exact, eager, frobenius=FROBENIUS[qkv.dtype], **kwargs)


def check_cross(o, q, k, v, scale, **kwargs):
    exact, eager = (
        explicit_cross(q.double(), k.double(), v.double(), scale),
        explicit_cross(q, k, v, scale),
    )
    assert_parity(o, exact, eager, frobenius=FROBENIUS[q.dtype], **kwargs)


def as_heads(qkv, h):
    """(B, N, 3*h*d) -> q, k, v, each (B, N, h, d)."""
    return qkv.view(*qkv.shape[:2], 3, h, -1).unbind(2)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("N", LENGTHS)
@by_dtype
def test_parity(dtype, N, guarded_outputs):
    B, h = (2, 2) if N < 64 else (1, 2) if N < 100 else (1, 1)
    qkv = randn(B, N, 3 * h * 64, dtype=dtype, seed=N)
    check(attention(qkv, h), qkv, h)


@pytest.mark.parametrize(("d", "h"), [(8, 3), (16, 1), (32, 2), (48, 2), (64, 1), (80, 2), (128, 3)])
@by_dtype
def test_head_dimensions(dtype, d, h, guarded_outputs):
    qkv = randn(1, 67, 3 * h * d, dtype=dtype, seed=d)
    check(attention(qkv, h), qkv, h)


@pytest.mark.parametrize(("N", "M"), [(1, 130), (130, 1), (65, 66), (3, 257), (100, 64)])
@by_dtype
def test_cross_attention(dtype, N, M, guarded_outputs):
    q, k, v = (randn(1, n, 2, 32, dtype=dtype, seed=i) for i, n in enumerate((N, M, M)))
    check_cross(cross_attention(q, k, v), q, k, v, 32**-0.5)
    check_cross(cross_attention(q, k, v, scale=0.3), q, k, v, 0.3)


def shipped_configs():
    """Every configuration that some call chooses, with a head_dim that chooses it."""
    found = {}
    for architecture, dtype, head_pad, n_keys, precision in itertools.product(
        (*configs.ARCHITECTURES, "unknown"), DTYPES, (16, 32, 64, 128), (100, 512, 513, 4097), ("ieee", "tf32")
    ):
        config = configs.attention(
            architecture, torch.empty(0, dtype=dtype).element_size(), head_pad, n_keys, precision
        )
        found.setdefault((config, dtype), head_pad)
    return [pytest.param(c, t, d, id=f"{t}-{c.block_m}x{c.block_n}-d{d}-{c.descriptors}".removeprefix("torch."))
            for (c, t), d in found.items()]  # fmt: skip


@pytest.mark.parametrize(("config", "dtype", "d"), shipped_configs())
def test_shipped_configurations(config, dtype, d, guarded_outputs):
    d, h = max(d, 32), 2
    for N in {config.block_n, config.block_n + 1, config.block_n + 2, config.block_n + 3, 2 * config.block_n + 1}:
        qkv = randn(1, N, 3 * h * d, dtype=dtype, seed=N)
        x = qkv.view(1, N, 3 * h, d)
        o, lse = kernel._run(x, x, x, (h, 0, h, 2 * h), d**-0.5, True, config=config)
        check(o, qkv, h, context=f"N={N}")
        exact = reference.attention_lse(qkv.double(), h)[1]
        torch.testing.assert_close(lse[..., :N].double(), exact, rtol=2e-6, atol=2e-6)


@by_dtype
def test_log_sum_exp(dtype, guarded_outputs):
    for N, padding in ((66, 128), (130, 256)) if dtype == torch.bfloat16 else ((66, 128),):
        qkv = randn(2, N, 3 * 16, dtype=dtype) if N > 128 else randn(2, N, 3 * 2 * 16, dtype=dtype)
        h = qkv.shape[-1] // 48
        o, lse = attention(qkv, h, return_lse=True)
        assert lse.shape == (2, h, N) and lse.dtype == torch.float32
        exact = reference.attention_lse(qkv.double(), h)[1]
        torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-6)
        padded = torch.ops.segmenter.attention_lse(qkv, h)[1]
        assert padded.shape == (2, h, padding)
        assert_bitwise_equal(padded[..., :N], lse)
        assert (padded[..., N:] == math.inf).all()
        check(o, qkv, h)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 200.0])
@by_dtype
def test_magnitudes(dtype, magnitude):
    qkv = (randn(1, 67, 3 * 2 * 32) * magnitude).to(dtype)
    o = attention(qkv, 2)
    if dtype != torch.float32 or magnitude < 1:
        return check(o, qkv, 2)
    # Scores of thousands leave the exponent few bits: whether eager or we are nearer is chance. An absolute bound.
    exact, lse = reference.attention_lse(qkv.double(), 2)
    assert (o - exact).norm() <= 0.05 * torch.finfo(dtype).eps * lse.abs().max() * exact.norm()


@pytest.mark.parametrize("N", [64, 65, 66, 70])
def test_all_scores_far_below_zero(N):
    """The running maximum must start at -inf: with -1e4 every probability would vanish."""
    qkv = torch.cat([torch.full((1, N, 32), 30.0), randn(1, N, 32) - 300, randn(1, N, 32, seed=1)], -1).to(DEVICE)
    assert reference.attention_lse(qkv.double(), 1)[1].max() < -1e4
    for dtype in (torch.float32, torch.bfloat16):
        check(attention(qkv.to(dtype), 1), qkv.to(dtype), 1)


def test_rows_of_very_different_scale():
    for dtype in DTYPES:
        qkv = randn(1, 97, 3 * 32)
        qkv[:, ::2, :32] *= 100
        qkv[:, 1::3, 32:64] *= 10
        check(attention(qkv.to(dtype), 1), qkv.to(dtype), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Results known exactly


@pytest.mark.parametrize("N", [16, 64, 65, 66, 100, 128])
@by_dtype
def test_attention_to_one_key_copies_its_value(dtype, N):
    """Each query sees one key only, in a random order: a dropped, doubled or exchanged key shows in every bit."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(N)).to(DEVICE)
    one_hot = 64.0 * torch.eye(N, 128, dtype=dtype, device=DEVICE)
    v = randn(1, N, 128, dtype=dtype)
    qkv = torch.cat([one_hot[order][None], one_hot[None], v], -1)
    assert_bitwise_equal(attention(qkv, 1), v[:, order])


@pytest.mark.parametrize("N", [1, 2, 64, 128])
@by_dtype
def test_equal_scores_give_the_mean(dtype, N):
    v = randn(1, N, 2 * 16).mul(4).round()
    qkv = torch.cat([torch.zeros(1, N, 32, device=DEVICE), randn(1, N, 32, seed=1).round(), v], -1).to(dtype)
    o, lse = attention(qkv, 2, return_lse=True)
    assert_bitwise_equal(o, v.double().mean(1, keepdim=True).expand(1, N, 32).to(dtype))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(N)), rtol=1e-6, atol=0)


@by_dtype
def test_values_of_one_give_one(dtype):
    qkv = randn(2, 97, 3 * 2 * 16, dtype=dtype)
    qkv[..., 64:] = 1
    o = attention(qkv, 2)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=4e-7 if dtype == torch.float32 else 2**-8)


def test_order_of_keys_does_not_matter():
    q, k, v = (randn(2, n, 2, 16, seed=i) for i, n in enumerate((33, 97, 97)))
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    o = cross_attention(q, k, v)
    torch.testing.assert_close(cross_attention(q, k[:, order], v[:, order]), o, rtol=1e-5, atol=1e-6)


@by_dtype
def test_images_and_heads_and_queries_are_independent(dtype):
    """Another image, head or query must change nothing."""
    qkv = randn(2, 34, 3 * 3 * 16, dtype=dtype)
    o = attention(qkv, 3)
    assert_bitwise_equal(o, attention(qkv, 3), "second run")
    assert_bitwise_equal(attention(qkv[1:], 3), o[1:], "one image")
    assert_bitwise_equal(attention(qkv.flip(0), 3), o.flip(0), "images in another order")
    heads = qkv.view(2, 34, 3, 3, 16)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    exchanged = attention(heads[:, :, :, order].reshape(2, 34, -1), 3)
    assert_bitwise_equal(exchanged.view(2, 34, 3, 16), o.view(2, 34, 3, 16)[:, :, order], "heads in another order")
    q, k, v = as_heads(qkv, 3)
    assert_bitwise_equal(cross_attention(q, k, v), o, "the same, separately")
    # Not bit for bit: a library's product depends a little on where in the tile a row is.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(cross_attention(q[:, 7:29], k, v), o[:, 7:29], rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("N", [65, 70])
def test_nan_contract(N, part):
    """NaN in a query poisons its row, in a key or value the head: where explicit softmax has it."""
    column = {"query": 3, "key": 32 + 16 + 3, "value": 64 + 5}[part]
    dtype = torch.float32 if N == 65 else torch.bfloat16
    for row in (0, 40, N - 1):
        qkv = randn(1, N, 3 * 2 * 16, dtype=dtype)
        qkv[0, row, column] = math.nan
        o = attention(qkv, 2)
        assert_bitwise_equal(o.isnan(), reference.explicit_attention(qkv, 2).isnan(), f"{dtype} row {row}")
        bad = o.view(N, 2, 16).isnan()
        if part == "query":
            assert bad[row, 0].all() and bad.sum() == 16
        elif part == "key":
            assert bad[:, 1].all() and bad.sum() == N * 16
        else:
            assert bad[:, 0, 5].all() and bad.sum() == N


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_layouts_guards_and_untouched_inputs(dtype, layout, guarded_outputs):
    N = 34 if dtype == torch.float32 else 67  # one or two single rows, or a masked tile, after the full one
    qkv = LAYOUTS[layout](randn(2, N, 3 * 2 * 16, dtype=dtype))
    dense = qkv.contiguous()
    x = guarded(qkv)
    o = attention(x, 2)
    assert o.is_contiguous()
    assert_bitwise_equal(x, qkv, "inputs are never written")
    check_guards(x)
    assert_bitwise_equal(o, attention(dense, 2))
    check(o, dense, 2)


@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_layouts_of_separate_tensors(first, guarded_outputs):
    names = [list(LAYOUTS)[(first + step) % len(LAYOUTS)] for step in (0, 1, 3)]
    h = 1 if "huge_stride" in names else 2  # that layout needs a dimension of size 1
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [randn(2, n, h, 16, dtype=dtype, seed=i) for i, n in enumerate((19, 67, 67))]
        placed = [LAYOUTS[name](t) for name, t in zip(names, tensors, strict=True)]
        inputs = [guarded(t) for t in placed]
        o = cross_attention(*inputs)
        for x, t in zip(inputs, placed, strict=True):
            assert_bitwise_equal(x, t)
            check_guards(x)
        dense = [t.contiguous() for t in placed]
        assert_bitwise_equal(o, cross_attention(*dense), str(names))
        check_cross(o, *dense, 16**-0.5, context=str(names))


def test_descriptors_and_pointers_agree():
    for dtype, d in ((torch.float16, 32), (torch.bfloat16, 80)):
        x = randn(1, 67, 6, d, dtype=dtype)
        results = [
            kernel._run(x, x, x, (2, 0, 2, 4), 0.2, True, configs.AttentionConfig(64, 64, 4, 2, descriptors))
            for descriptors in (True, False)
        ]
        for ours, theirs in zip(*results, strict=True):
            assert_bitwise_equal(ours, theirs)


def test_strides_of_sizes_of_one_may_be_anything():
    x = randn(1, 1, 3 * 16, dtype=torch.float16)
    for stride in (0, 3331333, 2**33, 2**40):
        assert_bitwise_equal(attention(x.as_strided(x.shape, (stride, stride, 1)), 1), x[..., 32:])


@pytest.mark.skipif(DEVICE == "cuda", reason="lazily committed memory is the CPU's; tests/gpu has the real sizes")
def test_offsets_beyond_32_bits():
    """In a process of its own: with 32-bit offsets it reads far before the tensor and is killed."""
    command = [sys.executable, "-m", "tests.support.huge_offsets"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr[-2000:])
    assert result.stdout.split() == ["batches", "output", "batches", "output", "rows"]


@pytest.mark.parametrize("B", [65_535, 65_536, 131_072])
def test_large_batches_stay_on_the_first_grid_axis(B):
    """The second and third end at 65,535."""
    with launch.recorded("sm_90") as launches:
        attention(torch.zeros(B, 1, 24), 1)
    assert [item.plan.grid for item in launches] == [(B, 1, 1)]


def test_empty():
    assert attention(torch.zeros(0, 5, 48, device=DEVICE), 2).shape == (0, 5, 16)
    o, lse = attention(torch.zeros(2, 0, 48, device=DEVICE), 2, return_lse=True)
    assert o.shape == (2, 0, 16) and lse.shape == (2, 2, 0)
    k = torch.zeros(2, 3, 2, 8, device=DEVICE)
    assert cross_attention(k[:, :0], k, k).shape == (2, 0, 16)


def heads(B=1, N=4, h=2, d=8, **kwargs):
    return torch.zeros(B, N, h, d, device=kwargs.pop("device", DEVICE), **kwargs)


BAD_CALLS = [
    (lambda: attention(randn(1, 4, 48).double(), 2), KernelError, "qkv must be one of bfloat16, float16, float32, got"),
    (lambda: attention(randn(1, 4, 3 * 136), 1), KernelError, "multiple of 8 up to 128, got 136; use impl=.eager"),
    (lambda: attention(randn(1, 4, 3 * 12), 1), KernelError, "multiple of 8 up to 128, got 12"),
    (lambda: attention(randn(1, 4, 50), 2), ValueError, "50 columns, which is no multiple of 3 . n_heads = 6"),
    (lambda: attention(randn(1, 4, 48), 0), ValueError, "no multiple of 3"),
    (lambda: attention(randn(4, 48), 2), ValueError, r"must be .B, N, 3.h.d., got .4, 48."),
    (lambda: attention(torch.zeros(1, 4, 48, device="meta"), 2), KernelError, "run on CUDA tensors .*, got meta"),
    (lambda: cross_attention(heads(), heads(), heads(device="meta")), KernelError, "one device"),
    (lambda: cross_attention(heads(), heads(), heads(dtype=torch.float16)), KernelError, "v must be one of float32"),
    (lambda: cross_attention(heads(), heads(N=0), heads(N=0)), ValueError, "no keys"),
    (lambda: cross_attention(heads(), heads(), heads(N=5)), ValueError, "q must be"),
    (lambda: cross_attention(heads(), heads(h=1), heads(h=1)), ValueError, "q must be"),
    (lambda: cross_attention(heads(d=136), heads(d=136), heads(d=136)), KernelError, "up to 128, got 136"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def gradients(function, inputs, upstream):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for o, u in zip(outputs, upstream, strict=True)])


@by_dtype
def test_gradient(dtype):
    qkv, upstream = randn(2, 67, 3 * 2 * 16, dtype=dtype), randn(2, 67, 32, dtype=dtype, seed=1)
    explicit = functools.partial(reference.explicit_attention, n_heads=2)
    (ours,) = gradients(lambda t: attention(t, 2), [qkv], [upstream])
    (exact,) = gradients(explicit, [qkv.double()], [upstream])
    (eager,) = gradients(explicit, [qkv], [upstream])
    assert_parity(ours, exact, eager)


def test_gradient_of_log_sum_exp():
    qkv = randn(2, 35, 3 * 2 * 16)
    upstream = [randn(2, 35, 32, seed=1), randn(2, 2, 35, seed=2)]
    (ours,) = gradients(lambda t: attention(t, 2, return_lse=True), [qkv], upstream)
    (exact,) = gradients(lambda t: reference.attention_lse(t, 2), [qkv.double()], upstream)
    (eager,) = gradients(lambda t: reference.attention_lse(t, 2), [qkv], upstream)
    # Eager's error is chance: its libraries choose the order of sums by the CPU.
    assert_parity(ours, exact, eager, frobenius=2.0)


@pytest.mark.parametrize("needed", [s for s in itertools.product([0, 1], repeat=3) if any(s)], ids=str)
def test_each_subset_of_gradients(needed):
    inputs = [randn(2, n, 2, 16, seed=i) for i, n in enumerate((5, 9, 9))]
    upstream = randn(2, 5, 32, seed=3)
    exact = gradients(lambda q, k, v: explicit_cross(q, k, v, 0.3), [t.double() for t in inputs], [upstream])
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(inputs, needed, strict=True)]
    cross_attention(*leaves, scale=0.3).backward(upstream)
    for leaf, n, want in zip(leaves, needed, exact, strict=True):
        if n:
            torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-4, atol=1e-6)
        else:
            assert leaf.grad is None


def test_backward_twice_is_equal_and_touches_nothing():
    qkv = randn(2, 9, 3 * 2 * 16).requires_grad_()
    before = qkv.detach().clone()
    o = attention(qkv, 2)
    upstream = torch.ones((), device=DEVICE).expand_as(o)  # stride 0, as from sum()
    grads = [torch.autograd.grad(o, qkv, upstream, retain_graph=True)[0] for _ in range(2)]
    assert_bitwise_equal(*grads)
    assert_bitwise_equal(grads[0], torch.autograd.grad(o, qkv, torch.ones_like(o))[0])
    assert_bitwise_equal(qkv.detach(), before)
    assert grads[0].abs().max() > 0.01


def test_second_derivative():
    qkv, upstream, direction = randn(1, 7, 3 * 2 * 8), randn(1, 7, 16, seed=1), randn(1, 7, 48, seed=2)

    def second(function, dtype):
        x, u = (t.to(dtype).requires_grad_() for t in (qkv, upstream))
        (first,) = torch.autograd.grad(function(x), x, u, create_graph=True)
        return torch.autograd.grad(first, [x, u], direction.to(dtype))

    exact = second(lambda x: reference.explicit_attention(x, 2), torch.float64)
    for ours, want in zip(second(lambda x: attention(x, 2), torch.float32), exact, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("descriptors", [True, False])
def test_nan_in_the_next_head_stays_there(descriptors):
    """A head of 48 columns is padded to 64: what lies there belongs to the next head, and 0 times NaN is NaN."""
    h, d, N = 2, 48, 40
    x = torch.randn(1, N, 3 * h, d, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    config = configs.AttentionConfig(16, 16, 4, 2, descriptors)

    def run(x):
        return kernel._run(x, x, x, (h, 0, h, 2 * h), d**-0.5, False, config)[0][..., :d]

    want = run(x)
    x[:, 5, h + 1] = math.nan  # a key of the second head
    x[:, 7, 2 * h + 1] = math.nan  # and a value
    assert_bitwise_equal(run(x), want)
