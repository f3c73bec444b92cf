"""EoMT (Kerssies et al., CVPR 2025) of Hugging Face transformers, from a local folder, on our kernels."""

from segmenter.eomt.load import is_eomt, load_eomt
from segmenter.eomt.model import Eomt

__all__ = ["Eomt", "is_eomt", "load_eomt"]
