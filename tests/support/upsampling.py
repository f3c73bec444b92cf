"""Masks to label, and what the labels must be: F.interpolate's arithmetic written out, for any size and device.

The device of the masks says whose arithmetic; what is computed is on the CPU.
"""

import numpy as np
import torch
import torch.nn.functional as F

from segmenter.kernels.reference import label_dtype
from segmenter.kernels.upsample_tiles import rounds_product


def fma(a, b, c):
    """float32 a * b + c, rounded once."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def weights(n_in, n_out, rounded):
    """(low cells, high cells, weights of the high ones) of bilinear upsampling without align_corners."""
    scale, pixels = np.float32(n_in) / np.float32(n_out), np.arange(n_out, dtype=np.float32) + np.float32(0.5)
    source = scale * pixels - np.float32(0.5) if rounded else fma(scale, pixels, np.float32(-0.5))
    source = np.maximum(source, 0)
    low = np.minimum(source.astype(np.int64), n_in - 1)
    return low, np.minimum(low + 1, n_in - 1), np.clip(source - low.astype(np.float32), 0, 1)


def upsampled(masks, size):
    """(..., h, w, K) -> (..., H, W, K) float32."""
    x, rounded = masks.float().cpu().numpy(), rounds_product(masks.device.type)
    (y0, y1, h), (x0, x1, w) = weights(x.shape[-3], size[0], rounded), weights(x.shape[-2], size[1], rounded)
    h, w = h[:, None, None], w[:, None]
    top, bottom = x[..., y0, :, :], x[..., y1, :, :]
    top, bottom = (fma(1 - w, row[..., x0, :], w * row[..., x1, :]) for row in (top, bottom))
    return torch.from_numpy(fma(1 - h, top, h * bottom))


def expected_scores(masks, tops, lefts, size, window, shape):
    """(B, H, W, K) of windows' masks (B, n, gh, gw, K), averaged where windows overlap."""
    logits = upsampled(masks, size)[..., : window[0], : window[1], :]
    total, count = torch.zeros(len(masks), *shape, masks.shape[-1]), torch.zeros(*shape, 1)
    for i, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        total[:, top : top + window[0], left : left + window[1]] += logits[:, i]
        count[top : top + window[0], left : left + window[1]] += 1
    return total / count


def expected_labels(masks, *geometry):
    """Labels (B, H, W): the lowest class among equals."""
    return expected_scores(masks, *geometry).argmax(-1).to(label_dtype(masks.shape[-1]))


def random_masks(B, h, w, K, seed=0, scale=1.0):
    """Noise: nearly all classes can win everywhere."""
    return torch.randn(B, h, w, K, generator=torch.Generator().manual_seed(seed)) * scale


def smooth_masks(B, h, w, K, seed=0):
    """Regions of one class with a little noise, as trained models give."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(B, K, max(2, h // 4), max(2, w // 4), generator=generator)
    region = F.interpolate(coarse, (h, w), mode="bicubic").argmax(1)
    return F.one_hot(region, K) * 4.0 + torch.randn(B, h, w, K, generator=generator) * 0.3


def tied_masks(B, h, w, K, seed=0):
    """Small integers, and every class twice where K allows: equals everywhere."""
    masks = torch.randint(-2, 3, (B, h, w, K), generator=torch.Generator().manual_seed(seed)).float()
    masks[..., K // 2 : K // 2 * 2] = masks[..., : K // 2]
    return masks


def close_masks(B, h, w, K, seed=0):
    """All classes within a few roundings of each other, at magnitudes from subnormal to 1e30."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(B, h, w, 1, generator=generator)
    base = base * 10.0 ** torch.randint(-44, 30, (B, 1, 1, 1), generator=generator)
    steps = torch.randint(-3, 4, (B, h, w, K), generator=generator)
    return base.expand(-1, -1, -1, K) * (1 + steps * 2.0**-23)


def near_masks(B, h, w, K, seed=0, scale=1.0):
    """The last class best in every cell, by the least that numbers can differ: rounding makes many pixels equals."""
    best = (1 + torch.rand(B, h, w, 1, generator=torch.Generator().manual_seed(seed))) * scale
    return torch.cat([torch.nextafter(best, torch.zeros(())).expand(-1, -1, -1, K - 1), best], -1)


def subnormal_masks(B, h, w, K, seed=0):
    return near_masks(B, h, w, K, seed, 1e-42)


MASKS = {
    "random": random_masks,
    "smooth": smooth_masks,
    "tied": tied_masks,
    "close": close_masks,
    "near": near_masks,
    "subnormal": subnormal_masks,
}

WINDOWS = [  # tops, lefts, cells, size, window, shape
    ((0, 16), (0,), 4, 32, 32, (48, 32)),
    ((0, 11, 13), (0, 9), 2, 16, 16, (29, 25)),  # flush with the end, at odd places; up to six windows over a pixel
    ((0, 5), (0, 6, 12), 2, 16, 13, (18, 25)),  # windows that are padded
]
