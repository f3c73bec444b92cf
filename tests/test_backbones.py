"""Encoders of timm and Hugging Face as encoders of ours, tiny and random: the tokens of the library's own code."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from segmenter import create_segmenter
from segmenter.config import NORMALIZATION, ConfigError
from segmenter.export.program import trace
from segmenter.inference.images import normalize
from segmenter.layers import LayerScale
from segmenter.training.loop import Run, train
from segmenter.training.optimizer import parameter_groups
from segmenter.training.recipe import Recipe
from segmenter.weights.build import build
from segmenter.weights.convert import convert
from segmenter.weights.load import from_pretrained, load_any
from segmenter.weights.read import CheckpointError
from tests.support.backbones import BACKBONES, backbone, features, write_folder
from tests.support.blocks import ATTENTION, DEVICE, MLP
from tests.support.spies import kernels_run
from tests.support.tiny import tiny_config, tiny_model
from tests.support.tiny_runs import tiny_recipe

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


@pytest.mark.parametrize("name", ["DINOv2 with registers", "DeiT-III", "Hugging Face DINOv2 with registers"])
def test_folders_of_the_hub(name, tmp_path):
    """Weights and the JSON beside them tell all that the live model does."""
    theirs = backbone(name)
    live, read = (load_any(source, **LINEAR) for source in (theirs, write_folder(name, theirs, tmp_path)))
    assert read.config == dataclasses.replace(live.config, normalization="deit") and read.info.normalization == "deit"
    im = image(read.patch_size, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(read.encoder(im, return_features=True), features(theirs, im), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DINOv2", "Hugging Face DINOv2"])
def test_statistics_of_the_input(name, tmp_path):
    """Those of the source, never other ones in their place."""
    theirs = backbone(name)
    for key, (mean, std) in NORMALIZATION.items():
        assert load_any(write_folder(name, theirs, tmp_path / key, mean, std), **LINEAR).info.normalization == key
    odd = write_folder(name, theirs, tmp_path / "odd", [0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    with pytest.raises(CheckpointError, match=r"mean \[0.48, 0.46, 0.41\] and std .* of none of vit, deit, sat493m"):
        load_any(odd, **LINEAR)
    assert load_any(odd, **LINEAR, normalization="deit").info.normalization == "deit"
    if name == "DINOv2":
        theirs.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
        with pytest.raises(CheckpointError, match="give normalization"):
            load_any(theirs, **LINEAR)


def test_names_of_facebookresearch():
    """Their DINOv2 has a position for the class token and none for registers."""
    theirs = backbone("DINOv2 with registers")
    state = theirs.state_dict()
    position = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))
    state |= {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 64)}
    state |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    model, im = load_any_state(state), image(14, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(im, return_features=True), features(theirs, im), atol=1e-5, rtol=1e-5)


def load_any_state(state):
    return build(convert(state, n_heads=2, **LINEAR), "eager", "the file")


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("timm/vit_small_patch14_reg4_dinov2", {"decoder": "linear", "decoder_batch_norm": True}),
        ("Hugging Face DINOv2", {"decoder_layers": 1, "layer_decay": 0.8, "optimizer": "adamw", "min_lr": 0.0}),
    ],
)
def test_train(model, changes, tmp_path, monkeypatch):
    """`segmenter train` from it: trained, evaluated, resumed, saved; nothing is downloaded."""
    if model.startswith("timm/"):
        timm = pytest.importorskip("timm", exc_type=Exception)
        made = backbone("DINOv2 with registers")
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made)
    else:
        made = backbone(model)
        model = str(write_folder(model, made, tmp_path / "hub"))
    recipe = tiny_recipe(tmp_path, model=model, crop_size=28, freeze_backbone=False, dropout=0.0, **changes)
    run = tmp_path / "run"
    monkeypatch.setattr(Run, "_evaluate_if_due", killed_after(3, Run._evaluate_if_due))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run, progress=False)
    monkeypatch.undo()
    outcome = train(recipe, run, progress=False)  # only the checkpoint is needed for this
    assert outcome.step == outcome.total == 6 and outcome.best is not None
    trained = from_pretrained(run / "final")
    assert (trained.patch_size, trained.info.window_size, trained.info.normalization) == (14, 28, "deit")
    assert trained.config.layer_scale and trained.config.image_size == (28, 28)
    gamma = made.state_dict().get("blocks.0.ls1.gamma", made.state_dict().get("encoder.layer.0.layer_scale1.lambda1"))
    assert 0 < (trained.encoder.blocks[0].ls1.gamma - gamma).abs().max() < 0.5
    assert trained.segment(torch.zeros(40, 33, 3, dtype=torch.uint8).numpy()).shape == (40, 33)


def killed_after(steps, function):
    def killed(run, *args):
        found = function(run, *args)
        if run.step == steps:
            raise KeyboardInterrupt
        return found

    return killed


def test_crops_that_are_no_whole_patches(tmp_path):
    folder = write_folder("DINOv2", backbone("DINOv2"), tmp_path / "hub")
    recipe = tiny_recipe(tmp_path, model=str(folder), crop_size=32)
    with pytest.raises(CheckpointError, match=r"32 .crop_size in training. must be .* patch size 14, as 28 or 42"):
        train(recipe, tmp_path / "run", progress=False)


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
