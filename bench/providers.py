"""The ways to compute one thing that are compared, by name, and why one of them cannot run here.

    eager          the published code's order of work in plain PyTorch: explicit score matrices
    sdpa-flash ... the same with `scaled_dot_product_attention` on the named backend; one row for each that runs here
    compile        torch.compile(max-autotune) of the scaled_dot_product_attention form
    triton         our kernels; in a training step with level 1 of `Segmenter.recompute`
    triton-0 ...   the same step with another level

For single operations compile uses "max-autotune-no-cudagraphs", because every provider's calls go into a CUDA graph of
ours anyway; its own graphs would copy the inputs first. Whole models get "max-autotune", graphs included.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmenter.kernels import reference
from segmenter.ops import EAGER, Operators, load_kernels, why_not_on

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PROVIDERS = ("eager", *BACKENDS, "compile", "triton")
LEVELS = {f"triton-{level}": level for level in (0, 2, 3)}
PUBLISHED = EAGER._replace(name="published", attention=reference.explicit_attention)
INTERPRETED = "Triton's interpreter, whose time says nothing"


class Unavailable(RuntimeError):
    """A provider cannot run here; the message says why."""


def with_backend(name: str, fn: Callable) -> Callable:
    """`fn` with scaled_dot_product_attention held to one backend."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(BACKENDS[name]):
            return fn(*args, **kwargs)

    return run


def attention(provider: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Attention of packed qkv, as `reference.attention`, by this provider ("compile" is not compiled yet)."""
    if provider == "eager":
        return reference.explicit_attention
    if provider == "triton":
        return load_kernels().attention
    return with_backend(provider, reference.attention) if provider in BACKENDS else reference.attention


def computing(provider: str) -> str:
    """Which provider computes: levels of a training step are by the kernels."""
    return "triton" if provider in LEVELS else provider


def operators(provider: str) -> Operators:
    """All operators of a model by this provider."""
    if computing(provider) == "triton":
        return load_kernels()
    return EAGER._replace(name=provider, attention=attention(provider))


def require(provider: str, device: torch.device, dtype: torch.dtype, timed: bool = True) -> None:
    """Raises Unavailable if the provider cannot run attention with heads of 64 here.

    Args:
        timed: the interpreter is not good enough.
    """
    if provider == "triton":
        reason = why_not_on(device.type, device.index)
        if device.type == "cpu" and timed:
            reason = reason or INTERPRETED
        if reason is not None:
            raise Unavailable(reason)
    elif provider in BACKENDS:
        qkv = torch.zeros(1, 16, 3 * 64, device=device, dtype=dtype)
        try:
            attention(provider)(qkv, 1)
        except RuntimeError as error:  # "No available kernel", or a backend that this build does not have
            reason = str(error).strip().splitlines()[0]
            raise Unavailable(f"scaled_dot_product_attention does not have it here: {reason}") from None


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """While inside, float32 is multiplied at this precision, whatever was set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def using(model: nn.Module, ops: Operators) -> Iterator[None]:
    """While inside, every part of `model` that has a choice computes with `ops`."""
    before = [(module, module.ops) for module in model.modules() if hasattr(module, "ops")]
    try:
        for module, _ in before:
            module.ops = ops
        yield
    finally:
        for module, old in before:
            module.ops = old
