"""From bytes to the windows that EoMT runs on, as transformers' EomtImageProcessor makes them, without its host work.

For semantic segmentation an image is resized to a short side of one window and cut into overlapping windows along its
long side. For instance and panoptic segmentation it is resized to fit into one window, and padded.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.inference.images import ImageError
from segmenter.weights.read import CheckpointError


class Geometry(NamedTuple):
    """How windows lie on the resized image, and the size of the image: what follows masks and classes in the arguments
    of `segmenter.kernels.queries_argmax.queries_argmax`."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    window: tuple[int, int]
    canvas: tuple[int, int]
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        """Windows of an image."""
        return len(self.tops) * len(self.lefts)


def window_starts(length: int, window: int) -> tuple[int, ...]:
    """First pixels of the windows along the long side of an image: as few as cover it, overlapping alike.

    The arithmetic of transformers' `EomtImageProcessor._split_image`, which rounds down in floating point: the last
    window may begin a pixel early, and then leaves out the last pixel.
    """
    n = math.ceil(length / window)
    overlap = (n * window - length) / (n - 1) if n > 1 else 0
    return tuple(int(i * (window - overlap)) for i in range(n))


class Preprocessing(nn.Module):
    """The preprocessing of a folder.

    Args:
        processor: transformers' EomtImageProcessor. side: of the images that the network takes.
    Raises:
        CheckpointError: settings that are not EoMT's.

    Attributes:
        split: whether images are cut into windows, for semantic segmentation; else they are padded.
    """

    def __init__(self, processor: Any, side: int):
        super().__init__()
        self.processor, self.split = processor, bool(processor.do_split_image)
        size = processor.size
        window = size.shortest_edge, size.longest_edge or size.shortest_edge
        problems = [
            f"{name} off" for name in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, name)
        ]
        if not self.split and not processor.do_pad:
            problems.append("neither do_split_image nor do_pad")
        if window != (side, side) or (self.split and size.longest_edge not in (None, side)):
            problems.append(f"size {window[0]} x {window[1]} for a network that takes {side} x {side}")
        if problems:
            raise CheckpointError(f"its preprocessor_config.json has {', '.join(problems)}; that is not EoMT's")
        self.window = window
        scale = 1.0 / processor.rescale_factor
        self.statistics = {
            name: (torch.tensor(values) * scale).view(3, 1, 1)
            for name, values in (("mean", processor.image_mean), ("std", processor.image_std))
        }
        for name, values in self.statistics.items():
            self.register_buffer(name, values, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Preprocessing":
        super()._apply(fn, recurse)
        for name, values in self.statistics.items():  # a network in a half type still gets images as they are
            setattr(self, name, values.to(getattr(self, name).device))
        return self

    def settings(self) -> dict[str, Any]:
        """What it does, for people and to tell whether it is still the same."""
        names = ("do_split_image", "do_pad", "resample", "image_mean", "image_std", "rescale_factor")
        found = {name: getattr(self.processor, name) for name in names}
        return {"size": list(self.window), **{k: int(v) if k == "resample" else v for k, v in found.items()}}

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Geometry]:
        """Windows of images.

        Args:
            pixels: (B, H, W, 3) uint8.
        Returns:
            (windows (B * n, 3, h, w) normalised float32, image by image, how they lie).
        Raises:
            ImageError: an image so narrow that nothing of it is left once it fits into a window.
        """
        (h, w), shape = self.window, tuple(pixels.shape[1:3])
        if not self.split and round(h * min(shape) / max(shape)) == 0:
            raise ImageError(
                f"an image of {shape[0]} x {shape[1]} pixels is too narrow: made as long as the window ({h} pixels), "
                "nothing is left of its short side; cut it into parts"
            )
        x = pixels.permute(0, 3, 1, 2).contiguous()
        x = self.processor.resize(image=x, size=self.processor.size, resample=self.processor.resample)
        if not self.split:  # transformers leaves images whose short side fits already a pixel or two too long
            x = x[..., :h, :w]
        canvas = tuple(x.shape[-2:])
        tops = lefts = (0,)
        if self.split and canvas[0] > canvas[1]:
            tops = window_starts(canvas[0], h)
        elif self.split:
            lefts = window_starts(canvas[1], w)
        else:
            x = F.pad(x, (0, w - canvas[1], 0, h - canvas[0]))
        windows = [x[..., top : top + h, left : left + w] for top in tops for left in lefts]
        x = torch.stack(windows, 1).flatten(0, 1).float()
        return x.sub_(self.mean).div_(self.std), Geometry(tops, lefts, (h, w), canvas, shape)
