"""Parts of the transformer."""

from segmenter.layers import Attention, Block, DropPath
from segmenter.layers import Mlp as FeedForward

__all__ = ["Attention", "Block", "DropPath", "FeedForward"]
