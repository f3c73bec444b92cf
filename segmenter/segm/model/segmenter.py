"""The whole network."""

from segmenter.model import Segmenter

__all__ = ["Segmenter"]
