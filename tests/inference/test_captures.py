"""Captures that fail: disturbed by other threads, impossible, out of memory. As in test_compiled_inference."""

import contextlib
import functools

import pytest
import torch

from segmenter.inference import cuda_graphs
from segmenter.inference.compiled_inference import CompiledInference
from tests.inference.test_compiled_inference import by_copy, images, one_by_one
from tests.support.fake_graphs import install


@pytest.fixture
def graphs(monkeypatch):
    return install(monkeypatch)


def failing(monkeypatch, *errors):
    """Has the next captures raise these; a list of the shapes that were tried."""
    good, left, tried = cuda_graphs.Graph, list(errors), []

    def graph(function, example, place):
        tried.append(tuple(example.shape[:3]))
        if left:
            raise left.pop(0)
        return good(function, example, place)

    monkeypatch.setattr(cuda_graphs, "Graph", graph)
    return tried


NOT_PERMITTED = RuntimeError("operation not permitted when stream is capturing")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def test_what_cannot_be_captured_runs_without_a_graph(model, graphs, monkeypatch):
    """A part that waits for the device, say: three tries, said once, and never an error."""
    compiled = model.compile_inference(1, 64, 64)
    pixels, other = images(1, 64, 80), images(1, 64, 96)
    tried = failing(monkeypatch, *[NOT_PERMITTED] * 6)
    with pytest.warns(
        UserWarning, match=r"\(1, 64, 80\) cannot be captured and run without a graph: operation"
    ) as said:
        for _ in range(6):
            assert torch.equal(compiled(pixels), one_by_one(model, pixels))
    assert len(said) == 1 and tried == [(1, 64, 80)] * 3 and compiled.shapes == [(1, 64, 64)]
    with pytest.warns(UserWarning, match=r"\(1, 64, 96\) cannot be captured"):
        compiled.capture(1, 64, 96)
    assert len(tried) == 6 and torch.equal(compiled(other), one_by_one(model, other)) and len(tried) == 6
    compiled(images(1))
    assert graphs[0].replays == 1, "the other shapes are still captured"


def test_a_passing_disturbance_is_no_reason_to_give_up(model, graphs, monkeypatch):
    compiled, pixels = CompiledInference(model), images(1)
    tried = failing(monkeypatch, NOT_PERMITTED)
    for _ in range(4):
        assert torch.equal(compiled(pixels), one_by_one(model, pixels))
    assert len(tried) == 2 and compiled.shapes == [(1, 64, 64)] and graphs[0].replays == 2
    assert graphs[0].place.pool == 1, "the pool of a failed capture takes no other"


def test_captures_do_not_push_out_each_other_for_memory(model, graphs, monkeypatch):
    compiled = model.compile_inference(1, 64, 64)
    pixels, tried = images(1, 64, 80), failing(monkeypatch, OUT_OF_MEMORY)
    compiled(pixels)
    with pytest.warns(UserWarning, match=r"not enough memory to capture images \(1, 64, 80\); from here on new shapes"):
        compiled(pixels)
    for w in (80, 96, 80, 96):
        compiled(images(1, 64, w))
    compiled(images(1))
    assert len(tried) == 1 and compiled.shapes == [(1, 64, 64)] and graphs[0].replays == 1
    by_copy(model)  # new weights, new chance
    for _ in range(2):
        assert torch.equal(compiled(pixels), one_by_one(model, pixels))
    assert compiled.shapes == [(1, 64, 80)]


def test_graphs_give_way_to_a_call_that_does_not_fit_beside_them(model, graphs, monkeypatch):
    compiled, pixels = model.compile_inference(1, 64, 64), images(1, 64, 80)
    labels, errors = compiled._function, iter([OUT_OF_MEMORY])

    def run(x):
        for error in errors:
            raise error
        return labels(x)

    monkeypatch.setattr(compiled, "_function", run)
    with pytest.warns(UserWarning, match=r"not enough memory for images \(1, 64, 80\) beside what was captured"):
        assert torch.equal(compiled(pixels), one_by_one(model, pixels))
    assert not compiled.shapes
    errors = iter([OUT_OF_MEMORY])
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to give way
        compiled(pixels)


def test_calls_follow_each_other_on_any_stream_of_a_device(model, monkeypatch):
    """Of all models: they share a workspace. Default streams of two devices have the same handle."""
    waits, current = [], ["0 default"]

    class Event:
        def record(self, stream):
            self.stream = stream

        def wait(self, stream):
            waits.append((self.stream, stream))

    two = CompiledInference(model), CompiledInference(model)
    turns = cuda_graphs._Turns.on.__wrapped__
    monkeypatch.setattr(cuda_graphs._Turns, "on", functools.cache(turns))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(current[0][0]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda_graphs, "stream_handle", lambda index: len(current[0]))
    monkeypatch.setattr(cuda_graphs.Graphs, "device", property(lambda self: torch.device(f"cuda:{current[0][0]}")))
    for i, current[0] in enumerate(("0 default", "0 default", "1 default", "1 other", "0 default")):
        with two[i % 2]._on_device():
            pass
    assert waits == [("1 default", "1 other")]


def test_a_model_on_another_device_than_the_current_one(model, monkeypatch):
    """Its turn is on its own device, and the caller's is the current one again afterwards; errors leave it too."""
    at, turns = [0], []

    @contextlib.contextmanager
    def device(index):
        at.append(index)
        yield
        at.pop()

    class Event:
        def record(self, stream):
            turns.append(stream)

    compiled = CompiledInference(model)
    monkeypatch.setattr(cuda_graphs._Turns, "on", functools.cache(cuda_graphs._Turns.on.__wrapped__))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: f"stream of {at[-1]}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda_graphs, "stream_handle", lambda index: 0)
    monkeypatch.setattr(cuda_graphs.Graphs, "device", torch.device("cuda:1"))
    with compiled._on_device(), compiled._on_device():  # as a call within a call
        assert at == [0, 1]
    assert at == [0] and turns == ["stream of 1"] * 2
    with pytest.raises(ZeroDivisionError), compiled._on_device():
        raise ZeroDivisionError
    assert len(turns) == 3
    assert cuda_graphs._Turns.on(1).lock.acquire(blocking=False) and not cuda_graphs._Turns.on(1).begun
