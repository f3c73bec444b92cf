"""The attention half of a block, x + s * proj(attention(qkv(LayerNorm(x)))), as training needs it: as one operator.

    x (B, N, d), LayerNorm (d,), qkv (3 d, d), proj (d, d), LayerScale s (d,) or none  ->  (B, N, d)

Forward it is what it is in inference: three kernels, one after another. Backward, one operator can do what three
cannot:
- the residual's gradient is added where the LayerNorm's gradient is rounded, and not by a pass of its own;
- qkv, three quarters of what the half would keep, may be computed again instead, by the kernel that computed it and so
  bit for bit.

Kept are x, the attention's result and log-sum-exp, and qkv if `keep_qkv`: with half types 4 or 10 bytes a token and
column, x included.
Reference: `reference.layernorm_linear`, `reference.attention_lse` and `reference.linear` in a row.
Test: tests/kernels/test_attention_half.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from segmenter.kernels import launch, reference
from segmenter.kernels.attention import attention, lse_rows, padded, uses_sdpa
from segmenter.kernels.attention_backward import ATTENTION_BACKWARD
from segmenter.kernels.checks import result_type
from segmenter.kernels.linear import layernorm_linear, linear
from segmenter.kernels.linear_backward import LAYERNORM_LINEAR_BACKWARD, LINEAR_BACKWARD, of_layer_scale
from segmenter.kernels.operators import HOST_FUNCTIONS, REFERENCES, define, differentiated, forbid_forward_mode

Tensors = tuple[torch.Tensor, ...]


def _composed(functions: dict, attend: Callable) -> Callable:
    """The three operations in a row, by `functions` and `attend`, with what the backward pass may want."""

    def run(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv, layer_scale=None
    ) -> Tensors:
        qkv = functions["layernorm_linear"](x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, False)
        o, lse = attend(qkv, heads)
        y = functions["linear"](o, weight, bias, x, False, layer_scale)
        return y, o, lse, qkv if keep_qkv else launch.empty((0,), qkv.dtype, qkv.device)

    return run


def _fake(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv, layer_scale=None
) -> Tensors:
    qkv = x.new_empty(*x.shape[:-1], qkv_weight.shape[0], dtype=weight.dtype)
    B, N, C = reference.packed_shape(qkv, heads)
    o = x.new_empty(B, N, C // 3, dtype=weight.dtype)
    y = x.new_empty(x.shape, dtype=result_type(x, weight, layer_scale))
    lse = x.new_empty(B, heads, lse_rows(N), dtype=torch.float32)
    return y, o, lse, qkv if keep_qkv else qkv.new_empty(0)


def _flops(x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, *args, **kwargs) -> int:
    (B, N, d), inner = x, weight[1]
    return 2 * B * N * d * 4 * inner + 4 * B * N * N * inner


def _backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple | None:
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, keep_qkv, layer_scale = inputs
    (o, lse, qkv), (grad, *others) = outputs, grads
    if grad is None or any(g is not None for g in others):  # results that no public function returns
        return None
    of_qkv = any(needed[:5])
    of_branch, of_scale = grad if layer_scale is None else grad * layer_scale, None
    if needed[10]:
        of_scale = of_layer_scale(grad, layer_scale, F.linear(o, weight, bias))
    d_o, *of_proj = LINEAR_BACKWARD(of_branch, o, weight, bias, False, [of_qkv, *needed[5:7]])
    if not of_qkv:
        return *(None,) * 5, *of_proj, None, None, None, of_scale
    before = x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, False
    if not keep_qkv:
        qkv = layernorm_linear(*before)
    d_qkv = ATTENTION_BACKWARD(d_o, qkv, o, lse, None, heads)
    return *LAYERNORM_LINEAR_BACKWARD(d_qkv, *before, needed[:5], grad), *of_proj, None, None, None, of_scale


_attention_half = define(
    "attention_half(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor weight, Tensor? bias, int heads, float eps, bool keep_qkv, Tensor? layer_scale=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_composed(HOST_FUNCTIONS, lambda qkv, heads: HOST_FUNCTIONS["attention_lse"](qkv, heads)),
    reference=_composed(REFERENCES, lambda qkv, heads: padded(*reference.attention_lse(qkv, heads))),
    fake=_fake,
    flops=_flops,
    autocast=lambda dtype, args: (*args[:3], *(None if t is None else t.to(dtype) for t in args[3:7]), *args[7:]),
    backward=_backward,
    keep_results=(1, 2, 3),
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
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + layer_scale * linear(attention(layernorm_linear(x))): see these three for arguments, types and errors.

    Args:
        x: (B, N, d). norm_weight, norm_bias: (d,). qkv_weight: (3 * inner, d), qkv_bias: (3 * inner,) or None.
        weight: (d, inner), bias: (d,) or None, of the projection. heads: how many.
        keep_qkv: keep qkv for the backward pass, or compute it again there: three eighths of this half's products.
        layer_scale: (d,) or None for ones.
    Returns:
        (B, N, d), the type of x, or if that is wider of the weights or of layer_scale.

    Where no gradient is needed, or kernels/configs_backward.py has PyTorch compute the attention's, it is the three.
    """
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias)
    launch.check_device(x, *parameters, layer_scale)
    forbid_forward_mode()
    if differentiated(x, *(p for p in (*parameters, layer_scale) if p is not None)) and not uses_sdpa(x, qkv_weight):
        return _attention_half(x, *parameters, heads, eps, keep_qkv, layer_scale)[0]
    qkv = layernorm_linear(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps)
    return linear(attention(qkv, heads), weight, bias, x, False, layer_scale)
