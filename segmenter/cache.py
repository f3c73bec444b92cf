"""What follows from parameters alone and is computed once for many calls: resampled positions, folded weights."""

import contextlib
import contextvars
import functools
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Seen(NamedTuple):
    """A tensor as it was when something was computed from it."""

    tensor: weakref.ref
    storage: torch.Tensor  # shares its memory: while this lives, no other tensor can come to lie at the same address
    version: int

    def unchanged(self, tensor: torch.Tensor) -> bool:
        old = self.storage
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and (old.data_ptr(), old.dtype, old.device) == (tensor.data_ptr(), tensor.dtype, tensor.device)
            and (old.shape, old.stride()) == (tensor.shape, tensor.stride())
        )


class Cache:
    """A few results, each with the tensors it was computed from; none is ever given for tensors that have changed.

    Changed means: another tensor, other memory (`.to()`, `.half()`, `p.data = ...`) or written to since, which PyTorch
    counts in `_version` (`copy_`, `load_state_dict`, most optimisers). Fused optimisers write without counting: so the
    step of any optimiser empties the cache, and so does a call that records gradients. Nobody sees writes
    through `p.data` or a NumPy view, as in `p.data.mul_(2)`, or those of a replayed CUDA graph: call `clear()` after
    them. (A module that is switched to training or evaluation should call it as well.)

    Nothing is cached where that could be wrong or keep a graph alive: of parameters with gradients (they are about
    to be changed), within torch.compile, torch.export and transforms of torch.func, while a CUDA graph is captured (its
    replay has to follow the weights), and of parameters made under inference_mode, which have no version.

    Copies and pickles of it are empty. Several threads may compute the same thing twice.

    Args:
        limit: results kept; the one not used for longest goes first.
    Attributes:
        cleared: how often `clear` was called.
    """

    def __init__(self, limit: int = 16):
        self.limit, self.cleared = limit, 0
        self._lock = threading.Lock()
        self._results: OrderedDict[Hashable, tuple[tuple[_Seen, ...], Any]] = OrderedDict()

    def __call__(self, key: Hashable, tensors: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave in an earlier call with this key and these tensors.

        Args:
            key: all that the result depends on besides the tensors, but for autocast and the stream.
            tensors: what it is computed from. make: gives a tensor, or a tuple of them.
        """
        if not _may_cache(tensors):
            return make()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self.clear()
            return make()
        key = (key, *_surroundings(tensors[0]))
        with self._lock:
            seen, result = self._results.get(key, ((), None))
            if seen and len(seen) == len(tensors) and all(map(_Seen.unchanged, seen, tensors)):
                self._results.move_to_end(key)
                return _hand_out(result)
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return _hand_out(make())  # in the graph's memory, which holds it only once the graph has run
        # Not as a tensor of inference mode, which could not be used where gradients are recorded.
        with torch.inference_mode(False), torch.no_grad():
            seen = tuple(_Seen(weakref.ref(t), t.detach(), t._version) for t in tensors)
            result = make()
        results = result if isinstance(result, tuple) else (result,)
        if all(type(t) is torch.Tensor for t in results):  # not the stand-ins of tracing
            with self._lock:
                self._drop_outdated()
                self._results[key] = (seen, result)
                while len(self._results) > self.limit:
                    self._results.popitem(last=False)
        return _hand_out(result)

    def clear(self) -> None:
        """Empties it."""
        with self._lock:
            self._results.clear()
            self.cleared += 1

    def __len__(self) -> int:
        return len(self._results)

    def __deepcopy__(self, memo: dict) -> "Cache":
        return Cache(self.limit)

    def __reduce__(self) -> tuple:
        return Cache, (self.limit,)

    def _drop_outdated(self) -> None:
        """Drops what belongs to tensors that are gone or have changed, so that old weights are not kept in memory."""
        for key, (seen, _) in list(self._results.items()):
            if not all((t := s.tensor()) is not None and s.unchanged(t) for s in seen):
                del self._results[key]


_held: contextvars.ContextVar[list | None] = contextvars.ContextVar("held", default=None)


@contextlib.contextmanager
def holding_results() -> Iterator[list[Any]]:
    """Within it what is cached is used while a CUDA graph is captured too; all that is used is put into the list.

    For who holds the list as long as the graph, and captures it anew when parameters change.
    """
    token = _held.set([])
    try:
        yield _held.get()
    finally:
        _held.reset(token)


def _may_cache(tensors: Sequence[torch.Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    for t in tensors:
        if type(t) not in (nn.Parameter, torch.Tensor) or t.is_inference() or not t.is_leaf or t.grad is not None:
            return False
    return _held.get() is not None or not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _surroundings(tensor: torch.Tensor) -> tuple:
    """What else a result depends on: autocast; the stream that computes it, on which others would have to wait; and the
    steps of optimisers so far."""
    kind = tensor.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
    return autocast, stream, optimiser_steps()


def _hand_out(result: Any) -> Any:
    held = _held.get()
    if held is not None:
        held.append(result)
    return result


def optimiser_steps() -> int:
    """How many steps optimisers have made in this process since the first call. Fused ones write without counting."""
    return _steps()[0]


@functools.cache
def _steps() -> list[int]:
    """How many steps optimisers have made in this process since the first call, as one number in a list."""
    count, numbers = [0], itertools.count(1)

    def step(*args: Any) -> None:
        count[0] = next(numbers)

    register_optimizer_step_post_hook(step)
    return count
