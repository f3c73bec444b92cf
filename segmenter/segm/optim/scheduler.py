"""The schedule."""

from segmenter.training.schedule import PolynomialLR

__all__ = ["PolynomialLR"]
