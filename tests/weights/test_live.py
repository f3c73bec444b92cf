"""Live models: right or refused by name, whatever their weights are called; and they are left as they were."""

import copy

import pytest
import torch
import torch.nn as nn

from segmenter.weights.convert import convert
from segmenter.weights.load import convert_checkpoint, load_any
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_model

timm = pytest.importorskip("timm", reason="timm makes the models", exc_type=Exception)
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 0}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    return model.eval()


def plain(**options):
    return randomised(timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options}))


def named(name, **options):
    return randomised(timm.create_model(name, pretrained=False, **{"num_classes": 0, "depth": 1, **options}))


def image(size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options, note",
    [
        ({}, ""),
        ({"img_size": (32, 128)}, ""),  # 16 patches, no 4 x 4
        ({"img_size": (48, 80)}, ""),  # 16 tokens, no 4 x 4 patches
        ({"img_size": (48, 80), "no_embed_class": True}, ""),
        ({"img_size": 64, "no_embed_class": True, "init_values": 0.5}, ""),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False, "img_size": (48, 80)}, ""),
        ({"dynamic_img_size": True, "img_size": (48, 80)}, ""),
        ({"qkv_bias": False, "num_heads": 4}, "not in the file, zeros"),
    ],
)
def test_plain_models_give_their_own_tokens(options, note, tmp_path):
    vit = plain(**options)
    size = vit.patch_embed.img_size
    model = load_any(vit, n_cls=3)
    assert model.config.image_size == size
    with torch.no_grad():
        expected = vit.forward_features(image(size))
        found = model.encoder(image(size), return_features=True)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    report = str(convert_checkpoint(vit, tmp_path / "out", n_cls=3))
    assert note in report and "its tokens are those of the live model" in report and "(exact)" in report


def test_exact_is_said_of_compared_conversions_only(tmp_path):
    vit = plain(qkv_bias=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    report = str(convert_checkpoint(tmp_path / "vit.pth", tmp_path / "out", n_cls=3))
    assert "not in the file, zeros" in report and "(exact)" not in report
    assert convert(vit.state_dict(), n_cls=3).difference is None
    assert 0 <= convert(vit, n_cls=3).difference < 1e-5


GATED = {"embed_dim": 64, "num_heads": 2, "mlp_ratio": 4}
ROPE = "vit_small_patch16_rope_ape_224"


@pytest.mark.parametrize(
    "make, feature",
    [
        (lambda: named(ROPE, img_size=64), "rotary positions"),
        (lambda: named("vit_small_patch16_rope_mixed_ape_224", img_size=64), "rotary positions"),
        (lambda: named("beit_base_patch16_224", img_size=64), "relative positions"),
        (lambda: named("vit_relpos_small_patch16_224", img_size=64), "relative positions"),
        (lambda: named("vit_srelpos_small_patch16_224", img_size=64), "relative positions"),
        (lambda: named("samvit_base_patch16", img_size=64), "decomposed relative positions"),
        (lambda: named("cait_xxs24_224", img_size=64), "talking heads"),
        (lambda: named("convit_tiny", img_size=64), "gated positional attention"),
        (lambda: named("xcit_tiny_12_p16_224", img_size=64), "cross-covariance attention"),
        (lambda: named("eva02_tiny_patch14_336", img_size=56), "biases of queries and values alone"),
        (lambda: named("eva02_base_patch16_clip_224", img_size=64), r"a gated MLP \(SwiGLU\)"),
        (lambda: named("beit3_base_patch16_224", img_size=64), "norms inside attention or MLP"),
        (lambda: named("vit_giant_patch14_reg4_dinov2", img_size=56, **GATED), "a gated MLP .*sizes S, B and L"),
        (lambda: named("vit_small_plus_patch16_dinov3", img_size=64, **GATED), "a gated MLP .*sizes S, B and L"),
        (lambda: named("vit_small_patch16_dinov3", qk_norm=True, img_size=64, **GATED), "qk-norm"),
        (lambda: plain(norm_layer=timm.layers.RmsNorm), r"norms without bias \(RMSNorm\)"),
        (lambda: plain(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "parallel attention and MLP"),
        (lambda: plain(attn_layer="diff"), "differential attention"),
        (lambda: plain(qk_norm=True), "qk-norm"),
        (lambda: plain(pos_embed="none"), "absolute positions"),
        (lambda: plain(mlp_layer=timm.layers.SwiGLUPacked), "gated MLP|MLP uses SiLU"),
    ],
)
def test_other_encoders_are_refused_by_name(make, feature, tmp_path):
    model = make()
    with pytest.raises(CheckpointError, match=feature):
        load_any(model, n_cls=3)
    if "rope_ape" not in str(getattr(model, "pretrained_cfg", {}).get("architecture")):  # nothing in its weights tells
        torch.save(model.state_dict(), tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=feature):
            load_any(tmp_path / "file.pth", n_cls=3)


def test_what_no_name_tells_is_found_by_comparing():
    post_norm = plain(block_fn=timm.models.vision_transformer.ResPostBlock)  # the names and shapes of a plain ViT
    with pytest.raises(CheckpointError, match="VisionTransformer is no plain ViT: its tokens are .* away"):
        load_any(post_norm, n_cls=3)
    scaled = plain()
    scaled.blocks[0].attn.fused_attn, scaled.blocks[0].attn.scale = False, 1.0
    with pytest.raises(CheckpointError, match="is no plain ViT"):
        load_any(scaled, n_cls=3)
    overlapping = plain(img_size=64)
    overlapping.patch_embed.proj.stride = (8, 8)
    with pytest.raises(CheckpointError, match="does not run on an image of .64, 64., so that"):
        load_any(overlapping, n_cls=3)
    causal = plain()
    forward = causal.forward_features
    causal.forward_features = lambda x: forward(x, is_causal=True)
    with pytest.raises(CheckpointError, match="is no plain ViT"):
        load_any(causal, n_cls=3)


def test_a_live_model_is_left_as_it_was():
    vit = plain(img_size=32, patch_size=8, embed_dim=128).half().train()
    vit.blocks[0].attn.eval()
    modes = [module.training for module in vit.modules()]
    before = copy.deepcopy(vit.state_dict())
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    convert(vit, n_cls=3)
    assert torch.equal(torch.rand(1), wanted)  # no random numbers taken
    assert [module.training for module in vit.modules()] == modes
    after = vit.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float16 for name in before)


def test_wrappers_of_trainers_are_looked_through():
    vit = plain()
    expected = load_any(vit, n_cls=3).state_dict()["encoder.blocks.0.attn.qkv.weight"]
    for wrapped in (nn.DataParallel(vit), torch.optim.swa_utils.AveragedModel(vit)):
        assert torch.equal(load_any(wrapped, n_cls=3).state_dict()["encoder.blocks.0.attn.qkv.weight"], expected)


def test_grids_that_contradict_a_live_model():
    with pytest.raises(CheckpointError, match=r"grid \(2, 8\) was given, the live model's is \(4, 4\)"):
        convert(plain(), n_cls=3, grid=(2, 8))
    with pytest.raises(CheckpointError, match="is on the meta device"), torch.device("meta"):
        convert(timm.models.vision_transformer.VisionTransformer(**SMALL), n_cls=3)
    with pytest.raises(CheckpointError, match="one set of weights, none averaged"):
        load_any(plain(), n_cls=3, averaged=True)


def test_a_live_segmenter_keeps_its_configuration():
    model = tiny_model(image_size=(32, 128), norm_eps=1e-3, pos_embed_mode="bicubic")
    again = load_any(model)
    assert (again.config.image_size, again.config.norm_eps) == ((32, 128), 1e-3)
    with torch.no_grad():
        assert torch.equal(again(image((32, 128))), model(image((32, 128))))


def test_live_models_of_transformers():
    transformers = pytest.importorskip("transformers", exc_type=Exception)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    for image_size in ((32, 128), (48, 80), 64):
        config = transformers.ViTConfig(**size, image_size=image_size, patch_size=16, layer_norm_eps=1e-3)
        vit = randomised(transformers.ViTForImageClassification(config))
        model = load_any(vit, n_cls=3)
        with torch.no_grad():
            expected = vit.vit(pixel_values=image(model.config.image_size)).last_hidden_state
            found = model.encoder(image(model.config.image_size), return_features=True)
        assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    config = transformers.IJepaConfig(**size, image_size=64, patch_size=16)
    with pytest.raises(CheckpointError, match="model_type 'ijepa' is none of the plain ViTs"):
        load_any(transformers.IJepaModel(config), n_cls=3)


def test_a_masked_autoencoder_is_compared_without_its_mask():
    transformers = pytest.importorskip("transformers", exc_type=Exception)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    config = transformers.ViTMAEConfig(**size, image_size=64, patch_size=16)
    mae = randomised(transformers.ViTMAEModel(config))
    assert convert(mae, n_cls=3).difference < 1e-5
    assert mae.config.mask_ratio == 0.75


def test_weights_in_several_files_are_named_as_such(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in several files \(model.safetensors.index.json\)"):
        load_any(tmp_path, n_cls=3)
