"""A profile's tables: what torch.profiler saw by region, operator and kernel, against measured ceilings.

A table is a list of lines, and a line a dictionary: name of a column -> text, number, or None where it is unknown.
"""

import bisect
import collections
import csv
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from bench import harness
from bench.shapes import Work
from bench.timing import Ceilings

FORWARD = "forward"  # the region around what is measured
ELSEWHERE = "(elsewhere)"  # what of it is in no other region
DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
# A profile's tables: the beginning of the file's name, what the table shows.
TABLES = {
    "regions": ("regions", "time and memory by region"),
    "operators": ("kernels", "time by operator"),
    "kernels": ("device_kernels", "kernels on the device"),
}
# Columns of a region's table -> what harness.rates calls them.
RATES = {name: name for name in ("tflops", "gbps", "percent_flops", "percent_bytes")}
RATES |= {"percent_of_roof": "percent_of_floor"}
Line = dict[str, Any]
Span = tuple[str, float, float]  # a region, its start and end in seconds


@dataclass
class Profile:
    """One provider, profiled. The tables are those of one forward, the slowest line first."""

    provider: str
    reason: str = ""  # why there is nothing
    seconds: float | None = None  # median of a forward without any profiler
    profiled_seconds: float | None = None  # mean with it, as everything below
    regions: list[Line] = field(default_factory=list)
    operators: list[Line] = field(default_factory=list)
    kernels: list[Line] = field(default_factory=list)
    # (seconds since the start, bytes beyond those at the start) of the last forward, one step an event
    memory: list[tuple[float, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # its regions from the same start

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes that tensors held at one time beyond those there before."""
        return max((held for _, held in self.memory), default=None)

    def region_peaks(self) -> dict[str, int]:
        """Region -> the same while it was open, its parts included; the largest of its layers."""
        times, found = [time for time, _ in self.memory], collections.Counter()
        for region, start, end in self.spans if times else ():
            first, last = bisect.bisect_right(times, start) - 1, bisect.bisect_right(times, end)
            held = max(held for _, held in self.memory[max(first, 0) : last])
            found[pattern(region)] = max(found[pattern(region)], held)
        return dict(found)


def pattern(region: str) -> str:
    """The name with a star for the number of a layer: "encoder.blocks.*.attn"."""
    return ELSEWHERE if region == FORWARD else re.sub(r"\.\d+(?=\.|$)", ".*", region)


def region_lines(
    seconds: Mapping[str, float], counted: Mapping, peaks: Mapping[str, int], forwards: int, roofs: Ceilings
) -> list[Line]:
    """Layers together, and the work of one forward against the ceilings.

    `seconds`: region -> its time without its parts, in all forwards. `counted`: `Counter.found` of one forward; empty:
    unknown. `peaks`: as of `Profile.region_peaks`.
    """
    time, layers = collections.Counter(), collections.Counter(map(pattern, seconds))
    work: dict[str, Work] = collections.defaultdict(lambda: Work(0, 0))
    for region, took in seconds.items():
        time[pattern(region)] += took
    for (region, _), one in counted.items():
        work[pattern(region)] += one.work
    lines = []
    for region, took in time.most_common():
        line = {"region": region, "layers": layers[region], "ms": 1e3 * took / forwards}
        line["share_percent"] = 100 * took / (time.total() or 1.0)
        line |= {"gflop": work[region].flops / 1e9 or None, "mbytes": work[region].bytes / 1e6 or None}
        reached = harness.rates(work[region], None, max(took, 1e-9) / forwards, roofs)
        line |= {column: reached.get(name) for column, name in RATES.items()}
        lines.append(line | {"peak_mib": peaks[region] / 2**20 if region in peaks else None})
    return lines


def region_seconds(events: Iterable[Any], regions: Collection[str], on_device: bool) -> dict[str, float]:
    """Region -> its time without its parts: of the kernels launched there, or the host's own."""
    found: dict[str, float] = collections.Counter()
    for event in events:
        kernels = sum(kernel.duration for kernel in event.kernels if kernel.name not in regions)
        around = event
        while around is not None and around.name not in regions:
            around = around.cpu_parent
        if around is not None:
            found[around.name] += (kernels if on_device else event.self_cpu_time_total) / 1e6
    return dict(found)


def operator_lines(averages: Iterable[Any], regions: Collection[str], forwards: int, on_device: bool) -> list[Line]:
    """torch's own table, `torch.profiler.profile.key_averages()`, of operators: their time without those inside."""
    own = "self_device_time_total" if on_device else "self_cpu_time_total"
    return _by_time(
        {"operator": row.key, "calls": row.count / forwards, "ms": getattr(row, own) / 1e3 / forwards}
        for row in averages
        if row.device_type == DeviceType.CPU and row.key not in regions and "ProfilerStep" not in row.key
    )


def kernel_lines(trace: Mapping[str, Any], forwards: int) -> list[Line]:
    """Kernels and copies of the device in a Chrome trace."""
    groups = collections.defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") in DEVICE_KINDS:
            args = event.get("args", {})
            groups[event["name"], args.get("registers per thread"), args.get("shared memory")].append(event["dur"])
    return _by_time(
        {"kernel": name, "launches": len(times) / forwards, "ms": sum(times) / 1e3 / forwards}
        | {"registers": registers, "shared_bytes": shared}
        for (name, registers, shared), times in groups.items()
    )


def _by_time(lines: Iterable[Line]) -> list[Line]:
    """Those that took time, the slowest first, with their shares."""
    lines = sorted((line for line in lines if line["ms"]), key=lambda line: -line["ms"])
    total = sum(line["ms"] for line in lines)
    return [line | {"share_percent": 100 * line["ms"] / total} for line in lines]


def timeline(trace: Mapping[str, Any], regions: Collection[str], device: str) -> tuple[list, list[Span]]:
    """`Profile.memory` and `Profile.spans` from a Chrome trace of torch.profiler, parsed."""
    events = trace["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in regions]
    forward = max((event for event in named if event["name"] == FORWARD), key=lambda event: event["ts"])
    start, end = forward["ts"], forward["ts"] + forward["dur"]
    steps = [event for event in events if event.get("name") == "[memory]" and start <= event["ts"] <= end]
    held, memory = 0, [(0.0, 0)]
    for step in sorted(steps, key=lambda step: step["ts"]):  # stable: an allocation and its release at one time
        if step["args"].get("Device Type") == getattr(DeviceType, device.upper()).value:
            held += step["args"]["Bytes"]
            memory.append(((step["ts"] - start) / 1e6, held))
    times = [
        (event["name"], (event["ts"] - start) / 1e6, event["dur"] / 1e6) for event in named if event is not forward
    ]
    spans = [(name, begin, begin + took) for name, begin, took in times if begin >= 0]
    return [*memory, ((end - start) / 1e6, held)], sorted(spans, key=lambda span: (span[1], -span[2]))


def csv_text(lines: Sequence[Line]) -> str:
    """A table as CSV; empty where something is unknown or does not apply."""
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return out.getvalue()
