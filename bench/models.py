"""What is timed: models, pictures, and the ways (providers) from a picture's bytes to its labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.published import published_inference
from segmenter.config import preset
from segmenter.images import normalize
from segmenter.model import Segmenter, create_segmenter
from segmenter.pretrained import from_pretrained

ROOT = Path(__file__).parent.parent
SHIPPED = "camvid-seg-s-16"
SIZE = 512
N_CLS = 150


def build(name: str) -> Segmenter:
    """A preset with seeded random weights, 150 classes, windows of 512; or the shipped model by its folder's name."""
    if name == SHIPPED:
        return from_pretrained(ROOT / "examples" / name)
    torch.manual_seed(0)
    model = create_segmenter(preset(name, n_cls=N_CLS, image_size=SIZE)).eval()
    model.info.window_size = model.info.window_stride = SIZE
    return model


def picture(size: int | None = SIZE) -> np.ndarray:
    """The street photograph of examples/, uint8 (H, W, 3), resized to a square of `size` unless that is None."""
    image = Image.open(ROOT / "examples" / "street.jpg").convert("RGB")
    return np.asarray(image if size is None else image.resize((size, size), Image.BICUBIC))


def _published(model: Segmenter, pixels: np.ndarray) -> torch.Tensor:
    im = normalize(pixels, model.info.normalization)[None]
    sizes = (model.info.window_size, model.info.window_stride, 1)
    return published_inference(model, [im], [False], pixels.shape[:2], *sizes).argmax(0)


PROVIDERS: dict[str, Callable[[Segmenter, np.ndarray], torch.Tensor]] = {
    "published": _published,
    "eager-fp32": lambda model, pixels: model.segment(pixels),
    "eager-bf16": lambda model, pixels: model.segment(pixels, dtype="bfloat16"),
}
