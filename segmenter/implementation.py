"""The one switch between eager PyTorch and the Triton kernels.

It is an argument (`impl`), decided when a module is constructed and visible as `model.impl`; no environment variable.
"""

from collections.abc import Callable
from typing import NamedTuple

from segmenter.kernels import reference

IMPLEMENTATIONS = ("auto", "eager", "triton")
_NO_TRITON = "this version has no Triton kernels yet"


class Operators(NamedTuple):
    """The operations that have more than one implementation; signatures as in `segmenter.kernels.reference`."""

    name: str
    attention: Callable
    layernorm_mlp: Callable
    mask_head: Callable


EAGER = Operators("eager", reference.attention, reference.layernorm_mlp, reference.mask_head)


class ImplementationError(RuntimeError):
    """The implementation asked for cannot run here."""


def select(impl: str = "auto") -> Operators:
    """The operators that `impl` stands for.

    Args:
        impl: "eager" (plain PyTorch, any device), "triton" (our GPU kernels), or "auto" (Triton where it can run).
    Raises:
        ValueError: an unknown name.
        ImplementationError: "triton" was asked for and cannot run; the message says why and what to do.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise ImplementationError(f'impl="triton": {_NO_TRITON}; use impl="eager" or impl="auto"')
    return EAGER


def explain(impl: str = "auto") -> tuple[str, str]:
    """(name of what would run for `impl`, the reason), for `segmenter info`."""
    try:
        operators = select(impl)
    except ImplementationError as error:
        return "none", str(error)
    return operators.name, _NO_TRITON if impl == "auto" else "asked for"
