"""Every shipped kernel configuration, compiled without a GPU: python -m bench.compile_report [--arch sm_90] [--json F].

The public operators themselves choose what is compiled (`kernels.launch.recorded`), for the calls of
`bench.compile.cases`. One line a kernel: registers a thread, bytes spilled a thread, shared memory of what the
architecture has, the instruction that multiplies matrices, how many programs fit on an SM; for Hopper also, by every
assembler that Triton bundles, instructions, the wgmma that are waited for one by one and the registers touched while
one is in flight (`bench.compile.sass`), and how many instructions an element a GELU adds. What is slow fails by
Triton's own choice of an assembler, what is wrong by any.

The exit status is 1 if a kernel does not compile, needs more shared memory than there is or multiplies without tensor
cores (float32 at the highest precision is meant to), spills on sm_80, sm_90, sm_100 or gfx942, or if one for Hopper's
half types is serialised in a loop, has a hazard or spends more on its GELU than it should.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel

from bench.compile import aot
from bench.compile.cases import CALLS, Case, cases, row_cases
from bench.compile.sass import Program
from bench.machine import DTYPES
from segmenter.files import write_text
from segmenter.kernels import launch
from segmenter.kernels.configs import SHARED_MEMORY

SPILL_FREE = ("sm_80", "sm_90", "sm_100", "gfx942")  # the others hold the MLP in one kernel with up to 40 bytes spilled
KNOWN_SPILLS = {  # bytes a thread in rows that were not chosen anew when they were first compiled
    ("linear", "sm_100", "m=65600 k=3072 residual"): 64,
    ("layernorm", "sm_90", "n=100"): 8,
    ("pixels_to_tokens", "sm_100", "side=500 patch=14"): 8,  # by ptxas 13.4
}
Task = tuple[Case, str, int]  # what a worker needs to record one launch of a case anew: its index among them
GELU_LIMIT = 12  # instructions an element that the GELU may add to a product on Hopper


@dataclasses.dataclass
class Kernel:
    """One kernel. Sizes in bytes, registers and spills a thread, shared memory a program."""

    op: str
    architecture: str
    dtype: str
    precision: str
    what: str
    kernel: str = ""
    config: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    tensor_core: str = ""
    has_dot: bool = False
    exact: bool = False  # its products are asked for in float32
    programs_per_sm: int = 0
    serialised: int = 0
    hazards: list[str] = dataclasses.field(default_factory=list)
    loops: list[dict[str, int]] = dataclasses.field(default_factory=list)  # innermost ones: instructions by name
    assemblers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # the same by each ptxas, on Hopper
    gelu_cost: float | None = None  # instructions an element that its GELU adds; of products on Hopper
    seconds: float = 0.0
    error: str = ""  # why there is no kernel
    failures: list[str] = dataclasses.field(default_factory=list)


def check(row: Kernel) -> list[str]:
    """What is wrong with a kernel, in words; nothing for most."""
    if row.error:
        return [row.error]
    exact = row.dtype == "fp32" and row.precision == "highest"
    allowed = KNOWN_SPILLS.get((row.op, row.architecture, row.what), 0) if row.architecture in SPILL_FREE else math.inf
    judged = row.architecture == "sm_90" and row.dtype != "fp32"
    faults = (
        (row.shared > row.shared_limit, f"needs {row.shared} bytes of shared memory, there are {row.shared_limit}"),
        (row.has_dot and row.tensor_core == "none" and not exact, "multiplies matrices without tensor cores"),
        # AMD's v_mfma has float32
        (row.exact and row.tensor_core not in ("none", "v_mfma"), "multiplies in TF32 what was to be float32"),
        (row.spills > allowed, f"spills {row.spills} bytes a thread"),
        (judged and row.serialised, f"waits for {row.serialised} wgmma one by one inside loops"),
        *((judged, hazard) for hazard in row.hazards),
        (judged and (row.gelu_cost or 0) > GELU_LIMIT,
         f"the GELU costs {row.gelu_cost} instructions an element, more than {GELU_LIMIT}"),
    )  # fmt: skip
    return [text for wrong, text in faults if wrong]


def row_of(case: Case, architecture: str, error: str = "") -> Kernel:
    """The case's row before it is compiled, or with the reason why there is no kernel."""
    names = case.op, architecture, case.dtype, case.precision, case.what
    return Kernel(*names, shared_limit=SHARED_MEMORY[architecture], error=error)


def compile_row(case: Case, architecture: str, index: int) -> Kernel:
    """Records the launch, compiles it and looks at the result. What goes wrong is in the row."""
    row = row_of(case, architecture)
    start = time.perf_counter()
    try:
        recorded = case.launches(architecture)[index]
        known = scalars(recorded)
        row.config = describe(recorded)
        row.exact = case.dtype == "fp32" and known.get("PRECISION") == "ieee"
        compiled = aot.compile_launch(recorded, architecture)
        vars(row).update(aot.figures(compiled, architecture))
        if architecture == "sm_80":
            row.loops = _loops(Program(aot.disassemble(compiled.kernel)))
        if architecture == "sm_90":
            _look_into(row, compiled)
            if case.op == "linear" and case.dtype != "fp32" and known.get("GELU"):
                row.gelu_cost = gelu_cost(recorded, architecture)
    except Exception as error:  # whatever the compiler raises is a finding, not the end of the report
        first_line = (str(error).strip() or "?").splitlines()[0]
        row.error = f"does not compile: {type(error).__name__}: {first_line[:200]}"
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _look_into(row: Kernel, compiled: CompiledKernel) -> None:
    """Adds what Hopper's machine code tells, by every assembler."""
    programs = []
    for release, path in aot.assemblers().items():
        binary, log = aot.assemble(compiled, path)
        registers, spills = aot.resource_usage(binary)
        programs.append(Program(aot.disassemble(binary)))
        row.assemblers[release] = {
            "registers": registers,
            "spills": spills,
            "instructions": len(programs[-1].instructions),
            "serialised": len(programs[-1].serialised(log)),
            "hazards": [f"{hazard.text} {hazard.reason}" for hazard in programs[-1].hazards()],
            "warnings": sorted(set(re.findall(r"\((C\d{4})\)", log))),
        }
    row.loops = _loops(programs[0])
    row.serialised = next(iter(row.assemblers.values()))["serialised"]
    row.hazards = [hazard for found in row.assemblers.values() for hazard in found["hazards"]]


def _loops(program: Program) -> list[dict[str, int]]:
    return [dict(program.mix(loop).most_common()) for loop in program.innermost_loops]


def scalars(recorded: launch.Launch) -> dict[str, Any]:
    """The kernel's arguments that are no tensors, by name."""
    plan = recorded.plan
    names = [parameter.name for parameter in plan.kernel.params[len(plan.tiles) :]]
    return dict(zip(names, plan.scalars, strict=True))


def describe(recorded: launch.Launch) -> str:
    """Tile sizes, warps, stages and kind of loads: "M128 N64 w8 s2 tma"."""
    plan = recorded.plan
    sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in scalars(recorded).items() if k.startswith("BLOCK_")]
    loads = ["tma"] if any(plan.tiles) else []
    return " ".join([*sizes, f"w{plan.options['num_warps']}", f"s{plan.options['num_stages']}", *loads])


def gelu_cost(recorded: launch.Launch, architecture: str) -> float:
    """Instructions an element that the GELU adds to a product: the same kernel is compiled with and without."""
    plan, known = copy.copy(recorded.plan), scalars(recorded)
    plan.scalars = tuple((known | {"GELU": None}).values())
    counts = []
    for kernel in (recorded, launch.Launch(plan, recorded.tensors)):
        compiled = aot.compile_launch(kernel, architecture)
        mix = Program(aot.disassemble(compiled.kernel)).mix()
        counts.append(mix.total() - mix["NOP"])  # which fill up to a whole line
    elements = known["BLOCK_M"] * known["BLOCK_N"] / (32 * compiled.metadata.num_warps)
    return round((counts[0] - counts[1]) / elements, 2)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def selected(
    architectures: Iterable[str], ops: Iterable[str] = (), full: bool = False, match: str = "", rows: bool = False
) -> list[tuple[Case, str]]:
    """The cases to compile, each with an architecture. `match` is searched for in "op dtype what"; `rows`: of rows."""
    return [
        (case, architecture)
        for architecture in architectures
        for case in (row_cases() if rows else cases())
        if (full or architecture in case.architectures) and (not ops or case.op in ops)
        if re.search(match, f"{case.op} {case.dtype} {case.what}")
    ]


def distinct_tasks(chosen: Iterable[tuple[Case, str]]) -> list[Task]:
    """One task for each binary, and for each case that cannot be recorded: compiling it will say why."""
    tasks: dict[tuple, Task] = {}
    for case, architecture in chosen:
        keys: list[tuple] = [(case, architecture)]
        with contextlib.suppress(Exception):
            keys = [aot.identity(recorded, architecture) for recorded in case.launches(architecture)]
        for index, key in enumerate(keys):
            tasks.setdefault(key, (case, architecture, index))
    return list(tasks.values())


def compile_all(tasks: list[Task], jobs: int) -> list[Kernel]:
    """A row for each task, in their order; a crash of the compiler is one row's failure."""
    rows = _compile_in_pool(tasks, jobs)
    for task in tasks:
        if task not in rows:  # a dead worker takes all that wait with it: find out which of them it was
            rows |= _compile_in_pool([task], 1)
        if task not in rows:
            rows[task] = row_of(*task[:2], "does not compile: the compiler's process died")
    return [rows[task] for task in tasks]


def _compile_in_pool(tasks: list[Task], jobs: int) -> dict[Task, Kernel]:
    rows = {}
    context = multiprocessing.get_context("spawn")  # neither torch's threads nor LLVM survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(compile_row, *task): task for task in tasks}
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, total=len(tasks), unit="kernel", file=sys.stderr):
            with contextlib.suppress(BrokenProcessPool):
                rows[futures[future]] = future.result()
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Showing it

HEADER = ("op", "arch", "type", "what", "config", "regs", "spill", "instr.", "ser.", "haz.", "shared", "matrix",
          "per SM", "GELU", "")  # fmt: skip


def table(rows: list[Kernel]) -> str:
    """Text with one line a kernel; what failed is marked. "A/B" is by one assembler and by the other."""
    lines = [HEADER]
    for row in rows:
        kind = row.dtype + (" tf32" if row.precision == "high" else "")
        what = row.what if row.op in row.kernel else f"{row.what} ({row.kernel.strip('_').removesuffix('_kernel')})"
        found = [(x["registers"], x["spills"], x["instructions"], x["serialised"], len(x["hazards"]))
                 for x in row.assemblers.values()] or [(row.registers, row.spills, "", "", "")]  # fmt: skip
        by_assembler = ["/".join(map(str, values)) for values in zip(*found, strict=True)]
        shared = f"{row.shared}/{row.shared_limit}"
        last = str(row.programs_per_sm), str(row.gelu_cost or ""), "FAILED" if row.failures else ""
        lines.append((row.op, row.architecture, kind, what, row.config, *by_assembler, shared, row.tensor_core, *last))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def versions(architectures: Iterable[str]) -> dict[str, str]:
    """What compiled: releases of triton and torch, and of ptxas by architecture."""
    nvidia = [architecture for architecture in architectures if architecture.startswith("sm_")]
    assemblers = {f"ptxas {name}": get_ptxas(aot.target(name).arch).version for name in nvidia}
    return {"triton": triton.__version__, "torch": torch.__version__, **assemblers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=[*SHARED_MEMORY], default=[*SHARED_MEMORY], help="default: all")
    parser.add_argument("--op", nargs="+", choices=sorted(CALLS), default=(), help="all")
    parser.add_argument("--match", default="", help='expression to be found in "op type what", for a few cases only')
    parser.add_argument("--rows", action="store_true", help="of each row of the tables its example, and no other case")
    parser.add_argument("--full", action="store_true", help="every case on every architecture")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a CPU")
    args = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it for this command")
    start = time.perf_counter()
    torch.set_num_threads(1)
    chosen = selected(args.arch, args.op, args.full, args.match, args.rows)
    if not chosen:
        parser.error("no case is left to compile")
    rows = [dataclasses.replace(row, failures=check(row)) for row in compile_all(distinct_tasks(chosen), args.jobs)]
    order = {name: i for i, name in enumerate((*SHARED_MEMORY, *DTYPES))}
    rows.sort(key=lambda row: (row.op, order[row.architecture], order[row.dtype], row.what))
    print(table(rows))
    failures = [f"{r.op} {r.architecture} {r.dtype} {r.what}: {text}" for r in rows for text in r.failures]
    used = versions(args.arch)
    print(f"sm_90 by ptxas {', '.join(aot.assemblers())}, of which the first is Triton's choice there")
    print(f"{len(rows)} kernels, {len(failures)} failures, {time.perf_counter() - start:.0f} s; {used}")
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
        head = f'{{"versions": {json.dumps(used)},\n"failures": {json.dumps(failures)},\n"rows": [\n'
        write_text(args.json, f"{head}{lines}\n]}}\n")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
