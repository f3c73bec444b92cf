"""Models from configurations and checkpoints."""

from segmenter.model import create_decoder, create_segmenter, create_vit
from segmenter.weights.load import load_model

__all__ = ["create_decoder", "create_segmenter", "create_vit", "load_model"]
