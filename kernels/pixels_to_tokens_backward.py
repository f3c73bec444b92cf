"""The gradient of the patch embedding's weights, from bytes: patches are never in memory.

    dY (B, N, d), pixels (B, H, W, 3) uint8  ->  (d, 3 P^2): dY^T patches / 128

The gradient of all that is added to the tokens, positions, extra tokens and biases, is a sum of dY over the images and
of that over the patches, which PyTorch makes in one pass (kernels/pixels_to_tokens.py). The weights need a product
over all B * N patches. A library would read the patches from memory, in half types 1.5 KB each at P = 16, as much as a
token at width 768, and they would have to be written first. So this kernel reads the bytes and converts them on the
way, as forward: a byte less 128 is exact in every type, and normalisation is part of the weights, not of the patches.

The result has few tiles, the sum many terms. Several programs share a tile, each with a range of the rows and a float32
sum of its own, and kernels/partial_sums.py adds those in a fixed order: no atomics, a second run gives the same bits.
How many follows from shapes alone, and is bounded: tiles times ranges are not much more than PROGRAMS.

dY is the first operand, transposed where it lies in shared memory, and the converted bytes the second: see
kernels/pixels_to_tokens.py for why they must not be the first. Rows beyond the last patch read it again, times 0.

Limits: as forward. Reference: `pixels_to_tokens_backward_reference`. Test:
tests/kernels/test_pixels_to_tokens_backward.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, configs_backward, launch, partial_sums, reference
from segmenter.kernels.operators import define, forbid_forward_mode
from segmenter.kernels.pixels import centred, patches, readable
from segmenter.kernels.reference import CENTRE

PROGRAMS = 2 * configs.MULTIPROCESSORS  # that the sum is shared among, about


@triton.jit
def _pixels_to_tokens_bwd_kernel(
    DY, Pixels, Partials,  # (B, N, D), (B, H, W, 3) uint8, (n_ranges, D, 3 P^2) float32
    stride_yb, stride_yn, stride_pb, stride_ph, grid_h, grid_w, n_rows, range_rows,
    D: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 3 * P * P
    N_BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    N_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N * N_BLOCKS_K
    dtype: tl.constexpr = DY.dtype.element_ty
    pid = tl.program_id(0)
    part = pid // N_TILES  # programs of one range run side by side: they share its rows in the L2 cache
    offs_n = pid % N_TILES // N_BLOCKS_K * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid % N_BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < D, offs_k < K
    n_patches = grid_h * grid_w
    offs_p = (offs_k // (3 * P)).to(tl.int64) * stride_ph + offs_k % (3 * P)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    start = part * range_rows
    end = tl.minimum(start + range_rows, n_rows)
    for m_0 in tl.range(start, end, BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        rows = tl.minimum(offs_m, n_rows - 1)
        image = (rows // n_patches).to(tl.int64)
        patch = rows % n_patches
        patch_y, patch_x = patch // grid_w, patch % grid_w
        corner = image * stride_pb + (patch_y * P).to(tl.int64) * stride_ph + patch_x * (3 * P)
        pointers = Pixels + corner[:, None] + offs_p[None, :]
        x = tl.load(pointers) if K % BLOCK_K == 0 else tl.load(pointers, mask=mask_k[None, :], other=128)
        dy_rows = image * stride_yb + patch.to(tl.int64) * stride_yn
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        dy = tl.load(DY + dy_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
        acc = tl.dot(dy.T, centred(x, dtype), acc, input_precision=PRECISION)

    y = Partials + part.to(tl.int64) * D * K + offs_n[:, None] * K + offs_k[None, :]
    tl.store(y, acc, mask=mask_n[:, None] & mask_k[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _run(
    dy: torch.Tensor,
    pixels: torch.Tensor,
    patch_size: int,
    config: configs_backward.PatchWeightsConfig | None = None,
) -> torch.Tensor:
    """`pixels_to_tokens_backward` of arguments that were checked.

    Args:
        config: instead of the table's choice.
    """
    (B, N, d), P, K = dy.shape, patch_size, 3 * patch_size**2
    precision = launch.dot_precision(dy.dtype)
    architecture = launch.architecture(dy)
    c = config or configs_backward.patch_weights(architecture, dy.element_size(), precision)
    if architecture in ("sm_100", "sm_103") and dy.dtype == torch.float32 and precision == "ieee":
        precision = "tf32x3"  # see kernels/pixels_to_tokens.py
    tiles, blocks = triton.cdiv(d, c.block_n) * triton.cdiv(K, c.block_k), triton.cdiv(B * N, c.block_m)
    range_blocks = triton.cdiv(blocks, max(1, PROGRAMS // max(1, tiles)))
    n_ranges = triton.cdiv(blocks, range_blocks) if blocks and tiles else 0
    partials = launch.empty((n_ranges, d, K), torch.float32, dy.device)
    if n_ranges:
        dy, pixels = launch.rows_contiguous(dy), readable(pixels, P)
        grid_h, grid_w = pixels.shape[1] // P, pixels.shape[2] // P
        scalars = (
            *dy.stride()[:2], *pixels.stride()[:2], grid_h, grid_w, B * N, range_blocks * c.block_m,
            d, P, c.block_m, c.block_n, c.block_k, precision,
        )  # fmt: skip
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
        plan = launch.Plan(_pixels_to_tokens_bwd_kernel, n_ranges * tiles, (None,) * 3, scalars, options)
        plan.run(dy, pixels, partials)
    return partial_sums.add(partials, (d, K), dy.dtype, 0.5)  # bytes are in units of 64


def _shape(dy: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """The result's (d, 3 P^2). Raises ValueError unless dy is (B, N, d), N the number of patches of an image."""
    B, grid_h, grid_w = reference.patch_grid(pixels, patch_size)
    if dy.ndim != 3 or dy.shape[:2] != (B, grid_h * grid_w):
        raise ValueError(f"dy must be {(B, grid_h * grid_w)} and a width, one row a patch, got {tuple(dy.shape)}")
    return dy.shape[2], 3 * patch_size**2


def _pixels_to_tokens_backward_kernel(dy: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    launch.check_device(dy, pixels)
    launch.check_floats("pixels", pixels, (torch.uint8,))
    launch.check_floats("dy", dy)
    _shape(dy, pixels, patch_size)
    return _run(dy, pixels, patch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def pixels_to_tokens_backward_reference(dy: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The same in eager PyTorch, with the patches in memory."""
    _shape(dy, pixels, patch_size)
    x = (patches(pixels, patch_size).to(dy.dtype) - CENTRE) / CENTRE
    return dy.flatten(0, 1).T @ x.flatten(0, 1)


def _pixels_to_tokens_backward_fake(dy: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    return dy.new_empty(_shape(dy, pixels, patch_size))


def _pixels_to_tokens_backward_flops(dy: tuple, pixels: Any, patch_size: int, **kwargs: Any) -> int:
    B, N, d = dy
    return 6 * B * N * d * patch_size**2


PIXELS_TO_TOKENS_BACKWARD = define(
    "pixels_to_tokens_backward(Tensor dy, Tensor pixels, int patch_size) -> Tensor",
    kernel=_pixels_to_tokens_backward_kernel,
    reference=pixels_to_tokens_backward_reference,
    fake=_pixels_to_tokens_backward_fake,
    flops=_pixels_to_tokens_backward_flops,
    autocast=lambda dtype, args: args,  # dy has the type of the weights that were multiplied already
)


def pixels_to_tokens_backward(dy: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The gradient of folded weights; `pixels_to_tokens` calls it by itself in a backward pass.

    Args:
        dy: of the patches' tokens, (B, N, d), bfloat16, float16 or float32, any strides: read in place where the last
            dimension is dense.
        pixels: (B, H, W, 3) uint8, as forward. patch_size: P.
    Returns:
        (d, 3 P^2), the type of dy.
    Raises:
        KernelError: another type or device. ValueError: shapes that do not go together.

    float32 is multiplied as `torch.set_float32_matmul_precision` says.
    """
    launch.check_device(dy, pixels)
    forbid_forward_mode()
    return PIXELS_TO_TOKENS_BACKWARD(dy, pixels, patch_size)
