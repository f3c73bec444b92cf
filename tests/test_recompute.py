"""Levels of what a training step keeps: the same gradients, and the bytes that are promised."""

import pytest
import torch

pytest.importorskip("triton")

from segmenter import create_segmenter
from segmenter.layers import Block
from segmenter.ops import load_kernels, select
from tests.support.kept import kept
from tests.support.parity import DEVICE
from tests.support.tiny import tiny_model

B, N, D, HEADS = 2, 17, 64, 2
LSE = 4 * B * HEADS * 128  # float32, padded to whole blocks of rows
LEVELS = [0, 1, 2, 3]


def block(dtype=torch.float16, drop_path=0.0, impl="triton"):
    torch.manual_seed(0)
    ops = load_kernels() if impl == "triton" else select("eager")
    return Block(D, HEADS, 4 * D, 0.0, drop_path, ops=ops).to(DEVICE, dtype).train()


def tokens(dtype=torch.float16):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def gradients(module, x):
    x = x.requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize(("level", "each"), [*enumerate((20, 12, 6, 2))])
def test_bytes(level, each):
    module = block()
    module.recompute = level
    bytes_, _ = kept(module, lambda: module(tokens().requires_grad_()))
    assert bytes_ == each * B * N * D + (LSE if level < 3 else 0)


def test_a_wide_stream_adds_four_bytes():
    module = block(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        copies = 2 * 12 * D * D  # of the weights, cast; biases
        bytes_, _ = kept(module, lambda: module(tokens(torch.float32).requires_grad_()))
    assert abs(bytes_ - (16 * B * N * D + LSE + copies)) < 2 * 12 * D


def test_eager_keeps_more():
    module = block(impl="eager")
    bytes_, _ = kept(module, lambda: module(tokens().requires_grad_()))
    assert bytes_ > 30 * B * N * D


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_same_gradients(drop_path):
    found = []
    for level in LEVELS:
        module = block(drop_path=drop_path)
        module.recompute = level
        torch.manual_seed(3)
        found.append(gradients(module, tokens()))
    for other in found[2:]:
        assert all(map(torch.equal, found[1], other))
    for first, again in zip(*found[:2], strict=True):  # level 0 has the hidden layer from another product
        assert (first - again).float().norm() < 4e-3 * again.float().norm()


def test_stochastic_depth_is_the_same_as_layer_by_layer():
    """With the same draws; and without it something else."""
    found = []
    for impl, drop_path in (("triton", 0.5), ("eager", 0.5), ("triton", 0.0)):
        torch.manual_seed(5)
        found.append(gradients(block(torch.float32, drop_path, impl), tokens(torch.float32)))
    for ours, theirs, without in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm() + 1e-5
        assert (ours - without).norm() > 0.1 * without.norm()


def test_models():
    """A level holds for every block, and gradients are those of eager PyTorch."""
    base = tiny_model()
    model = create_segmenter(base.config, impl="triton").to(DEVICE).eval()
    model.load_state_dict(base.state_dict())
    assert model.recompute(2) is model
    assert {b.recompute for b in model.modules() if isinstance(b, Block)} == {2}
    im = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for each in (model, base.to(DEVICE)):
        each.masks(im).square().mean().backward()
        found.append([p.grad for p in each.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() < 1e-4 * theirs.norm() + 1e-6
    for level in (-1, 4, 1.5, None):
        with pytest.raises(ValueError, match="level must be 0, 1, 2 or 3, got"):
            model.recompute(level)
