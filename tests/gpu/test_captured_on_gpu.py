"""Compiled inference on a card: replays are what `segment` gives, follow the weights, and share what they must."""

import threading

import pytest
import torch

from segmenter import create_segmenter, preset
from segmenter.inference.compiled_inference import CompiledInference
from segmenter.inference.network_graphs import graphs_of
from tests.gpu.conftest import size


def model_of(device, dtype=torch.float32, n_cls=19):
    torch.manual_seed(0)
    config = preset("Seg-T-Mask/16", n_cls=n_cls, image_size=size(512, 32))
    model = create_segmenter(config, impl=size("triton", "eager")).eval()
    model.info.window_size = model.info.window_stride = size(512, 32)
    return model.to(device, dtype)


def images(B, h, w, seed=0):
    """Smooth colours: neighbouring pixels get neighbouring labels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(B, 3, h // 12 + 2, w // 12 + 2, generator=generator)
    large = torch.nn.functional.interpolate(small, (h, w), mode="bicubic").clamp(0, 1)
    return (large * 255).byte().permute(0, 2, 3, 1).contiguous()


def one_by_one(model, pixels, **options):
    """As `segment` batches them: the same kernels with the same tiles, so the same bits."""
    from segmenter.inference.segment import segment_pixels

    return segment_pixels(model, pixels, batch_size=8, cuda_graphs=False, **options)


SHAPES = size([(2, 512, 512), (1, 700, 900), (3, 300, 500)], [(2, 32, 32), (1, 40, 50), (2, 20, 30)])


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"] if torch.cuda.is_available() else [None, "bfloat16"])
def test_replays_are_what_segment_gives(dtype, device):
    model = model_of(device)
    compiled = CompiledInference(model, dtype=dtype)
    for shape in SHAPES:
        for seed in range(6):
            pixels = images(*shape, seed=seed)
            for source in (pixels, pixels.to(device)):
                got = compiled(source)
                assert got.device == source.device
                assert torch.equal(got.cpu(), one_by_one(model, pixels, dtype=dtype)), f"{shape} {seed}"
    assert len(compiled.shapes) == len(SHAPES)
    if device.type == "cuda":
        assert all(n > 0 for n in compiled.memory().values())


def test_fewer_images_than_captured(device):
    model, shape = model_of(device), (4, *SHAPES[0][1:])
    compiled = model.compile_inference(*shape)
    pixels = images(*shape)
    want = one_by_one(model, pixels)
    for B in (2, 3, 4):
        assert torch.equal(compiled(pixels[:B]), want[:B])
    assert compiled.shapes == [shape]


@pytest.mark.parametrize("change", ["multiplied", "loaded", "assigned", "foreach", "fused", "half"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_that_change_are_followed(change, dtype, device):
    if change == "half" and (dtype or device.type == "cpu"):
        pytest.skip("runs in the weights' own type")
    model = model_of(device)
    compiled, pixels = CompiledInference(model, dtype=dtype), images(*SHAPES[1])
    before = [compiled(pixels) for _ in range(3)][-1]
    if change == "multiplied":
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.5)
    elif change in ("loaded", "assigned"):
        state = {name: torch.randn_like(t) * 0.1 for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=change == "assigned")
    elif change == "half":
        model.half()
    else:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.optim.AdamW(model.parameters(), lr=0.1, **{change: True}).step()
        model.zero_grad()
    want = one_by_one(model, pixels, dtype=dtype)
    for _ in range(3):
        assert torch.equal(compiled(pixels), want)
    assert change == "half" or not torch.equal(want, before)


def test_refresh(device):
    model = model_of(device)
    shape = SHAPES[1]
    compiled, pixels = model.compile_inference(*shape), images(*shape)
    compiled(pixels)
    for p in model.parameters():
        p.data.mul_(-1.5)
    compiled.refresh()
    model.eval()  # `segment` remembers as well
    for _ in range(3):
        assert torch.equal(compiled(pixels), one_by_one(model, pixels))


def test_old_shapes_go(device):
    model = model_of(device)
    compiled = CompiledInference(model, max_shapes=2)
    inputs = [images(*shape) for shape in SHAPES]
    want = [one_by_one(model, x) for x in inputs]
    for _ in range(3):
        for x, labels in zip(inputs, want, strict=True):
            assert torch.equal(compiled(x), labels)
            assert torch.equal(compiled(x), labels)
            assert len(compiled.shapes) <= 2
    assert compiled.shapes == [tuple(inputs[i].shape[:3]) for i in (0, 2)]  # the first came back, for the second


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_segment_captures_by_itself_and_gives_the_same(dtype, device):
    model = model_of(device)
    inputs = [images(1, *shape[1:], seed=i)[0].numpy() for i, shape in enumerate(SHAPES * 3)]
    want = [model.segment(x, dtype=dtype, cuda_graphs=False) for x in inputs]
    assert all(map(torch.equal, [model.segment(x, dtype=dtype) for x in inputs], want))
    assert all(map(torch.equal, model.segment_stream(inputs, batch_size=1, dtype=dtype), want))
    calls = []
    with torch.no_grad():
        model.decoder.proj_patch.mul_(-1)
    model.encoder.norm.register_forward_hook(lambda *a: calls.append(1))
    assert torch.equal(model.segment(inputs[0], dtype=dtype), model.segment(inputs[0], dtype=dtype, cuda_graphs=False))
    assert len(calls) == 2
    assert device.type == "cpu" or any(of_type.used for of_type in graphs_of(model))


@pytest.mark.card
def test_graphs_that_come_by_themselves_hold_bounded_memory(device):
    model = model_of(device)
    side = 512

    def round_of_calls():
        for i in range(12):
            model.segment(images(1, side, side + 8 * i)[0].numpy(), window_size=256 + 16 * i)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for _ in range(6):
        round_of_calls()
    before = max(round_of_calls() for _ in range(3))
    assert max(round_of_calls() for _ in range(6)) <= before + (8 << 20)


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads(own_streams, device):
    model = model_of(device)
    compiled = CompiledInference(model, max_shapes=2)
    inputs = [images(*SHAPES[i % 3], seed=i) for i in range(8)]
    want, wrong = [one_by_one(model, x) for x in inputs], []

    def work(i):
        try:
            stream = torch.cuda.Stream() if own_streams and device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for _ in range(size(10, 2)):
                    results = [compiled(inputs[i]), *compiled.map([inputs[i]] * 2)]
                    if not all(torch.equal(labels, want[i]) for labels in results):
                        wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_map_gives_the_results_of_calls_in_order(device):
    """Ten batches, one of them partial, one of another shape; what was fetched stays what it was."""
    model, shape = model_of(device), SHAPES[0]
    batches = [images(*shape, seed=i) for i in range(10)]
    batches[4] = batches[4][:1]
    batches[7] = images(*SHAPES[2], seed=7)
    compiled = model.compile_inference(*shape)
    results = list(compiled.map(iter(batches)))
    assert len(results) == 10 and list(compiled.map([])) == []
    for result, batch in zip(results, batches, strict=True):
        assert result.device.type == "cpu" and not result.is_pinned()
        assert torch.equal(result, compiled(batch))
        filled = torch.cat([batch, batch[-1:].expand(shape[0] - len(batch), -1, -1, -1)]) if len(batch) == 1 else batch
        assert torch.equal(result, one_by_one(model, filled)[: len(batch)])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_scores_that_are_not_finite(dtype, device):
    model, shape = model_of(device), SHAPES[0]
    compiled, pixels = CompiledInference(model, dtype=dtype), images(*shape)
    good = compiled(pixels)
    bias = model.decoder.mask_norm.bias.detach().clone()
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.decoder.mask_norm.bias[3] = value
        for _ in range(3):
            with pytest.raises(ValueError, match="NaN or infinite scores"):
                compiled(pixels)
        with pytest.raises(ValueError, match="NaN or infinite scores"):
            list(compiled.map([pixels]))
    with torch.no_grad():
        model.decoder.mask_norm.bias.copy_(bias)
    assert torch.equal(compiled(pixels), good)


@pytest.mark.card
def test_memory_does_not_grow(device):
    """Not over replays, nor over shapes that come and go, nor over weights that change."""
    model = model_of(device)
    compiled, inputs = CompiledInference(model, "bfloat16", max_shapes=1), [images(*s) for s in SHAPES[:2]]

    def round_of_calls():
        for x in inputs:
            for _ in range(3):
                compiled(x)
        with torch.no_grad():
            model.decoder.proj_patch.mul_(1.01)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for _ in range(3):
        round_of_calls()
    before = round_of_calls()
    for _ in range(5):
        assert round_of_calls() <= before + (1 << 20)
    compiled.capture(*inputs[0].shape[:3])  # by itself it would come late, after so many changes
    compiled(inputs[0])
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(50):
        compiled(inputs[0])
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.card
def test_a_graph_may_be_made_in_inference_mode_and_used_outside(device):
    model, pixels = model_of(device), images(*SHAPES[0])
    with torch.inference_mode():
        compiled = model.compile_inference(*SHAPES[0])
        compiled(pixels.to(device))
    assert torch.equal(compiled(pixels), one_by_one(model, pixels))


@pytest.mark.card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    model, pixels = model_of(torch.device("cuda:1")), images(*SHAPES[0])
    compiled = model.compile_inference(*SHAPES[0])
    want = one_by_one(model, pixels)
    assert torch.equal(compiled(pixels), want)
    assert torch.equal(next(compiled.map([pixels])), want)
    assert torch.cuda.current_device() == 0
    model.to("cuda:0")
    assert torch.equal(compiled(pixels), want) and torch.equal(compiled(pixels), want)
