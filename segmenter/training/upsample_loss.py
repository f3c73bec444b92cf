"""Cross-entropy of masks that are upsampled to pixels, without the logits of the pixels.

What training would do in PyTorch, `F.cross_entropy(F.interpolate(masks))`, holds several tensors of B x n_cls x H x W:
at Seg-L/16, 640 x 640, batch 8 and 150 classes 2 GB each. Here a few rows of pixels are computed at a time; their
part of the loss is added up and their gradient goes straight back into that of the masks, by hand:

    z = bilinear(masks),  p = softmax(z),  dz = ((1 - e) w_y + e/n S) p - (1 - e) w_y onehot(y) - e/n w

with the class weights w, their sum S, the label y and e of label smoothing over n classes. Upsampling is linear, so its
backward pass is its transpose, taken in the same two steps: along columns a matrix, along rows two neighbours. On a GPU
one kernel does all of it (kernels/upsample_cross_entropy.py).
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from segmenter.kernels.reference import check_loss, upsampling_matrix
from segmenter.ops import select

CHUNK_BYTES = 1 << 20  # logits of pixels that exist at a time on a CPU: about what a core's cache holds


class PixelLoss(NamedTuple):
    """Sums over the pixels that count, those whose label is not `ignore_index`.

    Attributes:
        loss: float32 scalar, differentiable; divide it by `weight`, of all processes, for the mean that
            F.cross_entropy gives. weight: float32 scalar, of their classes' weights. valid: int64 scalar, their number.
            correct: int64 scalar, how many have the largest score at their label (of equal ones, at the lowest class).
    """

    loss: torch.Tensor
    weight: torch.Tensor
    valid: torch.Tensor
    correct: torch.Tensor


def upsample_cross_entropy(
    masks: torch.Tensor,
    labels: torch.Tensor,
    patch_size: int,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    impl: str = "auto",
) -> PixelLoss:
    """Cross-entropy of masks, upsampled bilinearly (align_corners=False) by the patch size and cut to the labels' size.

    Args:
        masks: (B, n_cls, h, w) of any floating type; computed in float32, float64 in float64.
        labels: (B, H, W) integers, h = ceil(H / patch_size), w = ceil(W / patch_size).
        class_weight: (n_cls,), what a pixel of each class counts; None: all the same.
        ignore_index: label of pixels that do not count. label_smoothing: as of F.cross_entropy.
        impl: as of a model; the kernel takes no float64.
    Returns:
        sums, see `PixelLoss`; 0 and no gradient where no pixel counts. It cannot be differentiated twice.
    Raises:
        ValueError: shapes that do not fit; on a CPU, unless compiled, also a label that is neither a class nor
            `ignore_index`, which else makes the loss NaN or ends the program as in F.cross_entropy. TypeError: labels
            are no integers.
        ImplementationError: as of `ops.select`.
    """
    if masks.ndim != 4:
        raise ValueError(f"expected masks (B, n_cls, h, w), got {tuple(masks.shape)}")
    check_loss(masks.permute(0, 2, 3, 1), labels, class_weight, patch_size)
    _check_labels(labels, masks.shape[1], ignore_index)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    compute = in_chunks
    if select(impl).on(masks).name == "triton":
        from segmenter.kernels.upsample_cross_entropy import upsample_cross_entropy as compute
    if class_weight is not None:
        class_weight = class_weight.detach().to(masks.device)
    arguments = (labels, class_weight, patch_size, ignore_index, label_smoothing)
    return PixelLoss(*_UpsampleCrossEntropy.apply(masks, compute, arguments))


class _UpsampleCrossEntropy(torch.autograd.Function):
    """Computes the gradient along with the loss: everything that it takes is at hand then, and nowhere later."""

    @staticmethod
    def forward(ctx: Any, masks: torch.Tensor, compute: Any, arguments: tuple) -> tuple[torch.Tensor, ...]:
        with torch.autocast(masks.device.type, enabled=False):  # else products of float32 would be in a half type
            found = compute(masks.permute(0, 2, 3, 1), *arguments, masks.requires_grad)
        (loss, weight), (valid, correct), gradient = found
        ctx.save_for_backward(gradient)
        ctx.dtype = masks.dtype
        ctx.mark_non_differentiable(weight, valid, correct)
        return loss, weight, valid, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # float32: in float16 that of a mean over millions of pixels would be zero
        return (gradient * upstream).to(ctx.dtype).permute(0, 3, 1, 2), None, None


def in_chunks(
    masks: torch.Tensor,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    patch_size: int,
    ignore_index: int,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kernels.reference.upsample_cross_entropy` with a few rows of pixels at a time, in PyTorch, on any device."""
    B, h, w, K = masks.shape
    H, W = labels.shape[1:]
    x = masks.to(torch.promote_types(masks.dtype, torch.float32)).contiguous()
    columns, rows = upsampling_matrix(w, patch_size, x)[:W], upsampling_matrix(h, patch_size, x)[:H]
    weight = None if class_weight is None else class_weight.to(x.dtype)
    pixels = _Pixels(labels, weight, ignore_index, label_smoothing, x)
    gradient = torch.empty_like(x) if with_gradient else x.new_empty(0)
    n_images, height = at_once(x, W * K)
    buffer = x.new_empty(n_images * min(height, patch_size) * W * K)
    for b in range(0, B, n_images):
        images = slice(b, b + n_images)
        wide = (columns @ x[images]).flatten(2)  # (images, h, W * K)
        back = torch.zeros_like(wide) if with_gradient else None
        for first, last, above, below in _chunks(h, H, patch_size, height):
            near, taps = slice(above, below + 1), rows[first:last, above : below + 1].expand(len(wide), -1, -1)
            z = buffer[: len(wide) * (last - first) * W * K].view(len(wide), last - first, W * K)
            torch.bmm(taps, wide[:, near], out=z)
            pixels.take(z.view(-1, K), images, slice(first, last), with_gradient)
            if with_gradient:
                back[:, near].baddbmm_(taps.mT, z)  # z is its own gradient now
        if with_gradient:
            torch.matmul(columns.T, back.view(*x[images].shape[:2], W, K), out=gradient[images])
    return pixels.sums.to(x.dtype), pixels.counts, gradient


def at_once(x: torch.Tensor, row: int) -> tuple[int, int]:
    """Images, and rows of pixels of so many logits, of a step: few on a CPU; on a GPU a step is twenty launches."""
    if x.is_cuda:
        return max(1, len(x)), 1 << 30  # all rows between two of the masks
    return 1, max(1, CHUNK_BYTES * _threads() // (row * x.element_size()))


def _threads() -> int:
    return torch.get_num_threads()


_threads._dynamo_marked_constant = True  # torch.compile cannot trace the question; see `segmenter.ops`


class _Pixels:
    """Labels, and what logits of some rows of pixels give: sums of all so far, and their gradient."""

    def __init__(
        self, labels: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, smoothing: float, like: torch.Tensor
    ):
        self.labels, self.class_weight, self.ignore_index, self.smoothing = labels, weight, ignore_index, smoothing
        self.ones = like.new_ones(like.shape[-1]) if weight is None else weight
        self.sums, self.counts = like.new_zeros(2, dtype=torch.float64), like.new_zeros(2, dtype=torch.int64)

    def take(self, z: torch.Tensor, images: slice, rows: slice, with_gradient: bool) -> None:
        """Adds to the sums what logits (pixels, K) give, and turns them into the gradient of the loss by them."""
        y = self.labels[images, rows].reshape(-1).long()
        counted = y != self.ignore_index
        y = torch.where(counted, y, 0)
        weight = counted.to(z.dtype) if self.class_weight is None else self.class_weight[y] * counted
        highest, best = z.max(1)
        correct = (best == y) & counted
        z -= highest[:, None]
        at_label = z.gather(1, y[:, None])[:, 0]
        each = self.smoothing / z.shape[1]
        of_all = z @ self.ones if self.smoothing else None
        total = z.exp_().sum(1)
        log_total = total.log()
        own = (1 - self.smoothing) * weight
        losses, share = own * (log_total - at_label), own
        if self.smoothing:
            all_weights = self.ones.sum()
            share = own + each * all_weights * counted
            losses += torch.where(counted, each * (all_weights * log_total - of_all), 0.0)
        self.sums += torch.stack([losses.sum(dtype=torch.float64), weight.sum(dtype=torch.float64)])
        self.counts += torch.stack([counted.sum(), correct.sum()])
        if not with_gradient:
            return
        z *= (share / total)[:, None]
        z.scatter_add_(1, y[:, None], -own[:, None])
        if self.smoothing:
            z.addr_(counted.to(z.dtype), self.ones, alpha=-each)


def _chunks(h: int, H: int, patch_size: int, height: int) -> list[tuple[int, int, int, int]]:
    """(first and last + 1 row of pixels, the mask rows above and below them): all H rows, at most `height` at a time.

    Rows of a chunk lie between the centres of the same two mask rows; beyond the outermost centres there is only one.
    """
    edges = [0, *range(patch_size // 2, h * patch_size, patch_size), h * patch_size]
    found = []
    for i, (top, bottom) in enumerate(zip(edges, edges[1:], strict=False)):
        above, below = max(i - 1, 0), min(i, h - 1)
        bottom = min(bottom, H)
        found += [(r, min(r + height, bottom), above, below) for r in range(top, bottom, height)]
    return found


def _check_labels(labels: torch.Tensor, n_cls: int, ignore_index: int) -> None:
    """Raises ValueError if a label is neither a class nor ignore_index.

    Of labels on a GPU nobody waits to be told, and torch.compile cannot trace the question.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counted = labels[labels != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < n_cls:
        wrong = int(counted.min()) if counted.min() < 0 else int(counted.max())
        raise ValueError(f"label {wrong} is neither one of the {n_cls} classes nor ignore_index, {ignore_index}")
