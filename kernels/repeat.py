"""Host functions of operators, run as written once for each kind of arguments and repeated from notes after that.

A host function checks its arguments, chooses tiles, allocates, launches. All of it depends on the layouts of its
tensors, on its other arguments and on the precision of float32 products alone, and costs more host time than eager
PyTorch needs for the same operation. So `Repeated` runs it once for each of these, writes down what it did, and from
then on only that is done: the same memory is allocated, the same kernels are launched with new addresses, the same
functions of PyTorch are called.

What a host function has to keep to, so that its notes are all there is to it:
- memory comes from `launch.empty`, and everything else that computes goes through `launch.call` or a `launch.Plan`;
- views are free; what may be a copy is not (`launch.rows_contiguous`, `launch.contiguous`);
- nothing depends on values, or on anything that may change between two calls of the same key.
Memory that comes from anywhere else is an error at the first call.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from segmenter.kernels import direct, launch

MAX_PROGRAMS = 4096  # kinds of arguments that one function remembers; beyond that it starts over

Slots = list[Any]  # tensors of a call by number: its arguments, then what it makes; None once nothing needs it
Step = Callable[[Slots, int | None], None]  # also given the stream; None: launch as Triton does


class Ambiguous(Exception):
    """Two arguments share memory, or two results are empty: it cannot be told which of them is meant. Not repeated."""


class Notes:
    """What a host function does, in terms of its tensors."""

    def __init__(self, arguments: Sequence[torch.Tensor]):
        self.inputs = len(arguments)
        self.steps: list[tuple[Step, list[int], list[int]]] = []  # what is done, slots that it reads, and makes
        self.layouts: list[tuple] = []  # of each slot: (shape, strides, address)
        self.slots_of: dict[int, list[int]] = {}  # address of a storage -> slots
        self.allocations: dict[int, _Allocation] = {}
        self.viewed: set[int] = set()  # slots that are read as tensors and not only by address
        for tensor in arguments:
            self._slot(tensor)

    def _slot(self, tensor: torch.Tensor) -> int:
        slot, storage = len(self.layouts), tensor.untyped_storage().data_ptr()
        self.layouts.append((tensor.shape, tensor.stride(), tensor.data_ptr()))
        if slot < self.inputs:
            self.slots_of.setdefault(storage, []).append(slot)
        else:  # freed memory comes back at the same address
            self.slots_of[storage] = [slot]
        return slot

    def place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(slot, bytes from its beginning) of a tensor or of a view."""
        address, found = tensor.data_ptr(), self.slots_of.get(tensor.untyped_storage().data_ptr(), [])
        if len(found) > 1:
            found = [slot for slot in found if self.layouts[slot][2] == address]
            if len(found) != 1:
                raise Ambiguous
        if not found:
            raise AssertionError("memory of a host function that is no argument's and not from launch.empty or call")
        return found[0], address - self.layouts[found[0]][2]

    def view(self, tensor: torch.Tensor) -> tuple[int, tuple | None]:
        """(slot, None if that is the tensor, else the arguments of `as_strided`)."""
        slot, offset = self.place(tensor)
        self.viewed.add(slot)
        layout = (tensor.shape, tensor.stride())
        if self.layouts[slot][:2] == layout and not offset:
            return slot, None
        return slot, (*layout, offset // tensor.element_size())

    def allocated(self, tensor: torch.Tensor) -> None:
        slot = self._slot(tensor)
        self.allocations[slot] = step = _Allocation(slot, tensor)
        self.steps.append((step, [], [slot]))

    def called(self, function: Callable, arguments: tuple, options: dict, result: Any) -> None:
        places = [self.view(x) if isinstance(x, torch.Tensor) else None for x in arguments]
        results = result if isinstance(result, tuple) else (result,)
        made = [self._slot(tensor) for tensor in results]
        step = _Call(function, arguments, places, options, made if isinstance(result, tuple) else made[0])
        self.steps.append((step, [place[0] for place in places if place], made))

    def launched(self, plan: Any, tensors: Sequence[torch.Tensor | None]) -> None:
        places = [None if tensor is None else self.place(tensor) for tensor in tensors]
        self.steps.append((_Launch(plan, places), [place[0] for place in places if place], []))

    def program(self, result: Any) -> "Program":
        """The notes, to be done again."""
        results = result if isinstance(result, tuple) else (result,)
        if len({(tensor.shape, tensor.dtype) for tensor in results if not tensor.numel()}) > 1:
            raise Ambiguous  # whatever is empty is at address 0
        outputs = []
        for tensor in results:
            slot, offset = self.place(tensor)
            if slot < self.inputs:
                raise AssertionError("a host function returned one of its arguments")
            allocation = self.allocations.get(slot)
            whole = tensor.is_contiguous() and not offset and tensor.numel() == math.prod(self.layouts[slot][0])
            if allocation is not None and whole and slot not in self.viewed:  # known by its address alone
                allocation.shape = tuple(tensor.shape)
                outputs.append((slot, None))
            else:
                outputs.append(self.view(tensor))
        kept, steps = {slot for slot, _ in outputs}, []
        for step, read, made in reversed(self.steps):
            dead = sorted({*read, *made} - kept - set(range(self.inputs)))
            kept.update(dead)
            steps.append((step, dead))
        return Program(steps[::-1], len(self.layouts) - self.inputs, outputs, isinstance(result, tuple))


_empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # half the time of torch.empty


class _Allocation:
    def __init__(self, slot: int, tensor: torch.Tensor):
        self.slot, self.shape, self.dtype, self.device = slot, tuple(tensor.shape), tensor.dtype, tensor.device

    def __call__(self, slots: Slots, stream: int | None) -> None:
        if stream is None or _empty_cuda is None:
            slots[self.slot] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            slots[self.slot] = _empty_cuda(self.shape, self.strides, self.dtype)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        return torch.empty(self.shape, device="meta").stride()


class _Call:
    def __init__(self, function: Callable, arguments: tuple, places: list, options: dict, made: int | list[int]):
        self.function, self.options, self.made = function, options, made
        self.arguments = [None if place else x for x, place in zip(arguments, places, strict=True)]
        self.places = [(i, *place) for i, place in enumerate(places) if place]

    def __call__(self, slots: Slots, stream: int | None) -> None:
        arguments = self.arguments.copy()
        for i, slot, view in self.places:
            arguments[i] = slots[slot] if view is None else strided(slots[slot], view)
        result = self.function(*arguments, **self.options)
        if isinstance(self.made, int):
            slots[self.made] = result
        else:
            for slot, tensor in zip(self.made, result, strict=True):
                slots[slot] = tensor


class _Launch:
    """Launches a plan: directly, where that is possible and nobody wants to be told of launches.

    Attributes:
        why_not_direct: why Triton launches it each time, or None.
    """

    why_not_direct: str | None = None

    def __init__(self, plan: launch.Plan, places: list[tuple[int, int] | None]):
        self.plan, self.places = plan, places
        self.direct: direct.Launcher | None = None

    def __call__(self, slots: Slots, stream: int | None) -> None:
        if stream is None or self.why_not_direct is not None:
            self.plan.run(*direct.tensors_at(slots, self.places))
        elif self.direct is not None:
            self.direct(slots, stream)
        else:
            self._first(slots, stream)

    def _first(self, slots: Slots, stream: int) -> None:
        try:
            self.direct = direct.Launcher(self.plan, direct.tensors_at(slots, self.places), self.places)
        except direct.Unknown as error:
            self.why_not_direct = str(error)
        self(slots, stream)


def strided(tensor: torch.Tensor, view: tuple) -> torch.Tensor:
    """The view (shape, strides, elements from the tensor's first)."""
    shape, strides, offset = view
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


class Program:
    """The steps of a host function for arguments of one kind."""

    def __init__(self, steps: list[tuple[Step, list[int]]], n_made: int, outputs: list, several: bool):
        self.steps, self.made, self.outputs, self.several = steps, [None] * n_made, outputs, several

    def run(self, tensors: list[torch.Tensor]) -> Any:
        index = tensors[0].get_device()
        if index < 0:
            return self._run(tensors, None)
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):  # never set_device: the caller's current device stays as it is
                return self._run(tensors, direct.stream(index))
        return self._run(tensors, direct.stream(index))

    def _run(self, tensors: list[torch.Tensor], stream: int | None) -> Any:
        slots: Slots = tensors + self.made
        for step, dead in self.steps:
            step(slots, stream)
            for slot in dead:
                slots[slot] = None
        found = [slots[slot] if view is None else strided(slots[slot], view) for slot, view in self.outputs]
        return tuple(found) if self.several else found[0]


_UNKNOWN, _TENSOR = object(), object()
# PyTorch's comparison of tensors with what was seen, in C++, which compiled programs are guarded by: a sixth of the
# time of a key. It knows types, devices, sizes and strides, and what the dispatcher looks at.
_TensorGuards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_RECENT = 4  # kinds of arguments that are told by it


class _Recent:
    """Arguments of one kind, to tell quickly whether others are of this kind."""

    def __init__(self, arguments: tuple, program: Program):
        self.program, self.count, self.precision = program, len(arguments), launch.float32_precision()
        self.tensors = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
        self.others = [i for i in range(self.count) if i not in self.tensors]
        self.values = [arguments[i] for i in self.others]
        tensors = [arguments[i] for i in self.tensors]
        self.alignments = [x.data_ptr() % 16 for x in tensors]
        self.guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def tensors_of(self, arguments: tuple) -> list[torch.Tensor] | None:
        """The tensors of arguments that are of this kind, else None."""
        if len(arguments) != self.count:
            return None
        tensors = [arguments[i] for i in self.tensors]
        same = (
            self.guards.check(*tensors)
            and [x.data_ptr() % 16 for x in tensors] == self.alignments
            and [arguments[i] for i in self.others] == self.values
            and launch.float32_precision() == self.precision
        )
        return tensors if same else None


class Repeated:
    """A host function that is repeated from notes. Called with the same positional arguments.

    Attributes:
        function: the host function. programs: by the kind of arguments; None where it always runs as written.
    """

    everywhere: "weakref.WeakSet[Repeated]" = weakref.WeakSet()

    def __init__(self, function: Callable):
        self.function = function
        self.programs: dict[tuple, Program | None] = {}
        self.recent: tuple[_Recent, ...] = ()
        self.everywhere.add(self)

    def __call__(self, *arguments: Any) -> Any:
        if launch.current.notes is not None or launch._recording is not None:  # part of a larger one; nothing is run
            return self.function(*arguments)
        for recent in self.recent:
            if (found := recent.tensors_of(arguments)) is not None:
                return recent.program.run(found)
        return self._by_key(arguments)

    def _by_key(self, arguments: tuple) -> Any:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        # Of tensors, all that host functions and Triton's specialisation look at.
        layouts = [(x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.get_device()) for x in tensors]
        others = [_TENSOR if isinstance(x, torch.Tensor) else tuple(x) if isinstance(x, list) else x for x in arguments]
        key = (*layouts, *others, launch.float32_precision())
        program = self.programs.get(key, _UNKNOWN)
        if program is _UNKNOWN:
            return self._first(key, tensors, arguments)
        if program is None:
            return self.function(*arguments)
        if _TensorGuards is not None:
            self.recent = (_Recent(arguments, program), *self.recent[: _RECENT - 1])
        return program.run(tensors)

    def _first(self, key: tuple, tensors: list[torch.Tensor], arguments: tuple) -> Any:
        """As written, with notes."""
        program, notes = None, Notes(tensors)
        try:
            launch.current.notes = notes
            result = self.function(*arguments)
            program = notes.program(result)
        except Ambiguous:
            launch.current.notes = None
            result = self.function(*arguments)
        finally:
            launch.current.notes = None
        if len(self.programs) >= MAX_PROGRAMS:
            self.forget()
        self.programs[key] = program
        return result

    def forget(self) -> None:
        """Drops all programs."""
        self.programs.clear()
        self.recent = ()


def forget() -> None:
    """Drops all programs: for tests and tools that put something else in place of what host functions look at."""
    for one in Repeated.everywhere:
        one.forget()
