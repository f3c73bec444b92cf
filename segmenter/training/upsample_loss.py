"""Cross-entropy of masks that are upsampled to pixels, without the logits of the pixels.

What training would do in PyTorch, `F.cross_entropy(F.interpolate(masks))`, holds several tensors of B x n_cls x H x W:
at Seg-L/16, 640 x 640, batch 8 and 150 classes 1.9 GB each. Here a few rows of pixels are computed at a time; their
part of the loss is added up and their gradient goes straight back into that of the masks, by hand:

    z = bilinear(masks),  p = softmax(z),  dz = ((1 - e) w_y + e/n S) p - (1 - e) w_y onehot(y) - e/n w

with the class weights w, their sum S, the label y and e of label smoothing over n classes. Upsampling is linear, so its
backward pass is its transpose, taken in the same two steps: along columns a matrix, along rows two neighbours.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 20  # of the pixels' logits that exist at a time: about what a core's cache holds


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
) -> PixelLoss:
    """Cross-entropy of masks, upsampled bilinearly (align_corners=False) by the patch size and cut to the labels' size.

    Args:
        masks: (B, n_cls, h, w) of any floating type; computed in float32, float64 in float64.
        labels: (B, H, W) integers, h = ceil(H / patch_size), w = ceil(W / patch_size).
        class_weight: (n_cls,), what a pixel of each class counts; None: all the same.
        ignore_index: label of pixels that do not count. label_smoothing: as of F.cross_entropy.
    Returns:
        sums, see `PixelLoss`; 0 and no gradient where no pixel counts. It cannot be differentiated twice.
    Raises:
        ValueError: shapes that do not fit, or a label that is neither a class nor `ignore_index`. TypeError: labels are
            no integers.
    """
    _check(masks, labels, patch_size, class_weight, ignore_index, label_smoothing)
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    if class_weight is not None:
        class_weight = class_weight.detach().to(masks.device, dtype)
    arguments = (masks, labels, patch_size, class_weight, ignore_index, label_smoothing)
    return PixelLoss(*_UpsampleCrossEntropy.apply(*arguments))


class _UpsampleCrossEntropy(torch.autograd.Function):
    """Computes the gradient along with the loss: everything that it takes is at hand then, and nowhere later."""

    @staticmethod
    def forward(ctx: Any, masks: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        loss, weight, valid, correct, gradient = in_chunks(masks, *arguments, masks.requires_grad)
        ctx.save_for_backward(gradient)
        ctx.dtype = masks.dtype
        ctx.mark_non_differentiable(weight, valid, correct)
        return loss, weight, valid, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # float32: in float16 that of a mean over millions of pixels would be zero
        return (gradient * upstream).to(ctx.dtype), None, None, None, None, None


def in_chunks(
    masks: torch.Tensor,
    labels: torch.Tensor,
    patch_size: int,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`upsample_cross_entropy` in PyTorch, on any device: its four sums, and the gradient of the loss (B, n_cls, h, w).

    The gradient is in the layout of the masks' classes last, as they are read.
    """
    B, n_cls, h, w = masks.shape
    H, W = labels.shape[1:]
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    x = masks.detach().permute(0, 2, 3, 1).to(dtype).contiguous()  # (B, h, w, n_cls)
    columns = _upsampling(w, patch_size, x)[:W]
    rows = _upsampling(h, patch_size, x)[:H]
    pixels = _Pixels(labels, n_cls, class_weight, ignore_index, label_smoothing, x)
    gradient = torch.empty_like(x) if with_gradient else None
    sums = x.new_zeros(2, dtype=torch.float64)
    counts = labels.new_zeros(2, dtype=torch.int64)
    height = max(1, CHUNK_BYTES // (W * n_cls * x.element_size()))
    buffer = x.new_empty(min(height, patch_size), W, n_cls)
    for b in range(B):
        wide = columns @ x[b]  # (h, W, n_cls)
        back = torch.zeros_like(wide) if with_gradient else None
        for first, last, above, below in _chunks(h, H, patch_size, height):
            z = buffer[: last - first]
            near = slice(above, below + 1)
            taps = rows[first:last, near]  # (rows, 1 or 2)
            torch.mm(taps, wide[near].flatten(1), out=z.flatten(1))
            pixels.backward_(z, b, first, last, sums, counts)  # z is its own gradient now
            if with_gradient:
                back[near].flatten(1).addmm_(taps.T, z.flatten(1))
        if with_gradient:
            torch.matmul(columns.T, back, out=gradient[b])
    loss, weight = sums.to(dtype)
    gradient = gradient.permute(0, 3, 1, 2) if with_gradient else None
    return loss, weight, counts[0], counts[1], gradient


class _Pixels:
    """Labels, and what the logits of some rows of pixels give: sums, counts and gradient."""

    def __init__(
        self,
        labels: torch.Tensor,
        n_cls: int,
        class_weight: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
        like: torch.Tensor,
    ):
        self.labels, self.n_cls, self.ignore_index, self.smoothing = labels, n_cls, ignore_index, smoothing
        self.class_weight, self.like = class_weight, like
        self.total = float(n_cls) if class_weight is None else class_weight.sum().item()

    def backward_(
        self, z: torch.Tensor, b: int, first: int, last: int, sums: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Turns logits (rows, W, n_cls) into the gradient of the loss by them, and adds to sums and counts."""
        z = z.view(-1, self.n_cls)
        y = self.labels[b, first:last].reshape(-1).long()
        counted = y != self.ignore_index
        y = torch.where(counted, y, 0)
        weight = torch.ones_like(y, dtype=z.dtype) if self.class_weight is None else self.class_weight[y]
        weight = weight * counted
        highest, best = z.max(1)
        counts += torch.stack([counted.sum(), ((best == y) & counted).sum()])
        z -= highest[:, None]
        at_label = z.gather(1, y[:, None])[:, 0]
        each = self.smoothing / self.n_cls
        of_all = (z.sum(1) if self.class_weight is None else z @ self.class_weight) if self.smoothing else None
        total = z.exp_().sum(1)
        log_total = total.log()
        own = (1 - self.smoothing) * weight
        losses = own * (log_total - at_label)
        share = own
        if self.smoothing:
            share = own + each * self.total * counted.to(z.dtype)  # a bool alone would make it float32
            losses += torch.where(counted, each * (self.total * log_total - of_all), 0.0)
        sums += torch.stack([losses.sum(dtype=torch.float64), weight.sum(dtype=torch.float64)])
        z *= (share / total)[:, None]
        z.scatter_add_(1, y[:, None], -own[:, None])
        if self.smoothing:
            ones = z.new_ones(self.n_cls) if self.class_weight is None else self.class_weight
            z.addr_(counted.to(z.dtype), ones, alpha=-each)


def _upsampling(n: int, factor: int, like: torch.Tensor) -> torch.Tensor:
    """(n * factor, n), what F.interpolate (bilinear, align_corners=False) does along one side, as a matrix."""
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], scale_factor=float(factor), mode="linear", align_corners=False)[0].T.contiguous()


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


def _check(
    masks: torch.Tensor,
    labels: torch.Tensor,
    patch_size: int,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    if masks.ndim != 4 or labels.ndim != 3 or len(masks) != len(labels):
        raise ValueError(
            f"expected masks (B, n_cls, h, w) and labels (B, H, W), got {tuple(masks.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    n_cls, *grid = masks.shape[1:]
    if [-(-n // patch_size) for n in labels.shape[1:]] != grid:
        raise ValueError(
            f"labels of {labels.shape[1]} x {labels.shape[2]} pixels have {-(-labels.shape[1] // patch_size)} x "
            f"{-(-labels.shape[2] // patch_size)} patches of {patch_size}, the masks {grid[0]} x {grid[1]}"
        )
    if class_weight is not None and class_weight.shape != (n_cls,):
        raise ValueError(f"class_weight must be ({n_cls},), one for each class, got {tuple(class_weight.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if labels.numel() and labels.device.type == "cpu":
        counted = labels[labels != ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < n_cls:
            wrong = int(counted.min()) if counted.min() < 0 else int(counted.max())
            raise ValueError(f"label {wrong} is neither one of the {n_cls} classes nor ignore_index, {ignore_index}")
