"""The one switch between eager PyTorch and the Triton kernels.

It is an argument (`impl`), decided when a module is constructed and visible as `model.impl`; no environment variable.
"auto" looks at the tensors of each call instead: kernels on a capable GPU, eager PyTorch elsewhere.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.config import IMPLEMENTATIONS
from segmenter.guard import altered
from segmenter.kernels import reference, reference_maps, reference_queries, reference_rotary
from segmenter.kernels.configs import FLOATS

MIN_TRITON = (3, 6)  # the oldest that the kernels are tested with
MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


class Operators(NamedTuple):
    """The operations that have more than one implementation; signatures as in `segmenter.kernels.reference`.

    `pixels_to_tokens` has one parameter more, `cached`: see `kernels.pixels_to_tokens.normalized_pixels_to_tokens`.
    """

    name: str
    attention: Callable
    layernorm_linear: Callable
    linear: Callable
    layernorm_mlp: Callable
    mask_head: Callable
    pixels_to_tokens: Callable
    windows_argmax: Callable
    queries_argmax: Callable  # of `segmenter.kernels.reference_queries`
    # of `segmenter.kernels.reference_maps`: what attention is looked at by
    attention_rows: Callable
    attention_statistics: Callable
    attention_transposed: Callable
    layernorm: Callable
    cross_attention: Callable
    rotate: Callable  # of `segmenter.kernels.reference_rotary`
    # what kernels have besides, for the sake of gradients: half a block, and an MLP with its hidden layer
    attention_half: Callable | None = None
    layernorm_mlp_hidden: Callable | None = None

    def on(self, x: torch.Tensor) -> "Operators":
        """The operators for this input: these, whatever it is."""
        return self

    def compose(self, formula: Callable, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """`formula(self, x, *arguments)`: an operation that is made of operators, such as half a block."""
        return formula(self, x, *arguments)


class Kernels(Operators):
    """The kernels. `_replace` gives plain `Operators`, which call what they were given."""

    __slots__ = ()

    def compose(self, formula: Callable, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """As one operator, repeated from notes (kernels/repeat.py) past PyTorch's dispatcher, where nobody notices."""
        if unobserved(x):
            return (_COMPOSED.get(formula) or _composed(formula))(x, *arguments)
        return formula(self, x, *arguments)

    def _replace(self, **others: Any) -> Operators:
        return Operators(*self)._replace(**others)


class ImplementationError(RuntimeError):
    """The implementation asked for cannot run here."""


def _eager_pixels_to_tokens(*arguments: Any, cached: Callable | None = None) -> torch.Tensor:
    """The reference, which has no folded weights to keep from call to call."""
    return reference.pixels_to_tokens(*arguments)


EAGER = Operators(
    "eager",
    reference.attention,
    reference.layernorm_linear,
    reference.linear,
    reference.layernorm_mlp,
    reference.mask_head,
    _eager_pixels_to_tokens,
    reference.windows_argmax,  # labels are made by its equal without full-resolution logits: `inference.pruned_argmax`
    reference_queries.queries_argmax,
    reference_maps.attention_rows,
    reference_maps.attention_statistics,
    reference_maps.attention_transposed,
    reference.layernorm,
    reference.cross_attention,
    reference_rotary.rotate,
)


class Automatic:
    """Chooses the operators of a call by its input: kernels where they can run, eager PyTorch elsewhere.

    Args:
        name: for people.
        on_cpu: whether tensors on the CPU get the kernels when Triton's interpreter is on, which is slow.
    """

    __slots__ = ("name", "on_cpu")  # and no dictionary, which `guard.decision` would look through in every call

    def __init__(self, name: str, on_cpu: bool):
        self.name, self.on_cpu = name, on_cpu

    def on(self, x: torch.Tensor) -> Operators:
        """The operators for this input."""
        if (x.device.type == "cpu" and not self.on_cpu) or why_not_tensor(x) is not None:
            return EAGER
        return KERNELS[0]


AUTO = Automatic("auto", on_cpu=False)
KERNELS: list[Operators] = []  # the kernels, once loaded: a plain look-up, because torch.compile traces it
_COMPOSED: dict[Callable, Callable] = {}  # formula -> what runs it as one operator


def _composed(formula: Callable) -> Callable:
    from segmenter.kernels.operators import HOST_FUNCTIONS
    from segmenter.kernels.repeat import Repeated

    names = ("attention", "layernorm_linear", "linear", "layernorm_mlp", "layernorm", "cross_attention", "rotate")
    host = EAGER._replace(name="triton", **{name: HOST_FUNCTIONS[name] for name in names})
    return _COMPOSED.setdefault(formula, Repeated(functools.partial(formula, host)))


def unobserved(x: torch.Tensor) -> bool:
    """Whether calling an operator for x now does nothing but run its kernel.

    Gradients, autocast, modes, transforms of torch.func, tracing, compiling and profilers all work through PyTorch's
    dispatcher; tensors of other types, too.
    """
    return not torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu") and unobserved_but_for_autocast(x)


def unobserved_but_for_autocast(x: torch.Tensor) -> bool:
    """`unobserved`, whatever autocast is."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and not x.is_neg()  # its values have the other sign in memory
    )


def load_kernels() -> Operators:
    """The kernels. Imports them, and Triton, the first time."""
    if not KERNELS:
        from segmenter.kernels.attention import attention, cross_attention
        from segmenter.kernels.attention_half import attention_half
        from segmenter.kernels.attention_rows import attention_rows
        from segmenter.kernels.attention_statistics import attention_statistics
        from segmenter.kernels.attention_transposed import attention_transposed
        from segmenter.kernels.layernorm import layernorm
        from segmenter.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_hidden
        from segmenter.kernels.linear import layernorm_linear, linear
        from segmenter.kernels.mask_head import mask_head
        from segmenter.kernels.pixels_to_tokens import normalized_pixels_to_tokens
        from segmenter.kernels.queries_argmax import queries_argmax
        from segmenter.kernels.rotate import rotate
        from segmenter.kernels.upsample_argmax import windows_argmax

        KERNELS.append(
            Kernels(
                "triton",
                attention,
                layernorm_linear,
                linear,
                layernorm_mlp,
                mask_head,
                normalized_pixels_to_tokens,
                windows_argmax,
                queries_argmax,
                attention_rows,
                attention_statistics,
                attention_transposed,
                layernorm,
                cross_attention,
                rotate,
                attention_half,
                layernorm_mlp_hidden,
            )
        )
    return KERNELS[0]


def select(impl: str = "auto") -> Operators | Automatic:
    """What `impl` stands for: an object whose `on(x)` gives the operators for an input.

    Args:
        impl: "eager" (plain PyTorch, any device), "triton" (our GPU kernels), or "auto" (Triton where it can run).
    Raises:
        ValueError: an unknown name.
        ImplementationError: "triton" was asked for and cannot run; the message says why and what to do.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        reason = _why_no_kernels()
        if reason:
            raise ImplementationError(f'impl="triton": {reason}; use impl="eager" or impl="auto"')
        return load_kernels()
    return EAGER if impl == "eager" else AUTO


@functools.cache
def why_not_triton(device: int = 0) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None if they can."""
    reason = why_no_triton()
    if reason:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if not torch.version.hip and capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, the kernels need {needed}"
    return None


def explain(impl: str = "auto") -> tuple[str, str]:
    """(name of what would run for `impl` on this machine's GPU, or without one, the reason), for `segmenter info`."""
    if impl == "auto":
        reason = why_not_triton()
        return ("eager", reason) if reason else ("triton", "for tensors on the GPU, eager on the CPU")
    try:
        return select(impl).name, "asked for"
    except ImplementationError as error:
        return "none", str(error)


class OperatorModule(nn.Module):
    """A module of this project that calls operators.

    Attributes:
        ops: the operators. computes: what they compute in it, for people.
    """

    ops: Operators | Automatic
    computes = "all of it"

    def implementations(self, parameter: torch.Tensor) -> Iterator[tuple[str, str]]:
        """(part, what computes it) for `parts`; `parameter` is one of the model."""
        return iter(())

    def obstacles(self) -> list[str]:
        """Why some of it would not run by operators that kernels can stand for, now."""
        return []


def parts(model: nn.Module) -> dict[str, str]:
    """Which implementation each part of a model uses, for people: {"attention": "triton", ...}.

    A block whose layers hold something that fused operators would bypass (hooks, adapters, quantised weights) calls
    them one by one instead; it is counted with the reason.
    """
    parameter = next(model.parameters())
    names = ("pixels_to_tokens", "attention", "layernorm_linear", "layernorm_mlp", "mask_head", "windows_argmax")
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for module in model.modules():
        if isinstance(module, OperatorModule):
            for part, what in module.implementations(parameter):
                counts[part][what] += 1
    described = {}
    for part, found in counts.items():
        texts = [what if n == found.total() else f"{what} ({n} of {found.total()})" for what, n in found.items()]
        if texts:
            described[part] = ", ".join(texts)
    return described


def what_computes(name: str, reason: str | None) -> str:
    """What computes a part whose operators have this name, or whose layers are called for a reason."""
    return name if reason is None else f"layer by layer ({reason})"


def why_not_tensor(x: torch.Tensor) -> str | None:
    """Why the kernels cannot take a tensor of this type and device now, or None if they can and are loaded."""
    if x.dtype not in FLOATS:
        return f"{str(x.dtype).removeprefix('torch.')} input"
    if torch.autograd.forward_ad._current_level >= 0:  # within dual_level and jvp, where tangents would be lost
        return "forward-mode differentiation"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func"
    reason = altered() or why_not_on(x.device.type, x.device.index)
    if reason is None and x.device.type == "cpu":  # the interpreter
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if torch.bfloat16 in (x.dtype, cast):
            return _why_not_interpreted_bfloat16()
    return reason


def why_not_on(device: str, index: int | None) -> str | None:
    """Why kernels cannot run on tensors of this device, or None if they can and are loaded."""
    if device == "cuda":
        reason = why_not_triton(index or 0)
    elif device == "cpu":
        reason = why_no_triton() or (None if _interpreting() else "tensors on the CPU")
    else:
        reason = f"tensors on {device}"
    if reason is None:
        load_kernels()
    return reason


def _why_no_kernels() -> str | None:
    return why_no_triton() or (None if torch.cuda.is_available() or _interpreting() else "no CUDA device")


def _why_not_interpreted_bfloat16() -> str | None:
    from segmenter.kernels.interpreted import why_not_bfloat16

    return why_not_bfloat16()


# torch.compile takes the answers as constants: it cannot trace the look-ups, and the machine stays what it is. This is
# what `torch.compiler.assume_constant_result` sets; calling that would import torch._dynamo, two seconds, here.
why_not_on._dynamo_marked_constant = True
_why_no_kernels._dynamo_marked_constant = True
_why_not_interpreted_bfloat16._dynamo_marked_constant = True


@functools.cache
def why_no_triton() -> str | None:
    """What is wrong with the installed Triton, or None if the kernels can be imported. Imports it."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"triton {version} is too old, the kernels need {'.'.join(map(str, MIN_TRITON))} (PyTorch 2.10)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        return f"triton cannot be imported ({str(error).strip().splitlines()[0]})"
    return None


def _interpreting() -> bool:
    from segmenter.kernels.launch import INTERPRETED

    return INTERPRETED
