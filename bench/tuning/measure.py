"""One configuration: what the compiler makes of it, whether it computes rightly, how long it takes.

Each of these runs in a process of its own kind, so that a crash or a hang costs one configuration: compilers in a pool,
and one process that has the GPU (or, for a rehearsal, Triton's interpreter).
"""

import contextlib
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from bench import gate, machine, operations, providers, timing
from bench.compile import report
from bench.machine import DTYPES
from bench.shapes import Shape
from bench.tuning.buckets import Bucket
from segmenter.kernels import launch, reference
from segmenter.kernels.attention import padded
from segmenter.kernels.operators import REFERENCES
from segmenter.kernels.reference_queries import queries_scores

_TF32 = 2**-9  # of the largest score, in sums of products whose operands are cut to 10 bits
SECONDS = 0.2  # what the rounds of one configuration take
_EAGER = {  # the function that a public one is checked by, where that is not `reference`'s of the same name
    "attention": lambda qkv, n_heads, lse: reference.explicit_attention(qkv, n_heads),
    "pixels_to_tokens": REFERENCES["pixels_to_tokens"],
}


def compiled(bucket: Bucket, config: Any) -> report.Kernel:
    """The bucket's kernel with this configuration; what goes wrong is in it."""
    try:
        index = bucket.launches(config)[1]
    except Exception as error:  # a finding too: no such launch can be made
        return report.row_of(bucket.case, bucket.architecture, f"cannot be launched: {type(error).__name__}: {error}")
    with bucket.in_force(config):
        return report.compile_row(bucket.case, bucket.architecture, index)


def infeasible(kernel: report.Kernel, shipped: report.Kernel) -> str:
    """Why a configuration is not worth timing beside the shipped one, "" if it is."""
    faults = report.check(kernel)
    if not kernel.error:
        if kernel.spills > shipped.spills and not any("spills" in fault for fault in faults):
            faults.append(f"spills {kernel.spills} bytes a thread, the shipped one {shipped.spills}")
        if kernel.programs_per_sm < 1:
            faults.append("does not fit on a multiprocessor")
    return "; ".join(faults)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and their exact results


def inputs(bucket: Bucket, seed: int, device: torch.device) -> tuple:
    """Random arguments of the example's public function, laid out as the example's."""
    fn, arguments = bucket.arguments()
    torch.manual_seed(seed)
    if fn.__name__ == "upsample_argmax":  # tiles differ in how many classes are left, as after training
        masks, size = arguments["masks"], arguments["size"]
        shape = Shape("B", size[0] // masks.shape[1], size[0], masks.shape[0], masks.shape[3])
        (regions,) = operations.MASKS_TO_LABELS.inputs(shape, masks.dtype, device)
        return (regions.permute(0, 2, 3, 1), *list(arguments.values())[1:])
    found = {
        name: _random(name, value, device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    if fn.__name__ == "attention_backward":  # gradients belong to what the forward pass gave
        o, lse = padded(*reference.attention_lse(found["qkv"], found["n_heads"]))
        found["o"].copy_(o), found["lse"].copy_(lse)
    if "labels" in found:
        found["labels"].remainder_(found["masks"].shape[-1])
    return tuple(found.values())


def _random(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if not like.is_floating_point():
        return tensor.random_(0, 256)
    values = torch.randn(like.shape, device=device)
    is_weight = "weight" in name or "proj" in name
    if like.ndim == 1:
        values = is_weight + 0.2 * values
    elif is_weight:
        values *= like.shape[1] ** -0.5
    return tensor.copy_(values)


def references(bucket: Bucket, arguments: tuple) -> tuple[Any, Any]:
    """(exact, eager in the arguments' types): results, or of labels (the classes' exact scores, eager labels)."""
    name = bucket.arguments()[0].__name__
    eager = _EAGER.get(name) or getattr(reference, name, None) or REFERENCES[name]
    if name == "upsample_argmax":
        masks, size = arguments[:2]
        return F.interpolate(masks.permute(0, 3, 1, 2).float(), size, mode="bilinear"), eager(*arguments)
    if name == "queries_argmax":
        masks, classes, *geometry = arguments
        return queries_scores(masks.float(), classes.float(), *geometry), eager(*arguments)
    floats = (isinstance(value, torch.Tensor) and value.is_floating_point() for value in arguments)
    wide = (value.double() if is_float else value for value, is_float in zip(arguments, floats, strict=True))
    return eager(*wide), eager(*arguments)


def check(bucket: Bucket, result: Any, exact: Any, eager: Any) -> tuple[str, float]:
    """(how right a result is, its largest error in units of eager's). Raises gate.GateError if it is wrong.

    Of several results, each is checked that there is, and the largest error is that of the worst.
    """
    if isinstance(result, tuple):
        several = zip(result, exact, eager, strict=True)
        found = [check(bucket, *one) for one in several if one[0].is_floating_point() and one[0].numel()]
        return max(found, key=lambda one: one[1])
    if not result.is_floating_point():
        floor = 4 * torch.finfo(DTYPES[bucket.case.dtype]).eps
        floor = max(floor, _TF32) if bucket.row.kind == "tf32" else floor
        said = gate.check_labels("triton", result, exact, eager, floor)
        ours, theirs = (gate.shortfall(labels, exact).max().item() for labels in (result, eager))
    else:
        said = gate.check("triton", result, exact, eager)
        ours, theirs = (gate.largest_error(x, exact) for x in (result, eager))
    return said, ours / theirs if theirs else float(ours > 0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, what host functions allocate is NaN, or the largest integer, until a kernel writes it."""
    empty = launch.empty

    def filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return empty(shape, dtype, device).fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)

    with mock.patch.object(launch, "empty", filled):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# In the process that has the device


def ceilings(device: str, dtype: str) -> dict[str, Any]:
    """`timing.measure_ceilings`, small ones on a CPU, as for a results file."""
    return timing.measure_ceilings(torch.device(device), DTYPES[dtype], small=device == "cpu")._asdict()


@functools.lru_cache(1)
def _first_set(bucket: Bucket, device: torch.device) -> tuple[tuple, torch.Tensor, torch.Tensor]:
    arguments = inputs(bucket, 0, device)
    return arguments, *references(bucket, arguments)


@functools.lru_cache(1)
def _sets(bucket: Bucket, device: torch.device, count: int) -> list[tuple]:
    return [_first_set(bucket, device)[0], *(inputs(bucket, seed, device) for seed in range(1, count))]


def measured(bucket: Bucket, config: Any, device: str) -> dict[str, Any]:
    """Checks a configuration and times it: "gate", "error_ratio", "median", "iqr" in seconds, "rounds", "timing".

    If it is wrong there is nothing but "wrong", which says how.
    """
    where, fn = torch.device(device), bucket.arguments()[0]
    with torch.no_grad(), providers.float32_products(bucket.case.precision):
        arguments, exact, eager = _first_set(bucket, where)
        with bucket.in_force(config):
            try:
                with poisoned():
                    result = fn(*arguments)
                said, ratio = check(bucket, result, exact, eager)
                times, mode = _times(bucket, fn, where)
                again = tree_leaves(fn(*arguments))
                if not all(map(torch.equal, tree_leaves(result), again)):
                    raise gate.GateError("its results differ from run to run")
            except gate.GateError as error:
                return {"wrong": str(error)}
    low, middle, high = statistics.quantiles(times, n=4)
    found = {"gate": said, "error_ratio": ratio, "median": middle, "iqr": high - low}
    return found | {"rounds": len(times), "timing": mode}


def _times(bucket: Bucket, fn: Any, device: torch.device) -> tuple[list[float], str]:
    """(seconds a call, once a round, "graph"): by events around a graph over inputs that the L2 cache does not hold.

    On a CPU, which only rehearses, two calls by the wall clock.
    """
    arguments = _first_set(bucket, device)[0]
    if device.type == "cpu":
        return [timing.wall_seconds(lambda: fn(*arguments), device) for _ in range(2)], "wall"
    seconds = min(timing.wall_seconds(lambda: fn(*arguments), device) for _ in range(3))
    sets = timing.n_sets(timing.tensor_bytes(arguments), machine.cache_bytes(device), seconds)
    run = timing.graphed(timing.Rotation(fn, _sets(bucket, device, sets), sets))
    run()
    clock, times = timing.Clock("events", sets), []
    for _ in range(timing.rounds_for(seconds * sets, SECONDS)):
        clock()
        run()
        times.append(clock())
    return times, "graph"
