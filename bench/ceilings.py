"""The two ceilings of a machine, measured: a large matrix product and a large copy, in the same run as what they judge.

python -m bench.ceilings [--dtype bf16]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench import timing
from bench.machine import DTYPES, device_name

# Sizes that fill the device: side of the square matrices, and bytes of the copied buffer.
SIDE = {"cuda": 8192, "cpu": 2048}
COPY = {"cuda": 2 << 30, "cpu": 256 << 20}
SMALL_SIDE, SMALL_COPY = 128, 1 << 20  # for smoke tests


class Ceilings(NamedTuple):
    """What this machine reached: operations and bytes (read and written) a second, and how far the runs spread."""

    dtype: str
    flops_per_second: float
    bytes_per_second: float
    flops_spread: float
    bytes_spread: float


def measure(device: torch.device, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """Medians of ten runs, random data (zeros run faster). float32 as `torch.set_float32_matmul_precision` says."""
    side = SMALL_SIDE if small else _side(device, dtype)
    products = _seconds(_product(side, device, dtype), device)
    source = torch.empty((SMALL_COPY if small else COPY[device.type]) // 4, device=device).uniform_()
    target = torch.empty_like(source)
    copies = _seconds(lambda: target.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    name = str(dtype).removeprefix("torch.")
    rates = (2 * side**3 / statistics.median(products), moved / statistics.median(copies))
    return Ceilings(name, *rates, timing.spread(products), timing.spread(copies))


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """x W^T, the form of every linear layer, which libraries do at least as fast as any other."""
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: F.linear(x, weight)


def _side(device: torch.device, dtype: torch.dtype) -> int:
    """The full side, or a smaller one where that would take seconds: CPUs without instructions for a half type."""
    if device.type == "cuda":
        return SIDE["cuda"]
    side = 256
    while side < SIDE["cpu"] and statistics.median(_seconds(_product(side, device, dtype), device, 2)) < 0.05:
        side *= 2
    return side


def _seconds(run: Callable[[], torch.Tensor], device: torch.device, rounds: int = 10) -> list[float]:
    """Seconds of a call, `rounds` times: on a GPU by events around ten calls, once its clocks have risen."""
    if device.type != "cuda":
        for _ in range(2):
            run()
        return [_wall(run) for _ in range(rounds)]
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        run()
        torch.cuda.synchronize(device)
    times = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(10):
            run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3 / 10)
    return times


def _wall(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    found = measure(device, dtype)
    print(
        f"{device_name(device)}: {found.flops_per_second / 1e12:.2f} TFLOP/s of {found.dtype} matrix products "
        f"(+-{100 * found.flops_spread:.0f} %), {found.bytes_per_second / 1e9:.1f} GB/s of copies "
        f"(+-{100 * found.bytes_spread:.0f} %)"
    )


if __name__ == "__main__":
    main()
