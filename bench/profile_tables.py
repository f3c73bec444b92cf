"""A profile's tables: what torch.profiler or Proton saw by region, operator and kernel, against measured ceilings.

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

from bench.shapes import Work
from bench.timing import Ceilings

FORWARD = "forward"  # the annotation around what is measured
ELSEWHERE = "(elsewhere)"  # outside every named region
DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
MEMORY_TYPE = {"cpu": 0, "cuda": 1}  # the device of a trace's memory events
PROTON_METADATA = "__proton_launch_metadata"  # kernels that Proton itself launches to count
PROTON_UNITS = {"time (s)": 1.0, "time (ms)": 1e-3, "time (us)": 1e-6, "time (ns)": 1e-9}
Line = dict[str, Any]
Span = tuple[str, float, float]  # a region, its start and end in seconds


@dataclass
class Profile:
    """One provider, profiled. The tables are those of one forward, the slowest line first."""

    provider: str
    reason: str = ""  # why there is nothing
    notes: list[str] = field(default_factory=list)  # what a reader has to know
    seconds: float | None = None  # median of a forward without any profiler
    profiled_seconds: float | None = None  # mean with it, as everything below
    regions: list[Line] = field(default_factory=list)
    operators: list[Line] = field(default_factory=list)
    kernels: list[Line] = field(default_factory=list)
    # (seconds since the start, bytes beyond those at the start) of the last forward, one step an event
    memory: list[tuple[float, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # its regions from the same start

    @property
    def covered(self) -> float:
        """The share of the time that lies in named regions."""
        return 1 - sum(line["share_percent"] for line in self.regions if line["region"] == ELSEWHERE) / 100

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
    return re.sub(r"\.\d+(?=\.|$)", ".*", region) or ELSEWHERE


def rates(work: Work, seconds: float, roofs: Ceilings) -> dict[str, float | None]:
    """TFLOP/s, GB/s, percent of each ceiling, percent of the best time that both allow; None where there is no work."""
    best = work.floor(roofs.flops_per_second, roofs.bytes_per_second)
    flops, moved = work.flops / seconds, work.bytes / seconds
    found = {
        "tflops": flops / 1e12,
        "gbps": moved / 1e9,
        "percent_flops": 100 * flops / roofs.flops_per_second,
        "percent_bytes": 100 * moved / roofs.bytes_per_second,
        "percent_of_roof": 100 * best / seconds,
    }
    return {name: value or None for name, value in found.items()}


def region_lines(
    seconds: Mapping[str, float], counted: Mapping, peaks: Mapping[str, int], forwards: int, roofs: Ceilings
) -> list[Line]:
    """Layers together, and the work of one forward against the ceilings.

    Args:
        seconds: region -> its time without its parts, in all forwards.
        counted: `Counter.found` of one forward; empty: unknown.
        peaks: as of `Profile.region_peaks`.
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
        line |= rates(work[region], max(took, 1e-9) / forwards, roofs)
        lines.append(line | {"peak_mib": peaks[region] / 2**20 if region in peaks else None})
    return lines


def forwards_of(events: Iterable[Any]) -> list[Any]:
    """The annotations FORWARD of `torch.profiler.profile.events()`.

    Raises:
        ValueError: there is none.
    """
    found = [event for event in events if event.name == FORWARD and event.device_type == DeviceType.CPU]
    if not found:
        raise ValueError(f"the profile has no annotation {FORWARD!r}: nothing was profiled, or it is incomplete")
    return found


def region_seconds(events: Iterable[Any], regions: Collection[str], on_device: bool) -> dict[str, float]:
    """Region ("" is none) -> its time without its parts: of its kernels, or the host's own."""
    named, found = {FORWARD, *regions}, collections.Counter()

    def kernels(event: Any) -> float:
        launched = sum(kernel.duration for kernel in event.kernels if kernel.name not in named)
        return launched + sum(map(kernels, event.cpu_children))

    for event in events:
        if event.name in named and event.device_type == DeviceType.CPU:
            took = kernels(event) if on_device else event.time_range.elapsed_us()
            found[event.name] += took / 1e6
            around = event
            while (around := around.cpu_parent) is not None and around.name not in named:
                pass
            if around is not None:
                found[around.name] -= took / 1e6
    found[""] = found.pop(FORWARD)
    return dict(found)


def operator_lines(averages: Iterable[Any], regions: Collection[str], forwards: int, on_device: bool) -> list[Line]:
    """torch's own table, `torch.profiler.profile.key_averages()`, of operators: their time without those inside."""
    found = []
    for row in averages:
        if row.device_type == DeviceType.CPU and row.key not in {FORWARD, *regions} and "ProfilerStep" not in row.key:
            ms = (row.self_device_time_total if on_device else row.self_cpu_time_total) / 1e3 / forwards
            found += [{"operator": row.key, "calls": row.count / forwards, "ms": ms}] if ms or not on_device else []
    return _by_time(found)


def kernel_lines(trace: Mapping[str, Any], forwards: int) -> list[Line]:
    """Kernels and copies of the device in a Chrome trace."""
    groups = collections.defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") in DEVICE_KINDS:
            args = event.get("args", {})
            groups[event["name"], args.get("registers per thread"), args.get("shared memory")].append(event["dur"])
    lines = []
    for (name, registers, shared), times in groups.items():
        line = {"kernel": name, "launches": len(times) / forwards, "ms": sum(times) / 1e3 / forwards}
        lines.append(line | {"registers": registers, "shared_bytes": shared})
    return _by_time(lines)


def _by_time(lines: list[Line]) -> list[Line]:
    total = sum(line["ms"] for line in lines) or 1.0
    lines = sorted(lines, key=lambda line: -line["ms"])
    return [line | {"share_percent": 100 * line["ms"] / total} for line in lines]


def timeline(trace: Mapping[str, Any], regions: Collection[str], device: str) -> tuple[list, list[Span]]:
    """`Profile.memory` and `Profile.spans` from a Chrome trace of torch.profiler, parsed."""
    events = trace["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    forward = max((event for event in named if event["name"] == FORWARD), key=lambda event: event["ts"])
    start, seconds = forward["ts"], forward["dur"] / 1e6
    steps = [event for event in events if event.get("name") == "[memory]"]
    held, memory = 0, [(0.0, 0)]
    for event in sorted(steps, key=lambda step: step["ts"]):  # stable: an allocation and its release at one time
        time = (event["ts"] - start) / 1e6
        if 0 <= time <= seconds and event["args"].get("Device Type") == MEMORY_TYPE[device]:
            held += event["args"]["Bytes"]
            memory.append((time, held))
    times = [(event["name"], (event["ts"] - start) / 1e6, event["dur"] / 1e6) for event in named]
    spans = [(name, begin, begin + took) for name, begin, took in times if name in regions and 0 <= begin <= seconds]
    return [*memory, (seconds, held)], sorted(spans, key=lambda span: (span[1], -span[2]))


def read_hatchet(data: Any, regions: Collection[str], forwards: int) -> tuple[dict[str, float], list[Line]]:
    """(as of `region_seconds`, kernels as operators) from a .hatchet file of Proton, parsed.

    Proton knows scopes and kernels, not torch's operators.

    Raises:
        ValueError: it is no tree of frames.
    """
    if not isinstance(data, list) or not data or "frame" not in data[0]:
        raise ValueError("this is no .hatchet file of Proton: it does not begin with a frame")
    time, kernels, calls = collections.Counter(), collections.Counter(), collections.Counter()

    def visit(node: dict[str, Any], region: str) -> None:
        name, metrics = node["frame"]["name"], node.get("metrics", {})
        if name.startswith(PROTON_METADATA):
            return
        seconds = sum(float(metrics[unit]) * scale for unit, scale in PROTON_UNITS.items() if unit in metrics)
        if seconds and "device_id" in metrics:
            time[region] += seconds
            kernels[name] += seconds
            calls[name] += int(metrics.get("count", 1))
        for child in node.get("children", []):
            visit(child, name if name in regions else region)

    visit(data[0], "")
    lines = [
        {"operator": name, "calls": calls[name] / forwards, "ms": 1e3 * kernels[name] / forwards} for name in calls
    ]
    return dict(time), _by_time(lines)


def csv_text(lines: Sequence[Line]) -> str:
    """A table as CSV; empty where something is unknown or does not apply."""
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return out.getvalue()
