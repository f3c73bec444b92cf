"""Compiles a recorded launch for any architecture, without a GPU, and reads what the compiler made of it."""

import contextlib
import io
import os
import re
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
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.knobs import NvidiaTool
from triton.runtime.jit import native_specialize_impl

from segmenter.kernels import launch
from segmenter.kernels.launch import Launch

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


def compile_launch(recorded: Launch, architecture: str) -> CompiledKernel:
    """Compiles through Triton's cache, as the launch itself would."""
    src, options = source(recorded, architecture)
    return triton.compile(src, target=target(architecture), options=dict(options))


def figures(compiled: CompiledKernel, architecture: str) -> dict[str, Any]:
    """What one kernel became, by name.

    `registers` are a thread's, on AMD with accumulation registers; `spills` bytes of local memory a thread; `shared`
    bytes a program; `tensor_core` the instruction that multiplies matrices, "none" if there is none; `has_dot` whether
    the kernel asks for such a product.
    """
    if architecture.startswith("gfx"):
        text, names = compiled.asm["amdgcn"], ("v_mfma",)
        fields = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        registers, spills = (int(re.search(field, text)[1]) for field in fields)
    else:
        text, names = compiled.asm["ptx"], ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
        registers, spills = resource_usage(compiled.kernel)
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps  # with those of warp specialisation
    return {
        "kernel": compiled.name,
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "tensor_core": next((name for name in names if name in text), "none"),
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "programs_per_sm": programs_per_sm(architecture, registers, shared, num_warps),
    }


def programs_per_sm(architecture: str, registers: int, shared: int, num_warps: int) -> int:
    """How many programs fit on one SM (AMD: compute unit) by registers, threads and shared memory.

    An estimate: on Blackwell, tensor memory is not counted.
    """
    registers, lanes = -(-registers // 8) * 8, 32 * num_warps
    if architecture.startswith("gfx"):  # 4 SIMDs of 512 registers and at most 8 waves, 64 KB
        return min(4 * min(8, 512 // registers) // num_warps, 65_536 // max(1, shared))
    most_shared, most_lanes, most_programs = _SM[architecture]
    return min(_REGISTERS // (registers * lanes), most_lanes // lanes, most_shared // (shared + 1024), most_programs)


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA's tools, as Triton bundles them


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _read(knobs.nvidia.cuobjdump, cubin, "-res-usage"))
    return int(found[1]), int(found[2])


def disassemble(cubin: bytes) -> str:
    """SASS."""
    return _read(knobs.nvidia.nvdisasm, cubin, "-c", "-ndf")


def assemblers() -> dict[str, str]:
    """Path of each ptxas that can assemble for sm_90, by release: Triton's choice first, then newer ones that it has.

    An older one does not read the PTX that is written for Triton's choice.
    """
    choice = get_ptxas(90)
    bundled = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    found: dict[str, str] = {}
    for tool in (choice, *map(NvidiaTool.from_path, map(str, bundled))):
        if tool is not None and _release(tool) >= _release(choice):
            found.setdefault(tool.version, tool.path)
    return found


def _release(tool: NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))


def assemble(compiled: CompiledKernel, path: str) -> tuple[bytes, str]:
    """Machine code of a kernel's PTX by this ptxas, with Triton's own options, and what ptxas says about it.

    Triton keeps no log of what comes out of its cache, so for its own choice too the PTX is assembled again.
    """
    machine, printed = compiled.metadata.target, io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):  # which restores the environment too
        os.environ["TRITON_PTXAS_PATH"] = os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = path
        knobs.nvidia.dump_ptxas_log = True
        cubin = make_backend(machine).make_cubin(compiled.asm["ptx"], {}, compiled.metadata, machine.arch)
    return cubin, printed.getvalue()


def _read(tool: NvidiaTool, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([tool.path, *options, file.name], text=True, stderr=subprocess.STDOUT)
