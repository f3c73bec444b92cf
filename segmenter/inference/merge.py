"""Scores a few rows at a time, from the low-resolution masks of windows.

The published code upsamples every window to full resolution, averages the windows into one (n_cls, H, W) map, resizes
it to the original size and applies a softmax. Each of those steps works on rows, so the same numbers can be had a few
rows at a time. `View.rows` is that computation; `row_blocks` goes through an image with it.
Scores are kept class-last here: on a CPU, upsampling and argmax are then several times faster.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from segmenter.inference.windows import Windows, check_finite, check_sizes, masks_of_images

# Bytes of the scores of the rows that are computed together: small enough for a CPU's last cache, large enough to keep
# a GPU busy.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


@dataclass
class View:
    """Low-resolution masks of all windows of one image at one scale.

    Attributes:
        masks: (windows, gh, gw, n_cls) float32 logits, class last.
        windows: how they cut the resized image. flip: the image was mirrored left to right.
    """

    masks: torch.Tensor
    windows: Windows
    flip: bool = False
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def rows(self, top: int, bottom: int, ori_shape: tuple[int, int]) -> torch.Tensor:
        """Logits of rows top..bottom of the image at `ori_shape` (H0, W0), mirrored back: (bottom - top, W0, n_cls).

        The result may lie in a buffer that the next call overwrites.
        """
        H, W = self.windows.shape
        if ori_shape[0] == H:
            logits = self._merged_rows(top, bottom)
        else:
            low, high, weight = _source_rows(top, bottom, H, ori_shape[0], self.masks.device)
            # a row more than needed at either end, where the host may round otherwise; asking the device would wait
            first = max(0, int(H / ori_shape[0] * (top + 0.5) - 0.5) - 1)
            merged = self._merged_rows(first, min(H, int(H / ori_shape[0] * (bottom - 0.5) - 0.5) + 3))
            logits = _lerp(merged, low - first, high - first, weight)
        if ori_shape[1] != W:
            logits = self._resize_width(logits, ori_shape[1], "resized")
        return logits.flip(1) if self.flip else logits

    def _merged_rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of the average of all windows at the resized size: (bottom - top, W, n_cls)."""
        windows, (height, width) = self.windows, self.windows.window
        if len(self.masks) == 1:
            return self._window_rows(0, top, bottom)
        merged = self._buffer("merged", bottom - top, windows.shape[1]).zero_()
        count = self.masks.new_zeros(bottom - top, windows.shape[1], 1)
        for i, window_top in enumerate(windows.tops):
            first, last = max(top, window_top), min(bottom, window_top + height)
            if first >= last:
                continue
            here = slice(first - top, last - top)
            for j, left in enumerate(windows.lefts):
                window = i * len(windows.lefts) + j
                merged[here, left : left + width] += self._window_rows(window, first - window_top, last - window_top)
                count[here, left : left + width] += 1
        return merged.div_(count)

    def _window_rows(self, window: int, top: int, bottom: int) -> torch.Tensor:
        """Rows top..bottom of one upsampled window: (bottom - top, window's width, n_cls)."""
        masks, (height, width) = self.masks[window], self.windows.size
        rows = _lerp(masks, *_source_rows(top, bottom, len(masks), height, masks.device))
        return self._resize_width(rows, width, "window")[:, : self.windows.window[1]]

    def _resize_width(self, x: torch.Tensor, width: int, buffer: str) -> torch.Tensor:
        """Bilinear resize of the middle axis of (rows, W, n_cls), in class-last memory: the fast path on a CPU."""
        out = self._buffer(buffer, x.shape[0], width)
        # unsqueezed first, so that the strides are those that torch takes for channels_last: else it copies in and out
        source, target = x[None].permute(0, 3, 1, 2), out[None].permute(0, 3, 1, 2)
        torch.ops.aten.upsample_bilinear2d.out(source, target.shape[2:], False, None, None, out=target)
        return out

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Uninitialised (rows, width, n_cls), reused: on a CPU fresh pages cost more than what is written to them."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != width:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside it
                buffer = self._buffers[name] = torch.empty(rows, width, self.masks.shape[-1], device=self.masks.device)
        return buffer[:rows]


def row_blocks(
    views: Sequence[View], ori_shape: tuple[int, int], probabilities: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Scores of the views, a few rows at a time: yields (first row, scores (rows, W0, n_cls)).

    Scores are the mean softmax over views if `probabilities` or if there are several views; else the logits. Each block
    may overwrite the one before.
    """
    masks = views[0].masks
    shapes = [view.windows.shape for view in views]
    # an enlarged image needs several rows of a view for each row of the result
    pixels_per_row = max(max(1, h / ori_shape[0]) * max(w, ori_shape[1]) for h, w in shapes)
    bytes_per_row = math.ceil(pixels_per_row) * masks.shape[-1] * 4
    n_rows = max(1, BLOCK_BYTES.get(masks.device.type, BLOCK_BYTES["cuda"]) // bytes_per_row)
    for first in range(0, ori_shape[0], n_rows):
        last = min(first + n_rows, ori_shape[0])
        if len(views) == 1 and not probabilities:
            yield first, views[0].rows(first, last, ori_shape)
            continue
        scores = views[0].rows(first, last, ori_shape).softmax(-1)
        for view in views[1:]:
            scores += view.rows(first, last, ori_shape).softmax(-1)
        yield first, scores.div_(len(views))


def fill_labels(labels: torch.Tensor, views: Sequence[View]) -> None:
    """Writes into `labels` (H0, W0) the best class of each pixel."""
    for top, scores in row_blocks(views, tuple(labels.shape), probabilities=False):
        labels[top : top + len(scores)] = scores.argmax(-1)


def inference(
    model: torch.nn.Module,
    ims: Sequence[torch.Tensor],
    ims_metas: Sequence[dict[str, Any]],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
) -> torch.Tensor:
    """Class probabilities of one image given at one or more scales, as the published `inference`.

    Args:
        model: a `Segmenter`, in evaluation mode. ims: (1, 3, h, w) each, normalised.
        ims_metas: a dict with "flip" (bool: this image is mirrored left to right) for each image.
        ori_shape: (H0, W0) of the result. window_size, window_stride: pixels. batch_size: windows a forward call.
    Returns:
        (n_cls, H0, W0) float32: softmax per image, averaged over images.
    Raises:
        ValueError: sizes that make no sense, or scores that are not finite (float16 overflows with large weights).
    """
    if not ims or len(ims) != len(ims_metas):
        raise ValueError(
            f"need one ims_metas entry for each of at least one image, got {len(ims_metas)} and {len(ims)}"
        )
    check_sizes(window_size, batch_size)
    ori_shape = (int(ori_shape[0]), int(ori_shape[1]))
    device = next(model.parameters()).device
    views = []
    for im, meta in zip(ims, ims_metas, strict=True):
        if im.ndim != 4 or im.shape[0] != 1:
            raise ValueError(f"expected one image (1, 3, h, w), got {tuple(im.shape)}")
        masks, windows = masks_of_images(model, im.to(device), window_size, window_stride, batch_size)
        check_finite(masks)
        views.append(View(masks[0].float(), windows, bool(meta["flip"])))
    result = torch.empty(views[0].masks.shape[-1], *ori_shape, device=device)
    for top, scores in row_blocks(views, ori_shape, probabilities=True):
        result[:, top : top + len(scores)] = scores.permute(2, 0, 1)
    return result


def _source_rows(
    top: int, bottom: int, n_in: int, n_out: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For output rows top..bottom of a bilinear resize n_in -> n_out: the two source rows and the second's weight.

    The arithmetic of F.interpolate(align_corners=False), in float32 as there.
    """
    # full, not tensor: a copy from the host could not be captured in a CUDA graph
    scale = torch.full((), n_in / n_out, dtype=torch.float32, device=device)
    source = scale * (torch.arange(top, bottom, device=device, dtype=torch.float32) + 0.5) - 0.5
    source = source.clamp_(min=0)
    low = source.long()
    high = (low + 1).clamp_(max=n_in - 1)
    return low, high, source - low


def _lerp(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows low * (1 - weight) + high * weight of x (rows, W, n_cls)."""
    weight = weight[:, None, None]
    return x[low] * (1 - weight) + x[high] * weight
