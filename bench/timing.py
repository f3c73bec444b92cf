"""How anything is timed here: the clock, the rotation of inputs, graph replays, peak memory.

On a GPU, kernels are timed by events around a CUDA graph that calls the function once on each of several input sets, so
that launch costs are not in the figure, nor is a warm L2 unless MAX_SETS of them fit in it; where a call cannot be
captured, events stand around the plain calls and the result says so. Whole models are timed by the wall clock up to the
end of the device's work, as a user would see it. On a CPU everything is wall clock.
"""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MAX_SETS = 64
SLOW = 0.5  # seconds: fewer rounds, because they vary less and there is no time
SHORT, LONG = 2e-3, 0.1  # seconds: a round of shorter calls has several; for longer ones the cache says nothing
Call = Callable[..., Any]


class Clock:
    """The timer of pytest-benchmark: called before and after each round; the difference is seconds a call.

    Attributes:
        mode: "wall" (after waiting for the device) or "events" (of CUDA).
        calls: calls of the measured function in a round.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, mode: str = "wall", calls: int = 1, device: torch.device | None = None) -> None:
        """Must come before each measurement: a call that raised would leave the events half used."""
        self.mode, self.calls, self.device = mode, calls, device
        self._start: Any = None

    def __call__(self) -> float:
        if self.mode == "wall":
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter() / self.calls
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
            return 0.0
        event.synchronize()
        milliseconds, self._start = self._start.elapsed_time(event), None
        return milliseconds / 1e3 / self.calls


CLOCK = Clock()


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in (nested) tuples and lists."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(tensor_bytes(value) for value in values) if isinstance(values, tuple | list) else 0


_ALLOCATION_FAILED = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)


def n_sets(bytes_per_set: int, cache: int, seconds: float) -> int:
    """How many input sets are larger than twice the last cache together: two to MAX_SETS, two if a call takes long."""
    if seconds > LONG:
        return 2
    return min(MAX_SETS, max(2, math.ceil(2 * cache / max(bytes_per_set, 1))))


class Rotation:
    """Calls `fn` on `calls` input sets, the next ones every time, and returns the last result."""

    def __init__(self, fn: Call, sets: Sequence[tuple], calls: int):
        self.fn, self.sets, self.calls, self.next = fn, sets, calls, 0

    def __call__(self) -> Any:
        for _ in range(self.calls):
            inputs = self.sets[self.next]
            self.next = (self.next + 1) % len(self.sets)
            result = self.fn(*inputs)
        return result


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph. Raises RuntimeError if it cannot be captured."""
    before = torch.cuda.current_stream()
    try:
        return _captured(run)
    except RuntimeError:
        torch.cuda.set_stream(before)  # torch 2.11 stays on the capture's stream if that fails
        raise


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def rounds_for(seconds: float, budget: float) -> int:
    """Rounds of `seconds` each that take about `budget` seconds: 5 to 100, of slow ones 3."""
    return max(3 if seconds > SLOW else 5, min(100, int(budget / max(seconds, 1e-6))))


def spread(times: Sequence[float]) -> float | None:
    """Half the distance of the quartiles, relative to the median; None for fewer than three."""
    if len(times) < 3:
        return None
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives memory that is not in use back to the device or the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs beyond what is there before it; None where that cannot be seen.

    On a GPU what torch allocates. On Linux the high-water mark of resident memory, which the kernel resets for us; a
    first call should have warmed up before, or libraries and thread pools count.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(field: str) -> int:
    """A size that Linux says of this process, VmRSS or alike, in bytes. Raises OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
