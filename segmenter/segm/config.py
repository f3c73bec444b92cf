"""The settings of the published config.yml."""

import dataclasses
from typing import Any

from segmenter.config import BACKBONES, DECODERS
from segmenter.data.datasets import PUBLISHED


def load_config() -> dict[str, Any]:
    """{"model": backbones, "decoder": decoders, "dataset": training and evaluation on each}, each by name; one's own
    to change."""
    datasets = {name: dataclasses.asdict(settings) for name, settings in PUBLISHED.items()}
    for settings in datasets.values():
        del settings["max_ratio"]  # of the data sets' own files
    return {
        "model": {name: dataclasses.asdict(backbone) for name, backbone in BACKBONES.items()},
        "decoder": {name: dict(kwargs) for name, kwargs in DECODERS.items()},
        "dataset": datasets,
    }
