"""Time, peak memory and attention's share as a model's images grow, up to where a provider runs out of memory.

What runs is the network, from a normalised image to low-resolution masks, and the labels. "triton" takes labels
without full-resolution logits; eager, sdpa and compile go by way of these, as everybody does. No provider runs as a
CUDA graph here, so launches are in every time.
"""

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import models, operations, providers, timing
from bench.profiling import COMPILED, LABELS, Regions
from bench.shapes import Shape
from segmenter.inference import pruned_argmax
from segmenter.ops import EAGER

COMPILE_MODE = "max-autotune-no-cudagraphs"  # graphs would keep their memory and hide it from every measurement
MEMORY_SHARE = 0.5  # of what is available on a CPU, for one call
ROUND_SECONDS, MOST_ROUNDS = 1.0, 9
OUT_OF_MEMORY = "out of memory"
Network = Callable[[torch.Tensor], torch.Tensor]


class Point(NamedTuple):
    """One provider at one length.

    `attention` is unknown for a compiled program, and where peak memory cannot be seen.
    """

    tokens: int  # of the encoder, CLS included
    provider: str
    size: int  # side of the square image in pixels
    seconds: float | None = None  # median of a call
    spread: float | None = None  # half the distance of its quartiles, relative to the median; None: too few rounds
    peak_bytes: int | None = None  # beyond the loaded model and the image; None where it cannot be seen
    attention: float | None = None  # share of the time between qkv and its output, of all layers
    reason: str = ""  # why it was not measured: OUT_OF_MEMORY, "not run: ...", "failed: ..."


def sizes_for(tokens: Sequence[int], patch: int) -> list[int]:
    """Sides in pixels of the square images that have so many tokens, CLS included.

    Raises:
        ValueError: a number is no square and one.
    """
    for count in tokens:
        if count < 2 or math.isqrt(count - 1) ** 2 != count - 1:
            raise ValueError(f"{count} tokens are no square number of patches and one more, like 257 or 4097")
    return [math.isqrt(count - 1) * patch for count in tokens]


def scaling(
    shape: Shape,
    sizes: Sequence[int],
    provider: str,
    device: torch.device,
    dtype: torch.dtype,
    seconds_left: Callable[[], float],
    memory_share: float = MEMORY_SHARE,
) -> Iterator[Point]:
    """Measures one provider at growing sizes, one point a size, smallest first.

    A size whose time, extrapolated quadratically from the last, is more than is left is not run; nor is one beyond a
    size that ran out of memory. Their points say why.

    Args:
        shape: all but the size. sizes: pixels, multiples of the patch.
        seconds_left: what may still be spent, asked before each size.
        memory_share: on a CPU, the part of the available memory that a call may take before it fails.
    """
    last, stopped = None, unavailable(provider, device, dtype)
    for size in sorted(sizes):
        shape = shape._replace(size=size)
        reason = stopped or _over_budget(shape, last, seconds_left())
        if not reason:
            try:
                last = _measure(shape, provider, device, dtype, memory_share)
            except (RuntimeError, MemoryError) as error:
                reason = why_failed(error)
                stopped = f"not run: {reason} at {shape.tokens} tokens"
            finally:
                timing.release(device)
        yield Point(shape.tokens, provider, size, reason=reason) if reason else last.point


class _Measured(NamedTuple):
    point: Point
    setup: float  # seconds before the first round: building, compiling, the first call and that for the memory


def _over_budget(shape: Shape, last: _Measured | None, seconds_left: float) -> str:
    """Why this size is not run, or ""."""
    if last is None:
        return "" if seconds_left > 0 else "not run: no time left"
    predicted = last.point.seconds * (shape.tokens / last.point.tokens) ** 2
    needed = 3 * predicted + last.setup  # the first call, that for the memory, one round
    return f"not run: predicted {rounded(needed)} s" if needed > seconds_left else ""


def _measure(shape: Shape, provider: str, device: torch.device, dtype: torch.dtype, memory_share: float) -> _Measured:
    start = time.perf_counter()
    im, model = image(shape, device, dtype), build(shape, device, dtype)
    watch = Stopwatch(device)
    regions = Regions(watch) if provider != "compile" else None
    with limited_memory(device, memory_share), torch.no_grad():
        run = network(model, provider)
        seconds = [timing.wall_seconds(lambda: run(im), device)]
        with regions.of(model) if regions else contextlib.nullcontext():
            peak = timing.peak_bytes(lambda: seconds.append(timing.wall_seconds(lambda: run(im), device)), device)
        seen = regions and len(seconds) > 1  # no call where peak memory cannot be seen
        share = watch.seconds(".attn") / seconds[1] if seen else None
        setup = time.perf_counter() - start - 2 * min(seconds)
        times = wall_times(lambda: run(im), device, seconds[-1])
    median, spread = statistics.median(times), timing.spread(times)
    return _Measured(Point(shape.tokens, provider, shape.size, median, spread, peak, share), max(setup, 0.0))


def wall_times(run: Callable[[], Any], device: torch.device, expected: float) -> list[float]:
    """Seconds of calls of a function that has warmed up: about ROUND_SECONDS of them, at least one."""
    rounds = max(1, min(MOST_ROUNDS, int(ROUND_SECONDS / expected)))
    return [timing.wall_seconds(run, device) for _ in range(rounds)]


class Stopwatch:
    """Scopes for `Regions` that take the time: the host's, on a GPU that of its stream."""

    def __init__(self, device: torch.device):
        self._on_gpu, self._spans = device.type == "cuda", []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self, ending: str) -> float:
        """Of all regions whose names end so; the device must have finished."""
        chosen = [(start, end) for name, start, end in self._spans if name.endswith(ending)]
        return sum(start.elapsed_time(end) / 1e3 if self._on_gpu else end - start for start, end in chosen)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The shape's model in evaluation mode with random weights and a position embedding of its own size."""
    return copy.deepcopy(models.build(shape, device)).to(dtype)


def image(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalised random images (B, 3, H, W): what is in them changes no time."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape.batch, 3, shape.size, shape.size, device=device, generator=generator).to(dtype)


def network(
    model: torch.nn.Module, provider: str, regions: Regions | None = None, compile_options: dict | None = None
) -> Network:
    """The provider's way from a normalised image (B, 3, H, W) to labels (B, H, W) uint8. Sets the model's operators.

    Args:
        regions: where the parts are opened as regions; the caller opens those of the model itself.
        compile_options: of torch.compile, beyond those of COMPILE_MODE.
    """
    models.set_operators(model, EAGER if provider == "compile" else providers.operators(provider))
    labels, scope = operations.full_labels, contextlib.nullcontext if regions is None else regions.region
    if provider == "triton":
        labels = functools.partial(operations.labels_by, pruned_argmax.operator(providers.operators(provider)))

    def run(im: torch.Tensor) -> torch.Tensor:
        masks = model.masks(im)
        with scope(LABELS):
            return labels(masks, model.patch_size)

    if provider != "compile":
        return run
    options = {**torch._inductor.list_mode_options(COMPILE_MODE), **(compile_options or {})}
    torch._dynamo.reset()  # or a model of the ninth size would run uncompiled
    compiled = torch.compile(lambda im: labels(model.masks(im), model.patch_size), options=options, dynamic=False)

    def run_compiled(im: torch.Tensor) -> torch.Tensor:
        with scope(COMPILED):
            return compiled(im)

    return run_compiled


def unavailable(provider: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the provider cannot run here, or ""."""
    try:
        providers.require(provider, device, dtype)
    except providers.Unavailable as error:
        return f"not run: {error}"
    return ""


def rounded(seconds: float) -> str:
    """Three digits, no exponent for long times."""
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"


def why_failed(error: BaseException) -> str:
    """One line, for tables."""
    if timing.out_of_memory(error):
        return OUT_OF_MEMORY
    return f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"


@contextlib.contextmanager
def limited_memory(device: torch.device, share: float = MEMORY_SHARE) -> Iterator[None]:
    """While inside, allocations beyond `share` of the memory that is available now fail, instead of the whole machine.

    Only on a CPU and only on Linux; a GPU's memory has its own limit.
    """
    try:
        import resource

        limit = timing.status_bytes("VmSize") + int(share * _available_bytes())
    except (ImportError, OSError):
        limit = None
    if device.type != "cpu" or limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _available_bytes() -> int:
    """What Linux would give without swapping, and what a container's limit leaves of it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(limit - used, 0))
    if not found:
        raise OSError("/proc/meminfo has no MemAvailable")
    return min(found)
