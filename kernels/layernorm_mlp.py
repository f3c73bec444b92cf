"""The MLP half of a block, x + s * fc2(gelu(fc1(LayerNorm(x)))).

    x (..., d), LayerNorm (d,), fc1 (d_ff, d), fc2 (d, d_ff), LayerScale s (d,) or none  ->  (..., d)

Two ways; `configs.layernorm_mlp` chooses:
- "single": one kernel. A program normalises BLOCK_M whole rows and walks over the hidden layer in chunks of BLOCK_H:
  h = gelu(x fc1[chunk]^T + b), out += h fc2[:, chunk]^T. The hidden layer never reaches memory: at Seg-Ti/16, 512x512,
  4 * 1025 * 192 elements an image, 1.6 MB in bfloat16, written and read again, where x itself is 0.4 MB. It needs the
  normalised rows and their accumulator on one multiprocessor: narrow layers only.
- "split": `layernorm_linear` with GELU, then `linear` with bias, LayerScale and residual.

Statistics and accumulators are float32; the hidden layer is rounded to the weights' type, as in eager PyTorch.

Limits: any width; "single" needs one that is a power of two or the sum of two (192, 384), half types, and weights on
16-byte boundaries are fastest.
A gradient computes the hidden layer again, or `layernorm_mlp_hidden` keeps it: see kernels/layernorm_mlp_backward.py.

Reference: `reference.layernorm_mlp`, `reference_backward.layernorm_mlp_hidden`. Test:
tests/kernels/test_layernorm_mlp.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, reference, reference_backward
from segmenter.kernels.blocks import fits_rows, gelu, gelu_form, load_tile, normalised_rows, power_of_two_columns
from segmenter.kernels.checks import as_rows, check_affine, check_layer_scale, check_linear, check_types, result_type
from segmenter.kernels.layernorm import run as run_layernorm
from segmenter.kernels.layernorm_mlp_backward import LAYERNORM_MLP_BACKWARD
from segmenter.kernels.linear import layernorm_linear, linear_flops, normalised_product, product
from segmenter.kernels.linear_backward import of_layer_scale
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _store_out(acc, X, Y, Bias, LayerScale, row_0, stride_x, n_rows, D: tl.constexpr, COL_0: tl.constexpr,
               COLS: tl.constexpr, BLOCK_M: tl.constexpr, HAS_SCALE: tl.constexpr,
               DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Stores X + LayerScale * (acc + Bias) as columns COL_0.. of Y."""
    offs_d = COL_0 + tl.arange(0, COLS)
    acc = acc + tl.load(Bias + offs_d).to(tl.float32)[None, :]
    if HAS_SCALE:
        acc = acc * tl.load(LayerScale + offs_d).to(tl.float32)[None, :]
    if DESCRIPTORS:  # no row addresses to keep in registers during the main loop
        y = acc + X.load([row_0, COL_0]).to(tl.float32)
        Y.store([row_0, COL_0], y.to(Y.dtype))
    else:
        offs_m = row_0 + tl.arange(0, BLOCK_M)
        rows = tl.minimum(offs_m, n_rows - 1).to(tl.int64)
        y = acc + tl.load(X + rows[:, None] * stride_x + offs_d[None, :]).to(tl.float32)
        pointers = Y + rows[:, None] * D + offs_d[None, :]
        tl.store(pointers, y.to(Y.dtype.element_ty), mask=(offs_m < n_rows)[:, None])


@triton.jit
def _layernorm_mlp_fwd_kernel(
    X, W11, W12, W21, W22, X1, X2, Y1, Y2,  # (M, D); fc1 (H, D) and fc2 (D, H), each cut at D1; (M, D) cut at D1
    Gamma, Beta, Bias1, Bias2, LayerScale,  # (D,) twice, (H,), (D,) twice
    stride_x, stride_1, stride_2, n_rows, eps,
    D: tl.constexpr,
    D1: tl.constexpr,  # the largest power of two up to D; D - D1 is 0 or another one
    H: tl.constexpr,  # a multiple of BLOCK_H
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, GELU: tl.constexpr, HAS_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m_0 = tl.program_id(0) * BLOCK_M
    dtype: tl.constexpr = W11.dtype if DESCRIPTORS else W11.dtype.element_ty
    x_1, x_2 = normalised_rows(X, Gamma, Beta, m_0, stride_x, n_rows, eps, D, D1, BLOCK_M, dtype)
    rows_h = tl.arange(0, BLOCK_H).to(tl.int64)
    rows_1 = tl.arange(0, D1).to(tl.int64)
    acc_1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D1 < D:
        rows_2 = tl.arange(0, D - D1).to(tl.int64)
        acc_2 = tl.zeros([BLOCK_M, D - D1], tl.float32)
    for h_0 in tl.range(0, H, BLOCK_H):
        offs_h = h_0 + tl.arange(0, BLOCK_H)
        w = load_tile(W11, (h_0, 0), rows_h, stride_1, None, D1, D1, DESCRIPTORS)
        h = tl.dot(x_1, w.T, input_precision=PRECISION)
        if D1 < D:
            w = load_tile(W12, (h_0, D1), rows_h, stride_1, None, D - D1, D - D1, DESCRIPTORS)
            h = tl.dot(x_2, w.T, h, input_precision=PRECISION)
        h = gelu(h + tl.load(Bias1 + offs_h).to(tl.float32)[None, :], GELU).to(dtype)
        w = load_tile(W21, (0, h_0), rows_1, stride_2, None, H, BLOCK_H, DESCRIPTORS)
        acc_1 = tl.dot(h, w.T, acc_1, input_precision=PRECISION)
        if D1 < D:
            w = load_tile(W22, (D1, h_0), rows_2, stride_2, None, H, BLOCK_H, DESCRIPTORS)
            acc_2 = tl.dot(h, w.T, acc_2, input_precision=PRECISION)
    _store_out(acc_1, X1, Y1, Bias2, LayerScale, m_0, stride_x, n_rows, D, 0, D1, BLOCK_M, HAS_SCALE, DESCRIPTORS)
    if D1 < D:
        _store_out(acc_2, X2, Y2, Bias2, LayerScale, m_0, stride_x, n_rows, D, D1, D - D1, BLOCK_M, HAS_SCALE,
                   DESCRIPTORS)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launching. From here on x is (M, d) with dense rows.


def _single(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, scale, tanh, c) -> torch.Tensor:
    y = launch.empty(x.shape, result_type(x, fc2_weight, scale), x.device)
    (m, d), hidden, d_1 = x.shape, fc1_weight.shape[0], power_of_two_columns(x.shape[1])
    cut = (fc1_weight, fc2_weight, x, y)
    descriptors = c.descriptors and all(launch.fits_descriptor(t) for t in cut)
    tiles: list[launch.Tiles | None] = [None] * 14
    if descriptors:
        # 0 stands for the columns of x on this side of the cut.
        blocks = ((c.block_h, 0), (0, c.block_h), (c.block_m, 0), (c.block_m, 0))
        for i, (tensor, block) in enumerate(zip(cut, blocks, strict=True)):
            for side, columns in enumerate((d_1, d - d_1)):
                if columns:
                    block_ = tuple(size or columns for size in block)
                    tiles[1 + 2 * i + side] = launch.Tiles(tuple(tensor.shape), tensor.stride(), block_)
    scalars = (
        x.stride(0), fc1_weight.stride(0), fc2_weight.stride(0), m, eps, d, d_1, hidden, c.block_m, c.block_h,
        gelu_form(fc1_weight.dtype, launch.architecture(x), tanh), scale is not None, descriptors,
        launch.dot_precision(fc1_weight.dtype),
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    plan = launch.Plan(_layernorm_mlp_fwd_kernel, triton.cdiv(m, c.block_m), tuple(tiles), scalars, options)
    halves = [half for t in cut for half in (t, t if d_1 < d else None)]
    plan.run(x, *halves, norm_weight, norm_bias, fc1_bias, fc2_bias, scale)
    return y


def run(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    eps: float,
    strategy: str | None = None,
    config: configs.MlpConfig | None = None,
    layer_scale: torch.Tensor | None = None,
    tanh: bool = False,
) -> torch.Tensor:
    """The operator for x (M, d), dense rows.

    Args:
        strategy: "single" or "split", config: of "single"; instead of the table's choice.
    """
    if x.numel() == 0:
        return launch.empty(x.shape, result_type(x, fc2_weight, layer_scale), x.device)
    (m, d), hidden, architecture = x.shape, fc1_weight.shape[0], launch.architecture(x)
    scaled = layer_scale is not None
    strategy = strategy or configs.layernorm_mlp(architecture, fc1_weight.element_size(), d, scaled)
    c = config or configs.mlp(architecture, m)
    if strategy == "single" and fits_rows(d) and hidden % c.block_h == 0:
        of_fc2 = fc2_weight, fc2_bias, eps, layer_scale, tanh, c
        return _single(x, norm_weight, norm_bias, fc1_weight, fc1_bias, *of_fc2)
    h = normalised_product(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, "tanh" if tanh else True)
    return product(h, fc2_weight, fc2_bias, x, layer_scale=layer_scale)


def _check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale) -> None:
    """Raises ValueError unless the shapes fit together."""
    check_affine(x, norm_weight, norm_bias)
    check_linear("fc1_weight", x, fc1_weight, fc1_bias)
    expected = (x.shape[-1], fc1_weight.shape[0])
    if fc2_weight.shape != expected or fc2_bias.shape != expected[:1]:
        raise ValueError(
            f"fc2_weight and fc2_bias must be {expected} and {expected[:1]}, "
            f"got {tuple(fc2_weight.shape)} and {tuple(fc2_bias.shape)}"
        )
    check_layer_scale(layer_scale, fc2_weight)


def _check_all(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale) -> None:
    """Raises KernelError or ValueError unless devices, types and shapes fit together."""
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    launch.check_device(x, *parameters)
    launch.check_floats("x", x)
    check_types(fc1_weight, bias=fc1_bias, norm_weight=norm_weight, norm_bias=norm_bias, layer_scale=layer_scale)
    launch.check_floats("fc2_weight", fc2_weight, (fc1_weight.dtype,))
    launch.check_floats("fc2_bias", fc2_bias, (fc1_weight.dtype,))
    _check(x, *parameters)


def _dense(tensors) -> list[torch.Tensor | None]:
    return [None if t is None else launch.rows_contiguous(t) for t in tensors]


def _layernorm_mlp_kernel(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, layer_scale=None, tanh=False
) -> torch.Tensor:
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    _check_all(x, *parameters)
    *parameters, layer_scale = _dense(parameters)
    return run(as_rows(x), *parameters, eps, layer_scale=layer_scale, tanh=tanh).view(x.shape)


def _layernorm_mlp_hidden_kernel(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, layer_scale=None
) -> tuple:
    """The result, and fc1(layer_norm(x)) before the GELU."""
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    _check_all(x, *parameters)
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale = _dense(parameters)
    rows = as_rows(x)
    normed = run_layernorm(rows, norm_weight, norm_bias, eps, fc1_weight.dtype)
    a = launch.call(F.linear, normed, fc1_weight, fc1_bias)
    y = product(launch.call(F.gelu, a), fc2_weight, fc2_bias, rows, layer_scale=layer_scale)
    return y.view(x.shape), a.view(*x.shape[:-1], fc1_weight.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _layernorm_mlp_fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    parameters, (_, layer_scale, *_) = args[:6], (*args[6:], None)
    _check(x, *parameters, layer_scale)
    return x.new_empty(x.shape, dtype=result_type(x, parameters[4], layer_scale))


def _layernorm_mlp_hidden_fake(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a = x.new_empty(*x.shape[:-1], args[2].shape[0], dtype=args[2].dtype)
    return _layernorm_mlp_fake(x, *args), a


def _layernorm_mlp_reference(x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, *args: Any):
    # x and the LayerNorm's parameters may have different types, which not every backend of PyTorch takes.
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    out = reference.layernorm_mlp(x.to(wide), norm_weight.to(wide), norm_bias.to(wide), *args)
    return out.to(result_type(x, args[2], *args[5:6])).contiguous()


def _layernorm_mlp_flops(
    x: tuple[int, ...], norm_weight: tuple, norm_bias: tuple, fc1_weight: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    return 2 * linear_flops(x, fc1_weight)


def _layernorm_mlp_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    """Nothing for `eps` and `tanh`."""
    (*tensors, fc2_bias, eps, layer_scale, tanh), (grad, *_), (pre_activation,) = inputs, grads, outputs or (None,)
    if layer_scale is None:
        found = LAYERNORM_MLP_BACKWARD(grad, *tensors, eps, needed[:7], pre_activation, None, tanh)
        return *found, None, None, None
    of_scale = None
    if needed[8]:  # the branch is computed again
        *of_fc1, fc2_weight = tensors
        a = layernorm_linear(*of_fc1, eps) if pre_activation is None else pre_activation
        h = F.gelu(a, approximate="tanh" if tanh else "none")
        of_scale = of_layer_scale(grad, layer_scale, F.linear(h, fc2_weight, fc2_bias))
    of_branch = grad * layer_scale
    found = LAYERNORM_MLP_BACKWARD(of_branch, *tensors, eps, needed[:7], pre_activation, grad, tanh)
    return *found, None, of_scale, None


def _layernorm_mlp_hidden_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> Any:
    grad, of_hidden = grads
    if grad is None or of_hidden is not None:
        return None
    return _layernorm_mlp_backward((*inputs, False), outputs, grads, needed)[:-1]


_layernorm_mlp = define(
    "layernorm_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
    " Tensor fc2_weight, Tensor fc2_bias, float eps, Tensor? layer_scale=None, bool tanh=False) -> Tensor",
    kernel=_layernorm_mlp_kernel,
    reference=_layernorm_mlp_reference,
    fake=_layernorm_mlp_fake,
    flops=_layernorm_mlp_flops,
    autocast=lambda dtype, args: (*args[:3], *(t.to(dtype) for t in args[3:7]), *args[7:]),
    backward=_layernorm_mlp_backward,
)


_layernorm_mlp_hidden = define(
    "layernorm_mlp_hidden(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
    " Tensor fc2_weight, Tensor fc2_bias, float eps, Tensor? layer_scale=None) -> (Tensor, Tensor)",
    kernel=_layernorm_mlp_hidden_kernel,
    reference=reference_backward.layernorm_mlp_hidden,
    fake=_layernorm_mlp_hidden_fake,
    flops=_layernorm_mlp_flops,
    autocast=lambda dtype, args: (*args[:3], *(t.to(dtype) for t in args[3:7]), *args[7:]),
    backward=_layernorm_mlp_hidden_backward,
    keep_results=(1,),
)


def layernorm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    eps: float = 1e-5,
    layer_scale: torch.Tensor | None = None,
    tanh: bool = False,
) -> torch.Tensor:
    """x + layer_scale * fc2(gelu(fc1(layer_norm(x)))), with the exact (erf) GELU; x is kept for its gradient.

    Args:
        x: (..., d), bfloat16, float16 or float32. norm_weight, norm_bias: (d,), of any of these types.
        fc1_weight: (d_ff, d), fc1_bias: (d_ff,), fc2_weight: (d, d_ff), fc2_bias: (d,), all of one of these types.
        eps: added to the variance. layer_scale: (d,), of any of these types, or None for ones.
        tanh: the approximation of the GELU by tanh, that of PyTorch's approximate="tanh".
    Returns:
        (..., d), the type of x, or if that is wider of the weights or of layer_scale.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.

    Under autocast the four weights and biases are cast; x and layer_scale, and with them the result, stay as they are.
    The gradient of layer_scale, unlike the others, computes the second product again.
    """
    launch.check_device(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    forbid_forward_mode()
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _layernorm_mlp(x, *parameters, eps, layer_scale, tanh)


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
    """`layernorm_mlp`, and the hidden layer before its GELU, which is kept: the gradient has one product less.

    Args, Raises: as `layernorm_mlp`.
    Returns:
        What that returns, and fc1(layer_norm(x)), (..., d_ff), the type of the weights.

    With a gradient of the second result, gradients are the eager reference's.
    """
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    launch.check_device(x, *parameters, layer_scale)
    forbid_forward_mode()
    return _layernorm_mlp_hidden(x, *parameters, eps, layer_scale)
