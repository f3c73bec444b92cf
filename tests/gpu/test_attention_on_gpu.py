"""Attention at full sizes: every shipped configuration, every length that the model meets, repeats, large tensors."""

import pytest
import torch

from segmenter.kernels import attention as module
from segmenter.kernels import configs, reference
from segmenter.kernels.attention import attention, cross_attention
from tests.gpu.conftest import size
from tests.support.parity import assert_bitwise_equal, assert_parity

HALF = (torch.bfloat16, torch.float16)
LENGTHS = size([1, 2, 3, 257, 258, 406, 960, 1025, 1026, 1174, 1601, 2305, 4097, 4246], [1, 2, 65, 100])


def random_qkv(B, N, h, d, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(B, N, 3 * h * d, generator=generator, device=device).to(dtype)


def ratio(N, dtype):
    """Limit of the Frobenius error in units of eager's, which rounds scores and probabilities to half precision.

    With few keys there is nothing to round: eager is exact as well.
    """
    return None if dtype == torch.float32 or N < 64 else 0.65


def exact(qkv, h):
    """In float64, head by head: all heads' scores at once would not fit at the longest sequences."""
    q, k, v = reference.split_heads(qkv.double(), h)
    heads = [(q[:, i] @ k[:, i].mT * q.shape[-1] ** -0.5).softmax(-1) @ v[:, i] for i in range(h)]
    return torch.stack(heads, 2).flatten(2)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("N", LENGTHS)
def test_lengths_of_the_model(N, dtype, device):
    h = 3
    qkv = random_qkv(2, N, h, 64, dtype, device)
    out, lse = attention(qkv, h, return_lse=True)
    context = f"N={N} {dtype}"
    assert_parity(out, exact(qkv, h), reference.explicit_attention(qkv, h), frobenius=ratio(N, dtype), context=context)
    assert_bitwise_equal(attention(qkv, h), out, context)
    want = reference.attention_lse(qkv.double(), h)[1]
    assert (lse.double() - want).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("d", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_head_sizes(d, dtype, device):
    N, h = size(1174, 70), 2
    qkv = random_qkv(2, N, h, d, dtype, device)
    assert_parity(attention(qkv, h), exact(qkv, h), reference.explicit_attention(qkv, h), frobenius=0.65)


def shipped():
    """Every configuration that the table can give for some architecture: (config, head_dim, element size)."""
    found = {}
    for architecture in configs.ARCHITECTURES:
        for head_pad in (32, 64, 128):
            for bytes_, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
                for n in (257, 1025, 4097):
                    config = configs.attention(architecture, bytes_, head_pad, n, precision)
                    found[config, head_pad, bytes_] = None
    return list(found)


@pytest.mark.parametrize(("config", "d", "bytes_"), shipped(), ids=str)
def test_every_shipped_configuration_is_right_and_repeats(config, d, bytes_, device):
    if device.type == "cuda" and config.descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this card has no copy engine for descriptors")
    h = 2
    for dtype in HALF if bytes_ == 2 else (torch.float32,):
        for N in size((257, 1025, 1174), (65, 70)):
            qkv = random_qkv(2, N, h, d, dtype, device, seed=N)
            x = qkv.view(2, N, 3 * h, d)

            def run(x=x):
                return module._run(x, x, x, (h, 0, h, 2 * h), d**-0.5, False, config)[0]

            first = run()
            assert_parity(first, exact(qkv, h), reference.explicit_attention(qkv, h), context=f"{config} {dtype} N={N}")
            for _ in range(size(100, 1)):  # a moving result is a race
                assert torch.equal(run(), first), f"{config} {dtype} N={N} differs between runs"


def test_tf32_when_asked_for(device):
    torch.set_float32_matmul_precision("high")
    N, h = size(1025, 65), 2
    qkv = random_qkv(1, N, h, 64, torch.float32, device)
    error = (attention(qkv, h) - exact(qkv, h)).norm() / exact(qkv, h).norm()
    assert error < 2e-3


def test_cross_attention_at_full_size(device):
    N, M = size((1174, 4096), (70, 33))
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (torch.randn(2, n, 12, 64, generator=generator, device=device).bfloat16() for n in (N, M, M))
    want = reference.cross_attention(q.double(), k.double(), v.double(), 0.125)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 0.125).softmax(-1)
    eager = (scores @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    assert_parity(cross_attention(q, k, v), want, eager, frobenius=0.65)


@pytest.mark.card
def test_more_heads_than_a_grid_has_rows(device):
    """B*h = 65,537 at N = 5: beyond the 65,535 programs of the y and z axes."""
    B, h, d = 65537, 1, 64
    qkv = random_qkv(B, 5, h, d, torch.bfloat16, device)
    assert_parity(attention(qkv, h), exact(qkv, h), reference.explicit_attention(qkv, h))


@pytest.mark.card
@pytest.mark.parametrize("elements", [2**31, 2**32])
def test_offsets_beyond_32_bits(elements, device):
    """The last image of a batch whose qkv has more elements than an int32 (or uint32) can count."""
    h, d, N = 16, 64, 1025
    B = elements // (N * 3 * h * d) + 2
    if torch.cuda.mem_get_info()[0] < B * N * 4 * h * d * 2 * 1.1:
        pytest.skip("too little memory on this card")
    qkv = torch.zeros(B, N, 3 * h * d, dtype=torch.bfloat16, device=device)
    last = random_qkv(1, N, h, d, torch.bfloat16, device)
    qkv[-1] = last[0]
    out = attention(qkv, h)
    assert_bitwise_equal(out[-1:], attention(last, h))
    assert not out[0].any()


@pytest.mark.card
def test_long_sequence_in_linear_memory(device):
    """16,385 tokens (patch 8, 1024 x 1024): no score matrix, which would hold 3.2 GB a head in float32."""
    h, N = 12, 16385
    qkv = random_qkv(1, N, h, 64, torch.bfloat16, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(qkv, h)
    assert torch.cuda.max_memory_allocated() - before < 2 * out.numel() * out.element_size()
    rows = torch.arange(0, N, 511, device=device)
    q, k, v = reference.split_heads(qkv.double(), h)
    want = ((q[:, :, rows] @ k.mT * 0.125).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert (out[:, rows].double() - want).norm() / want.norm() < 3e-3
