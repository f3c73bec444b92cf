"""What was found out about a module when it was accelerated, and has to hold still at every call.

A fused operator reads the parameters of layers in place of calling them. That is right only as long as each of them is
what it was when it was looked at: of the same class, with the same children and flags, without hooks, with ordinary
weights. Layers get replaced (LoRA, quantisation), hooked and switched later, so a call asks again (`unlike_before`,
through `segmenter.guard.decision`).
"""

import functools
from types import BuiltinFunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.guard import (
    DECISION,
    OF_EVERY_MODULE,
    PLAIN_TENSORS,
    attributes_of,
    hooks_of_all,
    is_fake,
    qualified,
    replaced,
    why_not_bypass,
)

Path = tuple[str, ...]  # names of children, from the accelerated module down

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_WITHOUT_FLAGS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)  # what these do is in parameters, eps and rates
OURS = ("_segmenter", "_segmenter_declined", DECISION)  # attributes of accelerated modules
RATES = (  # of nn.Dropout; of everybody's stochastic depth; of attention probabilities, twice
    "p", "drop_prob", "dropout", "attention_dropout",
)  # fmt: skip


class Unlike(Exception):
    """The module is not of the structure looked for. The message says what is in the way."""


class Held(NamedTuple):
    """An object that a layer holds and that holds nothing but plain values, such as a configuration, and these."""

    holder: Any
    values: dict[str, Any]

    def change(self, name: str, now: Any) -> str | None:
        """How it differs by now, in words."""
        if now is not self.holder:
            return f"another {name}"
        values = vars(now)
        changed = (n for n in {**self.values, **values} if values.get(n, self) is not self.values.get(n, self))
        return next((f"another {name}.{n} than before" for n in changed if values.get(n) != self.values.get(n)), None)


class Layer(NamedTuple):
    """One layer that is read, or passed over, instead of being called.

    Attributes:
        path: where it is. kind: its class. children: the names of its children.
        flags: its plain attributes, and objects of these as `Held`.
        rate: the name of the attribute that drops something in training.
    """

    path: Path
    kind: type
    children: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    rate: str | None


Layers = tuple[Layer, ...]


def original_class(cls: type) -> type:
    """The class that an accelerated one was made from; any other class itself."""
    return cls.__dict__.get("_segmenter_original", cls)  # not inherited: others may have made a subclass since


def find(root: nn.Module, path: Path) -> nn.Module | None:
    """The descendant at `path`, or None."""
    module: nn.Module | None = root
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def record(root: nn.Module, path: Path, parameters: tuple[str, ...] = (), children: tuple[str, ...] = ()) -> Layer:
    """Notes down what the layer at `path` is.

    Args:
        parameters: the only ones that it may hold itself. children: the only ones that it may have.
    Raises:
        Unlike: it holds anything else, or something whose effect cannot be told from outside.
    """
    layer, name = find(root, path), ".".join(path) or "it"
    if layer is None:
        raise Unlike(f"{name} is missing")
    state = layer.__dict__
    held = {n for kind in ("_parameters", "_buffers") for n, tensor in state[kind].items() if tensor is not None}
    if extra := sorted(held - set(parameters)):
        raise Unlike(f"{name} ({_class(layer)}) holds {', '.join(extra)}")
    if extra := sorted({n for n, child in layer._modules.items() if child is not None} - set(children)):
        raise Unlike(f"{name} ({_class(layer)}) has a layer {', '.join(extra)}")
    if (reason := why_not_bypass(layer, (type(layer),), True)) not in (None, "hooks"):  # hooks come and go
        raise Unlike(f"{name} has {reason}")
    kind = original_class(type(layer))
    replaced(kind)  # notes down its forward
    attributes = {n: value for n, value in state.items() if n not in OF_EVERY_MODULE and n not in OURS}
    for attribute, value in attributes.items():
        if not (_is_plain(value) or _is_function(value) or _is_data(value)):
            raise Unlike(f"{name} ({_class(layer)}) holds {attribute}, a {qualified(type(value))}")
    rate = next((n for n in RATES if isinstance(attributes.get(n), (int, float))), None)
    noted = {
        n: Held(v, dict(vars(v))) if attributes_of(v) is not None else _comparable(v) for n, v in attributes.items()
    }
    flags = () if kind in _WITHOUT_FLAGS else tuple((n, v) for n, v in noted.items() if n != rate)
    return Layer(path, kind, tuple(layer._modules), flags, rate)


def record_linear(root: nn.Module, path: Path, bias: bool = False, masked: bool = False) -> Layer:
    """`record` of a linear layer, with a bias if `bias`. Subclasses that add nothing may pass: `verify` tries them.

    Args:
        masked: it may hold a buffer of the shape of its bias, which the bias is multiplied by.
    Raises:
        Unlike: it is another kind of layer, such as an adapter around a linear layer.
    """
    return _record_kind(root, path, nn.Linear, bias, mask_of_bias(find(root, path)) if masked else ())


def mask_of_bias(layer: nn.Module | None) -> tuple[str, ...]:
    """The name of what a linear layer's bias may be multiplied by, if there is one such buffer, else ()."""
    held = () if layer is None else tuple(name for name, buffer in layer._buffers.items() if buffer is not None)
    bias = None if layer is None else layer._parameters.get("bias")
    return held if len(held) == 1 and bias is not None and layer._buffers[held[0]].shape == bias.shape else ()


def record_norm(root: nn.Module, path: Path) -> Layer:
    """`record` of a LayerNorm over the last dimension with weight and bias."""
    return _record_kind(root, path, nn.LayerNorm, True)


def _record_kind(root: nn.Module, path: Path, kind: type, bias: bool, buffers: tuple[str, ...] = ()) -> Layer:
    layer, name = find(root, path), ".".join(path)
    if layer is None:
        raise Unlike(f"{name} is missing")
    if not isinstance(layer, kind):
        raise Unlike(f"{name} is {_class(layer)}, not {qualified(kind)}")
    recorded = record(root, path, ("weight", "bias", *buffers))
    needed = ("weight", "bias") if bias else ("weight",)
    if absent := [n for n in needed if layer._parameters.get(n) is None]:  # a parametrised weight is not there either
        raise Unlike(f"{name} has no parameter {', '.join(absent)}")
    return recorded


def unlike_before(root: nn.Module, layers: Layers, dtype: torch.dtype | None = None) -> str | None:
    """Why layers that were recorded have to be called at the moment, or None if they need not be.

    Args:
        dtype: what all parameters must have; None if that does not matter.
    """
    if hooks_of_all():
        return "hooks on all modules"
    for cls in (original_class(type(root)), *(layer.kind for layer in layers)):
        if reason := replaced(cls):
            return reason
    return next((reason for layer in layers if (reason := _unlike_before(root, layer, dtype))), None)


def _unlike_before(root: nn.Module, noted: Layer, dtype: torch.dtype | None) -> str | None:
    layer, name = find(root, noted.path), ".".join(noted.path)
    if layer is None:
        return f"{name} is gone"
    if reason := _changed(layer, noted):
        return reason
    if layer is not root and (reason := why_not_bypass(layer, (type(layer),), True)):  # the root's own hooks run anyway
        return f"{name} has {reason}"
    if noted.rate is not None and layer.__dict__.get(noted.rate) and (root.training or layer.training):
        return f"{name} drops at random in training"
    for parameter in (p for p in layer._parameters.values() if p is not None):
        if layer is root and type(parameter) not in PLAIN_TENSORS and not is_fake(parameter):
            return f"it has weights of type {qualified(type(parameter))}"
        if dtype is not None and parameter.dtype != dtype:
            return f"{name or 'it'} is {_name(parameter.dtype)}, the input {_name(dtype)}"
    return None


def _changed(layer: nn.Module, noted: Layer) -> str | None:
    """How class, children or flags differ from what was noted."""
    name, state = ".".join(noted.path) or "it", layer.__dict__
    if original_class(type(layer)) is not noted.kind:
        if not noted.path:  # a subclass of the accelerated class, with the same forward
            return None
        return f"{name} is {_class(layer)}, it was {qualified(noted.kind)}"
    if tuple(state["_modules"]) != noted.children:
        return f"{name} has other layers than before"
    for flag, value in noted.flags:
        if isinstance(value, Held):
            if change := value.change(flag, state.get(flag)):
                return f"{name} has {change}"
        elif _comparable(state.get(flag)) != value:
            return f"{name} has {flag}={state.get(flag)!r}, it was {value!r}"
    return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(_is_plain(v) for v in value))


def _is_function(value: Any) -> bool:
    """Whether it is a function written in C, perhaps with plain arguments by name: a method of an object holds more."""
    if isinstance(value, functools.partial):
        return not value.args and all(map(_is_plain, value.keywords.values())) and _is_function(value.func)
    return isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType)


def _comparable(value: Any) -> Any:
    """The value, or of a function with arguments both, since two such are never equal."""
    return (value.func, value.keywords) if isinstance(value, functools.partial) else value


def _is_data(value: Any, depth: int = 4) -> bool:
    """Whether an object holds nothing but plain values, collections of these, and such objects."""
    found = attributes_of(value)
    return found is not None and depth > 0 and all(_is_plain_or_collected(v, depth - 1) for v in found.values())


def _is_plain_or_collected(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth > 0 and all(_is_plain_or_collected(v, depth - 1) for v in value)
    return _is_plain(value) or _is_data(value, depth)


def _class(module: nn.Module) -> str:
    return qualified(original_class(type(module)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
