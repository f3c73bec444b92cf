"""Eager PyTorch definition of the gradients of LayerNorm and linear layers, by their formulas: see `reference`.

Each function takes the gradient of the result, the arguments of the operation, and which of the gradients of its
tensors are needed; it returns one for each tensor, without elements where it is not needed. Rounding is where eager
PyTorch rounds: after each operation. Differentiable.
"""

import math
from collections.abc import Sequence

import torch

Gradients = tuple[torch.Tensor, ...]


def _needed(gradients: Sequence[torch.Tensor | None], needed: Sequence[bool], like: torch.Tensor) -> Gradients:
    pairs = zip(gradients, needed, strict=True)
    return tuple(like.new_empty(0) if t is None or not need else t.contiguous() for t, need in pairs)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def layernorm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    needed: Sequence[bool] = (True,) * 3,
) -> Gradients:
    """Of x, weight and bias, for grad (..., d) of `reference.layernorm`, in float32 or wider and rounded once.

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
    gradients = (
        dx.to(x.dtype),
        *(None if t is None else s.to(t.dtype) for s, t in zip(sums, (weight, bias), strict=True)),
    )
    return _needed(gradients, needed, x)
