"""The whole way from bytes to labels as one CUDA graph a shape: `model.compile_inference(batch, height, width)`.

A forward pass of a small model is some hundred kernels of a few microseconds; launching them one by one takes longer
than running them. A graph launches all of them at once.
"""

import collections
import contextlib
import copy
import ctypes
import functools
import itertools
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.cache import Cache, holding_results, optimiser_steps
from segmenter.inference import segment
from segmenter.inference.windows import check_finite, check_sizes

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
        names = dict(module.named_parameters(recurse=False))
        for name, parameter in names.items():
            if isinstance(module, MATRICES) or name in ("proj_patch", "proj_classes"):
                shared[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return copy.deepcopy(model, shared)


class Shape(NamedTuple):
    """Images (batch, height, width, 3)."""

    batch: int
    height: int
    width: int


class Place(NamedTuple):
    """Where graphs of one model are captured: blocks that one leaves free are there for the next on the same stream."""

    pool: Any
    stream: Any

    @staticmethod
    def on(device: torch.device) -> "Place":
        """A new pool, on the device's one stream for capturing: libraries keep a workspace for each stream."""
        return Place(torch.cuda.graph_pool_handle(), capture_stream(device.index or 0))

    def give_up(self) -> None:
        """After a failed capture: PyTorch up to 2.11 sends allocations of the stream to the pool until it is told."""
        with contextlib.suppress(RuntimeError):  # newer ones have been
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)


@functools.cache
def capture_stream(index: int) -> Any:
    """A stream of a device that nobody else has: what `torch.cuda.Stream()` gives comes from a pool of 32, in turn."""
    with torch.cuda.device(index):
        handle = ctypes.c_void_p()
        try:
            create = ctypes.CDLL(None).cudaStreamCreateWithFlags  # of the runtime that PyTorch has loaded
            failed = create(ctypes.byref(handle), 1)  # 1: does not wait for the default stream
        except AttributeError:  # linked into PyTorch, or of AMD
            failed = True
        return torch.cuda.Stream(index) if failed else torch.cuda.ExternalStream(handle.value, device=index)


ATTEMPTS = 3  # to capture a shape
_capturing = threading.Lock()  # PyTorch allows one capture at a time in a process


class Graph:
    """A function of one tensor, captured with a static input and static outputs.

    Attributes:
        input, outputs: the static tensors. nbytes: what they and capturing took on the device.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], example: torch.Tensor, place: Place
    ):
        self.graph, self._streams = torch.cuda.CUDAGraph(), set()
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
        stream = torch.cuda.current_stream()
        if stream.cuda_stream not in self._streams:  # which may still read the input when it is freed
            self.input.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        with torch.inference_mode():  # outside, a tensor that was made inside could not be written to
            self.input.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


class Direct:
    """What stands for a `Graph` on a device that has none: the function itself."""

    nbytes = 0

    def __init__(self, function: Callable, example: torch.Tensor, place: Place | None):
        self.function, self.device = function, example.device

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(x.to(self.device))


class Watched:
    """The parameters and buffers of a model as they are, to tell later, in microseconds, whether any has changed.

    Changed means written to, moved or replaced. Not seen are modules that are added or taken away, and writes that
    PyTorch does not count; `optimiser_steps` stands for those of fused optimisers.
    """

    def __init__(self, model: nn.Module):
        self.steps = optimiser_steps()
        self.owners = [owner for m in model.modules() for owner in (m._parameters, m._buffers) if owner]
        self.values = list(itertools.chain.from_iterable(map(dict.values, self.owners)))
        self.tensors = [tensor for tensor in self.values if tensor is not None]
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]  # those count no writes
        self.addresses, self.versions = self._addresses(), self._versions()
        self.memory = [tensor.detach() for tensor in self.tensors]  # so that no later tensor comes to the same address

    def unchanged(self) -> bool:
        """Written for speed: it runs before every replay."""
        values = list(itertools.chain.from_iterable(map(dict.values, self.owners)))
        return (
            self.steps == optimiser_steps()
            and len(values) == len(self.values)
            and all(map(operator.is_, values, self.values))
            and self._addresses() == self.addresses
            and self._versions() == self.versions
        )

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def _versions(self) -> list[int]:
        return list(map(_VERSION, self.counted))


_VERSION = operator.attrgetter("_version")


class CompiledInference:
    """Labels of batches of images, each shape captured once; see `Segmenter.compile_inference`.

    Calls may come from several threads; they run one after the other. Weights may be changed in place
    (`load_state_dict`, a step of any optimiser in the process), replaced or moved: the next call sees it, converts
    them again where `dtype` asks for that, and captures anew what comes twice. Call `refresh` after changes that
    PyTorch does not count (`p.data.mul_(2)`), and after others than of weights (`model.info`, `accelerate`).

    What cannot be captured runs without a graph, and that is warned of once: a shape after three tries, because what
    other threads do can spoil one; every new shape once memory ran out, so that captures do not push out each other.

    Attributes:
        graphs: whether shapes are captured; False on a CPU, where calls run one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: str | torch.dtype | None = None,
        window_size: int | None = None,
        window_stride: int | None = None,
        window_batch_size: int = 8,
        max_shapes: int = 8,
    ):
        if model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before compile_inference")
        if max_shapes < 1:
            raise ValueError(f"max_shapes must be at least 1, got {max_shapes}")
        self.model, self.dtype, self.max_shapes = model, dtype, max_shapes
        self._windows = (*segment.window_of(model, window_size, window_stride), window_batch_size)
        check_sizes(self._windows[0], window_batch_size)
        segment.compute_dtype(model, dtype)  # raises for one that this model cannot run in
        self._lock = threading.RLock()
        self._shapes: collections.OrderedDict[Shape, Graph | Direct] = collections.OrderedDict()
        self._met: collections.OrderedDict[Shape, int] = collections.OrderedDict()  # not captured: how often tried
        self._full = False  # memory ran out: nothing more is captured
        self._transfers: list[_Transfer] = []  # that no `map` uses
        self._weights: Watched | None = None
        self._network: nn.Module = model
        self._place: Place | None = None
        self._last: torch.cuda.Event | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that are captured, the one not used for longest first."""
        return list(self._shapes)

    def capture(self, batch: int, height: int, width: int) -> None:
        """Captures a shape now, rather than at its second call.

        Warns:
            UserWarning: it cannot be captured, or memory does not suffice; it will run without a graph.
        """
        shape = Shape(batch, height, width)
        if min(shape) < 1:
            raise ValueError(f"batch, height and width must be at least 1, got {tuple(shape)}")
        with self._lock, self._on_device():
            self._follow_weights()
            pixels = torch.zeros(*shape, 3, dtype=torch.uint8, device=self.device)
            for _ in range(ATTEMPTS):
                if shape not in self._shapes:
                    self._try(shape, pixels)

    def memory(self) -> dict[Shape, int]:
        """Bytes on the device that each captured shape holds (input, labels, what lies between); 0 without graphs.

        All shapes take from one pool: a shape that fits into what others left free adds nothing.
        """
        return {shape: graph.nbytes for shape, graph in list(self._shapes.items())}  # other threads may change it

    def refresh(self) -> None:
        """Reads the weights again and forgets what was captured."""
        with self._lock:
            self._weights = None
            for module in self.model.modules():
                if isinstance(getattr(module, "cache", None), Cache):
                    module.cache.clear()
            self._follow_weights()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Labels of images.

        Args:
            pixels: (B, H, W, 3) uint8, on the CPU or on the model's device. A shape that is not captured runs without a
                graph the first time and is captured the second; up to half fewer images than a captured batch of
                their size are filled up.
        Returns:
            labels (B, H, W), new memory, on the device of pixels.
        Raises:
            ValueError: another shape or type, or scores that are not finite (which waits for the device to tell).
        """
        _check_pixels(pixels)
        with self._lock, self._on_device():
            labels, finite = self._run(pixels)
            if labels.device == pixels.device:
                labels = labels.clone()
            else:
                labels, finite = _on_host(labels, finite)
                torch.cuda.current_stream().synchronize()  # the only wait
                labels = labels.clone()
            check_finite(finite)
        return labels

    def map(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Labels (on the CPU) of batches (on the CPU), in order; copies to and from the device overlap computing.

        Two batches are under way at a time, through pinned memory: one is taken from `batches` before the labels of the
        one before are given. If taking or running one raises, those before it are given first.
        """
        if not self.graphs:
            yield from map(self, batches)
            return
        waiting: collections.deque[_Transfer] = collections.deque()
        iterator, failure = iter(batches), None
        with self._two_transfers() as transfers:
            for i in itertools.count():
                transfer = transfers[i % 2]  # its labels were fetched in the turn before last
                try:
                    pixels = next(iterator)
                    _check_pixels(pixels)
                    with self._lock, self._on_device():
                        transfer.send(pixels, self._run)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                waiting.append(transfer)
                if len(waiting) == 2:
                    yield waiting.popleft().fetch()
            while waiting:
                yield waiting.popleft().fetch()
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def _two_transfers(self) -> Iterator[list["_Transfer"]]:
        """Kept from one `map` to the next: PyTorch keeps memory by stream."""
        with self._lock:
            here = [t for t in self._transfers if t.device == self.device]  # not where the model was before
            free, self._transfers = here[:2], here[2:]
        taken = free + [_Transfer(self.device) for _ in range(2 - len(free))]
        try:
            yield taken
        finally:
            for transfer in taken:  # one may be under way still, if nobody fetched its labels
                transfer.done.synchronize()
            with self._lock:
                self._transfers += taken

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """On the model's device, after what an earlier call started there: graphs share memory, and the callers'
        streams may differ."""
        if not self.graphs:
            yield
            return
        with torch.cuda.device(self.device):
            if self._last is not None:
                self._last.wait()
            try:
                yield
            finally:
                self._last = torch.cuda.current_stream().record_event()

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels, largest score), of which the next call may overwrite both."""
        self._follow_weights()
        shape = Shape(*pixels.shape[:3])
        # a graph for a few images more is faster than no graph
        larger = [s for s in self._shapes if s[1:] == shape[1:] and shape.batch < s.batch <= 2 * shape.batch]
        if self.graphs and shape not in self._shapes and larger:
            rest = min(larger).batch - shape.batch
            labels, finite = self._run(torch.cat([pixels, pixels[-1:].expand(rest, -1, -1, -1)]))
            return labels[: shape.batch], finite
        if shape not in self._shapes and shape in self._met:
            self._try(shape, pixels)
        if shape in self._shapes:
            self._shapes.move_to_end(shape)
            return self._shapes[shape](pixels)
        self._met.setdefault(shape, 0)
        if len(self._met) > 64:
            self._met.popitem(last=False)
        return self._without_graph(pixels)

    def _try(self, shape: Shape, pixels: torch.Tensor) -> None:
        """Captures a shape, if that can be."""
        if not self.graphs:
            self._shapes[shape] = Direct(self._labels, pixels.to(self.device), None)
        elif not self._full and self._met.get(shape, 0) < ATTEMPTS:
            self._capture(shape, pixels.to(self.device))
        while len(self._shapes) > self.max_shapes:
            self._shapes.popitem(last=False)

    def _capture(self, shape: Shape, pixels: torch.Tensor) -> None:
        try:
            self._shapes[shape] = Graph(self._labels, pixels, self._place)
            self._met[shape] = 0
        except torch.OutOfMemoryError:
            self._stop_capturing(f"not enough memory to capture images {tuple(shape)}")
        except RuntimeError as error:
            self._met[shape] = tried = self._met.get(shape, 0) + 1
            self._place = Place.on(self.device)  # the pool of a failed capture takes no other
            if tried == ATTEMPTS:
                cause = str(error.__context__ or error).strip().splitlines()[0]
                warnings.warn(
                    f"images {tuple(shape)} cannot be captured and run without a graph: {cause}", stacklevel=6
                )

    def _without_graph(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Graphs give way to a call that does not fit beside them."""
        try:
            return self._labels(pixels.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError:
            if not self._shapes:
                raise
        self._shapes.clear()
        self._stop_capturing(f"not enough memory for images {tuple(pixels.shape[:3])} beside what was captured")
        self._place = Place.on(self.device)  # what the graphs held goes back with their pool
        torch.cuda.empty_cache()
        return self._labels(pixels.to(self.device, non_blocking=True))

    def _stop_capturing(self, why: str) -> None:
        self._full = True
        warnings.warn(f"{why}; from here on new shapes run without a graph", stacklevel=7)

    def _labels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, H, W), and a number that is finite if all scores are. What is captured."""
        parameter = next(self.model.parameters())
        dtype = segment.resolve_dtype(self.dtype, parameter.device, parameter.dtype)
        half = dtype != parameter.dtype
        # said in full, so that what the caller has on is not captured; and weights are converted already
        autocast = torch.autocast(parameter.device.type, dtype if half else None, enabled=half, cache_enabled=False)
        with autocast, torch.inference_mode():
            masks, windows = segment.predict(self._network, pixels, *self._windows)
            labels = segment.labels_of_views(self._network, [(masks, windows, False)], tuple(pixels.shape[1:3]))
            return labels, masks.abs().max().float()

    def _follow_weights(self) -> None:
        if self.model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before segmenting")
        if self._weights is not None and self._weights.unchanged():
            return
        self._weights = Watched(self.model)
        self._shapes.clear()
        self._met.clear()
        self._full = False
        self._place = Place.on(self.device) if self.graphs else None
        parameter = next(self.model.parameters())
        dtype = segment.resolve_dtype(self.dtype, parameter.device, parameter.dtype)
        self._network = self.model if dtype == parameter.dtype else half_weights(self.model, dtype)

    def __repr__(self) -> str:
        kind = "captured" if self.graphs else "run one by one"
        shapes = ", ".join(f"{s.batch}x{s.height}x{s.width} ({n / 2**20:.0f} MiB)" for s, n in self.memory().items())
        return f"CompiledInference({kind}: {shapes or 'nothing yet'})"


class _Transfer:
    """One of the batches under way: pinned memory on the host, and staging on the device so that the graph is free."""

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device)
        self.pixels: torch.Tensor | None = None  # pinned
        self.done = torch.cuda.Event()
        self.results: tuple[torch.Tensor, torch.Tensor] | None = None  # pinned

    def send(self, pixels: torch.Tensor, run: Callable) -> None:
        compute = torch.cuda.current_stream(self.device)
        if self.pixels is None or self.pixels.shape != pixels.shape:
            self.pixels = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        self.pixels.copy_(pixels)
        with torch.cuda.stream(self.copies):
            staged = self.pixels.to(self.device, non_blocking=True)
        compute.wait_stream(self.copies)
        staged.record_stream(compute)
        labels, finite = (x.clone() for x in run(staged))  # the next batch overwrites what a graph gives
        self.copies.wait_stream(compute)
        with torch.cuda.stream(self.copies):
            self.results = _on_host(labels, finite)
            for x in (labels, finite):
                x.record_stream(self.copies)
            self.done.record()

    def fetch(self) -> torch.Tensor:
        """The labels, once they are there: pageable memory of their own."""
        self.done.synchronize()
        labels, finite = self.results
        check_finite(finite)
        return labels.clone()


def _on_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies in pinned memory, on their way on the current stream."""
    copies = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
    for copied, x in zip(copies, tensors, strict=True):
        copied.copy_(x, non_blocking=True)
    return copies


def _check_pixels(pixels: Any) -> None:
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
        what = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"expected a uint8 tensor (B, H, W, 3), got {what}")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected images (B, H, W, 3), got {tuple(pixels.shape)}")
