"""Graphs that calls capture by themselves: the labels stay, nothing goes past them, memory is bounded. On the CPU, with
the stand-ins of tests/support/fake_graphs.py, whose replays compute anew: so what is asked is whether there was one."""

import copy
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import segmenter
from segmenter.encoder import VisionTransformer
from segmenter.inference import cuda_graphs, network_graphs, segment
from segmenter.inference.cuda_graphs import PATIENCE, first_parameter, half_weights
from segmenter.inference.network_graphs import MAX_SHAPES, graphs_of, release, why_not
from segmenter.layers import Block
from tests.inference.test_segment import image
from tests.support.fake_graphs import install
from tests.support.tiny import tiny_model

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def graphs(monkeypatch):
    return install(monkeypatch)


def used(model):
    """Calls that a graph answered."""
    return sum(of_type.used for of_type in graphs_of(model))


def captured(model, graphs, **options):
    """Has one window of 64 x 64 captured; the image, and its labels without graphs."""
    pixels = image(64, 64)
    want = model.segment(pixels, cuda_graphs=False, **options)
    for _ in range(3):
        assert torch.equal(model.segment(pixels, **options), want)
    assert len(graphs) == 1 and graphs[0].replays == used(model) == 2
    return pixels, want


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"scales": (0.75, 1.5), "flip": True}])
def test_the_same_labels_for_images_of_any_size(model, graphs, dtype, options):
    for i, size in enumerate([(64, 64), (70, 91), (40, 50), (64, 200), (64, 64)]):
        got = model.segment(image(*size, seed=i), dtype=dtype, window_stride=40, **options)
        want = model.segment(image(*size, seed=i), dtype=dtype, window_stride=40, cuda_graphs=False, **options)
        assert torch.equal(got, want)
    assert len(graphs) <= 2, "windows have one shape, whatever the image's is; of bytes, and of resized images"
    assert used(model) > 3


def test_a_shape_that_does_not_come_again_is_not_captured(model, graphs):
    for n in (1, 2, 3, 4):
        segment.segment_pixels(model, torch.zeros(n, 64, 64, 3, dtype=torch.uint8), batch_size=8)
    assert not graphs and all(not of_type.shapes for of_type in graphs_of(model))


def test_turned_off(model, graphs):
    for _ in range(4):
        model.segment(image(64, 64), cuda_graphs=False)
        list(model.segment_stream([image(64, 64)], cuda_graphs=False))
    assert not graphs and not graphs_of(model)


def test_streams_use_them(model, graphs):
    images = [image(64, 64 + 8 * (i % 3), seed=i) for i in range(12)]
    want = list(model.segment_stream(images, batch_size=2, cuda_graphs=False))
    got = list(model.segment_stream(images, batch_size=2))
    assert all(map(torch.equal, got, want)) and used(model) > 3


# ---------------------------------------------------------------------------------------------------------------------
# Nothing goes past them


class Adapter(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_layer(model):
    layer = model.encoder.blocks[0].mlp.fc1
    model.encoder.blocks[0].mlp.fc1 = nn.Linear(layer.in_features, layer.out_features)


def another_class(model):
    model.encoder.blocks[0].mlp.fc1.__class__ = Adapter


def another_layer(model):
    model.encoder.blocks.append(copy.deepcopy(model.encoder.blocks[0]))


def replaced_method(model):
    model.encoder.blocks[1].forward = lambda x: x


def parametrised(model):
    parametrize.register_parametrization(model.decoder.proj_dec, "weight", nn.Identity())


def weights_of(change):
    def apply(model):
        with torch.no_grad():
            change(model.encoder.blocks[0].attn.qkv.weight)

    return apply


def setting(path, value):
    def apply(model):
        *parents, name = path.split(".")
        for parent in parents:
            model = getattr(model, parent)
        setattr(model, name, value)

    return apply


CHANGES = {
    "written to": weights_of(lambda weight: weight.mul_(-1)),
    "moved": weights_of(lambda weight: setattr(weight, "data", -weight.data)),
    "layer": replaced_layer,
    "class": another_class,
    "more layers": another_layer,
    "method": replaced_method,
    "parametrised": parametrised,
    "normalization": setting("info.normalization", "deit"),
    "eps": setting("encoder.norm.eps", 0.5),
    "operators": setting("encoder.ops", segmenter.ops.select("eager")),
    "training": lambda model: model.encoder.blocks[0].train(),
    "hook": lambda model: model.encoder.norm.register_forward_hook(lambda *a: None),
    "hook before": lambda model: model.decoder.register_forward_pre_hook(lambda *a: None),
}


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Block, "forward"), (VisionTransformer, "forward_tokens"), (segmenter.Segmenter, "masks_of_pixels")],
)
def test_methods_replaced_on_a_class_end_graphs(model, graphs, monkeypatch, owner, name):
    pixels, _ = captured(model, graphs)
    calls, written = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or written(*a, **k))
    model.segment(pixels)
    assert calls and used(model) == 2


def test_writes_that_nobody_counts_are_seen_after_eval(model, graphs):
    """As an average of weights that is copied through `p.data`: then the rule of `segmenter.cache` holds."""
    pixels, before = captured(model, graphs, dtype="bfloat16")
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    model.eval()
    want = model.segment(pixels, dtype="bfloat16", cuda_graphs=False)
    assert not torch.equal(want, before)
    assert torch.equal(model.segment(pixels, dtype="bfloat16"), want) and used(model) == 2


def test_an_attribute_in_place_of_another_ends_graphs(model, graphs):
    pixels, _ = captured(model, graphs)
    del model.encoder.blocks[0].attn.scale
    model.encoder.blocks[0].attn.factor = 1.0
    with pytest.raises(AttributeError, match="scale"):
        model.segment(pixels)
    assert used(model) == 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_that_changes_ends_its_graphs(model, graphs, change, dtype):
    pixels, _ = captured(model, graphs, dtype=dtype)
    CHANGES[change](model)
    want = model.segment(pixels, dtype=dtype, cuda_graphs=False)
    assert torch.equal(model.segment(pixels, dtype=dtype), want)
    assert used(model) == 2, "the graph is of the model as it was"


def test_hooks_are_called(model, graphs):
    pixels, _ = captured(model, graphs)
    calls = []
    handle = model.encoder.blocks[1].mlp.register_forward_hook(lambda *a: calls.append(1))
    for n in range(1, 6):
        model.segment(pixels)
        assert len(calls) == n
    handle.remove()
    for _ in range(PATIENCE):
        model.segment(pixels)
    assert len(calls) == 5 and used(model) > 2, "hooks go, and graphs come back"


def test_hooks_on_all_modules_and_replaced_functions(model, graphs, monkeypatch):
    pixels, _ = captured(model, graphs)
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: calls.append(1))
    model.segment(pixels)
    handle.remove()
    assert calls and used(model) == 2
    monkeypatch.setattr(Block, "forward", lambda self, x: calls.append("replaced") or x)
    for _ in range(3):
        model.segment(pixels)
    assert calls[-1] == "replaced" and used(model) == 2


def test_what_observes_or_traces_a_call_sees_it(model, graphs):
    pixels, _ = captured(model, graphs)
    with torch.profiler.profile() as profile:
        model.segment(pixels)
    assert any("addmm" in event.name or "linear" in event.name for event in profile.events())
    with FlopCounterMode(display=False) as flops:
        model.segment(pixels)
    assert flops.get_total_flops() > 0 and used(model) == 2


def test_switches_of_torch_have_graphs_of_their_own(model, graphs):
    pixels, _ = captured(model, graphs)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for _ in range(3):
            model.segment(pixels)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [g.replays for g in graphs] == [2, 2]
    with torch.autocast("cpu", torch.bfloat16):
        want = model.segment(pixels, cuda_graphs=False)
        for _ in range(3):
            assert torch.equal(model.segment(pixels), want)
    model.segment(pixels)
    assert [g.replays for g in graphs] == [3, 2, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_class, "which is tests.inference.test_network_graphs.Adapter"),
        (replaced_method, "a replaced method of encoder.blocks.1"),
        (lambda model: setattr(model.decoder, "forward", model.decoder.forward), "a replaced method of decoder"),
        (lambda m: setattr(m.encoder, "embed_pixels", m.encoder.embed_pixels), "a replaced method of encoder"),
        (lambda model: model.encoder.compile(backend="eager"), "a replaced method of encoder"),
        (lambda model: model.decoder.register_forward_hook(print), "hooks of decoder"),
        (lambda model: model.encoder.norm.train(), "training mode of encoder.norm"),
        (lambda model: setattr(model, "__class__", type("Mine", (type(model),), {})), "the model, which is"),
        (parametrised, "decoder.proj_dec, which is torch.nn.utils.parametrize.ParametrizedLinear"),
    ],
)
def test_why_not(model, graphs, change, reason):
    assert why_not(model) is None
    change(model)
    assert reason in why_not(model)
    for _ in range(4):
        model.segment(image(64, 64))
    assert not graphs


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", True),
    ],
)
def test_switches_of_libraries(owner, name, value):
    before, was = network_graphs._settings(), getattr(owner, name)
    try:
        setattr(owner, name, value)
        assert network_graphs._settings() != before
    finally:
        setattr(owner, name, was)
    assert network_graphs._settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="an interface of PyTorch 2.9")
@pytest.mark.parametrize("where", ["cuda.matmul", "cudnn.conv"])
def test_precision_that_the_newer_interface_alone_was_told(where):
    """The older one raises then. In a process of its own: what was told cannot be taken back."""
    code = f"""
import torch
from segmenter.inference.network_graphs import _settings
found = set()
for precision in ("ieee", "tf32"):
    torch.backends.{where}.fp32_precision = precision
    found.add(_settings())
assert len(found) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_parameter(model):
    layers = [nn.Identity(), nn.Linear(3, 2, bias=False), nn.LayerNorm(2), nn.LayerNorm(2, elementwise_affine=False)]
    for module in (model, model.decoder, nn.Sequential(*layers), nn.Sequential(layers[3], layers[2]), layers[0]):
        assert first_parameter(module) is next(module.parameters(), None)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


def test_batches_of_unequal_sizes_do_not_thrash(model, graphs):
    """One window to eight, in turn: eight graphs, however long it goes on."""
    for n in itertools.chain(*[range(1, 9)] * 4):
        segment.segment_pixels(model, torch.zeros(n, 64, 64, 3, dtype=torch.uint8), batch_size=8)
    assert len(graphs) == 8 and [g.replays for g in graphs] == [3] * 8


def test_more_shapes_than_are_kept(model, graphs):
    """Graphs that go before they pay off come back after twice as many calls each time."""
    small = [image(64 + 8 * i, 64 + 8 * i) for i in range(MAX_SHAPES + 4)]
    for _ in range(40):
        for pixels in small:
            model.segment(pixels, window_size=len(pixels))
    (of_type,) = graphs_of(model)
    assert len(of_type.shapes) == MAX_SHAPES
    assert len(graphs) < 6 * len(small), "40 rounds"


def test_weights_that_change_all_the_time(model, graphs):
    """A step, then two images, and so on: fewer and fewer captures, which cost more than they save."""
    pixels = image(64, 64)
    for _ in range(32):
        weights_of(lambda weight: weight.mul_(0.99))(model)
        for _ in range(2):
            model.segment(pixels)
    assert len(graphs) <= 6, "after 1, 2, 4, 8, 16, 32 calls without"


def test_graphs_give_way_to_a_call_that_does_not_fit(model, graphs, monkeypatch):
    pixels, want = captured(model, graphs)
    labels, errors = segment.labels_of_views, [OUT_OF_MEMORY]
    monkeypatch.setattr(segment, "labels_of_views", lambda *a: labels(*a) if not errors else raise_(errors.pop()))
    with pytest.warns(UserWarning, match="not enough memory for a call beside what was captured"):
        assert torch.equal(model.segment(pixels), want)
    assert not graphs_of(model)[0].shapes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(model.segment(pixels), want)
    assert len(graphs) == 1, "from here on without"
    errors.append(OUT_OF_MEMORY)
    with pytest.raises(torch.OutOfMemoryError):
        model.segment(pixels)


def test_graphs_give_way_to_probabilities(model, graphs, monkeypatch):
    pixels, want = captured(model, graphs)
    probabilities, errors = segment._with_probabilities, [OUT_OF_MEMORY]
    monkeypatch.setattr(
        segment, "_with_probabilities", lambda *a: probabilities(*a) if not errors else raise_(errors.pop())
    )
    with pytest.warns(UserWarning, match="not enough memory for a call beside what was captured"):
        assert torch.equal(model.segment(pixels, return_probabilities=True)[0], want)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, lambda model: model.to("cpu")])
def test_a_model_that_is_moved_or_converted_leaves_no_memory_behind(model, graphs, convert):
    captured(model, graphs)
    kept = weakref.ref(graphs_of(model)[0])
    graphs.clear()  # the stand-ins know whose they are
    convert(model)
    gc.collect()
    assert kept() is None and not graphs_of(model)


def raise_(error):
    raise error


def test_released_and_freed(graphs):
    model = tiny_model()
    captured(model, graphs)
    captured_bf16 = [model.segment(image(64, 64), dtype="bfloat16") for _ in range(3)]
    assert len(captured_bf16) == 3 and len(graphs) == 2
    assert [of_type.dtype for of_type in graphs_of(model)] == [torch.float32, torch.bfloat16]
    assert "1x64x64x3" in repr(graphs_of(model)[0]) and all(graphs_of(model)[0].memory().values())
    again = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert not graphs_of(again[0]) and not graphs_of(again[1])
    kept = weakref.ref(graphs_of(model)[0])
    graphs.clear()  # the stand-ins know whose they are
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None, "graphs keep no model alive"
    finally:
        gc.enable()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("change", [lambda m: m.train(), lambda m: m.to(torch.float64)])
def test_moving_and_training_give_memory_back_at_once(model, graphs, change):
    captured(model, graphs)
    (of_type,) = graphs_of(model)
    memory = weakref.ref(of_type._watched.memory[0])
    del of_type
    graphs.clear()  # the stand-ins are kept there
    change(model)
    gc.collect()
    assert not graphs_of(model) and memory() is None


def test_no_memory_for_converted_weights(model, graphs, monkeypatch):
    def exhausted(*_):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(cuda_graphs, "half_weights", exhausted)
    want = model.segment(image(64, 64), dtype="bfloat16", cuda_graphs=False)
    with pytest.warns(UserWarning, match=r"not enough memory to capture windows \(1, 64, 64, 3\)"):
        for _ in range(4):
            assert torch.equal(model.segment(image(64, 64), dtype="bfloat16"), want)
    assert not graphs


def test_release(model, graphs):
    captured(model, graphs)
    with pytest.warns(UserWarning):
        assert release(model)
    assert not release(model)


def test_weights_are_converted_once_and_only_for_graphs(model, graphs, monkeypatch):
    conversions = []
    monkeypatch.setattr(cuda_graphs, "half_weights", lambda *a: conversions.append(a) or half_weights(*a))
    model.segment(image(64, 64), dtype="bfloat16")
    assert not conversions
    for _ in range(4):
        model.segment(image(64, 64), dtype="bfloat16")
    assert len(conversions) == 1


def test_threads(model, graphs):
    inputs = [image(64, 64 + 8 * i, seed=i) for i in range(4)]
    want, wrong, start = [model.segment(x, cuda_graphs=False) for x in inputs], [], threading.Barrier(4)

    def work(i):
        start.wait()
        try:
            for _ in range(5):
                if not torch.equal(model.segment(inputs[i]), want[i]):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and used(model) > 4
