"""Training runs that take a second: a tiny model on tiny images."""

import json
from pathlib import Path
from typing import Any

import torch

from segmenter.training.checkpoint import CHECKPOINT, LOG
from segmenter.training.recipe import Recipe
from tests.support.data_sets import make_data_set
from tests.support.tiny import tiny_model

N = 5  # images of each split: three steps an epoch, of which the last one wraps around


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """Two epochs of three steps, with everything that is random; data set and first model are made in `folder`."""
    if not (folder / "model").is_dir():
        make_data_set(folder / "data", n=N)
        tiny_model(image_size=(32, 32)).save_pretrained(folder / "model")
    settings = {
        "data": str(folder / "data"), "model": str(folder / "model"), "crop_size": 32, "epochs": 2, "batch_size": 2,
        "learning_rate": 0.02, "dropout": 0.1, "drop_path": 0.3, "ema": 0.9, "workers": 0, "log_steps": 1,
        "overlays": 1,
    }  # fmt: skip
    return Recipe(**{**settings, **changes})


def read_checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / CHECKPOINT, weights_only=True)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit; `recipe`, which tells how the files were made, left out."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = [n for n in {**a, **b} if (place, n) != ("", "recipe")]
        return [d for n in names for d in differences(a.get(n), b.get(n), f"{place}/{n}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    return [] if type(a) is type(b) and a == b else [place]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def log_of(output):
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]
