"""Blocks as DINOv3's published code has them: keys without biases by a mask, positions under another name, lists."""

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

from segmenter.dropin.accelerate import accelerate, why_not
from tests.support.blocks import DEVICE, MLP, ROTARY, TIGHT, WIDTH, LayerScale, original
from tests.support.official import FeedForward
from tests.support.spies import kernels_run

HEADS, EXTRA, PATCHES = 2, 3, 6


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


class MaskedBias(nn.Linear):
    """Its bias is multiplied by a buffer: 0 where keys are."""

    def __init__(self, d, columns):
        super().__init__(d, columns)
        self.register_buffer("bias_mask", torch.ones(columns))
        self.bias_mask[columns // 3 : 2 * columns // 3] = 0

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    """Takes (sines, cosines) of the last tokens."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj = MaskedBias(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, attn_bias=None, rope=None):
        assert attn_bias is None
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = (self._turned(t, *rope) for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    @staticmethod
    def _turned(x, sin, cos):
        prefix = x.shape[-2] - sin.shape[-2]
        a, b = x[:, :, prefix:].to(sin.dtype).chunk(2, -1)
        turned = torch.cat([a, b], -1) * cos + torch.cat([-b, a], -1) * sin
        return torch.cat([x[:, :, :prefix], turned.to(x.dtype)], -2)


class Block(nn.Module):
    """Takes one tensor of tokens, or a list of them with a list of positions."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.mlp = FeedForward(WIDTH, 2 * WIDTH, 0.0)
        self.ls1, self.ls2 = LayerScale(), LayerScale()
        self.sample_drop_ratio = 0.0

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        if isinstance(x_or_x_list, torch.Tensor):
            return self._of_list([x_or_x_list], [rope_or_rope_list])[0]
        return self._of_list(x_or_x_list, rope_or_rope_list or [None] * len(x_or_x_list))

    def _of_list(self, tokens, ropes):
        if self.training and self.sample_drop_ratio > 0:
            return [x * torch.rand(()).item() for x in tokens]
        tokens = [x + self.ls1(self.attn(self.norm1(x), rope=rope)) for x, rope in zip(tokens, ropes, strict=True)]
        return [x + self.ls2(self.mlp(self.norm2(x))) for x in tokens]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, rope=None):
        for block in self.blocks:
            x = block(x, rope)
        return x


def model():
    torch.manual_seed(0)
    made = Model().to(DEVICE).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def inputs(patches=PATCHES):
    generator = torch.Generator().manual_seed(1)
    angles = 3 * torch.randn(patches, WIDTH // HEADS // 2, generator=generator).tile(2).to(DEVICE)
    return torch.randn(2, EXTRA + patches, WIDTH, generator=generator).to(DEVICE), (angles.sin(), angles.cos())


def test_blocks_equal_the_published_ones(kernels):
    module, (x, rope) = model(), inputs()
    want = module(x, rope)
    report = accelerate(module)
    assert [row.became for row in report.rows if row.name.count(".") == 1] == 2 * ["attention and MLP"], report
    torch.testing.assert_close(module(x, rope), want, **TIGHT)
    assert kernels == 2 * (ROTARY + MLP) and why_not(module) == {}
    kernels.clear()
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == 2 * (["layernorm_linear", "attention", "linear"] + MLP)


def test_masks_of_biases_are_read_on_every_call(kernels):
    """Keys get none, whatever the bias holds; and of a mask nothing is remembered."""
    module, (x, rope) = model(), inputs()
    accelerate(module)
    qkv, keys = module.blocks[0].attn.qkv, slice(WIDTH, 2 * WIDTH)
    with torch.no_grad():
        before = module(x, rope)
        qkv.bias[keys] += 5
        torch.testing.assert_close(module(x, rope), before, rtol=0, atol=0)
        qkv.bias_mask[keys] = 1
        after = module(x, rope)
        torch.testing.assert_close(after, original(module)(x, rope), **TIGHT)
    assert (after - before).abs().max() > 0.05
    assert kernels == 2 * 3 * (ROTARY + MLP)


def test_gradients_of_masked_biases():
    module, (x, rope), grads = model().train(), inputs(), []
    accelerate(module)
    for m in (module, original(module)):
        m(x, rope).square().sum().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, atol=1e-3, rtol=1e-3, msg=name)
    assert not grads[0]["blocks.0.attn.qkv.bias"][WIDTH : 2 * WIDTH].any()


def test_lists_and_dropped_samples_are_the_models(kernels):
    module, (x, rope) = model(), inputs()
    accelerate(module)
    pair = ([x, x[:1]], [rope, rope])
    for got, want in zip(module(*pair), original(module)(*pair), strict=True):
        torch.testing.assert_close(got, want, **TIGHT)
    assert kernels == []
    module.train().blocks[0].sample_drop_ratio = 0.5
    assert why_not(module)["blocks.0"] == ["it has sample_drop_ratio=0.5, it was 0.0"]
    torch.manual_seed(0)
    got = module(x, rope)
    torch.manual_seed(0)
    torch.testing.assert_close(got, original(module)(x, rope), **TIGHT)
    assert kernels == ROTARY + MLP  # the other block
