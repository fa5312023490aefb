"""Whole-slide pathology: slides and annotations to a classifier, heatmaps and a FROC report."""

__version__ = "0.2.0"
