"""May a fused operator read a layer's parameters instead of calling the layer?

Only if the layer does nothing but what its type says. A LoRA layer still has the `weight` of the layer that it wraps,
and a quantised one may have a null pointer for it: reading either would be silently wrong. And only as long as nobody
listens in or has put something else in the place of what would be called: hooks of one module or of all, methods
replaced on a class, functions replaced in torch.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack

_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)
_FORWARD, _PRE = _module._global_forward_hooks, _module._global_forward_pre_hooks
_BACKWARD, _BACKWARD_PRE = _module._global_backward_hooks, _module._global_backward_pre_hooks


def why_not_bypass(module: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """Why `module` has to be called, or None if its parameters may be read in its place.

    Args:
        kinds: the exact types that it may have. Subclasses are out.
    """
    cls, state = type(module), module.__dict__
    if cls not in kinds:
        return f"{qualified(cls)} in place of {qualified(kinds[0])}"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or hooks_of_all()
    ):
        return "hooks"
    if "forward" in state or "_call_impl" in state:
        return "a replaced forward"
    if cls.forward is not METHODS.get(cls) and (reason := replaced(cls)):
        return reason
    if state["_modules"] and (reason := altered()):  # once for all: layers are asked about after what holds them
        return reason
    if cls is nn.GELU and state["approximate"] != "none":
        return "the approximate GELU"
    if cls is nn.LayerNorm and len(state["normalized_shape"]) != 1:
        return "a mean over several dimensions"
    for parameter in state["_parameters"].values():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS and not is_fake(parameter):
            return f"weights of type {qualified(type(parameter))}"
    return None


def hooks_of_all() -> bool:
    """Whether there are hooks on all modules (torch.nn.modules.module.register_module_forward_hook and the like).

    Those of PyTorch itself do not count: its FLOP counter and its module tracker only note where a call comes from.
    """
    if not (_FORWARD or _PRE or _BACKWARD or _BACKWARD_PRE):
        return False
    hooks = (hook for kind in (_FORWARD, _PRE, _BACKWARD, _BACKWARD_PRE) for hook in kind.values())
    return not all((getattr(hook, "__module__", None) or "").startswith("torch.") for hook in hooks)


def qualified(cls: type) -> str:
    """Name of a class with its module."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a stand-in of torch.export or torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


# ---------------------------------------------------------------------------------------------------------------------
# What is replaced on classes and in torch


def replaced(cls: type) -> str | None:
    """Whether a class runs something else when it is called than when first seen, in words. Classes of PyTorch and of
    this project are not decorated, so there it is what the class statement wrote that counts."""
    if cls not in METHODS:
        owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
        known = owner.__module__.startswith(("torch.nn.modules.", "segmenter."))
        written = getattr(cls.forward, "__qualname__", "") == f"{owner.__qualname__}.forward"
        METHODS[cls] = cls.forward if written or not known else None
    if cls.forward is not METHODS[cls]:
        return f"a forward replaced on its class {qualified(cls)}"
    if cls.__call__ is not nn.Module.__call__ or cls._call_impl is not nn.Module._call_impl:
        return f"a __call__ replaced on its class {qualified(cls)}"
    return None


METHODS: dict[type, Callable | None] = {}  # class -> its forward when it was first seen
for _cls in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential, nn.MultiheadAttention):
    replaced(_cls)


_PLACES = (  # of what layers call, and every layer is called through
    (nn.Module, ("__call__", "_call_impl")),
    *((cls, ("__call__", "_call_impl")) for cls in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout)),
    (
        F,
        (
            "linear", "layer_norm", "gelu", "dropout", "softmax", "normalize", "scaled_dot_product_attention",
            "multi_head_attention_forward",
        ),
    ),
    (torch, ("softmax", "matmul", "layer_norm")),
    (torch.Tensor, ("softmax", "__matmul__")),
)  # fmt: skip
_GETTERS = tuple((owner, operator.attrgetter(*names)) for owner, names in _PLACES)


def _called() -> list[tuple[Callable, ...]]:
    return [get(owner) for owner, get in _GETTERS]


def _as_written(name: str, function: Callable) -> Callable | None:
    """The function, or None if it was not PyTorch that gave it this name. What is built in has no globals."""
    by = getattr(function, "__globals__", {"__name__": "torch.nn"})["__name__"]
    name = "_wrapped_call_impl" if name == "__call__" else name
    return function if getattr(function, "__name__", None) == name and by.startswith("torch.nn") else None


_WRITTEN = [tuple(map(_as_written, names, found)) for (_, names), found in zip(_PLACES, _called(), strict=True)]


def altered() -> str | None:
    """What has been put in place of functions of PyTorch that the kernels stand for, or None.

    Functions replaced before or after this package was imported, other than by PyTorch itself as torch.export and
    torch.fx do for a while, and a TorchFunctionMode other than PyTorch's own such as `torch.device(...)`. (Modes below,
    as TorchDispatchMode, see the kernels as operators.)
    """
    now = _called()
    if now != _WRITTEN:
        for (owner, names), written, found in zip(_PLACES, _WRITTEN, now, strict=True):
            for name, old, new in zip(names, written, found, strict=True):
                by = getattr(new, "__globals__", {}).get("__name__", "")  # a decorator may have copied __module__
                if old is not new and (by.startswith("torch.nn.") or not by.startswith("torch.")):
                    return f"{owner.__name__}.{name}, which has been replaced"
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if not type(mode).__module__.startswith("torch."):
                return f"the TorchFunctionMode {qualified(type(mode))}"
    return None


# For torch.compile they are constants: what is compiled stays as it was compiled.
altered._dynamo_marked_constant = True
replaced._dynamo_marked_constant = True
