"""The published way from an image to labels, in plain PyTorch: what ours is compared with, in tests and benchmarks.

Score matrices are written out in attention, every window is upsampled to full resolution, all windows are kept, and the
(n_cls, H, W) map is merged, resized and put through a softmax before the argmax. Written from the description of
github.com/rstrudel/segmenter in our own words; `tests/test_golden.py` checks it against the golden cases.
"""

import itertools

import torch
import torch.nn.functional as F

from bench.providers import PUBLISHED, using
from segmenter.inference.windows import resize, window_anchors
from segmenter.ops import Operators


@torch.no_grad()
def published_inference(
    model: torch.nn.Module,
    ims: list[torch.Tensor],
    flips: list[bool],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
    ops: Operators = PUBLISHED,
) -> torch.Tensor:
    """Class probabilities (n_cls, H0, W0) of one image given at several scales; arguments as `inference`.

    `ops` are explicit score matrices unless something else is to be compared.
    """
    total = torch.zeros(model.n_cls, *ori_shape)
    for im, flip in zip(ims, flips, strict=True):
        im = resize(im, window_size)
        H, W = im.shape[-2:]
        anchors = list(itertools.product(*(window_anchors(side, window_size, window_stride) for side in (H, W))))
        crops = torch.stack([im[0, :, top : top + window_size, left : left + window_size] for top, left in anchors])
        seg_maps = torch.zeros(len(crops), model.n_cls, window_size, window_size)
        with using(model, ops):
            for i in range(0, len(crops), batch_size):
                seg_maps[i : i + batch_size] = model(crops[i : i + batch_size])
        logits, count = torch.zeros(model.n_cls, H, W), torch.zeros(1, H, W)
        for seg_map, (top, left) in zip(seg_maps, anchors, strict=True):
            logits[:, top : top + window_size, left : left + window_size] += seg_map
            count[:, top : top + window_size, left : left + window_size] += 1
        logits = F.interpolate((logits / count)[None], ori_shape, mode="bilinear", align_corners=False)[0]
        total += (logits.flip(2) if flip else logits).softmax(0)
    return total / len(ims)
