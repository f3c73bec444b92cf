"""Encoders of timm and Hugging Face as encoders of ours, tiny and random: the tokens of the library's own code."""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton")

from segmenter import create_segmenter
from segmenter.analysis.attention_layers import AnalysisError
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
ROTARY = ["layernorm_linear", "rotate", "cross_attention", "attention", "linear"]  # the operator, and its kernel
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


@pytest.mark.parametrize(
    "name", ["DINOv2", "DINOv2 with registers", "registers, mean of patches", "mean of patches", "DINOv3"]
)
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
        got = model.encoder.forward_tokens(tokens, return_features=True, grid=(5, 3))
        want = features(theirs, im)
    on_bytes = ["pixels_to_tokens"] if model.encoder.n_extra_tokens else []  # the kernel wants one token before them
    assert ran == on_bytes + 2 * ((ROTARY if name == "DINOv3" else ATTENTION) + MLP)
    torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-3)


def twin(model, impl):
    """The same model, by other operators."""
    other = create_segmenter(model.config, impl).eval()
    other.load_state_dict(model.state_dict())
    return other.to(DEVICE)


@pytest.mark.parametrize(
    "changes", [{}, {"drop_path_rate": 0.5}, {"pos_embed": "rotary"}, {"pos_embed": "rotary", "drop_path_rate": 0.5}]
)
def test_gradients_of_the_kernels(changes, monkeypatch):
    """Of LayerScale, registers, positions and all else."""
    model = tiny_model(**{**NEWER, **changes}, decoder={"name": "linear"})
    im, ran, gradients = image(14, 3, 5).to(DEVICE), kernels_run(monkeypatch), []
    for impl in ("eager", "triton"):
        module = twin(model, impl).train()
        torch.manual_seed(5)
        masks = module.recompute(3 if impl == "triton" and len(changes) == 2 else 1).masks(im)
        weights = torch.randn(masks.shape, generator=torch.Generator().manual_seed(6)).to(DEVICE)
        (masks * weights).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if ".head" not in name[:15]})
    assert ran.count("attention") == (4 if len(changes) == 2 else 2)  # at level 3, once more in the backward pass
    for name, want in gradients[0].items():
        assert want.abs().max() > 1e-3, name
        torch.testing.assert_close(gradients[1][name], want, atol=2e-4 * want.abs().max().item(), rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "name", ["DINOv2 with registers", "DeiT-III", "DINOv3", "Hugging Face DINOv2 with registers", "Hugging Face DINOv3"]
)
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


def test_names_of_facebookresearch_dinov3():
    """Biases of keys are masked in their code; what the file holds in their place does not matter."""
    theirs = backbone("DINOv3, biases")
    state = {re.sub(r"gamma_([12])$", r"ls\1.gamma", name): t.clone() for name, t in theirs.state_dict().items()}
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full_like(q, torch.nan if i else 5.0), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
    state |= {"storage_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 64)}
    state["rope_embed.periods"] = (100.0 ** (torch.arange(8) / 8)).bfloat16()
    model, im = load_any_state(state), image(16, 5, 3)
    assert (model.config.pos_embed, model.config.norm_eps, model.config.image_size) == ("rotary", 1e-5, (256, 256))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(im, return_features=True), features(theirs, im), atol=1e-5, rtol=1e-5)
    state["rope_embed.periods"] = 10.0 ** (torch.arange(8) / 8)
    with pytest.raises(CheckpointError, match="other ones than DINOv3's"):
        load_any_state(state)


def test_rotary_positions_are_never_guessed(tmp_path):
    """Weights of timm's that have none learned do not tell which rotary ones they have."""
    torch.save(backbone("DINOv3").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="lack pos_embed .absolute positions"):
        load_any(tmp_path / "vit.pth", **LINEAR)
    assert load_any(tmp_path / "vit.pth", **LINEAR, pos_embed="rotary", n_heads=2).config.pos_embed == "rotary"
    with pytest.raises(ValueError, match="rotary positions: give the grid"):
        tiny_model(pos_embed="rotary").encoder.forward_tokens(torch.zeros(1, 17, 64))


def test_rotary_layer_by_layer(monkeypatch):
    """With hooks queries and keys are turned as well; and attention maps are those of the turned ones."""
    model, ran, im = (
        tiny_model(**{**NEWER, "pos_embed": "rotary"}),
        kernels_run(monkeypatch),
        image(14, 3, 5).to(DEVICE),
    )
    slow, fast = twin(model, "eager"), twin(model, "triton")
    with torch.no_grad():
        want = slow.encoder(im, return_features=True)
        seen = []
        fast.encoder.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
        fast.encoder.blocks[1].attn.register_forward_hook(lambda *args: None)
        got = fast.encoder(im, return_features=True)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert ran == ["rotate", "attention", *MLP, "rotate", *MLP], "the second is called, with its weights"
        maps = slow.get_attention_map_enc(im, 0)
        q, k, _ = seen[0].cpu().unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        angles = torch.atan2(slow.encoder.rotation((3, 5)).sin, slow.encoder.rotation((3, 5)).cos)[:, :16].cpu()
        turn = lambda x: torch.cat([x[:, :, :4], turned(x[:, :, 4:], angles)], 2)  # noqa: E731
        want = (turn(q) @ turn(k).mT * 32**-0.5).softmax(-1)
        torch.testing.assert_close(maps.cpu(), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(AnalysisError, match="such as rotary positions"):
        fast.attention(torch.zeros(56, 56, 3, dtype=torch.uint8).numpy(), points=[(3, 3)])


def turned(x, angles):
    """By complex numbers, written independently."""
    z = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("Hugging Face DINOv3", {"decoder_layers": 1, "crop_size": 32}),
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
    recipe = tiny_recipe(tmp_path, model=model, **{"crop_size": 28, "dropout": 0.0, **changes})
    run = tmp_path / "run"
    monkeypatch.setattr(Run, "_evaluate_if_due", killed_after(3, Run._evaluate_if_due))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run, progress=False)
    monkeypatch.undo()
    outcome = train(recipe, run, progress=False)  # only the checkpoint is needed for this
    assert outcome.step == outcome.total == 6 and outcome.best is not None
    trained = from_pretrained(run / "final")
    crop = recipe.crop_size
    assert (trained.info.window_size, trained.info.normalization) == (crop, "deit")
    assert trained.config.layer_scale and trained.config.image_size == (crop, crop)
    gamma = next(p for name, p in made.named_parameters() if name.endswith(("ls1.gamma", "layer_scale1.lambda1")))
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
    with pytest.raises(
        CheckpointError, match="size 32 must be a multiple of the patch size 14, such as 28 or 42 .in training"
    ):
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
        ({"pos_embed": "some"}, "pos_embed 'some' is unknown; choose one of all, patches, rotary"),
        ({"pos_embed": "rotary", "d_model": 60, "n_heads": 10}, "heads of a multiple of 4, not 6"),
        ({"distilled": True, "class_token": False}, "distilled needs class_token"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(**wrong)
    with pytest.raises(ValueError, match="no class token to classify by"):
        tiny_model(class_token=False).encoder(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["DINOv2 with registers", "registers, mean of patches", "DINOv3"])
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
