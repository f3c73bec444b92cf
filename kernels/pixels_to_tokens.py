"""Images to tokens: normalisation, patch embedding, positions and extra tokens in one kernel that reads the bytes.

    pixels (B, H, W, 3) uint8, weight (d, 3 P^2), bias table (4, d), extra tokens (E, d), positions (E + N, d)
    ->  (B, E + N, d),   N = ceil(H/P) * ceil(W/P):   patches weight^T / 128 + bias + positions, extra tokens in front

Eager PyTorch writes the image as float32 several times over before the convolution reads it: at 512x512, 3.1 MB an
image and pass, against 0.8 MB of bytes that are read here; then it writes and reads the tokens twice more, for the
extra tokens and for the positions. Nothing but the result is written here.

Normalisation is no work at all: `reference.fold_normalization` makes it part of weight and bias, once for all calls.
What is multiplied is the byte less 128 (in units of 64, for one multiply-add to convert it), an integer from -128 to
127, which bfloat16 (integers up to 256) and float16 (up to 2,048) hold exactly; eager rounds the normalised pixel
instead, so this has less error. Centred, because the error of a sum grows with its terms. The weights are in (row,
column, channel) order, so that the 3P bytes of one row of a patch, which lie side by side in the image, are side by
side in K as well: 16-byte asynchronous copies for P = 16 and 32, 8-byte ones for P = 8. P = 14 has 42 bytes a row:
loads of 2 bytes.

Zeros that pad a normalised image are no byte, but a byte of 128 adds nothing to the product. So an image of another
size than multiples of P is copied (as bytes) into one of 128s, and patches on the right, the bottom and in the corner
take the constants for what is real of them from rows 1 to 3 of the bias table. Images whose address or strides are no
multiples of 16 are copied too: loads of single bytes would make the loop three times as long.

The product is computed transposed, weight times patches: the converted bytes then reach Hopper's tensor cores through
shared memory. As the first operand they would stay in registers, which ptxas 12.8 overwrites while they are being read.

Where tensor cores take operands from registers (sm_80), more than half of the loop's instructions still only move
bytes and fragments: two permutations part the bytes of a word, which lie as the copies wrote them, one joins each pair.

Limits: three channels; any sizes, P and d (P = 8, 16 and 32, d = 192, 384, 768 and 1024 are what it is tuned for).
Reference: `reference.pixels_to_tokens`. Test: tests/kernels/test_pixels_to_tokens.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from segmenter.kernels import configs, launch, reference
from segmenter.kernels.blocks import load_tile, program_block
from segmenter.kernels.operators import define, forbid_forward_mode
from segmenter.kernels.pixels import centred, patches, readable
from segmenter.kernels.pixels_to_tokens_backward import PIXELS_TO_TOKENS_BACKWARD
from segmenter.kernels.reference import CENTRE


@triton.jit
def _pixels_to_tokens_fwd_kernel(
    Pixels, W, Table,  # (B, H, W, 3) uint8, (D, 3 P^2), (4, D) float32
    Extra, Pos, Y,  # (E, D), (E + N, D), (B, E + N, D)
    stride_pb, stride_ph, stride_w, grid_h, grid_w, n_rows, n_blocks_m,
    D: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PADDED: tl.constexpr,  # the last row or column of patches is partly padding
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 3 * P * P
    dtype: tl.constexpr = W.dtype if DESCRIPTORS else W.dtype.element_ty
    # Rows are the patches of all images one after the other; tiles that hang over the edge read the last row again.
    block_m, block_n = program_block(n_blocks_m, tl.cdiv(D, BLOCK_N), GROUP_M)
    m_0, n_0 = block_m * BLOCK_M, block_n * BLOCK_N
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    offs_n = n_0 + tl.arange(0, BLOCK_N)
    n_patches = grid_h * grid_w
    rows = tl.minimum(offs_m, n_rows - 1)
    image = (rows // n_patches).to(tl.int64)
    patch = rows % n_patches
    patch_y, patch_x = patch // grid_w, patch % grid_w
    corner = image * stride_pb + (patch_y * P).to(tl.int64) * stride_ph + patch_x * (3 * P)
    w_rows = tl.minimum(offs_n, D - 1).to(tl.int64) - n_0

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k_0 in tl.range(0, K, BLOCK_K):
        offs_k = k_0 + tl.arange(0, BLOCK_K)
        offs_p = (offs_k // (3 * P)).to(tl.int64) * stride_ph + offs_k % (3 * P)
        pointers = Pixels + corner[:, None] + offs_p[None, :]
        x = tl.load(pointers) if K % BLOCK_K == 0 else tl.load(pointers, mask=offs_k[None, :] < K, other=128)
        w = load_tile(W, (n_0, k_0), w_rows, stride_w, None, K, BLOCK_K, DESCRIPTORS)
        acc = tl.dot(w, centred(x, dtype).T, acc, input_precision=PRECISION)
    acc = acc.T * 0.5

    mask_n = offs_n < D
    mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
    if PADDED:
        kind = tl.where(patch_x == grid_w - 1, 1, 0) + tl.where(patch_y == grid_h - 1, 2, 0)
        acc = acc + tl.load(Table + kind[:, None] * D + offs_n[None, :], mask=mask, other=0.0)
    else:
        acc = acc + tl.load(Table + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = acc + tl.load(Pos + (E + patch)[:, None] * D + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y_rows = rows.to(tl.int64) + (image + 1) * E
    tl.store(Y + y_rows[:, None] * D + offs_n[None, :], acc.to(Y.dtype.element_ty), mask=mask)

    # The extra tokens of the images whose first patch is in this block.
    last = tl.cdiv(tl.minimum(m_0 + BLOCK_M, n_rows), n_patches)
    for b in tl.range(tl.cdiv(m_0, n_patches), last):
        for e in tl.static_range(E):
            token = tl.load(Extra + e * D + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            token += tl.load(Pos + e * D + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            y_row = tl.cast(b, tl.int64) * (n_patches + E) + e
            tl.store(Y + y_row * D + offs_n, token.to(Y.dtype.element_ty), mask=mask_n)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _run(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias_table: torch.Tensor,
    extra_tokens: torch.Tensor,
    pos_embed: torch.Tensor,
    patch_size: int,
    config: configs.LinearConfig | None = None,
) -> torch.Tensor:
    """`pixels_to_tokens` of arguments that were checked; all but pixels have dense rows, and only weight has others.

    Args:
        config: instead of the table's choice.
    """
    B, n_tokens, d = pixels.shape[0], *pos_embed.shape
    y = launch.empty((B, n_tokens, d), _result_type(weight, extra_tokens, pos_embed), pixels.device)
    if y.numel() == 0:
        return y
    padded = bool(pixels.shape[1] % patch_size or pixels.shape[2] % patch_size)
    pixels = readable(pixels, patch_size)
    plan = _plan(pixels, weight, extra_tokens, patch_size, padded, launch.dot_precision(weight.dtype), config)
    plan.run(pixels, weight, bias_table, extra_tokens, pos_embed, y)
    return y


def _plan(pixels, weight, extra_tokens, patch_size, padded, precision, config) -> launch.Plan:
    (B, height, width, _), d = pixels.shape, weight.shape[0]
    grid_h, grid_w = height // patch_size, width // patch_size
    n_rows, architecture = B * grid_h * grid_w, launch.architecture(pixels)
    about = (weight.element_size(), n_rows, d, patch_size, padded, precision)
    c = config or configs.pixels_to_tokens(architecture, *about)
    if architecture in ("sm_100", "sm_103") and weight.dtype == torch.float32 and precision == "ieee":
        # For operands that come from bytes, Triton 3.6 takes TF32 there, whatever is asked for. The bytes lose nothing
        # by that, so the weights in three parts give the sum of float32.
        precision = "tf32x3"
    descriptors = c.descriptors and launch.fits_descriptor(weight)
    tiles: list[launch.Tiles | None] = [None] * 6
    if descriptors:
        tiles[1] = launch.Tiles(tuple(weight.shape), weight.stride(), (c.block_n, c.block_k))
    n_blocks_m = triton.cdiv(n_rows, c.block_m)
    scalars = (
        pixels.stride(0), pixels.stride(1), weight.stride(0), grid_h, grid_w, n_rows, n_blocks_m,
        d, patch_size, extra_tokens.shape[0], c.block_m, c.block_n, c.block_k, c.group_m,
        padded, descriptors, precision,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    programs = n_blocks_m * triton.cdiv(d, c.block_n)
    return launch.Plan(_pixels_to_tokens_fwd_kernel, programs, tuple(tiles), scalars, options)


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def _result_type(weight: torch.Tensor, extra_tokens: torch.Tensor, pos_embed: torch.Tensor) -> torch.dtype:
    """What concatenation and sum give in eager PyTorch."""
    return torch.promote_types(torch.promote_types(weight.dtype, extra_tokens.dtype), pos_embed.dtype)


def _shape(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size) -> tuple[int, int, int]:
    """The result's (B, E + N, d). Raises ValueError unless the shapes go together and images have pixels."""
    B, grid_h, grid_w = reference.patch_grid(pixels, patch_size)
    d = weight.shape[0]
    if weight.ndim != 2 or weight.shape[1] != 3 * patch_size**2 or bias_table.shape != (4, d):
        shapes = f"{tuple(weight.shape)} and {tuple(bias_table.shape)}"
        raise ValueError(f"weight must be (d, {3 * patch_size**2}) and bias_table (4, d), got {shapes}")
    reference.check_positions(extra_tokens, pos_embed, grid_h * grid_w, d)
    return B, pos_embed.shape[0], d


def _pixels_to_tokens_kernel(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size) -> torch.Tensor:
    launch.check_device(pixels, weight, bias_table, extra_tokens, pos_embed)
    launch.check_floats("pixels", pixels, (torch.uint8,))
    for name, tensor in (("weight", weight), ("extra_tokens", extra_tokens), ("pos_embed", pos_embed)):
        launch.check_floats(name, tensor)
    launch.check_floats("bias_table", bias_table, (torch.float32,))
    _shape(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size)
    dense = (launch.contiguous(t) for t in (bias_table, extra_tokens, pos_embed))
    return _run(pixels, launch.rows_contiguous(weight), *dense, patch_size)


def _pixels_to_tokens_fake(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size) -> torch.Tensor:
    shape = _shape(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size)
    return weight.new_empty(shape, dtype=_result_type(weight, extra_tokens, pos_embed))


def _pixels_to_tokens_reference(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size) -> torch.Tensor:
    """The same from folded weights, differentiable in all but the pixels."""
    B, _, _ = _shape(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size)
    (_, H, W, _), P, E = pixels.shape, patch_size, extra_tokens.shape[0]
    _, grid_h, grid_w = reference.patch_grid(pixels, P)
    y = F.linear(patches(pixels, P).to(weight.dtype) - CENTRE, weight) / CENTRE
    if H % P or W % P:
        right, bottom = (torch.arange(n, device=y.device) == n - 1 for n in (grid_w, grid_h))
        bias = bias_table[(right[None, :] + 2 * bottom[:, None]).flatten()]  # (N, d)
    else:
        bias = bias_table[0]
    extra = (extra_tokens + pos_embed[:E]).expand(B, -1, -1)
    tokens = torch.cat([extra, y + bias + pos_embed[E:]], dim=1)
    return tokens.to(_result_type(weight, extra_tokens, pos_embed)).contiguous()


def _pixels_to_tokens_flops(pixels, weight, bias_table, extra, pos, patch_size, **_) -> int:
    B, H, W, _ = pixels
    return 2 * B * -(-H // patch_size) * -(-W // patch_size) * weight[0] * weight[1]


def _pixels_to_tokens_backward(inputs: tuple, outputs: tuple, grads: tuple, needed: tuple[bool, ...]) -> tuple:
    """Of the weights by a kernel, of all that is added to tokens by one sum over the images. Bytes have none."""
    (pixels, weight, table, extra, pos, P), (dy,) = inputs, grads
    E, found = extra.shape[0], [None] * len(inputs)
    if needed[1]:
        found[1] = PIXELS_TO_TOKENS_BACKWARD(dy[:, E:].to(weight.dtype), pixels, P)
    if any(needed[2:]):
        sums = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))  # (E + N, d)
        found[2] = _table_gradient(sums[E:], pixels, P).to(table.dtype) if needed[2] else None
        found[3] = sums[:E].to(extra.dtype) if needed[3] else None
        found[4] = sums.to(pos.dtype) if needed[4] else None
    return tuple(found)


def _table_gradient(sums: torch.Tensor, pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(4, d), sums (N, d) over the patches of each kind: inside, in the last column, in the last row, in the corner."""
    _, grid_h, grid_w = reference.patch_grid(pixels, patch_size)
    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size:
        grid = sums.view(grid_h, grid_w, -1)
        last = grid[:, -1]
        kinds = [grid[:-1, :-1].sum((0, 1)), last[:-1].sum(0), grid[-1, :-1].sum(0), last[-1]]
        return torch.stack(kinds)
    return F.pad(sums.sum(0, keepdim=True), (0, 0, 0, 3))


_pixels_to_tokens = define(
    "pixels_to_tokens(Tensor pixels, Tensor weight, Tensor bias_table, Tensor extra_tokens, Tensor pos_embed,"
    " int patch_size) -> Tensor",
    kernel=_pixels_to_tokens_kernel,
    reference=_pixels_to_tokens_reference,
    fake=_pixels_to_tokens_fake,
    flops=_pixels_to_tokens_flops,
    autocast=lambda dtype, args: (args[0], args[1].to(dtype), *args[2:]),
    backward=_pixels_to_tokens_backward,
)


def pixels_to_tokens(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias_table: torch.Tensor,
    extra_tokens: torch.Tensor,
    pos_embed: torch.Tensor,
    patch_size: int,
) -> torch.Tensor:
    """Tokens of images by weights that hold the normalisation; differentiable in all but the pixels, which are bytes.

    Args:
        pixels: (B, H, W, 3) uint8, any H and W from 1 on, with any strides: crops of larger images are read in place
            where their rows begin at multiples of 16 bytes and their sides are multiples of P.
        weight, bias_table: (d, 3 P^2), bfloat16, float16 or float32, and (4, d) float32, from
            `reference.fold_normalization` for images of this size.
        extra_tokens: (E, d), E >= 1. pos_embed: (E + N, d), made for this grid. Any of the three types.
        patch_size: P.
    Returns:
        (B, E + N, d), contiguous, the widest type of weight, extra_tokens and pos_embed.
    Raises:
        KernelError: other types or devices. ValueError: shapes do not fit.

    float32 is multiplied as `torch.set_float32_matmul_precision` says. Under autocast the weight is cast; fold in the
    autocast type to begin with, so that the bias fits the rounded weight. Where a gradient is needed, the arguments and
    the result are kept: none of them may be written before the backward pass, of which the weights' part is
    kernels/pixels_to_tokens_backward.py's.
    """
    launch.check_device(pixels, weight, bias_table, extra_tokens, pos_embed)
    forbid_forward_mode()
    return _pixels_to_tokens(pixels, weight, bias_table, extra_tokens, pos_embed, patch_size)


def normalized_pixels_to_tokens(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extra_tokens: torch.Tensor,
    pos_embed: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    cached: Callable | None = None,
) -> torch.Tensor:
    """`reference.pixels_to_tokens` by the kernel: folds, unless `cached` still has it, and multiplies.

    Args:
        cached: (key, tensors, function without arguments) -> the function's result, or the one of an earlier call
            with this key and these tensors unchanged.
    """
    kind, P = weight.device.type, weight.shape[-1]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    _, H, W, _ = pixels.shape
    size = (H % P, W % P)
    # torch.compile cannot trace the question; without the rounding TF32 is what it is anywhere else.
    tf32 = not torch.compiler.is_compiling() and launch.dot_precision(dtype) == "tf32"
    parameters = (weight,) if bias is None else (weight, bias)

    def fold() -> tuple[torch.Tensor, torch.Tensor]:
        return reference.fold_normalization(weight, bias, mean, std, dtype, size, tf32)

    key = ("fold", tuple(mean), tuple(std), dtype, size, tf32)
    folded, table = fold() if cached is None else cached(key, parameters, fold)
    return pixels_to_tokens(pixels, folded, table, extra_tokens, pos_embed, P)
