"""The gradient of attention by kernels: numbers, memory, what is kept. Second derivatives are in test_operators.py."""

import functools
import inspect
import itertools
import math

import pytest
import torch

from segmenter.kernels import attention_backward as kernel
from segmenter.kernels import configs, configs_backward, launch, reference
from segmenter.kernels.attention import attention, cross_attention
from segmenter.kernels.launch import KernelError
from segmenter.kernels.reference import explicit_cross_attention as explicit_cross
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 3, 64, 65, 127, 130, 257]
BACKWARD = {"_attention_delta_kernel": 0, "_attention_dkdv_kernel": 1, "_attention_dq_kernel": 2}

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def gradients(function, inputs, upstream):
    """Of all inputs, for gradients of the results that are left out where they are None."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    pairs = zip(outputs if isinstance(outputs, tuple) else (outputs,), upstream, strict=True)
    pairs = [(o, u.to(o.dtype)) for o, u in pairs if u is not None]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [u for _, u in pairs])


def assert_right(name, ours, exact, eager, where, lse=None):
    """The rule of parity, for one gradient.

    Norms are wider than by default where we keep less than eager: lse is one float32 number a row, and delta is made of
    the rounded result, which shows in half precision where few keys leave little to average. Of a single key nothing
    depends on the query, and eager says exactly 0.

    Args:
        lse: log-sum-exps of a size of 50 or more. In float32 the rounding of such scores is all there is to see, and
            eager, which keeps its probabilities, has the same ones forward and backward. An absolute bound.
    """
    if exact.isfinite().all() and not exact.any():
        assert ours.abs().max() <= 2e-5, f"{name} is {ours.abs().max()} and should be 0 {where}"
    elif lse is not None and ours.dtype == torch.float32:
        error, limit = (ours - exact).norm() / exact.norm(), 8 * torch.finfo(ours.dtype).eps * lse.abs().max()
        assert error <= limit, f"relative error of {name} {error:.2e} > {limit:.2e} {where}"
    else:
        limits = {"max_ratio": 2.0, "frobenius": 1.5 if ours.numel() < 1024 else 1.0}
        if ours.dtype == torch.float32:
            limits = {"max_ratio": 3.0, "frobenius": 6.0, "terms": 900}
        assert_parity(ours, exact, eager, **limits, context=f"{name} {where}")


def check(function, definition, inputs, upstream, lse=None, **where):
    """Every gradient by the rule of parity, each a tensor of its own; of packed qkv, each of its thirds."""
    ours = gradients(function, inputs, upstream)
    exact = gradients(definition, [t.double() for t in inputs], upstream)
    eager = gradients(definition, inputs, upstream)
    names, parts = ("dq", "dk", "dv"), 3 if len(inputs) == 1 else 1
    found = ([t for gradient in grads for t in gradient.chunk(parts, -1)] for grads in (ours, exact, eager))
    for name, o, x, e in zip(names, *found, strict=True):
        assert_right(name, o, x, e, where, lse)
    return ours


def check_packed(qkv, h, upstream, **kwargs):
    explicit = functools.partial(reference.explicit_attention, n_heads=h)
    return check(lambda x: attention(x, h), explicit, [qkv], [upstream], **kwargs)[0]


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels as they are launched."""
    names, run = [], launch.Plan.run

    def spy(plan, *tensors):
        names.append(plan.kernel.fn.__name__)
        return run(plan, *tensors)

    monkeypatch.setattr(launch.Plan, "run", spy)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What runs, and what is kept


def test_without_gradients_nothing_else_is_launched(launched):
    qkv = randn(1, 9, 3 * 2 * 8)
    with torch.no_grad():
        attention(qkv.requires_grad_(), 2)
    attention(qkv.detach(), 2)
    assert launched == ["_attention_fwd_kernel"] * 2
    with launch.recorded("sm_90") as launches, torch.no_grad():
        attention(qkv, 2)
    (forward,) = launches
    parameters = list(inspect.signature(forward.plan.kernel.fn).parameters)[len(forward.tensors) :]
    assert forward.plan.scalars[parameters.index("STORE_LSE")] is False


@pytest.mark.parametrize("needed", [s for s in itertools.product([0, 1], repeat=3) if any(s)], ids=str)
def test_each_subset_of_gradients(needed, launched, guarded_outputs):
    inputs = [randn(2, n, 2, 16, seed=i) for i, n in enumerate((5, 9, 9))]
    upstream = randn(2, 5, 32, seed=3)
    exact = gradients(functools.partial(explicit_cross, scale=0.3), [t.double() for t in inputs], [upstream])
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(inputs, needed, strict=True)]
    cross_attention(*leaves, scale=0.3).backward(upstream)
    for leaf, n, want in zip(leaves, needed, exact, strict=True):
        if n:
            torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-4, atol=1e-6)
        else:
            assert leaf.grad is None
    wanted = [True, bool(needed[1] or needed[2]), bool(needed[0])]
    assert launched == ["_attention_fwd_kernel", *(n for n, run in zip(BACKWARD, wanted, strict=True) if run)]


@pytest.mark.parametrize("name", ["attention", "cross_attention"])
def test_the_operators_themselves_have_the_gradient_too(name, launched):
    """Traced programs call them: nothing but the result is kept, so the log-sum-exp is computed again."""
    qkv, upstream = randn(1, 9, 3 * 2 * 8), randn(1, 9, 16, seed=1)
    args = (qkv,) if name == "attention" else qkv.view(1, 9, 3, 2, 8).unbind(2)
    last = 2 if name == "attention" else 8**-0.5
    public = {"attention": attention, "cross_attention": cross_attention}[name]
    ours = gradients(lambda *t: getattr(torch.ops.segmenter, name)(*t, last), args, [upstream])
    assert launched == ["_attention_fwd_kernel"] * 2 + list(BACKWARD)
    for a, b in zip(ours, gradients(lambda *t: public(*t, last), args, [upstream]), strict=True):
        assert_bitwise_equal(a, b)


def test_the_table_chooses_between_kernels_and_pytorch(launched, monkeypatch):
    """By architecture and number of keys. PyTorch has no gradient of the log-sum-exp, so with one it is ours."""
    rows = (configs.Row(configs.HOPPER, "half", "n >= 9", "sdpa", {}), *configs_backward.ATTENTION_BY)
    monkeypatch.setattr(configs_backward, "ATTENTION_BY", rows)
    forward = ["_attention_fwd_kernel"]
    for n, dtype, ran in ((9, torch.float16, []), (8, torch.float16, [*BACKWARD]), (9, torch.float32, [*BACKWARD])):
        launched.clear()
        check_packed(randn(1, n, 48, dtype=dtype), 2, randn(1, n, 16, dtype=dtype, seed=1))
        assert launched == forward + ran
        launched.clear()
        inputs = [randn(1, length, 2, 8, dtype=dtype, seed=i) for i, length in enumerate((3, n, n))]
        definition = functools.partial(explicit_cross, scale=8**-0.5)
        check(cross_attention, definition, inputs, [randn(1, 3, 16, dtype=dtype, seed=3)])
        assert launched == forward + ran
    launched.clear()
    upstream = randn(1, 9, 16, dtype=torch.float16, seed=1), randn(1, 2, 9, seed=2)
    gradients(lambda x: attention(x, 2, return_lse=True), [randn(1, 9, 48, dtype=torch.float16)], upstream)
    assert launched == forward + [*BACKWARD]


def test_all_rows_choose_kernels_until_it_is_measured():
    assert {row.config for row in configs_backward.ATTENTION_BY} == {"kernels"}


def test_what_is_kept():
    """qkv, the result and one float32 a row and head, in multiples of 128 rows."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        attention(randn(2, 130, 3 * 2 * 8, dtype=torch.float16).requires_grad_(), 2)
    assert sorted(sizes) == sorted([2 * 130 * 48 * 2, 2 * 130 * 16 * 2, 2 * 2 * 256 * 4])


def test_writing_the_result_is_noticed():
    qkv = randn(1, 9, 48).requires_grad_()
    o = attention(qkv, 2)
    o.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_half_precision_by_autocast():
    qkv, upstream = randn(1, 67, 3 * 2 * 16), randn(1, 67, 32, dtype=torch.bfloat16, seed=1)
    x = qkv.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attention(x, 2)
        (inside,) = torch.autograd.grad(o, x, upstream, retain_graph=True)
    (outside,) = torch.autograd.grad(o, x, upstream)
    assert o.dtype == torch.bfloat16 and inside.dtype == torch.float32
    assert_bitwise_equal(inside, outside)
    (want,) = gradients(lambda x: attention(x, 2), [qkv.bfloat16()], [upstream])
    assert_bitwise_equal(inside, want.float())


def saved(dtype=torch.float32, N=9):
    qkv = randn(1, N, 48, dtype=dtype)
    return (randn(1, N, 16, dtype=dtype, seed=1), qkv, *torch.ops.segmenter.attention_lse(qkv, 2), None, 2)


BAD_CALLS = [
    (0, lambda t: t.half(), KernelError, "grad must be one of float32, got torch.float16"),
    (0, lambda t: t[:, 1:], ValueError, r"grad must be .1, 9, 16., got .1, 8, 16."),
    (2, lambda t: t[..., 1:], ValueError, r"o must be .1, 9, 16., got .1, 9, 15."),
    (3, lambda t: t[..., :9], ValueError, r"lse must be .1, 2, 128., got .1, 2, 9."),
    (3, lambda t: t.double(), KernelError, "lse must be one of float32"),
    (4, lambda t: torch.zeros(1, 2, 9, device=DEVICE), ValueError, "grad_lse must be .1, 2, 128., got .1, 2, 9."),
    (1, lambda t: t.double(), KernelError, "qkv must be one of"),
    (1, lambda t: t.to("meta"), KernelError, "one device"),
    (5, lambda t: 4, KernelError, "multiple of 8 up to 128, got 4"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    args = list(saved())
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        kernel.attention_backward(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("N", [63, 65, 70, 130])
@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float16, 1.5), (torch.bfloat16, 4.5), (torch.float32, 4.5)], ids=str
)
def test_all_scores_far_below_zero(dtype, shift, N, guarded_outputs):
    """Keys beyond N score 0, far more than any: exp(0 - lse) overflows, and infinity times 0 is NaN."""
    qkv = randn(1, N, 3, 64, seed=N)
    qkv[:, :, 0] += shift
    qkv[:, :, 1] -= shift
    qkv = qkv.view(1, N, 192).to(dtype)
    lse = reference.attention_lse(qkv.double(), 1)[1]
    assert lse.min() < (-11 if dtype == torch.float16 else -89)
    check_packed(qkv, 1, randn(1, N, 64, dtype=dtype, seed=1), lse=lse)


@by_dtype
def test_gradient_of_log_sum_exp(dtype, guarded_outputs):
    """With the gradient of the result, and alone."""
    N, h = 67 if dtype != torch.float32 else 35, 2
    qkv, of_o, of_lse = randn(2, N, 96, dtype=dtype), randn(2, N, 32, dtype=dtype, seed=1), randn(2, h, N, seed=2)

    def definition(x):
        return reference.attention_lse(x, h)

    for upstream in ((of_o, of_lse), (of_o, None), (of_o, torch.zeros_like(of_lse))):
        check(lambda x: attention(x, h, return_lse=True), definition, [qkv], upstream)
    (alone,) = gradients(lambda x: attention(x, h, return_lse=True), [qkv], (None, of_lse))
    q, k = qkv.double().requires_grad_(), qkv.requires_grad_()
    (exact,) = torch.autograd.grad(definition(q)[1], q, of_lse.double())
    (eager,) = torch.autograd.grad(definition(k)[1], k, of_lse)
    assert_parity(alone[..., :64], exact[..., :64], eager[..., :64])
    assert (alone[..., 64:] == 0).all() and alone[..., :64].abs().max() > 0.01


@pytest.mark.parametrize("N", LENGTHS)
@by_dtype
def test_parity(dtype, N, guarded_outputs):
    B, h, d = (2, 2, 32) if N < 100 else (1, 1, 64)
    qkv, upstream = randn(B, N, 3 * h * d, dtype=dtype, seed=N), randn(B, N, h * d, dtype=dtype, seed=N + 1)
    check_packed(qkv, h, upstream, N=N)


@pytest.mark.more
@pytest.mark.parametrize(("d", "h"), [(8, 3), (24, 2), (32, 2), (48, 2), (64, 1), (80, 2), (128, 2)])
@by_dtype
def test_head_dimensions(dtype, d, h, guarded_outputs):
    check_packed(randn(1, 67, 3 * h * d, dtype=dtype, seed=d), h, randn(1, 67, h * d, dtype=dtype, seed=1), d=d)


@pytest.mark.more
@pytest.mark.parametrize(("N", "M"), [(1, 130), (130, 1), (65, 66), (3, 257), (100, 64)])
@by_dtype
def test_cross_attention(dtype, N, M, guarded_outputs):
    inputs = [randn(1, n, 2, 32, dtype=dtype, seed=i) for i, n in enumerate((N, M, M))]
    upstream = randn(1, N, 64, dtype=dtype, seed=3)
    for scale in (32**-0.5, 0.3):
        attend = functools.partial(cross_attention, scale=scale)
        check(attend, functools.partial(explicit_cross, scale=scale), inputs, [upstream], scale=scale)


def shipped_configs():
    """Every configuration that some call chooses, with a head_dim that chooses it; of half types with one of them."""
    found, dtypes = {}, (torch.float32, torch.bfloat16)
    tables = (configs_backward.attention_dkdv, configs_backward.attention_dq)
    for table, architecture, dtype, head_pad, n, precision in itertools.product(
        tables, (*configs.ARCHITECTURES, "unknown"), dtypes, (32, 64, 128), (100, 1025, 4097), ("ieee", "tf32")
    ):
        config = table(architecture, torch.empty(0, dtype=dtype).element_size(), head_pad, n, precision)
        found.setdefault((table is configs_backward.attention_dq, config, dtype), head_pad)
    return [pytest.param(of_dq, c, t, d, id=f"{'dq' if of_dq else 'dkdv'}-{t}-{c.block_m}x{c.block_n}-d{d}-"
                         f"{c.descriptors}".replace("torch.", "")) for (of_dq, c, t), d in found.items()]  # fmt: skip


def explicit(inputs, upstream, dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in inputs)
    o = explicit_cross(q, k, v, q.shape[-1] ** -0.5)
    return torch.autograd.grad(o, (q, k, v), upstream.to(dtype))


def run(inputs, upstream, chosen):
    """The three gradients by these configurations."""
    q, k, v = inputs
    saved = torch.ops.segmenter.cross_attention_lse(q, k, v, q.shape[-1] ** -0.5)
    grads = tuple(launch.empty(t.shape, t.dtype, t.device) for t in inputs)
    kernel._run(upstream, inputs, saved, None, grads, (q.shape[2], 0, 0, 0), q.shape[-1] ** -0.5, chosen)
    return grads


@pytest.mark.parametrize(("of_dq", "config", "dtype", "d"), shipped_configs())
def test_shipped_configurations(of_dq, config, dtype, d, guarded_outputs):
    size = config.block_n if of_dq else config.block_m
    for n in {size, size + 1, 2 * size - 1}:
        N, M = (19, n) if of_dq else (n, 19)
        inputs = tuple(randn(1, length, 1, d, dtype=dtype, seed=i) for i, length in enumerate((N, M, M)))
        upstream = randn(1, N, d, dtype=dtype, seed=3)
        ours = run(inputs, upstream, (None, config) if of_dq else (config, None))
        exact, eager = (explicit(inputs, upstream, t) for t in (torch.float64, dtype))
        for name, o, x, e in zip(("dq", "dk", "dv"), ours, exact, eager, strict=True):
            assert_right(name, o, x, e, f"n={n}")


def test_descriptors_and_pointers_agree():
    for dtype, d in ((torch.float16, 32), (torch.bfloat16, 80)):
        inputs = tuple(randn(1, 67, 2, d, dtype=dtype, seed=i) for i in range(3))
        tiles = (configs.AttentionConfig(32, 32, 4, 2, descriptors) for descriptors in (True, False))
        ours, theirs = (run(inputs, randn(1, 67, 2 * d, dtype=dtype, seed=3), (c, c)) for c in tiles)
        for a, b in zip(ours, theirs, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("magnitude", [1e-3, 6.0])
@by_dtype
def test_magnitudes(dtype, magnitude):
    qkv, upstream = (randn(1, 67, 3 * 2 * 32) * magnitude).to(dtype), randn(1, 67, 64, dtype=dtype, seed=1)
    lse = reference.attention_lse(qkv.double(), 2)[1] if magnitude > 1 else None
    check_packed(qkv, 2, upstream, lse=lse)


def test_scores_far_above_zero():
    qkv = randn(1, 67, 3, 64)
    qkv[:, :, :2] += 4.5
    for dtype in DTYPES:
        x = qkv.view(1, 67, 192).to(dtype)
        lse = reference.attention_lse(x.double(), 1)[1]
        check_packed(x, 1, randn(1, 67, 64, dtype=dtype, seed=1), lse=lse, dtype=dtype)


def test_gradient_of_log_sum_exp_of_separate_tensors():
    inputs = [randn(2, n, 2, 16, seed=i) for i, n in enumerate((9, 67, 67))]
    upstream = randn(2, 9, 32, seed=3), randn(2, 2, 9, seed=4)
    attend = functools.partial(cross_attention, scale=0.3, return_lse=True)
    check(attend, functools.partial(reference.cross_attention_lse, scale=0.3), inputs, upstream)


@pytest.mark.parametrize("part", ["query", "key", "value", "upstream"])
def test_nan_stays_in_its_head(part):
    """And is lost nowhere: in the same places as explicit softmax has it."""
    for N, dtype in ((65, torch.float32), (70, torch.bfloat16)):
        qkv, upstream = randn(1, N, 3 * 2 * 16, dtype=dtype), randn(1, N, 32, dtype=dtype, seed=1)
        where = {"query": 3, "key": 32 + 3, "value": 64 + 3, "upstream": 3}[part]
        (upstream if part == "upstream" else qkv)[0, 5, where] = math.nan
        explicit = functools.partial(reference.explicit_attention, n_heads=2)
        (ours,), (eager,) = (gradients(f, [qkv], [upstream]) for f in (lambda x: attention(x, 2), explicit))
        assert_bitwise_equal(ours.isnan(), eager.isnan(), f"N={N}")
        assert ours.isnan().any() and not ours.view(1, N, 3, 2, 16)[..., 1, :].isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_offsets_are_64_bits_wide():
    """Row 2**31 / 2 of batch 1: with 32 bits it would be read from before the tensor. Lazily committed memory."""
    if DEVICE == "cuda":
        pytest.skip("lazily committed memory is the CPU's")
    d = 16
    wide = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided((2, 3, 3 * d), (2**31, 3 * d, 1))
    wide.copy_(randn(2, 3, 3 * d, dtype=torch.float16))
    upstream = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided((2, 3, d), (2**31, 16, 1))
    upstream.copy_(randn(2, 3, d, dtype=torch.float16, seed=1))
    o, lse = torch.ops.segmenter.attention_lse(wide, 1)
    for descriptors in (True, False):
        c = configs.AttentionConfig(16, 16, 4, 2, descriptors)
        out = torch.empty(2, 3, 3, d, dtype=torch.float16)
        x, dense = wide.view(2, 3, 3, d), wide.contiguous().view(2, 3, 3, d)
        kernel._run(upstream, (x, x, x), (o, lse), None, (out, out, out), (1, 0, 1, 2), 0.25, (c, c))
        want = torch.empty_like(out)
        args = (dense, dense, dense), (o, lse), None, (want, want, want), (1, 0, 1, 2), 0.25, (c, c)
        kernel._run(upstream.contiguous(), *args)
        assert_bitwise_equal(out, want)


@pytest.mark.parametrize(("B", "N", "M"), [(0, 5, 7), (2, 0, 7), (0, 0, 3)])
def test_empty(B, N, M):
    qkv = randn(B, N, 3 * 2 * 8)
    (grad,) = gradients(lambda x: attention(x, 2), [qkv], [randn(B, N, 16)])
    assert grad.shape == qkv.shape
    for _ in range(3):  # from notes, too
        inputs = [randn(B, n, 2, 8) for n in (N, M, M)]
        grads = gradients(cross_attention, inputs, [randn(B, N, 16)])
        for grad, x in zip(grads, inputs, strict=True):
            assert_bitwise_equal(grad, torch.zeros_like(x))


@pytest.mark.more
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    i = list(LAYOUTS).index(layout)
    dtype, N = ((torch.float16, 67), (torch.float32, 34), (torch.bfloat16, 67))[i % 3]
    qkv = randn(2, N, 3 * 2 * 16, dtype=dtype)
    placed = LAYOUTS[layout](randn(2, N, 32, dtype=dtype, seed=1))
    qkv = qkv[: len(placed)]
    upstream = guarded(placed)
    x = qkv.clone().requires_grad_()
    (ours,) = torch.autograd.grad(attention(x, 2), x, upstream)
    assert ours.is_contiguous()
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    assert_bitwise_equal(ours, gradients(lambda x: attention(x, 2), [qkv], [placed.contiguous()])[0])


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_expanded_upstream_gradients(dims, guarded_outputs):
    qkv, upstream = randn(2, 67, 3 * 2 * 16, dtype=torch.float16), randn(2, 67, 32, dtype=torch.float16, seed=1)
    for dim in dims:
        upstream = upstream.narrow(dim, 0, 1)
    upstream = upstream.expand(2, 67, 32)
    check_packed(qkv, 2, upstream)


@pytest.mark.more
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs(layout, guarded_outputs):
    dtype, N = ((torch.float32, 19), (torch.bfloat16, 67))[list(LAYOUTS).index(layout) % 2]
    qkv = LAYOUTS[layout](randn(2, N, 3 * 2 * 16, dtype=dtype))
    upstream = randn(len(qkv), N, 32, dtype=dtype, seed=1)
    x = guarded(qkv).requires_grad_()
    (ours,) = torch.autograd.grad(attention(x, 2), x, upstream)
    assert_bitwise_equal(x.detach(), qkv, "inputs are never written")
    check_guards(x)
    assert_bitwise_equal(ours, gradients(lambda x: attention(x, 2), [qkv.contiguous()], [upstream])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients_of_log_sum_exp(layout):
    qkv = randn(2, 9, 3 * 2 * 16)
    o, lse = torch.ops.segmenter.attention_lse(qkv, 2)
    placed = LAYOUTS[layout](randn(2, 2, 128, seed=1))
    if placed.shape == lse.shape:
        ours, dense = (kernel.attention_backward(o, qkv, o, lse, g, 2) for g in (placed, placed.contiguous()))
        assert_bitwise_equal(ours, dense)


def test_backward_twice_is_equal_and_touches_nothing():
    for dtype in DTYPES:
        qkv, upstream = randn(1, 67, 3 * 2 * 16, dtype=dtype).requires_grad_(), randn(1, 67, 32, dtype=dtype, seed=1)
        kept = []

        def pack(tensor, kept=kept):
            kept.append((tensor, tensor.clone()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            o = attention(qkv, 2)
        before = qkv.detach().clone(), o.detach().clone(), upstream.clone()
        first, second = (torch.autograd.grad(o, qkv, upstream, retain_graph=True)[0] for _ in range(2))
        assert_bitwise_equal(first, second)
        for tensor, was in zip((qkv, o, upstream), before, strict=True):
            assert_bitwise_equal(tensor.detach(), was)
        for tensor, was in kept:
            assert_bitwise_equal(tensor, was, "of what is kept")
        assert_bitwise_equal(torch.autograd.grad(attention(qkv, 2), qkv, upstream)[0], first, "another run")


def test_images_and_heads_are_independent():
    qkv, upstream = randn(2, 67, 3 * 2 * 16, dtype=torch.float16), randn(2, 67, 32, dtype=torch.float16, seed=1)
    attend = functools.partial(attention, n_heads=2)
    (whole,) = gradients(attend, [qkv], [upstream])
    assert_bitwise_equal(gradients(attend, [qkv[1:]], [upstream[1:]])[0], whole[1:])
    q, k, v = qkv.view(2, 67, 3, 2, 16).unbind(2)
    separate = gradients(cross_attention, [q, k, v], [upstream])
    assert_bitwise_equal(torch.stack(separate, 2).view(whole.shape), whole, "the same, separately")
