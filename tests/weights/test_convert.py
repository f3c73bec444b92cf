"""Recognising weights, reading the architecture off their shapes, requests, and changing size or patch."""

import sys

import pytest
import torch
import torch.nn.functional as F

from segmenter.config import ConfigError
from segmenter.model import create_segmenter
from segmenter.weights.build import build
from segmenter.weights.convert import convert
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_config, tiny_model


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
    small = build(converted, "eager", "x")
    with torch.no_grad():
        a, b = model.encoder.patch_embed(image), small.encoder.patch_embed(other)
    assert F.cosine_similarity(a, b, dim=-1).min() > 0.97
    assert model.encoder.patch_embed.proj.weight.shape[-1] == 16  # the argument is unchanged


def test_another_patch_size_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(CheckpointError, match="needs timm .pip install timm."):
        convert(tiny_model().state_dict(), patch_size=8)


def test_encoder_of_width_that_is_no_multiple_of_64_needs_heads():
    model = create_segmenter(tiny_config(d_model=96, n_heads=3, decoder={"name": "linear"}))
    with pytest.raises(CheckpointError, match="width 96 is no multiple of 64; give n_heads"):
        convert(model.state_dict())
    assert convert(model.state_dict(), n_heads=3).config.n_heads == 3
