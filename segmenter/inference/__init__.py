"""From images to labels: reading, windows, merging, labels without logits, streams of images, CUDA graphs."""

from segmenter.inference.windows import inference, window_anchors

__all__ = ["inference", "window_anchors"]
