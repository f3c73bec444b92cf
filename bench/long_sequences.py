"""Time, peak memory and attention's share as a model's images grow, up to where a provider runs out of memory.

What runs is the network, from a normalised image to low-resolution masks, and the labels. "triton" takes labels
without full-resolution logits; eager, sdpa and compile go by way of these, as everybody does. No provider runs as a
CUDA graph here, so launches are in every time.
"""

import contextlib
import copy
import functools
import math
import re
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


class Point(NamedTuple):
    """One provider at one length."""

    tokens: int  # of the encoder, CLS included
    provider: str
    size: int  # side of the square image in pixels
    seconds: float | None = None  # median of a call
    spread: float | None = None  # half the distance of its quartiles, relative to the median; None: too few rounds
    peak_bytes: int | None = None  # beyond the loaded model and the image; None where it cannot be seen
    attention: float | None = (
        None  # share of the time between qkv and its output, of all layers; None as above, or compiled
    )
    reason: str = ""  # why it was not measured: OUT_OF_MEMORY, "not run: ...", "failed: ..."


def sizes_for(tokens: Sequence[int], patch: int) -> list[int]:
    """Sides in pixels of the square images that have so many tokens, CLS included. Raises ValueError if none has."""
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
    size that ran out of memory. Their points say why. `sizes` are in pixels, multiples of the patch; `memory_share` is
    the part of a CPU's available memory that a call may take before it fails.
    """
    last, stopped, on = None, "", (provider, device, dtype)
    for size in sorted(sizes):
        shape = shape._replace(size=size)
        # The first call, that for the memory, one round.
        needed = 3 * last.point.seconds * (shape.tokens / last.point.tokens) ** 2 + last.setup if last else 0.0
        left = max(seconds_left(), 1e-9) if last else seconds_left()  # what is known of a smaller size is the reason
        run = functools.partial(_measure, shape, *on, memory_share)
        measured, reason = (None, stopped) if stopped else attempt(run, *on, needed, left)
        if reason and not reason.startswith("not run"):
            stopped = f"not run: {reason} at {shape.tokens} tokens"
        last = measured or last
        yield Point(shape.tokens, provider, size, reason=reason) if reason else measured.point


class _Measured(NamedTuple):
    point: Point
    setup: float  # seconds before the first round: building, compiling, the first call and that for the memory


def attempt(
    run: Callable[[], Any], provider: str, device: torch.device, dtype: torch.dtype, needed: float, left: float
) -> tuple[Any, str]:
    """(what `run` returns, ""), or (None, why not): the provider, no time, no memory, a failure."""
    try:
        providers.require(provider, device, dtype)
        if left <= 0 or needed > left:
            predicted = f"{needed:.3g}" if needed < 1000 else f"{needed:,.0f}"  # no exponent
            raise providers.Unavailable(f"predicted {predicted} s" if left > 0 else "no time left")
        return run(), ""
    except providers.Unavailable as error:
        return None, f"not run: {error}"
    except (RuntimeError, MemoryError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, OUT_OF_MEMORY if timing.out_of_memory(error) else f"failed: {first[:200]}"
    finally:
        timing.release(device)


def _measure(shape: Shape, provider: str, device: torch.device, dtype: torch.dtype, memory_share: float) -> _Measured:
    start = time.perf_counter()
    im, model = image(shape, device, dtype), build(shape, device, dtype)
    watch, compiled = Stopwatch(device), provider == "compile"
    with limited_memory(device, memory_share), torch.no_grad():
        run = functools.partial(network(model, provider), im)
        seconds = [timing.wall_seconds(run, device)]
        with contextlib.nullcontext() if compiled else Regions(watch).of(model):
            peak = timing.peak_bytes(lambda: seconds.append(timing.wall_seconds(run, device)), device)
        seen = not compiled and len(seconds) > 1  # no call where peak memory cannot be seen
        share = watch.seconds(".attn") / seconds[1] if seen else None
        setup = max(time.perf_counter() - start - 2 * min(seconds), 0.0)
        times = wall_times(run, device, seconds[-1])
    median, spread = statistics.median(times), timing.spread(times)
    return _Measured(Point(shape.tokens, provider, shape.size, median, spread, peak, share), setup)


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
        event = lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))  # noqa: E731
        now = event if self._on_gpu else time.perf_counter
        start = now()
        yield
        self._spans.append((name, start, now()))

    def seconds(self, ending: str) -> float:
        """Of all regions whose names end so; the device must have finished."""
        chosen = [(start, end) for name, start, end in self._spans if name.endswith(ending)]
        return sum(start.elapsed_time(end) / 1e3 if self._on_gpu else end - start for start, end in chosen)


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The shape's model in evaluation mode with random weights and a position embedding of its own size."""
    return copy.deepcopy(models.build(shape, device)).to(dtype)


def image(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalised random images (B, 3, H, W): what is in them changes no time."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape.batch, 3, shape.size, shape.size, device=device, generator=generator).to(dtype)


def network(
    model: torch.nn.Module, provider: str, regions: Regions | None = None, compile_options: dict | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The provider's way from a normalised image (B, 3, H, W) to labels (B, H, W) uint8. Sets the model's operators.

    The labels, or all of a compiled program, are one of `regions`; the caller opens those of the model itself.
    `compile_options` are beyond those of COMPILE_MODE.
    """
    models.set_operators(model, EAGER if provider == "compile" else providers.operators(provider))
    labels = operations.full_labels
    if provider == "triton":
        labels = functools.partial(operations.labels_by, pruned_argmax.operator(providers.operators(provider)))
    if regions and provider != "compile":
        labels = regions.region(LABELS)(labels)
    run = lambda im: labels(model.masks(im), model.patch_size)  # noqa: E731
    if provider != "compile":
        return run
    options = {**torch._inductor.list_mode_options(COMPILE_MODE), **(compile_options or {})}
    torch._dynamo.reset()  # or a model of the ninth size would run uncompiled
    compiled = torch.compile(run, options=options, dynamic=False)
    return regions.region(COMPILED)(compiled) if regions else compiled


@contextlib.contextmanager
def limited_memory(device: torch.device, share: float = MEMORY_SHARE) -> Iterator[None]:
    """While inside, allocations beyond `share` of the memory that is available now fail, instead of the whole machine.

    Only on a CPU and only on Linux; a GPU's memory has its own limit.
    """
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(ImportError, OSError):
            import resource

            limit = timing.status_bytes("VmSize") + int(share * _available_bytes())
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if device.type == "cpu":
                undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
                lower = limit if soft == resource.RLIM_INFINITY else min(limit, soft)
                resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
        yield


def _available_bytes() -> int:
    """What Linux would give without swapping, and what a container's limit leaves of it."""
    found = re.search(r"^MemAvailable: *(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if not found:
        raise OSError("/proc/meminfo has no MemAvailable")
    available, group = int(found[1]) * 1024, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, max(limit - used, 0))
    return available
