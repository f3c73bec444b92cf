"""From an image to the low-resolution masks of its windows: the published resize rule and sliding windows.

What follows, the masks' upsampling and merging, is in `merge` (scores) and `pruned_argmax` (labels) beside this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MAX_RESIZED_PIXELS = 100_000_000


def resized_shape(h: int, w: int, window_size: int) -> tuple[int, int]:
    """Size to run an image at: the short side is brought up to `window_size`, never down. The long side truncates."""
    if min(h, w) >= window_size:
        return h, w
    return (window_size, int(w / h * window_size)) if h < w else (int(h / w * window_size), window_size)


def resize(im: torch.Tensor, window_size: int) -> torch.Tensor:
    """Applies `resized_shape` to (B, C, h, w) with bilinear interpolation.

    Raises:
        ValueError: the result would have more than MAX_RESIZED_PIXELS, which only very long thin images reach.
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
        raise ValueError(f"an image of {w}x{h} would be enlarged to {shape[1]}x{shape[0]} {why}")
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
    """How windows cut images of one size.

    Attributes:
        tops, lefts: first row and column of each window, in pixels; windows are ordered row by row.
        size: (h, w) of a window, padded to whole patches, that its masks are upsampled to. window: (h, w) of it.
        shape: (H, W) of the images.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    size: tuple[int, int]
    window: tuple[int, int]
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        """How many windows an image is cut into."""
        return len(self.tops) * len(self.lefts)

    def tokens(self, patch_size: int) -> int:
        """Patches of all windows of an image; class tokens are not counted."""
        return self.count * math.prod(side // patch_size for side in self.size)

    @property
    def geometry(self) -> tuple:
        """What follows the masks in the arguments of `windows_argmax`."""
        return self.tops, self.lefts, self.size, self.window, self.shape


def windows_of(shape: tuple[int, int], window_size: int, window_stride: int, patch_size: int) -> Windows:
    """Square windows over images of `shape` (H, W), neither side of which is below window_size."""
    tops, lefts = (tuple(window_anchors(length, window_size, window_stride)) for length in shape)
    padded = -(-window_size // patch_size) * patch_size
    return Windows(tops, lefts, (padded, padded), (window_size, window_size), tuple(shape))


def masks_of(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Masks (B, n_cls, gh, gw) of windows, which are bytes (B, h, w, 3) or normalised (B, 3, h, w)."""
    return model.masks_of_pixels(windows) if windows.dtype == torch.uint8 else model.masks(windows)


def predict_masks(
    network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, windows: Windows, batch_size: int
) -> torch.Tensor:
    """Runs a network over all windows of a batch of images of one size.

    Args:
        network: as `masks_of` a model. images: (B, 3, H, W) normalised, or (B, H, W, 3) bytes. batch_size: windows a
            call.
    Returns:
        (B, windows, gh, gw, n_cls), class last.
    """
    (height, width), first = windows.window, 1 if images.dtype == torch.uint8 else 2
    places = [(b, top, left) for b in range(len(images)) for top in windows.tops for left in windows.lefts]
    masks = []
    with torch.inference_mode():
        for i in range(0, len(places), batch_size):
            if windows.shape == windows.window:  # the images themselves
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


def masks_of_images(
    model: torch.nn.Module,
    images: torch.Tensor,
    window_size: int,
    window_stride: int,
    batch_size: int,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Windows]:
    """Masks (B, windows, gh, gw, n_cls) of images (B, 3, h, w), enlarged to a window if they are smaller.

    Args:
        model: has `masks(im)`, `patch_size`. images: normalised, on the model's device. window_size, window_stride:
            pixels. batch_size: windows a forward call. network: what runs in place of `model.masks`.
    Raises:
        ValueError: a stride that makes no sense, or images that would grow too large.
    """
    images = resize(images, window_size).to(next(model.parameters()).dtype)
    windows = windows_of(tuple(images.shape[-2:]), window_size, window_stride, model.patch_size)
    return predict_masks(network or model.masks, images, windows, batch_size), windows


def check_sizes(window_size: int, batch_size: int) -> None:
    """Raises ValueError unless both are at least 1."""
    if window_size < 1 or batch_size < 1:
        raise ValueError(f"window_size and batch_size must be at least 1, got {window_size} and {batch_size}")
