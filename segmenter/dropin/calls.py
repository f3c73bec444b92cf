"""What the modules of a model are called with besides tokens.

Kernels run for calls with tokens alone, or with rotary positions of a known form. Whether a model calls its blocks so,
or with relative positions or a mask each time, shows in a call of it (`observed`). Without one, only signatures tell: a
module whose forward has further arguments is taken to get them (`expected`).
"""

import inspect
import itertools
import re
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.dropin.guard import original_class

_WISHES = re.compile("mask|causal|return|need|output|identity")  # what models by default do not pass

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
ANY = "**"  # stands for all names that a forward does not have


class Call(NamedTuple):
    """How a module is called.

    Attributes:
        arguments: what it gets besides tokens. sure: it has been seen, not inferred.
        tokens: the first argument is a tensor of (B, N, d).
    """

    arguments: tuple[str, ...]
    sure: bool
    tokens: bool = True


def optional(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments after the first that the original forward of a module can do without."""
    return tuple(p.name for p in _further(module) if p.kind in _NAMED and p.default is not inspect.Parameter.empty)


def required(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments after the first that it cannot do without."""
    return tuple(p.name for p in _further(module) if p.kind in _NAMED and p.default is inspect.Parameter.empty)


def further(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments after the first, in order; ANY at the end if it takes whatever else by name."""
    return tuple(ANY if p.kind is p.VAR_KEYWORD else p.name for p in _further(module) if p.kind is not p.VAR_POSITIONAL)


def _further(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(original_class(type(module)).forward).parameters.values())[2:]


def is_wish(name: str) -> bool:
    """Whether an argument of this name is one that models by default do not pass."""
    return _WISHES.search(name) is not None


def expected(module: nn.Module, parents: list[nn.Module]) -> Call:
    """What a module has to be taken to be called with.

    Args:
        parents: the modules that hold it, the model first. Without any the caller is who accelerates it.
    """
    names = [name for name in optional(module) if parents and not is_wish(name)]
    names += [name for name in optional(module) if is_wish(name) and any(_grants(p, name) for p in parents)]
    return Call(tuple(names), sure=False)


def _grants(parent: nn.Module, wish: str) -> bool:
    """Whether a module holds what would be given for a wish: a mask, or a switch for causal attention."""
    if "mask" in wish:
        held = {**parent.__dict__, **parent._buffers}
        return any("mask" in name and isinstance(value, torch.Tensor) for name, value in held.items())
    return "causal" in wish and any("causal" in name and value is True for name, value in parent.__dict__.items())


def observed(model: nn.Module, example: Any, modules: list[nn.Module]) -> dict[nn.Module, Call]:
    """Calls the model once, in evaluation mode and without gradients, and tells how it called those modules.

    Args:
        example: the model's input, or a tuple of its arguments.
    """
    seen: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = given(module, args, kwargs)
        x, *_ = (*args, *kwargs.values(), None)
        before = seen.get(module, Call((), True))
        names = dict.fromkeys((*before.arguments, *found))
        seen[module] = Call(tuple(names), True, before.tokens and isinstance(x, torch.Tensor) and x.ndim == 3)

    devices = sorted({t.get_device() for t in itertools.chain(model.parameters(), model.buffers()) if t.is_cuda})
    training = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):  # by itself it would wake up every GPU
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return seen


def asks(value: Any) -> bool:
    """Whether an argument of this value asks for something."""
    return value is not None and value is not False


def given(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments after the first by name, without those that ask for nothing."""
    try:
        bound = inspect.signature(original_class(type(module)).forward).bind(module, *args, **kwargs).arguments
    except TypeError:  # a decorated forward that takes more than its signature says
        bound = {"self": module, **{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    (_, _), (_, x), *rest = bound.items()
    flat = {}
    for name, value in rest:
        flat.update(value if isinstance(value, dict) else {name: value})
    return {n: v for n, v in flat.items() if asks(v) and v is not x and n != "identity" and v != ()}
