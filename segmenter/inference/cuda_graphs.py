"""What a model does to one tensor, as a CUDA graph for each shape that comes again.

A forward pass of a small model is some hundred kernels of a few microseconds; launching them one by one takes longer
than running them. A graph launches all of them at once. `compiled_inference` captures the whole way from bytes to
labels, `network_graphs` the network alone.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import operator
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.cache import Cache, holding_results, optimiser_steps
from segmenter.inference.precision import resolve_dtype
from segmenter.inference.transfers import dedicated_stream, stream_handle

# Whose parameters autocast converts, as it does `proj_patch` and `proj_classes`. Not the patch embedding: the kernels
# fold the normalisation into its float32 weights, which rounds once, and remember that.
MATRICES = (nn.Linear,)


def half_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a float32 model whose matrices are in `dtype`; everything else is the model's own memory.

    Under autocast to `dtype` it computes what the model does, without converting its weights in every call.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference():  # nobody counts writes to it, so that a copy could be outdated
                continue
            if isinstance(module, MATRICES) or name in ("proj_patch", "proj_classes"):
                shared[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return copy.deepcopy(model, shared)


class Place(NamedTuple):
    """Where graphs of one model are captured: blocks that one leaves free are there for the next on the same stream."""

    pool: Any
    stream: Any

    @staticmethod
    def on(device: torch.device) -> "Place":
        """A new pool, on the device's one stream for capturing: libraries keep a workspace for each stream."""
        return Place(torch.cuda.graph_pool_handle(), dedicated_stream(device.index or 0, "capture"))

    def give_up(self) -> None:
        """After a failed capture: PyTorch up to 2.11 sends allocations of the stream to the pool until it is told."""
        with contextlib.suppress(RuntimeError):  # newer ones have been
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)


class _Turns:
    """Calls with graphs on one device, whose streams may differ: each begins there when the one before has ended.

    Graphs of a model share memory, and all of a device the workspace of cuBLAS, which goes with the capture stream.
    Entered on the device, also within a call that has its turn already; no generator, for speed: each call does it.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.begun: list[tuple[int, torch.cuda.Stream, torch.cuda.Event]] = []  # one within the other
        self.last: torch.cuda.Event | None = None  # the end of the call before
        self.ends: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}  # of the last call on each stream

    @staticmethod
    @functools.cache
    def on(index: int) -> "_Turns":
        return _Turns()

    def __enter__(self) -> None:
        self.lock.acquire()
        try:
            handle = stream_handle(torch.cuda.current_device())
            stream, end = self.ends.get(handle) or (torch.cuda.current_stream(), torch.cuda.Event())
            if self.last not in (None, end):
                self.last.wait(stream)
            self.begun.append((handle, stream, end))
        except BaseException:
            self.lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            handle, stream, end = self.begun.pop()
            end.record(stream)
            if len(self.ends) > _KEPT:
                self.ends.clear()
            self.last, self.ends[handle] = end, (stream, end)
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def from_elsewhere(self, index: int) -> Iterator[None]:
        """The same for who is not on the device, number `index`, and goes there."""
        with torch.cuda.device(index), self:
            yield

    def wait(self) -> None:
        """Returns once the device has ended what was begun."""
        with self.lock:
            if self.last is not None:
                self.last.synchronize()


_capturing = threading.Lock()  # PyTorch allows one capture at a time in a process


class Graph:
    """A function of one tensor, captured with a static input and static outputs.

    Attributes:
        input, outputs: the static tensors. nbytes: what they and capturing took on the device. used: how often.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], example: torch.Tensor, place: Place
    ):
        self.graph, self._streams, self.used = torch.cuda.CUDAGraph(), set(), 0
        with _capturing, holding_results() as self.held:
            place.stream.wait_stream(torch.cuda.current_stream(example.device))
            with torch.cuda.stream(place.stream):
                self.input = example.clone()
                for _ in range(2):  # compiles kernels, makes tables, and lets libraries allocate their workspaces
                    function(self.input)
                torch.cuda.synchronize(example.device)
                torch.cuda.empty_cache()  # as capturing does itself: else it would hide what capturing takes
                before = torch.cuda.memory_reserved(example.device)
                try:
                    with torch.cuda.graph(self.graph, place.pool, place.stream, capture_error_mode="thread_local"):
                        self.outputs = function(self.input)
                except BaseException:
                    place.give_up()
                    raise
            torch.cuda.current_stream(example.device).wait_stream(place.stream)
            self.nbytes = self.input.nbytes + max(0, torch.cuda.memory_reserved(example.device) - before)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs for x, which the next call overwrites."""
        handle = stream_handle(self.input.get_device())
        if handle not in self._streams:  # which may still read the input when it is freed
            self.input.record_stream(torch.cuda.current_stream(self.input.device))
            self._streams.add(handle)
        with torch.inference_mode():  # outside, a tensor that was made inside could not be written to
            self.input.copy_(x, non_blocking=True)
        self.graph.replay()
        self.used += 1
        return self.outputs


class Direct:
    """What stands for a `Graph` on a device that has none: the function itself."""

    nbytes = used = 0

    def __init__(self, function: Callable, example: torch.Tensor, place: Place | None):
        self.function, self.device = function, example.device

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(x.to(self.device))


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """`next(module.parameters(), None)`, in a fifth of its time: every call asks for it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for layer in module._modules.values():
        if layer is not None and (found := first_parameter(layer)) is not None:
            return found
    return None


class Watched:
    """The parameters and buffers of a model as they are, to tell later, in microseconds, whether any has changed.

    Changed means written to, moved or replaced. Not seen are modules that are added or taken away, and writes that
    PyTorch does not count; `optimiser_steps` stands for those of fused optimisers.
    """

    def __init__(self, model: nn.Module):
        self.steps = optimiser_steps()
        self.owners = [owner for m in model.modules() for owner in (m._parameters, m._buffers) if owner]
        self.contents = list(map(dict, self.owners))
        named = [(owner, name, t) for owner in self.owners for name, t in owner.items() if t is not None]
        self.tensors = [tensor for _, _, tensor in named]
        self.single = [(owner, name, tensor) for owner, name, tensor in named if tensor.numel() == 1]
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]  # those count no writes
        self.addresses, self.versions = self._addresses(), self._versions()
        self.memory = [tensor.detach() for tensor in self.tensors]  # so that no later tensor comes to the same address

    def unchanged(self) -> bool:
        """Written for speed: it runs at every replay."""
        return (
            self.steps == optimiser_steps()
            and same(self.owners, self.contents)
            and all(owner[name] is tensor for owner, name, tensor in self.single)  # equals are `same`
            and self._addresses() == self.addresses
            and self._versions() == self.versions
        )

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def _versions(self) -> list[int]:
        return list(map(_VERSION, self.counted))


_VERSION = operator.attrgetter("_version")


def same(these: list, those: list) -> bool:
    """Whether two lists, or lists of dictionaries, hold the same objects, or equal ones.

    Python looks for identity before it asks for equality, so this takes a few nanoseconds an object. Tensors of several
    elements that are not the same have no equality: they raise.
    """
    try:
        return these == those
    except RuntimeError:
        return False


ATTEMPTS = 3  # to capture a shape
PAYS = 8  # replays that make up for a capture, which runs the model three times and waits for the device
PATIENCE = 64  # the most calls without a graph before a capture
_KEPT = 64  # shapes without a graph, and streams, that are known


@dataclasses.dataclass
class _Met:
    """A shape that has no graph. `calls` since it has none, of which `wait` are to come before it is captured."""

    calls: int = 0
    wait: int = 1
    failed: int = 0


class Graphs:
    """A graph for each shape that comes again; subclasses say of what, as `_function`, and of which `model`.

    A shape is captured at its second call. One whose graph had to go before it paid off, because other shapes came or
    the model changed, has to be asked for twice as often the next time: so however shapes and changes alternate, few
    calls capture. After three captures that failed (other threads can spoil one) a shape runs without a graph for good,
    with a warning; once memory ran out every new shape does, so that captures do not push out each other.

    Attributes:
        dtype: as of `segment_image`. max_shapes: graphs that are kept; the one not used for longest goes.
        used: calls that had a graph.
    """

    model: nn.Module

    def __init__(self, dtype: str | torch.dtype | None, max_shapes: int):
        if max_shapes < 1:
            raise ValueError(f"max_shapes must be at least 1, got {max_shapes}")
        self.dtype, self.max_shapes = dtype, max_shapes
        self.used = 0
        self._lock = threading.RLock()
        self._shapes: collections.OrderedDict[Hashable, Graph | Direct] = collections.OrderedDict()
        self._met: collections.OrderedDict[Hashable, _Met] = collections.OrderedDict()
        self._full = False  # memory ran out: nothing more is captured
        self._watched: Any = None  # of the model, since there are graphs
        self._converted: nn.Module | None = None  # a copy with weights in dtype
        self._place: Place | None = None

    @property
    def device(self) -> torch.device:
        return first_parameter(self.model).device

    @property
    def graphs(self) -> bool:
        """Whether shapes are captured; False on a CPU, where calls run one by one."""
        return self.device.type == "cuda"

    @property
    def shapes(self) -> list[Hashable]:
        """The shapes that are captured, the one not used for longest first."""
        return list(self._shapes)

    def memory(self) -> dict[Hashable, int]:
        """Bytes on the device that each captured shape holds (input, outputs, what lies between); 0 without graphs.

        All shapes take from one pool: a shape that fits into what others left free adds nothing.
        """
        return {shape: graph.nbytes for shape, graph in list(self._shapes.items())}  # other threads may change it

    def refresh(self) -> None:
        """Forgets what was captured, and what was computed from weights: for changes that nobody counts."""
        with self._lock:
            self._forget()
            self._met.clear()
            for module in self.model.modules():
                if isinstance(getattr(module, "cache", None), Cache):
                    module.cache.clear()

    def _function(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is captured, of `self._network`."""
        raise NotImplementedError

    @property
    def _network(self) -> nn.Module:
        return self.model if self._converted is None else self._converted

    def _watch(self) -> Any:
        """What tells whether the model is `unchanged()`."""
        return Watched(self.model)

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        """On the model's device, in its turn there."""
        device = self.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        turns = _Turns.on(device.index)
        return turns if torch.cuda.current_device() == device.index else turns.from_elsewhere(device.index)

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Autocast as `dtype` says, in full: what the caller has on is not captured. Weights are converted already."""
        parameter = first_parameter(self.model)
        dtype = resolve_dtype(self.dtype, parameter.device, parameter.dtype)
        half = dtype != parameter.dtype
        kind = parameter.device.type
        with torch.autocast(kind, dtype if half else None, enabled=half, cache_enabled=False), torch.inference_mode():
            yield

    def _replay(self, shape: Hashable, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """What the graph of a shape gives for x; None if it has none, or one of a model that has changed.

        That is looked at while the device computes already, for what has changed in vain: the graph only reads weights,
        as they were, and its outputs are overwritten.
        """
        run = self._shapes.get(shape)
        outputs = None if run is None or isinstance(run, Direct) else run(x)
        if self._watched is not None and not self._watched.unchanged():
            self._forget()
            return None
        if run is None:
            return None
        self._shapes.move_to_end(shape)
        self.used += 1
        return run(x) if outputs is None else outputs

    def _capture_in_time(self, shape: Hashable, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """What the graph of a shape gives that has none so far, if it is time to capture it and that can be."""
        met = self._met.setdefault(shape, _Met())
        self._met.move_to_end(shape)
        if len(self._met) > _KEPT:
            self._met.popitem(last=False)
        if met.calls < met.wait:
            met.calls += 1
        else:
            self._try(shape, x)
        return self._replay(shape, x) if shape in self._shapes else None

    def _prepare(self) -> None:
        """Makes what captures need, unless it is there."""
        if self._watched is not None:
            return
        watched, parameter = self._watch(), first_parameter(self.model)
        dtype = resolve_dtype(self.dtype, parameter.device, parameter.dtype)
        self._converted = None if dtype == parameter.dtype else half_weights(self.model, dtype)
        self._place = Place.on(self.device) if self.graphs else None
        self._watched = watched

    def _forget(self) -> None:
        """Back to the beginning, but for how long each shape has to wait."""
        if self._place is not None:  # what goes may still be read on another stream than it came from
            _Turns.on(self._place.stream.device_index).wait()
        while self._shapes:
            self._drop()
        for met in self._met.values():
            met.calls = met.failed = 0
        self._full, self._watched, self._converted, self._place = False, None, None, None

    def _drop(self) -> None:
        """Drops the graph not used for longest."""
        shape, graph = self._shapes.popitem(last=False)
        met = self._met.setdefault(shape, _Met())
        met.calls, met.wait = 0, 1 if graph.used >= PAYS else min(2 * met.wait, PATIENCE)

    def _try(self, shape: Hashable, x: torch.Tensor) -> None:
        """Captures a shape, if that can be."""
        if not self.graphs:
            self._prepare()
            self._shapes[shape] = Direct(self._function, x.to(self.device), None)
        elif not self._full and self._met.setdefault(shape, _Met()).failed < ATTEMPTS:
            self._capture(shape, x.to(self.device))
        while len(self._shapes) > self.max_shapes:
            self._drop()

    def _capture(self, shape: Hashable, x: torch.Tensor) -> None:
        met = self._met[shape]
        try:
            self._prepare()
            self._shapes[shape] = Graph(self._function, x, self._place)
            met.failed = 0
        except torch.OutOfMemoryError:
            self._stop_capturing(f"not enough memory to capture {self._named(x)}")
        except RuntimeError as error:
            met.failed += 1
            self._place = Place.on(self.device)  # the pool of a failed capture takes no other
            if met.failed == ATTEMPTS:
                cause = str(error.__context__ or error).strip().splitlines()[0]
                warnings.warn(f"{self._named(x)} cannot be captured and run without a graph: {cause}", stacklevel=6)

    def _give_way(self, to: str) -> bool:
        """Whether there were graphs, which are gone now, with the memory that they held: `to` did not fit beside."""
        if not self._shapes:
            return False
        while self._shapes:
            self._drop()
        self._stop_capturing(f"not enough memory for {to} beside what was captured")
        self._place = Place.on(self.device)  # what the graphs held goes back with their pool
        torch.cuda.empty_cache()
        return True

    def _stop_capturing(self, why: str) -> None:
        self._full = True
        warnings.warn(f"{why}; from here on new shapes run without a graph", stacklevel=7)

    @staticmethod
    def _named(x: torch.Tensor) -> str:
        return f"images {tuple(x.shape[:3])}"

    def __repr__(self) -> str:
        kind = "captured" if self.graphs else "run one by one"
        sizes = ((getattr(shape, "shape", shape), nbytes) for shape, nbytes in self.memory().items())
        shapes = ", ".join(f"{'x'.join(map(str, size))} ({nbytes / 2**20:.0f} MiB)" for size, nbytes in sizes)
        return f"{type(self).__name__}({kind}: {shapes or 'nothing yet'})"
