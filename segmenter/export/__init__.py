"""Exports: a file that turns uint8 images into labels, for programs that do not have this package."""

from segmenter.export.check import Agreement, ExportError, ExportReport, check_file, export_model

__all__ = ["Agreement", "ExportError", "ExportReport", "check_file", "export_model"]
