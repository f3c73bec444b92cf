"""The eager definitions against torch's own modules, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from segmenter.kernels import reference


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n_heads", "d"), [(1, 64), (3, 16), (12, 8)])
@pytest.mark.parametrize("N", [1, 17, 64])
def test_attention_is_multi_head_attention(n_heads, d, N):
    dim = n_heads * d
    mha = torch.nn.MultiheadAttention(dim, n_heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.eye_(mha.out_proj.weight)
    x = randn(2, N, dim)
    want, probabilities = mha(x, x, x, average_attn_weights=False)
    qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    torch.testing.assert_close(reference.attention(qkv, n_heads), want)
    torch.testing.assert_close(reference.explicit_attention(qkv, n_heads), want)
    torch.testing.assert_close(reference.attention_probabilities(qkv, n_heads), probabilities)


def test_attention_takes_slices_of_larger_tensors():
    qkv = randn(2, 30, 3 * 32)
    torch.testing.assert_close(reference.attention(qkv[:, 3:20], 2), reference.attention(qkv[:, 3:20].contiguous(), 2))


def test_attention_rejects_columns_that_do_not_divide():
    with pytest.raises(ValueError, match="no multiple of 3 . n_heads = 21"):
        reference.attention(torch.zeros(1, 4, 64), 7)


def test_explicit_attention_passes_nan_on():
    qkv = randn(1, 4, 3 * 8)
    qkv[0, 2, 0] = math.nan
    bad = reference.explicit_attention(qkv, 1).isnan().any(-1)[0]
    assert bad.tolist() == [False, False, True, False]


def test_layernorm_mlp():
    x, g, b = randn(2, 5, 12), randn(12, seed=1), randn(12, seed=2)
    w1, b1, w2, b2 = randn(48, 12, seed=3), randn(48, seed=4), randn(12, 48, seed=5), randn(12, seed=6)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    h = ((x - mean) / (var + 0.1).sqrt() * g + b) @ w1.T + b1
    exact = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(reference.layernorm_mlp(x, g, b, w1, b1, w2, b2, eps=0.1), x + exact @ w2.T + b2)
    by_tanh = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    got = reference.layernorm_mlp(x, g, b, w1, b1, w2, b2, eps=0.1, tanh=True)
    torch.testing.assert_close(got, x + by_tanh @ w2.T + b2)
    assert (by_tanh - exact).abs().max() > 1e-4


def test_mask_head_is_layer_norm_of_cosines():
    patches, classes = randn(2, 6, 8), randn(2, 4, 8, seed=1)
    wp, wc, g, b = randn(8, 8, seed=2), randn(8, 8, seed=3), randn(4, seed=4), randn(4, seed=5)
    cosine = F.cosine_similarity((patches @ wp)[:, :, None], (classes @ wc)[:, None], dim=-1)
    centred = cosine - cosine.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * g + b
    torch.testing.assert_close(reference.mask_head(patches, classes, wp, wc, g, b), want)


def test_mask_head_of_a_zero_vector_is_nan_there_only():
    patches, classes, eye = randn(1, 3, 8), randn(1, 4, 8, seed=1), torch.eye(8, dtype=torch.float64)
    patches[0, 1] = 0
    bad = reference.mask_head(patches, classes, eye, eye, None, None).isnan().all(-1)[0]
    assert bad.tolist() == [False, True, False]


def test_definitions_are_differentiable():
    def ready(*shape, seed):
        return randn(*shape, seed=seed).requires_grad_()

    torch.autograd.gradcheck(lambda t: reference.attention(t, 2), [ready(1, 3, 12, seed=1)])
    head = [ready(1, 3, 4, seed=1), ready(1, 3, 4, seed=2), ready(4, 4, seed=3), ready(4, 4, seed=4)]
    torch.autograd.gradcheck(reference.mask_head, [*head, ready(3, seed=5), ready(3, seed=6)])
    mlp = [ready(2, 4, seed=1), ready(4, seed=2), ready(4, seed=3), ready(8, 4, seed=4), ready(8, seed=5)]
    torch.autograd.gradcheck(reference.layernorm_mlp, [*mlp, ready(4, 8, seed=6), ready(4, seed=7)])
