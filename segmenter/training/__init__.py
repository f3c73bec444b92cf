"""Training: the published recipe and what people add to it. `segmenter train`, or `segmenter.training.loop.train`."""
