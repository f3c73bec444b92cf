"""Cross-entropy of masks upsampled to pixels, and its gradient by the masks, without the logits of pixels in memory.

    masks (B, h, w, K), labels (B, H, W)  ->  sums (2,), counts (2,), gradient (B, h, w, K)

In PyTorch the logits, their softmax and both gradients are B x K x H x W each, 1.26 GB at 150 classes, 512 x 512 and
batch 8. Here one program takes a cell, the pixels between four mask centres, whose logits all come from the same four
rows of K scores. It goes over the cell's rows of pixels: two interpolated scores a class, one multiply-add a pixel and
class, maximum, exponential, sum, and at once the gradient of each pixel, of which only the sums at the four corners are
kept. They go to memory, and a second kernel adds, for each mask centre, what the cells around it have for it, in a
fixed order: no atomics, so every run gives the same bits.

Gradients are of the sum, in float32: those of a mean over millions of pixels are below the smallest float16. What
trains divides by the pixels of all processes, and casts last.

Limits: up to MAX_CLASSES classes. A label that is neither a class nor ignore_index makes the loss NaN.
Reference: `reference.upsample_cross_entropy`. Test: tests/kernels/test_upsample_cross_entropy.py.
"""

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs_backward, launch, reference
from segmenter.kernels.blocks import LN2, LOG2E
from segmenter.kernels.operators import define, forbid_forward_mode

MAX_CLASSES = 2048


@triton.jit
def _scores(Masks, index, offs_k, K: tl.constexpr):
    """The K scores of a mask centre, in log2 units; -inf beyond K."""
    scores = tl.load(Masks + index * K + offs_k, mask=offs_k < K, other=float("-inf"))
    return scores.to(tl.float32) * LOG2E


@triton.jit
def _pixels(z, label, counts, weight, smoothing, offs_k, K: tl.constexpr, K_PAD: tl.constexpr, SMOOTHED: tl.constexpr):
    """Loss, class weight and hit of some pixels, and the gradient of their loss by their scores.

    Args:
        z: (pixels, K_PAD) in log2 units, -inf beyond K. counts: whether a pixel does. weight: (K_PAD,), 0 beyond K.
    """
    mask_k = offs_k < K
    hot = (label[:, None] == offs_k[None, :]) & mask_k[None, :]  # 255 may be a class of the padding
    highest = tl.max(z, 1)
    e = tl.exp2(z - highest[:, None])
    total = tl.sum(e, 1)
    log_total = highest + tl.log2(total)
    known = (label >= 0) & (label < K)
    at_label = tl.where(known, tl.sum(tl.where(hot, z, 0.0), 1), float("nan"))
    of_label = tl.where(counts, tl.sum(tl.where(hot, weight[None, :], 0.0), 1), 0.0)
    own = (1.0 - smoothing) * of_label
    loss = tl.where(counts, LN2 * own * (log_total - at_label), 0.0)
    share = own
    if SMOOTHED:
        each = tl.where(counts, smoothing / K, 0.0)
        all_weights = tl.sum(weight, 0)
        weighted = tl.sum(tl.where(mask_k[None, :], weight[None, :] * z, 0.0), 1)
        loss += LN2 * each * (all_weights * log_total - weighted)
        share += each * all_weights
    back = e * (share / total)[:, None] - tl.where(hot, own[:, None], 0.0)
    if SMOOTHED:
        back -= each[:, None] * weight[None, :]
    best = tl.min(tl.where(z == highest[:, None], offs_k[None, :], K_PAD), 1)
    return loss, of_label, counts & (best == label), back


@triton.jit
def _cells_kernel(
    Masks, Labels, Weight,  # (B, h, w, K), (B, H, W), (K,) or None
    Parts, Sums, Counts,  # (4, cells, K), and (2, cells) twice
    grid_h, grid_w, height, width, n_cells, ignore_index, smoothing,
    K: tl.constexpr, K_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_X: tl.constexpr,  # pixels of a row at a time
    WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    cell_x = cell % (grid_w + 1)
    cell_y = cell // (grid_w + 1) % (grid_h + 1)
    b = (cell // ((grid_w + 1) * (grid_h + 1))).to(tl.int64)
    above, below = tl.maximum(cell_y - 1, 0), tl.minimum(cell_y, grid_h - 1)
    left, right = tl.maximum(cell_x - 1, 0), tl.minimum(cell_x, grid_w - 1)
    offs_k = tl.arange(0, K_PAD)
    mask_k = offs_k < K
    row_above, row_below = (b * grid_h + above) * grid_w, (b * grid_h + below) * grid_w
    v_00, v_01 = _scores(Masks, row_above + left, offs_k, K), _scores(Masks, row_above + right, offs_k, K)
    v_10, v_11 = _scores(Masks, row_below + left, offs_k, K), _scores(Masks, row_below + right, offs_k, K)
    weight = tl.load(Weight + offs_k, mask=mask_k, other=0.0) if WEIGHTED else tl.where(mask_k, 1.0, 0.0)
    g_00 = tl.zeros([K_PAD], tl.float32)
    g_01, g_10, g_11 = g_00, g_00, g_00
    loss = tl.zeros([BLOCK_X], tl.float32)
    weights = loss
    valid = tl.zeros([BLOCK_X], tl.int32)
    correct = valid
    SHIFT: tl.constexpr = 0.5 + 0.5 * (P % 2)  # of an odd patch the centre is a pixel, the last of its cell
    top, first = cell_y * P - P // 2, cell_x * P - P // 2
    for r in range(P):
        t = (r + SHIFT) * (1.0 / P)
        y = top + r
        # the padding is -inf, and -inf - -inf is NaN
        at_left = tl.where(mask_k, v_00 + t * (v_10 - v_00), float("-inf"))
        step = tl.where(mask_k, (v_01 + t * (v_11 - v_01)) - at_left, 0.0)
        for x_0 in range(0, P, BLOCK_X):
            i = x_0 + tl.arange(0, BLOCK_X)
            s = (i + SHIFT) * (1.0 / P)
            x = first + i
            inside = (i < P) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            label = tl.load(Labels + (b * height + y) * width + x, mask=inside, other=0).to(tl.int32)
            counts = inside & (label != ignore_index)
            z = at_left[None, :] + s[:, None] * step[None, :]
            of_pixels, of_label, hit, back = _pixels(z, label, counts, weight, smoothing, offs_k, K, K_PAD, SMOOTHED)
            loss += of_pixels
            weights += of_label
            valid += counts.to(tl.int32)
            correct += hit.to(tl.int32)
            if GRADIENT:
                every, rightward = tl.sum(back, 0), tl.sum(back * s[:, None], 0)
                g_00 += (1.0 - t) * (every - rightward)
                g_01 += (1.0 - t) * rightward
                g_10 += t * (every - rightward)
                g_11 += t * rightward
    at = cell.to(tl.int64) * K + offs_k
    corner = n_cells.to(tl.int64) * K
    if GRADIENT:
        tl.store(Parts + at, g_00, mask=mask_k)
        tl.store(Parts + corner + at, g_01, mask=mask_k)
        tl.store(Parts + 2 * corner + at, g_10, mask=mask_k)
        tl.store(Parts + 3 * corner + at, g_11, mask=mask_k)
    tl.store(Sums + cell, tl.sum(loss, 0))
    tl.store(Sums + n_cells + cell, tl.sum(weights, 0))
    tl.store(Counts + cell, tl.sum(valid, 0))
    tl.store(Counts + n_cells + cell, tl.sum(correct, 0))


@triton.jit
def _gather_kernel(Parts, Gradient, grid_h, grid_w, n_cells, K: tl.constexpr, K_PAD: tl.constexpr):
    """Of one mask centre: four cells meet there, and those at a border have several of their corners in it."""
    pid = tl.program_id(0)
    j = pid % grid_w
    i = pid // grid_w % grid_h
    b = pid // (grid_w * grid_h)
    offs_k = tl.arange(0, K_PAD)
    mask_k = offs_k < K
    gradient = tl.zeros([K_PAD], tl.float32)
    for corner in tl.static_range(4):
        for n in tl.static_range(4):
            cell_y, cell_x = i + n // 2, j + n % 2
            row = tl.maximum(cell_y - 1, 0) if corner < 2 else tl.minimum(cell_y, grid_h - 1)
            col = tl.maximum(cell_x - 1, 0) if corner % 2 == 0 else tl.minimum(cell_x, grid_w - 1)
            cell = ((b * (grid_h + 1) + cell_y) * (grid_w + 1) + cell_x).to(tl.int64)
            here = mask_k & (row == i) & (col == j)
            gradient += tl.load(Parts + (corner * n_cells.to(tl.int64) + cell) * K + offs_k, mask=here, other=0.0)
    tl.store(Gradient + pid.to(tl.int64) * K + offs_k, gradient, mask=mask_k)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _run(
    masks: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    patch_size: int,
    ignore_index: int,
    smoothing: float,
    with_gradient: bool,
    config: configs_backward.UpsampleCrossEntropyConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, h, w, K = masks.shape
    n_cells, device = B * (h + 1) * (w + 1), masks.device
    gradient = launch.empty(masks.shape if with_gradient else (0,), torch.float32, device)
    if B == 0:
        nothing = (launch.call(torch.zeros, 2, dtype=t, device=device) for t in (torch.float32, torch.int64))
        return *nothing, gradient
    parts = launch.empty((4, n_cells, K) if with_gradient else (0,), torch.float32, device)
    sums, counts = (launch.empty((2, n_cells), dtype, device) for dtype in (torch.float32, torch.int32))
    k_pad = max(16, triton.next_power_of_2(K))
    c = config or configs_backward.upsample_cross_entropy(triton.next_power_of_2(patch_size), k_pad)
    flags = (weight is not None, smoothing > 0, with_gradient)
    scalars = (
        h, w, *labels.shape[1:], n_cells, ignore_index, float(smoothing),
        K, k_pad, patch_size, c.block_x, *flags,
    )  # fmt: skip
    options = {"num_warps": c.num_warps, "num_stages": 1}
    launch.Plan(_cells_kernel, n_cells, (None,) * 6, scalars, options).run(masks, labels, weight, parts, sums, counts)
    if with_gradient:
        scalars = (h, w, n_cells, K, k_pad)
        options = {"num_warps": max(1, min(4, k_pad // 256)), "num_stages": 1}
        launch.Plan(_gather_kernel, B * h * w, (None,) * 2, scalars, options).run(parts, gradient)
    return launch.call(torch.sum, sums, 1), launch.call(torch.sum, counts, 1), gradient


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def _upsample_cross_entropy_kernel(masks, labels, weight, patch_size, ignore_index, label_smoothing, with_gradient):
    launch.check_device(masks, labels, weight)
    launch.check_floats("masks", masks)
    reference.check_loss(masks, labels, weight, patch_size)
    if masks.shape[-1] > MAX_CLASSES:
        raise launch.KernelError(f'{masks.shape[-1]} classes are more than {MAX_CLASSES}; use impl="eager"')
    if weight is not None and weight.dtype != torch.float32:
        weight = launch.call(torch.Tensor.to, weight, torch.float32)
    tensors = (
        launch.contiguous(masks),
        launch.contiguous(labels),
        None if weight is None else launch.contiguous(weight),
    )
    return _run(*tensors, patch_size, ignore_index, label_smoothing, with_gradient)


def _upsample_cross_entropy_fake(masks, labels, weight, patch_size, ignore_index, label_smoothing, with_gradient):
    reference.check_loss(masks, labels, weight, patch_size)
    wide = torch.promote_types(masks.dtype, torch.float32)
    gradient = masks.new_empty(masks.shape if with_gradient else (0,), dtype=wide)
    return masks.new_empty(2, dtype=wide), masks.new_empty(2, dtype=torch.int64), gradient


def _upsample_cross_entropy_flops(masks, labels, *args, **kwargs):
    # interpolation 2, maximum 1, difference 1, sum 1; the gradient: product 1, label 1, two sums 4
    return 11 * labels[0] * labels[1] * labels[2] * masks[-1]


_upsample_cross_entropy = define(
    "upsample_cross_entropy(Tensor masks, Tensor labels, Tensor? weight, int patch_size, int ignore_index, "
    "float label_smoothing, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    kernel=_upsample_cross_entropy_kernel,
    reference=reference.upsample_cross_entropy,
    fake=_upsample_cross_entropy_fake,
    flops=_upsample_cross_entropy_flops,
    autocast=lambda dtype, args: args,
)


def upsample_cross_entropy(
    masks: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    patch_size: int,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    with_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of masks upsampled by the patch size, and its gradient by them, in one pass.

    What autograd differentiates is `segmenter.training.upsample_loss`, which calls this.

    Args:
        masks: (B, h, w, K), class last, bfloat16, float16 or float32; a copy is made unless they are contiguous.
        labels: (B, H, W) integers, h = ceil(H / patch_size), w = ceil(W / patch_size). One that is neither a class nor
            ignore_index makes the loss NaN.
        weight: (K,), what a pixel of each class counts; None: all the same.
    Returns:
        sums: (2,) float32, the loss and the weights of the pixels that count. counts: (2,) int64, their number, and how
            many have their largest score at their label. gradient: (B, h, w, K) float32, none unless with_gradient.
    Raises:
        KernelError: another type or device, too many classes. ValueError: shapes do not fit. TypeError: labels are no
            integers.
    """
    launch.check_device(masks, labels, weight)
    forbid_forward_mode()
    return _upsample_cross_entropy(masks, labels, weight, patch_size, ignore_index, label_smoothing, with_gradient)
