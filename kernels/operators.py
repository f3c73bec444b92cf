"""How an operator becomes `torch.ops.segmenter.NAME`: one call of `define` in the file of its kernel.

Registered with torch.library's define/impl, which costs half of what `custom_op` does per call and, unlike
`triton_op`, works on the CPU and under torch.compile there. For every operator:

- CUDA runs the kernel. The CPU runs the eager reference, or the kernel when Triton's interpreter is on. (The public
  functions refuse CPU tensors without the interpreter; the operators themselves accept them, so that a traced or
  exported program can run on a CPU.)
- Outputs are freshly allocated and contiguous, never views of inputs, and the fake implementation says the same.
- Gradients are those of the eager reference: it is evaluated again in the backward pass, in the inputs' precision.
  Where kernels run, an operator may have a backward pass of its own instead. Differentiating twice works, always
  through the reference. Forward-mode AD does not exist and raises in the public functions.
- Under autocast, arguments are cast as the eager operations would cast them.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from segmenter.kernels.launch import INTERPRETED, KernelError
from segmenter.kernels.repeat import Repeated

LIBRARY = torch.library.Library("segmenter", "DEF")
HOST_FUNCTIONS: dict[str, Callable] = {}  # of operators by name: what the dispatcher calls in the end, as written
REFERENCES: dict[str, Callable] = {}  # of operators by name: the same in eager PyTorch


def define(
    schema: str,
    *,
    kernel: Callable,
    reference: Callable,
    fake: Callable,
    flops: Callable,
    autocast: Callable[[torch.dtype, tuple], tuple],
    autocast_result: Callable[[Any], Any] | None = None,
    backward: Callable[[tuple, tuple, tuple, tuple], tuple] | None = None,
    keep_results: tuple[int, ...] = (),
) -> Any:
    """Registers an operator and returns its overload, `torch.ops.segmenter.NAME.default`.

    Args:
        schema: "name(Tensor x, int n) -> Tensor".
        kernel, reference, fake: the implementations; positional arguments in the order of the schema.
        flops: floating-point operations, two a multiply-add, from the shapes of the arguments and `out_shape`.
        autocast: (the autocast dtype, the arguments) -> the arguments to call with.
        autocast_result: applied to the result under autocast, for what eager returns in float32 there.
        backward: (arguments, results, gradients of the results or None, which arguments need one) -> gradients of the
            arguments, in place of the reference's where kernels run; anything for those that need none. None: the
            reference's all the same.
        keep_results: which of the results are kept for `backward`, by their numbers; it is given these.
    """
    name = schema.split("(")[0]
    HOST_FUNCTIONS[name], REFERENCES[name], kernel = kernel, reference, Repeated(kernel)
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, kernel if INTERPRETED else reference, "CPU")
    qualified = f"segmenter::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    _register_autograd(qualified, reference, backward, keep_results)
    operator = getattr(torch.ops.segmenter, name)
    register_flop_formula(operator)(flops)
    for device in ("cuda", "cpu"):
        function = _autocast_kernel(operator.default, device, autocast, autocast_result)
        LIBRARY.impl(name, function, f"Autocast{device.upper()}")
    return operator.default


def forbid_forward_mode() -> None:
    """Raises KernelError inside torch.func.jvp and forward_ad.dual_level, where tangents would silently be zero."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise KernelError('the kernels have no forward-mode derivative; use impl="eager" for it')


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether an operator is to keep something for its gradient beyond its arguments.

    Not in exported programs, which are for inference: there the plain operator is right, and its gradient slower.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return wanted and not torch.compiler.is_exporting()


def _register_autograd(qualified: str, reference: Callable, by_kernels: Callable | None, keep: tuple[int, ...]) -> None:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.others = [None if is_tensor else x for x, is_tensor in zip(inputs, ctx.is_tensor, strict=True)]
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, torch.Tensor)], *(results[i] for i in keep))
        ctx.set_materialize_grads(by_kernels is None)

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else x for x, is_tensor in zip(ctx.others, ctx.is_tensor, strict=True)]
        # the dispatcher leaves out arguments at the end that have their default
        needs = *ctx.needs_input_grad, *(False,) * (len(inputs) - len(ctx.needs_input_grad))
        wanted = [i for i, needed in enumerate(needs) if needed]
        create_graph = torch.is_grad_enabled()
        upstream = [g for g in grads if g is not None]
        if not upstream:
            return (None,) * len(inputs)
        if by_kernels is not None and not create_graph and (upstream[0].is_cuda or INTERPRETED):
            found = by_kernels(tuple(inputs), tuple(saved), grads, needs)
            if found is not None:
                return tuple(g if need else None for g, need in zip(found, needs, strict=True))
        # The fused backends of scaled_dot_product_attention have no second derivative.
        backend = sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext()
        with torch.enable_grad(), backend:
            if not create_graph:
                inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
                for i in wanted:
                    inputs[i] = inputs[i].requires_grad_()
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            options = {"create_graph": create_graph, "allow_unused": True}
            results = torch.autograd.grad(
                [o for o, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs], **options
            )
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, results, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)


def _autocast_kernel(operator: Any, device: str, cast: Callable, result: Callable | None) -> Callable:
    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            out = operator(*cast(dtype, args))
        return out if result is None else result(out)

    return run
