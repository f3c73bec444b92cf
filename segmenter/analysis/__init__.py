"""Looking inside: where tokens attend to, as maps and as numbers, on whole images and at any length."""

from segmenter.analysis.maps import AttentionMaps, attention
from segmenter.analysis.statistics import AttentionStatistics, attention_statistics
from segmenter.analysis.subject import AnalysisError

__all__ = ["AnalysisError", "AttentionMaps", "AttentionStatistics", "attention", "attention_statistics"]
