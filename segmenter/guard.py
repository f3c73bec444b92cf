"""May a fused operator read a layer's parameters instead of calling the layer? The one place where that is asked.

Only if the layer does nothing but what its type says. A LoRA layer still has the `weight` of the layer that it wraps,
and a quantised one may have a null pointer for it: reading either would be silently wrong. And only as long as nobody
listens in or has put something else in the place of what would be called: hooks of one module or of all, methods
replaced on a class, functions replaced in torch.

`why_not_bypass` asks it of one layer. A block asks it of all its layers in its method `decide`, and calls that through
`decision`, which asks again only if something has changed that the answer can depend on.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack

PLAIN_TENSORS = (nn.Parameter, torch.Tensor)
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
DECISION = "_segmenter_decision"  # where `decision` keeps its answer in a module
_FORWARD, _PRE = _module._global_forward_hooks, _module._global_forward_pre_hooks
_BACKWARD, _BACKWARD_PRE = _module._global_backward_hooks, _module._global_backward_pre_hooks


def decision(module: nn.Module, x: torch.Tensor) -> Any:
    """`module.decide(x)`, asked again only if something has changed that the answer may depend on.

    That is: whatever is in the dictionaries of the module and of all modules below it (layers, hooks, flags, modes) and
    of objects in them (configurations), classes and their methods, types and shapes of parameters; type and device of
    x; autocast and transforms of torch.func; what is replaced in torch and hooks on all modules. `decide` may look at
    nothing else.
    """
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):  # traced: the compiler itself watches
        return module.decide(x)
    seen = module.__dict__.setdefault(DECISION, None)
    if seen is None or not seen.holds_for(module, x):
        seen = _Decision(module, x)  # looks first: what changes while the answer is found shows in the next call
        seen.answer = module.decide(x)
        module.__dict__[DECISION] = seen
    return seen.answer


class _Decision:
    """An answer of `decide` with all that it may depend on, and nothing that would keep memory from being freed.

    Copies and pickles of it hold for nothing.
    """

    answer: Any = None
    state: list | None = None
    classes = names = held = ()

    def __init__(self, root: nn.Module, x: torch.Tensor):
        modules: list[nn.Module | None] = [root]
        for module in modules:  # grows
            modules += () if module is None else module._modules.values()
        bases = dict.fromkeys(base for module in modules for base in type(module).__mro__)
        self.classes = [cls for cls in bases if issubclass(cls, nn.Module)]
        ours = {*OF_EVERY_MODULE, DECISION}
        self.names = [[name for name in getattr(module, "__dict__", ()) if name not in ours] for module in modules]
        self.state, self.values = self._look(root)
        self.held = list({id(found): found for value in self.values if (found := attributes_of(value))}.values())
        self.contents = self._contents()
        if any(isinstance(value, torch.Tensor) for value in self.values):  # somebody's results: not to be kept
            self.state, self.values = [object()], []
        self.around = _around(x)

    def holds_for(self, root: nn.Module, x: torch.Tensor) -> bool:
        """Whether nothing has changed. Written for speed: it runs at every call of a block."""
        state, values = self._look(root)
        return (
            state == self.state
            and all(map(operator.is_, values, self.values))
            and (not self.held or self._contents() == self.contents)
            and _around(x) == self.around
        )

    def _contents(self) -> list:
        """What objects held by the modules hold, such as configurations."""
        return [{n: v if type(v) in _VALUES else id(v) for n, v in found.items()} for found in self.held]

    def _look(self, root: nn.Module) -> tuple[list, list]:
        """(what to compare by ==, attributes to compare by `is`) of the modules as they are now.

        An object() in the first equals nothing, so that no answer holds.
        """
        state, values, modules, parameters = [], [], [root], []
        try:
            state += map(_METHODS, self.classes)
            for module, names in zip(modules, self.names, strict=False):  # `modules` grows
                if module is None:
                    continue
                held = module.__dict__
                hooked = (
                    held["_forward_hooks"]
                    or held["_forward_pre_hooks"]
                    or held["_backward_hooks"]
                    or held["_backward_pre_hooks"]
                )
                state += type(module), len(held), held["training"], bool(hooked)
                if children := held["_modules"]:
                    state += children
                    modules += children.values()
                if tensors := held["_parameters"]:
                    parameters += tensors.values()
                if names:
                    values += map(held.__getitem__, names)
        except (AttributeError, KeyError):  # an attribute is gone, or never was there, as in modules of torch.jit
            return [object()], []
        kinds = list(map(type, parameters))
        if not _PLAIN_OR_NONE.issuperset(kinds):
            return [object()], []
        state += kinds
        state += map(_TYPE_AND_SHAPE, parameters if _NONE not in kinds else [p for p in parameters if p is not None])
        return state, values

    def __getstate__(self) -> dict:
        return {}


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that only holds something, as configurations do; None of anything else."""
    found = getattr(value, "__dict__", None)
    holds = isinstance(found, dict) and not callable(value) and not isinstance(value, (type, torch.Tensor))
    return found if holds else None


_NONE = type(None)
_VALUES = frozenset((bool, int, float, str, _NONE))
_PLAIN_OR_NONE = frozenset((*PLAIN_TENSORS, _NONE))
_TYPE_AND_SHAPE = operator.attrgetter("dtype", "shape")
_METHODS = operator.attrgetter("forward", "__call__", "_call_impl")


def _around(x: torch.Tensor) -> tuple:
    """What an answer depends on besides the module."""
    device = x.device
    kind = device.type if device.type in ("cpu", "cuda") else "cpu"  # no kernels elsewhere, whatever autocast is
    return (
        type(x),
        x.dtype,
        device,
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.autograd.forward_ad._current_level,
        torch._C._functorch.maybe_current_level(),
        hooks_of_all(),
        altered(),
    )


def why_not_bypass(module: nn.Module, kinds: tuple[type, ...], approximate: bool = False) -> str | None:
    """Why `module` has to be called, or None if its parameters may be read in its place.

    Args:
        kinds: the exact types that it may have. Subclasses are out. approximate: it may be the GELU by tanh.
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
    if reason := replaced(cls):  # asked of every layer: torch.compile may trace this twice, and has to find the same
        return reason
    if state["_modules"] and (reason := altered()):  # once for all: layers are asked about after what holds them
        return reason
    if cls is nn.GELU and state["approximate"] != "none" and not approximate:
        return "the approximate GELU"
    if cls is nn.LayerNorm and len(state["normalized_shape"]) != 1:
        return "a mean over several dimensions"
    for parameter in state["_parameters"].values():
        if parameter is not None and type(parameter) not in PLAIN_TENSORS and not is_fake(parameter):
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
