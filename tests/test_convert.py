"""Weights of other projects: their own forward pass, or an independent computation, against the converted model."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmenter.checkpoint import CheckpointError
from segmenter.config import ConfigError
from segmenter.convert import architecture, change_patch_size, convert, recognise
from segmenter.model import create_segmenter
from segmenter.state import build, load_state
from tests.tiny import tiny_config, tiny_model

D, LAYERS, PATCH, SIDE = 128, 2, 16, 64  # two heads of 64, a 4 x 4 grid


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: t + 1 if re.search(r"(norm\w*|ln\d)\.weight$|scale$", n) else t for n, t in tensors.items()}


def picture(side=SIDE, seed=1):
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
        ({}, "head.weight of 10 classes replaced"),
        ({"num_classes": 0}, "head.weight was not in the file"),
        ({"num_classes": 1000}, ""),
        ({"init_values": 0.5}, "LayerScale folded"),
        ({"no_embed_class": True}, "zeros added for the class token"),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias was not in the file: zeros"),
        ({"num_heads": 4}, ""),
    ],
)
def test_timm_models_give_the_same_features(kwargs, notes):
    model = timm_vit(**kwargs)
    converted = convert(model, n_cls=3)
    assert converted.kind == "timm" and not converted.has_decoder
    assert converted.config.norm_eps == 1e-6 and converted.config.n_heads == model.blocks[0].attn.num_heads
    with torch.no_grad():
        assert_close(features(converted, picture()), model.forward_features(picture()))
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
        assert_close(features(converted, picture()), model.forward_features(picture()))


def test_timm_imagenet_logits_survive():
    model = timm_vit(num_classes=1000)
    with torch.no_grad():
        assert_close(encoder_of(convert(model, n_cls=3))(picture()), model(picture()))


def test_layer_scale_of_facebook_deit3_names():
    model = timm_vit(init_values=0.5)
    renamed = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in model.state_dict().items()}
    with torch.no_grad():
        assert_close(features(convert(renamed, n_cls=3), picture()), model.forward_features(picture()))


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
        ({"reg_tokens": 2}, "register tokens"),
        ({"qk_norm": True}, "qk-norm"),
        ({"fc_norm": True, "global_pool": "avg"}, "norm after pooling"),
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


def jax_arrays(prefix="", **others):
    shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, D),
        "embedding/bias": (D,),
        "cls": (1, 1, D),
        "Transformer/posembed_input/pos_embedding": (1, 17, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
        "head/kernel": (D, 1000),
        "head/bias": (1000,),
        **others,
    }
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/scale": (D,), f"{block}{norm}/bias": (D,)}
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            shapes |= {f"{attention}{name}/kernel": (D, 2, D // 2), f"{attention}{name}/bias": (2, D // 2)}
        shapes |= {f"{attention}out/kernel": (2, D // 2, D), f"{attention}out/bias": (D,)}
        shapes |= {f"{block}MlpBlock_3/Dense_0/kernel": (D, 4 * D), f"{block}MlpBlock_3/Dense_0/bias": (4 * D,)}
        shapes |= {f"{block}MlpBlock_3/Dense_1/kernel": (4 * D, D), f"{block}MlpBlock_3/Dense_1/bias": (D,)}
    return {prefix + name: tensor for name, tensor in random_tensors(shapes).items()}


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
    assert_close(features(converted, picture()), plain_vit(p, picture(), 2, 1e-6))
    assert torch.equal(converted.state["encoder.head.weight"], a["head/kernel"].T)


def test_npz_like_timms_own_loader(tmp_path):
    model = timm_vit(num_classes=1000)
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in jax_arrays().items()})
    model.load_pretrained(str(tmp_path / "a.npz"))
    with torch.no_grad():
        assert_close(features(convert(jax_arrays(), n_cls=3), picture()), model.forward_features(picture()))


def test_npz_of_imagenet_21k_and_hybrids():
    other = convert(
        jax_arrays(**{"pre_logits/kernel": (D, D), "pre_logits/bias": (D,), "head/kernel": (D, 50)}), n_cls=3
    )
    assert other.state["encoder.head.weight"].shape == (1000, D)
    assert not any("pre_logits" in name for name in other.state)
    with pytest.raises(CheckpointError, match="ResNet stem"):
        convert(jax_arrays(**{"conv_root/kernel": (3, 3, 3, 8)}), n_cls=3)


# -- mmsegmentation -------------------------------------------------------------------------------------------------


def to_mmseg(state, n_cls):
    """The inverse map, written independently as plain replacements."""
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("encoder.head"):
            continue
        if name in ("decoder.proj_patch", "decoder.proj_classes"):
            part = name.removeprefix("decoder.proj_")
            theirs[f"decode_head.{part}_proj.weight"] = tensor.T.clone()
            continue
        if name == "decoder.head.weight":
            tensor = tensor[:, :, None, None]
        for ours, mm in [
            ("encoder.patch_embed.proj.", "backbone.patch_embed.projection."), ("encoder.norm.", "backbone.ln1."),
            ("decoder.head.", "decode_head.conv_seg."), ("decoder.proj_dec.", "decode_head.dec_proj."),
            ("encoder.", "backbone."), ("decoder.", "decode_head."), (".blocks.", ".layers."), (".norm1.", ".ln1."),
            (".norm2.", ".ln2."), (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
            (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
        ]:  # fmt: skip
            name = name.replace(ours, mm)
        theirs[name] = tensor.clone()
    if "decode_head.cls_emb" in theirs:
        theirs["decode_head.conv_seg.weight"] = torch.ones(n_cls, 64, 1, 1)
        theirs["decode_head.conv_seg.bias"] = torch.ones(n_cls)
    return theirs


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
    loaded = build(config, converted.state, "eager", "x")
    with torch.no_grad():
        for side in (64, 90):  # 90: position embedding resized
            assert torch.equal(loaded(picture(side)), model(picture(side)))
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
    assert "patch_embed.proj.bias was not in the file: zeros" in "; ".join(converted.notes)


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
        assert torch.equal(features(converted, picture()), model.encoder(picture(), return_features=True))


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
    head_shapes = {f"{h}.{w}": (1000, D)[: 3 - len(w) // 3] for h in heads for w in ("weight", "bias")}
    head_shapes = {k: (1000, D) if k.endswith("weight") else (1000,) for k in head_shapes}
    logits = random_tensors(head_shapes, seed=5)

    converted = convert({prefix + k: v for k, v in t.items()} | logits, n_cls=3)
    assert converted.kind == "hf" and converted.config.distilled == distilled
    assert (converted.config.norm_eps, converted.config.pos_embed_mode) == (1e-12, "bicubic")
    assert_close(features(converted, picture()), plain_vit(p, picture(), 2, 1e-12))
    assert torch.equal(converted.state["encoder.head.weight"], logits[f"{heads[0]}.weight"])
    if distilled:
        assert torch.equal(converted.state["encoder.head_dist.bias"], logits["distillation_classifier.bias"])


# -- recognising, shapes, arguments ---------------------------------------------------------------------------------


def test_recognise():
    state = tiny_model().state_dict()
    assert recognise(state) == "segmenter"
    assert recognise(to_mmseg(state, 5)) == "mmseg"
    assert recognise(jax_arrays()) == recognise(jax_arrays("opt/target/")) == "npz"
    assert recognise([name.removeprefix("encoder.") for name in state]) == "timm"
    assert recognise(["vit.embeddings.patch_embeddings.projection.weight"]) == "hf"
    assert recognise(["conv1.weight", "fc.weight"]) is None
    with pytest.raises(CheckpointError, match=r"no known kind \(choose one of segmenter, mmseg.*conv1\.weight"):
        convert({"conv1.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="kind 'keras' is unknown"):
        convert(state, kind="keras")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"decoder": {"name": "linear"}, "n_cls": 2},
        {"patch_size": 8, "image_size": (48, 48)},
        {"d_model": 192, "n_heads": 3, "n_layers": 1, "distilled": True, "normalization": "deit"},
        {"decoder": {"name": "mask_transformer", "n_layers": 3}},
    ],
)
def test_architecture_is_read_off_the_shapes(overrides):
    model = tiny_model(**overrides)
    config = convert(model.state_dict()).config
    for name in ("image_size", "patch_size", "d_model", "n_heads", "n_layers", "n_cls", "distilled", "normalization"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert config.decoder == model.config.decoder


def test_a_grid_that_is_not_square_must_be_told():
    model = tiny_model(image_size=(32, 80))  # 2 x 5 patches
    with pytest.raises(CheckpointError, match="10 patches, no square; give its grid"):
        convert(model.state_dict())
    assert convert(model.state_dict(), grid=(2, 5)).config.image_size == (32, 80)
    assert convert(model.state_dict(), image_size=(32, 80)).config.image_size == (32, 80)
    with pytest.raises(CheckpointError, match=r"neither a square nor the \(2, 4\) grid"):
        convert(model.state_dict(), image_size=(32, 64))
    with pytest.raises(CheckpointError, match=r"10 patches, which is no \(3, 3\) grid"):
        convert(model.state_dict(), grid=(3, 3))
    resized = convert(tiny_model(image_size=(32, 128)).state_dict(), grid=(2, 8), image_size=(32, 64))  # 16 = 4 x 4
    assert resized.state["encoder.pos_embed"].shape == (1, 9, 64)


def test_image_size_resizes_the_position_embedding():
    model = tiny_model()
    converted = convert(model.state_dict(), image_size=96)
    grid = model.encoder.pos_embed[:, 1:].detach().reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bilinear").flatten(2).transpose(1, 2)
    assert torch.equal(converted.state["encoder.pos_embed"][:, 1:], expected)
    assert torch.equal(converted.state["encoder.pos_embed"][:, :1], model.encoder.pos_embed[:, :1])
    assert converted.config.image_size == (96, 96) and "resized from (4, 4) to (6, 6)" in converted.notes[0]
    with pytest.raises(CheckpointError, match="image_size 100 must be a multiple of the patch size 16"):
        convert(model.state_dict(), image_size=100)


@pytest.mark.parametrize(
    "request_, error, message",
    [
        ({"n_cls": 19}, CheckpointError, "19 classes were asked for, the file holds a model of 5 classes"),
        ({"decoder": "linear"}, CheckpointError, "the file holds a mask_transformer decoder"),
        ({"normalization": "imagenet"}, CheckpointError, "normalization 'imagenet' is unknown"),
        ({"n_heads": 5}, CheckpointError, "do not make a Segmenter: d_model 64 must be divisible by n_heads 5"),
        ({"normalisation": "vit"}, ConfigError, "argument normalisation is unknown"),
        ({"kind": "timm"}, CheckpointError, "timm weights lack pos_embed"),
        ({"kind": "npz"}, CheckpointError, "npz weights"),
    ],
)
def test_requests_that_contradict_the_file(request_, error, message):
    with pytest.raises(error, match=message):
        convert(tiny_model().state_dict(), **request_)


def test_weights_with_parts_missing():
    state = tiny_model().state_dict()
    for name in ("encoder.pos_embed", "encoder.patch_embed.proj.weight"):
        with pytest.raises(CheckpointError, match=f"lack {name}"):
            architecture({k: v for k, v in state.items() if k != name})
    theirs = {k: v for k, v in to_mmseg(state, 5).items() if "patch_proj" not in k}
    with pytest.raises(CheckpointError, match=r"mmseg weights lack decode_head\.patch_proj\.weight"):
        convert(theirs)
    jax = {k: v for k, v in jax_arrays().items() if "encoderblock_1/MultiHeadDotProductAttention_1/key" not in k}
    with pytest.raises(CheckpointError, match=r"npz weights lack encoder\.blocks\.1\.attn\.k\."):
        convert(jax, n_cls=3)
    with pytest.raises(CheckpointError, match="patch embedding must be"):
        architecture(state | {"encoder.patch_embed.proj.weight": torch.ones(64, 3, 16, 8)})
    with pytest.raises(CheckpointError, match="position embedding must be"):
        architecture(state | {"encoder.pos_embed": torch.ones(5, 64)})


# -- patch size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [8, 32])
def test_another_patch_size_answers_alike_on_smooth_images(patch_size):
    pytest.importorskip("timm.layers", reason="timm resamples the patch embedding", exc_type=Exception)
    model = tiny_model()
    converted = convert(model.state_dict(), patch_size=patch_size)
    config = converted.config
    assert config.patch_size == patch_size and config.image_size == (4 * patch_size, 4 * patch_size)
    assert "an extension" in converted.notes[0]
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), torch.ones(64, 64)])[None]
    other = F.interpolate(image, size=config.image_size, mode="bilinear", antialias=True)
    small = build(config, converted.state, "eager", "x")
    with torch.no_grad():
        a, b = model.encoder.patch_embed(image), small.encoder.patch_embed(other)
    assert F.cosine_similarity(a, b, dim=-1).min() > 0.97
    resized = change_patch_size(model.state_dict(), patch_size, (6, 6))
    assert resized["encoder.pos_embed"].shape == (1, 37, 64)
    assert model.encoder.patch_embed.proj.weight.shape[-1] == 16  # the argument is unchanged


def test_encoder_of_width_that_is_no_multiple_of_64_needs_heads():
    model = create_segmenter(tiny_config(d_model=96, n_heads=3, decoder={"name": "linear"}))
    with pytest.raises(CheckpointError, match="width 96 is no multiple of 64; give n_heads"):
        convert(model.state_dict())
    assert convert(model.state_dict(), n_heads=3).config.n_heads == 3
