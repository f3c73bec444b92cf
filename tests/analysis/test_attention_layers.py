"""Watching attention layers: other people's hooks, accelerated models, other people's models, what is refused."""

import pytest
import torch
import torch.nn as nn

import segmenter
from segmenter.analysis import AnalysisError, attention, attention_statistics
from segmenter.ops import OperatorModule
from tests.analysis.test_maps import CLOSE
from tests.cli.tools import image
from tests.support import official
from tests.support.blocks import PlainAttention, PlainBlock
from tests.support.spies import kernels_run
from tests.support.tiny import tiny_model


class Vit(nn.Module):
    """Blocks as timm's, whose own attention keeps no map."""

    patch_size = 8

    def __init__(self, block=PlainBlock, registers=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.registers = nn.Parameter(torch.randn(1, registers, 32))
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, im):
        x = self.embed(im).flatten(2).transpose(1, 2)
        x = torch.cat([self.registers, x], 1)
        for block in self.blocks:
            x = block(x)
        return x


IM = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(3))


def rows_of(attention, x, row):
    """(heads, N) for tokens x (1, N, d)."""
    q, k, _ = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q * attention.scale @ k.transpose(-2, -1)).softmax(-1)[0, :, row]


def test_another_model():
    vit = Vit().eval()
    found = attention(vit, IM, points=[(39, 8)])
    assert found.pixels is None and found.patches == ((1, 4),)
    x = torch.cat([vit.registers, vit.embed(IM).flatten(2).transpose(1, 2)], 1)
    with torch.no_grad():
        for layer, block in enumerate(vit.blocks):
            row = rows_of(block.attn, block.norm1(x), 3 + 5 + 4)
            torch.testing.assert_close(found.maps[layer, 0].flatten(1), row[:, 3:], **CLOSE)
            torch.testing.assert_close(found.others[layer, 0], row[:, :3], **CLOSE)
            x = block(x)
    assert attention(vit, IM[0]).queries == ("token 0", "token 1", "token 2")
    assert attention_statistics(vit, IM).first == 3


@pytest.mark.parametrize("make", [Vit, lambda: tiny_model(d_model=128, n_heads=2)], ids=["another", "ours"])
def test_accelerated_models_give_the_same_and_stay_accelerated(make, monkeypatch):
    model = make().eval()
    source = IM if isinstance(model, Vit) else image(40, 64)
    options = {"points": [(9, 9)]}
    want, numbers = attention(model, source, **options), attention_statistics(model, source)
    segmenter.accelerate(model)
    ran = kernels_run(monkeypatch)
    found, theirs = attention(model, source, **options), attention_statistics(model, source)
    assert ran.count("attention") >= 2 * 2  # the model's own, by the kernel
    torch.testing.assert_close(found.maps, want.maps, **CLOSE)
    torch.testing.assert_close(theirs.entropy, numbers.entropy, **CLOSE)
    torch.testing.assert_close(theirs.centre, numbers.centre, **CLOSE)


def test_our_kernels_look_where_they_compute(monkeypatch):
    pytest.importorskip("triton")
    from segmenter.kernels import launch

    model, names, run = tiny_model(), [], launch.Plan.run
    segmenter.accelerate(model)
    monkeypatch.setattr(launch.Plan, "run", lambda plan, *t: names.append(plan.kernel.fn.__name__) or run(plan, *t))
    attention(model, image(40, 64), points=[(1, 1)])
    attention(model, image(40, 64), points=[(1, 1)], rollout=True)
    attention_statistics(model, image(40, 64))
    for name in ("rows", "transposed", "statistics"):
        assert f"_attention_{name}_fwd_kernel" in names


def test_published_models():
    """Of the published structure, which is not ours: tests/support/official.py."""
    torch.manual_seed(0)
    encoder = official.VisionTransformer((64, 64), 16, 2, 64, 1, 0.0, 0.0, False)
    model = official.Segmenter(encoder, official.MaskTransformer(5, 16, 64, 1, 1, 0.0, 0.0), 5).eval()
    im = torch.randn(1, 3, 64, 64)
    assert attention(model, im, points=[(0, 0)]).maps.shape == (2, 1, 1, 4, 4)
    decoder = attention(model, im, part="decoder")
    assert len(decoder.queries) == 5 and decoder.maps.shape == (1, 5, 1, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks of other code


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_other_hooks_change_is_seen():
    """A hook that turns attention of a layer even: earlier layers stay, this one is even."""
    model, pixels = tiny_model(), image(64, 64)
    before = attention(model, pixels, points=[(5, 5)])

    def even(module, args, qkv):
        return torch.cat([torch.zeros_like(qkv[..., :64]), qkv[..., 64:]], -1)

    with model.encoder.blocks[1].attn.qkv.register_forward_hook(even):
        found = attention(model, pixels, points=[(5, 5)])
    torch.testing.assert_close(found.maps[0], before.maps[0])
    torch.testing.assert_close(found.maps[1], torch.full_like(found.maps[1], 1 / 17))
    assert hooks(model) == 0


def test_heads_that_another_hook_ablates_are_no_reason_to_refuse():
    model, pixels = tiny_model(d_model=128, n_heads=2), image(64, 64)
    before = attention(model, pixels, points=[(5, 5)])

    def ablate(module, args):
        return (args[0] * torch.cat([torch.zeros(64), torch.ones(64)]),)

    with model.encoder.blocks[0].attn.proj.register_forward_pre_hook(ablate):
        found = attention(model, pixels, points=[(5, 5)])
    torch.testing.assert_close(found.maps[0], before.maps[0])
    assert not torch.allclose(found.maps[1], before.maps[1])


def test_hooks_are_gone_whatever_happens():
    model = tiny_model()
    with pytest.raises(AnalysisError):
        attention(model, image(64, 64), points=[(5, 5)], layers=[7])

    def fail(module, args):
        raise RuntimeError("somebody's own error")

    with model.encoder.blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="own error"):
        attention(model, image(64, 64), points=[(5, 5)])
    assert hooks(model) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


class Rotated(PlainAttention):
    """Values are weighted by something else than its projections say."""

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k = k * torch.cos(torch.arange(N, dtype=x.dtype))[:, None]
        x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Causal(PlainAttention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, is_causal=True)


def test_timm_models(monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = timm.models.VisionTransformer(**sizes, dynamic_img_size=True, reg_tokens=2).eval()
    im = torch.randn(1, 3, 24, 40)
    found, numbers = attention(vit, im, points=[(30, 20)]), attention_statistics(vit, im)
    assert found.maps.shape == (2, 1, 2, 3, 5) and found.others.shape[-1] == 3 and numbers.first == 3
    segmenter.accelerate(vit)
    torch.testing.assert_close(attention(vit, im, points=[(30, 20)]).maps, found.maps, **CLOSE)
    normed = timm.models.VisionTransformer(**sizes, qk_norm=True).eval()
    with pytest.raises(AnalysisError, match="attention layer 0 .Attention. computes something else than softmax"):
        attention(normed, torch.randn(1, 3, 32, 32), points=[(1, 1)])


def test_what_is_advised_for_images_works():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    vit = timm.models.VisionTransformer(**sizes).eval()
    advice = r"segmenter\.load_any\(model, n_cls=1, decoder='linear'\)"
    with pytest.raises(AnalysisError, match=f"of a plain ViT, {advice}, which takes any image"):
        attention(vit, image(40, 40), points=[(30, 20)])
    ours = segmenter.load_any(vit, n_cls=1, decoder="linear")
    assert ours.attention(image(40, 40), points=[(30, 20)]).maps.shape == (2, 1, 1, 5, 5)


@pytest.mark.parametrize("kind", [Rotated, Causal])
def test_other_kinds_of_attention_are_refused(kind):
    vit = Vit()
    for block in vit.blocks:
        block.attn = kind()
    with pytest.raises(AnalysisError, match="computes something else than softmax"):
        attention(vit.eval(), IM, points=[(1, 1)])


def test_inputs_of_other_models():
    vit = Vit().eval()
    for source, message in (
        (image(24, 40), "Vit is no Segmenter: give its own input, a float tensor"),
        (torch.zeros(2, 3, 24, 40), "one image at a time, got 2"),
    ):
        with pytest.raises(AnalysisError, match=message):
            attention(vit, source, points=[(1, 1)])
    with pytest.raises(AnalysisError, match="labels no patches; give points"):
        vit.n_cls = 3
        attention(vit, IM, classes=[1])
    with pytest.raises(AnalysisError, match="size is for images"):
        attention(vit, IM, points=[(1, 1)], size=5)
    with pytest.raises(AnalysisError, match="Vit has no decoder"):
        attention(vit, IM, part="decoder")


def test_models_that_call_a_layer_twice_or_never():
    vit = Vit().eval()
    vit.blocks.append(vit.blocks[0])
    with pytest.raises(AnalysisError, match="attention layers 0 were not called once"):
        attention(vit, IM, points=[(1, 1)])


def test_models_that_leave_out_patches():
    vit = Vit().eval()
    vit.embed.stride = (16, 16)
    with pytest.raises(AnalysisError, match="layer 0 has 1 x 9 tokens, the image 3 x 5 patches"):
        attention(vit, IM, points=[(1, 1)])


def test_our_modules_have_their_operators():
    assert all(isinstance(m, OperatorModule) for m in (tiny_model(), tiny_model().encoder.blocks[0].attn))
