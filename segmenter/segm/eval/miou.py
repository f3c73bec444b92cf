"""The core of the published mIoU script. The whole of it is `segmenter eval`."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from segmenter.segm.model.utils import inference


def blend_im(im: np.ndarray, seg: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Two images (H, W, 3) of bytes laid over each other; alpha 0 is `im`, 1 is `seg`."""
    return np.asarray(Image.blend(Image.fromarray(im), Image.fromarray(seg), alpha))


def process_batch(
    model: torch.nn.Module, batch: dict[str, Any], window_size: int, window_stride: int, window_batch_size: int
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Labels of one image.

    Args:
        model: for `inference`, or that in DistributedDataParallel.
        batch: as a DataLoader with batches of one puts it together: "im", views (1, 3, h, w); "im_metas", for each a
            dict of flip, ori_shape (height, width) and ori_filename [name].
    Returns:
        (file name, the last view at the image's own size (1, 3, H, W), labels (H, W)), both on the CPU.
    """
    ims, metas = batch["im"], batch["im_metas"]
    ori_shape = tuple(int(side) for side in metas[0]["ori_shape"])
    model = getattr(model, "module", model)
    scores = inference(model, ims, metas, ori_shape, window_size, window_stride, window_batch_size)
    im = F.interpolate(ims[-1], ori_shape, mode="bilinear")
    return metas[0]["ori_filename"][0], im.cpu(), scores.argmax(0).cpu()
