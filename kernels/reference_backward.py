"""Eager PyTorch definition of the gradients of LayerNorm and linear layers, by their formulas: see `reference`.

Each function takes the gradient of the result, the arguments of the operation that it needs, and which of the gradients
are needed; what is not needed has no elements. Rounding is where eager PyTorch rounds: after each operation.
Differentiable.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from segmenter.kernels import reference

Gradients = tuple[torch.Tensor, ...]
Types = Sequence[torch.dtype | None]


def _needed(gradients: Sequence[torch.Tensor], types: Types, needed: Sequence[bool]) -> Gradients:
    """Of these types; without elements where that is None, or the gradient not needed."""
    triples = zip(gradients, types, needed, strict=True)
    nothing = torch.empty(0, dtype=types[0], device=gradients[0].device)
    return tuple(nothing.clone() if t is None or not need else g.to(t).contiguous() for g, t, need in triples)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def layernorm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float = 1e-5,
    needed: Sequence[bool] = (True,) * 3,
) -> Gradients:
    """Of x, weight and bias, for grad (..., d) of `reference.layernorm`; in float32 or wider, and rounded once.

    With xn = (x - mean) * rstd and g = grad * weight: dx = rstd * (g - mean of g - xn * mean of g * xn), dweight = sum
    of grad * xn, dbias = sum of grad.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, grad = centred * rstd, grad.to(wide)
    g = grad if weight is None else grad * weight.to(wide)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    sums = _rows(grad * normed).sum(0), _rows(grad).sum(0)
    types = (x.dtype, None if weight is None else weight.dtype, bias_dtype)
    if grad.dtype == torch.float64 and bias_dtype is not None:  # what others are compared with
        types = (*types[:2], torch.float64)
    return _needed((dx, *sums), types, needed)


def linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool = False,
    needed: Sequence[bool] = (True,) * 3,
) -> Gradients:
    """Of x, weight and bias, for grad (..., d_out) of `reference.linear`; that of a residual is grad itself.

    dx = grad weight, dweight = grad^T x, dbias = sum of grad; with a GELU grad is multiplied by its derivative first.
    """
    rows, grad = _rows(x), _rows(grad).to(weight.dtype)
    if gelu:
        grad = torch.ops.aten.gelu_backward(grad, F.linear(rows, weight, bias))
    dx, d_weight = (grad @ weight).view(x.shape), grad.t() @ rows
    types = (x.dtype, weight.dtype, None if bias is None else weight.dtype)
    return _needed((dx, d_weight, grad.sum(0)), types, needed)


def layernorm_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    gelu: bool = False,
    needed: Sequence[bool] = (True,) * 5,
    added: torch.Tensor | None = None,
) -> Gradients:
    """Of x, norm_weight, norm_bias, weight and bias, for grad (..., d_out) of `reference.layernorm_linear`.

    added: (..., d), added to that of x.
    """
    of_normed, *others = linear_backward(grad, _normed(x, norm_weight, norm_bias, eps, weight), weight, bias, gelu)
    dx, *of_norm = layernorm_backward(of_normed.to(x.dtype), x, norm_weight, norm_bias.dtype, eps)
    dx = dx if added is None else dx + added
    types = (x.dtype, norm_weight.dtype, norm_bias.dtype, weight.dtype, None if bias is None else bias.dtype)
    return _needed((dx, *of_norm, *others), types, needed)


def _normed(x, norm_weight, norm_bias, eps, like) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    return reference.layernorm(x.to(wide), norm_weight.to(wide), norm_bias.to(wide), eps).to(like.dtype)


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
) -> Gradients:
    """Of x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight and fc2_bias, for grad (..., d) of
    `reference.layernorm_mlp`, times layer_scale, and of_residual without it. The bias of fc2 has the type of its
    weight."""
    normed = _normed(x, norm_weight, norm_bias, eps, fc1_weight)
    a = F.linear(normed, fc1_weight, fc1_bias) if pre_activation is None else pre_activation
    form = {"approximate": "tanh" if tanh else "none"}
    dh, *of_fc2 = linear_backward(grad, F.gelu(a, **form), fc2_weight, fc1_bias)  # without a GELU, any bias
    of_normed, *of_fc1 = linear_backward(torch.ops.aten.gelu_backward(dh, a, **form), normed, fc1_weight, fc1_bias)
    dx, *of_norm = layernorm_backward(of_normed.to(x.dtype), x, norm_weight, norm_bias.dtype, eps)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_weight)
    dx = dx + (grad if of_residual is None else of_residual)
    return _needed((dx, *of_norm, *of_fc1, *of_fc2), [t.dtype for t in tensors], needed)


def layernorm_mlp_hidden(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    eps: float = 1e-5,
    layer_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.layernorm_mlp`, and what its gradient may have been kept of it: fc1(layer_norm(x)), (..., d_ff)."""
    a = F.linear(_normed(x, norm_weight, norm_bias, eps, fc1_weight), fc1_weight, fc1_bias)
    return reference.linear(F.gelu(a), fc2_weight, fc2_bias, x, False, layer_scale).contiguous(), a.contiguous()
