"""Weights of other projects: their own forward pass, or an independent computation, against the converted model."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmenter.model import create_segmenter
from segmenter.weights.build import build, load_state
from segmenter.weights.convert import convert
from segmenter.weights.read import CheckpointError
from tests.support.foreign import LAYERS, PATCH, SIDE, D, jax_arrays, random_tensors, to_mmseg
from tests.support.tiny import tiny_model


def image(side=SIDE, seed=1):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def encoder_of(converted):
    """The encoder that the converted weights make; strict."""
    model = create_segmenter(converted.config, "eager").eval()
    load_state(model.encoder, {k.removeprefix("encoder."): v for k, v in converted.state.items()})
    return model.encoder


def features(converted, im):
    with torch.no_grad():
        return encoder_of(converted)(im, return_features=True)


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape and expected.std() > 0.1
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def plain_vit(p, im, heads, eps):
    """A ViT written out with explicit softmax: the reference for layouts that nothing installed here can run.

    `p` has one entry per projection: blk.i.{n1,q,k,v,o,n2,f1,f2} as (weight (out, in), bias).
    """
    grid = F.conv2d(im, *p["patch"], stride=p["patch"][0].shape[-1])
    x = grid.flatten(2).transpose(1, 2)
    extra = p["extra"].expand(im.shape[0], -1, -1)
    x = torch.cat([extra, x], 1) + p["pos"]
    norm = lambda x, wb: F.layer_norm(x, x.shape[-1:], *wb, eps)  # noqa: E731
    split = lambda x: x.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731
    for i in range(p["layers"]):
        y = norm(x, p[f"{i}.n1"])
        q, k, v = (split(F.linear(y, *p[f"{i}.{name}"])) for name in "qkv")
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + F.linear(attention.transpose(1, 2).flatten(2), *p[f"{i}.o"])
        y = F.linear(norm(x, p[f"{i}.n2"]), *p[f"{i}.f1"])
        x = x + F.linear(F.gelu(y), *p[f"{i}.f2"])
    return norm(x, p["norm"])


# -- timm -----------------------------------------------------------------------------------------------------------


def timm_vit(name="VisionTransformer", **kwargs):
    vit = pytest.importorskip(
        "timm.models.vision_transformer", reason="timm makes the reference here", exc_type=Exception
    )
    if name != "VisionTransformer":
        vit = pytest.importorskip("timm.models.deit", exc_type=Exception)
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": D, "depth": LAYERS, "num_heads": 2}
    model = getattr(vit, name)(**{**size, "num_classes": 10, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "kwargs, notes",
    [
        ({}, "replaced by zeros, an ImageNet head"),
        ({"num_classes": 0}, r"not in the file, zeros: encoder\.head\.weight"),
        ({"num_classes": 1000}, ""),
        ({"init_values": 0.5, "num_classes": 1000}, ""),
        ({"no_embed_class": True, "num_classes": 1000}, ""),
        ({"reg_tokens": 2, "num_classes": 1000}, ""),
        ({"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5, "num_classes": 1000}, ""),
        ({"fc_norm": True, "global_pool": "avg"}, "left out: fc_norm and the head"),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, "left out: fc_norm and the head"),
        ({"qkv_bias": False}, r"not in the file, zeros: encoder\.blocks\.0\.attn\.qkv\.bias"),
        ({"num_heads": 4, "num_classes": 1000}, ""),
    ],
)
def test_timm_models_give_the_same_features(kwargs, notes):
    model = timm_vit(**kwargs)
    converted = convert(model, n_cls=3)
    assert converted.kind == "timm" and not converted.has_decoder
    assert converted.config.norm_eps == 1e-6 and converted.config.n_heads == model.blocks[0].attn.num_heads
    with torch.no_grad():
        assert_close(features(converted, image()), model.forward_features(image()))
    assert re.search(notes, "; ".join(converted.notes)) and (notes or not converted.notes)


def test_timm_state_dict_equals_live_model_and_stays_unchanged():
    model = timm_vit(init_values=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live, read = convert(model, n_cls=3), convert(state, n_cls=3)
    assert live.state.keys() == read.state.keys()
    assert all(torch.equal(live.state[k], read.state[k]) for k in live.state)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    live.state["encoder.cls_token"].fill_(9)
    assert model.cls_token.max() < 5  # nothing shared


def test_timm_distilled():
    model = timm_vit("VisionTransformerDistilled", num_classes=7)
    converted = convert(model.state_dict(), n_cls=3)
    assert converted.config.distilled and converted.config.normalization == "deit"
    with torch.no_grad():
        assert_close(features(converted, image()), model.forward_features(image()))


def test_timm_imagenet_logits_survive():
    model = timm_vit(num_classes=1000)
    with torch.no_grad():
        assert_close(encoder_of(convert(model, n_cls=3))(image()), model(image()))


def test_layer_scale_of_facebook_deit3_names():
    model = timm_vit(init_values=0.5)
    renamed = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in model.state_dict().items()}
    with torch.no_grad():
        assert_close(features(convert(renamed, n_cls=3), image()), model.forward_features(image()))


def test_timm_normalization_follows_the_live_model():
    model = timm_vit()
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406)}
    assert convert(model, n_cls=3).config.normalization == "deit"
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5)}
    assert convert(model, n_cls=3).config.normalization == "vit"
    assert convert(model, n_cls=3, normalization="deit").config.normalization == "deit"


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"qk_norm": True}, "qk-norm"),
        ({"pre_norm": True}, "norm before the blocks"),
        ({"mlp_ratio": 2}, "the MLP is 256 wide; the Segmenter encoder has 4 x 128"),
        ({"in_chans": 4}, r"patch embedding must be \(d, 3, P, P\), found \(128, 4, 16, 16\)"),
        ({"act_layer": torch.nn.ReLU}, "the MLP uses ReLU"),
    ],
)
def test_timm_models_that_are_no_plain_vit(kwargs, message):
    with pytest.raises(CheckpointError, match=message):
        convert(timm_vit(**kwargs), n_cls=3)


def test_live_models_of_other_kinds_are_refused():
    with pytest.raises(CheckpointError, match="no known kind"):
        convert(torch.nn.Linear(2, 2), n_cls=3)
    odd = torch.nn.Module()
    odd.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="no plain VisionTransformer of timm"):
        convert(odd, n_cls=3)


# -- JAX npz --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_npz_gives_the_features_of_the_jax_formulas(prefix):
    a = jax_arrays()
    p = {"patch": (a["embedding/kernel"].permute(3, 2, 0, 1), a["embedding/bias"]), "layers": LAYERS, "extra": a["cls"]}
    p["pos"] = a["Transformer/posembed_input/pos_embedding"]
    p["norm"] = (a["Transformer/encoder_norm/scale"], a["Transformer/encoder_norm/bias"])
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}/"
        attention = block + "MultiHeadDotProductAttention_1/"
        for ours, name in (("n1", "LayerNorm_0"), ("n2", "LayerNorm_2")):
            p[f"{i}.{ours}"] = (a[f"{block}{name}/scale"], a[f"{block}{name}/bias"])
        for ours, name in (
            ("q", "query"),
            ("k", "key"),
            ("v", "value"),
        ):  # einsum "nd,dhe->nhe", written as rows (h, e)
            kernel = torch.einsum("dhe->hed", a[f"{attention}{name}/kernel"]).reshape(D, D)
            p[f"{i}.{ours}"] = (kernel, a[f"{attention}{name}/bias"].reshape(D))
        kernel = torch.einsum("hed->dhe", a[f"{attention}out/kernel"]).reshape(D, D)
        p[f"{i}.o"] = (kernel, a[f"{attention}out/bias"])
        for ours, name in (("f1", "Dense_0"), ("f2", "Dense_1")):
            p[f"{i}.{ours}"] = (a[f"{block}MlpBlock_3/{name}/kernel"].T, a[f"{block}MlpBlock_3/{name}/bias"])
    converted = convert(jax_arrays(prefix), n_cls=3)
    assert converted.kind == "npz" and converted.config.n_heads == 2 and converted.config.norm_eps == 1e-6
    assert_close(features(converted, image()), plain_vit(p, image(), 2, 1e-6))
    assert torch.equal(converted.state["encoder.head.weight"], a["head/kernel"].T)


def test_npz_like_timms_own_loader(tmp_path):
    model = timm_vit(num_classes=1000)
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in jax_arrays().items()})
    model.load_pretrained(str(tmp_path / "a.npz"))
    with torch.no_grad():
        assert_close(features(convert(jax_arrays(), n_cls=3), image()), model.forward_features(image()))


def test_npz_of_imagenet_21k_and_hybrids():
    other = convert(
        jax_arrays(**{"pre_logits/kernel": (D, D), "pre_logits/bias": (D,), "head/kernel": (D, 50)}), n_cls=3
    )
    assert other.state["encoder.head.weight"].shape == (1000, D)
    assert not any("pre_logits" in name for name in other.state)
    with pytest.raises(CheckpointError, match="ResNet stem"):
        convert(jax_arrays(**{"conv_root/kernel": (3, 3, 3, 8)}), n_cls=3)


# -- mmsegmentation -------------------------------------------------------------------------------------------------


MMSEG = {"norm_eps": 1e-6, "pos_embed_mode": "bicubic"}


@pytest.mark.parametrize("decoder", [{"name": "linear"}, {"name": "mask_transformer", "n_layers": 2}])
def test_mmseg_gives_the_same_logits(decoder):
    model = tiny_model(decoder=decoder, **MMSEG)
    converted = convert(to_mmseg(model.state_dict(), 5))
    assert (converted.kind, converted.has_decoder) == ("mmseg", True)
    config = converted.config
    assert (config.n_cls, config.decoder["name"]) == (5, decoder["name"])
    assert config.decoder.get("n_layers") == decoder.get("n_layers")
    assert (config.norm_eps, config.pos_embed_mode) == (1e-6, "bicubic")
    loaded = build(converted, "eager", "x")
    with torch.no_grad():
        for side in (64, 90):  # 90: position embedding resized
            assert torch.equal(loaded(image(side)), model(image(side)))
    if decoder["name"] != "linear":
        assert "conv_seg dropped" in "; ".join(converted.notes)


def test_mmseg_projections_are_transposed():
    theirs = to_mmseg(tiny_model().state_dict(), 5)
    theirs["decode_head.patch_proj.weight"] = torch.arange(64.0 * 64).reshape(64, 64)
    assert convert(theirs).state["decoder.proj_patch"][3, 5] == 5 * 64 + 3


def test_mmseg_without_patch_bias_gets_zeros():
    theirs = to_mmseg(tiny_model().state_dict(), 5)
    del theirs["backbone.patch_embed.projection.bias"]
    converted = convert(theirs)
    assert torch.equal(converted.state["encoder.patch_embed.proj.bias"], torch.zeros(64))
    assert "zeros: encoder.patch_embed.proj.bias" in "; ".join(converted.notes)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mmseg_pretrain_file_is_an_encoder(prefix):
    model = tiny_model(**MMSEG)
    theirs = {k: v for k, v in to_mmseg(model.state_dict(), 5).items() if k.startswith("backbone.")}
    theirs = {prefix + k.removeprefix("backbone."): v for k, v in theirs.items()}
    with pytest.raises(CheckpointError, match="pretrained backbone, not a segmentation checkpoint.*give n_cls"):
        convert(theirs)
    converted = convert(theirs, n_cls=4, decoder="linear")
    assert not converted.has_decoder and converted.config.decoder == {"name": "linear"}
    with torch.no_grad():
        assert torch.equal(features(converted, image()), model.encoder(image(), return_features=True))


def test_mmseg_heads_of_other_networks_are_refused():
    theirs = to_mmseg(tiny_model().state_dict(), 5) | {"decode_head.convs.0.conv.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"parts that a Segmenter has not: decode_head\.convs|decoder\.convs"):
        convert(theirs)


# -- Hugging Face ---------------------------------------------------------------------------------------------------

HUB = {
    "n1": "encoder.layer.{}.layernorm_before", "q": "encoder.layer.{}.attention.attention.query",
    "k": "encoder.layer.{}.attention.attention.key", "v": "encoder.layer.{}.attention.attention.value",
    "o": "encoder.layer.{}.attention.output.dense", "n2": "encoder.layer.{}.layernorm_after",
    "f1": "encoder.layer.{}.intermediate.dense", "f2": "encoder.layer.{}.output.dense",
}  # fmt: skip
MEMORY = {
    "n1": "layers.{}.layernorm_before", "q": "layers.{}.attention.q_proj", "k": "layers.{}.attention.k_proj",
    "v": "layers.{}.attention.v_proj", "o": "layers.{}.attention.o_proj", "n2": "layers.{}.layernorm_after",
    "f1": "layers.{}.mlp.fc1", "f2": "layers.{}.mlp.fc2",
}  # fmt: skip


@pytest.mark.parametrize("names", [HUB, MEMORY])
@pytest.mark.parametrize("prefix", ["vit.", "deit.", ""])
def test_hugging_face_names(names, prefix):
    distilled = prefix == "deit."
    shapes = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.position_embeddings": (1, 17 + distilled, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
        "pooler.dense.weight": (D, D),
        "pooler.dense.bias": (D,),
    }
    if distilled:
        shapes["embeddings.distillation_token"] = (1, 1, D)
    for i in range(LAYERS):
        for key, name in names.items():
            rows, columns = {"f1": (4 * D, D), "f2": (D, 4 * D)}.get(key, (D, D))
            weight = (rows,) if key in ("n1", "n2") else (rows, columns)
            shapes |= {f"{name.format(i)}.weight": weight, f"{name.format(i)}.bias": (rows,)}
    t = random_tensors(shapes)
    pair = lambda name: (t[f"{name}.weight"], t[f"{name}.bias"])  # noqa: E731
    p = {"patch": pair("embeddings.patch_embeddings.projection"), "norm": pair("layernorm"), "layers": LAYERS}
    tokens = ["embeddings.cls_token"] + ["embeddings.distillation_token"] * distilled
    p |= {"extra": torch.cat([t[name] for name in tokens], 1), "pos": t["embeddings.position_embeddings"]}
    p |= {f"{i}.{key}": pair(name.format(i)) for i in range(LAYERS) for key, name in names.items()}
    heads = ["cls_classifier", "distillation_classifier"] if distilled else ["classifier"]
    logits = random_tensors({f"{h}.weight": (1000, D) for h in heads} | {f"{h}.bias": (1000,) for h in heads}, seed=5)

    converted = convert({prefix + k: v for k, v in t.items()} | logits, n_cls=3)
    assert converted.kind == "hf" and converted.config.distilled == distilled
    assert (converted.config.norm_eps, converted.config.pos_embed_mode) == (1e-12, "bicubic")
    assert_close(features(converted, image()), plain_vit(p, image(), 2, 1e-12))
    assert torch.equal(converted.state["encoder.head.weight"], logits[f"{heads[0]}.weight"])
    if distilled:
        assert torch.equal(converted.state["encoder.head_dist.bias"], logits["distillation_classifier.bias"])


def test_live_hugging_face_model_tells_its_configuration():
    class Config:
        def to_dict(self):
            return self.__dict__

    model = torch.nn.Module()
    model.state_dict = lambda: {}
    model.config = Config()
    model.config.hidden_act = "quick_gelu"
    with pytest.raises(CheckpointError, match="hidden_act is 'quick_gelu'"):
        convert(model, n_cls=3)
    model.config.hidden_act, model.config.layer_norm_eps, model.config.num_attention_heads = "gelu", 1e-7, 4
    state = {k: v for k, v in tiny_model().state_dict().items() if k.startswith("encoder.")}
    model.state_dict = lambda: state
    config = convert(model, n_cls=3).config
    assert (config.norm_eps, config.n_heads) == (1e-7, 4)
