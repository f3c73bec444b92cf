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
from typing import Any, NamedTuple

import torch

from bench import models, operations, providers, timing
from bench.profiling import COMPILED, LABELS, Regions
from bench.shapes import Shape
from segmenter.inference import pruned_argmax

COMPILE_MODE = "max-autotune-no-cudagraphs"  # graphs would keep their memory and hide it from every measurement
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
    attention: float | None = None  # share of the time between qkv and its output, of all layers; None also if compiled
    reason: str = ""  # why it was not measured: OUT_OF_MEMORY, "not run: ...", "failed: ..."
    setup: float = 0.0  # seconds before the first round: building, compiling, the first call and that for the memory

    def predicted(self, tokens: int) -> float:
        """Seconds that three calls at another length take with the same setup, if time grows quadratically."""
        return 3 * self.seconds * (tokens / self.tokens) ** 2 + self.setup


def sizes_for(tokens: Sequence[int], patch: int) -> list[int]:
    """Sides in pixels of the square images that have so many tokens, CLS included. Raises ValueError if none has."""
    for count in tokens:
        if count < 2 or math.isqrt(count - 1) ** 2 != count - 1:
            raise ValueError(f"{count} tokens are no square number of patches and one more, like 257 or 4097")
    return [math.isqrt(count - 1) * patch for count in tokens]


def scaling(
    shape: Shape, sizes: Sequence[int], chosen: Sequence[str], device: torch.device, dtype: torch.dtype, stop: float
) -> Iterator[Point]:
    """Measures the chosen providers at growing sizes, one point a size, smallest first.

    They share the time until `stop` (of `time.monotonic`). A size whose time, predicted from the last, is more than is
    left is not run; nor is one beyond a size that ran out of memory. Their points say why. `sizes` are in pixels,
    multiples of the patch.
    """
    for i, provider in enumerate(chosen):
        now, last, stopped, on = time.monotonic(), None, "", (provider, device, dtype)
        end = now + max(stop - now, 0) / (len(chosen) - i)
        for size in sorted(sizes):
            shape, left = shape._replace(size=size), end - time.monotonic()
            needed = last.predicted(shape.tokens) if last else 0.0  # the first call, that for the memory, one round
            left = max(left, 1e-9) if last else left  # what is known of a smaller size is the reason
            run = functools.partial(_measure, shape, *on)
            measured, reason = (None, stopped) if stopped else attempt(run, *on, needed, left)
            if reason and not reason.startswith("not run"):
                stopped = f"not run: {reason} at {shape.tokens} tokens"
            last = measured or last
            yield measured or Point(shape.tokens, provider, size, reason=reason)


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


@torch.no_grad()
def _measure(shape: Shape, provider: str, device: torch.device, dtype: torch.dtype) -> Point:
    start, compiled = time.perf_counter(), provider == "compile"
    model, im = prepared(shape, device, dtype)
    run, ops = functools.partial(network(model, provider), im), providers.operators(provider)
    seconds, (attention, attention_seconds) = [timing.wall_seconds(run, device)], watched(ops.attention, device)
    with contextlib.nullcontext() if compiled else providers.using(model, ops._replace(attention=attention)):
        peak = timing.peak_bytes(lambda: seconds.append(timing.wall_seconds(run, device)), device)
    seen = not compiled and len(seconds) > 1  # no call where peak memory cannot be seen
    share = attention_seconds() / seconds[1] if seen else None
    setup = max(time.perf_counter() - start - 2 * min(seconds), 0.0)
    times = wall_times(run, device, seconds[-1])
    median, spread = statistics.median(times), timing.spread(times)
    return Point(shape.tokens, provider, shape.size, median, spread, peak, share, setup=setup)


def wall_times(run: Callable[[], Any], device: torch.device, expected: float) -> list[float]:
    """Seconds of calls of a function that has warmed up: about ROUND_SECONDS of them, at least one."""
    rounds = max(1, min(MOST_ROUNDS, int(ROUND_SECONDS / expected)))
    return [timing.wall_seconds(run, device) for _ in range(rounds)]


def watched(function: Callable, device: torch.device) -> tuple[Callable, Callable[[], float]]:
    """The function, and what gives the seconds of its calls so far: the host's, or those of a GPU that has finished."""
    spans, on_gpu = [], device.type == "cuda"
    event = lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))  # noqa: E731
    now = event if on_gpu else time.perf_counter

    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = function(*args, **kwargs)
        spans.append((start, now()))
        return result

    return call, lambda: sum(start.elapsed_time(end) / 1e3 if on_gpu else end - start for start, end in spans)


def prepared(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """The shape's model in evaluation mode with random weights, and normalised random images (B, 3, H, W)."""
    generator = torch.Generator(device).manual_seed(0)
    im = torch.randn(shape.batch, 3, shape.size, shape.size, device=device, generator=generator)
    return copy.deepcopy(models.build(shape, device)).to(dtype), im.to(dtype)


def network(
    model: torch.nn.Module, provider: str, regions: Regions | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The provider's way from a normalised image (B, 3, H, W) to labels (B, H, W) uint8. Sets the model's operators.

    The labels, or all of a compiled program, are one of `regions`; the caller opens those of the model itself.
    """
    ops, labels, named = providers.operators(provider), operations.full_labels, (regions or Regions()).region
    models.set_operators(model, ops)
    if provider == "triton":
        labels = functools.partial(operations.labels_by, pruned_argmax.operator(ops))
    if provider != "compile":
        labels = named(LABELS)(labels)
    run = lambda im: labels(model.masks(im), model.patch_size)  # noqa: E731
    if provider != "compile":
        return run
    # Without the second, generated CPU kernels are no events of a profiler.
    options = {**torch._inductor.list_mode_options(COMPILE_MODE), "cpp.enable_kernel_profile": True}
    torch._dynamo.reset()  # or a model of the ninth size would run uncompiled
    return named(COMPILED)(torch.compile(run, options=options, dynamic=False))
