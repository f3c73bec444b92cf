"""What only a device shows: CUDA graphs, side streams, inductor, a second device, and the golden cases on the card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter import create_segmenter, preset
from segmenter.kernels.attention import attention
from segmenter.ops import parts
from tests.gpu.conftest import size

ROOT = Path(__file__).parents[2]


def fast_model(device, name="Seg-T-Mask/16", image=64):
    torch.manual_seed(0)
    model = create_segmenter(preset(name, n_cls=19, image_size=size(512, image)), impl="triton").eval()
    return model.to(device)


def eager_twin(model):
    twin = create_segmenter(model.config, impl="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device)


@pytest.mark.parametrize("name", ["Seg-T-Mask/16", "Seg-S/32"])
def test_whole_model_equals_eager(name, device):
    model = fast_model(device, name)
    assert set(parts(model).values()) == {"triton"}
    im = torch.randn(2, 3, *size((512, 500), (64, 60)), device=device)
    with torch.inference_mode():
        want = eager_twin(model)(im)
        torch.testing.assert_close(model(im), want, atol=1e-3, rtol=1e-3)
        with torch.autocast(device.type, torch.bfloat16):
            low = model(im).float()
        agreement = (low.argmax(1) == want.argmax(1)).float().mean().item()
    assert agreement > 0.9  # random weights: nearly all classes tie


@pytest.mark.card
def test_graph_capture_and_replay_with_changed_inputs(device):
    model = fast_model(device).to(torch.bfloat16)
    im = torch.randn(2, 3, 512, 512, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        model.masks(im)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model.masks(im)
        for seed in range(3):
            im.copy_(torch.randn(im.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(out, model.masks(im))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)  # weights change in place: nothing derived from them was kept
        graph.replay()
        assert torch.equal(out, model.masks(im))


@pytest.mark.card
def test_side_stream(device):
    """On a stream that waits, while another allocates: the launch goes to the current stream, not to the default."""
    qkv = torch.randn(2, 1025, 3 * 192, device=device).bfloat16()
    want = attention(qkv, 3)
    stream = torch.cuda.Stream(priority=0)
    target = torch.empty_like(qkv)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        target.copy_(qkv)
        out = attention(target, 3)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device_and_the_current_one_stays():
    qkv = torch.randn(1, 257, 3 * 64, device="cuda:1").bfloat16()
    assert torch.equal(attention(qkv, 1).cpu(), attention(qkv.to("cuda:0"), 1).cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.card
def test_compile_and_export(device):
    model = fast_model(device).to(torch.bfloat16)
    im = torch.randn(1, 3, 512, 512, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        want = model.masks(im)
        compiled = torch.compile(model.masks, fullgraph=True)(im)
    assert (compiled.argmax(1) == want.argmax(1)).float().mean() > 0.95
    with torch.no_grad():
        program = torch.export.export(model, (im,))
        assert any("segmenter.attention" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(im), model(im))


def test_golden_cases_on_the_kernels(device):
    """The stand-alone checker with GOLDEN_IMPL=triton."""
    environment = {**os.environ, "GOLDEN_IMPL": "triton", "PYTHONPATH": str(ROOT)}
    checker = ["tests/golden/check.py", "tests/golden", "--adapter", "tests/golden_adapter.py", "--quiet"]
    command = [sys.executable, *checker]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "34 passed" in result.stdout, result.stdout[-500:]


@pytest.mark.card
def test_gradients_at_full_length(device):
    """Of the whole model, in float32, against eager."""
    fast = fast_model(device)
    eager = eager_twin(fast)
    im = torch.randn(1, 3, 512, 512, device=device)
    gradients = []
    for model in (fast, eager):
        model.zero_grad()
        model(im).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient - other).norm() <= 1e-3 * other.norm() + 1e-9, name
