"""Padding, windows, position embeddings: the published functions, with their names and arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segmenter import layers
from segmenter.guard import why_not_bypass
from segmenter.inference import merge
from segmenter.inference import windows as ours
from segmenter.layers import init_weights
from segmenter.model import Segmenter

__all__ = [
    "checkpoint_filter_fn",
    "inference",
    "init_weights",
    "merge_windows",
    "num_params",
    "padding",
    "resize",
    "resize_pos_embed",
    "sliding_window",
    "unpadding",
]


def padding(im: torch.Tensor, patch_size: int, fill_value: float = 0) -> torch.Tensor:
    """(B, C, H, W), padded on the right and at the bottom to multiples of `patch_size`."""
    return layers.pad_to_multiple(im, patch_size, fill_value)


def unpadding(y: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W), cut on the right and at the bottom to `target_size` (height, width)."""
    return y[:, :, : target_size[0], : target_size[1]]


def resize(im: torch.Tensor, smaller_size: int) -> torch.Tensor:
    """(B, C, h, w), enlarged so that its shorter side is `smaller_size`; never made smaller."""
    return ours.resize(im, smaller_size)


def resize_pos_embed(
    posemb: torch.Tensor,
    grid_old_shape: tuple[int, int] | None,
    grid_new_shape: tuple[int, int],
    num_extra_tokens: int,
) -> torch.Tensor:
    """(1, num_extra_tokens + old patches, d) -> the same for the new grid, bilinear; `grid_old_shape` None is square.

    Raises:
        ValueError: the old grid does not have that many patches.
    """
    return layers.resize_pos_embed(posemb, grid_old_shape, grid_new_shape, num_extra_tokens)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """The weights of an encoder, out of {"model": weights} if need be, positions resized to the encoder `model`."""
    weights = dict(state_dict.get("model", state_dict))
    positions = weights.get("pos_embed")
    if positions is not None and positions.shape != model.pos_embed.shape:
        n_extra = 1 + ("dist_token" in weights)
        weights["pos_embed"] = resize_pos_embed(positions, None, model.patch_embed.grid_size, n_extra)
    return weights


def sliding_window(im: torch.Tensor, flip: Any, window_size: int, window_stride: int) -> dict[str, Any]:
    """Square windows over (B, C, H, W), the last of each row and column flush with the end.

    Returns:
        crop: views (B, C, window_size, window_size), row by row. anchors: (top, left) of each. flip: as given.
        shape: (H, W).
    Raises:
        ValueError: the image is smaller than a window, or the stride leaves pixels out.
    """
    tops, lefts = (ours.window_anchors(length, window_size, window_stride) for length in im.shape[-2:])
    anchors = [(top, left) for top in tops for left in lefts]
    crops = [im[:, :, top : top + window_size, left : left + window_size] for top, left in anchors]
    return {"crop": crops, "anchors": anchors, "flip": flip, "shape": tuple(im.shape[-2:])}


def merge_windows(windows: Mapping[str, Any], window_size: int, ori_shape: tuple[int, int]) -> torch.Tensor:
    """Scores of windows -> class probabilities (n_cls, *ori_shape).

    Overlapping windows are averaged in float32, the mean is resized to `ori_shape`, mirrored back if "flip", then
    softmax.

    Args:
        windows: what `sliding_window` gave, and "seg_maps" (windows, n_cls, window_size, window_size).
    """
    maps = windows["seg_maps"]
    scores = torch.zeros(maps.shape[1], *windows["shape"], device=maps.device)  # float32 for half types, too
    count = torch.zeros(windows["shape"], device=maps.device)
    for (top, left), window in zip(windows["anchors"], maps, strict=True):
        place = (..., slice(top, top + window_size), slice(left, left + window_size))
        scores[place] += window
        count[place] += 1
    scores = F.interpolate((scores / count)[None], tuple(ori_shape), mode="bilinear")[0]
    return (scores.flip(2) if windows["flip"] else scores).softmax(dim=0)


def inference(
    model: torch.nn.Module,
    ims: Sequence[torch.Tensor],
    ims_metas: Sequence[Mapping[str, Any]],
    ori_shape: tuple[int, int],
    window_size: int,
    window_stride: int,
    batch_size: int,
) -> torch.Tensor:
    """Class probabilities (n_cls, *ori_shape) of one image from one or more views of it, on the model's device.

    A `Segmenter` goes the way of `segmenter.inference.merge.inference`, in little memory. Any other model with
    `n_cls`, or one whose forward is not the class's own, is called with windows (b, 3, window_size, window_size) for
    their logits.

    Args:
        ims: views (1, 3, h, w), normalised. ims_metas: of each, "flip": whether it is mirrored.
        ori_shape: (height, width). window_size, window_stride: pixels. batch_size: windows a call.
    """
    if why_not_bypass(model, (Segmenter,)) is None:
        return merge.inference(model, ims, ims_metas, ori_shape, window_size, window_stride, batch_size)
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    device, total = next((p.device for p in parameters), ims[0].device), 0
    for im, meta in zip(ims, ims_metas, strict=True):
        im = resize(im.to(device), window_size)
        windows = sliding_window(im, bool(meta["flip"]), window_size, window_stride)
        crops = torch.cat(windows.pop("crop"))
        with torch.no_grad():
            windows["seg_maps"] = torch.cat([model(part).float() for part in crops.split(batch_size)])
        total = total + merge_windows(windows, window_size, ori_shape)
    return total / len(ims)


def num_params(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
