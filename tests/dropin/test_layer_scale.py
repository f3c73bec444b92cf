"""LayerScale in timm's models: DINOv2, DeiT-III and ViTs with registers, as whole fused blocks, against timm itself."""

import copy

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")
timm = pytest.importorskip("timm")

from segmenter.dropin.accelerate import accelerate, restore, why_not  # noqa: E402
from tests.support.blocks import (  # noqa: E402
    ATTENTION,
    DEVICE,
    MLP,
    TIGHT,
    WIDTH,
    PlainBlock,
    assert_same_gradients,
    block,
    original,
    replace,
    tokens,
)
from tests.support.spies import kernels_run  # noqa: E402

SMALL = {"pretrained": False, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 7}
MODELS = {  # name in timm -> side of the image
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "deit3_small_patch16_224": 48,
    "vit_betwixt_patch16_reg4_gap_256": 48,
}


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def build(name):
    """Every parameter random, LayerScale (1e-5 at first) and norms too."""
    model, generator = timm.create_model(name, img_size=MODELS[name], **SMALL), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + ("bias" not in n))
    return model.to(DEVICE).eval(), torch.randn(2, 3, *2 * [MODELS[name]], generator=generator).to(DEVICE)


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_timm(name, kernels):
    """End to end, block by block, with every part on the kernels, and undone to the last bit."""
    model, im = build(name)
    twin, seen = copy.deepcopy(model), []
    for layer in twin.blocks:
        layer.register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        want = twin(im)
        report = accelerate(model)
        assert [row.became for row in report.swapped] == 2 * ["attention and MLP", "attention core"]
        got = model(im)
        assert kernels == 2 * (ATTENTION + MLP)
        torch.testing.assert_close(got, want, **TIGHT)
        assert want.abs().max() > 0.5
        for layer, (x, y) in zip(model.blocks, seen, strict=True):
            torch.testing.assert_close(layer(x), y, **TIGHT)
        assert why_not(model) == {}
        assert restore(model) == 4
        assert torch.equal(model(im), want)


def test_changes_in_place_are_followed(kernels):
    """By both vectors, as an optimiser, an average or a checkpoint make them: nothing is copied or folded."""
    module, x = block("scaled"), tokens()
    before = module(x)
    for scale in (module.ls1, module.ls2):
        with torch.no_grad():
            scale.gamma.mul_(-0.5)
        after = module(x)
        torch.testing.assert_close(after, original(module)(x), **TIGHT)
        assert (after - before).abs().max() > 0.1
        before = after
    module.load_state_dict(block("scaled", accelerated=False, seed=5).state_dict())
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == 4 * (ATTENTION + MLP)


@pytest.mark.parametrize("frozen", [None, "mlp.fc2", "ls1"])
def test_gradients_equal_timm(frozen, kernels):
    module = block("scaled").train()
    assert_same_gradients(module, original(module), frozen)
    assert kernels == ATTENTION + MLP


def test_types(kernels):
    """Under autocast a float32 LayerScale makes the result float32, as in timm; otherwise it has the tokens' type."""
    module = block("scaled")
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        for x in (tokens(), tokens(dtype=torch.bfloat16)):
            got, want = module(x), original(module)(x)
            assert got.dtype == want.dtype == torch.float32
            torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)
    assert kernels == 2 * (ATTENTION + MLP)
    module.ls2.bfloat16()
    assert why_not(module)[""] == ["MLP: ls2 is bfloat16, the input float32"]


class Vectors(PlainBlock):
    """As BEiT's and EVA's: the block itself holds the factors."""

    def __init__(self):
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), attn_mask=attn_mask))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class Reversed(Vectors):
    def forward(self, x):
        x = x + self.gamma_2 * self.attn(self.norm1(x))
        return x + self.gamma_1 * self.mlp(self.norm2(x))


def test_vectors_of_the_block_itself(kernels):
    module, x = Vectors().to(DEVICE).eval(), tokens()
    assert accelerate(module).rows[0].became == "attention and MLP"
    for vector in (module.gamma_1, module.gamma_2):
        before = module(x)
        with torch.no_grad():
            vector.mul_(-0.5)
        torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
        assert (module(x) - before).abs().max() > 0.1
    assert kernels == 6 * (ATTENTION + MLP)
    kernels.clear()
    module.mlp.register_forward_hook(lambda *args: None)
    module.attn.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == ["attention"]  # the core
    module.gamma_1.data = module.gamma_1.data.bfloat16()
    assert set(why_not(module, x)[""]) == {
        f"{half}: it is bfloat16, the input float32" for half in ("attention", "MLP")
    }
    (row, _) = accelerate(Reversed()).rows
    assert (row.became, row.reason) == (None, "its forward is not that of a pre-norm block")


class Affine(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.gamma, self.beta = old.gamma, nn.Parameter(torch.randn(WIDTH, device=DEVICE))

    def forward(self, x):
        return x * self.gamma + self.beta


class Squared(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.gamma = old.gamma

    def forward(self, x):
        return x * self.gamma.square()


REPLACED = {Affine: f"ls1 ({__name__}.Affine) holds something else than one vector", Squared: "something else than its"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", REPLACED)
def test_what_does_something_else_is_called(make, when, kernels):
    module, x = block("scaled", accelerated=False), tokens()
    plain = module(x)
    if when == "after":
        accelerate(module)
    replace(module, "ls1", make)
    if when == "before":
        row = accelerate(module).rows[0]
        assert row.became == "MLP"
        assert REPLACED[make] in row.reason
    got = module(x)
    torch.testing.assert_close(got, original(module)(x), **TIGHT)
    assert (got - plain).abs().max() > 0.05
    assert [k for k in kernels if k in (*MLP, "layernorm_linear")] == MLP


@pytest.mark.parametrize(("path", "fused"), [("ls1", MLP), ("ls2", ATTENTION)])
def test_hooked_scales_are_called(path, fused, kernels):
    module, calls = block("scaled"), []
    module.get_submodule(path).register_forward_hook(lambda *args: calls.append(path))
    torch.testing.assert_close(module(tokens()), original(module)(tokens()), **TIGHT)
    assert calls == 2 * [path]
    assert [k for k in kernels if k in (*MLP, "layernorm_linear")] == fused[:1]
    assert f"{path} has hooks" in str(why_not(module))
