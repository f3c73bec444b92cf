"""Copies between host and device that overlap computing: through pinned memory, on streams of their own."""

import ctypes
import functools
from typing import Any

import torch

from segmenter.inference.windows import check_finite


@functools.cache
def dedicated_stream(index: int, use: str) -> Any:
    """A stream of a CUDA device that nobody else has, one for each use: PyTorch keeps memory and workspaces by stream,
    and what `torch.cuda.Stream()` gives comes from a pool of 32, in turn."""
    with torch.cuda.device(index):
        handle = ctypes.c_void_p()
        try:
            create = ctypes.CDLL(None).cudaStreamCreateWithFlags  # of the runtime that PyTorch has loaded
            failed = create(ctypes.byref(handle), 1)  # 1: does not wait for the default stream
        except AttributeError:  # linked into PyTorch, or of AMD
            failed = True
        return torch.cuda.Stream(index) if failed else torch.cuda.ExternalStream(handle.value, device=index)


def stream_handle(index: int) -> int:
    """The address of the current stream of a CUDA device: in a tenth of a microsecond, `current_stream` takes ten."""
    return torch._C._cuda_getCurrentRawStream(index)


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x.to(device)`; from the host to a GPU without waiting for what is computed there. `x` may change afterwards."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)  # to the host it has to wait: else what comes from a GPU may not be there yet
    compute = torch.cuda.current_stream(device)
    copies = dedicated_stream(compute.device_index, "upload")
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    with torch.cuda.stream(copies):
        staged = pinned.to(device, non_blocking=True)
    compute.wait_stream(copies)
    staged.record_stream(compute)
    return staged


class Download:
    """Labels on their way to the host, once what computes them is enqueued on the current stream.

    Args:
        labels: on any device, not to be written to any more. largest: of the scores: finite if all scores are.
    """

    def __init__(self, labels: torch.Tensor, largest: torch.Tensor):
        self._results, self._done = (labels, largest), None
        if labels.is_cuda:
            compute = torch.cuda.current_stream(labels.device)
            copies = dedicated_stream(compute.device_index, "download")
            copies.wait_stream(compute)
            with torch.cuda.stream(copies):
                self._results = tuple(map(_in_pinned_memory, (labels, largest)))
                for x in (labels, largest):
                    x.record_stream(copies)
                self._done = copies.record_event()

    def fetch(self) -> torch.Tensor:
        """The labels, in ordinary memory of the host: the one wait for the device.

        Raises:
            ValueError: the scores were not finite.
        """
        labels, largest = self._results
        if self._done is not None:
            self._done.synchronize()
        check_finite(largest)
        return labels if self._done is None else labels.clone()


def _in_pinned_memory(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
