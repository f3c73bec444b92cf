"""Scores on data sets, charts of them, and models beside each other."""
