"""Where the time of a forward pass goes: named regions of a model, and counted work of every operator.

Operations are those of matrix products, as in bench/shapes.py. Bytes are those of all tensors that an operator reads
and writes, each once: what has to move if nothing stays in a cache between operators.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from bench.shapes import Work
from segmenter.layers import Block, PatchEmbed
from segmenter.ops import Operators

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


class Regions:
    """Named parts of a forward pass, opened as annotations of a profiler. Results are the same with them and without.

    Args:
        scope: makes the context manager of a name: `torch.profiler.record_function`, `triton.profiler.scope`.
    """

    def __init__(self, scope: Callable[[str], Any] = torch.profiler.record_function):
        self.names: set[str] = set()  # all that were opened
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
    closed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Block | PatchEmbed))
    silent = (nn.ModuleList, nn.Dropout, nn.Identity)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and not name.startswith(closed) and not name.endswith("mask_norm") and not isinstance(module, silent)
    ]


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
        self.found, self._where = {}, where

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
