"""Class colours, and the statistics of the input."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from segmenter.classes import ClassesError
from segmenter.config import NORMALIZATION
from segmenter.text_files import read_yaml

IGNORE_LABEL = 255
STATS = {name: {"mean": mean, "std": std} for name, (mean, std) in NORMALIZATION.items()}


def dataset_cat_description(
    path: str | os.PathLike, cmap: Mapping[int, Any] | Sequence[Any] | None = None
) -> tuple[list[str], dict[int, torch.Tensor]]:
    """Class names in the order of the file, and colours (3,) float32 in 0..1 by class id; IGNORE_LABEL is black.

    Args:
        path: YAML, a list of {id, name, color}. cmap: by id, the colours (0..1) of classes that have none there.
    Raises:
        ClassesError: unreadable, or an entry lacks something.
    """
    entries = read_yaml(path, ClassesError)
    if not isinstance(entries, list) or not all(isinstance(e, dict) and {"id", "name"} <= e.keys() for e in entries):
        raise ClassesError(f"{path}: expected a list of {{id, name, color}}")
    colors = {}
    for entry in entries:
        if "color" in entry:
            colors[entry["id"]] = torch.tensor(entry["color"]).float() / 255
        elif cmap is not None:
            colors[entry["id"]] = torch.as_tensor(cmap[entry["id"]]).float()
        else:
            raise ClassesError(f"{path}: class {entry['id']!r} has no color, and no cmap was given")
    colors[IGNORE_LABEL] = torch.zeros(3)
    return [entry["name"] for entry in entries], colors


def seg_to_rgb(seg: torch.Tensor, colors: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Labels (B, H, W) -> colours (B, H, W, 3) float32 on the CPU; `colors`: (3,) or (1, 3) by label."""
    seg = seg.cpu()
    rgb = torch.zeros(*seg.shape, 3)
    for label in seg.unique().tolist():
        rgb[seg == label] = colors[label].reshape(-1, 3)[0].float().cpu()
    return rgb


def rgb_normalize(x: torch.Tensor, stats: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """(3, H, W) or (B, 3, H, W) in 0..1 -> (x - mean) / std."""
    mean, std = (torch.tensor(stats[name], dtype=x.dtype, device=x.device)[:, None, None] for name in ("mean", "std"))
    return (x - mean) / std


def rgb_denormalize(x: torch.Tensor, stats: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """(B, 3, H, W) -> x * std + mean, in place."""
    mean, std = (torch.tensor(stats[name], dtype=x.dtype, device=x.device)[:, None, None] for name in ("mean", "std"))
    return x.mul_(std).add_(mean)
