"""Encoder, decoders and the whole network, behaviour by behaviour."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from segmenter import Segmenter, create_segmenter
from segmenter.config import ModelConfig
from segmenter.decoder import DecoderLinear
from segmenter.kernels import reference
from segmenter.layers import DropPath, pad_to_multiple, resize_pos_embed
from segmenter.ops import EAGER
from tests.support.tiny import tiny_config, tiny_model


def image(h, w, batch=1, seed=0):
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_forward(model, im):
    """The network written out once more, token by token, from the state dict alone."""
    w, P = model.state_dict(), model.patch_size
    heads = model.encoder.n_heads

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def block(x, name, h):
        qkv = linear(norm(x, name + ".norm1"), name + ".attn.qkv")
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        p = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + linear((p @ v).transpose(1, 2).flatten(2), name + ".attn.proj")
        hidden = linear(norm(x, name + ".norm2"), name + ".mlp.fc1")
        return x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), name + ".mlp.fc2")

    B, _, H, W = im.shape
    im = F.pad(im, (0, -W % P, 0, -H % P))
    gh, gw = im.shape[2] // P, im.shape[3] // P
    patches = im.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).reshape(B, gh * gw, -1)
    x = patches @ w["encoder.patch_embed.proj.weight"].flatten(1).T + w["encoder.patch_embed.proj.bias"]
    extra = [w[f"encoder.{n}_token"].expand(B, 1, -1) for n in ("cls", "dist") if f"encoder.{n}_token" in w]
    x, pos = torch.cat([*extra, x], 1), w["encoder.pos_embed"]
    if pos.shape[1] != x.shape[1]:
        n = len(extra)
        side = round((pos.shape[1] - n) ** 0.5)
        grid = pos[:, n:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (gh, gw), mode="bilinear", align_corners=False)
        pos = torch.cat([pos[:, :n], grid.flatten(2).mT], 1)
    x = x + pos
    for i in range(model.encoder.n_layers):
        x = block(x, f"encoder.blocks.{i}", heads)
    x = norm(x, "encoder.norm")[:, len(extra) :]
    if "decoder.head.weight" in w:
        masks = linear(x, "decoder.head")
    else:
        K, d = w["decoder.cls_emb"].shape[1:]
        x = torch.cat([linear(x, "decoder.proj_dec"), w["decoder.cls_emb"].expand(B, -1, -1)], 1)
        for i in range(model.decoder.n_layers):
            x = block(x, f"decoder.blocks.{i}", d // 64)
        x = norm(x, "decoder.decoder_norm")
        p, c = x[:, :-K] @ w["decoder.proj_patch"], x[:, -K:] @ w["decoder.proj_classes"]
        masks = norm(F.cosine_similarity(p[:, :, None], c[:, None], -1), "decoder.mask_norm")
    masks = masks.mT.reshape(B, -1, gh, gw)
    return F.interpolate(masks, im.shape[2:], mode="bilinear", align_corners=False)[..., :H, :W]


@pytest.mark.parametrize("patch_size", [8, 16, 32])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "decoder", [{"name": "linear"}, {"name": "mask_transformer", "n_layers": 2}], ids=["lin", "mask"]
)
def test_forward_equals_the_written_out_network(patch_size, distilled, decoder):
    model = tiny_model(
        patch_size=patch_size, distilled=distilled, decoder=decoder, d_model=128, n_heads=2, normalization="deit"
    )
    for h, w in ((64, 64), (70, 45), (128, 64)):
        im = image(h, w, batch=2)
        want = plain_forward(model, im)
        got = model(im)
        assert got.shape == (2, 5, h, w)
        assert want.std() > 0.1
        torch.testing.assert_close(got, want, atol=2e-5 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_any_decoder_depth(n_layers):
    model = tiny_model(decoder={"name": "mask_transformer", "n_layers": n_layers})
    assert len(model.decoder.blocks) == n_layers
    im = image(48, 64)
    torch.testing.assert_close(model(im), plain_forward(model, im), atol=1e-4, rtol=0)


def test_masks_upsampled_and_cropped_are_the_logits(model):
    im = image(50, 37)
    masks = model.masks(im)
    assert masks.shape == (1, 5, 4, 3)
    want = F.interpolate(masks, (64, 48), mode="bilinear")[..., :50, :37]
    torch.testing.assert_close(model(im), want, atol=0, rtol=0)


def test_padding_is_zeros_right_and_below():
    im = image(5, 7)
    padded = pad_to_multiple(im, 4)
    assert padded.shape == (1, 3, 8, 8)
    torch.testing.assert_close(padded[..., :5, :7], im)
    assert padded[..., 5:, :].abs().sum() == padded[..., 7:].abs().sum() == 0
    assert pad_to_multiple(padded, 4) is padded


def test_single_pixel_image(model):
    assert model(image(1, 1)).shape == (1, 5, 1, 1)


def test_position_embedding_quirk_and_its_correction():
    """The published code looks at the token count only: 32x128 has as many 16-pixel patches as 64x64."""
    im = image(32, 128)
    quirky, corrected = tiny_model(), tiny_model(pos_embed_check="grid")
    with torch.no_grad():
        as_is = quirky.encoder.embed(im) - quirky.encoder.pos_embed
        resized = resize_pos_embed(quirky.encoder.pos_embed, (4, 4), (2, 8), 1)
        torch.testing.assert_close(corrected.encoder.embed(im), as_is + resized)
        assert (quirky(im) - corrected(im)).abs().max() > 1e-3
        torch.testing.assert_close(quirky(image(64, 64)), corrected(image(64, 64)))


def test_position_embedding_modes_and_errors():
    pos = torch.randn(1, 1 + 16, 8)
    same = resize_pos_embed(pos, None, (4, 4), 1)
    torch.testing.assert_close(same, pos)
    bilinear, bicubic = (resize_pos_embed(pos, None, (7, 5), 1, mode) for mode in ("bilinear", "bicubic"))
    assert bilinear.shape == bicubic.shape == (1, 36, 8)
    torch.testing.assert_close(bilinear[:, :1], pos[:, :1])
    assert (bilinear - bicubic).abs().max() > 0.01
    with pytest.raises(ValueError, match="16 patches, which is not a .3, 5. grid"):
        resize_pos_embed(pos, (3, 5), (4, 4), 1)


def test_encoder_outputs(model):
    im = image(64, 64, batch=2)
    features = model.encoder(im, return_features=True)
    assert features.shape == (2, 17, 64)
    torch.testing.assert_close(model.encoder(im), model.encoder.head(features[:, 0]))
    distilled = tiny_model(distilled=True).encoder
    features = distilled(im, return_features=True)
    want = (distilled.head(features[:, 0]) + distilled.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(distilled(im), want)


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_maps(distilled):
    model = tiny_model(distilled=distilled)
    im = image(48, 64)
    extra = 1 + distilled
    encoder_map, decoder_map = model.get_attention_map_enc(im, 1), model.get_attention_map_dec(im, 0)
    assert encoder_map.shape == (1, 1, 12 + extra, 12 + extra)
    assert decoder_map.shape == (1, 1, 12 + 5, 12 + 5)
    for probabilities in (encoder_map, decoder_map):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
        assert probabilities.std() > 1e-4
    block = model.encoder.blocks[1]
    x = model.encoder.blocks[0](model.encoder.embed(im))
    qkv = block.attn.qkv(block.norm1(x))
    torch.testing.assert_close(encoder_map, reference.attention_probabilities(qkv, 1))


def test_attention_maps_do_not_pad(model):
    """As published: a last partial patch is dropped, where `forward` would pad it."""
    whole, partial = image(48, 64), image(50, 70)
    partial[..., :48, :64] = whole
    torch.testing.assert_close(model.get_attention_map_enc(partial, 0), model.get_attention_map_enc(whole, 0))
    torch.testing.assert_close(model.get_attention_map_dec(partial, 0), model.get_attention_map_dec(whole, 0))


@pytest.mark.parametrize("layer", [-1, 2])
def test_attention_map_layer_range(model, layer):
    with pytest.raises(ValueError, match=r"the encoder has layers 0\.\.1"):
        model.get_attention_map_enc(image(64, 64), layer)
    with pytest.raises(ValueError, match=r"the decoder has layers 0\.\.0"):
        model.get_attention_map_dec(image(64, 64), layer)
    with pytest.raises(ValueError, match="linear decoder has no attention"):
        tiny_model(decoder={"name": "linear"}).get_attention_map_dec(image(64, 64), 0)


@pytest.mark.parametrize(
    ("im", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"expected an image batch \(B, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64), ValueError, "got .1, 4, 64, 64"),
        (torch.zeros(1, 3, 0, 64), ValueError, "got .1, 3, 0, 64"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "normalised float image, got torch.uint8"),
        ("photo.jpg", TypeError, "for images use segment"),
    ],
)
def test_bad_input(model, im, error, message):
    with pytest.raises(error, match=message):
        model(im)


def test_public_attributes_of_the_published_model(model):
    assert (model.n_cls, model.patch_size) == (5, 16)
    assert (model.encoder.distilled, model.encoder.n_layers, model.encoder.d_model) == (False, 2, 64)
    assert model.no_weight_decay() == {
        "encoder.pos_embed", "encoder.cls_token", "encoder.dist_token", "decoder.cls_emb",
    }  # fmt: skip
    assert model.impl == "eager"


def test_state_dict_keys_and_order():
    keys = list(tiny_model(distilled=True).state_dict())
    assert keys[:4] == [
        "encoder.cls_token",
        "encoder.dist_token",
        "encoder.pos_embed",
        "encoder.patch_embed.proj.weight",
    ]
    assert keys.index("encoder.head_dist.bias") < keys.index("encoder.blocks.0.norm1.weight")
    block = [k.removeprefix("encoder.blocks.0.") for k in keys if k.startswith("encoder.blocks.0.")]
    names = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert block == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    decoder = [k for k in keys if k.startswith("decoder.") and ".blocks." not in k]
    names = ["cls_emb", "proj_patch", "proj_classes"]
    names += [f"{n}.{kind}" for n in ("proj_dec", "decoder_norm", "mask_norm") for kind in ("weight", "bias")]
    assert decoder == [f"decoder.{name}" for name in names]


def test_layer_norm_epsilon_reaches_every_encoder_norm_and_no_decoder_norm():
    model = create_segmenter(tiny_config(norm_eps=1e-3))
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {v for k, v in eps.items() if k.startswith("encoder.")} == {1e-3}
    assert {v for k, v in eps.items() if k.startswith("decoder.")} == {1e-5}


def test_initialisation_statistics():
    torch.manual_seed(0)
    model = create_segmenter(
        ModelConfig.from_dict({**tiny_config().to_dict(), "d_model": 256, "n_heads": 4, "n_cls": 150})
    )
    weights = model.state_dict()
    for name in ("encoder.blocks.0.attn.qkv.weight", "encoder.blocks.1.mlp.fc1.weight", "encoder.pos_embed",
                 "decoder.cls_emb", "decoder.proj_dec.weight"):  # fmt: skip
        assert weights[name].std() == pytest.approx(0.02, rel=0.05), name
    for name in ("decoder.proj_patch", "decoder.proj_classes"):
        assert weights[name].std() == pytest.approx(256**-0.5, rel=0.05)
    assert all((v == 1).all() for k, v in weights.items() if "norm" in k and k.endswith("weight"))
    assert all((v == 0).all() for k, v in weights.items() if k.endswith("bias") and "patch_embed" not in k)


def test_training_uses_dropout_and_stochastic_depth_and_evaluation_does_not():
    model = create_segmenter(tiny_config(drop_path_rate=0.5))
    assert [getattr(b.drop_path, "drop_prob", 0) for b in model.encoder.blocks] == [0, 0.5]
    im = image(64, 64)
    model.train()
    assert (model(im) - model(im)).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(model(im), model(im), atol=0, rtol=0)


def test_training_and_evaluation_agree_without_dropout():
    model = tiny_model(decoder={"name": "mask_transformer", "n_layers": 1, "dropout": 0.0})
    im = image(64, 64)
    torch.testing.assert_close(model.train()(im), model.eval()(im), atol=1e-5, rtol=1e-5)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out.flatten(1).std(1) == 0).all()
    assert out.mean() == pytest.approx(1, abs=0.05)


def test_every_parameter_but_the_imagenet_head_gets_a_gradient():
    model = tiny_model().train()
    F.cross_entropy(model(image(64, 64)), torch.randint(0, 5, (1, 64, 64))).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # a key's bias shifts all scores of a query alike, so qkv.bias still has gradients through q and v
    assert without == {"encoder.head.weight", "encoder.head.bias"}


def test_copies_and_pickles_give_the_same_logits(model, tmp_path):
    im = image(40, 40)
    want = model(im)
    torch.testing.assert_close(copy.deepcopy(model)(im), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(im), want)


def test_bfloat16_stays_close(model):
    im = image(64, 64)
    want = model(im)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(im).float()
    assert 0 < (got - want).abs().max() < 0.2 * want.abs().max()


def test_encoders_of_others_fit():
    """What the published class asks of an encoder, and no more."""

    class Foreign(torch.nn.Module):
        patch_size, distilled = 16, False

        def forward(self, im, return_features=False):
            return F.avg_pool2d(im, 16).flatten(2).mT[:, [0, *range(im.shape[2] * im.shape[3] // 256)]]

        def no_weight_decay(self):
            return {"x"}

    model = Segmenter(Foreign(), DecoderLinear(4, 16, 3), 4)
    assert model(image(40, 64)).shape == (1, 4, 40, 64)
    assert model.no_weight_decay() == {"encoder.x"}
    assert (model.impl, model.info.window_size) == ("unknown", 512)


def test_every_block_and_the_mask_head_go_through_the_chosen_operators(model):
    calls = []

    def spied(name):
        return lambda *a, **k: calls.append(name) or getattr(reference, name)(*a, **k)

    spy = EAGER._replace(**{name: spied(name) for name in EAGER._fields if callable(getattr(EAGER, name))})
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = spy
    model(image(64, 64))
    assert calls == ["layernorm_linear", "attention", "linear", "layernorm_mlp"] * 3 + ["mask_head"]
