"""How anything is timed here: the clock, the rotation of inputs, graph replays, peak memory, measured ceilings.

On a GPU, kernels are timed by events around a CUDA graph that calls the function once on each of several input sets, so
that launch costs are not in the figure, nor is a warm L2 unless MAX_SETS of them fit in it; where a call cannot be
captured, events stand around the plain calls and the result says so. Whole models are timed by the wall clock up to the
end of the device's work, as a user would see it. On a CPU everything is wall clock.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

MAX_SETS = 64
SLOW = 0.5  # seconds: fewer rounds, because they vary less and there is no time
SHORT, LONG = 2e-3, 0.1  # seconds: a round of shorter calls has several; for longer ones the cache says nothing
# Of the ceilings, filling the device: side of the square matrices, and bytes of the copied buffer.
SIDE, COPY = {"cuda": 8192, "cpu": 2048}, {"cuda": 2 << 30, "cpu": 256 << 20}
SMALL_SIDE, SMALL_COPY = 128, 1 << 20  # for smoke tests
Call = Callable[..., Any]


class Clock:
    """The timer of pytest-benchmark: called before and after each round; the difference is seconds a call.

    `mode` is "wall" (after waiting for the device) or "events" (of CUDA); a round has `calls` of what is measured.
    """

    def __init__(self, mode: str = "wall", calls: int = 1):
        self.reset(mode, calls)

    def reset(self, mode: str = "wall", calls: int = 1, device: torch.device | None = None) -> None:
        """Must come before each measurement: a call that raised would leave the events half used."""
        self.mode, self.calls, self.device = mode, calls, device
        self._start: Any = None

    def __call__(self) -> float:
        if self.mode == "wall":
            if self.device is not None:
                synchronize(self.device)
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
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


_ALLOCATION_FAILED = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    failed = isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)
    return failed or isinstance(error, torch.OutOfMemoryError | MemoryError)


def n_sets(bytes_per_set: int, cache: int, seconds: float) -> int:
    """How many input sets are larger than twice the last cache together: two to MAX_SETS, two if a call takes long."""
    return 2 if seconds > LONG else min(MAX_SETS, max(2, math.ceil(2 * cache / max(bytes_per_set, 1))))


class Rotation:
    """Calls `fn` on `calls` input sets, the next ones every time, and returns the last result."""

    def __init__(self, fn: Call, sets: Sequence[tuple], calls: int):
        self.fn, self.sets, self.calls = fn, itertools.cycle(sets), calls

    def __call__(self) -> Any:
        for inputs in itertools.islice(self.sets, self.calls):
            result = self.fn(*inputs)
        return result


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph. Raises RuntimeError if it cannot be captured."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run(), run()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError:
        torch.cuda.set_stream(before)  # torch 2.11 stays on the capture's stream if that fails
        raise

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """(result, seconds) of one call, up to the end of the device's work."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, up to the end of the device's work."""
    return timed(run, device)[1]


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


# ---------------------------------------------------------------------------------------------------------------------
# The two ceilings of a machine, measured in the same run as what they judge


class Ceilings(NamedTuple):
    """What this machine reached: operations and bytes (read and written) a second, and how far the runs spread."""

    dtype: str
    flops_per_second: float
    bytes_per_second: float
    flops_spread: float
    bytes_spread: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """Of a large matrix product and a large copy: medians of ten runs, of random data (zeros run faster).

    float32 products are as `torch.set_float32_matmul_precision` says.
    """
    side = SMALL_SIDE if small else _side(device, dtype)
    products = _product_seconds(side, device, dtype)
    source = torch.empty((SMALL_COPY if small else COPY[device.type]) // 4, device=device).uniform_()
    target = torch.empty_like(source)
    copies = _seconds(lambda: target.copy_(source), device)
    rates = 2 * side**3 / statistics.median(products), 2 * tensor_bytes(source) / statistics.median(copies)
    return Ceilings(str(dtype).removeprefix("torch."), *rates, spread(products), spread(copies))


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype, rounds: int = 10) -> list[float]:
    """Of x W^T, the form of every linear layer, which libraries do at least as fast as any other."""
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return _seconds(lambda: F.linear(x, weight), device, rounds)


def _side(device: torch.device, dtype: torch.dtype) -> int:
    """The full side, or a smaller one where that would take seconds: CPUs without instructions for a half type."""
    if device.type == "cuda":
        return SIDE["cuda"]
    side = 256
    while side < SIDE["cpu"] and statistics.median(_product_seconds(side, device, dtype, 2)) < 0.05:
        side *= 2
    return side


def _seconds(run: Callable[[], torch.Tensor], device: torch.device, rounds: int = 10) -> list[float]:
    """Seconds of a call, `rounds` times: on a GPU by events around ten calls, once its clocks have risen."""
    if device.type != "cuda":
        return [wall_seconds(run, device) for _ in range(rounds + 2)][2:]
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        run()
        torch.cuda.synchronize(device)
    clock, times = Clock("events", 10), []
    for _ in range(rounds):
        clock()
        for _ in range(10):
            run()
        times.append(clock())
    return times
