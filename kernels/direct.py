"""Launching through the C function that Triton's own launcher ends in.

Triton prepares each launch in Python: 10 to 25 microseconds of host time for a kernel with tensor maps. For one plan,
all that it hands to its C function stays the same but the addresses and the tensor maps made of them. So it is asked
once what it hands over, and from then on that is handed over with new addresses. What lies between is not known here:
where something is not as expected (another backend, kernels that need scratch memory), Triton launches as before.
"""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import knobs

MAX_MAPS = 4096  # tensor maps that one argument remembers by address; beyond that it starts over


def stream(index: int) -> int | None:
    """The current stream of a CUDA device for direct launches, or None if somebody wants to be told of each launch."""
    runtime = knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # profilers
        return None
    return torch._C._cuda_getCurrentRawStream(index)


class Launcher:
    """Launches the compiled kernel of one plan.

    Args:
        compiled, grid: Triton's kernel and the programs along its axes.
        arguments: of some tensors, what the kernel is called with.
        tensors: the same, as the plan is run with.
    Raises:
        Unknown: this Triton does something else than what is known here.
    """

    def __init__(self, compiled: Any, grid: tuple[int, int, int], arguments: Callable, tensors: Sequence[Any]):
        self.compiled, self.grid, self.arguments = compiled, grid, arguments
        try:
            self._read(tensors)
        except Unknown:
            raise
        except Exception as error:
            raise Unknown(f"{type(error).__name__}: {error}") from error

    def _read(self, tensors: Sequence[Any]) -> None:
        run = self.compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            raise Unknown("the kernel needs scratch memory")
        handed = self._handed_over(tensors, 0)
        self.function = _raw(run.launch)
        if handed[:4] != (*self.grid, 0):
            raise Unknown("grid and stream do not come first")
        self.nested = isinstance(handed[-1], list | tuple)
        self.after, template = (handed[4:-1], handed[-1]) if self.nested else ((), handed[4:])
        self.template = list(template)
        index_of = {id(tensor): i for i, tensor in enumerate(tensors) if tensor is not None}
        self.pointers = [(p, index_of[id(x)]) for p, x in enumerate(template) if isinstance(x, torch.Tensor)]
        maps = [p for p, x in enumerate(template) if type(x).__name__ == "PyCUtensorMap"]
        mapped = [id(x.base) for x in self.arguments(tensors) if hasattr(x, "base") and hasattr(x, "block_shape")]
        if maps and len(maps) != len(mapped):
            raise Unknown(f"{len(maps)} tensor maps of {len(mapped)} descriptors")
        self.maps = [(p, index_of[base], {}) for p, base in zip(maps, mapped, strict=bool(maps))]
        found = {id(tensors[i]) for _, i, *_ in (*self.pointers, *self.maps)}
        if found != set(index_of):
            raise Unknown("a tensor is handed over in a form of its own")

    def __call__(self, stream: int, addresses: Sequence[int | None], tensors: Callable[[], Sequence[Any]]) -> None:
        """Launches on tensors at these addresses; `tensors()` gives them, for tensor maps not made before."""
        arguments = self.template.copy()
        for position, i in self.pointers:
            arguments[position] = addresses[i]
        for position, i, known in self.maps:
            found = known.get(addresses[i])
            arguments[position] = self._encoded(position, i, known, tensors()) if found is None else found
        if self.nested:
            self.function(*self.grid, stream, *self.after, arguments)
        else:
            self.function(*self.grid, stream, *arguments)

    def _encoded(self, position: int, i: int, known: dict, tensors: Sequence[Any]) -> Any:
        """A new tensor map, by Triton. It holds values only: memory that is freed and used again is no danger."""
        if len(known) >= MAX_MAPS:
            known.clear()
        handed = self._handed_over(tensors, 0)
        known[tensors[i].data_ptr()] = made = handed[-1][position] if self.nested else handed[4 + position]
        return made

    def _handed_over(self, tensors: Sequence[Any], stream: int) -> tuple:
        """What Triton's launcher hands to its C function."""
        handed, run = [], copy.copy(self.compiled.run)
        run.launch = _ending_in(run.launch, lambda *arguments: handed.append(arguments))
        about = (self.compiled.function, self.compiled.packed_metadata, None, None, None)  # no metadata, no hooks
        run(*self.grid, stream, *about, *self.arguments(tensors))
        return handed[0]


class Unknown(RuntimeError):
    """Triton's launcher is not as it is known here."""


def _raw(launch: Callable) -> Callable:
    """The C function itself."""
    if not isinstance(launch, types.FunctionType):
        return launch
    return launch.__closure__[launch.__code__.co_freevars.index("launcher")].cell_contents


def _ending_in(launch: Callable, end: Callable) -> Callable:
    """Triton's function that makes tensor maps and then calls the C function, with another end."""
    if not isinstance(launch, types.FunctionType):
        return end
    names, cells = launch.__code__.co_freevars, list(launch.__closure__)
    cells[names.index("launcher")] = types.CellType(end)
    return types.FunctionType(launch.__code__, launch.__globals__, closure=tuple(cells))
