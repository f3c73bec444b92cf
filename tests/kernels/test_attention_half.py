"""Half a block as one operator: its gradients, what it keeps for them, and when it is three operators instead."""

import pytest
import torch

from segmenter.kernels import attention_half as module
from segmenter.kernels import configs_backward, reference
from segmenter.kernels.attention_half import attention_half
from tests.support.gradients import check_gradients, doubled, gradients
from tests.support.parity import DEVICE, assert_bitwise_equal, randn

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def make(B=2, N=17, d=32, heads=2, dtype=FP32, stream=None, bias=True):
    def of(*shape, seed, scale=1.0, mean=0.0):
        return (mean + scale * randn(*shape, seed=seed)).to(dtype)

    x = (2 * randn(B, N, d, seed=0)).to(stream or dtype)
    norm = of(d, seed=1, scale=0.2, mean=1.0), of(d, seed=2, scale=0.2)
    qkv = of(3 * d, d, seed=3, scale=1.5 / d**0.5), of(3 * d, seed=4, scale=0.1) if bias else None
    projection = of(d, d, seed=5, scale=d**-0.5), of(d, seed=6, scale=0.1) if bias else None
    return [x, *norm, *qkv, *projection, heads, 1e-5]


def definition(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv=True, layer_scale=None
):
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    normed = reference.layernorm(x.to(wide), norm_weight.to(wide), norm_bias.to(wide), eps).to(weight.dtype)
    qkv = reference.linear(normed, qkv_weight, qkv_bias)
    return reference.linear(reference.explicit_attention(qkv, heads), weight, bias, x, False, layer_scale)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("N", "d", "heads"), [(17, 32, 2), (66, 48, 1)])
def test_parity(N, d, heads, dtype, guarded_outputs):
    args = make(N=N, d=d, heads=heads, dtype=dtype)
    # as attention's own gradient, see test_attention_backward.py: float32, and fewer than 1,024 numbers in half types
    limits = {"max_ratio": 3.0, "frobenius": 6.0 if dtype == FP32 else 1.5, "terms": 2 * N}
    check_gradients(attention_half, definition, args, randn(2, N, d, seed=9, dtype=dtype), **limits)


@pytest.mark.parametrize(("dtype", "scale"), [(FP32, FP32), (FP16, FP16), (BF16, FP32)], ids=str)
def test_layer_scale(dtype, scale, guarded_outputs):
    args = [*make(d=48, heads=1, dtype=dtype, stream=scale), False, randn(48, seed=8, dtype=scale)]
    limits = {"max_ratio": 3.0, "frobenius": 6.0 if dtype == FP32 else 1.5, "terms": 34}
    check_gradients(attention_half, definition, args, randn(2, 17, 48, seed=9, dtype=scale), **limits)


def test_a_wide_stream_has_its_residual_gradient_added_before_rounding():
    args, upstream = make(dtype=BF16, stream=FP32), 1000 * randn(2, 17, 32, seed=9)
    dx = gradients(attention_half, args, upstream)[0]
    exact = gradients(definition, doubled(args), upstream)[0]
    assert dx.dtype == FP32 and (dx - exact).norm() < 2e-2 * (exact - upstream).norm()  # of the half's own part


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_what_is_not_kept_is_computed_again_bit_for_bit(dtype):
    args, upstream = make(dtype=dtype, bias=False), randn(2, 17, 32, seed=9, dtype=dtype)
    kept, again = (gradients(lambda *a, k=keep: attention_half(*a, k), args, upstream) for keep in (True, False))
    for i, (a, b) in enumerate(zip(kept, again, strict=True)):
        if isinstance(args[i], torch.Tensor):
            assert_bitwise_equal(a, b, f"gradient {i}")


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept(keep):
    B, N, d, heads = 2, 17, 32, 2
    args, kept = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in make(B, N, d, heads, FP16)], {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention_half(*args, keep)
    parameters = sum(x.numel() * x.element_size() for x in args[1:7])
    lse = 4 * B * heads * 128
    assert sum(kept.values()) - parameters - lse == (10 if keep else 4) * B * N * d


def test_only_what_is_needed_is_computed(monkeypatch):
    args, upstream = make(), randn(2, 17, 32, seed=9)
    whole = gradients(attention_half, args, upstream)
    for only in ([0], [3], [0, 6]):
        for i, gradient in enumerate(gradients(attention_half, args, upstream, only)):
            if i in only:
                assert_bitwise_equal(gradient, whole[i])
    monkeypatch.setattr(module, "ATTENTION_BACKWARD", None)  # not called
    for i, gradient in enumerate(gradients(attention_half, args, upstream, [5, 6])):
        if i in (5, 6):
            assert_bitwise_equal(gradient, whole[i])


def test_three_operators_where_it_would_keep_something_for_nothing(monkeypatch):
    args = make()
    whole = attention_half(*[x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in args])
    monkeypatch.setattr(module, "_attention_half", None)  # not called
    with torch.no_grad():
        assert_bitwise_equal(attention_half(*args), whole)
    monkeypatch.setattr(configs_backward, "attention_by", lambda *_, **__: "sdpa")
    assert_bitwise_equal(attention_half(*args), whole)


def test_half_precision_by_autocast():
    args, upstream = make(), randn(2, 17, 32, seed=9)

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast(DEVICE, BF16):
                return function(*inputs)

        return call

    ours, eager = (gradients(under_autocast(f), args, upstream) for f in (attention_half, definition))
    exact = gradients(definition, doubled(args), upstream)
    for o, e, want in zip(ours[:7], eager[:7], exact[:7], strict=True):
        assert o.dtype == FP32
        assert (o - want).norm() <= 1.5 * (e - want).norm() + 1e-6 * want.norm()
