"""Where the time of a forward pass goes: named regions of a model, and counted work of every operator.

Operations are those of matrix products, as in bench/shapes.py. Bytes are those of all tensors that an operator reads
and writes, each once: what has to move if nothing stays in a cache between operators.
"""

import contextlib
import math
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
    """Named parts of a forward pass, annotations of torch.profiler. Results are the same with them and without."""

    def __init__(self) -> None:
        self.names: set[str] = set()  # all that were opened
        self._open: list[torch.profiler.record_function] = []

    @property
    def current(self) -> str:
        """The innermost open region; "" outside of all."""
        return self._open[-1].name if self._open else ""

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """The region `name` while inside; as a decorator, of every call of a function."""
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
        with contextlib.ExitStack() as undo:
            for name, module in _hookable(model):
                undo.callback(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)).remove)
                # always_call: also if the layer raises, for instance because memory is used up
                undo.callback(module.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)
            for name, module in model.named_modules():
                if hasattr(module, "ops"):
                    undo.callback(setattr, module, "ops", module.ops)
                    module.ops = self._named(module.ops.on(parameter), name)
            yield

    def _named(self, ops: Operators, holder: str) -> Operators:
        """`ops` whose calls are regions of the module `holder`."""

        def name_of(part: str) -> str:  # an Attention called by itself is "...attn" already
            return holder if holder.rpartition(".")[2] == part else f"{holder}.{part}".lstrip(".")

        return ops._replace(**{op: self.region(name_of(part))(getattr(ops, op)) for op, part in PARTS.items()})

    def _enter(self, name: str) -> None:
        self.names.add(name)
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def _leave(self) -> None:
        self._open.pop().__exit__(None, None, None)


def _hookable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hooks may name: blocks, and what is neither inside a block nor read by a fused operator."""
    named = dict(model.named_modules())
    closed = tuple(f"{name}." for name, module in named.items() if isinstance(module, Block | PatchEmbed))
    silent = (nn.ModuleList, nn.Dropout, nn.Identity)
    open_ = [name for name in named if name and not name.startswith(closed) and not name.endswith("mask_norm")]
    return [(name, named[name]) for name in open_ if not isinstance(named[name], silent)]


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

    `where` tells the region of a call. `found`: (region, operator as profilers call it, "aten::mm") -> its calls and
    work; views are in it, without work. Under `torch.no_grad`, not `torch.inference_mode`: there, composite operators
    would arrive whole.
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
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
    schema, name = func._schema, func._schema.name.rpartition("::")[2]
    returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if returns_view or name in _NOTHING_MOVES or name.startswith(("empty", "new_empty")):
        return Work(flops, 0)
    if name in _GATHERS:
        return Work(flops, 2 * _bytes(out) + _bytes(args[1:]))
    only_written = {a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write}
    read = [args[1:] if name in _OVERWRITES else args, *(v for key, v in kwargs.items() if key not in only_written)]
    return Work(flops, _bytes(read) + _bytes(out))


def _bytes(values: Any) -> int:
    """Bytes that lie behind tensors; what is expanded lies there once."""
    found = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.numel()]
    sides = lambda x: (side for side, stride in zip(x.shape, x.stride(), strict=True) if stride)  # noqa: E731
    return sum(x.element_size() * math.prod(sides(x)) for x in found)
