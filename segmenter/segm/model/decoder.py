"""The decoders."""

from segmenter.decoder import DecoderLinear, MaskTransformer

__all__ = ["DecoderLinear", "MaskTransformer"]
