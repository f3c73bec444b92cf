"""Compiled inference: the labels of `segment`, whatever shapes, threads and changes of weights come, on the CPU.

Graphs are rehearsed with stand-ins that keep what matters of them: static inputs and outputs, which every replay
overwrites. What only a card can show is in tests/gpu/test_captured_on_gpu.py.
"""

import threading

import numpy as np
import pytest
import torch
import torch.nn as nn

from segmenter import create_segmenter
from segmenter.inference import cuda_graphs
from segmenter.inference.compiled_inference import CompiledInference, Shape
from segmenter.inference.cuda_graphs import PAYS, Watched, half_weights
from tests.inference.test_segment import image
from tests.support.fake_graphs import install
from tests.support.tiny import tiny_model

SIZES = [(64, 64), (70, 91), (40, 50), (33, 100), (1, 9)]  # one window, several, enlarged


def images(B=2, h=64, w=64, seed=0):
    return torch.from_numpy(np.stack([image(h, w, seed + i) for i in range(B)]))


def one_by_one(model, pixels, **options):
    return torch.stack([model.segment(x.numpy(), cuda_graphs=False, **options) for x in pixels])


def other_weights(model, seed=9):
    return tiny_model(seed).state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# The labels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_labels_are_those_of_segment(model, size, dtype):
    compiled = model.compile_inference(2, *size, dtype=dtype, window_stride=40)
    for seed in range(2):
        pixels = images(2, *size, seed=10 * seed)
        got = compiled(pixels)
        assert (got.shape, got.dtype, got.device, got.is_inference()) == (
            pixels.shape[:3],
            torch.uint8,
            pixels.device,
            False,
        )
        assert torch.equal(got, one_by_one(model, pixels, dtype=dtype, window_stride=40))
    assert len(got.unique()) > 1 or min(size) == 1


def test_window_batches_do_not_matter(model):
    pixels = images(3, 70, 91)
    want = one_by_one(model, pixels, window_size=48, window_stride=30)
    for n in (1, 5):
        compiled = model.compile_inference(3, 70, 91, window_size=48, window_stride=30, window_batch_size=n)
        assert torch.equal(compiled(pixels), want)


def test_any_strides_and_inference_mode(model):
    pixels = images(2, 70, 91)
    want = one_by_one(model, pixels, dtype="bfloat16")
    compiled = CompiledInference(model, dtype="bfloat16")
    with torch.inference_mode():  # what is made here has to serve outside as well
        assert torch.equal(compiled(pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), want)
    assert torch.equal(compiled(pixels), want)
    assert torch.equal(compiled(pixels[:1].expand(2, -1, -1, -1))[1], want[0])


def test_no_image_is_added_without_graphs(model, monkeypatch):
    compiled, pixels = model.compile_inference(4, 64, 64), images(4)
    want, ran, labels = one_by_one(model, pixels), [], compiled._function
    monkeypatch.setattr(compiled, "_function", lambda x: ran.append(len(x)) or labels(x))
    for B in (1, 2, 3):
        assert torch.equal(compiled(pixels[:B]), want[:B])
    assert ran == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_half_weights_shares_the_rest(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    half = half_weights(model, torch.bfloat16)
    converted, own = set(), dict(model.named_parameters())
    for name, p in half.named_parameters():
        if p.dtype == torch.bfloat16:
            converted.add(name)
            assert torch.equal(p, own[name].bfloat16()) and p.requires_grad == own[name].requires_grad
        else:
            assert p is own[name]
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    assert converted == {n for n, p in own.items() if id(p) in linear or n.endswith(("proj_patch", "proj_classes"))}
    assert not half.training and type(half) is type(model)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


def test_half_weights_converts_none_whose_writes_are_not_counted():
    """Nothing would tell that they changed."""
    with torch.inference_mode():
        model = tiny_model()
        half = half_weights(model, torch.bfloat16)
    assert all(p is own for p, own in zip(half.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_half_weights_give_the_bits_of_autocast(impl, decoder):
    if impl == "triton":
        pytest.importorskip("triton")
    config = tiny_model(decoder={"name": decoder, **({"n_layers": 1} if decoder != "linear" else {})}).config
    model = create_segmenter(config, impl=impl).eval()
    pixels = images(1, 40, 50)
    with torch.inference_mode():
        half = half_weights(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = half.masks_of_pixels(pixels), model.masks_of_pixels(pixels)
    assert got.dtype == want.dtype and torch.equal(got, want)


def by_copy(model):
    with torch.no_grad():
        model.decoder.proj_patch.copy_(-model.decoder.proj_patch)


def by_loading(model):
    model.load_state_dict(other_weights(model))


def by_assigning(model):
    model.load_state_dict(other_weights(model), assign=True)


def by_buffers_of_data(model):
    for p in model.parameters():
        p.data = p.data.flip(0).clone()


def by_step(**options):
    def change(model):
        generator = torch.Generator().manual_seed(3)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        torch.optim.SGD(model.parameters(), lr=0.1, **options).step()
        model.zero_grad()

    return change


CHANGES = {
    "copy": by_copy,
    "load": by_loading,
    "assign": by_assigning,
    "data": by_buffers_of_data,
    "step": by_step(foreach=False),
    "foreach": by_step(foreach=True),
    "fused": by_step(fused=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_changed_weights_are_seen(model, change, dtype):
    compiled = model.compile_inference(
        1, 70, 91, dtype=dtype, window_size=70
    )  # resamples positions, and remembers them
    pixels = images(1, 70, 91)
    before = compiled(pixels)
    CHANGES[change](model)
    assert compiled.shapes  # nobody told it
    want = one_by_one(model, pixels, dtype=dtype, window_size=70)
    assert not torch.equal(want, before)
    assert torch.equal(compiled(pixels), want)


def test_new_weights_where_old_ones_were(model):
    """Memory that is given back may be handed out again, for a tensor that counts as many writes."""
    compiled, pixels, layer = model.compile_inference(1, 64, 64, dtype="bfloat16"), images(1), model.decoder.proj_dec
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for _ in range(2):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=generator))
        compiled(pixels)
        assert torch.equal(compiled._network.decoder.proj_dec.weight, layer.weight.bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_a_tensor_replaced_by_an_equal_one_is_seen(shape, other):
    """Python finds one element equal, and has no answer for several."""
    module = torch.nn.Linear(3, 2)
    module.scale = torch.nn.Parameter(torch.ones(shape))
    watched = Watched(module)
    assert watched.unchanged()
    module.scale = torch.nn.Parameter(torch.ones(shape, dtype=other))
    assert not watched.unchanged()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_refresh_sees_what_is_not_counted(model, dtype):
    compiled, pixels = model.compile_inference(1, 96, 96, dtype=dtype, window_size=96), images(1, 96, 96)
    before = compiled(pixels)
    for p in (model.encoder.pos_embed, model.decoder.proj_patch):
        p.data.mul_(-3)
    compiled.refresh()
    assert not compiled.shapes
    got = compiled(pixels)
    fresh = tiny_model()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(got, one_by_one(fresh, pixels, dtype=dtype, window_size=96))
    assert not torch.equal(got, before)


def test_unchanged_weights_are_converted_once(model, monkeypatch):
    conversions = []
    monkeypatch.setattr(cuda_graphs, "half_weights", lambda *a: conversions.append(a) or half_weights(*a))
    compiled = model.compile_inference(1, 64, 64, dtype="bfloat16")
    for _ in range(3):
        compiled(images(1))
    assert len(conversions) == 1
    by_copy(model)
    compiled(images(1))
    assert len(conversions) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.fixture
def graphs(monkeypatch):
    return install(monkeypatch)


def test_the_second_call_of_a_shape_is_captured(model, graphs):
    compiled, pixels = CompiledInference(model), [images(2, seed=s) for s in range(4)]
    want = [one_by_one(model, x) for x in pixels]
    assert torch.equal(compiled(pixels[0]), want[0]) and not graphs and not compiled.shapes
    results = [compiled(x) for x in pixels]
    assert len(graphs) == 1 and graphs[0].replays == 4
    assert graphs[0].calls == [(2, 64, 64, 3)] * 3  # twice to warm up, once captured
    assert all(map(torch.equal, results, want)), "a later call wrote into the result of an earlier one"
    with torch.inference_mode():
        graphs[0].outputs[0].fill_(99)
    assert all(map(torch.equal, results, want))


def test_a_shape_captured_in_advance_is_replayed_at_once(model, graphs):
    compiled, pixels = model.compile_inference(2, 64, 64), images(3)
    want = one_by_one(model, pixels)
    first, second = compiled(pixels[:2]), compiled(pixels[2:])  # one image, filled up
    assert torch.equal(first, want[:2]) and torch.equal(second, want[2:])
    assert [g.replays for g in graphs] == [2]


def test_fewer_images_are_filled_up(model, graphs):
    compiled = model.compile_inference(4, 64, 64)
    compiled.capture(3, 64, 64)
    pixels = images(4)
    want = one_by_one(model, pixels)
    for B in (2, 3, 4, 1):
        assert torch.equal(compiled(pixels[:B]), want[:B])
    assert [g.replays for g in graphs] == [1, 2]  # the smallest that is large enough, unless more than twice as large
    compiled(images(5))
    assert len(graphs) == 2


def test_what_the_caller_has_on_is_not_captured(model, graphs):
    pixels = images(1, 70, 91)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = model.compile_inference(1, 70, 91)
        compiled(pixels)
    scores = compiled._function(pixels)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled._function(pixels)[1], scores)


def test_graphs_may_be_made_in_inference_mode_and_used_outside(model, graphs):
    compiled, pixels = CompiledInference(model), images(2)
    with torch.inference_mode():
        compiled(pixels), compiled(pixels)
    assert torch.equal(compiled(pixels), one_by_one(model, pixels))


def test_the_shape_not_used_for_longest_goes(model, graphs):
    compiled = CompiledInference(model, max_shapes=2)
    a, b, c = (images(1, 64, w) for w in (64, 70, 80))
    for pixels in (a, a, b, b, a, c, c):
        compiled(pixels)
    assert compiled.shapes == [(1, 64, 64), (1, 64, 80)] and len(graphs) == 3
    for _ in range(2):  # it went before it paid off, so it has to be asked for twice as often
        assert torch.equal(compiled(b), one_by_one(model, b)) and len(graphs) == 3
    assert torch.equal(compiled(b), one_by_one(model, b))
    assert compiled.shapes == [(1, 64, 80), (1, 64, 70)] and len(graphs) == 4
    assert len({g.place for g in graphs}) == 1


def test_changed_weights_end_the_graphs(model, graphs):
    compiled, pixels = model.compile_inference(1, 64, 64), images(1)
    for _ in range(PAYS):
        compiled(pixels)
    by_copy(model)
    assert torch.equal(compiled(pixels), one_by_one(model, pixels))  # direct, as if no call had met the shape
    assert torch.equal(compiled(pixels), one_by_one(model, pixels))
    assert [g.used for g in graphs] == [PAYS + 1, 1] and len({g.place for g in graphs}) == 2
    compiled.refresh()
    assert not compiled.shapes


def test_a_capture_that_fails_leaves_the_rest(model, graphs, monkeypatch):
    compiled = model.compile_inference(1, 64, 64)
    labels = compiled._function
    monkeypatch.setattr(compiled, "_function", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compiled.capture(2, 64, 64)
    monkeypatch.setattr(compiled, "_function", labels)
    assert compiled.shapes == [(1, 64, 64)]
    assert torch.equal(compiled(images(1)), one_by_one(model, images(1)))


def test_memory_and_repr(model, graphs):
    compiled = CompiledInference(model)
    assert repr(compiled) == "CompiledInference(captured: nothing yet)" and compiled.memory() == {}
    compiled.capture(2, 512, 512)
    assert compiled.memory() == {Shape(2, 512, 512): 2 * 512 * 512 * 3}
    assert repr(compiled) == "CompiledInference(captured: 2x512x512 (2 MiB))"


def test_without_graphs(model):
    compiled = model.compile_inference(2, 64, 64)
    assert not compiled.graphs and compiled.device == torch.device("cpu")
    assert compiled.memory() == {(2, 64, 64): 0}
    assert repr(compiled) == "CompiledInference(run one by one: 2x64x64 (0 MiB))"


def test_shapes_met_once_are_forgotten_in_the_end(model, monkeypatch):
    compiled = CompiledInference(model)
    monkeypatch.setattr(compiled, "_function", lambda x: (x[..., 0], x.sum()))
    for w in range(1, 100):
        compiled(torch.zeros(1, 1, w, 3, dtype=torch.uint8))
    assert len(compiled._met) <= 64 and not compiled.shapes


# ---------------------------------------------------------------------------------------------------------------------
# Threads and streams of batches


@pytest.mark.parametrize("max_shapes", [1, 8])
def test_threads(model, graphs, max_shapes):
    """Eight at a time, with images and shapes of their own; with room for one shape, they evict each other's."""
    compiled = CompiledInference(model, max_shapes=max_shapes)
    inputs = [images(1 + i % 2, 64, 64 + 8 * (i % 3), seed=i) for i in range(8)]
    want, wrong, start = [one_by_one(model, x) for x in inputs], [], threading.Barrier(8)

    def work(i):
        start.wait()
        try:
            for _ in range(3):
                if not torch.equal(compiled(inputs[i]), want[i]):
                    wrong.append(i)
                repr(compiled)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_map_gives_results_in_order_and_takes_batches_as_they_are_asked_for(model):
    batches, taken = [images(B, 64, 64, seed=B) for B in (2, 2, 1)], []
    compiled = model.compile_inference(2, 64, 64)

    def source():
        for i, batch in enumerate(batches):
            taken.append(i)
            yield batch

    results = compiled.map(source())
    assert not taken
    for i, batch in enumerate(batches):
        assert torch.equal(next(results), one_by_one(model, batch))
        assert taken == list(range(i + 1))
    assert list(results) == [] and list(compiled.map([])) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_scores_that_are_not_finite(model, value, dtype):
    compiled = model.compile_inference(1, 64, 64, dtype=dtype)
    good, norm = compiled(images(1)), model.decoder.mask_norm
    bias = norm.bias.detach().clone()
    with torch.no_grad():
        norm.bias[2] = value
    for run in (compiled, lambda x: list(compiled.map([x]))):
        with pytest.raises(ValueError, match="NaN or infinite scores"):
            run(images(1))
    with torch.no_grad():
        norm.bias.copy_(bias)
    assert torch.equal(compiled(images(1)), good)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 8, 8, 3), r"expected a uint8 tensor \(B, H, W, 3\), got torch.float32"),
        (np.zeros((1, 8, 8, 3), np.uint8), "got ndarray"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"expected images \(B, H, W, 3\), got \(8, 8, 3\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got \(1, 3, 8, 8\)"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), r"got \(0, 8, 8, 3\)"),
        (torch.zeros(1, 8, 0, 3, dtype=torch.uint8), r"got \(1, 8, 0, 3\)"),
    ],
)
def test_images_that_are_none(model, pixels, message):
    compiled = CompiledInference(model)
    with pytest.raises(ValueError, match=message):
        compiled(pixels)
    with pytest.raises(ValueError, match=message):
        list(compiled.map([pixels]))
    assert not compiled.shapes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shapes": 0}, "max_shapes must be at least 1, got 0"),
        ({"window_size": 0}, "window_size and batch_size must be at least 1, got 0 and 8"),
        ({"window_batch_size": 0}, "at least 1, got 64 and 0"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of auto"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.compile_inference(1, 64, 64, **options)


def test_bad_shapes_and_types(model):
    with pytest.raises(ValueError, match=r"batch, height and width must be at least 1, got \(1, 0, 64\)"):
        model.compile_inference(1, 0, 64)
    with pytest.raises(ValueError, match=r"holds torch.bfloat16 weights and cannot run in torch.float16"):
        model.bfloat16().compile_inference(1, 64, 64, dtype="float16")


def test_training_mode(model):
    with pytest.raises(RuntimeError, match=r"training mode; call model.eval\(\) before compile_inference"):
        model.train().compile_inference(1, 64, 64)
    compiled = model.eval().compile_inference(1, 64, 64)
    model.train()
    with pytest.raises(RuntimeError, match=r"the model is in training mode; call model.eval\(\)"):
        compiled(images(1))
    model.eval()
    assert torch.equal(compiled(images(1)), one_by_one(model, images(1)))
