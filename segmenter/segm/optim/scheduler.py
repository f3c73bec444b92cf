"""The schedule."""

from segmenter.schedule import PolynomialLR

__all__ = ["PolynomialLR"]
