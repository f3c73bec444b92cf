"""The augmentation of the published training: resize, crop, flip, photometric distortion, normalise, pad.

Order and figures are those of mmsegmentation 0.x as the published code configures it (Segmenter repository,
segm/data/config; specified in the paper, section 4.1). Images are resized and padded by torchvision; cropping by
class share and the distortion are not in it as the recipe has them, so they are here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from segmenter.inference.images import normalize

BRIGHTNESS = 32  # +- grey levels
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # +- of 180
CROP_DRAWS = 10


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image and its labels. A call is random only in the generator that it is given.

    Args:
        crop_size: side of the square that comes out, pixels.
        im_size: the image's short side becomes ratio * im_size, with a random ratio; its long side at most
            ratio * max_ratio * im_size. None: the image's own size times the ratio. scale: (low, high) of the ratio,
            uniform.
        normalization: "vit" or "deit". ignore_index: the label of pixels that do not count, and of the padding.
        cat_max_ratio: a crop is drawn again, up to ten times, while one class has this share of it or more.
        flip: probability of mirroring. photometric: whether colours are distorted.
    """

    crop_size: int
    im_size: int | None
    max_ratio: float = 4.0
    scale: tuple[float, float] = (0.5, 2.0)
    normalization: str = "vit"
    ignore_index: int = 255
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True

    def __call__(
        self, pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (H, W, 3) uint8 and labels (H, W) -> (3, crop, crop) float32, normalised, and (crop, crop) int64."""
        ratio = rng.uniform(*self.scale)
        short, long = sorted(pixels.shape[:2])
        if self.im_size is not None:
            short, long = self.im_size, self.im_size * self.max_ratio
        size = resized(pixels.shape[:2], ratio * short, ratio * long)
        labels = resize_labels(labels, size)
        top, left = self._corner(labels, rng)
        window = np.s_[top : top + self.crop_size, left : left + self.crop_size]
        pixels, labels = resize_pixels(pixels, size)[window], labels[window]
        if rng.random() < self.flip:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if self.photometric:
            pixels = distort(pixels, rng)
        return self.finish(pixels, labels)

    def finish(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalises, then pads on the right and at the bottom: the image with zeros, the mean colour."""
        from torchvision.transforms.v2.functional import pad

        h, w = labels.shape
        border = [0, 0, self.crop_size - w, self.crop_size - h]
        im = normalize(np.ascontiguousarray(pixels), self.normalization, rounded=True)
        target = torch.from_numpy(labels.astype(np.int64))
        return pad(im, border, fill=0.0), pad(target[None], border, fill=self.ignore_index)[0]

    def nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands for a sample that is left out: no pixel of it counts."""
        labels = torch.full((self.crop_size, self.crop_size), self.ignore_index)
        return torch.zeros(3, self.crop_size, self.crop_size), labels

    def _corner(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """(top, left) of the crop: the first with more than one class and none with too large a share, or the last."""
        h, w = labels.shape
        for _ in range(CROP_DRAWS):
            top = int(rng.integers(max(h - self.crop_size, 0) + 1))
            left = int(rng.integers(max(w - self.crop_size, 0) + 1))
            if self.cat_max_ratio >= 1:
                break
            crop = labels[top : top + self.crop_size, left : left + self.crop_size]
            counts = np.bincount(crop[crop != self.ignore_index])
            if np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return top, left


def resized(shape: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """(H, W) that keeps the proportions and fits in short x long, pixels, as mmcv's `imrescale` rounds."""
    short, long = int(short), int(long)
    factor = min(long / max(shape), short / min(shape))
    return max(int(shape[0] * factor + 0.5), 1), max(int(shape[1] * factor + 0.5), 1)


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear and without antialiasing, as OpenCV's, on bytes (H, W, 3); the fast one of torchvision for bytes.

    Its last grey level depends on the processor. Evaluation, which must not, computes in floats
    (`segmenter.evaluation.evaluate`).
    """
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    if pixels.shape[:2] == size:
        return pixels
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return resize(channels_first, list(size), InterpolationMode.BILINEAR, antialias=False).permute(1, 2, 0).numpy()


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour as OpenCV's and F.interpolate's "nearest": source index floor(i * old / new)."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(labels.shape, size, strict=True))
    return labels[rows[:, None], columns]


def distort(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmsegmentation's PhotoMetricDistortion of bytes (H, W, 3), RGB; each step with probability 1/2, cut to bytes.

    Brightness, contrast (at the start or at the end), saturation, hue. HSV is Pillow's, with hues in 256 steps where
    OpenCV has 180.
    """
    if rng.random() < 0.5:
        pixels = _to_bytes(pixels + np.float32(rng.uniform(-BRIGHTNESS, BRIGHTNESS)))
    contrast = np.float32(rng.uniform(*CONTRAST)) if rng.random() < 0.5 else None
    contrast_first = rng.random() < 0.5
    if contrast is not None and contrast_first:
        pixels = _to_bytes(pixels * contrast)
    saturation = np.float32(rng.uniform(*SATURATION)) if rng.random() < 0.5 else None
    hue = int(rng.integers(-HUE, HUE + 1)) if rng.random() < 0.5 else 0
    if saturation is not None or hue:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if saturation is not None:
            hsv[..., 1] = _to_bytes(hsv[..., 1] * saturation)
        hsv[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # bytes wrap around, as hues do
        pixels = np.array(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))
    if contrast is not None and not contrast_first:
        pixels = _to_bytes(pixels * contrast)
    return pixels


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)
