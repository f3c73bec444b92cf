"""The gradients of linear layers: two plain products, and around them what kernels save.

    dY (M, N), x (M, K), W (N, K)  ->  dx = dY W (M, K), dW = dY^T x (N, K), db = sum of dY over rows (N,)

Both products are cuBLASLt's: weight gradients are added in float32 and have the weight's type. One pass over dY before
them (kernels/column_sums.py) sums it for the bias, rounds it to the weights' type (under autocast the stream and its
gradient are float32), and with a GELU multiplies it by the derivative at x W^T + b, which is computed again. With a
LayerNorm in front, its result is computed again for dW, and its own gradient is kernels/layernorm_backward.py's.

Only the arguments are kept for the backward pass. Reference: `reference_backward.linear_backward`,
`reference_backward.layernorm_linear_backward`. Test: tests/kernels/test_linear_backward.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segmenter.kernels import column_sums, launch, layernorm_backward, reference_backward
from segmenter.kernels.checks import as_rows, check_affine, check_linear, check_types
from segmenter.kernels.layernorm import run as run_layernorm
from segmenter.kernels.layernorm_backward import check_grad, gradients_fake, or_empty
from segmenter.kernels.operators import define, forbid_forward_mode

Gradients = tuple[torch.Tensor | None, ...]


def run(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients of x (M, K), weight (N, K) and bias, None of what is not needed or not there.

    Args:
        grad: (M, N), of weight's type or wider. grad, x: dense rows; x may be missing where only its gradient is needed
            and that of the bias.
    """
    pre_activation = launch.call(F.linear, x, weight, bias) if gelu else None
    sums = weight.dtype if bias is not None and needed[2] else None
    grad, d_bias = column_sums.passed_on(grad, weight.dtype, sums, pre_activation)
    dx = launch.call(torch.matmul, grad, weight) if needed[0] else None
    d_weight = launch.call(torch.matmul, grad.t(), x) if needed[1] else None
    return dx, d_weight, d_bias


def after_layernorm(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    linear: tuple[torch.Tensor, torch.Tensor | None],
    eps: float,
    gelu: bool,
    needed: Sequence[bool],
    added: torch.Tensor | None = None,
) -> Gradients:
    """The gradients of x (M, K), LayerNorm's weight and bias, weight (N, K) and bias; otherwise as `run`.

    added: (M, K), dense rows, added to the gradient of x.
    """
    of_rows = any(needed[:3])
    normed = run_layernorm(x, *norm, eps, linear[0].dtype) if gelu or needed[3] else None
    d_normed, *others = run(grad, normed, *linear, gelu, (of_rows, *needed[3:]))
    if d_normed is None:
        return None, None, None, *others
    types = types_of((x, *norm), needed[:3])
    return *layernorm_backward.run(d_normed, x, norm[0], eps, types, added), *others


def of_layer_scale(grad: torch.Tensor, layer_scale: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """The gradient of layer_scale (N,) from that of residual + layer_scale * branch, both (..., N); in float32.

    The branch's own gradient is grad * layer_scale, the residual's grad.
    """
    return (grad.float() * branch.float()).sum_to_size(layer_scale.shape).to(layer_scale.dtype)


def types_of(tensors: Sequence[torch.Tensor | None], needed: Sequence[bool]) -> tuple[torch.dtype | None, ...]:
    """The types of the gradients that are needed, None in the place of the others."""
    return tuple(t.dtype if t is not None and need else None for t, need in zip(tensors, needed, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _result(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[0])


def _linear_backward_kernel(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    needed: list[bool],
) -> tuple[torch.Tensor, ...]:
    launch.check_device(grad, x, weight, bias)
    check_types(weight, x=x, bias=bias)
    check_linear("weight", x, weight, bias)
    check_grad(grad, _result(x, weight), weight.dtype if grad.dtype == weight.dtype else torch.float32)
    dense = [None if t is None else launch.rows_contiguous(t) for t in (weight, bias)]
    dx, *others = run(as_rows(grad), as_rows(x), *dense, gelu, needed)
    return or_empty((None if dx is None else dx.view(x.shape), *others), x)


def _linear_backward_fake(grad, x, weight, bias, gelu, needed) -> tuple[torch.Tensor, ...]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return gradients_fake(shapes, types_of((x, weight, bias), needed), x)


def _layernorm_linear_backward_kernel(
    grad, x, norm_weight, norm_bias, weight, bias, eps, gelu, needed, added
) -> tuple[torch.Tensor, ...]:
    launch.check_device(grad, x, norm_weight, norm_bias, weight, bias, added)
    launch.check_floats("x", x)
    check_types(weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_affine(x, norm_weight, norm_bias)
    check_linear("weight", x, weight, bias)
    check_grad(grad, _result(x, weight), weight.dtype)
    norm = launch.rows_contiguous(norm_weight), launch.rows_contiguous(norm_bias)
    linear = launch.rows_contiguous(weight), None if bias is None else launch.rows_contiguous(bias)
    if added is not None:
        check_grad(added, x.shape, added.dtype)
        added = as_rows(added)
    dx, *others = after_layernorm(as_rows(grad), as_rows(x), norm, linear, eps, gelu, needed, added)
    return or_empty((None if dx is None else dx.view(x.shape), *others), x)


def _layernorm_linear_backward_fake(
    grad, x, norm_weight, norm_bias, weight, bias, eps, gelu, needed, added
) -> tuple[torch.Tensor, ...]:
    shapes = (x.shape, x.shape[-1:], x.shape[-1:], weight.shape, weight.shape[:1])
    return gradients_fake(shapes, types_of((x, norm_weight, norm_bias, weight, bias), needed), x)


def product_flops(x: tuple[int, ...], weight: tuple[int, ...], dx: bool, d_weight: bool) -> int:
    """Two operations a multiply-add of each product that is needed; what is computed again is no work."""
    return 2 * math.prod(x) * weight[0] * (dx + d_weight)


def _linear_flops(grad: Any, x: tuple, weight: tuple, bias: Any, gelu: bool, needed: list[bool], **kwargs: Any) -> int:
    return product_flops(x, weight, needed[0], needed[1])


def _layernorm_linear_flops(
    grad: Any, x: tuple, norm_weight: Any, norm_bias: Any, weight: tuple, bias: Any, eps: float, gelu: bool,
    needed: list[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return product_flops(x, weight, any(needed[:3]), needed[3])


LINEAR_BACKWARD = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool gelu, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_linear_backward_kernel,
    reference=reference_backward.linear_backward,
    fake=_linear_backward_fake,
    flops=_linear_flops,
    autocast=lambda dtype, args: args,  # as they were in the forward pass
)
LAYERNORM_LINEAR_BACKWARD = define(
    "layernorm_linear_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
    "Tensor? bias, float eps, bool gelu, bool[] needed, Tensor? added) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_layernorm_linear_backward_kernel,
    reference=reference_backward.layernorm_linear_backward,
    fake=_layernorm_linear_backward_fake,
    flops=_layernorm_linear_flops,
    autocast=lambda dtype, args: args,
)


def linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool = False,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `linear(x, weight, bias, gelu=gelu)`, which calls it by itself in a backward pass.

    Args:
        grad: of the result, (..., d_out), the type of x or float32. That of a residual is `grad` itself.
        x: (..., d_in), weight: (d_out, d_in), bias: (d_out,) or None, all bfloat16, float16 or float32.
        needed: which of the gradients of x, weight and bias are.
    Returns:
        (..., d_in), (d_out, d_in) and (d_out,), the type of x; what is not needed or not there has no elements.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.
    """
    launch.check_device(grad, x, weight, bias)
    forbid_forward_mode()
    return LINEAR_BACKWARD(grad, x, weight, bias, gelu, needed)


def layernorm_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    gelu: bool = False,
    needed: tuple[bool, bool, bool, bool, bool] = (True,) * 5,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `layernorm_linear(x, norm_weight, norm_bias, weight, bias, eps, gelu)`; as `linear_backward`.

    Args:
        grad: of the result, (..., d_out), the type of weight. The others: as forward.
        needed: which of the gradients of the five tensors are. added: (..., d), added to that of x.
    Returns:
        One gradient for each of them, of its shape and type; what is not needed or not there has no elements.
    """
    launch.check_device(grad, x, norm_weight, norm_bias, weight, bias, added)
    forbid_forward_mode()
    return LAYERNORM_LINEAR_BACKWARD(grad, x, norm_weight, norm_bias, weight, bias, eps, gelu, needed, added)
