"""From a picture to the low-resolution masks of its windows: the published resize rule and sliding windows.

What follows, the masks' upsampling and merging, is in `merge` (scores) and `pruned_argmax`
(labels) beside this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from segmenter.inference.merge import View, bands

MAX_RESIZED_PIXELS = 100_000_000


def resized_shape(h: int, w: int, window_size: int) -> tuple[int, int]:
    """Size to run an image at: the short side is brought up to `window_size`, never down. The long side truncates."""
    if min(h, w) >= window_size:
        return h, w
    return (window_size, int(w / h * window_size)) if h < w else (int(h / w * window_size), window_size)


def resize(im: torch.Tensor, window_size: int) -> torch.Tensor:
    """Applies `resized_shape` to (B, C, h, w) with bilinear interpolation.

    Raises:
        ValueError: the result would have more than MAX_RESIZED_PIXELS, which only very long thin pictures reach.
    """
    h, w = im.shape[-2:]
    shape = resized_shape(h, w, window_size)
    return resize_to(im, shape, f"to fill a window of {window_size}; pad or cut it, or use a smaller window_size")


def resize_to(im: torch.Tensor, shape: tuple[int, int], why: str) -> torch.Tensor:
    """Bilinear resize of (B, C, h, w) to `shape`, larger or smaller; `im` itself if it has that shape.

    Raises:
        ValueError: it would grow beyond MAX_RESIZED_PIXELS; the message ends with `why`.
    """
    h, w = im.shape[-2:]
    if shape == (h, w):
        return im
    if shape[0] * shape[1] > max(MAX_RESIZED_PIXELS, h * w):
        raise ValueError(f"a picture of {w}x{h} would be enlarged to {shape[1]}x{shape[0]} {why}")
    return F.interpolate(im, shape, mode="bilinear", align_corners=False)


def window_anchors(length: int, window_size: int, window_stride: int) -> list[int]:
    """Starts of the windows along one axis: multiples of the stride, and one window flush with the end."""
    if length < window_size:
        raise ValueError(f"length {length} is smaller than the window {window_size}")
    if window_stride < 1:
        raise ValueError(f"window_stride must be at least 1, got {window_stride}")
    if window_stride > window_size:
        raise ValueError(f"window_stride {window_stride} beyond window_size {window_size} would leave pixels out")
    return [*range(0, length - window_size, window_stride), length - window_size]


@dataclass(frozen=True)
class Windows:
    """How windows cut pictures of one size.

    Attributes:
        tops, lefts: window starts in pixels. size: (h, w) of a window, padded to whole patches. window: (h, w) of it.
        shape: (H, W) of the pictures.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    size: tuple[int, int]
    window: tuple[int, int]
    shape: tuple[int, int]

    @property
    def geometry(self) -> tuple:
        """What follows the masks in the arguments of `windows_argmax`."""
        return self.tops, self.lefts, self.size, self.window, self.shape


def windows_of(shape: tuple[int, int], window_size: int, window_stride: int, patch_size: int) -> Windows:
    """Square windows over pictures of `shape` (H, W), neither side of which is below window_size."""
    tops, lefts = (tuple(window_anchors(length, window_size, window_stride)) for length in shape)
    padded = -(-window_size // patch_size) * patch_size
    return Windows(tops, lefts, (padded, padded), (window_size, window_size), tuple(shape))


def predict_masks(
    network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, windows: Windows, batch_size: int
) -> torch.Tensor:
    """Runs a network over all windows of a batch of pictures of one size.

    Args:
        network: `model.masks` or `model.masks_of_pixels`. images: (B, 3, H, W) normalised for the one, (B, H, W, 3)
            bytes for the other. batch_size: windows a call.
    Returns:
        (B, windows, gh, gw, n_cls), class last.
    """
    (height, width), first = windows.window, 1 if images.dtype == torch.uint8 else 2
    places = [(b, top, left) for b in range(len(images)) for top in windows.tops for left in windows.lefts]
    masks = []
    with torch.inference_mode():
        for i in range(0, len(places), batch_size):
            if windows.shape == windows.window:  # the pictures themselves
                crops = images[i : i + batch_size]
            else:
                parts = [
                    images[b : b + 1].narrow(first, top, height).narrow(first + 1, left, width)
                    for b, top, left in places[i : i + batch_size]
                ]
                crops = parts[0] if len(parts) == 1 else torch.cat(parts)
            masks.append(network(crops).permute(0, 2, 3, 1))
        return (masks[0] if len(masks) == 1 else torch.cat(masks)).contiguous().unflatten(0, (len(images), -1))


def check_finite(masks: torch.Tensor) -> None:
    """Raises ValueError if the network gave scores that are no numbers."""
    if not torch.isfinite(masks).all():
        raise ValueError(
            "the network gave NaN or infinite scores; in float16 try bfloat16 or float32, else the weights"
        )


def predict_view(
    model: torch.nn.Module, im: torch.Tensor, flip: bool, window_size: int, window_stride: int, batch_size: int
) -> View:
    """Runs the model over the windows of one image.

    Args:
        model: has `masks(im)`, `patch_size`. im: (1, 3, h, w), normalised, on the model's device.
        flip: im is mirrored left to right. window_size, window_stride: pixels. batch_size: windows a forward call.
    Raises:
        ValueError: sizes that make no sense, or scores that are not finite (float16 overflows with large weights).
    """
    if im.ndim != 4 or im.shape[0] != 1:
        raise ValueError(f"expected one image (1, 3, h, w), got {tuple(im.shape)}")
    check_sizes(window_size, batch_size)
    im = resize(im, window_size).to(next(model.parameters()).dtype)
    windows = windows_of(tuple(im.shape[-2:]), window_size, window_stride, model.patch_size)
    masks = predict_masks(model.masks, im, windows, batch_size)[0].float()
    check_finite(masks)
    return View(masks, *windows.geometry, flip)


def check_sizes(window_size: int, batch_size: int) -> None:
    """Raises ValueError unless both are at least 1."""
    if window_size < 1 or batch_size < 1:
        raise ValueError(f"window_size and batch_size must be at least 1, got {window_size} and {batch_size}")


def inference(
    model: torch.nn.Module,
    ims: Sequence[torch.Tensor],
    ims_metas: Sequence[dict[str, Any]],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
) -> torch.Tensor:
    """Class probabilities of one picture given at one or more scales, as the published `inference`.

    Args:
        model: a `Segmenter`, in evaluation mode. ims: (1, 3, h, w) each, normalised.
        ims_metas: a dict with "flip" (bool: this image is mirrored left to right) for each image.
        ori_shape: (H0, W0) of the result. window_size, window_stride: pixels. batch_size: windows a forward call.
    Returns:
        (n_cls, H0, W0) float32: softmax per image, averaged over images.
    """
    if not ims or len(ims) != len(ims_metas):
        raise ValueError(
            f"need one ims_metas entry for each of at least one image, got {len(ims_metas)} and {len(ims)}"
        )
    ori_shape = (int(ori_shape[0]), int(ori_shape[1]))
    device = next(model.parameters()).device
    views = [
        predict_view(model, im.to(device), bool(meta["flip"]), window_size, window_stride, batch_size)
        for im, meta in zip(ims, ims_metas, strict=True)
    ]
    result = torch.empty(views[0].masks.shape[-1], *ori_shape, device=device)
    for top, scores in bands(views, ori_shape, probabilities=True):
        result[:, top : top + len(scores)] = scores.permute(2, 0, 1)
    return result
