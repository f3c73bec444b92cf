"""Segmenter: Transformer for Semantic Segmentation (Strudel et al., ICCV 2021).

Importing this package loads nothing but itself; each public name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "accelerate": "segmenter.dropin.accelerate",
    "restore": "segmenter.dropin.accelerate",
    "attention": "segmenter.analysis.maps",
    "attention_statistics": "segmenter.analysis.statistics",
    "Segmenter": "segmenter.model",
    "create_segmenter": "segmenter.model",
    "load_eomt": "segmenter.eomt.load",
    "load_model": "segmenter.weights.load",
    "load_any": "segmenter.weights.load",
    "push_to_hub": "segmenter.weights.hub",
    "segment_image": "segmenter.inference.segment",
    "segment_stream": "segmenter.inference.stream",
    "preset": "segmenter.config",
    "preset_names": "segmenter.config",
    # what the published code has besides: docs/drop-in.md
    "DecoderLinear": "segmenter.decoder",
    "MaskTransformer": "segmenter.decoder",
    "VisionTransformer": "segmenter.encoder",
    "create_decoder": "segmenter.model",
    "create_vit": "segmenter.model",
    "IGNORE_LABEL": "segmenter.segm.data.utils",
    "STATS": "segmenter.segm.data.utils",
    "dataset_cat_description": "segmenter.segm.data.utils",
    "seg_to_rgb": "segmenter.segm.data.utils",
    "compute_metrics": "segmenter.segm.metrics",
    "gather_data": "segmenter.segm.metrics",
    "checkpoint_filter_fn": "segmenter.segm.model.utils",
    "init_weights": "segmenter.segm.model.utils",
    "merge_windows": "segmenter.segm.model.utils",
    "num_params": "segmenter.segm.model.utils",
    "padding": "segmenter.segm.model.utils",
    "resize": "segmenter.segm.model.utils",
    "resize_pos_embed": "segmenter.segm.model.utils",
    "sliding_window": "segmenter.segm.model.utils",
    "unpadding": "segmenter.segm.model.utils",
}
__all__ = [
    "IGNORE_LABEL",
    "STATS",
    "DecoderLinear",
    "MaskTransformer",
    "Segmenter",
    "VisionTransformer",
    "__version__",
    "accelerate",
    "attention",
    "attention_statistics",
    "checkpoint_filter_fn",
    "compute_metrics",
    "create_decoder",
    "create_segmenter",
    "create_vit",
    "dataset_cat_description",
    "gather_data",
    "init_weights",
    "load_any",
    "load_eomt",
    "load_model",
    "merge_windows",
    "num_params",
    "padding",
    "preset",
    "preset_names",
    "push_to_hub",
    "resize",
    "resize_pos_embed",
    "restore",
    "seg_to_rgb",
    "segment_image",
    "segment_stream",
    "sliding_window",
    "unpadding",
]

if TYPE_CHECKING:
    from segmenter.analysis.maps import attention
    from segmenter.analysis.statistics import attention_statistics
    from segmenter.config import preset, preset_names
    from segmenter.decoder import DecoderLinear, MaskTransformer
    from segmenter.dropin.accelerate import accelerate, restore
    from segmenter.encoder import VisionTransformer
    from segmenter.eomt.load import load_eomt
    from segmenter.inference.segment import segment_image
    from segmenter.inference.stream import segment_stream
    from segmenter.model import Segmenter, create_decoder, create_segmenter, create_vit
    from segmenter.segm.data.utils import IGNORE_LABEL, STATS, dataset_cat_description, seg_to_rgb
    from segmenter.segm.metrics import compute_metrics, gather_data
    from segmenter.segm.model.utils import (
        checkpoint_filter_fn,
        init_weights,
        merge_windows,
        num_params,
        padding,
        resize,
        resize_pos_embed,
        sliding_window,
        unpadding,
    )
    from segmenter.weights.hub import push_to_hub
    from segmenter.weights.load import load_any, load_model


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'segmenter' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
