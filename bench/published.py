"""The published way from a picture to labels, in plain PyTorch: what ours is compared with, in tests and benchmarks.

Score matrices are written out in attention, every window is upsampled to full resolution, all windows are kept, and the
(n_cls, H, W) map is merged, resized and put through a softmax before the argmax. Written from the description of
github.com/rstrudel/segmenter in our own words; `tests/test_golden.py` checks it against the golden cases.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from segmenter.implementation import EAGER
from segmenter.inference import resize, window_anchors
from segmenter.kernels import reference

PUBLISHED = EAGER._replace(name="published", attention=reference.explicit_attention)


@contextlib.contextmanager
def published_attention(model: torch.nn.Module) -> Iterator[None]:
    """While inside, every block of `model` computes attention with an explicit score matrix."""
    holders = [module for module in model.modules() if hasattr(module, "ops")]
    before = [module.ops for module in holders]
    try:
        for module in holders:
            module.ops = PUBLISHED
        yield
    finally:
        for module, ops in zip(holders, before, strict=True):
            module.ops = ops


@torch.no_grad()
def published_inference(
    model: torch.nn.Module,
    ims: list[torch.Tensor],
    flips: list[bool],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
) -> torch.Tensor:
    """Class probabilities (n_cls, H0, W0) of one picture given at several scales; arguments as `inference`."""
    total = torch.zeros(model.n_cls, *ori_shape)
    for im, flip in zip(ims, flips, strict=True):
        im = resize(im, window_size)
        H, W = im.shape[-2:]
        anchors = [
            (top, left)
            for top in window_anchors(H, window_size, window_stride)
            for left in window_anchors(W, window_size, window_stride)
        ]
        crops = torch.stack([im[0, :, top : top + window_size, left : left + window_size] for top, left in anchors])
        seg_maps = torch.zeros(len(crops), model.n_cls, window_size, window_size)
        with published_attention(model):
            for i in range(0, len(crops), batch_size):
                seg_maps[i : i + batch_size] = model(crops[i : i + batch_size])
        logits, count = torch.zeros(model.n_cls, H, W), torch.zeros(1, H, W)
        for seg_map, (top, left) in zip(seg_maps, anchors, strict=True):
            logits[:, top : top + window_size, left : left + window_size] += seg_map
            count[:, top : top + window_size, left : left + window_size] += 1
        logits = F.interpolate((logits / count)[None], ori_shape, mode="bilinear", align_corners=False)[0]
        total += (logits.flip(2) if flip else logits).softmax(0)
    return total / len(ims)
