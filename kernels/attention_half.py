"""The attention half of a block, x + proj(attention(qkv(LayerNorm(x)))), as training needs it: as one operator.

    x (B, N, d), LayerNorm (d,), qkv (3 d, d), proj (d, d)  ->  (B, N, d)

Forward it is what it is in inference: three kernels, one after another. Backward, one operator can do what three
cannot:
- the residual's gradient is added where the LayerNorm's gradient is rounded, and not by a pass of its own;
- qkv, three quarters of what the half would keep, may be computed again instead, by the kernel that computed it and so
  bit for bit.

Kept are x, the attention's result and log-sum-exp, and qkv if `keep_qkv`: with half types 4 or 10 bytes a token and
column, x included.
Reference: `reference.layernorm_linear`, `attention_lse` and `linear`; `reference_backward.attention_half_backward`.
Test: tests/kernels/test_attention_half.py.
"""

from typing import Any

import torch

from segmenter.kernels import launch, linear_backward, reference, reference_backward
from segmenter.kernels.attention import attention, lse_rows, padded, uses_sdpa
from segmenter.kernels.checks import as_rows
from segmenter.kernels.layernorm_backward import check_grad, empty_like, or_empty
from segmenter.kernels.linear import layernorm_linear, linear
from segmenter.kernels.linear_backward import product_flops, types_of
from segmenter.kernels.operators import HOST_FUNCTIONS, REFERENCES, define, differentiated, forbid_forward_mode

Tensors = tuple[torch.Tensor, ...]


def _composed(functions: dict, attend: Any) -> Any:
    """The three operations in a row, by `functions` and `attend`, with what the backward pass may want."""

    def run(x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv) -> Tensors:
        qkv = functions["layernorm_linear"](x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, False)
        o, lse = attend(qkv, heads)
        y = functions["linear"](o, weight, bias, x, False)
        return y, o, lse, qkv if keep_qkv else launch.empty((0,), qkv.dtype, qkv.device)

    return run


def _fake(x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv) -> Tensors:
    qkv = x.new_empty(*x.shape[:-1], qkv_weight.shape[0], dtype=weight.dtype)
    B, N, C = reference.packed_shape(qkv, heads)
    o = x.new_empty(B, N, C // 3, dtype=weight.dtype)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    lse = x.new_empty(B, heads, lse_rows(N), dtype=torch.float32)
    return y, o, lse, qkv if keep_qkv else qkv.new_empty(0)


def _flops(x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, *args, **kwargs) -> int:
    (B, N, d), inner = x, weight[1]
    return 2 * B * N * d * 4 * inner + 4 * B * N * N * inner


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


def _backward_kernel(
    grad, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, o, lse, qkv, heads, eps, needed
) -> Tensors:
    launch.check_device(grad, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, o, lse, qkv)
    check_grad(grad, x.shape, torch.promote_types(x.dtype, weight.dtype))
    qkv_weight, weight = launch.rows_contiguous(qkv_weight), launch.rows_contiguous(weight)
    qkv_bias, bias = (None if t is None else launch.rows_contiguous(t) for t in (qkv_bias, bias))
    norm = launch.rows_contiguous(norm_weight), launch.rows_contiguous(norm_bias)
    of_qkv = any(needed[:5])
    rows = as_rows(grad)
    do, *of_proj = linear_backward.run(rows, as_rows(o), weight, bias, False, (of_qkv, *needed[5:]))
    if not of_qkv:
        return or_empty((*(None,) * 5, *of_proj), x)
    if qkv.numel() == 0:
        qkv = HOST_FUNCTIONS["layernorm_linear"](x, *norm, qkv_weight, qkv_bias, eps, False)
    d_qkv = HOST_FUNCTIONS["attention_backward"](do.view(o.shape), qkv, o, lse, None, heads)
    linears = qkv_weight, qkv_bias
    found = linear_backward.after_layernorm(as_rows(d_qkv), as_rows(x), norm, linears, eps, False, needed[:5], rows)
    dx, *others = found
    return or_empty((None if dx is None else dx.view(x.shape), *others, *of_proj), x)


def _backward_fake(
    grad, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, o, lse, qkv, heads, eps, needed
) -> Tensors:
    tensors = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias)
    return empty_like(tuple(None if t is None else t.shape for t in tensors), types_of(tensors, needed), x)


def _backward_flops(grad, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, *args, **kwargs) -> int:
    (B, N, d), inner, needed = x, weight[1], args[-1]
    of_attention = 10 * B * N * N * inner if any(needed[:5]) else 0
    of_proj = product_flops(x, (inner, d), any(needed[:5]), needed[5])
    return of_attention + of_proj + product_flops(x, (3 * inner, d), any(needed[:3]), needed[3])


ATTENTION_HALF_BACKWARD = define(
    "attention_half_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, "
    "Tensor? qkv_bias, Tensor weight, Tensor? bias, Tensor o, Tensor lse, Tensor qkv, int heads, float eps, "
    "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=reference_backward.attention_half_backward,
    fake=_backward_fake,
    flops=_backward_flops,
    autocast=lambda dtype, args: args,  # as they were in the forward pass
)


def _backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    *tensors, heads, eps, _ = inputs
    _, *kept = outputs
    return *ATTENTION_HALF_BACKWARD(grads[0], *tensors, *kept, heads, eps, needed[:7]), None, None, None


_attention_half = define(
    "attention_half(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor weight, Tensor? bias, int heads, float eps, bool keep_qkv) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_composed(HOST_FUNCTIONS, lambda qkv, heads: HOST_FUNCTIONS["attention_lse"](qkv, heads)),
    reference=_composed(REFERENCES, lambda qkv, heads: padded(*reference.attention_lse(qkv, heads))),
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: (*args[:3], *(None if t is None else t.to(dtype) for t in args[3:7]), *args[7:]),
    backward=_backward,
    keep_results=True,
)


def attention_half(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    eps: float = 1e-5,
    keep_qkv: bool = True,
) -> torch.Tensor:
    """x + linear(attention(layernorm_linear(x))): see these three for arguments, types and errors.

    Args:
        x: (B, N, d). norm_weight, norm_bias: (d,). qkv_weight: (3 * inner, d), qkv_bias: (3 * inner,) or None.
        weight: (d, inner), bias: (d,) or None, of the projection. heads: how many.
        keep_qkv: keep qkv for the backward pass, or compute it again there: three eighths of this half's products.
    Returns:
        (B, N, d), the type of x, or of the weights if that is wider.

    Where no gradient is needed, or kernels/configs_backward.py has PyTorch compute the attention's, it is the three.
    """
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias)
    launch.check_device(x, *parameters)
    forbid_forward_mode()
    if differentiated(x, *(p for p in parameters if p is not None)) and not uses_sdpa(x, qkv_weight):
        return _attention_half(x, *parameters, heads, eps, keep_qkv)[0]
    qkv = layernorm_linear(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps)
    return linear(attention(qkv, heads), weight, bias, residual=x)
