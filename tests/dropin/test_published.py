"""In place of the published code: every name of docs/drop-in.md, and the parts of a block one by one."""

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmenter import create_decoder, create_vit, layers
from segmenter.config import ConfigError
from segmenter.encoder import VisionTransformer
from segmenter.layers import Attention, Block
from segmenter.weights.read import CheckpointError
from tests.support import foreign, official
from tests.support.tiny import tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")


def rows(heading):
    """The cells of the table below a heading, without back-quotes."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def resolve(path):
    """The object at a dotted path: the longest part of it that is a module, then attributes."""
    names = path.split(".")
    for n in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:n]))
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise
            continue
        for name in names[n:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize(("published", "arguments", "ours", "_"), rows("Functions and classes"))
def test_every_name_has_the_published_arguments(published, arguments, ours, _):
    found = resolve(f"segmenter.{published}")
    assert found is resolve(ours)
    if arguments == "–":
        assert not callable(found)
        return
    parameters = [p for name, p in inspect.signature(found).parameters.items() if name != "self"]
    wanted = [name for name in arguments.split(", ") if name]
    assert [p.name for p in parameters[: len(wanted)]] == wanted
    kinds = (inspect.Parameter.VAR_KEYWORD,)
    assert all(p.default is not inspect.Parameter.empty or p.kind in kinds for p in parameters[len(wanted) :])


@pytest.mark.parametrize("expression", [row[0] for row in rows("Inside a model")])
def test_every_part_is_there(expression):
    model = tiny_model(drop_path_rate=0.1)
    names = {"model": model, "encoder": model.encoder, "decoder": model.decoder, "block": model.encoder.blocks[1]}
    eval(expression, {**names, "x": torch.randn(2, 5, 64)})


@pytest.mark.parametrize("published", [row[0] for row in rows("What is not there")])
def test_what_is_not_there_is_not_there(published):
    with pytest.raises((ImportError, AttributeError)) as caught:
        resolve(f"segmenter.{published}")({})
    if published.startswith("segm.data."):
        assert re.search(r"needs mmcv and mmsegmentation .* `segmenter train`", str(caught.value))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks. The other side is the published layout, written anew in tests/support/official.py.


def two_blocks(dropout=0.0, drop_path=0.0, heads=2):
    """Ours and the published one with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    ours, theirs = Block(64, heads, 128, dropout, drop_path), official.Block(64, heads, 128, dropout, drop_path)
    ours.apply(lambda m: [torch.nn.init.normal_(p, std=0.2) for p in m.parameters(recurse=False)])
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert want.std() > 1e-3


@pytest.mark.parametrize("images", [1, 2, 3])
def test_attention_gives_tokens_and_weights(images):
    ours, theirs = two_blocks()
    x = tokens(images, 5, 64)
    y, attn = ours.attn(x)
    want, weights = theirs.attn(x)
    same(y, want)
    same(attn, weights)
    same(ours.attn.attend(x), want)
    assert ours.attn.attn is None
    assert ours.attn.scale == 32**-0.5


def test_attention_weights_are_those_that_were_dropped():
    ours, _ = two_blocks(dropout=0.4)
    attention = ours.attn.train()
    attention.proj_drop.p = 0.0
    x = tokens(2, 6, 64)
    y, attn = attention(x)
    assert (attn == 0).any()
    v = attention.qkv(x).unflatten(-1, (3, 2, 32))[:, :, 2].transpose(1, 2)
    same(y, attention.proj((attn @ v).transpose(1, 2).flatten(2)))


def test_dropout_of_the_weights_goes_by_its_own_layer():
    """Monte-Carlo dropout: evaluation but for the dropout layers; and training without them."""
    ours, theirs = two_blocks(dropout=0.9)
    x = tokens(2, 5, 64)
    want = theirs(x)
    ours.attn.attn_drop.train()
    assert (ours(x) - want).abs().max() > 0.01
    ours.train()
    for layer in (ours.attn.attn_drop, ours.attn.proj_drop, ours.mlp.drop):
        layer.eval()
    ours.attn.qkv.register_forward_hook(lambda *a: None)
    same(ours(x), want)
    ours.attn.attn_drop = torch.nn.Identity()
    same(ours(x), want)


def test_a_block_is_the_published_one_and_keeps_no_weights(monkeypatch):
    ours, theirs = two_blocks()
    x = tokens(2, 5, 64)
    same(ours(x, None, True), theirs(x, None, True))
    same(ours(x, return_attention=True), theirs(x, return_attention=True))
    monkeypatch.setattr(Attention, "_weights", None)  # where the (N, N) weights come from
    same(ours(x), theirs(x))
    same(ours(x, mask=None), theirs(x))
    ours.attn.qkv.register_forward_hook(lambda *a: None)  # layer by layer, and still without weights
    same(ours(x), theirs(x))


def test_another_scale_is_honoured():
    ours, theirs = two_blocks()
    x = tokens(2, 5, 64)
    plain = ours(x)
    ours.attn.scale = theirs.attn.scale = 1.5
    assert ours.why_not_fused("attention") == "another scale of the scores"
    assert (ours(x) - plain).abs().max() > 0.01
    same(ours(x), theirs(x))
    same(ours.attn.attend(x), theirs.attn(x)[0])
    same(ours(x, return_attention=True), theirs(x, return_attention=True))


def test_another_number_of_heads_is_honoured_as_published():
    ours, theirs = two_blocks()
    ours.attn.heads = theirs.attn.heads = 4
    same(ours(tokens(2, 5, 64)), theirs(tokens(2, 5, 64)))


def test_pruned_heads_keep_no_weights(monkeypatch):
    ours, theirs = two_blocks()
    for attention in (ours.attn, theirs.attn):  # of two heads of 32 the first
        attention.heads, attention.qkv, attention.proj = 1, torch.nn.Linear(64, 96), torch.nn.Linear(32, 64)
    theirs.load_state_dict(ours.state_dict())
    theirs.attn.forward = lambda x, mask=None: pruned(theirs.attn, x)  # its own takes the width from its input
    monkeypatch.setattr(Attention, "_weights", None)
    assert ours.why_not_fused("attention") is None
    same(ours(tokens(2, 5, 64)), theirs(tokens(2, 5, 64)))


def pruned(attention, x):
    q, k, v = attention.qkv(x).chunk(3, -1)
    attn = torch.softmax(q @ k.mT * 32**-0.5, -1)
    return attention.proj(attn @ v), attn


@pytest.mark.parametrize("path", ["attn", "attn.attn_drop"])
def test_hooks_see_what_they_see_in_the_published_code(path):
    ours, theirs = two_blocks()
    x, seen = tokens(2, 5, 64), {}
    handles = []
    for name, block in (("ours", ours), ("theirs", theirs)):
        keep = block.get_submodule(path).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        handles.append(keep)
    same(ours(x), theirs(x))
    assert type(seen["ours"]) is type(seen["theirs"])
    pair = [(out if isinstance(out, tuple) else (out,)) for out in (seen["ours"], seen["theirs"])]
    assert len(pair[0]) == len(pair[1])
    for got, want in zip(*pair, strict=True):
        same(got, want)
    seen.clear()
    same(ours(x, return_attention=True), theirs(x, return_attention=True))
    assert set(seen) == {"ours", "theirs"}
    handles[0].remove()
    assert ours.why_not_fused("attention") is None


def test_a_hook_may_change_the_weights():
    """Attention knock-out: what a hook returns takes the place of the weights."""
    ours, theirs = two_blocks()
    x = tokens(2, 5, 64)
    before = ours(x)
    for block in (ours, theirs):
        block.attn.attn_drop.register_forward_hook(lambda m, i, out: out.tril())
    same(ours(x), theirs(x))
    assert (ours(x) - before).abs().max() > 0.01


def test_a_mask_changes_nothing_and_is_warned_of():
    ours, theirs = two_blocks()
    x, mask = tokens(2, 5, 64), torch.ones(5, 5).tril()
    for got, want in ((lambda m: m(x, mask), theirs(x)), (lambda m: m.attn(x, mask)[0], theirs.attn(x)[0])):
        with pytest.warns(UserWarning, match="Attention ignores its mask"):
            same(got(ours), want)


def test_a_layer_of_ones_own_gets_the_mask():
    class Masked(Attention):
        def forward(self, x, mask=None):
            y, attn = super().forward(x)
            return (y, attn) if mask is None else (y * mask, attn * 2)

    block = Block(64, 2, 128, 0.0, 0.0).eval()
    block.attn = Masked(64, 2, 0.0).eval()
    x = tokens(2, 5, 64)
    nothing = torch.zeros(5, 1)
    torch.testing.assert_close(block(x, nothing), x + block.mlp(block.norm2(x)))
    weights = block(x, None, True)
    torch.testing.assert_close(block(x, nothing, return_attention=True), 2 * weights)
    assert (block(x) - block(x, nothing)).abs().max() > 1e-3


def test_a_subclass_that_adds_nothing_keeps_no_weights(monkeypatch):
    class Named(Attention):
        pass

    block = Block(64, 2, 128, 0.0, 0.0).eval()
    want = block(tokens(1, 5, 64))
    block.attn.__class__ = Named
    monkeypatch.setattr(Attention, "_weights", None)
    same(block(tokens(1, 5, 64)), want)


def test_stochastic_depth_goes_by_drop_prob():
    block = Block(64, 1, 128, 0.0, 0.3)
    assert block.drop_path.drop_prob == 0.3
    assert block.train().why_not_fused("mlp", "eager") == "stochastic depth" and block.drop_path.drops
    block.drop_path.drop_prob = 0.0
    assert block.why_not_fused("mlp", "eager") is None and not block.drop_path.drops
    ones = layers.DropPath(0.0).train()(torch.ones(9, 1, 1))
    torch.testing.assert_close(ones, torch.ones(9, 1, 1))


def test_feed_forward_of_another_width():
    mlp = layers.Mlp(64, 128, 0.0, out_dim=10)
    assert mlp(tokens(2, 3, 64)).shape == (2, 3, 10)
    assert mlp.unwrapped is mlp


def test_state_dict_has_no_more_names_than_before():
    ours, theirs = two_blocks()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not any("pre_logits" in name for name in tiny_model().state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])  # as many patches as positions, and another number
def test_gradients_lie_as_their_parameters(distilled, batch, size):
    """Otherwise DistributedDataParallel copies them at every step, and warns."""
    model = tiny_model(distilled=distilled).train()
    im, labels = tokens(batch, 3, *size), torch.arange(batch * size[0] * size[1]).reshape(batch, *size) % 5
    F.cross_entropy(model(im), labels).backward()
    laid_out = {name: (p.grad.stride(), p.stride()) for name, p in model.named_parameters() if p.grad is not None}
    assert {"encoder.cls_token", "decoder.cls_emb"} <= laid_out.keys()
    assert {name: pair for name, pair in laid_out.items() if pair[0] != pair[1]} == {}


def test_class_embeddings_get_the_sum_over_the_batch():
    decoder = tiny_model().decoder
    weights = tokens(3, 4 + 5, 64)
    (decoder.tokens(tokens(3, 4, 64)) * weights).sum().backward()
    torch.testing.assert_close(decoder.cls_emb.grad, weights[:, 4:].sum(0, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and decoders


def encoder(image_size=(64, 64), n_cls=1000, **kwargs):
    torch.manual_seed(3)
    return VisionTransformer(image_size, 16, 2, 128, 512, 2, n_cls, **kwargs).eval()


def save_npz(path, **kwargs):
    arrays = foreign.jax_arrays(**kwargs)
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return arrays


@pytest.mark.parametrize("stored", ["", "net/", "opt/target/"])
def test_pretrained_encoders_from_jax_files(tmp_path, stored):
    arrays = save_npz(tmp_path / "weights.npz", prefix=stored)
    net = encoder()
    net.load_pretrained(tmp_path / "weights.npz", *[stored] * (stored == "net/"))
    got = net.state_dict()
    torch.testing.assert_close(got["head.weight"], arrays[f"{stored}head/kernel"].T)
    torch.testing.assert_close(got["pos_embed"], arrays[f"{stored}Transformer/posembed_input/pos_embedding"])
    block = f"{stored}Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    torch.testing.assert_close(got["blocks.1.attn.qkv.weight"][128:256], arrays[block + "key/kernel"].flatten(1).T)


def test_pretrained_positions_are_resized_and_another_head_stays(tmp_path):
    arrays = save_npz(tmp_path / "weights.npz")
    net = encoder(image_size=(96, 64), n_cls=7)
    before = net.head.weight.clone()
    net.load_pretrained(tmp_path / "weights.npz")
    want = layers.resize_pos_embed(arrays["Transformer/posembed_input/pos_embedding"], (4, 4), (6, 4), 1)
    torch.testing.assert_close(net.pos_embed.data, want)
    torch.testing.assert_close(net.head.weight, before)


def test_pretrained_weights_that_do_not_fit_leave_the_encoder_alone(tmp_path):
    save_npz(tmp_path / "weights.npz")
    net = VisionTransformer((64, 64), 16, 3, 128, 512, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError, match="missing: blocks.2"):
        net.load_pretrained(tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match="no name in it begins with 'other/'"):
        net.load_pretrained(tmp_path / "weights.npz", "other/")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_pretrained_encoders_without_a_head(tmp_path):
    source, net = encoder(), encoder()
    with torch.no_grad():
        source.norm.bias.fill_(3)
        net.head.bias.fill_(5)
    torch.save({"model": {n: t for n, t in source.state_dict().items() if "head" not in n}}, tmp_path / "vit.pth")
    net.load_pretrained(str(tmp_path / "vit.pth"))
    assert (net.norm.bias == 3).all()
    assert (net.head.bias == 5).all()


def test_encoders_and_decoders_from_published_settings():
    from segmenter.segm.config import load_config

    cfg = load_config()
    assert cfg["dataset"]["cityscapes"]["window_stride"] == 512
    assert "max_ratio" not in cfg["dataset"]["ade20k"]
    model_cfg = cfg["model"]["deit_tiny_distilled_patch16_224"]
    model_cfg |= {"backbone": "deit_tiny_distilled_patch16_224", "image_size": (64, 96), "dropout": 0.3, "n_layers": 2}
    before = dict(model_cfg)
    net = create_vit(model_cfg)
    assert model_cfg == before
    assert (net.d_model, net.d_ff, net.n_cls, net.distilled, net.dropout.p) == (192, 768, 1000, True, 0.3)
    assert net.patch_embed.grid_size == (4, 6)
    decoder_cfg = {**cfg["decoder"]["mask_transformer"], "name": "mask_transformer", "n_cls": 7}
    decoder = create_decoder(net, decoder_cfg)
    assert (len(decoder.blocks), decoder.blocks[0].attn.heads, decoder.cls_emb.shape) == (2, 3, (1, 7, 192))
    assert create_decoder(net, {"name": "linear", "n_cls": 7}).head.weight.shape == (7, 192)
    assert load_config()["model"]["deit_tiny_distilled_patch16_224"]["n_layers"] == 12
    with pytest.raises(ConfigError, match="decoder 'unet' is unknown"):
        create_decoder(net, {"name": "unet", "n_cls": 7})
    with pytest.warns(UserWarning, match="mask transformer with 2 classes"):
        create_decoder(net, {"name": "mask_transformer", "n_cls": 2})
