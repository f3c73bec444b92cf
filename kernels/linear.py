"""Matrix product with everything around it: residual + s * act(LayerNorm(x) W^T + b), each part optional.

    x (..., K), W (N, K), b (N,), s (N,), residual (..., N)  ->  (..., N)

`linear` adds bias, exact GELU, LayerScale s and residual to the float32 accumulator, before the one rounding of the
result. Against eager PyTorch that saves a write and a read of (M, N) for the GELU, for s and for the sum: at Seg-B/16,
512x512, 2 * 1025 * 3072 elements an image and layer in fc1, 12.6 MB in bfloat16. s is read anew on every call: folded
into W and b it would be rounded once more, and changes in place would have to be followed.

`layernorm_linear` puts a LayerNorm in front, in one of three ways (`configs.layernorm_linear` chooses):
- "separate": LayerNorm writes its result in W's type, then the product: cuBLASLt's, if no GELU follows.
- "fold": the LayerNorm becomes part of the product. With W' = W * gamma, rounded to W's type, s = the row sums of this
  rounded W', b' = W beta + b, it is rstd * (x W'^T - mean * s) + b'. x goes into the product unchanged; W', s and b'
  are prepared anew on every call, so that weights can change in place under a CUDA graph.
- "rows": whole rows of x are normalised in the product's own kernel (narrow layers, where a row is one tile).

Limits: any sizes; tuned for widths of 192, 384, 768 and 1024. Gradients are kernels/linear_backward.py's, whichever way
it was.
Reference: `reference.linear`, `reference.layernorm_linear`. Test: tests/kernels/test_linear.py.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, reference
from segmenter.kernels.blocks import gelu, gelu_form, load_tile, normalised_rows, power_of_two_columns, program_block
from segmenter.kernels.checks import as_rows, check_affine, check_layer_scale, check_linear, check_types, result_type
from segmenter.kernels.layernorm import run as run_layernorm
from segmenter.kernels.layernorm import statistics
from segmenter.kernels.linear_backward import LAYERNORM_LINEAR_BACKWARD, LINEAR_BACKWARD, of_layer_scale
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _linear_fwd_kernel(
    X, W, Residual, Y, Bias, Mean, Rstd, RowSum,  # (M, K), (N, K), (M, N) twice, (N,), (M,) twice, (N,): see the flags
    LayerScale,  # (N,)
    stride_x, stride_w, stride_r, n_rows, n_blocks_m,
    N: tl.constexpr,
    K: tl.constexpr,  # a constant: with a runtime K, ptxas 12.8 waits for every single wgmma
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,  # x is to be normalised, W is folded: see the file's docstring
    GELU: tl.constexpr,  # a FORM of `gelu`, or None
    HAS_SCALE: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_m, block_n = program_block(n_blocks_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    m_0, n_0 = block_m * BLOCK_M, block_n * BLOCK_N
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    offs_n = n_0 + tl.arange(0, BLOCK_N)
    # Tiles that hang over the edge read the last row again: a product's row depends on no other, so no masks.
    x_rows = tl.minimum(offs_m, n_rows - 1).to(tl.int64)
    w_rows = tl.minimum(offs_n, N - 1).to(tl.int64) - n_0

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k_0 in tl.range(0, K, BLOCK_K):
        x = load_tile(X, (m_0, k_0), x_rows - m_0, stride_x, None, K, BLOCK_K, DESCRIPTORS)
        w = load_tile(W, (n_0, k_0), w_rows, stride_w, None, K, BLOCK_K, DESCRIPTORS)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)

    mask_n = offs_n < N
    if NORM:
        mean = tl.load(Mean + x_rows)
        rstd = tl.load(Rstd + x_rows)
        row_sum = tl.load(RowSum + offs_n, mask=mask_n, other=0.0)
        acc = (acc - mean[:, None] * row_sum[None, :]) * rstd[:, None]
    if HAS_BIAS:
        acc = acc + tl.load(Bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU is not None:
        acc = gelu(acc, GELU)
    mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        if DESCRIPTORS:  # the copy engine reads zeros beyond the edges and writes nothing there
            residual = Residual.load([m_0, n_0])
        else:
            residual = tl.load(Residual + x_rows[:, None] * stride_r + offs_n[None, :], mask=mask, other=0.0)
    if HAS_SCALE:  # behind the residual, where the bias takes no registers any more: else one program less fits
        acc = acc * tl.load(LayerScale + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc = acc + residual.to(tl.float32)
    if DESCRIPTORS:
        Y.store([m_0, n_0], acc.to(Y.dtype))
    else:
        tl.store(Y + x_rows[:, None] * N + offs_n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _fold_kernel(
    W, Gamma, Beta, Bias, Folded, RowSum, FoldedBias,  # (N, K), (K,) twice, (N,), (N, K), (N,) float32 twice
    stride_w,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n.to(tl.int64)
    mask_n = offs_n < N
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias += tl.load(Bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for k_0 in tl.range(0, K, BLOCK_K):
        offs_k = k_0 + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k[None, :] < K)
        w = tl.load(W + rows[:, None] * stride_w + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        gamma = tl.load(Gamma + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        beta = tl.load(Beta + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        folded = (w * gamma[None, :]).to(Folded.dtype.element_ty)
        tl.store(Folded + rows[:, None] * K + offs_k[None, :], folded, mask=mask)
        row_sum += tl.sum(folded.to(tl.float32), 1)
        bias += tl.sum(w * beta[None, :], 1)
    tl.store(RowSum + offs_n, row_sum, mask=mask_n)
    tl.store(FoldedBias + offs_n, bias, mask=mask_n)


@triton.jit
def _layernorm_linear_rows_kernel(
    X, W1, W2, Y, Gamma, Beta, Bias,  # (M, K), W (N, K) twice, (M, N), (K,) twice, (N,)
    stride_x, stride_w, n_rows, eps,
    N: tl.constexpr, K: tl.constexpr,
    K1: tl.constexpr,  # the largest power of two up to K; K - K1 is 0 or another one
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the output columns of one row block
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    m_0 = (pid // SPLIT) * BLOCK_M
    dtype: tl.constexpr = W1.dtype if DESCRIPTORS else W1.dtype.element_ty
    x_1, x_2 = normalised_rows(X, Gamma, Beta, m_0, stride_x, n_rows, eps, K, K1, BLOCK_M, dtype)
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    for n_0 in tl.range((pid % SPLIT) * BLOCK_N, N, SPLIT * BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        w_rows = tl.minimum(offs_n, N - 1).to(tl.int64) - n_0
        w = load_tile(W1, (n_0, 0), w_rows, stride_w, None, K1, K1, DESCRIPTORS)
        acc = tl.dot(x_1, w.T, input_precision=PRECISION)
        if K1 < K:
            w = load_tile(W2, (n_0, K1), w_rows, stride_w, None, K - K1, K - K1, DESCRIPTORS)
            acc = tl.dot(x_2, w.T, acc, input_precision=PRECISION)
        mask_n = offs_n < N
        if HAS_BIAS:
            acc = acc + tl.load(Bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GELU is not None:
            acc = gelu(acc, GELU)
        if DESCRIPTORS:
            Y.store([m_0, n_0], acc.to(Y.dtype))
        else:
            mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
            y_rows = Y + offs_m.to(tl.int64)[:, None] * N
            tl.store(y_rows + offs_n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launching. From here on x is (M, K) and residual (M, N), with dense rows.


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gelu: bool | str = False,
    layer_scale: torch.Tensor | None = None,
    folded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    config: configs.LinearConfig | None = None,
) -> torch.Tensor:
    """residual + layer_scale * act(x weight^T + bias) by our kernel, (M, N).

    Args:
        gelu: True for the exact one, "tanh" for its approximation.
        folded: (mean, rstd, row_sum) if x is to be normalised and `weight` and `bias` come from `_fold`.
        config: instead of the table's choice.
    """
    y = launch.empty((x.shape[0], weight.shape[0]), result_type(weight, residual, layer_scale), x.device)
    if y.numel() == 0:
        return y
    mean, rstd, row_sum = folded or (None, None, None)
    matrices, precision = (x, weight, residual, y), launch.dot_precision(x.dtype)
    plan = _plan(matrices, bias, gelu, layer_scale is not None, folded, precision, config)
    plan.run(*matrices, bias, mean, rstd, row_sum, layer_scale)
    return y


def chosen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    layer_scale: torch.Tensor | None,
) -> torch.Tensor:
    """`product`, or the same by cuBLASLt where the table says so."""
    if configs.linear_by_library(gelu, residual is not None or layer_scale is not None):
        return launch.call(F.linear, x, weight, bias)
    return product(x, weight, bias, residual, gelu, layer_scale)


def _plan(matrices, bias, gelu, has_scale, folded, precision, config) -> launch.Plan:
    x, weight, residual, _ = matrices
    (m, k), n, architecture = x.shape, weight.shape[0], launch.architecture(x)
    stride_r = 0 if residual is None else residual.stride(0)
    c = config or configs.linear(architecture, x.element_size(), m, n, gelu, precision)
    descriptors = c.descriptors and all(t is None or launch.fits_descriptor(t) for t in matrices)
    tiles: list[launch.Tiles | None] = [None] * 9
    if descriptors:
        blocks = ((c.block_m, c.block_k), (c.block_n, c.block_k), (c.block_m, c.block_n), (c.block_m, c.block_n))
        for i, (tensor, block) in enumerate(zip(matrices, blocks, strict=True)):
            if tensor is not None:
                tiles[i] = launch.Tiles(tuple(tensor.shape), tensor.stride(), block)
    n_blocks_m = triton.cdiv(m, c.block_m)
    scalars = (
        x.stride(0), weight.stride(0), stride_r, m, n_blocks_m, n, k, c.block_m, c.block_n, c.block_k, c.group_m,
        bias is not None, residual is not None, folded is not None,
        gelu_form(x.dtype, architecture, gelu == "tanh") if gelu else None, has_scale, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    return launch.Plan(_linear_fwd_kernel, n_blocks_m * triton.cdiv(n, c.block_n), tuple(tiles), scalars, options)


def _fold(
    norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight * norm_weight in weight's type, the sums of its rows, weight norm_bias + bias), the last two float32."""
    folded = launch.empty(weight.shape, weight.dtype, weight.device)
    row_sum, folded_bias = (launch.empty(weight.shape[:1], torch.float32, weight.device) for _ in range(2))
    n, k = weight.shape
    c = configs.fold(k)
    scalars = (weight.stride(0), n, k, c.block_m, c.block_n, bias is not None)
    options = {"num_warps": c.num_warps, "num_stages": 1}
    plan = launch.Plan(_fold_kernel, triton.cdiv(n, c.block_m), (None,) * 7, scalars, options)
    plan.run(weight, norm_weight, norm_bias, bias, folded, row_sum, folded_bias)
    return folded, row_sum, folded_bias


def _rows(x, norm_weight, norm_bias, weight, bias, eps, gelu, config) -> torch.Tensor:
    (m, k), n, architecture = x.shape, weight.shape[0], launch.architecture(x)
    y = launch.empty((m, n), weight.dtype, x.device)
    precision, k_1 = launch.dot_precision(weight.dtype), power_of_two_columns(k)
    c = config or configs.rows(architecture, m, n)
    descriptors = c.descriptors and launch.fits_descriptor(weight) and launch.fits_descriptor(y)
    tiles: list[launch.Tiles | None] = [None] * 7
    if descriptors:
        tiles[1] = launch.Tiles(tuple(weight.shape), weight.stride(), (c.block_n, k_1))
        tiles[2] = launch.Tiles(tuple(weight.shape), weight.stride(), (c.block_n, k - k_1)) if k_1 < k else None
        tiles[3] = launch.Tiles(tuple(y.shape), y.stride(), (c.block_m, c.block_n))
    split = min(c.split, triton.cdiv(n, c.block_n))
    scalars = (
        x.stride(0), weight.stride(0), m, eps, n, k, k_1, c.block_m, c.block_n, split,
        bias is not None, gelu_form(weight.dtype, architecture, gelu == "tanh") if gelu else None, descriptors,
        precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    programs = triton.cdiv(m, c.block_m) * split
    plan = launch.Plan(_layernorm_linear_rows_kernel, programs, tuple(tiles), scalars, options)
    plan.run(x, weight, weight if k_1 < k else None, y, norm_weight, norm_bias, bias)
    return y


def normalised_product(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    gelu: bool | str,
    strategy: str | None = None,
    config: configs.LinearConfig | configs.RowsConfig | None = None,
) -> torch.Tensor:
    """act(layer_norm(x) weight^T + bias), (M, N).

    Args:
        gelu: as for `product`.
        strategy, config: instead of the table's choice. "library" (without GELU), "separate", "fold" or "rows".
    """
    (m, k), n = x.shape, weight.shape[0]
    if m == 0 or n == 0:
        return launch.empty((m, n), weight.dtype, x.device)
    if strategy is None:
        size, same_type = weight.element_size(), x.dtype == weight.dtype
        strategy = configs.layernorm_linear(launch.architecture(x), size, m, k, gelu, same_type)
    if strategy == "rows":
        return _rows(x, norm_weight, norm_bias, weight, bias, eps, gelu, config)
    if strategy == "fold":
        mean, rstd = statistics(x, eps)
        folded, row_sum, folded_bias = _fold(norm_weight, norm_bias, weight, bias)
        return product(x, folded, folded_bias, gelu=gelu, folded=(mean, rstd, row_sum), config=config)
    h = run_layernorm(x, norm_weight, norm_bias, eps, weight.dtype)
    if strategy == "library":
        return launch.call(F.linear, h, weight, bias)
    return product(h, weight, bias, gelu=gelu, config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    layer_scale: torch.Tensor | None = None,
) -> tuple[int, ...]:
    check_linear("weight", x, weight, bias)
    check_layer_scale(layer_scale, weight)
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, got {tuple(residual.shape)}")
    return shape


def _linear_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    launch.check_device(x, weight, bias, residual, layer_scale)
    check_types(weight, x=x, bias=bias, residual=residual, layer_scale=layer_scale)
    shape = _linear_shape(x, weight, bias, residual, layer_scale)
    dense = (None if t is None else launch.rows_contiguous(t) for t in (weight, bias, layer_scale))
    (weight, bias, layer_scale), rows = dense, None if residual is None else as_rows(residual)
    return chosen(as_rows(x), weight, bias, rows, gelu, layer_scale).view(shape)


def _layernorm_linear_kernel(x, norm_weight, norm_bias, weight, bias, eps, gelu=False) -> torch.Tensor:
    launch.check_device(x, norm_weight, norm_bias, weight, bias)
    launch.check_floats("x", x)
    check_types(weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_affine(x, norm_weight, norm_bias)
    shape = _linear_shape(x, weight, bias, None)
    tensors = (None if t is None else launch.rows_contiguous(t) for t in (norm_weight, norm_bias, weight, bias))
    return normalised_product(as_rows(x), *tensors, eps, gelu).view(shape)


def _linear_fake(x, weight, bias, residual, gelu, layer_scale=None) -> torch.Tensor:
    shape = _linear_shape(x, weight, bias, residual, layer_scale)
    return x.new_empty(shape, dtype=result_type(weight, residual, layer_scale))


def _layernorm_linear_fake(x, norm_weight, norm_bias, weight, bias, *_) -> torch.Tensor:
    check_affine(x, norm_weight, norm_bias)
    return x.new_empty(_linear_shape(x, weight, bias, None), dtype=weight.dtype)


def _layernorm_linear_reference(x, norm_weight, norm_bias, weight, bias, eps, gelu):
    # x and the LayerNorm's parameters may have different types, which not every backend of PyTorch takes.
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    args = (x.to(wide), norm_weight.to(wide), norm_bias.to(wide), weight, bias, eps, gelu)
    return reference.layernorm_linear(*args).contiguous()


def linear_flops(x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Two operations a multiply-add of the product, from shapes; what surrounds it does not count."""
    return 2 * math.prod(x) * weight[0]


def _linear_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    (x, weight, bias, residual, gelu, layer_scale), (grad,) = inputs, grads
    of_residual, of_scale = grad.to(residual.dtype) if needed[3] else None, None
    if needed[5]:
        of_scale = of_layer_scale(grad, layer_scale, _linear(x, weight, bias, None, gelu))
    grad = grad if layer_scale is None else grad * layer_scale
    found = LINEAR_BACKWARD(grad, x, weight, bias, gelu, needed[:3]) if any(needed[:3]) else (None,) * 3
    return *found, of_residual, None, of_scale


def _layernorm_linear_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    return *LAYERNORM_LINEAR_BACKWARD(*grads, *inputs, needed[:5], None), None, None


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gelu, Tensor? layer_scale=None) -> Tensor",
    kernel=_linear_kernel,
    reference=lambda *args: reference.linear(*args).contiguous(),
    fake=_linear_fake,
    flops=lambda x, weight, *args, **kwargs: linear_flops(x, weight),
    autocast=lambda dtype, args: (*(None if t is None else t.to(dtype) for t in args[:3]), *args[3:]),
    backward=_linear_backward,
)
_layernorm_linear = define(
    "layernorm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps,"
    " bool gelu) -> Tensor",
    kernel=_layernorm_linear_kernel,
    reference=_layernorm_linear_reference,
    fake=_layernorm_linear_fake,
    flops=lambda x, norm_weight, norm_bias, weight, *args, **kwargs: linear_flops(x, weight),
    autocast=lambda dtype, args: (*args[:3], *(None if t is None else t.to(dtype) for t in args[3:5]), *args[5:]),
    backward=_layernorm_linear_backward,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + layer_scale * act(x weight^T + bias), act the exact (erf) GELU or nothing; x is kept for its gradient.

    Args:
        x: (..., d_in), bfloat16, float16 or float32. weight: (d_out, d_in), bias: (d_out,), the type of x.
        residual: (..., d_out), layer_scale: (d_out,), of any of these types.
    Returns:
        (..., d_out), the type of x, or if that is wider of the residual or layer_scale.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.

    float32 is multiplied as `torch.set_float32_matmul_precision` says. Under autocast x, weight and bias are cast, the
    residual and layer_scale stay as they are. The gradient of layer_scale computes the product again.
    """
    launch.check_device(x, weight, bias, residual, layer_scale)
    forbid_forward_mode()
    return _linear(x, weight, bias, residual, gelu, layer_scale)


def layernorm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    gelu: bool = False,
) -> torch.Tensor:
    """act(layer_norm(x) weight^T + bias), act the exact (erf) GELU or nothing; x is kept for its gradient.

    Args:
        x: (..., d), bfloat16, float16 or float32. norm_weight, norm_bias: (d,), of any of these types.
        weight: (d_out, d), bias: (d_out,), of one of these types.
        eps: added to the variance.
    Returns:
        (..., d_out), the type of weight.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.
    """
    launch.check_device(x, norm_weight, norm_bias, weight, bias)
    forbid_forward_mode()
    return _layernorm_linear(x, norm_weight, norm_bias, weight, bias, eps, gelu)
