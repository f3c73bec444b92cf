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
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):  # of profilers
        if hook is not None and getattr(hook, "calls", True):
            return None
    return torch._C._cuda_getCurrentRawStream(index)


class Launcher:
    """Launches the compiled kernel of one plan on tensors out of a list.

    Args:
        plan: that has been run. tensors: what it is run with now.
        places: where each of these comes from, (index into the list, bytes from its beginning) or None.
    Raises:
        Unknown: this Triton does something else than what is known here.
    """

    def __init__(self, plan: Any, tensors: Sequence[torch.Tensor | None], places: Sequence[tuple[int, int] | None]):
        self.plan, self.places = plan, places
        try:
            self._read(tensors)
        except Unknown:
            raise
        except Exception as error:  # whatever private parts of another version raise
            raise Unknown(f"{type(error).__name__}: {error}") from error

    def _read(self, tensors: Sequence[torch.Tensor | None]) -> None:
        run = self.plan.compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            raise Unknown("the kernel needs scratch memory")
        self.function, (self.before, self.after, self.arguments) = _raw(run.launch), self._handed_over(tensors)
        if self.before != self.plan.grid:
            raise Unknown("the grid does not come first")
        index_of = {id(tensor): i for i, tensor in enumerate(tensors) if tensor is not None}
        pointers = [(p, index_of[id(x)]) for p, x in enumerate(self.arguments) if isinstance(x, torch.Tensor)]
        maps = [p for p, x in enumerate(self.arguments) if type(x).__name__ == "PyCUtensorMap"]
        mapped = [i for i, tiles in enumerate(self.plan.tiles) if tiles is not None] if maps else []
        found = {id(tensors[i]) for i in (*(i for _, i in pointers), *mapped)}
        if len(maps) != len(mapped) or found != set(index_of):
            raise Unknown("a tensor is handed over in a form of its own")
        self.pointers = [(position, *self.places[i]) for position, i in pointers]
        for position, _ in pointers:  # where each launch puts an address; the tensor itself would be kept alive
            self.arguments[position] = None
        self.maps = [(position, *self.places[i], {}) for position, i in zip(maps, mapped, strict=True)]

    def __call__(self, slots: Sequence[Any], stream: int) -> None:
        arguments = self.arguments.copy()
        for position, slot, offset in self.pointers:
            arguments[position] = slots[slot].data_ptr() + offset
        for position, slot, offset, known in self.maps:
            address = slots[slot].data_ptr() + offset
            found = known.get(address)
            arguments[position] = self._encoded(position, address, known, slots) if found is None else found
        if self.after is None:
            self.function(*self.before, stream, *arguments)
        else:
            self.function(*self.before, stream, *self.after, arguments)

    def _encoded(self, position: int, address: int, known: dict[int, Any], slots: Sequence[Any]) -> Any:
        """A new tensor map, by Triton. It holds values only: memory that is freed and used again is no danger."""
        if len(known) >= MAX_MAPS:
            known.clear()
        known[address] = made = self._handed_over(tensors_at(slots, self.places))[2][position]
        return made

    def _handed_over(self, tensors: Sequence[torch.Tensor | None]) -> tuple[tuple, tuple | None, list]:
        """What Triton's launcher hands to its C function: before the stream, after it, and the kernel's arguments.

        The last come as one list, or where there is none, as all that is after the stream.
        """
        compiled, handed = self.plan.compiled, []
        run = copy.copy(compiled.run)
        run.launch = _ending_in(run.launch, lambda *arguments: handed.append(arguments))
        about = (compiled.function, compiled.packed_metadata, None, None, None)  # no metadata, no hooks
        run(*self.plan.grid, 0, *about, *self.plan.arguments(tensors))
        ((*before, _), rest) = handed[0][:4], handed[0][4:]
        if isinstance(rest[-1], list | tuple):
            return tuple(before), rest[:-1], list(rest[-1])
        return tuple(before), None, list(rest)


def tensors_at(slots: Sequence[Any], places: Sequence[tuple[int, int] | None]) -> list[torch.Tensor | None]:
    """Tensors at these places of the list, as far as a launch looks at them: address and type."""
    return [None if place is None else _at(slots[place[0]], place[1]) for place in places]


def _at(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    if not offset:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset // tensor.element_size())


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
