"""Encoders of timm and Hugging Face as encoders of ours, tiny and random: the tokens of the library's own code."""

import pytest
import torch

pytest.importorskip("triton")

from segmenter import create_segmenter
from segmenter.config import NORMALIZATION, ConfigError
from segmenter.export.program import trace
from segmenter.inference.images import normalize
from segmenter.layers import LayerScale
from segmenter.training.optimizer import parameter_groups
from segmenter.training.recipe import Recipe
from segmenter.weights.load import from_pretrained, load_any
from tests.support.backbones import BACKBONES, backbone, features
from tests.support.blocks import ATTENTION, DEVICE, MLP
from tests.support.spies import kernels_run
from tests.support.tiny import tiny_config, tiny_model

LINEAR = {"n_cls": 3, "decoder": "linear"}
SIZES = [(4, 4), (5, 7), (2, 8)]  # of patches: its own grid; a larger one; another of as many
# Patch rows beyond the image are zeros, whose norm the interpreter divides by in the mask head; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# With every option that the published model has not.
NEWER = {
    "patch_size": 14, "image_size": 56, "n_heads": 2, "layer_scale": True, "n_registers": 3, "pos_embed": "patches",
    "pos_embed_mode": "bicubic_antialias", "pos_embed_check": "grid",
}  # fmt: skip


def image(patch, rows, columns, seed=1):
    return torch.randn(2, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_are_those_of_the_library(name):
    """At any grid: positions are resampled as the library resamples them."""
    theirs = backbone(name)
    model = load_any(theirs, impl="eager", **LINEAR)
    for rows, columns in SIZES:
        im = image(model.patch_size, rows, columns)
        with torch.no_grad():
            want, got = features(theirs, im), model.encoder(im, return_features=True)
        assert want.std() > 0.1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with registers", "registers, mean of patches", "mean of patches"])
def test_kernels_give_these_tokens(name, monkeypatch):
    """From bytes, with every part on the kernels."""
    theirs, ran = backbone(name), kernels_run(monkeypatch)
    model = load_any(theirs, impl="triton", device=DEVICE, **LINEAR)
    mean, std = NORMALIZATION[model.info.normalization]
    P = model.patch_size
    pixels = torch.randint(0, 256, (1, 5 * P, 3 * P, 3), generator=torch.Generator().manual_seed(2)).byte()
    im = normalize(pixels[0].numpy(), model.info.normalization)[None]
    with torch.inference_mode():
        tokens = model.encoder.embed_pixels(pixels.to(DEVICE), mean, std)
        got = model.encoder.forward_tokens(tokens, return_features=True)
        want = features(theirs, im)
    on_bytes = ["pixels_to_tokens"] if model.encoder.n_extra_tokens else []  # the kernel wants one token before them
    assert ran == on_bytes + 2 * (ATTENTION + MLP)
    torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-3)


def twin(model, impl):
    """The same model, by other operators."""
    other = create_segmenter(model.config, impl).eval()
    other.load_state_dict(model.state_dict())
    return other.to(DEVICE)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradients_of_the_kernels(drop_path, monkeypatch):
    """Of LayerScale, registers, positions and all else."""
    model = tiny_model(**NEWER, decoder={"name": "linear"}, drop_path_rate=drop_path)
    im, ran, gradients = image(14, 3, 5).to(DEVICE), kernels_run(monkeypatch), []
    for impl in ("eager", "triton"):
        module = twin(model, impl).train()
        torch.manual_seed(5)
        masks = module.recompute(1).masks(im)
        weights = torch.randn(masks.shape, generator=torch.Generator().manual_seed(6)).to(DEVICE)
        (masks * weights).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if ".head" not in name[:15]})
    assert [name for name in ran if name == "attention"] == 2 * ["attention"]
    for name, want in gradients[0].items():
        assert want.abs().max() > 1e-3, name
        torch.testing.assert_close(gradients[1][name], want, atol=2e-4 * want.abs().max().item(), rtol=1e-3, msg=name)


def test_a_folder_keeps_the_encoder(tmp_path):
    model = load_any(backbone("DINOv2 with registers"), **LINEAR)
    assert model.info.normalization == "deit"
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == model.config and again.info == model.info
    im = image(14, 5, 3)
    with torch.inference_mode():
        assert torch.equal(again.masks(im), model.masks(im))


def test_configuration():
    plain, newer = tiny_config(), tiny_config(**NEWER)
    names = {"layer_scale", "n_registers", "class_token", "final_norm", "pos_embed"}
    assert not names & plain.to_dict().keys(), "folders of published models say what they said"
    assert type(newer).from_dict(newer.to_dict()) == newer and newer.to_dict()["n_registers"] == 3
    for wrong, message in (
        ({"n_registers": -1}, "n_registers -1 is out of range"),
        ({"layer_scale": "yes"}, "layer_scale must be true or false"),
        ({"pos_embed": "some"}, "pos_embed 'some' is unknown; choose one of all, patches"),
        ({"distilled": True, "class_token": False}, "distilled needs class_token"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(**wrong)
    with pytest.raises(ValueError, match="no class token to classify by"):
        tiny_model(class_token=False).encoder(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["DINOv2 with registers", "registers, mean of patches"])
def test_exported(name):
    model = load_any(backbone(name), impl="eager", **LINEAR)
    program = trace(model, "masks").module()
    for size in ((1, 61, 130), (3, 4 * model.patch_size, 4 * model.patch_size)):
        pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(3)).byte()
        with torch.inference_mode():
            torch.testing.assert_close(program(pixels), model.masks_of_pixels(pixels), atol=1e-4, rtol=1e-4)


def test_factors_are_read_at_every_call(monkeypatch):
    model, ran, before = tiny_model(**NEWER), kernels_run(monkeypatch), None
    slow, fast, im = twin(model, "eager"), twin(model, "triton"), image(14, 4, 4).to(DEVICE)
    with torch.no_grad():
        for factor in (1.0, -0.5, 3.0):
            for module in (slow, fast):
                module.encoder.blocks[1].ls1.gamma.mul_(factor)
                module.encoder.blocks[0].ls2.gamma.mul_(factor)
            want, got = (module.encoder(im, return_features=True) for module in (slow, fast))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert before is None or (got - before).abs().max() > 0.05
            before = got
    assert ran == 3 * 2 * (ATTENTION + MLP)


class Doubled(LayerScale):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("scale", "kept"), [("ls1", MLP), ("ls2", ATTENTION)])
@pytest.mark.parametrize("how", ["hook", "class"])
def test_a_layer_scale_that_may_do_more_is_called(scale, kept, how, monkeypatch):
    model, ran = tiny_model(**NEWER), kernels_run(monkeypatch)
    slow, fast, im = twin(model, "eager"), twin(model, "triton"), image(14, 4, 4).to(DEVICE)
    with torch.no_grad():
        plain = slow.encoder(im, return_features=True)
        for module in (slow, fast):
            block = module.encoder.blocks[0]
            if how == "hook":
                getattr(block, scale).register_forward_hook(lambda module, args, out: 2 * out)
            else:
                doubled = Doubled(64).to(DEVICE)
                doubled.load_state_dict(getattr(block, scale).state_dict())
                setattr(block, scale, doubled)
        want, got = (module.encoder(im, return_features=True) for module in (slow, fast))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.05
    assert [name for name in ran if name in ("layernorm_linear", *MLP)] == kept[:1] + ["layernorm_linear", *MLP]
    half = "attention" if scale == "ls1" else "mlp"
    assert fast.encoder.blocks[0].why_not_fused(half) is not None and fast.encoder.blocks[1].obstacles() == []


def test_what_is_not_decayed_and_learns_last():
    """Registers, positions and class token learn at the rate of a block before the first; no factor is decayed."""
    model = tiny_model(**NEWER)
    recipe = Recipe(data="d", learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, recipe)
        for p in group["params"]
    }
    named = dict(model.named_parameters())
    first, last = named["encoder.reg_token"], named["encoder.blocks.1.ls1.gamma"]
    assert rates[id(first)] == rates[id(named["encoder.cls_token"])] == (0.25, 0.0)
    assert rates[id(last)] == (1.0, 0.0) and rates[id(named["encoder.blocks.0.ls2.gamma"])] == (0.5, 0.0)
