"""Everything between a Python call and a running kernel: where kernels can run, checks, memory, launches, descriptors.

Nothing is tuned at run time, nothing synchronises and nothing is allocated but the outputs, so every operator can be
captured in a CUDA graph; a first call compiles, so make one call of each shape before capturing. From the second call
on, an operator is repeated from notes of the first: see kernels/repeat.py, which says what host functions have to keep
to for that.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from segmenter.kernels import configs, interpreted

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton.jit saw the kernels
FLOATS = configs.FLOATS
MAX_GRID = 2**31 - 1  # of axis 0, the only one used: the others end at 65,535

_recording: "Recording | None" = None


class KernelError(RuntimeError):
    """The kernels cannot take this call. The message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Where kernels run


@functools.cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(tensor: torch.Tensor) -> str:
    """Name of the architecture that a launch on this tensor's device compiles for: "sm_90", "gfx942", ...

    In the interpreter it is sm_90, so that tests run what ships for the H100 and H200.
    """
    if _recording is not None:
        return _recording.architecture
    return _device_architecture(tensor.device.index) if tensor.is_cuda else "sm_90"


def check_device(*tensors: torch.Tensor | None) -> None:
    """Raises KernelError unless all tensors (None is skipped) are on one device on which kernels can run.

    That is a CUDA device of capability 8.0 or newer, or the CPU when Triton's interpreter is on, and then with types
    that the interpreter computes rightly.
    """
    present = [t for t in tensors if t is not None]
    device = present[0].device
    for tensor in present[1:]:
        if tensor.device != device:
            raise KernelError(f"all tensors must be on one device, found {device} and {tensor.device}")
    if _recording is not None:
        return
    if device.type == "cuda":
        name = architecture(present[0])
        if name.startswith("sm_") and int(name[3:]) < 80:
            raise KernelError(f'the kernels need compute capability 8.0 or newer, found {name}; use impl="eager"')
    elif not (device.type == "cpu" and INTERPRETED):
        raise KernelError(
            f"the kernels run on CUDA tensors (or on CPU tensors with TRITON_INTERPRET=1), got {device}; "
            'move the tensors to the GPU or use impl="eager"'
        )
    elif any(t.dtype == torch.bfloat16 for t in present) and (reason := interpreted.why_not_bfloat16()):
        raise KernelError(f'{reason}; use float32, float16 or impl="eager"')


def check_floats(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises KernelError unless the tensor is of one of the supported types."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise KernelError(f'{name} must be one of {names}, got {tensor.dtype}; cast it or use impl="eager"')


def float32_precision() -> str:
    """What `torch.set_float32_matmul_precision` set, or "high" and "highest" by what PyTorch's newer interface did:
    where that was used the older one raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of every tl.dot: for float32 what `torch.set_float32_matmul_precision` says.

    "highest" multiplies in float32 on the ordinary cores ("ieee"), "high" and "medium" use TF32 tensor cores. Half
    types are not rounded, whatever it says.
    """
    if dtype != torch.float32:
        return "ieee"
    return "ieee" if float32_precision() == "highest" else "tf32"


def wide_precision(like: torch.Tensor) -> str:
    """`input_precision` of a product of float32 operands that has to lose nothing to what half types round: of three
    TF32 ones on NVIDIA's tensor cores (TF32 alone cuts off more than float16 rounds), in float32 on AMD's."""
    return "ieee" if architecture(like).startswith("gfx") else "tf32x3"


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, which is all that kernels ask for; else a dense copy."""
    return tensor if tensor.stride(-1) == 1 else call(torch.Tensor.contiguous, tensor)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it is contiguous, else a copy that is."""
    return tensor if tensor.is_contiguous() else call(torch.Tensor.contiguous, tensor)


def fits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether a hardware tensor descriptor can address it: base and outer strides in multiples of 16 bytes.

    A stride of 0 (an expanded tensor) cannot be encoded.
    """
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * size % 16 == 0 and stride * size < 2**40 for stride in tensor.stride()[:-1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Launching


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel reads or writes one tensor through a descriptor: its (shape, strides), cut into `block`s."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block))


class Plan:
    """One launch, decided: everything but the addresses.

    Args:
        kernel: a @triton.jit function. Its parameters come in the order tensors, scalars.
        grid: programs along axis 0.
        tiles: for each tensor argument None (passed as a pointer) or how to make a descriptor of it.
        scalars: the other arguments in order, constexprs included.
        options: num_warps, num_stages.
    """

    __slots__ = ("compiled", "grid", "kernel", "options", "scalars", "tiles")

    def __init__(
        self,
        kernel: Any,
        grid: int,
        tiles: tuple[Tiles | None, ...],
        scalars: tuple[Any, ...],
        options: dict[str, int],
    ):
        if grid > MAX_GRID:
            raise KernelError(f"this call needs {grid} programs, more than {MAX_GRID}; split the batch")
        self.kernel, self.grid, self.tiles, self.scalars = kernel, (grid, 1, 1), tiles, scalars
        self.options = {**options, "enable_fp_fusion": True}  # Triton's default, of which 3.9 warns that it will change
        self.compiled: Any = None

    def run(self, *tensors: torch.Tensor | None) -> None:
        """Launches on the tensors' device and its current stream. None stands for a tensor the kernel does not use."""
        if _recording is not None:
            _recording.launches.append(Launch(self, tensors))
            return
        if current.notes is not None:
            current.notes.launched(self, tensors)
        index = tensors[0].get_device()  # type: ignore[union-attr]  # the first is never None; -1 on the CPU
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):  # never set_device: the caller's current device stays as it is
                self._run(tensors)
        else:
            self._run(tensors)

    def arguments(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        """What the kernel is called with."""
        pairs = zip(tensors, self.tiles, strict=True)
        return [*(tensor if tiles is None else tiles.of(tensor) for tensor, tiles in pairs), *self.scalars]

    def _run(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        arguments = self.arguments(tensors)
        if self.compiled is not None:
            self.compiled[self.grid](*arguments)
        else:  # None again in the interpreter
            self.compiled = self.kernel[self.grid](*arguments, **self.options)


# ---------------------------------------------------------------------------------------------------------------------
# What host functions do besides launching


class _Current(threading.local):
    notes: Any = None  # a `repeat.Notes`, while a host function of this thread runs for the first time


current = _Current()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`, noted down."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if current.notes is not None:
        current.notes.allocated(tensor)
    return tensor


def call(function: Callable, *arguments: Any, **options: Any) -> Any:
    """`function(*arguments, **options)`, noted down. It gives new tensors, one or a tuple of them, no views."""
    notes, current.notes = current.notes, None  # nothing of what happens inside
    try:
        result = function(*arguments, **options)
    finally:
        current.notes = notes
    if notes is not None:
        notes.called(function, arguments, options, result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Recording, for tools that compile without a GPU


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that was decided and not made."""

    plan: Plan
    tensors: tuple[torch.Tensor | None, ...]


@dataclasses.dataclass
class Recording:
    architecture: str
    launches: list[Launch] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """Within it, the kernels' host code, called with CPU tensors, chooses for `architecture` and launches nothing.

    What it returns is not computed. `bench.compile_report` compiles exactly what ships that way. (PyTorch sends CPU
    tensors given to the operators themselves to the reference; `bench.compile.aot.recording` sends them here.)
    """
    global _recording
    before, _recording = _recording, Recording(architecture)
    try:
        yield _recording.launches
    finally:
        _recording = before
