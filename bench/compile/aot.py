"""Compiles a recorded launch for any architecture, without a GPU, and reads what the compiler made of it."""

import contextlib
import dataclasses
import io
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.knobs import NvidiaTool
from triton.runtime.jit import native_specialize_impl

from segmenter.kernels import launch
from segmenter.kernels.launch import Launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")}
_REGISTERS = 65_536  # of an SM, 32 bits each, handed to warps in units of 8 a thread
# An SM's shared memory in bytes, most threads and most programs (CUDA C programming guide, table of compute
# capabilities). Each program takes 1 KB of shared memory beyond its own.
_SM = {
    "sm_80": (167_936, 2048, 32),
    "sm_86": (102_400, 1536, 16),
    **dict.fromkeys(("sm_89", "sm_120"), (102_400, 1536, 24)),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), (233_472, 2048, 32)),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel became."""

    kernel: str
    architecture: str
    registers: int  # a thread; accumulation registers included on AMD
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    num_warps: int
    tensor_core: str  # the instruction that multiplies matrices, "none" if there is none
    has_dot: bool  # whether the kernel asks for such a product
    binary: bytes  # cubin or hsaco
    assembly: str  # PTX or AMD GCN
    options: Any  # what Triton's backend compiled it with


class _KernelDispatch(TorchDispatchMode):
    """Runs what CUDA tensors would run of our operators, whatever the device: the CPU's choice is the reference.

    Matrix products of PyTorch between our launches are not computed, only their shapes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "segmenter":
            with self:  # operators that call operators
                return func.redispatch(_CUDA, *args, **kwargs)
        if func.overloadpacket in _PRODUCTS:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            shape = func(*args, **kwargs)
            return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        return func(*args, **kwargs)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within it, public functions called with CPU tensors append to the list what they would launch on a GPU."""
    with torch.no_grad(), launch.recorded(architecture) as launches, _KernelDispatch():
        yield launches


def target(architecture: str) -> GPUTarget:
    """Triton's name for "sm_90", "gfx942", ..."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def source(recorded: Launch, architecture: str) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with the types and specialisations that this launch would compile it with, and its options."""
    plan, backend = recorded.plan, make_backend(target(architecture))
    signature, constants, attributes = {}, {}, {}
    arguments = plan.arguments(recorded.tensors)
    for i, (parameter, value) in enumerate(zip(plan.kernel.params, arguments, strict=True)):
        kind, key = "constexpr", None
        if not parameter.is_constexpr:  # the very function that a launch specialises its arguments with
            specialised = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            kind, key = native_specialize_impl(backend, value, parameter.is_const, *specialised)
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(key, str) and key:
            attributes[(i,)] = backend.parse_attr(key)
        signature[parameter.name] = kind
    return ASTSource(plan.kernel, signature, constants, attributes), plan.options


def identity(recorded: Launch, architecture: str) -> tuple:
    """Equal for launches that compile to the same binary."""
    src, options = source(recorded, architecture)
    return (architecture, src.hash(), *sorted(options.items()))


def compile_launch(recorded: Launch, architecture: str) -> Compiled:
    """Compiles through Triton's cache, as the launch itself would."""
    src, options = source(recorded, architecture)
    compiled = triton.compile(src, target=target(architecture), options=dict(options))
    has_dot = "tt.dot" in compiled.asm["ttir"]
    if architecture.startswith("gfx"):
        text, binary, names = compiled.asm["amdgcn"], compiled.asm["hsaco"], ("v_mfma",)
        fields = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        registers, spills = (int(re.search(field, text)[1]) for field in fields)
    else:
        text, binary = compiled.asm["ptx"], compiled.asm["cubin"]
        registers, spills = resource_usage(binary)
        names = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    core = next((name for name in names if name in text), "none")
    metadata = compiled.metadata  # whose num_warps counts those that warp specialisation adds
    return Compiled(compiled.name, architecture, registers, spills, metadata.shared, metadata.num_warps, core, has_dot,
                    binary, text, make_backend(target(architecture)).parse_options(dict(options)))  # fmt: skip


def programs_per_sm(compiled: Compiled) -> int:
    """How many programs fit on one SM (AMD: compute unit) by registers, threads and shared memory.

    An estimate: on Blackwell, tensor memory is not counted.
    """
    if compiled.architecture.startswith("gfx"):  # 4 SIMDs of 512 registers and at most 8 waves, 64 KB
        waves = 4 * min(8, 512 // (-(-compiled.registers // 8) * 8))
        return min(waves // compiled.num_warps, 65_536 // max(1, compiled.shared))
    shared, threads, programs = _SM[compiled.architecture]
    lanes = 32 * compiled.num_warps
    registers = -(-compiled.registers // 8) * 8
    return min(_REGISTERS // (registers * lanes), threads // lanes, shared // (compiled.shared + 1024), programs)


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA's tools, as Triton bundles them


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread by cuobjdump."""
    output = _tool(str(_TOOLS / "cuobjdump"), ".cubin", cubin, "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", output).groups()
    return int(registers), int(stack)


def disassemble(cubin: bytes) -> str:
    """SASS by nvdisasm."""
    return _tool(str(_TOOLS / "nvdisasm"), ".cubin", cubin, "-c", "-ndf")


def instructions(cubin: bytes) -> int:
    """How many there are, of 16 bytes each in the sections .text.* of the ELF file."""
    (table,), (count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    start = sections[names][4]
    return sum(size for name, *_, size, _, _, _, _ in sections if cubin.startswith(b".text.", start + name)) // 16


def assemblers() -> dict[str, str]:
    """Path of each ptxas that can assemble for sm_90, by release: Triton's choice first, then others that it bundles.

    Triton takes ptxas up to sm_90 and ptxas-blackwell from sm_100 on; TRITON_PTXAS_PATH replaces the former.
    """
    tools = (knobs.nvidia.ptxas, *map(NvidiaTool.from_path, map(str, sorted(_TOOLS.glob("ptxas*")))))
    found: dict[str, str] = {}
    for tool in tools:
        if tool is not None:
            found.setdefault(tool.version, tool.path)
    return found


def assemble(compiled: Compiled, path: str) -> tuple[bytes, str]:
    """Machine code of a kernel's PTX by this ptxas, with Triton's own options, and what ptxas says about it.

    Triton keeps no log of what comes out of its cache, so for its own choice too the PTX is assembled again.
    """
    machine, printed = target(compiled.architecture), io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):  # which restores the environment too
        os.environ["TRITON_PTXAS_PATH"], knobs.nvidia.dump_ptxas_log = path, True
        cubin = make_backend(machine).make_cubin(compiled.assembly, {}, compiled.options, machine.arch)
    return cubin, printed.getvalue()


def _tool(path: str, suffix: str, content: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"input{suffix}"
        file.write_bytes(content)
        result = subprocess.run([path, *options, str(file)], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
