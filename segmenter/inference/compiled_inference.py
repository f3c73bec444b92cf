"""The whole way from bytes to labels as one CUDA graph a shape: `model.compile_inference(batch, height, width)`."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from segmenter.inference import segment
from segmenter.inference.cuda_graphs import ATTEMPTS, Graphs
from segmenter.inference.precision import compute_dtype
from segmenter.inference.read_ahead import behind
from segmenter.inference.transfers import Download, upload
from segmenter.inference.windows import check_finite, check_sizes


class Shape(NamedTuple):
    """Images (batch, height, width, 3)."""

    batch: int
    height: int
    width: int


class CompiledInference(Graphs):
    """Labels of batches of images, each shape captured once; see `Segmenter.compile_inference`.

    Calls may come from several threads; they run one after the other. Weights may be changed in place
    (`load_state_dict`, a step of any optimiser in the process), replaced or moved: the next call sees it, converts
    them again where `dtype` asks for that, and captures anew what comes again. Call `refresh` after changes that
    PyTorch does not count (`p.data.mul_(2)`), and after others than of weights (`model.info`, `accelerate`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: str | torch.dtype | None = None,
        window_size: int | None = None,
        window_stride: int | None = None,
        window_batch_size: int = 8,
        max_shapes: int = 8,
    ):
        if model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before compile_inference")
        super().__init__(dtype, max_shapes)
        self.model = model
        segment.refuse_options(model, window_size=window_size, window_stride=window_stride)
        self._windows = (*segment.window_of(model, window_size, window_stride), window_batch_size)
        check_sizes(self._windows[0], window_batch_size)
        compute_dtype(model, dtype)  # raises for one that this model cannot run in

    def capture(self, batch: int, height: int, width: int) -> None:
        """Captures a shape now, rather than at its second call.

        Warns:
            UserWarning: it cannot be captured, or memory does not suffice; it will run without a graph.
        """
        shape = Shape(batch, height, width)
        if min(shape) < 1:
            raise ValueError(f"batch, height and width must be at least 1, got {tuple(shape)}")
        with self._lock, self._on_device():
            if self._watched is not None and not self._watched.unchanged():
                self._forget()
            pixels = torch.zeros(*shape, 3, dtype=torch.uint8, device=self.device)
            for _ in range(ATTEMPTS):
                if shape not in self._shapes:
                    self._try(shape, pixels)

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
        labels, largest = self._enqueue(pixels)
        if pixels.device == labels.device:
            check_finite(largest)
            return labels
        return Download(labels, largest).fetch()

    def map(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Labels (on the CPU) of batches (on the CPU), in order; copies to and from the device overlap computing.

        Two batches are under way at a time, through pinned memory: one is taken from `batches` before the labels of the
        one before are given. If taking or running one raises, those before it are given first.
        """

        def begin(pixels: torch.Tensor) -> Download:
            _check_pixels(pixels)
            return Download(*self._enqueue(pixels))

        for begun in behind(map(begin, batches), 1 if self.graphs else 0):
            yield begun.fetch()

    def _enqueue(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels, largest score) on the model's device, new memory."""
        with self._lock, self._on_device():
            if not pixels.is_cuda:
                pixels = upload(pixels, self.device)
            labels, largest = self._run(pixels)
            return labels.clone(), largest.clone()

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels, largest score), of which the next call may overwrite both."""
        if self.model.training:
            raise RuntimeError("the model is in training mode; call model.eval() before segmenting")
        shape = Shape(*pixels.shape[:3])
        if (outputs := self._replay(shape, pixels)) is not None:
            return outputs
        # a graph for a few images more is faster than no graph
        larger = [s for s in self._shapes if s[1:] == shape[1:] and shape.batch < s.batch <= 2 * shape.batch]
        if larger and self.graphs:
            rest = min(larger).batch - shape.batch
            labels, largest = self._run(torch.cat([pixels, pixels[-1:].expand(rest, -1, -1, -1)]))
            return labels[: shape.batch], largest
        if (outputs := self._capture_in_time(shape, pixels)) is not None:
            return outputs
        self._prepare()
        try:
            return self._function(pixels)
        except torch.OutOfMemoryError:
            if not self._give_way(self._named(pixels)):
                raise
        return self._function(pixels)

    def _function(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, H, W), and a number that is finite if all scores are."""
        with self._surroundings():
            if hasattr(self._network, "labels_of_pixels"):  # a model of another kind than Segmenter
                return self._network.labels_of_pixels(pixels, self._windows[-1])
            masks, windows = segment.predict(self._network, pixels, *self._windows)
            labels = segment.labels_of_views(self._network, [(masks, windows, False)], tuple(pixels.shape[1:3]))
            return labels, masks.abs().max().float()


def _check_pixels(pixels: Any) -> None:
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
        what = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"expected a uint8 tensor (B, H, W, 3), got {what}")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected images (B, H, W, 3), got {tuple(pixels.shape)}")
