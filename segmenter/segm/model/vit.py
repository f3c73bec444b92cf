"""The encoder."""

from segmenter.encoder import VisionTransformer
from segmenter.layers import PatchEmbed as PatchEmbedding

__all__ = ["PatchEmbedding", "VisionTransformer"]
