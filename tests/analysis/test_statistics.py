"""Statistics of all tokens' attention, of whole models."""

import math

import pytest
import torch

import segmenter
from segmenter.analysis import attention_statistics
from segmenter.kernels import reference_maps
from tests.analysis.test_maps import CLOSE, matrices
from tests.cli.tools import image
from tests.support.largest import Largest
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_numbers_of_the_whole_matrix(part):
    model, pixels = tiny_model(d_model=128, n_heads=2), image(60, 90)
    found = segmenter.attention_statistics(model, pixels, part=part)
    p = matrices(model, pixels, part).double()
    first, n = (1, 24) if part == "encoder" else (0, 24)
    assert (found.first, found.grid, found.patch_size, found.part) == (first, (4, 6), 16, part)
    assert found.layers == tuple(range(len(p)))
    patches = slice(first, first + n)
    torch.testing.assert_close(found.entropy, torch.special.entr(p).sum(-1).float(), **CLOSE)
    on_patches = p[..., patches].sum(-1, keepdim=True)
    torch.testing.assert_close(found.extra, (1 - on_patches[..., 0]).float(), rtol=1e-4, atol=1e-5)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0)).double()
    p = p[..., patches] / on_patches
    torch.testing.assert_close(found.centre, (p @ places).float(), **CLOSE)
    distances = torch.cdist(places, places)
    own = found.of_patches(found.distance)
    torch.testing.assert_close(own.flatten(-2), (p[:, :, patches] * distances).sum(-1).float(), **CLOSE)
    squared = found.of_patches(found.squared_distance).flatten(-2)
    torch.testing.assert_close(squared, (p[:, :, patches] * distances.square()).sum(-1).float(), **CLOSE)
    torch.testing.assert_close(found.mean_distance, own.mean((-2, -1)) * 16)
    is_patch = torch.zeros(p.shape[-2], dtype=torch.bool)
    is_patch[patches] = True
    for distance in (found.distance, found.squared_distance):
        assert torch.equal(distance.isnan(), ~is_patch.expand_as(distance))


def test_layers_are_chosen():
    model, pixels, done = tiny_model(), image(64, 64), []
    every = attention_statistics(model, pixels)
    last = attention_statistics(model, pixels, layers=-1, progress=done.append)
    assert last.layers == (1,) and done == [1]
    torch.testing.assert_close(last.entropy, every.entropy[1:])


def test_even_attention_has_the_largest_entropy_and_the_middle_as_its_centre():
    model = tiny_model()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.qkv.weight[:128] = 0
            block.attn.qkv.bias[:128] = 0
    found = attention_statistics(model, image(64, 80))
    torch.testing.assert_close(found.entropy, torch.full_like(found.entropy, math.log(21)))
    torch.testing.assert_close(found.centre, torch.tensor([1.5, 2.0]).expand_as(found.centre))


@pytest.mark.parametrize("side", [64, pytest.param(128, marks=pytest.mark.more)])
def test_no_matrix_of_tokens_in_a_whole_model(side):
    """Of 4,097 or 16,385. Neither in the model nor in what is asked of it: maps, rollout, statistics."""
    model, pixels, n = tiny_model(n_layers=1), image(16 * side, 16 * side), side**2 + 1
    with Largest() as largest:
        found = segmenter.attention(model, pixels, points=[(500, 500)], rollout=True)
        numbers = attention_statistics(model, pixels)
    assert found.maps.shape == (1, 1, 1, side, side) and numbers.entropy.shape == (1, 1, n)
    assert n * 64 < largest.numel <= max(reference_maps.BLOCK, pixels.size) < n**2 / 4
