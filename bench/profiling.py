"""Where the time of a forward pass goes: named regions, counted work, tables against measured ceilings, CSV.

Work comes from a run of its own under `Counter`, time from a trace (bench/traces.py) of further runs; both are tied
together by region and operator. Operations are those of matrix products, as in bench/shapes.py. Bytes are those of all
tensors that an operator reads and writes, each once: what has to move if nothing stays in a cache between operators.
"""

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from bench.ceilings import Ceilings
from bench.shapes import Work
from bench.traces import DISPATCH, Stretch, Trace
from segmenter.layers import PatchEmbed
from segmenter.ops import Operators

ELSEWHERE = "(elsewhere)"  # outside every named region
COMPILED = "compiled program"  # the one region of a compiled model
LABELS = "upsample+argmax"
# The layers that an operator of `Operators` stands for, by the names that they have in a block and in the decoder.
PARTS = {
    "attention": "attn",
    "layernorm_linear": "norm1+attn.qkv",
    "linear": "attn.proj",
    "layernorm_mlp": "norm2+mlp",
    "mask_head": "mask_head",
}


# ---------------------------------------------------------------------------------------------------------------------
# Regions


class Regions:
    """Named parts of a forward pass, opened as annotations of a profiler. Results are the same with them and without.

    Args:
        scope: makes the context manager of a name: `torch.profiler.record_function`, `triton.profiler.scope`.
    Attributes:
        names: all that were opened.
    """

    def __init__(self, scope: Callable[[str], Any] = torch.profiler.record_function):
        self.names: set[str] = set()
        self._scope = scope
        self._open: list[tuple[str, Any]] = []

    @property
    def current(self) -> str:
        """The innermost open region; "" outside of all."""
        return self._open[-1][0] if self._open else ""

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """The region `name` while inside."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """While inside, every part of `model` is a region by its own name.

        Layers inside a block get no hooks, because a block with hooks inside does not use fused operators: there the
        operators themselves are wrapped, and named after the layers that they stand for.
        """
        parameter = next(model.parameters())
        holders = [(name, module) for name, module in model.named_modules() if hasattr(module, "ops")]
        before = [module.ops for _, module in holders]
        handles = []
        try:
            for name, module in _hookable(model):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                # always_call: also if the layer raises, for instance because memory is used up
                handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
            for name, module in holders:
                module.ops = self._named(module.ops.on(parameter), name)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for (_, module), ops in zip(holders, before, strict=True):
                module.ops = ops

    def _named(self, ops: Operators, holder: str) -> Operators:
        """`ops` whose calls are regions of the module `holder`."""

        def wrapped(function: Callable, name: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.region(name):
                    return function(*args, **kwargs)

            return call

        def name_of(part: str) -> str:  # an Attention called by itself is "...attn" already
            return holder if holder.rpartition(".")[2] == part else f"{holder}.{part}".lstrip(".")

        return ops._replace(**{op: wrapped(getattr(ops, op), name_of(part)) for op, part in PARTS.items()})

    def _enter(self, name: str) -> None:
        scope = self._scope(name)
        scope.__enter__()
        self.names.add(name)
        self._open.append((name, scope))

    def _leave(self) -> None:
        self._open.pop()[1].__exit__(None, None, None)


def _hookable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hooks may name: blocks, and what is neither inside a block nor read by a fused operator."""
    closed = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if hasattr(module, "why_not_fused") or isinstance(module, PatchEmbed)
    )
    silent = (nn.ModuleList, nn.Dropout, nn.Identity)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and not name.startswith(closed or ("\0",)) and not isinstance(module, silent)
        if not name.endswith("mask_norm")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Counted work

_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
_NOTHING_MOVES = {"_unsafe_view", "_reshape_alias", "lift_fresh"}
_OVERWRITES = {"copy_", "zero_", "fill_", "uniform_", "normal_"}  # their first argument is not read
_GATHERS = {"index", "index_select", "gather", "embedding"}  # of their first argument they read as much as they return


class Counted(NamedTuple):
    """Calls of an operator and their work together."""

    calls: int
    work: Work


class Counter(TorchDispatchMode):
    """Counts the work of every operator that is called while it is active.

    Args:
        where: tells the region of a call.
    Attributes:
        found: (region, operator as profilers call it, "aten::mm") -> its calls and work. Views are in it, without work.

    Under `torch.no_grad`, not `torch.inference_mode`: there, composite operators would arrive whole.
    """

    def __init__(self, where: Callable[[], str] = lambda: ""):
        super().__init__()
        self.found: dict[tuple[str, str], Counted] = {}
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        key = (self._where(), func._schema.name)
        before = self.found.get(key, Counted(0, Work(0, 0)))
        self.found[key] = Counted(before.calls + 1, before.work + work_of(func, args, kwargs or {}, out))
        return out


def work_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Work:
    """Operations and bytes of one call of an operator overload."""
    packet = func._overloadpacket
    formula = flop_registry.get(packet) or _FORMULAS.get(packet)
    return Work(int(formula(*args, **kwargs, out_val=out)) if formula else 0, _moved(func, args, kwargs, out))


def _moved(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    schema, name = func._schema, func._schema.name.rpartition("::")[2]
    returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if returns_view or name in _NOTHING_MOVES or name.startswith(("empty", "new_empty")):
        return 0
    outputs = _bytes(out)
    if name in _GATHERS:
        return 2 * outputs + _bytes(args[1:])
    only_written = {a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write}
    read = args[1:] if name in _OVERWRITES else args
    return _bytes(read) + _bytes([value for key, value in kwargs.items() if key not in only_written]) + outputs


def _bytes(values: Any) -> int:
    """Bytes that lie behind tensors; what is expanded lies there once."""
    total = 0
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor):
            sides = [side for side, stride in zip(x.shape, x.stride(), strict=True) if stride]
            total += x.element_size() * torch.Size(sides).numel() if x.numel() else 0
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class Row(NamedTuple):
    """One line of a table, for one forward.

    Attributes:
        region: "*" stands for the number of a layer. operator: "" in a table of regions.
        layers: how many regions are together in it. calls, launches: of all layers; launches None on a CPU.
        seconds: of all layers. share: of the time of all operators. work: None where it is unknown.
    """

    region: str
    operator: str
    layers: int
    calls: float
    launches: float | None
    seconds: float
    share: float
    work: Work | None

    def rates(self, roofs: Ceilings) -> dict[str, float | None]:
        """TFLOP/s, GB/s, percent of each ceiling, percent of the best time that both allow; None where unknown."""
        names = ("tflops", "gbps", "percent_flops", "percent_bytes", "percent_of_roof")
        if self.work is None or not self.seconds:
            return dict.fromkeys(names)
        flops, moved = self.work.flops / self.seconds, self.work.bytes / self.seconds
        best = self.work.floor(roofs.flops_per_second, roofs.bytes_per_second) / self.seconds
        rated = (flops / roofs.flops_per_second, moved / roofs.bytes_per_second, best)
        values = (flops / 1e12, moved / 1e9, *(100 * value for value in rated))
        used = (self.work.flops, self.work.bytes, self.work.flops, self.work.bytes, self.work.flops + self.work.bytes)
        return {name: value if any_ else None for name, value, any_ in zip(names, values, used, strict=True)}


class KernelRow(NamedTuple):
    """Launches of one kernel in one forward."""

    name: str
    launches: float
    seconds: float
    share: float
    registers: int | None
    shared: int | None


def pattern(region: str) -> str:
    """The name with a star for the number of a layer: "encoder.blocks.*.attn"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", region) or ELSEWHERE


def operator_rows(
    trace: Trace, counted: Mapping[tuple[str, str], Counted], forwards: int, on_device: bool
) -> list[Row]:
    """One row for each operator in each region (layers together), the slowest first.

    Args:
        counted: work of one forward. Empty: unknown (a compiled program, or a profiler that sees kernels only).
        forwards: how many the trace holds.
    """
    work: dict[tuple[str, str], Work] = {}
    for (region, operator), found in counted.items():
        key = (pattern(region), operator)
        work[key] = work.get(key, Work(0, 0)) + found.work
    groups: dict[tuple[str, str], list] = {}
    for call in trace.calls:
        key = (pattern(call.region), call.operator)
        idle = not any(work.get(key, (0, 0))) if work else call.operator == DISPATCH
        groups.setdefault((key[0], DISPATCH) if idle and not call.launches else key, []).append(call)
    total = sum(call.seconds for call in trace.calls) or 1.0
    rows = []
    for (region, operator), calls in groups.items():
        seconds = sum(call.seconds for call in calls)
        if on_device and not seconds:
            continue
        launches = sum(call.launches for call in calls) / forwards if on_device else None
        layers = len({call.region for call in calls})
        known = work.get((region, operator), Work(0, 0)) if work else None
        times = (seconds / forwards, seconds / total)
        rows.append(Row(region, operator, layers, len(calls) / forwards, launches, *times, known))
    return sorted(rows, key=lambda row: -row.seconds)


def region_rows(rows: Iterable[Row], work: Mapping[str, Work] | None = None) -> list[Row]:
    """The operators of each region together, the slowest first.

    Args:
        work: region -> work of one forward, where the rows do not know it.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.region, []).append(row)
    found = []
    for region, inside in groups.items():
        known = [row.work for row in inside if row.work is not None]
        total = sum(known, Work(0, 0)) if known else (work or {}).get(region)
        launches = None if inside[0].launches is None else sum(row.launches or 0 for row in inside)
        calls, seconds, share = (sum(getattr(row, name) for row in inside) for name in ("calls", "seconds", "share"))
        found.append(Row(region, "", max(row.layers for row in inside), calls, launches, seconds, share, total))
    return sorted(found, key=lambda row: -row.seconds)


def region_work(counted: Mapping[tuple[str, str], Counted]) -> dict[str, Work]:
    """The work of one forward by region, layers together."""
    found: dict[str, Work] = {}
    for (region, _), one in counted.items():
        found[pattern(region)] = found.get(pattern(region), Work(0, 0)) + one.work
    return found


def kernel_rows(trace: Trace, forwards: int) -> list[KernelRow]:
    """One row for each kernel on the device, the slowest first."""
    groups: dict[tuple, list] = {}
    for kernel in trace.kernels:
        groups.setdefault((kernel.name, kernel.registers, kernel.shared), []).append(kernel)
    total = sum(kernel.seconds for kernel in trace.kernels) or 1.0
    rows = []
    for (name, registers, shared), found in groups.items():
        seconds, launches = sum(kernel.seconds for kernel in found), sum(kernel.launches for kernel in found)
        rows.append(KernelRow(name, launches / forwards, seconds / forwards, seconds / total, registers, shared))
    return sorted(rows, key=lambda row: -row.seconds)


@dataclass
class Profile:
    """One provider, profiled.

    Attributes:
        reason: why there is nothing, else "". notes: what a reader has to know.
        seconds: median of a forward without any profiler. profiled_seconds: mean with it, as everything below.
        memory, stretches: as in `Trace`.
    """

    provider: str
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    profiled_seconds: float | None = None
    operators: list[Row] = field(default_factory=list)
    regions: list[Row] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    @property
    def covered(self) -> float:
        """The share of the operators' time that lies in named regions."""
        return 1 - sum(row.share for row in self.operators if row.region == ELSEWHERE)

    @property
    def operator_seconds(self) -> float:
        """Time of all operators of one forward: of their kernels, or on a CPU their own."""
        return sum(row.seconds for row in self.operators)

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes that tensors held at one time beyond those there before."""
        return max((held for _, held in self.memory), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same ending to write to, renamed to `path` at the end: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(rows: Sequence[Row], roofs: Ceilings) -> str:
    """Operators or regions as CSV; empty where something is unknown or does not apply."""
    table = []
    for row in rows:
        work = row.work
        names = {"region": row.region, "operator": row.operator, "layers": row.layers, "calls": f"{row.calls:g}"}
        table.append(
            {
                **names,
                "launches": "" if row.launches is None else f"{row.launches:g}",
                "ms": f"{1e3 * row.seconds:.6g}",
                "share_percent": f"{100 * row.share:.4g}",
                "gflop": "" if work is None or not work.flops else f"{work.flops / 1e9:.6g}",
                "mbytes": "" if work is None or not work.bytes else f"{work.bytes / 1e6:.6g}",
                **{name: "" if v is None else f"{v:.4g}" for name, v in row.rates(roofs).items()},
            }
        )
    return _csv(table)


def kernels_csv_text(rows: Sequence[KernelRow]) -> str:
    """Kernels of the device as CSV."""
    return _csv(
        {
            "kernel": row.name,
            "launches": f"{row.launches:g}",
            "ms": f"{1e3 * row.seconds:.6g}",
            "share_percent": f"{100 * row.share:.4g}",
            "registers": "" if row.registers is None else row.registers,
            "shared_bytes": "" if row.shared is None else row.shared,
        }
        for row in rows
    )


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()
