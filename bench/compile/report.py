"""Every shipped kernel configuration, compiled without a GPU: python -m bench.compile_report [--arch sm_90] [--json F].

The public operators themselves choose what is compiled (`kernels.launch.recorded`), for the calls of
`bench.compile.cases`. One line a kernel: registers a thread, bytes spilled a thread, shared memory of what the
architecture has, the instruction that multiplies matrices, how many programs fit on an SM; for Hopper also, by every
assembler that Triton bundles, instructions, the wgmma that are waited for one by one and the registers touched while
one is in flight (`bench.compile.sass`). Triton's own choice of an assembler decides what fails.

The exit status is 1 if a kernel does not compile, needs more shared memory than there is or multiplies without tensor
cores (float32 at the highest precision is meant to), spills on sm_80, sm_90, sm_100 or gfx942, or if one for Hopper's
half types is serialised in a loop, has a hazard or spends more on its GELU than it should.
"""

import argparse
import concurrent.futures
import contextlib
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

from bench.compile import aot
from bench.compile.cases import TYPES, Case, cases
from bench.compile.sass import Program
from segmenter.files import write_text
from segmenter.kernels import launch
from segmenter.kernels.configs import SHARED_MEMORY

SPILL_FREE = ("sm_80", "sm_90", "sm_100", "gfx942")  # the others hold the MLP in one kernel with up to 40 bytes spilled
KNOWN_SPILLS = {  # bytes a thread in rows that were not chosen anew when they were first compiled
    ("linear", "sm_100", "m=65600 k=3072 residual"): 64,
    ("layernorm", "sm_90", "n=100"): 8,
}
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


@dataclasses.dataclass(frozen=True)
class Task:
    """One launch of a case: what a worker needs to record it anew."""

    case: Case
    architecture: str
    index: int


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
    return Kernel(*names, shared_limit=SHARED_MEMORY[architecture], error=error, failures=[error] if error else [])


def compile_row(task: Task) -> Kernel:
    """Records the launch, compiles it and looks at the result. What goes wrong is in the row."""
    case, architecture = task.case, task.architecture
    row = row_of(case, architecture)
    start = time.perf_counter()
    try:
        recorded = record(case, architecture)[task.index]
        row.config = describe(recorded)
        row.exact = case.dtype == "fp32" and constants(recorded).get("PRECISION") == "ieee"
        _fill(row, aot.compile_launch(recorded, architecture))
        if (architecture, case.op) == ("sm_90", "linear") and case.dtype != "fp32" and constants(recorded).get("GELU"):
            row.gelu_cost = gelu_cost(recorded, architecture)
    except Exception as error:  # whatever the compiler raises is a finding, not the end of the report
        row.error = f"does not compile: {in_one_line(error)}"
    row.seconds = round(time.perf_counter() - start, 2)
    row.failures = check(row)
    return row


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"


def _fill(row: Kernel, compiled: aot.Compiled) -> None:
    for name in ("kernel", "registers", "spills", "shared", "tensor_core", "has_dot"):
        setattr(row, name, getattr(compiled, name))
    row.programs_per_sm = aot.programs_per_sm(compiled)
    if row.architecture != "sm_90":
        return
    program = Program(aot.disassemble(compiled.binary))
    row.loops = [dict(program.mix(loop).most_common()) for loop in program.innermost_loops]
    wgmma = row.tensor_core == "wgmma.mma_async"
    for release, path in aot.assemblers().items():
        binary, log = compiled.binary, ""  # by Triton's own choice, the first
        if row.assemblers or wgmma:
            binary, log = aot.assemble(compiled, path)
        registers, spills = aot.resource_usage(binary)
        found = {"registers": registers, "spills": spills, "instructions": aot.instructions(binary)}
        if wgmma:
            program = Program(aot.disassemble(binary)) if row.assemblers else program
            found["serialised"] = len(program.serialised(log))
            found["hazards"] = [f"{hazard.text} {hazard.reason}" for hazard in program.hazards()]
            found["warnings"] = sorted(set(re.findall(r"\((C\d{4})\)", log)))
        row.assemblers[release] = found
    first = next(iter(row.assemblers.values()))
    row.serialised, row.hazards = first.get("serialised", 0), first.get("hazards", [])


def record(case: Case, architecture: str) -> list[launch.Launch]:
    """What the case launches on this architecture."""
    with aot.recording(architecture) as launches:
        case.run()
    return launches


def constants(recorded: launch.Launch) -> dict[str, Any]:
    """The kernel's compile-time arguments by name."""
    plan = recorded.plan
    arguments = zip(plan.kernel.params[len(plan.tiles) :], plan.scalars, strict=True)
    return {parameter.name: value for parameter, value in arguments if parameter.is_constexpr}


def describe(recorded: launch.Launch) -> str:
    """Tile sizes, warps, stages and kind of loads: "M128 N64 w8 s2 tma"."""
    plan = recorded.plan
    sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in constants(recorded).items() if k.startswith("BLOCK_")]
    loads = ["tma"] if any(plan.tiles) else []
    return " ".join([*sizes, f"w{plan.options['num_warps']}", f"s{plan.options['num_stages']}", *loads])


def gelu_cost(recorded: launch.Launch, architecture: str) -> float:
    """Instructions an element that the GELU adds to a product: the same kernel is compiled with and without."""
    plan, known = recorded.plan, constants(recorded)
    names = [parameter.name for parameter in plan.kernel.params[len(plan.tiles) :]]
    scalars = tuple(None if name == "GELU" else value for name, value in zip(names, plan.scalars, strict=True))
    plain = launch.Plan(plan.kernel, plan.grid[0], plan.tiles, scalars, plan.options)
    counts = []
    for kernel in (recorded, launch.Launch(plain, recorded.tensors)):
        compiled = aot.compile_launch(kernel, architecture)
        mix = Program(aot.disassemble(compiled.binary)).mix()
        counts.append(mix.total() - mix["NOP"])  # which fill up to a whole line
    elements = known["BLOCK_M"] * known["BLOCK_N"] / (32 * compiled.num_warps)
    return round((counts[0] - counts[1]) / elements, 2)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def selected(
    architectures: Iterable[str], ops: Iterable[str] = (), full: bool = False, match: str = ""
) -> list[tuple[Case, str]]:
    """The cases to compile, each with an architecture. `match` is searched for in "op dtype what"."""
    return [
        (case, architecture)
        for architecture in architectures
        for case in cases()
        if (full or architecture in case.architectures) and (not ops or case.op in ops)
        if re.search(match, f"{case.op} {case.dtype} {case.what}")
    ]


def distinct_tasks(chosen: Iterable[tuple[Case, str]]) -> tuple[list[Task], list[Kernel]]:
    """One task for each binary, and the cases that cannot even be recorded."""
    tasks: dict[tuple, Task] = {}
    rows = []
    for case, architecture in chosen:
        try:
            launches = record(case, architecture)
        except Exception as error:  # reported like a kernel that does not compile
            rows.append(row_of(case, architecture, f"cannot be called: {in_one_line(error)}"))
            continue
        for index, recorded in enumerate(launches):
            tasks.setdefault(aot.identity(recorded, architecture), Task(case, architecture, index))
    return list(tasks.values()), rows


def compile_all(tasks: list[Task], jobs: int) -> list[Kernel]:
    """A row for each task, in their order; a crash of the compiler is one row's failure."""
    rows: dict[Task, Kernel] = {}
    context = multiprocessing.get_context("spawn")  # neither torch's threads nor LLVM survive a fork

    def compile_in_pool(tasks: list[Task], jobs: int) -> None:
        with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(compile_row, task): task for task in tasks}
            for future in concurrent.futures.as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    rows[futures[future]] = future.result()
                    progress.update()

    with tqdm(total=len(tasks), unit="kernel", file=sys.stderr) as progress:
        compile_in_pool(tasks, jobs)
        for task in tasks:  # a dead worker takes all that wait with it: find out which of them it was
            if task not in rows:
                compile_in_pool([task], 1)
            if task not in rows:
                rows[task] = row_of(task.case, task.architecture, "does not compile: the compiler's process died")
                progress.update()
    return [rows[task] for task in tasks]


# ---------------------------------------------------------------------------------------------------------------------
# Showing it

HEADER = ("op", "arch", "type", "what", "config", "regs", "spill", "instr.", "shared", "matrix", "ser.", "haz.",
          "per SM")  # fmt: skip


def table(rows: list[Kernel]) -> str:
    """Text with one line a kernel; what failed is marked. "A/B" is by one assembler and by the other."""
    lines = [HEADER]
    for row in rows:
        kind = row.dtype + (" tf32" if row.precision == "high" else "")
        by = [*row.assemblers.values()] or [{"registers": row.registers, "spills": row.spills}]
        sizes = ["/".join(str(x.get(key, "")) for x in by) for key in ("registers", "spills", "instructions")]
        serialised = "/".join(str(x["serialised"]) for x in by if "serialised" in x)
        hazards = "/".join(str(len(x["hazards"])) for x in by if "hazards" in x)
        what = row.what if row.op in row.kernel else f"{row.what} ({row.kernel.strip('_').removesuffix('_kernel')})"
        shared = f"{row.shared}/{row.shared_limit}"
        lines.append((row.op, row.architecture, kind, what, row.config, *sizes, shared, row.tensor_core, serialised,
                      hazards, str(row.programs_per_sm)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(map(str.ljust, line, widths)) for line in lines]
    marks = ["", *("  FAILED" if row.failures else "" for row in rows)]
    return "\n".join((text + mark).rstrip() for text, mark in zip(texts, marks, strict=True))


def about_assemblers() -> str:
    """Which ptxas made the figures of sm_90, and when which of them is used."""
    first, *others = aot.assemblers()
    more = (
        f"Triton's choice there (TRITON_PTXAS_PATH names another), and by {', '.join(others)}, "
        "bundled too: of the two, ptxas and ptxas-blackwell, the second is its choice from sm_100 on"
    )
    return f"sm_90 by ptxas {first}, {more if others else 'the only one there is'}"


def versions(architectures: Iterable[str]) -> dict[str, str]:
    """What compiled: releases of triton and torch, and of ptxas by architecture."""
    targets = {f"ptxas {a}": aot.target(a).arch for a in architectures if a.startswith("sm_")}
    assemblers = {name: get_ptxas(arch).version for name, arch in targets.items()}
    return {"triton": triton.__version__, "torch": torch.__version__, **assemblers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=[*SHARED_MEMORY], default=[*SHARED_MEMORY], help="default: all")
    parser.add_argument("--op", nargs="+", choices=sorted({case.op for case in cases()}), default=(), help="all")
    parser.add_argument("--match", default="", help='expression to be found in "op type what", for a few cases only')
    parser.add_argument("--full", action="store_true", help="every case on every architecture")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a CPU")
    args = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it for this command")
    start = time.perf_counter()
    torch.set_num_threads(1)
    chosen = selected(args.arch, args.op, args.full, args.match)
    if not chosen:
        parser.error("no case is left to compile")
    tasks, rows = distinct_tasks(chosen)
    rows += compile_all(tasks, args.jobs)
    order = {name: i for i, name in enumerate((*SHARED_MEMORY, *TYPES))}
    rows.sort(key=lambda row: (row.op, order[row.architecture], order[row.dtype], row.what))
    print(table(rows))
    failures = [f"{r.op} {r.architecture} {r.dtype} {r.what}: {text}" for r in rows for text in r.failures]
    for row in (row for row in rows if row.gelu_cost is not None):
        print(f"GELU of {row.dtype} {row.what}: {row.gelu_cost} instructions an element")
    used = versions(args.arch)
    print(about_assemblers())
    print(f"{len(rows)} kernels, {len(failures)} failures, {time.perf_counter() - start:.0f} s; {used}")
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
        head = f'{{"versions": {json.dumps(used)},\n"failures": {json.dumps(failures)},\n"rows": [\n'
        write_text(args.json, f"{head}{lines}\n]}}\n")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
