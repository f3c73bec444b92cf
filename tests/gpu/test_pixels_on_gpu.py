"""Bytes to tokens at full sizes: parity, every shipped configuration many times, graphs that follow the weights."""

import pytest
import torch

from segmenter import create_segmenter, preset
from segmenter.inference.images import NORMALIZATION
from segmenter.kernels import configs, reference
from segmenter.kernels import pixels_to_tokens as kernel
from tests.gpu.conftest import size
from tests.support.parity import assert_parity

TYPES = (torch.bfloat16, torch.float16, torch.float32)
DEIT = NORMALIZATION["deit"]


def inputs(B, H, W, P, d, dtype, device, stream=None):
    g, stream = torch.Generator(device).manual_seed(H + d), stream or dtype

    def randn(*shape):
        return torch.randn(*shape, generator=g, device=device)

    pixels = torch.randint(0, 256, (B, H, W, 3), generator=g, device=device, dtype=torch.uint8)
    weight, bias = (randn(d, 3, P, P) * (3 * P * P) ** -0.5).to(dtype), randn(d).to(dtype)
    n = -(-H // P) * -(-W // P)
    return [pixels, weight, bias, randn(2, d).to(stream), randn(2 + n, d).to(stream), *DEIT]


def check(actual, args, context):
    wide = (x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    exact = reference.pixels_to_tokens(*wide)
    assert_parity(actual, exact, reference.pixels_to_tokens(*args), frobenius=1.1, context=context)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", size((192, 384, 768, 1024), (48, 192)))
@pytest.mark.parametrize("P", [8, 14, 16, 32])
def test_parity_at_the_widths_of_the_model(P, d, dtype, device):
    for B, H, W in size(((4, 512, 512), (3, 500, 375), (1, 224, 224), (33, 64, 96)), ((2, 32, 48), (1, 37, 20))):
        for stream in (dtype, torch.float32):
            args = inputs(B, H, W, P, d, dtype, device, stream)
            y = kernel.normalized_pixels_to_tokens(*args)
            check(y, args, f"{B}x{H}x{W} P={P} d={d} {dtype} stream={stream}")
            assert torch.equal(kernel.normalized_pixels_to_tokens(*args), y)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_configuration(dtype, device):
    bytes_ = torch.empty(0, dtype=dtype).element_size()
    found = {
        configs.pixels_to_tokens(architecture, bytes_, rows, 768, patch, padded, precision)
        for architecture in configs.ARCHITECTURES
        for rows in (196, 65536)
        for patch in (14, 16)
        for padded in (False, True)
        for precision in (("ieee",) if bytes_ == 2 else ("ieee", "tf32"))
    }
    new = device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    for H in size((512, 500), (64, 50)):
        args = inputs(size(8, 1), H, size(512, 48), 16, size(768, 48), dtype, device)
        fold = reference.fold_normalization(*args[1:3], *DEIT, dtype, args[0].shape[1:3])
        for config in sorted((c for c in found if new or not c.descriptors), key=str):
            y = kernel._run(args[0], *fold, *args[3:5], 16, config)
            check(y, args, f"H={H} {config} {dtype}")
            for _ in range(size(100, 1)):
                assert torch.equal(kernel._run(args[0], *fold, *args[3:5], 16, config), y), f"{config} differs"


def model_of(device, dtype=torch.float32):
    torch.manual_seed(0)
    config = preset("Seg-T-Mask/16", n_cls=19, image_size=size(512, 64))
    return create_segmenter(config, impl="triton").eval().to(device, dtype)


def test_model(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for the eager convolution
    model, side = model_of(device), size(500, 50)
    pixels = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, device=device)
    im = reference.normalized(pixels, *NORMALIZATION[model.info.normalization], torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model.masks_of_pixels(pixels), model.masks(im), atol=2e-3, rtol=2e-3)


@pytest.mark.card
def test_graphs_follow_images_and_weights(device):
    """What was remembered before the capture is not part of the graph."""
    model = model_of(device, torch.bfloat16)
    pixels = torch.randint(0, 256, (2, 384, 640, 3), dtype=torch.uint8, device=device)  # resamples positions
    with torch.inference_mode():
        model.masks_of_pixels(pixels)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model.masks_of_pixels(pixels)
        for _ in range(3):
            pixels.random_(0, 256)
            for parameter in model.parameters():
                parameter.mul_(1.1)
            graph.replay()
            assert torch.equal(out, model.masks_of_pixels(pixels))


@pytest.mark.card
def test_streams_do_not_share_what_they_remember(device):
    model = model_of(device)
    pixels = torch.randint(0, 256, (1, 384, 640, 3), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        want = model.encoder.embed_pixels(pixels, *DEIT)
        torch.cuda.synchronize()
        model.encoder.cache.clear()
        results = []
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                results.append(model.encoder.embed_pixels(pixels, *DEIT))
        torch.cuda.synchronize()
        assert len(model.encoder.cache) == 4  # positions and weights of either
        assert all(torch.equal(result, want) for result in results)
