"""Where dropout and stochastic depth act in training, one place at a time, and what a fresh model is set up with."""

import pytest
import torch

from segmenter import create_segmenter
from segmenter.decoder import MaskTransformer
from segmenter.encoder import VisionTransformer
from segmenter.kernels import reference
from segmenter.layers import Attention, Block, DropPath, Mlp
from tests.support.tiny import tiny_config, tiny_model

BLOCK_SITES = ("attn.attn_drop", "attn.proj_drop", "mlp.drop")
SITES = ["encoder.dropout", "encoder.blocks.1.drop_path", "decoder.blocks.1.drop_path"]
SITES += [f"{part}.blocks.{i}.{site}" for part in ("encoder", "decoder") for i in (0, 1) for site in BLOCK_SITES]


def still_model():
    """A tiny model with every place for dropout and stochastic depth, all of them at rate 0, and these by name."""
    decoder = {"name": "mask_transformer", "n_layers": 2, "drop_path_rate": 0.5, "dropout": 0.5}
    model = tiny_model(dropout=0.5, drop_path_rate=0.5, decoder=decoder)
    sites = {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Dropout, DropPath))}
    for site in sites.values():
        set_rate(site, 0.0)
    return model, sites


def set_rate(site, rate):
    setattr(site, "drop_prob" if isinstance(site, DropPath) else "p", rate)


def dropout_rates(module):
    return {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}


def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_sites_are_all_there_and_training_equals_evaluation_when_all_are_off():
    model, sites = still_model()
    assert set(sites) == set(SITES)
    with torch.no_grad():
        want = model.eval().masks(image())
        assert want.std() > 0.1
        torch.testing.assert_close(model.train().masks(image()), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_each_site_alone_changes_training_and_not_evaluation(name):
    torch.manual_seed(0)
    model, sites = still_model()
    want = model.masks(image())
    set_rate(sites[name], 0.9)
    torch.testing.assert_close(model.masks(image()), want, atol=0, rtol=0)
    assert (model.train().masks(image()) - want).abs().max() > 1e-2


@torch.no_grad()
def test_stochastic_depth_drops_either_branch_of_a_block_on_its_own():
    torch.manual_seed(0)
    block = Block(64, 1, 128, dropout=0.0, drop_path=0.5).train()
    x = torch.randn(64, 3, 64)
    attended = x + 2 * block.attn(block.norm1(x))[0]
    # what a sample can come out as: neither branch, the MLP only, attention only, both; kept branches doubled
    outcomes = torch.stack([y + keep * block.mlp(block.norm2(y)) for y in (x, attended) for keep in (0, 2)])
    distance = (outcomes - block(x)).abs().amax(dim=(2, 3))  # (outcome, sample)
    assert (distance.min(0).values < 1e-4).all()
    assert torch.bincount(distance.argmin(0), minlength=4).min() > 4


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
def test_a_branch_that_was_added_already_is_dropped_as_it_would_have_been(shape):
    drop, x, branch = DropPath(0.5).train(), torch.randn(shape), torch.randn(shape)
    for seed in range(3):
        torch.manual_seed(seed)
        want = x + drop(branch)
        torch.manual_seed(seed)
        torch.testing.assert_close(drop.between(x, x + branch), want)
    assert drop.eval().between(x, branch) is branch


@torch.no_grad()
def test_without_kernels_a_branch_is_dropped_before_it_is_added_as_in_the_published_code():
    block, x = Block(64, 1, 128, dropout=0.0, drop_path=0.5).train(), torch.randn(9, 3, 64)
    torch.manual_seed(0)
    y = x + block.drop_path(block.attn.attend(block.norm1(x)))
    want = y + block.drop_path(block.mlp(block.norm2(y)))
    torch.manual_seed(0)
    assert torch.equal(block(x), want)


@torch.no_grad()
def test_mlp_drops_activations_and_then_outputs():
    torch.manual_seed(0)
    mlp = Mlp(32, 32, dropout=0.5).train()
    mlp.fc2.weight.copy_(torch.eye(32))
    mlp.fc2.bias.fill_(1.0)
    x = torch.randn(50, 32)
    hidden = torch.nn.functional.gelu(mlp.fc1(x))
    # output dropped; output kept but its activation dropped; both kept
    outcomes = torch.stack([torch.zeros_like(hidden), torch.full_like(hidden, 2.0), 2 * (2 * hidden + 1)])
    distance = (outcomes - mlp(x)).abs()
    assert (distance.min(0).values < 1e-5).all()
    share = torch.bincount(distance.argmin(0).flatten(), minlength=3) / hidden.numel()
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.25]), atol=0.05, rtol=0)


def is_dropout_of(got, want, rate):
    """Every element is either 0 or scaled by 1 / (1 - rate), and about the share `rate` is 0."""
    torch.testing.assert_close(got, torch.where(got == 0, 0, want / (1 - rate)))
    assert (got == 0).float().mean() == pytest.approx(rate, abs=0.05)


def test_reference_attention_drops_probabilities():
    torch.manual_seed(0)
    n = 64
    qkv = torch.zeros(1, n, 3 * n)
    qkv[..., 2 * n :] = torch.eye(n)  # with v the identity the output is the matrix of probabilities, here uniform
    is_dropout_of(reference.attention(qkv, 1, dropout_p=0.25), torch.full((1, n, n), 1 / n), 0.25)


@torch.no_grad()
def test_attention_drops_its_projection_and_its_map():
    torch.manual_seed(0)
    attention = Attention(64, 1, dropout=0.25)
    x = torch.randn(2, 30, 64)
    output, probabilities = attention.eval()(x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 1, 30))
    attention.train()
    is_dropout_of(attention.probabilities(x), probabilities, 0.25)
    attention.attn_drop.p = 0.0
    is_dropout_of(attention(x)[0], output, 0.25)


def test_dropout_rates_reach_encoder_and_decoder():
    decoder = {"name": "mask_transformer", "n_layers": 2, "dropout": 0.2}
    model = create_segmenter(tiny_config(dropout=0.3, decoder=decoder))
    assert dropout_rates(model.encoder) == {0.3}
    assert dropout_rates(model.decoder) == {0.2}


def test_default_dropout_of_the_parts_is_that_of_the_published_code():
    assert dropout_rates(VisionTransformer((32, 32), 16, 1, 64, 256, 1)) == {0.1}
    assert dropout_rates(MaskTransformer(5, 16, 64, n_layers=1, n_heads=1, d_model=64, d_ff=256)) == {0.1}


def test_tokens_and_positions_start_as_small_noise():
    torch.manual_seed(0)
    encoder = VisionTransformer((16, 16), 16, 0, 2048, 1, 1, n_cls=1, distilled=True)
    for name in ("cls_token", "dist_token", "pos_embed"):
        assert getattr(encoder, name).std().item() == pytest.approx(0.02, rel=0.1), name


@torch.no_grad()
def test_mask_head_uses_the_epsilon_of_its_norm(model):
    decoder, patches = model.decoder, torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    published = decoder(patches, (64, 64))
    decoder.mask_norm.eps = 0.5
    x = decoder.decoder_norm(decoder.blocks[0](decoder.tokens(patches)))
    norm = decoder.mask_norm
    want = reference.mask_head(
        x[:, :-5], x[:, -5:], decoder.proj_patch, decoder.proj_classes, norm.weight, norm.bias, 0.5
    )
    got = decoder(patches, (64, 64))
    torch.testing.assert_close(got, want.mT.reshape(2, 5, 4, 4))
    assert (got - published).abs().max() > 0.1


@pytest.mark.parametrize("normalization", ["vit", "deit"])
@pytest.mark.parametrize("image_size", [(64, 128), (128, 64)])
def test_a_new_model_knows_its_normalisation_and_windows(normalization, image_size):
    info = create_segmenter(tiny_config(normalization=normalization, image_size=image_size)).info
    assert info.normalization == normalization
    assert (info.window_size, info.window_stride) == (128, 128)
