"""The gradients of an MLP half of a block, x + fc2(gelu(fc1(LayerNorm(x)))), from its arguments alone.

    dY (..., d) and the arguments  ->  a gradient for each of the seven tensors

With xn = LayerNorm(x) and a = xn fc1^T + b, both computed again: dfc2 = dY^T gelu(a), dA = (dY fc2) * gelu'(a),
dfc1 = dA^T xn, dxn = dA fc1, dx = dY + the LayerNorm's gradient of dxn. In the order of launches:

- kernels/column_sums.py: dY rounded to the weights' type, and summed for fc2's bias.
- LayerNorm, and a by cuBLASLt.
- kernels/gelu_backward.py: dA, gelu(a) and the sums for fc1's bias, of one read of a.
- cuBLASLt: dfc2, dfc1, dxn.
- kernels/layernorm_backward.py: dx, with dY added before it is rounded, and the LayerNorm's parameters.

Only the arguments need be kept for the backward pass: of what depends on the tokens, x. What is computed again costs
one product more, fc1's, a tenth of a block's products forward and backward. `layernorm_mlp_hidden` keeps a, four times
as much as x, and only the LayerNorm is computed again.
Reference: `reference_backward.layernorm_mlp_backward`. Test: tests/kernels/test_layernorm_mlp_backward.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segmenter.kernels import column_sums, gelu_backward, launch, layernorm_backward, reference_backward
from segmenter.kernels.checks import as_rows, check_mlp
from segmenter.kernels.layernorm import run as run_layernorm
from segmenter.kernels.layernorm_backward import check_grad, gradients_fake, or_empty
from segmenter.kernels.linear_backward import Gradients, product_flops, types_of
from segmenter.kernels.operators import define, forbid_forward_mode


def run(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    fc1: tuple[torch.Tensor, torch.Tensor],
    fc2_weight: torch.Tensor,
    pre_activation: torch.Tensor | None,
    eps: float,
    needed: Sequence[bool],
    of_residual: torch.Tensor | None = None,
    tanh: bool = False,
) -> Gradients:
    """The gradients of x, of LayerNorm's weight and bias, and of fc1's and fc2's, None of what is not needed.

    Args:
        grad, x: (M, d), dense rows. norm: weight and bias, fc1: weight and bias, fc2_weight: dense rows.
        pre_activation: a (M, d_ff), contiguous, if it was kept.
        of_residual: (M, d), dense rows, if it is another than grad. tanh: of the GELU by tanh.
    """
    of_residual = grad if of_residual is None else of_residual
    dtype, of_rows, of_hidden = fc2_weight.dtype, any(needed[:3]), any(needed[:5])
    rounded, d_fc2_bias = column_sums.passed_on(grad, dtype, dtype if needed[6] else None)
    if not (of_hidden or needed[5]):
        return *(None,) * 6, d_fc2_bias
    normed = run_layernorm(x, *norm, eps, dtype) if pre_activation is None or needed[3] else None
    if pre_activation is None:
        pre_activation = launch.call(F.linear, normed, *fc1)
    of_norm: Gradients = (None,) * 3
    if not of_hidden:
        h = launch.call(F.gelu, pre_activation, approximate="tanh" if tanh else "none")
        return *of_norm, None, None, launch.call(torch.matmul, rounded.t(), h), d_fc2_bias
    d_a, h, d_fc1_bias = gelu_backward.run(rounded, fc2_weight, pre_activation, needed[5], needed[4], tanh=tanh)
    d_fc2 = None if h is None else launch.call(torch.matmul, rounded.t(), h)
    d_fc1 = launch.call(torch.matmul, d_a.t(), normed) if needed[3] else None
    if of_rows:
        d_normed = launch.call(torch.matmul, d_a, fc1[0])
        of_norm = layernorm_backward.run(d_normed, x, norm[0], eps, types_of((x, *norm), needed[:3]), of_residual)
    return *of_norm, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _layernorm_mlp_backward_kernel(
    grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, eps, needed, pre_activation=None,
    of_residual=None, tanh=False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    launch.check_device(grad, x, *parameters, pre_activation, of_residual)
    check_mlp(x, *parameters)
    narrow = torch.promote_types(x.dtype, fc2_weight.dtype)
    check_grad(grad, x.shape, narrow if grad.dtype == narrow else torch.float32)
    if of_residual is not None:
        check_grad(of_residual, x.shape, grad.dtype)
        of_residual = as_rows(of_residual)
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight = (launch.rows_contiguous(t) for t in parameters)
    norm, fc1 = (norm_weight, norm_bias), (fc1_weight, fc1_bias)
    if pre_activation is not None:
        launch.check_floats("pre_activation", pre_activation, (fc1_weight.dtype,))
        hidden = (*x.shape[:-1], fc1_weight.shape[0])
        if pre_activation.shape != hidden:
            raise ValueError(f"pre_activation must be {hidden}, got {tuple(pre_activation.shape)}")
        pre_activation = as_rows(launch.contiguous(pre_activation))
    kept = pre_activation, eps, needed, of_residual, tanh
    dx, *others = run(as_rows(grad), as_rows(x), norm, fc1, fc2_weight, *kept)
    return or_empty((None if dx is None else dx.view(x.shape), *others), x)


def _layernorm_mlp_backward_fake(
    grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, eps, needed, *_
) -> tuple[torch.Tensor, ...]:
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    shapes = (*(t.shape for t in tensors), x.shape[-1:])
    return gradients_fake(shapes, types_of((*tensors, fc2_weight), needed), x)


def _layernorm_mlp_backward_flops(
    grad: Any, x: tuple, norm_weight: Any, norm_bias: Any, fc1_weight: tuple, fc1_bias: Any, fc2_weight: Any,
    eps: float, needed: list[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    of_fc2 = product_flops(x, fc1_weight, any(needed[:5]), needed[5])
    return of_fc2 + product_flops(x, fc1_weight, any(needed[:3]), needed[3])


LAYERNORM_MLP_BACKWARD = define(
    "layernorm_mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, float eps, bool[] needed, Tensor? pre_activation=None, "
    "Tensor? of_residual=None, bool tanh=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_layernorm_mlp_backward_kernel,
    reference=reference_backward.layernorm_mlp_backward,
    fake=_layernorm_mlp_backward_fake,
    flops=_layernorm_mlp_backward_flops,
    autocast=lambda dtype, args: args,  # as they were in the forward pass
)


def layernorm_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    eps: float = 1e-5,
    needed: Sequence[bool] = (True,) * 7,
    pre_activation: torch.Tensor | None = None,
    of_residual: torch.Tensor | None = None,
    tanh: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `layernorm_mlp`, which calls it by itself in a backward pass.

    Args:
        grad: of the result, (..., d), the type of x, or of the weights if that is wider, or float32; with a LayerScale
            times that. The others: as forward.
        needed: which of the gradients of x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight and fc2_bias are.
        pre_activation: fc1(layer_norm(x)), (..., d_ff), the type of the weights, or None to compute it again.
        of_residual: the gradient that x gets past the branch, (..., d), the type of grad; None: grad itself.
        tanh: as forward.
    Returns:
        One gradient for each of these seven, of its shape and type; what is not needed has no elements.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.
    """
    launch.check_device(grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, of_residual)
    forbid_forward_mode()
    args = (grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    return LAYERNORM_MLP_BACKWARD(*args, eps, needed, pre_activation, of_residual, tanh)
