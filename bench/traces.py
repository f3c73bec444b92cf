"""What profilers write, read back: Chrome traces of torch.profiler and .hatchet files of Proton. Pure functions.

A trace holds what the host did, nested in time (operators, named regions, launches of kernels), and what the device
did (kernels, copies), tied to its launch by a correlation number. Times below are in seconds.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FORWARD, WARM_UP = "forward", "warm-up"  # the annotations around what is measured and around what is not
DISPATCH = "(views, allocation, dispatch)"  # host time that belongs to no operator that computes
HOST_KINDS = {"cpu_op": "op", "user_annotation": "annotation", "cuda_runtime": "launch", "cuda_driver": "launch"}
DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
DEVICE_TYPE = {"cpu": 0, "cuda": 1}  # of torch's memory events
# What torch.compile puts around the kernels it generated.
WRAPPER = re.compile(r"Torch-Compiled Region|## Call CompiledFxGraph|TorchDynamo|Pregraph bytecode|AOTDispatcher")
PROTON_METADATA = "__proton_launch_metadata"  # kernels that Proton itself launches to count


class Call(NamedTuple):
    """One call of an operator: the region it was in, its time (of its kernels; on a CPU its own) and its launches."""

    region: str
    operator: str
    seconds: float
    launches: int


class Kernel(NamedTuple):
    """Launches of one kernel, or copies on the device, and their time together.

    `registers` a thread and `shared` bytes a block, where the trace says so.
    """

    name: str
    region: str
    seconds: float
    launches: int = 1
    registers: int | None = None
    shared: int | None = None


class Stretch(NamedTuple):
    """A region of the last forward, on the host's clock, from the forward's start."""

    region: str
    start: float
    end: float


@dataclass
class Trace:
    """What was read from a trace.

    Attributes:
        forwards: seconds of every forward, on the host's clock, waiting for the device included.
        memory: (seconds since the start, bytes beyond those at the start) of the last forward, one step an event.
    """

    calls: list[Call] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)


@dataclass
class _Node:
    """Something the host did: an operator, an annotation or a launch, with what happened within it."""

    kind: str
    name: str
    start: float
    end: float
    correlation: Any
    external: Any
    children: list["_Node"] = field(default_factory=list)
    computes: bool = False  # it, or something within it, is one of the counted operators

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e6

    def launches(self) -> Iterable["_Node"]:
        for child in self.children:
            if child.kind == "launch":
                yield child
            yield from child.launches()

    def walk(self) -> Iterable["_Node"]:
        yield self
        for child in self.children:
            yield from child.walk()


def read_chrome(trace: dict[str, Any], regions: Collection[str], counted: Collection[str], device: str) -> Trace:
    """A Chrome trace of one or several forwards, each in an annotation FORWARD.

    Args:
        trace: the parsed JSON. regions: names of annotations that are regions; the innermost counts.
        counted: operators that compute, as the outermost of which a call is listed; what is in none of them is listed
            by its outermost operator, or if nothing is counted (a compiled program) by that below WRAPPER.
        device: "cpu" or "cuda".
    Raises:
        ValueError: there is no FORWARD in it.
    """
    events = trace["traceEvents"]
    roots = _host_tree(events)
    nodes = [node for root in roots for node in root.walk()]
    forwards = [node for node in nodes if node.kind == "annotation" and node.name == FORWARD]
    if not forwards:
        raise ValueError(f"the trace has no annotation {FORWARD!r}: nothing was profiled, or the trace is incomplete")
    for root in roots:
        _mark(root, counted)
    kernels = _Kernels(events, nodes)
    found = Trace(forwards=[node.seconds for node in forwards])
    for forward in forwards:
        _visit(forward, "", _Reading(found, regions, counted, kernels, device == "cuda"))
    for event in kernels.without_launch(forwards[0].start, forwards[-1].end):
        _add_kernels(found, "", event["name"], [event])
    found.memory = _memory(events, forwards[-1], DEVICE_TYPE[device])
    found.stretches = _stretches(forwards[-1], regions)
    return found


def _host_tree(events: Iterable[dict[str, Any]]) -> list[_Node]:
    """The outermost nodes of every thread, what is within them below them."""
    threads: dict[Any, list[_Node]] = {}
    for event in events:
        kind = HOST_KINDS.get(event.get("cat"))
        if event.get("ph") != "X" or kind is None:
            continue
        args = event.get("args", {})
        start, seconds = float(event["ts"]), float(event.get("dur", 0))
        external = args.get("External id") if kind == "op" else None
        node = _Node(kind, event["name"], start, start + seconds, args.get("correlation"), external)
        threads.setdefault((event.get("pid"), event.get("tid")), []).append(node)
    roots = []
    for found in threads.values():
        # Of two that start together, the longer encloses the other; of two equal ones an annotation, then an operator.
        found.sort(key=lambda node: (node.start, -node.end, ("annotation", "op", "launch").index(node.kind)))
        open_: list[_Node] = []
        for node in found:
            while open_ and node.start >= open_[-1].end:
                open_.pop()
            (open_[-1].children if open_ else roots).append(node)
            open_.append(node)
    return roots


def _mark(node: _Node, counted: Collection[str]) -> bool:
    """Notes which nodes compute. Operators get the name that they have in `counted`."""
    if node.kind == "op" and node.name not in counted and node.name.removesuffix("_") in counted:
        # Where nobody watches, torch adds a linear layer's bias in place; under a counter it does not.
        node.name = node.name.removesuffix("_")
    below = [_mark(child, counted) for child in node.children]
    node.computes = any(below) or (node.kind == "op" and node.name in counted)
    return node.computes


class _Kernels:
    """The device's events by the launch that caused them."""

    def __init__(self, events: Iterable[dict[str, Any]], nodes: Iterable[_Node]):
        device = [event for event in events if event.get("ph") == "X" and event.get("cat") in DEVICE_KINDS]
        launches = {node.correlation for node in nodes if node.kind == "launch"} - {None}
        operators = {node.external for node in nodes if node.kind == "op"} - {None}
        inside = {launch.correlation for node in nodes if node.kind == "op" for launch in node.launches()}
        self.by_launch: dict[Any, list[dict]] = {}
        self.by_operator: dict[Any, list[dict]] = {}
        self.rest: list[dict] = []
        for event in device:
            args = event.get("args", {})
            launch, operator = args.get("correlation"), args.get("External id")
            if launch not in inside and operator in operators:
                # No launch, or one that the clocks place beside its operator: then the operator that torch noted.
                self.by_operator.setdefault(operator, []).append(event)
            elif launch in launches:
                self.by_launch.setdefault(launch, []).append(event)
            else:
                self.rest.append(event)

    def of(self, node: _Node) -> list[dict]:
        """Those launched within an operator, or by a launch."""
        found = self.by_launch.get(node.correlation, []) if node.kind == "launch" else []
        found = found + [event for launch in node.launches() for event in self.by_launch.get(launch.correlation, [])]
        return found + [event for inner in node.walk() for event in self.by_operator.get(inner.external, [])]

    def without_launch(self, start: float, end: float) -> list[dict]:
        """Those that started between two times and belong to nothing the host did, as far as the trace tells."""
        return [event for event in self.rest if start <= event["ts"] <= end]


class _Reading(NamedTuple):
    """What `_visit` carries along."""

    found: Trace
    regions: Collection[str]
    counted: Collection[str]
    kernels: _Kernels
    on_device: bool


def _visit(node: _Node, region: str, reading: _Reading) -> None:
    """Adds the calls within `node` that has region `region` around it."""
    found, kernels = reading.found, reading.kernels
    if node.kind == "annotation":
        inside = node.name if node.name in reading.regions else region
        for child in node.children:
            _visit(child, inside, reading)
    elif node.kind == "launch":
        events = kernels.of(node)
        if events:  # otherwise it was a wait, an allocation, a question
            _add_kernels(found, region, events[0]["name"], events)
    elif WRAPPER.match(node.name) or (node.computes and node.name not in reading.counted):
        for child in node.children:
            _visit(child, region, reading)
        if not reading.on_device:
            own = node.seconds - sum(child.seconds for child in node.children)
            found.calls.append(Call(region, DISPATCH, max(own, 0.0), 0))
    elif reading.on_device:
        events = kernels.of(node)
        if events or node.name in reading.counted:
            _add_kernels(found, region, node.name, events)
    else:
        found.calls.append(Call(region, node.name, node.seconds, 0))


def _add_kernels(found: Trace, region: str, operator: str, events: list[dict]) -> None:
    for event in events:
        args = event.get("args", {})
        seconds = event.get("dur", 0) / 1e6
        shared, registers = args.get("shared memory"), args.get("registers per thread")
        found.kernels.append(Kernel(event["name"], region, seconds, 1, registers, shared))
    found.calls.append(Call(region, operator, sum(event.get("dur", 0) for event in events) / 1e6, len(events)))


def _memory(events: Iterable[dict[str, Any]], forward: _Node, device_type: int) -> list[tuple[float, int]]:
    """Bytes allocated, from the start of the forward, as (seconds, bytes beyond the start)."""
    steps = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
        and event["args"].get("Device Type") == device_type
        and forward.start <= event["ts"] <= forward.end
    ]
    held, found = 0, [(0.0, 0)]
    for time, change in sorted(steps, key=lambda step: step[0]):  # stable: an allocation and its release at one time
        held += change
        found.append(((time - forward.start) / 1e6, held))
    return [*found, (forward.seconds, held)]


def _stretches(forward: _Node, regions: Collection[str]) -> list[Stretch]:
    """The outermost regions but those, like "encoder", that are only made of others."""
    named = [node for node in forward.walk() if node.kind == "annotation" and node.name in regions]
    outer = {name for name in regions if any(other.startswith(name + ".") for other in regions) and "." not in name}
    found: list[Stretch] = []
    end = forward.start
    for node in named:
        if node.name in outer or node.start < end:
            continue
        found.append(Stretch(node.name, (node.start - forward.start) / 1e6, (node.end - forward.start) / 1e6))
        end = node.end
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Proton


def read_hatchet(data: Any, regions: Collection[str]) -> Trace:
    """A .hatchet file of Proton, parsed: kernels below the scopes they were launched in, sums over all forwards.

    Calls are kernels here: Proton knows scopes and kernels, not torch's operators. `forwards` and `memory` stay empty.

    Raises:
        ValueError: it is no tree of frames.
    """
    if not isinstance(data, list) or not data or "frame" not in data[0]:
        raise ValueError("this is no .hatchet file of Proton: it does not begin with a frame")
    found = Trace()

    def walk(node: dict[str, Any], region: str) -> None:
        name, metrics = node["frame"]["name"], node.get("metrics", {})
        if name.startswith(PROTON_METADATA):
            return
        seconds = _seconds(metrics)
        if seconds and "device_id" in metrics:
            launches = int(metrics.get("count", 1))
            found.kernels.append(Kernel(name, region, seconds, launches))
            found.calls.append(Call(region, name, seconds, launches))
        inside = name if name in regions else region
        for child in node.get("children", []):
            walk(child, inside)

    walk(data[0], "")
    return found


def _seconds(metrics: dict[str, Any]) -> float:
    units = {"time (s)": 1.0, "time (ms)": 1e-3, "time (us)": 1e-6, "time (ns)": 1e-9}
    return sum(float(metrics[name]) * unit for name, unit in units.items() if name in metrics)
