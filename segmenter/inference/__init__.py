"""From images to labels: reading, windows, merging, labels without logits, streams of images, CUDA graphs."""

from segmenter.inference.merge import inference
from segmenter.inference.windows import window_anchors

__all__ = ["inference", "window_anchors"]
