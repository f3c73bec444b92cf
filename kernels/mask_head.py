"""Masks of the mask transformer: LayerNorm over classes of the cosine between projected patches and classes.

    patches (B, N, d), classes (B, K, d), two projections (d, d)  ->  (B, N, K), class last

One pass over the patches: neither the projected patches, nor their norms, nor the cosines reach memory. Eager PyTorch
writes and reads each of them: at Seg-B/16, 512x512, 150 classes 1024 * (3*768 + 2*150) elements an image, 5.3 MB in
bfloat16, in five kernels for one.

The K classes are few: PyTorch projects them and takes their norms. (Squared in the kernel they are squared again in
every program, some 300 instructions a warp and chunk at 256 classes, and spill.) Then one program takes BLOCK_M patches
of one image and walks over the projected width in chunks of BLOCK_D columns: p = x W[:, chunk] in float32, its squares
into the patches' norms, p c[:, chunk]^T into BLOCK_M x K_PAD cosines. Norms are divided out at the end, and the
LayerNorm is done on the same registers. The chunks are what lets one kernel serve any width: a row of p does not fit.

p is rounded to the tensors' type for the second product; norms, accumulators and statistics are float32, the variance
is of centred values. There is no epsilon in the two L2 norms: a zero patch makes its own row NaN, a zero class every
row of its image, as in the reference.

Limits: d a multiple of 16 (192, 384, 768 and 1024 are what it is tuned for), any N, any K: up to 256 classes in one
pass; above that a program takes 256 classes, and the cosines go through memory, in float32, to `layernorm`.
Reference: `reference.mask_head`. Test: tests/kernels/test_mask_head.py.
"""

import warnings
from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, layernorm, reference
from segmenter.kernels.blocks import load_tile
from segmenter.kernels.mask_head_backward import MASK_HEAD_BACKWARD
from segmenter.kernels.masks import MAX_CLASSES, check, check_shapes, class_padding
from segmenter.kernels.operators import define, forbid_forward_mode


@triton.jit
def _mask_head_fwd_kernel(
    X, W, C, ClassNorm,  # (B, N, D), (1, D, D), (B, K, D) projected classes and (B, K) their norms, float32
    NormWeight, NormBias, Y,  # (K,) or None, (K,) or None, (B, N, K)
    stride_xb, stride_xn, stride_wn, stride_cb, stride_cn,
    n_patches, n_blocks, n_slabs, eps,
    D: tl.constexpr,
    N_CLASSES: tl.constexpr,  # one value a model; a runtime number makes the stores single elements, and they spill
    K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,  # else the cosines themselves are stored, K_PAD classes a program
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    k_0 = (pid % n_slabs) * K_PAD
    b = pid // n_slabs // n_blocks
    m_0 = (pid // n_slabs % n_blocks) * BLOCK_M

    rows_x = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_w = tl.arange(0, BLOCK_K).to(tl.int64)
    rows_c = tl.arange(0, K_PAD).to(tl.int64)
    if not DESCRIPTORS:
        X += b.to(tl.int64) * stride_xb
        C += b.to(tl.int64) * stride_cb
    cosine = tl.zeros([BLOCK_M, K_PAD], tl.float32)
    patch_norm2 = tl.zeros([BLOCK_M], tl.float32)
    for d_0 in tl.range(0, D, BLOCK_D):  # not flattened: triton 3.8's ptxas (12.9) then serialises every wgmma
        p = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i_0 in tl.range(0, D, BLOCK_K):
            x = load_tile(X, (b, m_0, i_0), rows_x, stride_xn, n_patches, D, BLOCK_K, DESCRIPTORS)
            w = load_tile(W, (0, i_0, d_0), rows_w, stride_wn, D, D, BLOCK_D, DESCRIPTORS)
            p = tl.dot(x, w, p, input_precision=PRECISION)
        c = load_tile(C, (b, k_0, d_0), rows_c, stride_cn, N_CLASSES, D, BLOCK_D, DESCRIPTORS)
        patch_norm2 += tl.sum(p * p, 1)
        cosine = tl.dot(p.to(c.dtype), c.T, cosine, input_precision=PRECISION)

    offs_m = m_0 + tl.arange(0, BLOCK_M)
    offs_k = k_0 + tl.arange(0, K_PAD)
    real = offs_k < N_CLASSES
    class_norm = tl.load(ClassNorm + b.to(tl.int64) * N_CLASSES + offs_k, mask=real, other=1.0)
    cosine = cosine * tl.rsqrt(patch_norm2)[:, None] * (1.0 / class_norm)[None, :]
    if NORM:
        mean = tl.sum(cosine, 1) * (1.0 / N_CLASSES)  # what is beyond the classes is 0
        centred = tl.where(real[None, :], cosine - mean[:, None], 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / N_CLASSES) + eps)[:, None]
        if NormWeight is not None:
            y = y * tl.load(NormWeight + offs_k, mask=real, other=0.0).to(tl.float32)[None, :]
        if NormBias is not None:
            y = y + tl.load(NormBias + offs_k, mask=real, other=0.0).to(tl.float32)[None, :]
    else:
        y = cosine
    rows = Y + (b.to(tl.int64) * n_patches + m_0) * N_CLASSES
    pointers = rows + tl.arange(0, BLOCK_M)[:, None] * N_CLASSES + offs_k[None, :]
    tl.store(pointers, y.to(Y.dtype.element_ty), mask=(offs_m[:, None] < n_patches) & real[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _run(
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    norm: bool = True,
    config: configs.MaskHeadConfig | None = None,
) -> torch.Tensor:
    """Masks, or without `norm` the cosines in float32.

    Args:
        patches: (B, N, d), the last dimension dense. classes: (B, K, d), projected already, contiguous.
        proj_patch: (d, d), the last dimension dense. norm_weight, norm_bias: (K,) contiguous or None.
        config: instead of the table's choice.
    Returns:
        (B, N, K).
    """
    B, N, _ = patches.shape
    y = launch.empty((B, N, classes.shape[1]), patches.dtype if norm else torch.float32, patches.device)
    if y.numel() == 0:
        return y
    class_norm = launch.call(torch.linalg.vector_norm, classes, dim=-1, dtype=torch.float32)
    plan = _plan(patches, classes, proj_patch, eps, norm, launch.dot_precision(patches.dtype), config)
    plan.run(patches, proj_patch.unsqueeze(0), classes, class_norm, norm_weight, norm_bias, y)
    return y


def _plan(patches, classes, proj_patch, eps, norm, precision, config) -> launch.Plan:
    B, N, d = patches.shape
    K = classes.shape[1]
    k_pad = class_padding(K)
    c = config or configs.mask_head(launch.architecture(patches), patches.element_size(), k_pad, d, B * N, precision)
    descriptors = c.descriptors and all(launch.fits_descriptor(t) for t in (patches, classes, proj_patch))
    n_blocks, n_slabs = triton.cdiv(N, c.block_m), triton.cdiv(K, k_pad)
    tiles: list[launch.Tiles | None] = [None] * 7
    if descriptors:
        blocks = ((c.block_m, c.block_k), (c.block_k, c.block_d), (k_pad, c.block_d))
        for i, (tensor, block) in enumerate(zip((patches, proj_patch.unsqueeze(0), classes), blocks, strict=True)):
            tiles[i] = launch.Tiles(tuple(tensor.shape), tensor.stride(), (1, *block))
    scalars = (
        *patches.stride()[:2], proj_patch.stride(0), *classes.stride()[:2],
        N, n_blocks, n_slabs, eps,
        d, K, k_pad, c.block_m, c.block_d, c.block_k, norm, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    return launch.Plan(_mask_head_fwd_kernel, B * n_blocks * n_slabs, tuple(tiles), scalars, options)


def _masks(
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    proj_classes: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    config: configs.MaskHeadConfig | None = None,
) -> torch.Tensor:
    projected = launch.contiguous(launch.call(torch.matmul, classes, proj_classes))
    patches, proj_patch = launch.rows_contiguous(patches), launch.rows_contiguous(proj_patch)
    norm_weight, norm_bias = (None if t is None else launch.rows_contiguous(t) for t in (norm_weight, norm_bias))
    if classes.shape[1] <= MAX_CLASSES:
        return _run(patches, projected, proj_patch, norm_weight, norm_bias, eps, config=config)
    cosine = _run(patches, projected, proj_patch, None, None, eps, norm=False, config=config)
    rows = layernorm.as_rows(cosine)
    return layernorm.run(rows, norm_weight, norm_bias, eps, patches.dtype).view(cosine.shape)


def _mask_head_kernel(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias, eps) -> torch.Tensor:
    check(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias)
    return _masks(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias, eps)


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _mask_head_fake(patches: torch.Tensor, classes: torch.Tensor, *args: Any) -> torch.Tensor:
    B, N, K, _ = check_shapes(patches, classes, *args[:4])
    return patches.new_empty(B, N, K)


def _mask_head_reference(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias, eps) -> torch.Tensor:
    check_shapes(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias)
    projections = (proj_patch, proj_classes)
    if all(t is None or t.dtype == patches.dtype for t in (norm_weight, norm_bias)):
        return reference.mask_head(patches, classes, *projections, norm_weight, norm_bias, eps).contiguous()
    # A float32 norm in a half-precision model, as under autocast: `layer_norm` on a GPU takes one type only.
    masks = reference.mask_head(patches, classes, *projections, None, None, eps)
    masks = masks if norm_weight is None else masks * norm_weight
    masks = masks if norm_bias is None else masks + norm_bias
    return masks.to(patches.dtype).contiguous()


def _mask_head_flops(patches: tuple[int, ...], classes: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    (B, N, d), K = patches, classes[1]
    return 2 * B * d * (N * d + K * d + N * K)


def _cast_all_but_norm(dtype: torch.dtype, args: tuple) -> tuple:
    return (*(x.to(dtype) for x in args[:4]), *args[4:])


def _mask_head_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    """Gradients of the arguments, from them and the gradient of the masks: nothing of the forward pass is used."""
    *tokens, norm_weight, norm_bias, eps = inputs
    wanted = [*needed[:4], needed[4] or needed[5]]
    *found, norm = MASK_HEAD_BACKWARD(grads[0], *tokens, norm_weight, eps, wanted)
    weight, bias = (
        norm[i].to(t.dtype) if n else None for i, (t, n) in enumerate(zip(inputs[4:6], needed[4:6], strict=True))
    )
    return *(gradient if n else None for gradient, n in zip(found, needed, strict=False)), weight, bias, None


_mask_head = define(
    "mask_head(Tensor patches, Tensor classes, Tensor proj_patch, Tensor proj_classes, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps) -> Tensor",
    kernel=_mask_head_kernel,
    reference=_mask_head_reference,
    fake=_mask_head_fake,
    flops=_mask_head_flops,
    autocast=_cast_all_but_norm,
    autocast_result=lambda masks: masks.float(),  # what layer_norm returns there
    backward=_mask_head_backward,
)


def mask_head(
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    proj_classes: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Class masks of the mask transformer; their gradient is kernels/mask_head_backward.py's.

    Args:
        patches: (B, N, d) decoded patch tokens. classes: (B, K, d) decoded class tokens, K >= 1. Both bfloat16,
            float16 or float32, with any strides: slices of one tensor are read in place.
        proj_patch, proj_classes: (d, d), applied as x @ proj, the type of patches.
        norm_weight, norm_bias: (K,) affine of the LayerNorm over the class axis, any of the three types, or None.
        eps: added to the variance over classes.
    Returns:
        (B, N, K), class last, contiguous, the type of patches (float32 under autocast).
    Raises:
        KernelError: another type, width or device. ValueError: shapes that do not go together.
    Warns:
        UserWarning: there are two classes.

    float32 is multiplied as `torch.set_float32_matmul_precision` says. Where a gradient is needed, the arguments and
    the result are kept: none of them may be written before the backward pass. Gradients of gradients are the
    reference's.
    """
    launch.check_device(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias)
    forbid_forward_mode()
    if classes.ndim == 3 and classes.shape[1] == 2 and not torch.compiler.is_compiling():
        warnings.warn(_TWO_CLASSES, stacklevel=2)
    return _mask_head(patches, classes, proj_patch, proj_classes, norm_weight, norm_bias, float(eps))


_TWO_CLASSES = (
    "the LayerNorm over two classes leaves only the sign of their difference, and next to no gradient: "
    "use three classes or more, or the linear decoder"
)
