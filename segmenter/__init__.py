"""Segmenter: Transformer for Semantic Segmentation (Strudel et al., ICCV 2021).

Importing this package loads nothing but itself; each public name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "accelerate": "segmenter.acceleration",
    "restore": "segmenter.acceleration",
    "Segmenter": "segmenter.model",
    "create_segmenter": "segmenter.model",
    "load_model": "segmenter.pretrained",
    "load_any": "segmenter.pretrained",
    "segment_image": "segmenter.segment",
    "segment_stream": "segmenter.stream",
    "preset": "segmenter.config",
    "preset_names": "segmenter.config",
}
__all__ = [
    "Segmenter",
    "__version__",
    "accelerate",
    "create_segmenter",
    "load_any",
    "load_model",
    "preset",
    "preset_names",
    "restore",
    "segment_image",
    "segment_stream",
]

if TYPE_CHECKING:
    from segmenter.acceleration import accelerate, restore
    from segmenter.config import preset, preset_names
    from segmenter.model import Segmenter, create_segmenter
    from segmenter.pretrained import load_any, load_model
    from segmenter.segment import segment_image
    from segmenter.stream import segment_stream


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'segmenter' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
