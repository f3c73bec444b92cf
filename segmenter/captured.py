"""The whole way from bytes to labels as one CUDA graph a shape: `model.compile_inference(batch, height, width)`.

A forward pass of a small model is some hundred kernels of a few microseconds; launching them one by one takes longer
than running them. A graph launches all of them at once.
"""

import collections
import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter import segment
from segmenter.inference import check_finite, check_sizes
from segmenter.remembered import Remembered, keeping, optimiser_steps

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
    """Pictures (batch, height, width, 3)."""

    batch: int
    height: int
    width: int


class Graph:
    """A function of one tensor, captured with a static input and static outputs.

    Attributes:
        input, outputs: the static tensors. nbytes: what capturing allocated on the device.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], example: torch.Tensor, pool: Any = None
    ):
        self.input = example.clone()
        before = torch.cuda.memory_reserved(example.device)
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), keeping() as self.kept:
            for _ in range(2):  # compiles kernels, makes tables, and lets libraries allocate their workspaces
                function(self.input)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function(self.input)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self.nbytes = self.input.nbytes + max(0, torch.cuda.memory_reserved(example.device) - before)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs for x, which the next call overwrites."""
        self.input.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


class Direct:
    """What stands for a `Graph` on a device that has none: the function itself."""

    nbytes = 0

    def __init__(self, function: Callable, example: torch.Tensor, pool: Any = None):
        self.function, self.device = function, example.device

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(x.to(self.device))


class CompiledInference:
    """Labels of batches of pictures, each shape captured once; see `Segmenter.compile_inference`.

    Calls may come from several threads; they run one after the other. Weights may be changed in place
    (`load_state_dict`, an optimiser's step) or moved: the next call sees it, converts them again where `dtype` asks for
    that, and captures anew. After changes that PyTorch does not count (`p.data.mul_(2)`), call `refresh`.

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
        self._met: collections.OrderedDict[Shape, None] = collections.OrderedDict()  # shapes run once, not captured
        self._weights: tuple = ()
        self._memory: list[torch.Tensor] = []
        self._network: nn.Module = model
        self._pool: Any = None
        self._n_captured = 0

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
        """Captures a shape now, rather than at its second call."""
        shape = Shape(batch, height, width)
        if min(shape) < 1:
            raise ValueError(f"batch, height and width must be at least 1, got {tuple(shape)}")
        with self._lock:
            self._follow_weights()
            self._captured(shape, torch.zeros(*shape, 3, dtype=torch.uint8, device=self.device))

    def memory(self) -> dict[Shape, int]:
        """Bytes on the device that each captured shape holds (input, labels, what lies between); 0 without graphs.

        All shapes take from one pool: a shape that fits into what others left free adds nothing.
        """
        return {shape: graph.nbytes for shape, graph in list(self._shapes.items())}  # other threads may change it

    def refresh(self) -> None:
        """Reads the weights again and forgets what was captured."""
        with self._lock:
            self._weights = ()
            for module in self.model.modules():
                if isinstance(getattr(module, "remembered", None), Remembered):
                    module.remembered.clear()
            self._follow_weights()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Labels of pictures.

        Args:
            pixels: (B, H, W, 3) uint8, on the CPU or on the model's device. A shape that is not captured runs without a
                graph the first time and is captured the second; fewer pictures than a captured batch of their size are
                filled up.
        Returns:
            labels (B, H, W), new memory, on the device of pixels.
        Raises:
            ValueError: another shape or type, or scores that are not finite (which waits for the device to tell).
        """
        _check_pixels(pixels)
        with self._lock, self._on_device():
            labels, finite = self._run(pixels)
            labels = labels.to(pixels.device) if labels.device != pixels.device else labels.clone()
            check_finite(finite)
        return labels

    def map(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Labels (on the CPU) of batches (on the CPU), in order; copies to and from the device overlap computing.

        Two batches are under way at a time, through pinned memory. While they are, other threads' calls wait.
        """
        if not self.graphs:
            yield from map(self, batches)
            return
        waiting: collections.deque[_Transfer] = collections.deque()
        transfers = [_Transfer(self.device), _Transfer(self.device)]
        for i, pixels in enumerate(batches):
            _check_pixels(pixels)
            transfer = transfers[i % 2]  # its labels were fetched in the turn before last
            with self._lock, self._on_device():
                transfer.send(pixels, self._run)
            waiting.append(transfer)
            if len(waiting) == 2:
                yield waiting.popleft().fetch()
        while waiting:
            yield waiting.popleft().fetch()

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.graphs else contextlib.nullcontext()

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels, largest score), of which the next call may overwrite both."""
        self._follow_weights()
        shape = Shape(*pixels.shape[:3])
        larger = [s for s in self._shapes if s[1:] == shape[1:] and s.batch > shape.batch]
        if shape not in self._shapes and larger:
            rest = min(larger).batch - shape.batch
            labels, finite = self._run(torch.cat([pixels, pixels[-1:].expand(rest, -1, -1, -1)]))
            return labels[: shape.batch], finite
        if shape in self._shapes or shape in self._met:
            return self._captured(shape, pixels)(pixels)
        self._met[shape] = None
        if len(self._met) > 64:
            self._met.popitem(last=False)
        return self._labels(pixels.to(self.device, non_blocking=True))

    def _captured(self, shape: Shape, pixels: torch.Tensor) -> Graph | Direct:
        graph = self._shapes.get(shape)
        if graph is None:
            while len(self._shapes) >= self.max_shapes:
                self._shapes.popitem(last=False)
            with self._on_device():
                if self.graphs and self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                kind = Graph if self.graphs else Direct
                graph = self._shapes[shape] = kind(self._labels, pixels.to(self.device), self._pool)
            self._n_captured += 1
        self._shapes.move_to_end(shape)
        return graph

    def _labels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, H, W), and a number that is finite if all scores are. What is captured."""
        with segment.compute_dtype(self.model, self.dtype), torch.inference_mode():
            masks, windows = segment.predict(self._network, pixels, *self._windows)
            labels = segment.labels_of_views(self._network, [(masks, windows, False)], tuple(pixels.shape[1:3]))
            return labels, masks.abs().max().float()

    def _follow_weights(self) -> None:
        if self.model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before segmenting")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        # fused optimisers write without counting
        weights = (optimiser_steps(), *(_state(t) for t in tensors))
        if weights == self._weights:
            return
        self._weights = weights
        self._memory = [t.detach() for t in tensors]  # so that no later tensor can come to lie at the same address
        self._shapes.clear()
        self._pool = None
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
            self.results = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in (labels, finite))
            for host, x in zip(self.results, (labels, finite), strict=True):
                host.copy_(x, non_blocking=True)
                x.record_stream(self.copies)
            self.done.record()

    def fetch(self) -> torch.Tensor:
        """The labels, once they are there: pageable memory of their own."""
        self.done.synchronize()
        labels, finite = self.results
        check_finite(finite)
        return labels.clone()


def _check_pixels(pixels: Any) -> None:
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
        what = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"expected a uint8 tensor (B, H, W, 3), got {what}")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected pictures (B, H, W, 3), got {tuple(pixels.shape)}")


def _state(tensor: torch.Tensor) -> tuple:
    """What changes when a tensor is written to or moved. Those made under inference_mode do not count writes."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version
