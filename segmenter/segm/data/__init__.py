"""Class names, colours and statistics. The published loaders are built on mmsegmentation and are not there."""

from typing import Any

_LOADERS = ("ADE20KSegmentation", "CityscapesDataset", "ImagenetDataset", "Loader", "PascalContextDataset")


def __getattr__(name: str) -> Any:
    if name in _LOADERS:
        from segmenter.segm.data.factory import INSTEAD

        raise ImportError(f"{name} {INSTEAD}")
    raise AttributeError(f"module 'segmenter.segm.data' has no attribute {name!r}")
